"""Expectations of sums along completions, under a k-gram model or the optimal policy that it leads to."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from exo_toy.automata.automaton import RewardAutomaton
from exo_toy.automata.carry import Own, after, carry, carry_sum, less_mean, with_ends
from exo_toy.automata.chain import KGramModel
from exo_toy.automata.recursion import Conditionals, Lattice, expectation
from exo_toy.automata.values import Tables, Values, at_start, behind, over, scan


class Chain:
    """A k-gram model with an automaton's states along: what is carried under the model itself.

    Args:
        model: the model.
        transitions: [S, V] of an automaton.
        starts: [X or 1] states before the first token.
    """

    def __init__(self, model: KGramModel, transitions: Tensor, starts: Tensor) -> None:
        self.lattice, self.starts = Lattice(model.space, model.order, transitions), starts
        self.tables = Tables(self.lattice, model.log_tables)

    def mean_to_the_end(
        self, step: Callable[..., tuple[Tensor, ...]], carried: tuple[Tensor, ...], others: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """As :meth:`Values.mean_to_the_end`, with the model's tables for conditionals."""

        def one(positions: range, *carried: Tensor) -> tuple[Tensor, ...]:
            return step(positions, Own(self.tables.over(positions), self.lattice.n_states), *carried)

        return tuple(at_start(x, self.starts) for x in scan(one, self.tables.blocks(others), carried))


def sum_by_context(model: KGramModel, local: list[Tensor]) -> Float64[Tensor, " X"]:
    """Expectation of a sum over positions of what depends on the context alone, [X, C] for every table."""
    one = local[0].new_zeros(1, dtype=torch.int64)
    chain = Chain(model, one.expand(1, model.space.vocab_size), one)

    def by_state(positions: range, _: Own) -> Tensor:
        return over(chain.lattice, local, positions).unsqueeze(2)

    return expected_sum(chain, by_state, local[0].new_zeros(1), local)


def expected_sum(
    along: Chain | Values, local: Callable[[range, Any], Tensor], end: Tensor, others: Sequence[Tensor] = ()
) -> Float64[Tensor, " X"]:
    """Expectation of terms [n, B, S, D] summed over positions, and of what ending in a state adds [S].

    Terms may be +inf, which counts in full where its probability is not 0.
    """

    def step(positions: range, q: Own | Conditionals, *carried: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return carry_sum(along.lattice, positions, q, local(positions, q), *carried)

    infinite = end.detach() == torch.inf
    shape = (1, -1, along.lattice.n_contexts)
    later, infinite = (x[None, :, None].expand(shape) for x in (end.masked_fill(infinite, 0.0), infinite))
    total, center, hit = along.mean_to_the_end(step, (later, torch.zeros_like(later[..., :1]), infinite), others)
    return (center + total).masked_fill(hit, torch.inf)


def mean_cost(chain: Chain, cost: Tensor, end: Tensor, _: range, q: Own) -> Tensor:
    """Mean over tokens [n, B, S, D] of what transitions [S, V] and ending [S] cost."""
    return expectation(with_ends(chain.lattice, cost, end).expand(1, q.table.log.shape[1], -1, -1), q.table)


def moments(along: Chain | Values, automaton: RewardAutomaton) -> tuple[Tensor, Tensor]:
    """Mean and variance of the reward where it is finite."""
    lattice = along.lattice
    rewards, final = (x.masked_fill(x == -torch.inf, 0.0) for x in (automaton.rewards, automaton.final))

    def step(
        positions: range, q: Own | Conditionals, first: Tensor, second: Tensor, center: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        earned = with_ends(lattice, rewards, final).expand(1, q.table.log.shape[1], -1, -1)
        means = carry(lattice, positions, q, q.mean(earned), first, center)
        total = after(lattice, behind(means, first), center) + earned
        variances = carry(lattice, positions, q, _variance(total, q), second, torch.zeros_like(center))
        mean, center = less_mean(means[-1], center)
        return mean, variances[-1], center

    first = final[None, :, None].expand(1, -1, lattice.n_contexts)
    carried = first, torch.zeros_like(first), torch.zeros_like(first[..., :1])
    mean, variance, center = along.mean_to_the_end(step, carried)
    return center + mean, variance


def _variance(values: Tensor, q: Own | Conditionals) -> Tensor:
    """Variance over tokens [n, B, S, D] of values [n, B, S, V]."""
    center = values.detach().mean(-1, keepdim=True)
    return q.mean((values - center).square()) - (q.mean(values) - center).square()
