"""Models, data and settings that a trainer is given: what would go wrong late, or unseen, is said at once."""

import copy

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from exo_toy.integrations.reference import StaleCacheError, fingerprint
from exo_toy.integrations.trainer import CandidateTrainer
from tests.hf.conftest import tiny_gpt2, tiny_llama
from tests.hf.test_online import build as online
from tests.hf.training import ROWS, settings, trained, weights


def build(model, tokenizer, folder, *, rows=ROWS, trainer=None, **given):
    return CandidateTrainer(
        copy.deepcopy(model), settings(folder, **given), train_dataset=rows, processing_class=tokenizer,
        **(trainer or {}),
    )  # fmt: skip


def lora(**given):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], **given})


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# Models


@pytest.mark.unchecked
def test_a_compiled_policy_trains_as_a_bare_one(llama, tokenizer, tmp_path):
    compiled = trained(
        copy.deepcopy(llama), tokenizer, tmp_path / "compiled", rows=ROWS[:2],
        torch_compile=True, torch_compile_backend="eager",
    )  # fmt: skip
    bare = trained(copy.deepcopy(llama), tokenizer, tmp_path / "bare", rows=ROWS[:2], kernel="selective")
    assert torch.equal(weights(compiled.model), weights(bare.model))


@pytest.mark.parametrize("kind", ["trainer", "online"])
def test_an_adapter_that_trains_what_stays_is_refused(gpt2, tokenizer, tmp_path, kind):
    """Switched off, it would leave its trained biases in the reference."""
    adapter = lora(target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    make = build if kind == "trainer" else online
    with pytest.raises(ValueError, match=r"^ref_model or ref_cache must be given .* the first .*bias$"):
        make(gpt2, tokenizer, tmp_path, trainer={"peft_config": adapter})
    make(gpt2, tokenizer, tmp_path, trainer={"peft_config": adapter, "ref_model": copy.deepcopy(gpt2)})


def test_trained_tokens_are_of_the_adapter(llama, tokenizer, tmp_path):
    config = lora(trainable_token_indices=[5, 6], modules_to_save=["lm_head"])
    build(llama, tokenizer, tmp_path, trainer={"peft_config": config})
    assert fingerprint(get_peft_model(copy.deepcopy(llama), config)) == fingerprint(llama)


def test_a_cache_of_a_reference_with_an_adapter_is_refused(llama, tokenizer, tmp_path):
    """It would hold the log-probabilities of the model without it."""
    reference = get_peft_model(copy.deepcopy(llama), lora())
    with pytest.raises(ValueError, match=r"^ref_model must have no adapter where ref_cache is given"):
        build(
            llama, tokenizer, tmp_path, ref_cache=str(tmp_path / "cache"), precompute_ref=True,
            trainer={"ref_model": reference},
        )  # fmt: skip


def test_prompt_learning_is_refused_before_training(llama, tokenizer, tmp_path):
    from peft import PromptTuningConfig

    with pytest.raises(ValueError, match="prompt-learning"):
        build(
            llama, tokenizer, tmp_path,
            trainer={"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
        )  # fmt: skip


def test_a_cache_of_another_precision_is_stale(llama, tokenizer, tmp_path):
    given = {"ref_cache": str(tmp_path / "cache"), "rows": ROWS[:2]}
    build(llama, tokenizer, tmp_path, bf16=True, precompute_ref=True, **given)
    build(llama, tokenizer, tmp_path, bf16=True, **given)
    with pytest.raises(StaleCacheError, match=r"have autocast torch\.bfloat16, wanted is autocast none"):
        build(llama, tokenizer, tmp_path, **given)


# Data


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas"])
def test_the_format_of_a_dataset_is_no_matter(llama, tokenizer, tmp_path, kind):
    dataset = datasets.Dataset.from_list(ROWS[:3]).with_format(kind)
    assert list(build(llama, tokenizer, tmp_path, rows=dataset).train_dataset) == list(
        build(llama, tokenizer, tmp_path, rows=ROWS[:3]).train_dataset
    )
    prompts = online(llama, tokenizer, tmp_path, rows=dataset)
    assert prompts._prompts[1]["prompt"] == ROWS[1]["prompt"]


@pytest.mark.unchecked
@pytest.mark.parametrize("make", [build, online])
@pytest.mark.parametrize(
    "rows, message",
    [
        ({"prompt": ["a"]}, "train_dataset must have rows by index, not columns or splits by name; got dict"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "splits by name; got DatasetDict"),
        (["a prompt"], "train_dataset: row 0: must be a mapping with columns; got 'a prompt'"),
        ([*ROWS, ("a", "b")], r"train_dataset: row 11: must be a mapping with columns; got \('a', 'b'\)"),
    ],
)
def test_what_is_no_dataset_is_named(llama, tokenizer, tmp_path, make, rows, message):
    with pytest.raises(ValueError, match=message):
        make(llama, tokenizer, tmp_path, rows=rows)


@pytest.mark.parametrize("make", [build, online])
def test_rows_longer_than_the_positions_of_the_model_are_refused(tokenizer, tmp_path, make):
    rows = [ROWS[0], {**ROWS[1], "prompt": "the film was good " * 200}]
    with pytest.raises(ValueError, match=r"^train_dataset must have at most 256 tokens a row.* got \d{3,}$"):
        make(tiny_gpt2(len(tokenizer)), tokenizer, tmp_path, rows=rows)
    make(tiny_gpt2(len(tokenizer)), tokenizer, tmp_path, rows=rows, max_prompt_length=200)
    make(tiny_llama(len(tokenizer)), tokenizer, tmp_path, rows=rows)


def test_a_kernel_that_is_not_possible_is_refused_before_training(tokenizer, tmp_path):
    """Of the policy, or of a reference alone, whose heads scale the logits."""
    from transformers import GraniteConfig, GraniteForCausalLM

    plain = tiny_llama(len(tokenizer))
    sizes = {name: getattr(plain.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    scaled = GraniteForCausalLM(GraniteConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, logits_scaling=2.0))
    for model, ref_model in ((scaled, None), (plain, scaled)):
        with pytest.raises(ValueError, match=r'kernel must be "auto" or "selective" .* for GraniteForCausalLM'):
            build(model, tokenizer, tmp_path, kernel="linear", trainer={"ref_model": ref_model})


@pytest.mark.parametrize("make", [build, online])
def test_an_epoch_without_a_batch_is_refused(llama, tokenizer, tmp_path, make):
    trainer = make(llama, tokenizer, tmp_path, rows=ROWS[:3], dataloader_drop_last=True)
    with pytest.raises(ValueError, match="dataloader_drop_last must be False where 3 rows are fewer than the 4 of one"):
        trainer.train()


# What is logged


def test_a_second_training_logs_its_own_averages(llama, tokenizer, tmp_path):
    """Of the first, the last of three steps was not logged."""
    trainer = trained(copy.deepcopy(llama), tokenizer, tmp_path, logging_steps=2.0, learning_rate=0.0)
    first = logged(trainer, "logps/chosen")
    trainer.train()
    assert logged(trainer, "logps/chosen") == first and len(first) == 1


def test_an_evaluation_forgets_one_that_failed(llama, tokenizer, tmp_path):
    class Fails(TrainerCallback):
        times = 1

        def on_prediction_step(self, *args, **kwargs):
            self.times -= 1
            if self.times == 0:
                raise KeyboardInterrupt

    trainer = build(llama, tokenizer, tmp_path, trainer={"eval_dataset": ROWS, "callbacks": [Fails()]})
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    wanted = build(llama, tokenizer, tmp_path, trainer={"eval_dataset": ROWS}).evaluate()
    found = trainer.evaluate()
    assert found["eval_loss"] == wanted["eval_loss"] and found["eval_logps/chosen"] == wanted["eval_logps/chosen"]
