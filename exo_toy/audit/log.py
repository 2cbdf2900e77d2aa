"""Reads the log of a run, a line or an element of its list at a time, and says what is wrong with the rest."""

import json
import re
import reprlib
from collections.abc import Iterator
from io import BufferedReader
from typing import Any, NamedTuple

from exo_toy import checks

# Bytes of a line, or of an element of a list; and those of a list that are read at a time.
LONGEST, CHUNK = 2**26, 2**16
# What a number of a log may be in size; the squares of such rewards over the least temperature stay finite.
LARGEST = 1e30
_BOM = b"\xef\xbb\xbf"
# What a scanner of JSON stops at; an escaped character is one piece, so that an escaped quote ends no string.
_STRUCTURE = re.compile(rb'\\.|["\[\]{},\n]', re.DOTALL)


class Problem(NamedTuple):
    """What is wrong with a line, or with an element of a list; both count from 1."""

    line: int
    element: int | None
    reason: str

    def text(self, file: str) -> str:
        """``file:line: reason``; in a list, the element before the reason."""
        element = "" if self.element is None else f"element {self.element}: "
        return f"{file}:{self.line}: {element}{self.reason}"


class Record(NamedTuple):
    """The K candidates of one prompt.

    Attributes:
        line: where it begins, from 1.
        element: of a list, from 1.
        prompt: a string; of messages, their JSON.
        rewards: of each candidate.
        policy_logps: of each candidate, if known.
        ref_logps: of each candidate, if known; both or neither.
    """

    line: int
    element: int | None
    prompt: str
    rewards: list[float]
    policy_logps: list[float] | None
    ref_logps: list[float] | None

    @property
    def name(self) -> str:
        """Where it stands."""
        return f"line {self.line}" if self.element is None else f"element {self.element}"


class _Malformed(Exception):
    """The reason why a record is no use."""


def read(file: BufferedReader) -> Iterator[Record | Problem]:
    r"""The records of a log in order, and a problem in the place of each that is no use; blank lines are skipped.

    Args:
        file: opened in binary; never more of it is held than one line or element.

    Yields:
        Record or Problem.

    Example:
        >>> import io
        >>> lines = b'{"prompt": "a", "completions": ["b", "c"], "rewards": [0, 1]}\n{"prompt": 1}'
        >>> [type(item).__name__ for item in read(io.BufferedReader(io.BytesIO(lines)))]
        ['Record', 'Problem']
    """
    if file.peek(3).startswith(_BOM):
        file.read(3)
    line = 1
    while file.peek(1)[:1].isspace():
        line += file.read(1) == b"\n"
    for piece in _elements(file, line) if file.peek(1)[:1] == b"[" else _lines(file, line):
        if isinstance(piece, Problem):
            yield piece
            continue
        line, element, raw = piece
        try:
            yield _record(_parsed(raw), line, element)
        except _Malformed as error:
            yield Problem(line, element, str(error))
        except RecursionError:
            yield Problem(line, element, "is nested too deeply")


def _lines(file: BufferedReader, line: int) -> Iterator[tuple[int, None, bytes]]:
    """Lines that are not blank, from the given number on, cut off where they are too long."""
    while raw := file.readline(LONGEST + 1):
        if not raw.isspace():
            yield line, None, raw
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(LONGEST)
        line += 1


def _elements(file: BufferedReader, line: int) -> Iterator[tuple[int, int, bytes] | Problem]:
    """Elements of a list, told apart by brackets and commas alone, so that one that is no JSON spoils no other."""
    depth, in_string, element, start, held = 0, False, 1, line, bytearray()
    while chunk := file.read(CHUNK):
        while chunk.endswith(b"\\") and (more := file.read(1)):
            chunk += more
        begin = 0
        for match in _STRUCTURE.finditer(chunk):
            mark = match.group()
            if mark == b"\n":
                line += 1
            elif mark == b'"':
                in_string = not in_string
            elif not in_string and len(mark) == 1:
                depth += (mark in b"[{") - (mark in b"]}")
                if mark == b"[" and depth == 1:
                    begin = match.end()
                elif depth == 0 or (mark == b"," and depth == 1):
                    raw = bytes(held) + chunk[begin : match.start()]
                    # All of an empty list is blank.
                    if raw.strip() or depth or element > 1:
                        yield start + _blank_lines(raw), element, raw
                    begin, held, start, element = match.end(), bytearray(), line, element + 1
                if depth == 0:
                    if chunk[begin:].strip() or file.read(CHUNK).strip():
                        yield Problem(line, None, "more follows after the end of the list")
                    return
        held += chunk[begin:]
        del held[LONGEST + 1 :]
    yield Problem(start + _blank_lines(bytes(held)), element, "the file ends before the list does")


def _blank_lines(raw: bytes) -> int:
    """Before the first character."""
    return raw[: len(raw) - len(raw.lstrip())].count(b"\n")


def _parsed(raw: bytes) -> Any:
    """The JSON value of a line or an element."""
    if len(raw) > LONGEST:
        raise _Malformed(f"is longer than {LONGEST} bytes")
    try:
        return json.loads(raw.strip().decode("utf-8"))
    except json.JSONDecodeError as error:
        raise _Malformed(f"is not JSON: {error.msg} (character {error.pos + 1})") from error
    except ValueError as error:
        raise _Malformed(f"is not JSON: {error}") from error


def _record(value: Any, line: int, element: int | None) -> Record:
    """Every field in use checked."""
    if not isinstance(value, dict):
        raise _Malformed(f"must be an object; is {_named(value)}")
    needed = ["prompt", "completions", "rewards"]
    if "policy_logps" in value or "ref_logps" in value:
        needed += ["policy_logps", "ref_logps"]
    for field in needed:
        if field not in value:
            raise _Malformed(f"{field} is missing")
    prompt = _text("prompt", value["prompt"])
    completions = value["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise _Malformed(f"completions must be a list of at least 2 texts; is {_named(completions)}")
    for i, completion in enumerate(completions):
        _text(f"completions[{i}]", completion)
    numbers = {field: _numbers(field, value[field], len(completions)) for field in needed[2:]}
    return Record(line, element, prompt, numbers["rewards"], numbers.get("policy_logps"), numbers.get("ref_logps"))


def _text(field: str, value: Any) -> str:
    """A string as it is; messages, which are a list of objects, as their JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return json.dumps(value)
    raise _Malformed(f"{field} must be a string or a list of messages; is {_named(value)}")


def _numbers(field: str, numbers: Any, count: int) -> list[float]:
    """One for each completion; log-probabilities at most 0."""
    if not isinstance(numbers, list) or len(numbers) != count:
        raise _Malformed(f"{field} must be a list of {count} numbers, one per completion; is {_named(numbers)}")
    for i, number in enumerate(numbers):
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= LARGEST:
            raise _Malformed(f"{field}[{i}] must be a number of at most {LARGEST:g} in size; is {_named(number)}")
        # Rounding may lift a probability of one; anything higher is a negated or otherwise wrong number.
        if field != "rewards" and number > checks.NORMALISATION_TOLERANCE:
            raise _Malformed(f"{field}[{i}] must be a log-probability, at most 0; is {number}")
    return [float(number) for number in numbers]


def _named(value: Any) -> str:
    """A JSON value, short enough for a message."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
