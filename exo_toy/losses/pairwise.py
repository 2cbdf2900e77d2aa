"""Losses on pairs of a chosen and a rejected completion: EXO-pref and DPO."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from exo_toy import checks, logspace


class PreferenceLoss(NamedTuple):
    """What a loss on pairs returns, one entry per example.

    Attributes:
        losses: [B].
        chosen_rewards: [B] implicit rewards, beta times the log ratio of the chosen completion, in nats; detached.
        rejected_rewards: [B] the same of the rejected one.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


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

    Source: Ji et al., arXiv:2402.00856v4, Eq. 16.

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
    margin, chosen_rewards, rejected_rewards = _margin_and_rewards(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    log_p_f = torch.stack([logsigmoid(margin), logsigmoid(-margin)], -1)
    log_p_h = torch.stack(_label_log_probs(label_smoothing, margin), -1)
    losses = logspace.expectation(log_p_f, log_p_f - log_p_h)
    return PreferenceLoss(losses.to(chosen_rewards.dtype), chosen_rewards, rejected_rewards)


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

    Source: Rafailov et al., arXiv:2305.18290, Eq. 7.

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
    margin, chosen_rewards, rejected_rewards = _margin_and_rewards(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    losses = (1 - label_smoothing) * -logsigmoid(margin)
    if label_smoothing > 0:
        losses = losses - label_smoothing * logsigmoid(-margin)
    return PreferenceLoss(losses.to(chosen_rewards.dtype), chosen_rewards, rejected_rewards)


def _margin_and_rewards(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float | int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The margin, at least in float32, and both implicit rewards, detached and in the dtype to return."""
    policy = dict(policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps)
    ref = dict(ref_chosen_logps=ref_chosen_logps, ref_rejected_logps=ref_rejected_logps)
    checks.require_floating(**policy, **ref)
    checks.require_shape("B", **policy, **ref)
    _check_values(policy, ref)
    dtype = torch.promote_types(policy_chosen_logps.dtype, policy_rejected_logps.dtype)
    ref_dtype = torch.promote_types(ref_chosen_logps.dtype, ref_rejected_logps.dtype)
    compute_dtype = torch.promote_types(torch.promote_types(dtype, ref_dtype), torch.float32)
    checks.require_temperature(compute_dtype, beta=beta)
    chosen = policy_chosen_logps.to(compute_dtype) - ref_chosen_logps.to(compute_dtype)
    rejected = policy_rejected_logps.to(compute_dtype) - ref_rejected_logps.to(compute_dtype)
    # Scaled after the subtraction: where beta makes both rewards overflow, their difference would be NaN.
    margin = beta * (chosen - rejected)
    return margin, (beta * chosen.detach()).to(dtype), (beta * rejected.detach()).to(dtype)


def _check_values(policy: dict[str, Tensor], ref: dict[str, Tensor]) -> None:
    """Policy log-probabilities finite or -inf, not both -inf; reference log-probabilities finite."""
    conditions = []
    for name, logps in policy.items():
        bad = ~(logps.detach() < torch.inf)
        conditions.append((bad, _message(name, "finite or -inf", logps, bad)))
    for name, logps in ref.items():
        bad = ~logps.detach().isfinite()
        conditions.append((bad, _message(name, "finite", logps, bad)))
    chosen, rejected = (logps.detach() for logps in policy.values())
    both = (chosen == -torch.inf) & (rejected == -torch.inf)
    allowed = "above -inf where policy_rejected_logps is -inf"
    conditions.append((both, _message("policy_chosen_logps", allowed, chosen, both)))
    checks.require_values([*policy.values(), *ref.values()], *conditions)


def _message(name: str, allowed: str, tensor: Tensor, bad: Tensor) -> Callable[[], str]:
    """What require_values says if ``bad`` holds anywhere."""
    return lambda: f"{name} must be {allowed}; got {checks.first_bad(tensor, bad)}"


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
    checks.require_values([values], (bad, _message("label_smoothing", "in (0, 1)", values, bad)))
    eps = label_smoothing.to(torch.promote_types(label_smoothing.dtype, margin.dtype))
    return [torch.log1p(-eps).to(margin.dtype), torch.log(eps).to(margin.dtype)]
