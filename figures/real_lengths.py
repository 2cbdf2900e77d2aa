"""Draws ``analysis/results/real_lengths``: modes, the price of reward, and candidates, beyond enumeration."""

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from figures import style

CAPTIONS = {
    "real_lengths": """\
Completions too long to enumerate; exact but for descent and samples. (a, b) Two planted phrases of three of
four tokens, uniform reference, k-gram policies whose positions share a table; min KL(π_θ||π*) is the best that descent
found. (a) Probability of the two modes of π* (filled: the
larger, hollow: the other) at the minimisers of either KL, at the longest completions; grey: those of π*. (b)
KL(π_θ||π*) of both, at every length. (c-h) A bigram reference, and a phrase that pays at every occurrence. (c) Reward
against KL from the reference, both per token: π*_β (lines, all β), best of n and the k-gram policies nearest to π*_β.
(d-h) Temperatures at which KL(π*||π_ref) per token stays what the legend says, at every length; the policy is π*_{2β}.
(d) Effective sample size per candidate of weights π*/π_ref (filled) and π_θ/π_ref (hollow). (e) Candidates K from which
the expected loss is within a share of its limit. (f) How much of the limit the loss of K candidates shows, at the
largest divergence. (g) Sampled: the self-normalised estimate of log Z less log Z, with its 95% interval. (h) Sampled:
how often that interval holds log Z, with the 95% interval of the share; grey: 95%. Lines join points.
""",
}
LENGTH_STYLES = ("-", "--", ":", "-.")
LENGTH_MARKERS = ("o", "s", "^", "D")
MINIMISERS = {"reverse_kl": "policy_to_optimal", "forward_kl": "optimal_to_policy"}


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """One page of eight panels."""
    numbers, config = results.numbers, results.config
    figure, axes = plt.subplots(2, 4, figsize=(style.PAGE * 1.75, 5.2))
    _modes(axes[0, 0], numbers["planted"])
    _divergences(axes[0, 1], numbers["planted"])
    _frontier(axes[0, 2], numbers["frontier"])
    _sample_sizes(axes[0, 3], numbers["candidates"])
    _needed(axes[1, 0], numbers["candidates"], config["share"])
    _shown(axes[1, 1], numbers["candidates"])
    _estimated(axes[1, 2], numbers["candidates"], config["snis_samples"])
    _covered(axes[1, 3], numbers["candidates"], config["snis_samples"])
    paths = style.save(figure, "real_lengths", out_dir)
    plt.close(figure)
    return paths


def _lengths(cases: list[dict[str, Any]]) -> list[int]:
    return sorted({case["length"] for case in cases})


def _ordered(cases: list[dict[str, Any]], key: str, **fixed: Any) -> list[dict[str, Any]]:
    """The cases that agree with what is fixed, in the order of a number."""
    mine = [case for case in cases if all(case[name] == value for name, value in fixed.items())]
    return sorted(mine, key=lambda case: case[key])


def _modes(ax: Axes, cases: list[dict[str, Any]]) -> None:
    length = max(_lengths(cases))
    mine = _ordered(cases, "order", length=length)
    orders = [case["order"] for case in mine]
    for mode in mine[0]["optimal"]["modes"][1:]:
        ax.axhline(mode, color="0.6", linewidth=0.8, zorder=0)
    for name, key in MINIMISERS.items():
        look = style.METHODS[name]
        modes = [sorted(case[key]["modes"][1:], reverse=True) for case in mine]
        ax.plot(orders, [mode[0] for mode in modes], **look.line())
        ax.plot(orders, [mode[1] for mode in modes], **look.line(label=None, markerfacecolor="white"))
    ax.set(xlabel="order k", ylabel="probability of a mode", title=f"(a) modes, T = {length}", xticks=orders,
           ylim=(-0.05, 1.3), yticks=(0.0, 0.25, 0.5, 0.75, 1.0))  # fmt: skip
    ax.legend(fontsize=6, loc="upper left")


def _divergences(ax: Axes, cases: list[dict[str, Any]]) -> None:
    for i, length in enumerate(_lengths(cases)):
        mine = _ordered(cases, "order", length=length)
        orders = [case["order"] for case in mine]
        for name, key in MINIMISERS.items():
            look = style.METHODS[name]
            values = [case[key]["kl_policy_to_optimal"] for case in mine]
            label = f"{look.label}, T = {length}"
            ax.plot(orders, values, **look.line(label=label, linestyle=LENGTH_STYLES[i], marker=LENGTH_MARKERS[i]))
    ax.set(xlabel="order k", ylabel=r"$\mathrm{KL}(\pi_\theta\|\pi^*)$ (nats)", title="(b) what capacity costs",
           xticks=sorted({case["order"] for case in cases}), yscale="log")  # fmt: skip
    ax.legend(fontsize=6)


def _frontier(ax: Axes, cases: list[dict[str, Any]]) -> None:
    for i, case in enumerate(sorted(cases, key=lambda case: case["length"])):
        length = case["length"]
        more: dict[str, Any] = {"linestyle": LENGTH_STYLES[i], "marker": LENGTH_MARKERS[i]}
        optimal, best = style.METHODS["optimal"], style.METHODS["best_of_n"]
        _per_token(ax, case["optimal"], length, optimal.line(label=f"{optimal.label}, T = {length}", **more))
        _per_token(ax, case["best_of_n"], length, best.line(label=f"{best.label}, T = {length}", **more))
        for order, points in case["kgrams"].items():
            look = style.METHODS["forward_kl"]
            label = f"nearest k = {order}, T = {length}"
            line = look.line(label=label, **{**more, "linestyle": "none", "markersize": 2.5 + int(order)})
            _per_token(ax, points, length, {**line, "markerfacecolor": "white"})
    ax.set(xlabel=r"$\mathrm{KL}(\cdot\|\pi_\mathrm{ref})$ per token (nats)", ylabel="E r per token",
           title="(c) price of reward")  # fmt: skip
    ax.legend(fontsize=5)


def _per_token(ax: Axes, points: list[list[float]], length: int, line: dict[str, Any]) -> None:
    inner = sorted(point[:2] for point in points)
    ax.plot([kl / length for kl, _ in inner], [mean / length for _, mean in inner], **line)


def _sample_sizes(ax: Axes, cases: list[dict[str, Any]]) -> None:
    for i, divergence in enumerate(sorted({case["divergence"] for case in cases})):
        mine = _ordered(cases, "length", divergence=divergence)
        lengths = [case["length"] for case in mine]
        for name, look in (("optimal", style.METHODS["optimal"]), ("policy", style.METHODS["exo"])):
            shares = [case["log_ess_share"][name] / math.log(10) for case in mine]
            what = r"$\pi^*_\beta$" if name == "optimal" else r"$\pi^*_{2\beta}$"
            line = look.line(label=f"{what}, {divergence:g} nats", linestyle=LENGTH_STYLES[i], marker=LENGTH_MARKERS[i])
            if name == "policy":
                line["markerfacecolor"] = "white"
            ax.plot(lengths, shares, **line)
    ax.set(xlabel="length T (tokens)", ylabel=r"$\log_{10}$ ESS per candidate", title="(d) what candidates weigh")
    ax.legend(fontsize=6)


def _needed(ax: Axes, cases: list[dict[str, Any]], share: float) -> None:
    for i, divergence in enumerate(sorted({case["divergence"] for case in cases})):
        mine = _ordered(cases, "length", divergence=divergence)
        for name in ("exo", "dpo"):
            look = style.METHODS[f"{name}_rw"]
            reached = [case for case in mine if math.isfinite(case["doublings_needed"][name])]
            line = look.line(label=f"{look.label}, {divergence:g} nats", linestyle=LENGTH_STYLES[i],
                             marker=LENGTH_MARKERS[i])  # fmt: skip
            ax.plot([case["length"] for case in reached], [case["doublings_needed"][name] for case in reached], **line)
    ax.set(xlabel="length T (tokens)", ylabel=r"$\log_2 K$", title=f"(e) candidates to within {share:.0%}")
    ax.legend(fontsize=6)


def _shown(ax: Axes, cases: list[dict[str, Any]]) -> None:
    mine = _ordered(cases, "length", divergence=max(case["divergence"] for case in cases))
    lengths = [case["length"] for case in mine]
    for name in ("exo", "dpo"):
        look = style.METHODS[f"{name}_rw"]
        for i, k in enumerate(mine[0]["losses"]):
            shares = [case["losses"][k][name] / case["limits"][name] for case in mine]
            line = look.line(marker=("o", "s", "^", "D", "v", "P")[i % 6], linewidth=0.8)
            ax.plot(lengths, shares, **{**line, "label": f"{look.label}, K = {int(k):,}"})
    ax.set(
        ylabel="loss / its limit", title="(f) what K candidates show", ylim=(0.0, 1.6), yticks=(0, 0.25, 0.5, 0.75, 1)
    )
    _doubling(ax, lengths)
    ax.legend(fontsize=5, ncol=2, loc="upper center")


def _estimated(ax: Axes, cases: list[dict[str, Any]], samples: int) -> None:
    found = [
        (look, mine, [[value - e[3] for value in e[:3]] for e in (case["estimates"]["log_z"] for case in mine)])
        for look, mine in _by_divergence(cases)
    ]
    for look, mine, errors in found:
        bars = [[value - low for value, low, _ in errors], [high - value for value, _, high in errors]]
        ax.errorbar([case["length"] for case in mine], [value for value, _, _ in errors], yerr=bars, capsize=2, **look)
    ax.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(ylabel=r"estimated less true $\log Z$ (nats)", title=f"(g) {samples:,} samples, once")
    _doubling(ax, [case["length"] for case in found[0][1]])
    ax.legend(fontsize=6, loc="lower left")


def _covered(ax: Axes, cases: list[dict[str, Any]], samples: int) -> None:
    for look, mine in _by_divergence(cases):
        lengths, shares = [case["length"] for case in mine], [case["coverage"] for case in mine]
        bars = [[share - low for share, low, _ in shares], [high - share for share, _, high in shares]]
        ax.errorbar(lengths, [share for share, _, _ in shares], yerr=bars, capsize=2, **look)
    ax.axhline(0.95, color="0.6", linewidth=0.8, zorder=0)
    ax.set(ylabel=r"intervals that hold $\log Z$", title=f"(h) {samples:,} samples, often", ylim=(0.0, 1.02))
    _doubling(ax, [case["length"] for case in mine])
    ax.legend(fontsize=6, loc="lower left")


def _by_divergence(cases: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The cases of each divergence in the order of lengths, and how they look."""
    found = []
    for i, divergence in enumerate(sorted({case["divergence"] for case in cases})):
        look = style.METHODS["optimal"].line(
            label=f"{divergence:g} nats", linestyle=LENGTH_STYLES[i], marker=LENGTH_MARKERS[i]
        )
        found.append((look, _ordered(cases, "length", divergence=divergence)))
    return found


def _doubling(ax: Axes, lengths: list[int]) -> None:
    """A logarithmic axis of lengths."""
    ax.set(xlabel="length T (tokens)", xscale="log")
    ax.set_xticks(lengths, [str(length) for length in lengths])
    ax.minorticks_off()


if __name__ == "__main__":
    style.main("real_lengths")
