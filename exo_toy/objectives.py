"""What alignment maximises, and the divergences that its losses tend to. Exact, in float64."""

from jaxtyping import Float
from torch import Tensor

from exo_toy import checks
from exo_toy.divergences import kl_divergence
from exo_toy.logspace import expectation
from exo_toy.targets import optimal_policy, tempered_policy


def alignment_objective(
    log_pi: Float[Tensor, "*#X N"],
    log_ref: Float[Tensor, "*#X N"],
    reward: Float[Tensor, "*#X N"],
    *,
    beta: float | int,
) -> Float[Tensor, "*X"]:
    r"""KL-regularised expected reward, the objective of RLHF.

    .. math:: J_\beta(\pi) = E_\pi[r] - \beta \, \mathrm{KL}(\pi \| \pi_{ref})
        = \beta \log Z_\beta - \beta \, \mathrm{KL}(\pi \| \pi^*_\beta)

    Source: Ji et al., arXiv:2402.00856v4, section 2; the identity is Korbak et al., arXiv:2206.00761.

    Args:
        log_pi: [..., N] normalised log-probabilities of the policy.
        log_ref: [..., N] of the reference.
        reward: [..., N], finite, or -inf for a forbidden completion.
        beta: strength of the KL penalty, above 0, in the unit of the reward.

    Returns:
        [...] float64 in [-inf, beta log Z_beta], in the unit of the reward; -inf where the policy has mass on a
        forbidden completion or outside the reference's support.

    Raises:
        ValueError: shapes that do not match, tables that are not normalised, NaN or +inf in the reward, beta not
            above 0.

    Example:
        >>> import torch
        >>> ref = torch.tensor([0.5, 0.5]).log()
        >>> alignment_objective(ref, ref, torch.tensor([0.0, 1.0]), beta=0.1)
        tensor(0.5000, dtype=torch.float64)
    """
    checks.require_positive(beta=beta)
    log_pi, log_ref, reward = checks.as_tables(log_pi=log_pi, log_ref=log_ref, reward=reward)
    checks.require_log_probabilities(log_pi=log_pi, log_ref=log_ref)
    checks.require_rewards(reward)
    return expectation(log_pi, reward) - beta * kl_divergence(log_pi, log_ref)


def generalized_objective(
    log_pi: Float[Tensor, "*#X N"],
    log_ref: Float[Tensor, "*#X N"],
    reward: Float[Tensor, "*#X N"],
    *,
    beta_pi: float | int,
    beta_r: float | int,
) -> Float[Tensor, "*X"]:
    r"""The alignment objective of the tempered policy, with the KL penalty split into two temperatures.

    .. math:: J_{\beta_r}(\pi^{\beta_\pi}) = \beta_r \log Z_{\beta_r}
        - \beta_r \, \mathrm{KL}(\pi^{\beta_\pi} \| \pi^*_{\beta_r})

    Over all policies it is maximal at the optimal policy for beta = beta_r beta_pi, whatever the split.

    Source: Ji et al., arXiv:2402.00856v4, section 3.

    Args:
        log_pi: [..., N] normalised log-probabilities of the policy.
        log_ref: [..., N] of the reference.
        reward: [..., N], finite, or -inf for a forbidden completion.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        [...] float64 in [-inf, beta_r log Z_{beta_r}], in the unit of the reward.

    Raises:
        ValueError: as :func:`alignment_objective` and :func:`exo_toy.targets.tempered_policy`.

    Example:
        >>> import torch
        >>> ref, pi = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.2, 0.8]).log()
        >>> generalized_objective(pi, ref, torch.tensor([0.0, 1.0]), beta_pi=0.5, beta_r=1.0)
        tensor(0.6100, dtype=torch.float64)
    """
    checks.require_positive(beta_pi=beta_pi, beta_r=beta_r)
    tempered = tempered_policy(log_pi, log_ref, beta_pi=beta_pi)
    return alignment_objective(tempered, log_ref, reward, beta=beta_r)


def kl_policy_to_optimal(
    log_pi: Float[Tensor, "*#X N"],
    log_ref: Float[Tensor, "*#X N"],
    reward: Float[Tensor, "*#X N"],
    *,
    beta_pi: float | int,
    beta_r: float | int,
) -> Float[Tensor, "*X"]:
    r"""What the expected EXO-rw loss tends to as the number of candidates grows.

    .. math:: \mathrm{KL}(\pi^{\beta_\pi} \| \pi^*_{\beta_r})

    Source: Ji et al., arXiv:2402.00856v4, section 3.

    Args:
        log_pi: [..., N] normalised log-probabilities of the policy.
        log_ref: [..., N] of the reference.
        reward: [..., N], finite, or -inf for a forbidden completion.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        [...] float64 in [0, inf] up to rounding; 0 at the optimal policy for beta = beta_r beta_pi.

    Raises:
        ValueError: as :func:`exo_toy.targets.optimal_policy` and :func:`exo_toy.targets.tempered_policy`.

    Example:
        >>> import torch
        >>> ref = torch.tensor([0.5, 0.5]).log()
        >>> kl_policy_to_optimal(ref, ref, torch.tensor([0.0, 1.0]), beta_pi=0.5, beta_r=1.0)
        tensor(0.1201, dtype=torch.float64)
    """
    checks.require_positive(beta_pi=beta_pi, beta_r=beta_r)
    log_pi_star, _ = optimal_policy(log_ref, reward, beta=beta_r)
    return kl_divergence(tempered_policy(log_pi, log_ref, beta_pi=beta_pi), log_pi_star)


def kl_optimal_to_policy(
    log_pi: Float[Tensor, "*#X N"],
    log_ref: Float[Tensor, "*#X N"],
    reward: Float[Tensor, "*#X N"],
    *,
    beta_pi: float | int,
    beta_r: float | int,
) -> Float[Tensor, "*X"]:
    r"""What the gradient of the expected DPO-rw loss descends as the number of candidates grows.

    .. math:: \mathrm{KL}(\pi^*_{\beta_r} \| \pi^{\beta_\pi})

    Source: Ji et al., arXiv:2402.00856v4, section 3.

    Args:
        log_pi: [..., N] normalised log-probabilities of the policy.
        log_ref: [..., N] of the reference.
        reward: [..., N], finite, or -inf for a forbidden completion.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.

    Returns:
        [...] float64 in [0, inf] up to rounding; 0 at the optimal policy for beta = beta_r beta_pi.

    Raises:
        ValueError: as :func:`exo_toy.targets.optimal_policy` and :func:`exo_toy.targets.tempered_policy`.

    Example:
        >>> import torch
        >>> ref = torch.tensor([0.5, 0.5]).log()
        >>> kl_optimal_to_policy(ref, ref, torch.tensor([0.0, 1.0]), beta_pi=0.5, beta_r=1.0)
        tensor(0.1109, dtype=torch.float64)
    """
    checks.require_positive(beta_pi=beta_pi, beta_r=beta_r)
    log_pi_star, _ = optimal_policy(log_ref, reward, beta=beta_r)
    return kl_divergence(log_pi_star, tempered_policy(log_pi, log_ref, beta_pi=beta_pi))
