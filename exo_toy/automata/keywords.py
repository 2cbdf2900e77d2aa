"""Keyword lists as automata."""

import math
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from exo_toy import checks
from exo_toy.automata.automaton import RewardAutomaton
from exo_toy.automata.build import token_numbers

Keyword = str | tuple[str | int, ...]


def from_keywords(keywords: Mapping[Keyword, float | int], vocabulary: Sequence[str] | int) -> RewardAutomaton:
    r"""A reward at every occurrence of every keyword, overlaps included.

    .. math::
        r(y) = \sum_w R_w \, \big|\{ t : y_{t-|w|+1} \dots y_t = w \}\big|

    Source: Aho and Corasick, "Efficient string matching", Communications of the ACM 18(6), 1975. A state is the longest
    suffix of the string that begins a keyword.

    Args:
        keywords: weight R_w, finite, or -inf for what must not occur, of every keyword: a string, whose characters are
            tokens, or a tuple of tokens, each by name or by number.
        vocabulary: the V tokens by name, or V where keywords are tuples of numbers.

    Returns:
        One state for each distinct beginning of keywords, the empty one, 0, first; the reward is earned by the
        transition that completes an occurrence.

    Raises:
        ValueError: no keywords, an empty one, one that is there twice, a token that is not in the vocabulary, a weight
            that is NaN or +inf.

    Example:
        >>> spotter = from_keywords({"aba": 1.0, "b": 0.5}, "ab")
        >>> spotter.reward(torch.tensor([0, 1, 0, 1, 0])).item()  # ababa
        3.0
    """
    number = {}
    if isinstance(vocabulary, int):
        checks.require_integer("vocabulary", vocabulary, at_least=1)
        vocab_size = vocabulary
    else:
        number = token_numbers(vocabulary)
        vocab_size = len(number)
    if not isinstance(keywords, Mapping):
        raise ValueError(f"keywords must be a mapping of keywords to weights; got {type(keywords).__name__}")
    if not keywords:
        raise ValueError("keywords must hold one keyword at least; got none")

    # The trie: children by token and weight of every node, the root 0.
    children: list[dict[int, int]] = [{}]
    weights = [0.0]
    ended = set()
    for keyword, weight in keywords.items():
        checks.require_real(f"weight of {keyword!r}", weight, allowed="finite, or -inf for a forbidden keyword",
                            low=-math.inf, high=math.inf, low_allowed=True)  # fmt: skip
        node = 0
        for token in _tokens(keyword, number, vocab_size):
            if token not in children[node]:
                children[node][token] = len(children)
                children.append({})
                weights.append(0.0)
            node = children[node][token]
        if node in ended:
            raise ValueError(f"keywords must be distinct as token strings; got {keyword!r} twice")
        ended.add(node)
        weights[node] = weight

    # Breadth first: a node's row is that of its longest proper suffix in the trie, but for its own children.
    transitions = np.zeros((len(children), vocab_size), dtype=np.int64)
    queue = deque([(0, 0)])
    while queue:
        node, suffix = queue.popleft()
        transitions[node] = transitions[suffix]
        if node != suffix:
            weights[node] += weights[suffix]
        for token, child in children[node].items():
            queue.append((child, transitions[node, token]))
            transitions[node, token] = child
    table = torch.from_numpy(transitions)
    earned = torch.tensor(weights, dtype=torch.float64)
    return RewardAutomaton(table, earned[table], torch.zeros_like(earned))


def once(keyword: Keyword, vocabulary: Sequence[str] | int, *, reward: float | int) -> RewardAutomaton:
    r"""A reward for strings in which a keyword occurs, however often: a planted phrase.

    .. math::
        r(y) = R \; \mathbb{1}[w \text{ occurs in } y]

    Args:
        keyword: w, a string or tuple as for :func:`from_keywords`.
        vocabulary: as for :func:`from_keywords`.
        reward: R, earned by the transition that completes the first occurrence.

    Returns:
        |w| + 1 states, the last of which is that the phrase has occurred.

    Raises:
        ValueError: as for :func:`from_keywords`.

    Example:
        >>> phrase = once("ab", "abc", reward=2.0) + once("ca", "abc", reward=1.0)
        >>> phrase.reward(torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])).tolist()
        [2.0, 3.0]
    """
    every = from_keywords({keyword: reward}, vocabulary)
    transitions, rewards = every.transitions.clone(), every.rewards.clone()
    transitions[-1] = every.n_states - 1
    rewards[-1] = 0.0
    return RewardAutomaton(transitions, rewards, every.final)


def _tokens(keyword: Keyword, number: dict[str, int], vocab_size: int) -> list[int]:
    """A keyword as token numbers."""
    if not isinstance(keyword, str | tuple) or not keyword:
        raise ValueError(f"a keyword must be a string or a tuple of tokens, not empty; got {keyword!r}")
    tokens = []
    for token in keyword:
        place = number.get(token, -1) if isinstance(token, str) else token
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < vocab_size:
            raise ValueError(f"a keyword must hold tokens of the vocabulary; got {token!r} in {keyword!r}")
        tokens.append(place)
    return tokens
