"""Distributions proportional to a k-gram model times what an automaton weighs: their values, from end to start."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from jaxtyping import Float64, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from exo_toy import checks
from exo_toy.automata.automaton import RewardAutomaton
from exo_toy.automata.block import LogBlock
from exo_toy.automata.chain import KGramModel
from exo_toy.automata.recursion import Conditionals, Lattice, Table

Beta = float | int | Float64[Tensor, ""]
Starts = Int[Tensor, " X"] | None
# What transitions weigh, in nats, at most: sums over as many positions as fit into a memory are finite.
LARGEST = 1e290
# Entries X B S V that the positions of a block have together, at most.
LARGEST_BLOCK = 2**22


class Tables:
    """Log-tables [X or 1, C, V] of all positions, by groups; one that positions share is exponentiated once."""

    def __init__(self, lattice: Lattice, log_tables: Sequence[Tensor]) -> None:
        self.lattice, self.log_tables = lattice, log_tables
        # At once: what is made inside a checkpoint cannot be kept.
        self._last = Table.of(lattice.group(log_tables[-1], len(log_tables) - 1))

    def shared(self, t: int) -> bool:
        """Whether all positions from t on have one table."""
        return t >= len(self.log_tables) - 1

    def at(self, t: int) -> Table:
        """The table of position t."""
        return self._last if self.shared(t) else Table.of(self.log_at(t))

    def log_at(self, t: int) -> Tensor:
        """Its logarithms."""
        return self._last.log if self.shared(t) else self.lattice.group(self.log_tables[t], t)

    def over(self, positions: range) -> Table:
        """The tables of a block of descending positions, as :func:`over` has them."""
        if self.shared(positions[-1]):
            return self._last
        return Table.of(over(self.lattice, self.log_tables, positions))

    def blocks(self, others: Sequence[Tensor] = ()) -> list[range]:
        """Descending positions that are taken together, from the end; ``others`` are tables that belong to them.

        There are about √T in a block, as checkpoints are best; fewer where so many would take too much memory. Prompts
        with tables of their own, and positions before the k-th, with fewer contexts, stand alone.
        """
        lattice, length = self.lattice, self.lattice.space.length
        size = min(math.ceil(math.sqrt(length)), max(1, LARGEST_BLOCK // lattice.n_entries))
        if any(len(table) > 1 for tables in (self.log_tables, others) for table in tables[lattice.order :]):
            size = 1
        ends = [*range(length, lattice.order, -size), *range(lattice.order, 0, -1), 0]
        return [range(last - 1, first - 1, -1) for last, first in itertools.pairwise(ends)]


class Values:
    r"""The backward recursion of :mod:`exo_toy.automata.recursion` over all positions of a space.

    Log-values are kept close to 0, as offset + value: far from the end they are large, and would lose digits of the
    differences that conditionals are made of.

    Args:
        model: whose space, order and number of positions with a table of their own these are.
        log_tables: log-weights at most 0, in the place of the model's log-probabilities.
        transitions: [S, V] of an automaton.
        edge: [S, V] log-weight of a transition.
        end: [S] log-weight of ending in a state.
        starts: [X or 1] states before the first token.
    """

    def __init__(
        self,
        model: KGramModel,
        log_tables: Sequence[Tensor],
        transitions: Tensor,
        edge: Tensor,
        end: Tensor,
        starts: Tensor,
    ) -> None:
        self.space, self.lattice = model.space, Lattice(model.space, model.order, transitions)
        self.tables = Tables(self.lattice, log_tables)
        self.transitions, self.edge, self.end, self.starts = transitions, edge, end, starts
        # Square-root checkpoints; small blocks are up to four times as long, for a block has costs of its own.
        # Positions before the k-th, with fewer contexts, stand alone.
        root = math.ceil(math.sqrt(self.space.length))
        size = max(root, min(4 * root, 2**18 // self.lattice.n_entries))
        self.borders = [*range(model.order), *range(model.order, self.space.length, size), self.space.length]

    @property
    def at_end(self) -> Tensor:
        """Values [1, S, C] behind the last position."""
        return self.end[None, :, None].expand(1, -1, self.lattice.n_contexts)

    @cached_property
    def checkpoints(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Values [X, S, C] and offsets [X] at the borders of blocks of positions."""
        values = self.at_end
        offset = values.new_zeros(1)
        found = {self.space.length: (values, offset)}
        for first, last in reversed(list(zip(self.borders, self.borders[1:], strict=False))):
            values = self._earlier(values, offset, range(last - 1, first - 1, -1))
            values, offset = recentred(values, offset)
            found[first] = (values, offset)
        return found

    def log_sum(self) -> Float64[Tensor, " X"]:
        """Log of the sum of all weights, from the start."""
        values, offset = self.checkpoints[0]
        return offset + at_start(values, self.starts)

    def following(self) -> Iterator[tuple[int, Tensor]]:
        """Positions in order, each with what every token leads to and earns [X, B, S, V], up to a constant."""
        for first, last in zip(self.borders, self.borders[1:], strict=False):
            values, offset = self.checkpoints[last]
            inner = range(last - 1, first, -1)
            later = [values, *(self._log_values(values, offset, inner, whole=True) if inner else ())]
            for t in range(first, last):
                yield t, self.weigh(later.pop(), offset)

    def following_at(self, t: int) -> Tensor:
        """What :meth:`following` has at one position."""
        last = next(border for border in self.borders if border > t)
        values, offset = self.checkpoints[last]
        if last > t + 1:
            values = self._earlier(values, offset, range(last - 1, t, -1))
        return self.weigh(values, offset)

    def weigh(self, values: Tensor, offset: Tensor) -> Tensor:
        """[X, B, S, V] what a token leads to and earns."""
        return self.lattice.follow(values, self.end - offset.unsqueeze(-1)) + self.edge

    def mean_to_the_end(
        self, step: Callable[..., tuple[Tensor, ...]], carried: tuple[Tensor, ...], others: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """Quantities carried along with the values, from [1, S, C] at the end to [X] at the start of each prompt.

        ``step`` makes those of a block's last position, given its descending positions, their conditionals, and those
        behind the first; ``others`` are tables that it uses besides.
        """

        def one(positions: range, values: Tensor, offset: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
            found = self._log_values(values, offset, positions, whole=True)
            q = Conditionals(self.tables.over(positions), self.weigh(behind(found, values), offset))
            return *recentred(found[-1], offset), *step(positions, q, *carried)

        start = (self.at_end, self.at_end.new_zeros(1), *carried)
        return tuple(at_start(x, self.starts) for x in scan(one, self.tables.blocks(others), start)[2:])

    def _earlier(self, values: Tensor, offset: Tensor, positions: range) -> Tensor:
        """Values at the last of some descending positions, from those behind the first."""
        return self._log_values(values, offset, positions, whole=False)[-1]

    def _log_values(self, values: Tensor, offset: Tensor, positions: range, *, whole: bool) -> Tensor:
        """Values [n, X, S, C] at each of some descending positions, or at the last, from those behind the first."""
        shared = self.tables.shared(positions[-1])
        linear = self.tables.at(positions[-1]).linear.detach() if shared else None
        logs = [self.tables.log_at(t) for t in (positions[:1] if shared else positions)]
        end = self.end - offset.unsqueeze(-1)
        return LogBlock.apply(self.lattice, positions, whole, linear, values, end, self.edge, *logs)


def over(lattice: Lattice, tables: Sequence[Tensor], positions: range) -> Tensor:
    """Tables [X, C, ...] of descending positions by groups: [n, B, D, ...], or the one of all; of one, all prompts'."""
    last = len(tables) - 1
    alone = len(positions) == 1 or positions[-1] >= last
    found = [lattice.group(tables[min(t, last)], t) for t in (positions[-1:] if alone else positions)]
    return found[0] if alone else torch.cat(found)


def behind(found: Tensor, later: Tensor) -> Tensor:
    """What lies behind each of n positions [n, S, C], from what is found at them [n, 1, S, C]; of one, all prompts'."""
    return later if len(found) == 1 else torch.cat([later, found[:-1].squeeze(1)])


def scan(
    step: Callable[..., tuple[Tensor, ...]], blocks: Sequence[range], carried: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Steps for blocks of positions from the end; the backward pass keeps what comes out of each."""
    for positions in blocks:
        if torch.is_grad_enabled():
            carried = checkpoint(step, positions, *carried, use_reentrant=False, preserve_rng_state=False)
        else:
            carried = step(positions, *carried)
    return carried


def at_start(values: Tensor, starts: Tensor) -> Tensor:
    """[X] what values [X or 1, S, 1] of position 0 hold at the start of each prompt."""
    n_prompts = max(len(values), len(starts))
    starts = starts.expand(n_prompts).unsqueeze(-1)
    return values.squeeze(-1).expand(n_prompts, -1).gather(1, starts).squeeze(-1)


def recentred(values: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The same log-values with the largest at 0."""
    largest = values.detach().amax(2).amax(1)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    return values - largest[:, None, None], offset + largest


def tilted(model: KGramModel, automaton: RewardAutomaton, *, beta: Beta, starts: Starts = None) -> Values:
    """The optimal policy's values: the model times exp(r / beta)."""
    require_beta(beta)
    first = first_states(model, automaton, starts)
    edge, end = divided(automaton.rewards, beta), divided(automaton.final, beta)
    return Values(model, model.log_tables, automaton.transitions, edge, end, first)


def first_states(model: KGramModel, automaton: RewardAutomaton, starts: Starts) -> Tensor:
    """States before the first token of each prompt [X or 1], of an automaton that reads the model's tokens."""
    if automaton.vocab_size != model.space.vocab_size:
        raise ValueError(
            f"automaton must read the {model.space.vocab_size} tokens of the model; got {automaton.vocab_size}"
        )
    if starts is None:
        starts = torch.full((1,), automaton.start, dtype=torch.int64, device=automaton.transitions.device)
    if (
        not isinstance(starts, Tensor)
        or starts.is_floating_point()
        or starts.is_complex()
        or starts.dtype == torch.bool
    ):
        got = starts.dtype if isinstance(starts, Tensor) else type(starts).__name__
        raise ValueError(f"starts must be a tensor of an integer dtype; got {got}")
    if starts.ndim != 1 or len(starts) == 0 or (model.n_prompts > 1 and len(starts) not in (1, model.n_prompts)):
        raise ValueError(f"starts must have shape [{model.n_prompts}] (X prompts); got {list(starts.shape)}")
    bad = (starts < 0) | (starts >= automaton.n_states)
    message = f"starts must be states in 0..{automaton.n_states - 1}"
    checks.require_values([starts], (bad, lambda: f"{message}; got {checks.first_bad(starts, bad)}"))
    return starts.to(torch.int64)


def possible(values: Values) -> Values:
    """The same values, if something is allowed for every prompt."""
    log_sum = values.log_sum().detach()
    bad = log_sum == -torch.inf
    allowed = "automaton must allow a completion of positive probability for every prompt"
    checks.require_values([log_sum], (bad, lambda: f"{allowed}; not so for prompt {bad.nonzero()[0].item()}"))
    return values


def aligned(model: KGramModel, other: KGramModel) -> tuple[KGramModel, KGramModel]:
    """Two models of one space with tables of one order."""
    if model.space != other.space:
        raise ValueError(f"models must be over one space; got {model.space} and {other.space}")
    if model.n_prompts != other.n_prompts and 1 not in (model.n_prompts, other.n_prompts):
        raise ValueError(f"models must be for the same prompts; got {model.n_prompts} and {other.n_prompts}")
    order = max(model.order, other.order)
    return model.lifted(order), other.lifted(order)


def require_beta(beta: Beta) -> None:
    """A number above 0, or a scalar tensor that holds one."""
    if not isinstance(beta, Tensor):
        checks.require_positive(beta=beta)
        return
    if beta.shape != () or beta.dtype != torch.float64:
        raise ValueError(f"beta must be a number or a float64 scalar; got {beta.dtype} of shape {list(beta.shape)}")
    checks.require_values([beta], (~((beta > 0) & (beta < torch.inf)), lambda: f"beta must be above 0; got {beta}"))


def divided(rewards: Tensor, beta: Beta) -> Tensor:
    """r / beta, whose gradient in beta is finite where r is -inf; never so large that sums would overflow."""
    forbidden = rewards == -torch.inf
    finite = rewards.masked_fill(forbidden, 0.0) / beta
    bad = ~(finite.detach().abs() < LARGEST)
    message = f"beta must be so large that finite rewards / beta are below {LARGEST:g} in size"
    checks.require_values(
        [finite.detach()], (bad, lambda: f"{message}; got beta {beta}, reward {checks.first_bad(rewards, bad)}")
    )
    return finite.masked_fill(forbidden, -torch.inf)
