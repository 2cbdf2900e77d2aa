"""The reward of a list of keywords, over the tokens of a text."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from exo_toy.automata import RewardAutomaton, from_keywords
from exo_toy.automata.keywords import Keyword as Phrase
from exo_toy.spaces import SequenceSpace
from exo_toy.text.reading import TextError, Vocabulary, characters, pieces, words

# Bytes of a list of keywords: each letter of it may become a state.
LARGEST_LIST = 2**20


class Keyword(NamedTuple):
    """A keyword, what each occurrence of it earns, and the line that it stands on, from 1."""

    line: int
    text: str
    weight: float


class LeftOut(NamedTuple):
    """A keyword that no completion can hold, and why."""

    keyword: Keyword
    reason: str


def read_keywords(path: Path) -> list[Keyword]:
    r"""The keywords of a UTF-8 file, one a line, each by itself or behind its weight and a tab.

    A weight is a number, or -inf for what must not occur; 1 where none is given. Blank lines are skipped; spaces belong
    to a keyword.

    Args:
        path: of the list.

    Returns:
        Keyword in the order of lines.

    Raises:
        TextError: the list cannot be read, is too long, or holds no keyword; a line without a keyword, or with a weight
            that is none.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as home:
        ...     _ = (Path(home) / "list").write_text("whale\n2.5\twhite whale\n")
        ...     read_keywords(Path(home) / "list")
        [Keyword(line=1, text='whale', weight=1.0), Keyword(line=2, text='white whale', weight=2.5)]
    """
    try:
        with path.open("rb") as file:
            n_bytes = len(file.read(LARGEST_LIST + 1))
            if n_bytes > LARGEST_LIST:
                raise TextError(f"{path}: a list of keywords has at most {LARGEST_LIST} bytes")
            text = "".join(pieces(file, str(path)))
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from error
    found = []
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            weight, tab, keyword = content.partition("\t")
            if tab and not keyword:
                raise TextError(f"{path}:{line}: no keyword behind the tab")
            found.append(
                Keyword(line, keyword, _weight(f"{path}:{line}", weight)) if tab else Keyword(line, weight, 1.0)
            )
    if not found:
        raise TextError(f"{path}: holds no keyword")
    return found


def keyword_automaton(
    keywords: Sequence[Keyword], vocabulary: Vocabulary, space: SequenceSpace
) -> tuple[RewardAutomaton, list[LeftOut]]:
    """The reward of keywords, each of which is cut into tokens as the text was.

    Args:
        keywords: as :func:`read_keywords` has them.
        vocabulary: of the text.
        space: the completions.

    Returns:
        (the automaton, what is left out of it: keywords with tokens that are not told apart from others or that the
        text lacks, and those longer than a completion).

    Raises:
        TextError: a keyword without a token, one that is there twice, none that is left.
        ValueError: an automaton that exceeds the space's memory budget.

    Example:
        >>> vocabulary = Vocabulary(("a", "b"), "")
        >>> automaton, left_out = keyword_automaton(
        ...     [Keyword(1, "ab", 2.0), Keyword(2, "ac", 1.0)], vocabulary, SequenceSpace(2, 9)
        ... )
        >>> automaton.n_states, [entry.reason for entry in left_out]
        (3, ["'c' is not in the text"])
    """
    weights, lines, left_out = dict[Phrase, float](), dict[tuple[int, ...], int](), list[LeftOut]()
    for keyword in keywords:
        tokens = [token for piece in (words if vocabulary.joined_by else characters)([keyword.text]) for token in piece]
        if not tokens:
            raise TextError(f"line {keyword.line} of the keywords: {keyword.text!r} holds no word")
        missing = next((token for token in tokens if token not in vocabulary.number), None)
        if missing is not None:
            cut = " among the most frequent" if vocabulary.has_unknown else ""
            left_out.append(LeftOut(keyword, f"{missing!r} is not{cut} in the text"))
        elif len(tokens) > space.length:
            left_out.append(LeftOut(keyword, f"has {len(tokens)} tokens, a completion {space.length}"))
        else:
            numbers = tuple(vocabulary.number[token] for token in tokens)
            if numbers in lines:
                twice = f"{keyword.text!r} is there already, in line {lines[numbers]}"
                raise TextError(f"line {keyword.line} of the keywords: {twice}")
            weights[numbers], lines[numbers] = keyword.weight, keyword.line
    if not weights:
        reasons = "; ".join(f"{entry.keyword.text!r}: {entry.reason}" for entry in left_out[:3])
        raise TextError(f"none of {len(left_out)} keywords can occur: {reasons}")
    n_states = 1 + sum(map(len, weights))
    space.require_memory(4 * 8 * n_states * space.vocab_size, what=f"an automaton of {n_states} states")
    return from_keywords(weights, space.vocab_size), left_out


def _weight(where: str, text: str) -> float:
    """A number, or -inf."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not weight < math.inf:
        raise TextError(f"{where}: a weight must be a number, or -inf; got {text!r}")
    return weight
