"""Sweeps on a Dask cluster: the same values as from processes of this machine, and nothing lost or stale."""

import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest

from analysis import cluster as clusters
from analysis import runner, storage
from exo_toy import cli
from exo_toy.cli.experiments import CHECKOUT

dask = pytest.importorskip("dask", reason="the extra dask is not installed")
distributed = pytest.importorskip("distributed", reason="the extra dask is not installed")

# As a worker is started by hand, and one that cannot import the experiments.
WORKER = "from distributed.cli.dask_worker import main; main()"
NO_ANALYSIS = "import sys; sys.modules['analysis'] = None; " + WORKER
UNREACHABLE = "tcp://127.0.0.1:1"


def of_every_kind(seed: int) -> dict[str, Any]:
    array = np.random.default_rng(seed).normal(size=(4, 8))
    return {
        "array": np.exp(array).sum(0),
        "single": array.astype(np.float32),
        "empty": np.zeros((0, 3), dtype=bool),
        "scalar": array[0, 0],
        "nested": [(1, 2.5), {"nan": math.nan, "infinite": -math.inf, "zero": -0.0, "none": None, "text": "β"}],
    }


def bits(value: Any) -> Any:
    """Comparable, and equal for equal types and bits alone."""
    match value:
        case np.ndarray() | np.generic():
            return type(value), value.dtype, value.shape, value.tobytes()
        case float():
            return value.hex()
        case dict():
            return {key: bits(item) for key, item in value.items()}
        case list() | tuple():
            return type(value), [bits(item) for item in value]
    return type(value), value


def where_and_how(i: int) -> tuple[int, int]:
    import torch  # as late as by an experiment: a worker imports this module for every function

    return os.getpid(), torch.get_num_threads()


def where_and_what_is_ignored(i: int) -> tuple[int, bool]:
    return os.getpid(), signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def logged(x: int, log: str, kept: str) -> int:
    """The third of five cases waits for the others to be kept and then fails, where there is a file to say so."""
    with Path(log).open("a") as file:
        file.write(f"{x}\n")
    if x == 3 and Path(f"{log}.stop").exists():
        while len(list(Path(kept).glob("*.pickle"))) < 4:
            time.sleep(0.01)
        raise ArithmeticError("three is too many")
    return x * x


def deadly(x: int, log: str) -> int:
    """Ends its worker where x is among the lives in the log, and takes one of them."""
    lives = Path(log).read_text().split()
    if str(x) in lives:
        lives.remove(str(x))
        Path(log).write_text(" ".join(lives))
        os._exit(1)
    return x


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two workers that nobody has told how many threads to take."""
    with pytest.MonkeyPatch.context() as patch, dask.config.set({"distributed.nanny.pre-spawn-environ": {}}):
        patch.delenv("OMP_NUM_THREADS", raising=False)
        with distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL
        ) as cluster:
            yield cluster


@pytest.fixture
def scheduler(cluster) -> str:
    return cluster.scheduler_address


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(runner, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def on(scheduler: str, label: str = "s"):
    return runner.session(label, backend="dask", scheduler=scheduler)


def test_values_are_those_of_loky_bit_for_bit_and_in_order(scheduler):
    cases = [{"seed": seed} for seed in range(7)]
    with runner.session("loky", jobs=2):
        loky = runner.map_cases(of_every_kind, cases)
    with on(scheduler) as current:
        dask = runner.map_cases(of_every_kind, cases)
    assert [bits(value) for value in dask] == [bits(value) for value in loky]
    assert (current.cases, current.resumed) == (7, 0)


def test_an_experiment_stores_what_it_finds_without_a_cluster(scheduler, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "RESULTS", tmp_path)
    small = ["--preset", "quick", "--problems", "4", "--chunk", "2", "--split-problems", "1"]
    stored = []
    for options in (["--jobs", "1"], ["--backend", "dask", "--scheduler", scheduler]):
        runner.main("objective_identity", [*small, *options])
        stored.append(storage.load("objective_identity", runner.CUSTOM))
    assert bits(stored[0].numbers) == bits(stored[1].numbers)
    assert bits(stored[0].arrays) == bits(stored[1].arrays)
    assert [one.provenance["backend"] for one in stored] == ["loky", "dask"]


def test_an_exception_comes_with_its_traceback_and_the_rest_is_kept(scheduler, cache, tmp_path):
    log = tmp_path / "log"
    cases = [{"x": x, "log": str(log), "kept": str(cache / "s")} for x in range(1, 6)]
    stop = Path(f"{log}.stop")
    stop.touch()
    with pytest.raises(ArithmeticError, match="three is too many") as raised, on(scheduler):
        runner.map_cases(logged, cases)
    assert "in logged" in "".join(traceback.format_exception(raised.value))
    stop.unlink()
    with on(scheduler) as current:
        assert runner.map_cases(logged, cases) == [1, 4, 9, 16, 25]
    assert (current.cases, current.resumed) == (5, 4)
    assert sorted(log.read_text().split()) == ["1", "2", "3", "3", "4", "5"]
    assert not (cache / "s").exists()


def test_workers_take_one_thread_and_evaluate_everything_but_what_an_experiment_keeps_here(scheduler):
    cases = [{"i": i} for i in range(4)]
    with on(scheduler):
        there = runner.map_cases(where_and_how, cases)
        with joblib.parallel_config("sequential"):
            here = runner.map_cases(where_and_how, [{"i": i} for i in range(4, 8)])
    assert os.getpid() not in {process for process, _ in there}
    assert {threads for _, threads in there} == {1}
    assert {process for process, _ in here} == {os.getpid()}


def test_without_a_scheduler_a_cluster_lives_as_long_as_the_session(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with runner.session("s", jobs=1, backend="dask"):
        ((process, ignored),) = runner.map_cases(where_and_what_is_ignored, [{"i": 0}])
        assert process != os.getpid()
        assert ignored, "an interrupt of the terminal is left to the parent"
        assert "OMP_NUM_THREADS" not in os.environ
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_cases_wait_for_workers_but_not_for_a_cluster_that_has_ended(tmp_path, capsys):
    log = tmp_path / "lives"
    log.touch()
    empty = distributed.LocalCluster(
        n_workers=0, processes=False, dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL
    )
    with pytest.raises(runner.ClusterError, match="the cluster is lost"), on(empty.scheduler_address):
        assert "no workers yet" in capsys.readouterr().err
        empty.scale(1)
        assert runner.map_cases(deadly, [{"x": 0, "log": str(log)}]) == [0]
        empty.scale(0)
        threading.Timer(0.5, empty.close).start()
        runner.map_cases(deadly, [{"x": 1, "log": str(log)}])


@pytest.fixture
def stale(tmp_path) -> Path:
    """A checkout with one other line in the library."""
    for package in ("exo_toy", "analysis"):
        ignore = shutil.ignore_patterns("results", ".cache", "__pycache__")
        shutil.copytree(CHECKOUT / package, tmp_path / "stale" / package, ignore=ignore)
    with (tmp_path / "stale" / "exo_toy" / "checks.py").open("a") as file:
        file.write("# older\n")
    return tmp_path / "stale"


@pytest.mark.parametrize(
    ("program", "message"),
    [(WORKER, "has sources [0-9a-f]{16}, not [0-9a-f]{16}: update"), (NO_ANALYSIS, "cannot import analysis.cluster")],
    ids=["stale", "without analysis"],
)
def test_a_worker_that_would_find_something_else_is_named(scheduler, stale, program, message):
    options = ["--no-nanny", "--nthreads", "1", "--no-dashboard"]
    with distributed.Client(scheduler, set_as_default=False) as client:
        others = set(client.ncores())
        process = subprocess.Popen(
            [sys.executable, "-c", program, scheduler, *options],
            cwd=stale,
            env={**os.environ, "PYTHONPATH": str(stale)},
            stderr=subprocess.DEVNULL,
        )
        try:
            client.wait_for_workers(len(others) + 1, timeout=60)
            (worker,) = set(client.ncores()) - others
            with pytest.raises(runner.ClusterError, match=f"worker {worker} {message}"), on(scheduler):
                pytest.fail("the session began")
        finally:
            process.terminate()
            process.wait()
        while len(client.ncores()) > len(others):
            time.sleep(0.05)


def test_a_worker_is_looked_at_again_when_a_case_arrives(scheduler):
    """It may have joined, or have been replaced, since the session began."""
    expected = {**clusters.ORIGIN, "torch": "9.9"}
    with distributed.Client(scheduler, set_as_default=False) as client:
        future = client.submit(clusters._evaluate, expected, where_and_how, {"i": 0})
        with pytest.raises(runner.ClusterError, match=r"worker tcp://.* has torch 2\S*, not 9.9: update"):
            future.result()


REFUSED = {
    "unreachable": (["--backend", "dask", "--scheduler", UNREACHABLE], f"no Dask scheduler at {UNREACHABLE}: no"),
    "malformed": (["--backend", "dask", "--scheduler", "here"], "no Dask scheduler at here: missing port"),
    "loky": (["--scheduler", UNREACHABLE], f"--scheduler {UNREACHABLE} needs --backend dask"),
    "jobs": (["--backend", "dask", "--scheduler", UNREACHABLE, "--jobs", "2"], "--jobs 2 does not change"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("command", ["verify", "reproduce", "analysis"])
def test_what_cannot_run_is_said_in_one_line_and_nothing_is_written(
    command, options, message, cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(clusters, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(storage, "RESULTS", tmp_path / "results")
    if command == "analysis":
        with pytest.raises(SystemExit) as exit_:
            runner.main("lm_step", ["--preset", "quick", *options])
        code = exit_.value.code
    else:
        code = cli.main([command, "--quick", *options])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_another_server_than_a_scheduler_is_refused(cluster):
    worker = next(iter(cluster.scheduler_info["workers"]))
    with pytest.raises(runner.ClusterError, match=f"no Dask scheduler at {worker}: a Worker answers"), on(worker):
        pytest.fail("the session began")


def test_without_distributed_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert cli.main(["verify", "--quick", "--backend", "dask"]) == 2
    err = capsys.readouterr().err
    assert "--backend dask needs distributed: pip install -e" in err
    assert "[dask]" in err


def test_the_case_of_a_lost_worker_is_evaluated_by_another(scheduler, tmp_path):
    log = tmp_path / "lives"
    log.write_text("1")
    with on(scheduler):
        assert runner.map_cases(deadly, [{"x": x, "log": str(log)} for x in range(3)]) == [0, 1, 2]
    assert log.read_text() == ""


def test_a_case_that_ends_one_worker_after_the_other_is_an_error(cluster, scheduler, tmp_path, monkeypatch):
    log = tmp_path / "lives"
    log.write_text("1")
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    with pytest.raises(distributed.KilledWorker), on(scheduler):
        runner.map_cases(deadly, [{"x": x, "log": str(log)} for x in range(3)])
