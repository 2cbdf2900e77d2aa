"""Density ratios from samples and what they cost: oracle, laws, the exact limit, extreme inputs, gradients, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exo_toy.estimators import effective_sample_size, snis_density_ratio
from tests import oracles, strategies
from tests.tolerances import TOLERANCES, assert_close

INF = math.inf
both_estimators = pytest.mark.parametrize("estimator", [snis_density_ratio, effective_sample_size])


@st.composite
def log_weights(draw: st.DrawFn, *, bound: float = 20.0, holes: bool = False) -> torch.Tensor:
    """[X, M], X and M distinct; with ``holes``, some -inf but never a whole row."""
    n_rows, n_samples = draw(strategies.sizes(2))
    values = draw(strategies.tensors((n_rows, n_samples), -bound, bound))
    return values.masked_fill(~draw(strategies.masks(values.shape)), -INF) if holes else values


def density_ratio_by_loops(log_ratio: list[float]) -> list[float]:
    largest = max(log_ratio)
    weights = [math.exp(value - largest) for value in log_ratio]
    return [len(weights) * weight / math.fsum(weights) for weight in weights]


def sample_size_by_loops(log_weight: list[float]) -> float:
    largest = max(log_weight)
    weights = [math.exp(value - largest) for value in log_weight]
    return math.fsum(weights) ** 2 / math.fsum(weight**2 for weight in weights)


def test_oracles_by_hand():
    # Weights 1, 3: ratios 2/4 and 6/4; (1 + 3)^2 / (1 + 9).
    assert density_ratio_by_loops([0.0, math.log(3)]) == pytest.approx([0.5, 1.5], rel=1e-15)
    assert sample_size_by_loops([0.0, math.log(3)]) == pytest.approx(1.6, rel=1e-15)
    assert sample_size_by_loops([5.0, 5.0, -INF]) == 2.0


@given(log_weights(holes=True))
def test_equal_the_plain_loops(log_weight):
    assert_close(snis_density_ratio(log_weight), [density_ratio_by_loops(row) for row in log_weight.tolist()])
    assert_close(effective_sample_size(log_weight), [sample_size_by_loops(row) for row in log_weight.tolist()])


@given(log_weights())
def test_single_rows_are_the_rows_of_a_batch(log_weight):
    for row, ratio, size in zip(
        log_weight, snis_density_ratio(log_weight), effective_sample_size(log_weight), strict=True
    ):
        assert_close(snis_density_ratio(row), ratio)
        assert_close(effective_sample_size(row), size)


@given(log_weights(holes=True), st.floats(-1e4, 1e4))
def test_constant_changes_nothing(log_weight, constant):
    # Adding the constant rounds the weights themselves, by 1e4 units of the dtype's rounding.
    assert_close(snis_density_ratio(log_weight + constant), snis_density_ratio(log_weight), scale=1e4)
    assert_close(effective_sample_size(log_weight + constant), effective_sample_size(log_weight), scale=1e4)


@given(log_weights(holes=True))
def test_bounds(log_weight):
    n_samples = log_weight.shape[-1]
    ratio, size = snis_density_ratio(log_weight), effective_sample_size(log_weight)
    assert_close(ratio.mean(-1), torch.ones(len(ratio)))
    assert (ratio >= 0).all() and (ratio <= n_samples * (1 + 1e-12)).all()
    assert (size >= 1 - 1e-12).all() and (size <= n_samples * (1 + 1e-12)).all()
    # Of the mean square of the ratios there are M / ESS.
    assert_close(ratio.square().mean(-1), n_samples / size)


@given(st.integers(1, 9), st.floats(-50.0, 50.0))
def test_extremes_of_the_sample_size(n_samples, value):
    assert_close(effective_sample_size(torch.full((n_samples,), value, dtype=torch.float64)), float(n_samples))
    alone = torch.full((n_samples,), -INF, dtype=torch.float64)
    alone[-1] = value
    assert effective_sample_size(alone).item() == 1.0
    assert snis_density_ratio(alone)[-1].item() == n_samples


@given(strategies.problems())
def test_exact_where_every_completion_appears_as_often_as_it_is_likely(problem):
    """With the reference's shares the estimate is the ratio itself, and ESS / M is 1 / E_ref[ratio^2]."""
    counts = torch.arange(1, problem.log_pi.shape[-1] + 1)
    samples = torch.repeat_interleave(torch.arange(len(counts)), counts)
    shares = counts.double() / counts.sum()
    log_ratio = problem.log_pi - shares.log()
    ratio = log_ratio.exp()
    assert_close(snis_density_ratio(log_ratio[:, samples]), ratio[:, samples], scale=ratio.max().item())
    second_moment = (shares * ratio.square()).sum(-1)
    assert_close(effective_sample_size(log_ratio[:, samples]) / len(samples), 1 / second_moment)


def test_optimal_policy_from_rewards_alone():
    """exp(r / beta) needs no normaliser: log Z cancels."""
    log_ref, reward, beta = [math.log(0.25)] * 4, [0.0, 1.0, 2.0, 3.0], 0.5
    log_pi_star, _ = oracles.optimal_policy(log_ref, reward, beta)
    exact = [math.exp(lp - lr) for lp, lr in zip(log_pi_star, log_ref, strict=True)]
    assert_close(snis_density_ratio(torch.tensor(reward, dtype=torch.float64) / beta), exact)


@both_estimators
@pytest.mark.parametrize("extreme", [1e4, 1e300])
def test_extreme_weights(estimator, extreme):
    values = torch.tensor([[extreme, extreme, -extreme], [-extreme, -extreme, -INF]], dtype=torch.float64)
    wanted = [[1.5, 1.5, 0.0], [1.5, 1.5, 0.0]] if estimator is snis_density_ratio else [2.0, 2.0]
    assert_close(estimator(values), wanted)


@both_estimators
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@given(log_weights(bound=8.0, holes=True))
def test_dtypes(estimator, dtype, log_weight):
    rounded = log_weight.to(dtype)
    assert estimator(rounded).dtype == dtype
    assert_close(estimator(rounded), estimator(rounded.double()))


@both_estimators
@given(log_weights(bound=3.0))
def test_gradients(estimator, log_weight):
    assert torch.autograd.gradcheck(estimator, log_weight.requires_grad_(), atol=1e-6)


@both_estimators
def test_gradient_at_probability_zero_is_the_limit(estimator):
    gradients = []
    for last in (-INF, -200.0):
        values = torch.tensor([0.3, -0.2, last], dtype=torch.float64, requires_grad=True)
        # The first entry alone: the ratios' sum is a constant, M.
        gradients += torch.autograd.grad(estimator(values).reshape(-1)[0], values)
    assert gradients[0].isfinite().all()
    assert_close(gradients[0], gradients[1])


@both_estimators
def test_argument_is_not_written_to(estimator):
    values = torch.tensor([[0.0, 1.0, -INF]], dtype=torch.float64)
    before = values.clone()
    estimator(values)
    assert values.equal(before)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(()), r"be \[\.\.\., M\] with M >= 1 samples; got shape \[\]"),
        (torch.zeros(2, 0), r"be \[\.\.\., M\] with M >= 1 samples; got shape \[2, 0\]"),
        (torch.tensor([[0.0, 1.0], [0.0, math.nan]]), r"be finite or -inf; got nan at index \[1, 1\]"),
        (torch.tensor([0.0, INF]), r"be finite or -inf; got inf at index \[1\]"),
        (torch.tensor([[0.0, 1.0], [-INF, -INF]]), "be above -inf for a sample of each row; got a row of only -inf"),
        (torch.zeros(3, dtype=torch.int64), "have a floating-point dtype; got torch.int64"),
        ([0.0, 1.0], "be a torch.Tensor; got list"),
    ],
)
@pytest.mark.parametrize(
    ("estimator", "name"), [(snis_density_ratio, "log_ratio"), (effective_sample_size, "log_weight")]
)
def test_errors(estimator, name, values, message):
    with pytest.raises(ValueError, match=f"^{name} must {message}"):
        estimator(values)
