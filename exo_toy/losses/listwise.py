"""Losses on K candidates with rewards: EXO-rw and DPO-rw."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from exo_toy import checks, logspace


def exo_rw_loss(
    log_ratio: Float[Tensor, "B K"],
    rewards: Float[Tensor, "B K"],
    *,
    beta_pi: float | int,
    beta_r: float | int,
    mask: Bool[Tensor, "B K"] | None = None,
    log_weights: Float[Tensor, "B K"] | None = None,
) -> Float[Tensor, " B"]:
    r"""EXO with rewards: probability matching on K candidates in the direction of reinforcement learning.

    .. math::
        \mathrm{KL}(p_f \| p_r), \quad p_f = \mathrm{softmax}(\beta_\pi \log\tfrac{\pi_\theta}{\pi_{ref}}),
        \quad p_r = \mathrm{softmax}(r / \beta_r)

    With candidates drawn from the reference it tends to :math:`\mathrm{KL}(\pi_\theta^{\beta_\pi}\|\pi^*_{\beta_r})`
    as K grows; with candidates from a proposal :math:`\mu` so does the loss with :math:`\log\pi_{ref} - \log\mu` added
    inside both softmaxes. Adding a constant to a row of either argument changes nothing.

    Source: Ji et al., arXiv:2402.00856v4, the loss for learning from a reward model.

    Args:
        log_ratio: [B, K], log policy minus log reference of each candidate, summed over its tokens, in nats;
            finite, or -inf where the policy gives it probability zero.
        rewards: [B, K], finite, or -inf for a forbidden candidate.
        beta_pi: policy temperature, above 0; multiplies the log ratio.
        beta_r: reward temperature, above 0; divides the reward.
        mask: [B, K] bool, True for the candidates that count. What a masked entry holds, NaN included, changes
            nothing and gets zero gradient.
        log_weights: [B, K], log reference minus log proposal of each candidate, in nats, where candidates come from a
            proposal and not from the reference; finite, or -inf where the reference is zero, which counts as masked.
            It is added inside both softmaxes; a constant added to a row changes nothing.

    Returns:
        [B] in [0, inf], in the arguments' dtype (half types are computed in float32). 0 where p_f = p_r and for a
        row with one unmasked candidate; inf where p_f gives a forbidden candidate positive probability: such a row has
        no gradient (NaN), mask the candidate instead.

    Raises:
        ValueError: a wrong shape, dtype or temperature; K below 2; a row without a candidate; NaN or +inf that is not
            masked; a row whose log ratios, rewards or log weights are all -inf.

    Example:
        >>> exo_rw_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 1.0]]), beta_pi=0.5, beta_r=1.0)
        tensor([0.])
    """
    log_p_f, log_p_r = candidate_log_probs(log_ratio, rewards, beta_pi, beta_r, mask, log_weights)
    return logspace.expectation(log_p_f, log_p_f - log_p_r).to(common_dtype(log_ratio, rewards, log_weights))


def dpo_rw_loss(
    log_ratio: Float[Tensor, "B K"],
    rewards: Float[Tensor, "B K"],
    *,
    beta_pi: float | int,
    beta_r: float | int,
    mask: Bool[Tensor, "B K"] | None = None,
    log_weights: Float[Tensor, "B K"] | None = None,
) -> Float[Tensor, " B"]:
    r"""DPO generalised to rewards on K candidates: cross-entropy with soft targets.

    .. math::
        -\sum_i p_r(i) \log p_f(i), \quad p_f = \mathrm{softmax}(\beta_\pi \log\tfrac{\pi_\theta}{\pi_{ref}}),
        \quad p_r = \mathrm{softmax}(r / \beta_r)

    It is KL(p_r || p_f) plus the entropy of p_r. With candidates drawn from the reference its gradient tends to that
    of :math:`\mathrm{KL}(\pi^*_{\beta_r}\|\pi_\theta^{\beta_\pi})` as K grows, the other direction than EXO's; with
    candidates from a proposal :math:`\mu` so does that of the loss with :math:`\log\pi_{ref} - \log\mu` added inside
    both softmaxes. Adding a constant to a row of either argument changes nothing. With two candidates and a one-hot
    target it is DPO.

    Source: Ji et al., arXiv:2402.00856v4, DPO with a reward model.

    Args:
        log_ratio: [B, K], log policy minus log reference of each candidate, summed over its tokens, in nats;
            finite, or -inf where the policy gives it probability zero.
        rewards: [B, K], finite, or -inf for a forbidden candidate.
        beta_pi: policy temperature, above 0; multiplies the log ratio.
        beta_r: reward temperature, above 0; divides the reward.
        mask: [B, K] bool, True for the candidates that count. What a masked entry holds, NaN included, changes
            nothing and gets zero gradient.
        log_weights: [B, K], log reference minus log proposal of each candidate, in nats, where candidates come from a
            proposal and not from the reference; finite, or -inf where the reference is zero, which counts as masked.
            It is added inside both softmaxes; a constant added to a row changes nothing.

    Returns:
        [B] in [0, inf], in the arguments' dtype (half types are computed in float32). At least the entropy of p_r,
        reached where p_f = p_r; 0 for a row with one unmasked candidate; inf where a candidate with positive p_r has
        log ratio -inf (the gradient with respect to f stays p_f - p_r).

    Raises:
        ValueError: a wrong shape, dtype or temperature; K below 2; a row without a candidate; NaN or +inf that is not
            masked; a row whose log ratios, rewards or log weights are all -inf.

    Example:
        >>> dpo_rw_loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), beta_pi=0.5, beta_r=1.0)
        tensor([0.6931])
    """
    log_p_f, log_p_r = candidate_log_probs(log_ratio, rewards, beta_pi, beta_r, mask, log_weights)
    return logspace.expectation(log_p_r, -log_p_f).to(common_dtype(log_ratio, rewards, log_weights))


def candidate_log_probs(
    log_ratio: Tensor,
    rewards: Tensor,
    beta_pi: float | int,
    beta_r: float | int,
    mask: Tensor | None,
    log_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """log p_f and log p_r over the candidates that count, at least in float32."""
    given = {"log_ratio": log_ratio, "rewards": rewards}
    if log_weights is not None:
        given["log_weights"] = log_weights
    checks.require_floating(**given)
    compute_dtype = torch.promote_types(common_dtype(log_ratio, rewards, log_weights), torch.float32)
    checks.require_temperature(compute_dtype, beta_pi=beta_pi, beta_r=beta_r)
    checks.require_shape("B K", **given)
    mask = candidate_mask(log_ratio, mask)
    if log_weights is not None:
        _check_weights(log_weights.detach(), mask)
        mask = mask & (log_weights > -torch.inf)
    _check_values(log_ratio.detach(), rewards.detach(), mask)
    f = beta_pi * _below_max(log_ratio.to(compute_dtype), mask)
    scaled_rewards = _below_max(rewards.to(compute_dtype), mask) / beta_r
    if log_weights is not None:
        shift = _below_max(log_weights.to(compute_dtype), mask)
        f, scaled_rewards = f + shift, scaled_rewards + shift
    return logspace.log_softmax(f, mask), logspace.log_softmax(scaled_rewards, mask)


def candidate_mask(log_ratio: Tensor, mask: Tensor | None) -> Tensor:
    """The mask, all True if there is none, of K >= 2 candidates."""
    checks.require_shape("B K", log_ratio=log_ratio)
    if log_ratio.shape[-1] < 2:
        raise ValueError(f"log_ratio must have K >= 2 candidates per row; got shape {list(log_ratio.shape)}")
    if mask is None:
        return torch.ones_like(log_ratio, dtype=torch.bool)
    checks.require_mask(mask=mask)
    checks.require_shape("B K", log_ratio=log_ratio, mask=mask)
    return mask


def common_dtype(log_ratio: Tensor, rewards: Tensor, log_weights: Tensor | None) -> torch.dtype:
    """The widest of the arguments'."""
    dtype = torch.promote_types(log_ratio.dtype, rewards.dtype)
    return dtype if log_weights is None else torch.promote_types(dtype, log_weights.dtype)


def _below_max(values: Tensor, mask: Tensor) -> Tensor:
    """Values minus the largest of their row that counts.

    The softmax does not see the shift, hence neither does the gradient; but scaling the differences, not the values,
    keeps their digits and cannot overflow to inf - inf.
    """
    largest = values.detach().masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    return values - largest


def _check_values(log_ratio: Tensor, rewards: Tensor, mask: Tensor) -> None:
    """Every row has a candidate with a finite log ratio and one with a finite reward; no NaN, no +inf."""
    bad_ratio = mask & ~(log_ratio < torch.inf)
    bad_reward = mask & ~(rewards < torch.inf)
    empty = ~mask.any(-1)
    no_ratio = ~(mask & (log_ratio > -torch.inf)).any(-1)
    no_reward = ~(mask & (rewards > -torch.inf)).any(-1)
    row = checks.first_bad
    checks.require_values(
        [log_ratio, rewards, mask],
        (empty, lambda: f"mask must keep at least one candidate per row; got all {row(~empty, empty)}"),
        (bad_ratio, lambda: f"log_ratio must be finite or -inf where unmasked; got {row(log_ratio, bad_ratio)}"),
        (bad_reward, lambda: f"rewards must be finite or -inf where unmasked; got {row(rewards, bad_reward)}"),
        (no_ratio, lambda: f"log_ratio must be above -inf for a candidate of each row; got {_whole_row(no_ratio)}"),
        (no_reward, lambda: f"rewards must be above -inf for a candidate of each row; got {_whole_row(no_reward)}"),
    )


def _check_weights(log_weights: Tensor, mask: Tensor) -> None:
    """Every row with a candidate has one with a finite weight; no NaN, no +inf."""
    bad = mask & ~(log_weights < torch.inf)
    none = mask.any(-1) & ~(mask & (log_weights > -torch.inf)).any(-1)
    row = checks.first_bad
    checks.require_values(
        [log_weights, mask],
        (bad, lambda: f"log_weights must be finite or -inf where unmasked; got {row(log_weights, bad)}"),
        (none, lambda: f"log_weights must be above -inf for a candidate of each row; got {_whole_row(none)}"),
    )


def _whole_row(bad: Tensor) -> str:
    """The first row [B] that holds only -inf, for an error message."""
    return f"-inf throughout row {bad.nonzero()[0].item()}"
