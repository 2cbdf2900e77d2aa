"""Draws ``analysis/results/fixed_points``: where the losses at finite K end, and which gets more at equal K."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from figures import style

Case = dict[str, Any]
EXO, DPO = style.METHODS["exo_rw"], style.METHODS["dpo_rw"]
LOOKS = {"exo": EXO, "dpo": DPO}
WORLDS = {"planted": "planted modes", "reviews": "reviews", "random": "random rewards"}
WORLD_MARKERS = {"planted": "o", "reviews": "^", "random": "s"}
ORDER_MARKERS = ("o", "s", "^")
# From light to dark as the difference grows past these shares of the gain.
SHADES = {"exo": ("#D6E9F5", "#7DB8DD", "#0072B2"), "dpo": ("#FDF0D0", "#F6CD73", "#E69F00")}
STEPS = (0.01, 0.1)
EQUAL, NEITHER = "0.8", "white"
FLOOR = 1e-8

CAPTIONS = {
    "fixed_points": """\
Minimisers of the exactly expected losses at K candidates, k-gram policies. (a) Planted modes: how much the
divergence that each loss tends to (KL(π_θ||π*) for EXO-rw, KL(π*||π_θ) for DPO-rw) exceeds its minimum there, relative
to it; dotted: a tenth. (b) The first K from which on it stays below a tenth, against the number of candidates that are
worth one of π*, 1/ESS; a point for each world, order and temperature, colours as in (a); at the upper edge with an
arrow: not within the K computed. Grey diagonal: equal. (c) Planted modes, longer sequences, k = 0: total variation
between EXO-rw's minimiser (blue) and the minimisers of both divergences, and of DPO-rw's (orange).
""",
    "fixed_points_map": """\
Which loss ends at the higher objective J at equal K: at the best minimiser found of each exactly expected loss, by K
and temperature β (in standard deviations of the reward under the reference); columns: the order k of the policy, rows:
worlds. Colour: the loss with the higher J, darker where it is ahead by more than 1 % and more than 10 % of
J(π*) − J(π_ref), which the numbers give in per cent; grey: equal. Black lines separate the regions.
""",
    "fixed_points_paths": """\
Which loss gets more reward on the way, at equal K and equal distance: along the exact gradient flow of each expected
loss from the reference, where both policies stand at the same KL from it (in shares of KL(π*||π_ref); 0: the first
step). Colour: the loss with the higher expected reward (and so the higher J, at any β), darker where it is
ahead by more than 1 % and more than 10 % of what the best of all policies gains at that distance, which the numbers
give in per cent; grey: equal; hatched: only the loss of that colour gets so far; white: neither does. Black lines
separate the regions. Rows: worlds, temperatures (in standard deviations of the reward) and the flow's metric; columns:
the order k of the policy.
""",
}


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """Three figures."""
    numbers, equal = results.numbers, results.config["equal"]
    drawn = {
        "fixed_points": _minimisers(numbers),
        "fixed_points_map": _map(numbers["grid"], equal),
        "fixed_points_paths": _paths(numbers["paths"], [0.0, *results.config["fractions"]], equal),
    }
    paths = []
    for name, figure in drawn.items():
        paths += style.save(figure, name, out_dir)
        plt.close(figure)
    return paths


def _minimisers(numbers: Case) -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(style.PAGE * 1.3, 2.7))
    _excess(axes[0], numbers["grid"])
    _near_from(axes[1], numbers["grid"])
    _distances(axes[2], numbers["planted"])
    return figure


def _excess(ax: Axes, grid: list[Case]) -> None:
    world = grid[-1]["world"] if all(case["world"] != "planted" for case in grid) else "planted"
    temperatures = _values(grid, "temperature")
    sharp = temperatures[1 % len(temperatures)]
    for case in _of(grid, world=world, temperature=sharp):
        look = LOOKS[case["loss"]]
        label = f"{look.label}, k = {case['order']}"
        ks = [point["k"] for point in case["points"]]
        line = look.line(marker=ORDER_MARKERS[case["order"]], label=label, alpha=1 - 0.25 * case["order"])
        ax.plot(ks, np.maximum(case["excess"], FLOOR), **line)
    ax.axhline(0.1, color="0.3", linestyle=":", linewidth=1.0)
    ax.set(yscale="log", xlabel="candidates K", ylabel="excess of the limit's divergence")
    ax.set_title(f"(a) {WORLDS[world]}, β = {sharp:.2g} sd")
    ax.set_xscale("log", base=2)
    ax.legend(fontsize=6)


def _near_from(ax: Axes, grid: list[Case]) -> None:
    top = 2 * max(point["k"] for point in grid[0]["points"])
    for case in grid:
        beyond = math.isinf(case["near_from"])
        look = LOOKS[case["loss"]]
        ax.plot(
            1 / case["ess_optimal"],
            top if beyond else case["near_from"],
            color=look.color,
            marker=r"$\uparrow$" if beyond else WORLD_MARKERS[case["world"]],
            markerfacecolor=look.color if case["order"] == 0 else "white",
            linestyle="none",
            alpha=0.8,
        )
    low, high = 1.0, max(1 / case["ess_optimal"] for case in grid)
    ax.plot([low, high], [low, high], color="0.6", linewidth=0.8)
    for world in _values(grid, "world"):
        ax.plot([], [], color="0.3", marker=WORLD_MARKERS[world], linestyle="none", label=WORLDS[world])
    ax.plot([], [], color="0.3", marker="o", markerfacecolor="white", linestyle="none", label="k > 0")
    ax.set(xlabel="candidates worth one of π*, 1/ESS", ylabel="K", title="(b) K from which on excess < 10 %")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.legend(fontsize=6)


def _distances(ax: Axes, planted: list[Case]) -> None:
    ends = {"exo": style.METHODS["reverse_kl"], "dpo": style.METHODS["forward_kl"]}
    for case in _of(planted, order=0):
        look = LOOKS[case["loss"]]
        for name, end in ends.items():
            label = f"{look.label} to {end.label}"
            line = {"color": look.color, "linestyle": end.linestyle, "marker": end.marker, "label": label}
            ks = [point["k"] for point in case["points"]]
            ax.plot(ks, [point[f"distance_{name}"] for point in case["points"]], **line)
    ax.set(xlabel="candidates K", ylabel="total variation", ylim=(-0.02, 1.6), yticks=np.linspace(0, 1, 6))
    ax.set_title(f"(c) planted, length {planted[0]['world'].removeprefix('planted')}, k = 0")
    ax.set_xscale("log", base=2)
    ax.legend(fontsize=5.5, loc="upper right")


def _map(grid: list[Case], equal: float) -> Figure:
    worlds, orders = _values(grid, "world"), _values(grid, "order")
    size = (style.PAGE * 1.3, 0.7 + 1.9 * len(worlds))
    figure, axes = plt.subplots(len(worlds), len(orders), figsize=size, squeeze=False)
    for row, world in zip(axes, worlds, strict=True):
        for ax, order in zip(row, orders, strict=True):
            cases = _of(grid, world=world, order=order)
            if not cases:
                _full_table(ax, order)
                continue
            temperatures, ks = _values(cases, "temperature"), [point["k"] for point in cases[0]["points"]]
            ahead = np.array([[_ahead(cases, t, i) for i in range(len(ks))] for t in temperatures])
            _regions(ax, ahead, ks, [f"{t:.2g}" for t in temperatures], equal)
            ax.set_title(f"{WORLDS[world]}, k = {order}")
        row[0].set_ylabel("β (sd of the reward)")
    for ax in axes[-1]:
        ax.set_xlabel("candidates K")
    _legend(figure, reached=False)
    return figure


def _ahead(cases: list[Case], temperature: float, i: int) -> float:
    """What EXO-rw's J is above DPO-rw's at the i-th K, as a share of the gain of pi*."""
    exo, dpo = (_of(cases, temperature=temperature, loss=loss)[0] for loss in ("exo", "dpo"))
    gain = exo["optimal"]["objective"] - exo["reference"]["objective"]
    difference: float = exo["points"][i]["objective"] - dpo["points"][i]["objective"]
    return difference / gain


def _paths(paths: list[Case], fractions: list[float], equal: float) -> Figure:
    rows = sorted(
        {(case["metric"], case["world"], case["temperature"]) for case in paths},
        key=lambda row: (row[0], list(WORLDS).index(row[1]), row[2]),
    )
    orders = _values(paths, "order")
    size = (style.PAGE * 1.3, 0.8 + 0.5 * len(rows) + 0.105 * len(rows) * len(fractions))
    figure, axes = plt.subplots(len(rows), len(orders), figsize=size, squeeze=False)
    for line, (metric, world, temperature) in zip(axes, rows, strict=True):
        for ax, order in zip(line, orders, strict=True):
            cases = _of(paths, metric=metric, world=world, temperature=temperature, order=order)
            if not cases:
                _full_table(ax, order) if metric == "euclidean" else ax.set_axis_off()
                continue
            ks = _values(cases, "k")
            shares = {
                loss: np.array([[case["first_share"], *case["shares"]] for case in _of(cases, loss=loss)]).T
                for loss in LOOKS
            }
            _regions(ax, shares["exo"] - shares["dpo"], ks, [f"{f:g}" for f in fractions], equal)
            _reached(ax, shares)
            flow = ", natural gradient" if metric == "natural" else ""
            ax.set_title(f"{WORLDS[world]}, β = {temperature:.2g} sd, k = {order}{flow}", fontsize=7)
        line[0].set_ylabel(r"KL from $\pi_\mathrm{ref}$")
    for ax in axes[-1]:
        ax.set_xlabel("candidates K")
    _legend(figure, reached=True)
    return figure


def _regions(ax: Axes, ahead: np.ndarray, ks: Iterable[int], rows: list[str], equal: float) -> None:
    """A cell for each entry [rows, K], coloured by sign and size; lines where the sign changes; numbers in per cent."""
    for (y, x), share in np.ndenumerate(ahead):
        if math.isnan(share):
            continue
        color, dark = _color(share, equal)
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=color, linewidth=0))
        ax.text(x, y, _percent(share), fontsize=4.5, ha="center", va="center", color="white" if dark else "black")
    sign = np.where(np.isnan(ahead), 9, np.sign(np.where(np.abs(ahead) <= equal, 0, ahead)))
    for y, x in zip(*np.nonzero(sign[:, 1:] != sign[:, :-1]), strict=True):
        ax.plot([x + 0.5] * 2, [y - 0.5, y + 0.5], color="black", linewidth=1.0)
    for y, x in zip(*np.nonzero(sign[1:] != sign[:-1]), strict=True):
        ax.plot([x - 0.5, x + 0.5], [y + 0.5] * 2, color="black", linewidth=1.0)
    ax.grid(False)
    ax.set(xlim=(-0.5, ahead.shape[1] - 0.5), ylim=(-0.5, ahead.shape[0] - 0.5))
    ax.set_xticks(range(ahead.shape[1]), [str(k) for k in ks], fontsize=5.5)
    ax.set_yticks(range(ahead.shape[0]), rows, fontsize=5.5)


def _reached(ax: Axes, shares: dict[str, np.ndarray]) -> None:
    """Hatches where only one of the losses gets so far."""
    for loss, other in (("exo", "dpo"), ("dpo", "exo")):
        for y, x in zip(*np.nonzero(~np.isnan(shares[loss]) & np.isnan(shares[other])), strict=True):
            look: Case = {"facecolor": "white", "edgecolor": LOOKS[loss].color, "hatch": "////", "linewidth": 0}
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **look))


def _color(share: float, equal: float) -> tuple[str, bool]:
    """Of a cell, and whether it takes light text."""
    if abs(share) <= equal:
        return EQUAL, False
    loss = "exo" if share > 0 else "dpo"
    step = sum(abs(share) > bound for bound in STEPS)
    return SHADES[loss][step], loss == "exo" and step == 2


def _percent(share: float) -> str:
    """Two digits of the size, in per cent; the colour shows the sign."""
    size = 100 * abs(share)
    return "0" if size < 0.005 else f"{size:.2f}" if size < 0.1 else f"{size:.1f}" if size < 10 else f"{size:.0f}"


def _full_table(ax: Axes, order: int) -> None:
    ax.set_axis_off()
    text = f"k = {order} is a full table:\nboth end at π* at every K"
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=7)


def _legend(figure: Figure, *, reached: bool) -> None:
    names = ("< 1 %", "1 - 10 %", "> 10 %")
    patches = [
        Patch(color=shade, label=f"{LOOKS[loss].label} ahead, {name}")
        for loss, shades in SHADES.items()
        for shade, name in zip(shades, names, strict=True)
    ]
    patches.append(Patch(color=EQUAL, label="equal"))
    if reached:
        for look in LOOKS.values():
            patches.append(
                Patch(
                    facecolor="white",
                    edgecolor=look.color,
                    hatch="////",
                    linewidth=0,
                    label=f"only {look.label} gets so far",
                )
            )
    figure.legend(handles=patches, loc="outside upper center", ncols=5 if reached else 4, fontsize=6)


def _of(cases: list[Case], **wanted: Any) -> list[Case]:
    """The cases with these values, by order and K."""
    found = [case for case in cases if all(case[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda case: (case["order"], case.get("k", 0)))


def _values(cases: list[Case], key: str) -> list[Any]:
    """The values of an entry, ascending; worlds in their own order."""
    order: Callable[[Any], Any] | None = list(WORLDS).index if key == "world" else None
    return sorted({case[key] for case in cases}, key=order)


if __name__ == "__main__":
    style.main("fixed_points")
