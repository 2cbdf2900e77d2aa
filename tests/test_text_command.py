"""``exo-toy text`` on files from elsewhere: what it prints, writes and refuses, and its exit codes."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from exo_toy import cli

TEXT = "call me ishmael. some years ago, never mind how long precisely\r\n" * 4


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text").write_text(TEXT, newline="")
    (tmp_path / "list").write_text("me\n2\tago\n")
    return tmp_path / "text", tmp_path / "list"


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """However slow the machine is, steps are not reported."""
    monkeypatch.setattr(cli.text, "PATIENCE", math.inf)


def run(file, keywords, *options) -> int:
    return cli.main(["text", str(file), "--reward", str(keywords), "--beta", "1", "--length", "8", *options])


def test_prints_and_writes(files, tmp_path, capsys):
    output = tmp_path / "found.json"
    assert run(*files, "--order", "1", "--samples", "2", "--output", str(output)) == 0
    printed, errors = capsys.readouterr()
    found = json.loads(output.read_text(encoding="utf-8"))
    assert not errors
    labels = "log Z_β, E[r], Var[r], KL(·‖π_ref), KL(·‖π*_β), KL(π*_β‖·), P_ref, P_π*, EXO-rw, 95 % interval"
    for label in labels.split(", "):
        assert label in printed
    assert f"log Z_β: {found['log_z']:.6g}" in printed
    for samples in found["samples"].values():
        assert len(samples) == 2
        for sample in samples:
            assert sample["text"].replace("\n", "⏎") in printed
    assert found["text"]["tokens"] == len(TEXT.replace("\r", ""))
    assert found["settings"]["order"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "list", "text"]


def test_words_and_smoothing(files, capsys):
    assert run(*files, "--words", "--smoothing", "add-delta", "--delta", "0.5", "--vocabulary", "2") == 2
    assert "none of 2 keywords can occur: 'me': 'me' is not among the most frequent" in capsys.readouterr().err
    assert run(*files, "--words", "--smoothing", "add-delta", "--delta", "0.5") == 0
    assert "k = 1, add-delta δ = 0.5" in capsys.readouterr().out


def test_keywords_that_the_text_lacks_are_named(files, tmp_path, capsys):
    files[1].write_text("me\nzoë\n")
    assert run(*files, "--output", str(tmp_path / "found.json")) == 1
    assert f"{files[1]}:2: left out: 'z' is not in the text" in capsys.readouterr().err
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["left_out"] == [{"line": 2, "text": "zoë", "weight": 1.0, "reason": "'z' is not in the text"}]


@pytest.mark.parametrize(
    ("content", "keywords", "options", "message"),
    [
        (b"", "me", (), "text: holds no character"),
        (b"  \n", "me", ("--words",), "text: holds no word"),
        (b"\x7fELF\x02\x01\x01\x00\x00\x00", "me", (), "NUL characters: a binary file"),
        (b"\x89PNG\r\n\x1a\n", "me", (), "is no utf-8 text (byte 0x89 at offset 0)"),
        (b"me", "me", ("--encoding", "klingon"), "encoding must be one that Python knows"),
        (b"me", "", (), "list: holds no keyword"),
        (b"me", "x\tme", (), "list:1: a weight must be a number"),
        (b"me", "me", ("--beta", "0"), "beta must be"),
        (b"me", "me", ("--delta", "1"), "delta goes with smoothing add-delta"),
        (b"me", "me", ("--order", "8"), "order must be in 0..7"),
        (
            b"me",
            "me",
            ("--order", "1", "--beta", "5e-324"),
            "beta must be so large that finite rewards / beta are below",
        ),
        (b"me", "m", ("--order", "1", "--length", "10000000"), "1024 completions of 10000000 tokens would take"),
        (b"me", "me", ("--order", "1", "--seed", "9" * 20), "seed must be an integer below 2**63"),
        (b"me", "me", ("--order", "1", "--seed", "-1"), "seed must be an integer of at least 0"),
        (bytes(range(32, 127)), "AB", ("--order", "6"), "tables of order 6 over 95 tokens would take"),
    ],
)
def test_what_is_no_use_is_refused_and_nothing_written(files, tmp_path, capsys, content, keywords, options, message):
    files[0].write_bytes(content)
    files[1].write_text(keywords)
    (tmp_path / "found.json").write_text("old")
    assert run(*files, *options, "--output", str(tmp_path / "found.json")) == 2
    printed, errors = capsys.readouterr()
    assert message in errors and errors.startswith("exo-toy: ") and errors.count("\n") == 1
    assert not printed
    assert (tmp_path / "found.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "list", "text"]


def test_files_that_are_not_there(files, tmp_path, capsys):
    missing = tmp_path / "missing"
    for arguments in ((missing, files[1]), (files[0], missing), (tmp_path, files[1])):
        assert run(*arguments) == 2
        assert "cannot be read: " in capsys.readouterr().err
    assert run(*files, "--output", str(missing / "found.json")) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err


def test_what_is_read_and_what_is_no_file_is_not_replaced(files, tmp_path, capsys):
    (tmp_path / "link").symlink_to(files[0])
    os.mkfifo(tmp_path / "pipe")
    for output in (*files, tmp_path / "link"):
        assert run(*files, "--output", str(output)) == 2
        assert f"{output}: must be another file than those that are read" in capsys.readouterr().err
    assert run(*files, "--output", str(tmp_path / "pipe")) == 2
    assert "pipe: must be a file to write, no device or pipe" in capsys.readouterr().err
    assert files[0].read_bytes() == TEXT.encode() and (tmp_path / "pipe").is_fifo()


def test_a_tiny_beta_has_finite_divergences_and_a_warning(files, tmp_path, capsys):
    """Of what the reference draws, the optimal policy has less left than float64 can say."""
    assert run(*files, "--order", "1", "--beta", "1e-9", "--output", str(tmp_path / "found.json")) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(isinstance(x, float) for x in found["closest_kgram"].values())
    assert len(found["warnings"]) == 2 and capsys.readouterr().out.count("\nwarning: of 1024 candidates") == 2


def test_any_bytes_can_be_read_as_latin_1(files, capsys):
    files[0].write_bytes(bytes(range(256)) * 2 + b"me")
    assert run(*files, "--encoding", "latin-1", "--order", "1", "--vocabulary", "300") == 0
    printed, _ = capsys.readouterr()
    # All 256, less a carriage return, which is another newline.
    assert "514 characters, 255 different" in printed
    # A terminal gets no control characters.
    assert all(letter.isprintable() for line in printed.splitlines() for letter in line)


def test_progress_of_large_files(files, capsys, monkeypatch):
    monkeypatch.setattr(cli.text, "TAKES_LONG", 10)
    monkeypatch.setattr("exo_toy.text.reading.CHUNK", 32)
    assert run(*files) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "exo-toy: the vocabulary: 10 %" and lines[-1] == "exo-toy: the counts: 100 %"
    assert len(lines) == len(set(lines)) <= 20


def test_steps_are_reported_once_patience_ends(files, capsys, monkeypatch):
    monkeypatch.setattr(cli.text, "PATIENCE", -1.0)
    assert run(*files) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "exo-toy: 1 of 7: log Z" and lines[-1] == "exo-toy: 7 of 7: the candidates"
    assert [line.split()[1] for line in lines] == [str(i) for i in range(1, 8)]


def test_small_effective_sample_sizes_are_warned_of(files, tmp_path, capsys):
    output = tmp_path / "found.json"
    for beta, warned in (("100", []), ("0.02", ["π/π_ref of the best k-gram", "π*_β/π_ref"])):
        assert run(*files, "--beta", beta, "--order", "1", "--output", str(output)) == 0
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
        found = json.loads(output.read_text())
        assert printed == [f"warning: {warning}" for warning in found["warnings"]]
        assert len(printed) == len(warned)
        for line, name, weights in zip(printed, ("closest_kgram", "optimal"), warned, strict=False):
            size = found["effective_sizes"][name]
            assert f"of 1024 candidates (16 groups of K = 64) the weights {weights} have" in line
            assert f"(ESS) of {size['value']:.3g}, {size['exact']:.3g} by their exact moments" in line
            assert "the exact answers stand beside them" in line
            assert min(size.values()) < 102.4


def test_a_terminal_without_letters_gets_their_numbers(files):
    files[0].write_text("ñu me ago " * 9, encoding="utf-8")
    found = subprocess.run(
        [sys.executable, "-m", "exo_toy.cli", "text", *map(str, files[:1]), "--reward", str(files[1]), "--beta", "1"],
        env={**os.environ, "PYTHONPATH": str(cli.experiments.CHECKOUT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert "\\xf1u me" in found.stdout and "log Z_\\u03b2" in found.stdout


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ended_from_outside_it_leaves_nothing(files, tmp_path, how):
    code = (
        "import os, signal, sys\nfrom exo_toy import cli, text\n"
        f"def stop(*_): os.kill(os.getpid(), {int(how)})\n"
        "text.write = stop\nsys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["text", str(files[0]), "--reward", str(files[1]), "--beta", "1", "--length", "8"]
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--output", str(tmp_path / "found.json")],
        env={**os.environ, "PYTHONPATH": str(cli.experiments.CHECKOUT)},
        cwd=Path(cli.experiments.CHECKOUT),
        capture_output=True,
        timeout=120,
        # Ignored where the tests themselves run in the background of a shell, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.returncode == (130 if how == signal.SIGINT else 143), process.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list", "text"]
