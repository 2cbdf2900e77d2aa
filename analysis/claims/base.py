"""Claims, verdicts, and what all experiments' evaluations share.

A verdict is computed from stored results alone. What an experiment must provide is listed beside the function that
reads it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from analysis.storage import StoredResult

Results = Mapping[str, StoredResult]
Measured = Mapping[str, Any]
# Identities are exact: what is left is rounding.
EXACT = 1e-12
# An objective known to 1e-16 is flat within about 1e-8 of its maximum, and L-BFGS stops somewhere there.
MAXIMISER_TOLERANCE = 1e-6
# Converged: a loss at finite K ends within a tenth of the best value of KL(pi_theta || pi*).
NEAR_OPTIMUM = 1.1

LOOKS = {
    "exo_rw": "EXO-rw",
    "dpo_rw": "DPO-rw",
    "ppo": "PPO",
    "ppo_few": "PPO on as few completions",
    "exo_pref": "EXO-pref",
    "dpo_pref": "DPO-pref",
}


class Verdict(StrEnum):
    """What the results say of a claim."""

    HOLDS = "holds"
    CONDITIONAL = "holds under stated conditions"
    FAILS = "fails"
    NOT_TESTED = "not tested here"


@dataclass(frozen=True)
class Outcome:
    """What was measured, in one line, the verdict it leads to, and what to do about it, in one sentence if anything."""

    ours: str
    verdict: Verdict
    practice: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim, where it is made and where it is checked; ``evaluate`` is None where it is not tested here."""

    id: str
    statement: str
    where: str
    function: str = ""
    test: str = ""
    script: str = ""
    figure: str = ""
    paper_value: str = ""
    evaluate: Callable[[Results], Outcome] | None = None
    why_not: str = ""
    # False for a claim whose failure is itself a finding: it is reported and does not make the command fail.
    should_hold: bool = True


def judge(claim: Claim, results: Results) -> Outcome:
    """The outcome of a claim; of one that is not tested, the reason. A claim that fails gives no advice."""
    if claim.evaluate is None:
        return Outcome(claim.why_not, Verdict.NOT_TESTED)
    outcome = claim.evaluate(results)
    return replace(outcome, practice="") if outcome.verdict == Verdict.FAILS else outcome


def failed(outcomes: Mapping[Claim, Outcome]) -> list[Claim]:
    """Claims that should hold and do not."""
    return [claim for claim, outcome in outcomes.items() if claim.should_hold and outcome.verdict == Verdict.FAILS]


def holds_if(condition: bool, otherwise: Verdict = Verdict.FAILS) -> Verdict:
    """HOLDS or the other; a condition that compares with NaN is False, and so never holds."""
    return Verdict.HOLDS if condition else otherwise


def largest(values: list[float]) -> float:
    """The maximum, NaN if one of them is."""
    return next((value for value in values if value != value), max(values))


def in_range(values: list[float]) -> str:
    """From the least to the largest."""
    return f"{min(values):.2g} to {max(values):.2g}"


def signs(differences: Mapping[str, Measured]) -> dict[str, int]:
    """The sign of each difference, 0 where its interval holds 0."""
    return {at: 1 if found["low"] > 0 else -1 if found["high"] < 0 else 0 for at, found in differences.items()}
