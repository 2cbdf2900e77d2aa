"""k-gram models from counts, smoothed."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from exo_toy import checks
from exo_toy.automata import KGramModel
from exo_toy.spaces import SequenceSpace

# Probabilities [C, V] from counts [C, V] and the probabilities of the order below, in which the oldest token is left
# out of the context: the same rows, but for that token.
Smoothing = Callable[[Float64[Tensor, "C V"], Float64[Tensor, "C V"]], Float64[Tensor, "C V"]]


def witten_bell(counts: Float64[Tensor, "C V"], lower: Float64[Tensor, "C V"]) -> Float64[Tensor, "C V"]:
    r"""Interpolated Witten-Bell smoothing: a context that was followed by many different tokens expects new ones.

    .. math::
        p(a \mid c) = \frac{n(ca) + m(c)\, p'(a \mid c)}{n(c) + m(c)}, \qquad m(c) = |\{a : n(ca) > 0\}|

    Source: Witten and Bell, "The zero-frequency problem", IEEE Transactions on Information Theory 37(4), 1991, method
    C, interpolated.

    Args:
        counts: [C, V] n, how often each token followed each context.
        lower: [C, V] p', the probabilities of the order below.

    Returns:
        [C, V] probabilities, above 0 where ``lower`` is; ``lower`` itself where the context was never seen.

    Example:
        >>> witten_bell(torch.tensor([[3.0, 1.0, 0.0]]).double(), torch.full((1, 3), 1 / 3).double())
        tensor([[0.6111, 0.2778, 0.1111]], dtype=torch.float64)
    """
    total, kinds = counts.sum(-1, keepdim=True), (counts > 0).double().sum(-1, keepdim=True)
    return torch.where(total > 0, (counts + kinds * lower) / (total + kinds), lower)


def absolute_discounting(counts: Float64[Tensor, "C V"], lower: Float64[Tensor, "C V"]) -> Float64[Tensor, "C V"]:
    r"""Interpolated absolute discounting: every count gives up one and the same D to what is less often seen.

    .. math::
        p(a \mid c) = \frac{\max(n(ca) - D, 0) + D\, m(c)\, p'(a \mid c)}{n(c)}, \qquad
        D = \frac{n_1}{n_1 + 2 n_2}

    with :math:`n_i` the number of entries of the table that are i; D is a half where none is 1.

    Source: Ney, Essen and Kneser, "On structuring probabilistic dependences in stochastic language modelling", Computer
    Speech and Language 8(1), 1994.

    Args:
        counts: as for :func:`witten_bell`.
        lower: as for :func:`witten_bell`.

    Returns:
        As :func:`witten_bell`.

    Example:
        >>> absolute_discounting(torch.tensor([[3.0, 1.0, 0.0]]).double(), torch.full((1, 3), 1 / 3).double())
        tensor([[0.6667, 0.1667, 0.1667]], dtype=torch.float64)
    """
    ones, twos = (int((counts == i).sum()) for i in (1, 2))
    discount = ones / (ones + 2 * twos) if ones else 0.5
    total, kinds = counts.sum(-1, keepdim=True), (counts > 0).double().sum(-1, keepdim=True)
    mixed = ((counts - discount).clamp(min=0.0) + discount * kinds * lower) / total
    return torch.where(total > 0, mixed, lower)


def add_delta(
    counts: Float64[Tensor, "C V"], lower: Float64[Tensor, "C V"], *, delta: float | int
) -> Float64[Tensor, "C V"]:
    r"""Additive smoothing, :math:`p(a \mid c) = (n(ca) + \delta) / (n(c) + \delta V)`; it needs no lower order.

    Args:
        counts: as for :func:`witten_bell`.
        lower: unused.
        delta: δ, above 0.

    Returns:
        [C, V] probabilities above 0; uniform where the context was never seen.

    Raises:
        ValueError: delta not above 0.

    Example:
        >>> counts = torch.tensor([[3.0, 1.0, 0.0]]).double()
        >>> add_delta(counts, counts, delta=1.0)
        tensor([[0.5714, 0.2857, 0.1429]], dtype=torch.float64)
    """
    checks.require_positive(delta=delta)
    return (counts + delta) / (counts.sum(-1, keepdim=True) + delta * counts.shape[-1])


def kgram_counts(
    tokens: Int[Tensor, " N"] | Iterable[Int[Tensor, " _"]], vocab_size: int, *, order: int
) -> tuple[Float64[Tensor, "_ V"], ...]:
    """How often each token followed each context of 0, 1, ..., k tokens.

    Args:
        tokens: [N] in 0..V-1, or any number of such tensors, which follow upon each other; one at a time is held.
        vocab_size: V.
        order: k, at least 0.

    Returns:
        k + 1 tables [V**j, V]; contexts are numbered with the oldest token first, the most significant.

    Raises:
        ValueError: tokens out of range.

    Example:
        >>> [table.tolist() for table in kgram_counts(torch.tensor([0, 1, 0]), 2, order=1)]
        [[[2.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]
    """
    checks.require_integer("vocab_size", vocab_size, at_least=1)
    checks.require_integer("order", order, at_least=0)
    counts = torch.zeros(vocab_size ** (order + 1), dtype=torch.float64)
    first = last = torch.zeros(0, dtype=torch.int64)
    for piece in (tokens,) if isinstance(tokens, Tensor) else tokens:
        _require_tokens(piece, vocab_size)
        run = torch.cat([last, piece.to(torch.int64)])
        first = torch.cat([first, run[len(last) :]])[:order] if len(first) < order else first
        codes = _codes(run, vocab_size, order)
        counts.index_add_(0, codes, torch.ones(len(codes), dtype=torch.float64))
        last = run[max(len(run) - order, 0) :]
    tables = [counts.unflatten(0, (-1, vocab_size))]
    for lower in reversed(range(order)):
        # Every token but the first k has a full context, whose oldest token is summed out.
        table = tables[0].unflatten(0, (vocab_size, -1)).sum(0)
        early = _codes(first[: lower + 1], vocab_size, lower)
        tables.insert(0, table.flatten().index_add(0, early, torch.ones(len(early)).double()).view_as(table))
    return tuple(tables)


def fit_kgram(
    tokens: Int[Tensor, " N"] | Iterable[Int[Tensor, " _"]],
    space: SequenceSpace,
    *,
    order: int,
    smoothing: Smoothing = witten_bell,
) -> KGramModel:
    r"""The k-gram model of a stretch of tokens, smoothed by the orders below, down to the uniform distribution.

    Args:
        tokens: [N] in 0..V-1, or any number of such tensors, which follow upon each other; one at a time is held.
        space: the completions that are to be modelled; without an eos.
        order: k, in 0..T-1.
        smoothing: (counts, probabilities of the order below) -> probabilities [C, V]: :func:`witten_bell`,
            :func:`absolute_discounting`, :func:`add_delta` with its delta, or another.

    Returns:
        A model whose positions from k on share a table; the t-th before has that of order t.

    Raises:
        ValueError: no tokens, or some out of range; a space with an eos; an order out of range, or whose tables exceed
            the space's memory budget.

    Example:
        >>> tokens = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1, 1])
        >>> fit_kgram(tokens, SequenceSpace(2, 50), order=1).table(1).exp()
        tensor([[[0.0909, 0.9091],
                 [0.3896, 0.6104]]], dtype=torch.float64)
    """
    space.require_order(order)
    if space.eos is not None:
        raise ValueError(f"space must have no eos; got {space.eos}")
    require_tables(space, order=order)
    return from_counts(kgram_counts(tokens, space.vocab_size, order=order), space, smoothing=smoothing)


def from_counts(
    counts: tuple[Float64[Tensor, "_ V"], ...], space: SequenceSpace, *, smoothing: Smoothing = witten_bell
) -> KGramModel:
    """The k-gram model of counts of all orders, as :func:`kgram_counts` has them.

    Raises:
        ValueError: no counts above 0.

    Example:
        >>> counts = kgram_counts(torch.tensor([0, 1, 1]), 2, order=0)
        >>> from_counts(counts, SequenceSpace(2, 9)).table(0).exp()
        tensor([[[0.4000, 0.6000]]], dtype=torch.float64)
    """
    if not counts[0].any():
        raise ValueError("tokens must hold one token at least; got none")
    lower = torch.full_like(counts[0], 1 / space.vocab_size)
    tables = []
    for count in counts:
        lower = smoothing(count, lower.repeat(len(count) // len(lower), 1))
        tables.append(lower.log().unsqueeze(0))
    return KGramModel(space, len(counts) - 1, tuple(tables))


def require_tables(space: SequenceSpace, *, order: int) -> None:
    """Raise where tables of an order, and what smoothing makes on the way, exceed the space's memory budget."""
    n_bytes = 6 * 8 * space.vocab_size ** (order + 1)
    space.require_memory(n_bytes, what=f"tables of order {order} over {space.vocab_size} tokens")


def nats_per_token(model: KGramModel, counts: tuple[Float64[Tensor, "_ V"], ...]) -> float:
    """Mean of minus log p of the tokens that were counted, given their contexts; the first k have shorter ones."""
    total = -(counts[-1] * model.table(model.order)[0]).sum()
    for t in range(model.order):
        # What is in the counts of order t and not in those above, summed out: the t-th token.
        early = counts[t] - counts[t + 1].unflatten(0, (model.space.vocab_size, -1)).sum(0)
        total = total - (early * model.table(t)[0]).sum()
    return (total / counts[0].sum()).item()


def _require_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Integers in 0..V-1."""
    bad = (tokens < 0) | (tokens >= vocab_size)
    message = f"tokens must be in 0..{vocab_size - 1}"
    checks.require_values([tokens], (bad, lambda: f"{message}; got {checks.first_bad(tokens, bad)}"))


def _codes(tokens: Tensor, vocab_size: int, order: int) -> Tensor:
    """Number of each run of order + 1 tokens, the oldest most significant."""
    n_runs = max(len(tokens) - order, 0)
    codes = torch.zeros(n_runs, dtype=torch.int64)
    for i in range(order + 1):
        codes = codes * vocab_size + tokens[i : i + n_runs]
    return codes
