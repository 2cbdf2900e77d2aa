"""Losses on a batch as a whole: alignment via optimal transport, which compares sorted margins."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from exo_toy.losses.ratios import PreferenceLoss, pair_ratios, require_finite, with_rewards


def aot_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
) -> PreferenceLoss:
    r"""AOT on pairs: the sorted margins of the policy against the sorted margins of the reference.

    .. math::
        -\log\sigma\big(\beta [u_{(i)} - v_{(i)}]\big), \quad
        u = \log\tfrac{\pi_\theta(y_w)}{\pi_\theta(y_l)}, \quad v = \log\tfrac{\pi_{ref}(y_w)}{\pi_{ref}(y_l)}

    u_(i) is the i-th smallest of the batch. With a batch of one it is DPO. Tabular optimum: not pi*, no closed form:
    which pair has which margin does not count, so that the policy is free to satisfy the order with the wrong pairs.

    Source: Melnyk et al., arXiv:2406.05882, section 3; compared with TRL 1.16's aot, which its authors wrote. Equation
    number not checked. From TRL's first release of it to 0.x the unpaired form was called aot_pair.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completion under the policy, in nats; finite or -inf.
        policy_rejected_logps: [B] the same of the rejected one.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; multiplies the differences of the margins.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], entry i belonging to the i-th smallest margins and not to example i,
        log 2 where policy and reference agree, in the policy log-probabilities' dtype (half types are computed in
        float32). The order of the batch does not matter.

    Raises:
        ValueError: a wrong shape or dtype, beta out of range, NaN or +inf, a reference log-probability that is not
            finite, both policy log-probabilities -inf.

    Example:
        >>> import torch
        >>> z = torch.zeros(2)
        >>> aot_loss(z, z, z, z, beta=0.1).losses
        tensor([0.6931, 0.6931])
    """
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    dtype = ratios.chosen.dtype
    policy = (policy_chosen_logps.to(dtype) - policy_rejected_logps.to(dtype)).sort().values
    ref = (ref_chosen_logps.to(dtype) - ref_rejected_logps.to(dtype)).sort().values
    return with_rewards(ratios, -logsigmoid(beta * (policy - ref)))


def aot_unpaired_loss(
    policy_chosen_logps: Float[Tensor, " B"],
    policy_rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float | int,
) -> PreferenceLoss:
    r"""AOT without pairs: the sorted log ratios of chosen completions against those of rejected ones.

    .. math::
        -\log\sigma\big(\beta [a^w_{(i)} - a^l_{(i)}]\big), \quad a = \log\tfrac{\pi_\theta(y)}{\pi_{ref}(y)}

    With a batch of one it is DPO. Tabular optimum: not pi*, no closed form.

    Source: Melnyk et al., arXiv:2406.05882, section 3; compared with TRL 1.16's aot_unpaired. Equation number not
    checked.

    Args:
        policy_chosen_logps: [B] log-probability of the chosen completions under the policy, in nats; finite.
        policy_rejected_logps: [B] of as many rejected ones, of whichever prompts.
        ref_chosen_logps: [B] under the reference; finite.
        ref_rejected_logps: [B] under the reference; finite.
        beta: above 0; multiplies the log ratios.

    Returns:
        PreferenceLoss; losses [B] in [0, inf], entry i belonging to the i-th smallest log ratios and not to example i,
        log 2 where policy and reference agree, in the policy log-probabilities' dtype (half types are computed in
        float32). The order of either kind in the batch does not matter.

    Raises:
        ValueError: a wrong shape or dtype, beta out of range, a log-probability that is not finite.

    Example:
        >>> import torch
        >>> z = torch.zeros(2)
        >>> aot_unpaired_loss(z, z, z, z, beta=0.1).losses
        tensor([0.6931, 0.6931])
    """
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    # Two of -inf may meet at one rank, whichever pairs they come from.
    require_finite(policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps)
    chosen, rejected = ratios.chosen.sort().values, ratios.rejected.sort().values
    return with_rewards(ratios, -logsigmoid(beta * (chosen - rejected)))
