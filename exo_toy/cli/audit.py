"""``exo-toy audit``: losses and diagnostics of a logged run.

Exit codes: 0, every record was used; 1, malformed ones were left out; 2, nothing was written; 143, terminated.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from exo_toy.cli.base import FIGURES, Missing, absent, clean_up_when_terminated, print_table

# Malformed records of a log that are printed; the file of problems has them all.
PRINTED_PROBLEMS = 20


def add(commands: Any) -> None:
    """The command and its options."""
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
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Audit a log and return the exit code."""
    missing = absent(FIGURES if options.figure else ())
    if missing:
        raise Missing(f"`audit` draws with {', '.join(missing)}: pip install {' '.join(missing)}, or pass --no-figure")
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

    clean_up_when_terminated()
    try:
        with audit.staged(output) as folder:
            report = audit.run(options.file, settings, folder, on_problem)
            if options.figure:
                from exo_toy import plots

                if not plots.density_ratios(report.tables, beta=settings.beta, folder=folder):
                    print("exo-toy: no figure: no rewards that vary", file=sys.stderr)
    except audit.AuditError as error:
        raise Missing(str(error)) from error
    print_table([("quantity", "mean", "95 % interval", "bias", "prompts"), *report.rows()])
    for warning in report.summary["warnings"]:
        print(f"exo-toy: warning: {warning}", file=sys.stderr)
    if n_problems:
        print(f"exo-toy: {n_problems} malformed records left out, see {output / audit.PROBLEMS}", file=sys.stderr)
    names = (audit.SUMMARY, audit.PROMPTS, audit.PROBLEMS, *audit.FIGURES)
    print(*(output / name for name in names if (output / name).exists()), sep="\n")
    return 1 if n_problems else 0
