"""Expected losses over labelled pairs of completions: every pair, both labels, nothing sampled."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from exo_toy import checks
from exo_toy.logspace import expectation

# Loss of B pairs from log pi of the chosen and the rejected completion and log pi_ref of both, [B] each, to [B].
PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def bradley_terry(reward: Float[Tensor, "*X N"]) -> Float64[Tensor, "*X N N"]:
    r"""Probability :math:`\sigma(r(y) - r(y'))` that y is preferred to y'.

    Source: Bradley and Terry, 1952.

    Args:
        reward: [..., N], finite.

    Returns:
        [..., N, N] float64, y along the last dimension but one; P + P^T = 1.

    Raises:
        ValueError: a reward that is not finite.

    Example:
        >>> bradley_terry(torch.tensor([0.0, 0.0]))
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    (reward,) = checks.as_tables(reward=reward)
    bad = ~reward.isfinite()
    checks.require_values([reward], (bad, lambda: f"reward must be finite; got {checks.first_bad(reward, bad)}"))
    return (reward.unsqueeze(-1) - reward.unsqueeze(-2)).sigmoid()


def expected_preference_loss(
    log_pi: Float[Tensor, " N"], log_ref: Float[Tensor, " N"], preference: Float[Tensor, "N N"], loss: PairLoss
) -> Float64[Tensor, ""]:
    r"""The expectation of a loss on a pair drawn from the reference and labelled once.

    .. math::
        \sum_{y, y'} \pi_{ref}(y)\, \pi_{ref}(y') \big[ P(y \succ y')\, \ell(y, y')
        + (1 - P(y \succ y'))\, \ell(y', y) \big]

    Pairs of one completion twice are among them, as among draws.

    Source: Rafailov et al., arXiv:2305.18290, Eq. 7, with the expectation over pairs and labels written out.

    Args:
        log_pi: [N] normalised log-probabilities of the policy, finite where the reference is positive.
        log_ref: [N] of the reference.
        preference: [N, N], P(y > y') in [0, 1], y along the rows; labels of a pair are complementary:
            :math:`P + P^T = 1`.
        loss: of log pi of the chosen, of the rejected, log pi_ref of the chosen, of the rejected, [B] each, to [B].

    Returns:
        Scalar, float64; differentiable in ``log_pi`` as the loss is.

    Raises:
        ValueError: tables of other shapes or not normalised, probabilities of preference outside [0, 1] or not
            complementary.

    Example:
        >>> from exo_toy.losses import dpo_loss
        >>> pi = ref = torch.tensor([0.5, 0.5]).log()
        >>> prefer = bradley_terry(torch.tensor([0.0, 1.0]))
        >>> expected_preference_loss(pi, ref, prefer, lambda *logps: dpo_loss(*logps, beta=1.0).losses)
        tensor(0.6931, dtype=torch.float64)
    """
    log_pi, log_ref = checks.as_tables(log_pi=log_pi, log_ref=log_ref)
    checks.require_log_probabilities(log_pi=log_pi, log_ref=log_ref)
    checks.require_shape("N N", preference=preference)
    if preference.shape != (len(log_ref), len(log_ref)):
        raise ValueError(f"preference must be [{len(log_ref)}, {len(log_ref)}]; got {list(preference.shape)}")
    outside = ~((preference >= 0) & (preference <= 1))
    one_sided = (preference + preference.mT - 1).abs() > 1e-6
    checks.require_values(
        [preference],
        (outside, lambda: f"preference must lie in [0, 1]; got {checks.first_bad(preference, outside)}"),
        (one_sided, lambda: "preference must be complementary: preference + preference.T = 1"),
    )
    inside = log_ref > -torch.inf
    log_pi, log_ref = log_pi[inside], log_ref[inside]
    preference = preference[inside][:, inside].double()
    n = len(log_ref)
    chosen = torch.arange(n, device=log_ref.device).repeat_interleave(n)
    rejected = torch.arange(n, device=log_ref.device).repeat(n)
    losses = loss(log_pi[chosen], log_pi[rejected], log_ref[chosen], log_ref[rejected]).unflatten(0, (n, n))
    # The sum holds both orders of a pair, so that either label contributes one half of it.
    return 2 * expectation(log_ref, expectation(log_ref, preference * losses))
