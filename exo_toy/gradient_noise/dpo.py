"""Noise of the gradient of DPO-rw on K candidates."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from exo_toy.gradient_noise.candidates import STEP, drawn_candidates, log_transform, power
from exo_toy.gradient_noise.noise import Noise, require_counts

# With t = exp(u - exp(-u)) the integrands fall doubly exponentially at both ends: beyond these, less than float64
# resolves. At STEP the rule errs by less than 1e-15, relative, also on t^2 exp(-t) du.
BELOW, ABOVE = 3.75, 3.75
# Log of what is left of M^(K-2), beside at most K^2, at the last node.
NEGLIGIBLE = -60.0
# Log weights spread over more nats than this are refused: the cost grows with its square.
MOST_SPREAD = 1e3
# Pairs of nodes evaluated at once.
PAIRS_AT_ONCE = 2**18


def dpo_rw_noise(
    scores: Float[Tensor, "N P"],
    log_pi: Float[Tensor, " N"],
    log_ref: Float[Tensor, " N"],
    reward: Float[Tensor, " N"],
    *,
    k: int,
    beta_pi: float | int,
    beta_r: float | int,
    log_proposal: Float[Tensor, " N"] | None = None,
) -> Noise:
    """Mean and noise of the gradient of DPO-rw on K candidates: :func:`dpo_rw_noises` at one K.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).double().log()
        >>> scores, reward = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]), torch.tensor([0.0, math.log(3)])
        >>> dpo_rw_noise(scores, uniform, uniform, reward, k=2, beta_pi=1, beta_r=1).mean
        tensor([ 0.1250, -0.1250], dtype=torch.float64)
    """
    betas = {"beta_pi": beta_pi, "beta_r": beta_r}
    (noise,) = dpo_rw_noises(scores, log_pi, log_ref, reward, ks=(k,), log_proposal=log_proposal, **betas)
    return noise


def dpo_rw_noises(
    scores: Float[Tensor, "N P"],
    log_pi: Float[Tensor, " N"],
    log_ref: Float[Tensor, " N"],
    reward: Float[Tensor, " N"],
    *,
    ks: Sequence[int],
    beta_pi: float | int,
    beta_r: float | int,
    log_proposal: Float[Tensor, " N"] | None = None,
) -> list[Noise]:
    r"""Mean and noise of the gradient of :func:`exo_toy.losses.dpo_rw_loss`, exact at any number of candidates.

    With :math:`w = (\pi/\pi_{ref})^{\beta_\pi} \pi_{ref}/\mu`, :math:`v = e^{r/\beta_r} \pi_{ref}/\mu` and
    :math:`S^w, S^v` their sums over K candidates drawn from :math:`\mu`, by default the reference, the gradient is

    .. math:: g = \beta_\pi \sum_i \Big(\frac{w_i}{S^w} - \frac{v_i}{S^v}\Big) s_i

    In :math:`\|g\|^2` products of two w stand over :math:`(S^w)^2` and those of two v over :math:`(S^v)^2`: a
    one-dimensional integral each. Products of a w and a v stand over :math:`S^w S^v`, an integral in two variables,

    .. math:: \frac{1}{S^w S^v} = \int_0^\infty \!\! \int_0^\infty e^{-t S^w - t' S^v} \, dt \, dt', \quad
        M(t, t') = E[e^{-t w - t' v}]

    whose kernel is a product, so that moments at all pairs of nodes are products of matrices [m, N] and [N, m']. Only
    :math:`E[w e^{-tw-t'v} s] \cdot E[v e^{-tw-t'v} s]` needs vectors at every pair, of min(N, P) numbers, as no inner
    product of scores depends on more: 2 m m' N min(N, P) multiplications, where m and m' are about 45 plus five times
    the spread of the log weights plus the logarithm of the largest over the smallest K. On one core that is a second
    for N = 600 and as many parameters, some seconds for N = 2000 with 500. Memory is a few times (m + m' + P) N
    numbers.

    What is left of the second moment when :math:`\|E g\|^2` is taken off has an absolute error of about 1e-14 times
    :math:`\beta_\pi^2 \max\|s\|^2`.

    Source: the loss is Ji et al., arXiv:2402.00856v4, section 3; its noise is not in the paper.

    Args:
        scores: [N, P] gradients of log pi.
        log_pi: [N] log-probabilities of the policy, finite where the reference is positive; a constant added to them
            changes nothing.
        log_ref: [N] normalised log-probabilities of the reference.
        reward: [N], finite where the reference is positive.
        ks: numbers of candidates, each at least 1.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.
        log_proposal: [N] normalised log-probabilities of what the candidates are drawn from, finite where the reference
            is positive and -inf elsewhere; the reference unless given.

    Returns:
        Noise of K candidates together, for each K; zero at K = 1, up to rounding.

    Raises:
        ValueError: as :func:`exo_toy.gradient_noise.exo_rw_noises`, beyond a spread of 1e3 nats already.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).double().log()
        >>> scores, reward = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]), torch.tensor([1.0, 3.0]).double().log()
        >>> noises = dpo_rw_noises(scores, uniform, uniform, reward, ks=(2, 3), beta_pi=1, beta_r=1)
        >>> [round(noise.to_signal().item(), 12) for noise in noises]
        [1.0, 0.37037037037]
    """
    require_counts(ks, at_least=1)
    drawn = drawn_candidates(scores, log_pi, log_ref, reward, beta_pi, beta_r, log_proposal, MOST_SPREAD)
    p = drawn.p
    policy, target = (_kernels(log_w + drawn.correction, p, ks) for log_w in (drawn.f, drawn.scaled_reward))
    # No constant in the scores is seen, and no inner product of centred scores needs more than N numbers of each.
    scores = drawn.scores - p @ drawn.scores
    short = torch.linalg.qr(scores.mT, mode="r").R.mT if scores.shape[1] > scores.shape[0] else scores
    norms = short.square().sum(-1)

    own = [_own_moments(kernels, p, short, norms) for kernels in (policy, target)]
    seconds = [own[0].second(k) + own[1].second(k) for k in ks]
    for cross in _cross_moments(policy, target, p, short, norms):
        seconds = [second - 2 * cross.second(k) for k, second in zip(ks, seconds, strict=True)]
    means = [(policy.share(p, k) - target.share(p, k)) @ scores for k in ks]
    return [
        Noise(beta_pi * mean, beta_pi**2 * (second - mean.square().sum()))
        for mean, second in zip(means, seconds, strict=True)
    ]


class _Kernels(NamedTuple):
    """Kernels of weights w at nodes t, and the trapezoidal rule for integrals over dt / t.

    Attributes:
        x: [m, N] t w.
        kernel: [m, N] e^-x.
        deviation: [m, N] e^-x - 1.
        rule: [m] weights of the nodes.
    """

    x: Tensor
    kernel: Tensor
    deviation: Tensor
    rule: Tensor

    def log_m(self, p: Tensor) -> Tensor:
        """[m] log M, M = E[e^-x]."""
        return log_transform(self.deviation @ p, self.kernel @ p)

    def share(self, p: Tensor, k: int) -> Tensor:
        """[N] factors of g(y) in the expectation of sum_i w_i g_i / S over K candidates."""
        return k * p * ((self.rule * power(self.log_m(p), k - 1)) @ (self.x * self.kernel))


class _Moments(NamedTuple):
    """Moments at nodes, or pairs of nodes, of which the second moment of g is made.

    Attributes:
        log_m: log of the Laplace transform.
        rule: weights of the nodes.
        same: E[|s|^2 ...] of one candidate with itself.
        two: E[... s] . E[... s] of two candidates.
    """

    log_m: Tensor
    rule: Tensor
    same: Tensor
    two: Tensor

    def second(self, k: int) -> Tensor:
        """A scalar: the sum over pairs of K candidates."""
        # A product of two large integers is no number that torch takes.
        pairs = float(k * (k - 1))
        others = k * self.same * power(self.log_m, k - 1) + pairs * self.two * power(self.log_m, k - 2)
        return (self.rule * others).sum()


def _kernels(log_w: Tensor, p: Tensor, ks: Sequence[int]) -> _Kernels:
    """At as many nodes as sums of any of these numbers of weights need."""
    log_w = log_w - log_w.max()
    first = math.floor(-BELOW / STEP)
    last = math.ceil((ABOVE + math.log(max(ks) / min(ks)) - log_w.min().item()) / STEP)
    nodes = STEP * torch.arange(first, last + 1, dtype=log_w.dtype, device=log_w.device)
    log_t = nodes - torch.exp(-nodes) - math.log(max(ks))
    # Sums of logarithms do not overflow; beyond exp(7) every kernel is zero.
    x = (log_t.unsqueeze(-1) + log_w).clamp_(max=7).exp_()
    kernels = _Kernels(x, torch.exp(-x), torch.expm1(-x), STEP * (1 + torch.exp(-nodes)))
    needed = int(((min(ks) - 2) * kernels.log_m(p) >= NEGLIGIBLE - 2 * math.log(max(ks))).sum())
    return _Kernels(*(part[: needed + 1] for part in kernels))


def _own_moments(kernels: _Kernels, p: Tensor, scores: Tensor, norms: Tensor) -> _Moments:
    """Of two weights of one kind, over the square of their sum: 1 / S^2 is the integral of t e^(-tS)."""
    weighted = kernels.x * kernels.kernel * p
    return _Moments(
        log_m=kernels.log_m(p),
        rule=kernels.rule,
        same=(kernels.x * weighted) @ norms,
        two=(weighted @ scores).square().sum(-1),
    )


def _cross_moments(policy: _Kernels, target: _Kernels, p: Tensor, scores: Tensor, norms: Tensor) -> Iterator[_Moments]:
    """Of a weight of each kind, over both sums, at pairs [m, m'] of nodes, some m at a time."""
    ye = target.x * target.kernel
    at_once = max(1, PAIRS_AT_ONCE // len(ye))
    for start in range(0, len(policy.x), at_once):
        x, kernel, deviation, rule = (part[start : start + at_once] for part in policy)
        # e^(-a-b) - 1 from e^-a - 1 and e^-b - 1.
        of_pairs = (deviation * p) @ target.deviation.mT + (deviation @ p).unsqueeze(-1) + target.deviation @ p
        xe, pe = x * kernel * p, kernel * p
        two = [(((xe[i] * target.kernel) @ scores) * ((pe[i] * ye) @ scores)).sum(-1) for i in range(len(x))]
        yield _Moments(
            log_m=log_transform(of_pairs, pe @ target.kernel.mT),
            rule=rule.unsqueeze(-1) * target.rule,
            same=(xe * norms) @ ye.mT,
            two=torch.stack(two),
        )
