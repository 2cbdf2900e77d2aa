"""The quadrature in two dimensions: brute force over tuples, both ends, laws, huge K, settings that must not show."""

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy import laplace_pairs
from exo_toy.divergences import alpha_divergence
from exo_toy.laplace import expected_log_sum, expected_log_sum_and_ratio
from exo_toy.laplace_pairs import expected_alpha_divergence
from tests import strategies
from tests.tolerances import assert_close

# Both ends, next to them, inside, and beyond.
ALPHAS = (-0.5, -0.2, 0.0, 1e-9, 1e-4, 0.009, 0.3, 0.5, 0.8, 1 - 1e-4, 1 - 1e-9, 1.0, 1.2, 1.5)
each_alpha = pytest.mark.parametrize("alpha", ALPHAS)


def over_tuples(log_w: Tensor, log_v: Tensor, log_p: Tensor, k: int, alpha: float) -> Tensor:
    """The expectation for one table [N], over all N^K tuples; differentiable."""
    draws = torch.cartesian_prod(*[torch.arange(len(log_p))] * k).reshape(-1, k)
    values = alpha_divergence(log_w[draws].log_softmax(-1), log_v[draws].log_softmax(-1), alpha=alpha)
    return (log_p[draws].sum(-1).exp() * values).sum()


def with_derivatives(function, tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient, and gradient of the gradient's square, in both weights and the logits of the draws."""
    tables = tables.clone().requires_grad_()
    value = function(tables[0], tables[1], tables[2].log_softmax(-1))
    (gradient,) = torch.autograd.grad(value, tables, create_graph=True)
    (second,) = torch.autograd.grad((gradient**2).sum(), tables)
    return value.detach(), gradient.detach(), second


def drawn(seed: int, n: int, spread: float) -> Tensor:
    """Two tables of log weights over so many nats, and logits of the draws."""
    generator = torch.Generator().manual_seed(seed)
    weights = spread * (torch.rand(2, n, generator=generator, dtype=torch.float64) - 0.5)
    return torch.cat([weights, torch.randn(1, n, generator=generator, dtype=torch.float64)])


@each_alpha
@pytest.mark.parametrize("spread", [0.0, 2.0, 20.0])
@pytest.mark.parametrize(("k", "n"), [(2, 6), (4, 4), (7, 3)])
def test_agrees_with_all_tuples_to_second_order(alpha, spread, k, n):
    tables = drawn(k, n, spread)
    ours = with_derivatives(lambda *t: expected_alpha_divergence(*t, k=k, alpha=alpha), tables)
    theirs = with_derivatives(lambda *t: over_tuples(*t, k, alpha), tables)
    for actual, expected in zip(ours, theirs, strict=True):
        # Beyond [0, 1] the divergence grows with the spread: relative to the largest entry.
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("spread", [100.0, 300.0])
@pytest.mark.parametrize("alpha", [alpha for alpha in ALPHAS if 0 <= alpha <= 1])
def test_wide_spreads_between_the_ends(alpha, spread):
    tables = drawn(3, 3, spread)
    value = expected_alpha_divergence(tables[0], tables[1], tables[2].log_softmax(-1), k=5, alpha=alpha)
    expected = over_tuples(tables[0], tables[1], tables[2].log_softmax(-1), 5, alpha)
    assert_close(value, expected, scale=spread)


@given(problem=strategies.problems(n=st.integers(2, 4)), alpha=st.floats(0.0, 1.0))
def test_agrees_with_all_tuples_of_drawn_problems(problem, alpha):
    k = 2 + problem.k % 4
    log_w = problem.beta_pi * (problem.log_pi - problem.log_ref)
    log_v = problem.reward / problem.beta_r
    value = expected_alpha_divergence(log_w, log_v, problem.log_ref, k=k, alpha=alpha)
    expected = [over_tuples(*row, k, alpha) for row in zip(log_w, log_v, problem.log_ref, strict=True)]
    torch.testing.assert_close(value, torch.stack(expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("k", [2, 9, 1000, 2**30])
def test_the_ends_are_the_quadratures_in_one_dimension(k):
    log_w, log_v, log_p = drawn(1, 40, 12.0)
    log_p = log_p.log_softmax(-1)

    def kl(log_w: Tensor, log_v: Tensor) -> Tensor:
        log_sum, gap = expected_log_sum_and_ratio(log_w, log_w - log_v, log_p, k=k)
        return gap - log_sum + expected_log_sum(log_v, log_p, k=k)

    assert_close(expected_alpha_divergence(log_w, log_v, log_p, k=k, alpha=1), kl(log_w, log_v), scale=10)
    assert_close(expected_alpha_divergence(log_w, log_v, log_p, k=k, alpha=0), kl(log_v, log_w), scale=10)


def two_point(log_w: list[float], log_v: list[float], p: float, k: int, alpha: float) -> float:
    """Two completions, by the sum over how many of the K are the first, at 40 digits."""
    with mpmath.workdps(40):
        a, total = mpmath.mpf(alpha), mpmath.mpf(0)
        probability = (1 - mpmath.mpf(p)) ** k
        for j in range(k + 1):
            counts = (j, k - j)
            sums = [sum(c * mpmath.exp(x) for c, x in zip(counts, xs, strict=True)) for xs in (log_w, log_v)]
            terms = (
                c * (mpmath.exp(x) / sums[0]) ** a * (mpmath.exp(y) / sums[1]) ** (1 - a)
                for c, x, y in zip(counts, log_w, log_v, strict=True)
                if c
            )
            total += probability * (1 - sum(terms)) / (a * (1 - a))
            probability *= mpmath.mpf(p) / (1 - mpmath.mpf(p)) * mpmath.mpf(k - j) / (j + 1)
        return float(total)


@pytest.mark.parametrize("alpha", [-0.4, 1e-7, 0.25, 0.6, 1.4])
@pytest.mark.parametrize(("log_w", "log_v"), [([0.0, 3.0], [1.0, 0.0]), ([0.0, 9.0], [0.0, 7.0])])
@pytest.mark.parametrize("k", [2, 30, 500])
def test_two_completions(alpha, log_w, log_v, k):
    tables = (torch.tensor(row, dtype=torch.float64) for row in (log_w, log_v, [math.log(0.2), math.log(0.8)]))
    value = expected_alpha_divergence(*tables, k=k, alpha=alpha)
    assert value.item() == pytest.approx(two_point(log_w, log_v, 0.2, k, alpha), rel=1e-12, abs=1e-12)


@each_alpha
def test_limit_and_rate(alpha):
    """At K = 2^30 the divergence of the normalised tables; the bias falls as 1/K."""
    log_w, log_v, log_p = drawn(2, 5, 2.0)
    log_p = log_p.log_softmax(-1)
    limit = alpha_divergence((log_p + log_w).log_softmax(-1), (log_p + log_v).log_softmax(-1), alpha=alpha)
    bias = {k: k * (expected_alpha_divergence(log_w, log_v, log_p, k=k, alpha=alpha) - limit) for k in (2**14, 2**18)}
    at_most = expected_alpha_divergence(log_w, log_v, log_p, k=2**30, alpha=alpha)
    assert at_most.item() == pytest.approx(limit.item(), abs=1e-8)
    assert bias[2**14].item() == pytest.approx(bias[2**18].item(), rel=0.02)


@each_alpha
def test_exchanged_weights_are_the_complement_of_alpha(alpha):
    log_w, log_v, log_p = drawn(4, 6, 8.0)
    log_p = log_p.log_softmax(-1)
    exchanged = expected_alpha_divergence(log_v, log_w, log_p, k=5, alpha=1 - alpha)
    assert_close(exchanged, expected_alpha_divergence(log_w, log_v, log_p, k=5, alpha=alpha).item(), scale=10)


def test_constants_equal_weights_one_draw_and_zeros():
    log_w, log_v, log_p = drawn(5, 4, 8.0)
    log_p = log_p.log_softmax(-1)
    for alpha in ALPHAS:
        value = expected_alpha_divergence(log_w, log_v, log_p, k=3, alpha=alpha)
        assert_close(expected_alpha_divergence(log_w + 900, log_v - 70, log_p, k=3, alpha=alpha), value, scale=1e3)
        assert_close(expected_alpha_divergence(log_w, log_w, log_p, k=3, alpha=alpha), 0.0)
        assert expected_alpha_divergence(log_w, log_v, log_p, k=1, alpha=alpha).item() == 0.0
        # Outside the support of the draws nothing counts, whatever it is.
        more = [torch.cat([row, row.new_tensor([end])]) for row, end in ((log_w, math.nan), (log_v, 1e9))]
        padded = torch.cat([log_p, log_p.new_tensor([-math.inf])])
        assert_close(expected_alpha_divergence(*more, padded, k=3, alpha=alpha), value)


def test_continuous_in_alpha():
    """Also where it changes sides, at 1/2, and at the ends: differences fall with the step."""
    log_w, log_v, log_p = drawn(6, 30, 10.0)
    for middle, step in itertools.product((0.0, 0.5, 1.0), (1e-3, 1e-6)):
        ends = [
            expected_alpha_divergence(log_w, log_v, log_p.log_softmax(-1), k=6, alpha=middle + sign * step).item()
            for sign in (-1, 0, 1)
        ]
        assert abs(ends[2] - 2 * ends[1] + ends[0]) < 100 * step**2 + 1e-12


@pytest.mark.parametrize(("name", "setting"), [("STEP", 0.125), ("SERIES_RANGE", 0.2), ("FIRST", -60.0)])
def test_settings_of_the_quadrature_do_not_show(monkeypatch, name, setting):
    tables = drawn(7, 5, 10.0)
    before = {a: with_derivatives(lambda *t, a=a: expected_alpha_divergence(*t, k=40, alpha=a), tables) for a in ALPHAS}
    monkeypatch.setattr(laplace_pairs, name, setting)
    for alpha, wanted in before.items():
        ours = with_derivatives(lambda *t, a=alpha: expected_alpha_divergence(*t, k=40, alpha=a), tables)
        for actual, expected in zip(ours, wanted, strict=True):
            assert_close(actual, expected, scale=10 * max(1.0, expected.abs().max().item()))


def test_the_step_is_what_makes_it_exact(monkeypatch):
    log_w, log_v, log_p = drawn(8, 5, 10.0)
    monkeypatch.setattr(laplace_pairs, "STEP", 1.0)
    value = expected_alpha_divergence(log_w, log_v, log_p.log_softmax(-1), k=4, alpha=0.5)
    assert 1e-8 < abs(value - over_tuples(log_w, log_v, log_p.log_softmax(-1), 4, 0.5)) < 1e-2


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 1.2])
def test_gradcheck_and_gradgradcheck(alpha):
    tables = [row.clone().requires_grad_() for row in drawn(9, 3, 3.0)]

    def function(log_w: Tensor, log_v: Tensor, logits: Tensor) -> Tensor:
        return expected_alpha_divergence(log_w, log_v, logits.log_softmax(-1), k=4, alpha=alpha)

    assert torch.autograd.gradcheck(function, tables)
    assert torch.autograd.gradgradcheck(function, tables)


@pytest.mark.parametrize("bad", [-0.51, 1.51, math.nan, math.inf])
def test_alpha_outside_its_range_is_refused(bad):
    zeros = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^alpha must be in \[-0.5, 1.5\]; got"):
        expected_alpha_divergence(zeros, zeros, zeros - math.log(2), k=2, alpha=bad)
