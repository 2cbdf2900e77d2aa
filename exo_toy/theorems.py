"""One function per theorem: both sides, computed independently of each other, and what the theorem assumes.

No function enforces its assumptions: break one and the sides part, which is how the tests know that they can. Where a
theorem speaks of a parameter theta, ``policy`` is any module with ``log_probs()`` [X, N]; the gradient is flattened
over its parameters. Over prompts everything is averaged. All is exact, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from exo_toy import checks, finite_k
from exo_toy.divergences import kl_divergence
from exo_toy.losses import dpo_loss, dpo_rw_loss, exo_rw_loss
from exo_toy.objectives import (
    alignment_objective,
    generalized_objective,
    kl_optimal_to_policy,
    kl_policy_to_optimal,
)
from exo_toy.policies import Policy
from exo_toy.targets import optimal_policy, tempered_policy


@dataclass(frozen=True)
class Theorem:
    """Both sides of a theorem on one problem, of equal shape, and its assumptions in words."""

    left: Tensor
    right: Tensor
    assumptions: tuple[str, ...]

    @property
    def error(self) -> float:
        """Largest difference of the sides, relative to the largest entry of either (absolute where both are 0)."""
        scale = max(self.left.abs().max().item(), self.right.abs().max().item())
        # Equal infinities agree; their difference would be NaN.
        difference = torch.where(self.left == self.right, 0.0, self.left - self.right)
        return difference.abs().max().item() / (scale or 1.0)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the sides."""
        return torch.cosine_similarity(self.left.flatten(), self.right.flatten(), dim=0, eps=0.0).item()


def parameter_gradient(value: Float[Tensor, ""], policy: Policy) -> Float[Tensor, " P"]:
    """Gradient of a scalar with respect to all parameters of a policy, flattened and concatenated.

    Args:
        value: a scalar computed from ``policy.log_probs()``.
        policy: the policy; its ``.grad`` fields are left alone.

    Returns:
        [P] in the order of ``policy.parameters()``.

    Example:
        >>> from exo_toy.policies import TabularPolicy
        >>> from exo_toy.spaces import SequenceSpace
        >>> policy = TabularPolicy(SequenceSpace(2, 1))
        >>> parameter_gradient(policy.log_probs()[0, 0], policy)
        tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    gradients = torch.autograd.grad(value, list(policy.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def objective_identity(log_pi: Tensor, log_ref: Tensor, reward: Tensor, *, beta: float | int) -> Theorem:
    r"""KL-regularised reward maximisation is KL minimisation to the optimal policy.

    .. math:: J_\beta(\pi) = \beta \log Z_\beta - \beta \, \mathrm{KL}(\pi \| \pi^*_\beta)

    Source: Ji et al., arXiv:2402.00856v4, section 2; Korbak et al., arXiv:2206.00761.

    Args:
        log_pi: [..., N] normalised log-probabilities of the policy, in nats.
        log_ref: [..., N] of the reference.
        reward: [..., N], finite, or -inf for a forbidden completion.
        beta: strength of the KL penalty, above 0.

    Returns:
        Theorem with sides [...], in the unit of the reward; both -inf where the objective is.

    Raises:
        ValueError: what :func:`exo_toy.objectives.alignment_objective` or :func:`exo_toy.targets.optimal_policy`
            refuses.

    Example:
        >>> pi, ref = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).double().log()
        >>> reward = torch.tensor([0.0, 1.0])
        >>> objective_identity(pi, ref, reward, beta=0.5).error < 1e-12
        True
    """
    log_pi_star, log_z = optimal_policy(log_ref, reward, beta=beta)
    return Theorem(
        alignment_objective(log_pi, log_ref, reward, beta=beta),
        beta * log_z - beta * kl_divergence(log_pi, log_pi_star),
        ("the optimal policy and log Z are those of this reward, reference and beta",),
    )


def generalized_objective_identity(
    log_pi: Tensor, log_ref: Tensor, reward: Tensor, *, beta_pi: float | int, beta_r: float | int
) -> Theorem:
    r"""The same with the penalty split into a reward and a policy temperature.

    .. math:: J_{\beta_r}(\pi^{\beta_\pi}) = \beta_r \log Z_{\beta_r}
        - \beta_r \, \mathrm{KL}(\pi^{\beta_\pi} \| \pi^*_{\beta_r})

    Source: Ji et al., arXiv:2402.00856v4, section 3.

    Args:
        log_pi: [..., N] normalised log-probabilities of the policy, in nats.
        log_ref: [..., N] of the reference.
        reward: [..., N], finite, or -inf for a forbidden completion.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        Theorem with sides [...], in the unit of the reward.

    Raises:
        ValueError: what :func:`exo_toy.objectives.generalized_objective` refuses.

    Example:
        >>> pi, ref = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).double().log()
        >>> reward = torch.tensor([0.0, 1.0])
        >>> generalized_objective_identity(pi, ref, reward, beta_pi=0.5, beta_r=2.0).error < 1e-12
        True
    """
    _, log_z = optimal_policy(log_ref, reward, beta=beta_r)
    return Theorem(
        generalized_objective(log_pi, log_ref, reward, beta_pi=beta_pi, beta_r=beta_r),
        beta_r * (log_z - kl_policy_to_optimal(log_pi, log_ref, reward, beta_pi=beta_pi, beta_r=beta_r)),
        ("the same temperatures on both sides",),
    )


def generalized_gradient_identity(
    policy: Policy, log_ref: Tensor, reward: Tensor, *, beta_pi: float | int, beta_r: float | int
) -> Theorem:
    r"""Ascent on the generalised objective is descent on a KL divergence, for any parametrisation.

    .. math:: \nabla_\theta J_{\beta_r}(\pi_\theta^{\beta_\pi})
        = -\beta_r \nabla_\theta \mathrm{KL}(\pi_\theta^{\beta_\pi} \| \pi^*_{\beta_r})

    Source: Ji et al., arXiv:2402.00856v4, section 3.

    Args:
        policy: as in :mod:`exo_toy.policies`, X prompts.
        log_ref: [X, N] or [N] normalised log-probabilities of the reference, in nats.
        reward: [X, N] or [N], finite, or -inf for a forbidden completion.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        Theorem with sides [P], the gradients with respect to all parameters.

    Raises:
        ValueError: what :func:`exo_toy.objectives.generalized_objective` refuses.

    Example:
        >>> from exo_toy import policies, spaces
        >>> policy = policies.TabularPolicy(spaces.SequenceSpace(2, 1))
        >>> problem = policy, torch.tensor([0.25, 0.75]).double().log(), torch.tensor([0.0, 1.0])
        >>> generalized_gradient_identity(*problem, beta_pi=0.5, beta_r=2.0).error < 1e-12
        True
    """
    betas = {"beta_pi": beta_pi, "beta_r": beta_r}
    objective = generalized_objective(policy.log_probs(), log_ref, reward, **betas).mean()
    divergence = kl_policy_to_optimal(policy.log_probs(), log_ref, reward, **betas).mean()
    return Theorem(
        parameter_gradient(objective, policy),
        -beta_r * parameter_gradient(divergence, policy),
        ("the same temperatures on both sides",),
    )


def optimum_equivalence(log_ref: Tensor, reward: Tensor, *, beta_pi: float | int, beta_r: float | int) -> Theorem:
    r"""Whatever the split of the penalty, the unrestricted optimum is the same policy.

    .. math:: \pi^{\beta_\pi} = \pi^*_{\beta_r} \iff \pi = \pi^*_{\beta_r \beta_\pi}

    Both directions, as probabilities: tempering the right policy gives the right target, and undoing the tempering of
    the target (tempering by 1/beta_pi) gives the right policy.

    Source: Ji et al., arXiv:2402.00856v4, section 3.

    Args:
        log_ref: [..., N] normalised log-probabilities of the reference, in nats.
        reward: [..., N], finite, or -inf for a forbidden completion.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        Theorem with sides [2, ..., N], probabilities: the two directions.

    Raises:
        ValueError: what :func:`exo_toy.targets.optimal_policy` refuses.

    Example:
        >>> ref, reward = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0])
        >>> optimum_equivalence(ref, reward, beta_pi=0.5, beta_r=2.0).error < 1e-12
        True
    """
    log_optimum, _ = optimal_policy(log_ref, reward, beta=beta_r * beta_pi)
    log_target, _ = optimal_policy(log_ref, reward, beta=beta_r)
    return Theorem(
        torch.stack(
            [
                tempered_policy(log_optimum, log_ref, beta_pi=beta_pi).exp(),
                tempered_policy(log_target, log_ref, beta_pi=1 / beta_pi).exp(),
            ]
        ),
        torch.stack([log_target.exp(), log_optimum.exp()]),
        ("the policy class holds the optimal policy", "beta = beta_r beta_pi"),
    )


def exo_rw_gradient_limit(
    policy: Policy, log_ref: Tensor, reward: Tensor, *, k: int, beta_pi: float | int, beta_r: float | int
) -> Theorem:
    r"""EXO-rw descends the KL divergence that RL descends (the paper's main theorem).

    .. math:: E[\nabla_\theta \mathrm{EXO}] \to \nabla_\theta \mathrm{KL}(\pi_\theta^{\beta_\pi} \| \pi^*_{\beta_r}),
        \quad K \to \infty

    Source: Ji et al., arXiv:2402.00856v4, section 3 (EXO's theorem).

    Args:
        policy: as in :mod:`exo_toy.policies`, X prompts.
        log_ref: [X, N] or [N] normalised log-probabilities of the reference, in nats.
        reward: [X, N] or [N], finite where the reference is positive.
        k: number of candidates, at least 1.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        Theorem with sides [P], the gradients with respect to all parameters.

    Raises:
        ValueError: what :func:`exo_toy.finite_k.expected_exo_rw_loss` refuses.

    Example:
        >>> from exo_toy import policies, spaces
        >>> policy = policies.TabularPolicy(spaces.SequenceSpace(2, 1))
        >>> problem = policy, torch.tensor([0.25, 0.75]).double().log(), torch.tensor([0.0, 1.0])
        >>> exo_rw_gradient_limit(*problem, k=2**20, beta_pi=0.5, beta_r=2.0).error < 1e-5
        True
    """
    betas = {"beta_pi": beta_pi, "beta_r": beta_r}
    loss = finite_k.expected_exo_rw_loss(policy.log_probs(), log_ref, reward, k=k, **betas).mean()
    limit = kl_policy_to_optimal(policy.log_probs(), log_ref, reward, **betas).mean()
    return Theorem(
        parameter_gradient(loss, policy),
        parameter_gradient(limit, policy),
        ("K tends to infinity: at finite K the sides differ by c/K + O(1/K^2)", "candidates come from the reference"),
    )


def dpo_rw_gradient_limit(
    policy: Policy, log_ref: Tensor, reward: Tensor, *, k: int, beta_pi: float | int, beta_r: float | int
) -> Theorem:
    r"""DPO-rw descends the KL divergence in the other direction.

    .. math:: E[\nabla_\theta \mathrm{DPO}] \to \nabla_\theta \mathrm{KL}(\pi^*_{\beta_r} \| \pi_\theta^{\beta_\pi}),
        \quad K \to \infty

    Source: Ji et al., arXiv:2402.00856v4, section 3 (DPO's theorem).

    Args:
        policy: as in :mod:`exo_toy.policies`, X prompts.
        log_ref: [X, N] or [N] normalised log-probabilities of the reference, in nats.
        reward: [X, N] or [N], finite where the reference is positive.
        k: number of candidates, at least 1.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        Theorem with sides [P], the gradients with respect to all parameters.

    Raises:
        ValueError: what :func:`exo_toy.finite_k.expected_dpo_rw_loss` refuses.

    Example:
        >>> from exo_toy import policies, spaces
        >>> policy = policies.TabularPolicy(spaces.SequenceSpace(2, 1))
        >>> problem = policy, torch.tensor([0.25, 0.75]).double().log(), torch.tensor([0.0, 1.0])
        >>> dpo_rw_gradient_limit(*problem, k=2**20, beta_pi=0.5, beta_r=2.0).error < 1e-5
        True
    """
    betas = {"beta_pi": beta_pi, "beta_r": beta_r}
    loss = finite_k.expected_dpo_rw_loss(policy.log_probs(), log_ref, reward, k=k, **betas).mean()
    limit = kl_optimal_to_policy(policy.log_probs(), log_ref, reward, **betas).mean()
    return Theorem(
        parameter_gradient(loss, policy),
        parameter_gradient(limit, policy),
        ("K tends to infinity: at finite K the sides differ by c/K + O(1/K^2)", "candidates come from the reference"),
    )


def exo_rw_gradient_at_reference(
    policy: Policy, log_ref: Tensor, reward: Tensor, *, k: int, beta_pi: float | int, beta_r: float | int
) -> Theorem:
    r"""At the reference EXO-rw is parallel to RL at every K, not only in the limit.

    .. math:: E[\nabla_\theta \mathrm{EXO}] = \tfrac{K-1}{K} \,
        \nabla_\theta \mathrm{KL}(\pi_\theta^{\beta_\pi} \| \pi^*_{\beta_r}) \quad \text{where } \pi_\theta = \pi_{ref}

    Source: not in the paper. At the reference the candidate weights are uniform, and the expected sample covariance is
    (K-1)/K of the covariance. DPO-rw has no such property.

    Args:
        policy: as in :mod:`exo_toy.policies`, X prompts.
        log_ref: [X, N] or [N] normalised log-probabilities of the reference, in nats.
        reward: [X, N] or [N], finite where the reference is positive.
        k: number of candidates, at least 1.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        Theorem with sides [P], the gradients with respect to all parameters.

    Raises:
        ValueError: what :func:`exo_toy.finite_k.expected_exo_rw_loss` refuses.

    Example:
        >>> from exo_toy import policies, spaces
        >>> policy = policies.TabularPolicy(spaces.SequenceSpace(2, 1))
        >>> problem = policy, torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.0, 1.0])
        >>> exo_rw_gradient_at_reference(*problem, k=3, beta_pi=0.5, beta_r=2.0).error < 1e-12
        True
    """
    limit = exo_rw_gradient_limit(policy, log_ref, reward, k=k, beta_pi=beta_pi, beta_r=beta_r)
    return Theorem(limit.left, (k - 1) / k * limit.right, ("the policy is the reference", "K >= 2"))


def exo_rw_bias_rate(
    policy: Policy, log_ref: Tensor, reward: Tensor, *, k: int, beta_pi: float | int, beta_r: float | int
) -> Theorem:
    r"""The bias of EXO-rw, of its value and of its gradient, is c/K with c in closed form.

    .. math:: K \, \big(E[\mathrm{EXO}] - \mathrm{KL}(\pi_\theta^{\beta_\pi} \| \pi^*_{\beta_r})\big) \to c

    The left side is extrapolated once, 2 b(2K) - b(K) with b(K) = K bias(K), so the sides differ by O(1/K^2). First
    entry: the value; the rest: the gradient.

    Source: not in the paper; :func:`exo_toy.finite_k.exo_rw_bias_coefficient`.

    Args:
        policy: as in :mod:`exo_toy.policies`, X prompts.
        log_ref: [X, N] or [N] normalised log-probabilities of the reference, in nats.
        reward: [X, N] or [N], finite where the reference is positive.
        k: number of candidates, at least 1.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        Theorem with sides [1 + P]: K times the bias of the loss, then its gradient with respect to all parameters.

    Raises:
        ValueError: what :func:`exo_toy.finite_k.expected_exo_rw_loss` refuses.

    Example:
        >>> from exo_toy import policies, spaces
        >>> policy = policies.TabularPolicy(spaces.SequenceSpace(2, 1))
        >>> problem = policy, torch.tensor([0.25, 0.75]).double().log(), torch.tensor([0.0, 1.0])
        >>> exo_rw_bias_rate(*problem, k=2**10, beta_pi=0.5, beta_r=2.0).error < 1e-5
        True
    """
    return _bias_rate(
        policy,
        lambda log_pi, k, **betas: finite_k.expected_exo_rw_loss(log_pi, log_ref, reward, k=k, **betas),
        lambda log_pi, **betas: kl_policy_to_optimal(log_pi, log_ref, reward, **betas),
        lambda log_pi, **betas: finite_k.exo_rw_bias_coefficient(log_pi, log_ref, reward, **betas),
        k=k,
        betas={"beta_pi": beta_pi, "beta_r": beta_r},
    )


def dpo_rw_bias_rate(
    policy: Policy, log_ref: Tensor, reward: Tensor, *, k: int, beta_pi: float | int, beta_r: float | int
) -> Theorem:
    r"""The bias of DPO-rw (less log K), of its value and of its gradient, is c/K with c in closed form.

    .. math:: K \, \big(E[\mathrm{DPO}] - \log K
        + E_{\pi^*_{\beta_r}}[\log \pi_\theta^{\beta_\pi} - \log \pi_{ref}]\big) \to c

    The left side is extrapolated once, as in :func:`exo_rw_bias_rate`.

    Source: not in the paper; :func:`exo_toy.finite_k.dpo_rw_bias_coefficient`.

    Args:
        policy: as in :mod:`exo_toy.policies`, X prompts.
        log_ref: [X, N] or [N] normalised log-probabilities of the reference, in nats.
        reward: [X, N] or [N], finite where the reference is positive.
        k: number of candidates, at least 1.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        Theorem with sides [1 + P]: K times the bias of the loss, then its gradient with respect to all parameters.

    Raises:
        ValueError: what :func:`exo_toy.finite_k.expected_dpo_rw_loss` refuses.

    Example:
        >>> from exo_toy import policies, spaces
        >>> policy = policies.TabularPolicy(spaces.SequenceSpace(2, 1))
        >>> problem = policy, torch.tensor([0.25, 0.75]).double().log(), torch.tensor([0.0, 1.0])
        >>> dpo_rw_bias_rate(*problem, k=2**10, beta_pi=0.5, beta_r=2.0).error < 1e-5
        True
    """

    def limit(log_pi: Tensor, **betas: float | int) -> Tensor:
        log_pi_star, _ = optimal_policy(log_ref, reward, beta=betas["beta_r"])
        # KL(pi*||ref) - KL(pi*||pi) = E_{pi*}[log pi - log ref]
        return kl_optimal_to_policy(log_pi, log_ref, reward, **betas) - kl_divergence(log_pi_star, log_ref)

    def loss(log_pi: Tensor, k: int, **betas: float | int) -> Tensor:
        expected = finite_k.expected_dpo_rw_loss(log_pi, log_ref, reward, k=k, **betas)
        return expected - torch.tensor(k, dtype=torch.float64).log()

    return _bias_rate(
        policy,
        loss,
        limit,
        lambda log_pi, **betas: finite_k.dpo_rw_bias_coefficient(log_pi, log_ref, reward, **betas),
        k=k,
        betas={"beta_pi": beta_pi, "beta_r": beta_r},
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


def tabular_gradients(log_pi: Tensor, log_pi_star: Tensor) -> Theorem:
    r"""The gradients of both KL divergences for a softmax over a full table of logits.

    .. math:: \nabla \mathrm{KL}(\pi \| \pi^*) = \pi \odot (d - E_\pi d), \ d = \log\pi - \log\pi^*; \qquad
        \nabla \mathrm{KL}(\pi^* \| \pi) = \pi - \pi^*

    Left: automatic differentiation with respect to the logits; right: the closed forms; stacked [2, ..., N].

    Source: the score of a softmax is 1[y=z] - pi(z).

    Args:
        log_pi: [..., N] normalised log-probabilities of the policy, in nats, float64.
        log_pi_star: [..., N] of the optimal policy, positive everywhere.

    Returns:
        Theorem with sides [2, ..., N].

    Raises:
        ValueError: what :func:`exo_toy.divergences.kl_divergence` refuses.

    Example:
        >>> pi, star = torch.tensor([[0.25, 0.75], [0.125, 0.875]]).double().log()
        >>> tabular_gradients(pi, star).error < 1e-12
        True
    """
    log_pi, log_pi_star = checks.as_tables(log_pi=log_pi, log_pi_star=log_pi_star)
    logits = log_pi.detach().clone().requires_grad_()
    log_policy = torch.log_softmax(logits, -1)
    automatic = [
        torch.autograd.grad(divergence.sum(), logits, retain_graph=True)[0]
        for divergence in (kl_divergence(log_policy, log_pi_star), kl_divergence(log_pi_star, log_policy))
    ]
    pi, d = log_pi.exp(), log_pi - log_pi_star
    closed = [pi * (d - (pi * d).sum(-1, keepdim=True)), pi - log_pi_star.exp()]
    return Theorem(torch.stack(automatic), torch.stack(closed), ("the parameters are the logits of a full table",))


def _bias_rate(
    policy: Policy,
    loss: Callable[..., Tensor],
    limit: Callable[..., Tensor],
    coefficient: Callable[..., Tensor],
    *,
    k: int,
    betas: dict[str, float | int],
) -> Theorem:
    """Extrapolated K * bias against the coefficient, of the value and of the gradient."""

    def value_and_gradient(value: Tensor) -> Tensor:
        return torch.cat([value.detach().reshape(1), parameter_gradient(value, policy)])

    def scaled_bias(n_candidates: int) -> Tensor:
        bias = loss(policy.log_probs(), n_candidates, **betas) - limit(policy.log_probs(), **betas)
        return n_candidates * value_and_gradient(bias.mean())

    return Theorem(
        2 * scaled_bias(2 * k) - scaled_bias(k),
        value_and_gradient(coefficient(policy.log_probs(), **betas).mean()),
        ("K is large: the sides differ by O(1/K^2)", "candidates come from the reference"),
    )


def _loss_gradient(
    loss: Callable[..., Tensor], log_ratio: Tensor, rewards: Tensor, beta_pi: float | int, beta_r: float | int
) -> Tensor:
    """Automatic gradient of a listwise loss with respect to the log ratios [B, K]."""
    log_ratio = log_ratio.detach().clone().requires_grad_()
    value = loss(log_ratio, rewards, beta_pi=beta_pi, beta_r=beta_r).sum()
    return torch.autograd.grad(value, log_ratio)[0]
