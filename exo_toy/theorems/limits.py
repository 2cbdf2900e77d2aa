"""What the expected gradients of the K-candidate losses tend to, how fast, and where exactly they are already there."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exo_toy import finite_k
from exo_toy.divergences import kl_divergence
from exo_toy.objectives import (
    kl_optimal_to_policy,
    kl_policy_to_optimal,
)
from exo_toy.policies import Policy
from exo_toy.targets import optimal_policy
from exo_toy.theorems.theorem import Theorem, parameter_gradient


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
    betas: dict[str, Any] = {"beta_pi": beta_pi, "beta_r": beta_r}
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
    betas: dict[str, Any] = {"beta_pi": beta_pi, "beta_r": beta_r}
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

    def limit(log_pi: Tensor, **betas: Any) -> Tensor:
        log_pi_star, _ = optimal_policy(log_ref, reward, beta=betas["beta_r"])
        # KL(pi*||ref) - KL(pi*||pi) = E_{pi*}[log pi - log ref]
        return kl_optimal_to_policy(log_pi, log_ref, reward, **betas) - kl_divergence(log_pi_star, log_ref)

    def loss(log_pi: Tensor, k: int, **betas: Any) -> Tensor:
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
        ("K is large, but K times 1e-16 small: the sides differ by O(1/K^2)", "candidates come from the reference"),
    )
