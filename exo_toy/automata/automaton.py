"""Rewards that a finite automaton computes: its states, its sum with others, and strings run through it.

A state reads a token, earns the reward of the transition and moves on; where the string ends, the final reward of the
state reached is added. An eos is a token like the others here: its transition is taken, then the string ends. What ends
a string, and how long it may be, is the business of the space.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor

from exo_toy import checks


@dataclass(frozen=True, eq=False)
class RewardAutomaton:
    r"""A reward of token strings of any length, computed by a finite automaton.

    .. math::
        r(y_1 \dots y_n) = \sum_{t=1}^{n} \rho(s_{t-1}, y_t) + \phi(s_n), \qquad s_t = \delta(s_{t-1}, y_t)

    ``a + b`` is the automaton of the sum of two rewards, on the pairs of states that can be reached; ``c * a`` that of
    a multiple. Both, and :meth:`reward`, are differentiable in ``rewards`` and ``final``.

    Source: the weighted automata of Mohri, "Finite-State Transducers in Language and Speech Processing", Computational
    Linguistics 23(2), 1997, deterministic ones.

    Args:
        transitions: [S, V] δ, the next state, in 0..S-1.
        rewards: [S, V] ρ, the reward of a transition: finite, or -inf where it is forbidden.
        final: [S] φ, the reward for ending in a state: finite, or -inf where no string may end.
        start: the state before the first token.

    Raises:
        ValueError: a wrong shape, dtype or device, a state out of range, a reward that is NaN or +inf.

    Example:
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> (ones + 2 * ones).reward(torch.tensor([[0, 1, 1], [0, 0, 1]]))
        tensor([6., 3.], dtype=torch.float64)
    """

    transitions: Int64[Tensor, "S V"]
    rewards: Float64[Tensor, "S V"]
    final: Float64[Tensor, " S"]
    start: int = 0

    def __post_init__(self) -> None:
        transitions, rewards, final = self.transitions, self.rewards, self.final
        for name, tensor, dtype in (
            ("transitions", transitions, torch.int64),
            ("rewards", rewards, torch.float64),
            ("final", final, torch.float64),
        ):
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name} must be a {dtype} tensor; got {got}")
        checks.require_shape("S V", transitions=transitions, rewards=rewards)
        if transitions.numel() == 0:
            raise ValueError(f"transitions must have a state and a token at least; got shape {list(transitions.shape)}")
        n_states = len(transitions)
        if final.shape != (n_states,) or final.device != transitions.device:
            raise ValueError(
                f"final must have shape [{n_states}] (S states of transitions) on {transitions.device}; "
                f"got {list(final.shape)} on {final.device}"
            )
        checks.require_integer("start", self.start, at_least=0)
        if self.start >= n_states:
            raise ValueError(f"start must be a state in 0..{n_states - 1}; got {self.start}")
        outside = (transitions < 0) | (transitions >= n_states)
        checks.require_values(
            [transitions],
            (
                outside,
                lambda: (
                    f"transitions must hold states in 0..{n_states - 1}; got {checks.first_bad(transitions, outside)}"
                ),
            ),
        )
        _require_rewards("rewards", rewards.detach())
        _require_rewards("final", final.detach())

    @property
    def n_states(self) -> int:
        """S."""
        return self.transitions.shape[0]

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.transitions.shape[1]

    def to(self, device: torch.device | str) -> "RewardAutomaton":
        """The same automaton on a device."""
        return RewardAutomaton(self.transitions.to(device), self.rewards.to(device), self.final.to(device), self.start)

    def states(self, tokens: Int[Tensor, "*leading T"]) -> Int64[Tensor, "*leading T_and_1"]:
        """States passed through: s_0, the start, to s_T.

        Raises:
            ValueError: tokens of no integer dtype or out of range.

        Example:
            >>> zeros = torch.zeros(2, 3).double()
            >>> parity = RewardAutomaton(torch.tensor([[0, 1], [1, 0]]), zeros[:, :2], zeros[:, 2])
            >>> parity.states(torch.tensor([1, 0, 1])).tolist()
            [0, 1, 1, 0]
        """
        self._require_tokens(tokens)
        state = torch.full(tokens.shape[:-1], self.start, dtype=torch.int64, device=self.transitions.device)
        passed = [state]
        for token in tokens.to(torch.int64).unbind(-1):
            state = self.transitions[state, token]
            passed.append(state)
        return torch.stack(passed, -1)

    def reward(
        self, tokens: Int[Tensor, "*leading T"], lengths: Int[Tensor, "*leading"] | None = None
    ) -> Float64[Tensor, "*leading"]:
        """The reward of token strings.

        Args:
            tokens: [..., T] tokens in 0..V-1; T may be 0.
            lengths: [...] how many tokens of each string count, in 0..T, an eos included; what stands after them may
                be anything. None for all T.

        Returns:
            [...] float64: finite, or -inf for a forbidden string.

        Raises:
            ValueError: tokens or lengths of no integer dtype, out of range or of a wrong shape.

        Example:
            >>> ones = torch.ones(1, 3).double()
            >>> length = RewardAutomaton(torch.tensor([[0, 0]]), ones[:, :2], ones[:, 2])
            >>> length.reward(torch.tensor([[0, 1, 1], [0, -1, -1]]), torch.tensor([3, 1])).tolist()
            [4.0, 2.0]
        """
        _require_strings(tokens)
        if lengths is None:
            lengths = torch.full(tokens.shape[:-1], tokens.shape[-1], device=tokens.device)
        running = self._running(tokens, lengths)
        tokens = tokens.masked_fill(~running, 0).to(torch.int64)
        states = self.states(tokens)
        earned = torch.where(running, self.rewards[states[..., :-1], tokens], 0.0).sum(-1)
        return earned + self.final[states.gather(-1, lengths.to(torch.int64).unsqueeze(-1)).squeeze(-1)]

    def trim(self) -> "RewardAutomaton":
        """The states that some string reaches, numbered breadth first in token order: the start is 0."""
        order = reached(self.transitions, torch.ones_like(self.transitions, dtype=torch.bool), self.start)
        number = torch.zeros(self.n_states, dtype=torch.int64, device=order.device)
        number[order] = torch.arange(len(order), device=order.device)
        return RewardAutomaton(number[self.transitions[order]], self.rewards[order], self.final[order])

    def __add__(self, other: "RewardAutomaton") -> "RewardAutomaton":
        if not isinstance(other, RewardAutomaton):
            return NotImplemented
        if other.vocab_size != self.vocab_size:
            raise ValueError(
                f"automata must have one vocabulary to be added; got {self.vocab_size} and {other.vocab_size} tokens"
            )
        if other.transitions.device != self.transitions.device:
            raise ValueError(
                f"automata must be on one device to be added; got {self.transitions.device} "
                f"and {other.transitions.device}"
            )
        # A pair of states (i, j) is numbered i * S_other + j until all that can be reached are known.
        first = self.start * other.n_states + other.start
        frontier = [first]
        known = set(frontier)
        while frontier:
            following = _next_pairs(self, other, torch.tensor(frontier, device=self.transitions.device)).unique()
            frontier = [pair for pair in following.tolist() if pair not in known]
            known.update(frontier)
        pairs = torch.tensor(sorted(known), device=self.transitions.device)
        transitions = torch.searchsorted(pairs, _next_pairs(self, other, pairs))
        i, j = pairs // other.n_states, pairs % other.n_states
        rewards, final = self.rewards[i] + other.rewards[j], self.final[i] + other.final[j]
        return RewardAutomaton(transitions, rewards, final, int(torch.searchsorted(pairs, first)))

    def __mul__(self, factor: float | int) -> "RewardAutomaton":
        checks.require_real("factor", factor, allowed="a finite number", low=-math.inf, high=math.inf)
        if factor <= 0:
            values = torch.cat([self.rewards.detach().flatten(), self.final.detach()])
            message = f"factor must be above 0 for an automaton that forbids strings (-inf); got {factor}"
            checks.require_values([values], (values == -math.inf, lambda: message))
        return RewardAutomaton(self.transitions, factor * self.rewards, factor * self.final, self.start)

    __rmul__ = __mul__

    def _require_tokens(self, tokens: Tensor) -> None:
        """Integers in 0..V-1."""
        _require_strings(tokens)
        bad = (tokens < 0) | (tokens >= self.vocab_size)
        checks.require_values(
            [tokens],
            (bad, lambda: f"tokens must be in 0..{self.vocab_size - 1}; got {checks.first_bad(tokens, bad)}"),
        )

    def _running(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[..., T] which tokens count."""
        _require_integers("lengths", lengths)
        if lengths.shape != tokens.shape[:-1]:
            raise ValueError(f"lengths must have shape {list(tokens.shape[:-1])}; got {list(lengths.shape)}")
        bad = (lengths < 0) | (lengths > tokens.shape[-1])
        checks.require_values(
            [lengths],
            (bad, lambda: f"lengths must be in 0..{tokens.shape[-1]}; got {checks.first_bad(lengths, bad)}"),
        )
        return torch.arange(tokens.shape[-1], device=tokens.device) < lengths.unsqueeze(-1)


def reached(transitions: Int64[Tensor, "S V"], allowed: Tensor, start: int) -> Int64[Tensor, " R"]:
    """States reached from the start over allowed transitions, breadth first, in token order."""
    order = torch.tensor([start], device=transitions.device)
    seen = torch.zeros(len(transitions), dtype=torch.bool, device=transitions.device)
    seen[order] = True
    frontier = order
    while len(frontier):
        nexts = transitions[frontier][allowed[frontier]]
        states, which = nexts[~seen[nexts]].unique(return_inverse=True)
        place = torch.arange(len(which), device=which.device)
        first = torch.full_like(states, len(which)).scatter_reduce(0, which, place, "amin")
        frontier = states[first.argsort()]
        seen[frontier] = True
        order = torch.cat([order, frontier])
    return order


def _next_pairs(a: RewardAutomaton, b: RewardAutomaton, pairs: Tensor) -> Tensor:
    """[P, V] numbers of the pairs of states that follow pairs [P]."""
    return a.transitions[pairs // b.n_states] * b.n_states + b.transitions[pairs % b.n_states]


def _require_rewards(name: str, values: Tensor) -> None:
    """Finite, or -inf."""
    bad = values.isnan() | (values == math.inf)
    checks.require_values(
        [values],
        (bad, lambda: f"{name} must be finite, or -inf where forbidden; got {checks.first_bad(values, bad)}"),
    )


def _require_strings(tokens: Tensor) -> None:
    """Integers [..., T]."""
    _require_integers("tokens", tokens)
    if tokens.ndim == 0:
        raise ValueError("tokens must have shape [..., T]; got a scalar")


def _require_integers(name: str, tensor: Tensor) -> None:
    """A tensor of an integer dtype."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in (
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64
    ):  # fmt: skip
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be a tensor of an integer dtype; got {got}")
