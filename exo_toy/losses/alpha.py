"""Losses on K candidates between EXO-rw and DPO-rw: alpha-divergences."""

import math

from jaxtyping import Bool, Float
from torch import Tensor

from exo_toy import checks, logspace
from exo_toy.losses.listwise import candidate_log_probs, common_dtype


def alpha_rw_loss(
    log_ratio: Float[Tensor, "B K"],
    rewards: Float[Tensor, "B K"],
    *,
    alpha: float | int,
    beta_pi: float | int,
    beta_r: float | int,
    mask: Bool[Tensor, "B K"] | None = None,
    log_weights: Float[Tensor, "B K"] | None = None,
) -> Float[Tensor, " B"]:
    r"""Probability matching on K candidates by an alpha-divergence, between DPO-rw (alpha = 0) and EXO-rw (alpha = 1).

    .. math::
        D_\alpha(p_f \| p_r) = \frac{1 - \sum_i p_f(i)^\alpha p_r(i)^{1-\alpha}}{\alpha (1 - \alpha)}, \quad
        p_f = \mathrm{softmax}(\beta_\pi \log\tfrac{\pi_\theta}{\pi_{ref}}), \quad p_r = \mathrm{softmax}(r / \beta_r)

    The ends are limits: KL(p_f || p_r), EXO-rw, at alpha = 1; KL(p_r || p_f), DPO-rw less the entropy of p_r, at
    alpha = 0. Renyi's divergence of order alpha is :math:`\log(1 - \alpha(1-\alpha) D_\alpha) / (\alpha - 1)`. The
    gradient with respect to f is a multiple of p_f - m, m the normalised :math:`p_f^\alpha p_r^{1-\alpha}`: the
    candidate's target lies the closer to p_f the larger alpha is. With candidates drawn from the reference it tends to
    :math:`D_\alpha(\pi_\theta^{\beta_\pi}\|\pi^*_{\beta_r})` as K grows; with candidates from a proposal :math:`\mu` so
    does the loss with :math:`\log\pi_{ref} - \log\mu` added inside both softmaxes. Adding a constant to a row of either
    argument changes nothing.

    Source: the divergence is Amari's, Cichocki and Amari, Entropy 12(6), 2010, Eq. 43; its ends are the losses of
    Ji et al., arXiv:2402.00856v4.

    Args:
        log_ratio: [B, K], log policy minus log reference of each candidate, summed over its tokens, in nats;
            finite, or -inf where the policy gives it probability zero.
        rewards: [B, K], finite, or -inf for a forbidden candidate.
        alpha: any finite number. In (0, 1) the loss is at most 1 / (alpha (1 - alpha)), whatever the arguments.
        beta_pi: policy temperature, above 0; multiplies the log ratio.
        beta_r: reward temperature, above 0; divides the reward.
        mask: [B, K] bool, True for the candidates that count. What a masked entry holds, NaN included, changes
            nothing and gets zero gradient.
        log_weights: [B, K], log reference minus log proposal of each candidate, in nats, where candidates come from a
            proposal and not from the reference; finite, or -inf where the reference is zero, which counts as masked.
            It is added inside both softmaxes; a constant added to a row changes nothing.

    Returns:
        [B] in [0, inf], up to rounding, in the arguments' dtype (half types are computed in float32). 0 where
        p_f = p_r and for a row with one unmasked candidate; inf where, for alpha of at least 1, p_f gives a forbidden
        candidate positive probability (such a row has no gradient, NaN), and where, for alpha of at most 0, a
        candidate with positive p_r has log ratio -inf.

    Raises:
        ValueError: alpha not finite; a wrong shape, dtype or temperature; K below 2; a row without a candidate; NaN or
            +inf that is not masked; a row whose log ratios, rewards or log weights are all -inf.

    Example:
        >>> import torch
        >>> alpha_rw_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 5.0]]), alpha=0.5, beta_pi=0.5, beta_r=1.0)
        tensor([0.4217])
    """
    checks.require_real("alpha", alpha, allowed="a finite number", low=-math.inf, high=math.inf)
    log_p_f, log_p_r = candidate_log_probs(log_ratio, rewards, beta_pi, beta_r, mask, log_weights)
    return logspace.alpha_divergence(log_p_f, log_p_r, float(alpha)).to(common_dtype(log_ratio, rewards, log_weights))
