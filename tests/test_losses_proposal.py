"""exo_rw_loss and dpo_rw_loss with ``log_weights``: oracle, laws, infinities, transforms, dtypes, refusals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.losses import dpo_rw_loss, exo_rw_loss
from tests import oracles, strategies
from tests.tolerances import TOLERANCES, assert_close

INF, NAN = math.inf, math.nan
ORACLES = {exo_rw_loss: oracles.exo_rw, dpo_rw_loss: oracles.dpo_rw}
both_losses = pytest.mark.parametrize("loss", ORACLES, ids=lambda loss: loss.__name__)
# torch's own: its forward-mode rules are compiled by the deprecated torch.jit on first use.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

LOG_RATIO = torch.tensor([[0.3, -1.2, 0.5], [2.0, 0.1, -0.4]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, 0.2, -0.7], [0.0, 0.6, 0.3]], dtype=torch.float64)
LOG_WEIGHTS = torch.tensor([[-0.6, 0.4, 0.9], [0.2, -1.1, 0.7]], dtype=torch.float64)
ARGUMENTS = (LOG_RATIO, REWARDS, LOG_WEIGHTS)
MASK = torch.tensor([[True, False, True], [True, True, True]])
TEMPERATURES = {"beta_pi": 0.7, "beta_r": 1.3}


def gradients(function, *arguments: Tensor) -> tuple[Tensor, ...]:
    arguments = tuple(argument.clone().requires_grad_() for argument in arguments)
    return torch.autograd.grad(function(*arguments).sum(), arguments)


def weighted(loss, mask: Tensor | None = None):
    """The loss as a function of its three tensors."""
    return lambda f, r, weights: loss(f, r, log_weights=weights, mask=mask, **TEMPERATURES)


# Values


@both_losses
@given(drawn=strategies.candidates(), data=st.data())
def test_weights_stand_inside_both_softmaxes(loss, device, drawn, data):
    """The plain loops know no weights: there they are part of the log ratio and of the reward."""
    log_weights = data.draw(strategies.tensors(drawn.mask.shape, -20.0, 20.0)).masked_fill(~drawn.mask, NAN)
    moved = drawn.to(device)
    value = loss(
        moved.log_ratio, moved.rewards, mask=moved.mask, log_weights=log_weights.to(device), **drawn.temperatures
    )
    expected = [
        ORACLES[loss](
            (f + shift / drawn.beta_pi)[kept].tolist(),
            (r + shift * drawn.beta_r)[kept].tolist(),
            drawn.beta_pi,
            drawn.beta_r,
        )
        for f, r, shift, kept in zip(drawn.log_ratio, drawn.rewards, log_weights, drawn.mask, strict=True)
    ]
    # Of a sum of f and a weight both are rounded, and a loss is a mean of such sums.
    assert_close(value, expected, scale=drawn.scale + 20.0)


@both_losses
@given(drawn=strategies.candidates(holes=True))
def test_no_weights_are_equal_weights_bit_for_bit(loss, drawn):
    def call(f, r, **more):
        return loss(f, r, mask=drawn.mask, **drawn.temperatures, **more)

    zeros = torch.zeros_like(drawn.log_ratio)
    assert torch.equal(call(drawn.log_ratio, drawn.rewards), call(drawn.log_ratio, drawn.rewards, log_weights=zeros))
    finite = drawn.log_ratio.clamp(min=-30), drawn.rewards.clamp(min=-30)
    without, equal = (
        gradients(lambda f, r, more=more: call(f, r, **more), *finite) for more in ({}, {"log_weights": zeros})
    )
    assert all(torch.equal(a, b) for a, b in zip(without, equal, strict=True))


@both_losses
@given(drawn=strategies.candidates(), data=st.data())
def test_constants_and_order_change_nothing(loss, drawn, data):
    log_weights = data.draw(strategies.tensors(drawn.mask.shape, -20.0, 20.0))
    shift = data.draw(strategies.tensors((len(drawn.mask), 1), -50.0, 50.0))
    order = data.draw(st.permutations(range(drawn.mask.shape[1])))

    def call(order, log_weights):
        tensors = (drawn.log_ratio[:, order], drawn.rewards[:, order])
        return loss(*tensors, mask=drawn.mask[:, order], log_weights=log_weights[:, order], **drawn.temperatures)

    everything = list(range(drawn.mask.shape[1]))
    value = call(everything, log_weights)
    assert_close(call(everything, log_weights + shift), value, scale=drawn.scale)
    assert_close(call(order, log_weights), value, scale=drawn.scale)


@pytest.mark.parametrize("copies", [2, 5])
def test_a_candidate_drawn_often_is_one_of_that_weight(copies):
    """What a weight means: EXO's loss is the same, DPO's differs by what is no function of the policy."""
    index = [0] * copies + [1, 2]
    log_weights = torch.tensor([[copies, 1.0, 1.0]] * 2).double().log()
    for loss in ORACLES:
        repeated = gradients(lambda f, loss=loss: loss(f[:, index], REWARDS[:, index], **TEMPERATURES), LOG_RATIO)
        once = gradients(lambda f, loss=loss: loss(f, REWARDS, log_weights=log_weights, **TEMPERATURES), LOG_RATIO)
        assert_close(once[0], repeated[0])
    assert_close(
        exo_rw_loss(LOG_RATIO, REWARDS, log_weights=log_weights, **TEMPERATURES),
        exo_rw_loss(LOG_RATIO[:, index], REWARDS[:, index], **TEMPERATURES),
    )


@both_losses
def test_the_optimum_is_that_without_weights(loss):
    """Where f matches the reward it does so under any weights."""
    optimum = REWARDS / (TEMPERATURES["beta_pi"] * TEMPERATURES["beta_r"])
    (gradient,) = gradients(lambda f: weighted(loss)(f, REWARDS, LOG_WEIGHTS), optimum)
    assert_close(gradient, torch.zeros_like(gradient))
    (elsewhere,) = gradients(lambda f: weighted(loss)(f, REWARDS, LOG_WEIGHTS), LOG_RATIO)
    assert elsewhere.abs().max() > 1e-2


# Infinities


@both_losses
@pytest.mark.parametrize("held", [0.4, INF, NAN])
def test_zero_reference_counts_as_masked(loss, held):
    """Its log ratio may be infinite or nothing at all; all gradients to the candidate are zero."""
    log_ratio, rewards, log_weights = (table.clone() for table in ARGUMENTS)
    log_ratio[0, 1], log_weights[0, 1] = held, -INF
    value = weighted(loss)(log_ratio, rewards, log_weights)
    assert torch.equal(value, weighted(loss, MASK)(*ARGUMENTS))
    for gradient, expected in zip(
        gradients(weighted(loss), log_ratio, rewards, log_weights),
        gradients(weighted(loss, MASK), *ARGUMENTS),
        strict=True,
    ):
        assert gradient[0, 1].item() == 0.0
        assert torch.equal(gradient, expected)
    near = LOG_WEIGHTS.clone()
    near[0, 1] = -800.0
    assert_close(weighted(loss)(LOG_RATIO, REWARDS, near), value)


@both_losses
def test_extreme_weights(loss):
    """Differences of 1e4 nats leave one candidate, or the tied ones, and nothing that is not finite."""
    log_weights = torch.tensor([[0.0, 1e4, 0.0], [-1e4, 0.0, 0.0]]).double()
    value = weighted(loss)(LOG_RATIO, REWARDS, log_weights)
    rest = loss(LOG_RATIO[1:, 1:], REWARDS[1:, 1:], **TEMPERATURES)
    assert_close(value, [0.0, rest.item()])
    assert all(gradient.isfinite().all() for gradient in gradients(weighted(loss), LOG_RATIO, REWARDS, log_weights))


# Gradients and transforms


@both_losses
@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
def test_gradcheck_and_gradgradcheck(loss, mask):
    arguments = tuple(argument.clone().requires_grad_() for argument in ARGUMENTS)
    assert torch.autograd.gradcheck(weighted(loss, mask), arguments)
    assert torch.autograd.gradgradcheck(weighted(loss, mask), arguments)


@both_losses
def test_gradients_are_the_closed_form(loss):
    f, h = 0.7 * LOG_RATIO, 0.7 * LOG_RATIO - REWARDS / 1.3
    p_f, p_r = (f + LOG_WEIGHTS).softmax(-1), (REWARDS / 1.3 + LOG_WEIGHTS).softmax(-1)
    expected = p_f * (h - (p_f * h).sum(-1, keepdim=True)) if loss is exo_rw_loss else p_f - p_r
    (gradient,) = gradients(lambda f: weighted(loss)(f, REWARDS, LOG_WEIGHTS), LOG_RATIO)
    assert_close(gradient, 0.7 * expected)


@both_losses
@forward_mode
def test_transforms(loss):
    call = weighted(loss, MASK)
    expected = gradients(call, *ARGUMENTS)
    by_func = torch.func.grad(lambda *a: call(*a).sum(), argnums=(0, 1, 2))(*ARGUMENTS)
    for gradient, wanted in zip(by_func, expected, strict=True):
        assert_close(gradient, wanted)
    tangents = tuple(argument.cos() for argument in ARGUMENTS)
    _, derivative = torch.func.jvp(call, ARGUMENTS, tangents)
    assert_close(derivative, sum((g * t).sum(-1) for g, t in zip(expected, tangents, strict=True)))
    several = torch.stack([LOG_WEIGHTS, 2 * LOG_WEIGHTS, -LOG_WEIGHTS])
    mapped = torch.func.vmap(lambda weights: call(LOG_RATIO, REWARDS, weights))(several)
    assert_close(mapped, torch.stack([call(LOG_RATIO, REWARDS, weights) for weights in several]))
    hessian = torch.func.hessian(lambda weights: call(LOG_RATIO, REWARDS, weights).sum())(LOG_WEIGHTS)
    reverse = torch.autograd.functional.hessian(lambda weights: call(LOG_RATIO, REWARDS, weights).sum(), LOG_WEIGHTS)
    assert_close(hessian, reverse)


@pytest.mark.unchecked
@both_losses
@pytest.mark.parametrize(("mask", "dynamic"), [(None, False), (MASK, True)], ids=["unmasked", "masked-dynamic"])
def test_compiled(loss, mask, dynamic):
    torch._dynamo.reset()
    function = torch.compile(weighted(loss, mask), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_close(function(*ARGUMENTS), weighted(loss, mask)(*ARGUMENTS))
    for gradient, wanted in zip(
        gradients(function, *ARGUMENTS), gradients(weighted(loss, mask), *ARGUMENTS), strict=True
    ):
        assert_close(gradient, wanted)


@both_losses
def test_gradients_flow_only_where_they_are_asked_for(loss):
    leaf = LOG_RATIO.clone().requires_grad_()
    fixed = LOG_WEIGHTS.clone()
    weighted(loss)(leaf, REWARDS, fixed).sum().backward()
    assert leaf.grad is not None and fixed.grad is None and fixed._version == 0
    assert torch.equal(fixed, LOG_WEIGHTS)


# Dtypes


@both_losses
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(loss, dtype):
    """The widest of the three is returned; half types are computed in float32."""
    arguments = tuple(argument.to(dtype) for argument in ARGUMENTS)
    value = weighted(loss)(*arguments)
    assert value.dtype == dtype
    assert_close(value, weighted(loss)(*(argument.double() for argument in arguments)))
    assert weighted(loss)(*arguments[:2], LOG_WEIGHTS).dtype == torch.float64


# Refusals


@pytest.mark.unchecked
@both_losses
@pytest.mark.parametrize(
    ("log_weights", "message"),
    [
        (torch.zeros(2, 1), "log_weights must have the same shape [B, K] as log_ratio, [2, 3]; got [2, 1]"),
        (torch.zeros(3), "log_weights must have shape [B, K]; got [3]"),
        (torch.zeros(2, 3, dtype=torch.int64), "log_weights must have a floating-point dtype; got torch.int64"),
        ([[0.0] * 3] * 2, "log_weights must be a torch.Tensor; got list"),
        (
            torch.tensor([[0.0] * 3, [0.0, NAN, 0.0]]),
            "log_weights must be finite or -inf where unmasked; got nan at index [1, 1]",
        ),
        (
            torch.tensor([[0.0] * 3, [0.0, INF, 0.0]]),
            "log_weights must be finite or -inf where unmasked; got inf at index [1, 1]",
        ),
        (
            torch.tensor([[0.0] * 3, [-INF] * 3]),
            "log_weights must be above -inf for a candidate of each row; got -inf throughout row 1",
        ),
    ],
)
def test_refusals(loss, log_weights, message):
    with pytest.raises(ValueError) as refusal:
        loss(LOG_RATIO, REWARDS, log_weights=log_weights, **TEMPERATURES)
    assert str(refusal.value).startswith(message)


@pytest.mark.unchecked
@both_losses
def test_rows_whose_only_possible_candidates_have_no_weight(loss):
    log_ratio, log_weights = LOG_RATIO.clone(), LOG_WEIGHTS.clone()
    log_ratio[1, 1:], log_weights[1, 0] = -INF, -INF
    with pytest.raises(ValueError, match="log_ratio must be above -inf for a candidate of each row"):
        weighted(loss)(log_ratio, REWARDS, log_weights)
    # An unmasked candidate is asked for first.
    with pytest.raises(ValueError, match="mask must keep at least one candidate"):
        weighted(loss, torch.tensor([[True] * 3, [False] * 3]))(*ARGUMENTS)
