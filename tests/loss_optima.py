"""Whether a policy is the optimum of an exact expected loss: five completions, pairs from mu, labels of Bradley-Terry.

The gradient is by the logits of the whole table, so that a policy which is best along some directions only fails.
"""

import torch
from torch import Tensor

from exo_toy.targets import optimal_policy
from tests.tolerances import assert_close

REF = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64)
MU = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
REWARD = torch.tensor([0.0, 0.7, -0.4, 1.1, 0.3], dtype=torch.float64)
LENGTHS = torch.tensor([1, 3, 2, 2, 4])
PREFERENCE = (REWARD[:, None] - REWARD[None, :]).sigmoid()
WIN_RATE = PREFERENCE @ MU
FIRST, SECOND = (index.flatten() for index in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
LOG_REF = REF.log()


def expected_pair_loss(loss, log_pi: Tensor, *, preference: Tensor = PREFERENCE, mu: Tensor = MU) -> Tensor:
    """Sum over y and y' of mu(y) mu(y') P(y over y') loss(y, y'), twice: either may be drawn first."""
    weight = 2 * mu[FIRST] * mu[SECOND] * preference[FIRST, SECOND]
    return (weight * loss(log_pi, FIRST, SECOND)).sum()


def with_reference(loss, **settings):
    """A loss of log pi and the indices of chosen and rejected."""
    return lambda log_pi, won, lost: loss(log_pi[won], log_pi[lost], LOG_REF[won], LOG_REF[lost], **settings).losses


def gradient_at(expected, log_pi: Tensor) -> Tensor:
    """By the logits."""
    logits = log_pi.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(expected(logits.log_softmax(-1)), logits)
    return gradient


def assert_optimal(expected, log_pi: Tensor) -> None:
    """No gradient there, higher values around, and a gradient elsewhere (or else the test could not fail)."""
    assert_close(log_pi.logsumexp(-1), 0.0)
    gradient = gradient_at(expected, log_pi)
    assert_close(gradient, torch.zeros_like(gradient), scale=1e3)
    for direction in torch.eye(5, dtype=torch.float64):
        for step in (-0.05, 0.05):
            assert expected((log_pi + step * direction).log_softmax(-1)) > expected(log_pi)
    assert gradient_at(expected, LOG_REF).abs().max() > 1e-3


def normalised_root(log_pi_of) -> Tensor:
    """The constant c for which log_pi_of(c) is normalised, by bisection; it falls in c."""
    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if log_pi_of(middle).logsumexp(-1) > 0 else (low, middle)
    return log_pi_of((low + high) / 2)


PI_STAR = optimal_policy(LOG_REF, REWARD, beta=0.7)[0]
