"""How far the expected EXO-rw and DPO-rw losses are from their limits: coefficients of 1/K."""

from jaxtyping import Float
from torch import Tensor

from exo_toy.finite_k.weights import log_weights
from exo_toy.logspace import expectation


def exo_rw_bias_coefficient(
    log_pi: Float[Tensor, "*#X N"],
    log_ref: Float[Tensor, "*#X N"],
    reward: Float[Tensor, "*#X N"],
    *,
    beta_pi: float | int,
    beta_r: float | int,
    log_proposal: Float[Tensor, "*#X N"] | None = None,
) -> Float[Tensor, "*X"]:
    r"""How far the expected EXO-rw loss is from its limit: the coefficient of 1/K.

    With the density ratios :math:`\rho = \pi^{\beta_\pi}/\mu` and :math:`\rho^* = \pi^*_{\beta_r}/\mu` to the proposal,
    by default the reference, :math:`h = \log\rho - \log\rho^*` and expectations under the proposal,

    .. math:: c = \lim_{K\to\infty} K \big(E[\mathrm{loss}] - \mathrm{KL}(\pi^{\beta_\pi} \| \pi^*_{\beta_r})\big)
        = \tfrac12 \mathrm{Var}\rho - \tfrac12 \mathrm{Var}\rho^* - E\big[\rho(\rho - 1)(h - E[\rho h])\big]

    Its gradient is the 1/K coefficient of the expected gradient.

    Source: the delta method on the expectation of a self-normalised ratio; not in the paper.

    Args:
        log_pi: [..., N] normalised log-probabilities of the policy, finite where the reference is positive.
        log_ref: [..., N] of the reference.
        reward: [..., N], finite where the reference is positive.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.
        log_proposal: [..., N] normalised log-probabilities of what the candidates are drawn from, finite where the
            reference is positive and -inf elsewhere; the reference unless given.

    Returns:
        [...] float64, of either sign.

    Raises:
        ValueError: as :func:`expected_exo_rw_loss`.

    Example:
        >>> import torch
        >>> ref = torch.tensor([0.5, 0.5]).log()
        >>> exo_rw_bias_coefficient(ref, ref, torch.tensor([0.0, 1.0]), beta_pi=0.5, beta_r=1.0)
        tensor(-0.1068, dtype=torch.float64)
    """
    log_rho, log_rho_star, log_mu = _log_density_ratios(log_pi, log_ref, reward, beta_pi, beta_r, log_proposal)
    rho, h = log_rho.exp(), log_rho - log_rho_star
    h_mean = expectation(log_mu, rho * h).unsqueeze(-1)
    covariance = expectation(log_mu, rho * log_rho.expm1() * (h - h_mean))
    return (_variance(log_rho, log_mu) - _variance(log_rho_star, log_mu)) / 2 - covariance


def dpo_rw_bias_coefficient(
    log_pi: Float[Tensor, "*#X N"],
    log_ref: Float[Tensor, "*#X N"],
    reward: Float[Tensor, "*#X N"],
    *,
    beta_pi: float | int,
    beta_r: float | int,
    log_proposal: Float[Tensor, "*#X N"] | None = None,
) -> Float[Tensor, "*X"]:
    r"""How far the expected DPO-rw loss, less log K, is from its limit: the coefficient of 1/K.

    With the density ratios :math:`\rho = \pi^{\beta_\pi}/\mu` and :math:`\rho^* = \pi^*_{\beta_r}/\mu` to the proposal,
    by default the reference, and expectations under the proposal,

    .. math:: c = E\big[\rho^*(\rho^* - 1)(\log\rho - E[\rho^* \log\rho])\big] - \tfrac12 \mathrm{Var}\rho

    Its gradient is the 1/K coefficient of the expected gradient.

    Source: the delta method on the expectation of a self-normalised ratio; not in the paper.

    Args:
        log_pi: [..., N] normalised log-probabilities of the policy, finite where the reference is positive.
        log_ref: [..., N] of the reference.
        reward: [..., N], finite where the reference is positive.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.
        log_proposal: [..., N] normalised log-probabilities of what the candidates are drawn from, finite where the
            reference is positive and -inf elsewhere; the reference unless given.

    Returns:
        [...] float64, of either sign.

    Raises:
        ValueError: as :func:`expected_dpo_rw_loss`.

    Example:
        >>> import torch
        >>> ref = torch.tensor([0.5, 0.5]).log()
        >>> abs(dpo_rw_bias_coefficient(ref, ref, torch.tensor([0.0, 1.0]), beta_pi=0.5, beta_r=1.0).item()) < 1e-15
        True
    """
    log_rho, log_rho_star, log_mu = _log_density_ratios(log_pi, log_ref, reward, beta_pi, beta_r, log_proposal)
    rho_star = log_rho_star.exp()
    mean = expectation(log_mu, rho_star * log_rho).unsqueeze(-1)
    covariance = expectation(log_mu, rho_star * log_rho_star.expm1() * (log_rho - mean))
    return covariance - _variance(log_rho, log_mu) / 2


def _log_density_ratios(
    log_pi: Tensor,
    log_ref: Tensor,
    reward: Tensor,
    beta_pi: float | int,
    beta_r: float | int,
    log_proposal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log of tempered policy / proposal and of optimal policy / proposal, on the proposal's support."""
    *weights, log_mu = log_weights(log_pi, log_ref, reward, 1, beta_pi, beta_r, log_proposal)
    log_rho, log_rho_star = (log_w - (log_mu + log_w).logsumexp(-1, keepdim=True) for log_w in weights)
    return log_rho, log_rho_star, log_mu


def _variance(log_rho: Tensor, log_p: Tensor) -> Tensor:
    """Variance under p of a density ratio, whose mean is 1."""
    return expectation(log_p, log_rho.expm1() ** 2)
