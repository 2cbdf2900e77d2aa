"""From log-probabilities of tokens to those of completions."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from exo_toy import checks


def sequence_logps(token_logps: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    r"""Log-probabilities of completions: sums over their tokens.

    .. math::
        \log \pi(y \mid x) = \sum_{t \in \mathrm{mask}} \log \pi(y_t \mid x, y_{<t})

    The sum is taken in float64. In a model's half precision it is off by tenths of a nat after some hundred tokens,
    in float32 it dominates the error of a preference loss.

    Source: Ji et al., arXiv:2402.00856v4, the autoregressive policy.

    Args:
        token_logps: [B, T] in nats, -inf where a token has probability zero.
        mask: [B, T] bool, True for the tokens of the completion. What a masked entry holds, NaN included, changes
            nothing and gets zero gradient.

    Returns:
        [B] in [-inf, 0], in the input's dtype, at least float32; 0 for a row without a token.

    Raises:
        ValueError: a wrong shape or dtype.

    Example:
        >>> sequence_logps(torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[True, True, False]]))
        tensor([-3.])
    """
    checks.require_floating(token_logps=token_logps)
    checks.require_mask(mask=mask)
    checks.require_shape("B T", token_logps=token_logps, mask=mask)
    return _masked_sum(token_logps, mask).to(_at_least_float32(token_logps))


def candidate_log_ratios(
    policy_token_logps: Float[Tensor, "N T"],
    ref_token_logps: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    k: int,
) -> Float[Tensor, "B K"]:
    r"""Log ratios of K candidates per prompt, as the losses on candidates take them.

    .. math::
        \log \frac{\pi_\theta(y \mid x)}{\pi_{ref}(y \mid x)}
        = \sum_{t \in \mathrm{mask}} \log \pi_\theta(y_t \mid x, y_{<t}) - \log \pi_{ref}(y_t \mid x, y_{<t})

    Differences and sums are taken in float64.

    Source: Ji et al., arXiv:2402.00856v4, the log ratio in the loss for learning from a reward model.

    Args:
        policy_token_logps: [B·K, T] in nats, the K candidates of a prompt next to one another.
        ref_token_logps: [B·K, T], of the reference policy.
        mask: [B·K, T] bool, True for the tokens of the completion; as in :func:`sequence_logps`.
        k: K, at least 1, a divisor of the number of rows.

    Returns:
        [B, K] in nats, in the inputs' dtype, at least float32; 0 for a candidate without a token, NaN where both
        policies give one probability zero.

    Raises:
        ValueError: a wrong shape or dtype; a number of rows that K does not divide.

    Example:
        >>> policy, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-1.5], [-1.5]])
        >>> candidate_log_ratios(policy, ref, torch.tensor([[True], [True]]), 2)
        tensor([[ 0.5000, -0.5000]])
    """
    checks.require_floating(policy_token_logps=policy_token_logps, ref_token_logps=ref_token_logps)
    checks.require_mask(mask=mask)
    checks.require_shape("B·K T", policy_token_logps=policy_token_logps, ref_token_logps=ref_token_logps, mask=mask)
    checks.require_integer("k", k, at_least=1)
    if len(mask) % k:
        raise ValueError(f"k must divide the number of rows, {len(mask)}; got {k}")
    difference = policy_token_logps.double() - ref_token_logps.double()
    ratios = _masked_sum(difference, mask).view(-1, k)
    return ratios.to(torch.promote_types(_at_least_float32(policy_token_logps), _at_least_float32(ref_token_logps)))


def _masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Over tokens, in float64."""
    return torch.where(mask, x, 0.0).sum(-1, dtype=torch.float64)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
