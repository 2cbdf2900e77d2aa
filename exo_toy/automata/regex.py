"""Regular expressions as automata: Thompson's NFA, subset construction, minimisation.

Sources: Thompson, "Regular expression search algorithm", Communications of the ACM 11(6), 1968; Rabin and Scott,
"Finite automata and their decision problems", IBM Journal 3(2), 1959.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import torch

from exo_toy import checks
from exo_toy.automata.automaton import RewardAutomaton
from exo_toy.automata.build import from_function, token_numbers
from exo_toy.automata.minimise import minimise
from exo_toy.automata.regex_syntax import Choice, Concatenation, Node, Repeat, Symbol, parse

Subset = frozenset[int]
ACCEPT = 0
# Not a set of NFA states: what follows an occurrence no longer matters.
FOUND: Subset = frozenset([-1])
LARGEST_NFA = 100_000


def from_regex(
    pattern: str,
    vocabulary: Sequence[str],
    *,
    reward: float | int = 1.0,
    match: str = "full",
    words: bool = False,
    eos: int | None = None,
    max_states: int = 10_000,
) -> RewardAutomaton:
    r"""A reward for strings that match a regular expression, or for each occurrence of it.

    With L the language of the pattern and R the reward,

    * ``match="full"``: R if y ∈ L, as ``re.fullmatch``; earned at the end.
    * ``match="search"``: R if some substring of y, the empty one included, is in L, as ``re.search``; earned by the
      transition that completes the first.
    * ``match="count"``: R times the greatest number of disjoint non-empty substrings of y that are in L. They are taken
      greedily, each as soon as it ends, which is where R is earned; nothing read so far is used again. (``re.findall``
      prefers an early beginning and a long match instead: it counts 1 for ``a+`` in aaa, which holds 3.)

    The syntax is that of Python's ``re``: literals, ``.`` (any token, line ends included), classes, ``|``, groups,
    ``* + ? {m,n}``, escapes, ``\d \w \s``. With ``words``, a literal is a whole token between white space or
    operators: ``"(very)* (good|fine) \."``. The module ``regex_syntax`` has the details.

    Args:
        pattern: the regular expression.
        vocabulary: the V tokens by name. Without ``words``, tokens of several characters are met by ``.`` and by
            complements only.
        reward: R, finite, or -inf to forbid what matches.
        match: "full", "search" or "count".
        words: whether literals of the pattern are words.
        eos: a token that the pattern does not see (``.`` does not match it): it earns nothing and stays in the state.
        max_states: how many states the subset construction may reach.

    Returns:
        The fewest states with these rewards in these places, numbered breadth first; the start is 0.

    Raises:
        ValueError: a pattern that is no regular expression over the vocabulary, an argument that is none of the above,
            too many states.

    Example:
        >>> greeting = from_regex("h(i|ello)!*", "ehilo!")
        >>> strings = torch.tensor([[1, 2, 5, 5, 5], [1, 0, 3, 3, 4], [1, 1, 1, 1, 1]])  # hi!!! hello hhhhh
        >>> greeting.reward(strings)
        tensor([1., 1., 0.], dtype=torch.float64)
        >>> from_regex("h", "ehilo!", match="count").reward(strings)
        tensor([1., 1., 5.], dtype=torch.float64)
    """
    if not isinstance(pattern, str):
        raise ValueError(f"pattern must be a string; got {pattern!r}")
    number = token_numbers(vocabulary)
    n_tokens = len(number)
    checks.require_real("reward", reward, allowed="finite, or -inf for what is forbidden",
                        low=-math.inf, high=math.inf, low_allowed=True)  # fmt: skip
    if match not in ("full", "search", "count"):
        raise ValueError(f'match must be "full", "search" or "count"; got {match!r}')
    if eos is not None:
        checks.require_integer("eos", eos, at_least=0)
        if eos >= n_tokens:
            raise ValueError(f"eos must be None or a token in 0..{n_tokens - 1}; got {eos}")
    visible = {token: place for token, place in number.items() if place != eos}
    machine = _Thompson(parse(pattern, visible, words=words), n_tokens, match=match, reward=float(reward))
    by_class = from_function(
        machine.step, len(machine.representatives), machine.start, max_states=max_states, final=machine.final
    )
    by_class = minimise(by_class, push=False)
    transitions, rewards = by_class.transitions[:, machine.token_class], by_class.rewards[:, machine.token_class]
    if eos is not None:
        transitions[:, eos] = torch.arange(by_class.n_states)
        rewards[:, eos] = 0.0
    return RewardAutomaton(transitions, rewards, by_class.final)


class _Thompson:
    """Nondeterministic states, each with a set of tokens that leads to one other, or with free moves to several.

    A subset holds states with tokens, and ACCEPT where it is reached: what free moves lead to is followed at once.
    """

    def __init__(self, tree: Node, n_tokens: int, *, match: str, reward: float) -> None:
        self.match = match
        self.reward = reward
        self.n_tokens = n_tokens
        self.tokens: list[frozenset[int]] = [frozenset()]
        self.next: list[int] = [ACCEPT]
        self.free: list[list[int]] = [[]]
        self.closures: dict[int, Subset] = {}
        self.opening = self.closure(self.attach(tree, ACCEPT))

    @property
    def start(self) -> Subset:
        """The subset before the first token."""
        return FOUND if self.match == "search" and ACCEPT in self.opening else self.opening

    def step(self, subset: Subset, token_class: int) -> tuple[Subset, float]:
        """The subset and the reward after a token of a class."""
        if subset == FOUND:
            return FOUND, 0.0
        token = self.representatives[token_class]
        moved = frozenset().union(*(self.closure(self.next[q]) for q in subset if token in self.tokens[q]))
        if self.match == "full":
            return moved, 0.0
        if ACCEPT in moved:
            return (FOUND if self.match == "search" else self.opening), self.reward
        return moved | self.opening, 0.0

    def final(self, subset: Subset) -> float:
        """The reward for ending in a subset."""
        if self.match == "full":
            return self.reward if ACCEPT in subset else 0.0
        # A pattern that the empty string matches is found before the first token.
        return self.reward if self.start == FOUND else 0.0

    @cached_property
    def token_class(self) -> torch.Tensor:
        """[V] number of each token's class: tokens of one class are in the same sets of the pattern."""
        membership: list[list[int]] = [[] for _ in range(self.n_tokens)]
        for place, some in enumerate(dict.fromkeys(self.tokens)):
            for token in some:
                membership[token].append(place)
        numbers: dict[tuple[int, ...], int] = {}
        return torch.tensor([numbers.setdefault(tuple(sets), len(numbers)) for sets in membership])

    @cached_property
    def representatives(self) -> list[int]:
        """The first token of each class."""
        classes = self.token_class.tolist()
        return [classes.index(number) for number in range(max(classes) + 1)]

    def add(self, tokens: frozenset[int], following: int, free: list[int]) -> int:
        """A new state."""
        if len(self.tokens) >= LARGEST_NFA:
            raise ValueError(f"pattern must need at most {LARGEST_NFA} states once its counts are written out")
        self.tokens.append(tokens)
        self.next.append(following)
        self.free.append(free)
        return len(self.tokens) - 1

    def attach(self, node: Node, after: int) -> int:
        """States for a part of the pattern that go on to ``after``; the first of them."""
        match node:
            case Symbol(tokens):
                return self.add(tokens, after, [])
            case Concatenation(parts):
                for part in reversed(parts):
                    after = self.attach(part, after)
                return after
            case Choice(parts):
                return self.add(frozenset(), ACCEPT, [self.attach(part, after) for part in parts])
            case Repeat(part, low, high):
                leave = after
                if high is None:
                    after = self.add(frozenset(), ACCEPT, [leave])
                    self.free[after].append(self.attach(part, after))
                for _ in range((high or low) - low):
                    after = self.add(frozenset(), ACCEPT, [leave, self.attach(part, after)])
                for _ in range(low):
                    before, after = after, self.attach(part, after)
                    if after == before:  # nothing, however often
                        break
                return after

    def closure(self, state: int) -> Subset:
        """The states with tokens, and ACCEPT, to which free moves lead from a state."""
        if state not in self.closures:
            seen, stack = {state}, [state]
            while stack:
                new = [q for q in self.free[stack.pop()] if q not in seen]
                seen.update(new)
                stack += new
            self.closures[state] = frozenset(q for q in seen if self.tokens[q] or q == ACCEPT)
        return self.closures[state]
