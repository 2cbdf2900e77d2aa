"""Scores and gradients through DistributedDataParallel and FSDP2, on two gloo processes, against one bare model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exo_toy.integrations.candidates import CandidateCollator, tokenize_row
from exo_toy.integrations.scoring import completion_logps
from tests.hf.scoring_worker import CASES, WORLD, model_for

ROOT = Path(__file__).parents[2]
DEADLINE = 200  # seconds; many times what it takes


@pytest.fixture(scope="module")
def batches(tokenizer, rows):
    """Of different sizes."""
    collate = CandidateCollator(tokenizer.pad_token_id, "left")
    return [collate([tokenize_row(row, tokenizer) for row in part]) for part in (rows[:1], rows[1:])]


@pytest.fixture(scope="module")
def world(batches, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    torch.save({"batches": batches, "n_vocab": len(tokenizer)}, folder / "cases.pt")
    commands = [[sys.executable, "-m", "tests.hf.scoring_worker", str(folder), str(rank)] for rank in range(WORLD)]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        said = [process.communicate(timeout=DEADLINE)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_wrapped_models_score_as_bare_ones(world, batches, tokenizer, case):
    """FSDP that rounds what the model returns would round log-probabilities: there the selective kernel takes over."""
    kernel = "selective" if "rounded" in case else "linear"
    model = model_for(case, len(tokenizer))
    half = "half" in case
    close = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 0.0, "atol": 1e-10}
    for rank, batch in enumerate(batches):
        logps = completion_logps(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        (logps.sum() / WORLD).backward()
        found = world[rank][case]
        assert found["kernel"] == kernel
        torch.testing.assert_close(found["logps"], logps.detach(), **close)
        assert torch.equal(found["again"], found["logps"]), "with and without gradient"
    for rank in range(WORLD):
        for name, parameter in model.named_parameters():
            gradient = world[rank][case]["gradients"][name]
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(gradient, parameter.grad, rtol=0.0, atol=(0.1 if half else 1e-12) * scale)
