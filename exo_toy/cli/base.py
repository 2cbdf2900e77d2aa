"""What the commands share."""

import argparse
import contextlib
import importlib.util
import signal
import sys
from collections.abc import Iterable, Sequence

# Packages, and the extra that brings each.
FIGURES = {"matplotlib": "figures", "seaborn": "figures"}


class Missing(Exception):
    """The command cannot run here; the message says what is missing and how to get it."""


def positive_integer(text: str) -> int:
    """For argparse: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1; got {text}")
    return int(text)


def absent(packages: Iterable[str]) -> list[str]:
    """The packages that are not installed."""
    return [package for package in packages if not importlib.util.find_spec(package)]


def clean_up_when_terminated() -> None:
    """Ended from outside, a command takes away what it has begun; only the main thread can ask for that."""
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns of text, aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
