"""Log-values over a block of positions: in linear space where nothing gets lost there, else in log space.

In linear space a position costs a gather, a multiplication and a matrix product: its numbers share a scale, which is
looked at every few positions. If one comes out too small or too large to be trusted, each state has a scale of its own,
looked at every position (:func:`levelled`), and if that does not help, the block is taken in log space.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from exo_toy.automata.recursion import LOWEST, Conditionals, Lattice, Table

# Positions between two looks at the scale.
STRIDE = 16
# What lies between these is right: numbers that underflow at 2e-308 are lost beside a sum of at least 1e-100, before
# and after it is divided by a scale of at least 1e-100, as long as nothing multiplies them by much more than 1e50.
SMALL, LARGE = 1e-100, 1e50
# Entries X B S V of all positions together, up to which the backward pass finds blocks as the forward pass left them.
MOST_KEPT = 2**22


class LogBlock(torch.autograd.Function):
    """Log-values at descending positions; for the backward pass it keeps the values it began with, and little more."""

    @staticmethod
    def forward(ctx, lattice, positions, whole, linear, values, end, edge, *logs):  # type: ignore[no-untyped-def]
        """Values [n, X, S, C] at each of n positions if ``whole``, else [1, X, S, C] at the last, from those behind.

        ``logs`` is the log-table [X, B, D, V] of each position, or one for all of them and ``linear`` its exponential.
        """
        ctx.lattice, ctx.positions, ctx.whole, ctx.linear = lattice, positions, whole, linear
        ctx.save_for_backward(values, end, edge, *logs)
        # Contexts before the k-th position are of another number, and prompts that come together here a rare thing.
        alike = positions[-1] >= lattice.order and len({len(log) for log in logs} | {len(logs[0])}) == 1
        ctx.together = alike and len(positions) > 1 and len(values) in (1, len(logs[0]))
        ctx.trusted, ctx.run = False, None
        few = len(logs[0]) * lattice.n_entries * lattice.space.length <= MOST_KEPT
        if ctx.together:
            inputs = (lattice, len(positions), linear, values, end, edge, logs)
            if not _wakes(lattice, values, edge):
                # Where some are 0 in truth, all positions are looked at; so they are where some seem to be.
                again = few and any(ctx.needs_input_grad)
                keep = whole or again or bool((values == -torch.inf).any())
                run = Linear(*inputs, keep=keep)
                if run.low < SMALL and not keep:
                    run = Linear(*inputs, keep=True)
                ctx.trusted = run.trusted
                if ctx.trusted:
                    ctx.run = run if again else None
                    return run.log_values(whole=whole)
            found = levelled(*inputs, whole=whole)
            if found is not None:
                return found
        return _careful(lattice, positions, whole, values, end, edge, *logs)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        """By hand where the block can be taken in linear space, else by differentiating the careful recursion."""
        inputs = ctx.saved_tensors
        again = torch.is_grad_enabled()
        if ctx.together and not again:
            values, end, edge, *logs = inputs
            run = ctx.run or Linear(ctx.lattice, len(ctx.positions), ctx.linear, values, end, edge, logs, keep=True)
            if ctx.trusted or run.trusted:
                return None, None, None, None, *run.gradients(gradient, tables=any(ctx.needs_input_grad[7:]))
        with torch.enable_grad():
            # Nodes of their own: what values owe to the tables behind them is not this block's to count.
            inputs = [x.view_as(x) if again else x.detach().requires_grad_(x.requires_grad) for x in inputs]
            result = _careful(ctx.lattice, ctx.positions, ctx.whole, *inputs)
            needed = [i for i, flag in enumerate(ctx.needs_input_grad[4:]) if flag]
            found = torch.autograd.grad(
                result, [inputs[i] for i in needed], gradient, create_graph=again, allow_unused=True
            )
        gradients: list[Tensor | None] = [None] * len(inputs)
        for i, part in zip(needed, found, strict=True):
            gradients[i] = part
        return None, None, None, None, *gradients


class Linear:
    """A block of positions in linear space.

    Values are kept relative to each state's largest at the beginning of the block, to the largest weight of a
    transition at every position, and to the largest of all at every ``STRIDE``-th. ``sources`` holds the values behind
    each position [X B S D], then the ends [X S] if there is an eos, as :meth:`Lattice.route` expects them: with
    ``keep`` for all n positions, else the latest. ``low`` and ``high`` are the least value and the largest source.
    """

    def __init__(
        self,
        lattice: Lattice,
        n: int,
        linear: Tensor | None,
        values: Tensor,
        end: Tensor,
        edge: Tensor,
        logs: Sequence[Tensor],
        *,
        keep: bool = False,
    ) -> None:
        self.lattice, self.keep = lattice, keep
        self.values, self.end, self.edge, self.logs = values, end, edge, logs
        self.tables = [log.exp() for log in logs] if linear is None else [linear]
        n_prompts, n_groups, n_dropped, _ = self.shape = self.tables[0].shape
        n_rows, self.route = n_prompts * n_groups, lattice.route(n_prompts)
        n_states, n_tokens = edge.shape
        has_ends = lattice.space.eos is not None

        self.gauge = gauge = _finite(values.amax(2).amax(0))
        edge = (edge - gauge.unsqueeze(1)).add_(gauge.take(lattice.transitions))
        top = edge.max().clamp(min=LOWEST)
        self.factor = (edge - top).exp()
        self.size = n_rows * n_states * n_dropped
        n_kept = n + 1 if keep else STRIDE + 1
        self.sources = values.new_ones(n_kept, self.size + n_prompts * n_states * has_ends)
        self.sums = self.sources[:, : self.size].unflatten(1, (n_rows, n_states, n_dropped))
        self.weights = values.new_empty(n if keep else 1, n_rows, n_states, n_tokens)
        self.maxima: list[Tensor] = []
        self.sums[0] = self._by_rows(values - gauge.unsqueeze(1)).exp()
        sources, sums, log_scale = self.sources.unbind(), _matrices(self.sums), torch.zeros_like(top)
        weights, gathered = _matrices(self.weights), self.weights.flatten(1).unbind()
        tables = [_matrix(table).mT for table in self.tables]
        multiply = torch.mm if n_rows == 1 else torch.bmm
        ends, lows, highs, scales = (end - gauge).expand(n_prompts, -1).flatten(), [], [], [log_scale]
        for i in range(n):
            here, there, at = i % n_kept, (i + 1) % n_kept, i if keep else 0
            if i % STRIDE == 0 and i > 0:
                if not keep:
                    lows.append(self.sums.min())
                    highs.append(self.sources.max())
                self.maxima.append(sums[here].max())
                sums[here].div_(self.maxima[-1])
                log_scale = log_scale + self.maxima[-1].log()
                scales.append(log_scale)
            if has_ends:
                self.sources[here, self.size :] = (ends - (log_scale + i * top)).exp()
            torch.index_select(sources[here], 0, self.route, out=gathered[at])
            multiply(weights[at].mul_(self.factor), tables[i % len(tables)], out=sums[there])
        self.low = torch.stack([*lows, self.sums.min()]).min()
        self.high = torch.stack([*highs, self.sources.max()]).max()
        self.n, self.scales, self.top = n, scales, top

    def log_values(self, *, whole: bool) -> Tensor:
        """[n, X, S, C] at each of n positions if ``whole``, else [1, X, S, C] at the last."""
        n, top = self.n, self.top
        first, found = (1, self.sums[1:]) if whole else (n, self.sums[n % len(self.sums)].unsqueeze(0))
        # Of the n-th the scale has not been looked at.
        log_scales = torch.stack([self.scales[min(i, n - 1) // STRIDE] for i in range(first, n + 1)])
        log_scales = log_scales + torch.arange(first, n + 1, dtype=top.dtype, device=top.device) * top
        log_sums = found.log() + log_scales[:, None, None, None] + self.gauge.unsqueeze(1)
        return _by_context(self.lattice, log_sums, self.shape)

    @property
    def trusted(self) -> bool:
        """Whether no sum is too small, unless it is 0 in truth, nor anything too large."""
        if not self.high <= LARGE or any(largest < SMALL for largest in self.maxima):
            return False
        if self.low >= SMALL:
            return True
        return self.keep and bool(((self.sums >= SMALL) | (self.sums == 0)).all()) and self._support()

    def _support(self) -> bool:
        """Whether the sums are 0 exactly where nothing is allowed."""
        alive = self._by_rows(self.values) > -torch.inf
        ends = (self.end > -torch.inf).expand(self.shape[0], -1).flatten()
        allowed, supports = self.edge > -torch.inf, [(log > -torch.inf).flatten(0, 1).mT for log in self.logs]
        full = all(bool(support.all()) for support in supports)
        if not torch.equal(self.sums[0] > 0, alive):
            return False
        for i in range(1, len(self.sums)):
            before = alive
            source = alive.flatten() if self.lattice.space.eos is None else torch.cat([alive.flatten(), ends])
            there = source[self.route].unflatten(0, (len(alive), *allowed.shape)) & allowed
            if full:
                alive = there.any(-1, keepdim=True).expand_as(alive)
            else:
                alive = there.double() @ supports[(i - 1) % len(supports)].double() > 0
            if len(supports) == 1 and torch.equal(alive, before):
                # So it stays.
                return bool(((self.sums[i:] > 0) == alive).all())
            if not torch.equal(self.sums[i] > 0, alive):
                return False
        return True

    def gradients(self, gradient: Tensor, *, tables: bool) -> list[Tensor | None]:
        """Gradients of values, end, edge and the log-tables; none of these unless ``tables``."""
        n, rows = len(self.weights), self.shape[:2]
        adjoints = torch.zeros_like(self.sources)
        shares = adjoints[:, : self.size].unflatten(1, self.sums.shape[1:])
        # A sum of 0 has no weight in what follows.
        asked = self.sums[-len(gradient) :]
        shares[-len(gradient) :] = self._by_rows(gradient.flatten(0, 1)).view_as(asked) / asked.masked_fill(
            asked == 0, torch.inf
        )
        through, edge = torch.empty_like(self.weights[:1]), torch.zeros_like(self.weights[0])
        (out,), flat, weights = _matrices(through), through.flatten(), self.weights.unbind()
        adjoint, factors, maxima = adjoints.unbind(), _matrices(shares), list(self.maxima)
        matrices = [_matrix(table) for table in self.tables]
        multiply = torch.mm if self.sums.shape[1] == 1 else torch.bmm
        for i in reversed(range(n)):
            multiply(factors[i + 1], matrices[i % len(matrices)], out=out)
            edge.addcmul_(through[0], weights[i])
            through.mul_(self.factor)
            adjoint[i].index_add_(0, self.route, flat)
            if i and i % STRIDE == 0:
                factors[i].div_(maxima.pop())
        end = torch.zeros_like(self.end)
        if self.lattice.space.eos is not None:
            ended = (adjoints[:n, self.size :] * self.sources[:n, self.size :]).sum(0)
            end = ended.unflatten(0, (self.shape[0], -1)).sum_to_size(end.shape)
        values = self.lattice.ungroup((shares[0] * self.sums[0]).unflatten(0, rows)).sum_to_size(self.values.shape)
        by_table: list[Tensor | None] = [None] * len(self.logs)
        if tables and len(self.tables) == 1:
            # One product for all positions, whose rows come one below the other.
            left, right = (x.transpose(0, 1).flatten(1, 2) for x in (shares[1:], self.weights))
            by_table = [(left.mT @ right).unflatten(0, rows).mul_(self.tables[0])]
        elif tables:
            products = shares[1:].mT @ self.weights
            by_table = [x.unflatten(0, rows).mul_(table) for x, table in zip(products, self.tables, strict=True)]
        return [values, end, edge.sum(0), *by_table]

    def _by_rows(self, values: Tensor) -> Tensor:
        return _by_rows(self.lattice, values, self.shape)


def levelled(
    lattice: Lattice,
    n: int,
    linear: Tensor | None,
    values: Tensor,
    end: Tensor,
    edge: Tensor,
    logs: Sequence[Tensor],
    *,
    whole: bool,
) -> Tensor | None:
    """What :meth:`Linear.log_values` returns, with a scale for each state; None where a number is too small for that.

    Numbers and factors that are not 0 are at least ``SMALL``, so that no product of three of them underflows: a sum is
    0 where it is so in truth.
    """
    tables = [log.exp() for log in logs] if linear is None else [linear]
    shape, small = tables[0].shape, [_too_small(*pair) for pair in zip(tables, logs, strict=True)]
    tables, route = [_matrix(table).mT for table in tables], lattice.route(shape[0])
    ends = lattice.column == lattice.space.n_live
    # Numbers are relative to these: of each state's values [S], and of what ending in it adds.
    level, end_level = values.amax(2).amax(0), end.amax(0)
    rows = _by_rows(lattice, values - _finite(level).unsqueeze(1), shape)
    sums, ended = rows.exp(), (end - _finite(end_level)).exp().expand(shape[0], -1)
    small += [_too_small(sums, rows), _too_small(ended, end.expand_as(ended))]
    found = []
    for i in range(n):
        log_factor = edge + torch.where(ends, end_level[lattice.transitions], level[lattice.transitions])
        level = log_factor.amax(1)
        log_factor = log_factor - _finite(level).unsqueeze(1)
        factor = log_factor.exp()
        source = sums.flatten() if lattice.space.eos is None else torch.cat([sums.flatten(), ended.flatten()])
        weights = source.index_select(0, route).view(-1, *edge.shape).mul_(factor)
        sums = weights @ tables[i % len(tables)]
        largest = sums.amax(2).amax(0)
        level = level + largest.log()
        sums.div_(largest.masked_fill(largest == 0, 1.0).unsqueeze(1))
        small += [_too_small(factor, log_factor), ((sums > 0) & (sums < SMALL)).any()]
        if whole or i == n - 1:
            found.append(sums.log() + _finite(level).unsqueeze(1))
    return None if torch.stack(small).any() else _by_context(lattice, torch.stack(found), shape)


def _wakes(lattice: Lattice, values: Tensor, edge: Tensor) -> bool:
    """Whether a state from which nothing is allowed leads to one from which something is: no scale suits both."""
    level = values.amax(2).amax(0)
    return bool(((level == -torch.inf) & ((edge + level[lattice.transitions]).amax(1) > -torch.inf)).any())


def _too_small(numbers: Tensor, logs: Tensor) -> Tensor:
    """Whether numbers that are 0 or too near to it have a logarithm."""
    return ((numbers < SMALL) & (logs > -torch.inf)).any()


def _finite(level: Tensor) -> Tensor:
    """0 in place of -inf, from which nothing can be subtracted."""
    return level.masked_fill(level == -torch.inf, 0.0)


def _by_rows(lattice: Lattice, values: Tensor, shape: Sequence[int]) -> Tensor:
    """[X, S, C] to [X B, S, D], by a table's shape [X, B, D, V]; of several positions one below the other."""
    rows = lattice.regroup(values, lattice.order)
    return (rows.expand(shape[0], -1, -1, -1) if len(rows) == 1 else rows).flatten(0, 1)


def _by_context(lattice: Lattice, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse, [n, X B, S, D] to [n, X, S, C]."""
    return lattice.ungroup(rows.reshape(-1, shape[1], *rows.shape[2:])).unflatten(0, (-1, shape[0]))


def _matrices(batches: Tensor) -> tuple[Tensor, ...]:
    """The batch [X B, ...] of each position; where it is one matrix, that."""
    return batches.squeeze(1).unbind() if batches.shape[1] == 1 else batches.unbind()


def _matrix(table: Tensor) -> Tensor:
    """A table [X, B, D, V] as a batch of matrices, or the one matrix."""
    return table.flatten(0, 1) if table.shape[:2] != (1, 1) else table[0, 0]


def _careful(
    lattice: Lattice, positions: Sequence[int], whole: bool, values: Tensor, end: Tensor, edge: Tensor, *logs: Tensor
) -> Tensor:
    """The recursion with every sum checked, made of differentiable operations."""
    tables, found = [Table.of(log) for log in logs], []
    for i in range(len(positions)):
        g = lattice.follow(values, end) + edge
        values = lattice.ungroup(Conditionals(tables[i % len(tables)], g).log_sum)
        found.append(values)
    # Prompts part at the first position whose tables are their own.
    return torch.stack(torch.broadcast_tensors(*found) if whole else found[-1:])
