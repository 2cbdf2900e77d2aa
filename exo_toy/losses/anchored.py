"""Losses that hold each completion's log ratio against an anchor: NCA and APO on pairs, BCO and KTO without pairs."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from exo_toy import checks
from exo_toy.losses.ratios import (
    PreferenceLoss,
    UnpairedLoss,
    margin_of,
    message,
    pair_ratios,
    single_ratio,
    with_rewards,
)

Number = float | int | Float[Tensor, ""]


def nca_pair_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
) -> PreferenceLoss:
    r"""Noise contrastive alignment on a pair: :func:`nca_rw_loss` with two candidates and a one-hot target.

    .. math::
        -\log\sigma(\beta a_w) - \tfrac12 \log\sigma(-\beta a_w) - \tfrac12 \log\sigma(-\beta a_l), \quad
        a = \log\tfrac{\pi_\theta(y)}{\pi_{ref}(y)}

    Tabular optimum: :math:`\beta a(y) = \log 2 P(y \succ \mu)`, P the probability that y is preferred to another
    completion of the data, drawn from :math:`\mu`: exactly that if beta = 1 and the data are drawn from the reference,
    otherwise the nearest normalised policy in this loss. Win rates, not rewards.

    Source: Chen et al., arXiv:2402.05369, section 4.1; compared with TRL 1.16's nca_pair.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; multiplies the log ratios.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], 2 log 2 where policy and reference agree, in the policy
        log-probabilities' dtype (half types are computed in float32). It sees a constant added to both log ratios.

    Raises:
        ValueError: a wrong shape or dtype, beta out of range, NaN or +inf, a reference log-probability that is not
            finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> nca_pair_loss(z, z, z, z, beta=0.1).losses
        tensor([1.3863])
    """
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    return with_rewards(ratios, -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected))


def apo_zero_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
) -> PreferenceLoss:
    r"""Anchored preference optimisation, zero: chosen up and rejected down, each against the reference.

    .. math:: 1 - \sigma(\beta a_w) + \sigma(\beta a_l), \quad a = \log\tfrac{\pi_\theta(y)}{\pi_{ref}(y)}

    Tabular optimum: none inside: linear in :math:`\sigma(\beta a(y))`, the expected loss pushes every completion that
    wins less than half of its pairs to probability zero. Its gradient vanishes far from the reference.

    Source: D'Oosterlinck et al., arXiv:2408.06266, Eq. 7; compared with TRL 1.16's apo_zero. For chosen completions
    that are better than the model's own.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; multiplies the log ratios.

    Returns:
        PreferenceLoss; losses [B] in [0, 2], 1 where policy and reference agree, in the policy log-probabilities'
        dtype (half types are computed in float32). It sees a constant added to both log ratios.

    Raises:
        ValueError: a wrong shape or dtype, beta out of range, NaN or +inf, a reference log-probability that is not
            finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> apo_zero_loss(z, z, z, z, beta=0.1).losses
        tensor([1.])
    """
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return with_rewards(ratios, (-beta * ratios.chosen).sigmoid() + (beta * ratios.rejected).sigmoid())


def apo_down_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
) -> PreferenceLoss:
    r"""Anchored preference optimisation, down: chosen down, rejected further down.

    .. math:: \sigma(\beta a_w) + 1 - \sigma(\beta [a_w - a_l]), \quad a = \log\tfrac{\pi_\theta(y)}{\pi_{ref}(y)}

    Tabular optimum: no closed form, not pi*; bounded and not convex, it takes probability from what is chosen.

    Source: D'Oosterlinck et al., arXiv:2408.06266, Eq. 8; compared with TRL 1.16's apo_down. For chosen completions
    that are worse than the model's own.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; multiplies the log ratios.

    Returns:
        PreferenceLoss; losses [B] in [0, 2], 1 where policy and reference agree, in the policy log-probabilities'
        dtype (half types are computed in float32). It sees a constant added to both log ratios.

    Raises:
        ValueError: a wrong shape or dtype, beta out of range, NaN or +inf, a reference log-probability that is not
            finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> apo_down_loss(z, z, z, z, beta=0.1).losses
        tensor([1.])
    """
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return with_rewards(ratios, (beta * ratios.chosen).sigmoid() + (-margin_of(ratios)).sigmoid())


def bco_pair_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
    delta: Number,
) -> PreferenceLoss:
    r"""Binary classifier optimisation on pairs: chosen and rejected classified against a shift.

    .. math::
        -\log\sigma(\beta a_w - \delta) - \log\sigma(\delta - \beta a_l), \quad
        a = \log\tfrac{\pi_\theta(y)}{\pi_{ref}(y)}

    It is :func:`bco_loss` of both completions. Tabular optimum: :math:`\beta a(y) = \delta +
    \mathrm{logit}\,P(y \succ \mu)`, P the probability that y is preferred to another completion of the data, where
    delta makes that a normalised policy; elsewhere the nearest one in this loss.

    Convention: delta is explicit. TRL's BCOTrainer and its bco_pair before 1.0 have a running mean of the rewards,
    of which :func:`bco_shift` is one step; bco_pair of TRL 1.16 has 0.

    Source: Jung et al., arXiv:2404.04656, section 4; compared with TRL 1.16's bco_pair and with TRL's earlier
    trl/trainer/bco_trainer.py.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; multiplies the log ratios.
        delta: the shift, a finite number or a tensor of one, in units of beta times the log ratio.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], 2 log 2 where policy and reference agree and delta is 0, in the policy
        log-probabilities' dtype (half types are computed in float32). It sees a constant added to both log ratios.

    Raises:
        ValueError: a wrong shape or dtype, beta or delta out of range, NaN or +inf, a reference log-probability that
            is not finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> bco_pair_loss(z, z, z, z, beta=0.1, delta=0.0).losses
        tensor([1.3863])
    """
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    shift = _anchor("delta", delta, ratios.chosen, low=-math.inf, allowed="finite")
    losses = -logsigmoid(beta * ratios.chosen - shift) - logsigmoid(shift - beta * ratios.rejected)
    return with_rewards(ratios, losses)


def bco_shift(chosen_rewards: Float[Tensor, " B1"], rejected_rewards: Float[Tensor, " B2"]) -> Float[Tensor, ""]:
    r"""BCO's shift: the mean of the mean rewards of both classes.

    .. math:: \delta = \tfrac12 \big(\overline{\beta a_w} + \overline{\beta a_l}\big)

    Convention: each class counts one half. Trainers have the running mean over all completions, which is the same for
    as many of each, as on pairs.

    Source: Jung et al., arXiv:2404.04656, section 4; compared with huggingface/trl#1524 and #1599, which brought "BCE
    loss and reward shift" of the paper into TRL: there the mean of the detached rewards of both classes together, then
    averaged over the steps. Not with the paper's own text.

    Args:
        chosen_rewards: [B1] implicit rewards of chosen or desirable completions, as the losses return them.
        rejected_rewards: [B2] of the others.

    Returns:
        One number; it carries a gradient if the rewards do, which those that the losses return do not.

    Raises:
        ValueError: an empty batch, or not floating point.

    Example:
        >>> bco_shift(torch.tensor([1.0, 3.0]), torch.tensor([0.0]))
        tensor(1.)
    """
    given = dict(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    checks.require_floating(**given)
    for name, rewards in given.items():
        if rewards.ndim != 1 or len(rewards) == 0:
            raise ValueError(f"{name} must have shape [B] with B >= 1; got {list(rewards.shape)}")
    return (chosen_rewards.mean() + rejected_rewards.mean()) / 2


def bco_loss(
    policy_logps: Float[Tensor, " B"],
    ref_logps: Float[Tensor, " B"],
    desirable: Bool[Tensor, " B"],
    *,
    beta: float | int,
    delta: Number,
) -> UnpairedLoss:
    r"""Binary classifier optimisation: desirable and undesirable completions classified by their implicit reward.

    .. math::
        -\log\sigma\big(\pm[\beta a - \delta]\big), \quad a = \log\tfrac{\pi_\theta(y)}{\pi_{ref}(y)}, \quad
        + \text{ if desirable}, - \text{ if not}

    Tabular optimum: pi* if a completion is desirable with probability :math:`\sigma(r - c)` and
    :math:`\delta = c - \beta \log Z`. At another delta the nearest normalised policy in this loss.

    Source: Jung et al., arXiv:2404.04656, section 4. Conventions: see :func:`bco_pair_loss`.

    Args:
        policy_logps: [B] log-probability of the completion under the policy, in nats; finite or -inf.
        ref_logps: [B] under the reference; finite.
        desirable: [B] bool.
        beta: above 0; multiplies the log ratio.
        delta: the shift, a finite number or a tensor of one, in units of beta times the log ratio.

    Returns:
        UnpairedLoss; losses [B] in [0, inf], in the policy log-probabilities' dtype (half types are computed in
        float32).

    Raises:
        ValueError: a wrong shape or dtype, beta or delta out of range, NaN or +inf, a reference log-probability that
            is not finite.

    Example:
        >>> z = torch.zeros(1)
        >>> bco_loss(z, z, z > 0, beta=0.1, delta=0.0).losses
        tensor([0.6931])
    """
    log_ratio, sign = _signed_ratio(policy_logps, ref_logps, desirable, beta)
    shift = _anchor("delta", delta, log_ratio, low=-math.inf, allowed="finite")
    losses = -logsigmoid(sign * (beta * log_ratio - shift))
    return UnpairedLoss(losses.to(policy_logps.dtype), (beta * log_ratio.detach()).to(policy_logps.dtype))


def kto_loss(
    policy_logps: Float[Tensor, " B"],
    ref_logps: Float[Tensor, " B"],
    desirable: Bool[Tensor, " B"],
    *,
    beta: float | int,
    reference_point: Number,
    desirable_weight: float | int = 1.0,
    undesirable_weight: float | int = 1.0,
) -> UnpairedLoss:
    r"""Kahneman-Tversky optimisation: a saturating value of the log ratio above a reference point.

    .. math::
        \lambda_D \big[1 - \sigma(\beta [a - z_0])\big] \text{ if desirable}, \quad
        \lambda_U \big[1 - \sigma(\beta [z_0 - a])\big] \text{ if not}, \quad
        a = \log\tfrac{\pi_\theta(y)}{\pi_{ref}(y)}

    Tabular optimum: none inside: linear in :math:`\sigma(\beta [a(y) - z_0])`, the expected loss pushes every
    completion that is desirable with a probability under lambda_U / (lambda_D + lambda_U) to probability zero.

    Convention: z_0 is explicit, a log ratio that beta multiplies; the paper's estimate of KL(pi_theta || pi_ref),
    through which no gradient flows, is :func:`kto_reference_point`.

    Source: Ethayarajh et al., arXiv:2402.01306, Eq. 7 and 8; compared with the authors' code, ContextualAI/HALOs
    trainers.py, and with TRL 1.16's KTOTrainer.

    Args:
        policy_logps: [B] log-probability of the completion under the policy, in nats; finite or -inf.
        ref_logps: [B] under the reference; finite.
        desirable: [B] bool.
        beta: above 0; multiplies log ratio and reference point.
        reference_point: z_0 in nats, a finite number of at least 0 or a tensor of one.
        desirable_weight: lambda_D, above 0.
        undesirable_weight: lambda_U, above 0.

    Returns:
        UnpairedLoss; losses [B] in [0, the weight], half of it where a = z_0, in the policy log-probabilities' dtype
        (half types are computed in float32).

    Raises:
        ValueError: a wrong shape or dtype, a scalar out of range, NaN or +inf, a reference log-probability that is
            not finite.

    Example:
        >>> z = torch.zeros(1)
        >>> kto_loss(z, z, z > 0, beta=0.1, reference_point=0.0).losses
        tensor([0.5000])
    """
    log_ratio, sign = _signed_ratio(policy_logps, ref_logps, desirable, beta)
    checks.require_positive(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    anchor = _anchor("reference_point", reference_point, log_ratio, low=0.0, allowed="finite and at least 0")
    weight = 0.5 * (desirable_weight * (1 + sign) + undesirable_weight * (1 - sign))
    losses = weight * (sign * beta * (anchor - log_ratio)).sigmoid()
    return UnpairedLoss(losses.to(policy_logps.dtype), (beta * log_ratio.detach()).to(policy_logps.dtype))


def kto_reference_point(policy_logps: Float[Tensor, " B"], ref_logps: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    r"""KTO's reference point: the mean log ratio of completions of other prompts, at least 0, without a gradient.

    .. math:: z_0 = \max\Big(0, \frac1B \sum_i \log\tfrac{\pi_\theta(y_j | x_i)}{\pi_{ref}(y_j | x_i)}\Big)

    with :math:`j \neq i`: the caller pairs each prompt with another one's completion. It is a biased, noisy estimate
    of KL(pi_theta || pi_ref): the completions do not come from the policy.

    Source: Ethayarajh et al., arXiv:2402.01306, section 4.1; compared with TRL 1.16's KTOTrainer, which cycles the
    completions of a batch and averages over all processes.

    Args:
        policy_logps: [B] log-probability of the mismatched completions under the policy, in nats; finite.
        ref_logps: [B] under the reference; finite.

    Returns:
        One number of at least 0, detached, at least float32.

    Raises:
        ValueError: a wrong shape or dtype, an empty batch, a log-probability that is not finite.

    Example:
        >>> kto_reference_point(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -2.0]))
        tensor(0.5000)
    """
    log_ratio = single_ratio(policy_logps, ref_logps).detach()
    bad = ~log_ratio.isfinite()
    checks.require_values([log_ratio], (bad, message("policy_logps", "finite", policy_logps.detach(), bad)))
    if len(log_ratio) == 0:
        raise ValueError("policy_logps must have shape [B] with B >= 1; got [0]")
    return torch.relu(log_ratio.mean())


def _signed_ratio(
    policy_logps: Tensor, ref_logps: Tensor, desirable: Tensor, beta: float | int
) -> tuple[Tensor, Tensor]:
    """The log ratio, and +1 for desirable completions, -1 for the others."""
    log_ratio = single_ratio(policy_logps, ref_logps)
    checks.require_temperature(log_ratio.dtype, beta=beta)
    checks.require_mask(desirable=desirable)
    checks.require_shape("B", policy_logps=policy_logps, desirable=desirable)
    return log_ratio, 2.0 * desirable.to(log_ratio.dtype) - 1.0


def _anchor(name: str, value: Number, like: Tensor, *, low: float, allowed: str) -> float | int | Tensor:
    """One number for the batch, checked; a tensor of it keeps its gradient."""
    if not isinstance(value, Tensor):
        checks.require_real(name, value, allowed=allowed, low=low, high=math.inf, low_allowed=math.isfinite(low))
        return value
    checks.require_floating(**{name: value})
    if value.ndim != 0:
        raise ValueError(f"{name} must be {allowed}: a number or a tensor of one; got shape {list(value.shape)}")
    held = value.detach()
    bad = ~(held.isfinite() & (held >= low))
    checks.require_values([held], (bad, message(name, allowed, held, bad)))
    return value.to(like.dtype)
