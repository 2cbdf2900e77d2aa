"""Draws ``analysis/results/mode_seeking``: which modes a policy of limited capacity finds."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from figures import style

CAPTIONS = {
    "mode_seeking": """\
Mode-seeking and mean-seeking, exactly. (a) A bimodal optimal policy on a line and the discretised Gaussians that
minimise either KL divergence; thin: further local minima. (b-f) Two planted modes on sequences of 6 tokens, uniform
reference, k-gram policies. (b) Probability of the two modes (filled: the better, hollow: the other) at the best local
minimum of KL(π_θ||π*) found and at the minimiser of KL(π*||π_θ), against k. (c) The KL divergence that RL minimises,
at both minimisers, against β (hollow: the best found, but not certified as a minimum). (d) The same at the policies
that minimise the exactly expected EXO and DPO losses at K candidates (lines; k = 0), and at policies trained on
sampled candidates (markers: mean over seeds, bars: range), against the two limits. (e) Expected reward of the same
policies. (f) Their mode probabilities, EXO only, and its effective sample size per candidate.
""",
}
ORDER_MARKERS = ("o", "s", "^", "D")
FLOOR = 1e-6


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """One page of six panels."""
    numbers, beta = results.numbers, results.config["beta"]
    figure, axes = plt.subplots(2, 3, figsize=(style.PAGE * 1.35, 5.2))
    _line(axes[0, 0], results.arrays)
    _masses(axes[0, 1], numbers, beta)
    _against_beta(axes[0, 2], numbers)
    at_beta = next(case for case in numbers["capacity"] if (case["beta"], case["order"]) == (beta, 0))
    limits = {
        "reverse_kl": at_beta["policy_to_optimal"][0],
        "forward_kl": at_beta["optimal_to_policy"],
        "optimal": numbers["target"][str(beta)],
    }
    _against_k(axes[1, 0], numbers, limits, "kl_policy_to_optimal")
    axes[1, 0].set(ylabel=r"$\mathrm{KL}(\pi_\theta\|\pi^*)$ (nats)", title="(d) fixed points at finite K")
    axes[1, 0].legend(fontsize=6, loc="center right")
    _against_k(axes[1, 1], numbers, limits, "expected_reward")
    axes[1, 1].set(ylabel="expected reward (nats)", title="(e) expected reward")
    _masses_against_k(axes[1, 2], numbers, limits)
    paths = style.save(figure, "mode_seeking", out_dir)
    plt.close(figure)
    return paths


def _line(ax: Axes, arrays: dict[str, np.ndarray]) -> None:
    points, optimal = arrays["line_points"], arrays["line_optimal"]
    ax.fill_between(points, optimal, color="0.88")
    ax.plot(points, optimal, **style.METHODS["optimal"].line(markers=False, linewidth=0.8))
    for name, key in (("reverse_kl", "line_policy_to_optimal"), ("forward_kl", "line_optimal_to_policy")):
        best, *others = arrays[key]
        ax.plot(points, best, **style.METHODS[name].line(markers=False))
        for other in others:
            ax.plot(points, other, color=style.METHODS[name].color, linewidth=0.6)
    ax.set(xlabel="point of the line", ylabel="probability", title="(a) two-parameter policy")
    ax.set_ylim(top=1.35 * max(optimal.max(), arrays["line_policy_to_optimal"].max()))
    ax.legend(fontsize=6, loc="upper right")


def _masses(ax: Axes, numbers: dict[str, Any], beta: float) -> None:
    cases = sorted((case for case in numbers["capacity"] if case["beta"] == beta), key=lambda case: case["order"])
    orders = [case["order"] for case in cases]
    for i, mass in enumerate(numbers["target"][str(beta)]["mode_masses"]):
        ax.axhline(mass, color="black", linewidth=0.8, label=style.METHODS["optimal"].label if i == 0 else None)
    for name, pick in (
        ("reverse_kl", lambda case: case["policy_to_optimal"][0]),
        ("forward_kl", lambda case: case["optimal_to_policy"]),
    ):
        look = style.METHODS[name]
        masses = np.array([sorted(pick(case)["mode_masses"], reverse=True) for case in cases])
        ax.plot(orders, masses[:, 0], **look.line())
        ax.plot(orders, masses[:, 1], **look.line(label=None, markerfacecolor="white"))
    ax.set(xlabel="order k of the k-gram policy", ylabel="probability of a mode", title="(b) capacity", xticks=orders)
    ax.legend(fontsize=6)


def _against_beta(ax: Axes, numbers: dict[str, Any]) -> None:
    for order in sorted({case["order"] for case in numbers["capacity"]}):
        cases = sorted((case for case in numbers["capacity"] if case["order"] == order), key=lambda case: case["beta"])
        betas = [case["beta"] for case in cases]
        for name, pick in (
            ("reverse_kl", lambda case: case["policy_to_optimal"][0]),
            ("forward_kl", lambda case: case["optimal_to_policy"]),
        ):
            look = style.METHODS[name]
            line = look.line(marker=ORDER_MARKERS[order], label=look.label if order == 0 else None)
            ax.plot(betas, [max(pick(case)["kl_policy_to_optimal"], FLOOR) for case in cases], **line)
            if name == "reverse_kl":
                stiff = [case for case in cases if case["certified"] and not pick(case)["is_minimum"]]
                hollow = {**line, "linestyle": "none", "markerfacecolor": "white", "label": None}
                ax.plot(
                    [case["beta"] for case in stiff], [pick(case)["kl_policy_to_optimal"] for case in stiff], **hollow
                )
        ax.plot([], [], color="0.4", marker=ORDER_MARKERS[order], linestyle="none", label=f"k = {order}")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel=r"$\beta$ (nats of reward per nat of KL)",
        ylabel=r"$\mathrm{KL}(\pi_\theta\|\pi^*)$ (nats)",
        title="(c) the KL that RL minimises",
    )
    ticks = sorted({case["beta"] for case in numbers["capacity"]})
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_ylim(bottom=1e-6)
    ax.legend(fontsize=6, loc="lower right", ncol=2)


def _against_k(ax: Axes, numbers: dict[str, Any], limits: dict[str, Any], quantity: str) -> None:
    for name in ("reverse_kl", "forward_kl"):
        look = style.METHODS[name]
        ax.axhline(limits[name][quantity], color=look.color, linestyle=":", linewidth=1.2, label=look.label)
    for name in ("exo", "dpo"):
        look = style.METHODS[name]
        exact = sorted((case for case in numbers["fixed_points"] if case["loss"] == name), key=lambda case: case["k"])
        ax.plot([case["k"] for case in exact], [case[quantity] for case in exact], **look.line(markers=False))
        ks, middle, low, high = _over_seeds(numbers["trained"], name, quantity)
        ax.errorbar(
            ks,
            middle,
            [middle - low, high - middle],
            color=look.color,
            marker=look.marker,
            linestyle="none",
            capsize=2,
            linewidth=0.8,
            label=f"{look.label}, sampled training",
        )
    ax.set(xscale="log", xlabel="candidates K")
    ax.set_xscale("log", base=2)


def _masses_against_k(ax: Axes, numbers: dict[str, Any], limits: dict[str, Any]) -> None:
    exact = sorted((case for case in numbers["fixed_points"] if case["loss"] == "exo"), key=lambda case: case["k"])
    ks = [case["k"] for case in exact]
    masses = np.array([sorted(case["mode_masses"], reverse=True) for case in exact])
    look, limit = style.METHODS["exo"], style.METHODS["reverse_kl"]
    ax.plot(ks, masses[:, 0], **look.line(label="EXO, better mode"))
    ax.plot(ks, masses[:, 1], **look.line(label="EXO, other mode", markerfacecolor="white"))
    for mass in limits["reverse_kl"]["mode_masses"]:
        ax.axhline(mass, color=limit.color, linestyle=":", linewidth=1.2)
    ax.set(xlabel="candidates K", ylabel="probability of a mode", title="(f) EXO's modes, and their price")
    ax.set_xscale("log", base=2)
    twin = ax.twinx()
    twin.plot(ks, [case["ess_share"] for case in exact], color="0.5", linestyle="--", linewidth=1.0, label="ESS / M")
    twin.set(yscale="log", ylabel="ESS per candidate of $\\pi_\\mathrm{ref}$")
    twin.grid(False)
    twin.minorticks_off()
    twin.spines["right"].set_visible(True)
    handles = [*ax.get_legend_handles_labels()[0], *twin.get_legend_handles_labels()[0]]
    ax.legend(handles=handles, fontsize=6, loc="center right")


def _over_seeds(
    trained: list[dict[str, Any]], name: str, quantity: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lowest and highest over seeds at each K."""
    ks = sorted({case["k"] for case in trained})
    values = [[case[quantity] for case in trained if case["loss"] == name and case["k"] == k] for k in ks]
    return (
        np.array(ks),
        np.array([np.mean(row) for row in values]),
        np.array([min(row) for row in values]),
        np.array([max(row) for row in values]),
    )


if __name__ == "__main__":
    style.main("mode_seeking")
