"""The temperatures of losses on candidates that take none are read off them, exactly, or said to be assumed."""

import functools

import pytest

from exo_toy.lab import characterize
from exo_toy.lab.binding import examine
from exo_toy.losses import alpha_rw_loss, dpo_rw_loss, exo_rw_loss, fpo_loss, jensen_shannon, nca_rw_loss
from exo_toy.testing import assert_gradient_targets
from tests.planted_losses import ties_to_the_first

BETAS = {"beta_pi": 0.3, "beta_r": 0.2}
DIVERGENCES = {
    "exo_rw": exo_rw_loss,
    "dpo_rw": dpo_rw_loss,
    "alpha_rw": functools.partial(alpha_rw_loss, alpha=0.5),
    "alpha above 1": functools.partial(alpha_rw_loss, alpha=2.0),
    "fpo_js": functools.partial(fpo_loss, divergence=jensen_shannon),
}


def closed(loss, **settings):
    """The loss with its temperatures inside."""
    return lambda log_ratio, rewards: loss(log_ratio, rewards, **settings)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_both_are_shown_by_a_divergence(name):
    for beta_pi, beta_r in ((0.01, 100.0), (5.0, 0.01)):
        subject = examine(closed(DIVERGENCES[name], beta_pi=beta_pi, beta_r=beta_r), settings={})
        assert (subject.beta_pi, subject.beta_r) == (
            pytest.approx(beta_pi, rel=1e-10),
            pytest.approx(beta_r, rel=1e-10),
        )
        assert subject.temperatures == {"beta_pi": "found", "beta_r": "found"}


def test_what_was_told_stands():
    loss = closed(exo_rw_loss, **BETAS)
    half = examine(loss, settings={"beta_pi": 0.3})
    assert (half.beta_pi, half.beta_r) == (0.3, pytest.approx(0.2, rel=1e-10))
    assert half.temperatures == {"beta_pi": "told", "beta_r": "found"}
    # What contradicts it shows nothing.
    wrong = examine(loss, settings={"beta_pi": 0.6})
    assert (wrong.beta_pi, wrong.beta_r) == (0.6, 1.0)
    assert wrong.temperatures == {"beta_pi": "told", "beta_r": "assumed"}
    assert examine(exo_rw_loss, settings=BETAS).temperatures == {"beta_pi": "told", "beta_r": "told"}


def test_the_page_says_which():
    report = characterize(closed(dpo_rw_loss, **BETAS), candidates=(2, 4))
    assert report.equals == ("dpo_rw",) and {optimum.verdict for optimum in report.optima} == {"pi*"}
    assert "  beta_pi = 0.3 and beta_r = 0.2 not told, but shown by the loss\n" in str(report)
    assert not report.told
    # No divergence between both policies: NCA's is of another kind, and what sees ranks alone has none.
    nca, ranks = closed(nca_rw_loss, **BETAS), lambda f, r: ties_to_the_first(f, r, beta_pi=0.3)
    assert examine(ranks, settings={}).temperatures == {"beta_pi": "assumed", "beta_r": "assumed"}
    assert "  beta_pi = 1 and beta_r = 1 assumed, neither told" in str(characterize(nca, candidates=(2,)))


def test_assertions_need_not_be_told_either():
    assert_gradient_targets(closed(exo_rw_loss, **BETAS), "KL(policy||optimal)")
    with pytest.raises(
        AssertionError, match=r"it tends to that of no .*; beta_pi = 1 and beta_r = 1 assumed, for it was"
    ):
        assert_gradient_targets(lambda f, r: ties_to_the_first(f, r, beta_pi=0.3), "KL(policy||optimal)")
