r"""Recursions over pairs of a k-gram context and an automaton's state, from the last position to the first.

The value of a pair (c, s) at a position is what completions still weigh from there,

.. math::
    v_t(c, s) = \sum_a P_t(a \mid c) \, e^{w(s, a)} \, v_{t+1}(c a, \delta(s, a))

Of the context ca that follows c by a, the oldest token d is gone, so the pairs that differ in d alone share all that
they lead to. Gathered once for the other tokens b of the context, G[b, s, a] = w(s, a) + log v(ba, δ(s, a)), a position
costs one matrix product over a for each b: exp G[b] [S, V] by P[b] [V, D], D contexts for the D values of d. Rows of G
are scaled by their largest entry; where that leaves too little of a sum, it is taken in log space.

Shapes: v [X, S, C], contexts in their order; tables by b and d, G and what is weighed by P [X, B, S, V]; sums over
tokens [X, B, S, D]. X is 1 where prompts do not differ.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from exo_toy import logspace
from exo_toy.spaces import SequenceSpace

# A sum below this, of terms at most 1, may have lost digits, or everything, to underflow at 2e-308.
TINY = 1e-280
# Stands in for a largest entry of -inf, from which nothing can be subtracted.
LOWEST = -1e300
# Rows that are summed in log space at a time.
ROWS = 2**14


class Lattice:
    """Pairs of a context and a state, and how tokens lead from one to the next."""

    def __init__(self, space: SequenceSpace, order: int, transitions: Tensor) -> None:
        self.space, self.order = space, order
        self.transitions, (self.n_states, self.vocab_size) = transitions, transitions.shape
        # The column of a token: its number among the live ones; behind them the eos, where completions end.
        token = torch.arange(self.vocab_size, device=transitions.device)
        column = token if space.eos is None else token - (token > space.eos).long()
        self.column = torch.where(space.is_live(token), column, space.n_live)
        self.index = (transitions * space.vocab_size + self.column).flatten()
        self._routes: dict[int, Tensor] = {}

    @property
    def n_entries(self) -> int:
        """B S V, at positions from the k-th on."""
        return self.n_groups(self.order) * self.index.numel()

    @property
    def n_contexts(self) -> int:
        """C behind the last position."""
        return self.space.n_contexts(self.space.length, order=self.order)

    def n_groups(self, t: int) -> int:
        """B, the contexts at position t without the token that the next context drops."""
        following = self.space.n_contexts(t + 1, order=self.order)
        return following // self.space.n_live if self.order else 1

    def group(self, table: Tensor, t: int) -> Tensor:
        """[X, C, ...] to [X, B, D, ...]."""
        return table.unflatten(1, (-1, self.n_groups(t))).transpose(1, 2)

    def ungroup(self, sums: Tensor) -> Tensor:
        """[X, B, S, D] to [X, S, C]."""
        return sums.permute(0, 2, 3, 1).flatten(2)

    def regroup(self, values: Tensor, t: int) -> Tensor:
        """The inverse of :meth:`ungroup`."""
        return values.unflatten(2, (-1, self.n_groups(t))).permute(0, 3, 1, 2)

    def follow(self, values: Tensor, end: Tensor) -> Tensor:
        """What each token leads to [X, B, S, V]: values [X, S, C] of the next position, or end [X or 1, S]."""
        n_live = self.space.n_live
        if self.order == 0:
            children = values.unsqueeze(1).expand(-1, 1, -1, n_live)
        else:
            children = values.unflatten(2, (-1, n_live)).transpose(1, 2)
        if self.space.eos is not None:
            ended = end[:, None, :, None].expand(len(children), children.shape[1], -1, 1)
            children = torch.cat([children, ended], -1)
        return children.flatten(2).index_select(2, self.index).unflatten(2, (self.n_states, self.vocab_size))

    def route(self, n_prompts: int) -> Tensor:
        """Where each of [X, B, S, V], flat, stands in sums [X, B, S, D] of the next position, then ends [X, S]."""
        if n_prompts not in self._routes:
            n_groups = self.n_groups(self.order)
            n_dropped = self.space.n_contexts(self.order, order=self.order) // n_groups
            device = self.column.device
            group = torch.arange(n_groups, device=device)[:, None, None]
            child = group * self.space.n_live + self.column if self.order else torch.zeros_like(group)
            place = (child % n_groups * self.n_states + self.transitions) * n_dropped + child // n_groups
            prompt = torch.arange(n_prompts, device=device)[:, None, None, None]
            size = n_groups * self.n_states * n_dropped
            ended = n_prompts * size + prompt * self.n_states + self.transitions
            place = torch.where(self.column == self.space.n_live, ended, prompt * size + place)
            self._routes[n_prompts] = place.flatten()
        return self._routes[n_prompts]


class Table(NamedTuple):
    """Next tokens' probabilities [X, B, D, V], or weights at most 1: logarithms, and whether they are above 0."""

    log: Tensor
    linear: Tensor
    support: Tensor

    @classmethod
    def of(cls, log: Tensor) -> "Table":
        """The table of these logarithms."""
        return cls(log, log.exp(), (log.detach() > -torch.inf).double())

    def at(self, i: int, n: int) -> "Table":
        """Where this is the table of n positions, [n or 1, B, D, V]: that of the i-th."""
        return self if len(self.log) == 1 or n == 1 else Table(*(x[i].unsqueeze(0) for x in self))


class ByContext(NamedTuple):
    """Values [X, B, D, V] of a context and a token, 0 where the token has no probability; which of them are +inf."""

    finite: Tensor
    weighed: Tensor
    infinite: Tensor | None

    @classmethod
    def of(cls, values: Tensor, table: Table) -> "ByContext":
        """The values, and their products with the table."""
        values = values.masked_fill(table.support == 0, 0.0)
        infinite = values.detach() == torch.inf
        finite = values.masked_fill(infinite, 0.0)
        return cls(finite, table.linear * finite, infinite.double() if infinite.any() else None)


def product(weights: Tensor, table: Tensor) -> Tensor:
    """Sums over tokens [X, B, S, D] of [X, B, S, V] by [X, B, D, V]; either may have 1 for X."""
    if len(table) > 1:
        return weights @ table.mT
    if weights.shape[:2] == (1, 1):
        return (weights[0, 0] @ table[0, 0].mT)[None, None]
    # Prompts are more rows to one product, rather than copies of the table.
    rows = weights.transpose(0, 1).flatten(1, 2) @ table[0].mT
    return rows.unflatten(1, (len(weights), -1)).transpose(0, 1)


def expectation(values: Tensor, table: Table) -> Tensor:
    """Expectations over tokens [X, B, S, D]; an infinite value counts in full where its probability is not 0."""
    infinite = values.detach().isinf()
    if not infinite.any():
        return product(values, table.linear)
    finite = product(values.masked_fill(infinite, 0.0), table.linear)
    hit = product(infinite.double(), table.support) > 0
    return finite.masked_fill(hit, values.detach()[infinite][0].item())


class Conditionals:
    """The distribution q(a | c, s) proportional to P(a | c) e^g(s, a), over the tokens of one position.

    ``log_sum`` [X, B, S, D] is the logarithm of what it is divided by, -inf where nothing is left (``dead``), and
    ``log_of_sums`` that of what ``relative``, g less its largest entry over tokens, is divided by. All is made of
    differentiable operations.
    """

    def __init__(self, table: Table, g: Tensor) -> None:
        self.table, self.g = table, g
        largest = g.detach().amax(-1, keepdim=True).clamp(min=LOWEST)
        self.relative = g - largest
        self.weights = self.relative.exp()
        sums = product(self.weights, table.linear)
        self.low = sums.detach() < TINY
        self.sums = sums.masked_fill(self.low, 1.0)
        log_of_sums = self.sums.log().masked_fill(self.low, -torch.inf)
        self.allowed = g.detach() > -torch.inf
        self.entries: tuple[Tensor, ...] = ()
        # Where the largest entry is -inf the sum is 0 in truth, and so it is where no allowed token has a probability.
        if (self.low & (largest > LOWEST)).any():
            lost = self.low & (product(self.allowed.double(), table.support) > 0)
            if lost.any():
                self.entries = lost.nonzero(as_tuple=True)
                log_of_sums = log_of_sums.index_put(self.entries, self._by_rows(_log_sum))
        self.log_sum = log_of_sums + largest
        self.dead = log_of_sums.detach() == -torch.inf
        self.log_of_sums = log_of_sums.masked_fill(self.dead, 0.0)

    @property
    def inverse(self) -> Tensor:
        """1 over the sums of weights [X, B, S, D]; 0 where there are none, or in log space alone."""
        return self.sums.reciprocal().masked_fill(self.low, 0.0)

    def mean(self, values: Tensor, by_context: ByContext | None = None) -> Tensor:
        """Expectation [X, B, S, D] of values [X, B, S, V], finite where allowed, plus values by context.

        Of these +inf counts in full where its probability is not 0. 0 where nothing is left.
        """
        values = values.masked_fill(~self.allowed, 0.0)
        total = product(self.weights * values, self.table.linear)
        if by_context is not None:
            total = total + product(self.weights, by_context.weighed)
        result = (total / self.sums).masked_fill(self.low, 0.0)
        if self.entries:
            result = result.index_put(self.entries, self._by_rows(_expectation, values, by_context))
        if by_context is not None and by_context.infinite is not None:
            result = result.masked_fill(product(self.allowed.double(), by_context.infinite) > 0, torch.inf)
        return result

    def _by_rows(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        values: Tensor | None = None,
        by_context: ByContext | None = None,
    ) -> Tensor:
        """A function of the log-weights and the values [n, V] of the entries in log space, some of them at a time."""
        parts = []
        for x, b, s, d in zip(*(index.split(ROWS) for index in self.entries), strict=True):
            row = self.relative[x % len(self.g), b, s] + self.table.log[x % len(self.table.log), b, d]
            value = torch.zeros_like(row) if values is None else values[x % len(values), b, s]
            if by_context is not None:
                value = value + by_context.finite[x % len(by_context.finite), b, d]
            parts.append(function(row, value))
        return torch.cat(parts)


def _log_sum(log_weights: Tensor, _: Tensor) -> Tensor:
    return log_weights.logsumexp(-1)


def _expectation(log_weights: Tensor, values: Tensor) -> Tensor:
    return logspace.expectation(log_weights.log_softmax(-1), values)
