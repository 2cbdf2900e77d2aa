"""Draws ``analysis/results/expressivity``: states that pi* needs, and the gap of policies that have fewer."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from figures import style

CLOSE, FLOOR = 1e-3, 1e-7
# Targets are no methods: colours of Paul Tol that no method of a figure beside this one has.
LOOKS = {
    "parity": style.Look("parity", "#44AA99", "-", "o"),
    "palindrome": style.Look("palindrome", "#882255", "--", "s"),
    "planted_modes": style.Look("two planted modes", "#999933", "-.", "^"),
    "review": style.Look("review world", "#AA4499", ":", "D"),
}

CAPTIONS = {
    "expressivity": """\
What an autoregressive policy has to remember to hold π* exactly, for four rewards (V = 2 tokens for parity and
palindrome, 4 for the planted modes, 8 for the review world, whose first opening is drawn). (a) Before every position of
the longest completions counted: states of the smallest deterministic machine (filled) and rank of the matrix of
prefixes by suffixes (hollow), at one β. (b) The largest over positions, against the length. (c) What a k-gram policy
falls short of π*: the least KL(π*||π_θ), in closed form (filled), and the least KL(π_θ||π*) found from several starts
(hollow); at k = T − 1, which is exact, both are 0 and not drawn. (d) The least KL(π*||π_θ) found of a GRU, against its
width; an upper bound of the least there is. Grey: 10⁻³ nats. (c) and (d) at the longest completions fitted. Lines join
integers.
""",
}


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """Four panels: counts above, gaps below."""
    config, numbers = results.config, results.numbers
    shown = [case for case in numbers["exact"]
             if case["beta"] == config["beta"] and case["opening"] in (None, config["openings"][0])]  # fmt: skip
    figure, axes = plt.subplots(2, 2, figsize=(style.PAGE, 4.8))
    _by_position(axes[0, 0], shown)
    _by_length(axes[0, 1], shown)
    _by_order(axes[1, 0], numbers["kgrams"])
    _by_width(axes[1, 1], numbers["grus"])
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, title=rf"$\beta$ = {config['beta']:g}")
    paths = style.save(figure, "expressivity", out_dir)
    plt.close(figure)
    return paths


def _of(cases: list[dict[str, Any]], name: str, key: str) -> list[dict[str, Any]]:
    """The cases of a target, in the order of a number."""
    return sorted((case for case in cases if case["name"] == name), key=lambda case: case[key])


def _longest(cases: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The cases of a target at its largest length."""
    mine = [case for case in cases if case["name"] == name]
    return [case for case in mine if case["length"] == max(case["length"] for case in mine)]


def _pair(ax: Axes, x: list[int], filled: list[float], hollow: list[float], look: style.Look) -> None:
    """Two curves of one target."""
    ax.plot(x, hollow, **look.line(label=None, linewidth=0.7, markerfacecolor="white", markersize=5.5))
    ax.plot(x, filled, **look.line())


def _by_position(ax: Axes, cases: list[dict[str, Any]]) -> None:
    for name, look in LOOKS.items():
        (case,) = _longest(cases, name)
        _pair(ax, list(range(case["length"])), case["states"], case["ranks"], look)
    ax.set(xlabel="tokens before the cut, t", ylabel="states; rank", title="(a) at every cut")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_yscale("log", base=2)


def _by_length(ax: Axes, cases: list[dict[str, Any]]) -> None:
    for name, look in LOOKS.items():
        mine = _of(cases, name, "length")
        lengths = [case["length"] for case in mine]
        _pair(ax, lengths, [max(case["states"]) for case in mine], [max(case["ranks"]) for case in mine], look)
    ax.set(xlabel="length T", ylabel="most states; largest rank", title="(b) against length")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_yscale("log", base=2)


def _by_order(ax: Axes, cases: list[dict[str, Any]]) -> None:
    for name, look in LOOKS.items():
        below_full = [case for case in _longest(cases, name) if case["order"] < case["length"] - 1]
        mine = _of(below_full, name, "order")
        orders = [case["order"] for case in mine]
        closed, found = ([case[key] for case in mine] for key in ("optimal_to_policy", "policy_to_optimal"))
        _pair(ax, orders, closed, found, look)
    ax.set(xlabel="order k of the k-gram policy", ylabel="KL (nats)", title="(c) k-gram policies", yscale="log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _close(ax)


def _by_width(ax: Axes, cases: list[dict[str, Any]]) -> None:
    for name, look in LOOKS.items():
        mine = _of(_longest(cases, name), name, "width")
        ax.plot([case["width"] for case in mine], [max(case["gap"], FLOOR) for case in mine], **look.line())
    widths = sorted({case["width"] for case in cases})
    ax.set(xlabel="width of the GRU", ylabel=r"$\mathrm{KL}(\pi^*\|\pi_\theta)$ (nats)", title="(d) GRUs", yscale="log")
    ax.set_xticks(widths)
    _close(ax)


def _close(ax: Axes) -> None:
    ax.axhline(CLOSE, color="0.5", linewidth=0.8, zorder=0)


if __name__ == "__main__":
    style.main("expressivity")
