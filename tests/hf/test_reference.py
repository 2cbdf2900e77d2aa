"""Where the reference comes from: second model, adapter off, cache; and that a stale cache is an error."""

import copy
import json
import re

import numpy as np
import pytest
import torch

from exo_toy.integrations import reference
from exo_toy.integrations.candidates import CandidateCollator, Candidates, tokenize_row
from exo_toy.integrations.reference import (
    ReferenceCache,
    StaleCacheError,
    fingerprint,
    precompute,
    reference_logps,
    reference_policy,
)
from exo_toy.integrations.scoring import completion_logps, scatter
from tests.hf.conftest import tiny_llama

SETTINGS = {"temperature": 0.8, "progress": False}


@pytest.fixture(scope="session")
def dataset(tokenizer, rows):
    return [tokenize_row(row, tokenizer) for row in rows]


@pytest.fixture(scope="session")
def collator(tokenizer):
    return CandidateCollator(tokenizer.pad_token_id, dtype=torch.float64)


def score(model, batch, temperature=0.8, **settings):
    masks = batch["attention_mask"], batch["completion_mask"]
    logps = completion_logps(model, batch["input_ids"], *masks, temperature=temperature, **settings)
    return scatter(logps, batch["candidate_rows"], batch["candidate_mask"])


def adapted_copy(model, *, zero=False, **settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(9)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=zero, **settings)
    return get_peft_model(copy.deepcopy(model), config)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_adapter_off_is_the_base_model(llama, collator, dataset):
    """And on again afterwards; to the bit, in training mode too."""
    batch = collator(dataset)
    policy = adapted_copy(llama, lora_dropout=0.3).train()
    modes = [module.training for module in policy.modules()]
    with torch.no_grad():
        wanted, adapted = score(llama, batch), score(policy, batch)
    assert not torch.equal(adapted, wanted)
    found = reference_logps(batch, policy=policy, temperature=0.8)
    assert torch.equal(found, wanted)
    assert not found.requires_grad
    assert [module.training for module in policy.modules()] == modes
    policy.eval()
    with torch.no_grad():
        assert not torch.equal(score(policy, batch), wanted)


def test_a_fresh_adapter_is_the_reference_to_the_bit(llama, gpt2, collator, dataset):
    """Step 0: the log ratio is 0, not about 0."""
    batch = collator(dataset)
    policy = adapted_copy(llama, zero=True).eval()
    for kernel in ("linear", "selective"):
        ref = reference_logps(batch, policy=policy, temperature=0.8, kernel=kernel)
        assert torch.equal(score(policy, batch, kernel=kernel).detach(), ref)
    second = copy.deepcopy(gpt2).train()
    ref = reference_logps(batch, policy=gpt2, ref_model=second, temperature=0.8)
    assert torch.equal(score(gpt2, batch).detach(), ref), "dropout in the reference"
    assert second.training


def test_log_ratios_of_a_batch_come_from_the_cache_if_it_has_them(llama, collator, dataset):
    batch = collator(dataset)
    stored = torch.full_like(batch["rewards"], -7.0)
    assert reference_logps(batch | {"ref_logps": stored}, policy=llama) is stored


def test_no_reference_is_an_error(llama, collator, dataset):
    with pytest.raises(ValueError, match=r"ref_model must be given .* got None with LlamaForCausalLM"):
        reference_logps(collator(dataset), policy=llama)
    with pytest.raises(ValueError, match="ref_model must be given"), reference_policy(llama):
        pass


def test_fingerprints_see_weights_dtype_and_config(llama, tokenizer):
    first = fingerprint(llama)
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert fingerprint(copy.deepcopy(llama)) == first
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-6
    changed = {fingerprint(other), fingerprint(copy.deepcopy(llama).bfloat16())}
    config = copy.deepcopy(llama)
    config.config.rms_norm_eps = 1e-3
    changed.add(fingerprint(config))
    assert len(changed | {first}) == 4


def test_fingerprints_do_not_see_what_changes_no_log_probability(llama):
    same = copy.deepcopy(llama).train().requires_grad_(False)
    same.config.use_cache = False
    same.config.pad_token_id = 5
    same.config.attention_dropout = 0.0
    same.config._name_or_path = "elsewhere"
    assert fingerprint(same) == fingerprint(llama)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fingerprint_of_a_saved_model_is_its_own(request, name, tmp_path):
    model = request.getfixturevalue(name)
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path)) == fingerprint(model)


def test_fingerprint_of_an_adapted_model_is_its_base_models(llama):
    assert fingerprint(adapted_copy(llama, modules_to_save=["lm_head"])) == fingerprint(llama)


def test_the_cache_gives_back_what_was_computed(llama64, collator, dataset, tmp_path):
    cache = precompute(llama64, dataset, tmp_path / "cache", collator=collator, batch_size=2, **SETTINGS)
    assert len(cache) == sum(len(row.completion_ids) for row in dataset)
    opened = ReferenceCache(tmp_path / "cache", fingerprint=fingerprint(llama64), temperature=0.8)
    features = [vars(row) | {"ref_logps": opened.logps(row)} for row in reversed(dataset)]
    batch = collator(features)
    with torch.no_grad():
        torch.testing.assert_close(batch["ref_logps"], score(llama64, batch), rtol=0, atol=1e-10)
    assert torch.equal(reference_logps(batch, policy=llama64), batch["ref_logps"])


def test_float32_log_probs_come_back_to_the_bit(llama, collator, dataset, tmp_path):
    """Where a batch is the one that was computed, its log ratio is 0."""
    cache = precompute(llama, dataset, tmp_path, collator=collator, batch_size=len(dataset), **SETTINGS)
    batch = CandidateCollator(0)([vars(row) | {"ref_logps": cache.logps(row)} for row in dataset])
    with torch.no_grad():
        assert torch.equal(batch["ref_logps"], score(llama, batch))


def test_an_adapted_models_cache_is_its_base_models(llama, collator, dataset, tmp_path):
    cache = precompute(adapted_copy(llama), dataset, tmp_path, collator=collator, batch_size=3, **SETTINGS)
    assert cache.fingerprint == fingerprint(llama)
    batch = collator([vars(row) | {"ref_logps": cache.logps(row)} for row in dataset])
    with torch.no_grad():
        torch.testing.assert_close(batch["ref_logps"], score(llama, batch).double(), rtol=1e-6, atol=0.0)


def test_a_model_in_training_mode_is_scored_without_dropout(gpt2, collator, dataset, tmp_path):
    training = copy.deepcopy(gpt2).train()
    cache = precompute(training, dataset, tmp_path, collator=collator, batch_size=3, **SETTINGS)
    assert training.training
    with torch.no_grad():
        batch = collator([vars(row) | {"ref_logps": cache.logps(row)} for row in dataset])
        torch.testing.assert_close(batch["ref_logps"], score(gpt2, batch).double(), rtol=1e-6, atol=0.0)


def test_keys_are_content(llama, collator, tmp_path):
    """The same text in another row, in another place, after another prompt, and split elsewhere."""
    cache = precompute(
        llama,
        [Candidates([20, 21], [[22, 2], [23, 2]], [0.0, 1.0]), Candidates([24], [[22, 2], [23, 24, 2]], [1.0, 0.0])],
        tmp_path,
        collator=collator,
        **SETTINGS,
    )
    assert len(cache) == 4
    (first, second), (other, _) = (
        cache.logps(Candidates([20, 21], [[22, 2], [23, 2]], [5.0, 5.0])),
        cache.logps({"prompt_ids": [24], "completion_ids": [[22, 2], [23, 24, 2]]}),
    )
    assert first != other, "one completion after two prompts"
    assert cache.logps(Candidates([20, 21], [[23, 2], [22, 2], [23, 2]], [0.0] * 3)) == [second, first, second]
    for absent in (
        Candidates([20], [[21, 22, 2], [23, 2]], [0.0, 1.0]),
        Candidates([20, 21], [[22], [23]], [0.0, 1.0]),
    ):
        with pytest.raises(
            StaleCacheError, match=r"candidate 0 of row 6, .* is not in the cache .*precompute again"
        ) as error:
            cache.logps(absent, index=6)
        assert cache.fingerprint in str(error.value)


def test_another_model_or_temperature_is_an_error_that_names_both(llama, collator, dataset, tmp_path):
    precompute(llama, dataset, tmp_path, collator=collator, **SETTINGS)
    before = files(tmp_path)
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    for attempt in (
        lambda: ReferenceCache(tmp_path, fingerprint=fingerprint(other), temperature=0.8),
        lambda: precompute(other, dataset, tmp_path, collator=collator, **SETTINGS),
    ):
        with pytest.raises(StaleCacheError, match="are stale") as error:
            attempt()
        assert fingerprint(llama) in str(error.value)
        assert fingerprint(other) in str(error.value)
    with pytest.raises(StaleCacheError, match=r"temperature 0\.8, wanted is temperature 1\.0"):
        ReferenceCache(tmp_path, fingerprint=fingerprint(llama), temperature=1.0)
    with pytest.raises(StaleCacheError, match=r"temperature 0\.8, wanted is temperature 0\.5"):
        precompute(llama, dataset, tmp_path, collator=collator, temperature=0.5, progress=False)
    assert files(tmp_path) == before
    assert len(ReferenceCache(tmp_path, fingerprint=None, temperature=0.8)) == 9


def test_no_cache_is_an_error(tmp_path):
    with pytest.raises(StaleCacheError, match=f"no cache of reference log-probabilities in {tmp_path}"):
        ReferenceCache(tmp_path, fingerprint=None, temperature=1.0)


def count_calls(monkeypatch, fail_at=None):
    """Rows scored in each batch; the batch numbered ``fail_at`` is interrupted."""
    scored = []

    def counted(model, input_ids, *masks, **settings):
        if len(scored) == fail_at:
            raise KeyboardInterrupt
        scored.append(len(input_ids))
        return completion_logps(model, input_ids, *masks, **settings)

    monkeypatch.setattr(reference, "completion_logps", counted)
    return scored


@pytest.mark.parametrize("save_every", [1, 100])
def test_an_interrupted_precompute_goes_on_where_it_stopped(
    llama, collator, dataset, tmp_path, monkeypatch, save_every
):
    settings = {"collator": collator, "batch_size": 1, "save_every": save_every, **SETTINGS}
    count_calls(monkeypatch, fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        precompute(llama, dataset, tmp_path, **settings)
    assert len(ReferenceCache(tmp_path, fingerprint=None, temperature=0.8)) == 5
    scored = count_calls(monkeypatch)
    cache = precompute(llama, dataset, tmp_path, **settings)
    assert scored == [4], "the third prompt's candidates and no others"
    assert len(cache) == 9
    scored = count_calls(monkeypatch)
    precompute(llama, dataset, tmp_path, **settings)
    assert scored == []
    whole = precompute(llama, dataset, tmp_path / "whole", **settings)
    assert [whole.logps(row) for row in dataset] == [cache.logps(row) for row in dataset]


def test_a_save_that_fails_leaves_no_file(llama, collator, dataset, tmp_path, monkeypatch):
    def half(file, **arrays):
        file.write(b"PK")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError, match="disk full"):
        precompute(llama, dataset, tmp_path, collator=collator, **SETTINGS)
    assert files(tmp_path) == ["header.json"]
    header = json.loads((tmp_path / "header.json").read_text())
    assert header == {"fingerprint": fingerprint(llama), "temperature": 0.8, "autocast": "none"}


def test_a_file_that_a_killed_process_left_is_not_read(llama, collator, dataset, tmp_path):
    cache = precompute(llama, dataset, tmp_path, collator=collator, **SETTINGS)
    (tmp_path / ".part-0123456789abcdef.npz.77").write_bytes(b"PK")
    assert len(ReferenceCache(tmp_path, fingerprint=cache.fingerprint, temperature=0.8)) == len(cache)


def test_shards_fill_one_folder(llama, collator, dataset, tmp_path):
    settings = {"collator": collator, "num_shards": 2, **SETTINGS}
    first = precompute(llama, dataset, tmp_path, shard=0, **settings)
    assert len(first) == len(dataset[0].completion_ids) + len(dataset[2].completion_ids)
    assert len(precompute(llama, dataset, tmp_path, shard=1, **settings)) == 9


@pytest.mark.unchecked
def test_bad_numbers_are_refused_before_the_model_is_run(llama, collator, dataset, tmp_path):
    for bad in ({"batch_size": 0}, {"save_every": 0}, {"num_shards": 0}, {"shard": 1}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            precompute(llama, dataset, tmp_path / "cache", **({"collator": collator} | SETTINGS | bad))
    assert not (tmp_path / "cache").exists()


def test_progress_is_shown_when_asked(llama, collator, dataset, tmp_path, capsys):
    precompute(llama, dataset, tmp_path, collator=collator, temperature=1.0, progress=True)
    assert "3/3" in capsys.readouterr().err
    precompute(tiny_llama(llama.config.vocab_size), dataset, tmp_path / "quiet", collator=collator, **SETTINGS)
    assert capsys.readouterr().err == ""
