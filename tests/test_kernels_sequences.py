"""sequence_logps and candidate_log_ratios: loops, masks, infinities, dtypes, gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.kernels import candidate_log_ratios, selective_logps, sequence_logps
from exo_toy.losses import exo_rw_loss
from tests import kernel_oracles as oracles
from tests import oracles as loss_oracles
from tests import strategies
from tests.sequence_strategies import generators, normal
from tests.tolerances import TOLERANCES, assert_close

INF, NAN = math.inf, math.nan
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@st.composite
def completions(draw: st.DrawFn, *, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of two policies [B·k, T], and a mask with holes, empty rows among them."""
    batch, n_tokens = draw(strategies.sizes(2, high=6))
    generator = draw(generators())
    shape = (batch * k, n_tokens)
    policy, ref = (-3 * normal(shape, generator).abs() for _ in range(2))
    kept = torch.rand((shape[0], 1), generator=generator)
    return policy, ref, torch.rand(shape, generator=generator) < kept


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def test_the_oracles_by_hand():
    mask = [[True, True, False], [False, True, True]]
    assert oracles.sequence_logps([[-1.0, -2.0, NAN], [4.0, -8.0, -INF]], mask) == [-3.0, -INF]
    policy, ref = [[-1.0, -2.0, NAN], [4.0, -8.0, -16.0]], [[-0.5, -0.25, 1.0], [NAN, -1.0, -2.0]]
    assert oracles.candidate_log_ratios(policy, ref, mask, 2) == [[-2.25, -21.0]]
    assert oracles.candidate_log_ratios(policy, ref, mask, 1) == [[-2.25], [-21.0]]


# Values


@given(drawn=completions())
def test_sequences_agree_with_the_oracle(device, drawn):
    policy, _, mask = (x.to(device) for x in drawn)
    assert_close(sequence_logps(policy, mask), oracles.sequence_logps(policy.tolist(), mask.tolist()), scale=20)


@given(data=st.data(), k=st.integers(1, 4))
def test_ratios_agree_with_the_oracle(device, data, k):
    policy, ref, mask = (x.to(device) for x in data.draw(completions(k=k)))
    ratios = candidate_log_ratios(policy, ref, mask, k)
    assert ratios.shape == (len(mask) // k, k)
    expected = oracles.candidate_log_ratios(policy.tolist(), ref.tolist(), mask.tolist(), k)
    assert_close(ratios, torch.tensor(expected, dtype=torch.float64).view(-1, k), scale=20)
    difference = sequence_logps(policy, mask) - sequence_logps(ref, mask)
    assert_close(ratios.flatten(), difference, scale=20)


@DTYPES
@given(data=st.data())
def test_lower_precision_is_rounded_once(dtype, data):
    """The sum of the inputs as they are, to the last bit of float32."""
    policy, ref, mask = data.draw(completions(k=2))
    policy, ref = policy.to(dtype), ref.to(dtype)
    total, ratios = sequence_logps(policy, mask), candidate_log_ratios(policy, ref, mask, 2)
    assert total.dtype == ratios.dtype == at_least_float32(dtype)
    expected = oracles.sequence_logps(policy.tolist(), mask.tolist())
    expected_ratios = oracles.candidate_log_ratios(policy.tolist(), ref.tolist(), mask.tolist(), 2)
    rounding = torch.finfo(total.dtype).eps / 2
    for actual, wanted in [(total, expected), (ratios, expected_ratios)]:
        wanted = torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(actual.double(), wanted, rtol=1.01 * rounding, atol=1e-13)


def test_long_completions_in_half_precision():
    """In bfloat16 a sum of -1 stands still at -256, in float16 at -2048."""
    for dtype in (torch.bfloat16, torch.float16):
        token_logps = torch.full((2, 5000), -1.0, dtype=dtype)
        assert sequence_logps(token_logps, ones(2, 5000)).tolist() == [-5000.0, -5000.0]
    # In float32 half a unit of a large partial sum is lost each time.
    small = torch.tensor([[-(2.0**24), *[-1.0] * 4]])
    assert sequence_logps(small, ones(1, 5)).item() == -(2.0**24) - 4


def test_ratios_of_large_log_probabilities():
    """The difference of the sums is exact, though float32 knows neither sum to more than 1/16."""
    policy, ref = torch.full((1, 1000), -1000.0), torch.full((1, 1000), -1000.0 - 2**-13)
    assert candidate_log_ratios(policy, ref, ones(1, 1000), 1).item() == 1000 * 2**-13


def test_candidates_of_a_prompt_are_next_to_one_another():
    policy = torch.arange(6.0).unsqueeze(1)
    ratios = candidate_log_ratios(policy, torch.zeros(6, 1), ones(6, 1), 3)
    assert ratios.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


# Masks and infinities


@pytest.mark.parametrize("filling", [NAN, INF, -INF, 1e300])
@given(data=st.data())
def test_what_a_masked_entry_holds_changes_nothing(filling, data):
    policy, ref, mask = data.draw(completions(k=2))
    arguments = [(policy, ref), tuple(x.masked_fill(~mask, filling) for x in (policy, ref))]
    results = []
    for inputs in arguments:
        leaves = [x.clone().requires_grad_() for x in inputs]
        total = sequence_logps(leaves[0], mask)
        ratios = candidate_log_ratios(*leaves, mask, 2)
        gradients = torch.autograd.grad(3 * total.sum() + ratios.sum(), leaves)
        results.append([total, ratios, *gradients])
        assert torch.equal(gradients[0], 4.0 * mask)
        assert torch.equal(gradients[1], -1.0 * mask)
    for plain, filled in zip(*results, strict=True):
        assert torch.equal(plain, filled)


def test_impossible_tokens():
    token_logps = torch.tensor([[-1.0, -INF], [-1.0, -2.0]], requires_grad=True)
    total = sequence_logps(token_logps, ones(2, 2))
    assert total.tolist() == [-INF, -3.0]
    total.sum().backward()
    assert torch.equal(token_logps.grad, torch.ones(2, 2))
    ref = torch.tensor([[-2.0, -3.0], [-1.0, -INF]])
    assert candidate_log_ratios(token_logps.detach(), ref, ones(2, 2), 2).tolist() == [[-INF, INF]]
    neither = candidate_log_ratios(token_logps.detach(), token_logps.detach(), ones(2, 2), 2)
    assert neither.isnan().tolist() == [[True, False]]


def test_nothing_unmasked_is_zero():
    assert sequence_logps(torch.full((3, 4), NAN), ~ones(3, 4)).tolist() == [0.0, 0.0, 0.0]
    assert sequence_logps(torch.zeros(3, 0), ones(3, 0)).tolist() == [0.0, 0.0, 0.0]
    assert sequence_logps(torch.zeros(0, 4), ones(0, 4)).shape == (0,)
    assert candidate_log_ratios(torch.zeros(0, 4), torch.zeros(0, 4), ones(0, 4), 3).shape == (0, 3)


def test_no_argument_is_changed_and_strides_do_not_matter():
    policy, mask = normal((4, 3), torch.Generator().manual_seed(0)), ones(4, 3)
    strided, strided_mask = policy.t().contiguous().t(), mask.t().contiguous().t()
    assert_close(sequence_logps(strided, strided_mask), sequence_logps(policy, mask))
    assert_close(
        candidate_log_ratios(strided, -strided, strided_mask, 2), candidate_log_ratios(policy, -policy, mask, 2)
    )
    assert policy._version == mask._version == 0


@pytest.mark.parametrize(
    ("policy", "ref", "expected"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_mixed_dtypes_promote(policy, ref, expected):
    token_logps = torch.tensor([[-1.5], [-0.25]])
    ratios = candidate_log_ratios(token_logps.to(policy), 2 * token_logps.to(ref), ones(2, 1), 2)
    assert ratios.dtype == expected
    assert ratios.tolist() == [[1.5, 0.25]]


# Gradients and the losses on top


def test_gradcheck():
    policy, ref = (normal((6, 4), torch.Generator().manual_seed(seed)).requires_grad_() for seed in (0, 1))
    mask = torch.rand((6, 4), generator=torch.Generator().manual_seed(2)) < 0.7
    assert torch.autograd.gradcheck(lambda x: sequence_logps(x, mask), policy)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda p, r: candidate_log_ratios(p, r, mask, 3).square(), (policy, ref))


@given(data=st.data())
def test_a_loss_on_top(data):
    """From logits to EXO-rw, against the same by loops."""
    policy, ref, mask = data.draw(completions(k=3))
    rewards = data.draw(strategies.tensors((len(mask) // 3, 3), -5.0, 5.0))
    loss = exo_rw_loss(candidate_log_ratios(policy, ref, mask, 3), rewards, beta_pi=0.5, beta_r=2.0)
    ratios = oracles.candidate_log_ratios(policy.tolist(), ref.tolist(), mask.tolist(), 3)
    expected = [
        loss_oracles.exo_rw(row, values, 0.5, 2.0) for row, values in zip(ratios, rewards.tolist(), strict=True)
    ]
    assert_close(loss, expected, scale=20)


def test_ignored_labels_and_masked_tokens_agree():
    """Labels that are ignored where the mask is False: the log-probability there is 0 in any case."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = normal((4, 6, 9), generator), torch.randint(9, (4, 6), generator=generator)
    mask = torch.rand((4, 6), generator=generator) < 0.6
    masked = sequence_logps(selective_logps(logits, labels), mask)
    ignored = sequence_logps(selective_logps(logits, labels.masked_fill(~mask, -100)), ones(4, 6))
    assert torch.equal(masked, ignored)


# torch's own: its forward-mode rules are compiled by the deprecated torch.jit on first use.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_under_transforms():
    policy, ref = (normal((3, 4, 5), torch.Generator().manual_seed(seed)) for seed in (0, 1))
    mask = torch.rand((3, 4, 5), generator=torch.Generator().manual_seed(2)) < 0.7
    mapped = torch.func.vmap(lambda p, r, m: candidate_log_ratios(p, r, m, 2))(policy, ref, mask)
    looped = [candidate_log_ratios(p, r, m, 2) for p, r, m in zip(policy, ref, mask, strict=True)]
    assert torch.equal(mapped, torch.stack(looped))
    gradient = torch.func.grad(lambda p: sequence_logps(p, mask[0]).sum())(policy[0])
    assert torch.equal(gradient, mask[0].double())
    _, derivative = torch.func.jvp(lambda p: sequence_logps(p, mask[0]), (policy[0],), (ref[0],))
    assert_close(derivative, sequence_logps(ref[0], mask[0]))
