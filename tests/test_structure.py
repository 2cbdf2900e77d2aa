"""The house: who may import whom, and code in the README that runs."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "exo_toy"

# A module imports from lower floors only; modules of one package count as one.
FLOORS = {
    0: {"checks", "logspace"},
    1: {"divergences", "kernels", "laplace", "laplace_pairs", "losses", "margins", "spaces"},
    2: {"expressivity", "policies", "reviews", "rewards", "targets"},
    3: {
        "automata",
        "estimators",
        "evaluation",
        "finite_k",
        "gradient_noise",
        "kl_estimators",
        "objectives",
        "preferences",
    },
    4: {"candidates", "plots", "theorems", "training"},
    5: {"audit", "integrations", "lab", "text"},
    6: {"cli", "testing"},
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules}
DEPENDENCIES = {"jaxtyping", "numpy", "scipy", "torch"}
# What a module may import beyond the standard library, where that differs from the library's dependencies.
OWN_DEPENDENCIES = {
    "checks": {"jaxtyping", "torch"},
    "logspace": {"jaxtyping", "torch"},
    "losses": {"jaxtyping", "torch"},
    "kernels": {"jaxtyping", "torch", "triton"},
    "plots": DEPENDENCIES | {"matplotlib", "seaborn"},
    "integrations": DEPENDENCIES
    | {"accelerate", "datasets", "matplotlib", "peft", "seaborn", "tqdm", "transformers", "trl", "yaml"},
    "cli": set(),
}

SOURCES = sorted(LIBRARY.rglob("*.py"))
FIGURES = sorted((ROOT / "figures").glob("*.py"))


def module_of(path: Path) -> str:
    """The name in the table: ``losses`` for exo_toy/losses/pairwise.py, the empty name for exo_toy/__init__.py."""
    first, *rest = path.relative_to(LIBRARY).parts
    return first if rest else first.removesuffix(".py").replace("__init__", "")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, also inside functions; relative imports are spelled out."""
    package = path.parent.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, [base, node.module]))
            yield from (f"{origin}.{name.name}" for name in node.names)


def own_imports(path: Path) -> set[str]:
    """Names of the library's modules that a file imports."""
    split = (name.split(".") for name in imports(path))
    return {parts[1] for parts in split if parts[0] == "exo_toy" and len(parts) > 1 and parts[1] != "__version__"}


def violations(module: str, imported: set[str]) -> set[str]:
    """The imports that go to the same floor or up, but for those within a package."""
    return {other for other in imported - {module} if FLOOR[other] >= FLOOR[module]}


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_modules_stand_on_a_floor_and_import_from_below(path):
    module = module_of(path)
    if not module:
        assert own_imports(path) == set(), "importing exo_toy loads none of its modules"
        return
    assert module in FLOOR, f"{module} has no floor: give it one in FLOORS"
    imported = own_imports(path)
    assert imported <= FLOOR.keys(), f"no such modules: {imported - FLOOR.keys()}"
    assert not violations(module, imported), f"{module}, floor {FLOOR[module]}, imports {violations(module, imported)}"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_modules_import_no_more_than_their_dependencies(path):
    foreign = {name.split(".")[0] for name in imports(path)} - {"exo_toy"} - set(sys.stdlib_module_names)
    assert foreign <= OWN_DEPENDENCIES.get(module_of(path), DEPENDENCIES)


def test_the_reader_of_imports_sees_every_form(tmp_path, monkeypatch):
    """The two tests above could not fail if imports were overlooked."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "LIBRARY", tmp_path / "exo_toy")
    path = tmp_path / "exo_toy" / "losses" / "new.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch.nn as nn\nimport exo_toy.cli\nfrom exo_toy import checks\nfrom exo_toy.targets import x\n"
        "from .. import plots\nfrom ..lab import y\nfrom . import pairwise\n"
        "def f():\n    from exo_toy import spaces\n"
    )
    assert module_of(path) == "losses"
    assert own_imports(path) == {"cli", "checks", "targets", "plots", "lab", "losses", "spaces"}
    assert violations("losses", own_imports(path)) == {"cli", "targets", "plots", "lab", "spaces"}
    assert "torch.nn" in set(imports(path))


@pytest.mark.parametrize("path", FIGURES, ids=ids)
def test_figures_name_neither_torch_nor_the_library(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "exo_toy"}


def test_figures_load_neither_torch_nor_the_library():
    """Nor do the modules that they import in turn."""
    modules = [f"figures.{path.stem}" for path in FIGURES]
    assert modules
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += "print(*sorted({'torch', 'exo_toy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""


def test_public_names_are_exported():
    """What other code imports by name; the list may grow."""
    contract = {
        "losses": ["exo_rw_loss", "dpo_rw_loss", "exo_pref_loss", "dpo_loss"],
        "spaces": ["SequenceSpace"],
        "targets": ["optimal_policy", "tempered_policy", "best_of_n"],
        "divergences": ["kl_divergence"],
        "objectives": ["alignment_objective", "generalized_objective"],
        "finite_k": ["expected_exo_rw_loss", "expected_dpo_rw_loss", "exo_rw_bias_coefficient"],
        "policies": ["KGramPolicy", "TabularPolicy"],
        "kernels": ["linear_logps", "selective_logps", "sequence_logps", "candidate_log_ratios"],
    }
    for module, names in contract.items():
        path = LIBRARY / module / "__init__.py" if (LIBRARY / module).is_dir() else LIBRARY / f"{module}.py"
        bound = {name.split(".")[-1] for name in imports(path)}
        bound |= {
            node.name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert set(names) <= bound


def test_readme_code_runs(tmp_path):
    """Every Python block of the README, in order, each in a process of its own and outside the checkout."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2, "the README shows a loss in a training step and an exact theorem check"
    for block in blocks:
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", block],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, f"{block}\n{run.stderr}"
