"""The temperatures of a loss on candidates that nobody told: read off the loss itself."""

from dataclasses import replace

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from exo_toy.lab.subject import ASSUMED, FOUND, LabError, Subject, probe

# Four candidates, no two sums of two rewards alike; in units of which one suits any beta_r.
REWARDS = torch.tensor([1.0, 0.2, 0.7, 0.4], dtype=torch.float64)
UNITS = (1.0, 0.1, 10.0, 0.01, 100.0)
NEWTON_STEPS = 20
# Relative size of a last step that moves no digit that counts; the curvature is that of the point before it.
CONVERGED = 1e-13
# Relative departure from a straight line.
STRAIGHT = 1e-7


def with_temperatures(subject: Subject) -> Subject:
    """The loss with those of its temperatures that were not told and that it shows; what was told stands."""
    if subject.kind != "list" or ASSUMED not in subject.temperatures.values():
        return subject
    found = next(filter(None, (_shown(subject, unit * REWARDS) for unit in UNITS)), None)
    if found is None:
        return subject
    shown = dict(zip(("beta_pi", "beta_r"), found, strict=True))
    told = {name: getattr(subject, name) for name, origin in subject.temperatures.items() if origin != ASSUMED}
    # One that contradicts what was told shows nothing of the other.
    if any(abs(shown[name] / value - 1) > STRAIGHT for name, value in told.items()):
        return subject
    origins = {name: origin if name in told else FOUND for name, origin in subject.temperatures.items()}
    return replace(subject, **{**shown, **told}, temperatures=origins)


def _shown(subject: Subject, rewards: Tensor) -> tuple[float, float] | None:
    r"""beta_pi and beta_r of a divergence of p = softmax(beta_pi a) from q = softmax(r / beta_r).

    It is least where a = r / (beta_pi beta_r) + c, and there its second derivative by the log ratios of candidates i
    and j is -q_i q_j times one number, whichever divergence it is: a is linear in r, and the logarithm in r_i + r_j.
    """

    def value(log_ratio: Tensor) -> Tensor:
        return subject(*probe(subject, log_ratio[None], rewards[None])).sum()

    def value_and_gradient(vector: np.ndarray) -> tuple[float, np.ndarray]:
        log_ratio = torch.from_numpy(vector.copy()).requires_grad_()
        loss = value(log_ratio)
        return loss.item(), torch.autograd.grad(loss, log_ratio, materialize_grads=True)[0].numpy()

    try:
        found = scipy.optimize.minimize(value_and_gradient, np.zeros(len(rewards)), jac=True, method="L-BFGS-B")
        at = torch.from_numpy(found.x)
        for _ in range(NEWTON_STEPS):
            hessian = torch.autograd.functional.hessian(value, at)
            # A constant added to all log ratios changes nothing.
            step = torch.linalg.pinv(hessian, rtol=1e-12) @ torch.from_numpy(value_and_gradient(at.numpy())[1])
            at = at - step
            if step.abs().max() <= CONVERGED * at.abs().max():
                break
    # It has no second derivative, or refuses what it met on its way.
    except (LabError, RuntimeError):
        return None
    i, j = torch.triu_indices(len(rewards), len(rewards), offset=1)
    product = _slope(at, rewards)
    inverse = _slope((-hessian[i, j]).log(), rewards[i] + rewards[j])
    if product is None or inverse is None:
        return None
    return inverse / product, 1 / inverse


def _slope(values: Tensor, of: Tensor) -> float | None:
    """The slope of a rising straight line, if it is one."""
    x, y = of - of.mean(), values - values.mean()
    slope = (x @ y) / (x @ x)
    straight = bool((y - slope * x).abs().max() <= STRAIGHT * y.abs().max())
    return float(slope) if straight and slope > 0 and slope.isfinite() else None
