"""Density ratios pi / pi_ref of trained policies and of the optimal one: exact, and as samples from the reference show.

Policies of order 0 and 1 are trained with EXO-rw and DPO-rw on K candidates sampled from the reference; whatever K,
every step takes the same number of samples. Then, for each of them and for pi*,

* the exact ratio at every completion, and over the reward: P_pi(r) / P_ref(r), smoothed by a Gaussian kernel;
* its estimate over the reward: M completions from the reference, weighted by self-normalised importance weights, with
  the same kernel. Both densities of a ratio have the same bandwidth at every M, so that the estimate tends to the exact
  curve; a ratio of estimated densities never exceeds M.

The estimates are drawn again and again to show their spread, from one seed's policy; the policies' exact figures are
over all training seeds. ``python -m analysis.density_ratio --help`` lists the settings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import runner
from analysis.mode_seeking import Problem, exact_ess_share, two_modes
from exo_toy.estimators import effective_sample_size, snis_density_ratio
from exo_toy.losses import dpo_rw_loss, exo_rw_loss
from exo_toy.policies import KGramPolicy
from exo_toy.training import train

LOSSES = {"exo_rw": exo_rw_loss, "dpo_rw": dpo_rw_loss}
# A band holds nine tenths of the repetitions.
BAND = (0.05, 0.5, 0.95)
# Rewards that agree to so many decimals differ by rounding alone.
DECIMALS = 9


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the reported run."""

    vocab_size: int = 4
    length: int = 6
    second_weight: float = 0.8
    width: float = 1 / 1.5
    beta: float = 0.5
    orders: tuple[int, ...] = (0, 1)
    n_candidates: tuple[int, ...] = (4, 64, 1024)
    samples_per_step: int = 8192
    steps: int = 500
    learning_rate: float = 0.2
    training_seeds: int = 8
    sample_sizes: tuple[int, ...] = (64, 256, 1024, 4096, 16384, 65536)
    repetitions: int = 200
    # In nats of reward; Scott's rule gives 0.24 for 4096 samples of the reference.
    bandwidth: float = 0.25
    grid_points: int = 121
    seed: int = 0


PRESETS = {
    "quick": Config(
        n_candidates=(4, 1024),
        steps=150,
        training_seeds=1,
        sample_sizes=(64, 256, 1024, 4096),
        repetitions=50,
    ),
    "default": Config(steps=200, training_seeds=2, sample_sizes=(64, 256, 1024, 4096, 16384), repetitions=100),
    "full": Config(),
}


def run(config: Config) -> runner.Result:
    """Evaluate every case; numbers for the claims, arrays for the figure."""
    problem = {name: getattr(config, name) for name in ("vocab_size", "length", "second_weight", "width", "beta")}
    estimation = {
        name: getattr(config, name) for name in ("sample_sizes", "repetitions", "bandwidth", "grid_points", "seed")
    }
    training = {"steps": config.steps, "learning_rate": config.learning_rate}
    settings = [
        {
            "loss": loss,
            "order": order,
            "k": k,
            "batch_size": config.samples_per_step // k,
            "training_seed": config.seed + 1 + i,
            "estimated": i == 0,
        }
        for k in config.n_candidates
        for order in config.orders
        for loss in LOSSES
        for i in range(config.training_seeds)
    ]
    # The longest first: those whose ratios are estimated as well.
    settings.sort(key=lambda case: not case["estimated"])
    policies = runner.map_cases(trained, [{**case, **training, **problem, **estimation} for case in settings])
    (optimal,) = runner.map_cases(optimum, [{**problem, **estimation}])

    axis = RewardAxis(two_modes(**problem), config.bandwidth, config.grid_points)
    order_of_rank = np.argsort(-optimal["log_ratio"], kind="stable")
    numbers: dict[str, Any] = {
        "n_completions": len(order_of_rank),
        "optimal": {**optimal["exact"], "estimates": optimal["numbers"]},
        "samples_per_policy": config.samples_per_step * config.steps,
    }
    arrays = {
        "grid": axis.grid.numpy(),
        "levels": axis.levels.numpy(),
        "level_share": axis.masses(axis.problem.log_ref.exp()).numpy(),
        "sample_sizes": np.array(config.sample_sizes),
        "optimal_log_ratio_by_rank": optimal["log_ratio"][order_of_rank],
        **{f"optimal_{name}": array for name, array in optimal["arrays"].items()},
    }
    for loss in LOSSES:
        for order in config.orders:
            for k in config.n_candidates:
                same = [
                    result
                    for case, result in zip(settings, policies, strict=True)
                    if (case["loss"], case["order"], case["k"]) == (loss, order, k)
                ]
                first = same[0]
                entry = {**over_seeds([result["exact"] for result in same]), "estimates": first["numbers"]}
                numbers.setdefault(loss, {}).setdefault(str(order), {})[str(k)] = entry
                prefix = f"{loss}_{order}_{k}"
                arrays[f"{prefix}_log_ratio_by_rank"] = first["log_ratio"][order_of_rank]
                arrays |= {f"{prefix}_{name}": array for name, array in first["arrays"].items()}
    return runner.Result(numbers, arrays)


class RewardAxis:
    """Distributions over the reward, exact: point masses at the rewards that occur, seen through a Gaussian kernel."""

    def __init__(self, problem: Problem, bandwidth: float, grid_points: int) -> None:
        self.problem = problem
        self.bandwidth = bandwidth
        rounded, self.level_of = problem.reward.round(decimals=DECIMALS).unique(return_inverse=True)
        self.levels = rounded.scatter_reduce(0, self.level_of, problem.reward, "amax", include_self=False)
        self.grid = torch.linspace(self.levels[0].item(), self.levels[-1].item(), grid_points, dtype=torch.float64)

    def masses(self, weights: Tensor, index: Tensor | None = None) -> Tensor:
        """[..., L] sums of weights [..., M] by the reward of their completions: all in order, or those of ``index``."""
        level = self.level_of if index is None else self.level_of[index]
        zeros = weights.new_zeros(*weights.shape[:-1], len(self.levels))
        return zeros.scatter_add(-1, level.expand(weights.shape), weights)

    def log_density(self, masses: Tensor, rewards: Tensor) -> Tensor:
        """[..., G] log of the kernel density with masses [..., L] at given rewards [G]."""
        distance = (rewards.unsqueeze(-1) - self.levels) / self.bandwidth
        kernel = -distance.square() / 2 - math.log(self.bandwidth * math.sqrt(2 * math.pi))
        return torch.logsumexp(masses.log().unsqueeze(-2) + kernel, -1)

    def log_ratio(self, masses: Tensor, ref_masses: Tensor, rewards: Tensor) -> Tensor:
        """[..., G] log ratio of two densities."""
        return self.log_density(masses, rewards) - self.log_density(ref_masses, rewards)


def trained(
    *,
    loss: str,
    order: int,
    k: int,
    batch_size: int,
    steps: int,
    learning_rate: float,
    training_seed: int,
    estimated: bool,
    sample_sizes: Sequence[int],
    repetitions: int,
    bandwidth: float,
    grid_points: int,
    seed: int,
    **settings: Any,
) -> dict[str, Any]:
    """A policy trained from the reference on candidates sampled from it, examined."""
    problem = two_modes(**settings)
    policy = KGramPolicy(problem.space, order)
    steps_taken = train(
        policy,
        problem.log_ref.unsqueeze(0),
        problem.reward.unsqueeze(0),
        LOSSES[loss],
        k=k,
        beta_pi=1.0,
        beta_r=problem.beta,
        batch_size=batch_size,
        steps=steps,
        learning_rate=learning_rate,
        generator=torch.Generator().manual_seed(training_seed),
    )
    for _ in steps_taken:
        pass
    log_pi = policy.log_probs().detach()[0]
    axis = RewardAxis(problem, bandwidth, grid_points)
    log_ratio = log_pi - problem.log_ref
    return examined(axis, log_pi, log_ratio, sample_sizes if estimated else (), repetitions, seed)


def optimum(
    *, sample_sizes: Sequence[int], repetitions: int, bandwidth: float, grid_points: int, seed: int, **settings: Any
) -> dict[str, Any]:
    """The optimal policy, examined; its weights come from the rewards alone."""
    problem = two_modes(**settings)
    axis = RewardAxis(problem, bandwidth, grid_points)
    return examined(axis, problem.log_pi_star, problem.reward / problem.beta, sample_sizes, repetitions, seed)


def examined(
    axis: RewardAxis, log_pi: Tensor, log_weight: Tensor, sample_sizes: Sequence[int], repetitions: int, seed: int
) -> dict[str, Any]:
    """A policy [N] measured exactly and, for every M in ``sample_sizes``, estimated again and again."""
    problem = axis.problem
    log_ratio = log_pi - problem.log_ref
    masses, ref_masses = axis.masses(log_pi.exp()), axis.masses(problem.log_ref.exp())
    log_ratio_of_levels = (masses / ref_masses).log()
    exact_curve = axis.log_ratio(masses, ref_masses, axis.grid)
    exact_at_levels = axis.log_ratio(masses, ref_masses, axis.levels)
    arrays = {"exact": exact_curve, "exact_of_levels": log_ratio_of_levels}

    # The same draws for every policy.
    generator = torch.Generator().manual_seed(seed)
    numbers = {}
    curves = []
    for size in sample_sizes:
        # The reference is uniform.
        index = torch.randint(problem.space.size, (repetitions, size), generator=generator)
        ratio = snis_density_ratio(log_weight[index])
        estimated, ref_estimated = (
            axis.masses(ratio / size, index),
            axis.masses(torch.full_like(ratio, 1 / size), index),
        )
        curves.append(
            axis.log_ratio(estimated, ref_estimated, axis.grid).quantile(torch.tensor(BAND, dtype=torch.float64), 0)
        )
        at_levels = axis.log_ratio(estimated, ref_estimated, axis.levels)
        numbers[str(size)] = {
            "ess": spread(effective_sample_size(log_weight[index])),
            # Where the policy is, not where the axis happens to be long.
            "mean_absolute_log_error": spread(((at_levels - exact_at_levels).abs() * masses).sum(-1)),
            "ratio_at_highest_reward": spread(at_levels[:, -1].exp()),
        }
    if curves:
        arrays["estimated"] = torch.stack(curves)
    return {
        "exact": measures(axis, log_pi),
        "numbers": numbers,
        "arrays": {name: array.numpy() for name, array in arrays.items()},
        "log_ratio": log_ratio.numpy(),
    }


def measures(axis: RewardAxis, log_pi: Tensor) -> dict[str, float]:
    """Exact numbers of a policy [N]."""
    problem = axis.problem
    first, second = problem.space.index(problem.modes).tolist()
    log_ratio = log_pi - problem.log_ref
    measured = problem.measure(log_pi)
    masses, ref_masses = axis.masses(log_pi.exp()), axis.masses(problem.log_ref.exp())
    return {
        "kl_policy_to_optimal": measured["kl_policy_to_optimal"],
        "kl_optimal_to_policy": measured["kl_optimal_to_policy"],
        "kl_to_reference": measured["kl_to_reference"],
        "expected_reward": measured["expected_reward"],
        "first_mode_mass": log_pi[first].exp().item(),
        "second_mode_mass": log_pi[second].exp().item(),
        "ratio_at_first_mode": log_ratio[first].exp().item(),
        "ratio_at_second_mode": log_ratio[second].exp().item(),
        # 1 where the largest ratio of any completion is the mode's.
        "peaks_at_first_mode": float(log_ratio.argmax() == first),
        "peak_over_reward": axis.levels[(masses / ref_masses).argmax()].item(),
        "smoothed_ratio_at_highest_reward": axis.log_ratio(masses, ref_masses, axis.levels[-1:]).exp().item(),
        "ess_share": exact_ess_share(log_pi, problem.log_ref),
    }


def over_seeds(results: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, least and largest of every number over the training seeds."""
    table = {name: [result[name] for result in results] for name in results[0]}
    return {
        name: {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
        for name, values in table.items()
    }


def spread(values: Tensor) -> dict[str, float]:
    """Mean, median and the band of repetitions."""
    low, median, high = values.quantile(torch.tensor(BAND, dtype=torch.float64)).tolist()
    return {"mean": values.mean().item(), "median": median, "low": low, "high": high}


if __name__ == "__main__":
    runner.main("density_ratio")
