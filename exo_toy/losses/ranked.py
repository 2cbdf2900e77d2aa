"""Losses on K candidates: Plackett-Luce for rankings, NCA and f-PO for rewards."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from exo_toy import checks, logspace
from exo_toy.losses.listwise import candidate_log_probs, candidate_mask, common_dtype

# Of log p and log q [B, K], normalised over the candidates that count and -inf elsewhere, to [B].
Divergence = Callable[[Tensor, Tensor], Tensor]


def plackett_luce_loss(
    log_ratio: Float[Tensor, "B K"],
    *,
    beta: float | int,
    mask: Bool[Tensor, "B K"] | None = None,
) -> Float[Tensor, " B"]:
    r"""DPO for rankings: the Plackett-Luce likelihood of candidates given best first.

    .. math::
        -\sum_{k=1}^{K-1} \log \frac{e^{\beta a_k}}{\sum_{j \ge k} e^{\beta a_j}}, \quad
        a = \log\tfrac{\pi_\theta(y)}{\pi_{ref}(y)}

    With two candidates it is DPO. Tabular optimum: pi* if rankings are Plackett-Luce with the reward.

    Source: Rafailov et al., arXiv:2305.18290, Eq. 20 (appendix A.3); derived again from its Eq. 18, the model.

    Args:
        log_ratio: [B, K], log policy minus log reference of each candidate, the best one first, in nats; finite or
            -inf, the latter for at most one candidate of each row.
        beta: above 0; multiplies the log ratios.
        mask: [B, K] bool, True for the candidates that count. What a masked entry holds, NaN included, changes
            nothing and gets zero gradient.

    Returns:
        [B] in [0, inf], log K! where policy and reference agree, in the argument's dtype (half types are computed in
        float32). 0 for a row with one unmasked candidate. A constant added to a row changes nothing.

    Raises:
        ValueError: a wrong shape, dtype or beta; K below 2; a row without a candidate; NaN or +inf that is not masked;
            a row with two candidates of -inf.

    Example:
        >>> plackett_luce_loss(torch.zeros(1, 3), beta=0.1)
        tensor([1.7918])
    """
    checks.require_floating(log_ratio=log_ratio)
    compute_dtype = torch.promote_types(log_ratio.dtype, torch.float32)
    checks.require_temperature(compute_dtype, beta=beta)
    mask = candidate_mask(log_ratio, mask)
    _check_ranking(log_ratio.detach(), mask)
    largest = log_ratio.detach().masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    f = (beta * (log_ratio.to(compute_dtype) - largest)).masked_fill(~mask, 0.0)
    # Row k of [B, K, K]: candidate k and those that are ranked below it.
    remaining = torch.ones_like(f, dtype=torch.bool).unsqueeze(-2).expand(*f.shape, f.shape[-1]).triu()
    remaining = remaining & mask.unsqueeze(-2)
    contested = mask & (remaining.sum(-1) > 1)
    log_p = logspace.log_softmax(f.unsqueeze(-2).expand(remaining.shape), remaining | ~contested.unsqueeze(-1))
    return -log_p.diagonal(dim1=-2, dim2=-1).masked_fill(~contested, 0.0).sum(-1).to(log_ratio.dtype)


def nca_rw_loss(
    log_ratio: Float[Tensor, "B K"],
    rewards: Float[Tensor, "B K"],
    *,
    beta_pi: float | int,
    beta_r: float | int,
    mask: Bool[Tensor, "B K"] | None = None,
) -> Float[Tensor, " B"]:
    r"""Noise contrastive alignment with rewards: each candidate classified as wanted or as noise.

    .. math::
        -\sum_i p_r(i) \log\sigma(\beta_\pi a_i) - \frac1K \sum_i \log\sigma(-\beta_\pi a_i), \quad
        a = \log\tfrac{\pi_\theta}{\pi_{ref}}, \quad p_r = \mathrm{softmax}(r / \beta_r)

    Tabular optimum, with candidates drawn from the reference and as K grows: :math:`\beta_\pi a = r/\beta_r - \log
    Z_{\beta_r}`, which is pi* of beta_r if beta_pi = 1; otherwise the nearest normalised policy in this loss.

    Source: Chen et al., arXiv:2402.05369, the NCA loss of Table 1; compared with the authors' code,
    thu-ml/Noise-Contrastive-Alignment reward_trainer.py, where beta_r is temperature_alpha (the inverse of the paper's
    alpha, it says) and 0.01 is added to the first reward.

    Args:
        log_ratio: [B, K], log policy minus log reference of each candidate, summed over its tokens, in nats;
            finite, or -inf where the policy gives it probability zero.
        rewards: [B, K], finite, or -inf for a forbidden candidate.
        beta_pi: policy temperature, above 0; multiplies the log ratio.
        beta_r: reward temperature, above 0; divides the reward.
        mask: [B, K] bool, True for the candidates that count, K of the formula being their number. What a masked entry
            holds, NaN included, changes nothing and gets zero gradient.

    Returns:
        [B] in [0, inf], 2 log 2 where policy and reference agree, in the arguments' dtype (half types are computed in
        float32). A constant added to the rewards of a row changes nothing, one added to its log ratios does.

    Raises:
        ValueError: a wrong shape, dtype or temperature; K below 2; a row without a candidate; NaN or +inf that is not
            masked; a row whose log ratios or rewards are all -inf.

    Example:
        >>> nca_rw_loss(torch.zeros(1, 3), torch.zeros(1, 3), beta_pi=0.1, beta_r=1.0)
        tensor([1.3863])
    """
    _, log_p_r = candidate_log_probs(log_ratio, rewards, beta_pi, beta_r, mask, None)
    mask = candidate_mask(log_ratio, mask)
    f = beta_pi * log_ratio.to(log_p_r.dtype).masked_fill(~mask, 0.0)
    noise = logsigmoid(-f).masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)
    return (logspace.expectation(log_p_r, -logsigmoid(f)) - noise).to(common_dtype(log_ratio, rewards, None))


def fpo_loss(
    log_ratio: Float[Tensor, "B K"],
    rewards: Float[Tensor, "B K"],
    *,
    divergence: Divergence,
    beta_pi: float | int,
    beta_r: float | int,
    mask: Bool[Tensor, "B K"] | None = None,
    log_weights: Float[Tensor, "B K"] | None = None,
) -> Float[Tensor, " B"]:
    r"""f-PO: probability matching on K candidates by any divergence.

    .. math::
        D(p_f, p_r), \quad p_f = \mathrm{softmax}(\beta_\pi \log\tfrac{\pi_\theta}{\pi_{ref}}),
        \quad p_r = \mathrm{softmax}(r / \beta_r)

    KL(p_f || p_r) is :func:`exo_rw_loss`, KL(p_r || p_f) :func:`dpo_rw_loss` less an entropy, Amari's family
    :func:`alpha_rw_loss`, all of which know more of infinities than a divergence given here may. Tabular optimum: pi*
    at beta = beta_r beta_pi, for every divergence that is 0 for equal arguments alone.

    Source: Han et al., arXiv:2410.21662, the objective of f-PO; compared with the authors' code, MinkaiXu/fPO
    src/align_stage/loss.py: their js is :func:`jensen_shannon` with log p_r held at -10 or above, their alpha is
    1 - alpha of :func:`alpha_rw_loss`. Equation number not checked.

    Args:
        log_ratio: [B, K], log policy minus log reference of each candidate, summed over its tokens, in nats;
            finite, or -inf where the policy gives it probability zero.
        rewards: [B, K], finite, or -inf for a forbidden candidate.
        divergence: of log p_f and log p_r [B, K], normalised, -inf for what is masked, to [B]:
            :func:`jensen_shannon`, or one's own.
        beta_pi: policy temperature, above 0; multiplies the log ratio.
        beta_r: reward temperature, above 0; divides the reward.
        mask: [B, K] bool, True for the candidates that count. What a masked entry holds, NaN included, changes
            nothing and gets zero gradient.
        log_weights: [B, K], log reference minus log proposal of each candidate, in nats, as for :func:`exo_rw_loss`.

    Returns:
        [B] in the arguments' dtype (half types are computed in float32). A constant added to a row of either argument
        changes nothing.

    Raises:
        ValueError: a wrong shape, dtype or temperature; K below 2; a row without a candidate; NaN or +inf that is not
            masked; a row whose log ratios, rewards or log weights are all -inf.

    Example:
        >>> log_ratio, rewards = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 1.0]])
        >>> fpo_loss(log_ratio, rewards, divergence=jensen_shannon, beta_pi=0.5, beta_r=1.0)
        tensor([0.])
    """
    log_p_f, log_p_r = candidate_log_probs(log_ratio, rewards, beta_pi, beta_r, mask, log_weights)
    return divergence(log_p_f, log_p_r).to(common_dtype(log_ratio, rewards, log_weights))


def jensen_shannon(log_p: Float[Tensor, "B K"], log_q: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    r"""Jensen-Shannon divergence for :func:`fpo_loss`, in the tables' dtype.

    .. math:: \tfrac12 \mathrm{KL}(p \| m) + \tfrac12 \mathrm{KL}(q \| m), \quad m = \tfrac12 (p + q)

    Args:
        log_p: [B, K], normalised; -inf for zero.
        log_q: [B, K], normalised; -inf for zero.

    Returns:
        [B] in [0, log 2], up to rounding.

    Example:
        >>> jensen_shannon(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]]))
        tensor([0.6931])
    """
    log_m = logspace.logaddexp(log_p, log_q) - math.log(2)
    return (logspace.expectation(log_p, _minus(log_p, log_m)) + logspace.expectation(log_q, _minus(log_q, log_m))) / 2


def _minus(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p - log q where p is positive, elsewhere 0 without a gradient."""
    zero = log_p == -torch.inf
    return log_p.masked_fill(zero, 0.0) - log_q.masked_fill(zero, 0.0)


def _check_ranking(log_ratio: Tensor, mask: Tensor) -> None:
    """A candidate in each row, no NaN, no +inf, and no two candidates of probability zero."""
    bad, empty = mask & ~(log_ratio < torch.inf), ~mask.any(-1)
    lost = (mask & (log_ratio == -torch.inf)).sum(-1) > 1
    row = checks.first_bad
    checks.require_values(
        [log_ratio, mask],
        (empty, lambda: f"mask must keep at least one candidate per row; got all {row(~empty, empty)}"),
        (bad, lambda: f"log_ratio must be finite or -inf where unmasked; got {row(log_ratio, bad)}"),
        (
            lost,
            lambda: (
                "log_ratio must be above -inf for all but one candidate of each row; "
                f"got two of -inf in row {lost.nonzero()[0].item()}"
            ),
        ),
    )
