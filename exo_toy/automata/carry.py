r"""Expected sums along completions, from the last position to the first, many positions at a time.

What a position adds, averaged over what comes behind it,

.. math::
    u_t(c, s) = \ell_t(c, s) + \sum_a q_t(a \mid c, s) \, u_{t+1}(c a, \delta(s, a))

q is a k-gram model (:class:`Own`), or one that is weighted by what completions still weigh
(:class:`exo_toy.automata.recursion.Conditionals`). Given the values of that recursion, the terms of a block of n
positions are made together, as if positions were prompts; one product for each position is left.

Shapes as in :mod:`exo_toy.automata.recursion`, with n in place of X where positions share a prompt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from exo_toy.automata.recursion import Conditionals, Lattice, Table, product


class Own:
    """A k-gram model's own conditionals at some positions, with what is asked of Conditionals."""

    weights = inverse = None

    def __init__(self, table: Table, n_states: int) -> None:
        self.table = table
        self.allowed = torch.ones(1, 1, n_states, 1, dtype=torch.bool, device=table.log.device)

    def mean(self, values: Tensor) -> Tensor:
        """Expectation [X, B, S, D] of finite values [X, B, S, V]."""
        return product(values, self.table.linear)


def carry(
    lattice: Lattice, positions: Sequence[int], q: Own | Conditionals, local: Tensor, later: Tensor, center: Tensor
) -> Tensor:
    """Sums [n, X, S, C] at descending positions, from those behind the first [X, S, C], less a center [X, S, 1].

    The center is a constant; a completion that ends has it to come, negative, in place of what comes later.
    """
    n = len(positions)
    if isinstance(q, Conditionals) and q.entries:
        # Some conditionals exist in log space alone.
        found = []
        for i in range(n):
            one = Conditionals(q.table.at(i, n), _at(q.g, i, n))
            later = lattice.ungroup(one.mean(after(lattice, later, center)) + _at(local, i, n))
            found.append(later)
        return torch.stack(found)
    inputs = (center, q.table.linear, q.weights, q.inverse, local, later)
    return Carry.apply(lattice, n, *inputs) if positions[-1] >= lattice.order else _plain(lattice, n, *inputs)


def reaches(lattice: Lattice, n: int, q: Own | Conditionals, bad: Tensor, later: Tensor) -> Tensor:
    """Whether something bad, at [n, B, S, D] or behind, may be met: [X, S, C] at the last of n positions."""
    nothing = torch.zeros_like(later[:1, :, :1], dtype=torch.float64)
    for i in range(n):
        reached = _at(q.allowed, i, n) * after(lattice, later.double(), nothing)
        later = lattice.ungroup(_at(bad, i, n) | (product(reached, q.table.at(i, n).support) > 0))
    return later


def carry_sum(
    lattice: Lattice,
    positions: Sequence[int],
    q: Own | Conditionals,
    local: Tensor,
    later: Tensor,
    center: Tensor,
    infinite: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums at the last position, whose terms may be +inf: the finite part, its center, and where it counts nothing."""
    bad = local.detach() == torch.inf
    sums, center = less_mean(carry(lattice, positions, q, local.masked_fill(bad, 0.0), later, center)[-1], center)
    if bad.any() or infinite.any():
        return sums, center, reaches(lattice, len(positions), q, bad, infinite).expand_as(sums)
    return sums, center, torch.zeros_like(sums, dtype=torch.bool)


def less_mean(sums: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """The sums less one number more, which would cost them digits: they grow with the number of positions."""
    shift = sums.detach().mean((1, 2), keepdim=True)
    return sums - shift, center + shift


def with_ends(lattice: Lattice, rewards: Tensor, final: Tensor) -> Tensor:
    """What transitions earn [S, V], with the final reward [S] of completions that end there."""
    return torch.where(lattice.column == lattice.space.n_live, rewards + final[lattice.transitions], rewards)


class Carry(torch.autograd.Function):
    """The recursion over n positions from the k-th on, with its gradients by hand."""

    @staticmethod
    def forward(ctx, lattice, n, center, table, weights, inverse, local, later):  # type: ignore[no-untyped-def]
        """Sums [n, X, S, C]; weights [X, B, S, V] and the inverse of their sums [X, B, S, D] are None where all are 1.

        Where n is not 1, n or 1 stands for X in all but ``later``, which has 1.
        """
        own = _Rows(lattice, n, center, table, weights, inverse, local, later)
        ctx.lattice, ctx.n, ctx.center = lattice, n, center
        sums = own.forward(local, later)
        ctx.save_for_backward(table, weights, inverse, local, later, sums)
        return own.ungrouped(sums[1:])

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        """By hand, or through plain operations where the gradient is to be differentiated itself."""
        *inputs, sums = ctx.saved_tensors
        if not torch.is_grad_enabled():
            own = _Rows(ctx.lattice, ctx.n, ctx.center, *inputs)
            return None, None, None, *own.backward(gradient, sums, ctx.needs_input_grad[3:])
        with torch.enable_grad():
            nodes = [x if x is None else x.view_as(x) for x in inputs]
            wanted = [flag and x is not None for flag, x in zip(ctx.needs_input_grad[3:], nodes, strict=True)]
            result = _plain(ctx.lattice, ctx.n, ctx.center, *nodes)  # type: ignore[arg-type]
            leaves = [x for x, flag in zip(nodes, wanted, strict=True) if x is not None and flag]
            found = iter(torch.autograd.grad(result, leaves, gradient, create_graph=True, allow_unused=True))
        return None, None, None, *(next(found) if flag else None for flag in wanted)


class _Rows:
    """Tensors by position and row, [n or 1, X B, ...]: rows are prompts and groups of contexts."""

    def __init__(
        self,
        lattice: Lattice,
        n: int,
        center: Tensor,
        table: Tensor,
        weights: Tensor | None,
        inverse: Tensor | None,
        local: Tensor,
        later: Tensor,
    ) -> None:
        self.lattice, self.n, self.inputs = lattice, n, (table, weights, inverse, local, later)
        self.n_prompts = max(len(x) for x in (table, local, later)) if n == 1 else 1
        self.table = self.rows(table)
        self.weights, self.inverse = (None if x is None else self.rows(x) for x in (weights, inverse))
        self.route = lattice.route(self.n_prompts)
        self.n_rows, n_dropped = self.table.shape[1], self.table.shape[2]
        self.shape = (self.n_rows, lattice.n_states, n_dropped)
        self.size = self.n_rows * lattice.n_states * n_dropped
        self.ends = -center.expand(self.n_prompts, lattice.n_states, 1).flatten()

    def rows(self, x: Tensor) -> Tensor:
        """[n or 1, X B, ...]: from [X or 1, B, ...], or [n or 1, B, ...] for several positions."""
        return x if self.n > 1 else x.expand(self.n_prompts, *x.shape[1:]).flatten(0, 1).unsqueeze(0)

    def regrouped(self, values: Tensor) -> Tensor:
        """[..., X, S, C] to [..., X B, S, D]."""
        flat = values.reshape(-1, *values.shape[-2:])
        rows = self.lattice.regroup(flat, self.lattice.order)
        return rows.reshape(-1, self.n_prompts, *rows.shape[1:]).flatten(1, 2)

    def ungrouped(self, rows: Tensor) -> Tensor:
        """[n, X B, S, D] to [n, X, S, C]."""
        values = self.lattice.ungroup(rows.unflatten(1, (self.n_prompts, -1)).flatten(0, 1))
        return values.unflatten(0, (-1, self.n_prompts))

    def summed(self, gradient: Tensor, i: int) -> Tensor:
        """The gradient [n, X B, ...] of an input, in its shape."""
        given = self.inputs[i]
        assert given is not None
        if self.n == 1:
            gradient = gradient[0].unflatten(0, (self.n_prompts, -1))
        return gradient.sum_to_size(given.shape)

    def forward(self, local: Tensor, later: Tensor) -> Tensor:
        """Sums [n + 1, X B, S, D], those behind the first position first."""
        local = self.rows(local)
        source = torch.cat([local.new_empty(self.size), self.ends])
        sums = local.new_empty(self.n + 1, *self.shape)
        sums[0] = self.regrouped(later.expand(self.n_prompts, -1, -1))[0]
        gathered = local.new_empty(self.n_rows, self.lattice.n_states, self.lattice.vocab_size)
        flat, tables = gathered.flatten(), self.table.mT
        for i in range(self.n):
            source[: self.size] = sums[i].flatten()
            torch.index_select(source, 0, self.route, out=flat)
            if self.weights is not None:
                gathered.mul_(self.weights[i % len(self.weights)])
            torch.bmm(gathered, tables[i % len(tables)], out=sums[i + 1])
            if self.inverse is not None:
                sums[i + 1].mul_(self.inverse[i % len(self.inverse)])
            sums[i + 1].add_(local[i % len(local)])
        return sums

    def backward(self, gradient: Tensor, sums: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of the table, the weights, the inverse of their sums, what is local and what comes later."""
        adjoints = torch.empty_like(sums)
        adjoints[1:], adjoints[0] = self.regrouped(gradient), 0.0
        through = sums.new_empty(self.n, self.n_rows, self.lattice.n_states, self.lattice.vocab_size)
        shares = sums.new_empty(self.n, *self.shape)
        source = sums.new_empty(self.size + len(self.ends))
        for i in reversed(range(self.n)):
            shares[i] = adjoints[i + 1]
            if self.inverse is not None:
                shares[i].mul_(self.inverse[i % len(self.inverse)])
            torch.bmm(shares[i], self.table[i % len(self.table)], out=through[i])
            passed = through[i] if self.weights is None else through[i] * self.weights[i % len(self.weights)]
            source.zero_().index_add_(0, self.route, passed.flatten())
            adjoints[i] += source[: self.size].view(self.shape)
        found: list[Tensor | None] = [None, None, None, self.summed(adjoints[1:], 3), None]
        later = self.lattice.ungroup(adjoints[0].unflatten(0, (self.n_prompts, -1)))
        found[4] = later.sum_to_size(self.inputs[4].shape)
        if any(needed[:3]):
            sources = torch.cat([sums[:-1].flatten(1), self.ends.expand(self.n, -1)], 1)
            gathered = sources.index_select(1, self.route).view_as(through)
            if needed[1]:
                found[1] = self.summed(through * gathered, 1)
            if self.weights is not None:
                gathered = gathered * self.weights
            if needed[0]:
                found[0] = self.summed(shares.mT @ gathered, 0)
            if needed[2]:
                found[2] = self.summed(adjoints[1:] * (gathered @ self.table.mT), 2)
        return found


def _plain(
    lattice: Lattice,
    n: int,
    center: Tensor,
    table: Tensor,
    weights: Tensor | None,
    inverse: Tensor | None,
    local: Tensor,
    later: Tensor,
) -> Tensor:
    """What :class:`Carry` computes, of differentiable operations."""
    found = []
    for i in range(n):
        there = after(lattice, later, center)
        sums = product(there if weights is None else there * _at(weights, i, n), _at(table, i, n))
        later = lattice.ungroup((sums if inverse is None else sums * _at(inverse, i, n)) + _at(local, i, n))
        found.append(later)
    return torch.stack(found)


def after(lattice: Lattice, later: Tensor, center: Tensor) -> Tensor:
    """What each token leads to [X, B, S, V], less the center."""
    return lattice.follow(later, -center.expand(-1, lattice.n_states, 1).squeeze(-1))


def _at(x: Tensor, i: int, n: int) -> Tensor:
    """The part [1, ...] of position i; all prompts' [X, ...] where there is one position."""
    return x if n == 1 else x[i % len(x)].unsqueeze(0)
