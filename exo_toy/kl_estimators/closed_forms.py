"""What the expected gradients are: which divergence's, in closed form."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from exo_toy import checks
from exo_toy.divergences import kl_divergence
from exo_toy.kl_estimators.sampled import Estimator, Level, Recipe, Use
from exo_toy.kl_estimators.tables import finite_tables, prefix_log_probs, prefixes, token_log_probs
from exo_toy.logspace import expectation
from exo_toy.spaces import SequenceSpace

Verdict = Literal["right", "the other KL's", "zero", "biased"]

# Sums over some hundred completions err by 1e-14 of the sum of their terms' sizes, and these are within a factor 1e3
# of the gradient's unless the policy is closer to the reference than 1e-6 nats.
TOLERANCE = 1e-10

# Names of the terms of closed forms.
TO_REF, FROM_REF = "KL(π‖π_ref)", "KL(π_ref‖π)"
TO_REF_FIXED, FROM_REF_FIXED = "KL(π‖π_ref), prefixes fixed", "KL(π_ref‖π), prefixes fixed"
SQUARE, SQUARE_BY_TOKEN, SQUARE_UNDER_REF = "E_π[ℓ²/2]", "E_π[Σℓ_t²/2]", "E_ref[ℓ²/2]"
CHI2 = "χ²(π_ref‖π)"
UNDER_POLICY: dict[tuple[Level, Use], dict[Estimator, dict[str, int]]] = {
    ("sequence", "loss"): {"k1": {}, "k2": {TO_REF: 1}, "k3": {FROM_REF: 1}},
    ("sequence", "reward"): {"k1": {TO_REF: 1}, "k2": {SQUARE: 1, TO_REF: -1}, "k3": {TO_REF: 1, FROM_REF: -1}},
    ("sequence", "importance"): {"k1": {TO_REF: 1}, "k2": {SQUARE: 1}, "k3": {TO_REF: 1}},
    ("token", "loss"): {"k1": {}, "k2": {TO_REF_FIXED: 1}, "k3": {FROM_REF_FIXED: 1}},
    ("token", "reward"): {
        "k1": {TO_REF: 1},
        "k2": {SQUARE_BY_TOKEN: 1, TO_REF_FIXED: -1},
        "k3": {TO_REF: 1, FROM_REF_FIXED: -1},
    },
    ("token", "importance"): {"k1": {TO_REF: 1}, "k2": {SQUARE_BY_TOKEN: 1}, "k3": {TO_REF: 1}},
}
# Without weights. A loss is differentiated under a fixed sampler; k1's reward and k2's loss are one.
UNDER_REFERENCE: dict[tuple[Level, Use, Estimator], dict[str, int]] = {
    ("sequence", "loss", "k1"): {FROM_REF: -1},
    ("token", "loss", "k1"): {FROM_REF: -1},
    ("sequence", "loss", "k2"): {SQUARE_UNDER_REF: 1},
    ("sequence", "loss", "k3"): {CHI2: 1, FROM_REF: -1},
    ("sequence", "reward", "k1"): {SQUARE_UNDER_REF: 1},
    ("sequence", "reward", "k3"): {SQUARE_UNDER_REF: 1, CHI2: -1, FROM_REF: 1},
}


class Comparison(NamedTuple):
    """A gradient against those of KL(pi||pi_ref), which a penalty wants, and of KL(pi_ref||pi).

    Attributes:
        verdict: "right", "the other KL's", "zero" or "biased".
        error: distance from the first over its length; 1 for no gradient at all.
        other_error: distance from the second over its length.
        cosine: to the first; NaN for no gradient.
        other_cosine: to the second.
        component: along the first, over its length: 1 if right, 0 if no help, negative if it leads away.
    """

    verdict: Verdict
    error: float
    other_error: float
    cosine: float
    other_cosine: float
    component: float


def compare(gradient: Float[Tensor, " P"], right: Float[Tensor, " P"], other: Float[Tensor, " P"]) -> Comparison:
    """Which of the two true gradients an expected gradient is, within :data:`TOLERANCE` of its length.

    Args:
        gradient: [P] to be judged, finite.
        right: [P] of KL(pi||pi_ref), not zero.
        other: [P] of KL(pi_ref||pi), not zero and not the first.

    Returns:
        Comparison.

    Raises:
        ValueError: a gradient that is not finite; two that cannot be told apart, as where the policy is the reference.

    Example:
        >>> compare(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])).verdict
        "the other KL's"
    """
    gradient, right, other = gradient.double(), right.double(), other.double()
    if not gradient.isfinite().all():
        raise ValueError(f"gradient must be finite; got {checks.first_bad(gradient, ~gradient.isfinite())}")
    lengths = [vector.norm().item() for vector in (right, other, right - other)]
    if not min(lengths) > TOLERANCE * max(lengths):
        raise ValueError(f"right and other must differ from zero and from each other; got lengths {lengths}")
    length, (right_length, other_length, _) = gradient.norm().item(), lengths
    error, other_error = ((gradient - true).norm().item() / true.norm().item() for true in (right, other))
    zero = length <= TOLERANCE * right_length
    return Comparison(
        "zero" if zero else _verdict(error, other_error),
        error,
        other_error,
        math.nan if zero else (gradient @ right).item() / (length * right_length),
        math.nan if zero else (gradient @ other).item() / (length * other_length),
        (gradient @ right).item() / right_length**2,
    )


def _verdict(error: float, other_error: float) -> Verdict:
    if error <= TOLERANCE:
        return "right"
    return "the other KL's" if other_error <= TOLERANCE else "biased"


def closed_form(recipe: Recipe, sampler: Literal["policy", "reference"]) -> dict[str, int] | None:
    """The expected gradient of a recipe, as multiples of the gradients of :func:`divergence_terms`.

    Prefix weights make the expectation under any sampler that under the policy: ask for that. Under the policy a mean
    baseline changes nothing. Without weights, k1 as a loss is minus KL(mu||pi) under any sampler mu.

    Args:
        recipe: what is made of a sampled completion.
        sampler: who draws.

    Returns:
        Multiples by term, empty for a gradient of zero; None where none is known.

    Example:
        >>> closed_form(Recipe("k3", "reward"), "policy")
        {'KL(π‖π_ref)': 1, 'KL(π_ref‖π)': -1}
    """
    frozen = recipe.level == "token" and recipe.weights == "token"
    if frozen and (sampler == "reference" or recipe.use == "importance"):
        return {TO_REF_FIXED: 1} if sampler == "policy" and recipe.estimator != "k2" else None
    if sampler == "reference" and recipe.weights == "none":
        return UNDER_REFERENCE.get((recipe.level, recipe.use, recipe.estimator))
    return UNDER_POLICY[recipe.level, recipe.use][recipe.estimator]


def divergence_terms(
    log_pi: Float[Tensor, " N"], log_ref: Float[Tensor, " N"], space: SequenceSpace
) -> dict[str, Float64[Tensor, ""]]:
    r"""What the expected gradients are made of: differentiable scalars, by the names of :func:`closed_form`.

    "Prefixes fixed" is the sum of the divergences between the distributions of the next token,
    :math:`\sum_t E_{y_{<t} \sim [\pi]} \mathrm{KL}(\pi_t \| \pi_{ref,t})`, the prefixes' own distribution not
    differentiated.

    Args:
        log_pi: [N] normalised log-probabilities of the policy, finite, differentiable.
        log_ref: [N] of the reference, finite.
        space: N completions.

    Returns:
        Scalars in float64; the first two are the divergences themselves.

    Raises:
        ValueError: tables of other sizes, not normalised or not finite.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).log()
        >>> {value.item() for value in divergence_terms(uniform, uniform, SequenceSpace(2, 1)).values()}
        {0.0}
    """
    log_pi, log_ref = finite_tables(space, log_pi=log_pi, log_ref=log_ref)
    by_token = token_log_probs(space, log_pi) - token_log_probs(space, log_ref)
    return {
        TO_REF: kl_divergence(log_pi, log_ref),
        FROM_REF: kl_divergence(log_ref, log_pi),
        TO_REF_FIXED: _kl_with_fixed_prefixes(space, log_pi, log_ref, log_pi.detach()),
        FROM_REF_FIXED: _kl_with_fixed_prefixes(space, log_ref, log_pi, log_pi.detach()),
        SQUARE: expectation(log_pi, (log_pi - log_ref).square() / 2),
        SQUARE_BY_TOKEN: expectation(log_pi, by_token.square().sum(-1) / 2),
        SQUARE_UNDER_REF: expectation(log_ref, (log_pi - log_ref).square() / 2),
        CHI2: expectation(log_ref, torch.expm1(log_ref - log_pi)),
    }


def _kl_with_fixed_prefixes(space: SequenceSpace, log_p: Tensor, log_q: Tensor, log_weight: Tensor) -> Tensor:
    """Sum over positions of the mean, over prefixes of the weights' distribution, of KL(p_t||q_t)."""
    log_ratio = token_log_probs(space, log_p) - token_log_probs(space, log_q)
    total = log_p.new_zeros(())
    for t, prefix in enumerate(prefixes(space).unbind(-1)[:-1]):
        given_prefix = (log_p - prefix_log_probs(space, log_p)[:, t]).exp()
        kl = log_p.new_zeros(len(log_p)).index_add(0, prefix, given_prefix * log_ratio[:, t])
        total = total + log_weight.exp() @ kl[prefix]
    return total
