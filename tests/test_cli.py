"""The command, run in a small checkout of its own with experiments that only count."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis.runner import EXPERIMENTS
from exo_toy import __version__, cli
from exo_toy.cli.experiments import CHECKOUT as ROOT

EXPERIMENT = """
import time
from dataclasses import dataclass
from pathlib import Path
import numpy as np
from analysis import runner

LOG = Path(__file__).parents[1] / "log"


@dataclass(frozen=True)
class Config:
    cases: int = 3


PRESETS = {"quick": Config(), "default": Config(4), "full": Config(5)}


def case(i):
    while i == 1 and (LOG.parent / "hang").exists():
        time.sleep(0.05)
    with LOG.open("a") as file:
        file.write(f"{__name__} {i}\\n")
    return i


def run(config):
    values = runner.map_cases(case, [{"i": i} for i in range(config.cases)])
    return runner.Result({"sum": sum(values)}, {"values": np.array(values)})
"""

CLAIMS = """
from analysis import storage
from analysis.claims.base import Claim, Outcome, Verdict


def _sum(results):
    total = results["mode_seeking"].number("sum")
    wanted = (storage.ROOT / "wanted").read_text()
    return Outcome(f"sum {total}", Verdict.HOLDS if str(total) == wanted else Verdict.FAILS, "Add carefully.")


CLAIMS = (
    Claim("C2", "later", "there", why_not="planned"),
    Claim("C1", "the sum is right", "here", figure="mode_seeking", evaluate=_sum),
)
"""

FIGURE = """
import matplotlib.pyplot as plt
from figures import style

CAPTIONS = {{"{name}": "Captioned *{name}*."}}


def draw(results, out_dir):
    figure, axes = plt.subplots()
    axes.plot(results.arrays["values"])
    paths = style.save(figure, "{name}", out_dir)
    plt.close(figure)
    return paths
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The library, the runner and the style as they are; experiments, claims and figures of our own."""
    root = tmp_path / "checkout"
    for folder, files in {
        "analysis": ("__init__", "cluster", "runner", "storage", "report"),
        "analysis/claims": ("__init__", "base"),
        "figures": ("__init__", "style"),
        "exo_toy": ("__init__",),
        "exo_toy/cli": ("__init__", "__main__", "base", "audit", "experiments", "lab", "lm", "text"),
    }.items():
        (root / folder).mkdir(parents=True)
        for file in files:
            shutil.copy(ROOT / folder / f"{file}.py", root / folder)
    for name in EXPERIMENTS:
        (root / "analysis" / f"{name}.py").write_text(EXPERIMENT)
        (root / "figures" / f"{name}.py").write_text(FIGURE.format(name=name))
        (root / "analysis" / "claims" / f"{name}.py").write_text(CLAIMS if name == "mode_seeking" else "CLAIMS = ()\n")
    (root / "analysis" / "claims" / "win_rates.py").write_text("CLAIMS = WIN_RATE_COLUMNS = ()\nWIN_RATES = {}\n")
    (root / "wanted").write_text("3")
    return root


def start(checkout: Path, *arguments: str) -> subprocess.Popen:
    # A session of its own, so that an interrupt reaches its workers and not the tests.
    return subprocess.Popen(
        [sys.executable, "-m", "exo_toy.cli", *arguments],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Ignored where the tests themselves run in the background of a shell, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run(checkout: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(checkout, *arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def evaluated(checkout: Path) -> list[str]:
    log = checkout / "log"
    return sorted(log.read_text().splitlines()) if log.exists() else []


ALL = sorted(f"analysis.{name} {i}" for name in EXPERIMENTS for i in range(3))


def test_verify_runs_everything_and_prints_the_table(checkout):
    code, out, err = run(checkout, "verify", "--quick", "--jobs", "1")
    assert code == 0, err
    assert evaluated(checkout) == ALL
    for text in (
        "C1",
        "the sum is right",
        "sum 3",
        "In practice: Add carefully.",
        "holds",
        "C2",
        "planned",
        "not tested here",
    ):
        assert text in out
    assert "mode_seeking: 3/3" in err
    assert not (checkout / "analysis" / ".cache" / "quick").exists()
    assert not (checkout / "paper_repro.md").exists()


def test_a_claim_that_fails_gives_exit_code_1_and_is_named(checkout):
    (checkout / "wanted").write_text("4")
    code, out, err = run(checkout, "reproduce", "--quick", "--jobs", "1")
    assert code == 1
    assert "fails" in out
    assert "should hold and does not: C1" in err
    assert "**fails**" in (checkout / "paper_repro.md").read_text()


def test_reproduce_draws_and_writes_the_report(checkout):
    code, out, err = run(checkout, "reproduce", "--quick", "--jobs", "1")
    assert code == 0, err
    for name in EXPERIMENTS:
        for suffix in ("png", "pdf"):
            assert (checkout / "figures" / "quick" / f"{name}.{suffix}").stat().st_size > 1000
            assert f"figures/quick/{name}.{suffix}" in out
    text = (checkout / "paper_repro.md").read_text()
    assert "`exo-toy reproduce --quick`" in text
    assert "| C1 |" in text
    assert not list(checkout.rglob("*.part"))


@pytest.mark.parametrize("backend", ["loky", pytest.param("dask", marks=pytest.mark.slow)])
def test_an_interrupted_run_resumes_and_repeats_nothing(checkout, backend):
    if backend == "dask":
        pytest.importorskip("distributed", reason="the extra dask is not installed")
    command = ["verify", "--quick", "--jobs", "2", "--backend", backend]
    (checkout / "hang").touch()
    process = start(checkout, *command)
    # The first experiment's case 1 hangs; its two others get done by the other worker.
    deadline = time.monotonic() + 60
    while len(evaluated(checkout)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    first = evaluated(checkout)
    assert first == [f"analysis.{EXPERIMENTS[0]} {i}" for i in (0, 2)]
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert f"exo-toy {' '.join(command)}`" in err
    assert not (checkout / "analysis" / "results").exists()

    (checkout / "hang").unlink()
    code, _, err = run(checkout, *command)
    assert code == 0, err
    assert "2/3 kept from an interrupted run" in err
    assert evaluated(checkout) == ALL


def test_a_finished_run_is_not_resumed(checkout):
    for times in (1, 2):
        code, _, err = run(checkout, "verify", "--quick", "--jobs", "1")
        assert code == 0, err
        assert evaluated(checkout) == sorted(ALL * times)


def test_figures_without_results_says_what_to_run(checkout):
    code, out, err = run(checkout, "figures", "--quick")
    assert (code, out) == (2, "")
    assert f"no stored results of {EXPERIMENTS[0]} (quick)" in err
    assert f"python -m analysis.{EXPERIMENTS[0]} --preset quick" in err
    assert "Traceback" not in err


@pytest.fixture
def no_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(cli.experiments, "CHECKOUT", tmp_path)


@pytest.mark.parametrize("command", ["verify", "figures", "reproduce"])
def test_without_the_checkout_commands_say_so(no_checkout, command, capsys):
    assert cli.main([command]) == 2
    assert "needs the checkout" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "absent", "extras"),
    [
        ("verify", "joblib", "experiments"),
        ("verify", "rich", "experiments"),
        ("figures", "matplotlib", "figures"),
        ("reproduce", "seaborn", "figures"),
    ],
)
def test_a_missing_extra_is_named_with_the_command_that_brings_it(monkeypatch, command, absent, extras, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else real(name))
    assert cli.main([command]) == 2
    err = capsys.readouterr().err
    assert f"needs {absent}: pip install" in err
    assert f"[{extras}]" in err


def test_version_is_the_library_s(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == f"exo-toy {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["verify", "--quick", "--full"],
        ["verify", "--jobs", "0"],
        ["verify", "--backend", "spark"],
        ["figures", "--jobs", "2"],
        ["figures", "--backend", "dask"],
    ],
)
def test_bad_options_are_refused(arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
