"""Losses as others write them: the laboratory understands their signatures, and what it says of them is so."""

import pytest
import torch

from exo_toy.lab import LabError, characterize, defects
from exo_toy.lab.binding import examine
from exo_toy.lab.claims import settings_of
from exo_toy.lab.gradients import align
from exo_toy.lab.optimum import LABELLED, tabular_optimum
from exo_toy.losses import LOSSES, dpo_loss, dpo_rw_loss, exo_rw_loss
from exo_toy.testing import assert_conforms, assert_gradient_targets
from tests import foreign_losses as foreign
from tests.tolerances import assert_close

BETAS = {"beta_pi": 0.5, "beta_r": 1.0}


def test_a_method_whose_temperature_is_in_the_object():
    report = characterize(foreign.Trainer(beta=0.3).dpo_loss)
    assert (report.equals[0], report.beta_pi) == ("dpo", pytest.approx(0.3, rel=1e-9))
    assert report.optima[0].verdict == "pi*"
    # No optimum shows the temperature of IPO: it is told.
    ipo = foreign.Trainer(beta=0.3, loss_type="ipo").dpo_loss
    assert characterize(ipo).equals == ()
    assert characterize(ipo, settings={"beta": 0.3}).equals == ("ipo",)


def test_a_module_that_returns_the_mean_first():
    report = characterize(foreign.PairLoss(beta=0.3))
    assert (report.name, report.equals[0]) == ("PairLoss", "dpo")
    assert "reduced" in report.codes


@pytest.mark.parametrize(
    ("function", "settings"),
    [
        (foreign.preference_loss, {"beta": 0.5}),
        (foreign.preference_loss, {"beta": 0.5, "label_smoothing": 0.2}),
        (foreign.interleaved, {"beta": 0.5}),
        (foreign.in_a_dictionary, {"beta": 0.5}),
        (foreign.on_ratios, {"beta": 0.5}),
    ],
)
def test_other_signatures_of_one_loss(function, settings):
    like = {"beta": 0.5, "label_smoothing": settings.get("label_smoothing", 0.0)}
    assert_conforms(function, like=dpo_loss, settings=settings, like_settings=like)


def test_arguments_by_their_names_and_not_their_places():
    subject = examine(foreign.interleaved, settings={"beta": 0.5})
    assert subject.positions == (0, 2, 1, 3)
    preferred = examine(lambda preferred, dispreferred, ref_preferred, ref_dispreferred: preferred, settings={})
    assert preferred.positions == (0, 1, 2, 3)
    for winner, loser in (("w", "l"), ("pos", "neg"), ("better", "worse"), ("yw", "yl")):
        names = f"policy_{loser}, policy_{winner}, ref_{loser}, ref_{winner}"
        assert examine(eval(f"lambda {names}: policy_{winner}"), settings={}).positions == (1, 0, 3, 2)
    labelled = examine(lambda policy, reference, good: (policy - reference) * (2 * good - 1), settings={})
    assert (labelled.kind, labelled.positions) == ("unpaired", (0, 1, 2))


def test_a_temperature_called_tau():
    report = characterize(foreign.loser_first, settings={"tau": 0.3})
    assert (report.beta_pi, report.told, report.equals[0]) == (0.3, True, "dpo")
    assert report.optima[0].verdict == "pi*" and not report.findings


def test_a_list_of_log_probabilities_reduced_to_one_number():
    assert_conforms(foreign.listwise, like=dpo_rw_loss, like_settings=BETAS)
    assert examine(foreign.listwise, settings={}).batching == "reduced"


@pytest.mark.slow
def test_the_gradient_of_one_number_for_a_batch():
    assert_gradient_targets(foreign.listwise, "KL(optimal||policy)", settings=BETAS)


def test_advantages_on_exponentials_are_no_divergence():
    report = characterize(foreign.group_relative, settings={"beta_pi": 0.5}, candidates=(2, 4, 8))
    assert report.alignment.target == "none"
    assert report.optima[0].verdict == "on the boundary"
    assert report.equals == ()


def test_what_is_computed_in_half_is_held_to_no_more_digits():
    report = characterize(foreign.in_half, settings={"beta": 0.5})
    assert "dpo" in report.equals and report.unchanged_by["a constant added to the log ratios"]
    assert report.codes == {"dtype"}
    assert "float64 in, bfloat16 out; what the laboratory finds has its digits" in str(report)


def test_half_types_inside_are_not_told_apart():
    (finding,) = defects(foreign.in_float16, settings={"beta": 0.5})
    assert finding.text == "float64 in, computed in a half type; what the laboratory finds has its digits"


def test_what_is_computed_in_float32_has_no_other_defect():
    """Differences of seven digits are no signs of order, shifts or detached gradients."""
    settings = {"beta_pi": 0.1, "beta_r": 0.1}
    subject = examine(foreign.in_float32, settings=settings)
    assert (subject.precision, subject.ordered) == (torch.float32, False)
    assert {finding.code for finding in defects(foreign.in_float32, settings=settings)} == {"dtype", "nan"}
    assert_conforms(foreign.in_float32, like=exo_rw_loss, settings=settings, dtypes=(torch.float32, torch.bfloat16))
    with pytest.raises(AssertionError, match=r"in_float32 is not exo_rw_loss: its loss in torch\.float64"):
        assert_conforms(foreign.in_float32, like=exo_rw_loss, settings=settings)


@pytest.mark.parametrize("name", LOSSES)
def test_the_librarys_own_losses_are_computed_in_float64(name):
    for settings in (settings_of(name), LOSSES[name].settings):
        assert examine(LOSSES[name].function, settings=settings).precision == torch.float64


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (foreign.in_numpy, "in_numpy gives a loss without a gradient by the policy: it is detached, or not torch's"),
        (foreign.with_column, r"with_column must return one loss per example, \[3\] here; got \[3, 1\]"),
        (foreign.average_of_seen(), "gives another loss when called again: it keeps a state, or draws numbers"),
        (foreign.counted, "counted must return a tensor of floating-point losses .*; got torch.int64"),
        (foreign.as_number, "as_number must return a tensor of floating-point losses .*; got an object of type float"),
        (foreign.undefined, "undefined gives NaN on ordinary numbers: chosen 0.3, rejected -0.8, ref_chosen 0"),
        (foreign.strict, r"strict fails as a loss of kind 'pair' on chosen \[3\], .*: KeyError: 'attention_mask'"),
        (foreign.on_many, r"on_many fails as a loss of kind 'pair' on chosen \[25\], .*: RuntimeError: out of memory$"),
        (foreign.masked, r"mask has no default: give it a value, as settings=\{'mask': ...\}"),
        (foreign.with_kl_pairs, "kind must be told, one of list, .*: a loss of 6 tensors"),
        (
            foreign.no_backward,
            "no_backward gives a loss whose backward pass fails: NotImplementedError: no backward yet",
        ),
        (foreign.infinite, "infinite gives an infinite loss on ordinary numbers: chosen 0.3, rejected -0.8"),
        (foreign.with_dropout, "with_dropout gives another loss when called again: it keeps a state, or draws numbers"),
        (
            foreign.on_meta,
            "on_meta must return a dense tensor on the device of its arguments; got torch.strided on meta",
        ),
        (
            foreign.sparse,
            "sparse must return a dense tensor on the device of its arguments; got torch.sparse_coo on cpu",
        ),
        (foreign.in_a_list, "in_a_list must return a tensor of floating-point losses .*; got an object of type list"),
        (
            foreign.float32_only,
            "float32_only takes tensors in float32 and not in float64, in which .*: convert them in",
        ),
        (lambda a, b, c, d: a[:0], r"must return one loss per example, \[3\] here; got \[0\]"),
        (foreign.PairLoss, "the loss must be a function, or an object that can be called; got the class PairLoss"),
        (foreign.Trainer.dpo_loss, "dpo_loss must be the method of an object; got that of a class"),
        (foreign.by_keyword, "chosen has no default: .*, or let it come by position if it is a tensor"),
        (lambda: torch.zeros(3), "<lambda> must take tensors by position; it takes none"),
        (lambda *tensors: tensors[0], "kind must be told, one of list, .*: a loss of no named tensors"),
        (
            foreign.without_near_ties,
            "must take equal completions, for candidates are drawn with repetition: let it take",
        ),
    ],
)
def test_what_is_no_such_loss_is_refused_in_words(function, message):
    with pytest.raises(LabError, match=message) as error:
        characterize(function, settings={"beta": 0.5})
    assert "\n" not in str(error.value)


def test_lengths_and_a_reference():
    report = characterize(foreign.per_token, settings={"beta": 0.5})
    assert (report.kind, report.equals, report.findings) == ("pair", (), ())
    # As SimPO's: log ratio = length (r + c) / beta.
    lengths, reward = LABELLED.lengths.double(), LABELLED.reward
    per_token = (report.optima[0].log_pi - LABELLED.log_ref) / lengths * 0.5 - reward
    assert_close(per_token, per_token.mean().expand(5), scale=1e6)
    assert examine(foreign.length_penalised, settings={"beta": 0.5}).positions == (0, 1, 2, 3, 4, 5)
    found = defects(foreign.length_penalised, settings={"beta": 0.5})
    assert {finding.code for finding in found} == {"low precision"}
    assert_conforms(foreign.per_token, like=foreign.per_token, settings={"beta": 0.5})


def test_losses_that_refuse_equal_completions_see_them_apart():
    report = characterize(foreign.without_ties, settings=BETAS, candidates=(2, 4))
    assert report.apart and "  equal completions are refused: it saw them 1e-10 apart\n" in str(report)
    assert report.equals == ("dpo_rw",) and {optimum.verdict for optimum in report.optima} == {"pi*"}
    assert report.findings == () and report.unchanged_by["the order of the candidates"]
    pairs = characterize(foreign.without_equal_pairs, settings={"beta": 0.5})
    assert pairs.apart and pairs.optima[0].verdict == "pi*" and "dpo" in pairs.equals
    assert not characterize(dpo_loss, settings={"beta": 0.5}).apart


def test_losses_that_take_no_positive_log_probabilities():
    report = characterize(foreign.of_log_probabilities, settings={"beta": 0.1})
    assert report.optima[0].verdict == "pi*" and "dpo" in report.equals and not report.findings
    assert report.curve.weight[80].item() == pytest.approx(0.5)

    def listed(policy_logps, ref_logps, rewards):
        assert policy_logps.max() <= 0
        return foreign.listwise(policy_logps, ref_logps, rewards)

    subject = examine(listed, settings=BETAS)
    assert tabular_optimum(subject, k=2).verdict == "pi*" and subject.level < 0


def test_what_moves_in_steps_is_found_nowhere():
    report = characterize(foreign.stepwise, settings={"beta": 0.5})
    assert report.optima[0].verdict == "no gradient"
    texts = {finding.code: finding for finding in report.findings}
    assert "it moves in steps" in texts["gradient"].text
    assert texts["gradient"].example in ("margin -0.5 and 0", "margin 0 and 0.5")
    constant = characterize(lambda a, b, c, d: 0 * a + 1)
    assert constant.optima[0].verdict == "no gradient" and "blind" in constant.codes


def test_a_loss_is_the_same_in_any_unit():
    report = characterize(lambda *pair: 1e-30 * dpo_loss(*pair, beta=0.5).losses, kind="pair", settings={"beta": 0.5})
    assert report.optima[0].verdict == "pi*" and report.findings == ()
    assert "dpo" in report.equals and "ipo" not in report.equals
    units = (
        align(examine(lambda f, r, unit=unit: unit * exo_rw_loss(f, r, **BETAS), settings=BETAS), candidates=(2, 4))
        for unit in (1, 1e-30)
    )
    for have, want in zip(*(found.cosines.values() for found in units), strict=True):
        assert have == pytest.approx(want, rel=1e-12)


def test_what_is_centred_in_its_batch_is_not_accused_of_more():
    report = characterize(foreign.centred, settings={"beta": 0.5})
    assert {"mixed"} <= report.codes <= {"mixed", "nan"}
    assert report.optima[0].verdict == "the reference"
    assert report.unchanged_by["the label"] is False


@pytest.mark.unchecked
@pytest.mark.parametrize("candidates", [(), (1, 2), (2, 3), (2.0, 4.0)])
def test_numbers_of_candidates_double(candidates):
    with pytest.raises(
        LabError, match="candidates must be whole numbers of at least 2, each twice the one before; got"
    ):
        characterize(dpo_rw_loss, settings=BETAS, candidates=candidates)


def test_settings_that_the_loss_does_not_take():
    with pytest.raises(LabError, match="interleaved has no parameter gamma"):
        characterize(foreign.interleaved, settings={"gamma": 1.0})
    for beta in (0, True, float("inf"), "0.1"):
        with pytest.raises(LabError, match=f"beta must be a number above 0; got {beta!r}"):
            characterize(foreign.interleaved, settings={"beta": beta})
    with pytest.raises(LabError, match=r"a loss of kind 'list' takes 2 or 3 tensors; got 4 \(policy_chosen_logps"):
        characterize(foreign.interleaved, kind="list", settings={"beta": 0.5})
