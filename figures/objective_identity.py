"""To how many digits the exact identities hold over drawn problems, and that broken ones do not."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from figures import style

MOST_DIGITS = 16
# The last bin holds all that agree to 16 digits or more.
BINS = np.arange(0, MOST_DIGITS + 1, 0.5)

LABELS = {
    "objective": r"$J_\beta(\pi)=\beta\log Z_\beta-\beta\,\mathrm{KL}(\pi\|\pi^*_\beta)$",
    "optimum": r"$\nabla E_\pi[r]=\beta\,\nabla\mathrm{KL}(\pi\|\pi_\mathrm{ref})$ at $\pi^*_\beta$",
    "generalized": r"$J_{\beta_r}(\pi^{\beta_\pi})=\beta_r\log Z_{\beta_r}-\beta_r\,\mathrm{KL}$",
    "generalized_gradient": r"$\nabla J_{\beta_r}(\pi_\theta^{\beta_\pi})=-\beta_r\nabla\mathrm{KL}$",
    "optimum_split": r"$\pi^{\beta_\pi}=\pi^*_{\beta_r}$ iff $\pi=\pi^*_{\beta_r\beta_\pi}$",
    "tabular_gradients": r"$\nabla$ of both KL, full table",
    "exo_rw_sample_gradient": r"$\nabla$EXO-rw $=\mathrm{Cov}_{p_f}(h,\nabla f)$",
    "dpo_rw_sample_gradient": r"$\nabla$DPO-rw $=\sum(p_f-p_r)\nabla f$",
    "group_baseline": r"$\nabla$EXO-rw at ref.: group baseline",
    "exo_rw_at_reference": r"$E\nabla$EXO-rw at ref. $=\frac{K-1}{K}\nabla\mathrm{KL}$",
    "dpo_bradley_terry": "DPO, Bradley–Terry = DPO-rw, K = 2",
    "exo_pref": r"EXO-pref $=\mathrm{KL}(p_f\|p_h)$",
    "finite_k_enumeration": "quadrature = all tuples, K = 2…4",
}
HELD = {"color": "#0072B2", "linewidth": 0}
BROKEN = {"facecolor": "#E8E8E8", "edgecolor": "#666666", "hatch": "/////", "linewidth": 0.5}

CAPTIONS = {
    "objective_identity": """\
Digits to which the two sides of each exact identity agree, -log10 of the residual, over randomly drawn problems
(spaces, prompts, policy classes, temperatures and rewards over more than two decades). Filled: the identity as
stated. Hatched: the same problems with the temperature (for EXO-pref also the label smoothing) one per cent off on one
side, which has to fail; it agrees only where the temperature hardly matters: a target that is a point mass, equal
rewards. Bars of a row are shares of the problems; the last bin holds agreement to 16 digits or more, equality
included. Right: the fewest digits of any problem, as stated. Residuals are relative to the sides or, where a side is a
difference of larger terms, to the largest of these.
"""
}


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """One histogram per identity."""
    figure, axes = plt.subplots(len(LABELS), 1, figsize=(style.PAGE, 5.8), sharex=True)
    for ax, (name, label) in zip(axes, LABELS.items(), strict=True):
        _histogram(ax, results.arrays[f"control.{name}"], "one per cent off on one side", **BROKEN)
        _histogram(ax, results.arrays[f"residual.{name}"], "as stated", **HELD)
        ax.set_ylim(0, 1)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        fewest = -np.log10(results.number(f"worst_residual.{name}"))
        ax.text(1.01, 0.4, f"{fewest:.1f}", transform=ax.transAxes, va="center", fontsize=8)
    axes[0].text(1.01, 1.15, "fewest", transform=axes[0].transAxes, va="center", fontsize=8)
    ticks = range(0, MOST_DIGITS + 1, 2)
    axes[-1].set_xticks(ticks, [*map(str, ticks[:-1]), f"≥ {MOST_DIGITS}"])
    axes[-1].set_xlim(BINS[0], BINS[-1])
    axes[-1].set_xlabel(f"digits of agreement over {results.number('problems'):,} problems")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=2)
    paths = style.save(figure, "objective_identity", out_dir)
    plt.close(figure)
    return paths


def _histogram(ax: Axes, residual: np.ndarray, label: str, **look: object) -> None:
    """Shares of the problems by digits of agreement."""
    digits = -np.log10(np.maximum(residual, 10.0**-MOST_DIGITS))
    ax.hist(digits, BINS, weights=np.full(len(digits), 1 / len(digits)), label=label, **look)  # type: ignore[arg-type]


if __name__ == "__main__":
    style.main("objective_identity")
