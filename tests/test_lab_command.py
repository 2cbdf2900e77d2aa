"""`exo-toy lab`: any loss by its name, a page, a picture, an exit code; the picture itself."""

import importlib.util
import re
import sys

import pytest

from exo_toy import cli
from exo_toy.lab import characterize
from exo_toy.losses import exo_rw_loss


def lab(*arguments):
    return cli.main(["lab", *map(str, arguments)])


def test_a_sound_loss(capsys):
    assert lab("exo_toy.losses:dpo_loss", "--set", "beta=0.3", "--set", "label_smoothing=0.0") == 0
    out, err = capsys.readouterr()
    assert out.startswith("dpo_loss(beta=0.3, label_smoothing=0.0): a loss of kind 'pair'")
    assert "pi*, beta = 0.3" in out and "No findings" in out and not err


LOSSES = """
from torch.nn.functional import logsigmoid

constant = 3

def blind(a, b, c, d, beta):
    print("margin")
    m = beta * (a - b - c + d)
    return -logsigmoid(m) - logsigmoid(-m)

class Losses:
    @staticmethod
    def raises(a, b, c, d):
        raise KeyError("mask")

    @property
    def broken(self):
        raise RuntimeError("no model is loaded")

object = Losses()

def quits(a, b, c, d):
    raise SystemExit
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With modules of losses, from which the command is run."""
    (tmp_path / "my_losses.py").write_text(LOSSES)
    (tmp_path / "no_python.py").write_text("def loss(:\n")
    (tmp_path / "needs_more.py").write_text("import no_such_package\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    return tmp_path


def test_a_loss_of_the_folder_with_a_defect(folder, monkeypatch, capsys):
    monkeypatch.setattr(cli.lab, "PATIENCE", 0.0)
    assert lab("my_losses:blind", "--figure", "page.png") == 1
    out, err = capsys.readouterr()
    assert out.startswith("blind(beta=0.5): a loss of kind 'pair'")
    assert "* blind: " in out and "unchanged by the label" in out
    assert out.rstrip().endswith("page.png")
    assert (folder / "page.png").read_bytes().startswith(b"\x89PNG")
    # What takes long is said as it goes on, and what the loss prints is left out.
    assert "exo-toy: optima over full tables\n" in err
    assert re.search(r"exo-toy: left out \d+ lines that were printed, from 'margin' on", err)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_module:loss"], "no_such_module cannot be imported: ModuleNotFoundError: No module named 'no_such_m"),
        (["no_python:loss"], "no_python cannot be imported: SyntaxError: "),
        (["needs_more:loss"], "needs_more cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        (["leaves:loss"], "leaves cannot be imported: SystemExit: 0"),
        (["my_losses"], "MODULE:FUNCTION must name a function and its module, as my_losses:my_loss; got my_losses"),
        (["my_losses:nowhere"], "my_losses has no nowhere"),
        (
            ["my_losses.py:blind"],
            "MODULE must be a name as in an import, my_package.my_losses, and no file; got my_los",
        ),
        (["./my_losses:blind"], "MODULE must be a name as in an import, my_package.my_losses, and no file; got ./my_l"),
        (["my_losses:object.broken"], "my_losses:object.broken cannot be got: RuntimeError: no model is loaded"),
        (["my_losses:constant"], "the loss must be a function; got an object of type int"),
        (
            ["my_losses:Losses.raises"],
            "raises fails as a loss of kind 'pair' on a [3], b [3], c [3], d [3]: KeyError: 'm",
        ),
        (["my_losses:quits"], "quits fails as a loss of kind 'pair' on a [3], b [3], c [3], d [3]: SystemExit: "),
        (["my_losses:blind", "--kind", "triple"], "kind must be one of list, "),
        (["my_losses:blind", "--kind", "list"], "a loss of kind 'list' takes 2 or 3 tensors; got 4 (a, b, c, d)"),
        (["my_losses:blind", "--set", "gamma=1"], "blind has no parameter gamma"),
        (
            ["exo_toy.losses:rebel_loss"],
            "eta has no default: give it a value, as settings={'eta': ...} or --set eta=...",
        ),
    ],
)
def test_what_cannot_be_examined(arguments, message, folder, capsys):
    assert lab(*arguments) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and err.startswith("exo-toy: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("setting", ["beta", "beta=", "beta=x", "=1", "a b=1"])
def test_settings_are_literals(setting, capsys):
    with pytest.raises(SystemExit):
        lab("exo_toy.losses:dpo_loss", "--set", setting)
    assert "must be NAME=VALUE with a Python literal" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "seaborn" else real(name))
    assert lab("exo_toy.losses:dpo_loss", "--figure", "page.png") == 2
    assert "pip install seaborn" in capsys.readouterr().err


def test_the_picture_of_a_loss_on_lists(tmp_path, capsys):
    from exo_toy import plots

    report = characterize(exo_rw_loss, settings={"beta_pi": 0.5, "beta_r": 1.0}, candidates=(2, 4, 8))
    pages = [plots.loss_page(report, tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    assert pages[0] == pages[1]
    assert lab("exo_toy.losses:dpo_loss", "--figure", tmp_path / "no_folder" / "page.png") == 2
    assert "cannot be written: no such folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not supported"):
        plots.loss_page(report, tmp_path / "page.odd")
