"""``exo-toy verify``, ``figures`` and ``reproduce``: run the experiments, judge the claims, draw, write the report.

Exit codes: 0, every claim that should hold does; 1, one fails.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from exo_toy.cli.base import FIGURES, Missing, absent, positive_integer

CHECKOUT = Path(__file__).resolve().parents[2]
# What each command imports beyond the library's own dependencies, and the extra that brings it.
EXPERIMENTS = {"joblib": "experiments", "rich": "experiments", "transformers": "experiments"}
NEEDS = {"verify": EXPERIMENTS, "figures": FIGURES, "reproduce": EXPERIMENTS | FIGURES}


def add(commands: Any) -> None:
    """The commands and their options."""
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
        command.set_defaults(preset="default", run=run, resumes=True)
        if name != "figures":
            add_process_options(command)


def add_process_options(command: argparse.ArgumentParser) -> None:
    """Where experiments evaluate their cases; shared with the command line of each experiment."""
    command.add_argument("--jobs", type=positive_integer, metavar="N", help="processes (default: one per core)")
    command.add_argument(
        "--backend",
        choices=("loky", "dask"),
        default="loky",
        help="processes of this machine, or workers of a Dask cluster (default: %(default)s)",
    )
    command.add_argument(
        "--scheduler", metavar="ADDRESS", help="of the Dask cluster (default: one of this machine, for this run)"
    )


def run(options: argparse.Namespace) -> int:
    """Run one of the commands and return its exit code."""
    _require(options.command)
    # By name: the library does not depend on what lies beside it in the checkout.
    storage: Any = importlib.import_module("analysis.storage")
    try:
        if options.command == "figures":
            _draw(options.preset)
            return 0
        return _verify(options)
    except storage.ResultsError as error:
        raise Missing(str(error)) from error


def _require(command: str) -> None:
    """The checkout and the extras that a command needs are there."""
    if not all((CHECKOUT / part).is_file() for part in ("analysis/runner.py", "figures/style.py")):
        raise Missing(
            f"`{command}` needs the checkout: analysis/ and figures/ are not part of the installed package "
            f"(exo_toy is imported from {Path(__file__).parents[1]}). "
            "Clone the repository and run `make reproduce` there."
        )
    missing = absent(NEEDS[command])
    if missing:
        extras = ",".join(sorted({NEEDS[command][package] for package in missing}))
        raise Missing(
            f"`{command}` needs {', '.join(missing)}: "
            f"pip install -e '{CHECKOUT}[{extras}]' -c '{CHECKOUT / 'constraints.txt'}'"
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))


def _draw(preset: str) -> None:
    style: Any = importlib.import_module("figures.style")
    for path in style.draw_all(preset):
        print(path.relative_to(CHECKOUT))


def _verify(options: argparse.Namespace) -> int:
    claims: Any = importlib.import_module("analysis.claims")
    report: Any = importlib.import_module("analysis.report")
    runner: Any = importlib.import_module("analysis.runner")
    console: Any = importlib.import_module("rich.console")
    processes = {"jobs": options.jobs, "backend": options.backend, "scheduler": options.scheduler}
    try:
        # To the end of the report: interrupted while drawing, nothing has to be computed again.
        with runner.session(options.preset, **processes) as session:
            results = runner.run_experiments(options.preset, session)
            outcomes = report.judge_all(results)
            if options.command == "reproduce":
                _draw(options.preset)
                size = "" if options.preset == "default" else f" --{options.preset}"
                report.write_report(outcomes, results, options.preset, f"exo-toy reproduce{size}")
    except runner.ClusterError as error:
        raise Missing(str(error)) from error
    report.print_table(outcomes, console.Console())
    failed = claims.failed(outcomes)
    if failed:
        print(f"exo-toy: should hold and does not: {', '.join(claim.id for claim in failed)}", file=sys.stderr)
    return 1 if failed else 0
