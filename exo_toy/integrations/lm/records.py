"""Rows of JSON in and out: read and checked whole, written a batch at a time and gone on with after an interruption."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exo_toy.integrations import reference

Row = dict[str, Any]
# Begins the names of settings that are digests.
CONTENT = "content of "


class LmError(Exception):
    """A command cannot do what it is asked; the message says why."""


def read_rows(path: str | os.PathLike[str], columns: Sequence[str] = (), *, limit: int | None = None) -> list[Row]:
    r"""The rows of a file of JSON lines, or of one JSON list.

    Args:
        path: of the file.
        columns: which each row must have.
        limit: so many rows from the start; None for all.

    Returns:
        At least one row.

    Raises:
        LmError: no such file, no JSON, no rows, a row that lacks a column. The message names line or row.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w") as file:
        ...     print('[{"prompt": "a"}, {"prompt": "b"}]', file=file, flush=True)
        ...     read_rows(file.name, ["prompt"])
        [{'prompt': 'a'}, {'prompt': 'b'}]
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LmError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    rows: list[Any] = []
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            # Not splitlines, which also splits at characters that JSON allows inside strings.
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append(_parsed(line, number))
    except json.JSONDecodeError as error:
        raise LmError(f"{path}:{error.lineno}: is not JSON (one list, or an object a line): {error.msg}") from error
    if not rows:
        raise LmError(f"{path}: holds no rows")
    for index, row in enumerate(rows[:limit]):
        if not isinstance(row, dict):
            raise LmError(f"{path}: row {index}: must be an object; got {type(row).__name__}")
        for column in columns:
            if row.get(column) is None:
                raise LmError(f'{path}: row {index}, column "{column}": must be there; got columns {sorted(row)}')
        if "completions" in columns and not (isinstance(row["completions"], list) and row["completions"]):
            raise LmError(f'{path}: row {index}, column "completions": must be a list with a completion in it')
    return rows[:limit]


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(f"{error.msg} (character {error.pos + 1})", "\n" * number, number - 1) from error


def digest(path: str | os.PathLike[str]) -> str:
    """What identifies a file (its SHA-256) or a model's folder (names, sizes and times of its weights).

    Args:
        path: of the file or folder; a name on a hub stands for itself.

    Raises:
        LmError: a file that cannot be read.
    """
    place = Path(path)
    if place.is_dir():
        weights = [file for kind in ("*.safetensors", "*.bin", "*config.json") for file in place.glob(kind)]
        listed = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(weights)]
        return hashlib.sha256(repr(listed).encode()).hexdigest()
    if not place.is_file():
        return str(path)
    try:
        with place.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise LmError(f"{path}: cannot be read: {error.strerror}") from error


def write_whole(path: Path, text: str) -> None:
    """A file that appears whole or not at all.

    Args:
        path: of the file; one that is there is replaced.
        text: what it holds.

    Raises:
        LmError: it cannot be written.
    """
    try:
        reference.write_whole(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise LmError(f"{path}: cannot be written: {error.strerror}") from error


def require_writable(what: str, folder: Path) -> None:
    """A folder can be written to, or made.

    Args:
        what: the setting, for the message.
        folder: that may not exist yet.

    Raises:
        LmError: it cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise LmError(f"{what}: {folder} cannot be written to: {there} must be a folder that one may write to")


def require_same(what: str, was: Mapping[str, Any], asked: Mapping[str, Any], remedy: str) -> None:
    """What was begun or made is what is asked for now.

    Args:
        what: that was made, for the message.
        was: its settings.
        asked: the settings now.
        remedy: what to do about a difference.

    Raises:
        LmError: a setting that differs; the message names it.
    """
    for name in dict.fromkeys([*was, *asked]):
        if was.get(name) != asked.get(name):
            # Of a content there is a digest, which says nothing to a reader.
            content = name.startswith(CONTENT) and None not in (was.get(name), asked.get(name))
            before, now = (repr(some[name]) if name in some else "not given" for some in (was, asked))
            difference = "has changed" if content else f"was {before} and is now {now}"
            raise LmError(f"{what} was made with other settings: {name} {difference}; {remedy}")


class Lines:
    """Rows of an output, appended a batch at a time to ``NAME.part``; the output appears when all are there.

    The first line of the part, and ``NAME.settings.json`` beside the output, hold the settings.

    Args:
        path: of the output: ``.json`` for one JSON list, anything else for JSON lines.
        settings: what the rows depend on; JSON.

    Attributes:
        done: rows that are there.
        complete: whether the output is there.

    Raises:
        LmError: an output or a part of one with other settings; a folder that cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path, self.settings = Path(path), json.loads(json.dumps(settings))
        self.part = self.path.with_name(f"{self.path.name}.part")
        self._sidecar = self.path.with_name(f"{self.path.name}.settings.json")
        self.done, self.complete = 0, self.path.exists()
        remedy = "remove it, or choose another output"
        require_writable("output", self.path.parent)
        if self.complete:
            if not self._sidecar.exists():
                raise LmError(f"{self.path}: exists, and this command did not make it; {remedy}")
            was = json.loads(self._sidecar.read_text(encoding="utf-8"))
            require_same(str(self.path), was, self.settings, remedy)
        elif self.part.exists():
            whole = self.part.read_bytes()
            lines = whole[: whole.rfind(b"\n") + 1].splitlines(keepends=True)
            if lines:
                require_same(str(self.part), json.loads(lines[0]), self.settings, remedy)
                self.done = len(lines) - 1
                with self.part.open("rb+") as file:
                    file.truncate(sum(map(len, lines)))
            else:
                self.part.unlink()

    def append(self, rows: Sequence[Row]) -> None:
        """Rows that follow those that are there.

        Raises:
            LmError: they cannot be written, or hold a number that is not finite.
        """
        try:
            text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.part.open("a", encoding="utf-8") as file:
                if file.tell() == 0:
                    file.write(json.dumps(self.settings) + "\n")
                file.write(text)
        except OSError as error:
            raise LmError(f"{self.part}: cannot be written: {error.strerror}") from error
        except ValueError as error:
            raise LmError(
                f"{self.path}: a number of rows {self.done} to {self.done + len(rows)} is not finite"
            ) from error
        self.done += len(rows)

    def rows(self) -> list[Row]:
        """The rows that are there."""
        if self.complete:
            return read_rows(self.path)
        with self.part.open(encoding="utf-8") as file:
            next(file)
            return [json.loads(line) for line in file]

    def finish(self, convert: Callable[[Row], Row | None] | None = None) -> int:
        """Make the output.

        Args:
            convert: of each row: what the output holds in its place, None to leave it out.

        Returns:
            How many rows the output holds.

        Raises:
            LmError: no row is left, or the output cannot be written.
        """
        rows = [row if convert is None else convert(row) for row in self.rows()]
        kept = [row for row in rows if row is not None]
        if not kept:
            raise LmError(f"{self.path}: none of {len(rows)} rows is left to write")
        if self.path.suffix == ".json":
            text = "[\n" + ",\n".join(json.dumps(row) for row in kept) + "\n]\n"
        else:
            text = "".join(json.dumps(row) + "\n" for row in kept)
        write_whole(self._sidecar, json.dumps(self.settings, indent=1) + "\n")
        write_whole(self.path, text)
        self.part.unlink()
        self.complete = True
        return len(kept)
