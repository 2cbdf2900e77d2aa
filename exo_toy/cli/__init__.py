"""The command ``exo-toy``: a module for each command, or for those that belong together.

Exit codes: 2, something is missing or refused, with a message; 130, interrupted; others as each command says.
"""

import argparse
import sys
from collections.abc import Sequence

import exo_toy
from exo_toy.cli import audit, experiments, lab, lm, text
from exo_toy.cli.base import Missing

COMMANDS = (experiments, audit, lab, text, lm)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options, rest = _parser().parse_known_args(arguments)
    if options.takes_rest:
        options.rest = rest
    elif rest:
        _parser().parse_args(arguments)  # which refuses them
    try:
        return options.run(options)
    except Missing as error:
        print(f"exo-toy: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = " ".join(["exo-toy", *(sys.argv[1:] if arguments is None else arguments)])
        resumed = f"finished cases are kept, `{again}` goes on from there"
        print(f"\nexo-toy: interrupted; {resumed if options.resumes else 'nothing was written'}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="exo-toy",
        description='Check the claims of "Towards Efficient Exact Optimization of Language Model Alignment".',
    )
    parser.add_argument("--version", action="version", version=f"exo-toy {exo_toy.__version__}")
    # Of each command: what runs it, whether it goes on where it was interrupted, and whether it reads flags itself.
    parser.set_defaults(resumes=False, takes_rest=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in COMMANDS:
        module.add(commands)
    return parser
