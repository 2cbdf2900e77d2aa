"""Noise of EXO's, DPO's and policy gradients at equal numbers of samples: along training, and against K."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from figures import style

EXO, DPO, PPO, RL = (style.METHODS[name] for name in ("exo_rw", "dpo_rw", "ppo", "rl"))
# One family of methods has one colour; lines and markers tell its members apart.
LOOKS = {
    "exo_rw": EXO,
    "dpo_rw": DPO,
    "ppo": PPO,
    "none": replace(RL, label="policy gradient, no baseline", linestyle=":", marker="x"),
    "best": replace(RL, label="best constant baseline"),
    "leave_one_out": replace(RL, label="leave-one-out", linestyle=(0, (5, 1)), marker="P"),
}
TRAININGS = {"exo_rw": "EXO-rw", "ppo": "PPO"}
# EXO-rw's line, and how strong it is, from few candidates to many.
BY_K = ((":", 0.5), ("--", 0.75), ("-", 1.0))

CAPTIONS = {
    "gradient_noise": """\
Exact noise of sampled gradients along training, per sample: K times the trace of the covariance of the gradient of one
group of K samples per prompt, averaged over prompts. Upper half: the trace itself; lower half: the same over the
squared length of the expected gradient. Rows: policies on the way of EXO-rw and of PPO; columns: temperatures. EXO-rw's
and DPO-rw's candidates are fresh ones of the reference, the others' samples come from the policy. PPO: its first
descent, with the value table that fits best; of it and of a constant baseline the noise per sample is the same at every
K. EXO-rw's and DPO-rw's expected gradients are not along that of J, so that their ratios count other signals. The
temperature is split evenly, so that at the start EXO-rw's gradient is (K - 1)/K of the leave-one-out policy
gradient's, and traces can be compared. Where a method's training ends its own expected gradient vanishes and its ratio
grows without bound, the other's need not. Lines: geometric means over seeds, which share the policy they start from;
bands: 95 % bootstrap intervals over seeds.
""",
    "gradient_noise_candidates": """\
Exact noise over progress per sample against the number K of samples per prompt: K times the trace of the covariance
over the square of what the expected gradient has along that of J, at the start, in the middle and at the end of
training at one temperature; a loss is not drawn at a K where some seed's expected gradient points away. Flat for what
averages independent samples. At the start EXO-rw's curve lies on that of the policy gradient with the mean of the other
samples for a baseline (leave-one-out). Rows: policies on the way of EXO-rw and of PPO. Lines: geometric means over
seeds; bands: 95 % bootstrap intervals over seeds.
""",
}


def draw(results: style.StoredResult, out_dir: Path) -> list[Path]:
    """Along training, then against K."""
    return [*_draw_steps(results, out_dir), *_draw_candidates(results, out_dir)]


def _per_sample(results: style.StoredResult, training: str, name: str, *, over_signal: bool) -> np.ndarray:
    """[betas, seeds, checkpoints, K]."""
    at = results.numbers["estimators"].index(name)
    arrays = results.arrays
    values: np.ndarray = arrays[f"{training}.variance"][..., at, :] * arrays["ks"]
    return values / arrays[f"{training}.signal"][..., at, :] if over_signal else values


def _over_progress(results: style.StoredResult, training: str, name: str) -> np.ndarray:
    """[betas, seeds, checkpoints, K], NaN where the expected gradient points away from that of J."""
    values = _per_sample(results, training, name, over_signal=True)
    losses = results.numbers["losses"]
    if name not in losses:
        return values
    cosine = results.arrays[f"{training}.cosine"][..., losses.index(name), :]
    return values / np.where(cosine > 0, cosine, np.nan) ** 2


def _interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Geometric mean over the first axis, the seeds, and the percentiles of its bootstrap."""
    n, logs = len(values), np.log(values)
    drawn = np.random.default_rng(0).integers(n, size=(2000, n))
    low, high = np.quantile(logs[drawn].mean(1), [0.025, 0.975], axis=0)
    return np.exp(logs.mean(0)), np.exp(low), np.exp(high)


def _curve(ax: Axes, x: np.ndarray, values: np.ndarray, look: style.Look, alpha: float = 1.0) -> None:
    """A line over [seeds, points] with its interval."""
    mean, low, high = _interval(values)
    # Hollow, so that what lies on the same line is seen; EXO-rw on top.
    marker = {"zorder": 3} if look.color == EXO.color else {"zorder": 2, "markerfacecolor": "none", "markersize": 5.5}
    ax.plot(x, mean, **look.line(), alpha=alpha, **marker)
    ax.fill_between(x, low, high, color=look.color, alpha=0.12, linewidth=0)


def _draw_steps(results: style.StoredResult, out_dir: Path) -> list[Path]:
    betas, ks, steps = results.config["betas"], results.arrays["ks"], results.arrays["steps"]
    shown = (0, len(ks) // 2, len(ks) - 1)
    figure, axes = plt.subplots(4, len(betas), figsize=(style.PAGE, 8.2), sharex=True, sharey="row", squeeze=False)
    rows = [(over_signal, training) for over_signal in (False, True) for training in TRAININGS]
    for row, (over_signal, training) in enumerate(rows):
        for column, beta in enumerate(betas):
            ax = axes[row, column]
            for name in ("none", "best", "ppo"):
                values = _per_sample(results, training, name, over_signal=over_signal)[column, :, :, 0]
                _curve(ax, steps, values, LOOKS[name])
            few = replace(DPO, label=f"DPO-rw, K={ks[shown[1]]}")
            values = _per_sample(results, training, "dpo_rw", over_signal=over_signal)[column, :, :, shown[1]]
            _curve(ax, steps, values, few)
            for i, (linestyle, alpha) in zip(shown, BY_K, strict=True):
                values = _per_sample(results, training, "exo_rw", over_signal=over_signal)[column, :, :, i]
                _curve(ax, steps, values, replace(EXO, label=f"EXO-rw, K={ks[i]}", linestyle=linestyle), alpha)
            ax.set_yscale("log")
            ax.set_title(rf"{TRAININGS[training]}'s policy, $\beta$ = {beta:g}", fontsize=8)
        axes[row, 0].set_ylabel("noise / signal" if over_signal else "trace")
    for ax in axes[-1]:
        ax.set_xlabel("training steps")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    paths = style.save(figure, "gradient_noise", out_dir)
    plt.close(figure)
    return paths


def _draw_candidates(results: style.StoredResult, out_dir: Path) -> list[Path]:
    betas, ks, steps = results.config["betas"], results.arrays["ks"], results.arrays["steps"].tolist()
    middle = len(betas) // 2
    stages = results.numbers["stages"]
    figure, axes = plt.subplots(
        len(TRAININGS), len(stages), figsize=(style.PAGE, 4.6), sharex=True, sharey=True, squeeze=False
    )
    for row, training in enumerate(TRAININGS):
        for ax, (stage, step) in zip(axes[row], stages.items(), strict=True):
            for name, look in LOOKS.items():
                values = _over_progress(results, training, name)[middle, :, steps.index(step)]
                _curve(ax, ks, values, look)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xticks(ks)
            ax.set_title(f"{TRAININGS[training]}'s policy, {stage} ({step} steps)", fontsize=8)
        axes[row, 0].set_ylabel("noise / progress")
    for ax in axes[-1]:
        ax.set_xlabel("samples per prompt, K")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, title=rf"$\beta$ = {betas[middle]:g}")
    paths = style.save(figure, "gradient_noise_candidates", out_dir)
    plt.close(figure)
    return paths


if __name__ == "__main__":
    style.main("gradient_noise")
