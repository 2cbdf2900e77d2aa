"""What noise is, of one completion and of independent gradients; checks that all of this package shares."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.func import jacrev, vmap

from exo_toy import checks

# Samples differentiated at once.
SAMPLES_AT_ONCE = 256


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
            A scalar, at least 0 up to rounding; inf where the mean is zero and the variance is not, NaN where both are
            zero (as of a loss on one candidate): neither noise nor signal.

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
    gradients = rows_inside("gradients", gradients, log_p)
    p = log_p[log_p > -torch.inf].exp()
    mean = p @ gradients
    return Noise(mean, p @ (gradients - mean).square().sum(-1))


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


def require_counts(ks: Sequence[int], *, at_least: int) -> None:
    """At least one K, none below what is allowed or beyond the integers that float64 tells apart."""
    if not ks:
        raise ValueError("ks must hold at least one number of completions; got none")
    for k in ks:
        checks.require_integer("k", k, at_least=at_least, bits=54)


def require_finite(log_p: Tensor, where: str, **tables: Tensor) -> None:
    """Each table is finite wherever p is positive."""
    for name, table in tables.items():
        bad = (log_p > -torch.inf) & ~table.isfinite()
        if bad.any():
            raise ValueError(f"{name} must be finite where {where} is; got {checks.first_bad(table, bad)}")


def rows_inside(name: str, vectors: Tensor, log_p: Tensor) -> Tensor:
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
