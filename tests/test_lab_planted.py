"""Every planted defect is caught, by its name; and the same loss without it is not accused."""

import functools
import re

import pytest

from exo_toy import plots
from exo_toy.lab import FINDINGS, characterize, defects
from tests.planted_losses import PLANTED

# Of those that can be planted in a function; "order" is what is left where neither ties nor unread rewards explain it.
UNPLANTED = {"order"}


@functools.cache
def found(name):
    function, settings = PLANTED[name]
    return defects(function, settings=settings)


def codes(name):
    return {finding.code for finding in found(name)}


@pytest.mark.parametrize("name", PLANTED)
def test_defects_are_caught_and_named(name):
    assert name.split(",")[0] in codes(name), found(name)


def test_every_finding_is_planted():
    assert {name.split(",")[0] for name in PLANTED} | UNPLANTED == FINDINGS.keys()


@pytest.mark.parametrize(
    ("name", "text", "example"),
    [
        ("unnormalised target", r"falls to -4.54e-05.*sums to 1 \+4.54e-05", "margin 10"),
        ("label_smoothing changed", "label_smoothing = 0 gives the loss of 0.001", ""),
        ("alpha", "alpha = 0.3 gives the optimum of Amari's alpha = 0.7", ""),
        ("alpha, list", "alpha = 0.2 tends to the gradient of Amari's alpha = 0.8", ""),
        ("first candidates", "the rewards of candidates 3, 4 of 4 change nothing", ""),
        ("ties", "ties are resolved by position", r"rewards \(1, 1, 0.7\)"),
        ("infinite", "an infinite loss of finite numbers in float64", "pc -1420, pr 0, rc 0, rr 0"),
        ("infinite, list", "an infinite loss", r"rewards \(746, 0\)"),
        ("in-place, list", "writes to its argument rewards", ""),
        ("dtype", "float64 in, float32 out; what the laboratory finds has its digits", ""),
        ("raises", "IndexError: no such candidate", "pc -inf"),
        ("nan", "NaN in float64", "pc 0, pr 0, rc 0, rr 0"),
        ("nan, underflow", "NaN in float64", r"rewards \(746, 0\)"),
        ("ignored", "in_float32 = True and False give the same loss: nothing reads it", ""),
        ("ignored, temperature", "beta_r = 2.0 and 1.5 give the same loss: nothing reads it", ""),
        ("nan, ties", "NaN in float64", r"rewards \(0, 0\)"),
        ("mask", "not that of the other candidates", "mask"),
        ("reversed", "pc is taken for the chosen one's, pr for the rejected", "margin 0.5 and -0.5"),
        ("in-place, unseen", "writes to its argument pc", ""),
    ],
)
def test_the_diagnosis_is_the_right_one(name, text, example):
    named = [finding for finding in found(name) if finding.code == name.split(",")[0]]
    assert any(re.search(text, finding.text) and re.search(example, finding.example) for finding in named), named


@pytest.mark.parametrize("name", ["label_smoothing range", "double backward", "low precision", "in-place", "blind"])
def test_defects_of_one_kind_bring_no_other(name):
    # A target that divides by what may be zero is NaN at -inf besides.
    assert codes(name) - {"nan"} == {name}


def test_what_has_nan_everywhere_tends_nowhere_and_has_no_optimum(tmp_path):
    function, settings = PLANTED["nan, ties"]
    report = characterize(function, settings=settings, candidates=(2, 4))
    assert report.alignment.target == "undefined" and not report.alignment.bias
    assert {optimum.verdict for optimum in report.optima} == {"undefined"}
    assert all(optimum.log_pi.isnan().all() for optimum in report.optima)
    assert "Expected gradient as K grows: undefined, it has NaN" in str(report)
    assert plots.loss_page(report, tmp_path / "page.png").stat().st_size > 0


def test_order_is_reported_where_position_weighs():
    def weighted(log_ratio, rewards, *, beta_pi):
        position = 1 + 0.1 * rewards.cumsum(-1).detach() * 0 + log_ratio.new_tensor(range(log_ratio.shape[-1]))
        return (position * (beta_pi * log_ratio - rewards) ** 2).sum(-1)

    report = characterize(weighted, settings={"beta_pi": 0.5}, candidates=(2, 4))
    assert "order" in report.codes
    assert report.unchanged_by["the order of the candidates"] is False
