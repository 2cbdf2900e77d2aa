"""DPO with another divergence than KL: scores of log ratios, f-DPO and chi-PO on pairs.

The policy that maximises E[r] - beta D_f(pi || pi_ref), D_f = E_ref f(rho) with rho = pi / pi_ref, has
beta f'(rho(y)) = r(y) - c wherever it is positive. So beta f'(rho) takes the place of DPO's beta log rho. A score here
is f' as a function of log rho, up to a constant, which cancels between two completions.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from exo_toy import checks
from exo_toy.losses.ratios import PreferenceLoss, Ratios, Score, pair_ratios, with_rewards

# From this margin on -log sigma is 0 in every dtype, and so is its gradient.
SETTLED = 1000.0


def alpha_score(log_ratio: Float[Tensor, "..."], *, alpha: float | int) -> Float[Tensor, "..."]:
    r"""Score of Amari's alpha-divergence.

    .. math:: f'(\rho) = \frac{\rho^{\alpha-1} - 1}{\alpha - 1}

    log rho, KL(pi || pi_ref), at alpha = 1; 1 - 1/rho, KL(pi_ref || pi), at alpha = 0; rho - 1, chi-squared of pi
    against pi_ref, at alpha = 2.

    Convention: alpha as in :func:`alpha_rw_loss` and in the code of TRL 1.x. The f-DPO paper and TRL 0.x have 1 - alpha
    in its place, (1 - rho^-alpha) / alpha: the same score at alpha = 1/2 only.

    Source: Wang et al., arXiv:2309.16240, Table 1; compared with the authors' code, alecwangcq/f-divergence-dpo
    trainers.py (their alpha is 1 - alpha here), and with TRL 1.16.

    Args:
        log_ratio: log rho in nats, any shape; finite or -inf.
        alpha: any finite number. At 1 and below the score falls to -inf with rho, so that the optimal policy is
            positive everywhere; above 1 it need not be.

    Returns:
        The same shape; increasing in the log ratio, 0 at 0, inf where it overflows.

    Raises:
        ValueError: alpha not finite.

    Example:
        >>> alpha_score(torch.tensor([0.0, 1.0]), alpha=2)
        tensor([0.0000, 1.7183])
    """
    checks.require_real("alpha", alpha, allowed="a finite number", low=-math.inf, high=math.inf)
    if alpha == 1:
        return log_ratio
    return torch.expm1((alpha - 1) * log_ratio) / (alpha - 1)


def jensen_shannon_score(log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Score of the Jensen-Shannon divergence (twice it: KL to the mean of both, summed).

    .. math:: f'(\rho) = \log \frac{2\rho}{1 + \rho}

    At most log 2: a chosen completion that is already likely gains little by becoming likelier.

    Source: Wang et al., arXiv:2309.16240, Table 1; compared with alecwangcq/f-divergence-dpo trainers.py and TRL 1.16.

    Args:
        log_ratio: log rho in nats, any shape; finite or -inf.

    Returns:
        The same shape; increasing, 0 at 0, in [-inf, log 2].

    Example:
        >>> jensen_shannon_score(torch.tensor([0.0, 10.0]))
        tensor([0.0000, 0.6931])
    """
    return math.log(2) + logsigmoid(log_ratio)


def chi_po_score(log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""chi-PO's link: the score of chi-squared and KL together.

    .. math:: \phi(\rho) = \rho + \log\rho

    Source: Huang et al., arXiv:2407.13399, Algorithm 1; see :func:`chi_po_loss`.

    Args:
        log_ratio: log rho in nats, any shape; finite or -inf.

    Returns:
        The same shape; increasing, 1 at 0, inf where it overflows.

    Example:
        >>> chi_po_score(torch.tensor([0.0, 1.0]))
        tensor([1.0000, 3.7183])
    """
    return log_ratio.exp() + log_ratio


def f_dpo_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
    score: Score,
) -> PreferenceLoss:
    r"""f-DPO: DPO whose implicit reward is the derivative of an f-divergence.

    .. math::
        -\log\sigma\big(\beta [f'(\rho_w) - f'(\rho_l)]\big), \quad \rho = \frac{\pi_\theta(y)}{\pi_{ref}(y)}

    With the identity as score, KL(pi || pi_ref), it is DPO. Tabular optimum: the policy with
    :math:`\beta f'(\rho(y)) = r(y) - c` for all y, which maximises :math:`E[r] - \beta D_f(\pi\|\pi_{ref})`, where such
    a policy exists: always if f' falls to -inf with rho, as all scores here do but for alpha above 1.

    Source: Wang et al., arXiv:2309.16240, Theorem 1 and the loss after it; compared with the authors' code,
    alecwangcq/f-divergence-dpo trainers.py, and with TRL 1.16's f_divergence_type. Equation number not checked.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; multiplies the scores.
        score: f' as an elementwise, strictly increasing function of log rho: :func:`jensen_shannon_score`,
            ``functools.partial(alpha_score, alpha=0.5)``, or one's own.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], log 2 where policy and reference agree, in the policy
        log-probabilities' dtype (half types are computed in float32); its rewards are beta times the log ratios, as
        everywhere. It sees a constant added to both log ratios, but for KL.

    Raises:
        ValueError: a wrong shape or dtype, beta out of range, NaN or +inf, a reference log-probability that is not
            finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> f_dpo_loss(z, z, z, z, beta=0.1, score=jensen_shannon_score).losses
        tensor([0.6931])
    """
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return with_rewards(ratios, -logsigmoid(_clipped_margin(ratios, score, -torch.inf, SETTLED)))


def chi_po_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
    max_margin: float | int,
) -> PreferenceLoss:
    r"""Chi-squared preference optimisation: DPO with the link rho + log rho, its margin clipped.

    .. math::
        -\log\sigma\big(\mathrm{clip}_{\pm c}\, \beta [\phi(\rho_w) - \phi(\rho_l)]\big), \quad
        \phi(\rho) = \rho + \log\rho, \quad \rho = \frac{\pi_\theta(y)}{\pi_{ref}(y)}

    Tabular optimum, with c wider than every gap of rewards: :math:`\rho(y) = W_0(e^{(r(y) - Z)/\beta})`, W_0 Lambert's
    function and Z the normaliser, which maximises E[r] less beta times KL and chi-squared of pi against pi_ref, the
    latter half the mean of (rho - 1)^2 under pi_ref: rho + log rho is the derivative of both. A pair beyond the clip
    gets no gradient, also when it is misordered.

    Convention: the difference of the scores is clipped, as in the algorithm; elsewhere either score is, and completions
    far above the reference tie.

    Source: Huang et al., arXiv:2407.13399, Algorithm 1, c = 2 R_max there, and section 4.1; compared with others' notes
    of both, with which the optimum derived here agrees, not with the paper's own text. No code of the authors is known.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; multiplies the scores.
        max_margin: c, above 0; inf for no clip, which is f-DPO.

    Returns:
        PreferenceLoss; losses [B] in [log(1 + e^-c), log(1 + e^c)], log 2 where policy and reference agree, in the
        policy log-probabilities' dtype (half types are computed in float32). It sees a constant added to both log
        ratios.

    Raises:
        ValueError: a wrong shape or dtype, beta or max_margin out of range, NaN or +inf, a reference log-probability
            that is not finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> chi_po_loss(z + 1, z, z, z, beta=1.0, max_margin=2.0).losses
        tensor([0.1269])
    """
    if max_margin != math.inf:
        checks.require_positive(max_margin=max_margin)
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    margin = _clipped_margin(ratios, chi_po_score, -max_margin, min(max_margin, SETTLED))
    return with_rewards(ratios, -logsigmoid(margin))


def _clipped_margin(ratios: Ratios, score: Score, low: float, high: float) -> Tensor:
    """Beta times the difference of the scores, between two bounds, beyond which it has no gradient."""
    chosen, rejected = ratios.chosen, ratios.rejected
    margin = ratios.beta * (score(chosen.detach()) - score(rejected.detach()))
    # Two scores that overflow to one infinity: their order is that of the log ratios.
    unknown = margin.isnan()
    largest = torch.finfo(margin.dtype).max
    steep = ((chosen - rejected) * largest) * largest
    margin = torch.where(unknown, steep.detach(), margin)
    outside = (margin < low) | (margin > high)
    # Scores are taken where their slopes count: an infinite slope times no gradient would be NaN.
    idle = outside | unknown
    inside = ratios.beta * (score(chosen.masked_fill(idle, 0.0)) - score(rejected.masked_fill(idle, 0.0)))
    margin = torch.where(outside, margin.clamp(low, high), inside)
    return torch.where(unknown & ~outside, steep, margin)
