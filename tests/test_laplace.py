"""E[log S] and E[sum w g / S] over K draws: closed forms, sums over counts at 40 digits, quadrature, memory."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from exo_toy import laplace
from exo_toy.laplace import expected_log_sum, expected_log_sum_and_ratio
from tests import strategies
from tests.tolerances import assert_close

INF = math.inf
COUNTS = [1, 2, 7, 2**30]


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def two_point(log_w: list[float], g: list[float], log_odds: float, k: int, *, terms: int | None = None):
    """(E[log S], E[sum w g / S]) on two outcomes, at 40 digits: a sum over how often the first comes up.

    ``terms`` leaves out the rest of the counts, whose probability the caller bounds.
    """
    with mpmath.workdps(40):
        odds = mpmath.exp(mpmath.mpf(log_odds))
        p = odds / (1 + odds)
        w = [mpmath.exp(mpmath.mpf(value)) for value in log_w]
        log_sum, ratio = mpmath.mpf(0), mpmath.mpf(0)
        probability = (1 - p) ** k
        for j in range(min(k, terms or k) + 1):
            total = j * w[0] + (k - j) * w[1]
            log_sum += probability * mpmath.log(total)
            ratio += probability * (j * w[0] * mpmath.mpf(g[0]) + (k - j) * w[1] * mpmath.mpf(g[1])) / total
            probability *= odds * (k - j) / (j + 1)
        return float(log_sum), float(ratio)


# Closed forms


@pytest.mark.parametrize("k", COUNTS)
@given(log_p=strategies.log_probabilities((2, 5), holes=True), level=st.floats(-300.0, 300.0))
def test_equal_weights_give_log_k_and_the_mean(k, log_p, level):
    g = row(3.0, -1.0, 0.5, 2.0, -4.0).expand(2, 5)
    log_sum, ratio = expected_log_sum_and_ratio(torch.full((2, 5), level, dtype=torch.float64), g, log_p, k=k)
    assert_close(log_sum, torch.full((2,), level + math.log(k), dtype=torch.float64))
    assert_close(ratio, (log_p.exp() * g).sum(-1))


@given(log_w=strategies.tensors((3, 4), -30.0, 30.0), log_p=strategies.log_probabilities((3, 4)))
def test_one_draw_is_a_plain_expectation(log_w, log_p):
    g = log_w.flip(-1)
    log_sum, ratio = expected_log_sum_and_ratio(log_w, g, log_p, k=1)
    assert_close(log_sum, (log_p.exp() * log_w).sum(-1))
    assert_close(ratio, (log_p.exp() * g).sum(-1))


@pytest.mark.parametrize("k", COUNTS)
@given(
    log_w=strategies.tensors((2, 3), -30.0, 30.0), log_p=strategies.log_probabilities((2, 3)), g=st.floats(-5.0, 5.0)
)
def test_a_constant_comes_out_of_the_ratio(k, log_w, log_p, g):
    """Also at 2^30 draws, where the integrand lives at t of 1e-9 times the inverse weights."""
    _, ratio = expected_log_sum_and_ratio(log_w, torch.full_like(log_w, g), log_p, k=k)
    assert_close(ratio, torch.full((2,), g, dtype=torch.float64), scale=10.0)


# Sums over counts


@pytest.mark.parametrize("k", [2, 5, 64, 500, 2000])
@pytest.mark.parametrize(
    ("log_w", "log_odds"),
    [((0.3, -0.9), 0.4), ((5.0, -5.0), -3.0), ((0.0, -300.0), -1.0), ((-300.0, 300.0), 2.0), ((0.0, 40.0), 7.0)],
)
def test_two_outcomes(k, log_w, log_odds):
    g = (1.7, -0.6)
    expected = two_point(log_w, g, log_odds, k)
    log_p = torch.tensor([log_odds, 0.0], dtype=torch.float64).log_softmax(-1)
    actual = expected_log_sum_and_ratio(row(*log_w), row(*g), log_p, k=k)
    spread = abs(log_w[0] - log_w[1])
    assert_close(actual[0], expected[0], scale=max(1.0, spread / 300))
    assert_close(actual[1], expected[1])
    assert torch.equal(expected_log_sum(row(*log_w), log_p, k=k), actual[0])


@pytest.mark.parametrize("log_k", [10, 20, 30, 40])
@pytest.mark.parametrize("spread", [3.0, 30.0, 300.0])
def test_a_heavy_weight_seen_once_in_k_draws(log_k, spread):
    """The law of rare events at its worst: whether the sum is e^spread larger hangs on a count of mean 1."""
    k, log_w, g = 2**log_k, (0.0, -spread), (2.0, -1.0)
    log_odds = -log_k * math.log(2) - math.log1p(-(2.0**-log_k))
    # More than 60 occurrences have probability below 1e-80.
    expected = two_point(log_w, g, log_odds, k, terms=60)
    log_p = row(-log_k * math.log(2), math.log1p(-(2.0**-log_k)))
    actual = expected_log_sum_and_ratio(row(*log_w), row(*g), log_p, k=k)
    assert_close(actual[0], expected[0], scale=max(1.0, spread / 100))
    assert_close(actual[1], expected[1])


def test_three_outcomes():
    """All splits of 20 draws over three outcomes, at 40 digits."""
    k, log_w, g, p = 20, (0.5, -2.0, 3.0), (1.0, -2.0, 0.25), (0.25, 0.625, 0.125)
    log_sum, ratio = mpmath.mpf(0), mpmath.mpf(0)
    with mpmath.workdps(40):
        w = [mpmath.exp(mpmath.mpf(value)) for value in log_w]
        for a in range(k + 1):
            for b in range(k + 1 - a):
                count = (a, b, k - a - b)
                ways = math.comb(k, a) * math.comb(k - a, b)
                probability = ways * mpmath.fprod(mpmath.mpf(q) ** c for q, c in zip(p, count, strict=True))
                total = mpmath.fsum(c * value for c, value in zip(count, w, strict=True))
                log_sum += probability * mpmath.log(total)
                ratio += probability * mpmath.fsum(c * v * h for c, v, h in zip(count, w, g, strict=True)) / total
    actual = expected_log_sum_and_ratio(row(*log_w), row(*g), row(*p).log(), k=k)
    assert_close(actual[0], float(log_sum))
    assert_close(actual[1], float(ratio))


# What lies outside the support


@pytest.mark.parametrize("garbage", [math.nan, INF, -INF, 1e300, 500.0])
def test_entries_of_probability_zero_hold_anything(garbage):
    log_p = row(0.3, 0.7, 0.0).log().requires_grad_()
    log_w, g = row(0.4, -1.0, garbage).requires_grad_(), row(1.0, 2.0, garbage).requires_grad_()
    actual = expected_log_sum_and_ratio(log_w, g, log_p, k=9)
    expected = expected_log_sum_and_ratio(row(0.4, -1.0), row(1.0, 2.0), row(0.3, 0.7).log(), k=9)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)
    gradients = torch.autograd.grad(sum(actual), (log_w, g, log_p))
    for gradient in gradients:
        assert gradient.isfinite().all() and gradient[2].item() == 0.0


# Quadrature


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    log_w, g, logits = torch.randn(3, 2, 37, generator=generator, dtype=torch.float64)
    return 4 * log_w, g, logits.log_softmax(-1)


def value_gradients_and_second(k: int) -> list[Tensor]:
    free = [table.requires_grad_() for table in problem()]
    value = sum(part.sum() for part in expected_log_sum_and_ratio(*free[:2], free[2].log_softmax(-1), k=k))
    gradients = torch.autograd.grad(value, free, create_graph=True)
    # The gradients sum to a constant along some directions: weigh them unevenly before differentiating again.
    weights = torch.linspace(-1, 1, 37).double()
    second = torch.autograd.grad(sum((gradient * weights).sum() for gradient in gradients), free)
    return [value.detach(), *(gradient.detach() for gradient in gradients), *second]


@pytest.mark.parametrize("k", [1, 2, 50, 2**30])
@pytest.mark.parametrize(
    ("name", "setting"),
    [("STEP", 0.125), ("MOMENT_RANGE", 1e-300), ("TILE", 64), ("NODE_CHUNK", 7)],
    ids=["half the step", "no moments", "tiny tiles", "few nodes at a time"],
)
def test_settings_of_the_quadrature_do_not_show(monkeypatch, k, name, setting):
    expected = value_gradients_and_second(k)
    monkeypatch.setattr(laplace, name, setting)
    for actual, wanted in zip(value_gradients_and_second(k), expected, strict=True):
        assert_close(actual, wanted, scale=max(1.0, wanted.abs().max().item()))


def test_the_step_is_what_makes_it_exact(monkeypatch):
    """Four times the step leaves exp(-pi^2/step), about 1e-4: the tests above can fail."""
    expected = value_gradients_and_second(50)[0]
    monkeypatch.setattr(laplace, "STEP", 1.0)
    assert 1e-8 < abs(value_gradients_and_second(50)[0] - expected) < 1e-2


@pytest.mark.parametrize("k", [1, 2, 9, 2**30])
def test_gradcheck_and_gradgradcheck(k):
    generator = torch.Generator().manual_seed(1)
    log_w, g, logits = (table.requires_grad_() for table in torch.randn(3, 2, 3, generator=generator).double())

    def function(log_w: Tensor, g: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return expected_log_sum_and_ratio(log_w, g, logits.log_softmax(-1), k=k)

    assert torch.autograd.gradcheck(function, (log_w, g, logits))
    assert torch.autograd.gradgradcheck(function, (log_w, g, logits))
    assert torch.autograd.gradcheck(lambda w, p: expected_log_sum(w, p.log_softmax(-1), k=k), (log_w, logits))


def test_a_third_derivative():
    """Kernels only give kernels, so nothing stops at two; against a difference of second derivatives."""

    def second(shift: Tensor) -> Tensor:
        log_w = row(0.3, -0.7, 1.1) + shift * row(1.0, -2.0, 0.5)
        value = expected_log_sum(log_w, row(0.2, 0.5, 0.3).log(), k=6)
        (first,) = torch.autograd.grad(value, shift, create_graph=True)
        return torch.autograd.grad(first, shift, create_graph=True)[0]

    at = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (third,) = torch.autograd.grad(second(at), at)
    step = 1e-4
    ends = [second(torch.tensor(end, dtype=torch.float64, requires_grad=True)) for end in (step, -step)]
    difference = (ends[0] - ends[1]).item() / (2 * step)
    assert third.item() == pytest.approx(difference, rel=1e-6)
    assert abs(difference) > 1e-3


# Memory


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, in the forward or the backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(("rows", "n"), [(1, 60_000), (500, 120)])
def test_no_array_of_nodes_by_completions_is_ever_made_or_kept(monkeypatch, rows, n):
    monkeypatch.setattr(laplace, "TILE", 2**14)
    generator = torch.Generator().manual_seed(0)
    log_w, g, logits = (t.requires_grad_() for t in torch.randn(3, rows, n, generator=generator).double())
    log_p = logits.log_softmax(-1)
    n_nodes = len(laplace._nodes(log_w.detach() - log_w.max(), log_p.exp(), 64))
    saved = []
    with (
        LargestTensor() as made,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        value = sum(part.sum() for part in expected_log_sum_and_ratio(log_w, g, log_p, k=64))
        gradients = torch.autograd.grad(value, (log_w, g, logits), create_graph=True)
        torch.autograd.grad(sum((gradient**2).sum() for gradient in gradients), (log_w, g, logits))
    # Up to eight channels at second order, of N entries and of one entry a node.
    bound = 8 * max(log_w.numel(), rows * n_nodes)
    assert n_nodes > 200
    assert max(saved) <= bound
    assert made.numel <= max(bound, 2**14)
    assert 10 * bound < log_w.numel() * n_nodes
