"""The command ``exo-toy``: run the experiments, judge the claims, draw the figures, write the report.

Exit codes: 0, every claim that should hold does; 1, one fails; 2, something is missing; 130, interrupted.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import exo_toy

CHECKOUT = Path(__file__).resolve().parents[1]
# What each command imports beyond the library's own dependencies, and the extra that brings it.
EXPERIMENTS = {"joblib": "experiments", "rich": "experiments", "transformers": "experiments"}
FIGURES = {"matplotlib": "figures", "seaborn": "figures"}
NEEDS = {"verify": EXPERIMENTS, "figures": FIGURES, "reproduce": EXPERIMENTS | FIGURES}


class Missing(Exception):
    """The command cannot run here; the message says what is missing and how to get it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        _require(options.command)
        return _run(options)
    except Missing as error:
        print(f"exo-toy: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = " ".join(["exo-toy", *(sys.argv[1:] if arguments is None else arguments)])
        print(f"\nexo-toy: interrupted; finished cases are kept, `{again}` goes on from there", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="exo-toy",
        description='Check the claims of "Towards Efficient Exact Optimization of Language Model Alignment".',
    )
    parser.add_argument("--version", action="version", version=f"exo-toy {exo_toy.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    helps = {
        "verify": "run the experiments and judge the claims",
        "figures": "draw the figures from stored results",
        "reproduce": "verify, draw the figures and rewrite paper_repro.md",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        size = command.add_mutually_exclusive_group()
        size.add_argument("--quick", dest="preset", action="store_const", const="quick", help="a minute")
        size.add_argument("--full", dest="preset", action="store_const", const="full", help="the reported run")
        command.set_defaults(preset="default")
        if name != "figures":
            command.add_argument("--jobs", type=positive_integer, metavar="N", help="processes (default: one per core)")
    return parser


def positive_integer(text: str) -> int:
    """For argparse: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1; got {text}")
    return int(text)


def _require(command: str) -> None:
    """The checkout and the extras that a command needs are there."""
    if not all((CHECKOUT / part).is_file() for part in ("analysis/runner.py", "figures/style.py")):
        raise Missing(
            f"`{command}` needs the checkout: analysis/ and figures/ are not part of the installed package "
            f"(exo_toy is imported from {Path(__file__).parent}). Clone the repository and run `make reproduce` there."
        )
    absent = {package: extra for package, extra in NEEDS[command].items() if not importlib.util.find_spec(package)}
    if absent:
        extras = ",".join(sorted(set(absent.values())))
        raise Missing(
            f"`{command}` needs {', '.join(absent)}: "
            f"pip install -e '{CHECKOUT}[{extras}]' -c '{CHECKOUT / 'constraints.txt'}'"
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))


def _run(options: argparse.Namespace) -> int:
    # By name: the library does not depend on what lies beside it in the checkout.
    storage: Any = importlib.import_module("analysis.storage")
    try:
        if options.command == "figures":
            _draw(options.preset)
            return 0
        return _verify(options)
    except storage.ResultsError as error:
        raise Missing(str(error)) from error


def _draw(preset: str) -> None:
    style: Any = importlib.import_module("figures.style")
    for path in style.draw_all(preset):
        print(path.relative_to(CHECKOUT))


def _verify(options: argparse.Namespace) -> int:
    claims: Any = importlib.import_module("analysis.claims")
    report: Any = importlib.import_module("analysis.report")
    runner: Any = importlib.import_module("analysis.runner")
    console: Any = importlib.import_module("rich.console")
    # To the end of the report: interrupted while drawing, nothing has to be computed again.
    with runner.session(options.preset, jobs=options.jobs) as session:
        results = runner.run_experiments(options.preset, session)
        outcomes = report.judge_all(results)
        if options.command == "reproduce":
            _draw(options.preset)
            size = "" if options.preset == "default" else f" --{options.preset}"
            report.write_report(outcomes, results, options.preset, f"exo-toy reproduce{size}")
    report.print_table(outcomes, console.Console())
    failed = claims.failed(outcomes)
    if failed:
        print(f"exo-toy: should hold and does not: {', '.join(claim.id for claim in failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
