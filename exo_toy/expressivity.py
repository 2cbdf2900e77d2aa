r"""How much an autoregressive policy has to remember of a prefix to hold a distribution exactly.

Cut every completion before position t into a prefix and a suffix: :math:`H_t[u, v] = p(u v)` over live prefixes u of t
tokens and suffixes v (with an eos, a completion that ended earlier is not cut: nothing is left to remember).

* Its rank is the least number of states of a weighted automaton at that position, and a lower bound for any exact
  autoregressive machine (:func:`hankel_ranks`).
* The number of distinct rows, normalised, is the number of states of the smallest deterministic machine, whose state
  is a function of the prefix (:func:`state_counts`).
* With fewer states than that something is lost (:func:`least_gap`), and so it is where the state is the last k tokens
  (:func:`conditional_mutual_information`).

All in float64, for one distribution [N]. Counts are certified from below: what counts as different differs by more
than rounding can explain.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from exo_toy import checks
from exo_toy.logspace import expectation
from exo_toy.spaces import SequenceSpace, join_children, split_children

EPS = torch.finfo(torch.float64).eps
# Roundings behind a log-probability, each relative to the largest: reward, temperature, normaliser, reference.
ROUNDINGS = 16


class HankelRanks(NamedTuple):
    """Ranks of the prefix-by-suffix matrices before each position.

    Attributes:
        ranks: [T], at least 1 (0 where no completion gets that far).
        singular_values: T tensors, decreasing, of the scaled matrices: in [0, 1], the first 1.
        tolerances: [T], above which a singular value counts.
    """

    ranks: Tensor
    singular_values: tuple[Tensor, ...]
    tolerances: Tensor


def hankel_ranks(space: SequenceSpace, log_p: Float[Tensor, " N"], *, log_error: float | None = None) -> HankelRanks:
    r"""Numerical rank of the matrix of prefixes by suffixes, before every position.

    The rank is that of the matrix scaled by its row and column sums, which has no rare prefixes to lose in rounding,

    .. math::
        B_t[u, v] = \frac{p(u v)}{\sqrt{p(u) \, p(v)}}, \qquad 1 = \sigma_1 \ge \sigma_2 \ge \dots \ge 0

    whose further singular values are the canonical correlations of prefix and suffix. If every log-probability is known
    within δ, B is known entry by entry within 2δ relative; being nonnegative with norm 1, it is known within 2δ in
    norm, and so is every singular value (Weyl). To this the tolerance adds the error of the decomposition,
    max(rows, columns) times the machine epsilon. So the rank found is a lower bound for the true one, and equal to it
    unless a true singular value lies below the tolerance.

    Source: Denis and Esposito, Fundamenta Informaticae 86, 2008 (rank and weighted automata);
    Hirschfeld, 1935 (the scaling).

    Args:
        space: N completions.
        log_p: [N] normalised log-probabilities, -inf for zero.
        log_error: δ, at least 0, in nats; None for 16 roundings of the table's dtype, relative to the
            largest finite one.

    Returns:
        HankelRanks.

    Raises:
        ValueError: a table of another size, not of normalised log-probabilities, or a negative error.

    Example:
        >>> log_p = torch.tensor([0.4, 0.1, 0.1, 0.4]).double().log()
        >>> hankel_ranks(SequenceSpace(2, 2), log_p).ranks.tolist()
        [1, 2]
    """
    log_p, log_error = _table(space, log_p, log_error)
    spectra, tolerances = [], []
    for joint in _cuts(space, log_p):
        reached = joint.isfinite()
        joint = joint[reached.any(1)][:, reached.any(0)]
        if joint.numel() == 0:
            spectra.append(joint.new_zeros(1))
            tolerances.append(0.0)
            continue
        half_sums = joint.logsumexp(1, keepdim=True) / 2 + joint.logsumexp(0) / 2
        # Rows that are short of 1 in all, with an eos: conditional on the prefix being there.
        spectra.append(torch.linalg.svdvals((joint - half_sums).exp()))
        tolerances.append(2 * log_error + max(joint.shape) * EPS)
    ranks = [int((values > bound).sum()) for values, bound in zip(spectra, tolerances, strict=True)]
    return HankelRanks(torch.tensor(ranks), tuple(spectra), torch.tensor(tolerances, dtype=torch.float64))


def state_counts(
    space: SequenceSpace, log_p: Float[Tensor, " N"], *, log_error: float | None = None
) -> Int64[Tensor, " T"]:
    r"""Number of distinct conditional distributions of what follows a prefix, before every position.

    .. math::
        S_t = \big| \{\, p(\cdot \mid u) : |u| = t, \; p(u) > 0 \,\} \big|

    That many states, no fewer, has the smallest exact autoregressive machine whose state is a function of the prefix.
    They are found by merging from the last position up: two prefixes are one state if the conditionals of their next
    token agree and every next token leads both to one state.

    If every log-probability is known within δ, a conditional is known within 2δ, and two that are equal differ by at
    most 4δ: values farther apart than that are told apart, so the count is a lower bound, and exact unless two
    different conditionals are that close.

    Source: Nerode, Proc. AMS 9, 1958; Revuz, Theoretical Computer Science 92, 1992 (merging).

    Args:
        space: N completions.
        log_p: [N] normalised log-probabilities, -inf for zero.
        log_error: δ, as in :func:`hankel_ranks`.

    Returns:
        [T] int64, at least 1 (0 where no completion gets that far), at least the rank of the same cut.

    Raises:
        ValueError: as for :func:`hankel_ranks`.

    Example:
        >>> log_p = torch.tensor([0.4, 0.1, 0.1, 0.4]).double().log()
        >>> state_counts(SequenceSpace(2, 2), log_p).tolist()
        [1, 2]
    """
    log_p, log_error = _table(space, log_p, log_error)
    joints = [_next_token(space, joint) for joint in _cuts(space, log_p)]
    counts = []
    state = torch.zeros(len(joints[-1]) * space.n_live, dtype=torch.int64, device=log_p.device)
    for joint in reversed(joints):
        after = state.unflatten(0, (-1, space.n_live))
        prefix = joint.logsumexp(-1, keepdim=True)
        reached = prefix.squeeze(-1) > -torch.inf
        # What cannot be reached is one state, which is not counted; it differs from all others.
        conditional = torch.where(reached.unsqueeze(-1), joint - prefix, -torch.inf)
        behaviour = torch.cat([_classes(conditional, 4 * log_error), after], -1)
        _, state = behaviour.unique(dim=0, return_inverse=True)
        counts.append(len(state[reached].unique()))
    return torch.tensor(counts[::-1])


def conditional_mutual_information(
    space: SequenceSpace, log_p: Float[Tensor, " N"], order: int
) -> Float64[Tensor, " T"]:
    r"""What each token owes to tokens older than the k before it.

    .. math::
        I_t = P(|y| > t) \; I_p(y_t;\, y_{<t-k} \mid y_{t-k}, \dots, y_{t-1}, |y| > t), \qquad
        \sum_t I_t = \min_{\pi \; k\text{-gram}} \mathrm{KL}(p \| \pi)

    The minimum is attained by :func:`exo_toy.policies.closest_kgram`.

    Source: the chain rule, Cover and Thomas, Elements of Information Theory, Theorem 2.5.2.

    Args:
        space: N completions.
        log_p: [N] normalised log-probabilities, -inf for zero.
        order: k, in 0..T-1.

    Returns:
        [T] float64 in nats, at least 0 up to rounding; exactly 0 at t <= k.

    Raises:
        ValueError: an order out of range, or as for :func:`hankel_ranks`.

    Example:
        >>> log_p = torch.tensor([0.5, 0.0, 0.0, 0.5]).log()
        >>> conditional_mutual_information(SequenceSpace(2, 2), log_p, 0)
        tensor([0.0000, 0.6931], dtype=torch.float64)
    """
    space.require_order(order)
    log_p, _ = _table(space, log_p, None)
    terms = []
    for t, cut in enumerate(_cuts(space, log_p)):
        joint = _next_token(space, cut)
        by_context = joint.unflatten(0, (-1, space.n_contexts(t, order=order)))
        pooled = by_context.logsumexp(0)
        information = (
            by_context - by_context.logsumexp(-1, keepdim=True) - (pooled - pooled.logsumexp(-1, keepdim=True))
        )
        terms.append(expectation(by_context.flatten(), information.flatten()))
    return torch.stack(terms)


def cut_information(space: SequenceSpace, log_p: Float[Tensor, " N"]) -> Float64[Tensor, "2 T"]:
    r"""How much is known of the suffix from the prefix, before every position.

    .. math::
        I_t = P(|y| > t) \; I_p(y_{<t};\, y_{\ge t} \mid |y| > t)

    Args:
        space: N completions.
        log_p: [N] normalised log-probabilities, -inf for zero.

    Returns:
        [2, T] float64: I in nats, at least 0 up to rounding and at most the logarithm of the number of states times
        the second row, P(|y| > t), the probability of not having ended.

    Raises:
        ValueError: as for :func:`hankel_ranks`.

    Example:
        >>> cut_information(SequenceSpace(2, 2), torch.tensor([0.5, 0.0, 0.0, 0.5]).log())[0]
        tensor([0.0000, 0.6931], dtype=torch.float64)
    """
    log_p, _ = _table(space, log_p, None)
    rows = []
    for joint in _cuts(space, log_p):
        log_reached = joint.logsumexp((0, 1))
        log_ratio = joint - joint.logsumexp(1, keepdim=True) - joint.logsumexp(0) + log_reached
        rows.append(torch.stack([expectation(joint.flatten(), log_ratio.flatten()), log_reached.exp()]))
    return torch.stack(rows, -1)


def least_gap(space: SequenceSpace, log_p: Float[Tensor, " N"], *, n_states: int) -> Float64[Tensor, ""]:
    r"""A lower bound of KL(p || π) for every autoregressive machine with a state out of S at each position.

    .. math::
        \mathrm{KL}(p \| \pi) \ge \max_t \big( I_t - P(|y| > t) \log S \big)

    Whatever such a machine does, its state s is a function of the prefix and the suffix sees nothing else of it, so
    KL(p‖π) is at least :math:`I(\mathrm{prefix}; \mathrm{suffix} \mid s) \ge I(\mathrm{prefix}; \mathrm{suffix}) - \log
    S`. It says nothing of a state of real numbers, other than that b bits are 2^b states.

    Source: the data-processing inequality, Cover and Thomas, Elements of Information Theory, Theorem 2.8.1.

    Args:
        space: N completions.
        log_p: [N] normalised log-probabilities, -inf for zero.
        n_states: S, at least 1.

    Returns:
        A scalar in nats, at least 0.

    Raises:
        ValueError: ``n_states`` below 1, or as for :func:`hankel_ranks`.

    Example:
        >>> least_gap(SequenceSpace(2, 2), torch.tensor([0.5, 0.0, 0.0, 0.5]).log(), n_states=1)
        tensor(0.6931, dtype=torch.float64)
    """
    checks.require_integer("n_states", n_states, at_least=1)
    information, reached = cut_information(space, log_p)
    lost = information - reached * math.log(n_states)
    return lost.max().clamp(min=0.0)


def _cuts(space: SequenceSpace, log_p: Tensor) -> Iterator[Tensor]:
    """Log of H_t for t = 0..T-1: live prefixes by suffixes [A**t, S_t]."""
    below = log_p.unsqueeze(0)
    for _ in range(space.length):
        yield below
        children, _ = split_children(space, below.unsqueeze(0))
        below = children[0].flatten(0, 1)


def _next_token(space: SequenceSpace, joint: Tensor) -> Tensor:
    """Log-probabilities of prefix and next token [A**t, V]."""
    children, eos = split_children(space, joint.unsqueeze(0))
    return join_children(space, children.logsumexp(-1, keepdim=True), eos)[0]


def _classes(values: Tensor, tolerance: float) -> Tensor:
    """Integers of the shape of ``values``: the same where sorted values follow each other within the tolerance."""
    ordered, place = values.flatten().sort()
    # The difference of two -inf is NaN, which is no step.
    step = ordered.diff() > tolerance
    classes = torch.zeros_like(place)
    classes[place[1:]] = step.cumsum(0)
    return classes.reshape(values.shape)


def _table(space: SequenceSpace, log_p: Tensor, log_error: float | None) -> tuple[Tensor, float]:
    """The checked table in float64, and how far its entries may be from the truth."""
    checks.require_floating(log_p=log_p)
    given = torch.finfo(log_p.dtype).eps
    (log_p,) = checks.as_tables(log_p=log_p)
    if log_p.shape != (space.size,):
        raise ValueError(f"log_p must have shape [{space.size}]; got {list(log_p.shape)}")
    checks.require_log_probabilities(log_p=log_p)
    if log_error is None:
        largest = log_p.masked_fill(log_p == -torch.inf, 0.0).abs().max().item()
        return log_p, ROUNDINGS * given * (1 + largest)
    checks.require_real("log_error", log_error, allowed="a finite number of at least 0", low=0.0, high=float("inf"),
                        low_allowed=True)  # fmt: skip
    return log_p, log_error
