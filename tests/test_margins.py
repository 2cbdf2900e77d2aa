"""Losses of a pair as functions of the margin: against autograd of the losses themselves and integrals by mpmath."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exo_toy.losses import dpo_loss, dpo_rw_loss, exo_pref_loss, exo_rw_loss
from exo_toy.margins import (
    dpo_flow_time,
    dpo_margin_curvature,
    dpo_margin_gradient,
    exo_flow_time,
    exo_margin_curvature,
    exo_margin_gradient,
)

MARGINS = torch.linspace(-30, 30, 121, dtype=torch.float64)
TARGETS = (-20.0, -3.0, 0.0, 0.5, 6.9, 25.0)
# Autograd adds terms of the order of the margin and of the target, a few dozen, which mostly cancel.
TOLERANCE = 1e-13


def scalar(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def derivatives(loss):
    """First and second derivative of a loss of margins [B], by autograd."""
    margin = MARGINS.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(margin).sum(), margin, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), margin)
    return first.detach(), second


def on_pairs(loss, **settings):
    """A pair loss of the margin alone: temperature 1, everything but the chosen's log ratio zero."""
    zero = torch.zeros_like(MARGINS)
    return lambda margin: loss(margin, zero, zero, zero, beta=1.0, **settings).losses


def on_rewards(loss, target):
    def of_margin(margin):
        zero = torch.zeros_like(margin)
        return loss(
            torch.stack([margin, zero], -1), torch.stack([zero + 2 * target, zero], -1), beta_pi=1.0, beta_r=2.0
        )

    return of_margin


def close(found, expected):
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_and_curvatures_are_those_of_the_losses_on_rewards(target):
    first, second = derivatives(on_rewards(exo_rw_loss, target))
    close(exo_margin_gradient(MARGINS, target=target), first)
    close(exo_margin_curvature(MARGINS, target=target), second)
    first, second = derivatives(on_rewards(dpo_rw_loss, target))
    close(dpo_margin_gradient(MARGINS, target=target), first)
    close(dpo_margin_curvature(MARGINS), second)


@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.1192, 0.3])
def test_gradients_and_curvatures_are_those_of_the_losses_on_preferences(eps):
    target = math.log((1 - eps) / eps)
    first, second = derivatives(on_pairs(exo_pref_loss, label_smoothing=eps))
    close(exo_margin_gradient(MARGINS, target=target), first)
    close(exo_margin_curvature(MARGINS, target=target), second)
    first, _ = derivatives(on_pairs(dpo_loss, label_smoothing=eps))
    close(dpo_margin_gradient(MARGINS, target=target), first)
    first, second = derivatives(on_pairs(dpo_loss))
    close(dpo_margin_gradient(MARGINS, target=math.inf), first)
    close(dpo_margin_curvature(MARGINS), second)


def test_far_margins_keep_their_digits():
    """Against 50 digits: where sigmoids round to 1 and where their product underflows."""
    mpmath.mp.dps = 50
    for m in (-700.0, -100.0, -30.0, 30.0, 100.0, 700.0):
        for t in (-40.0, 6.9, 40.0):
            sigma = [1 / (1 + mpmath.exp(-x)) for x in (m, -m, t)]
            exo = sigma[0] * sigma[1] * (m - t)
            assert exo_margin_gradient(scalar(m), target=t).item() == pytest.approx(float(exo), rel=1e-14)
            curvature = sigma[0] * sigma[1] * (1 - (m - t) * mpmath.tanh(mpmath.mpf(m) / 2))
            assert exo_margin_curvature(scalar(m), target=t).item() == pytest.approx(float(curvature), rel=1e-13)
            dpo = dpo_margin_gradient(scalar(m), target=t).item()
            assert dpo == pytest.approx(float(sigma[0] - sigma[2]), rel=1e-13)
    assert dpo_margin_gradient(scalar(5.0), target=-math.inf).item() == pytest.approx(1 / (1 + math.exp(-5)), rel=1e-15)


def integral(gradient, start, end):
    """Time by quadrature, in pieces of at most one nat."""
    points = mpmath.linspace(start, end, 2 + math.ceil(abs(end - start)))
    return float(mpmath.quad(lambda m: -1 / gradient(m), points))


def sigma(x):
    return 1 / (1 + mpmath.exp(-x))


@given(st.floats(-30, 8), st.floats(0.05, 0.95), st.floats(0.1, 20), st.booleans())
def test_times_are_integrals(below, share, distance, mirrored):
    """From below to the share of the way to a target above; mirrored, from above to one below."""
    target, side = below + distance, -1 if mirrored else 1
    end = below + share * distance
    arguments = [side * x for x in (below, end)]
    exo = integral(lambda m: sigma(m) * sigma(-m) * (m - target), below, end)
    dpo = integral(lambda m: sigma(m) - sigma(target), below, end)
    start, end_ = (scalar(x) for x in arguments)
    # The closed form is a difference of terms this much larger than it.
    lost = 1 + 1 / (share * min(1.0, distance))
    assert exo_flow_time(start, end_, target=side * target).item() == pytest.approx(exo, rel=1e-13 * lost)
    assert dpo_flow_time(start, end_, target=side * target).item() == pytest.approx(dpo, rel=1e-12 * lost)


@given(st.floats(-30, 5), st.floats(0.1, 10))
def test_time_without_a_target_is_the_limit(start, distance):
    end = scalar(start + distance)
    unlimited = integral(lambda m: -sigma(-m), start, start + distance)
    assert dpo_flow_time(scalar(start), end, target=math.inf).item() == pytest.approx(unlimited, rel=1e-12)
    # At a target of 60 nats e^-60 is far below rounding.
    assert dpo_flow_time(scalar(start), end, target=60.0).item() == pytest.approx(unlimited, rel=1e-11)


def test_times_far_from_order_grow_as_said():
    starts = torch.tensor([-20.0, -40.0, -200.0], dtype=torch.float64)
    zeros = torch.zeros(3, dtype=torch.float64)
    exo = exo_flow_time(starts, zeros, target=6.9)
    # The next term of the asymptotic series is smaller by the distance.
    assert (exo * (-starts + 6.9) / (-starts).exp() - 1).abs().mul(-starts).max() < 2
    dpo = dpo_flow_time(starts, zeros, target=math.inf)
    assert torch.allclose(dpo, 1 - starts, rtol=1e-8, atol=0)


def test_the_target_is_never_reached_and_no_way_takes_no_time():
    for time in (exo_flow_time, dpo_flow_time):
        times = time(torch.tensor([0.0, 2.0]), torch.tensor([2.0, 2.0]), target=2.0)
        assert times.tolist() == [math.inf, 0.0]
        parts = [time(scalar(a), scalar(b), target=3.0).item() for a, b in ((-5.0, 1.0), (1.0, 2.0), (-5.0, 2.0))]
        assert parts[0] + parts[1] == pytest.approx(parts[2], rel=1e-13)


def test_time_is_that_of_small_steps():
    """Gradient descent on the losses themselves; its error is of the order of the rate."""
    rate, steps = 1e-2, 0
    margin = torch.tensor([-2.0], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    while margin.item() < 1.0:
        at = margin.clone().requires_grad_()
        loss = exo_pref_loss(at, zero, zero, zero, beta=1.0, label_smoothing=0.1).losses
        margin = margin - rate * torch.autograd.grad(loss.sum(), at)[0]
        steps += 1
    time = exo_flow_time(scalar(-2.0), scalar(1.0), target=math.log(9)).item()
    assert steps * rate == pytest.approx(time, rel=2 * rate)


@pytest.mark.unchecked
def test_bad_input_is_named():
    for gradient in (exo_margin_gradient, exo_margin_curvature, dpo_margin_gradient):
        with pytest.raises(ValueError, match=r"margin must be finite; got inf"):
            gradient(torch.tensor([math.inf]), target=0.0)
        with pytest.raises(ValueError, match=r"target must be .*; got nan"):
            gradient(torch.tensor([1.0]), target=math.nan)
    with pytest.raises(ValueError, match=r"target must be finite; got inf"):
        exo_margin_gradient(torch.tensor([1.0]), target=math.inf)
    with pytest.raises(ValueError, match=r"margin must be finite; got nan"):
        dpo_margin_curvature(torch.tensor([math.nan]))
    for time in (exo_flow_time, dpo_flow_time):
        with pytest.raises(ValueError, match=r"end must lie between start and target; got 3"):
            time(torch.tensor([0.0]), torch.tensor([3.0]), target=2.0)
        with pytest.raises(ValueError, match=r"end must lie between start and target; got 0"):
            time(torch.tensor([1.0]), torch.tensor([0.0]), target=2.0)
        with pytest.raises(ValueError, match=r"start must be at most 300 in size; got -301"):
            time(torch.tensor([-301.0]), torch.tensor([0.0]), target=2.0)
        with pytest.raises(ValueError, match=r"target must be at most 300 in size; got nan"):
            time(torch.tensor([0.0]), torch.tensor([0.0]), target=math.nan)
    with pytest.raises(ValueError, match=r"target must be at most 300 in size; got inf"):
        exo_flow_time(torch.tensor([0.0]), torch.tensor([0.0]), target=math.inf)
    with pytest.raises(ValueError, match="end must have a floating-point dtype"):
        dpo_flow_time(torch.tensor([0.0]), torch.tensor([0]), target=2.0)


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_differentiate_to_the_curvature_at_the_target_too(target):
    margin = torch.tensor([target, target - 1.0, target + 1.0], dtype=torch.float64, requires_grad=True)
    for gradient, curvature in (
        (dpo_margin_gradient(margin, target=target), dpo_margin_curvature(margin)),
        (exo_margin_gradient(margin, target=target), exo_margin_curvature(margin, target=target)),
    ):
        (by_autograd,) = torch.autograd.grad(gradient.sum(), margin)
        torch.testing.assert_close(by_autograd, curvature.detach(), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(
    ("time", "gradient"), [(exo_flow_time, exo_margin_gradient), (dpo_flow_time, dpo_margin_gradient)]
)
@pytest.mark.parametrize("target", [-1.5, 0.5, 6.0])
def test_time_falls_with_the_start_as_the_gradient_says(time, gradient, target):
    """d time / d start = 1 / gradient, d time / d end = -1 / gradient."""
    start = torch.tensor([target - 3.0, target + 2.0], dtype=torch.float64, requires_grad=True)
    end = torch.tensor([target - 0.5, target + 0.5], dtype=torch.float64, requires_grad=True)
    slopes = torch.autograd.grad(time(start, end, target=target).sum(), (start, end))
    expected = [sign / gradient(x.detach(), target=target) for sign, x in ((1, start), (-1, end))]
    torch.testing.assert_close(list(slopes), expected, rtol=1e-11, atol=0)
