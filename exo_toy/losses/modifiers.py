"""What composes with the losses: of log-probabilities, of weights, and of a loss into another loss.

* Log-probabilities: :func:`length_normalized`, :func:`length_desensitized`.
* Weights: :func:`wpo_weights`, to multiply the losses by.
* Losses: :func:`smoothed`, :func:`robust`, :func:`scored`, of any loss on pairs.

The scores that :func:`scored` takes, other implicit rewards than log ratios, are beside f-DPO.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from exo_toy import checks
from exo_toy.losses.ratios import PreferenceLoss, Score, message, pair_ratios

# Of chosen and rejected log-probabilities and of what else comes in pairs, in that order, with keywords.
PairLoss = Callable[..., PreferenceLoss]


def length_normalized(logps: Float[Tensor, " B"], lengths: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    r"""Mean log-probability per token.

    .. math:: \tfrac{1}{|y|} \log\pi(y)

    Given to a loss for policy and reference alike it makes the loss's length-normalised form (IPO with means, DPO
    with means).

    Source: Meng et al., arXiv:2405.14734, Eq. 4; normalised DPO in Lambert et al., arXiv:2411.15124, Eq. 6 (section
    5.1.2); compared with TRL 1.16's sigmoid_norm and ipo.

    Args:
        logps: [B] log-probabilities summed over tokens, in nats.
        lengths: [B] number of tokens, at least 1.

    Returns:
        [B] in the dtype of ``logps``, at least float32.

    Raises:
        ValueError: a wrong shape or dtype, a length below 1.

    Example:
        >>> length_normalized(torch.tensor([-6.0]), torch.tensor([3]))
        tensor([-2.])
    """
    checks.require_floating(logps=logps)
    _check_lengths(logps, lengths=lengths)
    dtype = torch.promote_types(logps.dtype, torch.float32)
    return logps.to(dtype) / lengths.to(dtype)


def length_desensitized(
    token_logps: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    shared_lengths: Int[Tensor, " B"],
    *,
    alpha: float | int,
) -> Float[Tensor, " B"]:
    r"""LD-DPO's log-probability: tokens beyond the length that both completions share count alpha.

    .. math:: \sum_{t \le l} \log p_t + \alpha \sum_{t > l} \log p_t, \quad l = \min(|y_w|, |y_l|)

    At alpha = 1 the plain sum.

    Convention: whether the reference is treated alike is the caller's choice, by calling this for its tokens as well.
    TRL 1.16 does, and turbo-alignment; TRL 0.x did not; without it the policy that equals the reference has a margin.

    Source: Liu et al., arXiv:2409.06411, the modified likelihood; compared with TRL 1.16's ld_alpha and the paper's
    entry in TRL's paper index, and with turbo-alignment's LDDPOTrainer, which agree; not with the paper's own text.

    Args:
        token_logps: [B, T] log-probability of each token, in nats; what stands outside the mask (NaN too) changes
            nothing and gets zero gradient.
        mask: [B, T] bool, True for the completion's tokens, which are counted in order, padded on whichever side.
        shared_lengths: [B], the smaller number of tokens of both completions of the pair.
        alpha: in [0, 1].

    Returns:
        [B], summed in at least float32, which is its dtype then.

    Raises:
        ValueError: a wrong shape or dtype, alpha or a length out of range.

    Example:
        >>> token_logps, mask = torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[True, True, True]])
        >>> length_desensitized(token_logps, mask, torch.tensor([1]), alpha=0.5)
        tensor([-4.])
    """
    _check_tokens(mask, token_logps=token_logps)
    _check_lengths(mask[:, 0] if mask.shape[1] else mask.any(-1), shared_lengths=shared_lengths)
    if alpha != 1 or isinstance(alpha, bool):
        checks.require_real("alpha", alpha, allowed="in [0, 1]", low=0.0, high=1.0, low_allowed=True)
    kept = token_logps.to(torch.promote_types(token_logps.dtype, torch.float32)).masked_fill(~mask, 0.0)
    beyond = mask.cumsum(-1) > shared_lengths.unsqueeze(-1)
    total = kept.masked_fill(beyond, 0.0).sum(-1)
    return total if alpha == 0 else total + alpha * kept.masked_fill(~beyond, 0.0).sum(-1)


def wpo_weights(
    token_logps: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    log_sum_sq_probs: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, " B"]:
    r"""WPO's weight of a completion: how likely the policy is to write it, per token; without a gradient.

    .. math:: \exp\Big(\tfrac{1}{|y|} \sum_t \big[\log p_t(y_t) - \log \textstyle\sum_v p_t(v)^2\big]\Big)

    A pair's loss is multiplied by the weights of both of its completions. The second term is the paper's alignment of
    weights, which makes the policy's own samples count about 1; without ``log_sum_sq_probs`` it is left out.

    Convention: nothing is clamped, as in TRL 1.16. The authors' code takes at most 1 for the product of both:
    ``(chosen * rejected).clamp(max=1)``.

    Source: Zhou et al., arXiv:2406.11827, Eq. 2 and the sampled alignment; compared with TRL 1.16's use_weighting and
    with the authors' code, wzhouad/WPO scripts/run_wpo.py.

    Args:
        token_logps: [B, T] log-probability of each token under the policy, in nats; what stands outside the mask (NaN
            too) changes nothing.
        mask: [B, T] bool, True for the completion's tokens, at least one in each row.
        log_sum_sq_probs: [B, T] log of the sum of the squared probabilities of all tokens at each position.

    Returns:
        [B] of at least 0, detached, in at least float32; at most 1 without alignment.

    Raises:
        ValueError: a wrong shape or dtype, a row without a token.

    Example:
        >>> wpo_weights(torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]]))
        tensor([0.1353])
    """
    given = dict(token_logps=token_logps)
    if log_sum_sq_probs is not None:
        given["log_sum_sq_probs"] = log_sum_sq_probs
    _check_tokens(mask, **given)
    empty = ~mask.any(-1)
    checks.require_values([mask], (empty, message("mask", "True for a token of each row", ~empty, empty)))
    logps = token_logps.detach().to(torch.promote_types(token_logps.dtype, torch.float32))
    if log_sum_sq_probs is not None:
        logps = logps - log_sum_sq_probs.detach()
    return (logps.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)).exp()


def smoothed(loss: PairLoss, *, label_smoothing: float | int) -> PairLoss:
    r"""The loss under labels that are wrong with probability eps: conservative DPO's, of any loss on pairs.

    .. math:: (1 - \varepsilon)\, \ell(w, l) + \varepsilon\, \ell(l, w)

    Convention: everything of the loss is exchanged, SimPO's margin too. The authors of SimPO, and TRL, smooth its
    sigmoid only, whose margin keeps its side.

    Source: Mitchell, "A note on DPO with noisy preferences", 2023, Eq. 3, for DPO; compared with TRL's losses of
    pairs before 1.0 and with torchtune's.

    Args:
        loss: a loss on pairs; its tensors come in pairs of chosen and rejected, which are exchanged.
        label_smoothing: eps in [0, 1/2); 0 is the loss itself.

    Returns:
        A loss with the arguments of ``loss``; computed in at least float32 and returned in the first tensor's dtype.

    Raises:
        ValueError: label_smoothing out of range; what ``loss`` raises.

    Example:
        >>> from exo_toy.losses import dpo_loss
        >>> z = torch.zeros(1)
        >>> smoothed(dpo_loss, label_smoothing=0.1)(z + 1, z, z, z, beta=1.0).losses
        tensor([0.4133])
    """
    eps = _noise(label_smoothing)
    return functools.partial(_mixed, loss, 1 - eps, eps)


def robust(loss: PairLoss, *, label_smoothing: float | int) -> PairLoss:
    r"""The loss made unbiased against labels flipped with probability eps: robust DPO's, of any loss on pairs.

    .. math:: \frac{(1 - \varepsilon)\, \ell(w, l) - \varepsilon\, \ell(l, w)}{1 - 2 \varepsilon}

    Its expectation under flipped labels is that of ``loss`` under the labels before the flip:
    :func:`smoothed` of it is ``loss``.

    Source: Chowdhury et al., arXiv:2403.00409, section 3.1, for DPO; Natarajan et al., 2013, for any loss.

    Args:
        loss: a loss on pairs; its tensors come in pairs of chosen and rejected, which are exchanged.
        label_smoothing: eps in [0, 1/2); 0 is the loss itself.

    Returns:
        A loss with the arguments of ``loss``; computed in at least float32 and returned in the first tensor's dtype.
        NaN where both labels cost an infinite loss.

    Raises:
        ValueError: label_smoothing out of range; what ``loss`` raises.

    Example:
        >>> from exo_toy.losses import dpo_loss
        >>> z = torch.zeros(1)
        >>> robust(dpo_loss, label_smoothing=0.1)(z + 1, z, z, z, beta=1.0).losses
        tensor([0.1883])
    """
    eps = _noise(label_smoothing)
    return functools.partial(_mixed, loss, (1 - eps) / (1 - 2 * eps), -eps / (1 - 2 * eps))


def scored(loss: PairLoss, *, score: Score) -> PairLoss:
    r"""The loss with scores in place of log ratios: another divergence than KL, of any loss on pairs.

    .. math:: \ell\big(f'(\rho_w), f'(\rho_l)\big), \quad \rho = \frac{\pi_\theta(y)}{\pi_{ref}(y)}

    Of DPO it is :func:`f_dpo_loss`, which also knows what to do where two scores overflow. Only a loss on the
    difference of the log ratios keeps its meaning: from other losses the normaliser of the policy does not cancel.

    Source: Wang et al., arXiv:2309.16240, for DPO; compared with TRL 1.16's f_divergence_type, of hinge, robust,
    exo_pair and discopop, too.

    Args:
        loss: a loss on pairs with a reference.
        score: f' as an elementwise, strictly increasing function of log rho, such as :func:`jensen_shannon_score`.

    Returns:
        A loss with the arguments of ``loss``; computed in at least float32 and returned in the policy's dtype. Its
        implicit rewards are those of the scores.

    Raises:
        ValueError: what ``loss`` raises; a score of +inf.

    Example:
        >>> from exo_toy.losses import hinge_loss, jensen_shannon_score
        >>> z = torch.zeros(1)
        >>> scored(hinge_loss, score=jensen_shannon_score)(z + 1, z, z, z, beta=1.0).losses
        tensor([0.6201])
    """
    return functools.partial(_on_scores, loss, score)


def _on_scores(
    loss: PairLoss,
    score: Score,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    /,
    *others: Tensor,
    **keywords: Any,
) -> PreferenceLoss:
    """The loss of a policy whose log ratios are the scores."""
    ratios = pair_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=1.0)
    zero = torch.zeros_like(ratios.chosen)
    result = loss(score(ratios.chosen), score(ratios.rejected), zero, zero, *others, **keywords)
    return PreferenceLoss(*(value.to(ratios.dtype) for value in result))


def _mixed(loss: PairLoss, right: float, wrong: float, /, *pairs: Tensor, **keywords: Any) -> PreferenceLoss:
    """So much of the loss, and so much of the loss of the exchanged pairs."""
    dtype = torch.promote_types(pairs[0].dtype, pairs[1].dtype)
    wide = [_at_least_float32(tensor) for tensor in pairs]
    exchanged = [tensor for pair in zip(wide[1::2], wide[::2], strict=True) for tensor in pair]
    result = loss(*wide, **keywords)
    losses = right * result.losses
    if wrong != 0:
        losses = losses + wrong * loss(*exchanged, **keywords).losses
    return PreferenceLoss(losses.to(dtype), result.chosen_rewards.to(dtype), result.rejected_rewards.to(dtype))


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Half types widened, integers left alone."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def _noise(label_smoothing: float | int) -> float:
    """Eps in [0, 1/2)."""
    checks.require_real("label_smoothing", label_smoothing, allowed="in [0, 1/2)", low=0.0, high=0.5, low_allowed=True)
    return float(label_smoothing)


def _check_lengths(beside: Tensor, **lengths: Tensor) -> None:
    """Numbers of tokens [B], one for each example, at least 1."""
    for name, values in lengths.items():
        other = (torch.bool, torch.complex64, torch.complex128)
        if not isinstance(values, Tensor) or values.is_floating_point() or values.dtype in other:
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{name} must be a tensor of an integer dtype; got {got}")
        checks.require_shape("B", logps=beside, **{name: values})
        bad = values < 1
        checks.require_values([values], (bad, message(name, "at least 1", values, bad)))


def _check_tokens(mask: Tensor, **tensors: Tensor) -> None:
    """Values of tokens [B, T] and their mask."""
    checks.require_floating(**tensors)
    checks.require_mask(mask=mask)
    checks.require_shape("B T", **tensors, mask=mask)
