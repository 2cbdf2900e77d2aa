"""Problems that carry their own answer: tables [X, N] with pi* and log Z known without solving anything."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Solved:
    """A problem and its optimal policy."""

    log_ref: Tensor
    reward: Tensor
    beta: float
    log_pi_star: Tensor
    log_z: Tensor


def _float64(*entries: list[float] | float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


def one_completion() -> Solved:
    """A single completion: nothing to choose, log Z is its reward over beta."""
    return Solved(_float64([0.0], [0.0]), _float64([3.0], [-1.0]), 0.5, _float64([0.0], [0.0]), _float64(6.0, -2.0))


def constant_reward() -> Solved:
    """The same reward everywhere: the reference is optimal, log Z is the reward over beta."""
    log_ref = _float64([0.5, 0.3, 0.2], [0.1, 0.1, 0.8]).log()
    reward = _float64([2.0] * 3, [-4.0] * 3)
    return Solved(log_ref, reward, 0.25, log_ref, _float64(8.0, -16.0))


def two_completions() -> Solved:
    """Two completions: the log odds of the reference plus the difference in reward over beta."""
    log_ref = _float64([0.5, 0.5], [0.75, 0.25], [0.2, 0.8]).log()
    reward = _float64([0.0, math.log(3.0)], [1.0, 1.0 + 2 * math.log(3.0)], [-math.log(2.0), math.log(2.0)])
    # beta 1: odds 3; 1/3 * 9 = 3; 4 * 4 = 16. Z: 2; e (3/4 + 9/4) = 3e; 1/10 + 16/10 = 17/10.
    log_pi_star = _float64([1 / 4, 3 / 4], [1 / 4, 3 / 4], [1 / 17, 16 / 17]).log()
    return Solved(log_ref, reward, 1.0, log_pi_star, _float64(math.log(2), 1 + math.log(3), math.log(1.7)))


def disjoint_modes() -> Solved:
    """A uniform reference on six completions, two allowed modes of two: pi* spreads as the modes' weights."""
    weights = _float64([4.0, 4.0, 0.0, 0.0, 1.0, 1.0], [0.0, 3.0, 3.0, 0.0, 2.0, 2.0])
    log_ref = torch.full_like(weights, -math.log(6))
    return Solved(
        log_ref,
        reward=2.0 * weights.log(),
        beta=2.0,
        log_pi_star=(weights / 10).log(),
        log_z=torch.full((2,), math.log(10 / 6), dtype=torch.float64),
    )


def already_optimal() -> Solved:
    """The reward is beta times the log ratio of a chosen policy, plus a constant: that policy is optimal."""
    log_ref = _float64([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25] * 4).log()
    log_pi = _float64([0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.05, 0.05, 0.4, 0.5]).log()
    constant = _float64([0.0], [5.0], [-2.0])
    return Solved(log_ref, 0.5 * (log_pi - log_ref) + constant, 0.5, log_pi, constant.squeeze(-1) / 0.5)


FAMILIES: list[Callable[[], Solved]] = [
    one_completion,
    constant_reward,
    two_completions,
    disjoint_modes,
    already_optimal,
]
