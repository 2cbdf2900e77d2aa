"""The paper's claims in our words, where each is checked here, and what the stored results say of it.

Each experiment has a module of its name here, with its claims in ``CLAIMS`` and the functions that judge them. The
paper is Ji et al., arXiv:2402.00856v4; KL directions are read by argument order.
"""

import importlib
import re

from analysis import storage
from analysis.claims.base import LOOKS, Claim, Measured, Outcome, Results, Verdict, failed, judge
from analysis.claims.win_rates import WIN_RATE_COLUMNS, WIN_RATES

__all__ = [
    "CLAIMS",
    "LOOKS",
    "WIN_RATES",
    "WIN_RATE_COLUMNS",
    "Claim",
    "Measured",
    "Outcome",
    "Results",
    "Verdict",
    "failed",
    "judge",
]

# The paper's own first, then theorems, engineering and what is beyond the paper.
KINDS = "CTEB"


def _place(claim: Claim) -> tuple[int, int, str]:
    """Where a claim stands: C2 before C10 before C14 before C14a before T3."""
    match = re.fullmatch(rf"([{KINDS}])(\d+)([a-z]?)", claim.id)
    if match is None:
        raise ValueError(f"claim id {claim.id!r} is not a letter of {KINDS}, a number and at most one small letter")
    kind, number, letter = match.groups()
    return KINDS.index(kind), int(number), letter


def _all_claims() -> tuple[Claim, ...]:
    modules = [importlib.import_module(f"{__name__}.{name}") for name in (*storage.EXPERIMENTS, "win_rates")]
    return tuple(sorted((claim for module in modules for claim in module.CLAIMS), key=_place))


CLAIMS = _all_claims()
