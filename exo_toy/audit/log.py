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
PAIR_LOGPS = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
_BOM = b"\xef\xbb\xbf"
# What a scanner of JSON stops at; an escaped character is one piece, so that an escaped quote ends no string.
_STRUCTURE = re.compile(rb'\\.|["\[\]{},\n]', re.DOTALL)
_MISSING = object()


class Problem(NamedTuple):
    """What is wrong with a line, or with an element of a list; elements count from 1."""

    line: int
    element: int | None
    field: str
    wrong: str
    allowed: str

    def text(self, file: str) -> str:
        """``file:line: field: what is wrong: what is allowed``; in a list, the element before the field."""
        element = "" if self.element is None else f" element {self.element}:"
        return f"{file}:{self.line}:{element} {self.field}: {self.wrong}: {self.allowed}"


class Record(NamedTuple):
    """The candidates of one prompt; or a pair, the chosen one first, without rewards.

    Attributes:
        line: where it begins, from 1.
        element: of a list, from 1.
        prompt: as it was read.
        distinct: number of different completions.
        rewards: of each candidate; None for a pair.
        policy_logps: of each candidate, if known.
        ref_logps: of each candidate, if known; both or neither.
    """

    line: int
    element: int | None
    prompt: Any
    distinct: int
    rewards: list[float] | None
    policy_logps: list[float] | None
    ref_logps: list[float] | None

    @property
    def name(self) -> str:
        """Where it stands."""
        return f"line {self.line}" if self.element is None else f"element {self.element}"

    @property
    def n_candidates(self) -> int:
        """K; 2 for a pair."""
        return 2 if self.rewards is None else len(self.rewards)


class _Malformed(Exception):
    """Field, what is wrong, what is allowed."""


def read(file: BufferedReader) -> Iterator[Record | Problem]:
    r"""The records of a log in order, and a problem in the place of each that is no use; blank lines count nothing.

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
    pieces = _elements(file, line) if file.peek(1)[:1] == b"[" else _lines(file, line)
    for line, element, raw in pieces:
        try:
            if isinstance(raw, _Malformed):
                raise raw
            yield _record(_parsed(raw, element), line, element)
        except _Malformed as error:
            yield Problem(line, element, *error.args)


def _lines(file: BufferedReader, line: int) -> Iterator[tuple[int, None, bytes | _Malformed]]:
    """Lines that are not blank, from the given number on."""
    while raw := file.readline(LONGEST + 1):
        if len(raw) > LONGEST:
            yield line, None, _too_long()
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(LONGEST)
        elif not raw.isspace():
            yield line, None, raw
        line += 1


def _elements(file: BufferedReader, line: int) -> Iterator[tuple[int, int, bytes | _Malformed]]:
    """Elements of a list, told apart by brackets and commas alone, so that one that is no JSON spoils no other."""
    depth, in_string, element, start = 0, False, 1, line
    held, too_long = list[bytes](), False
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
                if depth == 1 and mark == b"[":
                    begin = match.end()
                elif depth == 0 or (depth == 1 and mark == b","):
                    raw = b"".join([*held, chunk[begin : match.start()]])
                    if too_long:
                        yield start, element, _too_long()
                    elif raw.strip():
                        yield start + _blank_lines(raw), element, raw
                    elif depth or element > 1:
                        yield line, element, _Malformed("record", "is empty", "must be an object; a comma is too many")
                    begin, held, too_long, start, element = match.end(), [], False, line, element + 1
                    if depth == 0:
                        if chunk[begin:].strip() or file.read().strip():
                            yield (
                                line,
                                element,
                                _Malformed("record", "follows the list's end", "must be within the list"),
                            )
                        return
        held.append(chunk[begin:])
        if sum(map(len, held)) > LONGEST:
            held, too_long = [], True
    start += _blank_lines(b"".join(held))
    yield start, element, _Malformed("record", "the file ends here", "must be an object, and after the last one ]")


def _blank_lines(raw: bytes) -> int:
    """Before the first character."""
    return raw[: len(raw) - len(raw.lstrip())].count(b"\n")


def _too_long() -> _Malformed:
    return _Malformed("record", f"is longer than {LONGEST} bytes", "must be an object on a line, or in a list")


def _parsed(raw: bytes, element: int | None) -> Any:
    """The JSON value of a line or an element."""
    allowed = "must be a JSON object" + (" on one line" if element is None else "")
    try:
        return json.loads(raw.strip().decode("utf-8"))
    except UnicodeDecodeError as error:
        wrong = f"is not UTF-8 (byte {error.object[error.start]:#04x})"
        raise _Malformed("record", wrong, "must be UTF-8 text") from error
    except json.JSONDecodeError as error:
        wrong = f"is not JSON ({error.msg.removesuffix(' at')}, at its character {error.pos + 1})"
        raise _Malformed("record", wrong, allowed) from error
    except RecursionError as error:
        raise _Malformed("record", "is nested too deeply", allowed) from error
    except ValueError as error:
        raise _Malformed("record", "holds an integer of thousands of digits", allowed) from error


def _record(value: Any, line: int, element: int | None) -> Record:
    """Candidates or a pair, every field in use checked."""
    if not isinstance(value, dict):
        raise _Malformed("record", f"is {_named(value)}", "must be an object")
    _text("prompt", value.get("prompt", _MISSING))
    pair = "completions" not in value and ("chosen" in value or "rejected" in value)
    if pair:
        texts = [_text(field, value.get(field, _MISSING)) for field in ("chosen", "rejected")]
        logps = [_logp(field, value.get(field, _MISSING)) for field in PAIR_LOGPS]
        return Record(line, element, value["prompt"], len(set(texts)), None, logps[:2], logps[2:])
    completions = value.get("completions", _MISSING)
    if not isinstance(completions, list) or len(completions) < 2:
        named = f"a list of {len(completions)}" if isinstance(completions, list) else _named(completions)
        raise _Malformed("completions", f"is {named}", "must be a list of at least 2 texts")
    texts = [_text(f"completions[{i}]", text) for i, text in enumerate(completions)]
    rewards = _numbers(value, "rewards", len(texts))
    policy_logps, ref_logps = None, None
    if "policy_logps" in value or "ref_logps" in value:
        policy_logps, ref_logps = (_numbers(value, field, len(texts)) for field in ("policy_logps", "ref_logps"))
    return Record(line, element, value["prompt"], len(set(texts)), rewards, policy_logps, ref_logps)


def _text(field: str, value: Any) -> str:
    """A string as it is; messages, which are a list of objects, as their JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return json.dumps(value, sort_keys=True)
    raise _Malformed(field, f"is {_named(value)}", "must be a string or a list of messages")


def _numbers(value: dict[str, Any], field: str, count: int) -> list[float]:
    numbers = value.get(field, _MISSING)
    if not isinstance(numbers, list):
        raise _Malformed(field, f"is {_named(numbers)}", "must be a list of numbers, one for each completion")
    if len(numbers) != count:
        raise _Malformed(field, f"has {len(numbers)} entries", f"must have one for each of {count} completions")
    check = _number if field == "rewards" else _logp
    return [check(f"{field}[{i}]", number) for i, number in enumerate(numbers)]


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise _Malformed(field, f"is {_named(value)}", f"must be a number of at most {LARGEST:g} in size")
    return float(value)


def _logp(field: str, value: Any) -> float:
    logp = _number(field, value)
    # Rounding may lift a probability of one; anything higher is a negated or otherwise wrong number.
    if logp > checks.NORMALISATION_TOLERANCE:
        raise _Malformed(field, f"is {_named(value)}", "must be a log-probability, at most 0")
    return logp


def _named(value: Any) -> str:
    """A JSON value, short enough for a message."""
    if value is _MISSING:
        return "missing"
    if isinstance(value, str):
        return f"the string {reprlib.repr(value)}"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, float) and not -LARGEST <= value <= LARGEST:
        return "NaN" if value != value else json.dumps(value)
    return json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
