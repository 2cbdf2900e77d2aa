"""The command ``exo-toy``: run the experiments, judge the claims, draw the figures, write the report; audit a log.

Exit codes: 0, every claim that should hold does; 1, one fails; 2, something is missing; 130, interrupted. Of an audit:
0, every record was used; 1, malformed ones were left out; 2, nothing was written; 143, terminated.
"""

import argparse
import contextlib
import importlib
import importlib.util
import signal
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
# Malformed records of a log that are printed; the file of problems has them all.
PRINTED_PROBLEMS = 20


class Missing(Exception):
    """The command cannot run here; the message says what is missing and how to get it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "audit":
            return _audit(options)
        _require(options.command)
        return _run(options)
    except Missing as error:
        print(f"exo-toy: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if options.command == "audit":
            print("\nexo-toy: interrupted; nothing was written", file=sys.stderr)
            return 130
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
            add_process_options(command)
    _add_audit(commands)
    return parser


def _add_audit(commands: Any) -> None:
    text = "losses, effective sample sizes and sampled estimates of a run's log (JSON lines or a JSON list)"
    command = commands.add_parser("audit", help=text, description=text)
    command.add_argument(
        "file", type=Path, metavar="FILE", help="prompt, completions, rewards, policy_logps, ref_logps"
    )
    command.add_argument("--beta-pi", type=float, required=True, metavar="B", help="multiplies the log ratio")
    command.add_argument("--beta-r", type=float, required=True, metavar="B", help="divides the reward")
    command.add_argument(
        "--label-smoothing", type=float, default=1e-3, metavar="E", help="of EXO-pref (default: %(default)s)"
    )
    command.add_argument("--output", type=Path, metavar="DIR", help="to write to (default: FILE's name and .audit)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: %(default)s)")
    command.add_argument("--no-figure", dest="figure", action="store_false", help="leave the density ratios undrawn")


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


def _audit(options: argparse.Namespace) -> int:
    absent = [package for package in FIGURES if options.figure and not importlib.util.find_spec(package)]
    if absent:
        raise Missing(f"`audit` draws with {', '.join(absent)}: pip install {' '.join(absent)}, or pass --no-figure")
    from exo_toy import audit

    try:
        settings = audit.Settings(options.beta_pi, options.beta_r, options.label_smoothing, options.seed)
    except ValueError as error:
        raise Missing(str(error)) from error
    output = options.output or Path(f"{options.file.name}.audit")
    n_problems = 0

    def on_problem(text: str) -> None:
        nonlocal n_problems
        n_problems += 1
        if n_problems <= PRINTED_PROBLEMS:
            print(f"exo-toy: {text}", file=sys.stderr)

    # Ended from outside, it takes away what it has begun; only the main thread can ask for that.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with audit.staged(output) as folder:
            report = audit.run(options.file, settings, folder, on_problem)
            if options.figure:
                from exo_toy import plots

                if not plots.density_ratios(report.tables, beta=settings.beta, folder=folder):
                    print("exo-toy: no figure: no rewards that vary", file=sys.stderr)
    except audit.AuditError as error:
        raise Missing(str(error)) from error
    _print_table([("quantity", "mean", "95 % interval", "bias", "prompts"), *report.rows()])
    for warning in report.summary["warnings"]:
        print(f"exo-toy: warning: {warning}", file=sys.stderr)
    if n_problems:
        print(f"exo-toy: {n_problems} malformed records left out, see {output / audit.PROBLEMS}", file=sys.stderr)
    names = (audit.SUMMARY, audit.PROMPTS, audit.PROBLEMS, *audit.FIGURES)
    print(*(output / name for name in names if (output / name).exists()), sep="\n")
    return 1 if n_problems else 0


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
