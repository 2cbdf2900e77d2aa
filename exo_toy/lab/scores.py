"""The score that a loss on pairs compares: of the log ratio itself, as DPO's, or of f-DPO."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from exo_toy.lab.subject import Subject, probe

NODES, WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(32))
# Departure up to which slopes are products of one function, over the rounding of the loss.
SEPARABLE = 10


def slopes(subject: Subject, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of a pair's loss by the log ratio of the chosen and of the rejected completion."""
    first, second = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    losses = subject(*probe(subject, torch.stack([first, second], -1), torch.zeros(len(chosen), 2)))
    found = torch.autograd.grad(losses.sum(), [first, second], materialize_grads=True)
    return found[0], found[1]


def score_of(subject: Subject) -> Callable[[Tensor], Tensor] | None:
    """The function s, s(0) = 0, for which the loss is one of s(chosen) - s(rejected); None where there is none.

    Then the slopes are as s'(chosen) to -s'(rejected), whatever that loss is. s is found up to a factor.
    """
    if subject.kind != "pair":
        return None
    grid = torch.tensor([-1.5, -0.6, 0.0, 0.7, 1.6], dtype=torch.float64)
    first, second = (side.flatten() for side in torch.meshgrid(grid, grid, indexing="ij"))
    by_first, by_second = slopes(subject, first, second)
    derivative = _derivative(subject, first), _derivative(subject, second)
    left, right = by_first * derivative[1], -by_second * derivative[0]
    if not torch.allclose(left, right, rtol=SEPARABLE * subject.rounding, atol=0.0) or (left == 0).any():
        return None

    def score(a: Tensor) -> Tensor:
        half = a.unsqueeze(-1) / 2
        points = half * (1 + NODES)
        return (half * WEIGHTS * _derivative(subject, points.flatten()).reshape(points.shape)).sum(-1)

    return score


def alpha_of(subject: Subject) -> float | None:
    r"""The alpha of an alpha-divergence's score, :math:`s'(a) \propto e^{(\alpha - 1) a}`, as Amari counts it."""
    if score_of(subject) is None:
        return None
    points = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    alpha = 1 + _derivative(subject, points).log() / points
    spread = (alpha - alpha[0]).abs().max()
    return float(alpha.mean()) if spread < SEPARABLE * subject.rounding else None


def _derivative(subject: Subject, a: Tensor) -> Tensor:
    """s'(a) / s'(0)."""
    by_first, by_second = slopes(subject, a, torch.zeros_like(a))
    return -by_first / by_second
