"""selective_logps: values and gradients against loops, infinities, dtypes, memory."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.kernels import linear_logps, selective_logps
from exo_toy.kernels.tiles import Tile
from tests import kernel_oracles as oracles
from tests import kernel_strategies as kernels
from tests.kernel_strategies import LABEL_TYPES, LAYOUTS, peak, profiled, strided, use_tiles
from tests.sequence_strategies import generators, normal, with_holes
from tests.tolerances import assert_close

INF, NAN = math.inf, math.nan


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of ``selective_logps``, and the weights of its results."""

    logits: Tensor
    labels: Tensor
    weights: Tensor
    temperature: float = 1.0
    ignore_index: int = -100
    tile: Tile = kernels.SMALL

    @property
    def options(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "ignore_index": self.ignore_index}

    def to(self, target: torch.device | torch.dtype) -> "Case":
        labels = self.labels if isinstance(target, torch.dtype) else self.labels.to(target)
        return dataclasses.replace(self, logits=self.logits.to(target), labels=labels, weights=self.weights.to(target))

    def run(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities and the gradient of their weighted sum."""
        logits = self.logits.detach().requires_grad_()
        with use_tiles(self.tile):
            logps = selective_logps(logits, self.labels, **self.options)
        (gradient,) = torch.autograd.grad(logps, logits, self.weights.to(logps.dtype))
        return logps.detach(), gradient

    def expected(self) -> tuple[Tensor, Tensor]:
        """The same by loops, in float64."""
        rows = self.logits.double().reshape(-1, self.logits.shape[-1]).tolist()
        arguments = rows, self.labels.flatten().tolist(), self.temperature, self.ignore_index
        gradient = oracles.selective_gradient(*arguments, self.weights.double().flatten().tolist())
        logps, gradient = (
            torch.tensor(x, dtype=torch.float64) for x in (oracles.selective_logps(*arguments), gradient)
        )
        return logps.view(self.labels.shape), gradient.view(self.logits.shape)

    @property
    def scale(self) -> float:
        """The largest logit."""
        finite = self.logits.double().nan_to_num(0.0, 0.0, 0.0).abs()
        return max(1.0, finite.max().item() / self.temperature) * max(1.0, 1 / self.temperature)


@st.composite
def cases(draw: st.DrawFn, *, size: float = 3.0, holes: bool = False) -> Case:
    """Float64 on the CPU, sizes distinct; ignored rows hold NaN. With ``holes``, logits of -inf."""
    shape = draw(kernels.leading_shapes())
    n_vocab = draw(st.integers(1, 23).filter(lambda n: n != torch.Size(shape).numel()))
    generator = draw(generators())
    ignore_index = draw(st.sampled_from([-100, -1, 0, n_vocab - 1, n_vocab + 3]))
    ignored = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    labels = torch.randint(n_vocab, shape, generator=generator).masked_fill(ignored, ignore_index)
    logits = size * normal((*shape, n_vocab), generator)
    if holes:
        logits = with_holes(logits, generator)
    logits = logits.masked_fill((labels == ignore_index).unsqueeze(-1), NAN)
    return Case(
        strided(logits, draw(st.sampled_from(LAYOUTS))),
        strided(labels.to(draw(st.sampled_from(LABEL_TYPES))), draw(st.sampled_from(LAYOUTS))),
        normal(shape, generator).masked_fill(torch.rand(shape, generator=generator) < 0.3, 0.0),
        draw(st.sampled_from([1.0, 0.25, 2.5])),
        ignore_index,
        draw(kernels.sizes_of_tiles()),
    )


def random_case(n_rows: int, n_vocab: int, dtype: torch.dtype = torch.float64, **changed: Any) -> Case:
    generator = torch.Generator().manual_seed(0)
    logits, labels = (
        normal((n_rows, n_vocab), generator).to(dtype),
        torch.randint(n_vocab, (n_rows,), generator=generator),
    )
    return Case(logits, labels, normal((n_rows,), generator), **changed)


# Against the oracle


@given(case=cases())
def test_agrees_with_the_oracle(device, case):
    """Any shape, strides, integer type, tile, temperature and ignored label; what ignored rows hold is NaN."""
    case = case.to(device)
    for actual, expected in zip(case.run(), case.expected(), strict=True):
        assert actual.shape == expected.shape
        assert_close(actual, expected, scale=case.scale)


@given(case=cases(size=4e3))
def test_large_logits(case):
    for actual, expected in zip(case.run(), case.expected(), strict=True):
        assert_close(actual, expected, scale=case.scale)


@given(case=cases(holes=True))
def test_forbidden_tokens_are_the_limit_of_unlikely_ones(case):
    """-inf against -8000, where probabilities have underflowed; some labels, and some tiles, are forbidden."""
    near = dataclasses.replace(case, logits=case.logits.masked_fill(case.logits == -INF, -8000.0))
    (logps, gradient), (near_logps, near_gradient) = case.run(), near.run()
    assert gradient.isfinite().all()
    assert_close(gradient, near_gradient)
    impossible = near_logps < -2000
    assert torch.equal(logps == -INF, impossible)
    assert torch.equal(logps[~impossible], near_logps[~impossible])


@given(case=cases(holes=True), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_lower_precision_against_float64_of_the_same_inputs(device, case, dtype):
    """Values within 2e-6 of the largest logit; the gradient is rounded once more, to the dtype of the logits."""
    case = case.to(dtype).to(device)
    (logps, gradient), (expected_logps, expected_gradient) = case.run(), case.expected()
    assert (logps.dtype, gradient.dtype) == (torch.float32, dtype)
    tolerance = 2e-6 * case.scale
    torch.testing.assert_close(logps.double(), expected_logps, rtol=0.0, atol=tolerance)
    largest = max(1.0, case.weights.abs().max().item()) / case.temperature
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=rounding, atol=(tolerance + torch.finfo(dtype).tiny) * largest
    )


def test_agrees_with_linear_logps():
    head = kernels.random_head(6, n_vocab=11, width=3, temperature=0.7)
    logps = selective_logps(head.hidden @ head.weight.T + head.bias, head.labels, temperature=0.7)
    (expected,) = head.outputs("recompute", head.inputs(), entropy=False)
    assert_close(logps, expected)
    # Logits in float32, as a model that upcasts its head returns them, of hidden states and weights in bfloat16.
    half = head.to(torch.bfloat16)
    logits = half.hidden.float() @ half.weight.float().T
    expected = linear_logps(half.hidden, half.weight, half.labels)
    assert_close(selective_logps(logits, half.labels), expected.double())


# Defects of others


@pytest.mark.parametrize(("dtype", "naive_error"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)], ids=str)
def test_sums_over_a_completion_in_half_precision(dtype, naive_error):
    """200 tokens of 32000: log-softmax and sum in the model's dtype are off by hundredths to tenths of a nat."""
    generator = torch.Generator().manual_seed(0)
    logits = (2 * normal((200, 32000), generator)).to(dtype)
    labels = torch.randint(32000, (200,), generator=generator)
    exact = logits.double().log_softmax(-1).gather(1, labels.unsqueeze(1)).sum().item()
    naive = logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).sum()
    assert abs(naive.item() - exact) > naive_error  # the trap is there
    assert abs(selective_logps(logits, labels).double().sum().item() - exact) < 1e-3


def test_even_odds_in_half_precision():
    """log(1/32000) = -10.3735 is between two bfloat16 numbers, -10.375 and -10.3125: 200 of them are 0.3 off."""
    labels = torch.arange(200)
    logps = selective_logps(torch.zeros(200, 32000, dtype=torch.bfloat16), labels)
    assert_close(logps, torch.full((200,), -math.log(32000), dtype=torch.float64))
    rounded = torch.zeros(200, 32000, dtype=torch.bfloat16).log_softmax(-1)[:, 0].double().sum().item()
    assert abs(rounded + 200 * math.log(32000)) == pytest.approx(200 * (10.375 - math.log(32000)))


@given(case=cases(holes=True))
def test_arguments_are_not_written_to(case):
    originals = case.logits.clone(), case.labels.clone()
    case.run()
    with torch.no_grad():
        selective_logps(case.logits, case.labels, **case.options)
    for x, original in zip((case.logits, case.labels), originals, strict=True):
        torch.testing.assert_close(x, original, rtol=0.0, atol=0.0, equal_nan=True)
        assert x._version == 0


# Small and empty


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_no_rows(shape):
    logps, gradient = Case(torch.zeros(*shape, 5), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)).run()
    assert logps.shape == shape
    assert gradient.shape == (*shape, 5)


def test_all_rows_ignored():
    case = Case(torch.full((4, 5), NAN), torch.full((4,), -100), torch.full((4,), INF))
    logps, gradient = case.run()
    assert torch.equal(logps, torch.zeros(4))
    assert torch.equal(gradient, torch.zeros(4, 5))


def test_one_token_is_certain():
    logps, gradient = random_case(3, 1).run()
    assert (logps == 0).all() and (gradient == 0).all()


# To the last bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_batch(device, dtype):
    """At the tiles that users get."""
    case = random_case(40, 2500, dtype, tile=Tile(512, 512, 1024)).to(device)
    logps, gradient = case.run()
    for n in (1, 2, 3, 7, 33):
        rows = dataclasses.replace(case, logits=case.logits[:n], labels=case.labels[:n], weights=case.weights[:n])
        for actual, expected in zip(rows.run(), (logps, gradient), strict=True):
            assert torch.equal(actual, expected[:n])
    ignored = dataclasses.replace(case, labels=case.labels.clone())
    ignored.labels[::2] = -100
    for actual, expected in zip(ignored.run(), (logps, gradient), strict=True):
        assert torch.equal(actual[1::2], expected[1::2])
        assert (actual[::2] == 0).all()


@given(case=cases(holes=True))
def test_a_gradient_changes_no_value(case):
    with torch.no_grad(), use_tiles(case.tile):
        values = selective_logps(case.logits, case.labels, **case.options)
    assert torch.equal(values, case.run()[0])


# Memory

N_ROWS, N_VOCAB = 32, 4000
BYTES = {torch.float32: 4, torch.bfloat16: 2}


def selected_logits(view: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits as trainers hold them, with labels."""
    generator = torch.Generator().manual_seed(0)
    logits = normal((4, N_ROWS // 4 + 1, N_VOCAB), generator).to(dtype)
    views = {"all tokens": logits[:, 1:].clone(), "next tokens": logits[:, :-1], "a completion": logits[:, 1:]}
    return views[view], torch.randint(N_VOCAB, (4, N_ROWS // 4), generator=generator)


@pytest.mark.parametrize("dtype", BYTES, ids=str)
@pytest.mark.parametrize("view", ["all tokens", "next tokens", "a completion"])
def test_memory(view, dtype):
    """The graph keeps no copy of the logits, nor of a slice of them; both passes hold one tile, and the gradient."""
    logits, labels = selected_logits(view, dtype)
    logits.requires_grad_()
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with profiled() as record, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with use_tiles(Tile(8, 8, 128)):
            logps = selective_logps(logits, labels)
    kept.pop(logits.untyped_storage().data_ptr(), None)
    kept.pop(labels.untyped_storage().data_ptr(), None)
    numbers = N_ROWS * 8
    working = 6 * 8 * 128 * 4 + 16 * numbers
    assert sum(kept.values()) <= 4 * numbers
    assert peak(record) <= working
    gradient = logits.numel() * BYTES[dtype]
    with profiled() as record:
        torch.autograd.grad(logps.sum(), logits)
    assert gradient <= peak(record) <= gradient + working
    with profiled() as record:
        logits.detach().float().log_softmax(-1)
    assert peak(record) >= logits.numel() * 4  # the measure sees what is to be avoided
