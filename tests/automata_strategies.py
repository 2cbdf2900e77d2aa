"""Hypothesis strategies for reward automata; S and V distinct, rewards of integers so that sums are exact.

They draw what ``RewardAutomaton(*parts)`` takes: the run-time checks of its annotations draw random numbers, which
Hypothesis does not allow within a strategy.
"""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor, int]


@st.composite
def automata(draw: st.DrawFn, *, vocab_size: int | None = None, max_states: int = 4, forbidding: bool = True) -> Parts:
    """Small automata, any start, rewards of -2..2, in half of them a fifth -inf if they may forbid.

    The share that earns something is drawn too: where it is small, states differ by what comes later only.
    """
    n_tokens = vocab_size or draw(st.integers(1, 3))
    n_states = draw(st.integers(1, max_states).filter(lambda size: size != n_tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    transitions = torch.randint(n_states, (n_states, n_tokens), generator=generator)
    table = torch.randint(-2, 3, (n_states, n_tokens + 1), generator=generator).double()
    share = draw(st.sampled_from([0.15, 0.4, 1.0]))
    table *= torch.rand(table.shape, generator=generator) < share
    if forbidding and draw(st.booleans()):
        table[torch.rand(table.shape, generator=generator) < 0.2] = -math.inf
    return transitions, table[:, :-1], table[:, -1], draw(st.integers(0, n_states - 1))


@st.composite
def copied(draw: st.DrawFn, parts: Parts, *, unit: float = 1.0) -> Parts:
    """The same reward with each state two or three times, rewards moved along by potentials of whole units."""
    transitions, rewards, final, start = parts
    n_states, vocab_size = transitions.shape
    copies = draw(st.integers(2, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    original = torch.arange(n_states).repeat(copies)
    which = torch.randint(copies, (len(original), vocab_size), generator=generator)
    transitions = transitions[original] + n_states * which
    potential = unit * torch.randint(-3, 4, (len(original),), generator=generator).double()
    rewards = rewards[original] + potential[transitions] - potential.unsqueeze(-1)
    return transitions, rewards, final[original] - potential + potential[start], start
