"""What preference labels target: the reward that DPO and EXO-pref recover from infinitely many of them, exactly.

Labellers: Bradley-Terry with the true reward; the same with a share of the labels turned over (noisy); always for the
higher reward (hard). Losses, in expectation over all pairs and labels:

* exo_pref@eps: EXO-pref, its target a one-hot label smoothed by eps; exo_retuned: with beta times half of
  log((1-eps)/eps), so that small differences of reward are recovered as they are;
* exo_frequency: EXO-pref whose target is the share of labellers that agree with the label;
* exo_reward: EXO-pref whose target is the true reward's preference, however the label was drawn;
* dpo, dpo_smoothed: DPO, without and with label smoothing.

With two completions the recovered difference of rewards is a closed form; with more it is read off the minimiser of
the expected loss, for a full table and for k-grams. Nothing is sampled.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import runner
from exo_toy import rewards
from exo_toy.divergences import kl_divergence
from exo_toy.losses import dpo_loss, exo_pref_loss
from exo_toy.objectives import alignment_objective
from exo_toy.policies import TabularPolicy, closest_kgram
from exo_toy.preferences import (
    bradley_terry,
    dpo_optimum_exists,
    dpo_target,
    exo_pref_effective_beta,
    exo_pref_target,
    expected_preference_loss,
    hard_labels,
    noisy_labels,
)
from exo_toy.spaces import SequenceSpace
from exo_toy.targets import optimal_policy
from exo_toy.training import minimize

LABELS = ("bradley_terry", "noisy", "hard")
WORLDS = ("modes", "random")


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the reported run."""

    vocab_size: int = 3
    length: int = 3
    beta: float = 0.5
    # Standard deviations of the reward under the reference, in nats of the labeller's log odds.
    spreads: tuple[float, ...] = (0.3, 2.0)
    # The fourth is 1 / (1 + e^2), at which small differences are recovered as they are.
    label_smoothings: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.11920292202211755, 0.3)
    # exo_retuned's, and that of the policies of limited capacity.
    label_smoothing: float = 1e-3
    flip: float = 0.1
    gaps: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0, 4.0)
    largest_gap: float = 8.0
    # Pairs whose rewards differ by no more are those of the slope at small differences.
    small: float = 0.3
    iterations: int = 4000
    seed: int = 0


PRESETS = {
    "quick": Config(vocab_size=2, label_smoothings=(1e-3, 0.3), gaps=(0.5, 2.0), iterations=1000),
    "default": Config(vocab_size=2, iterations=2000),
    "full": Config(),
}


@dataclass(frozen=True)
class World:
    """Completions with a reference, the true reward and the optimal policy for it."""

    space: SequenceSpace
    log_ref: Tensor
    reward: Tensor
    log_pi_star: Tensor
    beta: float


def run(config: Config) -> runner.Result:
    """Minimise every case; numbers for the claim, curves for the figure."""
    shared = {"vocab_size": config.vocab_size, "length": config.length, "seed": config.seed}
    settings = {
        **shared,
        "beta": config.beta,
        "flip": config.flip,
        "label_smoothing": config.label_smoothing,
        "small": config.small,
        "iterations": config.iterations,
    }
    full = config.length - 1
    tables = [
        {"world": world, "spread": spread, "order": full, "labels": labels, "loss": loss}
        for world, spread, labels in itertools.product(WORLDS, config.spreads, LABELS)
        for loss in losses_for(labels, config.label_smoothings)
    ]
    limited = [
        {"world": world, "spread": spread, "order": order, "labels": "bradley_terry", "loss": loss}
        for world, spread, order in itertools.product(WORLDS, config.spreads, range(full))
        for loss in (f"exo_pref@{config.label_smoothing:g}", "exo_retuned", "exo_reward", "dpo")
    ]
    cases = [{**settings, **case} for case in tables + limited]
    found = runner.map_cases(recovered, cases)
    pairs = runner.map_cases(
        of_two,
        [
            {"gap": gap, "labels": labels, "eps": eps, "flip": config.flip, "beta": config.beta}
            for gap, labels, eps in itertools.product(config.gaps, LABELS, config.label_smoothings)
        ],
    )
    arrays = curves(config)
    for case, (_, gaps) in zip(cases, found, strict=True):
        if gaps is not None and case["order"] == full:
            arrays["|".join(["pairs", *(str(case[name]) for name in ("world", "spread", "labels", "loss"))])] = gaps
    numbers = {
        "cases": [measures for measures, _ in found],
        "two_completions": {
            "problems": len(pairs),
            "largest_error": max(pairs),
        },
        "effective_beta_share": {
            f"{eps:g}": exo_pref_effective_beta(torch.tensor([0.5]), beta=1.0, label_smoothing=eps).item()
            for eps in config.label_smoothings
        },
    }
    return runner.Result(numbers, arrays)


def losses_for(labels: str, label_smoothings: tuple[float, ...]) -> list[str]:
    """The losses that a labeller's labels are given to."""
    one_hot = [f"exo_pref@{eps:g}" for eps in label_smoothings]
    frequency = ["exo_frequency"] if labels == "noisy" else []
    return [*one_hot, "exo_retuned", *frequency, "exo_reward", "dpo", "dpo_smoothed"]


def world_of(world: str, spread: float, *, vocab_size: int, length: int, beta: float, seed: int) -> World:
    """A reference that is no product over positions, and two planted modes or a random reward."""
    space = SequenceSpace(vocab_size, length)
    generator = torch.Generator().manual_seed(seed)
    log_ref = torch.randn(space.size, generator=generator, dtype=torch.float64).log_softmax(-1)
    if world == "modes":
        modes = torch.tensor([[0] * length, [vocab_size - 1] * length])
        reward = rewards.planted_modes(space, modes, weights=torch.tensor([1.0, 0.8]).double(), widths=0.7)
    else:
        reward = torch.randn(space.size, generator=generator, dtype=torch.float64)
    centred = reward - (log_ref.exp() * reward).sum()
    reward = spread * centred / (log_ref.exp() * centred.square()).sum().sqrt()
    return World(space, log_ref, reward, optimal_policy(log_ref, reward, beta=beta)[0], beta)


def preference_of(labels: str, reward: Tensor, flip: float) -> Tensor:
    """[N, N] of a labeller."""
    if labels == "hard":
        return hard_labels(reward)
    clean = bradley_terry(reward)
    return noisy_labels(clean, flip=flip) if labels == "noisy" else clean


def pair_loss(
    loss: str, preference: Tensor, reward: Tensor, *, beta: float, flip: float, label_smoothing: float
) -> Callable[..., Tensor]:
    """A loss of B = N * N pairs, all of them in the order of the table of preferences."""
    if loss == "dpo":
        return lambda *logps: dpo_loss(*logps, beta=beta).losses
    if loss == "dpo_smoothed":
        return lambda *logps: dpo_loss(*logps, beta=beta, label_smoothing=flip).losses
    eps: float | Tensor = label_smoothing
    if loss == "exo_retuned":
        beta = beta * math.log((1 - label_smoothing) / label_smoothing) / 2
    elif loss == "exo_reward":
        eps = bradley_terry(reward).mT.flatten()
    elif loss == "exo_frequency":
        eps = preference.mT.flatten()
    else:
        eps = float(loss.removeprefix("exo_pref@"))
    return lambda *logps: exo_pref_loss(*logps, beta=beta, label_smoothing=eps).losses


def recovered(
    *,
    world: str,
    spread: float,
    order: int,
    labels: str,
    loss: str,
    beta: float,
    flip: float,
    label_smoothing: float,
    small: float,
    iterations: int,
    **sizes: int,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """The minimiser of an expected loss, measured; and the differences of rewards, true and recovered, [2, pairs]."""
    problem = world_of(world, spread, beta=beta, **sizes)
    preference = preference_of(labels, problem.reward, flip)
    case = {"world": world, "spread": spread, "order": order, "labels": labels, "loss": loss}
    if loss == "dpo" and not dpo_optimum_exists(preference):
        return {**case, "attained": False, **without_optimum(problem, preference)}, None
    of_pairs = pair_loss(loss, preference, problem.reward, beta=beta, flip=flip, label_smoothing=label_smoothing)
    # Of a policy that cannot hold both ends, the better of two local minima is reported.
    starts = (problem.log_ref,) if order == problem.space.length - 1 else (problem.log_ref, problem.log_pi_star)
    minima = []
    for start in starts:
        policy = closest_kgram(problem.space, start, order)
        optimum = minimize(
            policy,
            lambda log_pi: expected_preference_loss(log_pi[0], problem.log_ref, preference, of_pairs),
            max_iterations=iterations,
            certify=False,
        )
        minima.append((optimum, policy.log_probs()[0].detach()))
    optimum, log_pi = min(minima, key=lambda found: found[0].value)
    gaps, weights = differences(problem, log_pi)
    near = gaps[0].abs() <= small
    return {
        **case,
        "attained": True,
        "gradient": optimum.gradient,
        **measured(problem, log_pi),
        "slope": slope(gaps, weights),
        "slope_small": slope(gaps[:, near], weights[near]),
    }, gaps.numpy()


def without_optimum(problem: World, preference: Tensor) -> dict[str, Any]:
    """Where hard labels lead a full table: all mass on the best completion, the loss falling as margins grow."""
    rank = problem.reward.unique(return_inverse=True)[1].double()
    dpo = pair_loss("dpo", preference, problem.reward, beta=problem.beta, flip=0.0, label_smoothing=0.0)
    falling = [
        expected_preference_loss(
            (problem.log_ref + margin / problem.beta * rank).log_softmax(-1), problem.log_ref, preference, dpo
        ).item()
        for margin in (1.0, 2.0, 4.0, 8.0, 16.0)
    ]
    log_pi = torch.full_like(problem.log_ref, -math.inf)
    log_pi[problem.reward.argmax()] = 0.0
    return {**measured(problem, log_pi), "slope": math.inf, "slope_small": math.inf, "loss_by_margin": falling}


def measured(problem: World, log_pi: Tensor) -> dict[str, float]:
    """Distances from the optimal policy, and the share of the gain in J over the reference that is missed."""
    best, at, start = (
        alignment_objective(table, problem.log_ref, problem.reward, beta=problem.beta).item()
        for table in (problem.log_pi_star, log_pi, problem.log_ref)
    )
    return {
        "kl_to_optimum": kl_divergence(log_pi, problem.log_pi_star).item(),
        "kl_from_optimum": kl_divergence(problem.log_pi_star, log_pi).item(),
        "kl_to_reference": kl_divergence(log_pi, problem.log_ref).item(),
        "objective_gap": best - at,
        "missed_gain": (best - at) / (best - start),
    }


def differences(problem: World, log_pi: Tensor) -> tuple[Tensor, Tensor]:
    """True and recovered differences of reward [2, pairs], and the probability of each pair under the reference."""
    implicit = problem.beta * (log_pi - problem.log_ref)
    first, second = torch.triu_indices(len(implicit), len(implicit), offset=1)
    gaps = torch.stack([table[first] - table[second] for table in (problem.reward, implicit)])
    return gaps, 2 * (problem.log_ref[first] + problem.log_ref[second]).exp()


def slope(gaps: Tensor, weights: Tensor) -> float:
    """Recovered over true differences by weighted least squares; NaN without pairs."""
    true, found = gaps
    return ((weights * true * found).sum() / (weights * true.square()).sum()).item()


def of_two(*, gap: float, labels: str, eps: float, flip: float, beta: float) -> float:
    """With two completions: the largest distance of the minimisers' recovered differences from the closed forms."""
    reward = torch.tensor([gap, 0.0], dtype=torch.float64)
    log_ref = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    preference = preference_of(labels, reward, flip)
    targets = {
        f"exo_pref@{eps!r}": exo_pref_target(preference, label_smoothing=eps),
        "exo_reward": reward.unsqueeze(1) - reward,
        "dpo_smoothed": dpo_target(preference, label_smoothing=flip),
    }
    if dpo_optimum_exists(preference):
        targets |= {"dpo": dpo_target(preference), "exo_frequency": dpo_target(preference)}
    errors = []
    for loss, target in targets.items():
        of_pairs = pair_loss(loss, preference, reward, beta=beta, flip=flip, label_smoothing=eps)
        policy = TabularPolicy(SequenceSpace(2, 1))
        minimize(policy, lambda log_pi, of=of_pairs: expected_preference_loss(log_pi[0], log_ref, preference, of))  # type: ignore[misc]
        log_ratio = policy.log_probs()[0].detach() - log_ref
        errors.append(abs(beta * (log_ratio[0] - log_ratio[1]).item() - target[0, 1].item()))
    return max(errors)


def curves(config: Config) -> dict[str, np.ndarray]:
    """Closed forms of two completions: recovered against true differences, and the effective temperature against P."""
    gaps = torch.linspace(0, config.largest_gap, 161, dtype=torch.float64)
    clean = gaps.sigmoid()
    hard = torch.where(gaps > 0, 1.0, 0.5).double()
    by_labeller = {"bradley_terry": clean, "noisy": noisy_labels(clean, flip=config.flip), "hard": hard}
    probabilities = torch.linspace(0.5, 0.999, 200, dtype=torch.float64)
    arrays = {"gaps": gaps.numpy(), "probabilities": probabilities.numpy()}
    for labels, preference in by_labeller.items():
        arrays[f"exo_pref|{labels}"] = torch.stack(
            [exo_pref_target(preference, label_smoothing=eps) for eps in config.label_smoothings]
        ).numpy()
        arrays[f"dpo|{labels}"] = dpo_target(preference).numpy()
        arrays[f"dpo_smoothed|{labels}"] = dpo_target(preference, label_smoothing=config.flip).numpy()
    arrays["effective_beta"] = torch.stack(
        [exo_pref_effective_beta(probabilities, beta=1.0, label_smoothing=eps) for eps in config.label_smoothings]
    ).numpy()
    return arrays


if __name__ == "__main__":
    runner.main("label_targets")
