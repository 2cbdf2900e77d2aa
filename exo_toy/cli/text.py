"""``exo-toy text``: a k-gram reference fitted to a text, and its optimal policy for keywords.

Exit codes: 0, every keyword was used; 1, some were left out; 2, nothing was written; 143, terminated.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from exo_toy.cli.base import Missing, clean_up_when_terminated

# Bytes of a text whose reading is reported, and seconds after which every step is.
TAKES_LONG, PATIENCE = 2**23, 2.0


def add(commands: Any) -> None:
    """The command and its options."""
    text = "a k-gram reference fitted to a text, and its optimal policy for keywords, exactly, with samples of both"
    command = commands.add_parser("text", help=text, description=text)
    command.add_argument("file", type=Path, metavar="FILE", help="a text of any size")
    command.add_argument(
        "--reward", type=Path, required=True, metavar="FILE", help="keywords, one a line: KEYWORD or WEIGHT<TAB>KEYWORD"
    )
    command.add_argument("--beta", type=float, required=True, metavar="B", help="strength of the KL penalty")
    command.add_argument("--length", type=int, default=64, metavar="T", help="tokens of a completion (%(default)s)")
    command.add_argument("--words", dest="by_words", action="store_true", help="words are the tokens, not characters")
    command.add_argument(
        "--order", type=int, metavar="K", help="tokens that the next depends on (1 word, 2 characters)"
    )
    command.add_argument(
        "--vocabulary", type=int, metavar="N", help="tokens told apart, <unk> among them (1000 words, 128 characters)"
    )
    command.add_argument(
        "--smoothing",
        choices=("witten-bell", "absolute", "add-delta"),
        default="witten-bell",
        help="interpolated Witten-Bell, interpolated absolute discounting, or additive (default: %(default)s)",
    )
    command.add_argument("--delta", type=float, metavar="D", help="what add-delta adds to every count")
    command.add_argument("--encoding", metavar="NAME", help="of the text (default: UTF-8, or what its mark says)")
    command.add_argument("--samples", type=int, default=5, metavar="N", help="of either policy (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (default: %(default)s)")
    command.add_argument("--output", type=Path, metavar="FILE", help="to write all numbers and samples to, as JSON")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Fit and align a text, print what is found, and return the exit code."""
    from exo_toy import text

    clean_up_when_terminated()
    given = {name: getattr(options, name) for name in text.Settings.__dataclass_fields__}
    for path in (options.file, options.reward):
        if options.output and options.output.exists() and path.exists() and options.output.samefile(path):
            raise Missing(f"{options.output}: must be another file than those that are read")
    try:
        with contextlib.ExitStack() as stack:
            # Before the work: where nothing can be written, that is said at once.
            file = stack.enter_context(text.staged(options.output)) if options.output else None
            progress = _Progress()
            document = text.run(
                options.file, options.reward, text.Settings(**given), progress.on_bytes, progress.on_step
            )
            if file is not None:
                text.write(document, file)
    except (text.TextError, ValueError) as error:
        raise Missing(str(error)) from error
    for line in text.lines(document):
        # A terminal that has no such character gets its number.
        encoding = sys.stdout.encoding or "utf-8"
        print(line.encode(encoding, "backslashreplace").decode(encoding))
    for left in document["left_out"]:
        print(f"exo-toy: {options.reward}:{left['line']}: left out: {left['reason']}", file=sys.stderr)
    if options.output:
        print(options.output)
    return 1 if document["left_out"] else 0


class _Progress:
    """What takes long, on stderr: tenths of a text that is read, and the steps of the recursions."""

    def __init__(self) -> None:
        self.said, self.started = ("", 0), time.monotonic()

    def on_bytes(self, stage: str, done: int, total: int) -> None:
        tenths = 10 * done // max(total, 1)
        if total > TAKES_LONG and (stage, tenths) != self.said and tenths:
            print(f"exo-toy: {stage}: {10 * tenths} %", file=sys.stderr, flush=True)
        self.said = (stage, tenths)

    def on_step(self, step: str) -> None:
        if time.monotonic() - self.started > PATIENCE:
            print(f"exo-toy: {step}", file=sys.stderr, flush=True)
