"""Drawn k-gram models and automata, what enumeration says of them, and a dynamic programme in plain Python."""

import math
from collections.abc import Callable
from functools import cached_property

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.automata import RewardAutomaton
from exo_toy.automata.chain import KGramModel
from exo_toy.spaces import SequenceSpace
from tests import sequence_strategies

INF = math.inf
# For what takes a second per ten examples: a third of the profile's.
few = settings(max_examples=settings().max_examples // 3)


def model(
    space: SequenceSpace, order: int, n_prompts: int, generator: torch.Generator, *, homogeneous: bool, holes: bool
) -> KGramModel:
    """Normal logits; with ``holes``, half of them -inf."""
    n_tables = order + 1 if homogeneous else space.length
    shapes = sequence_strategies.table_shapes(space, order, n_prompts)[:n_tables]
    logits = [sequence_strategies.normal(shape, generator) for shape in shapes]
    logits = [sequence_strategies.with_holes(x, generator) if holes else x for x in logits]
    return KGramModel(space, order, tuple(logits))


def automaton(n_states: int, vocab_size: int, generator: torch.Generator, *, scale: float, forbids: bool):
    """Drawn transitions and rewards; with ``forbids``, a quarter of the rewards -inf."""
    transitions = torch.randint(n_states, (n_states, vocab_size), generator=generator)
    rewards = scale * sequence_strategies.normal((n_states, vocab_size), generator)
    final = scale * sequence_strategies.normal((n_states,), generator)
    if forbids:
        rewards = rewards.masked_fill(torch.rand(rewards.shape, generator=generator) < 0.25, -INF)
        final = final.masked_fill(torch.rand(final.shape, generator=generator) < 0.25, -INF)
    return RewardAutomaton(transitions, rewards, final, int(torch.randint(n_states, (), generator=generator)))


class Case:
    """A reference, a policy, an automaton and a temperature, and the tables over all completions.

    All is made when it is first asked for: the checks of annotations draw random numbers, which a strategy must not.
    """

    def __init__(self, space: SequenceSpace, beta, make: Callable[[], tuple]) -> None:
        self.space, self.beta, self._make = space, beta, make

    @cached_property
    def _made(self) -> tuple:
        return self._make()

    ref = property(lambda self: self._made[0])
    pi = property(lambda self: self._made[1])
    automaton = property(lambda self: self._made[2])

    @cached_property
    def tokens(self) -> Tensor:
        return self.space.tokens()

    @cached_property
    def log_ref(self) -> Tensor:
        return self.ref.log_prob(self.tokens)

    @cached_property
    def log_pi(self) -> Tensor:
        return self.pi.log_prob(self.tokens)

    @cached_property
    def reward(self) -> Tensor:
        """[X, N], of X prompts."""
        return self.automaton.reward(self.tokens, self.space.lengths()).expand(len(self.log_ref), -1)

    @property
    def possible(self) -> bool:
        """Whether something is allowed for every prompt."""
        return bool(((self.reward > -INF) & (self.log_ref > -INF)).any(-1).all())

    @property
    def scale(self) -> float:
        """The largest log-weight that enters."""
        finite = [x[x.isfinite()].abs().max().item() for x in (self.log_ref, self.log_pi, self.reward / self.beta)
                  if x.isfinite().any()]  # fmt: skip
        return max(1.0, *finite)


@st.composite
def cases(draw: st.DrawFn, *, holes: bool | None = None, scale: float | None = None) -> Case:
    """Models of two orders for X prompts, over a space with an eos or without."""
    space = draw(sequence_strategies.spaces(min_vocab=2, max_vocab=3))
    generator = draw(sequence_strategies.generators())
    n_prompts = draw(st.integers(1, 3))
    holes = draw(st.booleans()) if holes is None else holes
    forbids = draw(st.booleans()) if holes else False
    orders = [draw(sequence_strategies.orders(space)) for _ in range(2)]
    homogeneous = [draw(st.booleans()) for _ in range(2)]
    pi_prompts = draw(st.sampled_from([1, n_prompts]))
    n_states = draw(st.integers(1, 4))
    scale = draw(st.sampled_from([1.0, 30.0, 1000.0])) if scale is None else scale

    def make() -> tuple[KGramModel, KGramModel, RewardAutomaton]:
        ref = model(space, orders[0], n_prompts, generator, homogeneous=homogeneous[0], holes=holes)
        pi = model(space, orders[1], pi_prompts, generator, homogeneous=homogeneous[1], holes=False)
        return ref, pi, automaton(n_states, space.vocab_size, generator, scale=scale, forbids=forbids)

    return Case(space, draw(st.sampled_from([0.3, 1.0, 4.0])), make)


def plain_log_z(space, order, tables, transitions, rewards, final, start, beta) -> float:
    """log Z by a dictionary over pairs of a context and a state, last position first, in log space; lists only.

    ``tables[t][context][token]`` are log-probabilities, contexts tuples of tokens.
    """

    def log_sum(terms: list[float]) -> float:
        largest = max(terms)
        return largest if largest == -INF else largest + math.log(math.fsum(math.exp(x - largest) for x in terms))

    n_states, value = len(transitions), None
    for t in reversed(range(space.length)):
        earlier = {}
        for context, row in tables[t].items():
            for s in range(n_states):
                terms = []
                for a, log_p in enumerate(row):
                    following, state = (*context, a)[-order:] if order else (), transitions[s][a]
                    ends = a == space.eos or value is None
                    later = final[state] / beta if ends else value[following, state]
                    terms.append(log_p + rewards[s][a] / beta + later)
                earlier[context, s] = log_sum(terms)
        value = earlier
    return value[(), start]


def plain_tables(model: KGramModel, prompt: int = 0) -> list[dict[tuple[int, ...], list[float]]]:
    """Tables by context as :func:`plain_log_z` takes them."""
    space, order = model.space, model.order
    live = [token for token in range(space.vocab_size) if token != space.eos]
    contexts: list[list[tuple[int, ...]]] = [[()]]
    for _ in range(order):
        contexts.append([(*context, token) for context in contexts[-1] for token in live])
    logs = [table[prompt % len(table)].tolist() for table in model.log_tables]
    return [dict(zip(contexts[min(t, order)], logs[min(t, len(logs) - 1)], strict=True)) for t in range(space.length)]


def leaves(case: Case) -> tuple[Case, list[Tensor], Tensor]:
    """The same case with everything differentiable, what that is, and beta."""
    ref = [x.clone().requires_grad_() for x in case.ref.logits]
    pi = [x.clone().requires_grad_() for x in case.pi.logits]
    rewards, final = (x.clone().requires_grad_() for x in (case.automaton.rewards, case.automaton.final))
    beta = torch.tensor(case.beta, dtype=torch.float64, requires_grad=True)
    made = (
        KGramModel(case.space, case.ref.order, tuple(ref)),
        KGramModel(case.space, case.pi.order, tuple(pi)),
        RewardAutomaton(case.automaton.transitions, rewards, final, case.automaton.start),
    )
    return Case(case.space, beta, lambda: made), [*ref, *pi, rewards, final, beta], beta
