"""Fixed points at finite K: full tables, the documented case, the start of training, and what a run stores."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis import fixed_points, storage
from analysis.claims import Verdict
from analysis.claims.fixed_points import CLAIMS
from exo_toy.finite_k import expected_dpo_rw_loss, expected_exo_rw_loss
from exo_toy.logspace import expectation
from exo_toy.policies import KGramPolicy, closest_kgram
from exo_toy.targets import optimal_policy
from figures import fixed_points as figure
from figures import style
from tests.strategies import Problem, problems

TINY = fixed_points.Config(
    table_problems=1, table_ks=(2,), planted_length=2, planted_ks=(2,), worlds=("random",), orders=(0,),
    temperatures=(0.5, 1.0), ks=(2, 4), iterations=10, path_temperatures=(0.5,), path_ks=(4,),
    fractions=(0.05, 2.0), natural_orders=(), random_starts=0, rtol=1e-4,
)  # fmt: skip
LOSSES = {"exo": expected_exo_rw_loss, "dpo": expected_dpo_rw_loss}


@pytest.fixture(scope="module")
def result():
    found = fixed_points.run(TINY)
    config = storage.decode(storage.encode(dataclasses.asdict(TINY)))
    return storage.StoredResult("fixed_points", "tiny", config, {}, found.numbers, found.arrays)


@given(problems(max_k=64, spread=3.0), st.sampled_from(["exo", "dpo"]))
def test_both_losses_are_stationary_at_the_optimal_policy_at_every_k(problem: Problem, loss: str):
    """On every tuple of candidates the two softmaxes agree there, whatever K and the split of beta."""
    log_pi_star, _ = optimal_policy(problem.log_ref, problem.reward, beta=problem.beta)
    logits = log_pi_star.clone().requires_grad_()
    options = {"k": problem.k, "beta_pi": problem.beta_pi, "beta_r": problem.beta_r}
    value = LOSSES[loss](logits.log_softmax(-1), problem.log_ref, problem.reward, **options).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.abs().max().item() < 1e-10
    if loss == "exo":
        # Nothing is lower: it is a KL divergence.
        assert abs(value.item()) < 1e-10 * len(logits)


@pytest.mark.parametrize("loss", ["exo", "dpo"])
@pytest.mark.parametrize("seed", range(3))
def test_full_table(loss, seed):
    for k in (2, 64):
        found = fixed_points.full_table(k=k, loss=loss, seed=seed)
        assert found["is_minimum"]
        assert found["total_variation"] <= found["tolerance"] < 1e-6


@pytest.mark.slow
def test_documented_fixed_points():
    """Two planted modes of length 6, independent positions: figures known to four digits."""
    spread = fixed_points.reward_spread("planted6")
    settings = {"world": "planted6", "temperature": 0.5 / spread, "order": 0, "iterations": 120}
    found = fixed_points.fixed_points(loss="exo", ks=[2, 32, 1024], random_starts=0, seed=0, **settings)
    divergences = [point["kl_policy_to_optimal"] for point in found["points"]]
    assert divergences == pytest.approx([2.089, 0.669, 0.494], abs=6e-4)
    assert found["points"][0]["mode_masses"] == pytest.approx([0.0095, 0.0039], abs=6e-5)
    assert found["limits"]["exo"]["kl_policy_to_optimal"] == pytest.approx(0.4936, abs=6e-5)
    assert found["limits"]["dpo"]["kl_policy_to_optimal"] == pytest.approx(2.0340, abs=6e-5)
    assert found["near_from"] == 1024
    # At small K the policy is nearer to the other divergence's minimiser.
    first, *_, last = found["points"]
    assert first["distance_dpo"] < first["distance_exo"] and last["distance_exo"] < 0.05 < last["distance_dpo"]


@pytest.mark.parametrize("loss", ["exo", "dpo"])
@pytest.mark.parametrize("world", ["reviews", "random"])
def test_expected_is_the_library_s(world, loss):
    given = fixed_points.problem(world, 0.4)
    policy = KGramPolicy(given.space, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for logits in policy.parameters():
            logits.copy_(torch.randn(logits.shape, generator=generator, dtype=logits.dtype))
    for k in (2, 300):
        mine = fixed_points.expected(loss, given, k)(policy.log_probs())
        theirs = LOSSES[loss](policy.log_probs(), given.log_ref, given.reward, k=k, beta_pi=1.0, beta_r=0.4).sum()
        assert mine.item() == pytest.approx(theirs.item(), rel=1e-11, abs=1e-11)
        parameters = list(policy.parameters())
        gradients = (torch.autograd.grad(value, parameters) for value in (mine, theirs))
        for one, other in zip(*gradients, strict=True):
            assert (one - other).abs().max().item() < 1e-11


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("world", ["planted", "reviews", "random"])
def test_first_step_is_reinforcement_learning_s(world, order):
    """EXO-rw's gains the same at every K; by the natural gradient no direction of the policy's gains more."""
    given = fixed_points.problem(world, 0.3)

    def first(loss, k, metric):
        policy = closest_kgram(given.space, given.log_ref, order)
        objective = loss if k is None else fixed_points.expected(loss, given, k)
        return fixed_points.first_share(policy, given, objective, metric)

    def cost(log_pi):
        return -expectation(log_pi[0], given.reward)

    for metric in ("euclidean", "natural"):
        reinforcement = first(cost, None, metric)
        for k in (2, 5, 256):
            assert first("exo", k, metric) == pytest.approx(reinforcement, rel=1e-9)
            if metric == "natural":
                assert first("dpo", k, metric) <= reinforcement * (1 + 1e-9)
    assert 0 < first(cost, None, "euclidean") <= first(cost, None, "natural") * (1 + 1e-12) <= 1 + 1e-12


def test_small_distances_gain_the_first_share():
    settings = {"world": "random", "order": 0, "temperature": 0.5, "k": 4, "loss": "exo", "rtol": 1e-8}
    found = fixed_points.path(metric="euclidean", fractions=[1e-6, 4e-6], **settings)
    # What is left falls with the root of the distance.
    errors = [abs(share - found["first_share"]) for share in found["shares"]]
    assert errors[1] < 0.01
    assert errors[0] == pytest.approx(errors[1] / 2, rel=0.05)


@pytest.mark.parametrize(
    ("excess", "wanted"),
    [([0.5, 0.05, 0.01], 4), ([0.05, 0.5, 0.01], 8), ([0.05, 0.01, 0.0], 2), ([0.5, 0.01, 0.2], math.inf)],
)
def test_near_from(excess, wanted):
    assert fixed_points.near_from([2, 4, 8], excess) == wanted


@pytest.mark.slow
def test_figures_are_drawn_from_a_run(result, tmp_path):
    with style.theme():
        paths = figure.draw(result, tmp_path)
    assert {Path(path).stem for path in paths} == set(figure.CAPTIONS)
    assert all(path.stat().st_size > 1000 for path in paths)


@pytest.mark.parametrize(
    ("share", "wanted"),
    [(5e-5, figure.EQUAL), (-5e-5, figure.EQUAL), (0.005, figure.SHADES["exo"][0]), (-0.2, figure.SHADES["dpo"][2])],
)
def test_colour_of_a_cell(share, wanted):
    assert figure._color(share, 1e-4)[0] == wanted


def judged(result, **changes):
    """The outcome with parts of the numbers replaced."""
    changed = dataclasses.replace(result, numbers={**result.numbers, **changes})
    return CLAIMS[0].evaluate({"fixed_points": changed})


@pytest.mark.slow
def test_claim_holds_on_a_run(result):
    outcome = judged(result)
    assert outcome.verdict in (Verdict.HOLDS, Verdict.CONDITIONAL)
    assert outcome.practice.startswith("At K = 4 ") and outcome.practice.endswith(".")


@pytest.mark.slow
def test_claim_fails_where_a_full_table_ends_elsewhere(result):
    first, *others = result.numbers["tables"]
    assert judged(result, tables=[{**first, "total_variation": 0.1}, *others]).verdict == Verdict.FAILS
    assert judged(result, tables=[{**first, "total_variation": math.nan}, *others]).verdict == Verdict.FAILS
    assert judged(result, tables=[{**first, "is_minimum": False}, *others]).verdict == Verdict.FAILS


@pytest.mark.slow
def test_claim_fails_where_the_solver_is_not_accurate_enough(result):
    assert judged(result, solver_error=1e-3).verdict == Verdict.FAILS
    assert judged(result, solver_error=math.nan).verdict == Verdict.FAILS


@pytest.mark.slow
def test_claim_is_conditional_where_a_lower_temperature_needs_fewer(result):
    def needing(low, high):
        changed = [{**case, "near_from": low if case["temperature"] < 0.7 else high} for case in result.numbers["grid"]]
        return judged(result, grid=changed)

    assert needing(64.0, 2.0).verdict == Verdict.HOLDS
    assert needing(2.0, 64.0).verdict == Verdict.CONDITIONAL
    assert "at any K computed here" in needing(math.inf, math.inf).practice


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "advice"), [(0.3, "take EXO-rw"), (-0.3, "take DPO-rw"), (0.0, "take either")])
def test_advice_follows_the_objective(result, shift, advice):
    """DPO-rw's fixed points, and EXO-rw's the same but for a shift of J."""
    grid = []
    for case in result.numbers["grid"]:
        twin = next(
            other
            for other in result.numbers["grid"]
            if other["loss"] == "dpo" and other["temperature"] == case["temperature"]
        )
        gain = case["optimal"]["objective"] - case["reference"]["objective"]
        moved = shift * gain if case["loss"] == "exo" else 0.0
        points = [{**point, "objective": point["objective"] + moved} for point in twin["points"]]
        grid.append({**case, "points": points})
    outcome = judged(result, grid=grid)
    assert advice in outcome.practice
    if shift:
        assert "by up to 0.3 of the gain" in outcome.practice
