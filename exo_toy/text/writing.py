"""A document as a file of JSON, whole or not at all."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from exo_toy.text.reading import TextError


@contextmanager
def staged(output: Path) -> Iterator[TextIO]:
    """A file to write, which takes its place on leaving the block; on any failure nothing is left behind.

    Args:
        output: the file, in a folder that exists; one that is there is replaced.

    Yields:
        The file, open for writing.

    Raises:
        TextError: it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as home:
        ...     with staged(Path(home) / "found.json") as file:
        ...         _ = file.write("{}")
        ...     (Path(home) / "found.json").read_text()
        '{}'
    """
    if output.exists() and not output.is_file():
        raise TextError(f"{output}: must be a file to write, no {'folder' if output.is_dir() else 'device or pipe'}")
    part = output.with_name(f".part-{os.getpid()}-{output.name}")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(output)
    except OSError as error:
        raise TextError(f"{output}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def write(document: dict[str, Any], file: TextIO) -> None:
    """The document as JSON."""
    json.dump(document, file, indent=1, allow_nan=False, ensure_ascii=False)
    file.write("\n")


def plain(value: Any) -> Any:
    """What JSON can hold: infinities as text."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
