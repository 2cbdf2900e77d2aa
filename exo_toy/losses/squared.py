"""Losses on pairs that regress log ratios on targets set by the label: IPO, SPPO, Cal-DPO."""

import math

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from exo_toy import checks
from exo_toy.losses.ratios import PreferenceLoss, message, pair_ratios, with_rewards


def ipo_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
) -> PreferenceLoss:
    r"""Identity preference optimisation: the gap of the log ratios regressed on 1/(2 beta).

    .. math::
        \Big(\Delta - \frac{1}{2\beta}\Big)^2, \quad
        \Delta = \log\tfrac{\pi_\theta(y_w)}{\pi_{ref}(y_w)} - \log\tfrac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}

    Tabular optimum: :math:`\pi \propto \pi_{ref} \exp(P(y \succ \mu)/\beta)`, where :math:`P(y \succ \mu)` is the
    probability that y is preferred to another completion of the data, drawn from :math:`\mu`. Win rates, not rewards.

    Convention: the log-probabilities are sums over tokens, as in the paper's formula. TRL takes means over tokens, as
    its authors were told by the paper's; give this function :func:`length_normalized` log-probabilities for that, and
    a smaller 1/beta.

    Source: Azar et al., arXiv:2310.12036v2, Eq. 17; beta is the paper's tau; compared with
    eric-mitchell/direct-preference-optimization (sums) and TRL 1.16's ipo (means).

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; half its inverse is the gap aimed at, in nats.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], 1/(4 beta^2) where policy and reference agree, in the policy
        log-probabilities' dtype (half types are computed in float32). A constant added to both log ratios changes
        nothing.

    Raises:
        ValueError: a wrong shape or dtype, beta out of range, NaN or +inf, a reference log-probability that is not
            finite, both policy log-probabilities -inf.

    Example:
        >>> import torch
        >>> z = torch.zeros(1)
        >>> ipo_loss(z, z, z, z, beta=0.5).losses
        tensor([1.])
    """
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return with_rewards(ratios, (ratios.chosen - ratios.rejected - 0.5 / beta) ** 2)


def sppo_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
    win_rate: float | int | Float[Tensor, " B"] = 1.0,
) -> PreferenceLoss:
    r"""Self-play preference optimisation: each log ratio regressed on its completion's win rate.

    .. math::
        \Big(\log\tfrac{\pi_\theta(y_w)}{\pi_{ref}(y_w)} - \tfrac{P_w - 1/2}{\beta}\Big)^2
        + \Big(\log\tfrac{\pi_\theta(y_l)}{\pi_{ref}(y_l)} + \tfrac{P_w - 1/2}{\beta}\Big)^2

    P_w is 1 for hard labels. The target leaves out the logarithm of the normaliser, and a policy that is normalised
    can only come near it. Tabular optimum: the projection of :math:`(P(y \succ \mu) - 1/2)/\beta` onto the log ratios
    of normalised policies, in mean square over the completions of the data; not pi*.

    Convention: beta is the inverse of the paper's step size eta; the sum of both squares, as in TRL, not half of it, as
    in the authors' code. The reference is the policy of the last iteration.

    Source: Wu et al., arXiv:2405.00675, Eq. 4.7 (with the 1/2 of the text for the normaliser); compared with the
    authors' code, uclaml/SPPO sppo/trainer.py, and with TRL 1.16's sppo_hard, which they wrote, too.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; 1/eta.
        win_rate: P_w in [0, 1], one number or [B], the probability that the chosen completion is preferred.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], 2 (P_w - 1/2)^2 / beta^2 where policy and reference agree, in the
        policy log-probabilities' dtype (half types are computed in float32). It sees a constant added to both log
        ratios.

    Raises:
        ValueError: a wrong shape or dtype, beta or win_rate out of range, NaN or +inf, a reference log-probability
            that is not finite, both policy log-probabilities -inf.

    Example:
        >>> import torch
        >>> z = torch.zeros(1)
        >>> sppo_loss(z, z, z, z, beta=0.5).losses
        tensor([2.])
    """
    others = {"win_rate": win_rate} if isinstance(win_rate, Tensor) else {}
    ratios = pair_ratios(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, **others
    )
    if isinstance(win_rate, Tensor):
        values = win_rate.detach()
        bad = ~((values >= 0) & (values <= 1))
        checks.require_values([values], (bad, message("win_rate", "in [0, 1]", values, bad)))
        win_rate = win_rate.to(ratios.chosen.dtype)
    else:
        above_one = math.nextafter(1.0, 2.0)
        checks.require_real("win_rate", win_rate, allowed="in [0, 1]", low=0.0, high=above_one, low_allowed=True)
    target = (win_rate - 0.5) / beta
    return with_rewards(ratios, (ratios.chosen - target) ** 2 + (ratios.rejected + target) ** 2)


def cal_dpo_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
) -> PreferenceLoss:
    r"""Calibrated DPO: a logistic loss on the gap of the log ratios, and each of them regressed on +-1/(2 beta).

    .. math::
        -\log\sigma(a_w - a_l) + \Big(a_w - \frac{1}{2\beta}\Big)^2 + \Big(a_l + \frac{1}{2\beta}\Big)^2, \quad
        a = \log\tfrac{\pi_\theta(y)}{\pi_{ref}(y)}

    Convention: no beta inside the logistic term, as in the authors' code.
    Tabular optimum: no closed form; between DPO's at beta = 1 and :func:`sppo_loss`'s.

    Source: Xiao et al., arXiv:2412.14516v1; compared with the authors' code, Cal-DPO/Cal-DPO
    Pythia-2.8b-exp/trainers.py, with its setting shift = 1/2. Equation number not checked.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; half its inverse is what each log ratio aims at, in nats.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], log 2 + 1/(2 beta^2) where policy and reference agree, in the policy
        log-probabilities' dtype (half types are computed in float32). It sees a constant added to both log ratios.

    Raises:
        ValueError: a wrong shape or dtype, beta out of range, NaN or +inf, a reference log-probability that is not
            finite, both policy log-probabilities -inf.

    Example:
        >>> import torch
        >>> z = torch.zeros(1)
        >>> cal_dpo_loss(z, z, z, z, beta=0.5).losses
        tensor([2.6931])
    """
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    calibration = (ratios.chosen - 0.5 / beta) ** 2 + (ratios.rejected + 0.5 / beta) ** 2
    return with_rewards(ratios, calibration - logsigmoid(ratios.chosen - ratios.rejected))
