"""Completions, sums along them and k-gram conditionals, in plain loops: what spaces, policies and rewards must equal.

Nothing here imports the library, torch or numpy. A completion is a tuple of T tokens, filled with the eos after its
end; a table over a space is a dictionary from completions to numbers. ``test_spaces.py`` and ``test_policies.py`` hold
every function here against cases worked out by hand.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator

Completion = tuple[int, ...]
Context = tuple[int, ...]
Conditionals = list[dict[tuple[Context, int], float]]


def filled(string: Completion, eos: int | None) -> Completion:
    """The string with the eos in every place after its first eos."""
    return string[: length(string, eos)] + (eos,) * (len(string) - length(string, eos))


def length(string: Completion, eos: int | None) -> int:
    """Tokens up to the first eos, which counts, or all of them."""
    return string.index(eos) + 1 if eos in string else len(string)


def completions(vocab_size: int, max_length: int, eos: int | None) -> list[Completion]:
    """All completions. Where two of them part, both still run: depth-first order is the order of the filled strings."""
    strings = itertools.product(range(vocab_size), repeat=max_length)
    return sorted({filled(string, eos) for string in strings})


def steps(string: Completion, eos: int | None, order: int) -> Iterator[tuple[int, Context, int]]:
    """Position, context of the last ``order`` tokens, and token, up to the end of the completion."""
    for t in range(length(string, eos)):
        yield t, string[max(0, t - order) : t], string[t]


def context_number(context: Context, vocab_size: int, eos: int | None) -> int:
    """The context among all of its length: base-A number over the tokens but the eos."""
    live = [token for token in range(vocab_size) if token != eos]
    return list(itertools.product(live, repeat=len(context))).index(context)


def path_sum(string: Completion, tables: list, vocab_size: int, eos: int | None, order: int) -> float:
    """Sum of tables[t][context][token] along a completion."""
    return sum(
        tables[t][context_number(context, vocab_size, eos)][token] for t, context, token in steps(string, eos, order)
    )


def kgram_conditionals(p: dict[Completion, float], eos: int | None, order: int) -> Conditionals:
    """For each position p(token | the last ``order`` tokens, not ended), where the context has positive probability."""
    n_positions = len(next(iter(p)))
    joint = [defaultdict(list) for _ in range(n_positions)]
    marginal = [defaultdict(list) for _ in range(n_positions)]
    for string, mass in p.items():
        for t, context, token in steps(string, eos, order):
            joint[t][context, token].append(mass)
            marginal[t][context].append(mass)
    return [
        {
            (context, token): math.fsum(masses) / math.fsum(marginal[t][context])
            for (context, token), masses in joint[t].items()
            if math.fsum(marginal[t][context]) > 0
        }
        for t in range(n_positions)
    ]


def dependence_on_older_tokens(p: dict[Completion, float], eos: int | None, order: int) -> float:
    """Sum over t of I(y_t; y_{<t-k} | y_{t-k}..y_{t-1}), each over the completions that have not ended before t."""
    n_positions = len(next(iter(p)))
    given_all = kgram_conditionals(p, eos, n_positions)
    given_context = kgram_conditionals(p, eos, order)
    terms = []
    for string, mass in p.items():
        if mass > 0:
            for t, context, token in steps(string, eos, order):
                log_ratio = math.log(given_all[t][string[:t], token]) - math.log(given_context[t][context, token])
                terms.append(mass * log_ratio)
    return math.fsum(terms)


def hamming(first: Completion, second: Completion) -> int:
    """Places in which two completions of one length differ."""
    return sum(a != b for a, b in zip(first, second, strict=True))


def planted_modes(string: Completion, modes: list, weights: list[float], widths: list[float]) -> float:
    """Log of the sum of weight * exp(-distance / width)."""
    peaks = zip(modes, weights, widths, strict=True)
    return math.log(math.fsum(weight * math.exp(-hamming(string, mode) / width) for mode, weight, width in peaks))


def count(string: Completion, eos: int | None, counted: set[int]) -> int:
    """How many tokens up to the end are among the counted."""
    return sum(token in counted for token in string[: length(string, eos)])


def is_palindrome(string: Completion, eos: int | None) -> bool:
    """Whether the tokens before the eos read the same from either end."""
    body = [token for token in string if token != eos]
    return body == body[::-1]
