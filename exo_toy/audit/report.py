"""An audit from file to folder."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exo_toy.audit.log import Problem, Record, read
from exo_toy.audit.measures import INTERVALS, Settings, Table, Totals

PROMPTS, PROBLEMS, SUMMARY = "prompts.jsonl", "problems.txt", "summary.json"
FIGURES = ("density_ratio.pdf", "density_ratio.png")
# Candidates measured in one go.
AT_ONCE = 2**14
LABELS = {
    "losses.exo_rw": "EXO-rw",
    "losses.dpo_rw": "DPO-rw",
    "losses.exo_pref": "EXO-pref, best against worst",
    "losses.dpo": "DPO, best against worst",
    "ess.exo_weights": "ESS of EXO's weights",
    "ess.policy": "ESS of π_θ/π_ref",
    "ess.optimal": "ESS of π*_β/π_ref",
    "estimates.kl_policy_to_optimal": "KL(π_θ‖π*_β)",
    "estimates.kl_optimal_to_policy": "KL(π*_β‖π_θ)",
    "estimates.kl_policy_to_reference": "KL(π_θ‖π_ref)",
    "estimates.kl_optimal_to_reference": "KL(π*_β‖π_ref)",
    "estimates.objective": "J_β(π_θ)",
    "estimates.expected_reward": "E[r] under π_θ",
    "mean_reward": "E[r] under π_ref",
    "estimates.log_z": "log Z_β",
    "estimates.log_mean_ratio": "log mean π_θ/π_ref, truth 0",
}


class AuditError(Exception):
    """There is nothing to audit, or nowhere to write to; the message says which."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found over all prompts, and the tables that the figure is drawn from."""

    summary: dict[str, Any]
    tables: list[Table]

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Quantity, mean over prompts, interval, bias and number of prompts, as texts."""
        rows = []
        for name, entry in self.summary["over_prompts"].items():
            interval = "" if entry["low"] is None else f"{entry['low']:.4g} … {entry['high']:.4g}"
            bias = "" if entry["bias"] is None else f"{entry['bias']:+.2g}"
            rows.append((LABELS[name], f"{entry['mean']:.4g}", interval, bias, str(entry["prompts"])))
        return rows


def run(path: Path, settings: Settings, folder: Path, on_problem: Callable[[str], None]) -> Report:
    """Audit a log into a folder: ``prompts.jsonl``, ``summary.json`` and, if there are problems, ``problems.txt``.

    Args:
        path: of the log.
        settings: temperatures, label smoothing, seed.
        folder: an empty one.
        on_problem: gets the text of each problem as it is met.

    Returns:
        Report.

    Raises:
        AuditError: the log cannot be read, or has no record that is any use.
    """
    totals, n_problems = Totals(settings), 0
    try:
        log = path.open("rb")
    except OSError as error:
        raise AuditError(f"{path}: cannot be read: {error.strerror}") from error
    with (
        log,
        (folder / PROMPTS).open("w", encoding="utf-8") as prompts,
        (folder / PROBLEMS).open("w", encoding="utf-8", errors="backslashreplace") as problems,
    ):
        for records, malformed in _in_batches(read(log)):
            n_problems += len(malformed)
            for problem in malformed:
                problems.write(problem.text(str(path)) + "\n")
                on_problem(problem.text(str(path)))
            prompts.writelines(json.dumps(document, allow_nan=False) + "\n" for document in totals.add(records))
    if not n_problems:
        (folder / PROBLEMS).unlink()
    if not totals.n_records:
        why = f"none of {n_problems} records is usable" if n_problems else "it holds no record"
        raise AuditError(f"{path}: nothing to audit: {why}")
    over_prompts = totals.over_prompts(list(LABELS))
    summary = {
        "file": str(path),
        "settings": {**dataclasses.asdict(settings), "beta": settings.beta},
        "counts": {
            "malformed": n_problems,
            "records": totals.n_records,
            "without_log_probabilities": totals.n_without_logps,
        },
        "over_prompts": over_prompts,
        "intervals": INTERVALS,
        "warnings": totals.warnings(over_prompts),
    }
    text = json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / SUMMARY).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    return Report(summary, totals.tables)


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder to fill, whose files move to ``output`` on leaving the block; on any failure nothing is left behind.

    The files of an earlier audit in ``output`` are replaced, others left alone.

    Args:
        output: a folder, made where there is none, in one that exists.

    Yields:
        The folder to fill, inside ``output``.

    Raises:
        AuditError: it cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as home, staged(Path(home) / "audit") as folder:
        ...     folder.is_dir()
        True
    """
    made = not output.exists()
    try:
        output.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".part-", dir=output))
    except OSError as error:
        raise AuditError(f"{output}: cannot be written: {error.strerror}") from error
    try:
        yield folder
        # The summary last: it speaks for the others.
        for name in (*FIGURES, PROBLEMS, PROMPTS, SUMMARY):
            if (folder / name).exists():
                (folder / name).replace(output / name)
            else:
                (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise AuditError(f"{output}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made and not any(output.iterdir()):
            output.rmdir()


def _in_batches(items: Iterator[Record | Problem]) -> Iterator[tuple[list[Record], list[Problem]]]:
    """Some thousand candidates at a time, and the problems met on the way."""
    records, problems, size = list[Record](), list[Problem](), 0
    for item in items:
        if isinstance(item, Problem):
            problems.append(item)
            size += 1
        else:
            records.append(item)
            size += len(item.rewards)
        if size >= AT_ONCE:
            yield records, problems
            records, problems, size = [], [], 0
    yield records, problems
