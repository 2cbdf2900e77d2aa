"""The step of a language model: its log-probabilities against plain loops, its measurements against what is known."""

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import lm_step, storage
from analysis.claims import CLAIMS, Verdict, judge
from analysis.lm_step import HEADS, IGNORED, METHODS

TINY = lm_step.Config(
    vocab_sizes=(61, 131),
    n_candidates=(2, 3),
    n_prompts=2,
    prompt_length=3,
    completion_length=5,
    hidden_size=16,
    intermediate_size=24,
    n_layers=1,
    n_heads=2,
    repetitions=2,
    threads=1,
)
E2 = next(claim for claim in CLAIMS if claim.id == "E2")
MIB = 2**20


@pytest.fixture(scope="module")
def model_step():
    """V = 61, K = 3."""
    return lm_step.build(TINY, 61, 3)


@pytest.fixture(scope="module")
def result():
    return lm_step.run(TINY)


def test_completions_of_a_prompt_share_it_and_only_they_count(model_step):
    batch = model_step.batch
    tokens, labels = batch.input_ids.tolist(), batch.labels.tolist()
    assert (len(tokens), batch.rewards.shape) == (6, (2, 3))
    lengths = []
    for row, (inputs, targets) in enumerate(zip(tokens, labels, strict=True)):
        assert inputs[:3] == tokens[row // 3 * 3][:3]
        length = sum(label != IGNORED for label in targets)
        lengths.append(length)
        assert 3 <= length <= 5
        # The last token of the prompt predicts the first of the completion.
        assert targets == [IGNORED] * 2 + inputs[3 : 3 + length] + [IGNORED] * (5 - length)
        assert batch.attention_mask[row].tolist() == [1] * (3 + length) + [0] * (5 - length)
    assert len(set(lengths)) > 1 and tokens[0][:3] != tokens[3][:3]


def test_padding_changes_nothing(model_step):
    """What follows a completion has no part in its log-probabilities."""
    batch = model_step.batch
    padded = batch.attention_mask == 0
    other = dataclasses.replace(batch, input_ids=batch.input_ids.masked_fill(padded, 7))
    assert padded.any()
    for method in METHODS:
        with torch.no_grad():
            ours = model_step.token_logps(model_step.policy, method)
            theirs = dataclasses.replace(model_step, batch=other).token_logps(model_step.policy, method)
        assert torch.equal(ours, theirs), method


@pytest.mark.parametrize("method", [*METHODS, "float64"])
def test_log_probabilities_are_those_of_plain_loops(model_step, method):
    with torch.no_grad():
        logits = model_step.policy(input_ids=model_step.batch.input_ids).logits.double().tolist()
        ours = model_step.token_logps(model_step.policy, method).tolist()
    for row, labels in enumerate(model_step.batch.labels.tolist()):
        for position, label in enumerate(labels):
            z = logits[row][position]
            wanted = z[label] - math.log(math.fsum(map(math.exp, z))) if label != IGNORED else 0.0
            # float32 sums of 61 terms and logits below 16, each rounded to 2^-24 of itself.
            assert ours[row][position] == pytest.approx(wanted, abs=61 * 16 * 2**-24)


def test_reference_is_another_policy_nearby(model_step):
    with torch.no_grad():
        policy, reference = (
            model_step.token_logps(model, "naive") for model in (model_step.policy, model_step.reference)
        )
    counts = model_step.batch.labels != IGNORED
    assert 0 < (policy - reference)[counts].abs().max() < 1
    assert not any(parameter.requires_grad for parameter in model_step.reference.parameters())


def test_models_and_batches_are_those_of_their_seed():
    first, again, other = (lm_step.build(dataclasses.replace(TINY, seed=seed), 61, 2) for seed in (1, 1, 2))
    assert first.step("naive") == again.step("naive") != other.step("naive")


def test_float64_is_float64_throughout(model_step):
    """Central differences of the loss along a direction: wrong in the third digit if anything were in float32."""
    exact = model_step.in_float64()
    exact.step("float64")
    generator = torch.Generator().manual_seed(3)
    parameters = list(exact.policy.parameters())
    direction = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64) * p.std(correction=0) for p in parameters
    ]
    slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, direction, strict=True))
    step, losses = 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * step)
        losses.append(exact.step("float64").item())
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=sign * step)
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_who_takes_a_gradient(head):
    model_step = lm_step.build(TINY, 61, 2)
    model_step.freeze_head(head)
    for method in METHODS:
        model_step.step(method)
        gradients = model_step.gradients()
        assert ("lm_head.weight" in gradients, "model.embed_tokens.weight" in gradients) == (head == "trained",) * 2
        assert all(gradient.norm() > 0 for gradient in gradients.values())
        taken = {name for name, parameter in model_step.policy.named_parameters() if parameter.grad is not None}
        assert taken == set(gradients)


def test_all_methods_have_the_same_loss_and_gradients(result):
    for head in HEADS:
        for method in METHODS:
            worst = result.numbers["worst"][head][method]
            assert all(difference <= 2**-11.5 for difference in worst.values()), (head, method)
    assert result.numbers["rounding"] == 2**-23
    assert result.numbers["worst"]["trained"]["naive"]["gradient_difference"] == 0
    assert result.numbers["worst"]["trained"]["naive"]["gradient_difference_from_float64"] > 0


def test_a_kernel_that_is_a_little_off_is_seen(monkeypatch):
    """One per cent of temperature: a few per cent of the gradient, and the claim fails."""
    right = lm_step.linear_logps
    monkeypatch.setattr(lm_step, "linear_logps", lambda *args, **kwargs: right(*args, **kwargs, temperature=1.01))
    found = lm_step.compare(TINY, 61, 3)["steps"]["trained"]
    for quantity in ("loss_difference", "gradient_difference", "gradient_difference_from_float64"):
        assert found["kernel"][quantity] > 2**-11.5 > found["selective"][quantity], quantity


def test_half_precision_agrees_to_half_its_digits(monkeypatch):
    """The dtype of CUDA; what is left is the rounding of the model's own activations."""
    monkeypatch.setitem(lm_step.DTYPES, "cpu", torch.bfloat16)
    found = lm_step.compare(TINY, 61, 3)
    body = 4 * 16 * 16 + 3 * 16 * 24 + 3 * 16
    assert found["gradient_bytes"]["frozen"] == 2 * body and found["logits_bytes"] == 2 * 61 * found["positions"]
    for head in HEADS:
        for method in METHODS:
            step = found["steps"][head][method]
            assert 2**-12 < step["gradient_difference_from_float64"] <= 2**-3.5
            assert all(step[name] <= 2**-3.5 for name in step if "difference" in name)


def test_methods_take_turns(model_step, monkeypatch):
    taken = []
    monkeypatch.setattr(lm_step.Experiment, "step", lambda self, method: taken.append(method))
    times = lm_step._step_times(model_step, 3)
    assert taken == [*METHODS, *METHODS] * 3
    assert set(times) == {(head, method) for head in HEADS for method in METHODS}
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in times.values())


def hold(mebibytes: int) -> int:
    """Touch so much memory and let it go."""
    return torch.ones(mebibytes * MIB // 4).numel()


def measured(before: int, during: int) -> int:
    """Extra memory of a call, in MiB, after another that took and freed some."""
    hold(before)
    return lm_step.extra_bytes(lambda: hold(during), "cpu") // MIB


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the highest level cannot be reset")
@pytest.mark.parametrize("before", [1, 200])
def test_memory_is_that_of_the_call_alone(before):
    """Neither what was freed before it nor what the parent holds; the kernel counts in batches of pages per core."""
    parent = torch.ones(100 * MIB // 4)
    assert 62 <= lm_step.apart(measured, before, 64) <= 68
    del parent


def test_a_process_apart_is_another():
    assert lm_step.apart(os.getpid) != os.getpid()
    assert lm_step.apart(int, "11", base=2) == 3


def test_a_process_that_dies_is_an_error():
    """As where memory runs out; nothing waits for it."""
    with pytest.raises(RuntimeError, match=r"_exit ended its process \(exit code 9\)"):
        lm_step.apart(os._exit, 9)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the highest level cannot be reset")
def test_memory_of_a_step():
    """Naive holds the logits, their log-softmax and its gradient; the kernel less than the logits."""
    config = dataclasses.replace(TINY, completion_length=29)
    logits = 2 * 4 * 31 * 30000 * 4
    peak = {
        method: lm_step.apart(lm_step.peak_bytes, config, 30000, 4, head="frozen", method=method) for method in METHODS
    }
    assert 2 * logits < peak["naive"] < 5 * logits
    assert logits < peak["selective"] < 5 * logits
    assert 0 < peak["kernel"] < logits


def test_run_keeps_what_belongs_together(result):
    arrays, cells = result.arrays, result.numbers["cells"]
    assert [(cell["vocab_size"], cell["k"]) for cell in cells] == [(61, 2), (61, 3), (131, 2), (131, 3)]
    for cell, (i, j) in zip(cells, np.ndindex(2, 2), strict=True):
        vocab, k = arrays["vocab_size"][i], arrays["k"][j]
        assert (vocab, k) == (cell["vocab_size"], cell["k"])
        assert cell["positions"] == 2 * k * 7 and cell["logits_bytes"] == 4 * vocab * cell["positions"]
        # Four attention and three feed-forward matrices, three norms; then embedding and head.
        body = 4 * 16 * 16 + 3 * 16 * 24 + 3 * 16
        assert cell["gradient_bytes"] == {"trained": 4 * (body + 2 * 16 * vocab), "frozen": 4 * body}
        assert cell["parameters"] == body + 2 * 16 * vocab
        for head in HEADS:
            for method in METHODS:
                step = cell["steps"][head][method]
                # So small a step may fit into pages that are there: 0. Large ones are measured above.
                assert arrays[f"{head}_{method}_peak_bytes"][i, j] == step["peak_bytes"] >= 0
                assert arrays[f"{head}_{method}_seconds"][i, j].tolist() == step["seconds"]
    for head in HEADS:
        for method in METHODS:
            for quantity, worst in result.numbers["worst"][head][method].items():
                assert worst == max(cell["steps"][head][method][quantity] for cell in cells)


def stored(worst: float) -> dict[str, storage.StoredResult]:
    """Results whose kernel is so far from the others at one place."""
    fine = {f"{name}_difference{other}": 1e-6 for name in ("loss", "gradient") for other in ("", "_from_float64")}
    way = {"peak_bytes": 10 * MIB, "median_seconds": 0.5}
    numbers = {
        "device": "cpu",
        "dtype": "float32",
        "rounding": 2**-23,
        "cells": [{"vocab_size": 8, "k": 2, "steps": {head: {"naive": way, "kernel": way} for head in HEADS}}],
        "worst": {head: {"naive": fine, "kernel": dict(fine)} for head in HEADS},
    }
    numbers["worst"]["frozen"]["kernel"]["gradient_difference"] = worst
    return {"lm_step": storage.StoredResult("lm_step", "quick", {}, {}, numbers, {})}


@pytest.mark.parametrize(
    ("worst", "verdict"), [(1e-5, Verdict.HOLDS), (1e-3, Verdict.FAILS), (math.nan, Verdict.FAILS)]
)
def test_the_claim_follows_the_differences(worst, verdict):
    outcome = judge(E2, stored(worst))
    assert outcome.verdict == verdict
    assert f"gradient {worst:.1e}" in outcome.ours and "10 MiB and 0.50 s" in outcome.ours


def test_presets():
    assert set(lm_step.PRESETS) == {"quick", "default", "full"}
    assert lm_step.PRESETS["full"] == lm_step.Config()
    for config in lm_step.PRESETS.values():
        assert len(config.vocab_sizes) > 1 and len(config.n_candidates) > 1, "the figure has a line against each"


def test_another_device_is_refused():
    with pytest.raises(ValueError, match="device must be one of cpu, cuda; got 'tpu'"):
        lm_step.run(dataclasses.replace(TINY, device="tpu"))


def test_figure_is_drawn_from_stored_results_alone(result, tmp_path: Path):
    from figures import lm_step as figure
    from figures import style

    storage.store("lm_step", "quick", TINY, result.numbers, result.arrays, folder=tmp_path)
    with style.theme():
        paths = figure.draw(storage.load("lm_step", "quick", tmp_path), tmp_path)
    assert [path.suffix for path in paths] == [".pdf", ".png"] and all(path.stat().st_size > 10_000 for path in paths)
