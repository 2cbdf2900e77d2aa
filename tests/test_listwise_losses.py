"""exo_rw_loss and dpo_rw_loss: oracle, laws, gradients, infinities, dtypes, masks."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.losses import dpo_loss, dpo_rw_loss, exo_pref_loss, exo_rw_loss
from tests import oracles, strategies
from tests.strategies import Candidates
from tests.tolerances import TOLERANCES, assert_close

INF = math.inf
LOSSES = [(exo_rw_loss, oracles.exo_rw), (dpo_rw_loss, oracles.dpo_rw)]
both_losses = pytest.mark.parametrize(("loss", "oracle"), LOSSES, ids=["exo_rw", "dpo_rw"])
ATOL = TOLERANCES[torch.float64].atol


def by_oracle(
    oracle, log_ratio: Tensor, rewards: Tensor, mask: Tensor | None = None, *, beta_pi, beta_r
) -> list[float]:
    """The oracle on each row's unmasked candidates."""
    mask = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask
    rows = zip(log_ratio.double(), rewards.double(), mask, strict=True)
    return [oracle(row[kept].tolist(), values[kept].tolist(), beta_pi, beta_r) for row, values, kept in rows]


def row(*values: float, dtype=torch.float64) -> Tensor:
    return torch.tensor([values], dtype=dtype)


def value_and_gradients(loss, log_ratio: Tensor, rewards: Tensor, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    log_ratio, rewards = log_ratio.clone().requires_grad_(), rewards.clone().requires_grad_()
    value = loss(log_ratio, rewards, **kwargs)
    return value.detach(), *torch.autograd.grad(value.sum(), (log_ratio, rewards))


# Against the oracle


@both_losses
@given(drawn=strategies.candidates(holes=True))
def test_agrees_with_the_oracle(loss, oracle, device, drawn):
    drawn = drawn.to(device)
    value = loss(drawn.log_ratio, drawn.rewards, mask=drawn.mask, **drawn.temperatures)
    assert_close(value, by_oracle(oracle, drawn.log_ratio, drawn.rewards, drawn.mask, **drawn.temperatures))


@both_losses
@given(drawn=strategies.candidates())
def test_agrees_with_the_oracle_without_a_mask(loss, oracle, drawn):
    value = loss(drawn.log_ratio, drawn.rewards, **drawn.temperatures)
    assert_close(value, by_oracle(oracle, drawn.log_ratio, drawn.rewards, **drawn.temperatures))


@both_losses
@given(drawn=strategies.candidates(bound=1e4))
def test_agrees_with_the_oracle_on_large_inputs(loss, oracle, drawn):
    value = loss(drawn.log_ratio, drawn.rewards, mask=drawn.mask, **drawn.temperatures)
    expected = by_oracle(oracle, drawn.log_ratio, drawn.rewards, drawn.mask, **drawn.temperatures)
    # Rounding is relative to the differences within a row, of which the loss is a multiple: no allowance for scale.
    assert_close(value, expected)


def test_infonca_of_four_candidates():
    """InfoNCA's published form: -sum_i softmax(r/alpha)_i log softmax(beta lr)_i (arXiv:2402.05369, K=4)."""
    log_ratio, rewards = row(0.3, -1.2, 2.0, 0.1), row(1.0, 0.0, -2.0, 0.5)
    targets = torch.softmax(rewards / 0.4, -1)
    infonca = -(targets * torch.log_softmax(0.1 * log_ratio, -1)).sum(-1)
    assert_close(dpo_rw_loss(log_ratio, rewards, beta_pi=0.1, beta_r=0.4), infonca)


def test_reward_aware_kl_of_a_pair():
    """The Bernoulli KL between sigma(beta D) and sigma(eta dr) (arXiv:2406.11704) is EXO-rw on two candidates."""
    log_ratio, rewards = row(0.3, -1.2), row(1.0, 0.4)
    policy, target = torch.sigmoid(row(0.7 * 1.5)), torch.sigmoid(row(0.6 / 0.5))
    bernoulli = policy * (policy / target).log() + (1 - policy) * ((1 - policy) / (1 - target)).log()
    assert_close(exo_rw_loss(log_ratio, rewards, beta_pi=0.7, beta_r=0.5), bernoulli.squeeze(-1))


# Laws


@both_losses
@given(drawn=strategies.candidates(holes=True), data=st.data())
def test_constants_added_to_a_row_change_nothing(loss, oracle, drawn, data):
    shifts = data.draw(strategies.tensors((2, drawn.mask.shape[0], 1), -50.0, 50.0))
    value = loss(drawn.log_ratio, drawn.rewards, mask=drawn.mask, **drawn.temperatures)
    shifted = loss(drawn.log_ratio + shifts[0], drawn.rewards + shifts[1], mask=drawn.mask, **drawn.temperatures)
    assert_close(shifted, value)


@both_losses
@given(drawn=strategies.candidates(holes=True, min_k=2), data=st.data())
def test_order_of_candidates_does_not_matter(loss, oracle, drawn, data):
    order = data.draw(st.permutations(range(drawn.mask.shape[1])))
    value, *gradients = value_and_gradients(
        loss, drawn.log_ratio, drawn.rewards.clamp(min=-30), mask=drawn.mask, **drawn.temperatures
    )
    permuted, *permuted_gradients = value_and_gradients(
        loss, drawn.log_ratio[:, order], drawn.rewards.clamp(min=-30)[:, order], mask=drawn.mask[:, order],
        **drawn.temperatures,
    )  # fmt: skip
    assert_close(permuted, value)
    # Where DPO-rw is infinite so is its gradient to the rewards, through inf - inf: the order decides how it shows.
    for ours, theirs in zip(permuted_gradients, gradients, strict=True):
        assert_close(ours[value < INF], theirs[:, order][value < INF])


@both_losses
@given(drawn=strategies.candidates(holes=True), factor=strategies.temperatures())
def test_only_scaled_quantities_matter(loss, oracle, drawn, factor):
    value = loss(drawn.log_ratio, drawn.rewards, mask=drawn.mask, **drawn.temperatures)
    scaled = loss(
        drawn.log_ratio / factor,
        drawn.rewards * factor,
        mask=drawn.mask,
        beta_pi=drawn.beta_pi * factor,
        beta_r=drawn.beta_r * factor,
    )
    assert_close(scaled, value)


@given(drawn=strategies.candidates())
def test_bounds(drawn):
    exo = exo_rw_loss(drawn.log_ratio, drawn.rewards, mask=drawn.mask, **drawn.temperatures)
    dpo = dpo_rw_loss(drawn.log_ratio, drawn.rewards, mask=drawn.mask, **drawn.temperatures)
    target_entropy = torch.tensor(
        [
            oracles.entropy(oracles.log_softmax((values[kept] / drawn.beta_r).tolist()))
            for values, kept in zip(drawn.rewards, drawn.mask, strict=True)
        ],
        dtype=torch.float64,
    )
    assert (exo >= -ATOL).all()
    assert (dpo >= target_entropy - ATOL).all()


@given(drawn=strategies.candidates(), data=st.data())
def test_optimum_where_policy_matches_target(drawn, data):
    constant = data.draw(strategies.tensors((drawn.mask.shape[0], 1), -5.0, 5.0))
    optimum = drawn.rewards / (drawn.beta_r * drawn.beta_pi) + constant
    scale = optimum.abs().max().item() * drawn.beta_pi * 1e-2
    exo, exo_gradient, _ = value_and_gradients(
        exo_rw_loss, optimum, drawn.rewards, mask=drawn.mask, **drawn.temperatures
    )
    assert_close(exo, torch.zeros_like(exo), scale=scale)
    assert_close(exo_gradient, torch.zeros_like(optimum), scale=scale * drawn.beta_pi)
    _, dpo_gradient, _ = value_and_gradients(dpo_rw_loss, optimum, drawn.rewards, mask=drawn.mask, **drawn.temperatures)
    assert_close(dpo_gradient, torch.zeros_like(optimum), scale=scale * drawn.beta_pi)


@both_losses
def test_away_from_the_optimum_the_loss_is_higher(loss, oracle):
    rewards = row(0.0, 1.0, -0.5)
    best = loss(rewards, rewards, beta_pi=1.0, beta_r=1.0)
    for index, step in itertools.product(range(3), (-1.0, 1.0)):
        other = rewards.clone()
        other[0, index] += step
        assert loss(other, rewards, beta_pi=1.0, beta_r=1.0).item() > best.item() + 1e-3


@given(drawn=strategies.pairs())
def test_dpo_is_dpo_rw_on_a_pair_with_a_one_hot_target(drawn):
    log_ratio = torch.stack([drawn.policy_chosen - drawn.ref_chosen, drawn.policy_rejected - drawn.ref_rejected], -1)
    one_hot = torch.tensor([0.0, -INF], dtype=torch.float64).expand_as(log_ratio)
    listwise = dpo_rw_loss(log_ratio, one_hot, beta_pi=drawn.beta, beta_r=1.0)
    assert_close(dpo_loss(*drawn.logps, beta=drawn.beta).losses, listwise)


@given(drawn=strategies.pairs(), eps=st.floats(1e-6, 0.499))
def test_label_smoothed_pair_losses_are_list_losses_with_that_target(drawn, eps):
    log_ratio = torch.stack([drawn.policy_chosen - drawn.ref_chosen, drawn.policy_rejected - drawn.ref_rejected], -1)
    rewards = torch.tensor([math.log1p(-eps), math.log(eps)], dtype=torch.float64).expand_as(log_ratio)
    dpo = dpo_loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps).losses
    assert_close(dpo, dpo_rw_loss(log_ratio, rewards, beta_pi=drawn.beta, beta_r=1.0))
    exo = exo_pref_loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps).losses
    assert_close(exo, exo_rw_loss(log_ratio, rewards, beta_pi=drawn.beta, beta_r=1.0))


@given(drawn=strategies.pairs(), data=st.data())
def test_exo_pref_with_true_label_probabilities_is_exo_rw(drawn, data):
    rewards = data.draw(strategies.tensors((drawn.policy_chosen.shape[0], 2), -5.0, 5.0))
    log_ratio = torch.stack([drawn.policy_chosen - drawn.ref_chosen, drawn.policy_rejected - drawn.ref_rejected], -1)
    wrong = torch.sigmoid((rewards[:, 1] - rewards[:, 0]) / 0.8)
    pairwise = exo_pref_loss(*drawn.logps, beta=drawn.beta, label_smoothing=wrong).losses
    assert_close(pairwise, exo_rw_loss(log_ratio, rewards, beta_pi=drawn.beta, beta_r=0.8))


# Gradients


def closed_form(drawn: Candidates) -> dict[str, tuple[Tensor, Tensor]]:
    """Per-sample gradients of either loss with respect to log ratios and rewards, written out."""
    f, scaled_rewards = drawn.beta_pi * drawn.log_ratio, drawn.rewards / drawn.beta_r
    p_f = f.masked_fill(~drawn.mask, -INF).softmax(-1)
    p_r = scaled_rewards.masked_fill(~drawn.mask, -INF).softmax(-1)
    h = f - scaled_rewards
    exo = p_f * (h - (p_f * h).sum(-1, keepdim=True))
    dpo = p_f - p_r
    dpo_to_target = -p_r * (f - (p_r * f).sum(-1, keepdim=True))
    return {
        "exo_rw": (drawn.beta_pi * exo, (p_r - p_f) / drawn.beta_r),
        "dpo_rw": (drawn.beta_pi * dpo, dpo_to_target / drawn.beta_r),
    }


@both_losses
@given(drawn=strategies.candidates())
def test_gradients_are_the_closed_form(loss, oracle, device, drawn):
    drawn = drawn.to(device)
    _, *gradients = value_and_gradients(loss, drawn.log_ratio, drawn.rewards, mask=drawn.mask, **drawn.temperatures)
    for gradient, expected in zip(gradients, closed_form(drawn)[oracle.__name__], strict=True):
        assert_close(gradient, expected, scale=10.0)


@both_losses
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_and_gradgradcheck(loss, oracle, masked):
    log_ratio = torch.tensor([[0.3, -1.2, 0.5], [2.0, 0.1, -0.4]], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[1.0, 0.2, -0.7], [0.0, 0.6, 0.3]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, True, True]]) if masked else None

    def call(log_ratio, rewards):
        return loss(log_ratio, rewards, beta_pi=0.7, beta_r=1.3, mask=mask)

    assert torch.autograd.gradcheck(call, (log_ratio, rewards))
    assert torch.autograd.gradgradcheck(call, (log_ratio, rewards))


# Infinities and extremes


@pytest.mark.parametrize(
    ("loss", "infinite"), [(exo_rw_loss, "log_ratio"), (dpo_rw_loss, "rewards")], ids=["exo_rw", "dpo_rw"]
)
def test_probability_zero_is_the_limit_of_small_probabilities(loss, infinite):
    """Value and every gradient at -inf, against -800: there the probability has underflowed, the formula has not."""
    others = {"log_ratio": row(0.3, -0.4, 1.0), "rewards": row(-0.2, 0.9, 0.4)}
    near, at = ({**others, infinite: others[infinite].clone()} for _ in range(2))
    near[infinite][0, 1], at[infinite][0, 1] = -800.0, -INF
    for limit, there in zip(
        value_and_gradients(loss, **near, beta_pi=1.0, beta_r=1.0),
        value_and_gradients(loss, **at, beta_pi=1.0, beta_r=1.0),
        strict=True,
    ):
        assert there.isfinite().all()
        assert_close(there, limit)
    value, *_ = value_and_gradients(loss, **at, beta_pi=1.0, beta_r=1.0)
    assert value.item() > 0.01


@both_losses
def test_second_derivative_at_probability_zero_is_the_limit(loss, oracle):
    infinite = "log_ratio" if loss is exo_rw_loss else "rewards"

    def second(entry: float) -> Tensor:
        arguments = {"log_ratio": row(0.3, -0.4, 1.0), "rewards": row(-0.2, 0.9, 0.4)}
        arguments[infinite][0, 1] = entry
        free = [value.requires_grad_() for value in arguments.values()]
        value = loss(**arguments, beta_pi=0.7, beta_r=1.0).sum()
        gradients = torch.autograd.grad(value, free, create_graph=True)
        weights = row(0.3, 1.1, -0.8)
        return torch.cat(torch.autograd.grad(sum((g * weights).sum() for g in gradients), free))

    assert second(-INF).isfinite().all()
    assert_close(second(-INF), second(-1e4))


def test_dpo_rw_where_the_policy_excludes_a_wanted_candidate():
    """The value is infinite; the gradient to the log ratios stays p_f - p_r, its limit."""
    rewards = row(0.0, math.log(3.0))
    value, gradient, _ = value_and_gradients(dpo_rw_loss, row(0.0, -INF), rewards, beta_pi=2.0, beta_r=1.0)
    assert value.item() == INF
    assert_close(gradient, 2.0 * row(1.0 - 0.25, 0.0 - 0.75))
    near, near_gradient, _ = value_and_gradients(dpo_rw_loss, row(0.0, -1e4), rewards, beta_pi=2.0, beta_r=1.0)
    assert_close(near, [0.75 * 2e4])
    assert_close(near_gradient, gradient)


@pytest.mark.parametrize("log_ratio", [0.0, -30.0, -800.0], ids=["likely", "unlikely", "underflowing"])
def test_exo_rw_where_the_policy_allows_a_forbidden_candidate(log_ratio):
    """A true infinity, whose gradient is not finite, and in particular not zero."""
    value, gradient, _ = value_and_gradients(exo_rw_loss, row(0.0, log_ratio), row(0.0, -INF), beta_pi=1.0, beta_r=1.0)
    assert value.item() == INF
    assert not gradient.isfinite().all()


def test_a_candidate_excluded_by_both_counts_nothing():
    log_ratio, rewards = row(0.5, -INF, -1.0), row(0.1, -INF, 0.7)
    for loss in (exo_rw_loss, dpo_rw_loss):
        value, *gradients = value_and_gradients(loss, log_ratio, rewards, beta_pi=1.5, beta_r=0.5)
        kept, *kept_gradients = value_and_gradients(loss, log_ratio[:, ::2], rewards[:, ::2], beta_pi=1.5, beta_r=0.5)
        assert_close(value, kept)
        for gradient, expected in zip(gradients, kept_gradients, strict=True):
            assert gradient[0, 1].item() == 0.0
            assert_close(gradient[:, ::2], expected)


@both_losses
def test_only_the_infinite_row_is_infinite(loss, oracle):
    log_ratio = torch.tensor([[0.0, -INF, 1.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    rewards = torch.tensor([[-INF, 0.0, 1.0], [2.0, 1.0, 0.0]], dtype=torch.float64)
    value, gradient, _ = value_and_gradients(loss, log_ratio, rewards, beta_pi=1.0, beta_r=1.0)
    assert value[0].item() == INF
    assert_close(value[1:], by_oracle(oracle, log_ratio[1:], rewards[1:], beta_pi=1.0, beta_r=1.0))
    assert gradient[1].isfinite().all()


@both_losses
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_temperatures_that_blow_inputs_up(loss, oracle, dtype):
    """Scaled by 1e8 or 1e-8, inputs of the half types' largest size keep their values."""
    log_ratio, rewards = row(6e4, -6e4, 5e4, dtype=dtype), row(-3e4, 6e4, 5.9e4, dtype=dtype)
    for temperatures in ({"beta_pi": 1e-8, "beta_r": 1e8}, {"beta_pi": 1e-3, "beta_r": 1e-8}):
        value, *gradients = value_and_gradients(loss, log_ratio, rewards, **temperatures)
        assert_close(value, by_oracle(oracle, log_ratio, rewards, **temperatures), scale=1e-3)
        if dtype != torch.float16:  # which cannot hold a gradient divided by 1e-8
            assert all(gradient.isfinite().all() for gradient in gradients)


@both_losses
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_scaling_that_overflows_leaves_no_nan(loss, oracle, dtype):
    """Scaled values beyond the dtype: the softmax is one-hot, on the same candidate for both."""
    huge = torch.finfo(torch.promote_types(dtype, torch.float32)).max ** 0.95
    log_ratio, rewards = row(1e4, 2e4, 0.0, dtype=dtype), row(-1e4, 1e4, 0.0, dtype=dtype)
    value, *gradients = value_and_gradients(loss, log_ratio, rewards, beta_pi=huge, beta_r=1 / huge)
    assert value.item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients)


# Dtypes


@both_losses
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@given(drawn=strategies.candidates())
def test_lower_precision_against_float64_of_the_same_inputs(loss, oracle, device, dtype, drawn):
    drawn = drawn.to(dtype).to(device)
    value = loss(drawn.log_ratio, drawn.rewards, mask=drawn.mask, **drawn.temperatures)
    assert value.dtype == dtype
    assert value.device.type == device.type
    wide = drawn.to(torch.float64)
    expected = loss(wide.log_ratio, wide.rewards, mask=wide.mask, **wide.temperatures)
    assert_close(value, expected, scale=1.0 if dtype == torch.float64 else drawn.scale)


@pytest.mark.parametrize(
    ("log_ratio", "rewards", "expected"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
@both_losses
def test_mixed_dtypes_promote(loss, oracle, log_ratio, rewards, expected):
    arguments = row(0.1, 0.7, dtype=log_ratio), row(1.0, 0.3, dtype=rewards)
    value = loss(*arguments, beta_pi=1.0, beta_r=1.0)
    assert value.dtype == expected
    assert_close(value, by_oracle(oracle, *arguments, beta_pi=1.0, beta_r=1.0))


# Masks


@both_losses
@pytest.mark.parametrize("filling", [math.nan, INF, -INF, 1e300])
@given(drawn=strategies.candidates(min_k=2))
def test_what_a_masked_entry_holds_changes_nothing(loss, oracle, filling, drawn):
    value, *gradients = value_and_gradients(loss, drawn.log_ratio, drawn.rewards, mask=drawn.mask, **drawn.temperatures)
    filled = (drawn.log_ratio.masked_fill(~drawn.mask, filling), drawn.rewards.masked_fill(~drawn.mask, filling))
    filled_value, *filled_gradients = value_and_gradients(loss, *filled, mask=drawn.mask, **drawn.temperatures)
    assert torch.equal(filled_value, value)
    for gradient, filled_gradient in zip(gradients, filled_gradients, strict=True):
        assert torch.equal(filled_gradient, gradient)
        assert (filled_gradient[~drawn.mask] == 0).all()


def test_a_masked_entry_gets_zero_gradient_even_where_the_loss_is_infinite():
    mask = torch.tensor([[True, True, False]])
    _, exo, _ = value_and_gradients(
        exo_rw_loss, row(0.0, 0.0, math.nan), row(0.0, -INF, math.nan), beta_pi=1.0, beta_r=1.0, mask=mask
    )
    _, *dpo = value_and_gradients(
        dpo_rw_loss, row(0.0, -INF, math.nan), row(0.0, 0.0, math.nan), beta_pi=1.0, beta_r=1.0, mask=mask
    )
    assert [gradient[0, 2].item() for gradient in (exo, *dpo)] == [0.0, 0.0, 0.0]


@both_losses
@given(drawn=strategies.candidates(min_k=2), data=st.data())
def test_masking_equals_leaving_out(loss, oracle, drawn, data):
    kept = data.draw(st.lists(st.integers(0, drawn.mask.shape[1] - 1), min_size=2, unique=True))
    mask = torch.zeros_like(drawn.mask)
    mask[:, kept] = True
    value, *gradients = value_and_gradients(loss, drawn.log_ratio, drawn.rewards, mask=mask, **drawn.temperatures)
    left, *left_gradients = value_and_gradients(
        loss, drawn.log_ratio[:, kept], drawn.rewards[:, kept], **drawn.temperatures
    )
    assert_close(value, left)
    for gradient, expected in zip(gradients, left_gradients, strict=True):
        assert_close(gradient[:, kept], expected, scale=10.0)


@both_losses
def test_one_unmasked_candidate_gives_exactly_zero(loss, oracle):
    log_ratio, rewards = row(3.7, -1.0, 1e4), row(0.3, 55.0, -1e4)
    for kept in range(3):
        mask = torch.zeros(1, 3, dtype=torch.bool)
        mask[0, kept] = True
        value, *gradients = value_and_gradients(loss, log_ratio, rewards, beta_pi=0.3, beta_r=0.7, mask=mask)
        assert value.item() == 0.0
        assert all((gradient == 0).all() for gradient in gradients)


@both_losses
def test_an_empty_batch_gives_an_empty_loss(loss, oracle):
    empty = torch.zeros(0, 3, requires_grad=True)
    value = loss(empty, empty, beta_pi=1.0, beta_r=1.0)
    assert value.shape == (0,)
    value.sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 3)
