"""The pictures of an evaluation. Needs the extra ``figures``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import seaborn as sns
import torch
from matplotlib.figure import Figure

from exo_toy import plots
from exo_toy.integrations.lm.records import Row

# The KL of the reference to itself.
AT_ITSELF = {"mean": 0.0, "low": None, "high": None}
NOTE = "Bars: 95 % bootstrap intervals over prompts."


def frontier(entries: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw mean reward against KL to the reference, a point per checkpoint; the reference is at KL 0.

    Args:
        entries: of the summary, the reference first.
        folder: to write ``frontier.pdf`` and ``frontier.png`` to.

    Returns:
        The files written.
    """
    with plots.theme():
        figure = Figure(figsize=(5.0, 3.0))
        ax = figure.subplots()
        # Darker from one checkpoint to the next, which grey shows as well; names beside points would cover others.
        colors = [plots.LOOKS["optimal"][1], *sns.color_palette("flare", len(entries) - 1)]
        for entry, color in zip(entries, colors, strict=True):
            reward, kl = entry["reward"], entry.get("kl", AT_ITSELF)
            ax.errorbar(
                *(kl["mean"], reward["mean"], _bars(reward), _bars(kl)),
                fmt="s" if kl is AT_ITSELF else "o",
                markersize=4,
                elinewidth=0.8,
                capsize=2,
                color=color,
                label=entry["name"],
            )
        ax.locator_params(axis="x", nbins=5)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=6)
        ax.set(xlabel=r"KL($\pi_\theta\Vert\pi_\mathrm{ref}$) in nats", ylabel="mean reward")
        figure.supxlabel(NOTE, fontsize=6, x=0.01, ha="left")
        return plots.save(figure, folder / "frontier")


def density_ratios(candidates: Sequence[Row], *, beta: float, folder: Path) -> list[Path]:
    """Draw the density ratios of a policy and of the optimal one to the reference over the reward.

    Args:
        candidates: rows of the reference's completions with rewards, ``policy_logps`` and ``ref_logps``.
        beta: strength of the KL penalty of the optimal policy.
        folder: to write ``density_ratio.pdf`` and ``density_ratio.png`` to.

    Returns:
        The files written; none where no prompt's rewards vary.
    """
    policy, ref, rewards = (
        torch.tensor([row[name] for row in candidates], dtype=torch.float64)
        for name in ("policy_logps", "ref_logps", "rewards")
    )
    names = [f"prompt {index}" for index in range(len(candidates))]
    return plots.density_ratios([(names, policy - ref, rewards)], beta=beta, folder=folder)


def _bars(measure: dict[str, Any]) -> list[list[float]] | None:
    """Distances from the mean to the ends of its interval."""
    if measure["low"] is None:
        return None
    return [[max(0.0, measure["mean"] - measure["low"])], [max(0.0, measure["high"] - measure["mean"])]]
