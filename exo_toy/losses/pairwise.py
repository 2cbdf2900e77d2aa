"""Losses on pairs of a chosen and a rejected completion: EXO-pref and DPO."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from exo_toy import checks, logspace
from exo_toy.losses.ratios import PreferenceLoss, margin_of, message, pair_ratios, with_rewards


def exo_pref_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
    label_smoothing: float | Float[Tensor, " B"] = 1e-3,
) -> PreferenceLoss:
    r"""EXO from preferences: EXO's probability matching on a pair, its target the label-smoothed preference.

    .. math::
        \mathrm{KL}\big((\sigma(m), \sigma(-m)) \,\|\, (1-\varepsilon, \varepsilon)\big), \quad
        m = \beta\Big[\log\tfrac{\pi_\theta(y_w)}{\pi_{ref}(y_w)} - \log\tfrac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}\Big]

    Its minimum over m is at log((1-eps)/eps), so with one-hot labels smoothed by a constant eps the sharpness of the
    optimum is set by eps, not by the labels' frequencies. A tensor eps that carries each label's probability of
    being wrong targets the optimal policy of a Bradley-Terry labeller.

    Source: Ji et al., arXiv:2402.00856v4, Eq. 16; compared with TRL 1.16's exo_pair.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; multiplies the log ratios.
        label_smoothing: eps in (0, 1/2), or [B] in (0, 1), of each pair the probability that its rejected completion
            is the better one, as a model of rewards gives it: not a share of labels that are wrong, which is one
            number for all pairs.

    Returns:
        PreferenceLoss; losses [B] in [0, inf), 0 where sigma(m) = 1 - eps, in the policy log-probabilities' dtype
        (half types are computed in float32).

    Raises:
        ValueError: a wrong shape or dtype, beta or label_smoothing out of range, NaN or +inf, a reference
            log-probability that is not finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> exo_pref_loss(z, z, z, z, beta=0.1, label_smoothing=0.1).losses
        tensor([0.5108])
    """
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    margin = margin_of(ratios)
    log_p_f = torch.stack([logsigmoid(margin), logsigmoid(-margin)], -1)
    log_p_h = torch.stack(_label_log_probs(label_smoothing, margin), -1)
    return with_rewards(ratios, logspace.expectation(log_p_f, log_p_f - log_p_h))


def dpo_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
    label_smoothing: float | int = 0.0,
) -> PreferenceLoss:
    r"""Direct preference optimisation, with label smoothing (conservative DPO).

    .. math::
        -(1-\varepsilon)\log\sigma(m) - \varepsilon\log\sigma(-m), \quad
        m = \beta\Big[\log\tfrac{\pi_\theta(y_w)}{\pi_{ref}(y_w)} - \log\tfrac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}\Big]

    Source: Rafailov et al., arXiv:2305.18290, Eq. 7; smoothed: Mitchell, "A note on DPO with noisy preferences", 2023,
    Eq. 3; compared with TRL 1.16's sigmoid, which ignores label smoothing, and with torchtune's DPOLoss.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; multiplies the log ratios.
        label_smoothing: eps in [0, 1/2), the probability that a label is wrong.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], log 2 where policy and reference agree, in the policy
        log-probabilities' dtype (half types are computed in float32).

    Raises:
        ValueError: a wrong shape or dtype, beta or label_smoothing out of range, NaN or +inf, a reference
            log-probability that is not finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> dpo_loss(z, z, z, z, beta=0.1).losses
        tensor([0.6931])
    """
    checks.require_real("label_smoothing", label_smoothing, allowed="in [0, 1/2)", low=0.0, high=0.5, low_allowed=True)
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    margin = margin_of(ratios)
    losses = (1 - label_smoothing) * -logsigmoid(margin)
    if label_smoothing > 0:
        losses = losses - label_smoothing * logsigmoid(-margin)
    return with_rewards(ratios, losses)


def _label_log_probs(label_smoothing: float | Tensor, margin: Tensor) -> list[Tensor]:
    """log(1 - eps) and log(eps), [B] each, after checking the range of eps."""
    # The logarithms are taken before any rounding to the margin's dtype, where eps may be 0 or 1.
    if not isinstance(label_smoothing, Tensor):
        checks.require_real("label_smoothing", label_smoothing, allowed="in (0, 1/2)", low=0.0, high=0.5)
        logs = math.log1p(-label_smoothing), math.log(label_smoothing)
        return [torch.full_like(margin, log) for log in logs]
    checks.require_floating(label_smoothing=label_smoothing)
    checks.require_shape("B", policy_chosen_logps=margin, label_smoothing=label_smoothing)
    values = label_smoothing.detach()
    bad = ~((values > 0) & (values < 1))
    checks.require_values([values], (bad, message("label_smoothing", "in (0, 1)", values, bad)))
    eps = label_smoothing.to(torch.promote_types(label_smoothing.dtype, margin.dtype))
    return [torch.log1p(-eps).to(margin.dtype), torch.log(eps).to(margin.dtype)]
