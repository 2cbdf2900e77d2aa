"""The losses inside TRL's trainer: against this library's functions, and against TRL's own losses."""

import copy

import datasets
import pytest
import torch
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from exo_toy import losses
from exo_toy.integrations.candidates import CandidateCollator, tokenize_row
from exo_toy.integrations.scoring import completion_logps
from exo_toy.integrations.trl import ExoDPOTrainer
from tests.hf.training import PAIRS, weights

EXO = {"beta": 0.3, "label_smoothing": 0.05}


def config(folder, **given):
    defaults = dict(
        beta=0.3, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, max_length=None,
        activation_checkpointing=False, per_device_train_batch_size=len(PAIRS), logging_steps=1,
    )  # fmt: skip
    return DPOConfig(str(folder), **{**defaults, **given})


def build(kind, models, tokenizer, folder, *, trainer=None, **given):
    policy, ref = models
    return kind(
        copy.deepcopy(policy),
        copy.deepcopy(ref),
        config(folder, **given),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        **(trainer or {}),
    )


def loss_and_gradient(trainer):
    """Of all pairs in one batch, dropout off."""
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    loss.backward()
    parts = [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]
    return loss.item(), torch.cat(parts)


@pytest.fixture(scope="module")
def models(llama64):
    """A policy, and a reference near it."""
    ref = copy.deepcopy(llama64)
    generator = torch.Generator().manual_seed(1)
    for parameter in ref.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return llama64, ref


@pytest.mark.parametrize(
    ("loss", "theirs", "label_smoothing"),
    [(losses.dpo_loss, "sigmoid", 0.0), (losses.exo_pref_loss, "exo_pair", 0.05)],
)
def test_losses_and_gradients_are_those_of_trl(models, tokenizer, tmp_path, loss, theirs, label_smoothing):
    mine = build(ExoDPOTrainer, models, tokenizer, tmp_path, trainer={"loss": loss}, label_smoothing=label_smoothing)
    trl = build(DPOTrainer, models, tokenizer, tmp_path, loss_type=[theirs], label_smoothing=label_smoothing)
    (mine_loss, mine_gradient), (trl_loss, trl_gradient) = loss_and_gradient(mine), loss_and_gradient(trl)
    assert trl_gradient.norm() > 0.1
    # TRL's log-probabilities are float32: 1e-5 of some near 60.
    assert mine_loss == pytest.approx(trl_loss, rel=1e-5)
    assert (mine_gradient - trl_gradient).norm() < 1e-5 * trl_gradient.norm()
    shared = [name for name in mine._metrics["eval"] if name != "num_tokens"]
    assert {"rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"} <= set(shared)
    for name in shared:
        assert mine._metrics["eval"][name] == pytest.approx(trl._metrics["eval"][name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("loss", [losses.dpo_loss, losses.exo_pref_loss])
def test_losses_and_gradients_are_those_of_the_functions(models, tokenizer, tmp_path, loss):
    """From token ids, this library's log-probabilities and its loss, with no trainer."""
    policy, ref = copy.deepcopy(models)
    batch = CandidateCollator(tokenizer.pad_token_id)([tokenize_row(row, tokenizer) for row in PAIRS])
    tokens = [batch[name] for name in ("input_ids", "attention_mask", "completion_mask")]
    logps = [completion_logps(model, *tokens)[batch["candidate_rows"]] for model in (policy, ref)]
    pairs = [table[:, column] for table in (logps[0], logps[1].detach()) for column in (0, 1)]
    wanted = loss(*pairs, **EXO).losses.mean()
    wanted.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])

    trainer = build(ExoDPOTrainer, models, tokenizer, tmp_path, trainer={"loss": loss}, **EXO)
    mine_loss, mine_gradient = loss_and_gradient(trainer)
    assert mine_loss == pytest.approx(wanted.item(), rel=1e-5)
    assert (mine_gradient - gradient).norm() < 1e-5 * gradient.norm()


def test_exo_from_preferences_trains_and_logs(llama, tokenizer, tmp_path):
    trainer = build(
        ExoDPOTrainer, (llama, llama), tokenizer, tmp_path, label_smoothing=1e-3, learning_rate=1e-3,
        num_train_epochs=3.0, precompute_ref_log_probs=True,
    )  # fmt: skip
    before = weights(trainer.model)
    trainer.train()
    assert not torch.equal(before, weights(trainer.model))
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert len(margins) == 3 and margins[-1] > margins[0]
    assert trainer.state.log_history[-2]["num_tokens"] > 0


def test_an_adapter_is_its_own_reference(llama, tokenizer, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
    trainer = build(ExoDPOTrainer, (llama, None), tokenizer, tmp_path, trainer={"peft_config": lora}, **EXO)
    loss, gradient = loss_and_gradient(trainer)
    zeros = torch.zeros(1)
    assert loss == pytest.approx(losses.exo_pref_loss(zeros, zeros, zeros, zeros, **EXO).losses.item(), rel=1e-6)
    assert gradient.norm() > 0


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"label_smoothing must be in \(0, 1/2\)"),  # TRL's default, 0
        ({"label_smoothing": 0.7}, r"label_smoothing must be in \(0, 1/2\)"),
        ({"label_smoothing": 0.1, "beta": 0.0}, "beta must be a finite number above 0"),
        ({"label_smoothing": 0.1, "loss_type": ["ipo"]}, r"loss_type must be \['sigmoid'\].*got \['ipo'\]"),
        ({"label_smoothing": 0.1, "ld_alpha": 0.5}, "ld_alpha must be None"),
        ({"label_smoothing": 0.1, "use_weighting": True}, "use_weighting must be False"),
        ({"label_smoothing": 0.1, "f_divergence_type": "forward_kl"}, "f_divergence_type must be 'reverse_kl'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(llama, tokenizer, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        build(ExoDPOTrainer, (llama, llama), tokenizer, tmp_path, **given)


@pytest.mark.unchecked
def test_a_loss_of_another_form_is_refused(llama, tokenizer, tmp_path):
    for loss in (lambda *logps, **_: logps[0], lambda *logps, **_: (logps[0].mean(),) * 3):
        with pytest.raises(ValueError, match=r"loss must return three tensors \[B\]"):
            build(ExoDPOTrainer, (llama, llama), tokenizer, tmp_path, trainer={"loss": loss}, **EXO)
