"""The experiment of alpha-divergences against the space written out, against mode_seeking, and its verdict."""

import copy
import itertools
import math

import pytest
import torch

from analysis import alpha_divergences, mode_seeking
from analysis.alpha_divergences import LIMIT, AlikePolicy, Config, TwoModes
from analysis.claims import alpha_divergences as claims
from analysis.claims.base import Verdict
from analysis.storage import StoredResult
from exo_toy.divergences import alpha_divergence
from exo_toy.finite_k import expected_alpha_rw_loss

SMALL = {"vocab_size": 4, "length": 3, "second_weight": 0.7, "width": 0.8, "beta": 0.5}


def written_out(policy: AlikePolicy) -> torch.Tensor:
    """log pi of every sequence, the first token most significant."""
    first, second, other = policy.log_token_probs().tolist()
    tokens = (first, other, other, second)
    return torch.tensor([math.fsum(row) for row in itertools.product(tokens, repeat=3)], dtype=torch.float64)


@pytest.mark.parametrize("free", [(0.0, 0.0), (1.5, -0.4), (-2.0, 3.0)])
def test_classes_lose_nothing(free):
    """Loss, limit and all that is measured equal those on the 64 sequences."""
    classes, sequences = TwoModes(**SMALL), mode_seeking.two_modes(**SMALL)
    policy = AlikePolicy(classes, free)
    by_class, log_pi = policy.log_probs().detach(), written_out(policy)
    assert by_class.shape == (1, 10)
    measured, wanted = classes.measure(by_class[0]), sequences.measure(log_pi)
    for name in ("mode_masses", "kl_policy_to_optimal", "kl_optimal_to_policy", "objective"):
        assert measured[name] == pytest.approx(wanted[name], rel=1e-11, abs=1e-12)
    betas = {"beta_pi": 1.0, "beta_r": 0.5}
    for alpha in (-0.3, 0.4, 1.0):
        ours = [classes.objective(alpha, k)(by_class).item() for k in (3, None)]
        loss = expected_alpha_rw_loss(log_pi, sequences.log_ref, sequences.reward, k=3, alpha=alpha, **betas)
        theirs = [loss.item(), alpha_divergence(log_pi, sequences.log_pi_star, alpha=alpha).item()]
        assert ours == pytest.approx(theirs, rel=1e-11)


def test_shares_count_from_the_reference_to_the_optimal_policy():
    classes = TwoModes(**SMALL)
    assert classes.measure(classes.log_ref)["share_of_gain"] == pytest.approx(0, abs=1e-12)
    assert classes.target_numbers()["share_of_gain"] == pytest.approx(1, rel=1e-12)


def test_ends_are_the_fixed_points_of_exo_and_dpo():
    """mode_seeking finds them with every position its own logits and the quadrature in one dimension."""
    for found, loss in zip(alpha_divergences.sweep(k=4, alphas=[0.0, 1.0], **SMALL), ("dpo", "exo"), strict=True):
        wanted = mode_seeking.fixed_point(k=4, loss=loss, starts=1, seed=0, **SMALL)
        assert found["is_minimum"]
        assert found["mode_masses"] == pytest.approx(wanted["mode_masses"], rel=1e-5)
        assert found["objective"] == pytest.approx(wanted["objective"], rel=1e-7)


def test_limits_are_the_minimisers_of_both_divergences():
    low, high = alpha_divergences.sweep(k=None, alphas=[0.0, 1.0], **SMALL)
    wanted = mode_seeking.local_minimisers(order=0, starts=4, certify=False, seed=0, **SMALL)
    assert low["mode_masses"] == pytest.approx(wanted["optimal_to_policy"]["mode_masses"], rel=1e-5)
    assert high["value"] == pytest.approx(wanted["policy_to_optimal"][0]["value"], rel=1e-9)


def test_a_branch_is_followed_both_ways():
    """Where two minima are, both are found at every alpha; without continuation some starts would miss one."""
    found = alpha_divergences.sweep(k=None, alphas=[0.8, 1.0, 1.2], **{**SMALL, "length": 5, "beta": 0.3})
    assert [point["n_optima"] for point in found] == [2, 2, 2]
    assert all(point["optima_values"] == sorted(point["optima_values"]) for point in found)


def test_an_optimum_stays_one_among_all_policies_and_another_point_does_not():
    (found,) = alpha_divergences.sweep(k=3, alphas=[0.5], **SMALL)
    case = {"k": 3, "alpha": 0.5, "starts": 1, "seed": 1, **SMALL}
    checked = alpha_divergences.in_full_space(logits=found["logits"], value=found["value"], **case)
    assert checked["is_minimum"] and abs(checked["least_excess"]) < 1e-10
    too_high = alpha_divergences.in_full_space(
        logits=found["logits"], value=found["value"] + 0.01, **{**case, "starts": 0}
    )
    assert too_high["least_excess"] == pytest.approx(-0.01, abs=1e-9)


def test_gradients_at_the_reference_are_those_of_the_whole_table():
    ks, sequences = [2, 6], mode_seeking.two_modes(**SMALL)
    at_end = alpha_divergences.gradients_at_reference(ks=ks, alpha=1.0, **SMALL)
    for name in ("cosine_to_limit", "cosine_to_rl", "scale"):
        assert list(at_end[name].values()) == pytest.approx([1.0, 1.0], rel=1e-10)
    found = alpha_divergences.gradients_at_reference(ks=ks, alpha=0.3, **SMALL)

    def gradient(k: int | None, alpha: float) -> torch.Tensor:
        logits = sequences.log_ref.clone().requires_grad_()
        tables = (sequences.log_ref, sequences.reward, sequences.log_pi_star)
        function = alpha_divergences.objective(*tables, beta=0.5, alpha=alpha, k=k)
        return torch.autograd.grad(function(logits.log_softmax(-1).unsqueeze(0)), logits)[0]

    for k in ks:
        for name, other in (("cosine_to_limit", gradient(None, 0.3)), ("cosine_to_rl", gradient(None, 1.0))):
            wanted = torch.cosine_similarity(gradient(k, 0.3), other, 0).item()
            assert found[name][str(k)] == pytest.approx(wanted, rel=1e-9)
            assert wanted < 0.999


# The run and its claim

TINY = Config(
    length=3, betas=(0.5,), alphas=(1.0, 0.0), ks=(2,), checked_ks=(), checked_alphas=(1.0,), checked_starts=1,
    reference_alphas=(0.0, 1.0),
)  # fmt: skip


@pytest.mark.slow
def test_tiny_run_has_what_claim_and_figure_read(tmp_path):
    from figures import alpha_divergences as figure
    from figures import style

    result = alpha_divergences.run(TINY)
    assert result.arrays["alphas"].tolist() == [0.0, 1.0]
    assert result.arrays["mode_masses"].shape == (1, 2, 2, 2)
    assert list(result.numbers["best"]["0.5"]) == ["2", LIMIT]
    assert {(case["k"], case["alpha"]) for case in result.numbers["full_space"]} == {(None, 1.0)}
    assert all(case["is_minimum"] and case["least_excess"] > -1e-9 for case in result.numbers["full_space"])
    best = result.numbers["best"]["0.5"][LIMIT]
    # The limit at alpha = 1 is J itself: nothing has more.
    assert best["share_by_alpha"]["1.0"] >= best["share"] - 1e-12
    config = {"beta": 0.5, "betas": [0.5]}
    stored = StoredResult("alpha_divergences", "quick", config, {}, result.numbers, result.arrays)
    outcome = claims.CLAIMS[0].evaluate({"alpha_divergences": stored})
    assert outcome.practice.startswith("With a policy too small for π*, at K = 2 ")
    with style.theme():
        paths = figure.draw(stored, tmp_path)
    assert [path.name for path in paths] == ["alpha_divergences.pdf", "alpha_divergences.png"]


def case(shares: tuple[float, float, float], chooses: float | None = None) -> dict[str, object]:
    """At alpha = 0, 1 and 1.5."""
    by_alpha = dict(zip(("0.0", "1.0", "1.5"), shares, strict=True))
    best = max(by_alpha, key=lambda alpha: by_alpha[alpha])
    return {
        "alpha": float(best), "share": max(shares), "share_within": max(shares[:2]), "share_by_alpha": by_alpha,
        "chooses_a_mode_from": chooses,
    }  # fmt: skip


def outcome(by_k: dict[str, dict[str, object]]) -> claims.Outcome:
    cosines = {"cosine_to_limit": {"2": 0.1, "4": 0.2}, "cosine_to_rl": {"2": 0.9, "4": 0.8}}
    at_reference = [{"alpha": alpha, **copy.deepcopy(cosines)} for alpha in (0.0, 1.0)]
    numbers = {"best": {"0.5": by_k}, "at_reference": at_reference}
    stored = StoredResult("alpha_divergences", "full", {"beta": 0.5}, {}, numbers, {})
    return claims.CLAIMS[0].evaluate({"alpha_divergences": stored})


def test_verdict_and_practice_when_one_is_best_everywhere():
    found = outcome({"2": case((0.4, 0.5, 0.45)), "4": case((0.4, 0.52, 0.5)), LIMIT: case((0.5, 0.9, 0.9), 1.0)})
    assert found.verdict == Verdict.HOLDS
    assert "in [0, 1] in 3, of the best α at all in 3" in found.ours
    assert "chooses a mode from α=1 at K=∞ on" in found.ours
    assert found.practice == (
        "With a policy too small for π*, at K = 4 keep α = 1 (EXO-rw): the best α gets 52.0% of the gain, DPO-rw's end "
        "40.0%, more candidates up to 90.0%; at no other K tested does another α pay."
    )


def test_verdict_and_practice_when_more_than_one_pays():
    found = outcome({"4": case((0.4, 0.52, 0.6)), "16": case((0.4, 0.5, 0.55)), LIMIT: case((0.5, 0.9, 0.9))})
    assert found.verdict == Verdict.CONDITIONAL
    assert "at K = 4 take α = 1.5, 8.0 points more" in found.practice
    assert found.practice.endswith("another α than 1 pays only in between: α = 1.5 at K = 16 (5.0 points).")
    assert "chooses a mode from no α on" in found.ours


def test_the_claim_fails_where_the_other_end_is_best():
    assert outcome({"4": case((0.6, 0.5, 0.5)), LIMIT: case((0.9, 0.8, 0.8))}).verdict == Verdict.FAILS
    assert outcome({"4": case((0.6, 0.5, 0.5)), LIMIT: case((0.8, 0.9, 0.8))}).verdict == Verdict.CONDITIONAL
