"""Losses on pairs and on single completions with rewards: REBEL, reward-aware preference optimisation, DRO."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from exo_toy import checks, logspace
from exo_toy.losses.ratios import (
    PreferenceLoss,
    UnpairedLoss,
    margin_of,
    pair_ratios,
    require_finite,
    single_ratio,
    with_rewards,
)


def rebel_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    chosen_scores: Float[Tensor, " B"],
    rejected_scores: Float[Tensor, " B"],
    *,
    eta: float | int,
) -> PreferenceLoss:
    r"""REBEL: the gap of the log ratios regressed on the gap of the rewards.

    .. math::
        \Big(\frac{\Delta}{\eta} - (r_w - r_l)\Big)^2, \quad
        \Delta = \log\tfrac{\pi_\theta(y_w)}{\pi_{ref}(y_w)} - \log\tfrac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}

    It is :func:`rpo_squared_loss` at beta = 1/eta and reward_scale = 1. The order of the two completions means
    nothing: exchanged together with their rewards they give the same loss. Tabular optimum:
    :math:`\pi \propto \pi_{ref} e^{\eta r}`, that is pi* at beta = 1/eta. The reference is the last iterate.

    Source: Gao et al., arXiv:2404.16767, the regression of the algorithm; compared with the authors' code,
    ZhaolinGao/REBEL src/ultrafeedback/rebel.py, which has eta^2 times this. Equation number not checked.

    Args:
        policy_chosen_logps: [B] log-probability of one completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the other one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        chosen_scores: [B] reward of the one completion; finite.
        rejected_scores: [B] reward of the other one; finite.
        eta: above 0; the step size of mirror descent.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], the squared gap of the rewards where policy and reference agree, in
        the policy log-probabilities' dtype (half types are computed in float32). A constant added to both log ratios
        or to both rewards changes nothing.

    Raises:
        ValueError: a wrong shape or dtype, eta out of range, NaN or +inf, a reference log-probability or reward that
            is not finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> rebel_loss(z, z, z, z, z + 3, z, eta=0.5).losses
        tensor([9.])
    """
    checks.require_temperature(torch.float32, eta=eta)
    return rpo_squared_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_scores,
        rejected_scores,
        beta=1 / eta,
        reward_scale=1.0,
    )


def rpo_squared_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    chosen_scores: Float[Tensor, " B"],
    rejected_scores: Float[Tensor, " B"],
    *,
    beta: float | int,
    reward_scale: float | int,
) -> PreferenceLoss:
    r"""Reward-aware preference optimisation with the squared distance of the two gaps.

    .. math::
        \big(\beta\Delta - \eta (r_w - r_l)\big)^2, \quad
        \Delta = \log\tfrac{\pi_\theta(y_w)}{\pi_{ref}(y_w)} - \log\tfrac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}

    Tabular optimum: pi* of the reward eta r, whichever pairs are drawn.

    Source: the family of arXiv:2406.11704, which uses the KL of :func:`rpo_kl_loss`; compared with rpo_sq of
    NVIDIA/NeMo-Aligner megatron_gpt_dpo_model.py.

    Args:
        policy_chosen_logps: [B] log-probability of one completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the other one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        chosen_scores: [B] reward of the one completion; finite.
        rejected_scores: [B] reward of the other one; finite.
        beta: above 0; multiplies the log ratios.
        reward_scale: eta, above 0; multiplies the rewards.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], (eta (r_w - r_l))^2 where policy and reference agree, in the policy
        log-probabilities' dtype (half types are computed in float32). A constant added to both log ratios or to both
        rewards changes nothing.

    Raises:
        ValueError: a wrong shape or dtype, beta or reward_scale out of range, NaN or +inf, a reference
            log-probability or reward that is not finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> rpo_squared_loss(z, z, z, z, z + 3, z, beta=0.1, reward_scale=2.0).losses
        tensor([36.])
    """
    scores = dict(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    ratios = pair_ratios(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, **scores
    )
    gap = _reward_gap(chosen_scores, rejected_scores, reward_scale, ratios.chosen.dtype)
    return with_rewards(ratios, (margin_of(ratios) - gap) ** 2)


def rpo_kl_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    chosen_scores: Float[Tensor, " B"],
    rejected_scores: Float[Tensor, " B"],
    *,
    beta: float | int,
    reward_scale: float | int,
) -> PreferenceLoss:
    r"""Reward-aware preference optimisation with the KL of two coins, the target's first.

    .. math::
        \mathrm{KL}\big((\sigma(t), \sigma(-t)) \,\|\, (\sigma(\beta\Delta), \sigma(-\beta\Delta))\big), \quad
        t = \eta (r_w - r_l)

    It is DPO-rw on the pair less the entropy of the target. With the two coins exchanged it is EXO-rw on the pair:
    :func:`exo_rw_loss` with K = 2 and beta_r = 1/eta; implementations call either of the two forward.
    Tabular optimum: pi* of the reward eta r, whichever pairs are drawn.

    Source: Adler et al. (Nemotron-4 340B), arXiv:2406.11704, reward-aware preference optimisation; compared with
    rpo_bwd_kl of NVIDIA/NeMo-Aligner megatron_gpt_dpo_model.py, the "Bernoulli backward KL" of its user guide
    (rpo_fwd_kl there is EXO-rw). That backward is this direction is seen at a target gap of infinity: it is DPO then,
    as Table 1 of Wu et al., arXiv:2509.23102, says of the backward distance of Sun et al., arXiv:2502.00203, NVIDIA's
    later paper; the other direction is infinite there. Some quotations of the report have that other one.

    Args:
        policy_chosen_logps: [B] log-probability of one completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the other one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        chosen_scores: [B] reward of the one completion; finite.
        rejected_scores: [B] reward of the other one; finite.
        beta: above 0; multiplies the log ratios.
        reward_scale: eta, above 0; multiplies the rewards.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], 0 where beta Delta = eta (r_w - r_l), in the policy
        log-probabilities' dtype (half types are computed in float32). A constant added to both log ratios or to both
        rewards changes nothing.

    Raises:
        ValueError: a wrong shape or dtype, beta or reward_scale out of range, NaN or +inf, a reference
            log-probability or reward that is not finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> rpo_kl_loss(z, z, z, z, z + 2, z, beta=0.1, reward_scale=1.0).losses
        tensor([0.3278])
    """
    scores = dict(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    ratios = pair_ratios(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, **scores
    )
    margin = margin_of(ratios)
    gap = _reward_gap(chosen_scores, rejected_scores, reward_scale, ratios.chosen.dtype)
    log_target = torch.stack([logsigmoid(gap), logsigmoid(-gap)], -1)
    log_policy = torch.stack([logsigmoid(margin), logsigmoid(-margin)], -1)
    return with_rewards(ratios, logspace.expectation(log_target, log_target - log_policy))


def dro_loss(
    policy_logps: Float[Tensor, " B"],
    ref_logps: Float[Tensor, " B"],
    rewards: Float[Tensor, " B"],
    values: Float[Tensor, " B"],
    *,
    tau: float | int,
) -> UnpairedLoss:
    r"""Direct reward optimisation: the log ratio of single completions regressed on their rewards above a value.

    .. math:: \tfrac12 \Big(r(y) - V - \tau \log\tfrac{\pi_\theta(y)}{\pi_{ref}(y)}\Big)^2

    Minimised over the policy and the value V(x) together. Tabular optimum: pi* at beta = tau, with V = tau log Z.
    At a V held elsewhere the optimum is another policy.

    Source: Richemond et al., arXiv:2405.19107v1, Eq. 4 and Theorem 1, read. The authors' algorithm also divides the
    gradient of the policy by tau; here there is one loss for both.

    Args:
        policy_logps: [B] log-probability of the completion under the policy, in nats; finite or -inf.
        ref_logps: [B] under the reference; finite.
        rewards: [B], finite.
        values: [B], V of each example's prompt, in units of the reward; finite.
        tau: above 0; multiplies the log ratio.

    Returns:
        UnpairedLoss; losses [B] in [0, inf], (r - V)^2 / 2 where policy and reference agree, in the policy
        log-probabilities' dtype (half types are computed in float32); rewards are tau times the log ratio.

    Raises:
        ValueError: a wrong shape or dtype, tau out of range, NaN or +inf, a reference log-probability, reward or
            value that is not finite.

    Example:
        >>> z = torch.zeros(1)
        >>> dro_loss(z, z, z + 3, z + 1, tau=0.1).losses
        tensor([2.])
    """
    log_ratio = single_ratio(policy_logps, ref_logps, rewards=rewards, values=values)
    checks.require_temperature(log_ratio.dtype, tau=tau)
    require_finite(rewards=rewards, values=values)
    advantage = rewards.to(log_ratio.dtype) - values.to(log_ratio.dtype)
    losses = 0.5 * (advantage - tau * log_ratio) ** 2
    return UnpairedLoss(losses.to(policy_logps.dtype), (tau * log_ratio.detach()).to(policy_logps.dtype))


def _reward_gap(chosen: Tensor, rejected: Tensor, reward_scale: float | int, dtype: torch.dtype) -> Tensor:
    """Eta times the difference of the rewards, which are finite."""
    require_finite(chosen_scores=chosen, rejected_scores=rejected)
    checks.require_temperature(dtype, reward_scale=reward_scale)
    return reward_scale * (chosen.to(dtype) - rejected.to(dtype))
