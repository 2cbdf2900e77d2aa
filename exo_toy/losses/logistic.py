"""Losses on pairs that change DPO's logistic loss or hinge on the margin: robust DPO, DPOP, DiscoPOP, hinge."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from exo_toy import checks
from exo_toy.losses.ratios import PreferenceLoss, margin_of, pair_ratios, with_rewards


def robust_dpo_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
    label_smoothing: float | int,
) -> PreferenceLoss:
    r"""Robust DPO: DPO made unbiased against labels flipped with a known probability.

    .. math::
        \frac{-(1-\varepsilon)\log\sigma(m) + \varepsilon\log\sigma(-m)}{1-2\varepsilon}
        = -\log\sigma(m) - \frac{\varepsilon\, m}{1-2\varepsilon}, \quad
        m = \beta\Big[\log\tfrac{\pi_\theta(y_w)}{\pi_{ref}(y_w)} - \log\tfrac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}\Big]

    Under labels flipped with probability eps its expectation is DPO's under the labels before the flip.
    Tabular optimum: pi* if the labels are Bradley-Terry labels flipped with probability eps. On labels of preference
    P that were not flipped it aims at (P - eps)/(1 - 2 eps), and is unbounded below where P is under eps or over
    1 - eps.

    Source: Chowdhury et al., arXiv:2403.00409, section 3.1; compared with TRL 1.16's robust. Equation number not
    checked.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; multiplies the log ratios.
        label_smoothing: eps in [0, 1/2), the probability that a label was flipped; 0 is DPO.

    Returns:
        PreferenceLoss; losses [B] in [-inf, inf], log 2 where policy and reference agree, in the policy
        log-probabilities' dtype (half types are computed in float32). A constant added to both log ratios changes
        nothing.

    Raises:
        ValueError: a wrong shape or dtype, beta or label_smoothing out of range, NaN or +inf, a reference
            log-probability that is not finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> robust_dpo_loss(z, z, z, z, beta=0.1, label_smoothing=0.1).losses
        tensor([0.6931])
    """
    checks.require_real("label_smoothing", label_smoothing, allowed="in [0, 1/2)", low=0.0, high=0.5, low_allowed=True)
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    margin = margin_of(ratios)
    losses = -logsigmoid(margin)
    if label_smoothing > 0:
        losses = losses - label_smoothing / (1 - 2 * label_smoothing) * margin
    return with_rewards(ratios, losses)


def dpop_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
    penalty: float | int,
) -> PreferenceLoss:
    r"""DPO-positive: DPO with a penalty where the chosen completion fell below the reference.

    .. math::
        -\log\sigma\big(\beta [a_w - a_l - \lambda \max(0, -a_w)]\big), \quad
        a = \log\tfrac{\pi_\theta(y)}{\pi_{ref}(y)}

    Tabular optimum: not pi*: every completion is chosen at times, so that the penalty acts on each of those that pi*
    makes less likely. Let W(y) be the probability that y is preferred to another completion, both drawn from the
    reference. It is the reference itself, where the slope in no direction is negative, if and only if
    :math:`\lambda \ge 2 (\max W / \min W - 1)`; below that there is no closed form.

    Convention: beta multiplies the penalty too, as in the paper's loss; elsewhere the penalty is found outside beta, or
    added to the loss. At a_w = 0, where training starts, the gradient is DPO's, the one towards a larger a_w.

    Source: Pal et al., arXiv:2402.13228v2, the DPOP loss; compared with Eq. 3 of Wang et al. (NotaGen),
    arXiv:2502.18008, who train with it and have beta lambda before the maximum, inside the sigmoid, not with the
    paper's own text. The authors published no code of it.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; multiplies the log ratios.
        penalty: lambda, a finite number of at least 0; 0 is DPO.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], log 2 where policy and reference agree, in the policy
        log-probabilities' dtype (half types are computed in float32). It sees a constant added to both log ratios.

    Raises:
        ValueError: a wrong shape or dtype, beta or penalty out of range, NaN or +inf, a reference log-probability
            that is not finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> dpop_loss(z - 1, z - 1, z, z, beta=0.5, penalty=2.0).losses
        tensor([1.3133])
    """
    checks.require_real("penalty", penalty, allowed="finite and at least 0", low=0.0, high=torch.inf, low_allowed=True)
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    margin = margin_of(ratios)
    if penalty > 0:
        margin = margin - beta * penalty * torch.relu(-ratios.chosen)
    return with_rewards(ratios, -logsigmoid(margin))


def discopop_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
    tau: float | int,
) -> PreferenceLoss:
    r"""DiscoPOP, the log-ratio modulated loss: logistic on misordered pairs, exponential on ordered ones.

    .. math::
        -(1 - \sigma(m/\tau)) \log\sigma(m) + \sigma(m/\tau)\, e^{-m}, \quad
        m = \beta\Big[\log\tfrac{\pi_\theta(y_w)}{\pi_{ref}(y_w)} - \log\tfrac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}\Big]

    Found by search over programs. Not convex, and not even decreasing around m = 0 when tau is small: there are local
    optima. Tabular optimum: no closed form, not pi*.

    Source: Lu et al., arXiv:2406.08414, Eq. 5; compared with TRL 1.16's discopop. The authors use tau = 0.05.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; multiplies the log ratios.
        tau: in (0, 1], in nats of margin; above 1 the exponential would win on misordered pairs.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], (1 + log 2)/2 where policy and reference agree, in the policy
        log-probabilities' dtype (half types are computed in float32). A constant added to both log ratios changes
        nothing.

    Raises:
        ValueError: a wrong shape or dtype, beta or tau out of range, NaN or +inf, a reference log-probability that is
            not finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> discopop_loss(z, z, z, z, beta=0.1, tau=0.05).losses
        tensor([0.8466])
    """
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    checks.require_temperature(ratios.chosen.dtype, tau=tau)
    if tau > 1:
        raise ValueError(f"tau must be in (0, 1]; got {tau!r}")
    margin = margin_of(ratios)
    # At -inf the loss is DPO's; the product of the formula would be inf * 0 in its gradient.
    impossible = margin == -torch.inf
    m = margin.masked_fill(impossible, 0.0)
    # log of sigma(m/tau) e^-m: neither factor of it overflows alone, on either side.
    below, above = m.masked_fill(m >= 0, 0.0), m.masked_fill(m < 0, 0.0)
    log_exponential = torch.where(
        m < 0, below * (1 / tau - 1) + logsigmoid(-below / tau), logsigmoid(above / tau) - above
    )
    losses = log_exponential.exp() - (-m / tau).sigmoid() * logsigmoid(m)
    return with_rewards(ratios, torch.where(impossible, -margin, losses))


def hinge_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
) -> PreferenceLoss:
    r"""Hinge loss on the margin, as in SLiC and RSO.

    .. math::
        \max(0, 1 - m), \quad
        m = \beta\Big[\log\tfrac{\pi_\theta(y_w)}{\pi_{ref}(y_w)} - \log\tfrac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}\Big]

    Tabular optimum: on two completions m = 1 in favour of the one preferred more often, however often: the order of
    the rewards and nothing else. With more completions a compromise between such gaps; not pi*.

    Convention: log ratios, as in RSO; SLiC has log-probabilities (a reference of zeros gives that) with an absolute
    margin delta, which is 1/beta here, and adds a likelihood term.

    Source: Zhao et al., arXiv:2305.10425, section 2; Liu et al., arXiv:2309.06657 (hinge-norm); compared with TRL
    1.16's hinge and, for SLiC, ContextualAI/HALOs trainers.py.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; multiplies the log ratios, its inverse is the gap asked for.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], 1 where policy and reference agree, 0 with zero gradient from m = 1 on,
        in the policy log-probabilities' dtype (half types are computed in float32). A constant added to both log
        ratios changes nothing.

    Raises:
        ValueError: a wrong shape or dtype, beta out of range, NaN or +inf, a reference log-probability that is not
            finite, both policy log-probabilities -inf.

    Example:
        >>> z = torch.zeros(1)
        >>> hinge_loss(z, z, z, z, beta=0.1).losses
        tensor([1.])
    """
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return with_rewards(ratios, torch.relu(1 - margin_of(ratios)))
