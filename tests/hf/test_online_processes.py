"""The online form on two CPU processes against one: the same candidates, the same parameters, resumed as well."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# A process that waits longer than this for another one has failed.
PATIENCE = 240


def run(folder, tokenizer, *launcher):
    """What the worker left."""
    tokenizer.save_pretrained(folder / "tokenizer")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, "-m", "tests.hf.online_worker", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "online.pt", weights_only=False)


def test_two_processes_are_one(tokenizer, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    alone = run(tmp_path / "alone", tokenizer)
    together = run(tmp_path / "together", tokenizer, *launcher)
    for half in (False, True):
        one, two = alone[half], together[half]
        assert two["wrapper"] == "DistributedDataParallel" != one["wrapper"]
        torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=1e-12)
        assert any("reward" in entry for entry in one["log"])
        for mine, theirs in zip(one["log"], two["log"], strict=True):
            for name in ("reward", "ess", "kl/ref", "sampled/length"):
                assert (name in mine) == (name in theirs)
                if name in mine:
                    assert mine[name] == pytest.approx(theirs[name], rel=1e-9, abs=1e-12), name
    for results in (alone, together):
        assert torch.equal(results["resumed"]["weights"], results[True]["weights"])
    assert not torch.equal(alone[False]["weights"], alone[True]["weights"])
