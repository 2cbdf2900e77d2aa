"""Alignment by other losses than EXO and DPO, from files as they stand."""

import json

import pytest

from exo_toy import cli
from tests.hf.conftest import tiny_gpt2
from tests.hf.training import LABELS, PAIRS


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("weights")
    tiny_gpt2(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def align(folder, weights, rows, **flags):
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data": folder / "data.jsonl", "model_name_or_path": weights, "output_dir": folder / "out"}
    given |= {"use_cpu": True, "report_to": "none", "max_steps": 2, "disable_tqdm": True, "logging_steps": 1}
    return cli.main(
        ["lm", "align", *(str(word) for name, value in {**given, **flags}.items() for word in (f"--{name}", value))]
    )


@pytest.mark.parametrize(
    ("rows", "flags", "logged"),
    [
        (LABELS, {"loss": "kto", "beta": 0.1}, "reference_point"),
        (PAIRS, {"loss": "bco", "beta": 0.1}, "delta"),
        (PAIRS, {"loss": "simpo", "beta": 2.0, "loss_kwargs": '{"gamma": 1.0}'}, "rewards/margins"),
    ],
)
def test_other_losses_by_name(tmp_path, weights, rows, flags, logged):
    assert align(tmp_path, weights, rows, **flags) == 0
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert logged in history[0] and history[1]["grad_norm"] > 0


def test_one_completion_is_enough_for_labels_alone(tmp_path, weights, capsys):
    single = [{**row, "completions": row["completions"][:1], "rewards": row["rewards"][:1]} for row in LABELS]
    assert align(tmp_path, weights, [*single, {**single[0], "completions": [""]}], loss="kto", beta=0.1) == 0
    assert "1 completions without text and 1 rows with fewer than 1 left out" in capsys.readouterr().out
    assert align(tmp_path, weights, single, loss="exo_rw", beta_r=0.1, beta_pi=0.1, output_dir=tmp_path / "other") == 2
    assert "no row has two completions with text" in capsys.readouterr().err


def test_labels_are_checked_before_a_model_is_loaded(tmp_path, weights, capsys):
    rows = [LABELS[0], {**LABELS[1], "rewards": [0.5] * len(LABELS[1]["completions"])}]
    assert align(tmp_path, weights, rows, loss="kto", beta=0.1) == 2
    assert 'data.jsonl: row 1, column "rewards": must be 1 (desirable) or 0' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
