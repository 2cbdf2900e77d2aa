"""The expressivity experiment: its targets, its fits, its run and the verdict on what they give."""

import math
from dataclasses import asdict

import pytest
import torch

from analysis import claims, expressivity
from analysis.claims import Verdict
from analysis.claims.expressivity import _narrowest
from analysis.storage import StoredResult
from exo_toy.divergences import kl_divergence
from exo_toy.policies import GRUPolicy

SHARED = {"bonus": 2.0, "second_weight": 0.8, "width": 1 / 1.5}
TINY = expressivity.Config(
    openings=(0,),
    betas=(0.5,),
    binary_lengths=(2, 4),
    planted_lengths=(2, 3),
    review_lengths=(2, 3),
    fitted_binary_lengths=(3,),
    fitted_planted_lengths=(2,),
    fitted_review_lengths=(2,),
    kgram_starts=1,
    gru_widths=(1, 2),
    gru_starts=2,
    adam_steps=3,
    iterations=5,
)


def case(name: str, length: int, beta: float = 0.5) -> dict:
    return {"name": name, "length": length, "beta": beta, "opening": 0 if name == "review" else None, **SHARED}


def test_exact_numbers_of_parity():
    found = expressivity.exactly(**case("parity", 5))
    p = 1 / (1 + math.exp(-4))
    lost = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    assert found["ranks"] == found["states"] == [1, 2, 2, 2, 2]
    assert found["kgram_gaps"] == pytest.approx([lost] * 4 + [0.0], abs=1e-12)
    assert (found["closing_order"], found["close_order"]) == (4, 4)
    assert found["bound_states"] == [1, 2] and found["bounds"] == pytest.approx([lost, 0.0], abs=1e-12)
    assert found["largest_difference"] < 1e-12


def test_review_needs_more_than_its_writers():
    found = expressivity.exactly(**case("review", 3))
    assert max(found["states"]) > max(found["ranks"])
    assert found["states"] >= found["reference_states"]
    assert found["largest_dropped"] < found["largest_tolerance"] < found["smallest_kept"]


@pytest.mark.parametrize(("name", "length"), [("parity", 3), ("palindrome", 3), ("planted_modes", 3), ("review", 2)])
def test_minimisers_of_either_divergence_beat_each_other(name, length):
    for order in range(length - 1):
        found = expressivity.best_kgram(order=order, starts=1, seed=0, **case(name, length))
        assert found["policy_to_optimal"] <= found["closest_policy_to_optimal"] + 1e-12
        assert found["policy_to_optimal"] == min(found["start_values"]) > 1e-4
    # The full order holds it exactly.
    found = expressivity.best_kgram(order=length - 1, starts=1, seed=0, **case(name, length))
    assert abs(found["policy_to_optimal"]) < 1e-10 and abs(found["optimal_to_policy"]) < 1e-12


def test_descent_of_many_is_that_of_each():
    problem = expressivity.target(**case("palindrome", 3))
    generator = torch.Generator().manual_seed(0)
    policies = [GRUPolicy(problem.space, 2, generator=generator) for _ in range(3)]
    generator.manual_seed(0)
    alone = [GRUPolicy(problem.space, 2, generator=generator) for _ in range(3)]
    together = expressivity.descend(policies, problem.log_pi_star, steps=4, learning_rate=0.05)
    for policy, one, gap in zip(policies, alone, together, strict=True):
        (by_itself,) = expressivity.descend([one], problem.log_pi_star, steps=4, learning_rate=0.05)
        assert gap.item() == pytest.approx(by_itself.item(), rel=1e-9)
        table = policy.log_probs().detach()[0]
        assert gap.item() == pytest.approx(kl_divergence(problem.log_pi_star, table).item(), abs=1e-12)
        assert gap.item() < kl_divergence(problem.log_pi_star, problem.log_ref).item()


def test_wide_gru_closes_the_gap_of_a_short_parity():
    found = expressivity.best_gru(
        gru_width=4, starts=4, steps=100, learning_rate=0.05, iterations=200, seed=1, **case("parity", 3)
    )
    assert (
        -1e-12 <= found["gap"] < expressivity.CLOSE < min(expressivity.exactly(**case("parity", 3))["kgram_gaps"][:2])
    )
    assert found["gap"] <= min(found["gaps_by_adam"]) + 1e-12


def test_first_below():
    assert expressivity.first_below([0.5, 1e-4, 0.0], 1e-3) == 1
    assert expressivity.first_below([0.5, 1e-4, -1e-16], 1e-12) == 2


@pytest.fixture(scope="module")
def result() -> StoredResult:
    found = expressivity.run(TINY)
    return StoredResult("expressivity", "tiny", asdict(TINY), {}, found.numbers, found.arrays)


def test_tiny_run_has_every_case(result):
    numbers = result.numbers
    assert [(c["name"], c["length"]) for c in numbers["exact"]][::2] == [
        ("parity", 2), ("palindrome", 2), ("planted_modes", 2), ("review", 2)]  # fmt: skip
    assert [(c["name"], c["order"]) for c in numbers["kgrams"]][-4:] == [
        ("planted_modes", 0), ("planted_modes", 1), ("review", 0), ("review", 1)]  # fmt: skip
    assert len(numbers["grus"]) == 8
    assert result.arrays["singular_values.parity.4"][:, 0] == pytest.approx([1.0] * 4)
    # Behind the end of a row there is nothing.
    assert math.isnan(result.arrays["singular_values.parity.4"][0, 1])


def test_verdict_follows_the_counts(result):
    (claim,) = (claim for claim in claims.CLAIMS if claim.id == "C12")
    outcome = claims.judge(claim, {"expressivity": result})
    assert outcome.verdict == Verdict.CONDITIONAL
    assert "palindromes take 4 states at T=4" in outcome.ours
    for name, change in (
        ("parity", {"states": [1, 2, 3, 2]}),
        ("parity", {"closing_order": 2}),
        ("palindrome", {"ranks": [1, 2, 3, 2]}),
    ):
        exact = [{**c, **change} if (c["name"], c["length"]) == (name, 4) else c for c in result.numbers["exact"]]
        changed = StoredResult("expressivity", "tiny", result.config, {}, {**result.numbers, "exact": exact}, {})
        assert claims.judge(claim, {"expressivity": changed}).verdict == Verdict.FAILS


def test_narrowest_gru_is_named_or_said_to_be_missing():
    cases = [
        {"name": "parity", "length": 4, "width": width, "gap": gap} for width, gap in ((1, 0.5), (2, 9e-4), (4, 1e-6))
    ]
    cases.append({"name": "planted_modes", "length": 3, "width": 4, "gap": 0.02})
    assert _narrowest(cases) == "parity T=4: width 2, planted modes T=3: none up to 4 (best 2.0e-02)"
