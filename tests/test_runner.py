"""The runner and its files: what is finished is never done again, what is half done never counts."""

import dataclasses
import json
import math
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import exo_toy
from analysis import runner, storage


def square_and_log(x: float, log: str) -> float:
    """A case that leaves a line in a log each time it is really evaluated; interrupted where the log says so."""
    if (stop := Path(f"{log}.stop")).exists() and x == float(stop.read_text()):
        raise KeyboardInterrupt
    with Path(log).open("a") as file:
        file.write(f"{x}\n")
    return x * x


def evaluated(log: Path) -> list[float]:
    return sorted(float(line) for line in log.read_text().split()) if log.exists() else []


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(runner, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "log"


def cases(log: Path, values: range) -> list[dict]:
    return [{"x": float(x), "log": str(log)} for x in values]


def test_outside_a_session_nothing_is_kept(cache, log):
    for _ in range(2):
        assert runner.map_cases(square_and_log, cases(log, range(3))) == [0.0, 1.0, 4.0]
    assert evaluated(log) == [0, 0, 1, 1, 2, 2]
    assert not cache.exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_values_come_in_the_order_of_the_cases(cache, log, jobs):
    with runner.session("s", jobs=jobs):
        assert runner.map_cases(square_and_log, cases(log, range(7, 0, -1))) == [49, 36, 25, 16, 9, 4, 1]


def interrupt(log: Path) -> None:
    """A session that is interrupted at its third case."""
    stop = Path(f"{log}.stop")
    stop.write_text("3")
    with pytest.raises(KeyboardInterrupt), runner.session("s", jobs=1):
        runner.map_cases(square_and_log, cases(log, range(1, 6)))
    stop.unlink()


def test_an_interrupted_session_resumes(cache, log):
    interrupt(log)
    assert evaluated(log) == [1, 2]
    with runner.session("s", jobs=1) as current:
        assert runner.map_cases(square_and_log, cases(log, range(1, 6))) == [1, 4, 9, 16, 25]
    assert evaluated(log) == [1, 2, 3, 4, 5]
    assert (current.cases, current.resumed) == (5, 2)


def test_a_finished_session_leaves_nothing_to_reuse(cache, log):
    for _ in range(2):
        with runner.session("s", jobs=1) as current:
            runner.map_cases(square_and_log, cases(log, range(2)))
        assert current.resumed == 0
    assert evaluated(log) == [0, 0, 1, 1]
    assert not (cache / "s").exists()


def test_another_label_keeps_its_cases(cache, log):
    interrupt(log)
    with runner.session("other", jobs=1):
        runner.map_cases(square_and_log, cases(log, range(1, 3)))
    assert evaluated(log) == [1, 1, 2, 2]
    assert len(list((cache / "s").iterdir())) == 2


def test_changed_sources_reuse_nothing(cache, log, monkeypatch):
    interrupt(log)
    monkeypatch.setattr(runner, "fingerprint", lambda function: "changed")
    with runner.session("s", jobs=1) as current:
        runner.map_cases(square_and_log, cases(log, range(1, 6)))
    assert current.resumed == 0


def test_fingerprint_follows_library_experiments_versions_and_own_module(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    for name in ("exo_toy/losses/a.py", "analysis/b.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x = 1\n")
    monkeypatch.setattr(storage, "ROOT", root)
    monkeypatch.setattr(exo_toy, "__file__", str(root / "exo_toy" / "__init__.py"))
    seen = [runner.fingerprint(square_and_log)]
    assert runner.fingerprint(square_and_log) == seen[0]
    for name in ("exo_toy/losses/a.py", "analysis/b.py"):
        (root / name).write_text("x = 2\n")
        seen.append(runner.fingerprint(square_and_log))
    monkeypatch.setattr(storage, "versions", lambda: {"torch": "another"})
    seen.append(runner.fingerprint(square_and_log))
    own = tmp_path / "own.py"
    own.write_text("def case():\n    return 1\n")
    module = types.ModuleType("own")
    exec(compile(own.read_text(), str(own), "exec"), module.__dict__)
    seen.append(runner.fingerprint(module.case))
    own.write_text("def case():\n    return 2\n")
    seen.append(runner.fingerprint(module.case))
    assert len(set(seen)) == len(seen)


def test_case_key_tells_functions_and_arguments_apart():
    keys = {
        runner.case_key(square_and_log, {"x": 1.0}, "s"),
        runner.case_key(square_and_log, {"x": 1.0 + 2**-52}, "s"),
        runner.case_key(square_and_log, {"x": math.inf}, "s"),
        runner.case_key(evaluated, {"x": 1.0}, "s"),
        runner.case_key(square_and_log, {"x": 1.0}, "t"),
    }
    assert len(keys) == 5


def test_case_key_refuses_nested_functions():
    with pytest.raises(ValueError, match="top of its module"):
        runner.case_key(lambda: 0, {}, "s")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def half(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_atomically(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_case_whose_write_fails_does_not_count(cache, log, monkeypatch):
    def half(value, file):
        file.write(b"\x80")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(runner.pickle, "dump", half)
        with pytest.raises(OSError, match="disk full"), runner.session("s", jobs=1):
            runner.map_cases(square_and_log, cases(log, range(1)))
    with runner.session("s", jobs=1) as current:
        assert runner.map_cases(square_and_log, cases(log, range(1))) == [0.0]
    assert current.resumed == 0


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of every type that the command line reads."""

    seed: int = 3
    beta: float = 0.5
    name: str = "exact"
    sampled: bool = False
    ks: tuple[int, ...] = (2, 8)


NUMBERS = {
    "a": np.float64(0.1),
    "nested": {"nan": math.nan, "infinite": [math.inf, -math.inf], "text": "x", "none": None, "yes": True},
}


def test_store_and_load_give_back_what_was_stored(tmp_path):
    arrays = {"x": np.array([[0.1, math.nan]]), "n": np.arange(3), "t": np.array(["a", "bc"])}
    path = storage.store("name", "full", Config(), NUMBERS, arrays, run={"wall_seconds": 1.5}, folder=tmp_path)
    text = path.read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    stored = storage.load("name", "full", tmp_path)
    assert stored.number("a") == 0.1
    assert math.isnan(stored.number("nested.nan"))
    assert stored.number("nested.infinite") == [math.inf, -math.inf]
    assert stored.config == {"seed": 3, "beta": 0.5, "name": "exact", "sampled": False, "ks": [2, 8]}
    assert stored.provenance["wall_seconds"] == 1.5
    assert stored.provenance["torch"].startswith("2.")
    assert set(stored.arrays) == set(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(stored.arrays[key], array)
        assert stored.arrays[key].dtype == array.dtype
    with pytest.raises(storage.ResultsError, match=r"no number 'nested\.absent'"):
        stored.number("nested.absent")


def test_other_presets_lie_apart(tmp_path):
    path = storage.store("name", "quick", Config(), {"a": 1}, {}, folder=tmp_path)
    assert path == tmp_path / "quick" / "name.json"
    with pytest.raises(storage.ResultsError, match="no stored results"):
        storage.load("name", "full", tmp_path)


@pytest.mark.parametrize(
    ("numbers", "arrays", "message"),
    [
        ({"a": object()}, {}, "a result holds"),
        ({"a": "NaN"}, {}, "read back as a number"),
        ({1: 2}, {}, "keys must be texts"),
        ({}, {"x": np.array([None])}, "must be a numpy array"),
        ({}, {"x": [1.0]}, "must be a numpy array"),
    ],
)
def test_store_refuses_what_would_not_be_read_back(tmp_path, numbers, arrays, message):
    with pytest.raises(ValueError, match=message):
        storage.store("name", "full", Config(), numbers, arrays, folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_kill_while_storing_is_never_read_as_a_result(tmp_path, monkeypatch, fails_at):
    storage.store("name", "full", Config(), {"a": 1}, {"x": np.zeros(2)}, folder=tmp_path)
    calls = 0
    replace = os.replace

    def kill(source, target):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        storage.store("name", "full", Config(), {"a": 2}, {"x": np.ones(2)}, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name.json", "name.npz"]
    if fails_at == 1:
        assert storage.load("name", "full", tmp_path).number("a") == 1
    else:
        with pytest.raises(storage.ResultsError, match="not the one that"):
            storage.load("name", "full", tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "name.npz").unlink(), "missing or not the one"),
        (lambda folder: (folder / "name.npz").write_bytes(b"PK"), "missing or not the one"),
        (lambda folder: (folder / "name.json").write_text('{"name": '), "not a result file"),
        (lambda folder: (folder / "name.json").write_text("[]"), "not a result file"),
        (lambda folder: os.replace(folder / "name.json", folder / "else.json"), "no stored results"),
    ],
)
def test_load_refuses_damaged_files(tmp_path, damage, message):
    storage.store("name", "full", Config(), {"a": 1}, {"x": np.zeros(2)}, folder=tmp_path)
    damage(tmp_path)
    with pytest.raises(storage.ResultsError, match=message):
        storage.load("name", "full", tmp_path)


def test_load_refuses_the_results_of_another_experiment(tmp_path):
    storage.store("name", "full", Config(), {}, {}, folder=tmp_path)
    for suffix in ("json", "npz"):
        os.replace(tmp_path / f"name.{suffix}", tmp_path / f"other.{suffix}")
    with pytest.raises(storage.ResultsError, match=r"holds name \(full\), not other"):
        storage.load("other", "full", tmp_path)


@pytest.fixture
def experiment(tmp_path, monkeypatch, cache):
    """An experiment "fake" whose settings come back as its numbers; results in a temporary folder."""
    module = types.ModuleType("analysis.fake")
    module.Config = Config
    module.PRESETS = {"quick": Config(ks=(2,)), "default": Config(), "full": Config()}
    module.run = lambda config: runner.Result({"config": dataclasses.asdict(config)}, {"ks": np.array(config.ks)})
    monkeypatch.setitem(sys.modules, "analysis.fake", module)
    monkeypatch.setattr(storage, "RESULTS", tmp_path / "results")
    return module


@pytest.mark.parametrize(
    ("arguments", "preset", "changed"),
    [
        ([], "full", {}),
        (["--preset", "quick"], "quick", {"ks": [2]}),
        (["--preset", "quick", "--beta", "0.25", "--sampled"], "custom", {"ks": [2], "beta": 0.25, "sampled": True}),
        (["--ks", "4", "16", "--seed", "7", "--name", "x"], "custom", {"ks": [4, 16], "seed": 7, "name": "x"}),
    ],
)
def test_each_setting_is_an_option_and_changed_settings_are_stored_apart(
    experiment, arguments, preset, changed, capsys
):
    runner.main("fake", ["--jobs", "1", *arguments])
    stored = storage.load("fake", preset)
    assert stored.config == {"seed": 3, "beta": 0.5, "name": "exact", "sampled": False, "ks": [2, 8]} | changed
    assert stored.number("config.ks") == stored.config["ks"]
    assert str(storage.paths("fake", preset)[0]) in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--beta", "x"], ["--ks"], ["--preset", "slow"], ["--jobs", "0"], ["--k", "2"]])
def test_bad_options_are_refused(experiment, arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        runner.main("fake", arguments)
    assert exit_.value.code == 2
    assert "error" in capsys.readouterr().err


def test_a_setting_of_another_type_is_refused(experiment):
    experiment.Config = dataclasses.make_dataclass("Config", [("table", dict[str, int])], frozen=True)
    with pytest.raises(TypeError, match="table is"):
        runner.main("fake", [])
