"""Estimates from samples of the reference, and what they cost."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from exo_toy import checks


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
