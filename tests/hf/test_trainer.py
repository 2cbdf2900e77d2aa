"""The trainer on one process: against TRL, where it starts, what it logs, where it goes on, what it refuses."""

import copy
import json
import warnings

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer

from exo_toy import losses
from exo_toy.integrations.policy import disable_dropout
from exo_toy.integrations.trainer import CandidateTrainer
from tests.hf.conftest import tiny_gpt2, tiny_llama
from tests.hf.training import ON_PAIRS, ON_REWARDS, PAIRS, ROWS, settings, trained, weights
from tests.tolerances import assert_close

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def build(model, tokenizer, folder, rows=ROWS, *, eval_dataset=None, trainer=None, **given):
    return CandidateTrainer(
        copy.deepcopy(model),
        settings(folder, **given),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        **(trainer or {}),
    )


def one_batch(trainer):
    """All rows in one batch, as the trainer's loader gives it."""
    return next(iter(trainer.get_train_dataloader()))


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# Against TRL


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"loss": "dpo", "beta": 0.3}, {"loss_type": ["sigmoid"]}),
        (
            {"loss": "exo_pref", "beta": 0.3, "label_smoothing": 0.05},
            {"loss_type": ["exo_pair"], "label_smoothing": 0.05},
        ),
    ],
    ids=["dpo", "exo_pref"],
)
def test_losses_and_gradients_are_those_of_trl(tokenizer, tmp_path, ours, theirs):
    policy, ref = (tiny_llama(len(tokenizer), dtype=torch.float64, seed=seed).eval() for seed in (0, 1))
    for parameter in ref.parameters():  # near the policy, not equal to it
        parameter.data = policy.state_dict()[next(n for n, p in ref.named_parameters() if p is parameter)] + 0.01 * (
            parameter.data
        )
    size = {"per_device_train_batch_size": len(PAIRS)}
    mine = build(policy, tokenizer, tmp_path, PAIRS, trainer={"ref_model": copy.deepcopy(ref)}, **ours, **size)
    config = DPOConfig(
        str(tmp_path), beta=0.3, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        max_length=None, activation_checkpointing=False, **size, **theirs,
    )  # fmt: skip
    trl = DPOTrainer(
        copy.deepcopy(policy), copy.deepcopy(ref), config, train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )  # fmt: skip
    results = []
    for trainer in (mine, trl):
        # TRL leaves Llama's dropout of attention weights on, where the model is in training mode.
        loss = trainer.compute_loss(trainer.model.eval(), one_batch(trainer))
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        results.append((loss.item(), gradient))
    (loss, gradient), (expected_loss, expected) = results
    assert expected.norm() > 0.1
    # TRL keeps what it computes of the reference in float32: 1e-5 of log-probabilities near 60.
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


# Where it starts


@pytest.mark.parametrize("kind", ["rewards", "pairs"])
@pytest.mark.parametrize("reference", ["copy", "second", "adapter", "cache"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_policy_and_reference_agree_to_the_bit_at_the_start(tokenizer, tmp_path, kind, reference, make):
    model = make(len(tokenizer))
    rows, loss = (ROWS, ON_REWARDS) if kind == "rewards" else (PAIRS, ON_PAIRS)
    given, extra = {}, {}
    if reference == "second":
        extra = {"ref_model": copy.deepcopy(model)}
    elif reference == "adapter":
        lora = LORA if make is tiny_llama else LORA | {"target_modules": ["c_attn"], "fan_in_fan_out": True}
        extra = {"peft_config": LoraConfig(**lora)}
    elif reference == "cache":
        # In one batch, in the order of the rows: the cache is computed in the batch that is trained on.
        given = {"ref_cache": str(tmp_path / "cache"), "precompute_ref": True, "train_sampling_strategy": "sequential"}
    batch = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 16}
    trainer = build(model, tokenizer, tmp_path, rows, trainer=extra, **loss, **given, **batch)
    if reference == "cache":
        assert trainer.ref_model is None and (tmp_path / "cache").is_dir()
    seen = {}

    def keep(log_ratio, rewards, mask, **_):
        seen["log_ratio"] = log_ratio
        return log_ratio.sum(-1)

    trainer._custom_loss = keep
    trainer.compute_loss(trainer.model.train(), one_batch(trainer)).backward()
    assert seen["log_ratio"].shape == ((11, 5) if kind == "rewards" else (11, 2))
    assert (seen["log_ratio"] == 0).all() and seen["log_ratio"].requires_grad


def test_dropout_stays_where_it_is_asked_for(gpt2, tokenizer, tmp_path):
    trainer = build(gpt2, tokenizer, tmp_path, disable_dropout=False)
    trainer.train()
    # The first step's log ratios: dropout in the policy, none in the reference.
    assert abs(logged(trainer, "rewards/margins")[0]) > 1e-4
    assert logged(build_and_train(gpt2, tokenizer, tmp_path), "rewards/margins")[0] == 0


def build_and_train(model, tokenizer, folder, **given):
    trainer = build(model, tokenizer, folder, **given)
    trainer.train()
    return trainer


def test_dropout_goes_from_modules_and_attributes(tokenizer):
    for model in (tiny_gpt2(len(tokenizer)), get_peft_model(tiny_llama(len(tokenizer)), LoraConfig(**LORA))):
        ids = torch.arange(6, 26)[None]
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        disable_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_an_adapter_alone_is_trained(llama, tokenizer, tmp_path):
    trainer = build(llama, tokenizer, tmp_path, trainer={"peft_config": LoraConfig(**LORA)})
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert trainer.ref_model is None
    assert changed and all("lora_" in name for name in changed)
    assert logged(trainer, "kl/ref")[0] == 0 and logged(trainer, "kl/ref")[-1] > 0


def test_a_cache_gives_the_same_training_and_a_stale_one_is_refused(llama, tokenizer, tmp_path):
    cached = {"ref_cache": str(tmp_path / "cache")}
    plain = trained(copy.deepcopy(llama), tokenizer, tmp_path)
    filled = trained(copy.deepcopy(llama), tokenizer, tmp_path, precompute_ref=True, **cached)
    read = trained(copy.deepcopy(llama), tokenizer, tmp_path, **cached)
    assert read.ref_model is None
    assert torch.equal(weights(filled.model), weights(read.model))
    torch.testing.assert_close(weights(read.model), weights(plain.model), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="fingerprint"):
        build(tiny_llama(len(tokenizer), seed=1), tokenizer, tmp_path, **cached)
    with pytest.raises(ValueError, match="temperature"):
        build(llama, tokenizer, tmp_path, temperature=0.5, **cached)
    with pytest.raises(ValueError, match="not in the cache"):
        build(llama, tokenizer, tmp_path, [*ROWS, {**ROWS[0], "prompt": "another"}], **cached)


# What it trains


@pytest.mark.parametrize("loss", ["exo_rw", "dpo_rw"])
def test_training_raises_the_weight_of_the_best_candidate(llama, tokenizer, tmp_path, loss):
    trainer = build(llama, tokenizer, tmp_path, **{**ON_REWARDS, "loss": loss}, num_train_epochs=6.0)
    before = trainer.evaluate(ROWS)
    trainer.train()
    after = trainer.evaluate(ROWS)
    assert before["eval_top_reward_leads"] < 0.4 and after["eval_top_reward_leads"] > 0.7
    assert before["eval_rewards/accuracies"] == 0 and after["eval_rewards/accuracies"] > 0.7
    assert after["eval_kl/policy_to_optimal"] < 0.5 * before["eval_kl/policy_to_optimal"]
    assert after["eval_loss"] < before["eval_loss"]


@pytest.mark.parametrize("loss", ["exo_pref", "dpo"])
def test_training_on_pairs_prefers_the_chosen(llama, tokenizer, tmp_path, loss):
    rows = datasets.Dataset.from_list(PAIRS)
    trainer = trained(
        copy.deepcopy(llama), tokenizer, tmp_path, rows=rows, loss=loss, beta=0.2, num_train_epochs=6.0, ess_warning=0.5
    )
    metrics = trainer.evaluate(rows)
    assert metrics["eval_rewards/accuracies"] == 1 and metrics["eval_rewards/margins"] > 0
    assert not {"eval_kl/policy_to_optimal", "eval_top_reward_leads", "eval_ess_spare"} & metrics.keys()


def test_chats_datasets_and_lists_are_one(llama, tokenizer, tmp_path):
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completions": [[{"role": "assistant", "content": text}] for text in row["completions"]],
            "rewards": row["rewards"],
        }
        for row in ROWS
    ]
    vectors = [
        weights(trained(copy.deepcopy(llama), tokenizer, tmp_path, rows=rows).model)
        for rows in (chats, datasets.Dataset.from_list(chats))
    ]
    assert torch.equal(*vectors)
    plain = weights(trained(copy.deepcopy(llama), tokenizer, tmp_path).model)
    assert not torch.equal(plain, vectors[0])


def test_a_loss_of_ones_own_stands_in_for_the_named_one(llama, tokenizer, tmp_path):
    def loss(log_ratio, rewards, mask):
        return losses.dpo_rw_loss(log_ratio, rewards, beta_pi=0.2, beta_r=0.5, mask=mask)

    own = trained(copy.deepcopy(llama), tokenizer, tmp_path, trainer={"loss": loss})
    named = trained(copy.deepcopy(llama), tokenizer, tmp_path, **{**ON_REWARDS, "loss": "dpo_rw"})
    assert torch.equal(weights(own.model), weights(named.model))
    assert not torch.equal(weights(own.model), weights(trained(copy.deepcopy(llama), tokenizer, tmp_path).model))


def test_checkpointed_activations_change_nothing(llama, tokenizer, tmp_path):
    vectors = [
        weights(trained(copy.deepcopy(llama), tokenizer, tmp_path, activation_checkpointing=some).model)
        for some in (False, True)
    ]
    assert torch.equal(*vectors)


@pytest.mark.parametrize("missing", ["generation config", "padding token"])
def test_models_and_tokenizers_that_lack_something_will_do(llama, tokenizer, tmp_path, missing):
    model, other = copy.deepcopy(llama), copy.deepcopy(tokenizer)
    if missing == "padding token":
        other.pad_token = None
    else:
        model.generation_config = None
    trainer = trained(model, other, tmp_path, save_strategy="steps", save_steps=3.0)
    assert (tmp_path / "checkpoint-3").is_dir()
    assert torch.equal(weights(trainer.model), weights(trained(copy.deepcopy(llama), tokenizer, tmp_path).model))


# Where it goes on


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(gpt2, tokenizer, tmp_path, stop):
    """Inside the first epoch of three steps, at its end, inside the second."""
    given = {"num_train_epochs": 3.0, "save_strategy": "steps", "save_steps": 1.0, "warmup_steps": 2.0}
    whole = trained(copy.deepcopy(gpt2), tokenizer, tmp_path / "whole", **given)
    checkpoint = tmp_path / "whole" / f"checkpoint-{stop}"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["global_step"] == stop and whole.state.global_step == 9
    resumed = trained(copy.deepcopy(gpt2), tokenizer, tmp_path / "again", resume=str(checkpoint), **given)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    for name in ("loss", "rewards/margins", "kl/ref"):
        assert logged(resumed, name)[-3:] == logged(whole, name)[-3:]


# What it says


def test_metrics_are_averaged_over_prompts(llama, tokenizer, tmp_path):
    """The evaluation in ragged batches of three, and prompt by prompt."""
    trainer = trained(copy.deepcopy(llama), tokenizer, tmp_path, per_device_eval_batch_size=3)
    metrics = trainer.evaluate(ROWS)
    alone = [trainer.evaluate([row]) for row in ROWS]
    names = [name for name in metrics if "/" in name or name in ("eval_loss", "eval_ess", "eval_top_reward_leads")]
    assert {"eval_rewards/chosen", "eval_kl/ref", "eval_logps/rejected", "eval_loss"} <= set(names)
    for name in names:
        mean = sum(each[name] for each in alone) / len(ROWS)
        assert metrics[name] == pytest.approx(mean, rel=1e-4, abs=1e-5), name


def test_evaluation_during_training_by_name(llama, tokenizer, tmp_path):
    trainer = build(
        llama, tokenizer, tmp_path, eval_dataset={"a": ROWS[:2], "b": ROWS[2:]}, eval_strategy="steps", eval_steps=2.0
    )
    trainer.train()
    # After the second step and after the last.
    assert len(logged(trainer, "eval_a_loss")) == len(logged(trainer, "eval_b_kl/ref")) == 2
    assert set(trainer.reports) == {"train_dataset", "eval_dataset['a']", "eval_dataset['b']"}
    # What is trained on alone counts for the training.
    assert len(logged(trainer, "rewards/margins")) == 3


def test_the_warning_of_unrepresentative_candidates_comes_once(llama, tokenizer, tmp_path):
    sharp = {"beta_pi": 3.0, "beta_r": 0.1, "loss": "exo_rw", "num_train_epochs": 6.0, "learning_rate": 5e-3}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trained(copy.deepcopy(llama), tokenizer, tmp_path, **sharp)
    said = [str(warning.message) for warning in caught if "no longer represent" in str(warning.message)]
    assert len(said) == 1
    for remedy in ("current policy", "more per prompt", "smaller beta_pi", "larger beta_r"):
        assert remedy in said[0]
    assert logged(trainer, "ess")[0] == 1 and logged(trainer, "ess")[-1] < 0.5
    assert not logged(trainer, "ess_spare")
    # With 0 there is none: it would be an error here.
    trained(copy.deepcopy(llama), tokenizer, tmp_path, ess_warning=0.0, **sharp)


def test_rows_that_teach_nothing_are_counted_and_left_out(llama, tokenizer, tmp_path):
    same = {"prompt": "the", "completions": [" cat", " cat"], "rewards": [1.0, 0.0]}
    with_them = [same, *ROWS[:5], same, *ROWS[5:]]
    trainer = trained(copy.deepcopy(llama), tokenizer, tmp_path, rows=with_them)
    assert trainer.reports["train_dataset"].rows == 13
    assert sum(trainer.reports["train_dataset"].skipped.values()) == 2
    assert torch.equal(weights(trainer.model), weights(trained(copy.deepcopy(llama), tokenizer, tmp_path).model))


# What it refuses


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"rewards": [1.0, float("nan")]}, r'train_dataset: row 1, column "rewards.*finite'),
        ({"rewards": [1.0]}, r'train_dataset: row 1, column "rewards.*2'),
        ({"completions": ["a", ""], "rewards": [1.0, 0.0]}, r'train_dataset: row 1, column "completions\[1\]"'),
        ({"completions": ["a"], "rewards": [1.0]}, r"train_dataset: row 1.*at least 2"),
        ({"rewards": None}, r'train_dataset: row 1, column "rewards'),
        (PAIRS[1], r"train_dataset: row 1"),
    ],
    ids=["nan", "count", "empty", "one", "missing", "both"],
)
@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_a_bad_row_is_named_before_training(llama, tokenizer, tmp_path, row, message, kind):
    # A datasets.Dataset has the columns of its first row.
    good = {"prompt": "the", "completions": [" cat", " mat"], "rewards": [0.0, 1.0], "chosen": None, "rejected": None}
    with pytest.raises(ValueError, match=message):
        build(llama, tokenizer, tmp_path, kind([good, {**good, **row}]))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("given", "rows", "message"),
    [
        (ON_PAIRS, ROWS, "train_dataset: must have the columns prompt, chosen and rejected; got.*completions"),
        (ON_REWARDS, PAIRS, "train_dataset: must have the columns prompt, completions and rewards; got.*chosen"),
        (ON_REWARDS, [], "train_dataset must have at least one row"),
        (ON_REWARDS, [ROWS[0], PAIRS[0]], "train_dataset: row 1"),
        (ON_REWARDS, (row for row in ROWS), "train_dataset must have a length"),
        ({"loss": "exo_rw", "beta_r": 1.0}, ROWS, "beta_pi must be given for loss='exo_rw'"),
        ({"loss": "dpo"}, PAIRS, "beta must be given for loss='dpo'"),
        ({**ON_REWARDS, "beta": 0.1}, ROWS, "beta must be None for loss='exo_rw'"),
        ({**ON_REWARDS, "label_smoothing": 0.1}, ROWS, "label_smoothing must be None for loss='exo_rw'"),
        ({**ON_PAIRS, "beta_r": 0.1}, PAIRS, "beta_r must be None for loss='exo_pref'"),
        ({**ON_REWARDS, "precompute_ref": True}, ROWS, "ref_cache must name a folder"),
        ({**ON_REWARDS, "ref_cache": "nowhere"}, ROWS, "nowhere"),
        ({**ON_REWARDS, "train_sampling_strategy": "group_by_length"}, ROWS, "train_sampling_strategy"),
        ({**ON_REWARDS, "dataloader_persistent_workers": True, "dataloader_num_workers": 1}, ROWS, "persistent"),
        ({**ON_REWARDS, "accelerator_config": {"dispatch_batches": True}}, ROWS, "dispatch_batches"),
    ],
)
def test_settings_and_data_that_do_not_fit(llama, tokenizer, tmp_path, given, rows, message):
    with pytest.raises(ValueError, match=message):
        build(llama, tokenizer, tmp_path, rows, **given)


@pytest.mark.unchecked
def test_models_and_arguments_that_do_not_fit(llama, llama64, tokenizer, tmp_path):
    config = settings(tmp_path)
    with pytest.raises(ValueError, match="ref_model must be another object"):
        CandidateTrainer(llama, config, ROWS, processing_class=tokenizer, ref_model=llama)
    with pytest.raises(ValueError, match=r"ref_model must have the dtype of model, torch.float32; got torch.float64"):
        CandidateTrainer(llama, config, ROWS, processing_class=tokenizer, ref_model=llama64)
    with pytest.raises(ValueError, match="processing_class must be the tokenizer"):
        CandidateTrainer(llama, config, ROWS)
    with pytest.raises(ValueError, match="model must be a causal language model; got str"):
        CandidateTrainer("gpt2", config, ROWS, processing_class=tokenizer)
    with pytest.raises(ValueError, match="args must be a CandidateConfig; got TrainingArguments"):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True)
        CandidateTrainer(llama, arguments, ROWS, processing_class=tokenizer)
    with pytest.raises(ValueError, match="train_dataset or eval_dataset must be given"):
        CandidateTrainer(llama, config, processing_class=tokenizer, loss=lambda *_, **__: None)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="end-of-sequence"):
        CandidateTrainer(llama, config, ROWS, processing_class=endless)
    trainer = build(llama, tokenizer, tmp_path, trainer={"loss": lambda ratio, rewards, mask: ratio.sum()})
    with pytest.raises(ValueError, match=r"loss must return a tensor \[B\]"):
        trainer.train()
    with pytest.raises(ValueError, match="eval_dataset must be given"):
        build(llama, tokenizer, tmp_path).evaluate()


def test_truncation_is_followed(llama, tokenizer, tmp_path):
    trainer = build(llama, tokenizer, tmp_path, max_prompt_length=3, max_completion_length=2)
    batch = one_batch(trainer)
    assert batch["input_ids"].shape[1] <= 5 and batch["completion_mask"].sum(-1).max() == 2
    assert_close(batch["prompt_weights"], [1.0] * 4)
