"""Where the losses at finite K end, and which gets more at equal K."""

import itertools
import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from analysis.claims.base import Claim, Measured, Outcome, Results, Verdict, holds_if, largest

# The K that the advice is for.
SMALL_K = 4
NAMES = {"exo": "EXO-rw", "dpo": "DPO-rw"}
# Ahead in more than this share of comparisons is advice.
MOST = 0.75


class Score(NamedTuple):
    """In how many comparisons each loss is ahead, and by how much at most, in shares of the gain."""

    exo: int
    dpo: int
    equal: int
    most_exo: float
    most_dpo: float

    def __str__(self) -> str:
        return f"{self.exo} : {self.dpo} : {self.equal}"

    def best(self) -> str:
        """The loss to take: ahead in most of the comparisons, as :data:`MOST` has it; empty if neither is."""
        compared = self.exo + self.dpo + self.equal
        ahead = [name for name, count in (("EXO-rw", self.exo), ("DPO-rw", self.dpo)) if count > MOST * compared]
        return ahead[0] if ahead else ""

    def told(self) -> str:
        """In words."""
        ahead = [
            f"{name} in {count} of {self.exo + self.dpo + self.equal}"
            + (f" by up to {most:.2g} of the gain" if count else "")
            for name, count, most in (("EXO-rw", self.exo, self.most_exo), ("DPO-rw", self.dpo, self.most_dpo))
        ]
        return ", ".join(ahead)


def _fixed_points(results: Results) -> Outcome:
    """Minimisers and paths; fixed_points provides ``tables`` (with ``total_variation``, ``tolerance``, ``is_minimum``),

    ``planted`` and ``grid`` (minimisers at every K, by world, order, temperature and loss), ``paths`` and
    ``solver_error``, the error of their shares.
    """
    stored = results["fixed_points"]
    tables, grid, paths = (stored.number(key) for key in ("tables", "grid", "paths"))
    equal, error = stored.config["equal"], stored.number("solver_error")
    distance = largest([case["total_variation"] for case in tables])
    exact = all(case["is_minimum"] and case["total_variation"] <= case["tolerance"] for case in tables)
    ends = {
        k: _score(_at_end(grid, k), equal) for k in sorted({point["k"] for case in grid for point in case["points"]})
    }
    way = _score(_on_the_way(paths, SMALL_K), equal)
    late = sum(case["near_from"] > SMALL_K for case in grid)
    exceptions, steps = _exceptions(grid)
    scores = ", ".join(f"{score} at K = {k}" for k, score in ends.items())
    text = (
        f"full tables: all {len(tables)} minimisers within {distance:.1e} of π*_β in total variation"
        f"{'' if exact else ', NOT within their tolerances'}. Limited capacity: {_planted(stored.number('planted'))}; "
        f"at K = {SMALL_K} the limit's divergence exceeds its minimum by a tenth or more in {late} of {len(grid)} "
        f"cases; it stays below that in turn ({_relation(grid)}); in {exceptions} of {steps} steps to a lower β a "
        f"smaller K is enough. J of the fixed points, EXO-rw higher : DPO-rw higher : equal, {scores}. Expected reward "
        f"at equal KL on the way at K = {SMALL_K}: {way}, EXO-rw ahead by at most {way.most_exo:.1%} of the best "
        f"policy's gain, DPO-rw by {way.most_dpo:.1%} (solver's error {error:.0e})"
    )
    verdict = holds_if(exact and error <= equal)
    if verdict == Verdict.HOLDS and exceptions:
        verdict = Verdict.CONDITIONAL
    return Outcome(text, verdict, _practice(ends, way, grid))


def _score(ahead: list[float], equal: float) -> Score:
    exo, dpo = [share for share in ahead if share > equal], [-share for share in ahead if share < -equal]
    return Score(len(exo), len(dpo), len(ahead) - len(exo) - len(dpo), max(exo, default=0.0), max(dpo, default=0.0))


def _pairs(cases: list[Measured]) -> list[tuple[Measured, Measured]]:
    """EXO-rw's and DPO-rw's case of everything else alike."""
    found: dict[tuple[Any, ...], dict[str, Measured]] = {}
    for case in cases:
        place = tuple(case.get(key) for key in ("metric", "world", "order", "temperature", "k"))
        found.setdefault(place, {})[case["loss"]] = case
    return [(pair["exo"], pair["dpo"]) for pair in found.values()]


def _at_end(grid: list[Measured], k: int) -> list[float]:
    """How far EXO-rw's J is above DPO-rw's at their fixed points, in shares of the gain of pi*."""
    shares = []
    for exo, dpo in _pairs(grid):
        gain = exo["optimal"]["objective"] - exo["reference"]["objective"]
        values = [point["objective"] for case in (exo, dpo) for point in case["points"] if point["k"] == k]
        shares.append((values[0] - values[1]) / gain)
    return shares


def _on_the_way(paths: list[Measured], k: int) -> list[float]:
    """How far EXO-rw is ahead wherever both get, from the first step on, along gradient descent."""
    shares = []
    for exo, dpo in _pairs([case for case in paths if case["k"] == k and case["metric"] == "euclidean"]):
        ends = [[case["first_share"], *case["shares"]] for case in (exo, dpo)]
        shares += [a - b for a, b in zip(*ends, strict=True) if not math.isnan(a - b)]
    return shares


def _planted(planted: list[Measured]) -> str:
    """The documented case in figures."""
    exo = next(case for case in planted if case["loss"] == "exo" and case["order"] == 0)
    values = ", ".join(f"{point['kl_policy_to_optimal']:.3f} at K = {point['k']}" for point in exo["points"])
    return f"planted modes, k = 0, EXO-rw's KL(π‖π*) {values}, limit {exo['limits']['exo']['kl_policy_to_optimal']:.3f}"


def _exceptions(grid: list[Measured]) -> tuple[int, int]:
    """Of the steps to a lower temperature, those after which a smaller K is enough, and all."""
    lines: dict[tuple[Any, ...], list[Measured]] = {}
    for case in grid:
        lines.setdefault((case["world"], case["order"], case["loss"]), []).append(case)
    ordered = [sorted(line, key=lambda case: case["temperature"]) for line in lines.values()]
    steps = [low["near_from"] < high["near_from"] for line in ordered for low, high in itertools.pairwise(line)]
    return sum(steps), len(steps)


def _near(grid: list[Measured], loss: str) -> tuple[list[float], list[float], int]:
    """The first near K of each case that has one, 1/ESS of pi* there, and how many have none."""
    cases = [case for case in grid if case["loss"] == loss]
    near = [case for case in cases if math.isfinite(case["near_from"])]
    return [case["near_from"] for case in near], [1 / case["ess_optimal"] for case in near], len(cases) - len(near)


def _relation(grid: list[Measured]) -> str:
    """How the first near K goes with 1/ESS of pi* under the reference."""
    parts = []
    for loss, name in NAMES.items():
        first, worth, none = _near(grid, loss)
        if not first:
            parts.append(f"{name}: at no K computed")
            continue
        ratios = [k / one for k, one in zip(first, worth, strict=True)]
        part = f"{name}: from {min(ratios):.2g} to {max(ratios):.2g} times 1/ESS of π* on"
        if len(set(first)) > 1 and len(set(worth)) > 1:
            correlation = statistics.correlation([math.log(k) for k in first], [math.log(one) for one in worth])
            part += f", correlation of logarithms {correlation:.2f}"
        parts.append(part + (f", at no K computed in {none}" if none else ""))
    return "; ".join(parts)


def _practice(ends: Mapping[int, Score], way: Score, grid: list[Measured]) -> str:
    """One sentence: which loss at small K, and how large K must be."""
    end = ends[SMALL_K]
    advice = f"take {end.best() or 'either loss'} if you train to the end"
    smallest = min(ends)
    less = f"; at K = {smallest}: {ends[smallest].told()}" if smallest < SMALL_K else ""
    stopped = f"take {way.best()}" if way.best() else "neither is mostly ahead"
    first, worth, none = _near(grid, "exo")
    needed = (
        f"before K is {max(k / one for k, one in zip(first, worth, strict=True)):.0f} times 1/ESS"
        if first and not none
        else "at any K computed here"
    )
    return (
        f"At K = {SMALL_K} {advice} (the higher J: {end.told()}{less}) and if you stop early, at equal KL, {stopped} "
        f"({way.told()}); do not count on mode-seeking {needed}, where ESS is the effective share of reference samples "
        "weighted by exp(r/β)."
    )


CLAIMS = (
    Claim(
        "B1",
        "With a full table both losses end at π*_β at every K; with limited capacity each comes near the minimiser of "
        "its limit only from a K on that grows as β falls",
        "not in the paper",
        function="exo_toy.finite_k.expected_exo_rw_loss, exo_toy.training.flow.gradient_flow",
        test="tests/test_analysis_fixed_points.py",
        script="analysis/fixed_points.py",
        figure="fixed_points",
        paper_value="none",
        evaluate=_fixed_points,
    ),
)
