"""Estimates from samples of the reference, how far to trust them, and what they cost."""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from exo_toy import checks
from exo_toy.logspace import expectation

# Entries of the largest temporary that the resampling and the kernel make.
ELEMENTS_AT_ONCE = 2**21


def snis_density_ratio(log_ratio: Float[Tensor, "*X M"]) -> Float[Tensor, "*X M"]:
    r"""Self-normalised importance-sampling estimate of a density ratio to the reference, at its samples.

    .. math:: \hat\rho(y_i) = \frac{M e^{\ell_i}}{\sum_j e^{\ell_j}}

    With :math:`\ell = \log \pi/\pi_{ref}` it estimates a policy's density ratio; with :math:`\ell = r/\beta` the
    optimal policy's. A constant added to a row changes nothing, so unnormalised policies will do.

    Source: Ji et al., arXiv:2402.00856v4, the visualisation of density ratios.

    Args:
        log_ratio: [..., M], finite or -inf, at M independent samples from the reference.

    Returns:
        [..., M] in [0, M], mean 1 in each row; in the argument's dtype, half types computed in float32.

    Raises:
        ValueError: no sample, NaN or +inf, a row of only -inf.

    Example:
        >>> snis_density_ratio(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor([1.5000, 1.5000, 0.0000])
    """
    _check_samples("log_ratio", log_ratio)
    compute_dtype = torch.promote_types(log_ratio.dtype, torch.float32)
    return (log_ratio.shape[-1] * log_ratio.to(compute_dtype).softmax(-1)).to(log_ratio.dtype)


def effective_sample_size(log_weight: Float[Tensor, "*X M"]) -> Float[Tensor, "*X"]:
    r"""How many equally weighted samples a set of weighted samples is worth.

    .. math:: \frac{(\sum_i w_i)^2}{\sum_i w_i^2}

    Source: Kong, A Note on Importance Sampling using Standardized Weights, 1992. For EXO's candidates w is the density
    ratio of the policy to the reference.

    Args:
        log_weight: [..., M], finite or -inf; a constant added to a row changes nothing.

    Returns:
        [...] in [1, M]; M for equal weights, 1 when one sample has all the weight; in the argument's dtype, half types
        computed in float32.

    Raises:
        ValueError: no sample, NaN or +inf, a row of only -inf.

    Example:
        >>> effective_sample_size(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor(2.)
    """
    _check_samples("log_weight", log_weight)
    compute_dtype = torch.promote_types(log_weight.dtype, torch.float32)
    log_p = torch.log_softmax(log_weight.to(compute_dtype), -1)
    return (-torch.logsumexp(2 * log_p, -1)).exp().to(log_weight.dtype)


class Estimate(NamedTuple):
    r"""What M samples say of a number, and how far to trust them.

    Standard error and bias come from the same samples by the delta method, with the estimator's influence function
    :math:`\psi`. They hold to first order in 1/M and know nothing of completions that were not drawn: where the
    effective sample size is small, they are too small themselves.

    Attributes:
        value: [...] the estimate.
        standard_error: [...] :math:`\sqrt{\sum_i \psi_i^2 / (M (M-1))}`; NaN for one sample, or where the value is
            infinite.
        bias: [...] expectation of the value minus the truth, of order 1/M; not taken off the value.
    """

    value: Tensor
    standard_error: Tensor
    bias: Tensor

    def interval(self, *, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The normal interval around the value; the bias is not taken off, and nothing is cut off at 0.

        Args:
            level: in (0, 1), the coverage as M grows.

        Returns:
            (low [...], high [...]).

        Raises:
            ValueError: level out of range.

        Example:
            >>> Estimate(torch.tensor(1.0), torch.tensor(0.1), torch.tensor(0.0)).interval()
            (tensor(0.8040), tensor(1.1960))
        """
        checks.require_real("level", level, allowed="in (0, 1)", low=0.0, high=1.0)
        half = NormalDist().inv_cdf((1 + level) / 2) * self.standard_error
        return self.value - half, self.value + half


def snis_expectation(log_weight: Float[Tensor, "*X M"], values: Float[Tensor, "*X M"]) -> Estimate:
    r"""Self-normalised estimate of an expectation under a policy, from samples of the reference.

    .. math:: \hat A = \sum_i \hat p_i v_i, \quad \hat p = \mathrm{softmax}(\log w), \quad
        \psi_i = M \hat p_i (v_i - \hat A), \quad \text{bias} = -\tfrac1M \sum_i \hat p_i \psi_i

    Source: Owen, Monte Carlo theory, methods and examples, 2013, section 9.2.

    Args:
        log_weight: [..., M] log policy minus log reference up to a constant per row, finite or -inf, at M independent
            samples from the reference.
        values: [..., M] finite, or -inf.

    Returns:
        Estimate, [...] each, at least float32; value between a row's least and largest, -inf where such a value has
        weight.

    Raises:
        ValueError: no sample, shapes that differ, NaN or +inf, a row of only -inf.

    Example:
        >>> snis_expectation(torch.tensor([0.0, 0.0, -torch.inf]), torch.tensor([1.0, 2.0, 9.0])).value
        tensor(1.5000)
    """
    log_weight, values = _samples(log_weight=log_weight, values=values)
    return _delta_method(log_weight.log_softmax(-1), values)


def snis_log_normalizer(log_weight: Float[Tensor, "*X M"]) -> Estimate:
    r"""Estimate of the logarithm of a mean weight under the reference.

    .. math:: \log \tfrac1M \sum_i w_i, \quad \psi_i = \hat\rho_i - 1, \quad
        \text{bias} = -\tfrac{1}{2M} \big(\tfrac1M \sum_i \hat\rho_i^2 - 1\big)

    with :math:`\hat\rho` of :func:`snis_density_ratio`. For log weights r/beta it estimates log Z_beta. For the log
    ratio of a normalised policy the truth is 0 and the expectation, by Jensen's inequality, at most 0: values above
    tell of samples from elsewhere than the reference.

    Source: Owen, Monte Carlo theory, methods and examples, 2013, section 9.2; the logarithm by the delta method.

    Args:
        log_weight: [..., M], finite or -inf, at M independent samples from the reference.

    Returns:
        Estimate, [...] each, at least float32; value between the largest log weight and that minus log M.

    Raises:
        ValueError: no sample, NaN or +inf, a row of only -inf.

    Example:
        >>> snis_log_normalizer(torch.tensor([1.0, 3.0]).log()).value.exp()
        tensor(2.)
    """
    (log_weight,) = _samples(log_weight=log_weight)
    log_p = log_weight.log_softmax(-1)
    value = log_weight.logsumexp(-1) - math.log(log_weight.shape[-1])
    return _delta_method(log_p, torch.zeros_like(log_p), (1.0, log_p))._replace(value=value)


def snis_kl(log_p_weight: Float[Tensor, "*X M"], log_q_weight: Float[Tensor, "*X M"]) -> Estimate:
    r"""Self-normalised estimate of KL(p||q) of policies known up to constants, from samples of the reference.

    .. math:: \sum_i \hat p_i h_i, \quad h = \log \hat p - \log \hat q, \quad
        \psi_i = M \hat p_i (h_i - \bar h) - M \hat p_i + M \hat q_i

    with the softmax of the log weights for p-hat and q-hat, and the value itself for h-bar. EXO-rw is this estimate
    for beta_pi log_ratio and r/beta_r, DPO-rw the one the other way round plus the entropy of its target. Log weights
    of zero stand for the reference.

    Source: Ji et al., arXiv:2402.00856v4, section 3; the errors are not in the paper.

    Args:
        log_p_weight: [..., M] log p minus log reference up to a constant per row, finite or -inf, at M independent
            samples from the reference.
        log_q_weight: [..., M] the same of q.

    Returns:
        Estimate, [...] each, at least float32; value in [0, inf] up to rounding, 0 where the weights are proportional,
        inf where q gives no weight to a sample to which p does. Where q is the reference it cannot exceed log M.

    Raises:
        ValueError: no sample, shapes that differ, NaN or +inf, a row of only -inf.

    Example:
        >>> snis_kl(torch.tensor([0.0, -torch.inf]), torch.zeros(2)).value
        tensor(0.6931)
    """
    log_p_weight, log_q_weight = _samples(log_p_weight=log_p_weight, log_q_weight=log_q_weight)
    log_p, log_q = log_p_weight.log_softmax(-1), log_q_weight.log_softmax(-1)
    return _delta_method(log_p, log_p - log_q, (-1.0, log_p), (1.0, log_q))


def snis_objective(log_ratio: Float[Tensor, "*X M"], rewards: Float[Tensor, "*X M"], *, beta: float | int) -> Estimate:
    r"""Self-normalised estimate of the alignment objective J, from samples of the reference.

    .. math:: \sum_i \hat p_i v_i, \quad v_i = r_i - \beta \log (M \hat p_i), \quad
        \psi_i = M \hat p_i (v_i - \bar v) + \beta (M \hat p_i - 1)

    It is beta times the estimate of log Z_beta less beta times that of KL(pi||pi*_beta), as J is.

    Source: Ji et al., arXiv:2402.00856v4, section 2; the errors are not in the paper.

    Args:
        log_ratio: [..., M] log policy minus log reference up to a constant per row, finite or -inf, at M independent
            samples from the reference.
        rewards: [..., M], finite, or -inf for a forbidden completion.
        beta: strength of the KL penalty, above 0, in the unit of the reward.

    Returns:
        Estimate, [...] each, at least float32, in the unit of the reward; value at most the largest reward.

    Raises:
        ValueError: no sample, shapes that differ, NaN or +inf, a row of only -inf, beta not above 0.

    Example:
        >>> snis_objective(torch.zeros(2), torch.tensor([0.0, 1.0]), beta=0.1).value
        tensor(0.5000)
    """
    checks.require_positive(beta=beta)
    log_ratio, rewards = _samples(log_ratio=log_ratio, rewards=rewards)
    log_p = log_ratio.log_softmax(-1)
    return _delta_method(log_p, rewards - beta * (log_p + math.log(log_p.shape[-1])), (float(beta), log_p))


def log_density_ratio_over_reward(
    log_weights: Sequence[Float[Tensor, "_ _"]],
    rewards: Sequence[Float[Tensor, "_ _"]],
    grid: Float[Tensor, " G"],
    *,
    bandwidth: float | int,
) -> Estimate:
    r"""Log density ratio of a policy to the reference along the reward, seen through a Gaussian kernel.

    .. math:: \log \frac{\sum_x \sum_i \hat p_{xi} \, k(g - r_{xi})}{\sum_x M_x^{-1} \sum_i k(g - r_{xi})}

    with prompts x, samples i of the reference, the softmax of a prompt's log weights for p-hat and a normal density k.
    Both densities have one bandwidth, so that the ratio tends to that of the smoothed distributions of the reward. The
    errors are those over the samples where there is one prompt, otherwise those over the prompts; the bias then leaves
    out what the weights of each prompt have.

    Source: Ji et al., arXiv:2402.00856v4, the visualisation of density ratios; the errors are not in the paper.

    Args:
        log_weights: tables [X, M], one per number of samples, of log policy minus log reference up to a constant per
            row, finite or -inf.
        rewards: tables [X, M] of the same shapes, finite.
        grid: [G] rewards at which to estimate, finite.
        bandwidth: of the kernel, above 0, in the unit of the reward.

    Returns:
        Estimate, [G] each, float64; value at most log M, NaN where the kernel reaches no sample.

    Raises:
        ValueError: no table, shapes that differ, no sample, NaN or +inf, a row of only -inf, rewards or grid not
            finite, bandwidth not above 0.

    Example:
        >>> weights, rewards = [torch.tensor([[1.0, 1.0]])], [torch.tensor([[0.0, 1.0]])]
        >>> log_density_ratio_over_reward(weights, rewards, torch.tensor([0.5]), bandwidth=0.3).value.abs() < 1e-12
        tensor([True])
    """
    checks.require_positive(bandwidth=bandwidth)
    if not log_weights or len(log_weights) != len(rewards):
        raise ValueError(f"rewards must have a table for each of log_weights; got {len(rewards)}, {len(log_weights)}")
    _require_finite("grid", grid)
    for log_weight, reward in zip(log_weights, rewards, strict=True):
        checks.require_shape("X M", log_weights=log_weight, rewards=reward)
        _check_samples("log_weights", log_weight)
        _require_finite("rewards", reward)
    # In parts and twice over, first for the means: what the kernel makes is many times the samples.
    n_units, means = 0, torch.zeros((), dtype=torch.float64, device=grid.device)
    for part in _smoothed(log_weights, rewards, grid, bandwidth):
        n_units, means = n_units + part.shape[1], means + part.sum(1)
    means = means / n_units
    squares, second = torch.zeros_like(grid, dtype=torch.float64), torch.zeros_like(grid, dtype=torch.float64)
    for part in _smoothed(log_weights, rewards, grid, bandwidth):
        policy, reference, normalizer = part / means.unsqueeze(1)
        squares += (policy - reference - normalizer + 1).square().sum(0)
        second += (reference.square() - policy.square() + normalizer.square() - 1).sum(0)
    standard_error = (squares / (n_units * (n_units - 1))).sqrt() if n_units > 1 else squares * math.nan
    return Estimate((means[0] / means[1]).log(), standard_error, second / (2 * n_units**2))


def bootstrap_mean(
    values: Float[Tensor, "*X N"], *, generator: torch.Generator, level: float = 0.95, n_resamples: int = 1000
) -> tuple[Float[Tensor, "*X"], Float[Tensor, "*X"]]:
    """Percentile bootstrap interval of a mean over independent units, such as prompts.

    It holds what varies from unit to unit, the sampling within each included; not a bias that all share. With few
    units it is too narrow: its variance is (N-1)/N of the unbiased one.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    Args:
        values: [..., N] finite; all rows are resampled alike.
        generator: of the resampling, on the CPU.
        level: in (0, 1), the coverage as N grows.
        n_resamples: at least 2.

    Returns:
        (low [...], high [...]), float64, quantiles of the resampled means.

    Raises:
        ValueError: no unit, values that are not finite, level or n_resamples out of range.

    Example:
        >>> bootstrap_mean(torch.ones(3), generator=torch.Generator().manual_seed(0))
        (tensor(1., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    checks.require_real("level", level, allowed="in (0, 1)", low=0.0, high=1.0)
    checks.require_integer("n_resamples", n_resamples, at_least=2)
    _require_finite("values", values)
    n_units = values.shape[-1]
    # About the mean: the rounding of the sums is then relative to the spread.
    center = values.double().mean(-1, keepdim=True)
    deviations = (values.double() - center).reshape(-1, n_units)
    at_once = max(1, ELEMENTS_AT_ONCE // n_units)
    # Made before the large temporaries: small pieces among them would keep their memory from being used again.
    means = torch.empty(n_resamples, len(deviations), dtype=torch.float64, device=values.device)
    for some in means.split(at_once):
        drawn = torch.randint(n_units, (len(some), n_units), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        counts.scatter_add_(-1, drawn, torch.ones_like(counts))
        some.copy_(counts.to(values.device) @ deviations.T / n_units)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=values.device)
    low, high = means.quantile(tails, 0).reshape(2, *values.shape[:-1]) + center.squeeze(-1)
    return low, high


def _delta_method(log_p: Tensor, values: Tensor, *normalizers: tuple[float, Tensor]) -> Estimate:
    """E_p[values] and the errors of that plus c log E[w] for each pair of c and the log-softmax of a log weight.

    ``values`` hold their own part of the normalisers already.
    """
    n_samples = log_p.shape[-1]
    value = expectation(log_p, values)
    ratio = n_samples * log_p.exp()
    deviation = torch.where(log_p > -math.inf, values - value.unsqueeze(-1), 0.0)
    influence, second = ratio * deviation, -2 * ratio.square() * deviation
    for factor, log_weight in normalizers:
        other = n_samples * log_weight.exp()
        influence, second = influence + factor * (other - 1), second - factor * (other.square() - 1)
    return Estimate(value, _standard_error(influence), second.mean(-1) / (2 * n_samples))


def _standard_error(influence: Tensor) -> Tensor:
    """Of a mean over the last dimension; NaN for a single unit."""
    n_units = influence.shape[-1]
    if n_units == 1:
        return torch.full_like(influence[..., 0], math.nan)
    return (influence.square().sum(-1) / (n_units * (n_units - 1))).sqrt()


def _smoothed(
    log_weights: Sequence[Tensor], rewards: Sequence[Tensor], grid: Tensor, bandwidth: float
) -> Iterator[Tensor]:
    """For parts of the units [3, units, G]: means of the kernel with the ratios, without them, and of the ratios."""
    alone = len(log_weights) == 1 and len(log_weights[0]) == 1
    for log_weight, reward in zip(log_weights, rewards, strict=True):
        ratio = snis_density_ratio(log_weight.double())
        if alone:
            # Each sample is a unit of its own.
            ratio, reward = ratio.T, reward.T
        at_once = max(1, ELEMENTS_AT_ONCE // (ratio.shape[-1] * len(grid)))
        for ratios, some in zip(ratio.split(at_once), reward.double().split(at_once), strict=True):
            kernel = (-((grid.double() - some.unsqueeze(-1)) / bandwidth).square() / 2).exp()
            over = ratios.unsqueeze(-1)
            yield torch.stack([(over * kernel).mean(-2), kernel.mean(-2), over.mean(-2).expand(-1, len(grid))])


def _samples(**tables: Tensor) -> list[Tensor]:
    """Tables of one shape, checked, in their common dtype and at least float32."""
    dtype = torch.float32
    first_name, first = next(iter(tables.items()))
    for name, table in tables.items():
        _check_samples(name, table)
        if table.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape of {first_name}, {list(first.shape)}; got {list(table.shape)} "
                "(nothing is broadcast)"
            )
        dtype = torch.promote_types(dtype, table.dtype)
    return [table.to(dtype) for table in tables.values()]


def _require_finite(name: str, values: Tensor) -> None:
    """At least one entry, all of them finite."""
    checks.require_floating(**{name: values})
    if values.ndim == 0 or values.numel() == 0:
        raise ValueError(f"{name} must have an entry, and at least one dimension; got shape {list(values.shape)}")
    detached = values.detach()
    bad = ~detached.isfinite()
    checks.require_values([detached], (bad, lambda: f"{name} must be finite; got {checks.first_bad(detached, bad)}"))


def _check_samples(name: str, values: Tensor) -> None:
    """At least one sample; no NaN, no +inf; a weight above zero in each row."""
    checks.require_floating(**{name: values})
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., M] with M >= 1 samples; got shape {list(values.shape)}")
    detached = values.detach()
    bad = ~(detached < math.inf)
    none = (detached == -math.inf).all(-1)
    checks.require_values(
        [detached],
        (bad, lambda: f"{name} must be finite or -inf; got {checks.first_bad(detached, bad)}"),
        (none, lambda: f"{name} must be above -inf for a sample of each row; got a row of only -inf"),
    )
