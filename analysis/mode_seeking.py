"""Which modes a policy of limited capacity finds: the minimisers of both KL divergences, and of the losses at finite K.

1. A line of points, a bimodal optimal policy, a discretised Gaussian policy with two parameters.
2. Sequences with two planted modes and k-gram policies: all local minimisers of KL(pi_theta||pi*) that many starts
   find, each certified by its gradient and Hessian, and the closed-form minimiser of KL(pi*||pi_theta).
3. The policies that minimise the exactly expected EXO-rw and DPO-rw losses at K candidates, and one trained on sampled
   candidates for each, for k = 0.

Everything but the sampled training is exact. ``python -m analysis.mode_seeking --help`` lists the settings.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import runner
from exo_toy import rewards
from exo_toy.divergences import entropy, kl_divergence
from exo_toy.estimators import effective_sample_size
from exo_toy.finite_k import expected_dpo_rw_loss, expected_exo_rw_loss
from exo_toy.losses import dpo_rw_loss, exo_rw_loss
from exo_toy.objectives import alignment_objective
from exo_toy.policies import KGramPolicy, closest_kgram
from exo_toy.spaces import SequenceSpace
from exo_toy.targets import optimal_policy
from exo_toy.training import Optimum, minimize, train

LOSSES = {"exo": (exo_rw_loss, expected_exo_rw_loss), "dpo": (dpo_rw_loss, expected_dpo_rw_loss)}
# Optima whose values differ by less, relative, and whose policies differ by less in total variation, are one.
SAME = 1e-6


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the reported run."""

    n_points: int = 200
    line_starts: int = 64
    vocab_size: int = 4
    length: int = 6
    second_weight: float = 0.8
    width: float = 1 / 1.5
    beta: float = 0.5
    betas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    orders: tuple[int, ...] = (0, 1, 2, 3)
    starts: tuple[int, ...] = (48, 48, 24, 12)
    certified_orders: tuple[int, ...] = (0, 1, 2, 3)
    n_candidates: tuple[int, ...] = (2, 4, 8, 16, 24, 32, 64, 128, 256, 1024)
    fixed_point_starts: int = 6
    training_seeds: int = 5
    training_steps: int = 600
    training_batch: int = 32
    learning_rate: float = 0.05
    seed: int = 0


PRESETS = {
    "quick": Config(
        line_starts=16,
        betas=(0.5,),
        orders=(0, 1),
        starts=(8, 3),
        certified_orders=(0,),
        n_candidates=(2, 32, 1024),
        fixed_point_starts=2,
        training_seeds=1,
        training_steps=200,
        training_batch=16,
    ),
    "default": Config(
        line_starts=32,
        betas=(0.25, 0.5, 1.0),
        orders=(0, 1, 2),
        starts=(24, 12, 6),
        certified_orders=(0, 1),
        n_candidates=(2, 8, 16, 32, 64, 256, 1024),
        fixed_point_starts=2,
        training_seeds=2,
        training_steps=400,
    ),
    "full": Config(),
}


def run(config: Config) -> runner.Result:
    """Evaluate every case; numbers for the claims, arrays for the figure."""
    problem = {name: getattr(config, name) for name in ("vocab_size", "length", "second_weight", "width")}
    line_numbers, line_arrays = line(config.n_points, config.line_starts, config.seed)

    capacity_cases = [
        {
            **problem,
            "beta": beta,
            "order": order,
            "starts": config.starts[i],
            "certify": order in config.certified_orders,
            "seed": config.seed,
        }
        for i, order in reversed(list(enumerate(config.orders)))  # the longest first
        for beta in config.betas
    ]
    capacity = runner.map_cases(local_minimisers, capacity_cases)

    finite_cases = [
        {**problem, "beta": config.beta, "k": k, "loss": loss, "starts": config.fixed_point_starts, "seed": config.seed}
        for k in config.n_candidates
        for loss in LOSSES
    ]
    fixed_points = runner.map_cases(fixed_point, finite_cases)

    training = {"steps": config.training_steps, "batch_size": config.training_batch, "lr": config.learning_rate}
    training_cases = [
        {**problem, **training, "beta": config.beta, "k": k, "loss": loss, "seed": config.seed + 1 + i}
        for k in config.n_candidates
        for loss in LOSSES
        for i in range(config.training_seeds)
    ]
    trained = runner.map_cases(sampled_training, training_cases)

    numbers = {
        "line": line_numbers,
        "target": {str(beta): target_numbers(beta=beta, **problem) for beta in config.betas},
        "capacity": capacity,
        "fixed_points": fixed_points,
        "trained": trained,
    }
    return runner.Result(numbers, line_arrays)


class GaussianPolicy(torch.nn.Module):
    """A Gaussian with free mean and log standard deviation, normalised over the points of a line."""

    def __init__(self, points: Tensor, mean: float, log_scale: float) -> None:
        super().__init__()
        self.points = points
        self.shape = torch.nn.Parameter(torch.tensor([mean, log_scale], dtype=torch.float64))

    def log_probs(self) -> Tensor:
        """[1, N]"""
        mean, log_scale = self.shape
        return torch.log_softmax(-((self.points - mean) ** 2) / 2 * torch.exp(-2 * log_scale), -1).unsqueeze(0)


def line(n_points: int, starts: int, seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Local minimisers of both KL divergences for a Gaussian policy against a mixture of two Gaussians."""
    points = torch.linspace(-5, 5, n_points, dtype=torch.float64)
    left = math.log(0.6) - (points + 2) ** 2 / (2 * 0.6**2) - math.log(0.6)
    right = math.log(0.4) - (points - 2) ** 2 / (2 * 0.8**2) - math.log(0.8)
    log_pi_star = torch.log_softmax(torch.logaddexp(left, right), -1)
    valley = points[(points > -1.5) & (points < 1.5)][log_pi_star[(points > -1.5) & (points < 1.5)].argmin()]
    divergences: dict[str, Callable[[Tensor], Tensor]] = {
        "policy_to_optimal": lambda log_pi: kl_divergence(log_pi, log_pi_star).sum(),
        "optimal_to_policy": lambda log_pi: kl_divergence(log_pi_star, log_pi).sum(),
    }
    generator = torch.Generator().manual_seed(seed)
    numbers: dict[str, Any] = {"mass_left_of_valley": log_pi_star[points < valley].exp().sum().item()}
    arrays = {"line_points": points.numpy(), "line_optimal": log_pi_star.exp().numpy()}
    for name, objective in divergences.items():
        optima: list[tuple[Optimum, Tensor]] = []
        for _ in range(starts):
            mean, log_scale = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            policy = GaussianPolicy(points, 8 * mean - 4, 3 * log_scale - 2)
            optimum = minimize(policy, objective)
            add_distinct(optima, optimum, policy.log_probs().detach()[0])
        optima.sort(key=lambda found: found[0].value)
        numbers[name] = [
            {
                **describe(optimum),
                "mean": optimum.parameters[0].item(),
                "scale": optimum.parameters[1].exp().item(),
                "mass_left_of_valley": log_pi[points < valley].exp().sum().item(),
            }
            for optimum, log_pi in optima
        ]
        arrays[f"line_{name}"] = torch.stack([log_pi.exp() for _, log_pi in optima]).numpy()
    return numbers, arrays


@dataclass(frozen=True)
class Problem:
    """Two planted modes on sequences under a uniform reference."""

    space: SequenceSpace
    log_ref: Tensor
    reward: Tensor
    log_pi_star: Tensor
    modes: Tensor
    beta: float

    def measure(self, log_pi: Tensor) -> dict[str, Any]:
        """Everything reported of a policy [N], exactly."""
        masses = log_pi[self.space.index(self.modes)].exp().tolist()
        return {
            "kl_policy_to_optimal": kl_divergence(log_pi, self.log_pi_star).item(),
            "kl_optimal_to_policy": kl_divergence(self.log_pi_star, log_pi).item(),
            "kl_to_reference": kl_divergence(log_pi, self.log_ref).item(),
            "objective": alignment_objective(log_pi, self.log_ref, self.reward, beta=self.beta).item(),
            "expected_reward": (log_pi.exp() * self.reward).sum().item(),
            "entropy": entropy(log_pi).item(),
            "mode_masses": masses,
        }


def two_modes(*, vocab_size: int, length: int, second_weight: float, width: float, beta: float) -> Problem:
    """Modes 00..0 and (V-1)..(V-1); the reward falls with the Hamming distance to them."""
    space = SequenceSpace(vocab_size, length)
    modes = torch.tensor([[0] * length, [vocab_size - 1] * length])
    weights = torch.tensor([1.0, second_weight], dtype=torch.float64)
    widths = torch.tensor([width, width], dtype=torch.float64)
    reward = rewards.planted_modes(space, modes, weights=weights, widths=widths)
    log_ref = torch.full((space.size,), -math.log(space.size), dtype=torch.float64)
    log_pi_star, _ = optimal_policy(log_ref, reward, beta=beta)
    return Problem(space, log_ref, reward, log_pi_star, modes, beta)


def target_numbers(*, beta: float, **settings: Any) -> dict[str, Any]:
    """The optimal policy, measured like any other."""
    problem = two_modes(beta=beta, **settings)
    return problem.measure(problem.log_pi_star)


def local_minimisers(*, order: int, starts: int, certify: bool, seed: int, **settings: Any) -> dict[str, Any]:
    """Distinct local minimisers of KL(pi_theta||pi*), best first, and the minimiser of KL(pi*||pi_theta)."""
    problem = two_modes(**settings)
    objective = partial(_mean_kl, log_q=problem.log_pi_star)
    generator = torch.Generator().manual_seed(seed)
    closest = closest_kgram(problem.space, problem.log_pi_star, order)
    closest_log_pi = closest.log_probs().detach()[0]
    optima: list[tuple[Optimum, Tensor]] = []
    values = []
    # The other divergence's minimiser is a start as well: with much capacity it is near the best.
    for policy in (closest, *(random_policy(problem.space, order, generator) for _ in range(starts))):
        optimum = minimize(policy, objective, certify=False)
        values.append(optimum.value)
        add_distinct(optima, optimum, policy.log_probs().detach()[0])
    optima.sort(key=lambda found: found[0].value)
    if certify:
        optima = [certified(problem.space, order, optimum, objective) for optimum, _ in optima]
    return {
        "order": order,
        "beta": problem.beta,
        "starts": starts,
        "start_values": values,
        "certified": certify,
        "policy_to_optimal": [{**describe(optimum), **problem.measure(log_pi)} for optimum, log_pi in optima],
        "optimal_to_policy": problem.measure(closest_log_pi),
    }


def fixed_point(*, k: int, loss: str, starts: int, seed: int, **settings: Any) -> dict[str, Any]:
    """The best minimiser found of the exactly expected loss at K candidates, k-gram order 0."""
    problem = two_modes(**settings)
    expected = partial(
        LOSSES[loss][1], log_ref=problem.log_ref, reward=problem.reward, k=k, beta_pi=1.0, beta_r=problem.beta
    )
    generator = torch.Generator().manual_seed(seed)

    def objective(log_pi: Tensor) -> Tensor:
        return expected(log_pi).mean()

    policies = [
        near_mode(problem, problem.modes[0]),
        closest_kgram(problem.space, problem.log_pi_star, 0),
        near_mode(problem, problem.modes[1]),
        KGramPolicy(problem.space, 0),
        *(random_policy(problem.space, 0, generator) for _ in range(starts - 4)),
    ][:starts]
    optima: list[tuple[Optimum, Tensor]] = []
    for policy in policies:
        optimum = minimize(policy, objective, certify=False)
        add_distinct(optima, optimum, policy.log_probs().detach()[0])
    optima.sort(key=lambda found: found[0].value)
    best, log_pi = certified(problem.space, 0, optima[0][0], objective)
    return {
        "k": k,
        "loss": loss,
        "starts": len(policies),
        "n_optima": len(optima),
        "optima_values": [optimum.value for optimum, _ in optima],
        **describe(best),
        **problem.measure(log_pi),
        "ess_share": exact_ess_share(log_pi, problem.log_ref),
    }


def sampled_training(
    *, k: int, loss: str, seed: int, steps: int, batch_size: int, lr: float, **settings: Any
) -> dict[str, Any]:
    """One policy of order 0 trained from the reference on candidates sampled from it."""
    problem = two_modes(**settings)
    policy = KGramPolicy(problem.space, 0)
    generator = torch.Generator().manual_seed(seed)
    for _ in train(
        policy,
        problem.log_ref.unsqueeze(0),
        problem.reward.unsqueeze(0),
        LOSSES[loss][0],
        k=k,
        beta_pi=1.0,
        beta_r=problem.beta,
        batch_size=batch_size,
        steps=steps,
        learning_rate=lr,
        generator=generator,
    ):
        pass
    log_pi = policy.log_probs().detach()[0]
    index = torch.randint(problem.space.size, (k,), generator=generator)
    ess = effective_sample_size((log_pi - problem.log_ref)[index]).item()
    return {"k": k, "loss": loss, "seed": seed, **problem.measure(log_pi), "ess_of_one_group": ess}


def random_policy(space: SequenceSpace, order: int, generator: torch.Generator) -> KGramPolicy:
    """Standard normal logits."""
    policy = KGramPolicy(space, order)
    with torch.no_grad():
        for logits in policy.parameters():
            logits.copy_(torch.randn(logits.shape, generator=generator, dtype=logits.dtype))
    return policy


def near_mode(problem: Problem, mode: Tensor) -> KGramPolicy:
    """Order 0, a logit of 2 for the mode's tokens."""
    policy = KGramPolicy(problem.space, 0)
    with torch.no_grad():
        for logits, token in zip(policy.parameters(), mode.tolist(), strict=True):
            logits[..., token] = 2.0
    return policy


def certified(
    space: SequenceSpace, order: int, optimum: Optimum, objective: Callable[[Tensor], Tensor]
) -> tuple[Optimum, Tensor]:
    """The same optimum after Newton steps, with its Hessian's certificate."""
    policy = KGramPolicy(space, order)
    torch.nn.utils.vector_to_parameters(optimum.parameters.clone(), policy.parameters())
    optimum = minimize(policy, objective, newton_steps=2)
    return optimum, policy.log_probs().detach()[0]


def add_distinct(optima: list[tuple[Optimum, Tensor]], optimum: Optimum, log_pi: Tensor) -> None:
    """Append unless the same policy is there already; of two records of one policy the better stays."""
    for i, (known, known_log_pi) in enumerate(optima):
        same_value = abs(known.value - optimum.value) <= SAME * max(1.0, abs(known.value))
        if same_value and (known_log_pi.exp() - log_pi.exp()).abs().sum() / 2 < math.sqrt(SAME):
            if optimum.gradient < known.gradient:
                optima[i] = (optimum, log_pi)
            return
    optima.append((optimum, log_pi))


def describe(optimum: Optimum) -> dict[str, Any]:
    """The certificate in plain numbers."""
    plain = asdict(optimum)
    del plain["parameters"]
    return {**plain, "is_minimum": optimum.is_minimum()}


def exact_ess_share(log_pi: Tensor, log_ref: Tensor) -> float:
    """Limit of ESS / M for weights pi / ref: 1 / E_ref[(pi/ref)^2]."""
    return torch.exp(-torch.logsumexp(2 * log_pi - log_ref, -1)).item()


def _mean_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return kl_divergence(log_p, log_q).mean()


if __name__ == "__main__":
    runner.main("mode_seeking")
