"""What the pipeline's commands refuse, before a model is loaded and with nothing left behind; recipes and settings."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from exo_toy import cli
from exo_toy.integrations.lm import main, models
from exo_toy.integrations.lm.records import LmError
from exo_toy.integrations.lm.settings import parse, read_recipe
from tests.hf.conftest import tiny_gpt2
from tests.hf.lm_commands import ROW, SAMPLE, file, refused

RECIPES = sorted((Path(main.__file__).parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward_function", "nothing"], "must be MODULE:FUNCTION"),
        (["--reward_function", "no.such:thing"], "cannot be imported"),
        (["--reward_function", "tests.hf.lm_rewards:missing"], "cannot be imported"),
        (["--reward_function", "tests.hf.lm_rewards:later"], "must be a plain function"),
        (["--reward_function", "tests.hf.lm_rewards:too_few"], "one number per completion, 4; got 1"),
        (["--reward_function", "tests.hf.lm_rewards:not_finite"], "must return finite numbers (in float32); got nan"),
        ([], "exactly one of reward_model and reward_function"),
        (["--reward_function", "a:b", "--reward_model", "c"], "exactly one of reward_model and reward_function"),
        (["--reward_model", "./nowhere"], "reward_model: there is no folder ./nowhere"),
    ],
)
def test_bad_rewards(flags, message, tmp_path, capsys, unloadable):
    output = tmp_path / "out.json"
    own = ["--data", file(tmp_path, ROW, ROW), "--output", str(output)]
    assert message in refused(capsys, "score", *own, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_folder_without_a_model_and_a_classifier_of_three(tmp_path, tokenizer, capsys):
    data = file(tmp_path, ROW)
    out = ["--data", data, "--output", str(tmp_path / "out.json"), "--device", "cpu"]
    (tmp_path / "empty").mkdir()
    assert "must be a folder with one of config.json" in refused(
        capsys, "score", *out, "--reward_model", str(tmp_path / "empty")
    )
    from transformers import GPT2ForSequenceClassification

    three = GPT2ForSequenceClassification(tiny_gpt2(len(tokenizer), num_labels=3).config)
    three.save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    capsys.readouterr()  # the progress of saving
    assert cli.main(["lm", "score", *out, "--reward_model", str(tmp_path / "three")]) == 2
    assert "must have one output or two; it has 3" in capsys.readouterr().err


def test_models_that_lack_weights_or_are_broken(tmp_path, weights, capsys):
    """A model of another kind would be given a head of random numbers."""
    here = ["--data", file(tmp_path, ROW), "--device", "cpu"]
    message = refused(capsys, "score", *here, "--output", str(tmp_path / "out.json"), "--reward_model", weights)
    assert "must have all weights of GPT2ForSequenceClassification; it lacks 1, the first score.weight" in message
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(weights)
    part = {name: value for name, value in model.state_dict().items() if "h.1.mlp" not in name}
    model.save_pretrained(tmp_path / "part", state_dict=part)
    # Of a classifier that is to be trained the head alone may be new.
    for new_head, lacks, first in ((False, 5, "score.weight"), (True, 4, "transformer.h.1.mlp.c_fc.bias")):
        how = {"offline": True, "new_head": new_head, "num_labels": 1}
        with pytest.raises(LmError, match=f"it lacks {lacks}, the first {first}"):
            models.load(GPT2ForSequenceClassification, "x", str(tmp_path / "part"), **how)
    with (tmp_path / "part/model.safetensors").open("rb+") as opened:
        opened.truncate(1000)
    with pytest.raises(LmError, match=r"ref_model: .*part cannot be loaded: "):
        models.load(GPT2LMHeadModel, "ref_model", str(tmp_path / "part"), offline=True)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_devices_that_are_not_there(device, tmp_path, weights, capsys):
    own = ["--data", file(tmp_path, ROW), "--model_name_or_path", weights, "--output", str(tmp_path / "out.json")]
    assert cli.main(["lm", "sample", *own, *SAMPLE, "--device", device]) == 2
    assert "device" in capsys.readouterr().err
    assert not (tmp_path / "out.json.part").exists()


def test_outputs_below_a_file_are_refused_before_a_model_is_loaded(tmp_path, weights, capsys, unloadable):
    data = file(tmp_path, ROW)
    own = ["--data", data, "--model_name_or_path", weights]
    assert "must be a folder that one may write to" in refused(capsys, "sample", *own, "--output", f"{data}/x", *SAMPLE)
    train = ["--output_dir", data, "--beta_r", "1", "--beta_pi", "1", "--use_cpu", "--report_to", "none"]
    assert f"output_dir: {data} cannot be written to" in refused(capsys, "align", *own, *train)


@pytest.mark.parametrize("stage", ["sample", "score", "evaluate", "run"])
def test_several_processes_would_write_each_row_several_times(stage, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert f"{stage} runs in one process" in refused(capsys, stage)


def test_outputs_of_others_are_not_written_over(tmp_path, weights, capsys, unloadable):
    output = tmp_path / "mine.json"
    output.write_text("mine")
    own = ["--data", file(tmp_path, ROW), "--model_name_or_path", weights]
    assert "this command did not make it" in refused(capsys, "sample", *own, "--output", str(output), *SAMPLE)
    assert output.read_text() == "mine"
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    train = ["--output_dir", str(folder), "--beta_r", "1", "--beta_pi", "1", "--use_cpu", "--report_to", "none"]
    assert cli.main(["lm", "align", *own, *train]) == 2
    assert "holds files, and not of this command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "0"], "temperature must be a finite number above 0"),
        (["--num_candidates", "0"], "num_candidates must be an integer of at least 1"),
        (["--top_p", "1.5"], "top_p must be in (0, 1]"),
        (["--max_new_tokens", "x"], "invalid int value"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--temp", "1"], "no such setting: --temp 1"),
        (["--section", "x"], "--section and --var need --config"),
    ],
)
def test_bad_settings(flags, message, tmp_path, capsys, unloadable):
    own = ["--data", file(tmp_path, ROW), "--model_name_or_path", "x", "--output", str(tmp_path / "out.json")]
    assert message in refused(capsys, "sample", *own, *SAMPLE, *flags)


def test_prompts_need_room(tmp_path, weights, capsys, unloadable):
    own = ["--data", file(tmp_path, ROW, {"prompt": "the cat sat"}), "--model_name_or_path", weights]
    own += ["--output", str(tmp_path / "out.json"), "--temperature", "1", "--max_new_tokens", "255"]
    assert "in the 256 positions of model_name_or_path; got 255 after the 4 tokens of row 1" in refused(
        capsys, "sample", *own
    )


def test_needed_settings_are_named(capsys):
    assert "temperature" in refused(capsys, "sample", "--data", "x")


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("a: [", [], "is not YAML"),
        ("- 1", [], "must be a mapping of names; got list"),
        ("sample: 3", [], "sample must be a mapping of names; got int"),
        ("score: {}", [], "there is no section sample, only score"),
        ("score: {}", ["--section", "score"], "section score is of the stage score, not sample"),
        ("sample: {tempreature: 1}", [], "no such setting: tempreature"),
        ("sample: {data: '${where}'}", [], "${where} must be named under vars"),
        ("vars: {where: x}\nsample: {}", ["--var", "there=x"], "--var must be name=value with a name of ['where']"),
        ("sample: {temperature: [1, 2]}", [], "temperature must be one value; got [1, 2]"),
    ],
)
def test_bad_recipes(text, flags, message, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(text)
    assert message in refused(capsys, "sample", "--config", str(tmp_path / "recipe.yaml"), *flags)


def test_no_is_a_value_where_it_is_a_choice(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "align: {data: d, output_dir: o, save_strategy: no, bf16: no, use_cpu: yes, eval_strategy: 'no'}"
    )
    section = read_recipe(str(tmp_path / "recipe.yaml")).sections["align"]
    _, args, _ = parse(main.STAGES["align"][1], section, [], prog="x")
    assert (args.save_strategy, args.eval_strategy, args.bf16, args.use_cpu) == ("no", "no", False, True)


@pytest.mark.parametrize(
    ("section", "flags", "figures"),
    [
        ({}, [], True),
        ({}, ["--no_figures"], False),
        ({}, ["--figures", "False"], False),
        ({"figures": False}, [], False),
        ({"figures": False}, ["--figures"], True),
        ({"figures": True}, ["--no_figures"], False),
    ],
)
def test_switches(section, flags, figures):
    given = {"data": "d", "output": "o", "ref_model": "m", "models": ["n"], "temperature": 1, "max_new_tokens": 2}
    (parsed,) = parse(main.STAGES["evaluate"][1], {**given, "reward_function": "a:b", **section}, flags, prog="x")
    assert parsed.figures is figures


@pytest.mark.parametrize("stage", [*main.STAGES, "run"])
def test_help_names_the_recipe(stage, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["lm", stage, "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "--config FILE" in printed and "--var NAME=VALUE" in printed


def test_flags_win_over_the_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "vars: {k: 4}\n.draw: &draw {temperature: 0.5, max_new_tokens: 7}\n"
        "sample-test: {<<: *draw, data: d, model_name_or_path: m, output: o, num_candidates: '${k}', limit: null}\n"
    )
    recipe = read_recipe(str(tmp_path / "recipe.yaml"), ["k=5"])
    assert list(recipe.sections) == ["sample-test"] and recipe.stage("sample-test") == "sample"
    (made,) = parse(main.STAGES["sample"][1], recipe.sections["sample-test"], ["--temperature=0.8"], prog="x")
    assert (made.temperature, made.max_new_tokens, made.num_candidates, made.limit) == (0.8, 7, 5, None)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_have_known_settings_and_chained_files(path):
    recipe = read_recipe(str(path))
    assert {recipe.stage(section) for section in recipe.sections} == set(main.STAGES)
    made = {"weights/gpt2-large", "weights/pythia-2.8b", "weights/imdb-classifier"}
    inputs = ("model_name_or_path", "ref_model", "reward_model")
    for section, given in recipe.sections.items():
        parts = parse(main.STAGES[recipe.stage(section)][1], given, ["--bf16=False"] * ("bf16" in given), prog="x")
        for name in inputs:
            assert given.get(name, "weights/gpt2-large") in made, f"{section}: nothing makes {given[name]}"
        made |= {given.get("output_dir", given.get("output"))}
        if recipe.stage(section) == "align":
            assert parts[1].loss == "exo_rw" and parts[1].temperature == 0.8
            beta = parts[1].beta_r * parts[1].beta_pi
            assert recipe.sections["evaluate"]["beta"] == pytest.approx(beta)
            steps = parts[1].max_steps // parts[1].save_steps
            assert steps == (5 if path.stem == "tldr" else 10)
            assert parts[1].per_device_train_batch_size * parts[1].gradient_accumulation_steps in (64, 128)


def test_run_goes_through_the_sections_and_stops_where_one_fails(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text("vars: {x: 1}\nsample: {seed: '${x}'}\nscore-a: {}\nscore: {}\n")
    started = []

    def start(command):
        started.append(command[3:])
        return command

    monkeypatch.setattr(main.subprocess, "Popen", start)
    monkeypatch.setattr(main, "_exit_code", lambda command: 2 if "score-a" in command else 0)
    config = ["--config", str(tmp_path / "recipe.yaml")]
    assert cli.main(["lm", "run", *config, "--var", "x=2"]) == 2
    assert started == [
        ["lm", "sample", *config, "--section", "sample", "--var=x=2"],
        ["lm", "score", *config, "--section", "score-a", "--var=x=2"],
    ]
    capsys.readouterr()
    assert "run takes --config" in refused(capsys, "run")
    (tmp_path / "recipe.yaml").write_text("samples: {}\n")
    assert "section samples must begin with one of" in refused(capsys, "run", *config)


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else object())
    assert cli.main(["lm", "sample"]) == 2
    assert "`lm` needs trl" in capsys.readouterr().err


def test_the_command_line_loads_the_extra_only_when_it_is_used():
    code = "import sys; from exo_toy import cli; cli._parser(); print({'transformers', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


SECTION = "import time\ntry: print('up', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: pass"
WAITING = f"""
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background of a shell
from exo_toy.integrations.lm import main
main.GRACE = 0.5
sys.exit(main._exit_code(subprocess.Popen([sys.executable, "-c", {SECTION!r}])))
"""


@pytest.mark.parametrize("to_both", [True, False])
def test_an_interrupted_section_ends_in_its_own_time(to_both):
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as run:
        assert run.stdout.readline() == b"up\n"
        (os.killpg if to_both else os.kill)(run.pid, signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    assert (run.returncode, b"Traceback" in errors) == (130, False), errors
