r"""Regular expressions over a vocabulary, read into a tree.

The syntax is that of Python's ``re`` as far as it goes: literals, ``.``, classes ``[ab]``, ``[a-z]``, ``[^ab]``,
``\d \w \s`` and their complements ``\D \W \S``, ``|``, groups ``( )`` and ``(?: )``, and the quantifiers ``*``, ``+``,
``?``, ``{m}``, ``{m,}``, ``{,n}``, ``{m,n}``. A backslash makes a literal of any other character that is no letter or
digit. Whatever would need more than a finite automaton, or would change no language (lazy quantifiers), is refused.

In a pattern of *words* a literal is a whole token: a run of characters that are neither special nor white space. White
space itself means nothing, a class lists words, and there are neither ranges nor shorthands such as ``\d``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

SPECIAL = frozenset(r".^$*+?{[()|")
CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
BOUNDS = {"*": (0, None), "+": (1, None), "?": (0, 1)}
COUNTS = re.compile(r"\{(?=[0-9]|,[0-9])([0-9]{0,5})(?:(,)([0-9]{0,5}))?\}")
DEEPEST_NESTING = 20


@dataclass(frozen=True)
class Symbol:
    """One token out of a set."""

    tokens: frozenset[int]


@dataclass(frozen=True)
class Concatenation:
    """One part after the other; the empty string where there are none."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Choice:
    """Any one of the parts."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Repeat:
    """A part from ``low`` to ``high`` times; any number of times from ``low`` on where ``high`` is None."""

    part: "Node"
    low: int
    high: int | None


Node = Symbol | Concatenation | Choice | Repeat


def parse(pattern: str, number: Mapping[str, int], *, words: bool) -> Node:
    """The tree of a pattern.

    Args:
        pattern: a regular expression in the syntax of this module.
        number: the tokens that a pattern can speak of, and their numbers; ``.`` and complements mean these.
        words: whether literals are words rather than characters.

    Raises:
        ValueError: anything but such an expression; the message says what was met where.

    Example:
        >>> parse("a|b*", {"a": 0, "b": 1}, words=False)  # doctest: +NORMALIZE_WHITESPACE
        Choice(parts=(Symbol(tokens=frozenset({0})),
                      Repeat(part=Symbol(tokens=frozenset({1})), low=0, high=None)))
    """
    return _Parser(pattern, number, words).parse()


class _Parser:
    """Recursive descent; ``place`` is how far the pattern has been read."""

    def __init__(self, pattern: str, number: Mapping[str, int], words: bool) -> None:
        self.pattern, self.number, self.words = pattern, number, words
        self.any_token = frozenset(number.values())
        self.place = 0
        self.depth = 0

    def parse(self) -> Node:
        """The whole pattern."""
        tree = self.choice()
        if self.peek():
            raise self.error("a ')' that closes nothing")
        return tree

    def choice(self) -> Node:
        """What stands between ``|``."""
        parts = [self.concatenation()]
        while self.accept("|"):
            parts.append(self.concatenation())
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def concatenation(self) -> Node:
        """Quantified atoms, up to a ``|``, a ``)`` or the end."""
        parts: list[Node] = []
        while self.peek() and self.peek() not in ("|", ")"):
            parts.append(self.quantified())
        return parts[0] if len(parts) == 1 else Concatenation(tuple(parts))

    def quantified(self) -> Node:
        """An atom and the quantifier behind it, if there is one."""
        atom = self.atom()
        char = self.peek()
        if char in BOUNDS:
            self.place += 1
            low, high = BOUNDS[char]
        elif char == "{":
            low, high = self.counts()
        else:
            return atom
        if self.peek() == "{" or self.peek() in BOUNDS:
            raise self.error("a quantifier behind a quantifier (lazy and possessive ones change no language)")
        return Repeat(atom, low, high)

    def counts(self) -> tuple[int, int | None]:
        """The least and the greatest number in braces."""
        found = COUNTS.match(self.pattern, self.place)
        if not found:
            raise self.error("a '{' that begins none of {m}, {m,}, {,n}, {m,n} up to 99999 (\\{ is the literal)")
        low = int(found[1] or 0)
        high = int(found[3]) if found[3] else None if found[2] else low
        if high is not None and high < low:
            raise self.error("a greatest count below the least")
        self.place = found.end()
        return low, high

    def atom(self) -> Node:
        """A group, a class, the dot or a literal."""
        if self.accept("("):
            return self.group()
        if self.accept("["):
            return Symbol(self.bracket())
        if self.accept("."):
            return Symbol(self.any_token)
        if self.peek() in ("^", "$"):
            raise self.error("an anchor (what has to match is said by match=)")
        if self.peek() in SPECIAL:
            raise self.error("a quantifier of nothing")
        literal = self.literal(SPECIAL)
        return Symbol(literal if isinstance(literal, frozenset) else self.token(literal))

    def group(self) -> Node:
        """What stands in parentheses, the first of which has been read."""
        if self.accept("?") and not self.accept(":"):
            raise self.error("a group other than ( ) and (?: )")
        self.depth += 1
        if self.depth > DEEPEST_NESTING:
            raise self.error(f"groups nested more than {DEEPEST_NESTING} deep")
        tree = self.choice()
        if not self.accept(")"):
            raise self.error("the end, in a group that is not closed")
        self.depth -= 1
        return tree

    def bracket(self) -> frozenset[int]:
        """What stands in brackets, the first of which has been read."""
        complement = self.accept("^")
        tokens: frozenset[int] = frozenset()
        if self.peek() == "]":
            raise self.error("a class of nothing (\\] is the literal)")
        while not self.accept("]"):
            if not self.peek():
                raise self.error("the end, in a class that is not closed")
            tokens |= self.bracket_item()
        return self.any_token - tokens if complement else tokens

    def bracket_item(self) -> frozenset[int]:
        """A token, a shorthand or a range of characters."""
        first = self.literal(frozenset("]"))
        is_range = not self.words and self.peek() == "-" and self.pattern[self.place + 1 :][:1] not in ("]", "")
        if not is_range:
            return first if isinstance(first, frozenset) else self.token(first)
        self.place += 1
        last = self.literal(frozenset("]"))
        if isinstance(first, frozenset) or isinstance(last, frozenset) or last < first:
            raise self.error("the end of a range that does not run from one character to a later one")
        return frozenset(place for token, place in self.number.items() if len(token) == 1 and first <= token <= last)

    def literal(self, special: frozenset[str]) -> str | frozenset[int]:
        """A character or a word, or the tokens of a shorthand."""
        if self.words:
            found = ""
            while (char := self.pattern[self.place : self.place + 1]) and char not in special and not char.isspace():
                found += self.character()
            return found
        shorthand = self.pattern[self.place : self.place + 2]
        if shorthand in (r"\d", r"\w", r"\s", r"\D", r"\W", r"\S"):
            self.place += 2
            return frozenset(place for token, place in self.number.items() if re.fullmatch(shorthand, token))
        return self.character()

    def character(self) -> str:
        """One character, or what a backslash makes of the next."""
        char = self.pattern[self.place]
        self.place += 1
        if char != "\\":
            return char
        escaped = self.pattern[self.place : self.place + 1]
        if not escaped or (escaped.isalnum() and escaped not in CONTROL):
            raise self.error("an escape that means nothing here")
        self.place += 1
        return CONTROL.get(escaped, escaped)

    def token(self, literal: str) -> frozenset[int]:
        """The token of this name."""
        if literal not in self.number:
            raise self.error(f"{literal!r} just before, which is no token that a pattern can speak of")
        return frozenset([self.number[literal]])

    def peek(self) -> str:
        """The next character, empty at the end; white space between words is skipped."""
        while self.words and self.pattern[self.place : self.place + 1].isspace():
            self.place += 1
        return self.pattern[self.place : self.place + 1]

    def accept(self, char: str) -> bool:
        """Read this character if it is the next."""
        found = self.peek() == char
        self.place += found
        return found

    def error(self, met: str) -> ValueError:
        """What was met, and where."""
        return ValueError(f"pattern must be a regular expression; got {met} at place {self.place} of {self.pattern!r}")
