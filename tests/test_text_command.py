"""``exo-toy text`` on files from elsewhere: what it prints, writes and refuses, and its exit codes."""

import json
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
    assert lines[0] == "the vocabulary: 10 %" and lines[-1] == "the counts: 100 %"
    assert len(lines) == len(set(lines)) <= 20


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
