"""The benchmark of the trainers, on a model that takes a moment: all methods run, and what it prints was measured."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import trainer as benchmark
from exo_toy.integrations.candidates import CandidateCollator, tokenize_row

SHAPE = benchmark.Shape(width=64, layers=1, vocab_size=300, pairs=2, prompt=3, completion=8)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(benchmark.SHAPES, "cpu", SHAPE)


@pytest.mark.parametrize("method", benchmark.METHODS)
def test_every_method_is_measured(method, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "resident", lambda: 100)
    monkeypatch.setattr(benchmark, "peak_resident", lambda: 350)
    monkeypatch.setattr(sys, "argv", ["trainer", "--only", method, "--device", "cpu", "--steps", "2", "--warmups", "1"])
    assert benchmark.main() == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found == {"seconds": found["seconds"], "tokens": SHAPE.tokens, "memory": 250}
    assert found["seconds"] > 0


def test_memory_is_that_of_the_process():
    before = benchmark.resident()
    kept = torch.ones(2**25)
    # The system counts in steps of pages and threads.
    assert abs(benchmark.resident() - before - kept.nbytes) < 16 * 2**20
    assert benchmark.peak_resident() > before + kept.nbytes / 2


def test_tokens_are_those_of_the_texts():
    tokenizer = benchmark.tokenizer_of_bytes()
    rows = [tokenize_row(row, tokenizer) for row in benchmark.texts(SHAPE, steps=3)]
    batches = [CandidateCollator(tokenizer.pad_token_id)(rows[start : start + 2]) for start in (0, 2, 4)]
    assert len(rows) == 3 * SHAPE.pairs
    assert [batch["attention_mask"].sum().item() for batch in batches] == [SHAPE.tokens] * 3
    assert {batch["input_ids"].shape for batch in batches} == {(4, 11)}


def test_all_steps_after_the_first_ones_are_measured(monkeypatch):
    """By a clock that ticks a second more each time."""
    ticks = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(ticks))
    medians = []
    monkeypatch.setattr(benchmark.statistics, "median", lambda values: medians.append(list(values)) or 1.0)
    benchmark.measure("CandidateTrainer, exo_rw", SHAPE, "cpu", steps=3, warmups=2)
    assert medians == [[2.0, 3.0, 4.0]]


def test_the_floor_counts_the_factors_of_matrix_products():
    width, hidden = 64, 64 * 11 // 4
    assert benchmark.multiplying(SHAPE) == 4 * width**2 + 3 * width * hidden + 300 * width
    assert benchmark.floor_seconds(SHAPE, "cpu") > 0


def test_rows_are_medians_against_the_first_method(monkeypatch, capsys):
    """Of two rounds; a method that fails has none."""
    speeds = {name: [1.0 + place, 3.0 + place] for place, name in enumerate(benchmark.METHODS)}
    failing = list(benchmark.METHODS)[1]

    def measured(method, options):
        if method == failing:
            return None
        return {"seconds": 1 / speeds[method].pop(0), "tokens": 100, "memory": 2**20 * (4 - len(speeds[method]))}

    monkeypatch.setattr(benchmark, "in_a_process", measured)
    monkeypatch.setattr(benchmark, "floor_seconds", lambda shape, device: 0.25)
    monkeypatch.setattr(sys, "argv", ["trainer", "--device", "cpu", "--rounds", "2"])
    assert benchmark.main() == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert str(SHAPE) in head and "float32" in head
    assert [line[:34].strip() for line in lines] == [name for name in benchmark.METHODS if name != failing]
    # Speeds 1 and 3 steps a second, and 3 and 5, of 100 tokens; memory of 3 and 4 MiB.
    assert lines[0][34:].split() == ["200", "100%", "1.00", "0.50", "4", "1.00"]
    assert lines[1][34:].split() == ["400", "50%", "2.00", "1.00", "4", "1.00"]


def test_a_method_runs_in_a_process_of_its_own(monkeypatch, capsys):
    calls = []

    def run(command, **how):
        calls.append(command)
        return subprocess.CompletedProcess(
            command, len(calls) - 1, 'warning\n{"seconds": 1.0}\n', "Traceback\nno memory\n"
        )

    monkeypatch.setattr(subprocess, "run", run)
    options = type("Options", (), {"device": "cpu", "steps": 4, "warmups": 2})
    assert benchmark.in_a_process("CandidateTrainer, dpo", options) == {"seconds": 1.0}
    flags = ["--only", "CandidateTrainer, dpo", "--device", "cpu", "--steps", "4", "--warmups", "2"]
    assert calls[0][1:] == ["-m", "benchmarks.trainer", *flags]
    assert benchmark.in_a_process("CandidateTrainer, dpo", options) is None
    assert capsys.readouterr().err == "CandidateTrainer, dpo: failed: no memory\n"


@pytest.mark.parametrize("flag", ["--rounds", "--steps", "--warmups"])
def test_a_step_needs_one_before_it(flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainer", flag, "0"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "must be at least 1" in capsys.readouterr().err


def test_models_of_a_seed_are_one():
    first, second = (benchmark.model_of(SHAPE, torch.float32).state_dict() for _ in range(2))
    assert all(torch.equal(weights, second[name]) for name, weights in first.items())
