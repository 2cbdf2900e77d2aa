"""The laboratory recognises the library's losses, and what it measures is right."""

import functools
import math

import pytest
import torch

from exo_toy.finite_k import expected_dpo_rw_loss, expected_exo_rw_loss
from exo_toy.lab import FINDINGS, KINDS, LabError, characterize
from exo_toy.lab.binding import examine
from exo_toy.lab.claims import settings_of
from exo_toy.lab.draws import draws, multisets
from exo_toy.lab.gradients import LISTED, POLICIES, align, expected, extrapolated
from exo_toy.lab.laws import curve, invariances
from exo_toy.lab.optimum import LABELLED
from exo_toy.lab.report import MARGINS
from exo_toy.lab.scores import alpha_of, score_of
from exo_toy.lab.subject import LOG_RATIO, probe
from exo_toy.losses import LOSSES, dpo_loss, dpo_rw_loss, exo_pref_loss, exo_rw_loss, f_dpo_loss, ipo_loss
from tests import loss_oracles, oracles
from tests.planted_losses import rewards_as_weights
from tests.tolerances import assert_close

BETA = {"beta": 0.5}
BETAS = {"beta_pi": 0.5, "beta_r": 1.5}


def test_exo_is_parallel_to_rl_at_the_reference_for_any_k_and_dpo_is_not():
    subjects = (examine(loss, settings=BETAS) for loss in (exo_rw_loss, dpo_rw_loss))
    exo, dpo = (align(subject, candidates=(2, 4, 8)) for subject in subjects)
    assert exo.at_reference == pytest.approx((1, 1, 1), abs=1e-12)
    assert dpo.at_reference[-1] < 1 - 1e-3


@pytest.mark.parametrize("k", [2, 3, 4, 64])
@pytest.mark.parametrize(("loss", "exact"), [(exo_rw_loss, expected_exo_rw_loss), (dpo_rw_loss, expected_dpo_rw_loss)])
def test_expectations_are_those_of_the_closed_forms(loss, exact, k):
    subject = examine(loss, settings=BETAS)
    values, gradients = expected(subject, LISTED, POLICIES, k)
    logits = POLICIES.clone().requires_grad_()
    wanted = exact(logits.log_softmax(-1), LISTED.log_ref, LISTED.reward, k=k, **BETAS)
    # Ten thousand terms, and the quadrature.
    assert_close(values, wanted, scale=100)
    assert_close(gradients, torch.autograd.grad(wanted.sum(), logits)[0], scale=100)


@pytest.mark.parametrize(
    ("kind", "k", "n"), [("list", 4, 70), ("pair", 2, 25), ("ranked", 3, 125), ("unpaired", 2, 10)]
)
def test_probabilities_of_all_draws_sum_to_one(kind, k, n):
    index, weight = draws(kind, LABELLED, k, ordered=False)
    assert len(index) == n
    assert_close(weight.sum(), 1.0)


def test_multisets_weigh_as_the_tuples_do():
    index, weight = draws("list", LISTED, 3, ordered=False)
    tuples, each = draws("list", LISTED, 3, ordered=True)
    assert torch.equal(index, multisets(3, 3))
    for row, total in zip(index, weight, strict=True):
        assert_close(each[(tuples.sort(-1).values == row).all(-1)].sum(), total)


def test_rankings_of_two_are_bradley_and_terrys():
    index, weight = draws("pair", LABELLED, 2, ordered=False)
    p, reward = LABELLED.log_ref.exp(), LABELLED.reward
    for (won, lost), have in zip(index, weight, strict=True):
        assert_close(have, 2 * p[won] * p[lost] * (reward[won] - reward[lost]).sigmoid())


def test_the_limit_of_a_series_in_one_over_k_is_exact():
    k = torch.tensor([2.0, 4, 8, 16, 32], dtype=torch.float64)
    assert_close(extrapolated(0.7 + 3 / k - 5 / k**2 + 2 / k**3 + 1 / k**4), 0.7, scale=100)


def test_weights_on_the_margin():
    exo = curve(examine(exo_pref_loss, settings={"beta": 0.5, "label_smoothing": 1e-3}), MARGINS)
    dpo = curve(examine(dpo_loss, settings=BETA), MARGINS)
    assert_close(dpo.weight, (-dpo.margin).sigmoid())
    # The figures to be seen: nothing is learnt from badly misordered pairs.
    slope = [loss_oracles.sigma(m) * loss_oracles.sigma(-m) * (math.log(999) - m) for m in (-20.0, 0.0)]
    assert exo.weight[[0, 80]].tolist() == pytest.approx(slope)
    assert slope == pytest.approx([5.55e-8, 1.727], rel=1e-3)
    assert exo.losses[80].item() == pytest.approx(oracles.exo_pref(0, 0, 0, 0, 1.0, 1e-3))


def test_invariances():
    assert invariances(examine(exo_rw_loss, settings=BETAS)) == {
        "a constant added to the log ratios": True,
        "a constant added to the rewards": True,
        "other rewards": False,
        "the order of the candidates": True,
    }
    assert invariances(examine(ipo_loss, settings=BETA))["the label"] is False


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 1.7])
def test_alpha_is_read_off_a_score(alpha):
    scores = {1.0: lambda a: a}
    score = scores.get(alpha, lambda a: torch.expm1((alpha - 1) * a) / (alpha - 1))
    subject = examine(f_dpo_loss, settings={"beta": 0.5, "score": score})
    assert alpha_of(subject) == pytest.approx(alpha, abs=1e-8)
    a = torch.tensor([-2.0, 0.3, 1.0], dtype=torch.float64)
    assert_close(score_of(subject)(a), score(a), scale=100)


@pytest.mark.parametrize("kind", ["nca_pair", "hinge", "cal_dpo"])
def test_losses_that_compare_no_score_have_none(kind):
    assert score_of(examine(LOSSES[kind].function, settings=settings_of(kind))) is None


@pytest.mark.parametrize(("name", "kind"), [(name, record.kind) for name, record in LOSSES.items()])
def test_the_signature_tells_the_kind(name, kind):
    subject = examine(LOSSES[name].function, settings=settings_of(name))
    assert subject.kind == ("valued" if name == "dro" else {"batch": "pair"}.get(kind, kind))
    assert subject.batching == ("mixed" if kind == "batch" else "rows")


def test_a_tuple_and_positional_temperatures_are_understood():
    def trainers(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0, reduce=False):
        found = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=label_smoothing)
        return tuple(found)

    report = characterize(trainers, settings={"beta": 0.3})
    assert (report.kind, report.beta_pi) == ("pair", 0.3)
    assert {"dpo"} <= set(report.equals)
    bound = characterize(functools.partial(trainers, beta=0.3))
    assert (bound.name, bound.settings["beta"]) == ("trainers", 0.3)
    starred = characterize(lambda *tensors: dpo_loss(*tensors, beta=0.3), kind="pair")
    # No temperature is told: that of the optimum is found.
    assert starred.optima[0].verdict == "pi*" and "dpo" in starred.equals
    assert (starred.temperatures, starred.beta_pi) == ({"beta": "found"}, pytest.approx(0.3, rel=1e-9))
    assert "  beta = 0.3 not told, but shown by the loss\n" in str(starred)
    wrong = characterize(lambda *tensors: dpo_loss(*tensors, beta=0.3), kind="pair", settings={"beta": 0.6})
    assert (wrong.optima[0].verdict, wrong.beta_pi) == ("pi* at another temperature", 0.6)


def test_the_page_says_it_all():
    page = str(characterize(exo_rw_loss, settings=BETAS, candidates=(2, 4, 8, 16)))
    for part in ("exo_rw_loss", "K = 16", "KL(policy||optimal)", "pi*, beta = 0.75", "gradient weight", "No findings"):
        assert part in page
    assert max(map(len, page.splitlines())) <= 120


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (lambda a, b, c, d, e: a, {}, r"kind must be told, one of list, .* 5 tensors \(a, b, c, d, e\)"),
        (lambda a, b, *, gamma: a, {}, "gamma has no default: give it a value"),
        (lambda a, b: a.sum(-1), {"kind": "triple"}, "kind must be one of list, .*; got 'triple'"),
        (lambda a, b: a, {}, r"must return one loss per example, \[3\] here; got \[3, 2\]"),
        (lambda a, b: a @ b, {}, r"fails as a loss of kind 'list' on a \[3, 2\], b \[3, 2\]"),
        (min, {}, "the loss must have a signature"),
    ],
)
def test_losses_that_cannot_be_examined(function, arguments, message):
    with pytest.raises(LabError, match=message):
        characterize(function, **arguments)


def test_constants():
    assert len(FINDINGS) == len(set(FINDINGS.values()))
    assert set(KINDS) >= {"list", "pair"}
    assert probe(examine(dpo_loss, settings=BETA), LOG_RATIO, LOG_RATIO)[2].abs().max() == 0
    assert math.isclose(POLICIES.exp().sum().item(), 4)


@pytest.mark.parametrize(("k", "target"), [((2, 4, 8), "undecided"), ((2, 4, 8, 16, 32, 64), "KL(optimal||policy)")])
def test_too_few_candidates_leave_the_divergence_undecided(k, target):
    found = align(examine(dpo_rw_loss, settings=BETAS), candidates=k)
    assert found.target == target
    assert bool(found.bias) is (target != "undecided")
    # What is far from all is none of them at any K.
    assert align(examine(rewards_as_weights, settings={"beta_pi": 0.5}), candidates=k[:3]).target == "none"
