"""How every figure looks, and what each reads and writes. Imports neither torch nor exo_toy.

A figure is a module of this package with ``draw(results, out_dir)``, which returns the files it wrote, and with
``CAPTIONS``, the text of each. It has the name of the experiment that it reads. One method has one colour, one line
style and one marker in all figures, so that any of the three tells it from the others: colours of Okabe and Ito and,
for ways of computing the same, of Paul Tol, which the colour-blind can tell apart, spread in lightness for a print in
grey.
"""

import argparse
import importlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.figure import Figure

from analysis import storage
from analysis.storage import StoredResult, load

__all__ = ["METHODS", "Look", "StoredResult", "draw_all", "folder", "load", "main", "save", "theme"]

FIGURES = storage.EXPERIMENTS
# Width of a column and of a page of a two-column paper, in inches.
COLUMN, PAGE = 3.25, 6.75


@dataclass(frozen=True)
class Look:
    """Colour, line style, marker and name in a legend of one method."""

    label: str
    color: str
    linestyle: Any
    marker: str

    def line(self, *, markers: bool = True, **more: Any) -> dict[str, Any]:
        """Arguments of ``ax.plot``."""
        look = {"label": self.label, "color": self.color, "linestyle": self.linestyle}
        return {**look, **({"marker": self.marker} if markers else {}), **more}


METHODS = {
    "exo": Look("EXO", "#0072B2", "-", "o"),
    "dpo": Look("DPO", "#E69F00", "--", "s"),
    "rl": Look("RL", "#009E73", "-.", "^"),
    "ppo": Look("PPO", "#009E73", (0, (3, 1, 1, 1, 1, 1)), "v"),
    "ppo_few": Look("PPO, as few", "#117733", (0, (1, 1)), "2"),
    "optimal": Look(r"$\pi^*_\beta$", "#000000", "-", "D"),
    "reference": Look(r"$\pi_\mathrm{ref}$", "#999999", ":", "x"),
    "sft": Look("SFT", "#999999", (0, (1, 3)), "+"),
    "best_of_n": Look("best of n", "#CC79A7", (0, (5, 1)), "P"),
    "reverse_kl": Look(r"min $\mathrm{KL}(\pi_\theta\|\pi^*)$", "#56B4E9", "-", "<"),
    "forward_kl": Look(r"min $\mathrm{KL}(\pi^*\|\pi_\theta)$", "#D55E00", "--", ">"),
    "exo_rw": Look("EXO-rw", "#0072B2", "-", "o"),
    "dpo_rw": Look("DPO-rw", "#E69F00", "--", "s"),
    "exo_pref": Look("EXO-pref", "#56B4E9", "-", "p"),
    "dpo_pref": Look("DPO-pref", "#D55E00", "--", "D"),
    "chosen_sft": Look("SFT on chosen", "#999999", (0, (1, 3)), "+"),
    "naive": Look("naive: logits, log-softmax", "#CC6677", "--", "s"),
    "selective": Look("selective: logits", "#DDCC77", "-.", "^"),
    "kernel": Look("kernel: no logits", "#332288", "-", "o"),
}

RC = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "font.size": 8,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "mathtext.fontset": "dejavusans",
    # Text stays text in the PDF.
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


def theme() -> AbstractContextManager[None]:
    """The style of all figures, to draw inside of."""
    settings: dict[Any, Any] = {**sns.axes_style("whitegrid"), **sns.plotting_context("paper"), **RC}
    return mpl.rc_context(settings)


def save(figure: Figure, name: str, out_dir: Path) -> list[Path]:
    """Write ``name.pdf`` and ``name.png``, each complete or not at all; the same figure gives the same bytes."""
    # Dates and program versions would change the files of an unchanged figure.
    formats: dict[str, dict[str, Any]] = {
        "pdf": {"CreationDate": None, "ModDate": None, "Producer": None, "Creator": None},
        "png": {"Software": None},
    }
    paths = []
    for suffix, metadata in formats.items():
        path = Path(out_dir) / f"{name}.{suffix}"
        storage.write_atomically(path, partial(figure.savefig, format=suffix, metadata=metadata))
        paths.append(path)
    return paths


def folder(preset: str) -> Path:
    """Where the figures of a preset lie: those of the reported run in ``figures`` itself."""
    figures = storage.ROOT / "figures"
    return figures if preset == storage.REPORTED else figures / preset


def draw_all(preset: str) -> list[Path]:
    """Draw every figure from the stored results of a preset; the files written."""
    # All are read before the first is drawn: what is missing is said at once.
    results = {name: load(name, preset) for name in FIGURES}
    return [path for name in FIGURES for path in _draw(name, results[name], folder(preset))]


def _draw(name: str, results: StoredResult, out_dir: Path) -> list[Path]:
    with theme():
        paths: list[Path] = importlib.import_module(f"figures.{name}").draw(results, out_dir)
    return paths


def main(name: str, arguments: Sequence[str] | None = None) -> None:
    """Command line of one figure: ``python -m figures.<name>``."""
    parser = argparse.ArgumentParser(prog=f"python -m figures.{name}")
    parser.add_argument("--preset", default=storage.REPORTED, help="whose results to draw (default: %(default)s)")
    preset = parser.parse_args(arguments).preset
    try:
        for path in _draw(name, load(name, preset), folder(preset)):
            print(os.path.relpath(path))
    except storage.ResultsError as error:
        parser.exit(2, f"{error}\n")
