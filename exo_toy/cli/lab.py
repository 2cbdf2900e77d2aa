"""``exo-toy lab``: what a loss optimises, and where it breaks.

Exit codes: 0, no defect was found; 1, one was; 2, the loss could not be examined.
"""

import argparse
import ast
import contextlib
import importlib
import io
import sys
import time
from pathlib import Path
from typing import Any

from exo_toy.cli.base import FIGURES, Missing, absent

# Seconds after which it says what it is at.
PATIENCE = 2.0


def add(commands: Any) -> None:
    """The command and its options."""
    text = "what a loss on pairs or candidates optimises, and where it breaks"
    command = commands.add_parser("lab", help=text, description=text)
    command.add_argument("function", metavar="MODULE:FUNCTION", help="a loss per example; its module is imported")
    command.add_argument("--kind", metavar="KIND", help="which tensors it takes, if its signature does not tell")
    command.add_argument(
        "--set",
        dest="settings",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter that is no tensor, as beta=0.1",
    )
    command.add_argument("--figure", type=Path, metavar="FILE", help="to draw the findings to, .png or .pdf")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Examine a loss and return the exit code."""
    missing = absent(FIGURES if options.figure else ())
    if missing:
        raise Missing(f"`lab --figure` draws with {', '.join(missing)}: pip install {' '.join(missing)}")
    if options.figure and not options.figure.absolute().parent.is_dir():
        raise Missing(f"{options.figure}: cannot be written: no such folder")
    # As `python -m` finds modules.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    from exo_toy import lab

    started, printed = time.monotonic(), io.StringIO()

    def on_step(text: str) -> None:
        if time.monotonic() - started > PATIENCE:
            print(f"exo-toy: {text}", file=sys.stderr)

    # What the loss itself prints would come between the lines of the page.
    with contextlib.redirect_stdout(printed):
        function = _named(options.function)
        try:
            settings = dict(options.settings)
            report = lab.characterize(function, kind=options.kind, settings=settings, on_step=on_step)
        except lab.LabError as error:
            raise Missing(f"{options.function}: {error}") from error
    if printed.getvalue():
        lines = printed.getvalue().splitlines()
        count = "a line that was" if len(lines) == 1 else f"{len(lines)} lines that were"
        print(f"exo-toy: left out {count} printed, from {lines[0]!r} on", file=sys.stderr)
    print(report)
    if options.figure:
        from exo_toy import plots

        try:
            print(plots.loss_page(report, options.figure))
        except (OSError, ValueError) as error:
            raise Missing(f"{options.figure}: cannot be written: {error}") from error
    return 1 if report.findings else 0


def _setting(text: str) -> tuple[str, Any]:
    """For argparse: a keyword and a Python literal."""
    name, separator, value = text.partition("=")
    try:
        if separator and name.isidentifier():
            return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        pass
    raise argparse.ArgumentTypeError(f"must be NAME=VALUE with a Python literal; got {text}")


def _named(text: str) -> Any:
    """What MODULE:FUNCTION names."""
    module, _, path = text.partition(":")
    if not module or not path:
        raise Missing(f"MODULE:FUNCTION must name a function and its module, as my_losses:my_loss; got {text}")
    if not all(part.isidentifier() for part in module.split(".")) or module.endswith(".py"):
        raise Missing(f"MODULE must be a name as in an import, my_package.my_losses, and no file; got {module}")
    try:
        found: Any = importlib.import_module(module)
    # Importing it runs it: anything may come of that.
    except (Exception, SystemExit) as error:
        raise Missing(f"{module} cannot be imported: {_reason(error)}") from error
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise Missing(f"{module} has no {path}") from error
        # Properties run, too.
        except (Exception, SystemExit) as error:
            raise Missing(f"{module}:{path} cannot be got: {_reason(error)}") from error
    return found


def _reason(error: BaseException) -> str:
    """The kind of error and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
