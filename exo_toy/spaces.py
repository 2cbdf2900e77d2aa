"""Finite spaces of completions, and sums over them along shared prefixes.

Completions stand in the depth-first order of the trie of their prefixes, children in token order; without an eos that
is the order of base-V numbers. A *context* of order k at position t is the last min(t, k) tokens before t. Where there
is an eos, a context holds live tokens only (all but the eos, renumbered 0..A-1); it is numbered in base A, first token
most significant. A table of order k at position t is [X, A**min(t, k), V].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Int64, Shaped
from torch import Tensor

from exo_toy import checks

LARGEST_INDEX = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class SequenceSpace:
    r"""All completions of at most ``length`` tokens over a vocabulary.

    Without an eos: the :math:`V^T` strings of length T. With one: the strings ended by the eos, or cut at T,

    .. math::
        N = \sum_{i=1}^{T} (V-1)^{i-1} + (V-1)^T

    Constructing a space costs nothing, however large it is; only what enumerates it is bounded by the memory budget.

    Args:
        vocab_size: V, at least 1; at least 2 with an eos.
        length: T, at least 1; counts the eos.
        eos: the token that ends a completion, in 0..V-1, or None where every completion has length T.
        memory_budget: bytes that one table over the space may take (working memory can be some three times that).
            Not part of a space's identity: spaces that differ in it alone are equal.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> SequenceSpace(2, 2, eos=0).tokens().tolist()
        [[0, 0], [1, 0], [1, 1]]
        >>> SequenceSpace(256, 1000).size == 256**1000
        True
    """

    vocab_size: int
    length: int
    eos: int | None = None
    memory_budget: int = field(default=4 * 2**30, kw_only=True, compare=False)

    def __post_init__(self) -> None:
        checks.require_integer("vocab_size", self.vocab_size, at_least=1)
        checks.require_integer("length", self.length, at_least=1)
        checks.require_integer("memory_budget", self.memory_budget, at_least=1)
        if self.eos is None:
            return
        checks.require_integer("eos", self.eos, at_least=0)
        if self.eos >= self.vocab_size:
            raise ValueError(f"eos must be None or a token in 0..{self.vocab_size - 1}; got {self.eos}")
        if self.vocab_size == 1:
            raise ValueError("vocab_size must be at least 2 with an eos (the eos and another token); got 1")

    def __len__(self) -> int:
        return self.size

    @property
    def size(self) -> int:
        """N, the number of completions; exact at any size (``len`` stops at 2**63 - 1)."""
        return self.subtree_sizes[0]

    @property
    def n_live(self) -> int:
        """A, the number of tokens that do not end a completion."""
        return self.vocab_size - (self.eos is not None)

    @cached_property
    def subtree_sizes(self) -> tuple[int, ...]:
        """Completions below a prefix of 0, 1, ..., T live tokens: T + 1 integers from N down to 1."""
        sizes = [1]
        for _ in range(self.length):
            sizes.append((self.eos is not None) + self.n_live * sizes[-1])
        return tuple(reversed(sizes))

    def tokens(self, index: Int[Tensor, "*leading"] | None = None) -> Int64[Tensor, "*leading T"]:
        """Completions as tokens, filled with the eos after their end.

        Args:
            index: [...] indices in 0..N-1; None for all of them in order. Given indices enumerate nothing.

        Returns:
            [..., T] int64, on the device of ``index``; [N, T] for None.

        Raises:
            ValueError: an index out of range; a space too large for the memory budget (None) or for int64 indices.

        Example:
            >>> SequenceSpace(10, 3).tokens(torch.tensor([7, 250])).tolist()
            [[0, 0, 7], [2, 5, 0]]
        """
        if index is None:
            self.require_enumerable(bytes_per_completion=8 * self.length, what="tokens()")
            return self._unrank(torch.arange(self.size))
        self._require_int64_indices()
        _require_integers("index", index)
        bad = (index < 0) | (index >= self.size)
        checks.require_values(
            [index], (bad, lambda: f"index must be in 0..{self.size - 1}; got {checks.first_bad(index, bad)}")
        )
        return self._unrank(index.to(torch.int64))

    def lengths(self) -> Int64[Tensor, " N"]:
        """[N] number of tokens of each completion, the eos counted: in 1..T, all T without an eos.

        Raises:
            ValueError: a space too large for the memory budget.

        Example:
            >>> SequenceSpace(2, 2, eos=0).lengths().tolist()
            [1, 2, 2]
        """
        self.require_enumerable(bytes_per_completion=8, what="lengths()")
        one = torch.ones(1, 1, self.vocab_size, dtype=torch.int64)
        return sum_over_trie(self, [one] * self.length, order=0)[0]

    def index(self, tokens: Int[Tensor, "*leading T"]) -> Int64[Tensor, "*leading"]:
        """Where completions stand in the order of the space: the inverse of :meth:`tokens`.

        Args:
            tokens: [..., T] of an integer dtype, in 0..V-1, nothing but the eos after an eos.

        Returns:
            [...] int64 in 0..N-1, on the device of ``tokens``.

        Raises:
            ValueError: ``tokens`` are not completions of this space; a space too large for int64 indices.

        Example:
            >>> SequenceSpace(10, 3).index(torch.tensor([[0, 0, 7], [2, 5, 0]])).tolist()
            [7, 250]
        """
        self.require_completions(tokens)
        self._require_int64_indices()
        tokens = tokens.to(torch.int64)
        index = tokens.new_zeros(tokens.shape[:-1])
        running = torch.ones_like(index, dtype=torch.bool)
        for token, below in zip(tokens.unbind(-1), self.subtree_sizes[1:], strict=True):
            # An earlier eos is one completion, any other earlier token a whole subtree.
            after_eos = 0 if self.eos is None else (token > self.eos).long()
            index = index + torch.where(running, (token - after_eos) * below + after_eos, 0)
            running = running & self.is_live(token)
        return index

    def is_live(self, token: Tensor) -> Tensor:
        """Whether a completion goes on after this token (while there is room)."""
        return torch.ones_like(token, dtype=torch.bool) if self.eos is None else token != self.eos

    def next_context(self, context: Tensor, token: Tensor, *, order: int) -> Tensor:
        """Number of the context that follows ``context`` by ``token``; an eos leads to 0, which means nothing."""
        digit = token if self.eos is None else token - (token > self.eos).to(token.dtype)
        # Once k tokens are there the remainder drops the oldest; before that it changes nothing.
        return torch.where(self.is_live(token), (context * self.n_live + digit) % self.n_live**order, 0)

    def contexts(self, tokens: Int[Tensor, "*M T"], *, order: int) -> Int64[Tensor, "*M T"]:
        """Number of the context before each token of given completions; after the end it means nothing."""
        context = torch.zeros_like(tokens[..., 0], dtype=torch.int64)
        contexts = [context]
        for token in tokens.unbind(-1)[:-1]:
            context = self.next_context(context, token.to(torch.int64), order=order)
            contexts.append(context)
        return torch.stack(contexts, -1)

    def counted(self, tokens: Int[Tensor, "*M T"]) -> Bool[Tensor, "*M T"]:
        """Whether each token is part of its completion: the eos is, what fills up after it is not."""
        first = torch.ones_like(tokens[..., :1], dtype=torch.bool)
        return torch.cat([first, self.is_live(tokens[..., :-1])], -1).cumprod(-1).bool()

    def n_contexts(self, position: int, *, order: int) -> int:
        """A**min(t, k), the number of contexts at a position."""
        return int(self.n_live ** min(position, order))

    def require_order(self, order: int) -> None:
        """A context never holds more than the T - 1 tokens before the last position."""
        checks.require_integer("order", order, at_least=0)
        if order >= self.length:
            raise ValueError(
                f"order must be in 0..{self.length - 1} on completions of length {self.length} "
                f"(order {self.length - 1} already sees every earlier token); got {order}"
            )

    def require_completions(self, tokens: Tensor, name: str = "tokens") -> None:
        """``tokens`` [..., T] are completions of this space: integers in range, nothing but the eos after an eos."""
        _require_integers(name, tokens)
        if tokens.ndim == 0 or tokens.shape[-1] != self.length:
            raise ValueError(f"{name} must have shape [..., {self.length}]; got {list(tokens.shape)}")
        bad = (tokens < 0) | (tokens >= self.vocab_size)
        message = f"{name} must be in 0..{self.vocab_size - 1}"
        conditions = [(bad, lambda: f"{message}; got {checks.first_bad(tokens, bad)}")]
        if self.eos is not None:
            revived = torch.zeros_like(bad)
            revived[..., 1:] = (tokens[..., :-1] == self.eos) & (tokens[..., 1:] != self.eos)
            rule = f"{name} must hold nothing but the eos, {self.eos}, after an eos"
            conditions.append((revived, lambda: f"{rule}; got {checks.first_bad(tokens, revived)}"))
        checks.require_values([tokens], *conditions)

    def require_enumerable(self, *, bytes_per_completion: int, what: str) -> None:
        """Raise, saying how large it would be, where a table over all completions would exceed the memory budget.

        Args:
            bytes_per_completion: what the table holds for each completion.
            what: the call that wants it, for the message.
        """
        completions = f"{_readable(self.size)} completions (vocab_size={self.vocab_size}, length={self.length}"
        what = f"{what} of {completions}, eos={self.eos})"
        self.require_memory(self.size * bytes_per_completion, what=what)

    def require_memory(self, n_bytes: int, *, what: str) -> None:
        """Raise, saying how much ``what`` would take, where it is more than the memory budget."""
        if n_bytes > self.memory_budget:
            raise ValueError(
                f"{what} would take {_readable_gib(n_bytes)}, above the space's memory_budget of "
                f"{_readable_gib(self.memory_budget)}; take a smaller space or raise memory_budget"
            )

    def _require_int64_indices(self) -> None:
        if self.size > LARGEST_INDEX:
            raise ValueError(
                f"a space must have at most 2**63 - 1 completions for indices; this one has {_readable(self.size)} "
                f"(vocab_size={self.vocab_size}, length={self.length}, eos={self.eos})"
            )

    def _unrank(self, index: Tensor) -> Tensor:
        """Tokens [..., T] of indices known to be in range: digit by digit, the rest an index into the subtree."""
        tokens = index.new_empty((*index.shape, self.length))
        rest = index
        ended = torch.zeros_like(index, dtype=torch.bool)
        for t, below in enumerate(self.subtree_sizes[1:]):
            if self.eos is None:
                token, rest = rest // below, rest % below
            else:
                before_eos = self.eos * below
                ended = ended | (rest == before_eos)
                after_eos = (rest > before_eos).to(torch.int64)
                rest = rest - after_eos
                token = torch.where(ended, self.eos, rest // below + after_eos)
                rest = rest % below
            tokens[..., t] = token
        return tokens


def sum_over_trie(
    space: SequenceSpace, tables: Sequence[Shaped[Tensor, "X _ V"]], *, order: int
) -> Shaped[Tensor, "X N"]:
    r"""Sum of table entries along the path of every completion.

    .. math::
        s(y) = \sum_{t < |y|} \mathrm{table}_t(y_{t-k}, \dots, y_{t-1};\, y_t)

    A prefix is added up once for all completions that share it, so the sum costs about what writing it costs: with
    k < 3 or so, one pass over [X, N] without an eos and k + 2 with one. It is made of differentiable torch operations.

    Args:
        space: N completions.
        tables: T tables of order k, [X, A**min(t, k), V] (see the module's head for contexts), of one dtype.
        order: k, in 0..T-1.

    Returns:
        [X, N] in the tables' dtype.

    Raises:
        ValueError: a wrong number or shape of tables; a space too large for the memory budget.

    Example:
        >>> sum_over_trie(SequenceSpace(2, 2, eos=0), [torch.tensor([[[1, 10]]]), torch.tensor([[[2, 20]]])], order=0)
        tensor([[ 1, 12, 30]])
    """
    _require_tables(space, tables, order)
    n_prompts, n_live = tables[0].shape[0], space.n_live
    space.require_enumerable(bytes_per_completion=n_prompts * tables[0].element_size(), what="a table")

    # Down to depth k every prefix is a context of its own: there the tables take up the sums of their prefixes.
    tables = list(tables)
    for t in range(order):
        path_sums, _ = split_children(space, tables[t])
        tables[t + 1] = tables[t + 1] + path_sums.flatten(1).unsqueeze(-1)

    # From the last position up: `below` [X, contexts, completions] holds the sums under each context, in trie order.
    # The tokens before and after the eos are added apart, which spares the backward pass a copy of the table.
    below = tables[-1]
    for t in reversed(range(space.length - 1)):
        live, eos = _around_eos(space, tables[t])
        if order == 0:
            children = [below.unsqueeze(2)] * len(live)
        elif space.eos is None:
            children = [below.unflatten(1, (-1, n_live))]
        else:
            children = list(below.unflatten(1, (-1, n_live)).split([space.eos, n_live - space.eos], 2))
        if t < order:
            runs = [child.flatten(2) for child in children]
        else:
            runs = [_add_children(entries, child) for entries, child in zip(live, children, strict=True)]
        below = _join_around_eos(runs, eos)
    return below.squeeze(1)


def split_children(space: SequenceSpace, table: Tensor) -> tuple[Tensor, Tensor]:
    """Part values below nodes [X, C, S] into those of their live children [X, C, A, S'] and their eos [X, C, 0 or 1].

    The last dimension is in trie order; a table over tokens [X, C, V] is the case S' = 1.
    """
    live, eos = _around_eos(space, table)
    return torch.cat(live, -1).unflatten(-1, (space.n_live, -1)), eos


def join_children(space: SequenceSpace, children: Tensor, eos: Tensor) -> Tensor:
    """The inverse of :func:`split_children`: [X, C, A, S'] and [X, C, 0 or 1] to [X, C, S]."""
    if space.eos is None:
        return children.flatten(2)
    runs = [run.flatten(2) for run in children.split([space.eos, space.n_live - space.eos], 2)]
    return _join_around_eos(runs, eos)


def _add_children(entries: Tensor, children: Tensor) -> Tensor:
    """[X, C, a] + [X, C', a or 1, S] -> [X, C, a * S]; C' counts the contexts without their first token."""
    entries = entries.unflatten(1, (-1, children.shape[1])).unsqueeze(-1)
    return (entries + children.unsqueeze(1)).flatten(3).flatten(1, 2)


def _around_eos(space: SequenceSpace, table: Tensor) -> tuple[list[Tensor], Tensor]:
    """The runs of a table's last dimension before and after the eos (one run without an eos), and the eos itself."""
    if space.eos is None:
        return [table], table[..., :0]
    per_child = (table.shape[-1] - 1) // space.n_live
    before, eos, after = table.split([space.eos * per_child, 1, (space.n_live - space.eos) * per_child], -1)
    return [before, after], eos


def _join_around_eos(runs: list[Tensor], eos: Tensor) -> Tensor:
    """Put the eos back between the runs."""
    return runs[0] if len(runs) == 1 else torch.cat([runs[0], eos, runs[1]], -1)


def _require_tables(space: SequenceSpace, tables: Sequence[Tensor], order: int) -> None:
    """T tables of the given order, all for the same number of prompts."""
    space.require_order(order)
    if len(tables) != space.length:
        raise ValueError(f"tables must be one per position, {space.length}; got {len(tables)}")
    for t, table in enumerate(tables):
        wanted = [tables[0].shape[0], space.n_contexts(t, order=order), space.vocab_size]
        if list(table.shape) != wanted:
            raise ValueError(f"tables[{t}] must have shape {wanted} for order {order}; got {list(table.shape)}")


def _require_integers(name: str, tensor: Tensor) -> None:
    """A tensor of an integer dtype; booleans are refused."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must have an integer dtype; got {tensor.dtype}")


def _readable(count: int) -> str:
    """A count in full, or as a power of ten where nobody would read it in full."""
    return f"{count:,}" if count < 10**15 else f"10**{math.log10(count):.2f}"


def _readable_gib(n_bytes: int) -> str:
    return (
        f"{n_bytes / 2**30:.3g} GiB" if n_bytes < 10**15 else f"10**{math.log10(n_bytes) - math.log10(2**30):.2f} GiB"
    )
