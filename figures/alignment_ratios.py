"""Density ratios to the reference of aligned policies: over the reward, exact and estimated, and sorted by pi*."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from figures import style

_OVER_REWARD = """\
Density ratio to the reference, ρ = π/π_ref, over the reward for each of the seven openings, at one temperature: {what}.
Lines: exact, both densities seen through one Gaussian kernel (bandwidth: 0.2 standard deviations of the reward under
the reference). Open markers: the same from M completions of the reference, M in the legend: kernel densities (scipy)
with self-normalised importance weights over those without; median over independent draws, bars: 5 % to 95 %. ESS: mean
effective sample size of the M weights. The axis begins where the reference, and ends where π*_β, leaves 0.1 % outside;
ratios are cut off below 1e-4. One seed.
"""
CAPTIONS = {
    "alignment_ratios": _OVER_REWARD.format(
        what="π*_β of the reward model and the policies aligned on its rewards with EXO-rw and DPO-rw"
    ),
    "alignment_ratios_pref": _OVER_REWARD.format(
        what="π*_β of the oracle's reward and the policies aligned on its labels with EXO-pref and DPO-pref"
    ),
    "alignment_ratios_sorted": """\
Left: density ratio ρ = π/π_ref of the completions sorted by π*_β, exact; the first ranks alone, later ones in groups
by their joint probabilities, cut off below 1e-4; geometric mean over seven openings and all seeds, bands: least to
largest seed. Middle: error of the estimated ratio over the reward against the number M of samples, mean
|log ρ̂ − log ρ| under the policy. Dotted: slope −1/2. Right: effective sample size of the M weights (lines) and the
largest density ratio at any of the samples (faint; dotted: M, which it cannot exceed). Middle and right: means over
draws, openings and seeds. Rows: policies aligned on the reward model's rewards with groups of few and of many
completions (K), and policies aligned on the oracle's labels; π*_β is that of the reward model, or of the oracle.
""",
}
LOOKS = {"optimum": "optimal"}
# Those that the estimates are shown of; PPO joins on the second page.
SHOWN = 3
MARKED = 9
LOWEST, HIGHEST = 1e-4, 1e6
RANGE_BY_RANK = (1e-4, 1e5)


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """Seven panels for either kind of data, then ranks and errors."""
    return [
        *_draw_over_reward(results, "rw", "reward of the model", "alignment_ratios", out_dir),
        *_draw_over_reward(results, "pref", "reward of the oracle", "alignment_ratios_pref", out_dir),
        *_draw_sorted(results, out_dir),
    ]


def _look(policy: str) -> style.Look:
    return style.METHODS[LOOKS.get(policy, policy)]


def _draw_over_reward(results: style.StoredResult, kind: str, axis: str, name: str, out_dir: Path) -> list[Path]:
    openings = results.numbers["openings"]
    sizes = results.config["sample_sizes"]
    # The largest but one: what the largest shows lies on the lines.
    column = max(0, len(sizes) - 2)
    figure, axes = plt.subplots(2, 4, figsize=(style.PAGE, 4.3), sharey=True)
    for x, (ax, opening) in enumerate(zip(axes.flat, openings, strict=False)):
        _over_reward(ax, results, kind, x, column)
        ax.set_title(f"“{opening} …”", fontsize=7.5)
        ax.set_xlabel("reward (nats)")
    for row in axes:
        row[0].set_ylabel(r"density ratio $\rho$")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].axis("off")
    title = f"{axis}\n" + rf"$\beta$ = {results.config['beta']:g}, M = {sizes[column]:,}"
    axes.flat[-1].legend(handles, labels, loc="center", title=title)
    paths = style.save(figure, name, out_dir)
    plt.close(figure)
    return paths


def _over_reward(ax: Axes, results: style.StoredResult, kind: str, x: int, column: int) -> None:
    arrays, policies = results.arrays, results.numbers[kind]["policies"][:SHOWN]
    grid, ess = arrays[f"{kind}_grid"][x], results.numbers["estimates"].index("ess")
    # A few rewards per policy, side by side, so that no two bars lie on each other.
    marked = np.linspace(0.02, 0.92, MARKED)
    texts = []
    for p, policy in enumerate(policies):
        look = _look(policy)
        ax.plot(grid, np.exp(arrays[f"{kind}_exact"][x, p]), **look.line(markers=False, label=f"{look.label}, exact"))
        at = np.round((marked + 0.035 * p) * (len(grid) - 1)).astype(int)
        low, median, high = np.maximum(np.exp(arrays[f"{kind}_estimated"][x, p, column][:, at]), LOWEST / 10)
        ax.errorbar(
            grid[at], median, yerr=[median - low, high - median], color=look.color, marker=look.marker, markersize=2.8,
            markerfacecolor="white", markeredgewidth=0.7, linestyle="none", linewidth=0.8,
            label=f"{look.label}, estimated",
        )  # fmt: skip
        texts.append(f"{look.label} {arrays[f'{kind}_estimates'][0, x, p, column, ess]:.3g}")
    ax.text(0.04, 0.98, "ESS\n" + "\n".join(texts), transform=ax.transAxes, va="top", fontsize=6.5)
    ax.set(yscale="log", ylim=(LOWEST, HIGHEST))


def _draw_sorted(results: style.StoredResult, out_dir: Path) -> list[Path]:
    config = results.config
    titles = {
        "rw": f"on the model's rewards, K = {config['k']}",
        "rw_many": f"on the model's rewards, K = {config['many']}",
        "pref": "on the oracle's labels",
    }
    figure, axes = plt.subplots(len(titles), 3, figsize=(style.PAGE, 6.2), sharex="col", sharey="col")
    for letter, row, (kind, title) in zip("abc", axes, titles.items(), strict=True):
        _by_rank(row[0], results, kind)
        _errors(row[1], results, kind)
        _weights(row[2], results, kind)
        row[0].set(ylabel=r"$\rho$ of a completion")
        row[0].set_title(f"({letter}) {title}", loc="left")
        row[1].set(ylabel=r"error of $\hat\rho$ (nats)")
        row[2].set(ylabel=r"ESS; faint: largest $\hat\rho$")
    for ax, text in zip(axes[-1], (r"rank under $\pi^*_\beta$", "samples $M$", "samples $M$"), strict=True):
        ax.set_xlabel(text)
    entries: dict[str, Any] = {}
    for ax in axes[:, 0]:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=len(entries))
    paths = style.save(figure, "alignment_ratios_sorted", out_dir)
    plt.close(figure)
    return paths


def _by_rank(ax: Axes, results: style.StoredResult, kind: str) -> None:
    rank = results.arrays[f"{kind}_rank"][0]
    for p, policy in enumerate(results.numbers[kind]["policies"]):
        # [seeds, ranks], means over openings.
        ratio = results.arrays[f"{kind}_by_rank"][:, :, p].mean(1)
        look = _look(policy)
        ax.plot(rank, np.exp(ratio.mean(0)), **look.line(markers=False, linewidth=1.1))
        ax.fill_between(rank, *np.exp([ratio.min(0), ratio.max(0)]), color=look.color, alpha=0.15, linewidth=0)
    ax.axhline(1, color="0.5", linewidth=0.6)
    ax.set(xscale="log", yscale="log", ylim=RANGE_BY_RANK, xticks=[1, 10, 100, 1000, 10000, 100000])


def _estimates(results: style.StoredResult, kind: str, name: str) -> np.ndarray:
    """[policies, M], means over seeds and openings."""
    index = results.numbers["estimates"].index(name)
    values: np.ndarray = results.arrays[f"{kind}_estimates"][..., index].mean((0, 1))
    return values


def _errors(ax: Axes, results: style.StoredResult, kind: str) -> None:
    sizes, errors = np.array(results.config["sample_sizes"]), _estimates(results, kind, "error")
    for policy, error in zip(results.numbers[kind]["policies"], errors, strict=True):
        ax.plot(sizes, error, **_look(policy).line())
    ax.plot(sizes, errors.min() * (sizes / sizes[-1]) ** -0.5 * 0.7, color="0.3", linestyle=":", linewidth=1.0)
    ax.set(xscale="log", yscale="log")


def _weights(ax: Axes, results: style.StoredResult, kind: str) -> None:
    sizes = np.array(results.config["sample_sizes"])
    found = zip(*(_estimates(results, kind, name) for name in ("ess", "largest_ratio")), strict=True)
    for policy, (ess, largest) in zip(results.numbers[kind]["policies"], found, strict=True):
        ax.plot(sizes, ess, **_look(policy).line())
        ax.plot(sizes, largest, **_look(policy).line(alpha=0.35, markersize=2.5))
    ax.plot(sizes, sizes, color="0.3", linestyle=":", linewidth=1.0)
    ax.set(xscale="log", yscale="log")


if __name__ == "__main__":
    style.main("alignment_ratios")
