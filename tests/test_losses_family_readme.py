"""The page of the losses: its tables say what the library has, its code runs, the tests that it names exist."""

import collections
import re
import sys
import types
from pathlib import Path

import torch

from exo_toy import losses
from exo_toy.losses import LOSSES
from exo_toy.losses.table import LossRecord
from tests import loss_laws
from tests.tolerances import assert_close

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "exo_toy" / "losses" / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """From one heading to the next."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def blocks(title: str) -> list[str]:
    """Python code, wherever it is indented to."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", section(title), flags=re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def test_the_table_of_losses_is_the_table():
    listed = rows("All of them")
    assert [row[0] for row in listed] == list(LOSSES)
    for name, function, formula, source, optimum in listed:
        record = LOSSES[name]
        assert function == f"`{record.function.__name__}`"
        assert formula and source == record.source
        assert optimum.replace("\\", "") == record.optimum


def test_the_table_of_files_is_the_directory():
    """But for files that hold one loss."""
    named = re.findall(r"`(\w+)\.py`", section("How they are arranged"))
    assert len(named) == len(set(named))
    files = {path.stem for path in (ROOT / "exo_toy" / "losses").glob("*.py")} - {"__init__"}
    homes = collections.Counter({record.function: record.function.__module__ for record in LOSSES.values()}.values())
    alone = {module.rsplit(".")[-1] for module, count in homes.items() if count == 1}
    assert set(named) <= files
    assert files - set(named) <= alone


def test_tests_named_as_evidence_exist():
    evidence = {name for row in rows("Where others differ") for name in re.findall(r"`(test_\w+)`", row[-1])}
    assert len(evidence) > 10
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert {name for name in evidence if f"def {name}(" not in tests} == set()


def test_modifiers_run():
    (code,) = blocks("Modifiers")
    exec(compile(code, "README.md", "exec"), {})


def test_the_example_of_adding_a_loss(monkeypatch):
    """Its file, its record and its test, as they stand on the page."""
    file, record, test = blocks("Adding a loss")
    module = types.ModuleType("exo_toy.losses.squared_hinge")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(file, "squared_hinge.py", "exec"), module.__dict__)
    monkeypatch.setattr(losses, "squared_hinge_loss", module.squared_hinge_loss, raising=False)

    def _record(function, kind, source, optimum, **settings):
        return LossRecord(function, kind, source, optimum, settings)

    added = eval("{" + record + "}", {"_record": _record, **module.__dict__})
    monkeypatch.setattr(loss_laws, "LOSSES", {**LOSSES, **added})
    names: dict = {}
    exec(compile(test, "test_loss_squared_hinge.py", "exec"), names)
    for name in [name for name in names if name.startswith("test_")]:
        names[name]()
    (case,) = names["CASES"]
    tensors = loss_laws.arguments("squared_hinge")
    assert_close(case(*tensors).losses, case.by_oracle(tensors))
    impossible = torch.tensor([-torch.inf]).double(), *(torch.zeros(1).double() for _ in range(3))
    assert case(*impossible).losses.item() == case.no_chosen[0]
