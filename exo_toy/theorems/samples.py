"""Gradients on given candidates, and DPO on Bradley-Terry labels."""

from collections.abc import Callable

import torch
from torch import Tensor

from exo_toy import checks, finite_k
from exo_toy.losses import dpo_loss, dpo_rw_loss, exo_rw_loss
from exo_toy.policies import Policy
from exo_toy.theorems.theorem import Theorem, parameter_gradient


def exo_rw_sample_gradient(log_ratio: Tensor, rewards: Tensor, *, beta_pi: float | int, beta_r: float | int) -> Theorem:
    r"""The per-sample gradient of EXO-rw is a covariance under the candidates' own softmax.

    .. math:: \nabla \mathrm{EXO} = \sum_i p_f(i) \, (h_i - \bar h) \, \nabla f_i, \quad
        h = f - r/\beta_r, \ \bar h = \sum_j p_f(j) h_j

    Both sides with respect to the log ratios [B, K], where :math:`\nabla f_i` is beta_pi.

    Source: differentiate KL(p_f || p_r); the normalisers drop out because the score has mean zero.

    Args:
        log_ratio: [B, K] log policy minus log reference of each candidate, in nats, finite.
        rewards: [B, K], finite.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        Theorem with sides [B, K].

    Raises:
        ValueError: what :func:`exo_toy.losses.exo_rw_loss` refuses.

    Example:
        >>> log_ratio, rewards = torch.tensor([[0.0, 1.0, 3.0]]).double(), torch.tensor([[2.0, 0.0, 1.0]]).double()
        >>> exo_rw_sample_gradient(log_ratio, rewards, beta_pi=0.5, beta_r=2.0).error < 1e-12
        True
    """
    f = beta_pi * log_ratio
    p_f, h = f.softmax(-1), f - rewards / beta_r
    h_mean = (p_f * h).sum(-1, keepdim=True)
    return Theorem(
        _loss_gradient(exo_rw_loss, log_ratio, rewards, beta_pi, beta_r),
        beta_pi * p_f * (h - h_mean),
        ("finite log ratios and rewards",),
    )


def dpo_rw_sample_gradient(log_ratio: Tensor, rewards: Tensor, *, beta_pi: float | int, beta_r: float | int) -> Theorem:
    r"""The per-sample gradient of DPO-rw is the difference of the two softmaxes.

    .. math:: \nabla \mathrm{DPO} = \sum_i (p_f(i) - p_r(i)) \, \nabla f_i

    Both sides with respect to the log ratios [B, K], where :math:`\nabla f_i` is beta_pi.

    Source: differentiate the cross-entropy.

    Args:
        log_ratio: [B, K] log policy minus log reference of each candidate, in nats, finite.
        rewards: [B, K], finite.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        Theorem with sides [B, K].

    Raises:
        ValueError: what :func:`exo_toy.losses.dpo_rw_loss` refuses.

    Example:
        >>> log_ratio, rewards = torch.tensor([[0.0, 1.0, 3.0]]).double(), torch.tensor([[2.0, 0.0, 1.0]]).double()
        >>> dpo_rw_sample_gradient(log_ratio, rewards, beta_pi=0.5, beta_r=2.0).error < 1e-12
        True
    """
    p_f, p_r = (beta_pi * log_ratio).softmax(-1), (rewards / beta_r).softmax(-1)
    return Theorem(
        _loss_gradient(dpo_rw_loss, log_ratio, rewards, beta_pi, beta_r),
        beta_pi * (p_f - p_r),
        ("finite log ratios and rewards",),
    )


def group_baseline_gradient(
    log_ratio: Tensor, rewards: Tensor, *, beta_pi: float | int, beta_r: float | int
) -> Theorem:
    r"""Where the policy is the reference, EXO-rw is the policy gradient with the group's mean as baseline.

    .. math:: \nabla \mathrm{EXO} = -\frac{\beta_\pi}{\beta_r} \frac1K \sum_i (r_i - \bar r) \, \nabla \log \pi(y_i)

    It is (K-1)/K of the leave-one-out estimator (RLOO) and GRPO's without the division by the standard deviation. Both
    sides with respect to the log-probabilities of the candidates [B, K].

    Source: not in the paper; set f = 0 in :func:`exo_rw_sample_gradient`. RLOO: Ahmadian et al., arXiv:2402.14740.

    Args:
        log_ratio: [B, K] log policy minus log reference of each candidate, in nats, finite.
        rewards: [B, K], finite.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        Theorem with sides [B, K].

    Raises:
        ValueError: what :func:`exo_toy.losses.exo_rw_loss` refuses.

    Example:
        >>> log_ratio, rewards = torch.zeros(1, 3).double(), torch.tensor([[2.0, 0.0, 1.0]]).double()
        >>> group_baseline_gradient(log_ratio, rewards, beta_pi=0.5, beta_r=2.0).error < 1e-12
        True
    """
    k = log_ratio.shape[-1]
    return Theorem(
        _loss_gradient(exo_rw_loss, log_ratio, rewards, beta_pi, beta_r),
        -(beta_pi / beta_r) / k * (rewards - rewards.mean(-1, keepdim=True)),
        ("the policy is the reference: all log ratios are 0",),
    )


def dpo_bradley_terry_identity(
    policy: Policy, log_ref: Tensor, reward: Tensor, *, beta_pi: float | int, beta_r: float | int
) -> Theorem:
    r"""DPO on Bradley-Terry labels is DPO-rw on two candidates.

    .. math:: E_{y, y' \sim \pi_{ref}}\big[P \ell(y, y') + (1 - P) \ell(y', y)\big] = E[\mathrm{DPO\text{-}rw}]_{K=2},
        \quad P = \sigma\big((r(y) - r(y'))/\beta_r\big)

    with l the DPO loss. First the values, then the gradients. The left side goes over all N^2 pairs.

    Source: Ji et al., arXiv:2402.00856v4, section 3, states it for hard labels; Rafailov et al., arXiv:2305.18290.

    Args:
        policy: as in :mod:`exo_toy.policies`, X prompts.
        log_ref: [X, N] or [N] normalised log-probabilities of the reference, in nats.
        reward: [X, N] or [N], finite.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        Theorem with sides [1 + P]: the expected loss, then its gradient with respect to all parameters.

    Raises:
        ValueError: what :func:`exo_toy.losses.dpo_loss` and :func:`exo_toy.finite_k.expected_dpo_rw_loss` refuse.

    Example:
        >>> from exo_toy import policies, spaces
        >>> policy = policies.TabularPolicy(spaces.SequenceSpace(2, 1))
        >>> problem = policy, torch.tensor([0.25, 0.75]).double().log(), torch.tensor([0.0, 1.0])
        >>> dpo_bradley_terry_identity(*problem, beta_pi=0.5, beta_r=2.0).error < 1e-12
        True
    """
    tables = checks.as_tables(log_pi=policy.log_probs(), log_ref=log_ref, reward=reward)
    log_pi, log_ref_table, reward_table = torch.broadcast_tensors(*tables)
    x, n = log_pi.shape
    first, second = (pair.flatten() for pair in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))

    def pair_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        tables = (log_pi[:, chosen], log_pi[:, rejected], log_ref_table[:, chosen], log_ref_table[:, rejected])
        return dpo_loss(*(table.flatten() for table in tables), beta=beta_pi).losses.reshape(x, -1)

    prefers_first = torch.sigmoid((reward_table[:, first] - reward_table[:, second]) / beta_r)
    labelled = prefers_first * pair_loss(first, second) + (1 - prefers_first) * pair_loss(second, first)
    pair_probability = (log_ref_table[:, first] + log_ref_table[:, second]).exp()
    left = (pair_probability * labelled).sum(-1).mean()
    right = finite_k.expected_dpo_rw_loss(
        policy.log_probs(), log_ref, reward, k=2, beta_pi=beta_pi, beta_r=beta_r
    ).mean()
    return Theorem(
        torch.cat([left.detach().reshape(1), parameter_gradient(left, policy)]),
        torch.cat([right.detach().reshape(1), parameter_gradient(right, policy)]),
        ("labels follow the Bradley-Terry model of the reward / beta_r", "both completions come from the reference"),
    )


def _loss_gradient(
    loss: Callable[..., Tensor], log_ratio: Tensor, rewards: Tensor, beta_pi: float | int, beta_r: float | int
) -> Tensor:
    """Automatic gradient of a listwise loss with respect to the log ratios [B, K]."""
    log_ratio = log_ratio.detach().clone().requires_grad_()
    value = loss(log_ratio, rewards, beta_pi=beta_pi, beta_r=beta_r).sum()
    return torch.autograd.grad(value, log_ratio)[0]
