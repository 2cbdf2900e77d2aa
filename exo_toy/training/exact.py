"""Exact minimisation of an objective of a policy, certified."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from exo_toy.policies import Policy

# Curvatures below this share of the largest count as flat: a softmax does not change when its logits are shifted.
FLAT = 1e-8


@dataclass(frozen=True)
class Optimum:
    """Where a minimisation ended, and what certifies it.

    ``gradient`` is the largest entry of the gradient, ``curvature`` the smallest eigenvalue of the Hessian that is
    not flat, relative to the largest; ``saturation`` the largest log-probability ratio between two tokens of a
    conditional. A minimum has ``gradient`` near 0 and ``curvature`` above 0; a start that ran into a corner of the
    softmax, where every derivative vanishes though nothing is optimal, shows a huge ``saturation``.
    """

    parameters: Float[Tensor, " P"]
    value: float
    gradient: float
    curvature: float
    saturation: float

    def is_minimum(self, *, gradient: float = 1e-8, saturation: float = 18.0) -> bool:
        """Whether the certificate holds; ``saturation`` has to stay below ``-log(gradient)``.

        A token of probability p that ought to grow has a gradient and a curvature of the order of p. Beyond that bound
        the one is small enough to pass for zero and the other to be left out as flat.
        """
        return self.gradient <= gradient and self.curvature > 0 and not self.saturation > saturation


def minimize(
    policy: Policy,
    objective: Callable[[Tensor], Tensor],
    *,
    max_iterations: int = 2000,
    newton_steps: int = 10,
    certify: bool = True,
) -> Optimum:
    r"""Minimise an exact objective of a policy from where the policy stands: L-BFGS, then Newton's method.

    .. math:: \min_\theta \; \mathrm{objective}(\log \pi_\theta)

    Source: Liu and Nocedal, 1989, as in :func:`scipy.optimize.minimize`.

    Args:
        policy: as in :mod:`exo_toy.policies`; its parameters are set to the optimum.
        objective: ``log_pi`` [X, N] -> scalar, twice differentiable.
        max_iterations: of L-BFGS.
        newton_steps: at most so many, stopped where the gradient no longer falls.
        certify: whether to compute the Hessian; without it no Newton step is taken and ``curvature`` is NaN.

    Returns:
        Optimum, whose ``saturation`` is NaN for policies that are not made of logits.

    Raises:
        ValueError: the objective is not finite at the start.

    Example:
        >>> from exo_toy.policies import TabularPolicy
        >>> from exo_toy.spaces import SequenceSpace
        >>> policy, target = TabularPolicy(SequenceSpace(2, 1)), torch.tensor([0.2, 0.8]).double()
        >>> optimum = minimize(policy, lambda log_pi: -(target * log_pi).sum())
        >>> policy.log_probs().exp().detach(), optimum.is_minimum()
        (tensor([[0.2000, 0.8000]], dtype=torch.float64), True)
    """
    parameters = list(policy.parameters())
    start = parameters_to_vector(parameters).detach()

    def value_and_gradient(vector: np.ndarray) -> tuple[float, np.ndarray]:
        vector_to_parameters(torch.from_numpy(vector), parameters)
        value = objective(policy.log_probs())
        return value.item(), _flat(torch.autograd.grad(value, parameters)).numpy()

    if not math.isfinite(value_and_gradient(start.numpy().copy())[0]):
        raise ValueError("objective must be finite at the policy's start")
    options = {"maxiter": max_iterations, "maxfun": 2 * max_iterations, "ftol": 1e-16, "gtol": 1e-10, "maxcor": 20}
    found = scipy.optimize.minimize(value_and_gradient, start.numpy(), jac=True, method="L-BFGS-B", options=options)
    vector, value, gradient = found.x, float(found.fun), found.jac
    hessian = None
    for _ in range(newton_steps if certify else 0):
        hessian = _hessian(policy, objective, vector)
        candidate = vector - np.linalg.pinv(hessian, rcond=FLAT, hermitian=True) @ gradient
        new_value, new_gradient = value_and_gradient(candidate)
        if not np.abs(new_gradient).max() < np.abs(gradient).max() or new_value > value + 1e-9 * max(1.0, abs(value)):
            break
        vector, value, gradient, hessian = candidate, new_value, new_gradient, None
    if certify and hessian is None:
        hessian = _hessian(policy, objective, vector)
    vector_to_parameters(torch.from_numpy(vector), parameters)
    return Optimum(
        torch.from_numpy(vector.copy()),
        value,
        float(np.abs(gradient).max()),
        math.nan if hessian is None else _smallest_curvature(hessian),
        _saturation(policy),
    )


def _hessian(policy: Policy, objective: Callable[[Tensor], Tensor], vector: np.ndarray) -> np.ndarray:
    """Hessian [P, P] of the objective at a parameter vector."""
    parameters = list(policy.parameters())
    vector_to_parameters(torch.from_numpy(vector), parameters)
    gradient = _flat(torch.autograd.grad(objective(policy.log_probs()), parameters, create_graph=True))
    rows = [_flat(torch.autograd.grad(entry, parameters, retain_graph=True)) for entry in gradient]
    hessian = torch.stack(rows).numpy()
    return (hessian + hessian.T) / 2


def _smallest_curvature(hessian: np.ndarray) -> float:
    """Smallest eigenvalue, flat ones left out, relative to the largest; 0 where all are flat."""
    eigenvalues = np.linalg.eigvalsh(hessian)
    largest = np.abs(eigenvalues).max()
    if largest == 0:
        return 0.0
    relative = eigenvalues / largest
    curved = relative[np.abs(relative) > FLAT]
    return float(curved.min())


def _saturation(policy: Policy) -> float:
    """Largest difference between two logits of one conditional; NaN for a policy without a table of logits."""
    tables = getattr(policy, "logits", None)
    if tables is None:
        return math.nan
    spread = 0.0
    for logits in [tables] if isinstance(tables, Tensor) else tables:
        spread = max(spread, (logits.amax(-1) - logits.amin(-1)).max().item())
    return spread


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """All entries in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])
