"""alpha_rw_loss: oracle, its ends, gradient, laws, infinities, extremes, transforms, dtypes, refusals."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.divergences import alpha_divergence
from exo_toy.losses import alpha_rw_loss, dpo_rw_loss, exo_rw_loss
from tests import oracles, strategies
from tests.tolerances import TOLERANCES, assert_close

INF, NAN = math.inf, math.nan
LOG_RATIO = torch.tensor([[0.3, -1.2, 0.5], [2.0, 0.1, -0.4]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, 0.2, -0.7], [0.0, 0.6, 0.3]], dtype=torch.float64)
LOG_WEIGHTS = torch.tensor([[-0.6, 0.4, 0.9], [0.2, -1.1, 0.7]], dtype=torch.float64)
MASK = torch.tensor([[True, False, True], [True, True, True]])
TEMPERATURES = {"beta_pi": 0.7, "beta_r": 1.3}
ALPHAS = (-1.0, 0, 1e-9, 0.3, 0.5, 0.8, 1 - 1e-9, 1, 2.0)
each_alpha = pytest.mark.parametrize("alpha", ALPHAS)
inner = pytest.mark.parametrize("alpha", [1e-3, 0.3, 0.5, 0.8])
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def gradients(function, *arguments: Tensor) -> tuple[Tensor, ...]:
    arguments = tuple(argument.clone().requires_grad_() for argument in arguments)
    return torch.autograd.grad(function(*arguments).sum(), arguments)


def by_series(f: list[float], s: list[float], alpha: float) -> float:
    """(1 - sum p^alpha q^(1-alpha)) / (alpha (1-alpha)) at 50 digits, p and q softmaxes of f and s.

    The difference is as small as what divides it, and needs as many digits more.
    """
    with mpmath.workdps(50 + math.ceil(-math.log10(min(alpha, 1 - alpha)))):
        a = mpmath.mpf(alpha)
        p, q = ([mpmath.exp(mpmath.mpf(x)) for x in row] for row in (f, s))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        return float((1 - sum(x**a * y ** (1 - a) for x, y in zip(p, q, strict=True))) / (a * (1 - a)))


# Values


@given(drawn=strategies.candidates(), alpha=st.floats(0.0, 1.0), data=st.data())
def test_agrees_with_fifty_digits(drawn, alpha, data):
    """Also near both ends, where the formula as written has no digits left."""
    alpha = data.draw(st.sampled_from([alpha, 1e-9, 1e-5, 1 - 1e-5, 1 - 1e-9]))
    log_weights = data.draw(strategies.tensors(drawn.mask.shape, -20.0, 20.0)).masked_fill(~drawn.mask, NAN)
    value = alpha_rw_loss(
        drawn.log_ratio, drawn.rewards, alpha=alpha, mask=drawn.mask, log_weights=log_weights, **drawn.temperatures
    )
    scale = drawn.scale + 20.0
    for row, (f, r, shift, kept) in enumerate(
        zip(drawn.log_ratio, drawn.rewards, log_weights, drawn.mask, strict=True)
    ):
        f, s = drawn.beta_pi * f + shift, r / drawn.beta_r + shift
        if 0 < alpha < 1:
            expected = by_series(f[kept].tolist(), s[kept].tolist(), alpha)
        else:
            ends = (oracles.log_softmax(f[kept].tolist()), oracles.log_softmax(s[kept].tolist()))
            expected = oracles.kl(*(ends if alpha == 1 else ends[::-1]))
        assert_close(value[row], expected, scale=scale)


@given(drawn=strategies.candidates(holes=True))
def test_ends_are_exo_and_dpo_less_the_entropy(drawn):
    arguments, options = (drawn.log_ratio, drawn.rewards), {"mask": drawn.mask, **drawn.temperatures}
    assert torch.equal(alpha_rw_loss(*arguments, alpha=1, **options), exo_rw_loss(*arguments, **options))
    dpo = dpo_rw_loss(*arguments, **options)
    matched = (drawn.rewards / (drawn.beta_pi * drawn.beta_r)).masked_fill(~drawn.mask, 0.0)
    entropy = dpo_rw_loss(matched, drawn.rewards, **options)
    finite = dpo.isfinite()
    value = alpha_rw_loss(*arguments, alpha=0, **options)
    assert_close(value[finite], (dpo - entropy)[finite], scale=drawn.scale)
    assert torch.equal(value[~finite], dpo[~finite])


def test_at_zero_the_gradient_is_that_of_dpo():
    options = {"mask": MASK, "log_weights": LOG_WEIGHTS, **TEMPERATURES}
    ours = gradients(lambda f: alpha_rw_loss(f, REWARDS, alpha=0, **options), LOG_RATIO)
    assert_close(ours[0], gradients(lambda f: dpo_rw_loss(f, REWARDS, **options), LOG_RATIO)[0])


@each_alpha
def test_is_the_divergence_of_the_softmaxes(alpha):
    value = alpha_rw_loss(LOG_RATIO, REWARDS, alpha=alpha, **TEMPERATURES)
    p_f, p_r = (0.7 * LOG_RATIO).log_softmax(-1), (REWARDS / 1.3).log_softmax(-1)
    assert_close(value, alpha_divergence(p_f, p_r, alpha=alpha))


@inner
def test_gradient_pulls_towards_the_normalised_geometric_mean(alpha):
    """Z (p_f - m) / (1 - alpha), m = p_f^alpha p_r^(1-alpha) / Z, times beta_pi."""
    (gradient,) = gradients(lambda f: alpha_rw_loss(f, REWARDS, alpha=alpha, **TEMPERATURES), LOG_RATIO)
    p_f, p_r = (0.7 * LOG_RATIO).softmax(-1), (REWARDS / 1.3).softmax(-1)
    mean = p_f**alpha * p_r ** (1 - alpha)
    z = mean.sum(-1, keepdim=True)
    assert_close(gradient, 0.7 * z * (p_f - mean / z) / (1 - alpha))


# Laws


@each_alpha
@given(drawn=strategies.candidates(bound=5.0), data=st.data())
def test_constants_and_order_change_nothing(alpha, drawn, data):
    shift = data.draw(strategies.tensors((len(drawn.mask), 1), -50.0, 50.0))
    order = data.draw(st.permutations(range(drawn.mask.shape[1])))
    temperatures = {"beta_pi": 1.1, "beta_r": 0.9}
    value = alpha_rw_loss(drawn.log_ratio, drawn.rewards, alpha=alpha, mask=drawn.mask, **temperatures)
    moved = [tensor[:, order] for tensor in (drawn.log_ratio + shift, drawn.rewards - shift)]
    again = alpha_rw_loss(*moved, alpha=alpha, mask=drawn.mask[:, order], **temperatures)
    # Beyond [0, 1] rounding is relative to a value without bound.
    torch.testing.assert_close(again, value, rtol=1e-9, atol=1e-10)
    assert (value >= -1e-12).all()


@each_alpha
def test_zero_with_no_gradient_where_the_policy_matches_the_reward(alpha):
    optimum = REWARDS / (0.7 * 1.3)
    options = {"alpha": alpha, "log_weights": LOG_WEIGHTS, **TEMPERATURES}
    assert_close(alpha_rw_loss(optimum, REWARDS, **options), [0.0, 0.0])
    assert_close(gradients(lambda f: alpha_rw_loss(f, REWARDS, **options), optimum)[0], torch.zeros(2, 3).double())
    assert alpha_rw_loss(LOG_RATIO, REWARDS, **options).min() > 1e-3


@each_alpha
def test_masked_candidates_hold_anything_and_get_nothing(alpha):
    options = {"alpha": alpha, "mask": MASK, **TEMPERATURES}
    value = alpha_rw_loss(LOG_RATIO, REWARDS, **options)
    wanted = gradients(lambda f, r: alpha_rw_loss(f, r, **options), LOG_RATIO, REWARDS)
    for held in (NAN, INF, -INF, 1e300):
        f, r = LOG_RATIO.masked_fill(~MASK, held), REWARDS.masked_fill(~MASK, held)
        assert torch.equal(alpha_rw_loss(f, r, **options), value)
        for gradient, expected in zip(
            gradients(lambda f, r: alpha_rw_loss(f, r, **options), f, r), wanted, strict=True
        ):
            assert torch.equal(gradient, expected) and gradient[0, 1] == 0
    single = torch.tensor([[True, False, False]] * 2)
    assert_close(alpha_rw_loss(LOG_RATIO, REWARDS, alpha=alpha, mask=single, **TEMPERATURES), [0.0, 0.0])


# Infinities and extremes


@inner
@pytest.mark.parametrize("argument", [0, 1])
def test_minus_infinity_is_a_limit(alpha, argument):
    """A candidate that policy or reward rule out: finite inside (0, 1), value and gradients those nearby."""
    near, at = [LOG_RATIO.clone(), REWARDS.clone()], [LOG_RATIO.clone(), REWARDS.clone()]
    near[argument][0, 1], at[argument][0, 1] = -5e4, -INF

    def call(f: Tensor, r: Tensor) -> Tensor:
        return alpha_rw_loss(f, r, alpha=alpha, **TEMPERATURES)

    assert_close(call(*at), call(*near))
    for gradient, expected in zip(gradients(call, *at), gradients(call, *near), strict=True):
        assert_close(gradient, expected)


def test_infinite_only_where_the_divergence_is():
    ruled_out = torch.tensor([[0.0, -INF], [0.0, 0.0]]).double()
    zeros = torch.zeros_like(ruled_out)
    for alpha in ALPHAS:
        no_reward = alpha_rw_loss(zeros, ruled_out, alpha=alpha, **TEMPERATURES)
        no_policy = alpha_rw_loss(ruled_out, zeros, alpha=alpha, **TEMPERATURES)
        assert (no_reward[0] == INF) == (alpha >= 1)
        assert (no_policy[0] == INF) == (alpha <= 0)
        assert no_reward[1] == no_policy[1] == 0


@pytest.mark.parametrize("alpha", [0.0, 1e-9, 0.3, 0.7, 1.0])
def test_extremes_stay_finite(alpha):
    f = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]]).double()
    r = torch.tensor([[-1e4, 0.0, 1e4], [-1e4, 0.0, 1e4]]).double()

    def call(f: Tensor, r: Tensor) -> Tensor:
        return alpha_rw_loss(f, r, alpha=alpha, beta_pi=1.0, beta_r=1.0)

    value = call(f, r)
    # Nothing in common: 1 / (alpha (1 - alpha)), or so near the ends the divergence of 2e4 nats.
    expected = 2e4 if alpha in (0, 1) else -math.expm1(-2e4 * min(alpha, 1 - alpha)) / (alpha * (1 - alpha))
    assert_close(value, [expected, 0.0], scale=2e4)
    assert all(gradient.isfinite().all() for gradient in gradients(call, f, r))


# Transforms, dtypes


@forward_mode
@each_alpha
def test_gradcheck_and_gradgradcheck(alpha):
    arguments = [tensor.clone().requires_grad_() for tensor in (LOG_RATIO, REWARDS, LOG_WEIGHTS)]

    def call(f: Tensor, r: Tensor, weights: Tensor) -> Tensor:
        return alpha_rw_loss(f, r, alpha=alpha, mask=MASK, log_weights=weights, **TEMPERATURES)

    assert torch.autograd.gradcheck(call, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, arguments)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_functorch(alpha):
    def row(f: Tensor, r: Tensor) -> Tensor:
        return alpha_rw_loss(f.unsqueeze(0), r.unsqueeze(0), alpha=alpha, **TEMPERATURES)[0]

    by_row = torch.func.vmap(torch.func.grad(row))(LOG_RATIO, REWARDS)
    assert_close(by_row, gradients(lambda f: alpha_rw_loss(f, REWARDS, alpha=alpha, **TEMPERATURES), LOG_RATIO)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("alpha", [0, 0.4, 1])
def test_half_types_are_computed_in_float32(dtype, alpha):
    f, r = LOG_RATIO.to(dtype), REWARDS.to(dtype)
    value = alpha_rw_loss(f, r, alpha=alpha, **TEMPERATURES)
    assert value.dtype == dtype and dtype in TOLERANCES
    assert_close(value, alpha_rw_loss(f.double(), r.double(), alpha=alpha, **TEMPERATURES))


# Errors


@pytest.mark.unchecked
@pytest.mark.parametrize("bad", [NAN, INF, "1", True, None, torch.tensor(0.5)], ids=str)
def test_alpha_must_be_a_finite_number(bad):
    with pytest.raises(ValueError, match=r"^alpha must be a finite number"):
        alpha_rw_loss(LOG_RATIO, REWARDS, alpha=bad, **TEMPERATURES)


@pytest.mark.unchecked
def test_refuses_what_exo_refuses():
    with pytest.raises(ValueError, match=r"^rewards must have the same shape"):
        alpha_rw_loss(LOG_RATIO, REWARDS[:, :2], alpha=0.5, **TEMPERATURES)
    with pytest.raises(ValueError, match="K >= 2"):
        alpha_rw_loss(LOG_RATIO[:, :1], REWARDS[:, :1], alpha=0.5, **TEMPERATURES)
    with pytest.raises(ValueError, match=r"^log_ratio must be finite or -inf where unmasked; got nan"):
        alpha_rw_loss(LOG_RATIO * NAN, REWARDS, alpha=0.5, **TEMPERATURES)
    with pytest.raises(ValueError, match=r"^beta_pi must be a finite number above 0"):
        alpha_rw_loss(LOG_RATIO, REWARDS, alpha=0.5, beta_pi=0.0, beta_r=1.0)
