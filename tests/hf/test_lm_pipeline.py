"""The pipeline's commands from start to end, on a recipe with another model and other files; and gone on with."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from exo_toy import audit, cli
from exo_toy.integrations import sampling
from exo_toy.integrations.config import CandidateConfig
from exo_toy.integrations.lm import evaluation, generation, main, stages
from exo_toy.integrations.lm.data import for_alignment
from exo_toy.integrations.rows import tokenize_dataset
from tests.hf.conftest import tiny_gpt2
from tests.hf.lm_commands import SMALL, Home, rows_of, write_pairs

RECIPE = Path(main.__file__).parent / "recipes/tldr.yaml"


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer):
    """The recipe for TL;DR, run section by section."""
    path = tmp_path_factory.mktemp("lm")
    tiny_gpt2(len(tokenizer)).save_pretrained(path / "weights")
    tokenizer.save_pretrained(path / "weights")
    write_pairs(path / "data/tldr/train.json", 10, seed=0)
    write_pairs(path / "data/tldr/test.json", 6, seed=1)
    write_pairs(path / "data/tldr_filtered/train.json", 10, seed=2)
    made = Home(path, RECIPE)
    made.run_all()
    return made


def test_stages_write_the_official_formats(home):
    sampled, scored = (rows_of(home.path / f"data/tldr_{name}/train.json") for name in ("sft", "rw"))
    prompts = [row["prompt"] for row in rows_of(home.path / "data/tldr/train.json")]
    assert [row["prompt"] for row in sampled] == prompts
    assert all(row.keys() == {"prompt", "completions", "finished"} and len(row["completions"]) == 2 for row in sampled)
    assert [{**row, "rewards": given["rewards"]} for row, given in zip(sampled, scored, strict=True)] == scored
    assert all(len(row["rewards"]) == 2 for row in scored)
    assert len({number for row in scored for number in row["rewards"]}) > 10
    assert not list(home.path.rglob("*.part")) and not list(home.path.rglob(".*.json.*"))


def test_alignment_starts_from_the_fine_tuned_model_and_leaves_checkpoints(home):
    runs = home.path / "runs"
    assert sorted(path.name for path in (runs / "exo_rw").glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in (2, 3)
    ]
    history = json.loads((runs / "exo_rw/trainer_state.json").read_text())["log_history"]
    assert json.loads((runs / "exo_rw/exo_toy.json").read_text())["complete"] is True
    assert history[-1]["train_loss"] > 0


def test_evaluation_measures_what_its_samples_say(home):
    folder = home.path / "runs/evaluation"
    summary = json.loads((folder / "summary.json").read_text())
    names = [entry["name"] for entry in summary["policies"]]
    assert names == ["reference", "checkpoint-2", "checkpoint-3"]
    reference = rows_of(folder / "reference/samples.jsonl")
    for entry in summary["policies"]:
        rows = rows_of(folder / entry["name"] / "samples.jsonl")
        assert len(rows) == summary["prompts"] == 6
        mean = sum(number for row in rows for number in row["rewards"]) / 18
        assert entry["reward"]["mean"] == pytest.approx(mean)
        assert entry["reward"]["low"] <= mean <= entry["reward"]["high"]
        against = [
            (mine > row["chosen_reward"]) + 0.5 * (mine == row["chosen_reward"])
            for own, row in zip(rows, reference, strict=True)
            for mine in own["rewards"]
        ]
        assert entry["win_rate_chosen"]["mean"] == pytest.approx(sum(against) / 18)
        if entry["name"] == "reference":
            assert "kl" not in entry
            continue
        k1 = [p - r for row in rows for p, r in zip(row["policy_logps"], row["ref_logps"], strict=True)]
        assert entry["kl"]["mean"] == pytest.approx(sum(k1) / 18)
        wins = [
            (mine > other) + 0.5 * (mine == other)
            for own, row in zip(rows, reference, strict=True)
            for mine in own["rewards"]
            for other in row["rewards"]
        ]
        assert entry["win_rate_reference"]["mean"] == pytest.approx(sum(wins) / 54)
    assert all((folder / f"frontier.{kind}").stat().st_size > 1000 for kind in ("pdf", "png"))
    assert (folder / "checkpoint-3/density_ratio.png").stat().st_size > 1000


def test_log_probabilities_of_the_samples_are_those_of_the_models(home, tokenizer):
    from transformers import AutoModelForCausalLM

    runs = home.path / "runs"
    row = rows_of(runs / "evaluation/reference/samples.jsonl")[0]
    candidates = rows_of(runs / "evaluation/checkpoint-3/candidates.jsonl")[0]
    prompt = tokenizer(row["prompt"])["input_ids"]
    for name, column in (("sft", "ref_logps"), ("exo_rw/checkpoint-3", "policy_logps")):
        model = AutoModelForCausalLM.from_pretrained(runs / name).eval()
        for tokens, found in zip(row["completion_ids"], candidates[column], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
            logps = (logits / 0.8).log_softmax(-1)[range(len(tokens)), tokens]
            assert found == pytest.approx(logps.sum().item(), abs=1e-4)
    assert candidates["policy_logps"] != candidates["ref_logps"]


def test_an_audit_reads_the_candidates(home):
    with (home.path / "runs/evaluation/checkpoint-3/candidates.jsonl").open("rb") as file:
        records = list(audit.read(file))
    assert len(records) == 6 and all(isinstance(record, audit.Record) for record in records)
    assert all(len(record.policy_logps) == 3 for record in records)


@pytest.mark.parametrize("section", ["sft", "reward", "sample", "score", "align", "evaluate"])
def test_what_is_complete_is_left_alone(home, section, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for module in (stages, evaluation):
        monkeypatch.setattr(module, "load_policy", refuse)
        monkeypatch.setattr(module, "scorer", refuse)
    monkeypatch.setattr(stages, "_trainable", refuse)
    assert home.run(section, *(["--no_figures"] if section == "evaluate" else [])) == 0
    assert ("nothing to do" in capsys.readouterr().out) == (section != "evaluate")


@pytest.mark.parametrize(
    ("section", "flags", "message"),
    [
        ("sample", ["--temperature", "0.7"], "temperature was 0.8 and is now 0.7"),
        ("align", ["--beta_r", "0.4"], "beta_r was 0.5 and is now 0.4"),
        ("align", ["--padding_side", "left"], "padding_side was not given and is now 'left'"),
        ("evaluate", ["--num_samples", "2"], "num_samples was 3 and is now 2"),
        ("score", ["--data", "DATA/tldr/other.json"], "data was"),
    ],
)
def test_results_of_other_settings_are_not_mixed(home, section, flags, message, capsys):
    other = home.path / "data/tldr/other.json"
    other.write_text(json.dumps([{"prompt": "a", "completions": ["b", "c"]}]))
    flags = [flag.replace("DATA", str(home.path / "data")) for flag in flags]
    assert home.run(section, *flags) == 2
    assert message in capsys.readouterr().err


def interrupted(monkeypatch, module, name, calls):
    """The method raises at this call, as Ctrl-C would."""
    original, seen = getattr(module, name), []

    def method(*args, **kwargs):
        seen.append(1)
        if len(seen) == calls:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, method)
    return seen


def test_an_interrupted_sampling_ends_as_an_uninterrupted_one(home, monkeypatch, capsys):
    whole = home.path / "data/tldr_sft/train.json"
    cut = home.path / "cut/train.json"
    with monkeypatch.context() as context:
        interrupted(context, generation.Prompts, "draw", 3)
        assert home.run("sample", "--output", str(cut)) == 130
    assert "goes on from there" in capsys.readouterr().err
    part = cut.with_name("train.json.part")
    assert not cut.exists() and len(part.read_text().splitlines()) == 1 + 8
    # A crash in the middle of a line, and of a batch.
    content = part.read_bytes()
    part.write_bytes(content[: content.rindex(b"completions")])
    with monkeypatch.context() as context:
        seen = interrupted(context, generation.Prompts, "draw", 99)
        assert home.run("sample", "--output", str(cut)) == 0
    assert len(seen) == 2  # what is left of the second batch, and the third
    assert cut.read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_the_batch_size_of_a_sampling_does_not_matter(home, capsys):
    whole, other = home.path / "data/tldr_sft/train.json", home.path / "other/train.json"
    assert home.run("sample", "--output", str(other), "--batch_size", "3") == 0
    assert other.read_bytes() == whole.read_bytes()
    assert home.run("sample", "--batch_size", "3") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_reference_and_the_policies_draw_independently(home):
    """The same policy as its own reference draws other completions, so that its win rate is not of equal noise."""
    out = home.path / "runs/itself"
    model = str(home.path / "runs/sft")
    assert home.run("evaluate", "--models", model, "--output", str(out), "--no_figures") == 0
    reference, own = (rows_of(out / name / "samples.jsonl") for name in ("reference", "sft"))
    for one, other in zip(reference, own, strict=True):
        assert one["completion_ids"] != other["completion_ids"]
    assert json.loads((out / "summary.json").read_text())["policies"][1]["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert not list(out.rglob("*.png"))


def test_reward_functions_get_the_columns_of_the_data(home, tmp_path, monkeypatch, capsys):
    data, out, home_of_function = tmp_path / "data.jsonl", tmp_path / "out", tmp_path / "judges.py"
    rows = [{"prompt": "the film", "finished": "A", "prompts": 3}, {"prompt": "the cat", "rewards": "B"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    home_of_function.write_text(
        "def judge(prompts, completions, finished, rewards):\n"
        "    assert all(type(prompt) is str for prompt in prompts)\n"
        "    return [float(one == 'A') + 2.0 * (other == 'B') for one, other in zip(finished, rewards)]\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = ["--ref_model", str(home.path / "runs/sft"), "--models", str(home.path / "runs/exo_rw"), "--no_figures"]
    flags += ["--data", str(data), "--output", str(out), "--reward_function", "judges:judge", "--temperature", "1"]
    assert cli.main(["lm", "evaluate", *flags, *SMALL["evaluate"]]) == 0
    assert [row["rewards"] for row in rows_of(out / "exo_rw/samples.jsonl")] == [[1.0] * 3, [2.0] * 3]
    home_of_function.write_text("def judge(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    assert cli.main(["lm", "evaluate", *flags, *SMALL["evaluate"]]) == 2
    assert "content of rewards has changed; remove it" in capsys.readouterr().err


def test_an_interrupted_scoring_ends_as_an_uninterrupted_one(home, monkeypatch, capsys):
    whole, cut = home.path / "data/tldr_rw/train.json", home.path / "cut/rewards.json"
    flags = ["--output", str(cut), "--reward_batch_size", "4"]
    with monkeypatch.context() as context:
        interrupted(context, stages.Lines, "append", 3)
        assert home.run("score", *flags) == 130
    assert not cut.exists()
    assert home.run("score", *flags) == 0
    rewards = [[row["rewards"] for row in rows_of(path)] for path in (whole, cut)]
    torch.testing.assert_close(torch.tensor(rewards[0]), torch.tensor(rewards[1]), rtol=0, atol=1e-5)


def test_an_interrupted_alignment_goes_on_from_its_checkpoint(home, monkeypatch, capsys):
    out = home.path / "runs/cut"
    with monkeypatch.context() as context:
        interrupted(context, stages.CandidateTrainer, "compute_loss", 3)
        assert home.run("align", "--output_dir", str(out)) == 130
    assert json.loads((out / "exo_toy.json").read_text())["complete"] is False
    with monkeypatch.context() as context:
        seen = interrupted(context, stages.CandidateTrainer, "compute_loss", 99)
        assert home.run("align", "--output_dir", str(out)) == 0
    assert len(seen) == 1
    # And from the one before where an interruption left it half-written, as it does without the trainer's state.
    (out / "exo_toy.json").write_text((out / "exo_toy.json").read_text().replace("true", "false", 1))
    (out / "checkpoint-3/trainer_state.json").write_text('{"epoch": 0.')
    with monkeypatch.context() as context:
        seen = interrupted(context, stages.CandidateTrainer, "compute_loss", 99)
        assert home.run("align", "--output_dir", str(out)) == 0
    assert len(seen) == 1
    from safetensors.torch import load_file

    both = [load_file(home.path / f"runs/{name}/model.safetensors") for name in ("exo_rw", "cut")]
    assert all(torch.equal(weights, both[1][name]) for name, weights in both[0].items())


def test_candidates_without_text_are_left_out_and_counted(home, capsys):
    data = home.path / "data/empty.json"
    rows = rows_of(home.path / "data/tldr_rw/train.json")
    for row in rows:
        row["completions"], row["rewards"] = [*row["completions"], "x", ""], [*row["rewards"], 0.0, 1.0]
        row["finished"] += [False, True]
    data.write_text(json.dumps(rows))
    out = ["--output_dir", str(home.path / "runs/empty"), "--max_steps", "1", "--save_strategy", "no"]
    assert home.run("align", "--data", str(data), *out) == 0
    assert "10 completions without text and 0 rows" in capsys.readouterr().out


def test_pairs_of_the_best_and_the_worst(home):
    out = home.path / "pairs.jsonl"
    data = home.path / "data/tldr_sft/train.json"
    flags = ["--data", str(data), "--output", str(out), "--reward_function", "tests.hf.lm_rewards:length", "--pairs"]
    assert cli.main(["lm", "score", *flags]) == 0
    for row in rows_of(out):
        assert row.keys() == {"prompt", "chosen", "rejected", "finished"}
        assert len(row["chosen"]) > len(row["rejected"])


def test_a_sample_that_was_cut_is_not_taught_to_end(home, tokenizer, tmp_path, monkeypatch, capsys):
    """From the draws to what the trainer reads, as candidates and as pairs."""
    end = tokenizer.eos_token_id

    def draw(self, policy, start, stop, *, count, **_):
        words = [tokenizer(word)["input_ids"] for word in (" good", " bad bad")]
        return [[[*words[0], end], words[1]] if place % 2 else [words[0], words[1]] for place in range(start, stop)]

    sampled, scored, pairs = (tmp_path / f"{name}.jsonl" for name in ("sampled", "scored", "pairs"))
    with monkeypatch.context() as context:
        context.setattr(generation.Prompts, "draw", draw)
        assert home.run("sample", "--output", str(sampled)) == 0
    assert [row["finished"] for row in rows_of(sampled)] == [[False, False], [True, False]] * 5
    assert all(row["completions"] == [" good", " bad bad"] for row in rows_of(sampled))
    by_end = ["--data", str(sampled), "--reward_function", "tests.hf.lm_rewards:shorter_and_ended"]
    assert cli.main(["lm", "score", *by_end, "--output", str(scored)]) == 0
    assert cli.main(["lm", "score", *by_end, "--output", str(pairs), "--pairs"]) == 0
    assert [row["rewards"] for row in rows_of(scored)] == [[-5.0, -8.0], [95.0, -8.0]] * 5
    for path, settings in ((scored, {"beta_r": 1.0, "beta_pi": 1.0}), (pairs, {"loss": "dpo", "beta": 1.0})):
        args = CandidateConfig(str(tmp_path), **settings, use_cpu=True, report_to="none")
        rows = for_alignment("x", str(path), args, tokenizer)
        for place, row in enumerate(tokenize_dataset("x", rows, tokenizer)):
            assert [ids[-1] == end for ids in row["completion_ids"]] == [place % 2 == 1, False]


def test_chats_are_sampled_and_scored_as_chats(home):
    data, sampled, scored = (home.path / f"chat{name}.jsonl" for name in ("", "-sampled", "-scored"))
    chats = [{"prompt": [{"role": "user", "content": content}]} for content in ("the film", "the cat sat")]
    data.write_text("".join(json.dumps(row) + "\n" for row in chats))
    assert home.run("sample", "--data", str(data), "--output", str(sampled)) == 0
    for row in rows_of(sampled):
        assert all(completion[0]["role"] == "assistant" for completion in row["completions"])
    assert home.run("score", "--data", str(sampled), "--output", str(scored)) == 0
    assert all(len(row["rewards"]) == 2 for row in rows_of(scored))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft, of GPT-2's layers
def test_adapters_are_merged_but_for_those_of_the_alignment(home, capsys):
    """So that every stage starts from a whole model, and the adapter is one to the reference."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    runs = home.path / "runs/lora"
    lora = ["--use_peft", "--learning_rate", "0.1", "--save_steps", "2"]
    for stage in ("sft", "reward", "align"):
        start = ["--model_name_or_path", str(runs / "sft")] if stage == "align" else []
        assert home.run(stage, *lora, *start, "--output_dir", str(runs / stage)) == 0
        assert (runs / stage / "adapter_config.json").exists() == (stage == "align")
    data = ["--data", str(home.path / "data/tldr_sft/train.json"), "--output", str(runs / "scored.json")]
    assert home.run("score", *data, "--reward_model", str(runs / "reward")) == 0
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(home.path / "weights", num_labels=1)
    adapted = PeftModel.from_pretrained(base, runs / "reward/checkpoint-2")
    adapted.config.pad_token_id = 0
    rows = rows_of(runs / "scored.json")
    texts = {"prompts": [row["prompt"] for row in rows], "completions": [row["completions"][0] for row in rows]}
    wanted = sampling.reward_model(adapted, AutoTokenizer.from_pretrained(home.path / "weights"))(**texts)
    assert [row["rewards"][0] for row in rows] == pytest.approx(wanted, abs=1e-4)
    out = ["--ref_model", str(runs / "sft"), "--models", str(runs / "align"), "--output", str(runs / "evaluation")]
    judge = ["--reward_model", str(runs / "reward"), "--no_figures"]
    assert home.run("evaluate", *out, *judge) == 0
    measured = json.loads((runs / "evaluation/summary.json").read_text())["policies"][1]
    assert measured["kl"]["mean"] != 0
    capsys.readouterr()
    assert home.run("align", "--model_name_or_path", str(runs / "align"), "--output_dir", str(runs / "on")) == 2
    assert "must be a whole model, not an adapter" in capsys.readouterr().err
