"""linear_logps: laws, results that are the same to the last bit, and what is computed and kept."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import profile

from exo_toy.kernels import linear_logps, tiles
from exo_toy.kernels.tiles import Tile
from tests import kernel_strategies as kernels
from tests.kernel_strategies import MODES, Head, heads, peak, profiled, random_head
from tests.sequence_strategies import generators
from tests.tolerances import TOLERANCES, assert_close

ATOL = TOLERANCES[torch.float64].atol
all_modes = pytest.mark.parametrize("mode", MODES)
modes, tiled_modes = st.sampled_from(MODES), st.sampled_from(MODES[1:])


def outputs(head: Head, mode: str) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies."""
    return head.outputs(mode, head.inputs(*(["hidden"] if mode == "frozen" else ["hidden", "weight"])), entropy=True)


def all_labels(head: Head) -> Head:
    """Its first row with every token for a label."""
    n_vocab = len(head.weight)
    hidden = head.hidden.reshape(-1, head.weight.shape[1])[:1].nan_to_num(0.5).expand(n_vocab, -1)
    return dataclasses.replace(head, hidden=hidden, labels=torch.arange(n_vocab), ignore_index=-100)


# Laws


@given(mode=modes, head=heads())
def test_probabilities_sum_to_one(mode, head):
    logps, entropies = outputs(all_labels(head), mode)
    assert_close(logps.exp().sum(), 1.0, scale=head.scale)
    assert_close(-(logps.exp() * logps).sum(), entropies[0], scale=head.scale)


@given(mode=modes, head=heads())
def test_bounds(mode, head):
    logps, entropies = outputs(head, mode)
    tolerance = ATOL * head.scale
    assert (logps <= tolerance).all()
    assert (entropies >= -tolerance).all()
    assert (entropies <= math.log(len(head.weight)) + tolerance).all()


@given(mode=modes, head=heads(plain=True), generator=generators(), shift=st.floats(-50, 50))
def test_a_constant_added_to_the_bias_changes_nothing(mode, head, generator, shift):
    weights = kernels.weights_like(head, generator)
    bias = torch.zeros(len(head.weight), dtype=torch.float64) if head.bias is None else head.bias
    results = [dataclasses.replace(head, bias=bias + constant).run(mode, weights) for constant in (0.0, shift)]
    assert_close(results[1].logps, results[0].logps, scale=head.scale + abs(shift))
    assert_close(results[1].entropies, results[0].entropies, scale=head.scale + abs(shift))
    scale = (head.scale + abs(shift)) * max(1.0, *(w.abs().amax().item() for w in weights if w.numel()))
    for name, gradient in results[1].gradients.items():
        assert_close(gradient, results[0].gradients[name], scale=scale)
    if mode != "frozen":
        assert_close(results[0].gradients["bias"].sum(), 0.0, scale=scale)


@given(mode=modes, head=heads(), generator=generators())
def test_order_of_the_vocabulary_does_not_matter(mode, head, generator):
    order = torch.randperm(len(head.weight), generator=generator)
    labels = torch.where(head.counts, order.argsort()[head.labels.long().clamp(0, len(order) - 1)], -100)
    permuted = dataclasses.replace(
        head,
        weight=head.weight[order],
        bias=None if head.bias is None else head.bias[order],
        labels=labels,
        ignore_index=-100,
    )
    weights = kernels.weights_like(head, generator)
    result, expected = permuted.run(mode, weights), head.run(mode, weights)
    scale = head.scale * max(1.0, *(w.abs().amax().item() for w in weights if w.numel()))
    assert_close(result.logps, expected.logps, scale=scale)
    assert_close(result.entropies, expected.entropies, scale=scale)
    for name, gradient in result.gradients.items():
        wanted = expected.gradients[name]
        assert_close(gradient, wanted if name == "hidden" else wanted[order], scale=scale)


@given(mode=modes, head=heads())
def test_a_bias_is_one_more_column(mode, head):
    """Counted once, whatever the number of tiles."""
    bias = torch.linspace(-1, 1, len(head.weight), dtype=torch.float64)
    ones = torch.ones_like(head.hidden[..., :1])
    wider = dataclasses.replace(
        head,
        hidden=torch.cat([head.hidden, ones], -1),
        weight=torch.cat([head.weight, bias.unsqueeze(1)], 1),
        bias=None,
    )
    for actual, expected in zip(outputs(dataclasses.replace(head, bias=bias), mode), outputs(wider, mode), strict=True):
        assert_close(actual, expected, scale=head.scale)


@given(mode=modes, head=heads(), factor=st.sampled_from([0.5, 3.0]))
def test_temperature_and_cap_scale_with_the_products(mode, head, factor):
    scaled = dataclasses.replace(
        head,
        hidden=head.hidden * factor,
        bias=None if head.bias is None else head.bias * factor,
        softcap=None if head.softcap is None else head.softcap * factor,
        temperature=head.temperature * factor,
    )
    for actual, expected in zip(outputs(scaled, mode), outputs(head, mode), strict=True):
        assert_close(actual, expected, scale=head.scale)


# To the last bit


@given(head=heads(), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_every_way_of_saving_gives_the_same_values(head, dtype):
    """Reference policy and policy in training, frozen or not: a log ratio of 0 at the first step is exactly 0."""
    head = head.to(dtype)
    with torch.no_grad():
        expected = head.outputs("recompute", head.inputs(), entropy=True)
    for mode in MODES[1:]:
        learning = ["hidden"] if mode == "frozen" else ["hidden", "weight", "bias"]
        for entropy in (False, True):
            actual = head.outputs(mode, head.inputs(*learning), entropy=entropy)
            for values, wanted in zip(actual, expected, strict=False):
                assert torch.equal(values, wanted)


@given(mode=tiled_modes, head=heads(), generator=generators())
def test_results_are_deterministic(mode, head, generator):
    weights = kernels.weights_like(head, generator)
    first, second = head.run(mode, weights), head.run(mode, weights)
    assert torch.equal(first.logps, second.logps) and torch.equal(first.entropies, second.entropies)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name])


@all_modes
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_nothing_is_read_before_it_was_written(mode, softcap):
    """Torch's deterministic mode fills new memory with NaN."""
    head = random_head(7, n_vocab=11, width=3, softcap=softcap)
    labels = head.labels.clone()
    labels[[1, 5]] = head.ignore_index
    head = dataclasses.replace(head, labels=labels)
    for n_outputs in (1, 2):
        weights = kernels.weights_like(head, torch.Generator().manual_seed(0))[:n_outputs]
        expected = head.run(mode, weights)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(1).isnan().all()
            result = head.run(mode, weights)
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.equal(result.logps, expected.logps)
        for name, gradient in result.gradients.items():
            assert torch.equal(gradient, expected.gradients[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_row_does_not_depend_on_the_batch(device, dtype, frozen):
    """At the tiles that users get. Products with 1, 2 or 7 rows have other bits than those with many."""
    n_vocab, columns = 2 * tiles.tile_for(device).columns + 77, 64
    head = random_head(600, n_vocab=n_vocab, width=columns, dtype=dtype).to(device)
    everyone = row_results(head, 600, frozen)
    for n in (1, 2, 3, 7, 64, 100, 511, 512, 513):
        alone = row_results(head, n, frozen)
        for values, wanted in zip(alone, everyone, strict=True):
            assert torch.equal(values, wanted[:n]), n
    # What follows a row may be ignored, or count without a gradient.
    labels = head.labels.clone()
    labels[50:] = head.ignore_index
    for values, wanted in zip(
        row_results(dataclasses.replace(head, labels=labels), 600, frozen), everyone, strict=True
    ):
        assert torch.equal(values[:50], wanted[:50])
        assert (values[50:] == 0).all()


def row_results(head: Head, n: int, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and the gradient to hidden of the first n rows."""
    hidden, weight = head.hidden[:n].clone().requires_grad_(), head.weight.clone().requires_grad_(not frozen)
    logps, entropies = linear_logps(
        hidden, weight, head.labels[:n], bias=head.bias, return_entropy=True, backend="tiled"
    )
    (gradient,) = torch.autograd.grad((logps + 0.5 * entropies).sum(), hidden)
    return logps.detach(), entropies.detach(), gradient


@pytest.mark.parametrize("mode", ["recompute", "kept", "frozen"])
def test_ignored_rows_leave_no_trace(mode):
    """The same rows between ignored ones, which are dropped. (A part of a budget would hold other tiles.)"""
    head = random_head(8, n_vocab=11, width=3, dtype=torch.float32)
    weights = [torch.linspace(1, 2, 8)]
    hidden = torch.full((16, 3), math.nan)
    hidden[::2] = head.hidden
    labels = torch.full((16,), head.ignore_index)
    labels[::2] = head.labels
    spread_weights = [torch.full((16,), 5.0)]
    spread_weights[0][::2] = weights[0]
    spread = dataclasses.replace(head, hidden=hidden, labels=labels).run(mode, spread_weights)
    together = head.run(mode, weights)
    assert torch.equal(spread.logps[::2], together.logps)
    assert torch.equal(spread.gradients.pop("hidden")[::2], together.gradients.pop("hidden"))
    for name, gradient in spread.gradients.items():
        assert torch.equal(gradient, together.gradients[name])


# Products


def products(record: profile) -> float:
    """Multiply-adds of all matrix products."""
    return sum(event.flops or 0 for event in record.events() if "mm" in event.name) / 2


def one_product(head: Head) -> int:
    return head.labels.numel() * head.weight.numel()


ALL_LEARN = ("hidden", "weight", "bias")
COSTS = [
    ("recompute", (), False, 1),
    ("recompute", (), True, 1),
    ("recompute", ALL_LEARN, False, 4),
    ("recompute", ALL_LEARN, True, 4),
    ("part kept", ALL_LEARN, False, 3.5),
    ("kept", ALL_LEARN, False, 3),
    ("recompute", ("hidden",), False, 2),
    ("recompute", ("hidden",), True, 3),
    ("recompute", ("weight",), False, 3),
    ("recompute", ("weight", "bias"), False, 3),
    ("kept", ("weight",), False, 2),
    ("recompute", ("hidden", "bias"), False, 3),
    ("kept", ("hidden", "bias"), False, 2),
    ("recompute", ("bias",), False, 2),
    ("kept", ("bias",), False, 1),
]


def count(head: Head, mode: str, learning: tuple[str, ...], entropy: bool) -> tuple[float, float]:
    """Products of n·d·V of the forward, and of the backward."""
    inputs = head.inputs(*learning)
    with profiled() as forward:
        outputs = head.outputs(mode, inputs, entropy=entropy)
    with profiled() as backward:
        if learning:
            torch.autograd.grad(sum(x.sum() for x in outputs), [inputs[name] for name in learning])
    return products(forward) / one_product(head), products(backward) / one_product(head)


@pytest.mark.parametrize(("mode", "learning", "entropy", "cost"), COSTS)
def test_number_of_products(mode, learning, entropy, cost):
    """Nothing is computed for an input that needs no gradient. Tiles of rows that fill up, none padded."""
    head = random_head(8, n_vocab=16, width=3, softcap=2.0)
    assert sum(count(head, mode, learning, entropy)) == cost


@pytest.mark.parametrize(("mode", "learning", "entropy", "cost"), COSTS)
def test_ignored_rows_cost_nothing(mode, learning, entropy, cost):
    head = random_head(8, n_vocab=16, width=3)
    labels = head.labels.clone()
    labels[::2] = head.ignore_index
    head = dataclasses.replace(head, labels=labels)
    if mode == "part kept":
        cost = 3  # what was meant for half of the tiles of all rows holds all tiles of half of the rows
    assert sum(count(head, mode, learning, entropy)) == cost / 2
    head = dataclasses.replace(head, labels=torch.full((8,), head.ignore_index))
    assert sum(count(head, mode, learning, entropy)) == 0


def test_rows_without_a_gradient_cost_no_backward():
    head = random_head(8, n_vocab=16, width=3)
    inputs = head.inputs(*ALL_LEARN)
    logps, entropies = head.outputs("recompute", inputs, entropy=True)
    first, both = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    first[:2] = both[:2] = 1.0
    for weights, share in [((first, first), 1 / 4), ((first, both.roll(4)), 1 / 2), ((first * 0, first * 0), 0)]:
        with profiled() as record:
            torch.autograd.grad((logps, entropies), list(inputs.values()), weights, retain_graph=True)
        assert products(record) == 3 * share * one_product(head)


# Memory


def saved_bytes(head: Head, mode: str, learning: tuple[str, ...], entropy: bool) -> int:
    """Bytes that the graph keeps, beyond the inputs."""
    kept: dict[int, Tensor] = {}
    inputs = head.inputs(*learning)
    own = {x.untyped_storage().data_ptr() for x in (*inputs.values(), head.labels)}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = head.outputs(mode, inputs, entropy=entropy)
    assert len(outputs) == 1 + entropy
    return sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in own)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entropy", [False, True])
def test_memory_of_the_graph(dtype, entropy):
    n_rows, n_vocab, width = 40, 96, 7
    head = random_head(n_rows, n_vocab=n_vocab, width=width, dtype=dtype, tile=Tile(4, 8, 16))
    sums = torch.promote_types(dtype, torch.float32).itemsize
    rows = (2 + entropy) * n_rows * sums
    assert saved_bytes(head, "recompute", (), entropy) == 0
    assert saved_bytes(head, "recompute", ALL_LEARN, entropy) <= rows
    assert saved_bytes(head, "recompute", ("hidden",), entropy) <= rows + (1 + entropy) * n_rows * width * sums
    if not entropy:
        # Beside the budget the maxima of each row in each tile.
        maxima = n_rows * (n_vocab // 16) * sums
        probabilities = n_rows * n_vocab * dtype.itemsize
        part = saved_bytes(head, "part kept", ALL_LEARN, entropy)
        assert probabilities / 2 <= part <= head.half_a_budget + rows + maxima
        assert probabilities <= saved_bytes(head, "kept", ALL_LEARN, entropy) <= probabilities + rows + maxima


@pytest.mark.parametrize("mode", ["recompute", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_outputs", [1, 2], ids=["logps", "entropies too"])
def test_the_logits_never_exist(mode, dtype, n_outputs):
    """Beyond the gradients, forward and backward hold a few tiles, and float32 copies of hidden and its gradient."""
    n_rows, n_vocab, width, tile = 128, 4096, 16, Tile(32, 32, 128)
    softcap = 5.0 if n_outputs == 2 else None
    head = random_head(n_rows, n_vocab=n_vocab, width=width, dtype=dtype, tile=tile, softcap=softcap)
    with profiled() as record:
        result = head.run(mode, [torch.ones(n_rows)] * n_outputs)
    gradients = sum(x.untyped_storage().nbytes() for x in result.gradients.values())
    working = 4 * (6 * tile.block * tile.columns + 4 * n_rows * width + 16 * n_rows)
    assert working < 0.08 * 4 * n_rows * n_vocab
    assert gradients < peak(record) <= gradients + working


def test_the_peak_sees_the_logits():
    """The test above could not fail if the operators' memory were overlooked."""
    n_rows, n_vocab = 128, 4096
    head = random_head(n_rows, n_vocab=n_vocab, width=16, dtype=torch.float32)
    with profiled() as record:
        head.run("reference", [torch.ones(n_rows)])
    assert peak(record) > n_rows * n_vocab * 4
    with profiled() as record:
        dataclasses.replace(head, tile=Tile(32, 32, 128)).run("kept", [torch.ones(n_rows)])
    assert peak(record) > n_rows * n_vocab * 4
