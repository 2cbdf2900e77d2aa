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
    "top_leads": "top reward leads (share)",
    "mean_reward": "E[r] under π_ref",
    "ess.exo_weights": "ESS of p_f, EXO's weights",
    "ess.reward_weights": "ESS of p_r, DPO's targets",
    "ess.policy": "ESS of π_θ/π_ref",
    "ess.optimal": "ESS of π*_β/π_ref",
    "policy.kl_policy_to_optimal": "KL(π_θ‖π*_β)",
    "policy.kl_optimal_to_policy": "KL(π*_β‖π_θ)",
    "policy.kl_policy_to_reference": "KL(π_θ‖π_ref)",
    "policy.kl_optimal_to_reference": "KL(π*_β‖π_ref)",
    "policy.log_z": "log Z_β",
    "policy.log_mean_ratio": "log mean π_θ/π_ref, truth 0",
    "policy.expected_reward": "E[r] under π_θ",
    "policy.objective": "J_β(π_θ)",
    "tempered.kl_policy_to_optimal": "KL(π_θ^β_π‖π*_β_r)",
    "tempered.kl_optimal_to_policy": "KL(π*_β_r‖π_θ^β_π)",
    "tempered.kl_policy_to_reference": "KL(π_θ^β_π‖π_ref)",
    "tempered.kl_optimal_to_reference": "KL(π*_β_r‖π_ref)",
    "tempered.log_z": "log Z_β_r",
    "tempered.expected_reward": "E[r] under π_θ^β_π",
    "tempered.objective": "J_β_r(π_θ^β_π)",
}


class AuditError(Exception):
    """There is nothing to audit, or nowhere to write to; the message says which."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found over all prompts, and the tables that the figure is drawn from."""

    summary: dict[str, Any]
    tables: list[Table]

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Quantity, mean over prompts, interval, bias and number of prompts, as texts; the tempered only if other."""
        rows = []
        for name, entry in self.summary["over_prompts"].items():
            if name.startswith("tempered.") and self.summary["settings"]["beta_pi"] == 1:
                continue
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
        AuditError: the log cannot be read, is not text, or has no record that is any use.
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
        if b"\0" in log.peek(4096)[:4096]:
            raise AuditError(f"{path}: is a binary file: must be UTF-8 text, JSON lines or one JSON list")
        for records, malformed in _in_batches(read(log)):
            n_problems += len(malformed)
            for problem in malformed:
                problems.write(problem.text(str(path)) + "\n")
                on_problem(problem.text(str(path)))
            prompts.writelines(json.dumps(document, allow_nan=False) + "\n" for document in totals.add(records))
    if not n_problems:
        (folder / PROBLEMS).unlink()
    if not totals.counts["records"]:
        why = f"none of {n_problems} records is usable" if n_problems else "it holds no record"
        raise AuditError(f"{path}: nothing to audit: {why}")
    over_prompts = totals.over_prompts(list(LABELS))
    summary = {
        "file": str(path),
        "settings": {**dataclasses.asdict(settings), "beta": settings.beta},
        "counts": {"malformed": n_problems, **totals.counts},
        "over_prompts": over_prompts,
        "intervals": INTERVALS,
        "warnings": totals.warnings(over_prompts),
    }
    text = json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / SUMMARY).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    return Report(summary, totals.tables)


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``output`` on leaving the block; on any failure nothing of it is left behind.

    Where there is such a folder already, the files of an audit in it are replaced, and others left alone.

    Args:
        output: the folder, in one that exists.

    Yields:
        The folder to fill, beside or inside ``output``.

    Raises:
        AuditError: it cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as home, staged(Path(home) / "audit") as folder:
        ...     folder.is_dir()
        True
    """
    exists = output.is_dir()
    try:
        if output.exists() and not exists:
            raise FileExistsError(0, "it is no folder")
        place = output if exists else output.absolute().parent
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=place))
    except OSError as error:
        raise AuditError(f"{output}: cannot be written: {error.strerror}") from error
    try:
        yield folder
        if exists:
            # The summary last: it speaks for the others.
            for name in (*FIGURES, PROBLEMS, PROMPTS, SUMMARY):
                if (folder / name).exists():
                    (folder / name).replace(output / name)
                else:
                    (output / name).unlink(missing_ok=True)
        else:
            # mkdtemp makes folders that only their owner may enter.
            folder.chmod(0o755)
            folder.replace(output)
    except OSError as error:
        raise AuditError(f"{output}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_batches(items: Iterator[Record | Problem]) -> Iterator[tuple[list[Record], list[Problem]]]:
    """Some thousand candidates at a time, and the problems met on the way."""
    records, problems, size = list[Record](), list[Problem](), 0
    for item in items:
        if isinstance(item, Problem):
            problems.append(item)
            size += 1
        else:
            records.append(item)
            size += item.n_candidates
        if size >= AT_ONCE:
            yield records, problems
            records, problems, size = [], [], 0
    yield records, problems
