"""The real_lengths experiment: on lengths that can be enumerated, its run and the verdict on what it gives."""

import copy
import math
from dataclasses import asdict

import pytest
import torch

from analysis import claims, real_lengths
from analysis.claims import Verdict
from analysis.storage import StoredResult
from exo_toy import divergences, targets
from exo_toy.automata import RewardDistribution
from exo_toy.finite_k import expected_dpo_rw_loss, expected_exo_rw_loss
from tests.tolerances import assert_close

TINY = real_lengths.Config(
    planted_lengths=(4,),
    orders=(1,),
    iterations=(1,),
    frontier_lengths=(5,),
    betas=(0.3, 1.0),
    best_of=(1, 4),
    frontier_orders=(1,),
    lengths=(8, 16),
    divergences=(0.03,),
    n_candidates=(2, 64),
    snis_samples=16,
    snis_repeats=9,
)


def paid(text: str, *, bonus: float, head_start: float) -> float:
    """The reward with two modes, by search in a string."""
    places = {phrase: text.find(phrase) for phrase in ("012", "321") if phrase in text}
    if not places:
        return 0.0
    decides = min(places, key=places.get)
    count = sum(text.startswith(decides, i) for i in range(len(text)))
    return bonus * count + (head_start if decides == "012" else 0.0)


def test_automata_pay_what_a_search_finds():
    tokens = real_lengths.uniform(6).space.tokens()
    texts = ["".join(map(str, row)) for row in tokens.tolist()]
    reward = real_lengths.paying(bonus=3.0, head_start=0.4).reward(tokens)
    assert_close(reward, [paid(text, bonus=3.0, head_start=0.4) for text in texts])
    mode = real_lengths.which().reward(tokens)
    for text, found in zip(texts, mode.tolist(), strict=True):
        first, second = (text.find(phrase) % 99 for phrase in ("012", "321"))
        assert found == (0 if first == second == 98 else 1 if first < second else 2)
    assert_close(real_lengths.occurrences().reward(tokens), [float(text.count("012")) for text in texts])


def test_modes_of_the_optimal_policy_are_those_of_enumeration():
    ref, automaton = real_lengths.uniform(6), real_lengths.paying(bonus=3.0, head_start=0.4)
    tokens = ref.space.tokens()
    log_star, _ = targets.optimal_policy(ref.log_prob(tokens)[0], automaton.reward(tokens), beta=1.0)
    mode = real_lengths.which().reward(tokens)
    wanted = [log_star[mode == i].exp().sum().item() for i in range(3)]
    assert real_lengths.modes_of_optimal(ref, automaton) == pytest.approx(wanted, abs=1e-12)


def test_descent_lowers_the_divergence_that_it_is_told_to():
    _, case = real_lengths.planted(lengths=(4, 6), order=1, start="first", bonus=3.0, head_start=0.4, iterations=(2, 8))
    ref, automaton = real_lengths.uniform(6), real_lengths.paying(bonus=3.0, head_start=0.4)
    tokens = ref.space.tokens()
    log_star, log_z = targets.optimal_policy(ref.log_prob(tokens)[0], automaton.reward(tokens), beta=1.0)
    assert case["log_z"] == pytest.approx(log_z.item(), abs=1e-12)
    assert case["optimal"]["kl_to_reference"] == pytest.approx(
        divergences.kl_divergence(log_star, ref.log_prob(tokens)[0]).item(), abs=1e-11
    )
    sought, mean = case["policy_to_optimal"], case["optimal_to_policy"]
    assert sought["kl_policy_to_optimal"] < mean["kl_policy_to_optimal"]
    assert mean["kl_optimal_to_policy"] < sought["kl_optimal_to_policy"]
    for found in (sought, mean):
        assert sum(found["modes"]) == pytest.approx(1.0, abs=1e-12)


def test_candidates_are_those_of_enumeration():
    case = real_lengths.candidates(
        length=6, divergence=0.03, n_candidates=(2, 64), share=0.1, snis_samples=8,
        snis_repeats=9, seed=0)  # fmt: skip
    ref, beta = real_lengths.reference(6, 0), case["beta"]
    tokens = ref.space.tokens()
    log_ref, reward = ref.log_prob(tokens)[0], real_lengths.occurrences().reward(tokens)
    log_star, log_z = targets.optimal_policy(log_ref, reward, beta=beta)
    log_pi, _ = targets.optimal_policy(log_ref, reward, beta=2 * beta)
    assert divergences.kl_divergence(log_star, log_ref).item() == pytest.approx(0.18, abs=1e-10)
    assert case["log_z"] == pytest.approx(log_z.item(), abs=1e-12)
    for name, log_p in (("optimal", log_star), ("policy", log_pi)):
        share = 1 / (2 * log_p - log_ref).exp().sum().item()
        assert math.exp(case["log_ess_share"][name]) == pytest.approx(share, rel=1e-11)
    assert case["limits"]["exo"] == pytest.approx(divergences.kl_divergence(log_pi, log_star).item(), abs=1e-12)
    assert case["limits"]["dpo"] == pytest.approx(-(log_star.exp() * (log_pi - log_ref)).sum().item(), abs=1e-12)
    settings = {"beta_pi": 1.0, "beta_r": beta}
    for k, found in case["losses"].items():
        exo = expected_exo_rw_loss(log_pi, log_ref, reward, k=int(k), **settings).item()
        dpo = expected_dpo_rw_loss(log_pi, log_ref, reward, k=int(k), **settings).item() - math.log(int(k))
        assert found == {"exo": pytest.approx(exo, abs=1e-11), "dpo": pytest.approx(dpo, abs=1e-11)}
    # The K that is named does, and half of it does not.
    k = 2 ** int(case["doublings_needed"]["exo"])
    near, far = (expected_exo_rw_loss(log_pi, log_ref, reward, k=n, **settings).item() for n in (k, k // 2))
    assert near >= 0.9 * case["limits"]["exo"] > far


def test_a_loss_that_never_comes_near_takes_infinitely_many():
    assert real_lengths.doublings(lambda k: 1 - 1 / k, 1.0, 0.1) == 4.0
    assert real_lengths.doublings(lambda k: 0.5, 1.0, 0.1) == math.inf
    assert real_lengths.doublings(lambda k: -2.0 + 2 / k, -2.0, 0.5) == 1.0


@pytest.fixture(scope="module")
def result() -> StoredResult:
    found = real_lengths.run(TINY)
    return StoredResult("real_lengths", "tiny", asdict(TINY), {}, found.numbers, found.arrays)


def test_tiny_run_has_every_case(result):
    numbers = result.numbers
    assert [(c["length"], c["order"]) for c in numbers["planted"]] == [(4, 1)]
    for case in numbers["planted"]:
        assert set(case["start_values"]) == set(real_lengths.STARTS)
        assert case["policy_to_optimal"]["kl_policy_to_optimal"] == min(case["start_values"].values())
    (case,) = numbers["frontier"]
    assert len(case["optimal"]) == 2 and set(case["kgrams"]) == {"1"}
    assert case["largest_difference"] < 1e-11
    assert case["best_of_n"][0] == pytest.approx([0.0, case["reference"][0]], abs=1e-12)
    assert [c["length"] for c in numbers["candidates"]] == [8, 16]


def test_frontier_bounds_every_policy():
    case = real_lengths.frontier(length=6, betas=(0.3, 1.0), best_of=(4,), orders=(1,), seed=0)
    ref = real_lengths.reference(6, 0)
    tokens = ref.space.tokens()
    log_ref, reward = ref.log_prob(tokens)[0], real_lengths.occurrences().reward(tokens)
    for beta, (kl, mean, _) in zip((0.3, 1.0), case["optimal"], strict=True):
        log_z = targets.optimal_policy(log_ref, reward, beta=beta)[1].item()
        assert mean - beta * kl == pytest.approx(beta * log_z, abs=1e-11)
        # J of pi*_beta is the most that there is.
        for other_kl, other_mean in [*case["best_of_n"], *case["kgrams"]["1"]]:
            assert other_mean - beta * other_kl < beta * log_z


def stored(result: StoredResult, change) -> StoredResult:
    """Results of the reported shape, changed: the tiny run's modes would be sought on longer completions only."""
    numbers = copy.deepcopy(result.numbers)
    for case in numbers["planted"]:
        case["policy_to_optimal"] |= {
            "modes": [0.0, 0.98, 0.02],
            "kl_policy_to_optimal": 1.0,
            "kl_optimal_to_policy": 9.0,
        }
        case["optimal_to_policy"] |= {
            "modes": [0.0, 0.6, 0.4],
            "kl_policy_to_optimal": 5.0,
            "kl_optimal_to_policy": 3.0,
        }
    for i, case in enumerate(numbers["candidates"]):
        case |= {
            "doublings_needed": {"exo": 5.0 + 9 * i, "dpo": 6.0 + 9 * i}, "length": 64 + 200 * i,
            "log_ess_share": {"optimal": -3.0 - 12 * i, "policy": -1.0 - 4 * i}}  # fmt: skip
    change(numbers)
    return StoredResult("real_lengths", "tiny", result.config, {}, numbers, {})


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda numbers: None, Verdict.HOLDS),
        (lambda numbers: numbers["planted"][0]["policy_to_optimal"].update(modes=[0.0, 0.6, 0.4]), Verdict.FAILS),
        (lambda numbers: numbers["planted"][0]["optimal_to_policy"].update(modes=[0.0, 0.95, 0.05]), Verdict.FAILS),
        (lambda numbers: numbers["planted"][0]["policy_to_optimal"].update(kl_policy_to_optimal=6.0), Verdict.FAILS),
        (lambda numbers: numbers["candidates"][1]["doublings_needed"].update(exo=6.0), Verdict.FAILS),
        (lambda numbers: numbers["candidates"][1]["doublings_needed"].update(dpo=math.inf), Verdict.FAILS),
        (lambda numbers: numbers["candidates"][1]["log_ess_share"].update(optimal=-4.0), Verdict.FAILS),
        # A policy without memory seeks nothing, and need not.
        (
            lambda numbers: numbers["planted"].append({**numbers["planted"][0], "order": 0, "policy_to_optimal": {}}),
            Verdict.HOLDS,
        ),
    ],
)
def test_verdict_follows_the_numbers(result, change, verdict):
    (claim,) = (claim for claim in claims.CLAIMS if claim.id == "B7")
    outcome = claims.judge(claim, {"real_lengths": stored(result, change)})
    assert outcome.verdict == verdict
    assert "T=4, k=1" in outcome.ours


def test_reference_is_one_at_all_lengths():
    short, long = real_lengths.reference(4, 0), real_lengths.reference(9, 0)
    for a, b in zip(short.logits, long.logits, strict=True):
        assert torch.equal(a, b)


def test_coverage_and_its_interval():
    """One value is always held, by an interval of no width; the score interval by hand."""
    own = RewardDistribution(torch.tensor([2.0]).double(), torch.zeros(1, 1).double())
    settings = {"beta": 0.5, "samples": 4, "repeats": 16, "generator": torch.Generator().manual_seed(0)}
    z = 1.959963984540054**2
    assert real_lengths.coverage(own, 4.0, **settings) == [1.0, pytest.approx(16 / (16 + z)), pytest.approx(1.0)]
    assert real_lengths.coverage(own, 4.1, **settings) == [0.0, pytest.approx(0.0), pytest.approx(z / (16 + z))]
    low, high = real_lengths.wilson(0.5, 100)
    assert (low, high) == (pytest.approx(0.4038315), pytest.approx(0.5961685))
