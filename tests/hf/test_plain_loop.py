"""The trainer and the plain loop of the README, run as they stand."""

import copy
import json
import re
from pathlib import Path

import torch

from exo_toy import losses
from exo_toy.integrations.candidates import CandidateCollator, tokenize_row
from exo_toy.integrations.scoring import completion_logps, scatter
from tests.hf.training import ROWS, trained, weights

README = Path(__file__).parents[2] / "README.md"
# Blocks that need the extra hf are marked py, others python.
TRAINER, LOOP = re.findall(r"^```py\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def run(llama, tokenizer, folder, monkeypatch, block=LOOP):
    """A block's variables, after a training in a folder that holds what it reads."""
    llama.save_pretrained(folder / "sft")
    tokenizer.save_pretrained(folder / "sft")
    (folder / "candidates.json").write_text(json.dumps(ROWS), encoding="utf-8")
    monkeypatch.chdir(folder)
    space = {}
    exec(compile(block, "README.md", "exec"), space)
    return space


def test_it_has_at_most_thirty_lines():
    assert len(LOOP.splitlines()) <= 30


def test_it_is_the_trainer_s_training(llama, tokenizer, tmp_path, monkeypatch):
    policy = run(llama, tokenizer, tmp_path, monkeypatch)["policy"]
    trainer = trained(
        copy.deepcopy(llama), tokenizer, tmp_path, train_sampling_strategy="sequential", lr_scheduler_type="constant",
    )  # fmt: skip
    assert not torch.equal(weights(policy), weights(llama))
    # float32; three steps of Adam move a weight by 3e-3, and by less where rounding turns a gradient near 0.
    torch.testing.assert_close(weights(policy), weights(trainer.model), rtol=0, atol=1e-5)


def test_it_lowers_the_loss(llama, tokenizer, tmp_path, monkeypatch):
    space = run(llama, tokenizer, tmp_path, monkeypatch)
    batch = CandidateCollator(tokenizer.pad_token_id)([tokenize_row(row, tokenizer) for row in ROWS])
    tokens = [batch[name] for name in ("input_ids", "attention_mask", "completion_mask")]
    tables = [
        scatter(completion_logps(model, *tokens), batch["candidate_rows"], batch["candidate_mask"])
        for model in (llama, space["policy"])
    ]
    values = [
        losses.exo_rw_loss(
            table - tables[0], batch["rewards"], beta_pi=0.2, beta_r=0.5, mask=batch["candidate_mask"]
        ).mean()
        for table in tables
    ]
    assert values[1] < 0.9 * values[0]


def test_the_trainer_of_the_readme(llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run(llama, tokenizer, tmp_path, monkeypatch, TRAINER)
    assert (tmp_path / "aligned").is_dir()
