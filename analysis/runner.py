"""Runs experiments: independent cases in parallel, with progress, resumable, stored at the end.

An experiment is a module of this package, listed in :data:`analysis.storage.EXPERIMENTS`, with

* ``Config``, a frozen dataclass of settings whose defaults are the reported run;
* ``PRESETS``, the settings of "quick", "default" and "full" (the reported run);
* ``run(config)``, which returns a :class:`Result` and evaluates its cases through :func:`map_cases`.

``run`` called by itself writes nothing. Inside a :func:`session`, every finished case is kept in ``analysis/.cache``
until the session ends; after an interruption the next session of the same label starts from there. A session that
ends removes what it kept, so that running it again computes everything anew.

Cases are evaluated by processes of this machine, or by the workers of a Dask cluster (:mod:`analysis.cluster`).
"""

import argparse
import dataclasses
import hashlib
import importlib
import inspect
import json
import pickle
import shutil
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from analysis import cluster, storage
from analysis.cluster import ClusterError
from exo_toy.cli.experiments import add_process_options

EXPERIMENTS = storage.EXPERIMENTS
PRESETS = ("quick", "default", "full")
# Settings given one by one on the command line: never mistaken for a preset's results.
CUSTOM = "custom"
CACHE = storage.ROOT / "analysis" / ".cache"


@dataclasses.dataclass(frozen=True)
class Result:
    """What an experiment found: numbers (nested dictionaries) for claims and text, arrays for figures."""

    numbers: dict[str, Any]
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass
class Session:
    """Where finished cases are kept, what evaluates them, and how many there were."""

    cache: Path
    backend: str = "loky"
    cases: int = 0
    resumed: int = 0


_session: ContextVar[Session | None] = ContextVar("session", default=None)


@contextmanager
def session(
    label: str, *, jobs: int | None = None, backend: str = "loky", scheduler: str | None = None
) -> Iterator[Session]:
    """Experiments run in here evaluate their cases in parallel and can be resumed under this label.

    Args:
        label: of what is kept.
        jobs: processes of this machine; one per core unless given.
        backend: "loky", processes of this machine, or "dask", the workers of a Dask cluster.
        scheduler: address of that cluster. Without it, one of ``jobs`` workers is started here and closed at the end.

    Raises:
        ClusterError: options that do not go together, no such cluster, or a worker with other sources than here.
    """
    if scheduler is not None and backend != "dask":
        raise ClusterError(f"--scheduler {scheduler} needs --backend dask; got --backend {backend}")
    if scheduler is not None and jobs is not None:
        raise ClusterError(f"--jobs {jobs} does not change the cluster at {scheduler}; leave it out")
    current = Session(CACHE / label, backend)
    token = _session.set(current)
    jobs = jobs or joblib.cpu_count()
    try:
        with cluster.workers(jobs, scheduler) if backend == "dask" else _processes(jobs):
            yield current
    finally:
        _session.reset(token)
    # Not reached after an exception: what is finished then waits for the next session.
    shutil.rmtree(current.cache, ignore_errors=True)


def _processes(jobs: int) -> Any:
    """Cases go to processes of this machine."""
    # One process keeps torch's own threads; several share the cores between them.
    processes: dict[str, Any] = {
        "inner_max_num_threads": max(1, joblib.cpu_count() // jobs),
        "initializer": cluster.leave_interrupt_to_parent,
    }
    return joblib.parallel_config("loky", n_jobs=jobs, **(processes if jobs > 1 else {}))


def map_cases(function: Callable[..., Any], cases: Sequence[dict[str, Any]]) -> list[Any]:
    """``[function(**case) for case in cases]``, in parallel and resumable inside a :func:`session`.

    Args:
        function: module-level, of keyword arguments, its value picklable and determined by its arguments.
        cases: arguments as plain values (numbers, texts, lists of them), which also name the case in the cache.
    """
    current = _session.get()
    if current is None:
        return [function(**case) for case in cases]
    source = fingerprint(function)
    entries = [current.cache / f"{case_key(function, case, source)}.pickle" for case in cases]
    done = [entry.exists() for entry in entries]
    current.cases += len(cases)
    current.resumed += sum(done)
    missing = [(entry, case) for entry, case, present in zip(entries, cases, done, strict=True) if not present]
    title = function.__module__.rpartition(".")[2]
    with _progress(title, total=len(cases), completed=sum(done)) as advance:
        for _ in _evaluate(function, missing):
            advance()
    return [pickle.loads(entry.read_bytes()) for entry in entries]


def _evaluate(function: Callable[..., Any], missing: Sequence[tuple[Path, dict[str, Any]]]) -> Iterator[None]:
    """Evaluate cases and keep their values, in any order; yields after each."""
    # An experiment may ask joblib for another backend than its session's.
    backend, _ = joblib.parallel.get_active_backend()
    client = getattr(backend, "client", None)
    if client is None:
        tasks = (joblib.delayed(_evaluate_into)(entry, function, case) for entry, case in missing)
        yield from joblib.Parallel(return_as="generator_unordered")(tasks)
        return
    entries = [entry for entry, _ in missing]
    for i, value in cluster.values(client, function, [case for _, case in missing]):
        _keep(entries[i], value)
        yield


def fingerprint(function: Callable[..., Any]) -> str:
    """Hash of everything that a case of this function may depend on beside its arguments."""
    own = Path(inspect.getfile(function)).read_bytes()
    return hashlib.sha256(json.dumps(cluster.origin()).encode() + own).hexdigest()


def case_key(function: Callable[..., Any], case: dict[str, Any], source: str) -> str:
    """The name under which a case is kept: the same function, arguments and sources, hence the same value."""
    if "<" in function.__qualname__:
        raise ValueError(f"function must be defined at the top of its module; got {function.__qualname__}")
    # repr of a float is exact, and json refuses what has no plain form.
    name = [function.__module__, function.__qualname__, storage.encode(case), source]
    return hashlib.sha256(json.dumps(name, sort_keys=True).encode()).hexdigest()


def _evaluate_into(entry: Path, function: Callable[..., Any], case: dict[str, Any]) -> None:
    """Evaluate a case and keep its value; in a worker, so that it is kept even if the parent has gone."""
    _keep(entry, function(**case))


def _keep(entry: Path, value: Any) -> None:
    storage.write_atomically(entry, lambda file: pickle.dump(value, file))


@contextmanager
def _progress(title: str, *, total: int, completed: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr; a line per tenth where stderr is no terminal."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, completed=completed)
            yield lambda: bar.advance(task)
        return
    count = completed

    def advance() -> None:
        nonlocal count
        count += 1
        if count == total or count * 10 // total > (count - 1) * 10 // total:
            print(f"{title}: {count}/{total}", file=sys.stderr, flush=True)

    if completed:
        print(f"{title}: {completed}/{total} kept from an interrupted run", file=sys.stderr, flush=True)
    yield advance


def run_and_store(name: str, preset: str, current: Session, *, overrides: dict[str, Any] | None = None) -> Path:
    """Run one experiment inside a session and store its result; the json's path."""
    module = importlib.import_module(f"analysis.{name}")
    config = module.PRESETS[preset]
    if overrides:
        config, preset = dataclasses.replace(config, **overrides), CUSTOM
    cases, resumed, start = current.cases, current.resumed, time.perf_counter()
    result = module.run(config)
    run = {
        "wall_seconds": round(time.perf_counter() - start, 3),
        "backend": current.backend,
        "cases": current.cases - cases,
        "cases_from_interrupted_run": current.resumed - resumed,
    }
    return storage.store(name, preset, config, result.numbers, result.arrays, run=run)


def run_experiments(preset: str, current: Session) -> dict[str, storage.StoredResult]:
    """Run all experiments with a preset inside a session, store and read back their results."""
    for name in EXPERIMENTS:
        run_and_store(name, preset, current)
    return {name: storage.load(name, preset) for name in EXPERIMENTS}


def main(name: str, arguments: Sequence[str] | None = None) -> None:
    """Command line of one experiment, with an option for every setting: ``python -m analysis.<name>``."""
    config_class = importlib.import_module(f"analysis.{name}").Config
    parser = argparse.ArgumentParser(prog=f"python -m analysis.{name}", allow_abbrev=False)
    parser.add_argument(
        "--preset", choices=PRESETS, default=storage.REPORTED, help="settings to start from (default: %(default)s)"
    )
    add_process_options(parser)
    settings = parser.add_argument_group("settings", f"each overrides the preset's; stored as {CUSTOM!r} then")
    add_settings(settings, config_class)
    given = vars(parser.parse_args(arguments))
    preset = given.pop("preset")
    processes = {option: given.pop(option) for option in ("jobs", "backend", "scheduler")}
    label = f"{name}-{CUSTOM if given else preset}"
    try:
        with session(label, **processes) as current:
            print(run_and_store(name, preset, current, overrides=given))
    except ClusterError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def add_settings(parser: "argparse._ArgumentGroup", config_class: type) -> None:
    """One option per field of a dataclass; absent from the parsed arguments where not given."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        option = "--" + field.name.replace("_", "-")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"reported: {field.default!r}"}
        parser.add_argument(option, dest=field.name, **options, **_reading(hints[field.name], field.name))


def _reading(hint: Any, name: str) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint in (int, float, str):
        return {"type": hint}
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (Ellipsis,):
        return {"action": _StoreTuple, "nargs": "+", **_reading(typing.get_args(hint)[0], name)}
    raise TypeError(f"a setting is an int, float, str, bool or tuple[..., ...] of one of them; {name} is {hint}")


class _StoreTuple(argparse.Action):
    """Keeps a frozen dataclass's sequence a tuple."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        setattr(namespace, self.dest, tuple(values))
