"""Expected alpha-divergence losses on K candidates."""

from jaxtyping import Float
from torch import Tensor

from exo_toy import checks, laplace_pairs
from exo_toy.finite_k.weights import log_weights

# The quadrature holds arrays of nodes by nodes, four nodes for every nat between the largest weight and the smallest.
MOST_SPREAD = 1e3


def expected_alpha_rw_loss(
    log_pi: Float[Tensor, "*#X N"],
    log_ref: Float[Tensor, "*#X N"],
    reward: Float[Tensor, "*#X N"],
    *,
    k: int,
    alpha: float | int,
    beta_pi: float | int,
    beta_r: float | int,
    log_proposal: Float[Tensor, "*#X N"] | None = None,
) -> Float[Tensor, "*X"]:
    r"""The expectation of :func:`exo_toy.losses.alpha_rw_loss` over K candidates drawn from a proposal.

    With :math:`w = (\pi/\pi_{ref})^{\beta_\pi} \pi_{ref}/\mu`, :math:`v = e^{r/\beta_r} \pi_{ref}/\mu` and
    :math:`S^w, S^v` their sums over the candidates,

    .. math:: \frac{1 - E\big[\sum_i (w_i/S^w)^\alpha (v_i/S^v)^{1-\alpha}\big]}{\alpha(1-\alpha)}

    It tends to :math:`D_\alpha(\pi^{\beta_\pi} \| \pi^*_{\beta_r})` as K grows, whatever the proposal
    :math:`\mu`; by default that is the reference. At alpha = 1 it is the expected EXO-rw loss, at alpha = 0 the
    expected DPO-rw loss less the expected entropy of its targets.

    Source: not in the paper; the quadrature is that of :mod:`exo_toy.laplace_pairs`.

    Args:
        log_pi: [..., N] normalised log-probabilities of the policy, finite where the reference is positive.
        log_ref: [..., N] of the reference.
        reward: [..., N], finite where the reference is positive.
        k: number of candidates, at least 1.
        alpha: in [-1/2, 3/2].
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.
        log_proposal: [..., N] normalised log-probabilities of what the candidates are drawn from, finite where the
            reference is positive and -inf elsewhere; the reference unless given.

    Returns:
        [...] float64, at least 0, and 0 at K = 1, up to rounding.

    Raises:
        ValueError: alpha outside its range, scaled values spread over more than 1e3 nats, and what
            :func:`expected_exo_rw_loss` refuses.

    Example:
        >>> import torch
        >>> log_pi, log_ref = torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        >>> expected_alpha_rw_loss(log_pi, log_ref, torch.arange(4.0), k=2, alpha=1, beta_pi=0.5, beta_r=1.0)
        tensor(0.0479, dtype=torch.float64)
    """
    low, high = laplace_pairs.ALPHA_RANGE
    checks.require_real("alpha", alpha, allowed=f"in [{low}, {high}]", low=low, high=high + 1e-15, low_allowed=True)
    log_w, log_v, log_mu = log_weights(log_pi, log_ref, reward, k, beta_pi, beta_r, log_proposal, MOST_SPREAD)
    return laplace_pairs.expected_alpha_divergence(log_w, log_v, log_mu, k=k, alpha=alpha)
