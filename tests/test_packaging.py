"""A wheel, installed where the checkout is not."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from exo_toy import __version__

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the checkout is left as it is."""
    source = tmp_path_factory.mktemp("source") / "exo_toy"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "results", "build", "dist"))
    out = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, source, cwd=out)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of a new environment that holds the wheel, and finds its dependencies where these tests do."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    )
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    # A path file would run the .pth of the checkout's editable install too; a plain path does not.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"exo_toy", f"exo_toy-{__version__}.dist-info"}
    assert "exo_toy/py.typed" in names
    assert "exo_toy/losses/__init__.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_imports_outside_the_checkout(installed, tmp_path):
    code = "import exo_toy, exo_toy.losses; print(exo_toy.__file__, exo_toy.__version__)"
    done = run(installed / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, version = done.stdout.split()
    assert Path(file).is_relative_to(installed.parent)
    assert version == __version__


def test_the_losses_load_torch_and_nothing_heavier(installed, tmp_path):
    code = "import sys, exo_toy.losses; print(*sorted({'scipy', 'matplotlib', 'pandas', 'joblib'} & set(sys.modules)))"
    done = run(installed / "python", "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("command", ["verify", "figures", "reproduce"])
def test_commands_that_need_the_checkout_say_so(installed, tmp_path, command):
    done = run(installed / "exo-toy", command, cwd=tmp_path)
    assert done.returncode == 2
    assert "needs the checkout" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("option", "text"), [("--help", "verify"), ("--version", f"exo-toy {__version__}")])
def test_help_and_version_work(installed, tmp_path, option, text):
    done = run(installed / "exo-toy", option, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert text in done.stdout
