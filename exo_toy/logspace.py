"""Probabilities kept as logarithms: probability zero is -inf, and zero times infinity is zero.

The rule 0 * (+-inf) = 0 holds only where the weight is zero; any other infinity stays. It is applied before the
multiplication, so that the backward pass obeys it too.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def expectation(log_p: Float[Tensor, "*#X N"], values: Float[Tensor, "*#X N"]) -> Float[Tensor, "..."]:
    r""":math:`\sum_y p(y) v(y)` over the last dimension, where entries of probability zero count nothing.

    Args:
        log_p: [..., N] log-probabilities or log-weights, -inf for zero.
        values: [..., N], of any value (also infinite or NaN) where ``log_p`` is -inf.

    Returns:
        [...]; infinite where an infinite value has positive weight.

    Example:
        >>> expectation(torch.tensor([0.0, -torch.inf]), torch.tensor([2.0, torch.inf]))
        tensor(2.)
    """
    p = log_p.exp()
    values = torch.where(log_p > -torch.inf, values, 0.0)
    # A positive weight may underflow to 0; an infinite value still counts in full, and gets the weight's gradient, 0.
    return torch.where((p == 0) & values.isinf(), values.detach(), p * values).sum(-1)


def alpha_divergence(log_p: Float[Tensor, "*#X N"], log_q: Float[Tensor, "*#X N"], alpha: float) -> Tensor:
    r"""Amari's :math:`(1 - \sum_y p^\alpha q^{1-\alpha}) / (\alpha (1 - \alpha))`, its limits at 0 and 1; no checks.

    Args:
        log_p: [..., N] normalised log-probabilities, -inf for zero.
        log_q: [..., N].
        alpha: any finite number.

    Returns:
        [...], at least 0 up to rounding.

    Example:
        >>> alpha_divergence(torch.tensor([0.0, -torch.inf]), torch.tensor([0.5, 0.5]).log(), 1.0)
        tensor(0.6931)
    """
    if alpha < 0.5:
        log_p, log_q, alpha = log_q, log_p, 1 - alpha
    if alpha == 1:
        return expectation(log_p, log_p - log_q)
    # sum_y p - m with m = p^alpha q^(1-alpha), each term from the larger of the two: as alpha tends to 1 nothing
    # cancels, and (q/p)^(1-alpha), which may overflow where p underflows, is never formed.
    outside = log_p == -torch.inf
    step = (1 - alpha) * (log_q - log_p.masked_fill(outside, 0.0)).masked_fill(outside, 0.0)
    grows = step > 0
    difference = torch.where(grows, torch.expm1(-step.where(grows, 0.0)), -torch.expm1(step.where(~grows, 0.0)))
    # Divided twice: the product overflows for huge alpha.
    return expectation(torch.where(grows, log_p + step, log_p), difference) / alpha / (1 - alpha)


def log_softmax(logits: Float[Tensor, "*leading N"], mask: Bool[Tensor, "*leading N"] | None = None) -> Tensor:
    """Log-softmax over the last dimension; entries outside ``mask`` get -inf, whatever they hold, and no gradient.

    Args:
        logits: [..., N]; -inf gives -inf. A row without a finite entry gives NaN.
        mask: [..., N], True where the entry counts.

    Returns:
        [..., N], log-sum-exp 0.

    Example:
        >>> log_softmax(torch.tensor([0.0, torch.nan]), torch.tensor([True, False]))
        tensor([0., -inf])
    """
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return torch.log_softmax(logits, -1)


def logaddexp(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """log(exp a + exp b), -inf where both are, with derivatives that are limits at -inf (torch's own are NaN there).

    Args:
        a: any shape.
        b: the same shape.

    Returns:
        The same shape.

    Example:
        >>> logaddexp(torch.tensor(-torch.inf), torch.tensor(-torch.inf))
        tensor(-inf)
    """
    infinite, limit = (a == b) & a.isinf(), a.detach()
    a, b = a.masked_fill(infinite, 0.0), b.masked_fill(infinite, 0.0)
    larger, smaller = torch.where(a > b, a, b), torch.where(a > b, b, a)
    return torch.where(infinite, limit, larger + torch.log1p(torch.exp(smaller - larger)))
