"""Files of the pipeline: what is read, refused by row and column, left out and counted, and written."""

import json
import re

import pytest

from exo_toy import cli
from exo_toy.integrations.lm import stages
from exo_toy.integrations.lm.data import for_reward, for_sft
from exo_toy.integrations.lm.records import Lines, LmError, read_rows
from tests.hf.lm_commands import ROW, SAMPLE, file, refused

CHAT = [{"role": "user", "content": "a"}]
ANSWERS = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
TRAINER = ["--model_name_or_path", "WEIGHTS", "--output_dir", "OUT", "--use_cpu", "--report_to", "none"]
TRAINER += ["--activation_checkpointing", "False"]  # whose default in TRL is named as it was once
DRAWS = ["--temperature", "1", "--max_new_tokens", "4", "--reward_function", "tests.hf.lm_rewards:length"]
# Of stages, flags beside their data.
OWN = {
    "score": ["--output", "OUT", "--reward_function", "tests.hf.lm_rewards:length"],
    "evaluate": ["--ref_model", "WEIGHTS", "--models", "WEIGHTS", "--output", "OUT", *DRAWS],
    "sft": TRAINER,
    "reward": TRAINER,
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no rows"),
        ("[]", "holds no rows"),
        ('{"prompt": "a"}\n\n{"prompt"', ":3: is not JSON"),
        ('[{"prompt": "a"},\n{"prompt" 1}]', ":2: is not JSON"),
        ('{"prompt": "a"}\n3', "row 1: must be an object; got int"),
        ('{"prompt": "a"}\n{"text": "b"}', "row 1, column \"prompt\": must be there; got columns ['text']"),
        ('{"prompt": ""}', "row 0"),
        ('{"prompt": 3}', 'column "prompt": must be a string or a list of messages'),
    ],
)
def test_bad_files_of_prompts(content, message, tmp_path, weights, capsys, unloadable):
    (tmp_path / "data.jsonl").write_text(content)
    output = tmp_path / "out" / "sampled.json"
    own = ["--data", str(tmp_path / "data.jsonl"), "--model_name_or_path", weights, "--output", str(output)]
    assert message in refused(capsys, "sample", *own, *SAMPLE)
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"prompt": "a", "completions": ["b", "c"]}, [], 'row 1, column "rewards": must be there'),
        ({**ROW, "rewards": [1.0]}, [], 'row 1, column "rewards": must be a list of one number per completion, 2'),
        ({**ROW, "rewards": [1.0, float("nan")]}, [], "rewards[1]"),
        ({**ROW, "completions": [["b"], "c"]}, [], "row 1"),
        (
            {**ROW, "rewards": [3e38, 1.0]},
            [],
            'row 1, column "rewards": must be at most 1.7e+38 in size with beta_r=1; got 3e+38',
        ),
        (
            {**ROW, "finished": [True]},
            [],
            'row 1, column "finished": must be a list of one truth value per completion, 2',
        ),
        ({**ROW, "finished": ["no", True]}, [], 'row 1, column "finished": must hold true or false for each'),
        (ROW, ["--loss", "exo_pref"], "beta must be given"),
        (ROW, ["--loss", "nothing"], "loss must be one of"),
        (ROW, ["--label_smoothing", "0.1"], "label_smoothing must be None"),
        (ROW, ["--beta_r", "-1"], "beta_r must be a finite number above 0"),
        (ROW, ["--num_candidates", "1"], "num_candidates must be an integer of at least 2"),
        (ROW, ["--load_in_4bit", "True"], "load_in_4bit must be False"),
        (ROW, ["--ref_model", "/no/where"], "ref_model: there is no folder /no/where"),
    ],
)
def test_bad_alignments(row, flags, message, tmp_path, weights, capsys, unloadable):
    given = {"--beta_r": "1", "--beta_pi": "1", "--model_name_or_path": weights, "--output_dir": str(tmp_path / "out")}
    given |= {"--data": file(tmp_path, ROW, row), "--use_cpu": "True", "--report_to": "none"}
    if "exo_pref" in flags:
        given["--data"] = file(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    given |= dict(zip(flags[::2], flags[1::2], strict=True))
    assert message in refused(capsys, "align", *(text for pair in given.items() for text in pair))
    assert not (tmp_path / "out").exists()


def test_a_bad_row_is_named_as_it_stands_in_the_file(tmp_path, weights, capsys, unloadable):
    """Also after rows that are left out."""
    rows = [{**ROW, "completions": ["", "x"]}, ROW, {**ROW, "completions": ["", "x", 3], "rewards": [0, 1, 2]}]
    own = ["--data", file(tmp_path, *rows), "--model_name_or_path", weights, "--output_dir", str(tmp_path / "out")]
    assert cli.main(["lm", "align", *own, "--beta_r", "1", "--beta_pi", "1", "--use_cpu", "--report_to", "none"]) == 2
    said = capsys.readouterr()
    assert "2 completions without text and 1 rows with fewer than 2 left out" in said.out
    assert 'data.jsonl: row 2, column "completions[1]": must be a string, as the prompt is; got 3' in said.err


@pytest.mark.parametrize(
    ("stage", "row", "message"),
    [
        ("score", {"prompt": "a", "completions": ["b", 3]}, 'column "completions[1]": must be a string'),
        ("score", {"prompt": "a", "completions": ["b", None]}, 'column "completions[1]": must be a string'),
        ("score", {"prompt": 7, "completions": ["b", "c"]}, 'column "prompt": must be a string or a list of messages'),
        ("score", {"prompt": CHAT, "completions": ["b", "c"]}, 'column "completions[0]": must be a list of messages'),
        ("evaluate", {"prompt": "a", "chosen": 3}, 'column "chosen": must be a string, as the prompt is; got 3'),
        ("sft", {"prompt": "a", "chosen": 3}, 'column "chosen": must be a string, as the prompt is; got 3'),
        ("reward", {"prompt": "a", "chosen": "b", "rejected": CHAT}, 'column "rejected": must be a string'),
    ],
)
def test_texts_that_are_none(stage, row, message, tmp_path, weights, capsys, unloadable):
    good = {"prompt": "a", "chosen": "b", "rejected": "c", "completions": ["b", "c"]}
    own = ["--data", file(tmp_path, good, row), *OWN[stage]]
    paths = {"WEIGHTS": weights, "OUT": str(tmp_path / "out")}
    assert f"data.jsonl: row 1, {message}" in refused(capsys, stage, *(paths.get(word, word) for word in own))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"text": 3}], 'row 1, column "text": must be a string; got 3'),
        ([{"messages": CHAT}, {"messages": "a"}], 'row 1, column "messages": must be a list of messages'),
        ([{"text": "a"}, {"texts": "a"}], 'row 1, column "text": must be there'),
        ([{"foo": "a"}], "row 0: must have the columns prompt and chosen, prompt and completion, text, or messages"),
        ([{"prompt": "a", "chosen": ""}], "no row is left"),
    ],
)
def test_bad_files_of_whole_texts(rows, message, tmp_path, weights):
    with pytest.raises(LmError, match=re.escape(f"data.jsonl: {message}")):
        for_sft("train_dataset", file(tmp_path, *rows))


def test_rows_that_teach_a_trainer_of_trl_s_nothing_are_left_out_and_counted(tmp_path, capsys):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = file(tmp_path, pair, {**pair, "rejected": ""}, {**pair, "chosen": "c"}, {"prompt": CHAT, **ANSWERS})
    assert for_reward("train_dataset", file(tmp_path, pair, name="one.jsonl")).to_list() == [pair]
    assert capsys.readouterr().out == ""
    # Texts and chats are no columns of one dataset, with TRL as here.
    with pytest.raises(LmError, match="must be of one kind"):
        for_reward("train_dataset", path)
    path = file(tmp_path, pair, {**pair, "rejected": ""}, {**pair, "chosen": "c"})
    assert for_reward("train_dataset", path).to_list() == [pair]
    assert "train_dataset: 2 of 3 rows left out: no text, or chosen and rejected the same" in capsys.readouterr().out
    path = file(tmp_path, pair, {**pair, "chosen": ""})
    assert for_sft("train_dataset", path).to_list() == [{"prompt": "a", "completion": "b"}]
    assert "train_dataset: 1 of 2 rows left out: no text" in capsys.readouterr().out


def test_rows_are_read_from_lists_and_lines(tmp_path):
    rows = [{"prompt": "a\u2028b"}, {"prompt": "ü"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2), encoding="utf-8-sig")
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_rows(tmp_path / "list.json") == read_rows(tmp_path / "lines.json") == rows
    assert read_rows(tmp_path / "lines.json", limit=1) == rows[:1]


@pytest.mark.parametrize(("done", "wanted"), [(0, [(0, 4), (4, 8), (8, 9)]), (6, [(6, 8), (8, 9)]), (9, [])])
def test_batches_end_where_they_would_without_an_interruption(done, wanted, capsys):
    assert list(stages.batches("x", done, 9, 4)) == wanted


def test_lines_are_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "out.json"
    lines = Lines(path, {"seed": 0})
    lines.append([{"n": 0}, {"n": 1}])
    lines.append([{"n": 2}, {"n": 3}])
    with lines.part.open("a") as file:
        file.write('{"n": 4}\n{"n"')
    again = Lines(path, {"seed": 0})
    assert again.done == 5 and not again.complete
    with pytest.raises(LmError, match="seed was 0 and is now 1"):
        Lines(path, {"seed": 1})
    with pytest.raises(LmError, match="rows 5 to 6 is not finite"):
        again.append([{"n": float("nan")}])
    again.append([{"n": 5}])
    assert again.finish(lambda row: row if row["n"] != 1 else None) == 5
    assert read_rows(path) == [{"n": 0}, {"n": 2}, {"n": 3}, {"n": 4}, {"n": 5}]
    assert Lines(path, {"seed": 0}).complete
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["out.json", "out.json.settings.json"]
