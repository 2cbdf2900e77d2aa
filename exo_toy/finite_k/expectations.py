"""Expected EXO-rw and DPO-rw losses."""

from jaxtyping import Float
from torch import Tensor

from exo_toy import laplace
from exo_toy.finite_k.weights import log_weights


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
        >>> import torch
        >>> log_pi, log_ref = torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        >>> expected_exo_rw_loss(log_pi, log_ref, torch.arange(4.0), k=2, beta_pi=0.5, beta_r=1.0)
        tensor(0.0479, dtype=torch.float64)
    """
    log_w, log_v, log_mu = log_weights(log_pi, log_ref, reward, k, beta_pi, beta_r, log_proposal)
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
        >>> import torch
        >>> log_pi, log_ref = torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        >>> expected_dpo_rw_loss(log_pi, log_ref, torch.arange(4.0), k=2, beta_pi=0.5, beta_r=1.0)
        tensor(0.5749, dtype=torch.float64)
    """
    log_w, log_v, log_mu = log_weights(log_pi, log_ref, reward, k, beta_pi, beta_r, log_proposal)
    _, expected_log_w = laplace.expected_log_sum_and_ratio(log_v, log_w, log_mu, k=k)
    return laplace.expected_log_sum(log_w, log_mu, k=k) - expected_log_w
