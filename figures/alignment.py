"""Reward against divergence and against steps, of every method, in a world where both are exact."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from figures import style

METHODS = {
    name: style.METHODS[name] for name in ("exo_rw", "dpo_rw", "exo_pref", "dpo_pref", "ppo", "ppo_few", "chosen_sft")
}
STORED = {"chosen_sft": "sft"}
PANELS = {
    "on the reward model": ("exo_rw", "dpo_rw", "ppo", "ppo_few"),
    "on the labelled pairs": ("exo_pref", "dpo_pref", "chosen_sft"),
}

CAPTIONS = {
    "alignment": """\
Oracle reward against KL(policy || reference), both exact, means over prompts. Black: the frontier, traced by the
optimal policies of the oracle's reward; no policy can be above it. Dotted black: the optimal policies of the reward
models, which is where methods on the reward model would end with unlimited capacity and data (mean over seeds). Best of
n: exact, n along the curve, by the oracle's reward (strong) and by the reward models (faint, mean over seeds). Markers:
the end of training at each temperature, means over seeds, with bars of the 95 % bootstrap interval over seeds on both
axes; faint lines: the way there during training. PPO draws fresh completions at every step, in all many times those of
the others; "PPO, as few" no more than theirs. (a) Methods that see the reward model's rewards. (b) Methods that see
the labelled pairs themselves; SFT is maximum likelihood of the chosen completions.
""",
    "alignment_steps": """\
Oracle reward (top) and J of the reward that is optimised, the reward model's, at its temperature (bottom) against
training steps, means over seeds and prompts; bands: 95 % bootstrap interval over seeds. Columns: temperatures. "PPO,
as few" descends many times on each batch, and its steps are those descents. The dashed line is J of the optimal policy
of the reward model, which nothing can exceed.
""",
}


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """The frontier, then the curves along training."""
    return [*_draw_frontier(results, out_dir), *_draw_steps(results, out_dir)]


def _values(results: style.StoredResult, method: str, metric: str) -> np.ndarray:
    """[betas, seeds, checkpoints], means over prompts."""
    index = results.numbers["metrics"].index(metric)
    values: np.ndarray = results.arrays[STORED.get(method, method)][:, :, :, index].mean(-1)
    return values


def _interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the second axis, the seeds, and the percentiles of its bootstrap."""
    n = values.shape[1]
    drawn = np.random.default_rng(0).integers(n, size=(2000, n))
    means = values[:, drawn].mean(2)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    return values.mean(1), low, high


def _draw_frontier(results: style.StoredResult, out_dir: Path) -> list[Path]:
    figure, axes = plt.subplots(1, 2, figsize=(style.PAGE, 3.6), sharex=True, sharey=True)
    for letter, ax, (title, methods) in zip("ab", axes, PANELS.items(), strict=True):
        _possible(ax, results)
        for method in methods:
            _ends(ax, results, method)
        ax.set(title=f"({letter}) {title}", xlabel=r"$\mathrm{KL}(\pi_\theta\|\pi_\mathrm{ref})$ (nats)")
    axes[0].set_ylabel("oracle reward (nats)")
    ends = [_values(results, method, "kl_to_reference")[:, :, -1].mean(1).max() for method in METHODS]
    axes[0].set_xlim(-0.1, 1.05 * max(ends))
    entries: dict[str, Any] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4)
    paths = style.save(figure, "alignment", out_dir)
    plt.close(figure)
    return paths


def _possible(ax: Axes, results: style.StoredResult) -> None:
    """What holds without any training."""
    arrays, best = results.arrays, style.METHODS["best_of_n"]
    ax.plot(*arrays["frontier"][:, :2].T, color="black", label=r"frontier: $\pi^*_\beta$ of the oracle")
    kl, reward = arrays["optimum_of_model"].mean(0).T
    ax.plot(kl, reward, color="black", linestyle=":", label=r"$\pi^*_\beta$ of the reward model")
    ax.plot(*arrays["best_of_n_oracle"].T, **best.line(label="best of n, oracle", markersize=2.5))
    ax.plot(
        *arrays["best_of_n_model"].mean(0).T,
        **best.line(label="best of n, reward model", markersize=2.5, alpha=0.45),
    )


def _ends(ax: Axes, results: style.StoredResult, method: str) -> None:
    """The last checkpoint at each temperature, and the way to it."""
    kl, reward = (_values(results, method, name) for name in ("kl_to_reference", "oracle_reward"))
    look = METHODS[method]
    for path in zip(kl.mean(1), reward.mean(1), strict=True):
        ax.plot(*path, color=look.color, linewidth=0.6, alpha=0.4)
    (x, x_low, x_high), (y, y_low, y_high) = (_interval(values[:, :, -1]) for values in (kl, reward))
    ax.errorbar(
        x, y, xerr=[x - x_low, x_high - x], yerr=[y - y_low, y_high - y],
        color=look.color, marker=look.marker, linestyle="none", elinewidth=0.8, label=look.label, zorder=3,
    )  # fmt: skip


def _draw_steps(results: style.StoredResult, out_dir: Path) -> list[Path]:
    betas = list(results.numbers["final"]["exo_rw"])
    shown = sorted({0, len(betas) // 2, len(betas) - 1})
    figure, axes = plt.subplots(2, len(shown), figsize=(style.PAGE, 4.4), sharex=True, sharey="row", squeeze=False)
    for column, i in enumerate(shown):
        for ax, metric in zip(axes[:, column], ("oracle_reward", "model_objective"), strict=True):
            for method, look in METHODS.items():
                if metric == "model_objective" and method not in PANELS["on the reward model"]:
                    continue
                values = _values(results, method, metric)
                mean, low, high = _interval(values[min(i, len(values) - 1)][None])
                ax.plot(results.arrays["steps"], mean[0], **look.line(markers=False))
                ax.fill_between(results.arrays["steps"], low[0], high[0], color=look.color, alpha=0.2, linewidth=0)
        axes[1, column].axhline(results.arrays["optimal_model_objective"][i].mean(), color="black", linestyle="--")
        axes[0, column].set_title(rf"$\beta$ = {betas[i]}")
        axes[1, column].set_xlabel("steps")
    axes[0, 0].set_ylabel("oracle reward (nats)")
    axes[1, 0].set_ylabel(r"$J_\beta$, reward model (nats)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    paths = style.save(figure, "alignment_steps", out_dir)
    plt.close(figure)
    return paths


if __name__ == "__main__":
    style.main("alignment")
