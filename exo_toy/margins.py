r"""Losses on a pair as functions of the margin: gradient, curvature and the time that gradient flow takes.

On two candidates every loss of the library is a function of one number, the margin m, the difference of the scaled
log ratios of y and y', and of a target t, the log odds that the loss aims at:

* EXO, KL(p_f || p) with p = (sigma(t), sigma(-t)): EXO-rw has t = (r(y) - r(y')) / beta_r, EXO-pref
  t = log((1 - eps)/eps) for the chosen against the rejected, and its expectation over labels
  :func:`exo_toy.preferences.exo_pref_target`;
* DPO, the cross-entropy of p and p_f: DPO-rw has the same t, DPO log((1 - eps)/eps), infinite without smoothing, and
  its expectation over labels :func:`exo_toy.preferences.dpo_target`.

EXO's gradient carries the factor sigma(m) sigma(-m), which vanishes on both sides; DPO's vanishes only where the pair
is ordered as it should be. The margin is not the reference's own log odds: log ratios are zero at the reference, so
every pair starts at m = 0, and a margin far below is what training has put there. Float64.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Float64
from scipy import special
from torch import Tensor

from exo_toy import checks

# e^t and e^-t, and the exponential integrals that they multiply, stay finite.
FARTHEST = 300.0

Target = float | int | Float[Tensor, "..."]


def exo_margin_gradient(margin: Float[Tensor, "..."], *, target: Target) -> Float64[Tensor, "..."]:
    r"""Derivative of EXO's loss on a pair with respect to the margin.

    .. math:: \sigma(m)\, \sigma(-m)\, (m - t) \;\sim\; -|m| e^{-|m|} \quad (m \to -\infty)

    Source: Ji et al., arXiv:2402.00856v4, section 3, at K = 2; not spelled out there.

    Args:
        margin: m in nats, finite, any shape.
        target: t in nats, finite, broadcast against ``margin``.

    Returns:
        The common shape, float64; 0 at m = t, below 0 for m < t.

    Raises:
        ValueError: a margin or target that is not finite.

    Example:
        >>> exo_margin_gradient(torch.tensor([-10.0, 0.0, 2.0]), target=2.0)
        tensor([-0.0005, -0.5000,  0.0000], dtype=torch.float64)
    """
    margin, target = _pair(margin, target)
    return margin.sigmoid() * (-margin).sigmoid() * (margin - target)


def exo_margin_curvature(margin: Float[Tensor, "..."], *, target: Target) -> Float64[Tensor, "..."]:
    r"""Second derivative of EXO's loss on a pair with respect to the margin.

    .. math:: \sigma(m)\, \sigma(-m) \big[1 - (m - t) \tanh\tfrac{m}{2}\big]

    Below 0, so that the loss is not convex, on both sides of an interval around the target.

    Args:
        margin: m in nats, finite, any shape.
        target: t in nats, finite, broadcast against ``margin``.

    Returns:
        The common shape, float64.

    Raises:
        ValueError: a margin or target that is not finite.

    Example:
        >>> exo_margin_curvature(torch.tensor([-10.0, 0.0, 2.0]), target=2.0)
        tensor([-0.0005,  0.2500,  0.1050], dtype=torch.float64)
    """
    margin, target = _pair(margin, target)
    return margin.sigmoid() * (-margin).sigmoid() * (1 - (margin - target) * (margin / 2).tanh())


def dpo_margin_gradient(margin: Float[Tensor, "..."], *, target: Target) -> Float64[Tensor, "..."]:
    r"""Derivative of DPO's loss on a pair with respect to the margin.

    .. math:: \sigma(m) - \sigma(t) \;\to\; -\sigma(t) \quad (m \to -\infty)

    Source: Rafailov et al., arXiv:2305.18290, section 4.

    Args:
        margin: m in nats, finite, any shape.
        target: t in nats, finite or infinite, broadcast against ``margin``.

    Returns:
        The common shape, float64, in (-1, 1); 0 at m = t, below 0 for m < t.

    Raises:
        ValueError: a margin that is not finite, a target that is NaN.

    Example:
        >>> dpo_margin_gradient(torch.tensor([-10.0, 0.0, 2.0]), target=torch.inf)
        tensor([-1.0000, -0.5000, -0.1192], dtype=torch.float64)
    """
    margin, target = _pair(margin, target, infinite=True)
    side = torch.where(margin <= target, 1.0, -1.0).double()
    # The difference of two sigmoids near 1 without their common digits.
    gap = torch.expm1(side * (margin - target))
    return side * (-side * margin).sigmoid() * (side * target).sigmoid() * gap


def dpo_margin_curvature(margin: Float[Tensor, "..."]) -> Float64[Tensor, "..."]:
    r"""Second derivative of DPO's loss on a pair with respect to the margin, whatever the target.

    .. math:: \sigma(m)\, \sigma(-m)

    Args:
        margin: m in nats, finite, any shape.

    Returns:
        The same shape, float64, in [0, 1/4].

    Raises:
        ValueError: a margin that is not finite.

    Example:
        >>> dpo_margin_curvature(torch.tensor([-10.0, 0.0]))
        tensor([4.5396e-05, 2.5000e-01], dtype=torch.float64)
    """
    margin, _ = _pair(margin, 0.0)
    return margin.sigmoid() * (-margin).sigmoid()


def exo_flow_time(start: Float[Tensor, "..."], end: Float[Tensor, "..."], *, target: Target) -> Float64[Tensor, "..."]:
    r"""The time that gradient flow on EXO's loss takes from one margin to another.

    For :math:`\dot m = -\ell'(m)`, with :math:`x = t - m` and the exponential integrals :math:`E_1` and Ei,

    .. math:: \int_{m_0}^{m_1} \frac{2 + e^m + e^{-m}}{t - m}\, dm = 2 \log\frac{x_0}{x_1}
        + e^t \big[E_1(x_1) - E_1(x_0)\big] + e^{-t} \big[\mathrm{Ei}(x_0) - \mathrm{Ei}(x_1)\big]

    From a margin far below it is about :math:`e^{|m_0|} / (|m_0| + t)`. Steps of gradient descent at a small rate are
    this over the rate.

    Source: not in the paper.

    Args:
        start: m_0 in nats, at most 300 in size, any shape.
        end: m_1 between ``start`` and the target, the same shape.
        target: t in nats, at most 300 in size, broadcast against both.

    Returns:
        The common shape, at least 0, float64; infinite where the end is the target, which is never reached. A short
        interval loses the digits that the times to its two ends have in common.

    Raises:
        ValueError: an end that is not between start and target, values out of range.

    Example:
        >>> exo_flow_time(torch.tensor([0.0, -10.0]), torch.tensor([1.0, 1.0]), target=2.0)
        tensor([   3.0600, 2030.8870], dtype=torch.float64)
    """
    start, end, target, side = _interval(start, end, target)
    far, near, t = (side * x for x in (target - start, target - end, target))
    times = 2 * (far / near).log() + t.exp() * (_e1(near) - _e1(far)) + (-t).exp() * (_ei(far) - _ei(near))
    # Where nothing is left to go there is nothing to wait for, even at the target itself.
    return torch.where(start == end, 0.0, torch.where(near == 0, torch.inf, times))


def dpo_flow_time(start: Float[Tensor, "..."], end: Float[Tensor, "..."], *, target: Target) -> Float64[Tensor, "..."]:
    r"""The time that gradient flow on DPO's loss takes from one margin to another.

    For :math:`\dot m = -\ell'(m)` and :math:`m_0 < m_1 < t`, with :math:`L(m) = \log(1 - e^{m - t})`,

    .. math:: \int_{m_0}^{m_1} \frac{dm}{\sigma(t) - \sigma(m)} = \frac{1}{\sigma(t)} \Big[m_1 - m_0
        + \frac{L(m_0) - L(m_1)}{\sigma(-t)}\Big] \;\to\; m_1 - m_0 + e^{m_1} - e^{m_0} \quad (t \to \infty)

    From a margin far below it is about :math:`|m_0|`.

    Source: not in the paper.

    Args:
        start: m_0 in nats, at most 300 in size, any shape.
        end: m_1 between ``start`` and the target, the same shape.
        target: t in nats, at most 300 in size or infinite, broadcast against both.

    Returns:
        The common shape, at least 0, float64; infinite where the end is the target, which is never reached. A short
        interval loses the digits that the times to its two ends have in common.

    Raises:
        ValueError: an end that is not between start and target, values out of range.

    Example:
        >>> dpo_flow_time(torch.tensor([0.0, -10.0]), torch.tensor([1.0, 1.0]), target=torch.inf)
        tensor([ 2.7183, 13.7182], dtype=torch.float64)
    """
    start, end, target, side = _interval(start, end, target, infinite=True)
    start, end, t = (side * x for x in (start, end, target))
    without_target = end - start + end.exp() - start.exp()
    finite = torch.where(t.isinf(), 0.0, t)
    left = [_log1mexp(m - finite) for m in (start, end)]
    times = (end - start + (left[0] - left[1]) / (-finite).sigmoid()) / finite.sigmoid()
    return torch.where(start == end, 0.0, torch.where(t.isinf(), without_target, times))


def _pair(margin: Tensor, target: Target, *, infinite: bool = False) -> tuple[Tensor, Tensor]:
    """Both in float64, after checking that they are finite; the target may be infinite where told so."""
    checks.require_floating(margin=margin)
    target = torch.as_tensor(target, dtype=torch.float64, device=margin.device)
    bad, bad_target = ~margin.detach().isfinite(), target.isnan() if infinite else ~target.isfinite()
    allowed = "a number or infinite" if infinite else "finite"
    checks.require_values(
        [margin, target],
        (bad, lambda: f"margin must be finite; got {checks.first_bad(margin, bad)}"),
        (bad_target, lambda: f"target must be {allowed}; got {checks.first_bad(target, bad_target)}"),
    )
    return margin.double(), target


def _interval(
    start: Tensor, end: Tensor, target: Target, *, infinite: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All in float64 and one shape, and the side of the start: 1 below the target, -1 above it."""
    checks.require_floating(start=start, end=end)
    aim = torch.as_tensor(target, dtype=torch.float64, device=start.device)
    start, end, aim = torch.broadcast_tensors(start.double(), end.double(), aim)
    far = [~(x.abs() <= FARTHEST) for x in (start, end, aim)]
    if infinite:
        far[2] = far[2] & ~aim.isinf()
    side = torch.where(start <= aim, 1.0, -1.0).double()
    outside = (side * start > side * end) | (side * end > side * aim)
    names = ("start", "end", "target")
    checks.require_values(
        [start, end, aim],
        *(
            (bad, lambda name=name, x=x, bad=bad: f"{name} must be at most {FARTHEST:g} in size; {_got(x, bad)}")
            for name, x, bad in zip(names, (start, end, aim), far, strict=True)
        ),
        (outside, lambda: f"end must lie between start and target; {_got(end, outside)}"),
    )
    return start, end, aim, side


def _got(values: Tensor, bad: Tensor) -> str:
    return f"got {checks.first_bad(values, bad)}"


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x below 0, with all digits at both ends."""
    return torch.where(x > -0.7, torch.log(-torch.expm1(x)), torch.log1p(-x.exp()))


def _e1(x: Tensor) -> Tensor:
    """The exponential integral of e^-u / u from x on."""
    return _ExponentialIntegral.apply(x, special.exp1, -1.0)


def _ei(x: Tensor) -> Tensor:
    """The principal value of the integral of e^u / u up to x."""
    return _ExponentialIntegral.apply(x, special.expi, 1.0)


class _ExponentialIntegral(torch.autograd.Function):
    """One of the two by SciPy; its derivative is sign * exp(sign * x) / x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, integral: Callable[..., Any], sign: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sign = sign
        return torch.as_tensor(integral(x.cpu().numpy()), dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grad * ctx.sign * torch.exp(ctx.sign * x) / x, None, None
