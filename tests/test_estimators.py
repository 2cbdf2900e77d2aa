"""Estimates from samples, their errors and what they cost: oracle, laws, exact limits, extreme inputs, gradients."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import gaussian_kde

from exo_toy import estimators
from exo_toy.divergences import entropy, kl_divergence
from exo_toy.estimators import (
    Estimate,
    bootstrap_mean,
    effective_sample_size,
    log_density_ratio_over_reward,
    snis_density_ratio,
    snis_expectation,
    snis_kl,
    snis_log_normalizer,
    snis_objective,
)
from exo_toy.finite_k import exo_rw_bias_coefficient
from exo_toy.losses import dpo_rw_loss, exo_rw_loss
from exo_toy.objectives import alignment_objective
from exo_toy.targets import optimal_policy
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


# Estimates with errors

F64 = torch.float64


def functional(name: str, a: torch.Tensor, b: torch.Tensor, beta: float):
    """What an estimator estimates, as a function of how the reference shares its mass among the samples."""
    w, v = a.exp(), b.exp()
    return {
        "expectation": lambda share: (share * w * b).sum() / (share * w).sum(),
        "log_normalizer": lambda share: (share * w).sum().log(),
        "kl": lambda share: (
            (share * w * (a - b)).sum() / (share * w).sum() - (share * w).sum().log() + (share * v).sum().log()
        ),
        "objective": lambda share: (
            (share * w * (b - beta * a)).sum() / (share * w).sum() + beta * (share * w).sum().log()
        ),
    }[name]


def estimated(name: str, a: torch.Tensor, b: torch.Tensor, beta: float) -> Estimate:
    return {
        "expectation": lambda: snis_expectation(a, b),
        "log_normalizer": lambda: snis_log_normalizer(a),
        "kl": lambda: snis_kl(a, b),
        "objective": lambda: snis_objective(a, b, beta=beta),
    }[name]()


def assert_delta_method(estimate: Estimate, target, n_samples: int, scale: float) -> None:
    """Value, error and bias are those of the first two derivatives of the target at equal shares."""
    share = torch.full((n_samples,), 1 / n_samples, dtype=F64)
    # Towards each sample alone.
    directions = torch.eye(n_samples, dtype=F64) - 1 / n_samples
    influence = directions @ torch.autograd.functional.jacobian(target, share)
    curvature = torch.autograd.functional.hessian(target, share)
    assert_close(estimate.value, target(share), scale=scale)
    wanted = (influence.square().sum() / (n_samples * (n_samples - 1))).sqrt()
    assert_close(estimate.standard_error, wanted, scale=scale * n_samples)
    second = torch.einsum("ij,jk,ik->i", directions, curvature, directions)
    assert_close(estimate.bias, second.mean() / (2 * n_samples), scale=scale * n_samples**2)


all_estimates = pytest.mark.parametrize("name", ["expectation", "log_normalizer", "kl", "objective"])


@all_estimates
@given(st.data())
def test_errors_are_the_derivatives_of_the_estimate(name, data):
    n_samples, beta = data.draw(st.integers(2, 7)), data.draw(strategies.temperatures(0.2, 3.0))
    a, b = (data.draw(strategies.tensors((n_samples,), -4.0, 4.0)) for _ in range(2))
    # Terms of the second derivative reach the square of the largest weight over the mean one, times the values.
    scale = 30 * n_samples**2
    assert_delta_method(estimated(name, a, b, beta), functional(name, a, b, beta), n_samples, scale)


def by_their_shares(problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Each completion as often as an integer reference has it: [M] completions, and that reference [N]."""
    counts = torch.arange(1, problem.log_pi.shape[-1] + 1)
    return torch.repeat_interleave(torch.arange(len(counts)), counts), (counts.double() / counts.sum()).log()


@given(strategies.problems())
def test_exact_where_the_samples_are_the_reference(problem):
    index, log_ref = by_their_shares(problem)
    log_pi, reward, beta = problem.log_pi, problem.reward, problem.beta
    log_pi_star, log_z = optimal_policy(log_ref, reward, beta=beta)
    log_ratio, log_weight, zeros = (log_pi - log_ref)[:, index], reward[:, index] / beta, torch.zeros(1).double()
    zeros = zeros.expand_as(log_ratio)
    scale = 20 + 5 / beta
    assert_close(snis_kl(log_ratio, log_weight).value, kl_divergence(log_pi, log_pi_star), scale=scale)
    assert_close(snis_kl(log_weight, log_ratio).value, kl_divergence(log_pi_star, log_pi), scale=scale)
    assert_close(snis_kl(log_ratio, zeros).value, kl_divergence(log_pi, log_ref), scale=scale)
    assert_close(snis_log_normalizer(log_weight).value, log_z, scale=scale)
    assert_close(snis_log_normalizer(log_ratio).value, torch.zeros(len(log_pi)), scale=scale)
    objective = snis_objective(log_ratio, reward[:, index], beta=beta)
    assert_close(objective.value, alignment_objective(log_pi, log_ref, reward, beta=beta), scale=scale * beta)
    assert_close(snis_expectation(log_ratio, reward[:, index]).value, (log_pi.exp() * reward).sum(-1), scale=5.0)


@given(strategies.problems())
def test_bias_is_the_exact_coefficient_where_the_samples_are_the_reference(problem):
    index, log_ref = by_their_shares(problem)
    betas = {"beta_pi": problem.beta_pi, "beta_r": problem.beta_r}
    f, log_weight = problem.beta_pi * (problem.log_pi - log_ref), problem.reward / problem.beta_r
    exact = exo_rw_bias_coefficient(problem.log_pi, log_ref, problem.reward, **betas)
    estimate = snis_kl(f[:, index], log_weight[:, index])
    largest = len(index) ** 2 * (f.abs().max() + log_weight.abs().max()).item()
    assert_close(len(index) * estimate.bias, exact, scale=largest)


def test_errors_are_those_of_the_exact_distribution_over_draws():
    """Mean and variance over every multiset of K draws: K times bias and variance tend to the coefficients like 1/K."""
    counts = torch.tensor([4, 3, 2, 1])
    log_ref, log_pi = (counts.double() / 10).log(), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64).log()
    reward, index = torch.arange(4).double(), torch.repeat_interleave(torch.arange(4), counts)
    log_ratio, log_weight = log_pi - log_ref, reward / 2
    limit = snis_kl(log_ratio[index], log_weight[index])
    variance, bias = limit.standard_error**2 * (len(index) - 1), limit.bias * len(index)
    off = []
    for k in (32, 64, 128):
        drawn = torch.cartesian_prod(*[torch.arange(k + 1)] * 3)
        drawn = drawn[drawn.sum(-1) <= k]
        drawn = torch.cat([drawn, k - drawn.sum(-1, keepdim=True)], -1).double()
        log_probability = math.lgamma(k + 1) - torch.lgamma(drawn + 1).sum(-1) + (drawn * log_ref).sum(-1)
        # Completions drawn n times stand once, n times as heavy.
        log_n = (drawn / k).log()
        log_p, log_q = (log_n + log_ratio).log_softmax(-1), (log_n + log_weight).log_softmax(-1)
        value = torch.where(drawn > 0, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
        mean = (log_probability.exp() * value).sum()
        second = (log_probability.exp() * (value - mean).square()).sum()
        off.append([(k * second - variance).abs() / variance, (k * (mean - limit.value) - bias).abs() / bias.abs()])
    for coarse, fine in itertools.pairwise(off):
        # Halved, up to terms of order 1/K^2.
        assert all(0.4 < f / c < 0.6 for c, f in zip(coarse, fine, strict=True))


@given(strategies.candidates())
def test_exo_rw_and_dpo_rw_are_estimates_of_kl(candidates):
    f, s = candidates.beta_pi * candidates.log_ratio, candidates.rewards / candidates.beta_r
    exo = exo_rw_loss(candidates.log_ratio, candidates.rewards, **candidates.temperatures)
    dpo = dpo_rw_loss(candidates.log_ratio, candidates.rewards, **candidates.temperatures)
    assert_close(snis_kl(f, s).value, exo, scale=candidates.scale)
    assert_close(snis_kl(s, f).value, dpo - entropy(s.log_softmax(-1)), scale=candidates.scale)


@given(strategies.candidates(min_k=1), st.floats(-1e3, 1e3))
def test_laws_of_the_estimates(candidates, constant):
    log_ratio, rewards, beta = candidates.log_ratio, candidates.rewards, candidates.beta_r
    n_samples, scale = rewards.shape[-1], 1e3 + candidates.scale + rewards.abs().max().item() / beta
    kl, log_z = snis_kl(log_ratio, rewards / beta), snis_log_normalizer(rewards / beta)
    to_reference = snis_kl(log_ratio, torch.zeros_like(log_ratio)).value
    # J is beta log Z less beta KL, on estimates too.
    objective = snis_objective(log_ratio, rewards, beta=beta)
    assert_close(objective.value, beta * (log_z.value - kl.value), scale=beta * scale)
    assert_close(to_reference, math.log(n_samples) - entropy(log_ratio.log_softmax(-1)), scale=scale)
    assert (kl.value >= -1e-12 * scale).all()
    assert (to_reference <= math.log(n_samples) + 1e-12 * scale).all()
    for mine, shifted in zip(kl, snis_kl(log_ratio + constant, rewards / beta - constant), strict=True):
        assert_close(mine, shifted, scale=scale * n_samples**2)
    assert_close(snis_log_normalizer(rewards / beta + constant).value, log_z.value + constant, scale=scale)
    order = torch.arange(n_samples).flip(0)
    for mine, permuted in zip(
        objective, snis_objective(log_ratio[:, order], rewards[:, order], beta=beta), strict=True
    ):
        assert_close(mine, permuted, scale=beta * scale * n_samples**2)


def test_one_sample_has_no_error():
    for name in ("expectation", "log_normalizer", "kl", "objective"):
        estimate = estimated(name, torch.tensor([-2.0]), torch.tensor([3.0]), 0.5)
        assert estimate.standard_error.isnan() and estimate.bias == 0


def test_weights_of_zero_and_infinite_values():
    a, b = torch.tensor([0.0, 0.0, -INF], dtype=F64), torch.tensor([1.0, 2.0, -INF], dtype=F64)
    for name in ("expectation", "kl", "objective", "log_normalizer"):
        assert all(part.isfinite() for part in estimated(name, a, b, 0.5))
    outside = snis_kl(b, torch.tensor([0.0, -INF, 0.0], dtype=F64))
    assert outside.value == INF and outside.standard_error.isnan()
    forbidden = snis_objective(torch.zeros(3), torch.tensor([0.0, 1.0, -INF]), beta=1.0)
    assert forbidden.value == -INF and forbidden.standard_error.isnan()


@all_estimates
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_estimates_are_at_least_float32(name, dtype):
    a, b = torch.tensor([0.5, -1.0, 2.0], dtype=dtype), torch.tensor([1.0, 0.25, -0.5], dtype=dtype)
    for part, wanted in zip(estimated(name, a, b, 0.5), estimated(name, a.double(), b.double(), 0.5), strict=True):
        assert part.dtype == torch.float32
        assert_close(part, wanted, scale=10.0)


def test_interval_by_hand():
    low, high = Estimate(torch.tensor(1.0, dtype=F64), torch.tensor(2.0, dtype=F64), torch.tensor(0.1)).interval()
    # Of the normal distribution 95 % lie within 1.959963984540054 standard deviations.
    assert_close(torch.stack([low, high]), [1 - 2 * 1.959963984540054, 1 + 2 * 1.959963984540054])
    half = NormalDist().inv_cdf(0.75)
    low, high = Estimate(torch.zeros(2).double(), torch.ones(2).double(), torch.zeros(2)).interval(level=0.5)
    assert_close(torch.stack([low, high]), [[-half] * 2, [half] * 2])


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: snis_kl(torch.zeros(2), torch.zeros(3)), r"^log_q_weight must have the shape of log_p_weight, \[2\]"),
        (
            lambda: snis_kl(torch.zeros(2), torch.tensor([0.0, math.nan])),
            "^log_q_weight must be finite or -inf; got nan",
        ),
        (lambda: snis_expectation(torch.zeros(2), torch.tensor([0.0, INF])), "^values must be finite or -inf; got inf"),
        (lambda: snis_objective(torch.zeros(2), torch.zeros(2), beta=0.0), "^beta must be a finite number above 0"),
        (lambda: snis_log_normalizer(torch.zeros(2, 0)), r"^log_weight must be \[\.\.\., M\]"),
        (lambda: snis_kl(torch.zeros(2), torch.zeros(2)).interval(level=1.0), r"^level must be in \(0, 1\)"),
        (lambda: ratio_over_reward([], []), "^rewards must have a table for each of log_weights; got 0, 0"),
        (lambda: ratio_over_reward([torch.zeros(2)], [torch.zeros(2)]), r"^log_weights must have shape \[X, M\]"),
        (lambda: ratio_over_reward([torch.zeros(1, 2)], [torch.zeros(2, 2)]), "^rewards must have the same shape"),
        (
            lambda: ratio_over_reward([torch.zeros(1, 1)], [torch.full((1, 1), -INF)]),
            "^rewards must be finite; got -inf",
        ),
        (
            lambda: ratio_over_reward([torch.zeros(1, 1)], [torch.zeros(1, 1)], bandwidth=0),
            "^bandwidth must be a finite",
        ),
        (
            lambda: ratio_over_reward([torch.zeros(1, 1)], [torch.zeros(1, 1)], grid=torch.zeros(0)),
            "^grid must have an",
        ),
        (lambda: bootstrap_mean(torch.zeros(0), generator=torch.Generator()), "^values must have an entry"),
        (lambda: bootstrap_mean(torch.tensor([INF]), generator=torch.Generator()), "^values must be finite; got inf"),
        (lambda: bootstrap_mean(torch.zeros(2), generator=torch.Generator(), level=0.0), "^level must be in"),
        (lambda: bootstrap_mean(torch.zeros(2), generator=torch.Generator(), n_resamples=1), "^n_resamples must be an"),
    ],
)
def test_estimates_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Density ratios over the reward


def ratio_over_reward(log_weights, rewards, grid=None, bandwidth=0.7) -> Estimate:
    grid = torch.linspace(-2, 2, 5).double() if grid is None else grid
    return log_density_ratio_over_reward(log_weights, rewards, grid, bandwidth=bandwidth)


@given(st.data())
def test_density_ratio_is_that_of_two_kernel_densities(data):
    """Of scipy's, with weights and without, at equal bandwidths."""
    n_samples = data.draw(st.integers(3, 8))
    log_weight = data.draw(strategies.tensors((1, n_samples), -2.0, 2.0))
    rewards = torch.arange(n_samples).double() - 1 + data.draw(strategies.tensors((1, n_samples), -0.4, 0.4))
    grid, bandwidth = torch.linspace(-1, n_samples, 6).double(), 0.8
    densities = []
    for weights in (log_weight.softmax(-1)[0].numpy(), np.full(n_samples, 1 / n_samples)):
        spread = np.sqrt(np.cov(rewards[0].numpy(), aweights=weights))
        kde = gaussian_kde(rewards[0].numpy(), bw_method=bandwidth / spread, weights=weights)
        densities.append(kde.logpdf(grid.numpy()))
    assert_close(ratio_over_reward([log_weight], [rewards], grid, bandwidth).value, list(densities[0] - densities[1]))


@given(st.data())
def test_errors_of_one_prompt_s_density_ratio_are_derivatives(data):
    n_samples = data.draw(st.integers(2, 6))
    log_weight, rewards = (data.draw(strategies.tensors((1, n_samples), -2.0, 2.0)) for _ in range(2))
    grid = torch.tensor([-1.0, 0.5], dtype=F64)
    estimate = ratio_over_reward([log_weight], [rewards], grid)
    for point in range(2):
        kernel = (-((grid[point] - rewards[0]) / 0.7).square() / 2).exp()
        w = log_weight[0].exp()

        def target(share, kernel=kernel, w=w):
            return (share * w * kernel).sum().log() - (share * w).sum().log() - (share * kernel).sum().log()

        one = Estimate(*(part[point] for part in estimate))
        # Ratios of a kernel to its mean and of a weight to its mean reach M.
        assert_delta_method(one, target, n_samples, scale=30 * n_samples**2)


def test_prompts_are_averaged_and_their_spread_is_the_error():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3), (3, 5)]
    log_weights, rewards = ([torch.randn(shape, generator=generator).double() for shape in shapes] for _ in range(2))
    grid = torch.tensor([0.0, 1.0], dtype=F64)
    estimate = ratio_over_reward(log_weights, rewards, grid)
    over, under = [], []
    for weight, reward in zip(log_weights, rewards, strict=True):
        for w, r in zip(weight, reward, strict=True):
            kernel = (-((grid.unsqueeze(-1) - r) / 0.7).square() / 2).exp()
            over.append((kernel * w.softmax(-1)).sum(-1))
            under.append(kernel.mean(-1))
    over, under = torch.stack(over), torch.stack(under)
    for point in range(2):
        one = Estimate(*(part[point] for part in estimate))
        a, b = over[:, point], under[:, point]
        assert_delta_method(one, lambda share, a=a, b=b: (share * a).sum().log() - (share * b).sum().log(), 5, 100.0)


def test_parts_make_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    tables = [[torch.randn(shape, generator=generator).double() for shape in [(7, 3), (1, 4)]] for _ in range(2)]
    alone = [[table[:1]] for table, *_ in tables]
    whole = [*ratio_over_reward(*tables), *ratio_over_reward(*alone)]
    monkeypatch.setattr(estimators, "ELEMENTS_AT_ONCE", 1)
    for part, wanted in zip([*ratio_over_reward(*tables), *ratio_over_reward(*alone)], whole, strict=True):
        assert_close(part, wanted)


def test_no_density_where_the_kernel_reaches_no_sample():
    value = ratio_over_reward([torch.zeros(1, 2)], [torch.zeros(1, 2)], torch.tensor([0.0, 1e3])).value
    assert value[0].abs() < 1e-12
    assert value[1].isnan()


# Bootstrap


def test_bootstrap_draws_units_with_replacement():
    values = torch.tensor([[3.0, -1.0, 4.0, 1.5], [0.0, 1.0, 0.0, 0.0]], dtype=F64)
    drawn = torch.randint(4, (50, 4), generator=torch.Generator().manual_seed(7))
    low, high = bootstrap_mean(values, generator=torch.Generator().manual_seed(7), level=0.8, n_resamples=50)
    for row, *ends in zip(values, low, high, strict=True):
        means = row[drawn].mean(-1)
        assert_close(torch.stack(ends), [means.quantile(0.1), means.quantile(0.9)], scale=10.0)


def test_bootstrap_of_two_units_reaches_both(monkeypatch):
    # A quarter of the resamples is one unit twice; that fewer than 26 of 1000 are has a probability below
    # exp(-1000 KL(.026||.25)) < 1e-80.
    monkeypatch.setattr(estimators, "ELEMENTS_AT_ONCE", 10)
    low, high = bootstrap_mean(torch.tensor([0.0, 1.0]), generator=torch.Generator().manual_seed(0))
    assert (low.item(), high.item()) == (0.0, 1.0)


@given(log_weights(bound=5.0), st.floats(0.1, 10.0), st.floats(-100.0, 100.0))
def test_bootstrap_moves_with_its_values(values, factor, constant):
    ends, moved = (
        torch.stack(bootstrap_mean(table, generator=torch.Generator().manual_seed(3), n_resamples=40))
        for table in (values, factor * values + constant)
    )
    assert_close(moved, factor * ends + constant, scale=200.0)
    assert (ends[0] <= ends[1]).all()
    assert (ends[0] >= values.amin(-1) - 1e-11).all() and (ends[1] <= values.amax(-1) + 1e-11).all()
