"""Draws ``analysis/results/refreshed_candidates``: what fresh candidates repair of EXO-rw's gradient."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from figures import style

# Candidates are told apart as the methods are that would draw them.
LOOKS = {
    "reference": style.METHODS["reference"],
    "policy": replace(style.METHODS["rl"], label=r"$\pi_\theta$"),
    "tempered": replace(
        style.METHODS["exo_rw"], label=r"tempered: $\pi_\theta^{\beta_\pi}\pi_\mathrm{ref}^{1-\beta_\pi}$"
    ),
    "token_tempered": replace(style.METHODS["exo_pref"], label="tempered at each token", linestyle="--"),
    "half": replace(style.METHODS["forward_kl"], label=r"half $\pi_\theta$, half $\pi_\mathrm{ref}$"),
    "stale": replace(style.METHODS["best_of_n"], label="at each token, a checkpoint old"),
    "uncorrected": replace(
        style.METHODS["kernel"], label=r"$\pi_\theta$, log weights forgotten", linestyle=":", marker="*"
    ),
}
OTHERS = {
    "dpo_rw": replace(style.METHODS["dpo_rw"], label=r"DPO-rw on $\pi_\mathrm{ref}$"),
    "leave_one_out": replace(style.METHODS["ppo"], label=r"leave-one-out policy gradient"),
}
# Distances below are rounding.
FLOOR = 1e-9

CAPTIONS = {
    "refreshed_candidates": """\
EXO-rw on candidates from seven proposals, exactly; all but the last carry the log weight log π_ref − log μ. Tempered:
normalised over whole completions, which a language model cannot sample, or at each token, which it can. Rows: the
smallest and the largest β_π, β_π β_r = β. (a, e) Effective share of the weights p_f along EXO-rw's training. (b, f)
Distance of K/(K−1) times the expected gradient from that of its limit, KL(tempered policy‖π*), relative to the latter's
length, at the end of training, against K; tempered candidates have none, nor has the policy's with β_π = 1 (rounding,
not drawn). (c, g) Noise over signal per sample, K times the trace of the covariance over the squared length of the
mean, at the same policies, and of two other gradients; where the mean is biased, (b, f), a low ratio is no virtue. With
β_π = 1 EXO-rw on the policy's candidates is the leave-one-out policy gradient. Means over seeds, geometric for noise.
(d, h) Two planted modes, a policy without memory, β_π = 1: KL(π_θ‖π*) of the minimiser of the exactly expected loss at
K on the reference's candidates (0), then on candidates of the minimiser before, with the log weights (d) and without
(h); black: the best that the policy can.
"""
}


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """One page of eight panels."""
    figure, axes = plt.subplots(2, 4, figsize=(style.PAGE * 1.45, 5.2))
    beta_pis = results.config["beta_pis"]
    letters = iter("abcdefgh")
    for row, b in enumerate((0, len(beta_pis) - 1)):
        share, distance, ratio, path = axes[row]
        _shares(share, results, b)
        _distances(distance, results, b)
        _ratios(ratio, results, b)
        _refreshed(path, results, ("corrected", "uncorrected")[row])
        for ax, title in zip((share, distance, ratio), ("weights", "bias, end", "noise, end"), strict=True):
            ax.set_title(rf"({next(letters)}) {title}, $\beta_\pi$ = {beta_pis[b]:g}", fontsize=8)
        path.set_title(f"({next(letters)}) refreshed, {('with', 'without')[row]} weights", fontsize=8)
    for left, right in (
        (axes[0, 0], axes[1, 0]),
        (axes[0, 1], axes[1, 1]),
        (axes[0, 2], axes[1, 2]),
        (axes[0, 3], axes[1, 3]),
    ):
        limits = np.array([left.get_ylim(), right.get_ylim()])
        for ax in (left, right):
            ax.set_ylim(limits[:, 0].min(), limits[:, 1].max())
    handles, labels = axes[0, 2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    paths = style.save(figure, "refreshed_candidates", out_dir)
    plt.close(figure)
    return paths


def _at(results: style.StoredResult, name: str) -> int:
    return int(results.numbers["proposals"].index(name))


def _hollow(name: str) -> dict[str, Any]:
    """What may lie under another line is drawn larger and hollow."""
    return {"markerfacecolor": "none", "markersize": 6.5} if name == "policy" else {}


def _shares(ax: Axes, results: style.StoredResult, b: int) -> None:
    for name, look in LOOKS.items():
        share = results.arrays["share"][b, :, :, _at(results, name)].mean(0)
        ax.plot(results.arrays["steps"], share, **look.line(**_hollow(name)))
    ax.set(xlabel="training steps", ylabel="effective share of the weights")


def _distances(ax: Axes, results: style.StoredResult, b: int) -> None:
    for name, look in LOOKS.items():
        distance = results.arrays["distance"][b, :, -1, _at(results, name)].mean(0)
        ax.plot(results.arrays["ks"], np.where(distance > FLOOR, distance, np.nan), **look.line(**_hollow(name)))
    _against_k(ax, results)
    ax.set(yscale="log", ylabel="relative distance of the mean")


def _ratios(ax: Axes, results: style.StoredResult, b: int) -> None:
    ks = results.arrays["ks"]
    for o, look in enumerate(OTHERS.values()):
        ax.plot(ks, np.exp(np.log(results.arrays["other_ratio"][b, :, -1, o] * ks).mean(0)), **look.line())
    for name, look in LOOKS.items():
        q = _at(results, name)
        ratio = results.arrays["variance"][b, :, -1, q] * ks / results.arrays["signal"][b, :, -1, q]
        ax.plot(ks, np.exp(np.log(ratio).mean(0)), **look.line(**_hollow(name)))
    _against_k(ax, results)
    ax.set(yscale="log", ylabel="noise / signal per sample")


def _against_k(ax: Axes, results: style.StoredResult) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(results.arrays["ks"], [str(k) for k in results.arrays["ks"]])
    ax.set_xlabel("candidates K")


def _refreshed(ax: Axes, results: style.StoredResult, correction: str) -> None:
    paths = results.numbers["refreshed"][correction]
    look = LOOKS["tempered" if correction == "corrected" else "uncorrected"]
    for (k, path), marker, shade in zip(
        paths.items(), ("o", "s", "^", "D", "v", "P"), np.linspace(0.45, 1, len(paths)), strict=False
    ):
        ax.plot(range(len(path)), path, color=look.color, alpha=shade, marker=marker, label=f"K = {k}")
    ax.axhline(results.numbers["best_kl"], color="black", linewidth=0.8)
    ax.set_xticks(range(0, max(map(len, paths.values())), 2))
    ax.set(xlabel="refreshes", ylabel=r"$\mathrm{KL}(\pi_\theta\|\pi^*)$ (nats)")
    ax.legend(fontsize=6)


if __name__ == "__main__":
    style.main("refreshed_candidates")
