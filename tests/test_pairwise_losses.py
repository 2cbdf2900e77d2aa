"""exo_pref_loss and dpo_loss: oracle, laws, gradients, infinities, dtypes."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.losses import PreferenceLoss, dpo_loss, exo_pref_loss
from tests import oracles, strategies
from tests.strategies import Pairs
from tests.tolerances import TOLERANCES, assert_close

INF = math.inf
LOSSES = [(exo_pref_loss, oracles.exo_pref), (dpo_loss, oracles.dpo)]
both_losses = pytest.mark.parametrize(("loss", "oracle"), LOSSES, ids=["exo_pref", "dpo"])
ATOL = TOLERANCES[torch.float64].atol
smoothings = st.floats(1e-6, 0.499)


def by_oracle(oracle, logps: Sequence[Tensor], beta: float, label_smoothing: float | list[float]) -> list[float]:
    """The oracle on each pair."""
    eps = label_smoothing if isinstance(label_smoothing, list) else [label_smoothing] * len(logps[0])
    rows = zip(*(values.double().tolist() for values in logps), eps, strict=True)
    return [oracle(*row[:4], beta, row[4]) for row in rows]


def one(*values: float, dtype=torch.float64) -> list[Tensor]:
    """A batch of one pair."""
    return [torch.tensor([value], dtype=dtype) for value in values]


def at_margin(*margins: float) -> list[Tensor]:
    """Pairs of these margins at beta = 1."""
    chosen = torch.tensor(margins, dtype=torch.float64)
    return [chosen, *(torch.zeros_like(chosen) for _ in range(3))]


def value_and_gradients(loss, logps, **kwargs) -> tuple[Tensor, ...]:
    logps = [values.clone().requires_grad_() for values in logps]
    losses = loss(*logps, **kwargs).losses
    return losses.detach(), *torch.autograd.grad(losses.sum(), logps)


# Against the oracle


@both_losses
@given(drawn=strategies.pairs(), eps=smoothings)
def test_agrees_with_the_oracle(loss, oracle, device, drawn, eps):
    drawn = drawn.to(device)
    losses = loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps).losses
    assert_close(losses, by_oracle(oracle, drawn.logps, drawn.beta, eps))


@given(drawn=strategies.pairs())
def test_defaults_agree_with_the_oracle(drawn):
    dpo = dpo_loss(*drawn.logps, beta=drawn.beta).losses
    assert_close(dpo, by_oracle(oracles.dpo, drawn.logps, drawn.beta, 0.0))
    exo = exo_pref_loss(*drawn.logps, beta=drawn.beta).losses
    assert_close(exo, by_oracle(oracles.exo_pref, drawn.logps, drawn.beta, 1e-3))


@given(drawn=strategies.pairs(), data=st.data())
def test_a_probability_per_label_agrees_with_the_oracle(device, drawn, data):
    eps = data.draw(strategies.tensors(drawn.policy_chosen.shape, 1e-6, 1 - 1e-6))
    drawn = drawn.to(device)
    losses = exo_pref_loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps.to(device)).losses
    assert_close(losses, by_oracle(oracles.exo_pref, drawn.logps, drawn.beta, eps.tolist()))


@both_losses
@given(drawn=strategies.pairs(bound=1e4), eps=smoothings)
def test_agrees_with_the_oracle_on_large_inputs(loss, oracle, drawn, eps):
    losses = loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps).losses
    assert_close(losses, by_oracle(oracle, drawn.logps, drawn.beta, eps), scale=1e-2 * drawn.scale)


@given(drawn=strategies.pairs(bound=8.0), eps=smoothings)
def test_published_exo_pref(drawn, eps):
    """The published computation, its target normalised: sum of softmax(f) (log softmax(f) - log target)."""
    f = drawn.beta * torch.stack(
        [drawn.policy_chosen - drawn.ref_chosen, drawn.policy_rejected - drawn.ref_rejected], -1
    )
    target = torch.tensor([1 - eps, eps], dtype=torch.float64)
    published = (torch.softmax(f, -1) * (torch.log_softmax(f, -1) - torch.log(target))).sum(-1)
    assert_close(exo_pref_loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps).losses, published)


@given(drawn=strategies.pairs(bound=8.0), eps=smoothings)
def test_published_dpo(drawn, eps):
    """The published computation: logits from the difference of log ratios, then two log-sigmoids."""
    logits = (drawn.policy_chosen - drawn.policy_rejected) - (drawn.ref_chosen - drawn.ref_rejected)
    logsigmoid = torch.nn.functional.logsigmoid
    published = -logsigmoid(drawn.beta * logits) * (1 - eps) - logsigmoid(-drawn.beta * logits) * eps
    assert_close(dpo_loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps).losses, published)
    assert_close(dpo_loss(*drawn.logps, beta=drawn.beta).losses, -logsigmoid(drawn.beta * logits))


# What is returned


@both_losses
@given(drawn=strategies.pairs())
def test_implicit_rewards(loss, oracle, drawn):
    policy_chosen = drawn.policy_chosen.clone().requires_grad_()
    result = loss(policy_chosen, *drawn.logps[1:], beta=drawn.beta)
    assert isinstance(result, PreferenceLoss)
    assert result._fields == ("losses", "chosen_rewards", "rejected_rewards")
    assert_close(result.chosen_rewards, drawn.beta * (drawn.policy_chosen - drawn.ref_chosen))
    assert_close(result.rejected_rewards, drawn.beta * (drawn.policy_rejected - drawn.ref_rejected))
    assert result.losses.requires_grad
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


# Laws


@both_losses
@given(drawn=strategies.pairs(), eps=smoothings, data=st.data())
def test_constants_added_to_log_ratios_change_nothing(loss, oracle, drawn, eps, data):
    shift, common = data.draw(strategies.tensors((2, drawn.policy_chosen.shape[0]), -50.0, 50.0))
    losses = loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps).losses
    chosen, rejected, ref_chosen, ref_rejected = drawn.logps
    for shifted in [
        (chosen + shift, rejected + shift, ref_chosen, ref_rejected),
        (chosen + shift, rejected + common, ref_chosen + shift, ref_rejected + common),
    ]:
        assert_close(loss(*shifted, beta=drawn.beta, label_smoothing=eps).losses, losses, scale=2.0)


@both_losses
@given(drawn=strategies.pairs(), factor=strategies.temperatures())
def test_only_scaled_log_ratios_matter(loss, oracle, drawn, factor):
    losses = loss(*drawn.logps, beta=drawn.beta).losses
    scaled = loss(*(logps / factor for logps in drawn.logps), beta=drawn.beta * factor).losses
    assert_close(scaled, losses)


@both_losses
@given(drawn=strategies.pairs(), eps=st.floats(1e-6, 0.49))
def test_the_wrong_label_costs_more(loss, oracle, drawn, eps):
    """loss(chosen, rejected) - loss(rejected, chosen) is -(log odds of the label) * tanh(margin/2), or -margin * ..."""
    difference = (
        loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps).losses
        - loss(*drawn.swapped, beta=drawn.beta, label_smoothing=eps).losses
    )
    odds = math.log1p(-eps) - math.log(eps)
    # EXO-pref: (sigma(m) - sigma(-m)) (log eps - log(1-eps)). DPO: (1 - 2 eps) (log sigma(-m) - log sigma(m)).
    expected = -odds * torch.tanh(drawn.margin / 2) if loss is exo_pref_loss else -(1 - 2 * eps) * drawn.margin
    assert_close(difference, expected)
    clear = drawn.margin.abs() > 1e-6
    assert (difference.sign() == -drawn.margin.sign())[clear].all()


@given(drawn=strategies.pairs(), eps=smoothings)
def test_bounds(drawn, eps):
    exo = exo_pref_loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps).losses
    assert (exo >= -ATOL).all()
    assert (exo <= -math.log(eps) + ATOL).all()
    assert (dpo_loss(*drawn.logps, beta=drawn.beta).losses >= 0).all()
    label_entropy = oracles.entropy([math.log1p(-eps), math.log(eps)])
    smoothed = dpo_loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps).losses
    assert (smoothed >= label_entropy - ATOL).all()


@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.1, 0.3, 0.49])
def test_optimum_at_the_log_odds_of_the_label(eps):
    best = math.log1p(-eps) - math.log(eps)
    logps = at_margin(best - 0.5, best, best + 0.5)
    exo, exo_gradient, *_ = value_and_gradients(exo_pref_loss, logps, beta=1.0, label_smoothing=eps)
    dpo, dpo_gradient, *_ = value_and_gradients(dpo_loss, logps, beta=1.0, label_smoothing=eps)
    assert_close(exo[1], 0.0)
    assert_close(dpo[1], oracles.entropy([math.log1p(-eps), math.log(eps)]))
    for losses, gradient in ((exo, exo_gradient), (dpo, dpo_gradient)):
        assert losses[0] > losses[1] < losses[2]
        assert gradient[0] < 0 < gradient[2]
        assert_close(gradient[1], 0.0)


@both_losses
def test_at_the_reference(loss, oracle):
    """No margin: DPO is log 2, EXO-pref KL of a fair coin from the label, and the wrong label costs the same."""
    logps = one(-3.0, -7.0, -3.0, -7.0)
    expected = {"dpo": math.log(2), "exo_pref": -math.log(2) - math.log(0.1 * 0.9) / 2}[oracle.__name__]
    assert_close(loss(*logps, beta=0.3, label_smoothing=0.1).losses, [expected])


# Gradients


def closed_form(loss, drawn: Pairs, eps: float) -> Tensor:
    """Derivative of the loss with respect to the margin, written out."""
    p = torch.sigmoid(drawn.margin)
    if loss is dpo_loss:
        return p - (1 - eps)
    return p * torch.sigmoid(-drawn.margin) * (drawn.margin - (math.log1p(-eps) - math.log(eps)))


@both_losses
@given(drawn=strategies.pairs(), eps=smoothings)
def test_gradients_are_the_closed_form(loss, oracle, device, drawn, eps):
    drawn = drawn.to(device)
    _, *gradients = value_and_gradients(loss, drawn.logps, beta=drawn.beta, label_smoothing=eps)
    expected = drawn.beta * closed_form(loss, drawn, eps)
    for gradient, sign in zip(gradients, (1, -1, -1, 1), strict=True):
        assert_close(gradient, sign * expected, scale=drawn.beta)


@given(drawn=strategies.pairs(bound=5.0), data=st.data())
def test_gradient_with_respect_to_label_probabilities(drawn, data):
    eps = data.draw(strategies.tensors(drawn.policy_chosen.shape, 0.01, 0.99)).requires_grad_()
    (gradient,) = torch.autograd.grad(
        exo_pref_loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps).losses.sum(), eps
    )
    expected = torch.sigmoid(drawn.margin) / (1 - eps) - torch.sigmoid(-drawn.margin) / eps
    assert_close(gradient, expected, scale=10.0)


@both_losses
@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_gradcheck_and_gradgradcheck(loss, oracle, eps):
    values = torch.tensor([[-1.0, -2.0, 0.5], [-1.5, 0.3, -0.7], [0.1, 0.2, -0.9], [-2.0, -1.1, 0.4]])
    logps = [row.double().requires_grad_() for row in values]

    def call(*logps):
        return loss(*logps, beta=0.7, label_smoothing=eps).losses

    assert torch.autograd.gradcheck(call, logps)
    assert torch.autograd.gradgradcheck(call, logps)


def test_gradcheck_of_label_probabilities():
    logps = [torch.tensor(row).double() for row in ([-1.0, 0.5], [-1.5, -0.7], [0.1, -0.9], [-2.0, 0.4])]
    eps = torch.tensor([0.2, 0.8], dtype=torch.float64, requires_grad=True)
    logps[0].requires_grad_()

    def call(policy_chosen, eps):
        return exo_pref_loss(policy_chosen, *logps[1:], beta=0.7, label_smoothing=eps).losses

    assert torch.autograd.gradcheck(call, (logps[0], eps))
    assert torch.autograd.gradgradcheck(call, (logps[0], eps))


# Infinities and extremes


@pytest.mark.parametrize(
    ("loss", "eps", "impossible", "value", "slope"),
    [
        # A completion the policy excludes: value, and derivative with respect to the margin.
        (exo_pref_loss, 0.1, "rejected", -math.log(0.9), 0.0),
        (exo_pref_loss, 0.1, "chosen", -math.log(0.1), 0.0),
        (dpo_loss, 0.0, "rejected", 0.0, 0.0),
        (dpo_loss, 0.0, "chosen", INF, -1.0),
        (dpo_loss, 0.1, "rejected", INF, 0.1),
        (dpo_loss, 0.1, "chosen", INF, -0.9),
    ],
)
def test_probability_zero_is_the_limit_of_small_probabilities(loss, eps, impossible, value, slope):
    def call(entry: float) -> tuple[Tensor, ...]:
        logps = one(entry, -1.0, -2.0, -3.0) if impossible == "chosen" else one(-1.0, entry, -2.0, -3.0)
        return value_and_gradients(loss, logps, beta=0.5, label_smoothing=eps)

    there, *gradients = call(-INF)
    near, *near_gradients = call(-1e4)
    assert_close(there, [value])
    if value < INF:
        assert_close(near, there)
    for gradient, near_gradient, sign in zip(gradients, near_gradients, (1, -1, -1, 1), strict=True):
        assert_close(gradient, [sign * 0.5 * slope])
        assert_close(near_gradient, gradient)


@both_losses
@pytest.mark.parametrize("eps", [0.1, 1e-3])
def test_second_derivative_vanishes_at_infinite_margins(loss, oracle, eps):
    for chosen, rejected in [(-INF, -1.0), (-1.0, -INF), (-1e4, -1.0), (-1.0, -1e4)]:
        logps = [values.requires_grad_() for values in one(chosen, rejected, 0.0, 0.0)]
        (gradient,) = torch.autograd.grad(
            loss(*logps, beta=1.0, label_smoothing=eps).losses.sum(), logps[0], create_graph=True
        )
        (second,) = torch.autograd.grad(gradient.sum(), logps[0])
        assert_close(second, [0.0])


@both_losses
def test_margins_that_underflow_one_of_the_probabilities(loss, oracle):
    for margin in (-1e4, -800.0, -40.0, 40.0, 800.0, 1e4):
        value, *gradients = value_and_gradients(loss, at_margin(margin), beta=1.0, label_smoothing=0.1)
        assert_close(value, by_oracle(oracle, at_margin(margin), 1.0, 0.1))
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("eps", [1e-12, 1e-30, 1e-300])
def test_label_smoothing_smaller_than_the_dtype_can_hold(dtype, eps):
    """log eps is taken before eps is rounded, where it would be 0 and the loss infinite."""
    losses = exo_pref_loss(*one(-1.0, -2.0, -1.5, -1.5, dtype=dtype), beta=1.0, label_smoothing=eps).losses
    assert_close(losses, by_oracle(oracles.exo_pref, one(-1.0, -2.0, -1.5, -1.5), 1.0, eps), scale=10.0)


def test_label_probability_close_to_one_in_a_wider_dtype():
    eps = torch.tensor([1 - 1e-12], dtype=torch.float64)
    logps = one(-1.0, -2.0, -1.5, -1.5, dtype=torch.float32)
    losses = exo_pref_loss(*logps, beta=1.0, label_smoothing=eps).losses
    assert losses.dtype == torch.float32
    assert_close(losses, by_oracle(oracles.exo_pref, logps, 1.0, eps.tolist()), scale=10.0)


@both_losses
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_temperatures_that_blow_inputs_up(loss, oracle, dtype):
    for logps, beta in [((-6e4, -1.0, -1.0, -6e4), 1e-8), ((-6e4, -5e4, -4e4, -6e4), 1e-3)]:
        tensors = one(*logps, dtype=dtype)
        value, *gradients = value_and_gradients(loss, tensors, beta=beta, label_smoothing=0.1)
        assert_close(value, by_oracle(oracle, tensors, beta, 0.1), scale=100.0)
        assert all(gradient.isfinite().all() for gradient in gradients)


@both_losses
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_rewards_that_overflow_leave_no_nan_in_the_loss(loss, oracle, dtype):
    huge = torch.finfo(torch.promote_types(dtype, torch.float32)).max ** 0.95
    value, *gradients = value_and_gradients(loss, one(3e4, 2e4, 0.0, 0.0, dtype=dtype), beta=huge)
    assert_close(value, [-math.log1p(-1e-3) if loss is exo_pref_loss else 0.0])
    assert all((gradient == 0).all() for gradient in gradients)


# Dtypes


@both_losses
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@given(drawn=strategies.pairs(), eps=smoothings)
def test_lower_precision_against_float64_of_the_same_inputs(loss, oracle, device, dtype, drawn, eps):
    drawn = drawn.to(dtype).to(device)
    result = loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps)
    wide = drawn.to(torch.float64)
    expected = loss(*wide.logps, beta=wide.beta, label_smoothing=eps)
    for value, wanted in zip(result, expected, strict=True):
        assert value.dtype == dtype
        assert value.device.type == device.type
        # -log(1e-6) is 14, the largest log eps.
        assert_close(value, wanted, scale=1.0 if dtype == torch.float64 else drawn.scale + 14)


@both_losses
def test_the_reference_may_have_another_dtype(loss, oracle):
    policy, ref = one(-1.0, -2.0, dtype=torch.bfloat16), one(-1.2, -1.7, dtype=torch.float32)
    result = loss(*policy, *ref, beta=1.0, label_smoothing=0.1)
    assert all(value.dtype == torch.bfloat16 for value in result)
    assert_close(result.losses, by_oracle(oracle, (*policy, *ref), 1.0, 0.1))


@both_losses
def test_an_empty_batch_gives_an_empty_loss(loss, oracle):
    empty = torch.zeros(0, requires_grad=True)
    result = loss(empty, empty, empty, empty, beta=1.0)
    assert [value.shape for value in result] == [(0,)] * 3
    result.losses.sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0,)
