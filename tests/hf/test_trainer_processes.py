"""Two CPU processes against one: wrapped by DistributedDataParallel, with an adapter, sharded by FSDP2, resumed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
KINDS = ["full", "adapter", "pairs", "labels"]
# A process that waits longer than this for another one has failed.
PATIENCE = 240


def run(folder, kinds, *launcher):
    """What the worker left of each kind."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, "-m", "tests.hf.trainer_worker", str(folder), *kinds]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]
    return {kind: torch.load(folder / f"{kind}.pt", weights_only=False) for kind in kinds}


@pytest.fixture(scope="module")
def alone(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    tokenizer.save_pretrained(folder / "tokenizer")
    return run(folder, KINDS)


@pytest.fixture(scope="module")
def together(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    tokenizer.save_pretrained(folder / "tokenizer")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kinds = [*KINDS, "resumed", "fsdp2"]
    return run(folder, kinds, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}")


def assert_same(one, other):
    torch.testing.assert_close(one["weights"], other["weights"], rtol=0, atol=1e-12)
    for mine, theirs in zip([*one["log"], one["metrics"]], [*other["log"], other["metrics"]], strict=True):
        names = {
            name for name in mine if "/" in name or name.endswith(("ess", "leads", "grad_norm", "reference_point"))
        }
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-9, abs=1e-9), name
        for name in {"loss", "eval_loss"} & mine.keys():  # transformers adds up losses in float32
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one(alone, together, kind):
    assert together[kind]["wrapper"] == "DistributedDataParallel" != alone[kind]["wrapper"]
    assert_same(together[kind], alone[kind])


def test_sharded_processes_take_the_steps_of_one(alone, together):
    assert together["fsdp2"]["sharded"] == [True, True] and together["full"]["sharded"] == [False, False]
    assert_same(together["fsdp2"], alone["full"])


def test_the_runs_went_somewhere(alone):
    """The comparisons above are of parameters that have moved."""
    for kind in KINDS:
        log = alone[kind]["log"]
        if kind == "labels":
            assert 0 < log[0]["reference_point"] != log[3]["reference_point"] > 0
        else:
            assert log[0]["kl/ref"] == 0 and log[3]["kl/ref"] > 1e-3


def test_two_processes_resume_in_the_middle_of_an_epoch(together):
    """The order of the second epoch, not of the first."""
    assert torch.equal(together["resumed"]["weights"], together["full"]["weights"])
