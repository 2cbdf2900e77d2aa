"""Identities of the objective: reward maximisation is KL minimisation, whatever the split of the penalty."""

import torch
from torch import Tensor

from exo_toy import checks
from exo_toy.divergences import kl_divergence
from exo_toy.objectives import (
    alignment_objective,
    generalized_objective,
    kl_policy_to_optimal,
)
from exo_toy.policies import Policy
from exo_toy.targets import optimal_policy, tempered_policy
from exo_toy.theorems.theorem import Theorem, parameter_gradient


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
