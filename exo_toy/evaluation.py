"""How good a policy is, exactly: against other distributions, and against what is possible at its divergence."""

import math
from typing import NamedTuple

import scipy.optimize
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from exo_toy import checks, logspace
from exo_toy.divergences import kl_divergence
from exo_toy.targets import optimal_policy

# Rewards beyond this have no decimals.
LARGEST_FRACTION = 1e15
# At a temperature of the spread of the rewards times exp of this, or of minus this, an end is reached up to rounding.
ROUNDED = 40.0


def win_rate(
    log_p: Float[Tensor, "X N"], log_q: Float[Tensor, "X N"], reward: Float[Tensor, "X N"], *, decimals: int = 9
) -> Float64[Tensor, " X"]:
    r"""Probability that a completion of p has the higher reward than an independent one of q, ties counted half.

    .. math::
        P(r(y) > r(y')) + \tfrac12 P(r(y) = r(y')), \quad y \sim p,\; y' \sim q

    Args:
        log_p: [X, N] normalised log-probabilities, -inf for zero.
        log_q: [X, N] the same of the opponent.
        reward: [X, N], finite.
        decimals: rewards that agree to so many are ties.

    Returns:
        [X] float64, in [0, 1].

    Raises:
        ValueError: tables of other shapes, or not of normalised log-probabilities; a reward that is not finite.

    Example:
        >>> uniform, reward = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.0, 1.0]]).double()
        >>> win_rate(uniform, uniform, reward)
        tensor([0.5000], dtype=torch.float64)
    """
    log_p, log_q, reward = checks.as_tables(log_p=log_p, log_q=log_q, reward=reward)
    checks.require_log_probabilities(log_p=log_p, log_q=log_q)
    _require_finite(reward)
    rounded = torch.where(reward.abs() < LARGEST_FRACTION, reward.round(decimals=decimals), reward)
    rates = []
    for p, q, r in zip(log_p.exp(), log_q.exp(), rounded, strict=True):
        levels, level = r.unique(return_inverse=True)
        at = torch.zeros_like(levels).index_add_(0, level, q)
        rates.append((p * (at.cumsum(0) - at / 2)[level]).sum())
    return torch.stack(rates)


class FrontierPoint(NamedTuple):
    """The most reward that a divergence allows, and the temperature at which the optimal policy has both."""

    reward: float
    beta: float


def frontier(log_ref: Float[Tensor, "X N"], reward: Float[Tensor, "X N"], *, kl: float | int) -> FrontierPoint:
    r"""The largest mean reward of any policy within a mean divergence from the reference.

    .. math::
        \max_\pi E_x E_{y \sim \pi}\, r \quad \text{with} \quad E_x \mathrm{KL}(\pi \| \pi_{ref}) \le \kappa

    It is reached by the optimal policy of one temperature for all prompts. Where the divergence suffices for the
    highest reward of every prompt that the reference can produce, it is their mean.

    Source: Lagrange duality; the optimal policy is that of :func:`exo_toy.targets.optimal_policy`.

    Args:
        log_ref: [X, N] normalised log-probabilities.
        reward: [X, N], finite.
        kl: κ, at least 0, in nats.

    Returns:
        The reward, a mean over prompts, and the temperature (0 at the maximum, inf at κ = 0).

    Raises:
        ValueError: tables of other shapes, or not of normalised log-probabilities; a reward that is not finite; ``kl``
            out of range.

    Example:
        >>> uniform, reward = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.0, 1.0]]).double()
        >>> round(frontier(uniform, reward, kl=0.1).reward, 4)
        0.7198
    """
    log_ref, reward = checks.as_tables(log_ref=log_ref, reward=reward)
    checks.require_log_probabilities(log_ref=log_ref)
    _require_finite(reward)
    checks.require_real("kl", kl, allowed="at least 0 and finite", low=0.0, high=math.inf, low_allowed=True)
    inside = log_ref > -torch.inf
    best = reward.masked_fill(~inside, -torch.inf).amax(-1, keepdim=True)
    spread = (best - reward).masked_fill(~inside, 0.0).max().item()
    mean = logspace.expectation(log_ref, reward).mean().item()
    if kl == 0 or spread == 0:
        return FrontierPoint(mean, math.inf)
    # Nothing is gained beyond the divergence of the reference restricted to its best completions.
    if kl >= -log_ref.masked_fill(reward != best, -torch.inf).logsumexp(-1).mean().item():
        return FrontierPoint(best.mean().item(), 0.0)

    def at(log_beta: float) -> tuple[float, float]:
        log_pi, _ = optimal_policy(log_ref, reward, beta=math.exp(log_beta))
        return kl_divergence(log_pi, log_ref).mean().item(), logspace.expectation(log_pi, reward).mean().item()

    low = high = math.log(spread)
    while at(low)[0] < kl:
        low -= 2.0
        if low < math.log(spread) - ROUNDED:
            return FrontierPoint(best.mean().item(), 0.0)
    while at(high)[0] > kl:
        high += 2.0
        if high > math.log(spread) + ROUNDED:
            return FrontierPoint(mean, math.inf)
    log_beta = scipy.optimize.brentq(lambda x: at(x)[0] - kl, low, high, xtol=1e-12)
    return FrontierPoint(at(log_beta)[1], math.exp(log_beta))


def effective_share(log_p_weight: Float[Tensor, "X N"], log_ref: Float[Tensor, "X N"]) -> Float64[Tensor, " X"]:
    r"""Limit of the effective sample size over the number of samples, for weights of samples of the reference.

    .. math::
        \frac{(E_{ref}\, w)^2}{E_{ref}\, w^2}

    Args:
        log_p_weight: [X, N] log w up to a constant, such as beta_pi times the log ratio.
        log_ref: [X, N] normalised log-probabilities.

    Returns:
        [X] float64, in (0, 1].

    Raises:
        ValueError: tables of other shapes, a reference that is not normalised, a weight that is NaN or inf where the
            reference is not zero.

    Example:
        >>> uniform = torch.tensor([[0.5, 0.5]]).double().log()
        >>> effective_share(torch.tensor([[0.0, -torch.inf]]), uniform)
        tensor([0.5000], dtype=torch.float64)
    """
    log_w, log_ref = checks.as_tables(log_p_weight=log_p_weight, log_ref=log_ref)
    checks.require_log_probabilities(log_ref=log_ref)
    log_w = log_w.masked_fill(log_ref == -torch.inf, 0.0)
    bad = log_w.isnan() | (log_w == torch.inf)
    checks.require_values(
        [log_w], (bad, lambda: f"log_p_weight must be finite or -inf; got {checks.first_bad(log_w, bad)}")
    )
    return (2 * (log_w + log_ref).logsumexp(-1) - (2 * log_w + log_ref).logsumexp(-1)).exp()


def _require_finite(reward: Tensor) -> None:
    bad = ~reward.isfinite()
    checks.require_values([reward], (bad, lambda: f"reward must be finite; got {checks.first_bad(reward, bad)}"))
