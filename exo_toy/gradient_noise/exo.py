"""Noise of the gradient of EXO-rw on K candidates."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from exo_toy.gradient_noise.candidates import STEP, drawn_candidates, log_transform, power
from exo_toy.gradient_noise.noise import Noise, require_counts

# The integrands rise as t^2 at least and fall as exp(-t w): beyond these, less than float64 resolves.
BELOW, ABOVE = 20.0, 3.5
# Log of what is left of M^(K-4), beside at most K^4, at the last node.
NEGLIGIBLE = -60.0
# Log weights spread over more nats than this are refused: the cost grows with it.
MOST_SPREAD = 1e4
# Kernels evaluated at once.
KERNELS_AT_ONCE = 2**18


def exo_rw_noise(
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
    """Mean and noise of the gradient of EXO-rw on K candidates: :func:`exo_rw_noises` at one K.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).double().log()
        >>> scores, reward = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]), torch.tensor([0.0, 1.0])
        >>> exo_rw_noise(scores, uniform, uniform, reward, k=2, beta_pi=1, beta_r=1).mean
        tensor([ 0.1250, -0.1250], dtype=torch.float64)
    """
    betas = {"beta_pi": beta_pi, "beta_r": beta_r}
    (noise,) = exo_rw_noises(scores, log_pi, log_ref, reward, ks=(k,), log_proposal=log_proposal, **betas)
    return noise


def exo_rw_noises(
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
    r"""Mean and noise of the gradient of :func:`exo_toy.losses.exo_rw_loss`, exact at any number of candidates.

    With :math:`w = (\pi/\pi_{ref})^{\beta_\pi} \pi_{ref}/\mu`, :math:`h = \log(\pi/\pi_{ref})^{\beta_\pi} - r/\beta_r`
    and :math:`S = \sum_i w_i` over K candidates drawn from :math:`\mu`, by default the reference, the gradient is

    .. math:: g = \frac{\beta_\pi}{S^2} \sum_{i \ne j} w_i w_j (h_i - h_j)\, s_i

    so :math:`\|g\|^2` is a sum over pairs of pairs (i, j), (k, l), over :math:`S^4`, and
    :math:`S^{-m} = \int_0^\infty t^{m-1} e^{-tS} dt / \Gamma(m)` parts the candidates. In each case of indices that
    coincide, those that stand under a score leave vectors :math:`E[x^a h^b e^{-x} s]`, :math:`x = t w`, those that
    do not leave scalars. As g does not depend on a constant in h, at every t it is the one that makes
    :math:`E[x h e^{-x}]` zero: a lone j or l then leaves nothing but :math:`h_i\, E[x e^{-x}]`.

    With the tempered policy for a proposal, :math:`\mu \propto \pi^{\beta_\pi} \pi_{ref}^{1 - \beta_\pi}`, all weights
    are equal, g is the policy gradient with the group's mean for a baseline and its mean is exactly (K-1)/K of the
    gradient of :math:`\mathrm{KL}(\pi^{\beta_\pi} \| \pi^*_{\beta_r})`, wherever the policy is.

    What is left of the second moment when :math:`\|E g\|^2` is taken off has an absolute error of about 1e-14 times
    :math:`\beta_\pi^2 \max\|s\|^2 (\max h - \min h)^2`.

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
        Noise of K candidates together, for each K; zero at K = 1.

    Raises:
        ValueError: shapes that do not match, a reference or proposal that is not normalised, tables not finite where
            they must be, a proposal positive elsewhere than the reference, a temperature not above 0 or so extreme that
            log w or log v is spread over more than 1e4 nats (1e3 for DPO-rw), no K, a K below 1
            or not below 2**53.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).double().log()
        >>> scores, reward = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]), torch.tensor([0.0, 1.0])
        >>> noises = exo_rw_noises(scores, uniform, uniform, reward, ks=(2, 4), beta_pi=1, beta_r=1)
        >>> [round(noise.to_signal().item(), 12) for noise in noises]
        [1.0, 0.166666666667]
    """
    require_counts(ks, at_least=1)
    scores, p, f, scaled_reward, correction = drawn_candidates(
        scores, log_pi, log_ref, reward, beta_pi, beta_r, log_proposal, MOST_SPREAD
    )
    f = f - f.max()
    log_w = f + correction
    log_w = log_w - log_w.max()

    means, seconds = scores.new_zeros(len(ks), scores.shape[1]), scores.new_zeros(len(ks))
    for moments in _at_nodes(log_w, f - scaled_reward, p, scores, ks):
        for row, k in enumerate(ks):
            # A product of two large integers is no number that torch takes.
            pairs = float(k * (k - 1))
            means[row] += pairs * moments.first(k)
            seconds[row] += pairs * moments.second(k)
    return [
        Noise(beta_pi * mean, beta_pi**2 * (second - mean.square().sum()))
        for mean, second in zip(means, seconds, strict=True)
    ]


class _Moments(NamedTuple):
    """Moments of x = t w and h under p at some nodes m, h less the constant that makes E[x h e^-x] zero.

    Attributes:
        log_m: [m] log M, M = E[e^-x].
        x: [m] E[x e^-x].
        xx: [m] E[x^2 e^-x].
        mean, spread: [m] mean and variance of h under x^2 e^-x.
        near, far: [m] E[x^2 e^-x |s|^2 ((h - mean)^2 + spread)], E[x^2 e^-x |s|^2 h^2].
        vectors: [5, m, P] E[f e^-x s] for f = x, x h, x^2, x^2 h, x^2 h^2.
    """

    log_m: Tensor
    x: Tensor
    xx: Tensor
    mean: Tensor
    spread: Tensor
    near: Tensor
    far: Tensor
    vectors: Tensor

    def first(self, k: int) -> Tensor:
        """[P] E g over beta_pi K (K-1): the candidates i and j, and K - 2 others."""
        return STEP * (self.x * power(self.log_m, k - 2)) @ self.vectors[1]

    def second(self, k: int) -> Tensor:
        """E|g|^2 over beta_pi^2 K (K-1), of pairs (i, j) and (k, l)."""
        x, xh, xx, xxh, xxhh = self.vectors
        # Two candidates: i = k and j = l; i = l and j = k.
        two = self.xx * self.near + 2 * (_dot(xxh, xxh) - _dot(xxhh, xx))
        # Three: i = k; j = k or i = l; j = l.
        at_mean = xh - self.mean.unsqueeze(-1) * x
        three = self.x**2 * self.far + 2 * self.x * (_dot(xh, xxh) - _dot(x, xxhh))
        three = three + self.xx * (_dot(at_mean, at_mean) + self.spread * _dot(x, x))
        four = self.x**2 * _dot(xh, xh)
        weighted = two * power(self.log_m, k - 2) + (k - 2) * three * power(self.log_m, k - 3)
        return STEP / 6 * (weighted + float((k - 2) * (k - 3)) * four * power(self.log_m, k - 4)).sum()


def _at_nodes(log_w: Tensor, h: Tensor, p: Tensor, scores: Tensor, ks: Sequence[int]) -> Iterator[_Moments]:
    """Moments at the nodes of the trapezoidal rule in log t, some nodes at a time."""
    norms = scores.square().sum(-1)
    first = math.floor((-math.log(max(ks)) - BELOW) / STEP)
    last = math.ceil((ABOVE - log_w.min().item()) / STEP)
    at_once = max(1, KERNELS_AT_ONCE // len(p))
    for start in range(first, last + 1, at_once):
        nodes = STEP * torch.arange(start, min(start + at_once, last + 1), dtype=p.dtype, device=p.device)
        # Sums of logarithms do not overflow; beyond exp(7) every kernel is zero.
        x = (nodes.unsqueeze(-1) + log_w).clamp_(max=7).exp_()
        kernel = torch.exp(-x) * p
        deviation = torch.expm1(-x) @ p
        log_m = log_transform(deviation, kernel.sum(-1))
        xe, xxe = x * kernel, x.square() * kernel
        # Where all kernels are zero so are all moments, whatever h is measured from.
        total, square = (weight.sum(-1) for weight in (xe, xxe))
        centred = h - _ratio(xe @ h, total).unsqueeze(-1)
        mean = _ratio((xxe * centred).sum(-1), square)
        squares = (centred - mean.unsqueeze(-1)).square()
        spread = _ratio((xxe * squares).sum(-1), square)
        yield _Moments(
            log_m=log_m,
            x=total,
            xx=square,
            mean=mean,
            spread=spread,
            near=(xxe * (squares + spread.unsqueeze(-1))) @ norms,
            far=(xxe * centred.square()) @ norms,
            vectors=torch.stack([xe, xe * centred, xxe, xxe * centred, xxe * centred.square()]) @ scores,
        )
        if (min(ks) - 4) * log_m[-1].item() < NEGLIGIBLE - 4 * math.log(max(ks)):
            return


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return torch.where(b > 0, a, 0.0) / torch.where(b > 0, b, 1.0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
