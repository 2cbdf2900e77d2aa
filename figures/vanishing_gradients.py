"""Draws ``analysis/results/vanishing_gradients``: what EXO's vanishing gradients cost, and where."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from figures import style

LOSSES = ("exo_rw", "dpo_rw", "exo_pref", "dpo_pref")
METHODS = style.METHODS
CAPTIONS = {
    "vanishing_gradients": """\
Vanishing gradients, exactly. (a) Size of each loss's gradient with respect to the margin of one pair, the difference
of its scaled log ratios, in closed form; EXO-rw and DPO-rw at a difference of rewards of 2 nats, EXO-pref and DPO on
one label (colours as in b); dips: the loss's own target. (b) Time of gradient flow on the margin from a misordered
pair to even odds, in closed form (lines), and steps of gradient descent times their rate (markers, where few enough
were needed). (c, d) Training of a full table under expected losses until J has made up nine tenths of what it lacks,
from a start that gives e^-w to the completion to which π* gives most: steps of gradient descent at the rate 1/L, L the
largest curvature on the path (time of gradient flow times L). (c) The reference is as wrong as
the policy, all margins start at zero. (d) Only the policy is wrong, against an even reference. K = 2 where not said;
"many": more candidates. On Bradley-Terry labels DPO is DPO-rw at K = 2. (e, f) The same with Adam at one rate; curves
end where the most steps allowed did not do.
""",
}


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """One page of six panels."""
    numbers, config = results.numbers, results.config
    many = f", K = {config['many']}"
    looks = {
        "exo_rw": METHODS["exo_rw"],
        "exo_pref": METHODS["exo_pref"],
        "dpo_pref": replace(METHODS["dpo_pref"], label="DPO-pref, DPO-rw"),
        "exo_rw_many": replace(METHODS["exo_rw"], label="EXO-rw" + many, linestyle=":", marker="P"),
        "dpo_rw_many": replace(METHODS["dpo_rw"], label="DPO-rw" + many, linestyle=":", marker="X"),
        "reverse_kl": replace(METHODS["rl"], label=r"$\mathrm{KL}(\pi_\theta\|\pi^*)$: RL, $K\to\infty$ of EXO"),
        "forward_kl": replace(
            METHODS["forward_kl"], linestyle="-.", label=r"$\mathrm{KL}(\pi^*\|\pi_\theta)$: $K\to\infty$ of DPO"
        ),
    }
    figure, axes = plt.subplots(3, 2, figsize=(style.PAGE, 7.6))
    _gradients(axes[0, 0], results.arrays)
    _corrections(axes[0, 1], numbers["correction"], config)
    for row, (name, label) in enumerate((("steps", "steps of gradient descent"), ("adam_steps", "steps of Adam")), 1):
        for ax, scenario in zip(axes[row], ("reference", "policy"), strict=True):
            for training, look in looks.items():
                _training(ax, numbers["training"], scenario, training, name, look)
            letter = "cdef"[2 * (row - 1) + (scenario == "policy")]
            wrong = "reference wrong" if scenario == "reference" else "only the policy wrong"
            ax.set(yscale="log", xlabel="w, how wrong the start is (nats)", ylabel=label, title=f"({letter}) {wrong}")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7, title="panels c to f")
    paths = style.save(figure, "vanishing_gradients", out_dir)
    plt.close(figure)
    return paths


def _gradients(ax: Axes, arrays: dict[str, np.ndarray]) -> None:
    margin = arrays["margin"]
    for name in LOSSES:
        size = np.abs(arrays[f"gradient_{name}"])
        # A logarithmic axis has no zero; the line is broken there.
        ax.plot(margin, np.where(size > 0, size, np.nan), **METHODS[name].line(markers=False))
    ax.set(yscale="log", ylim=(1e-13, 4), xlabel="margin (nats)", ylabel="size of d loss / d margin")
    ax.set_title("(a) gradient of a pair")


def _corrections(ax: Axes, correction: dict[str, Any], config: dict[str, Any]) -> None:
    misordered = np.array(config["misordered"])
    for name in LOSSES:
        ax.plot(misordered, correction[name]["time"], **METHODS[name].line(markers=False))
        time = np.array(correction[name]["steps"]) * config["descent_rate"]
        found = np.isfinite(time)
        ax.plot(misordered[found], time[found], **METHODS[name].line(linestyle="none", label=None))
    ax.set(yscale="log", xlabel="misordered by (nats of margin)", ylabel="time to even odds")
    ax.set_title("(b) correction of a pair")
    ax.legend(fontsize=7, loc="upper left")


def _training(ax: Axes, found: list[dict[str, Any]], scenario: str, training: str, name: str, look: style.Look) -> None:
    own = [case for case in found if (case["scenario"], case["training"]) == (scenario, training)]
    own = sorted((case for case in own if np.isfinite(case[name])), key=lambda case: case["wrong"])
    ax.plot([case["wrong"] for case in own], [case[name] for case in own], **look.line())


if __name__ == "__main__":
    style.main("vanishing_gradients")
