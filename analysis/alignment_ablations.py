"""What the outcome of alignment depends on, and under which conditions methods change places.

One setting of :mod:`analysis.pipeline` is changed at a time, at one temperature:

* k: candidates to a group, at the same number of completions;
* label_smoothing: of EXO-pref;
* split: beta_pi / beta_r of the losses on rewards, their product fixed;
* completions: of each prompt, which are also the reward model's data;
* capacity: the policy a k-gram of order 0 up to the full table, and its reference with it;
* reward_order: how many tokens the reward model sees before the present one; up to all of them;
* hard_labels: whether labels are drawn or given by the higher reward.

Then the limits, in a smaller world: each method's expected loss, exact, minimised over k-grams up to the full table,
where all but EXO-pref have to reach the optimal policy of the reward that they were given; and the same methods on
completions, more and more of them, with a full table.

``python -m analysis.alignment_ablations --help`` lists the settings.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import runner
from analysis.pipeline import METRICS, Setting, aligned, mean_over_seeds, setting_of
from exo_toy.divergences import kl_divergence
from exo_toy.finite_k import expected_dpo_rw_loss, expected_exo_rw_loss
from exo_toy.losses import exo_pref_loss
from exo_toy.objectives import alignment_objective
from exo_toy.policies import closest_kgram
from exo_toy.preferences import bradley_terry, expected_preference_loss
from exo_toy.reviews import ReviewWorld
from exo_toy.targets import optimal_policy
from exo_toy.training import minimize

REWARDED = ("exo_rw", "dpo_rw", "ppo")
PAIRED = ("exo_pref", "dpo_pref")
METHODS = (*REWARDED, *PAIRED)
# Whose reward a method is given, and so whose optimal policy it is to reach.
GIVEN = {**dict.fromkeys(REWARDED, "model"), **dict.fromkeys(PAIRED, "oracle")}
# Ordered as in the paper: each is said to do at least as well as the next.
COMPARED = (("exo_rw", "ppo"), ("ppo", "dpo_rw"), ("exo_rw", "dpo_rw"), ("exo_pref", "ppo"), ("exo_pref", "dpo_pref"))
# What is told. The distance below the frontier grows with the divergence, which differs: methods are compared by J.
MEASURES = ("oracle_reward", "oracle_objective", "kl_to_reference", "kl_to_given_optimum", "below_frontier")


@dataclass(frozen=True)
class Config(Setting):
    """Settings; the defaults are the reported run."""

    length: int = 5
    beta: float = 0.4
    seeds: int = 6
    resamples: int = 10_000
    k_values: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    label_smoothing_values: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.1192, 0.3)
    split_values: tuple[float, ...] = (1 / 64, 1 / 8, 1.0, 8.0, 64.0)
    completions_values: tuple[int, ...] = (128, 512, 1024, 4096, 16384)
    # At most length - 1, the full table.
    capacity_values: tuple[int, ...] = (0, 1, 2, 3, 4)
    reward_order_values: tuple[int, ...] = (0, 1, 2, 4)
    hard_labels_values: tuple[int, ...] = (0, 1)
    # Of the limits.
    limit_length: int = 3
    limit_orders: tuple[int, ...] = (0, 1, 2)
    limit_completions: tuple[int, ...] = (1024, 4096, 16384, 65536)
    limit_steps: int = 800
    limit_batch: int = 512
    # Of tables of logits, of which a batch reaches few.
    table_rate: float = 0.1
    # Of the exact minimisation; J is flat where the optimal policy hardly goes.
    limit_iterations: int = 20_000


PRESETS = {
    "quick": Config(
        length=3, seeds=2, tuning_steps=200, steps=40,
        k_values=(2, 16), label_smoothing_values=(1e-3, 0.3), split_values=(0.125, 8.0),
        completions_values=(128, 1024), capacity_values=(0, 2), reward_order_values=(0, 2),
        limit_length=2, limit_orders=(0, 1), limit_completions=(1024, 4096), limit_steps=100, limit_iterations=2000,
    ),
    "default": Config(
        length=4, seeds=2, tuning_steps=400, steps=100,
        k_values=(2, 64), label_smoothing_values=(1e-3, 0.3), split_values=(0.125, 8.0),
        completions_values=(128, 1024), capacity_values=(0, 3), reward_order_values=(1, 3),
        limit_length=2, limit_orders=(0, 1), limit_completions=(1024, 16384), limit_steps=200, limit_iterations=2000,
    ),
    "full": Config(),
}  # fmt: skip


def axes(config: Config) -> dict[str, tuple[tuple[Any, ...], tuple[str, ...]]]:
    """What is varied: its values, and the methods that it concerns."""
    return {
        "k": (config.k_values, ("exo_rw", "dpo_rw")),
        "label_smoothing": (config.label_smoothing_values, ("exo_pref",)),
        "split": (config.split_values, ("exo_rw", "dpo_rw")),
        "completions": (config.completions_values, METHODS),
        "capacity": (config.capacity_values, METHODS),
        "reward_order": (config.reward_order_values, REWARDED),
        "hard_labels": (config.hard_labels_values, METHODS),
    }


def changed(config: Config, axis: str, value: float) -> dict[str, Any]:
    """The settings that a value of an axis stands for."""
    if axis == "capacity":
        return {"policy": "kgram", "size": value, "rate": config.table_rate}
    if axis == "hard_labels":
        return {"hard_labels": bool(value)}
    return {axis: value}


def run(config: Config) -> runner.Result:
    """Evaluate every case; numbers for the claims, arrays for the figures."""
    # By axis, value and method; every method at the unchanged setting too, so that any two can be compared.
    points: dict[tuple[str, float, str], dict[str, Any]] = {
        ("", 0, method): setting_of(config, checkpoints=1) for method in METHODS
    }
    for axis, (values, methods) in axes(config).items():
        for value in values:
            for method in methods:
                points[axis, value, method] = setting_of(config, checkpoints=1, **changed(config, axis, value))
    limit = {
        "length": config.limit_length,
        "policy": "kgram",
        "size": config.limit_length - 1,
        "reward_order": config.limit_length - 1,
        "rate": config.table_rate,
        "steps": config.limit_steps,
        "batch": config.limit_batch,
        "checkpoints": 1,
    }
    for value in config.limit_completions:
        for method in METHODS:
            points["limit_completions", value, method] = setting_of(config, **limit, completions=value)

    cases = unique(
        {"setting": setting, "method": method, "beta": config.beta, "seed": seed}
        for (_, _, method), setting in points.items()
        for seed in range(config.seeds)
    )
    # The longest first: a full table of many completions would otherwise end alone.
    cases.sort(key=lambda case: (-case["setting"]["steps"], case["setting"]["policy"], case["method"] != "ppo"))
    results = dict(zip(map(repr, cases), runner.map_cases(aligned, cases), strict=True))

    def of_seeds(axis: str, value: float, method: str) -> dict[str, np.ndarray]:
        """Measures [seeds] at the end of training."""
        setting = points.get((axis, value, method), points["", 0, method])
        same = [{"setting": setting, "method": method, "beta": config.beta, "seed": s} for s in range(config.seeds)]
        return measured([results[repr(case)] for case in same], method)

    def entry(axis: str, value: float) -> dict[str, Any]:
        """What an axis' value does to the methods that it concerns, and to their differences from any other."""
        own = [method for method in METHODS if (axis, value, method) in points]
        seen = {method: of_seeds(axis, value, method) for method in METHODS}
        differences = {
            f"{a} - {b}": {name: seen[a][name] - seen[b][name] for name in MEASURES}
            for a, b in COMPARED
            if a in own or b in own
        }
        return {
            "methods": {method: spread(seen[method], config) for method in own},
            "differences": {pair: spread(difference, config) for pair, difference in differences.items()},
        }

    numbers: dict[str, Any] = {
        "base": entry("", 0),
        "axes": {
            **{axis: {f"{v:g}": entry(axis, v) for v in values} for axis, (values, _) in axes(config).items()},
            "limit_completions": {f"{v:g}": entry("limit_completions", v) for v in config.limit_completions},
        },
    }
    limits = [{"config": limit_settings(config), "method": m, "order": k} for m in METHODS for k in config.limit_orders]
    found = runner.map_cases(limit_of, limits)
    numbers["limits"] = {
        method: {
            str(case["order"]): value for case, value in zip(limits, found, strict=True) if case["method"] == method
        }
        for method in METHODS
    }
    return runner.Result(numbers, {})


def unique(cases: Any) -> list[dict[str, Any]]:
    """Cases without repetitions, in their order."""
    return list({repr(case): case for case in cases}.values())


def measured(runs: list[dict[str, np.ndarray]], method: str) -> dict[str, np.ndarray]:
    """[seeds] of each measure at the end of training, means over prompts."""
    final = {name: np.array([run["metrics"][-1, m].mean() for run in runs]) for m, name in enumerate(METRICS)}
    return {
        **{name: final[name] for name in MEASURES if name in final},
        "kl_to_given_optimum": final[f"{GIVEN[method]}_kl_to_optimum"],
        "below_frontier": np.array([float(run["below_frontier"]) for run in runs]),
    }


def spread(measures: dict[str, np.ndarray], config: Config) -> dict[str, dict[str, float]]:
    """Each measure over seeds."""
    return {name: mean_over_seeds(values, config.resamples) for name, values in measures.items()}


def limit_settings(config: Config) -> dict[str, Any]:
    """What the exact limits depend on."""
    names = ("limit_length", "limit_iterations", "beta", "k", "split", "label_smoothing")
    return {name: getattr(config, name) for name in names}


def limit_of(*, config: dict[str, Any], method: str, order: int) -> dict[str, float]:
    """The k-gram that minimises the expected loss of a method, given the oracle's reward; means over prompts."""
    world = ReviewWorld(length=config["limit_length"])
    # The full table: what people write is the reference.
    log_ref, oracle = world.log_human(), world.oracle_reward()
    star, _ = optimal_policy(log_ref, oracle, beta=config["beta"])
    settings = {name: value for name, value in config.items() if not name.startswith("limit_")}
    objective = expected_loss(method, log_ref, oracle, **settings)
    policy = closest_kgram(world.space, log_ref, order)
    optimum = minimize(policy, objective, max_iterations=config["limit_iterations"], certify=False)
    log_pi = policy.log_probs().detach()
    return {
        "kl_to_optimum": kl_divergence(log_pi, star).mean().item(),
        "kl_from_optimum": kl_divergence(star, log_pi).mean().item(),
        "objective_gap": (
            alignment_objective(star, log_ref, oracle, beta=config["beta"])
            - alignment_objective(log_pi, log_ref, oracle, beta=config["beta"])
        ).mean().item(),
        "gradient": optimum.gradient,
    }  # fmt: skip


def expected_loss(
    method: str, log_ref: Tensor, reward: Tensor, *, beta: float, k: int, split: float, label_smoothing: float
) -> Callable[[Tensor], Tensor]:
    """The loss of a method in expectation over its samples and labels, of log pi [X, N]; a mean over prompts."""
    temperatures = {"beta_pi": (beta * split) ** 0.5, "beta_r": (beta / split) ** 0.5}
    if method == "exo_rw":
        return lambda log_pi: expected_exo_rw_loss(log_pi, log_ref, reward, k=k, **temperatures).mean()
    if method == "dpo_rw":
        return lambda log_pi: expected_dpo_rw_loss(log_pi, log_ref, reward, k=k, **temperatures).mean()
    if method == "ppo":
        return lambda log_pi: -alignment_objective(log_pi, log_ref, reward, beta=beta).mean()
    if method == "dpo_pref":
        # With Bradley-Terry labels DPO is DPO-rw at K = 2.
        return lambda log_pi: expected_dpo_rw_loss(log_pi, log_ref, reward, k=2, beta_pi=beta, beta_r=1.0).mean()
    preference = bradley_terry(reward)

    def exo_pref(*logps: Tensor) -> Tensor:
        return exo_pref_loss(*logps, beta=beta, label_smoothing=label_smoothing).losses

    of_prompt = functools.partial(expected_preference_loss, loss=exo_pref)
    return lambda log_pi: torch.stack([of_prompt(*row) for row in zip(log_pi, log_ref, preference, strict=True)]).mean()


if __name__ == "__main__":
    runner.main("alignment_ablations")
