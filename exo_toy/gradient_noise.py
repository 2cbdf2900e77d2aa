r"""How noisy a sampled gradient is: its exact mean and the trace of its covariance. Nothing is sampled.

A sampled gradient g has mean E g and noise :math:`E\|g - E g\|^2`, the sum of the variances of its entries. On a space
that is enumerated both are exact: of one completion from the policy, as in REINFORCE and PPO; of K completions with
their own mean as a baseline; and of EXO's loss on K candidates from the reference, whose weights are normalised by
their sum. The parameters enter through the scores :math:`s(y) = \nabla \log \pi_\theta(y)`, all in one vector of P
numbers. One prompt at a time; :func:`mean_of_independent` joins prompts. All in float64.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.func import jacrev, vmap

from exo_toy import checks

# The trapezoidal rule errs by 2 |Gamma(4 + 2 pi i / step)| / Gamma(4), relative: below 1e-17 at this step, 5e-13 at
# 1/4. A multiple of a power of two, so that all nodes are exact.
STEP = 0.1875
# The integrands rise as t^2 at least and fall as exp(-t w): beyond these, less than float64 resolves.
BELOW, ABOVE = 20.0, 3.5
# Log of what is left of M^(K-4), beside at most K^4, at the last node.
NEGLIGIBLE = -60.0
LOG_ZERO = -1e4
# Kernels evaluated at once, and samples differentiated at once.
KERNELS_AT_ONCE = 2**18
SAMPLES_AT_ONCE = 256

Baseline = Literal["none", "mean", "best"]


class Noise(NamedTuple):
    """Mean and noise of a sampled gradient.

    Attributes:
        mean: [P] its expectation.
        variance: trace of its covariance, at least 0 up to rounding.
    """

    mean: Tensor
    variance: Tensor

    def to_signal(self) -> Float64[Tensor, ""]:
        """Noise over signal, variance / ||mean||^2: as many independent copies average to a noise like the signal.

        Returns:
            A scalar, at least 0 up to rounding; inf where the mean is zero and the variance is not.

        Example:
            >>> Noise(torch.tensor([3.0, 4.0]).double(), torch.tensor(5.0).double()).to_signal()
            tensor(0.2000, dtype=torch.float64)
        """
        return self.variance / self.mean.square().sum()


def per_sample_gradients(
    function: Callable[..., Tensor], parameters: Mapping[str, Tensor], *samples: Tensor
) -> Float[Tensor, "M *F P"]:
    r"""Gradient of a function of each of M samples with respect to all parameters, in one vector.

    Each sample is evaluated by itself, all of them in parallel: M gradients cost about M times one, where a Jacobian
    of M values computed together would cost M times as much again.

    Args:
        function: of the parameters and of one entry of each of ``samples``; differentiable by ``torch.func``, with a
            value of any shape [*F].
        parameters: by name, as ``dict(policy.named_parameters())``.
        samples: tensors [M, ...].

    Returns:
        [M, *F, P], P the number of parameters, in their order.

    Raises:
        ValueError: no samples, or of different numbers.

    Example:
        >>> square = lambda parameters, x: x * parameters["a"] ** 2
        >>> per_sample_gradients(square, {"a": torch.tensor([3.0])}, torch.tensor([1.0, 2.0])).squeeze()
        tensor([ 6., 12.])
    """
    counts = [len(sample) if sample.ndim else 0 for sample in samples]
    if not counts or min(counts) < 1 or len(set(counts)) > 1:
        raise ValueError(f"samples must be tensors [M, ...] with one M of at least 1; got M {counts}")
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    derivative = vmap(
        jacrev(function), in_dims=(None, *(0 for _ in samples)), chunk_size=SAMPLES_AT_ONCE, randomness="error"
    )
    jacobians: dict[str, Tensor] = derivative(values, *samples)
    return torch.cat([jacobians[name].flatten(jacobians[name].ndim - values[name].ndim) for name in values], -1)


def sample_noise(gradients: Float[Tensor, "N P"], log_p: Float[Tensor, " N"]) -> Noise:
    r"""Mean and noise of the gradient of one completion drawn from p.

    .. math:: E g = \sum_y p(y)\, g(y), \qquad \sum_y p(y)\, \|g(y) - E g\|^2

    Args:
        gradients: [N, P], finite where p > 0 (elsewhere anything).
        log_p: [N] normalised log-probabilities, -inf for zero.

    Returns:
        Noise; for the mean over K independent completions, divide its variance by K.

    Raises:
        ValueError: shapes that do not match, a table that is not normalised, a gradient that is not finite.

    Example:
        >>> sample_noise(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, -torch.inf]))
        Noise(mean=tensor([1.], dtype=torch.float64), variance=tensor(0., dtype=torch.float64))
    """
    (log_p,) = checks.as_tables(log_p=log_p)
    checks.require_log_probabilities(log_p=log_p)
    gradients = _rows("gradients", gradients, log_p)
    p = log_p[log_p > -torch.inf].exp()
    mean = p @ gradients
    return Noise(mean, p @ (gradients - mean).square().sum(-1))


def policy_gradient_noise(
    scores: Float[Tensor, "N P"],
    log_pi: Float[Tensor, " N"],
    log_ref: Float[Tensor, " N"],
    reward: Float[Tensor, " N"],
    *,
    beta: float | int,
    baseline: Baseline,
) -> Noise:
    r"""Mean and noise of the policy gradient of one completion drawn from the policy.

    .. math:: g = (R(y) - b)\, s(y), \quad R = r - \beta \log\frac{\pi}{\pi_{ref}}, \quad
        b \in \Big\{0,\; E_\pi R,\; \frac{E_\pi[R \|s\|^2]}{E_\pi \|s\|^2}\Big\}

    Its mean is the gradient of :math:`J_\beta` for any constant b, as the scores have mean zero; the last b makes its
    noise the least that a constant can.

    Source: Williams, Simple statistical gradient-following algorithms for connectionist reinforcement learning, 1992;
    the best constant is that of Greensmith, Bartlett and Baxter, Variance reduction techniques for gradient estimates
    in reinforcement learning, 2004.

    Args:
        scores: [N, P] gradients of log pi, of mean zero under the policy.
        log_pi: [N] normalised log-probabilities of the policy.
        log_ref: [N] of the reference, finite where the policy is positive.
        reward: [N], finite where the policy is positive.
        beta: strength of the KL penalty, above 0.
        baseline: "none", "mean" or "best", the three values of b.

    Returns:
        Noise; for the mean over K independent completions, divide its variance by K.

    Raises:
        ValueError: shapes that do not match, tables that are not normalised or not finite where they must be, another
            baseline, beta not above 0.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).double().log()
        >>> scores, reward = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]), torch.tensor([0.0, 1.0])
        >>> [policy_gradient_noise(scores, uniform, uniform, reward, beta=1, baseline=b).variance.item()
        ...  for b in ("none", "mean")]
        [0.125, 0.0]
    """
    if baseline not in ("none", "mean", "best"):
        raise ValueError(f'baseline must be "none", "mean" or "best"; got {baseline!r}')
    scores, log_pi, returns = _returns(scores, log_pi, log_ref, reward, beta)
    at = 0.0
    if baseline != "none":
        weight = log_pi.exp() if baseline == "mean" else log_pi.exp() * scores.square().sum(-1)
        # Without any score there is no gradient, whatever the baseline.
        at = ((weight @ returns) / weight.sum()).item() if weight.sum() > 0 else 0.0
    return sample_noise((returns - at).unsqueeze(-1) * scores, log_pi)


def leave_one_out_noise(
    scores: Float[Tensor, "N P"],
    log_pi: Float[Tensor, " N"],
    log_ref: Float[Tensor, " N"],
    reward: Float[Tensor, " N"],
    *,
    beta: float | int,
    k: int,
) -> Noise:
    """Mean and noise of the policy gradient with the others' mean as a baseline: :func:`leave_one_out_noises` at one K.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).double().log()
        >>> scores, reward = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]), torch.tensor([0.0, 1.0])
        >>> leave_one_out_noise(scores, uniform, uniform, reward, beta=1, k=2).variance
        tensor(0.1250, dtype=torch.float64)
    """
    (noise,) = leave_one_out_noises(scores, log_pi, log_ref, reward, beta=beta, ks=(k,))
    return noise


def leave_one_out_noises(
    scores: Float[Tensor, "N P"],
    log_pi: Float[Tensor, " N"],
    log_ref: Float[Tensor, " N"],
    reward: Float[Tensor, " N"],
    *,
    beta: float | int,
    ks: Sequence[int],
) -> list[Noise]:
    r"""Mean and noise of the policy gradient of K completions, each with the mean of the others for a baseline.

    .. math:: g = \frac1K \sum_i \Big(R_i - \frac{1}{K-1} \sum_{j \ne i} R_j\Big) s_i, \qquad
        \frac{E\|\tilde R \tilde s - C\|^2}{K} + \frac{\|C\|^2 + E\tilde R^2\, E\|\tilde s\|^2}{K (K-1)}

    with R as in :func:`policy_gradient_noise`, tildes for deviations from the mean under the policy and
    :math:`C = E[\tilde R \tilde s] = E g`. It is a U-statistic of :math:`(R_i - R_j)(s_i - s_j)/2`, so the noise
    follows from that of this kernel and of its projection.

    Source: Kool, van Hoof and Welling, Buy 4 REINFORCE samples, get a baseline for free, 2019; the noise is by
    Hoeffding's decomposition, not in the paper.

    Args:
        scores: [N, P] gradients of log pi.
        log_pi: [N] normalised log-probabilities of the policy.
        log_ref: [N] of the reference, finite where the policy is positive.
        reward: [N], finite where the policy is positive.
        beta: strength of the KL penalty, above 0.
        ks: numbers of completions, each at least 2.

    Returns:
        Noise of the K completions together, for each K.

    Raises:
        ValueError: as :func:`policy_gradient_noise`; no K, a K below 2.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).double().log()
        >>> scores, reward = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]), torch.tensor([0.0, 1.0])
        >>> [noise.variance.item()
        ...  for noise in leave_one_out_noises(scores, uniform, uniform, reward, beta=1, ks=(2, 5))]
        [0.125, 0.0125]
    """
    _require_counts(ks, at_least=2)
    scores, log_pi, returns = _returns(scores, log_pi, log_ref, reward, beta)
    p = log_pi.exp()
    scores, returns = scores - p @ scores, returns - p @ returns
    single = sample_noise(returns.unsqueeze(-1) * scores, log_pi)
    product = (p @ returns.square()) * (p @ scores.square().sum(-1))
    rest = single.mean.square().sum() + product
    return [Noise(single.mean, single.variance / k + rest / (k * (k - 1))) for k in ks]


def exo_rw_noise(
    scores: Float[Tensor, "N P"],
    log_pi: Float[Tensor, " N"],
    log_ref: Float[Tensor, " N"],
    reward: Float[Tensor, " N"],
    *,
    k: int,
    beta_pi: float | int,
    beta_r: float | int,
) -> Noise:
    """Mean and noise of the gradient of EXO-rw on K candidates: :func:`exo_rw_noises` at one K.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).double().log()
        >>> scores, reward = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]), torch.tensor([0.0, 1.0])
        >>> exo_rw_noise(scores, uniform, uniform, reward, k=2, beta_pi=1, beta_r=1).mean
        tensor([ 0.1250, -0.1250], dtype=torch.float64)
    """
    (noise,) = exo_rw_noises(scores, log_pi, log_ref, reward, ks=(k,), beta_pi=beta_pi, beta_r=beta_r)
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
) -> list[Noise]:
    r"""Mean and noise of the gradient of :func:`exo_toy.losses.exo_rw_loss`, exact at any number of candidates.

    With :math:`w = (\pi/\pi_{ref})^{\beta_\pi}`, :math:`h = \log w - r/\beta_r` and :math:`S = \sum_i w_i` over K
    candidates drawn from the reference, the gradient is

    .. math:: g = \frac{\beta_\pi}{S^2} \sum_{i \ne j} w_i w_j (h_i - h_j)\, s_i

    so :math:`\|g\|^2` is a sum over pairs of pairs (i, j), (k, l), over :math:`S^4`, and
    :math:`S^{-m} = \int_0^\infty t^{m-1} e^{-tS} dt / \Gamma(m)` parts the candidates. In each case of indices that
    coincide, those that stand under a score leave vectors :math:`E[x^a h^b e^{-x} s]`, :math:`x = t w`, those that
    do not leave scalars. As g does not depend on a constant in h, at every t it is the one that makes
    :math:`E[x h e^{-x}]` zero: a lone j or l then leaves nothing but :math:`h_i\, E[x e^{-x}]`.

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

    Returns:
        Noise of K candidates together, for each K; zero at K = 1.

    Raises:
        ValueError: shapes that do not match, a reference that is not normalised, tables not finite where they must be,
            a temperature not above 0, no K, a K below 1.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).double().log()
        >>> scores, reward = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]), torch.tensor([0.0, 1.0])
        >>> noises = exo_rw_noises(scores, uniform, uniform, reward, ks=(2, 4), beta_pi=1, beta_r=1)
        >>> [round(noise.to_signal().item(), 12) for noise in noises]
        [1.0, 0.166666666667]
    """
    checks.require_positive(beta_pi=beta_pi, beta_r=beta_r)
    _require_counts(ks, at_least=1)
    log_pi, log_ref, reward = checks.as_tables(log_pi=log_pi, log_ref=log_ref, reward=reward)
    checks.require_log_probabilities(log_ref=log_ref)
    _require_finite(log_ref, "log_ref", log_pi=log_pi, reward=reward)
    scores = _rows("scores", scores, log_ref)
    inside = log_ref > -torch.inf
    log_pi, log_ref, reward = log_pi[inside], log_ref[inside], reward[inside]
    log_w = beta_pi * (log_pi - log_ref)
    log_w = log_w - log_w.max()
    h = log_w - (reward - reward.max()) / beta_r

    means, seconds = scores.new_zeros(len(ks), scores.shape[1]), scores.new_zeros(len(ks))
    for moments in _at_nodes(log_w, h, log_ref.exp(), scores, ks):
        for row, k in enumerate(ks):
            means[row] += k * (k - 1) * moments.first(k)
            seconds[row] += k * (k - 1) * moments.second(k)
    return [
        Noise(beta_pi * mean, beta_pi**2 * (second - mean.square().sum()))
        for mean, second in zip(means, seconds, strict=True)
    ]


def mean_of_independent(noises: Sequence[Noise]) -> Noise:
    """Noise of the mean of independent gradients, such as those of X prompts: means average, variances add over X^2.

    Args:
        noises: at least one.

    Returns:
        Noise.

    Raises:
        ValueError: none given.

    Example:
        >>> one = Noise(torch.ones(2), torch.tensor(1.0))
        >>> mean_of_independent([one, one])
        Noise(mean=tensor([1., 1.]), variance=tensor(0.5000))
    """
    if not noises:
        raise ValueError("noises must hold at least one; got none")
    means, variances = (torch.stack(parts) for parts in zip(*noises, strict=True))
    return Noise(means.mean(0), variances.mean() / len(noises))


class _Moments(NamedTuple):
    """Moments of x = t w and h under p at some nodes m, h less the constant that makes E[x h e^-x] zero.

    Attributes:
        log_transform: [m] log M, M = E[e^-x].
        x: [m] E[x e^-x].
        xx: [m] E[x^2 e^-x].
        mean, spread: [m] mean and variance of h under x^2 e^-x.
        near, far: [m] E[x^2 e^-x |s|^2 ((h - mean)^2 + spread)], E[x^2 e^-x |s|^2 h^2].
        vectors: [5, m, P] E[f e^-x s] for f = x, x h, x^2, x^2 h, x^2 h^2.
    """

    log_transform: Tensor
    x: Tensor
    xx: Tensor
    mean: Tensor
    spread: Tensor
    near: Tensor
    far: Tensor
    vectors: Tensor

    def first(self, k: int) -> Tensor:
        """[P] E g over beta_pi K (K-1): the candidates i and j, and K - 2 others."""
        return STEP * (self.x * self._others(k - 2)) @ self.vectors[1]

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
        weighted = two * self._others(k - 2) + (k - 2) * three * self._others(k - 3)
        return STEP / 6 * (weighted + (k - 2) * (k - 3) * four * self._others(k - 4)).sum()

    def _others(self, n: int) -> Tensor:
        """[m] M^n, of n further candidates; what has fewer than none of them counts nothing."""
        return torch.exp(max(n, 0) * self.log_transform)


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
        # M - 1 is exact near M = 1, the plain sum far from it; a finite number stands for log 0, times zero others.
        log_transform = torch.where(deviation > -0.5, deviation.log1p(), kernel.sum(-1).log()).clamp(min=LOG_ZERO)
        xe, xxe = x * kernel, x.square() * kernel
        # Where all kernels are zero so are all moments, whatever h is measured from.
        total, square = (weight.sum(-1) for weight in (xe, xxe))
        centred = h - _ratio(xe @ h, total).unsqueeze(-1)
        mean = _ratio((xxe * centred).sum(-1), square)
        squares = (centred - mean.unsqueeze(-1)).square()
        spread = _ratio((xxe * squares).sum(-1), square)
        yield _Moments(
            log_transform=log_transform,
            x=total,
            xx=square,
            mean=mean,
            spread=spread,
            near=(xxe * (squares + spread.unsqueeze(-1))) @ norms,
            far=(xxe * centred.square()) @ norms,
            vectors=torch.stack([xe, xe * centred, xxe, xxe * centred, xxe * centred.square()]) @ scores,
        )
        if (min(ks) - 4) * log_transform[-1].item() < NEGLIGIBLE - 4 * math.log(max(ks)):
            return


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return torch.where(b > 0, a, 0.0) / torch.where(b > 0, b, 1.0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _returns(
    scores: Tensor, log_pi: Tensor, log_ref: Tensor, reward: Tensor, beta: float | int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [n, P], log-probabilities [n] and r - beta log(pi / pi_ref) [n], where the policy is positive."""
    checks.require_positive(beta=beta)
    log_pi, log_ref, reward = checks.as_tables(log_pi=log_pi, log_ref=log_ref, reward=reward)
    checks.require_log_probabilities(log_pi=log_pi, log_ref=log_ref)
    _require_finite(log_pi, "log_pi", log_ref=log_ref, reward=reward)
    scores = _rows("scores", scores, log_pi)
    inside = log_pi > -torch.inf
    log_pi, log_ref, reward = log_pi[inside], log_ref[inside], reward[inside]
    return scores, log_pi, reward - beta * (log_pi - log_ref)


def _require_counts(ks: Sequence[int], *, at_least: int) -> None:
    """At least one K, none below what is allowed."""
    if not ks:
        raise ValueError("ks must hold at least one number of completions; got none")
    for k in ks:
        checks.require_integer("k", k, at_least=at_least)


def _require_finite(log_p: Tensor, where: str, **tables: Tensor) -> None:
    """Each table is finite wherever p is positive."""
    for name, table in tables.items():
        bad = (log_p > -torch.inf) & ~table.isfinite()
        if bad.any():
            raise ValueError(f"{name} must be finite where {where} is; got {checks.first_bad(table, bad)}")


def _rows(name: str, vectors: Tensor, log_p: Tensor) -> Tensor:
    """The rows [n, P] of a table [N, P] where p is positive, in float64, finite."""
    checks.require_floating(**{name: vectors})
    if log_p.ndim != 1 or vectors.ndim != 2 or len(vectors) != len(log_p):
        wanted = "[N, P] with one row for each of the N completions of tables [N]"
        raise ValueError(f"{name} must be {wanted}; got {list(vectors.shape)} for {list(log_p.shape)}")
    inside, rows = log_p > -torch.inf, vectors.to(torch.float64)
    rows = rows if inside.all() else rows[inside]
    # Both extremes are NaN where an entry is, and no table of truth values is made.
    if rows.numel() and not torch.stack(rows.aminmax()).isfinite().all():
        bad = ~rows.isfinite()
        raise ValueError(f"{name} must be finite where p is not zero; got {checks.first_bad(rows, bad)}")
    return rows
