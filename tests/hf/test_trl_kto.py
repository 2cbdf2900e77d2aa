"""KTO by name against TRL's KTOTrainer: loss, gradient, reference point and metrics of one batch."""

import copy

import datasets
import pytest
import torch
from trl import KTOConfig, KTOTrainer

from exo_toy.integrations.trainer import CandidateTrainer
from tests.hf.conftest import tiny_llama
from tests.hf.training import LABELS, settings

# A completion of each prompt, some wanted and some not.
SINGLE = [
    {"prompt": row["prompt"], "completions": row["completions"][:1], "rewards": [float(i % 3 == 0)]}
    for i, row in enumerate(LABELS)
]
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}


def loss_and_gradient(trainer):
    """Of all rows in one batch, dropout off."""
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def test_kto_is_that_of_trl(llama64, tokenizer, tmp_path):
    # Of this policy and this reference the reference point is above 0.
    policy, ref = tiny_llama(len(tokenizer), dtype=torch.float64, seed=1).eval(), llama64
    rows = [
        {"prompt": row["prompt"], "completion": row["completions"][0], "label": bool(row["rewards"][0])}
        for row in SINGLE
    ]
    common = dict(per_device_train_batch_size=len(rows), train_sampling_strategy="sequential")
    config = KTOConfig(
        str(tmp_path), beta=0.3, use_cpu=True, bf16=False, report_to="none", max_length=None, disable_tqdm=True,
        activation_checkpointing=False, **common, **WEIGHTS,
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    trl = KTOTrainer(copy.deepcopy(policy), copy.deepcopy(ref), config, train_dataset=data, processing_class=tokenizer)
    args = settings(tmp_path, loss="kto", beta=0.3, loss_kwargs=WEIGHTS, **common)
    mine = CandidateTrainer(copy.deepcopy(policy), args, SINGLE, None, tokenizer, copy.deepcopy(ref))
    (mine_loss, mine_gradient), (trl_loss, trl_gradient) = loss_and_gradient(mine), loss_and_gradient(trl)
    assert trl_gradient.norm() > 1e-3
    # TRL's log-probabilities are float32: 1e-5 of some near 60.
    assert mine_loss == pytest.approx(trl_loss, rel=1e-5)
    assert (mine_gradient - trl_gradient).norm() < 1e-4 * trl_gradient.norm()
    _, metrics = mine.prompt_losses(mine.model, mine._prepare_inputs(next(iter(mine.get_train_dataloader()))))
    (kl,) = trl._metrics["eval"]["kl"]
    assert kl > 0.1
    assert metrics["reference_point"][0].item() == pytest.approx(kl, rel=1e-5)
