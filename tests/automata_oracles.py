"""Automata run token by token, Myhill-Nerode classes and occurrences counted, in plain loops.

Nothing here imports the library, torch or numpy. ``test_automata.py`` and ``test_automata_regex.py`` hold every
function against cases worked out by hand.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator

String = tuple[int, ...]
Reward = Callable[[String], float]


def strings(vocab_size: int, longest: int) -> Iterator[String]:
    """All strings of at most so many tokens, the empty one first."""
    for length in range(longest + 1):
        yield from itertools.product(range(vocab_size), repeat=length)


def run(transitions: list, rewards: list, final: list, start: int, string: String) -> float:
    """The reward of a string."""
    state, total = start, 0.0
    for token in string:
        total += rewards[state][token]
        state = transitions[state][token]
    return total + final[state]


def classes(reward: Reward, vocab_size: int, *, prefixes: int, suffixes: int, up_to_a_constant: bool) -> int:
    """How many kinds of prefixes there are, told apart by what suffixes of bounded lengths earn after them.

    Up to a constant, prefixes are of one kind where what they earn differs by the same for all suffixes, and those
    after which all is forbidden are not counted (there is one kind at least). A lower bound of the number of states,
    and equal to it where the bounds are large enough: a suffix of n - 1 tokens parts two of n states that differ as
    they stand, one of 2n - 1 tokens two that differ by more than a constant.
    """
    ends = list(strings(vocab_size, suffixes))
    kinds = set()
    for prefix in strings(vocab_size, prefixes):
        row = [reward(prefix + end) for end in ends]
        if up_to_a_constant:
            offset = next((value for value in row if value > -math.inf), None)
            if offset is None:
                continue
            row = [value - offset for value in row]
        kinds.add(tuple(row))
    return max(1, len(kinds))


def occurrences(string: String, keyword: String) -> int:
    """Places at which the keyword stands, overlaps included."""
    return sum(string[i : i + len(keyword)] == keyword for i in range(len(string) - len(keyword) + 1))


def greedy_count(pattern: re.Pattern[str], text: str) -> int:
    """Occurrences that are not empty, each taken as soon as one ends that begins where the last ended or later."""
    begin = found = 0
    for end in range(1, len(text) + 1):
        if any(pattern.fullmatch(text, start, end) for start in range(begin, end)):
            found, begin = found + 1, end
    return found


def greatest_count(pattern: re.Pattern[str], text: str) -> int:
    """The greatest number of disjoint occurrences that are not empty."""
    best = [0]
    for end in range(1, len(text) + 1):
        added = [best[start] + 1 for start in range(end) if pattern.fullmatch(text, start, end)]
        best.append(max([best[-1], *added]))
    return best[-1]
