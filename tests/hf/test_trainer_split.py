"""A step's gradient is that of the mean over its prompts, however the step is cut into batches."""

import copy

import pytest
import torch

from exo_toy import losses
from exo_toy.integrations.candidates import tokenize_row
from tests.hf.conftest import tiny_gpt2
from tests.hf.training import ON_PAIRS, PAIRS, ROWS, settings, trained, weights
from tests.tolerances import assert_close

# SGD, so that an error of the gradient is an error of the parameters of the same size: Adam would scale a gradient
# that is off by a factor back to the right length.
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "num_train_epochs": 2.0}


@pytest.fixture(scope="module")
def whole(llama64, tokenizer, tmp_path_factory):
    """Eight prompts a step in one batch: steps of eight and of three prompts, twice."""
    folder = tmp_path_factory.mktemp("whole")
    return trained(copy.deepcopy(llama64), tokenizer, folder, per_device_train_batch_size=8, **SGD)


@pytest.mark.parametrize(
    ("batch", "steps", "side"), [(4, 2, "right"), (2, 4, "left"), (1, 8, "right"), (8, 1, "left"), (3, 2, "right")]
)
def test_batches_accumulation_and_padding_change_nothing(llama64, tokenizer, tmp_path, whole, batch, steps, side):
    split = trained(
        copy.deepcopy(llama64),
        tokenizer,
        tmp_path,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
        padding_side=side,
        pad_to_multiple_of=8 if side == "left" else None,
        **SGD,
    )
    assert split.state.global_step == whole.state.global_step == 4
    moved = (weights(whole.model) - weights(llama64)).abs().max()
    assert moved > 1e-3
    same = batch * steps == 8
    if not same:
        assert not torch.allclose(weights(split.model), weights(whole.model), rtol=0, atol=1e-6)
        return
    # The float32 accumulator of the trainer's loss is all that is not float64.
    torch.testing.assert_close(weights(split.model), weights(whole.model), rtol=0, atol=1e-11)
    for one, other in zip(split.state.log_history[:-1], whole.state.log_history[:-1], strict=True):
        for name in one.keys() - {"loss", "epoch"}:
            assert one[name] == pytest.approx(other[name], rel=1e-9, abs=1e-11), name
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_pairs_split_alike(tokenizer, tmp_path):
    """With GPT-2: absolute positions, tied embeddings."""
    start = tiny_gpt2(len(tokenizer), dtype=torch.float64)
    vectors = [
        weights(trained(copy.deepcopy(start), tokenizer, tmp_path, rows=PAIRS, **split, **SGD, **ON_PAIRS).model)
        for split in (
            {"per_device_train_batch_size": 8},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "padding_side": "left"},
        )
    ]
    assert (vectors[0] - weights(start)).abs().max() > 1e-3
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=1e-11)


def test_a_hand_written_loop_gives_the_same_steps(llama64, tokenizer, tmp_path):
    """EXO-rw on two to five candidates: one candidate at a time, no padding, no batch, plain softmax."""
    trainer = trained(
        copy.deepcopy(llama64),
        tokenizer,
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        temperature=0.7,
        train_sampling_strategy="sequential",
        **{**SGD, "num_train_epochs": 1.0},
    )
    model, ref = copy.deepcopy(llama64), llama64
    rows = [tokenize_row(row, tokenizer) for row in ROWS]

    def logp(policy, prompt, completion):
        logits = policy(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        return (logits / 0.7).log_softmax(-1)[range(len(completion)), completion].sum()

    for start in range(0, len(rows), 4):
        step = rows[start : start + 4]
        model.zero_grad()
        for row in step:
            pairs = [(row.prompt_ids, ids) for ids in row.completion_ids]
            ratio = torch.stack([logp(model, *pair) - logp(ref, *pair).detach() for pair in pairs])
            p_f, p_r = (0.2 * ratio).softmax(0), (torch.tensor(row.rewards, dtype=torch.float64) / 0.5).softmax(0)
            ((p_f * (p_f.log() - p_r.log())).sum() / len(step)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
    torch.testing.assert_close(weights(trainer.model), weights(model), rtol=0, atol=1e-8)


def test_a_step_of_many_epochs_order_depends_on_seed_and_epoch_alone(llama, tokenizer, tmp_path):
    def order(batch, seed):
        trainer = CandidateTrainerOrder(llama, tokenizer, tmp_path, batch, seed)
        return [trainer.epoch(0), trainer.epoch(1)]

    assert order(4, 1) == order(3, 1)
    assert order(4, 1) != order(4, 2)
    first, second = order(4, 1)
    assert first != second and sorted(first) == sorted(second)


class CandidateTrainerOrder:
    """The prompts of an epoch, as the training loop would see them."""

    def __init__(self, llama, tokenizer, folder, batch, seed):
        from exo_toy.integrations.trainer import CandidateTrainer

        config = settings(folder, per_device_train_batch_size=batch, seed=seed)
        trainer = CandidateTrainer(copy.deepcopy(llama), config, ROWS, processing_class=tokenizer)
        self.loader = trainer.get_train_dataloader()

    def epoch(self, number):
        self.loader.set_epoch(number)
        return [tuple(row.tolist()) for batch in self.loader for row in batch["rewards"].sum(-1, keepdim=True)]


def test_the_losses_average_is_the_libraries(llama64, tokenizer, tmp_path):
    """The logged loss is the mean of exo_rw_loss over the prompts of the step."""
    seen = []

    def loss(log_ratio, rewards, mask):
        values = losses.exo_rw_loss(log_ratio, rewards, beta_pi=0.2, beta_r=0.5, mask=mask)
        seen.append(values.detach())
        return values

    trainer = trained(
        copy.deepcopy(llama64),
        tokenizer,
        tmp_path,
        trainer={"loss": loss},
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = [torch.cat(seen[:2]), torch.cat(seen[2:])]
    assert [len(step) for step in steps] == [6, 5]
    assert_close(torch.tensor(logged, dtype=torch.float32), [step.mean().item() for step in steps])
