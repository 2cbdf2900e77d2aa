"""Automata from a step function, from tables over positions, and for a few rewards that need no pattern."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from exo_toy import checks
from exo_toy.automata.automaton import RewardAutomaton

State = TypeVar("State", bound=Hashable)


def no_final_reward(state: Hashable) -> float:
    """0, whatever the state."""
    return 0.0


def from_function(
    step: Callable[[State, int], tuple[State, float]],
    vocab_size: int,
    start: State,
    *,
    max_states: int,
    final: Callable[[State], float] = no_final_reward,
) -> RewardAutomaton:
    r"""The automaton of a step function, explored from the start.

    Args:
        step: (state, token) -> (next state, reward ρ), called once for every state that is reached and every token
            0..V-1. States are told apart by ``==`` and their hash.
        vocab_size: V, at least 1.
        start: the state before the first token.
        max_states: how many states there may be, at least 1.
        final: state -> φ, the reward for ending there.

    Returns:
        States numbered breadth first in token order: the start is 0. They are not minimised.

    Raises:
        ValueError: more than ``max_states`` states, a reward that is NaN or +inf.

    Example:
        >>> repeats = from_function(lambda last, a: (a, float(a == last)), 2, None, max_states=9)
        >>> repeats.n_states, repeats.reward(torch.tensor([1, 1, 1, 0, 1])).item()
        (3, 2.0)
    """
    checks.require_integer("vocab_size", vocab_size, at_least=1)
    checks.require_integer("max_states", max_states, at_least=1)
    number = {start: 0}
    states = [start]
    transitions, rewards = [], []
    for state in states:  # grows while it is read
        followers, earned = zip(*(step(state, token) for token in range(vocab_size)), strict=True)
        for follower in followers:
            if follower not in number:
                number[follower] = len(states)
                states.append(follower)
        if len(states) > max_states:
            raise ValueError(f"max_states must be at least the number of states reached; got {max_states}, too few")
        transitions.append([number[follower] for follower in followers])
        rewards.append(earned)
    return RewardAutomaton(
        torch.tensor(transitions),
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor([final(state) for state in states], dtype=torch.float64),
    )


def at_positions(table: Float[Tensor, "T V"]) -> RewardAutomaton:
    r"""A reward for each token at each position; a counter of T + 1 states.

    .. math::
        r(y) = \sum_{t < \min(|y|, T)} R_{t, y_t}

    Minus the Hamming distance to a phrase w is :math:`R_{t,a} = -\mathbb{1}[a \ne w_t]`.

    Args:
        table: [T, V] R, of a floating-point dtype; what comes at position T or later earns nothing.

    Returns:
        State t has read t tokens, state T at least T. Differentiable in the table.

    Raises:
        ValueError: a wrong shape or dtype, a reward that is NaN or +inf.

    Example:
        >>> at_positions(torch.tensor([[0.0, 1.0], [2.0, 0.0]])).reward(torch.tensor([1, 0, 1])).item()
        3.0
    """
    checks.require_floating(table=table)
    checks.require_shape("T V", table=table)
    n_positions, vocab_size = table.shape
    counter = torch.arange(1, n_positions + 2, device=table.device).clamp(max=n_positions)
    rewards = torch.cat([table.double(), torch.zeros(1, vocab_size, dtype=torch.float64, device=table.device)])
    return RewardAutomaton(counter.unsqueeze(-1).repeat(1, vocab_size), rewards, rewards.new_zeros(n_positions + 1))


def per_token(values: Float[Tensor, " V"]) -> RewardAutomaton:
    r"""A reward for each token wherever it stands, :math:`r(y) = \sum_t R_{y_t}`; one state.

    Args:
        values: [V] R, of a floating-point dtype; -inf forbids a token.

    Returns:
        An automaton that is differentiable in the values.

    Raises:
        ValueError: a wrong shape or dtype, a reward that is NaN or +inf.

    Example:
        >>> per_token(torch.tensor([0.0, 1.0])).reward(torch.tensor([1, 0, 1])).item()
        2.0
    """
    checks.require_floating(values=values)
    checks.require_shape("V", values=values)
    rewards = values.double().unsqueeze(0)
    return RewardAutomaton(torch.zeros_like(rewards, dtype=torch.int64), rewards, rewards.new_zeros(1))


def even_count(counted: Bool[Tensor, " V"], *, reward: float | int = 1.0) -> RewardAutomaton:
    r"""A reward for strings in which the counted tokens occur an even number of times; two states.

    Args:
        counted: [V] True for the tokens that count.
        reward: what an even number earns at the end.

    Raises:
        ValueError: a wrong shape or dtype, a reward that is NaN or +inf.

    Example:
        >>> even_count(torch.tensor([False, True])).reward(torch.tensor([[1, 0, 1], [0, 0, 1]])).tolist()
        [1.0, 0.0]
    """
    checks.require_real("reward", reward, allowed="finite, or -inf for what is forbidden",
                        low=-math.inf, high=math.inf, low_allowed=True)  # fmt: skip
    checks.require_mask(counted=counted)
    checks.require_shape("V", counted=counted)
    transitions = torch.stack([counted, ~counted]).to(torch.int64)
    final = torch.tensor([reward, 0.0], dtype=torch.float64, device=counted.device)
    return RewardAutomaton(transitions, torch.zeros_like(transitions, dtype=torch.float64), final)


def token_numbers(vocabulary: Sequence[str]) -> dict[str, int]:
    """The number of each token of a vocabulary, after a check that they are strings, none empty and none twice."""
    if not isinstance(vocabulary, Sequence):
        raise ValueError(f"vocabulary must be a sequence of strings; got {type(vocabulary).__name__}")
    number: dict[str, int] = {}
    for place, token in enumerate(vocabulary):
        if not isinstance(token, str) or not token or token in number:
            raise ValueError(f"vocabulary must hold distinct strings, none empty; got {token!r} at place {place}")
        number[token] = place
    if not number:
        raise ValueError("vocabulary must hold one token at least; got none")
    return number
