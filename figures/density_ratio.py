"""Draws ``analysis/results/density_ratio``: density ratios to the reference, exact and as samples show them."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from figures import style

CAPTIONS = {
    "density_ratio": """\
Density ratio to the reference, ρ = π/π_ref, of π*_β and of k-gram policies trained with EXO-rw and DPO-rw on K
candidates (same number of samples for all), two planted modes on 4096 sequences, uniform reference. Rows (a-c): one
order k and K each. Four columns: ρ over the reward. Lines: exact, smoothed by a Gaussian kernel (bandwidth 0.25).
Markers: the estimate from M completions of the reference (self-normalised importance weights, the same kernel; median
over independent draws of M, bars: 5 % to 95 %). No estimate can exceed M (dotted). ESS: mean effective sample size of
the M weights. (d-f) The same policies without smoothing or sampling: ρ of every sequence, sorted by π*_β (ties by the
drawn ratio), cut off below 1e-5; ranks 1 and 2, with markers, are the two modes. (g) Error of the estimate of row
(a), mean |log ρ̂ − log ρ| over the policy's own rewards, median and 5 % to 95 %.
""",
}
METHODS = {"optimal": "optimal", "exo_rw": "exo", "dpo_rw": "dpo"}
SHOWN_SIZES = 4
# Bars and lines beyond are cut off.
LOWEST, HIGHEST = 1e-5, 3e4


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """One page: three rows of ratios over the reward, one of ratios by rank."""
    config, arrays = results.config, results.arrays
    few, many = min(config["n_candidates"]), max(config["n_candidates"])
    low, high = min(config["orders"]), max(config["orders"])
    policies = [(low, many), (high, many), (low, few)]
    sizes = config["sample_sizes"][:SHOWN_SIZES]
    figure = plt.figure(figsize=(style.PAGE * 1.25, 8.4))
    rows = figure.add_gridspec(4, SHOWN_SIZES)
    first = None
    for row, (order, k) in enumerate(policies):
        for column, size in enumerate(sizes):
            ax = figure.add_subplot(rows[row, column], sharex=first, sharey=first)
            first = first or ax
            _over_reward(ax, results, order, k, column, size)
            ax.tick_params(labelbottom=row == len(policies) - 1, labelleft=column == 0)
            if row == 0:
                ax.set_title(f"M = {size}")
            if row == len(policies) - 1:
                ax.set_xlabel("reward $r$ (nats)")
        letter = "abc"[row]
        figure.axes[row * len(sizes)].set_ylabel(f"({letter}) order {order}, K = {k}\n" + r"density ratio $\rho$")
    for column, (order, k) in enumerate(policies):
        ax = figure.add_subplot(rows[3, column], sharey=figure.axes[0])
        _by_rank(ax, arrays, order, k)
        ax.set_title(f"({'def'[column]}) order {order}, K = {k}")
        ax.tick_params(labelleft=column == 0)
        if column == 0:
            ax.set_ylabel(r"$\rho$ of a sequence")
    _errors(figure.add_subplot(rows[3, 3]), results, *policies[0])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    paths = style.save(figure, "density_ratio", out_dir)
    plt.close(figure)
    return paths


def _prefix(name: str, order: int, k: int) -> str:
    return name if name == "optimal" else f"{name}_{order}_{k}"


def _entry(numbers: dict[str, Any], name: str, order: int, k: int) -> dict[str, Any]:
    entry: dict[str, Any] = numbers[name] if name == "optimal" else numbers[name][str(order)][str(k)]
    return entry


def _over_reward(ax: Axes, results: style.StoredResult, order: int, k: int, column: int, size: int) -> None:
    grid, arrays = results.arrays["grid"], results.arrays
    # A few rewards per method, side by side, so that no two bars lie on each other.
    marked = np.linspace(0.04, 0.94, 8)
    lines = []
    for i, (name, look) in enumerate(METHODS.items()):
        method, prefix = style.METHODS[look], _prefix(name, order, k)
        ax.plot(grid, np.exp(arrays[f"{prefix}_exact"]), **method.line(markers=False))
        at = np.round((marked + 0.03 * i) * (len(grid) - 1)).astype(int)
        below, median, above = np.maximum(np.exp(arrays[f"{prefix}_estimated"][column][:, at]), LOWEST / 10)
        ax.errorbar(
            grid[at],
            median,
            yerr=[median - below, above - median],
            color=method.color,
            marker=method.marker,
            markersize=2.6,
            markerfacecolor="white",
            markeredgewidth=0.7,
            linestyle="none",
            linewidth=0.8,
            label=f"{method.label}, estimated",
        )
        ess = _entry(results.numbers, name, order, k)["estimates"][str(size)]["ess"]["mean"]
        lines.append(f"{method.label} {ess:.3g}")
    ax.axhline(size, xmin=0.5, color="0.3", linestyle=":", linewidth=1.0)
    ax.text(0.03, 0.97, "ESS\n" + "\n".join(lines), transform=ax.transAxes, va="top", fontsize=6.5)
    ax.set(yscale="log", ylim=(LOWEST, HIGHEST), xticks=range(-8, 1, 2))


def _by_rank(ax: Axes, arrays: dict[str, np.ndarray], order: int, k: int) -> None:
    optimal = arrays["optimal_log_ratio_by_rank"]
    rank = np.arange(1, len(optimal) + 1)
    for name, look in METHODS.items():
        log_ratio = arrays[f"{_prefix(name, order, k)}_log_ratio_by_rank"]
        # Sequences that pi* does not tell apart, in the order of the ratio that is drawn.
        log_ratio = log_ratio[np.lexsort((-log_ratio, -optimal.round(6)))]
        method = style.METHODS[look]
        ax.plot(rank, np.exp(log_ratio), **method.line(markers=False, linewidth=0.9))
        ax.plot(rank[:2], np.exp(log_ratio[:2]), **method.line(linestyle="none", label=None))
    ax.set(xscale="log", yscale="log", xlabel=r"rank under $\pi^*_\beta$", ylim=(LOWEST, HIGHEST))


def _errors(ax: Axes, results: style.StoredResult, order: int, k: int) -> None:
    for i, (name, look) in enumerate(METHODS.items()):
        estimates = _entry(results.numbers, name, order, k)["estimates"]
        sizes = np.array([int(size) for size in estimates])
        low, median, high = (
            np.array([estimate["mean_absolute_log_error"][what] for estimate in estimates.values()])
            for what in ("low", "median", "high")
        )
        method = style.METHODS[look]
        line = method.line()
        # Side by side.
        ax.errorbar(sizes * 1.15 ** (i - 1), median, yerr=[median - low, high - median], elinewidth=0.8, **line)
    ax.set(xscale="log", yscale="log", xlabel="samples $M$", ylabel="error (nats)", title=f"(g) order {order}, K = {k}")
    # On the right, so that the columns above stay close.
    ax.yaxis.tick_right()
    ax.yaxis.set_label_position("right")
    ax.spines.left.set_visible(False)
    ax.spines.right.set_visible(True)


if __name__ == "__main__":
    style.main("density_ratio")
