"""The family of losses at infinities and extremes, in every dtype."""

import itertools
import math

import pytest
import torch
from hypothesis import given, note, settings
from torch import Tensor

from exo_toy.losses import LOSSES, alpha_score, chi_po_loss, f_dpo_loss, jensen_shannon_score, nca_rw_loss, orpo_loss
from tests import strategies
from tests.loss_cases import PAIR_CASES, REWARDED_CASES
from tests.loss_laws import INF, LOG_RATIO, REWARDS, SCORES, PairCase, arguments
from tests.loss_laws import per_example as losses_of
from tests.tolerances import TOLERANCES, assert_close

cases = pytest.mark.parametrize("case", PAIR_CASES, ids=lambda case: case.name)
by_name = pytest.mark.parametrize("name", LOSSES)
HALF_TYPES = [torch.float16, torch.bfloat16]


def value_and_slopes(case: PairCase, chosen: float, rejected: float, dtype=torch.float64) -> tuple[Tensor, ...]:
    """Of one pair whose reference log-probabilities are 0."""
    leaves = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in (chosen, rejected)]
    zero = torch.zeros(1, dtype=dtype)
    losses = case(*leaves, zero, zero).losses
    return losses.detach(), *torch.autograd.grad(losses.sum(), leaves)


# Probability zero


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_probability_zero(case, dtype):
    """Value and slopes where the policy excludes a completion, worked out by hand; no NaN anywhere."""
    for wanted, chosen, rejected in [(case.no_chosen, -INF, 0.0), (case.no_rejected, 0.0, -INF)]:
        for got, value in zip(value_and_slopes(case, chosen, rejected, dtype), wanted, strict=True):
            assert_close(got, [value])


@cases
def test_probability_zero_is_the_limit_of_small_probabilities(case):
    """From -1e4 to -1e8 nats: what is finite in the limit is reached, what is infinite grows with its sign."""
    for wanted, chosen, rejected in [(case.no_chosen, -1.0, 0.0), (case.no_rejected, 0.0, -1.0)]:
        near, far = (value_and_slopes(case, size * chosen, size * rejected) for size in (1e4, 1e8))
        for limit, first, second in zip(wanted, near, far, strict=True):
            if math.isfinite(limit):
                # Slopes may fall like one over the log ratio.
                assert abs(second.item() - limit) < 1e-6
            else:
                assert second.sign().item() == math.copysign(1, limit)
                assert second.abs() > first.abs() > 10 or second.isinf()


# Large log ratios


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_large_log_ratios_make_no_nan(case, dtype):
    for chosen, rejected in itertools.product([-1e4, 0.0, 1e4], repeat=2):
        value, *slopes = value_and_slopes(case, chosen, rejected, dtype)
        assert not value.isnan().any()
        assert not any(slope.isnan().any() for slope in slopes)
        if chosen == rejected and case.shift_invariant:
            assert_close(value, [case.at_reference])


@cases
def test_large_log_ratios_have_exact_values(case):
    """By the oracle, wherever its naive formula does not overflow."""
    compared = 0
    for chosen, rejected in [
        (1e4, 0.0),
        (-1e4, 0.0),
        (0.0, 1e4),
        (0.0, -1e4),
        (1e4, 1e4),
        (-1e4, -1e4),
        (700.0, 699.0),
    ]:
        try:
            expected = case.oracle(chosen, rejected, 0.0, 0.0, **case.oracle_settings)
        except (OverflowError, ZeroDivisionError, ValueError):
            continue
        compared += 1
        assert_close(value_and_slopes(case, chosen, rejected)[0], [expected])
    assert compared >= (1 if case.exponential else 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_scores_that_overflow(dtype):
    """Two scores of +inf or -inf: the order of the log ratios decides, as in the limit."""

    def call(chosen: float, rejected: float, score) -> tuple[Tensor, Tensor]:
        leaf, other, zero = (torch.tensor([x], dtype=dtype) for x in (chosen, rejected, 0.0))
        leaf.requires_grad_()
        losses = f_dpo_loss(leaf, other, zero, zero, beta=0.5, score=score).losses
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    def chi(x: Tensor) -> Tensor:
        return alpha_score(x, alpha=2)

    def kl_ref_pi(x: Tensor) -> Tensor:
        return alpha_score(x, alpha=0)

    for score, large in [(chi, 1e4), (kl_ref_pi, -1e4)]:
        for chosen, rejected, value, slope in [
            (large + 5, large, 0.0, 0.0),
            (large, large + 5, INF, -INF),
            (large, large, math.log(2), -INF),
        ]:
            got, gradient = call(chosen, rejected, score)
            assert_close(got, [value])
            assert_close(gradient, [slope])


def test_the_slope_before_a_score_overflows_is_not_clamped():
    """A rejected completion that became e^30 times likelier: loss and slope say so."""
    leaf = torch.tensor([30.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    losses = f_dpo_loss(zero, leaf, zero, zero, beta=0.1, score=lambda x: alpha_score(x, alpha=2)).losses
    (slope,) = torch.autograd.grad(losses.sum(), leaf)
    assert_close(losses, [0.1 * math.expm1(30.0)])
    assert_close(slope, [0.1 * math.exp(30.0)])


def test_chi_po_has_no_gradient_beyond_its_clip():
    """Also on misordered pairs; without a clip it is f-DPO and has."""
    leaf = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    for max_margin, beyond in [(2.0, True), (INF, False)]:
        losses = chi_po_loss(zero, leaf, zero, zero, beta=0.5, max_margin=max_margin).losses
        (slope,) = torch.autograd.grad(losses.sum(), leaf)
        assert (slope.item() == 0) == beyond
    assert_close(jensen_shannon_score(torch.tensor([1e4, -INF, 0.0])), torch.tensor([math.log(2), -INF, 0.0]))


@pytest.mark.parametrize("case", REWARDED_CASES, ids=lambda case: case.name)
def test_large_gaps_of_rewards(case):
    for gap in (-1e4, -50.0, 50.0, 1e4):
        for margin in (-1e4, 0.0, 1e4, INF, -INF):
            leaf = torch.tensor([0.0 if margin == INF else margin], dtype=torch.float64, requires_grad=True)
            other = torch.tensor([-INF if margin == INF else 0.0], dtype=torch.float64)
            zero = torch.zeros_like(other)
            losses = case(leaf, other, zero, zero, torch.tensor([gap], dtype=torch.float64), zero).losses
            (slope,) = torch.autograd.grad(losses.sum(), leaf)
            assert not losses.isnan().any() and not slope.isnan().any()
            if math.isfinite(margin):
                assert_close(losses, [case.oracle(margin, 0.0, 0.0, 0.0, gap, 0.0, **case.oracle_settings)], scale=1e4)
            else:
                assert losses.item() == INF


# ORPO's odds


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_odds_of_certain_completions(dtype):
    """A mean log-probability of 0: infinite odds, but a finite slope, -1 - lambda (odds of the other)."""
    length, rejected = torch.tensor([2]), torch.tensor([-3.0], dtype=dtype)
    odds = math.exp(-1.5) / (1 - math.exp(-1.5))
    for chosen in (0.0, -1e-35, -1e-12, -1e-7):
        leaf = torch.tensor([chosen], dtype=dtype, requires_grad=True)
        losses = orpo_loss(leaf, rejected, length, length, odds_weight=0.3).losses
        (slope,) = torch.autograd.grad(losses.sum(), leaf)
        assert_close(losses, [-chosen / 2 * (1 + 0.3 * odds)], scale=1.0)
        torch.testing.assert_close(slope.double(), torch.tensor([(-1 - 0.3 * odds) / 2]).double(), rtol=1e-5, atol=1e-6)
    assert orpo_loss(rejected, torch.zeros(1, dtype=dtype), length, length, odds_weight=0.3).losses.item() == INF


def test_odds_of_impossible_completions():
    length = torch.tensor([2])
    for chosen, rejected, value in [(-2e4, -2e4, 1e4 + 0.3 * math.log(2)), (-1.0, -2e4, 0.5), (-1.0, -INF, 0.5)]:
        leaves = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
        losses = orpo_loss(*leaves, length, length, odds_weight=0.3).losses
        assert_close(losses, [value])
        assert all(slope.isfinite().all() for slope in torch.autograd.grad(losses.sum(), leaves))


# Lists


def test_nca_at_infinities():
    """A forbidden candidate counts as noise alone; one that the policy excludes costs an infinite loss if wanted."""
    log_ratio = torch.tensor([[0.5, -INF]], dtype=torch.float64, requires_grad=True)
    forbidden = torch.tensor([[1.0, -INF]], dtype=torch.float64)
    losses = nca_rw_loss(log_ratio, forbidden, beta_pi=1.0, beta_r=1.0)
    assert_close(losses, [math.log1p(math.exp(-0.5)) + math.log1p(math.exp(0.5)) / 2])
    (gradient,) = torch.autograd.grad(losses.sum(), log_ratio)
    sigma = 1 / (1 + math.exp(-0.5))
    assert_close(gradient, [[sigma - 1 + sigma / 2, 0.0]])
    assert nca_rw_loss(log_ratio, torch.zeros_like(forbidden), beta_pi=1.0, beta_r=1.0).item() == INF


@pytest.mark.parametrize("name", ["nca_rw", "fpo_js", "plackett_luce"])
def test_what_is_masked_changes_nothing(name):
    record = LOSSES[name]
    mask = torch.tensor([[True, False, True, True], [True, True, False, True]])
    tensors = [LOG_RATIO, REWARDS][: 1 if name == "plackett_luce" else 2]
    value = record.function(*tensors, mask=mask, **record.settings)
    for hole in (math.nan, INF, -INF, 1e300):
        leaves = [tensor.masked_fill(~mask, hole).requires_grad_() for tensor in tensors]
        holed = record.function(*leaves, mask=mask, **record.settings)
        assert_close(holed, value)
        for gradient in torch.autograd.grad(holed.sum(), leaves):
            assert (gradient[~mask] == 0).all()
            assert gradient.isfinite().all()


# Dtypes


@by_name
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtype_is_kept_and_half_types_are_computed_in_float32(name, dtype):
    record = LOSSES[name]
    rounded = [x.to(dtype) if x.is_floating_point() else x for x in arguments(name)]
    wide = [x.double() if x.is_floating_point() else x for x in rounded]
    result, expected = (record.function(*tensors, **record.settings) for tensors in (rounded, wide))
    if isinstance(result, Tensor):
        result, expected = [result], [expected]
    for value, wanted in zip(result, expected, strict=True):
        assert value.dtype == dtype
        # Squares of 1/(2 beta) = 5, and a penalty of 50 times beta.
        assert_close(value, wanted, scale=1.0 if dtype == torch.float64 else 200.0)


@cases
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_differences_that_a_half_type_cannot_hold(case, dtype):
    """-300 - 1 is -301 in bfloat16's neighbourhood, which has steps of 2."""
    logps = [torch.tensor([x], dtype=dtype) for x in (-300.0, -302.0, -300.5, -302.0)]
    wide = [x.double() for x in logps]
    assert_close(case(*logps).losses, case(*wide).losses)


@settings(max_examples=settings().max_examples // 3)
@given(drawn=strategies.pairs(bound=8.0))
def test_float32_against_float64_of_the_same_inputs(drawn):
    single = drawn.to(torch.float32)
    for case in PAIR_CASES:
        note(case.name)
        losses, expected = case(*single.logps).losses, case(*single.to(torch.float64).logps).losses
        assert losses.dtype == torch.float32
        # Errors of the log ratios, 16 * 6e-8, are multiplied by slopes up to those of the scores and squares.
        slope = max(10.0, expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 10.0)
        assert_close(losses, expected, scale=100 * slope)


@cases
def test_the_reference_may_have_another_dtype(case):
    policy = [torch.tensor([x], dtype=torch.bfloat16) for x in (-1.0, -2.0)]
    ref = [torch.tensor([x], dtype=torch.float32) for x in (-1.2, -1.7)]
    result = case(*policy, *ref)
    assert all(value.dtype == torch.bfloat16 for value in result)
    assert_close(result.losses, case(*(x.double() for x in (*policy, *ref))).losses)


@by_name
def test_an_empty_batch_gives_an_empty_loss(name):
    empty = [x[:0].clone().requires_grad_(x.is_floating_point()) for x in arguments(name)]
    losses = losses_of(LOSSES[name].function(*empty, **LOSSES[name].settings))
    assert losses.shape == (0,)
    losses.sum().backward()
    assert empty[0].grad is not None


def test_scores_of_the_cases_have_distinct_gaps():
    """The rewarded cases would be blind to their rewards otherwise."""
    assert (SCORES[0] - SCORES[1]).unique().numel() == 3
