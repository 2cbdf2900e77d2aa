"""Draws ``analysis/results/alpha_divergences``: optima along the family from DPO-rw to EXO-rw, and beyond."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes

from figures import style

CAPTIONS = {
    "alpha_divergences": """\
The α-divergences D_α(π_θ‖π*) from KL(π*‖π_θ) at α = 0 (DPO-rw) to KL(π_θ‖π*) at α = 1 (EXO-rw), dotted, and beyond:
exact optima of a policy without memory on the sequences with two planted modes, at the reported β. (a) Probability of
the two modes at the best minimum found, K → ∞ (black lines: what π* gives them). (b) Probability of the better mode at
the best minimum of the exactly expected loss at K candidates. (c) Share of the gain J(π*) − J(π_ref) of the same
optima; stars: the best α of each K. (d) At the reference and with a full table, cosine of the expected gradient at K to
that of its limit (lines) and to that of KL(π_θ‖π*), RL's (dashed, hollow); α = 1 has cosine 1 to both at every K.
"""
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """One page of four panels."""
    figure, axes = plt.subplots(2, 2, figsize=(style.PAGE, 5.4))
    arrays, at = results.arrays, results.config["betas"].index(results.config["beta"])
    _limit(axes[0, 0], results, arrays["mode_masses"][at, -1])
    names = [*(f"K = {k}" for k in arrays["ks"]), "K → ∞"]
    colors = sns.color_palette("viridis_r", len(names))
    for j, name in enumerate(names):
        line: dict[str, Any] = {"color": colors[j], "marker": MARKERS[j], "markersize": 3, "linewidth": 1.1}
        share = arrays["share_of_gain"][at, j]
        axes[0, 1].plot(arrays["alphas"], arrays["mode_masses"][at, j].max(-1), label=name, **line)
        axes[1, 0].plot(arrays["alphas"], share, **line)
        best = share.argmax()
        axes[1, 0].plot(arrays["alphas"][best], share[best], "*", color=colors[j], markersize=10, mec="black", mew=0.6)
    axes[0, 1].set(ylabel="probability of the better mode", title="(b) optima at K candidates")
    axes[0, 1].legend(fontsize=6, loc="upper left")
    axes[1, 0].set(ylabel=r"share of the gain $J(\pi^*) - J(\pi_\mathrm{ref})$", title="(c) what the optima are worth")
    for ax in (axes[0, 0], axes[0, 1], axes[1, 0]):
        ax.set_xlabel(r"$\alpha$")
        for end in (0, 1):
            ax.axvline(end, color="0.5", linestyle=":", linewidth=0.9, zorder=0)
    _at_reference(axes[1, 1], results.numbers["at_reference"])
    paths = style.save(figure, "alpha_divergences", out_dir)
    plt.close(figure)
    return paths


def _limit(ax: Axes, results: style.StoredResult, masses: np.ndarray) -> None:
    for i, mass in enumerate(results.numbers["target"][str(results.config["beta"])]["mode_masses"]):
        ax.axhline(mass, color="black", linewidth=0.8, label=style.METHODS["optimal"].label if i == 0 else None)
    look = style.METHODS["exo_rw"]
    ax.plot(results.arrays["alphas"], masses[:, 0], **look.line(label="better mode", markersize=3))
    ax.plot(
        results.arrays["alphas"], masses[:, 1], **look.line(label="other mode", markersize=3, markerfacecolor="white")
    )
    ax.set(ylabel="probability of a mode", title=r"(a) optima of $D_\alpha(\pi_\theta\|\pi^*)$")
    ax.legend(fontsize=6, loc="center right", bbox_to_anchor=(1, 0.25))


def _at_reference(ax: Axes, found: list[dict[str, Any]]) -> None:
    shown = [one for one in found if one["alpha"] in (0.0, 0.5, 1.0, 1.5)]
    looks = {0.0: "dpo_rw", 0.5: "best_of_n", 1.0: "exo_rw", 1.5: "kernel"}
    for one in shown:
        look = style.METHODS[looks[one["alpha"]]]
        ks = [int(k) for k in one["cosine_to_limit"]]
        same: dict[str, Any] = {"color": look.color, "marker": look.marker}
        ax.plot(ks, list(one["cosine_to_limit"].values()), **same, label=rf"$\alpha$ = {one['alpha']:g}")
        ax.plot(ks, list(one["cosine_to_rl"].values()), **same, linestyle="--", markerfacecolor="white", linewidth=0.9)
    ax.set_xscale("log", base=2)
    ax.set_xticks(ks, [str(k) for k in ks])
    ax.set(xlabel="candidates K", ylabel="cosine", ylim=(0, 1.04), title="(d) gradients at the reference")
    ax.legend(fontsize=6, loc="lower right")


if __name__ == "__main__":
    style.main("alpha_divergences")
