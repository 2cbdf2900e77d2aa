"""Draws ``analysis/results/label_targets``: the reward that preference losses recover, and what J loses by it."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from figures import style

LABELS = {"bradley_terry": "Bradley-Terry labels", "noisy": "noisy labels", "hard": "hard labels"}
EXO, DPO = style.METHODS["exo_pref"], style.METHODS["dpo_pref"]
SMOOTHED = {**DPO.line(markers=False), "label": "DPO, smoothed", "linestyle": ":"}
# Losses told apart by marker: EXO-pref by eps, the rest by name.
MARKERS = ("o", "s", "^", "v", "P")
OTHERS = {
    "exo_retuned": ("EXO-pref, β retuned", EXO.color, "X"),
    "exo_frequency": ("EXO, labellers' share", "#0072B2", "<"),
    "exo_reward": ("EXO, true probability", "#0072B2", "*"),
    "dpo": ("DPO", DPO.color, "D"),
    "dpo_smoothed": ("DPO, smoothed", DPO.color, "d"),
}
# What is exact to rounding is drawn here: a logarithmic axis has no zero.
FLOOR = 1e-6

CAPTIONS = {
    "label_targets": """\
What preference labels target, with infinitely many of them and exactly. (a-c) Difference of implicit rewards of two
completions at the optimum against the true difference, in closed form, for labels drawn by Bradley-Terry, for such
labels with a share turned over (noisy; DPO's smoothing is of that share too), and for labels that always go to the
higher reward (hard; DPO without smoothing has no optimum there). Thin diagonal: the truth, recovered under all three by
EXO whose target carries the true probability of the label. (d) The temperature at which EXO-pref really works over its
β against the labeller's probability P, colours as above. (e) The same as (a) for all pairs of completions at
the minimiser of a full table (dots), random reward; lines: closed forms of two completions. (f) Share of the gain in J
over the reference that is missed at the optimum of each loss with a full table, by labels, a point for each reward; on
the axis: none, to rounding. Of DPO on hard labels: in the limit, all mass on the best completion.
""",
}


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """One page of six panels."""
    arrays, config = results.arrays, results.config
    eps = config["label_smoothings"]
    figure, axes = plt.subplots(2, 3, figsize=(style.PAGE * 1.3, 5.8))
    for ax, (labels, title), letter in zip(axes[0], LABELS.items(), "abc", strict=True):
        _recovered(ax, arrays, labels, eps)
        noise = f", {config['flip']:.0%} turned over" if labels == "noisy" else ""
        ax.set(xlabel="true difference of rewards (nats)", title=f"({letter}) {title}{noise}")
        ax.set_ylim(-0.3, 1.25 * config["largest_gap"])
    axes[0, 0].set_ylabel("recovered difference (nats)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=7)
    _temperature(axes[1, 0], arrays, eps)
    _pairs(axes[1, 1], arrays, config)
    _missed(axes[1, 2], results.numbers["cases"], config)
    paths = style.save(figure, "label_targets", out_dir)
    plt.close(figure)
    return paths


def _shades(eps: list[float]) -> list[Any]:
    return list(plt.get_cmap("Blues")(np.linspace(0.45, 1.0, len(eps))))


def _recovered(ax: Axes, arrays: dict[str, np.ndarray], labels: str, eps: list[float]) -> None:
    gaps = arrays["gaps"]
    ax.plot(gaps, gaps, color="black", linewidth=0.6, label="truth")
    for row, value, shade in zip(arrays[f"exo_pref|{labels}"], eps, _shades(eps), strict=True):
        ax.plot(gaps, row, color=shade, label=f"EXO-pref, ε = {value:.3g}")
    finite = np.isfinite(arrays[f"dpo|{labels}"])
    if finite.sum() > 1:
        ax.plot(gaps[finite], arrays[f"dpo|{labels}"][finite], **DPO.line(markers=False, label="DPO"))
    ax.plot(gaps, arrays[f"dpo_smoothed|{labels}"], **SMOOTHED)


def _temperature(ax: Axes, arrays: dict[str, np.ndarray], eps: list[float]) -> None:
    for row, value, shade in zip(arrays["effective_beta"], eps, _shades(eps), strict=True):
        ax.plot(arrays["probabilities"], row, color=shade, label=f"ε = {value:.3g}")
    ax.axhline(1.0, color="black", linewidth=0.6)
    ax.set(yscale="log", xlabel="P, that the label is given", ylabel="effective β / β", title="(d) temperature")
    ax.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    ax.minorticks_off()


def _pairs(ax: Axes, arrays: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    spread, gaps = max(config["spreads"]), arrays["gaps"]
    eps = config["label_smoothings"]
    ax.plot(gaps, gaps, color="black", linewidth=0.6)
    for value, row, shade in zip(eps, arrays["exo_pref|bradley_terry"], _shades(eps), strict=True):
        ax.plot(gaps, row, color=shade, linewidth=0.8)
        _dots(ax, arrays.get(f"pairs|random|{spread}|bradley_terry|exo_pref@{value:g}"), shade)
    _dots(ax, arrays.get(f"pairs|random|{spread}|bradley_terry|dpo"), DPO.color)
    ax.set(xlabel="true difference of rewards (nats)", ylabel="recovered difference (nats)")
    ax.set(title="(e) all pairs of a space", xlim=(0, config["largest_gap"]), ylim=(-1.0, 1.25 * config["largest_gap"]))


def _dots(ax: Axes, gaps: np.ndarray | None, color: Any) -> None:
    """True against recovered differences, each pair in the order of its true rewards."""
    if gaps is not None:
        sign = np.sign(gaps[0])
        ax.plot(sign * gaps[0], sign * gaps[1], linestyle="none", marker=".", markersize=2.5, color=color, alpha=0.7)


def _missed(ax: Axes, cases: list[dict[str, Any]], config: dict[str, Any]) -> None:
    eps = config["label_smoothings"]
    looks: dict[str, tuple[str, Any, str]] = {
        f"exo_pref@{value:g}": (f"EXO-pref, ε = {value:.3g}", shade, marker)
        for value, shade, marker in zip(eps, _shades(eps), MARKERS, strict=False)
    }
    looks |= OTHERS
    table = max(case["order"] for case in cases)
    for column, labels in enumerate(LABELS):
        for i, (loss, (label, color, marker)) in enumerate(looks.items()):
            values = [
                max(case["missed_gain"], FLOOR)
                for case in cases
                if (case["order"], case["labels"], case["loss"]) == (table, labels, loss)
            ]
            at = column + 0.07 * (i - (len(looks) - 1) / 2)
            look = {"color": color, "marker": marker, "markersize": 3.5, "linestyle": "none"}
            (points,) = ax.plot([at] * len(values), values, **look, label=label if column == 0 else None)
            # Those on the axis are drawn whole; a line without points has no place.
            points.set_clip_on(not values)
    ax.set_xticks(range(len(LABELS)), ["Bradley-\nTerry", "noisy\nlabels", "hard\nlabels"])
    ax.set(yscale="log", ylim=(FLOOR, None), ylabel="share of the gain in J missed", title="(f) what it costs")
    ax.legend(fontsize=5, loc="upper center", bbox_to_anchor=(0.5, -0.26), ncols=2)


if __name__ == "__main__":
    style.main("label_targets")
