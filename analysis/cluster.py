"""A Dask cluster as the place where cases are evaluated.

Its workers have the sources and packages of this machine, which is checked, and no files in common with it: what they
find comes back as it is found.
"""

import asyncio
import functools
import hashlib
import logging
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import joblib

import exo_toy
from analysis import storage

# How long the scheduler of a cluster may take to answer.
CONNECT_SECONDS = 5


class ClusterError(Exception):
    """Cases cannot be evaluated where they were asked to be; the message says why."""


@contextmanager
def workers(jobs: int, scheduler: str | None) -> Iterator[None]:
    """Cases go to the workers of a Dask cluster."""
    try:
        import dask
        import distributed
    except ImportError as error:
        install = f"pip install -e '{storage.ROOT}[dask]' -c '{storage.ROOT / 'constraints.txt'}'"
        raise ClusterError(f"--backend dask needs distributed: {install}") from error
    with ExitStack() as stack:
        if scheduler is None:
            # Dask would limit the threads of this process too, where an experiment may take all cores.
            with dask.config.set({"distributed.nanny.pre-spawn-environ": {}}):
                cluster = distributed.LocalCluster(
                    n_workers=jobs,
                    threads_per_worker=1,
                    memory_limit=None,
                    dashboard_address="127.0.0.1:0",
                    silence_logs=logging.ERROR,
                    env={"MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                    preload=["from analysis.cluster import leave_interrupt_to_parent as leave; leave()"],
                )
            scheduler = stack.enter_context(cluster).scheduler_address
        try:
            asyncio.run(asyncio.wait_for(_check_scheduler(scheduler), CONNECT_SECONDS))
        # Whatever listens there may answer anything.
        except Exception as error:
            reason = str(error) or f"no answer within {CONNECT_SECONDS} s"
            raise ClusterError(f"no Dask scheduler at {scheduler}: {reason}") from error
        client = distributed.Client(scheduler, set_as_default=False)
        _check_workers(stack.enter_context(client))
        stack.enter_context(joblib.parallel_config("dask", client=client))
        yield


async def _check_scheduler(address: str) -> None:
    """A scheduler answers; asked first, because a client that finds none takes long to give up."""
    import distributed

    security = distributed.Security().get_connection_args("client")
    async with distributed.rpc(address, connection_args=security) as server:
        identity = await server.identity()
    if identity["type"] != "Scheduler":
        raise ValueError(f"a {identity['type']} answers")


def _check_workers(client: Any) -> None:
    """Every worker can import what it is sent, and evaluates it as this process would."""
    # By name: a worker that cannot import a function is closed by its arrival.
    origins = client.run(pkgutil.resolve_name, f"{__name__}:ORIGIN", on_error="return")
    if not origins:
        print("the cluster has no workers yet; cases wait for them", file=sys.stderr, flush=True)
    for worker, origin_there in origins.items():
        if isinstance(origin_there, Exception):
            reason = f"{type(origin_there).__name__}: {origin_there}"
            raise ClusterError(f"worker {worker} cannot import {__name__}, start it from the checkout ({reason})")
        _check_origin(worker, origin_there, ORIGIN)


def _check_origin(worker: str, there: dict[str, str], here: dict[str, str]) -> None:
    """A worker has the sources and packages of the process that sends it cases."""
    differences = [f"{name} {there.get(name)}, not {here[name]}" for name in here if there.get(name) != here[name]]
    if differences:
        raise ClusterError(f"worker {worker} has {'; '.join(differences)}: update what it runs and restart it")


def values(client: Any, function: Callable[..., Any], cases: Sequence[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
    """Evaluate cases on a cluster; the number and value of each, as they are found."""
    # Not through joblib, which waits for ever for a case that ended its worker, and leaves a single worker idle.
    from distributed import as_completed
    from distributed.client import FutureCancelledError

    evaluate = functools.partial(_evaluate, ORIGIN, function)
    futures = client.map(evaluate, cases, pure=False)
    number = {future: i for i, future in enumerate(futures)}
    # A worker holds its value for as long as we hold the future.
    del futures
    for future in as_completed(number, loop=client.loop):
        try:
            value = future.result()
        except FutureCancelledError as error:
            raise ClusterError(f"the cluster is lost ({error.reason}); finished cases are kept") from error
        yield number.pop(future), value


def _evaluate(expected: dict[str, str], function: Callable[..., Any], case: dict[str, Any]) -> Any:
    """The value of a case, on a worker of a cluster."""
    from distributed import get_worker

    # Here too: workers may join, or be replaced, at any time.
    _check_origin(get_worker().address, ORIGIN, expected)
    # Whoever started the worker may have set it; otherwise a worker is one of many.
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)
    return function(**case)


def leave_interrupt_to_parent() -> None:
    """Ctrl-C reaches every process of the terminal; the parent alone answers it, and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def origin() -> dict[str, str]:
    """What a case depends on beside its arguments: versions of packages, and a hash of the sources."""
    digest = hashlib.sha256()
    for folder in (Path(exo_toy.__file__).parent, storage.ROOT / "analysis"):
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder.parent)}\0".encode() + file.read_bytes() + b"\0")
    return {**storage.versions(), "sources": digest.hexdigest()[:16]}


# When this process imported them: files that change later do not change what it runs.
ORIGIN = origin()
