"""Expectations over all completions of a space, from tables of log-probabilities."""

from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from exo_toy import checks
from exo_toy.kl_estimators.sampled import Recipe, kl_surrogate, terms_of, to_go
from exo_toy.logspace import expectation
from exo_toy.spaces import SequenceSpace

Baseline = Literal["none", "mean"]


def expected_kl_surrogate(
    log_pi: Float[Tensor, " N"],
    log_ref: Float[Tensor, " N"],
    space: SequenceSpace,
    *,
    recipe: Recipe,
    log_sampler: Float[Tensor, " N"] | None = None,
    baseline: Baseline = "none",
) -> Float64[Tensor, ""]:
    r"""The surrogate's mean over the sampler: its gradient is the exact expectation of the sampled gradient.

    .. math:: \nabla \sum_y [\mu(y)]\, \mathrm{surrogate}(y) = E_\mu[\nabla\, \mathrm{surrogate}]

    Args:
        log_pi: [N] normalised log-probabilities of the policy, finite, differentiable.
        log_ref: [N] of the reference, finite.
        space: N completions.
        recipe: what is made of a sampled completion.
        log_sampler: [N] of what draws the completions; None for the policy. Not differentiated.
        baseline: "mean" takes the mean return of each position, weighted as the rewards are, off rewards.

    Returns:
        A scalar in float64, to be differentiated.

    Raises:
        ValueError: tables of other sizes, not normalised or not finite; another baseline, or one without a reward.

    Example:
        >>> space, ref = SequenceSpace(2, 1), torch.tensor([0.5, 0.5]).log()
        >>> logits = torch.tensor([0.0, 1.0], requires_grad=True)
        >>> expected_kl_surrogate(logits.log_softmax(-1), ref, space, recipe=Recipe("k1", "loss")).backward()
        >>> bool(logits.grad.abs().max() < 1e-7)
        True
    """
    log_pi, log_ref, log_sampler = _tables(space, log_pi, log_ref, log_sampler)
    policy_logps, arguments = _arguments(space, log_pi, log_ref, log_sampler, recipe, baseline)
    return expectation(log_sampler, kl_surrogate(policy_logps, **arguments))


def score_coefficients(
    log_pi: Float[Tensor, " N"],
    log_ref: Float[Tensor, " N"],
    space: SequenceSpace,
    *,
    recipe: Recipe,
    log_sampler: Float[Tensor, " N"] | None = None,
    baseline: Baseline = "none",
) -> Float64[Tensor, "N T"]:
    r"""The gradient of every completion as a sum of its tokens' scores, :math:`g(y) = \sum_t c_t(y)\, s_t(y)`.

    With the scores [N, T, P] of the tokens it gives the sampled gradients of all completions, and hence their noise.

    Args:
        log_pi: as in :func:`expected_kl_surrogate`, as all that follows.
        log_ref: [N].
        space: N completions.
        recipe: what is made of a sampled completion.
        log_sampler: [N] or None.
        baseline: "none" or "mean".

    Returns:
        [N, T] float64, 0 after a completion's end.

    Raises:
        ValueError: as :func:`expected_kl_surrogate`.

    Example:
        >>> pi, ref = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log()
        >>> score_coefficients(pi, ref, SequenceSpace(2, 1), recipe=Recipe("k2", "loss")).squeeze()
        tensor([-0.4700,  0.9163], dtype=torch.float64)
    """
    log_pi, log_ref, log_sampler = _tables(space, log_pi, log_ref, log_sampler)
    policy_logps, arguments = _arguments(space, log_pi.detach(), log_ref, log_sampler, recipe, baseline)
    with torch.enable_grad():
        policy_logps = policy_logps.requires_grad_()
        (coefficients,) = torch.autograd.grad(kl_surrogate(policy_logps, **arguments).sum(), policy_logps)
    return coefficients


def token_log_probs(space: SequenceSpace, log_p: Float[Tensor, " N"]) -> Float64[Tensor, "N T"]:
    r"""Log-probability of each token given those before it, from the table of all completions; differentiable.

    Args:
        space: N completions.
        log_p: [N] normalised log-probabilities, finite.

    Returns:
        [N, T] float64 in nats, 0 after a completion's end; rows add up to ``log_p``.

    Raises:
        ValueError: a table of another size, not normalised or not finite.

    Example:
        >>> token_log_probs(SequenceSpace(2, 2), torch.tensor([0.1, 0.1, 0.2, 0.6]).log()).exp()[3]
        tensor([0.8000, 0.7500], dtype=torch.float64)
    """
    (log_p,) = finite_tables(space, log_p=log_p)
    steps = prefix_log_probs(space, log_p).diff(dim=-1)
    return torch.where(space.counted(space.tokens()).to(log_p.device), steps, 0.0)


@lru_cache(maxsize=8)
def prefixes(space: SequenceSpace) -> Tensor:
    """[N, T + 1]: completions with the same first t tokens have the same number in column t."""
    tokens = space.tokens()
    columns = [torch.unique(tokens[:, :t], dim=0, return_inverse=True)[1] for t in range(1, space.length + 1)]
    return torch.stack([torch.zeros(len(tokens), dtype=torch.int64), *columns], -1)


def prefix_log_probs(space: SequenceSpace, log_p: Tensor) -> Tensor:
    """[N, T + 1]: log-probability of the first t tokens of every completion."""
    columns = [torch.zeros_like(log_p)]
    for prefix in prefixes(space).to(log_p.device).unbind(-1)[1:]:
        highest = torch.full_like(log_p, -torch.inf).scatter_reduce(0, prefix, log_p.detach(), "amax")[prefix]
        sums = torch.zeros_like(log_p).index_add(0, prefix, (log_p - highest).exp())
        columns.append(highest + sums[prefix].log())
    return torch.stack(columns, -1)


def _arguments(
    space: SequenceSpace, log_pi: Tensor, log_ref: Tensor, log_sampler: Tensor, recipe: Recipe, baseline: Baseline
) -> tuple[Tensor, dict[str, Any]]:
    """Log-probabilities of the tokens of all completions, and the other arguments of :func:`kl_surrogate`."""
    logps, ref_logps, sampler_logps = (token_log_probs(space, log_p) for log_p in (log_pi, log_ref, log_sampler))
    mask = space.counted(space.tokens()).to(log_pi.device)
    weighted = sampler_logps if recipe.weights != "none" else None
    arguments: dict[str, Any] = {"ref_logps": ref_logps, "mask": mask, "recipe": recipe, "sampler_logps": weighted}
    if baseline not in get_args(Baseline):
        raise ValueError(f"baseline must be one of {get_args(Baseline)}; got {baseline!r}")
    if baseline == "mean":
        _, terms, weights, counted = terms_of(logps.detach(), ref_logps, mask, recipe, weighted)
        returns, weights = counted * to_go(weights * terms), counted * weights
        arguments["baseline"] = ((log_sampler.exp() @ returns) / (log_sampler.exp() @ weights)).unsqueeze(0)
    return logps, arguments


def _tables(
    space: SequenceSpace, log_pi: Tensor, log_ref: Tensor, log_sampler: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three tables, checked; the sampler and the reference are constants."""
    log_sampler = log_pi if log_sampler is None else log_sampler
    log_pi, log_ref, log_sampler = finite_tables(space, log_pi=log_pi, log_ref=log_ref, log_sampler=log_sampler)
    return log_pi, log_ref.detach(), log_sampler.detach()


def finite_tables(space: SequenceSpace, **tables: Tensor) -> tuple[Tensor, ...]:
    """Normalised tables [N] in float64 in which every completion of the space is possible."""
    for name, table in tables.items():
        if table.ndim != 1 or len(table) != space.size:
            raise ValueError(f"{name} must be [N] with the {space.size} completions of space; got {list(table.shape)}")
    checked = checks.as_tables(**tables)
    checks.require_log_probabilities(**dict(zip(tables, checked, strict=True)))
    for name, table in zip(tables, checked, strict=True):
        bad = ~table.isfinite()
        if bad.any():
            raise ValueError(f"{name} must be finite; got {checks.first_bad(table, bad)}")
    return checked
