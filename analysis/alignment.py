"""The paper's experiment in miniature: reward against divergence, with every axis exact and the frontier known.

Every method of :mod:`analysis.pipeline` at several temperatures and seeds, measured along its training.
``python -m analysis.alignment --help`` lists the settings.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from analysis import runner
from analysis.pipeline import (
    METHODS,
    METRICS,
    Evaluator,
    Setting,
    aligned,
    checkpoints,
    drawn,
    fine_tuned,
    mean_over_seeds,
    point,
    setting_of,
)
from exo_toy import logspace
from exo_toy.targets import best_of_n, optimal_policy

# Differences that are reported, seed by seed.
COMPARED = (
    ("exo_rw", "ppo"), ("ppo", "dpo_rw"), ("exo_rw", "dpo_rw"), ("exo_pref", "dpo_pref"),
    ("exo_rw", "ppo_few"), ("ppo", "ppo_few"),
)  # fmt: skip
# Told of the best of n too, which has no temperature: modes are then those at the first.
OUTCOMES = (
    "kl_to_reference", "oracle_reward", "model_reward", "win_against_reference", "win_against_chosen",
    "model_win_against_reference", "model_win_against_chosen", "mode_mass",
)  # fmt: skip


@dataclass(frozen=True)
class Config(Setting):
    """Settings; the defaults are the reported run."""

    betas: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6)
    seeds: int = 6
    # Of the paired comparisons.
    resamples: int = 10_000
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    # Divergences from the reference at which methods are compared.
    divergences: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0, 3.0)


PRESETS = {
    "quick": Config(length=4, betas=(0.1, 0.8), seeds=2, steps=60, tuning_steps=200, checkpoints=4),
    "default": Config(length=5, betas=(0.1, 0.4, 1.6), seeds=2, steps=200, tuning_steps=400, checkpoints=8),
    "full": Config(),
}


def run(config: Config) -> runner.Result:
    """Evaluate every case; numbers for the claims, arrays for the figures."""
    setting = setting_of(config)
    cases = [
        {"setting": setting, "method": method, "beta": beta, "seed": seed}
        for method in METHODS
        for beta in (config.betas[:1] if method == "sft" else config.betas)
        for seed in range(config.seeds)
    ]
    results = dict(
        zip(((c["method"], c["beta"], c["seed"]) for c in cases), runner.map_cases(aligned, cases), strict=True)
    )
    arrays: dict[str, np.ndarray] = {"steps": checkpoints(Setting(**setting))}
    for method in METHODS:
        betas = [beta for beta in config.betas if (method, beta, 0) in results]
        for name, suffix in (("metrics", ""), ("modes", "_modes"), ("below_frontier", "_below")):
            arrays[method + suffix] = np.array(
                [[results[method, beta, seed][name] for seed in range(config.seeds)] for beta in betas]
            )
    arrays |= possible(setting, config)
    return runner.Result(numbers(config, arrays), arrays)


def possible(setting: dict[str, Any], config: Config) -> dict[str, np.ndarray]:
    """The frontier of oracle reward against divergence, and best of n by either reward: what is exact by itself."""
    reference = fine_tuned(Setting(**setting))
    log_ref, oracle = reference.log_ref, reference.oracle
    frontier_points = []
    for beta in np.geomspace(min(config.betas) / 4, 50 * max(config.betas), 80):
        log_pi, _ = optimal_policy(log_ref, oracle, beta=float(beta))
        frontier_points.append((*point(log_pi, log_ref, oracle), beta))
    by_oracle = [point(best_of_n(log_ref, oracle, n=n), log_ref, oracle) for n in config.best_of]
    models = [drawn(Setting(**setting), seed).model for seed in range(config.seeds)]
    by_model = [[point(best_of_n(log_ref, model, n=n), log_ref, oracle) for n in config.best_of] for model in models]
    optima_of_models = [
        [point(optimal_policy(log_ref, model, beta=beta)[0], log_ref, oracle) for beta in config.betas]
        for model in models
    ]
    # The best of the most by the reward model, measured as the policies are, [seeds, M, X].
    options = Setting(**setting)
    best = []
    for data in (drawn(options, seed) for seed in range(config.seeds)):
        evaluator = Evaluator(reference, data, config.betas[0], options, config.betas[0])
        best.append(evaluator.metrics(best_of_n(log_ref, data.model, n=config.best_of[-1])))
    # What a perfect optimiser of the reward model reaches, [betas, seeds].
    model_objective = [
        [(beta * optimal_policy(log_ref, model, beta=beta)[1]).mean().item() for model in models]
        for beta in config.betas
    ]
    return {
        "optimal_model_objective": np.array(model_objective),
        "frontier": np.array(frontier_points),
        "best_of_n_oracle": np.array(by_oracle),
        "best_of_n_model": np.array(by_model),
        "best_of_n_metrics": torch.stack(best).numpy(),
        "optimum_of_model": np.array(optima_of_models),
        "reference_reward": logspace.expectation(log_ref, oracle).numpy(),
    }


def numbers(config: Config, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Final means with their spread over seeds, distance below the frontier, paired differences between methods."""
    found: dict[str, Any] = {"metrics": list(METRICS), "final": {}, "below_frontier": {}, "differences": {}}
    # [seeds, M] of each method and temperature, means over prompts.
    final = {
        (method, beta): arrays[method][i, :, -1].mean(-1)
        for method in METHODS
        for i, beta in enumerate(config.betas[: len(arrays[method])])
    }
    for (method, beta), values in final.items():
        below = arrays[f"{method}_below"][config.betas.index(beta)]
        found["below_frontier"].setdefault(method, {})[_name(beta)] = mean_over_seeds(below, config.resamples)
        found["final"].setdefault(method, {})[_name(beta)] = {
            name: mean_over_seeds(values[:, m], config.resamples) for m, name in enumerate(METRICS)
        }
    for a, b in COMPARED:
        for i, beta in enumerate(config.betas):
            difference = final[a, beta] - final[b, beta]
            measured = {name: mean_over_seeds(difference[:, m], config.resamples) for m, name in enumerate(METRICS)}
            measured["below_frontier"] = mean_over_seeds(
                arrays[f"{a}_below"][i] - arrays[f"{b}_below"][i], config.resamples
            )
            found["differences"].setdefault(f"{a} - {b}", {})[_name(beta)] = measured
    found["ppo_completions"] = config.steps * config.batch
    found["at_divergence"] = at_divergence(config, arrays)
    best = arrays["best_of_n_metrics"].mean(-1)
    found["best_of_n"] = {name: mean_over_seeds(best[:, METRICS.index(name)], config.resamples) for name in OUTCOMES}
    found["best_of_n"]["n"] = config.best_of[-1]
    found["least_room_below_frontier"] = min(_room(arrays[method], arrays["frontier"]) for method in METHODS)
    return found


def at_divergence(config: Config, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Nats below the frontier at equal divergences, and paired differences, where every seed of a method gets there.

    Methods that train at one temperature end at different divergences, and there is the less to miss the nearer the
    reference is.
    """
    kl_at = METRICS.index("kl_to_reference")
    below = {
        method: interpolated(arrays[method][:, :, -1, kl_at].mean(-1), arrays[f"{method}_below"], config.divergences)
        for method in METHODS
        if len(arrays[method]) > 1
    }
    differences = {f"{a} - {b}": below[a] - below[b] for a, b in COMPARED}
    return {
        what: {
            name: {
                _name(kl): mean_over_seeds(values[:, i], config.resamples)
                for i, kl in enumerate(config.divergences)
                if np.isfinite(values[:, i]).all()
            }
            for name, values in tables.items()
        }
        for what, tables in (("below_frontier", below), ("differences", differences))
    }


def interpolated(kl: np.ndarray, below: np.ndarray, divergences: tuple[float, ...]) -> np.ndarray:
    """[seeds, L]: distances below the frontier, of [betas, seeds] ends of training; NaN beyond them.

    Both grow like the root of a small divergence: the distance over it is taken as linear in the divergence's log.
    """
    rows = []
    for x, y in zip(kl.T, below.T, strict=True):
        order = np.argsort(x)
        levels = np.log(divergences)
        slope = np.interp(levels, np.log(x[order]), (y / np.sqrt(x))[order], left=np.nan, right=np.nan)
        rows.append(slope * np.sqrt(divergences))
    return np.array(rows)


def _room(metrics: np.ndarray, points: np.ndarray) -> float:
    """The least by which J of any checkpoint stays below its maximum, over all temperatures of the frontier."""
    kl, reward = (metrics[..., METRICS.index(name), :].mean(-1) for name in ("kl_to_reference", "oracle_reward"))
    return min(float((at_reward - reward - beta * (at_kl - kl)).min()) for at_kl, at_reward, beta in points)


def _name(beta: float) -> str:
    return f"{beta:g}"


if __name__ == "__main__":
    runner.main("alignment")
