"""Expected K-candidate losses, exact at every K from 1 to 2^30 and beyond, and their 1/K coefficients.

K candidates are drawn i.i.d. from the reference, or from another proposal with their weights corrected; repeats
allowed. Nothing is enumerated over tuples and nothing is sampled: :mod:`exo_toy.laplace` turns each expectation into a
one-dimensional integral. Float64; differentiable any number of times by autograd (not by torch.func) with respect to
the policy, the reference and the proposal (as tables that stay normalised, so from their logits) and the reward. Not in
the paper, whose statements are about K tending to infinity.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from exo_toy import checks, laplace
from exo_toy.logspace import expectation

MOST_SPREAD = 1e5


def expected_exo_rw_loss(
    log_pi: Float[Tensor, "*#X N"],
    log_ref: Float[Tensor, "*#X N"],
    reward: Float[Tensor, "*#X N"],
    *,
    k: int,
    beta_pi: float | int,
    beta_r: float | int,
    log_proposal: Float[Tensor, "*#X N"] | None = None,
) -> Float[Tensor, "*X"]:
    r"""The expectation of :func:`exo_toy.losses.exo_rw_loss` over K candidates drawn from a proposal.

    With :math:`w = (\pi/\pi_{ref})^{\beta_\pi} \pi_{ref}/\mu`, :math:`v = e^{r/\beta_r} \pi_{ref}/\mu`,
    :math:`h = \log w - \log v` and :math:`S^w, S^v` the weights' sums over the candidates,

    .. math:: E\Big[\sum_i \frac{w_i h_i}{S^w}\Big] - E[\log S^w] + E[\log S^v]

    It tends to :math:`\mathrm{KL}(\pi^{\beta_\pi} \| \pi^*_{\beta_r})` as K grows, whatever the proposal
    :math:`\mu`; by default that is the reference, and the weights need no correction.

    Source: the loss is Ji et al., arXiv:2402.00856v4, section 3; its exact expectation at finite K is not in the paper.

    Args:
        log_pi: [..., N] normalised log-probabilities of the policy, finite where the reference is positive.
        log_ref: [..., N] of the reference.
        reward: [..., N], finite where the reference is positive.
        k: number of candidates, at least 1.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.
        log_proposal: [..., N] normalised log-probabilities of what the candidates are drawn from, finite where the
            reference is positive and -inf elsewhere; the reference unless given.

    Returns:
        [...] float64, at least 0, and 0 at K = 1, up to rounding.

    Raises:
        ValueError: shapes that do not match, tables that are not normalised, log_pi or reward not finite where the
            reference is positive, a proposal positive elsewhere than the reference, a temperature not above 0 or so
            extreme that scaled values spread over more than 1e5 nats, k below 1.

    Example:
        >>> log_pi, log_ref = torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        >>> expected_exo_rw_loss(log_pi, log_ref, torch.arange(4.0), k=2, beta_pi=0.5, beta_r=1.0)
        tensor(0.0479, dtype=torch.float64)
    """
    log_w, log_v, log_mu = _log_weights(log_pi, log_ref, reward, k, beta_pi, beta_r, log_proposal)
    log_sum_w, expected_h = laplace.expected_log_sum_and_ratio(log_w, log_w - log_v, log_mu, k=k)
    return expected_h - log_sum_w + laplace.expected_log_sum(log_v, log_mu, k=k)


def expected_dpo_rw_loss(
    log_pi: Float[Tensor, "*#X N"],
    log_ref: Float[Tensor, "*#X N"],
    reward: Float[Tensor, "*#X N"],
    *,
    k: int,
    beta_pi: float | int,
    beta_r: float | int,
    log_proposal: Float[Tensor, "*#X N"] | None = None,
) -> Float[Tensor, "*X"]:
    r"""The expectation of :func:`exo_toy.losses.dpo_rw_loss` over K candidates drawn from a proposal.

    With :math:`w = (\pi/\pi_{ref})^{\beta_\pi} \pi_{ref}/\mu`, :math:`v = e^{r/\beta_r} \pi_{ref}/\mu` and
    :math:`S^w, S^v` their sums over the candidates,

    .. math:: -E\Big[\sum_i \frac{v_i \log w_i}{S^v}\Big] + E[\log S^w]

    Less log K it tends to :math:`-E_{\pi^*_{\beta_r}}[\log \pi^{\beta_\pi} - \log \mu]`, whose gradient is that of
    :math:`\mathrm{KL}(\pi^*_{\beta_r} \| \pi^{\beta_\pi})`, as K grows, whatever the proposal :math:`\mu`; by
    default that is the reference, and the weights need no correction.

    Source: the loss is Ji et al., arXiv:2402.00856v4, section 3; its exact expectation at finite K is not in the paper.

    Args:
        log_pi: [..., N] normalised log-probabilities of the policy, finite where the reference is positive.
        log_ref: [..., N] of the reference.
        reward: [..., N], finite where the reference is positive.
        k: number of candidates, at least 1.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.
        log_proposal: [..., N] normalised log-probabilities of what the candidates are drawn from, finite where the
            reference is positive and -inf elsewhere; the reference unless given.

    Returns:
        [...] float64, at least 0, and 0 at K = 1, up to rounding.

    Raises:
        ValueError: shapes that do not match, tables that are not normalised, log_pi or reward not finite where the
            reference is positive, a proposal positive elsewhere than the reference, a temperature not above 0 or so
            extreme that scaled values spread over more than 1e5 nats, k below 1.

    Example:
        >>> log_pi, log_ref = torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        >>> expected_dpo_rw_loss(log_pi, log_ref, torch.arange(4.0), k=2, beta_pi=0.5, beta_r=1.0)
        tensor(0.5749, dtype=torch.float64)
    """
    log_w, log_v, log_mu = _log_weights(log_pi, log_ref, reward, k, beta_pi, beta_r, log_proposal)
    _, expected_log_w = laplace.expected_log_sum_and_ratio(log_v, log_w, log_mu, k=k)
    return laplace.expected_log_sum(log_w, log_mu, k=k) - expected_log_w


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
        >>> ref = torch.tensor([0.5, 0.5]).log()
        >>> abs(dpo_rw_bias_coefficient(ref, ref, torch.tensor([0.0, 1.0]), beta_pi=0.5, beta_r=1.0).item()) < 1e-15
        True
    """
    log_rho, log_rho_star, log_mu = _log_density_ratios(log_pi, log_ref, reward, beta_pi, beta_r, log_proposal)
    rho_star = log_rho_star.exp()
    mean = expectation(log_mu, rho_star * log_rho).unsqueeze(-1)
    covariance = expectation(log_mu, rho_star * log_rho_star.expm1() * (log_rho - mean))
    return covariance - _variance(log_rho, log_mu) / 2


def _log_weights(
    log_pi: Tensor,
    log_ref: Tensor,
    reward: Tensor,
    k: int,
    beta_pi: float | int,
    beta_r: float | int,
    log_proposal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log w and log v, up to constants and 0 outside the proposal's support, and the proposal."""
    checks.require_integer("k", k, at_least=1)
    log_pi, log_ref, reward, log_mu = _finite_tables(log_pi, log_ref, reward, beta_pi, beta_r, log_proposal)
    outside = log_ref == -torch.inf
    log_ref = log_ref.masked_fill(outside, 0.0)
    log_ratio = log_pi.masked_fill(outside, 0.0) - log_ref
    rewards = reward.masked_fill(outside, 0.0)
    # Neither loss sees a constant added to f or to the reward; taking maxima off before scaling keeps shifts exact.
    log_w = beta_pi * (log_ratio - _max_over(log_ratio, outside))
    log_v = (rewards - _max_over(rewards, outside)) / beta_r
    if log_proposal is not None:
        correction = log_ref - log_mu.masked_fill(outside, 0.0)
        log_w, log_v = log_w + correction, log_v + correction
    _require_spread("beta_pi", "log ratios", beta_pi, log_w, outside)
    _require_spread("beta_r", "rewards", beta_r, log_v, outside)
    return log_w, log_v, log_mu


def _log_density_ratios(
    log_pi: Tensor,
    log_ref: Tensor,
    reward: Tensor,
    beta_pi: float | int,
    beta_r: float | int,
    log_proposal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log of tempered policy / proposal and of optimal policy / proposal, on the proposal's support."""
    *weights, log_mu = _log_weights(log_pi, log_ref, reward, 1, beta_pi, beta_r, log_proposal)
    log_rho, log_rho_star = (log_w - (log_mu + log_w).logsumexp(-1, keepdim=True) for log_w in weights)
    return log_rho, log_rho_star, log_mu


def _finite_tables(
    log_pi: Tensor,
    log_ref: Tensor,
    reward: Tensor,
    beta_pi: float | int,
    beta_r: float | int,
    log_proposal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy, reference, reward and proposal in float64 and one shape, finite wherever the reference is positive."""
    checks.require_positive(beta_pi=beta_pi, beta_r=beta_r)
    given = {"log_pi": log_pi, "log_ref": log_ref, "reward": reward}
    if log_proposal is not None:
        given["log_proposal"] = log_proposal
    tables = dict(zip(given, checks.as_tables(**given), strict=True))
    checks.require_log_probabilities(**{name: table for name, table in tables.items() if name != "reward"})
    log_mu = tables.get("log_proposal", tables["log_ref"])
    log_pi, log_ref, reward, log_mu = torch.broadcast_tensors(*list(tables.values())[:3], log_mu)
    inside = log_ref > -torch.inf
    bad_pi, bad_reward = inside & ~log_pi.isfinite(), inside & ~reward.isfinite()
    missing, beyond = inside & (log_mu == -torch.inf), ~inside & (log_mu > -torch.inf)
    first_bad = checks.first_bad
    checks.require_values(
        [log_pi.detach(), reward.detach(), log_mu.detach()],
        (bad_pi, lambda: f"log_pi must be finite where log_ref is; got {first_bad(log_pi, bad_pi)}"),
        (bad_reward, lambda: f"reward must be finite where log_ref is; got {first_bad(reward, bad_reward)}"),
        (missing, lambda: f"log_proposal must be finite where log_ref is; got {first_bad(log_mu, missing)}"),
        (beyond, lambda: f"log_proposal must be -inf where log_ref is; got {first_bad(log_mu, beyond)}"),
    )
    return log_pi, log_ref, reward, log_mu


def _require_spread(name: str, what: str, beta: float | int, scaled: Tensor, outside: Tensor) -> None:
    """The quadrature needs a node for every quarter of a nat between the largest and the smallest."""
    above = _max_over(scaled, outside) - scaled.detach()
    spread = above.masked_fill(outside, 0.0).max().item()
    if not spread <= MOST_SPREAD:
        raise ValueError(
            f"{name} must leave the {what} spread over at most {MOST_SPREAD:.0e} nats once scaled; "
            f"got {beta!r}, over {spread:.3g} nats"
        )


def _max_over(values: Tensor, outside: Tensor) -> Tensor:
    """Maximum over the reference's support, kept as a last dimension, without gradient."""
    return values.detach().masked_fill(outside, -torch.inf).amax(-1, keepdim=True)


def _variance(log_rho: Tensor, log_p: Tensor) -> Tensor:
    """Variance under p of a density ratio, whose mean is 1."""
    return expectation(log_p, log_rho.expm1() ** 2)
