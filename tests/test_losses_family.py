"""The losses on pairs that are not DPO and EXO: oracle, value at the reference, invariances, gradients."""

import math

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from exo_toy.losses import LOSSES, PreferenceLoss, aot_loss, aot_unpaired_loss, sppo_loss
from tests import loss_oracles, strategies
from tests.loss_cases import ELSEWHERE, OTHER_CASES, PAIR_CASES, REWARDED_CASES
from tests.loss_laws import LOGPS, SCORES, arguments, per_example
from tests.tolerances import assert_close

cases = pytest.mark.parametrize("case", PAIR_CASES, ids=lambda case: case.name)
rewarded = pytest.mark.parametrize("case", REWARDED_CASES, ids=lambda case: case.name)
by_name = pytest.mark.parametrize("name", LOSSES)
# Of tests that go through all cases at each draw.
fewer = settings(max_examples=settings().max_examples // 3)


def magnitude(values: list[float]) -> float:
    """The largest value there is, for tolerances: squares and exponentials amplify the rounding of their argument."""
    return max([1.0, *(abs(value) for value in values)])


def test_every_loss_of_the_table_is_tested():
    tested = [case.name for case in [*PAIR_CASES, *REWARDED_CASES, *OTHER_CASES]]
    assert len(set(tested)) == len(tested)
    assert set(tested) | ELSEWHERE == LOSSES.keys()


@by_name
def test_records_are_complete(name):
    record = LOSSES[name]
    assert record.source.replace(".", "").isdigit() and record.optimum
    losses = per_example(record.function(*arguments(name), **record.settings))
    assert losses.shape == (arguments(name)[0].shape[0],)
    assert losses.isfinite().all()


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        LOSSES["dpo"] = LOSSES["ipo"]
    with pytest.raises(TypeError):
        LOSSES["dpo"].settings["beta"] = 0.2


# Oracle


@fewer
@given(drawn=strategies.pairs(bound=8.0))
def test_agrees_with_the_oracle(device, drawn):
    """All cases on one draw: drawing takes longer than they do."""
    for case in PAIR_CASES:
        note(case.name)
        expected = case.by_oracle(drawn.logps)
        losses = case(*drawn.to(device).logps).losses
        # A slope times the rounding of the log ratios: e^8 for the scores, 16 for the squares.
        assert_close(losses, expected, scale=100 * magnitude(expected))


@given(drawn=strategies.pairs(bound=8.0), data=st.data())
def test_agrees_with_the_oracle_given_rewards(device, drawn, data):
    scores = data.draw(strategies.tensors((2, drawn.policy_chosen.shape[0]), -5.0, 5.0))
    for case in REWARDED_CASES:
        note(case.name)
        expected = case.by_oracle((*drawn.logps, *scores))
        losses = case(*drawn.to(device).logps, *scores.to(device)).losses
        assert_close(losses, expected, scale=100 * magnitude(expected))


@pytest.mark.parametrize("case", OTHER_CASES, ids=lambda case: case.name)
def test_other_losses_agree_with_the_oracle(case):
    tensors = arguments(case.name)
    assert_close(per_example(case(*tensors)), case.by_oracle(tensors), scale=100.0)


@pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss], ids=lambda loss: loss.__name__)
@given(drawn=strategies.pairs())
def test_sorted_losses_agree_with_the_oracle(loss, drawn):
    oracle = {aot_loss: loss_oracles.aot, aot_unpaired_loss: loss_oracles.aot_unpaired}[loss]
    rows = list(zip(*(values.tolist() for values in drawn.logps), strict=True))
    assert_close(loss(*drawn.logps, beta=drawn.beta).losses, oracle(rows, beta=drawn.beta), scale=100.0)


@given(drawn=strategies.pairs(), data=st.data())
def test_order_of_the_batch_does_not_matter_to_sorted_losses(drawn, data):
    order = data.draw(st.permutations(range(len(drawn.policy_chosen))))
    permuted = [logps[list(order)] for logps in drawn.logps]
    assert_close(aot_loss(*permuted, beta=1.0).losses, aot_loss(*drawn.logps, beta=1.0).losses)
    chosen_alone = permuted[0], drawn.logps[1], permuted[2], drawn.logps[3]
    assert_close(aot_unpaired_loss(*chosen_alone, beta=1.0).losses, aot_unpaired_loss(*drawn.logps, beta=1.0).losses)


@given(drawn=strategies.pairs(bound=8.0), data=st.data())
def test_sppo_with_win_rates(drawn, data):
    rates = data.draw(strategies.tensors(drawn.policy_chosen.shape, 0.0, 1.0))
    losses = sppo_loss(*drawn.logps, beta=drawn.beta, win_rate=rates).losses
    rows = zip(*(values.tolist() for values in (*drawn.logps, rates)), strict=True)
    expected = [loss_oracles.sppo(*row[:4], beta=drawn.beta, win_rate=row[4]) for row in rows]
    assert_close(losses, expected, scale=100 * magnitude(expected))
    one = sppo_loss(*drawn.logps, beta=drawn.beta, win_rate=rates[0].item()).losses
    assert_close(one[0], expected[0], scale=100 * magnitude(expected))
    # A rate below one half is the other label.
    swapped = sppo_loss(*drawn.swapped, beta=drawn.beta, win_rate=1 - rates).losses
    assert_close(swapped, losses, scale=100 * magnitude(expected))


# What is returned, and where


@cases
def test_implicit_rewards(case):
    logps = [logps.clone().requires_grad_() for logps in LOGPS]
    result = case(*logps)
    assert isinstance(result, PreferenceLoss)
    assert_close(result.chosen_rewards, case.settings["beta"] * (LOGPS[0] - LOGPS[2]))
    assert_close(result.rejected_rewards, case.settings["beta"] * (LOGPS[1] - LOGPS[3]))
    assert result.losses.requires_grad
    assert not result.chosen_rewards.requires_grad and not result.rejected_rewards.requires_grad


@cases
def test_value_at_the_reference(case):
    losses = case(LOGPS[0], LOGPS[1], LOGPS[0], LOGPS[1]).losses
    assert_close(losses, torch.full_like(losses, case.at_reference))


@rewarded
def test_value_at_the_reference_given_rewards(case):
    """With equal rewards the reference is the optimum; with others only their gap counts."""
    at_reference = LOGPS[0], LOGPS[1], LOGPS[0], LOGPS[1]
    assert_close(case(*at_reference, SCORES[0], SCORES[0]).losses, torch.zeros(3))
    value = case(*at_reference, *SCORES).losses
    assert (value > 1e-3).all()
    assert_close(case(*at_reference, SCORES[0] + 5, SCORES[1] + 5).losses, value, scale=10.0)


# Laws


@cases
def test_a_constant_added_to_both_log_ratios(case):
    """Losses on the margin do not see it; each of the others does."""
    losses = case(*LOGPS).losses
    shifted = case(LOGPS[0] - 1.3, LOGPS[1] - 1.3, *LOGPS[2:]).losses
    if case.shift_invariant:
        assert_close(shifted, losses, scale=10.0)
    else:
        assert (shifted - losses).abs().max() > 1e-3
    # None sees how policy and reference share the log ratio.
    both = case(LOGPS[0] - 2, LOGPS[1] + 3, LOGPS[2] - 2, LOGPS[3] + 3).losses
    assert_close(both, losses, scale=100.0)


@fewer
@given(drawn=strategies.pairs(bound=6.0))
def test_the_wrong_label_costs_more(drawn):
    """Where it does not, the loss is blind to the label or turned round."""
    margin = drawn.margin / drawn.beta
    for case in PAIR_CASES:
        note(case.name)
        difference = case(*drawn.logps).losses - case(*drawn.swapped).losses
        clear = (margin.abs() > 1e-3) & (difference.abs() > 1e-9)
        assert (difference.sign() == -margin.sign())[clear].all()
        assert (difference.abs() <= 1e-9)[margin.abs() < 1e-12].all()


def test_the_wrong_label_costs_more_somewhere():
    """The test above could not fail for a loss whose differences are never clear."""
    for case in PAIR_CASES:
        assert (case(*LOGPS).losses - case(LOGPS[1], LOGPS[0], LOGPS[3], LOGPS[2]).losses).abs().max() > 1e-2


@rewarded
def test_the_order_of_a_pair_with_rewards_means_nothing(case):
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = LOGPS
    swapped = policy_rejected, policy_chosen, ref_rejected, ref_chosen, SCORES[1], SCORES[0]
    assert_close(case(*swapped).losses, case(*LOGPS, *SCORES).losses, scale=10.0)


@rewarded
def test_minimum_where_the_gaps_agree(case):
    factor = {"rebel": 0.8}.get(case.name, 1.7 / 0.7)
    best = SCORES[0] * factor, SCORES[1] * factor
    zero = torch.zeros_like(SCORES[0])
    leaf = best[0].clone().requires_grad_()
    losses = case(leaf, best[1], zero, zero, *SCORES).losses
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    assert_close(losses, torch.zeros(3), scale=10.0)
    assert_close(gradient, torch.zeros(3), scale=10.0)
    for step in (-0.5, 0.5):
        assert (case(best[0] + step, best[1], zero, zero, *SCORES).losses > 1e-4).all()


# Gradients


@by_name
def test_gradcheck_and_gradgradcheck(name):
    record = LOSSES[name]
    # Wider temperatures than the table's: there second derivatives are too small to be tested.
    wide = {key: 0.7 if key in ("beta", "beta_pi", "beta_r") else value for key, value in record.settings.items()}
    wide |= {"tau": 0.5} if name == "discopop" else {}
    tensors = arguments(name)
    leaves = [x.clone().requires_grad_() for x in tensors if x.is_floating_point()]

    def call(*values):
        given_values = iter(values)
        return per_example(
            record.function(*(next(given_values) if x.is_floating_point() else x for x in tensors), **wide)
        )

    assert torch.autograd.gradcheck(call, leaves)
    # Along one direction, which torch draws from a generator of its own.
    assert torch.autograd.gradgradcheck(call, leaves, atol=1e-4, fast_mode=True)


@cases
def test_gradients_are_finite_and_exact_at_the_reference(case):
    """Where training starts: no kink may leave a NaN or half a slope there."""
    policy = [LOGPS[0].clone().requires_grad_(), LOGPS[1].clone().requires_grad_()]
    gradients = torch.autograd.grad(case(*policy, LOGPS[0], LOGPS[1]).losses.sum(), policy)
    step = 1e-5
    # DPOP has a kink there; its slope is the one towards a likelier chosen completion.
    for index, gradient in enumerate(gradients):
        sides = [1.0, 0.0] if case.name == "dpop" else [1.0, -1.0]
        moved = [[LOGPS[0], LOGPS[1]], [LOGPS[0], LOGPS[1]]]
        for pair, side in zip(moved, sides, strict=True):
            pair[index] = pair[index] + side * step
        values = [case(*pair, LOGPS[0], LOGPS[1]).losses for pair in moved]
        slope = (values[0] - values[1]) / (step * (sides[0] - sides[1]))
        torch.testing.assert_close(gradient, slope, rtol=1e-3, atol=1e-4)


def test_log_of_two():
    """The constants of the cases are what they are called."""
    assert math.isclose(loss_oracles.logistic(0.0), math.log(2))
