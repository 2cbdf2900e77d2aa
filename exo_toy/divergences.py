"""Divergences between tables of log-probabilities, exact, in float64.

Tables are [..., N] with completions last; probability zero is -inf. A table [N] is shared by the prompts of the other.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from exo_toy import checks, logspace
from exo_toy.logspace import expectation, logaddexp


def kl_divergence(log_p: Float[Tensor, "*#X N"], log_q: Float[Tensor, "*#X N"]) -> Float[Tensor, "..."]:
    r"""Kullback-Leibler divergence, in the order of its arguments.

    .. math:: \mathrm{KL}(p \| q) = \sum_y p(y) \log \frac{p(y)}{q(y)}

    Source: Kullback and Leibler, 1951.

    Args:
        log_p: [..., N] normalised log-probabilities in nats.
        log_q: [..., N].

    Returns:
        [...] float64 in [0, inf] up to rounding; 0 where p = q, inf where p puts mass outside q's support. Where
        p = 0 the gradient is its limit, 0.

    Raises:
        ValueError: shapes that do not match, or rows that are not normalised log-probabilities.

    Example:
        >>> kl_divergence(torch.tensor([0.0, -torch.inf]), torch.tensor([0.5, 0.5]).log())
        tensor(0.6931, dtype=torch.float64)
    """
    log_p, log_q = _log_probabilities(log_p, log_q)
    return expectation(log_p, log_p - log_q)


def entropy(log_p: Float[Tensor, "*X N"]) -> Float[Tensor, "*X"]:
    r"""Shannon entropy.

    .. math:: H(p) = -\sum_y p(y) \log p(y)

    Source: Shannon, 1948.

    Args:
        log_p: [..., N] normalised log-probabilities in nats.

    Returns:
        [...] float64 in [0, log N]; 0 for a point mass.

    Raises:
        ValueError: rows that are not normalised log-probabilities.

    Example:
        >>> entropy(torch.tensor([0.5, 0.5]).log())
        tensor(0.6931, dtype=torch.float64)
    """
    (log_p,) = checks.as_tables(log_p=log_p)
    checks.require_log_probabilities(log_p=log_p)
    return -expectation(log_p, log_p)


def total_variation(log_p: Float[Tensor, "*#X N"], log_q: Float[Tensor, "*#X N"]) -> Float[Tensor, "..."]:
    r"""Total variation distance.

    .. math:: \mathrm{TV}(p, q) = \tfrac12 \sum_y |p(y) - q(y)|

    Source: Tsybakov, Introduction to Nonparametric Estimation, 2009, section 2.4.

    Args:
        log_p: [..., N] normalised log-probabilities in nats.
        log_q: [..., N].

    Returns:
        [...] float64 in [0, 1]; 0 where p = q, 1 where the supports are disjoint.

    Raises:
        ValueError: shapes that do not match, or rows that are not normalised log-probabilities.

    Example:
        >>> total_variation(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log())
        tensor(0.5000, dtype=torch.float64)
    """
    log_p, log_q = _log_probabilities(log_p, log_q)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def jensen_shannon(log_p: Float[Tensor, "*#X N"], log_q: Float[Tensor, "*#X N"]) -> Float[Tensor, "..."]:
    r"""Jensen-Shannon divergence.

    .. math:: \tfrac12 \mathrm{KL}(p \| m) + \tfrac12 \mathrm{KL}(q \| m), \quad m = \tfrac12 (p + q)

    Source: Lin, IEEE Transactions on Information Theory 37(1), 1991.

    Args:
        log_p: [..., N] normalised log-probabilities in nats.
        log_q: [..., N].

    Returns:
        [...] float64 in [0, log 2] up to rounding; 0 where p = q, log 2 where the supports are disjoint.

    Raises:
        ValueError: shapes that do not match, or rows that are not normalised log-probabilities.

    Example:
        >>> jensen_shannon(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log())
        tensor(0.6931, dtype=torch.float64)
    """
    log_p, log_q = _log_probabilities(log_p, log_q)
    log_m = logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (expectation(log_p, log_p - log_m) + expectation(log_q, log_q - log_m))


def alpha_divergence(
    log_p: Float[Tensor, "*#X N"], log_q: Float[Tensor, "*#X N"], *, alpha: float | int
) -> Float[Tensor, "..."]:
    r"""Amari's alpha-divergence, from KL(q||p) at alpha = 0 to KL(p||q) at alpha = 1.

    .. math:: D_\alpha(p \| q) = \frac{1 - \sum_y p(y)^\alpha q(y)^{1-\alpha}}{\alpha (1 - \alpha)}

    Source: Cichocki and Amari, Entropy 12(6), 2010, Eq. 43.

    Args:
        log_p: [..., N] normalised log-probabilities in nats.
        log_q: [..., N].
        alpha: any finite number; 0 and 1 are the limits; D_alpha(p||q) = D_{1-alpha}(q||p).

    Returns:
        [...] float64 in [0, inf] up to rounding; 0 where p = q; finite for alpha in (0, 1).

    Raises:
        ValueError: alpha not finite, shapes that do not match, or rows that are not normalised log-probabilities.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
        >>> bool(torch.isclose(alpha_divergence(p, q, alpha=1), kl_divergence(p, q)))
        True
    """
    checks.require_real("alpha", alpha, allowed="a finite number", low=-math.inf, high=math.inf)
    log_p, log_q = _log_probabilities(log_p, log_q)
    return logspace.alpha_divergence(log_p, log_q, float(alpha))


def _log_probabilities(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Both tables in float64, checked and broadcast to one shape."""
    log_p, log_q = checks.as_tables(log_p=log_p, log_q=log_q)
    checks.require_log_probabilities(log_p=log_p, log_q=log_q)
    log_p, log_q = torch.broadcast_tensors(log_p, log_q)
    return log_p, log_q
