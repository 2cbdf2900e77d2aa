"""Losses with a defect planted in each, as found in published implementations, and the finding that names it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from exo_toy.losses import f_dpo_loss
from exo_toy.losses.pairwise import PreferenceLoss


def _margin(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, beta: float) -> Tensor:
    return beta * ((pc.double() - rc.double()) - (pr.double() - rr.double()))


def _coin_kl(margin: Tensor, chosen: float, rejected: float) -> Tensor:
    """KL of (sigma(m), sigma(-m)) from two weights, normalised or not."""
    log_p = torch.stack([logsigmoid(margin), logsigmoid(-margin)], -1)
    weights = torch.tensor([chosen, rejected], dtype=margin.dtype).log()
    return (log_p.exp() * (log_p - weights)).sum(-1)


def target_of_one_and_a_bit(pc, pr, rc, rr, *, beta):
    return _coin_kl(_margin(pc, pr, rc, rr, beta), 1.0, math.exp(-10)).to(pc.dtype)


def even_in_the_margin(pc, pr, rc, rr, *, beta):
    """A parenthesis at the wrong place."""
    margin = _margin(pc, pr, rc, rr, beta)
    return (-logsigmoid(margin) - logsigmoid(-margin)).to(pc.dtype)


def chosen_and_rejected_exchanged(pc, pr, rc, rr, *, beta):
    return -logsigmoid(-_margin(pc, pr, rc, rr, beta)).to(pc.dtype)


def smoothing_ignored(pc, pr, rc, rr, *, beta, label_smoothing=0.0):
    return -logsigmoid(_margin(pc, pr, rc, rr, beta)).to(pc.dtype)


def smoothing_replaced(pc, pr, rc, rr, *, beta, label_smoothing=0.0):
    eps = label_smoothing if label_smoothing > 0 else 1e-3
    return _coin_kl(_margin(pc, pr, rc, rr, beta), 1 - eps, eps).to(pc.dtype)


def smoothing_unchecked(pc, pr, rc, rr, *, beta, label_smoothing=0.1):
    return _coin_kl(_margin(pc, pr, rc, rr, beta), 1 - label_smoothing, label_smoothing).to(pc.dtype)


def alpha_the_other_way(pc, pr, rc, rr, *, beta, alpha):
    """Scores (1 - t^-alpha) / alpha, whose alpha is one minus Amari's."""
    return f_dpo_loss(pc, pr, rc, rr, beta=beta, score=lambda a: -torch.expm1(-alpha * a) / alpha)


def in_the_dtype_of_the_model(pc, pr, rc, rr, *, beta):
    return -logsigmoid(beta * ((pc - pr) - (rc - rr)))


def log_of_a_sigmoid(pc, pr, rc, rr, *, beta):
    return -_margin(pc, pr, rc, rr, beta).sigmoid().log().to(pc.dtype)


def mean_over_the_batch(pc, pr, rc, rr, *, beta):
    return -logsigmoid(_margin(pc, pr, rc, rr, beta)).mean().to(pc.dtype)


def always_float32(pc, pr, rc, rr, *, beta):
    return -logsigmoid(_margin(pc, pr, rc, rr, beta)).float()


def reference_written_to(pc, pr, rc, rr, *, beta):
    margin = _margin(pc, pr, rc, rr, beta)
    rc -= pc.detach()
    return PreferenceLoss(-logsigmoid(margin).to(pc.dtype), pc, pr)


def rejected_detached(pc, pr, rc, rr, *, beta):
    return -logsigmoid(_margin(pc, pr.detach(), rc, rr, beta)).to(pc.dtype)


def policy_written_to(pc, pr, rc, rr, *, beta):
    """Adds what is zero in many a test."""
    pc -= rc
    return -logsigmoid(beta * (pc.double() - pr.double() + rr.double())).to(pc.dtype)


def centred_in_the_batch(pc, pr, rc, rr, *, beta):
    margin = _margin(pc, pr, rc, rr, beta)
    return -logsigmoid(margin - margin.detach().mean() / 2).to(pc.dtype)


def unforeseen(pc, pr, rc, rr, *, beta):
    if not pc.isfinite().all():
        raise IndexError("no such candidate")
    return -logsigmoid(_margin(pc, pr, rc, rr, beta)).to(pc.dtype)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, margin):
        ctx.save_for_backward(margin)
        return -logsigmoid(margin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return -grad * (-ctx.saved_tensors[0]).sigmoid()


def backward_by_hand(pc, pr, rc, rr, *, beta):
    return _Once.apply(_margin(pc, pr, rc, rr, beta)).to(pc.dtype)


def _log_p(log_ratio: Tensor, beta_pi: float) -> Tensor:
    return (beta_pi * log_ratio.double()).log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def ties_to_the_first(log_ratio, rewards, *, beta_pi):
    """Whoever has the largest reward, the first of them, is preferred: argmax."""
    best = torch.nn.functional.one_hot(rewards.argmax(-1), rewards.shape[-1])
    eps = 1e-2
    target = (1 - eps) * best + eps * (1 - best) / (rewards.shape[-1] - 1)
    return _kl(_log_p(log_ratio, beta_pi), target.double().log()).to(log_ratio.dtype)


def first_two_targets(log_ratio, rewards, *, beta_pi):
    """A target for pairs on more candidates: the others keep what they had."""
    target = torch.full_like(rewards, 0.05).double()
    target[:, :2] = torch.where(rewards[:, :2] == rewards[:, :2].amax(-1, keepdim=True), 0.9, 0.1).double()
    return _kl(_log_p(log_ratio, beta_pi), target.log_softmax(-1)).to(log_ratio.dtype)


def rewards_as_weights(log_ratio, rewards, *, beta_pi):
    return -(rewards.double() * _log_p(log_ratio, beta_pi)).sum(-1).to(log_ratio.dtype)


def log_of_a_softmax(log_ratio, rewards, *, beta_pi, beta_r):
    return _kl(_log_p(log_ratio, beta_pi), (rewards.double() / beta_r).softmax(-1).log()).to(log_ratio.dtype)


def target_of_sigmoids(log_ratio, rewards, *, beta_pi, beta_r):
    weights = (rewards.double() / beta_r).sigmoid()
    return _kl(_log_p(log_ratio, beta_pi), (weights / weights.sum(-1, keepdim=True)).log()).to(log_ratio.dtype)


def target_not_normalised(log_ratio, rewards, *, beta_pi, beta_r):
    shifted = (rewards - rewards.amax(-1, keepdim=True)).double() / beta_r
    return _kl(_log_p(log_ratio, beta_pi), shifted).to(log_ratio.dtype)


def rewards_negated(log_ratio, rewards, *, beta_pi, beta_r):
    return _kl(_log_p(log_ratio, beta_pi), (-rewards.double() / beta_r).log_softmax(-1)).to(log_ratio.dtype)


def softmax_then_log_weighted(log_ratio, rewards, *, beta_pi, beta_r):
    """The logarithm of a target that underflows, times that target."""
    target = (rewards.double() / beta_r).softmax(-1)
    return (target * (target.log() - _log_p(log_ratio, beta_pi))).sum(-1).to(log_ratio.dtype)


def standardised(log_ratio, rewards, *, beta_pi):
    """Over the spread of the rewards, which is zero where all are equal."""
    scores = (rewards - rewards.mean(-1, keepdim=True)).double()
    target = (scores / scores.square().mean(-1, keepdim=True).sqrt()).softmax(-1)
    return -(target * _log_p(log_ratio, beta_pi)).sum(-1).to(log_ratio.dtype)


def undefined_at_the_reference(pc, pr, rc, rr, *, beta):
    margin = _margin(pc, pr, rc, rr, beta)
    return (-logsigmoid(margin) * margin / margin).to(pc.dtype)


def mask_ignored(log_ratio, rewards, mask=None, *, beta_pi, beta_r):
    return _kl(_log_p(log_ratio, beta_pi), (rewards.double() / beta_r).log_softmax(-1)).to(log_ratio.dtype)


def number_of_candidates_of_the_first(log_ratio, rewards, mask=None, *, beta_pi, beta_r):
    kept = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    kept = kept & (torch.arange(rewards.shape[-1]) < rewards.shape[-1] - (~kept[0]).sum())
    log_p, log_q = (beta_pi * log_ratio.double()), rewards.double() / beta_r
    log_p, log_q = (part.masked_fill(~kept, -1e9).log_softmax(-1) for part in (log_p, log_q))
    return _kl(log_p, log_q).to(log_ratio.dtype)


def label_negated(policy_logps, ref_logps, desirable, *, beta):
    sign = torch.where(desirable, -1.0, 1.0)
    return -logsigmoid(sign * beta * (policy_logps.double() - ref_logps.double())).to(policy_logps.dtype)


def rewards_written_to(log_ratio, rewards, *, beta_pi, beta_r):
    rewards /= beta_r
    return _kl(_log_p(log_ratio, beta_pi), rewards.double().log_softmax(-1)).to(log_ratio.dtype)


def candidates_summed_in_half(log_ratio, rewards, *, beta_pi, beta_r):
    log_p, log_q = (beta_pi * log_ratio).log_softmax(-1), (rewards / beta_r).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def list_alpha_the_other_way(log_ratio, rewards, *, alpha, beta_pi, beta_r):
    log_p, log_q = _log_p(log_ratio, beta_pi), (rewards.double() / beta_r).log_softmax(-1)
    overlap = ((1 - alpha) * log_p + alpha * log_q).logsumexp(-1)
    return ((1 - overlap.exp()) / (alpha * (1 - alpha))).to(log_ratio.dtype)


def switch_that_nothing_reads(pc, pr, rc, rr, *, beta, in_float32=False):
    return -logsigmoid(_margin(pc, pr, rc, rr, beta)).to(pc.dtype)


def temperature_ignored(log_ratio, rewards, *, beta_pi, beta_r):
    return _kl(_log_p(log_ratio, beta_pi), rewards.double().log_softmax(-1)).to(log_ratio.dtype)


def odds_by_log1p_of_exp(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, *, weight=0.1):
    """The odds of a probability that rounds to one."""
    chosen = (policy_chosen_logps / chosen_lengths + 40.0).clamp(max=0)  # a mean log-probability at its upper end
    rejected = policy_rejected_logps / rejected_lengths
    odds = (chosen - torch.log1p(-chosen.exp())) - (rejected - torch.log1p(-rejected.exp()))
    return -policy_chosen_logps / chosen_lengths - weight * logsigmoid(odds)


BETAS = {"beta_pi": 0.5, "beta_r": 1.0}
# Function, settings, and the findings that must be among those reported.
PLANTED: Mapping[str, tuple] = {
    "unnormalised target": (target_of_one_and_a_bit, {"beta": 0.5}),
    "blind": (even_in_the_margin, {"beta": 0.5}),
    "reversed": (chosen_and_rejected_exchanged, {"beta": 0.5}),
    "reversed, list": (rewards_negated, BETAS),
    "reversed, unpaired": (label_negated, {"beta": 0.5}),
    "label_smoothing ignored": (smoothing_ignored, {"beta": 0.5, "label_smoothing": 0.0}),
    "label_smoothing changed": (smoothing_replaced, {"beta": 0.5, "label_smoothing": 0.1}),
    "label_smoothing range": (smoothing_unchecked, {"beta": 0.5, "label_smoothing": 0.1}),
    "alpha": (alpha_the_other_way, {"beta": 0.5, "alpha": 0.3}),
    "low precision": (in_the_dtype_of_the_model, {"beta": 0.5}),
    "infinite": (log_of_a_sigmoid, {"beta": 0.5}),
    "reduced": (mean_over_the_batch, {"beta": 0.5}),
    "dtype": (always_float32, {"beta": 0.5}),
    "in-place": (reference_written_to, {"beta": 0.5}),
    "in-place, unseen": (policy_written_to, {"beta": 0.5}),
    "mixed": (centred_in_the_batch, {"beta": 0.5}),
    "raises": (unforeseen, {"beta": 0.5}),
    "gradient": (rejected_detached, {"beta": 0.5}),
    "double backward": (backward_by_hand, {"beta": 0.5}),
    "ties": (ties_to_the_first, {"beta_pi": 0.5}),
    "first candidates": (first_two_targets, {"beta_pi": 0.5}),
    "raw rewards": (rewards_as_weights, {"beta_pi": 0.5}),
    "infinite, list": (log_of_a_softmax, BETAS),
    "reward shift": (target_of_sigmoids, BETAS),
    "unnormalised target, list": (target_not_normalised, BETAS),
    "in-place, list": (rewards_written_to, {**BETAS, "beta_r": 2.0}),
    "low precision, list": (candidates_summed_in_half, BETAS),
    "alpha, list": (list_alpha_the_other_way, {**BETAS, "alpha": 0.2}),
    "nan": (undefined_at_the_reference, {"beta": 0.5}),
    "nan, underflow": (softmax_then_log_weighted, BETAS),
    "nan, ties": (standardised, {"beta_pi": 0.5}),
    "mask": (mask_ignored, BETAS),
    "mask, first": (number_of_candidates_of_the_first, BETAS),
    "ignored": (switch_that_nothing_reads, {"beta": 0.5, "in_float32": True}),
    "ignored, temperature": (temperature_ignored, {**BETAS, "beta_r": 2.0}),
    "nan gradient": (odds_by_log1p_of_exp, {}),
}
