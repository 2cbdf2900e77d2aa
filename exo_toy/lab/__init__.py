"""The laboratory: give it any loss on pairs or candidates, and it says what that optimises and where it breaks."""

from exo_toy.lab.gradients import NAMED, Alignment
from exo_toy.lab.laws import Curve, Finding
from exo_toy.lab.optimum import Capacity, TabularOptimum
from exo_toy.lab.report import FINDINGS, Report, characterize, defects
from exo_toy.lab.subject import KINDS, LabError

__all__ = [
    "FINDINGS",
    "KINDS",
    "NAMED",
    "Alignment",
    "Capacity",
    "Curve",
    "Finding",
    "LabError",
    "Report",
    "TabularOptimum",
    "characterize",
    "defects",
]
