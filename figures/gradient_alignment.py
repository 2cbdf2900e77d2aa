"""Exact gradients of EXO-rw and DPO-rw against both divergences as K grows, and what sampling shows of them."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from figures import style

LOSSES = {"exo_rw": style.METHODS["exo"], "dpo_rw": style.METHODS["dpo"]}
LABELS = {"exo_rw": "EXO-rw", "dpo_rw": "DPO-rw"}
TARGETS = {
    "policy_to_optimal": r"$\nabla\mathrm{KL}(\pi_\theta\|\pi^*)$",
    "optimal_to_policy": r"$\nabla\mathrm{KL}(\pi^*\|\pi_\theta)$",
}
OWN_TARGET = {"exo_rw": "policy_to_optimal", "dpo_rw": "optimal_to_policy"}
CLASSES = {"table": "full table", "kgram": "bigram"}
DISTANCES = {"reference": "at the reference", "near": "near", "far": "far"}
ERROR_LIMITS = (1e-7, 5)

CAPTIONS = {
    "gradient_alignment": """\
Exact expected gradients of the K-candidate losses (nothing is sampled) against the gradients of both KL divergences.
Columns: the policy at the reference, near it and far from it, with the median KL(policy || reference) in nats over
the problems. Lines are medians over random problems, bands their full range. Strong lines with filled markers: each
loss against its own limit, for EXO-rw the gradient of KL(policy || optimal), for DPO-rw that of KL(optimal || policy).
Faint dotted lines with hollow markers: the same loss against the other's limit. Thin black: the closed-form
coefficient, ||grad c|| / (K ||limit||). At the reference EXO-rw's cosine is 1 at every K and its relative error 1/K.
""",
    "gradient_alignment_sampled": """\
What sampling shows: the gradient of the loss averaged over as many draws of K candidates as a fixed number of
completions per prompt allows (stated below the axes), against the loss's own limit, on one problem (full table, far
from the reference). Markers are medians over independent repetitions, bars hold the central 90 % of them. Lines are
the exact expectation on the same problem: the sampled error stops falling at the sampling noise, the exact one goes
on, the relative error as 1/K and 1 - cosine as its square.
""",
}


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """The exact curves, and the sampled ones beside them."""
    return [*_draw_exact(results, out_dir), *_draw_sampled(results, out_dir)]


def _draw_exact(results: style.StoredResult, out_dir: Path) -> list[Path]:
    figure, axes = plt.subplots(4, 3, figsize=(style.PAGE, 7.6), sharex=True, sharey="row")
    for column, (distance, distance_label) in enumerate(DISTANCES.items()):
        for index, (policy_class, class_label) in enumerate(CLASSES.items()):
            cosine, error = axes[2 * index, column], axes[2 * index + 1, column]
            for loss in LOSSES:
                _curves(cosine, results, f"{policy_class}.{distance}.{loss}", loss, "cosine")
                _curves(error, results, f"{policy_class}.{distance}.{loss}", loss, "relative_error")
            kl = results.number(f"median_kl_to_reference.{policy_class}.{distance}")
            place = distance_label if distance == "reference" else f"{distance_label}, KL {kl:#.2g} nats"
            cosine.set_title(f"{class_label}, {place}", fontsize=8)
            cosine.set_ylim(-0.05, 1.05)
            error.set_yscale("log")
            error.set_ylim(*ERROR_LIMITS)
            if column == 0:
                cosine.set_ylabel("cosine")
                error.set_ylabel("relative error")
        _candidates_axis(axes[-1, column], results.arrays["k"])
    figure.legend(handles=_legend(), loc="outside upper center", ncols=3)
    paths = style.save(figure, "gradient_alignment", out_dir)
    plt.close(figure)
    return paths


def _curves(ax: Axes, results: style.StoredResult, key: str, loss: str, quantity: str) -> None:
    """Median and range over problems against both targets; of the error also its closed form."""
    k, look = results.arrays["k"], LOSSES[loss]
    for target in TARGETS:
        values = results.arrays[f"{key}.{quantity}.{target}"]
        own = target == OWN_TARGET[loss]
        ax.fill_between(k, values.min(0), values.max(0), color=look.color, alpha=0.2 if own else 0.1, linewidth=0)
        ax.plot(k, np.median(values, 0), **_line(loss, own=own), markevery=3)
    if quantity == "relative_error":
        ax.plot(k, np.median(results.arrays[f"{key}.relative_coefficient"]) / k, **PREDICTED)


PREDICTED: dict[str, Any] = {"color": "black", "linewidth": 0.6, "linestyle": "-", "zorder": 4}


def _line(loss: str, *, own: bool) -> dict[str, Any]:
    look = LOSSES[loss]
    if own:
        return {**look.line(), "label": None}
    faint = {"linestyle": ":", "linewidth": 1.0, "markerfacecolor": "white", "label": None}
    return {**look.line(), **faint}


def _legend() -> list[Line2D]:
    lines = [
        Line2D([], [], **{**_line(loss, own=own), "label": f"{LABELS[loss]} against {TARGETS[target]}"})
        for own in (True, False)
        for loss in LOSSES
        for target in TARGETS
        if (target == OWN_TARGET[loss]) == own
    ]
    predicted = Line2D([], [], label=r"closed form $\|\nabla c\|\,/\,(K\,\|\nabla\mathrm{KL}\|)$", **PREDICTED)
    return [*lines, predicted]


def _candidates_axis(ax: Axes, k: np.ndarray) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks([2**exponent for exponent in range(0, int(np.log2(k[-1])) + 1, 5)])
    ax.minorticks_off()
    ax.set_xlabel("candidates K")


def _draw_sampled(results: style.StoredResult, out_dir: Path) -> list[Path]:
    figure, axes = plt.subplots(1, 2, figsize=(style.PAGE, 2.6), layout="constrained")
    arrays, k = results.arrays, results.arrays["sampled.k"]
    for loss, look in LOSSES.items():
        # Side by side, so that the bars of the two losses do not cover each other.
        shifted = k * (0.93 if loss == "exo_rw" else 1.07)
        for ax, quantity in zip(axes, ("cosine", "relative_error"), strict=True):
            exact, sampled = arrays[f"sampled.{loss}.exact_{quantity}"], arrays[f"sampled.{loss}.{quantity}"]
            if quantity == "cosine":
                exact, sampled = 1 - exact, 1 - sampled
            ax.plot(k, exact, **look.line(markers=False, label=f"{LABELS[loss]}, exact"))
            low, median, high = np.quantile(sampled, [0.05, 0.5, 0.95], axis=1)
            ax.errorbar(
                shifted,
                median,
                yerr=[median - low, high - median],
                color=look.color,
                marker=look.marker,
                linestyle="",
                elinewidth=0.8,
                markerfacecolor="white",
                label=f"{LABELS[loss]}, sampled",
            )
            ax.set_yscale("log")
    axes[0].set_ylabel("1 − cosine")
    axes[1].set_ylabel("relative error")
    axes[0].set_title("direction", fontsize=8)
    axes[1].set_title("direction and length", fontsize=8)
    for ax in axes:
        _candidates_axis(ax, k)
        ax.set_xlabel(f"candidates K, in {results.config['sampled_completions']:,} / K draws")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    paths = style.save(figure, "gradient_alignment_sampled", out_dir)
    plt.close(figure)
    return paths


if __name__ == "__main__":
    style.main("gradient_alignment")
