"""The online form: whose candidates, with which weights and rewards; where it goes on; what it refuses."""

import copy
import math

import datasets
import pytest
import torch
from peft import LoraConfig

from exo_toy.integrations.candidates import CandidateCollator
from exo_toy.integrations.online import OnlineCandidateTrainer, OnlineConfig
from exo_toy.integrations.scoring import completion_logps, scatter
from tests.hf.training import ROWS, settings, weights
from tests.tolerances import assert_close

PROMPTS = [{"prompt": row["prompt"], "wanted": len(row["completions"])} for row in ROWS]
ONLINE = {"beta_r": 0.5, "beta_pi": 1.0, "num_candidates": 4, "max_new_tokens": 5}


def vowels(completions, **_):
    """Between 0 and 1, different for most texts."""
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) + len(text) / 100 for text in completions]


def build(model, tokenizer, folder, rows=PROMPTS, *, trainer=None, **given):
    plain = dict(
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, learning_rate=1e-3, logging_steps=1.0,
        num_train_epochs=1.0, max_grad_norm=0.0, per_device_train_batch_size=4,
    )  # fmt: skip
    config = OnlineConfig(str(folder), **{**plain, **ONLINE, **given})
    return OnlineCandidateTrainer(
        copy.deepcopy(model),
        config,
        train_dataset=rows,
        processing_class=tokenizer,
        **{"reward_funcs": vowels, **(trainer or {})},
    )


def run(*args, resume=None, **given):
    trainer = build(*args, **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def logps(model, features, temperature):
    """[B, K] in evaluation mode."""
    batch = CandidateCollator(0, dtype=torch.float64)(features)
    tokens = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    with torch.no_grad():
        return scatter(
            completion_logps(model.eval(), *tokens, temperature=temperature),
            batch["candidate_rows"],
            batch["candidate_mask"],
        )


@pytest.fixture
def moved(llama64):
    """A policy that has left its reference."""
    model = copy.deepcopy(llama64)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


# Whose candidates, with which weights


@pytest.mark.parametrize("half_reference", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_weights_are_reference_over_sampler(llama64, moved, tokenizer, tmp_path, half_reference, temperature):
    trainer = build(
        moved, tokenizer, tmp_path, trainer={"ref_model": copy.deepcopy(llama64)},
        temperature=temperature, half_reference=half_reference,
    )  # fmt: skip
    features = trainer.sample(range(len(PROMPTS)))
    policy, reference = (logps(model, features, temperature) for model in (moved, llama64))
    assert (policy - reference).abs().max() > 1
    sampler = torch.logaddexp(policy, reference) - math.log(2) if half_reference else policy
    given = torch.tensor([feature["log_weights"] for feature in features], dtype=torch.float64)
    assert_close(given, reference - sampler, scale=100.0)
    assert_close(torch.tensor([f["ref_logps"] for f in features], dtype=torch.float64), reference, scale=100.0)
    if half_reference:
        assert given.max() <= math.log(2)
        # The first two of each prompt are the policy's, which it makes likelier than the reference does.
        assert (policy - reference)[:, :2].mean() > 0 > (policy - reference)[:, 2:].mean()


def test_the_weights_in_the_loss_are_uniform_where_the_policy_is_the_sampler(llama64, moved, tokenizer, tmp_path):
    """With beta_pi = 1, log ratio plus log weight is 0 for every candidate: the effective sample size is all of K."""
    trainer = build(
        moved, tokenizer, tmp_path, trainer={"ref_model": copy.deepcopy(llama64)}, refresh_every=2,
        num_train_epochs=2.0, learning_rate=1e-2, ess_warning=0.0,
    )  # fmt: skip
    seen = []

    def loss(log_ratio, rewards, mask, log_weights):
        seen.append((log_ratio + log_weights).detach())
        return (log_ratio * rewards).sum(-1)

    trainer._custom_loss = loss
    trainer.train()
    # Three steps an epoch: sampled at the first and the third.
    fresh, stale = [0, 2, 3, 5], [1, 4]
    for step in fresh:
        assert seen[step].abs().max() < 1e-9
    for step in stale:
        assert seen[step].abs().max() > 1e-2
    ess = logged(trainer, "ess")
    assert all(ess[step] == pytest.approx(1.0, abs=1e-9) for step in fresh)
    assert all(ess[step] < 1 - 1e-4 for step in stale)
    # Log ratios stay against the reference, from which the policy has been away since before the first step.
    assert abs(logged(trainer, "rewards/chosen")[0]) > 0.1


def test_without_weights_the_ess_would_say_otherwise(llama64, moved, tokenizer, tmp_path):
    trainer = build(moved, tokenizer, tmp_path, trainer={"ref_model": copy.deepcopy(llama64)})
    features = trainer.sample(range(4))
    ratio = logps(moved, features, 1.0) - logps(llama64, features, 1.0)
    share = ratio.softmax(-1)
    assert (1 / (share**2).sum(-1)).max() < 3.9


def test_training_raises_the_reward_of_what_is_sampled(llama, tokenizer, tmp_path):
    """The reward is the share of tokens below 100, which the reference gives three tenths."""

    def low(completion_ids, **_):
        return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]

    trainer = run(
        llama, tokenizer, tmp_path, trainer={"reward_funcs": low}, num_train_epochs=8.0, learning_rate=1e-2,
        num_candidates=8, max_new_tokens=4, beta_r=0.1, ess_warning=0.0,
    )  # fmt: skip
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    assert rewards == logged(trainer, "rewards/low/mean")
    assert all(length <= 4 for length in logged(trainer, "sampled/length"))


def test_identical_and_empty_completions_are_counted_and_kept(llama, tokenizer, tmp_path):
    eos = tokenizer.eos_token_id
    given = [[[eos], [30, eos], [30, eos], [31, 32]], [[33, eos]] * 4]

    def sampler(policy, prompts, k, seeds):
        assert k == 4 and len(seeds) == len(prompts) and all(isinstance(token, int) for p in prompts for token in p)
        return given

    trainer = build(llama, tokenizer, tmp_path, rows=PROMPTS[:2], trainer={"sampler": sampler}, num_train_epochs=1.0)
    first, second = trainer.sample([0, 1])
    assert [first["completion_ids"], second["completion_ids"]] == given
    wanted = {"identical": 0.25, "all_identical": 0.0, "empty": 0.25, "truncated": 0.25, "length": 1.75}
    for name, number in wanted.items():
        assert first["sampled"][f"sampled/{name}"] == number
    assert second["sampled"]["sampled/all_identical"] == 1 and second["sampled"]["sampled/identical"] == 0.75
    trainer.train()
    assert weights(trainer.model).isfinite().all()
    assert logged(trainer, "sampled/all_identical") == [0.5]


def test_an_adapter_is_sampled_and_switched_off_for_the_reference(llama, tokenizer, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = build(llama, tokenizer, tmp_path, trainer={"peft_config": lora}, half_reference=True)
    assert trainer.ref_model is None
    features = trainer.sample([0, 1])
    reference = logps(llama, features, 1.0)
    assert_close(torch.tensor([f["ref_logps"] for f in features]).double(), reference, scale=1e8)  # float32
    plain = build(llama, tokenizer, tmp_path, half_reference=True).sample([0, 1])
    for mine, other in zip(features, plain, strict=True):
        # The reference's half is that of the model without an adapter; the policy's is another.
        assert mine["completion_ids"][2:] == other["completion_ids"][2:]
        assert mine["completion_ids"][:2] != other["completion_ids"][:2]
    trainer.train()
    assert weights(trainer.model).isfinite().all()


# Rewards


def test_reward_functions_get_what_trl_gives_them(llama, tokenizer, tmp_path):
    calls = []

    def recorded(prompts, completions, completion_ids, wanted, trainer_state, **others):
        calls.append((prompts, completions, completion_ids, wanted, others))
        assert trainer_state.global_step == 0
        return [float(len(ids)) for ids in completion_ids]

    trainer = build(
        llama, tokenizer, tmp_path, trainer={"reward_funcs": [vowels, recorded], "reward_weights": [2.0, 0.5]},
        sampling_batch_size=2,
    )  # fmt: skip
    features = trainer.sample([3, 0, 5])
    assert [len(prompts) for prompts, *_ in calls] == [8, 4]
    prompts, completions, ids, wanted, others = calls[0]
    assert prompts == [PROMPTS[3]["prompt"]] * 4 + [PROMPTS[0]["prompt"]] * 4
    assert wanted == [PROMPTS[3]["wanted"]] * 4 + [PROMPTS[0]["wanted"]] * 4 and not others
    assert ids == features[0]["completion_ids"] + features[1]["completion_ids"]
    assert completions == tokenizer.batch_decode(ids, skip_special_tokens=True)
    total = [2 * v + 0.5 * len(i) for v, i in zip(vowels(completions), ids, strict=True)]
    assert features[0]["rewards"] + features[1]["rewards"] == pytest.approx(total)


def test_chats_get_chats(llama, tokenizer, tmp_path):
    seen = []

    def recorded(prompts, completions, **_):
        seen.extend(zip(prompts, completions, strict=True))
        return vowels([completion[0]["content"] for completion in completions])

    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS]
    for dataset in (rows, datasets.Dataset.from_list(rows)):
        trainer = run(llama, tokenizer, tmp_path, dataset, trainer={"reward_funcs": recorded})
    assert seen[0][0] == rows[0]["prompt"] or seen[0][0] in [row["prompt"] for row in rows]
    assert set(seen[0][1][0]) == {"role", "content"} and seen[0][1][0]["role"] == "assistant"
    ids = trainer.train_dataset[0]["prompt_ids"]
    assert ids == tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_dict=False)


# Where it goes on


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(gpt2, tokenizer, tmp_path, stop):
    """Three steps an epoch, sampled every two: inside a window, between two, at an epoch's end, inside the next."""
    given = {"refresh_every": 2, "num_train_epochs": 2.0, "save_strategy": "steps", "save_steps": 1.0}
    whole = run(gpt2, tokenizer, tmp_path / "whole", **given)
    checkpoint = tmp_path / "whole" / f"checkpoint-{stop}"
    resumed = run(gpt2, tokenizer, tmp_path / "again", resume=str(checkpoint), **given)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    for name in ("loss", "reward", "ess", "sampled/length"):
        assert logged(resumed, name)[-2:] == logged(whole, name)[-2:]


def test_the_seed_decides(llama, tokenizer, tmp_path):
    first, again = (run(llama, tokenizer, tmp_path) for _ in range(2))
    other = run(llama, tokenizer, tmp_path, seed=1)
    assert torch.equal(weights(first.model), weights(again.model))
    assert logged(first, "sampled/length") == logged(again, "sampled/length")
    assert logged(first, "reward")[0] != logged(other, "reward")[0]


def test_fresh_candidates_at_each_refresh(llama, tokenizer, tmp_path):
    """Of the same prompts, with a policy that stands still."""
    trainer = run(
        llama, tokenizer, tmp_path, learning_rate=0.0, num_train_epochs=2.0, train_sampling_strategy="sequential"
    )
    rewards = logged(trainer, "reward")
    assert rewards[0] != rewards[3]


def test_a_second_training_starts_with_candidates_of_its_own(llama, tokenizer, tmp_path):
    """The first one stops inside a window; what it leaves is not trained on."""
    still = {"learning_rate": 0.0, "train_sampling_strategy": "sequential", "refresh_every": 3, "max_steps": 1}
    trainer = build(llama, tokenizer, tmp_path, **still)
    trainer.train()
    first = logged(trainer, "reward")
    trainer.train()
    assert logged(trainer, "reward") == first


def test_the_split_into_batches_changes_nothing(llama64, tokenizer, tmp_path):
    given = {"optim": "sgd", "learning_rate": 0.05, "refresh_every": 2}
    whole = run(llama64, tokenizer, tmp_path, per_device_train_batch_size=4, **given)
    split = run(
        llama64, tokenizer, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4,
        sampling_batch_size=3, padding_side="left", **given,
    )  # fmt: skip
    assert not torch.equal(weights(whole.model), weights(llama64))
    torch.testing.assert_close(weights(split.model), weights(whole.model), rtol=0, atol=1e-10)
    assert logged(split, "reward") == pytest.approx(logged(whole, "reward"), rel=1e-12)


def test_an_evaluation_has_candidates_of_its_own(llama, tokenizer, tmp_path):
    trainer = build(llama, tokenizer, tmp_path, trainer={"eval_dataset": ROWS}, eval_strategy="steps", eval_steps=2.0)
    trainer.train()
    assert logged(trainer, "eval_loss") and not logged(trainer, "eval_reward")
    assert len(logged(trainer, "reward")) == 3


# What it refuses


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"refresh_every": 0}, "refresh_every must be an integer of at least 1"),
        ({"num_candidates": 1}, "num_candidates must be an integer of at least 2"),
        ({"num_candidates": 3, "half_reference": True}, "num_candidates must be even"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1"),
        ({"sampling_batch_size": 0}, "sampling_batch_size must be an integer of at least 1"),
        ({"loss": "dpo"}, "loss must be one of exo_rw, dpo_rw, .*, which know proposals"),
        ({"max_completion_length": 5}, "max_completion_length must be None"),
        ({"ref_cache": "cache"}, "ref_cache must be None"),
        ({"beta_r": None}, "beta_r must be given"),
    ],
)
def test_settings_that_do_not_fit(llama, tokenizer, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        build(llama, tokenizer, tmp_path, **given)


@pytest.mark.unchecked
def test_data_and_functions_that_do_not_fit(llama, tokenizer, tmp_path):
    cases = [
        ([*PROMPTS, {"text": "a"}], {}, r'train_dataset: row 11, column "prompt": must be there; got.*text'),
        ([{"prompt": ""}], {}, 'train_dataset: row 0, column "prompt".*at least one token'),
        ([], {}, "train_dataset must have at least one row"),
        (None, {}, "train_dataset must be rows with a prompt; got None"),
        (PROMPTS, {"reward_funcs": []}, "reward_funcs must hold at least one function"),
        (PROMPTS, {"reward_funcs": llama}, "reward_funcs must be functions.*reward_model"),
        (PROMPTS, {"reward_funcs": ["name"]}, "reward_funcs must be functions.*'name'"),
        (PROMPTS, {"reward_funcs": [vowels, vowels]}, "reward_funcs must have different names"),
        (PROMPTS, {"reward_weights": [1.0, 2.0]}, "reward_weights must be one per function, 1; got 2"),
        (PROMPTS, {"reward_weights": [float("nan")]}, "reward_weights must be finite numbers"),
    ]
    for rows, trainer, message in cases:
        with pytest.raises(ValueError, match=message):
            build(llama, tokenizer, tmp_path, rows, trainer=trainer)
    with pytest.raises(ValueError, match="args must be an OnlineConfig; got CandidateConfig"):
        OnlineCandidateTrainer(llama, settings(tmp_path), PROMPTS, processing_class=tokenizer, reward_funcs=vowels)
    for sampler, message in [
        (lambda *_: [[[5]] * 3] * 4, r"sampler must return 4 completions for each of 4 prompts; got \[3"),
        (lambda *_: [[[5], [], [6], [7]]] * 4, "at least one token"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(llama, tokenizer, tmp_path, trainer={"sampler": sampler}).train()


@pytest.mark.unchecked
def test_a_checkpoint_that_does_not_fit(llama, tokenizer, tmp_path):
    given = {"refresh_every": 2, "save_strategy": "steps", "save_steps": 1.0}
    run(llama, tokenizer, tmp_path, **given)
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match="refresh_every must be that of the checkpoint, 2; got 3"):
        run(llama, tokenizer, tmp_path, resume=str(checkpoint), **{**given, "refresh_every": 3})
    with pytest.raises(ValueError, match="train_dataset and batch size must be those of the checkpoint"):
        run(llama, tokenizer, tmp_path, resume=str(checkpoint), seed=7, **given)
    (checkpoint / "candidates_0_of_1.pt").unlink()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint must hold candidates_0_of_1.pt"):
        run(llama, tokenizer, tmp_path, resume=str(checkpoint), **given)
