"""logspace: values, zero weights and infinities, derivatives at -inf."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy import logspace
from tests import oracles, strategies
from tests.tolerances import assert_close

INF, NAN = math.inf, math.nan


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# expectation


@given(data=st.data())
def test_expectation_agrees_with_the_oracle(device, data):
    shape = data.draw(strategies.sizes(2))
    log_p = data.draw(strategies.log_probabilities(shape, holes=True)).to(device)
    values = data.draw(strategies.tensors(shape, -1e3, 1e3)).to(device)
    expected = [oracles.expectation(*rows) for rows in zip(log_p.tolist(), values.tolist(), strict=True)]
    assert_close(logspace.expectation(log_p, values), expected, scale=10.0)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_entries_of_probability_zero_count_nothing(value):
    log_p, values = double(math.log(0.5), -INF, math.log(0.5)), double(2.0, value, 4.0)
    assert_close(logspace.expectation(log_p, values), 3.0)
    leaves = log_p.requires_grad_(), values.requires_grad_()
    by_log_p, by_values = torch.autograd.grad(logspace.expectation(*leaves), leaves, create_graph=True)
    assert_close(by_log_p, [1.0, 0.0, 2.0])
    assert_close(by_values, [0.5, 0.0, 0.5])
    second = torch.autograd.grad(by_log_p.sum() + by_values.sum(), leaves)
    assert_close(second[0], [1.5, 0.0, 2.5])
    assert_close(second[1], [0.5, 0.0, 0.5])


@pytest.mark.parametrize("log_weight", [-1.0, -700.0, -1e4, -1e300])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_infinities_of_positive_weight_stay(log_weight, value):
    """However small the weight, also where its exponential underflows to 0."""
    assert_close(logspace.expectation(double(0.0, log_weight), double(1.0, value)), value)


def test_infinities_of_both_signs_are_undefined():
    assert logspace.expectation(double(-1.0, -1.0, -1.0), double(INF, -INF, 0.0)).isnan()


def test_finite_values_of_underflowing_weight_are_lost_without_harm():
    log_p = double(0.0, -1e4).requires_grad_()
    value = logspace.expectation(log_p, double(1.0, 1e300))
    assert_close(value, 1.0)
    assert_close(torch.autograd.grad(value, log_p)[0], [1.0, 0.0])


def test_expectation_shares_an_unbatched_table():
    log_p = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]], dtype=torch.float64).log()
    assert_close(logspace.expectation(log_p, double(0.0, 4.0)), [2.0, 3.0, 0.0])
    assert_close(logspace.expectation(double(-INF, 0.0), log_p.exp()), [0.5, 0.75, 0.0])


def test_expectation_gradcheck():
    log_p, values = double(-0.3, -1.2, -0.9).requires_grad_(), double(1.0, -2.0, 0.4).requires_grad_()
    assert torch.autograd.gradcheck(logspace.expectation, (log_p, values))
    assert torch.autograd.gradgradcheck(logspace.expectation, (log_p, values))


# log_softmax


@given(data=st.data())
def test_log_softmax_agrees_with_the_oracle(device, data):
    shape = data.draw(strategies.sizes(2))
    logits, mask = (
        data.draw(strategies.tensors(shape, -1e3, 1e3)).to(device),
        data.draw(strategies.masks(shape)).to(device),
    )
    got = logspace.log_softmax(logits, mask)
    for row, values, kept in zip(got, logits, mask, strict=True):
        assert_close(row[kept], oracles.log_softmax(values[kept].tolist()), scale=10.0)
        assert (row[~kept] == -INF).all()
    assert_close(logspace.log_softmax(logits), [oracles.log_softmax(row) for row in logits.tolist()], scale=10.0)


@pytest.mark.parametrize("masked", [NAN, INF, -INF, 1e308])
def test_masked_logits_have_no_effect_and_no_gradient(masked):
    logits = double(0.0, masked, math.log(3)).requires_grad_()
    got = logspace.log_softmax(logits, torch.tensor([True, False, True]))
    assert_close(got, [math.log(1 / 4), -INF, math.log(3 / 4)])
    (gradient,) = torch.autograd.grad(got[0], logits)
    assert_close(gradient, [3 / 4, 0.0, -3 / 4])


def test_logit_of_minus_infinity():
    logits = double(0.0, -INF, math.log(3)).requires_grad_()
    got = logspace.log_softmax(logits)
    assert_close(got, [math.log(1 / 4), -INF, math.log(3 / 4)])
    assert_close(torch.autograd.grad(got[2], logits)[0], [-1 / 4, 0.0, 1 / 4])


def test_no_finite_logit_is_undefined():
    assert logspace.log_softmax(double(-INF, -INF)).isnan().all()


def test_log_softmax_leaves_its_argument_alone():
    logits = double(1.0, 2.0)
    logspace.log_softmax(logits, torch.tensor([True, False]))
    assert logits.tolist() == [1.0, 2.0]


# logaddexp


@given(data=st.data())
def test_logaddexp_agrees_with_the_oracle(device, data):
    count = data.draw(st.integers(1, 6))
    a, b = (data.draw(strategies.tensors((count,), -1e3, 1e3)) for _ in range(2))
    expected = [oracles.log_sum_exp(pair) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    assert_close(logspace.logaddexp(a.to(device), b.to(device)), expected)


@pytest.mark.parametrize(
    ("a", "b", "value", "slopes"),
    [
        (-INF, -INF, -INF, (0.0, 0.0)),
        (-INF, 2.0, 2.0, (0.0, 1.0)),
        (2.0, -INF, 2.0, (1.0, 0.0)),
        (-1e4, 2.0, 2.0, (0.0, 1.0)),
        (1.0, 1.0, 1 + math.log(2), (0.5, 0.5)),
        (INF, 2.0, INF, (1.0, 0.0)),
    ],
)
def test_logaddexp_at_infinities_and_ties(a, b, value, slopes):
    leaves = double(a).requires_grad_(), double(b).requires_grad_()
    got = logspace.logaddexp(*leaves)
    assert_close(got, [value])
    gradients = torch.autograd.grad(got.sum(), leaves, create_graph=True)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert_close(gradient, [slope])
    second = torch.autograd.grad(gradients[0].sum() + 2 * gradients[1].sum(), leaves)
    curvature = slopes[0] * slopes[1]
    assert_close(second[0], [-curvature])
    assert_close(second[1], [curvature])


def test_logaddexp_of_two_infinities_is_infinite():
    assert logspace.logaddexp(double(INF), double(INF)).item() == INF


def test_logaddexp_gradcheck():
    a, b = double(0.3, -1.2, 5.0).requires_grad_(), double(-0.4, 2.0, 5.5).requires_grad_()
    assert torch.autograd.gradcheck(logspace.logaddexp, (a, b))
    assert torch.autograd.gradgradcheck(logspace.logaddexp, (a, b))


def test_an_infinite_value_of_underflowing_weight_gets_the_weight_as_gradient():
    values = torch.tensor([1.0, torch.inf], requires_grad=True)
    log_p = torch.tensor([0.0, -200.0])
    assert log_p.exp()[1] == 0
    result = logspace.expectation(log_p, values)
    result.backward()
    assert result.item() == torch.inf
    assert values.grad.tolist() == [1.0, 0.0]
