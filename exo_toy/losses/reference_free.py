"""Losses on pairs without a reference: SimPO, ORPO, CPO."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from exo_toy import checks
from exo_toy.losses.modifiers import length_normalized
from exo_toy.losses.ratios import PreferenceLoss, Ratios, margin_of, message, policy_logps_of_pair, with_rewards


def simpo_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    chosen_lengths: Int[Tensor, " B"],
    rejected_lengths: Int[Tensor, " B"],
    *,
    beta: float | int,
    gamma: float | int,
) -> PreferenceLoss:
    r"""SimPO: a logistic loss on the gap of the mean log-probabilities per token, above a margin.

    .. math::
        -\log\sigma\Big(\beta \Big[\tfrac{\log\pi_\theta(y_w)}{|y_w|} - \tfrac{\log\pi_\theta(y_l)}{|y_l|}\Big]
        - \gamma\Big)

    Tabular optimum: at gamma = 0 and with alternatives of all lengths, :math:`\pi(y) = e^{|y| (r(y) + c)/\beta}`, c the
    normaliser: no reference, and the longer a completion the sharper. For gamma above 0 no closed form, wider gaps.

    Convention: gamma is absolute, as in the paper's formula, TRL and torchtune; gamma_beta_ratio in the authors' code
    is gamma / beta.

    Source: Meng et al., arXiv:2405.14734, Eq. 6; compared with TRL 1.16's CPOTrainer and torchtune's SimPOLoss.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion, summed over tokens, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        chosen_lengths: [B] number of tokens, at least 1.
        rejected_lengths: [B] the same of the rejected one.
        beta: above 0; multiplies the mean log-probabilities.
        gamma: the margin, a finite number of at least 0.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], in the log-probabilities' dtype (half types are computed in float32);
        rewards are beta times the mean log-probabilities.

    Raises:
        ValueError: a wrong shape or dtype, beta, gamma or a length out of range, NaN or +inf, both log-probabilities
            -inf.

    Example:
        >>> logps, lengths = torch.tensor([-6.0]), torch.tensor([3])
        >>> simpo_loss(logps, 2 * logps, lengths, 2 * lengths, beta=2.0, gamma=1.0).losses
        tensor([1.3133])
    """
    means = _mean_logps(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, beta)
    checks.require_real("gamma", gamma, allowed="finite and at least 0", low=0.0, high=math.inf, low_allowed=True)
    return with_rewards(means, -logsigmoid(margin_of(means) - gamma))


def orpo_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    chosen_lengths: Int[Tensor, " B"],
    rejected_lengths: Int[Tensor, " B"],
    *,
    odds_weight: float | int,
) -> PreferenceLoss:
    r"""ORPO: the likelihood of the chosen completion and the odds of both, per token.

    .. math::
        -s_w - \lambda \log\sigma\Big(\log\frac{e^{s_w}}{1 - e^{s_w}} - \log\frac{e^{s_l}}{1 - e^{s_l}}\Big), \quad
        s = \tfrac{1}{|y|} \log\pi_\theta(y)

    Tabular optimum: no closed form, not pi*: between the distribution of the chosen completions, to which the first
    term pulls, and odds of e^s proportional to e^r, to which the second does.

    Convention: the likelihood is a mean over the tokens of each completion. The authors' code and TRL take one mean
    over all tokens of a batch, those of the prompt included unless it is told otherwise.

    Source: Hong et al., arXiv:2403.07691, Eq. 6 and 7, with the mean log-probability of its Eq. 3; compared with the
    authors' code, xfactlab/orpo src/orpo_trainer.py, and with TRL 1.16's ORPOTrainer.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion, summed over tokens, in nats; at most 0.
        policy_rejected_logps: [B] the same of the rejected one.
        chosen_lengths: [B] number of tokens, at least 1.
        rejected_lengths: [B] the same of the rejected one.
        odds_weight: lambda, above 0.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], in the log-probabilities' dtype (half types are computed in float32);
        rewards are lambda times the mean log-probabilities.

    Raises:
        ValueError: a wrong shape or dtype, odds_weight or a length out of range, NaN, a log-probability above 0, both
            log-probabilities -inf or both 0.

    Example:
        >>> logps, lengths = torch.tensor([-6.0]), torch.tensor([3])
        >>> orpo_loss(logps, logps, lengths, lengths, odds_weight=0.1).losses
        tensor([2.0693])
    """
    means = _mean_logps(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, odds_weight)
    chosen, rejected = means.chosen, means.rejected
    _check_odds(chosen.detach(), rejected.detach())
    # Near certainty the log odds of the chosen one have an infinite slope, the odds ratio does not.
    certain = chosen > -1e-30
    x = chosen.masked_fill(certain, -1.0)
    log_odds = (x - _log1mexp(x)) - (rejected - _log1mexp(rejected))
    near = chosen.masked_fill(~certain, 0.0)
    held = rejected.masked_fill(~certain, -1.0)
    ratio = (held - near).exp() * torch.expm1(near) / torch.expm1(held)
    return with_rewards(means, -chosen + odds_weight * torch.where(certain, torch.log1p(ratio), -logsigmoid(log_odds)))


def cpo_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
    nll_weight: float | int = 1.0,
    chosen_lengths: Int[Tensor, " B"] | None = None,
) -> PreferenceLoss:
    r"""Contrastive preference optimisation: DPO with a uniform reference, and the likelihood of the chosen completion.

    .. math::
        -\log\sigma\big(\beta [\log\pi_\theta(y_w) - \log\pi_\theta(y_l)]\big) - \alpha \log\pi_\theta(y_w)

    Tabular optimum: :math:`\pi \propto e^{r/\beta}` at alpha = 0; otherwise no closed form, between that and the
    distribution of the chosen completions.

    Convention: the likelihood is a sum over tokens, as in the paper's formula; with ``chosen_lengths`` a mean over
    each completion's tokens. The authors' code and TRL take one mean over all tokens of a batch. The paper has
    alpha = 1.

    Source: Xu et al., arXiv:2401.08417, Eq. 3 and 5; compared with the authors' code, fe1ixxu/ALMA
    utils/cpo_trainer.py, and with TRL 1.16's CPOTrainer.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion, summed over tokens, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        beta: above 0; multiplies the log-probabilities in the first term.
        nll_weight: alpha, a finite number of at least 0.
        chosen_lengths: [B] number of tokens, at least 1, to divide the second term by.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], in the log-probabilities' dtype (half types are computed in float32);
        rewards are beta times the log-probabilities.

    Raises:
        ValueError: a wrong shape or dtype, beta, nll_weight or a length out of range, NaN or +inf, both
            log-probabilities -inf.

    Example:
        >>> logps = torch.tensor([-6.0])
        >>> cpo_loss(logps, logps, beta=0.1).losses
        tensor([6.6931])
    """
    chosen, rejected = policy_logps_of_pair(policy_chosen_logps, policy_rejected_logps)
    checks.require_temperature(chosen.dtype, beta=beta)
    checks.require_real(
        "nll_weight", nll_weight, allowed="finite and at least 0", low=0.0, high=math.inf, low_allowed=True
    )
    dtype = torch.promote_types(policy_chosen_logps.dtype, policy_rejected_logps.dtype)
    pair = Ratios(chosen, rejected, beta, dtype)
    losses = -logsigmoid(margin_of(pair))
    if nll_weight > 0:
        losses = losses - nll_weight * (chosen if chosen_lengths is None else length_normalized(chosen, chosen_lengths))
    return with_rewards(pair, losses)


def _mean_logps(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float | int,
) -> Ratios:
    """Mean log-probabilities per token, where the other losses have log ratios."""
    chosen, rejected = policy_logps_of_pair(policy_chosen_logps, policy_rejected_logps)
    checks.require_temperature(chosen.dtype, beta=beta)
    dtype = torch.promote_types(policy_chosen_logps.dtype, policy_rejected_logps.dtype)
    return Ratios(length_normalized(chosen, chosen_lengths), length_normalized(rejected, rejected_lengths), beta, dtype)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x of at most 0."""
    near = x > -math.log(2)
    by_expm1 = torch.log(-torch.expm1(x.masked_fill(~near, -0.5)))
    return torch.where(near, by_expm1, torch.log1p(-torch.exp(x.masked_fill(near, -1.0))))


def _check_odds(chosen: Tensor, rejected: Tensor) -> None:
    """Odds exist: no probability above 1, and not both 1."""
    not_chosen, not_rejected, both = chosen > 0, rejected > 0, (chosen == 0) & (rejected == 0)
    checks.require_values(
        [chosen, rejected],
        (not_chosen, message("policy_chosen_logps", "at most 0", chosen, not_chosen)),
        (not_rejected, message("policy_rejected_logps", "at most 0", rejected, not_rejected)),
        (both, message("policy_rejected_logps", "below 0 where policy_chosen_logps is 0", rejected, both)),
    )
