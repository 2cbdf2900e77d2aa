"""The policies that alignment aims at: optimal, tempered, best-of-n. Exact, in float64."""

import torch
from jaxtyping import Float
from torch import Tensor

from exo_toy import checks

MOST_DRAWS = 2**53


def optimal_policy(
    log_ref: Float[Tensor, "*#X N"], reward: Float[Tensor, "*#X N"], *, beta: float | int
) -> tuple[Float[Tensor, "*X N"], Float[Tensor, "*X"]]:
    r"""The policy that maximises the KL-regularised reward, and its log partition function.

    .. math::
        \pi^*_\beta(y) = \pi_{ref}(y) \, e^{r(y)/\beta} / Z_\beta, \quad Z_\beta = E_{\pi_{ref}}[e^{r/\beta}]

    Source: Ji et al., arXiv:2402.00856v4, section 2 (after Korbak et al., 2022).

    Args:
        log_ref: [..., N] normalised log-probabilities of the reference policy.
        reward: [..., N], finite, or -inf for a forbidden completion.
        beta: strength of the KL penalty, above 0, in the unit of the reward.

    Returns:
        (log_pi_star [..., N], log_z [...]), float64; -inf where the reference is zero or the completion forbidden.

    Raises:
        ValueError: shapes that do not match, a table that is not normalised, NaN or +inf in the reward, beta not
            above 0, a row in which every completion of positive reference probability is forbidden.

    Example:
        >>> optimal_policy(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, -torch.inf]), beta=1.0)[0].exp()
        tensor([1., 0.], dtype=torch.float64)
    """
    checks.require_positive(beta=beta)
    log_ref, reward = checks.as_tables(log_ref=log_ref, reward=reward)
    checks.require_log_probabilities(log_ref=log_ref)
    checks.require_rewards(reward)
    # The policy does not see a constant added to the reward; taking the largest off first keeps its digits.
    outside = log_ref == -torch.inf
    largest = reward.detach().masked_fill(outside, -torch.inf).amax(-1, keepdim=True)
    empty = largest == -torch.inf
    checks.require_values(
        [empty],
        (empty, lambda: "reward must be above -inf for a completion of positive reference probability; got only -inf"),
    )
    log_weight = log_ref + (reward - largest).masked_fill(outside, 0.0) / beta
    return log_weight.log_softmax(-1), log_weight.logsumexp(-1) + largest.squeeze(-1) / beta


def tempered_policy(
    log_pi: Float[Tensor, "*#X N"], log_ref: Float[Tensor, "*#X N"], *, beta_pi: float | int
) -> Float[Tensor, "*X N"]:
    r"""The normalised geometric mean of a policy and the reference.

    .. math:: \pi^{\beta_\pi}(y) \propto \pi(y)^{\beta_\pi} \, \pi_{ref}(y)^{1-\beta_\pi}

    Source: Ji et al., arXiv:2402.00856v4, section 3.

    Args:
        log_pi: [..., N] normalised log-probabilities of the policy.
        log_ref: [..., N] of the reference.
        beta_pi: policy temperature, above 0; 1 gives the policy itself, values above 1 sharpen its log ratio.

    Returns:
        [..., N] float64; -inf where the policy is zero and, for beta_pi below 1, where the reference is zero.

    Raises:
        ValueError: shapes that do not match, tables that are not normalised, beta_pi not above 0; supports that do
            not meet (beta_pi below 1), or a policy with mass outside the reference's support (beta_pi above 1).

    Example:
        >>> tempered_policy(torch.tensor([0.9, 0.1]).log(), torch.tensor([0.1, 0.9]).log(), beta_pi=0.5).exp()
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    checks.require_positive(beta_pi=beta_pi)
    log_pi, log_ref = checks.as_tables(log_pi=log_pi, log_ref=log_ref)
    checks.require_log_probabilities(log_pi=log_pi, log_ref=log_ref)
    log_pi, log_ref = torch.broadcast_tensors(log_pi, log_ref)
    if beta_pi == 1:
        return torch.log_softmax(log_pi, -1)
    zero = (log_pi == -torch.inf) | (log_ref == -torch.inf)
    if beta_pi > 1:
        outside = (log_ref == -torch.inf) & (log_pi > -torch.inf)
        checks.require_values(
            [log_pi.detach(), log_ref.detach()],
            (outside, lambda: f"log_pi must be -inf where log_ref is; got {checks.first_bad(log_pi, outside)}"),
        )
    disjoint = zero.all(-1)
    checks.require_values(
        [log_pi.detach(), log_ref.detach()],
        (disjoint, lambda: "log_pi must be above -inf on a completion where log_ref is; got disjoint supports"),
    )
    log_ref = log_ref.masked_fill(zero, 0.0)
    log_ratio = log_pi.masked_fill(zero, 0.0) - log_ref
    # Scaled as a difference to the largest, which the normalisation does not see, and which cannot overflow to NaN.
    largest = log_ratio.detach().masked_fill(zero, -torch.inf).amax(-1, keepdim=True)
    log_weight = log_ref + beta_pi * (log_ratio - largest)
    return torch.log_softmax(log_weight.masked_fill(zero, -torch.inf), -1)


def best_of_n(log_ref: Float[Tensor, "*#X N"], reward: Float[Tensor, "*#X N"], *, n: int) -> Float[Tensor, "*X N"]:
    r"""The distribution of the best of n independent draws from the reference, ties broken uniformly among the draws.

    .. math::
        \pi_n(y) = \pi_{ref}(y) \, \frac{F(r(y))^n - F^-(r(y))^n}{P_{ref}(r = r(y))},
        \quad F(c) = P_{ref}(r \le c), \ F^-(c) = P_{ref}(r < c)

    Its KL to the reference is at most log n - (n-1)/n (Beirami et al., arXiv:2401.01879).

    Source: Stiennon et al., arXiv:2009.01325; the closed form with ties follows from the distribution of a maximum.

    Args:
        log_ref: [..., N] normalised log-probabilities of the reference.
        reward: [..., N], finite or -inf.
        n: number of draws, at least 1.

    Returns:
        [..., N] float64 normalised log-probabilities; the reference itself at n = 1.

    Raises:
        ValueError: shapes that do not match, a table that is not normalised, NaN or +inf in the reward, n below 1.

    Example:
        >>> best_of_n(torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), torch.arange(4.0), n=2).exp()
        tensor([0.1600, 0.3300, 0.3200, 0.1900], dtype=torch.float64)
    """
    checks.require_integer("n", n, at_least=1)
    if n > MOST_DRAWS:
        raise ValueError(f"n must be at most 2**53, the integers that float64 tells apart; got {n}")
    log_ref, reward = checks.as_tables(log_ref=log_ref, reward=reward)
    checks.require_log_probabilities(log_ref=log_ref)
    checks.require_rewards(reward)
    log_ref, reward = torch.broadcast_tensors(log_ref, reward)
    reward, order = reward.sort(dim=-1, stable=True)
    log_p = log_ref.gather(-1, order)

    # One group per distinct reward, in increasing order: masses P, F^- below, 1 - F above, none of them by subtraction.
    first = torch.ones_like(reward, dtype=torch.bool)
    first[..., 1:] = reward[..., 1:] != reward[..., :-1]
    group = first.long().cumsum(-1) - 1
    mass = torch.zeros_like(log_p).scatter_add(-1, group, log_p.exp())
    below = torch.nn.functional.pad(mass.cumsum(-1), (1, 0))[..., :-1]
    above = torch.nn.functional.pad(mass.flip(-1).cumsum(-1), (1, 0))[..., :-1].flip(-1)
    nothing_below, empty = below == 0, mass == 0
    at_most = (below + mass).masked_fill(nothing_below & empty, torch.finfo(torch.float64).tiny)

    # (F^n - F^-^n) / P = F^(n-1) (1 - (1-s)^n) / s with s = P/F; the last factor, the number of tries, tends to n as
    # s tends to 0 and is 1 at s = 1. Logarithms of F and 1 - s are each taken from whichever tail is small.
    log_at_most = torch.where(above < 0.5, torch.log1p(-above.clamp(max=0.5)), at_most.log())
    share = (mass / at_most).masked_fill(empty, 0.5)
    log_rest = torch.where(
        share < 0.5, torch.log1p(-share.clamp(max=0.5)), (below / at_most).masked_fill(nothing_below, 0.5).log()
    )
    tries = (-torch.expm1(n * log_rest) / share).masked_fill(empty, n).masked_fill(nothing_below, 1.0)
    log_best = log_p + ((n - 1) * log_at_most + tries.log()).gather(-1, group)
    return torch.empty_like(log_best).scatter(-1, order, log_best)
