"""linear_logps: values and gradients against loops, options, extremes, dtypes, shapes."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.kernels import linear_logps, selective_logps
from tests import kernel_oracles as oracles
from tests import kernel_strategies as kernels
from tests.kernel_strategies import MODES, Head, heads, random_head, use_tiles
from tests.sequence_strategies import generators, normal
from tests.tolerances import assert_close

INF, NAN = math.inf, math.nan
LOG2, LOG3, LOG5 = math.log(2), math.log(3), math.log(5)
all_modes = pytest.mark.parametrize("mode", MODES)


def near(expected: list) -> object:
    return pytest.approx(expected, rel=1e-14, abs=1e-14)


# The oracle, by hand


def test_oracle_of_logits():
    assert oracles.products([1.0, 2.0], [[3.0, 4.0], [0.5, -1.0]], [10.0, 20.0]) == [21.0, 18.5]
    assert oracles.logit(3.0, None, 2.0) == 1.5
    # tanh(log 3) = (9 - 1)/(9 + 1) = 0.8, and 1 - 0.64 = 0.36.
    assert oracles.logit(5 * LOG3, 5.0, 2.0) == near(2.0)
    assert oracles.slope(5 * LOG3, 5.0, 2.0) == near(0.18)
    assert oracles.slope(7.0, None, 4.0) == 0.25
    assert (oracles.logit(-INF, 5.0, 2.0), oracles.slope(-INF, 5.0, 2.0)) == (-2.5, 0.0)


def test_oracle_of_log_probabilities():
    """Products log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8; at temperature 1/2 they are 1/30, 4/30, 25/30."""
    weight = [[0.0], [LOG2], [LOG5]]
    entropy = 3 * LOG2 - 2 / 8 * LOG2 - 5 / 8 * LOG5
    logps, entropies = oracles.linear_logps([[1.0], [NAN], [1.0]], weight, [2, -1, 0], None, None, 1.0, -1)
    assert logps == near([LOG5 - 3 * LOG2, 0.0, -3 * LOG2])
    assert entropies == near([entropy, 0.0, entropy])
    logps, _ = oracles.linear_logps([[0.0]], weight, [1], [0.0, LOG2, LOG5], None, 0.5, -1)
    assert logps == near([math.log(4 / 30)])
    assert oracles.selective_logps([[0.0, LOG2, LOG5], [NAN] * 3], [2, -1], 1.0, -1) == near([LOG5 - 3 * LOG2, 0.0])


def test_oracle_of_gradients():
    weight, mean = [[0.0], [LOG2], [LOG5]], 2 / 8 * LOG2 + 5 / 8 * LOG5
    hidden, head, bias = oracles.linear_gradients(
        [[2.0], [NAN]], weight, [2, 9], [0.0, -LOG2, -LOG5], None, 1.0, 9, [3.0, 7.0], [0.0, 7.0]
    )
    assert [*hidden[0], *hidden[1]] == near([3 * (LOG5 - mean), 0.0])
    assert [row[0] for row in head] == near([-6 / 8, -12 / 8, 18 / 8])
    assert bias == near([-3 / 8, -6 / 8, 9 / 8])
    # Probabilities 1/4, 3/4: log p + H = -3/4 log 3 and 1/4 log 3, each times -p.
    _, _, bias = oracles.linear_gradients([[0.0]], [[0.0]] * 2, [0], [0.0, LOG3], None, 1.0, 9, [0.0], [1.0])
    assert bias == near([3 / 16 * LOG3, -3 / 16 * LOG3])
    # Even odds at a slope of 0.18.
    _, _, bias = oracles.linear_gradients([[0.0]], [[0.0]] * 2, [0], [5 * LOG3] * 2, 5.0, 2.0, 9, [1.0], [0.0])
    assert bias == near([0.09, -0.09])
    by_logits = oracles.selective_gradient([[0.0, 2 * LOG3], [NAN] * 2], [1, 9], 2.0, 9, [3.0, 4.0])
    assert [*by_logits[0], *by_logits[1]] == near([-3 / 8, 3 / 8, 0.0, 0.0])


# Against the oracle


def assert_agrees(head: Head, mode: str, weights: list[Tensor]) -> None:
    actual, expected = head.run(mode, weights), head.expected(weights)
    assert actual.logps.shape == head.labels.shape
    assert_close(actual.logps, expected.logps, scale=head.scale)
    if actual.entropies is not None:
        assert_close(actual.entropies, expected.entropies, scale=head.scale)
    largest = max([1.0, *(w.abs().max().item() for w in weights)])
    for name, gradient in actual.gradients.items():
        assert gradient.dtype == head.hidden.dtype
        assert_close(gradient, expected.gradients[name], scale=head.scale * largest)


@all_modes
@given(head=heads(), generator=generators(), entropy=st.booleans())
def test_agrees_with_the_oracle(mode, device, head, generator, entropy):
    """Any shape, strides, integer type, tile, cap, temperature and ignored label; what ignored rows hold is NaN."""
    head = head.to(device)
    assert_agrees(head, mode, kernels.weights_like(head, generator)[: 1 + entropy])


@all_modes
def test_every_combination_of_options(mode):
    """On tiles with ragged ends in both directions."""
    for options in kernels.choices(
        biased=[True, False], softcap=[None, 1.5], temperature=[1.0, 0.6], ignore_index=[-100, 4], outputs=[1, 2]
    ):
        biased, outputs = options.pop("biased"), options.pop("outputs")
        head = random_head(7, n_vocab=11, width=3, **options)
        labels = head.labels.clone()
        labels[[1, 4]] = head.ignore_index
        head = dataclasses.replace(head, labels=labels, bias=head.bias if biased else None)
        assert_agrees(head, mode, kernels.weights_like(head, torch.Generator().manual_seed(1))[:outputs])


@pytest.mark.parametrize("budget", [0, kernels.ALL], ids=["recompute", "kept"])
@pytest.mark.parametrize("entropy", [False, True])
def test_any_set_of_inputs_may_learn(budget, entropy):
    """Each gradient is the same whoever else asks for one; without the head the path is another."""
    head = random_head(7, n_vocab=11, width=3, softcap=2.0, temperature=0.8)
    weights = kernels.weights_like(head, torch.Generator().manual_seed(1))[: 1 + entropy]
    expected = head.expected(weights)
    names = ["hidden", "weight", "bias"]
    for learning in itertools.chain.from_iterable(itertools.combinations(names, size) for size in (1, 2, 3)):
        inputs = head.inputs(*learning)
        outputs = head.outputs("kept" if budget else "recompute", inputs, entropy=entropy)
        gradients = torch.autograd.grad(outputs, [inputs[name] for name in learning], weights)
        for name, gradient in zip(learning, gradients, strict=True):
            assert_close(gradient, expected.gradients[name], scale=head.scale)
    assert not any(x.requires_grad for x in head.outputs("recompute", head.inputs(), entropy=entropy))


@all_modes
@pytest.mark.parametrize("used", ["logps", "entropies"])
def test_one_output_used_alone(mode, used):
    head = random_head(5, n_vocab=7, width=3)
    learning = ["hidden"] if mode == "frozen" else ["hidden", "weight", "bias"]
    inputs = head.inputs(*learning)
    outputs = head.outputs(mode, inputs, entropy=True)
    output = outputs[0] if used == "logps" else outputs[1]
    gradients = torch.autograd.grad(output.sum(), [inputs[name] for name in learning])
    one, none = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    expected = head.expected([one, none] if used == "logps" else [none, one])
    for name, gradient in zip(learning, gradients, strict=True):
        assert_close(gradient, expected.gradients[name], scale=head.scale)


def test_arguments_are_not_written_to():
    head = random_head(5, n_vocab=7, width=3)
    originals = head.hidden.clone(), head.weight.clone(), head.bias.clone(), head.labels.clone()
    for mode in MODES:
        head.run(mode, kernels.weights_like(head, torch.Generator().manual_seed(1)))
    for x, original in zip((head.hidden, head.weight, head.bias, head.labels), originals, strict=True):
        assert torch.equal(x, original)
        assert x._version == 0


# Small and empty


@all_modes
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_no_rows(mode, shape):
    head = random_head(*shape, n_vocab=5, width=2)
    result = head.run(mode, [torch.zeros(shape, dtype=torch.float64)] * 2)
    assert result.logps.shape == result.entropies.shape == shape
    for name, gradient in result.gradients.items():
        assert torch.equal(gradient, torch.zeros_like(getattr(head, name)))


@all_modes
def test_all_rows_ignored(mode):
    """Zeros, not NaN, whatever the hidden states hold and whatever gradient comes in."""
    head = random_head(5, n_vocab=7, width=3)
    head = dataclasses.replace(
        head, labels=torch.full((5,), head.ignore_index), hidden=torch.full_like(head.hidden, NAN)
    )
    result = head.run(mode, [torch.full((5,), INF, dtype=torch.float64)] * 2)
    assert torch.equal(result.logps, torch.zeros(5, dtype=torch.float64))
    assert torch.equal(result.entropies, result.logps)
    for name, gradient in result.gradients.items():
        assert torch.equal(gradient, torch.zeros_like(getattr(head, name))), name


@all_modes
def test_one_token_is_certain(mode):
    head = random_head(3, n_vocab=1, width=2)
    result = head.run(mode, [torch.ones(3, dtype=torch.float64)] * 2)
    assert (result.logps == 0).all() and (result.entropies == 0).all()
    assert all((gradient == 0).all() for gradient in result.gradients.values())


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_no_width(backend):
    """Logits that are the bias alone."""
    bias = torch.tensor([0.0, LOG2, LOG5], dtype=torch.float64, requires_grad=True)
    hidden, weight = torch.zeros(2, 0, dtype=torch.float64), torch.zeros(3, 0, dtype=torch.float64)
    logps = linear_logps(hidden, weight, torch.tensor([2, 0]), bias=bias, backend=backend)
    assert_close(logps, [LOG5 - 3 * LOG2, -3 * LOG2])
    (gradient,) = torch.autograd.grad(logps.sum(), bias)
    assert_close(gradient, [1 - 2 / 8, -4 / 8, 1 - 10 / 8])


# Extremes


@all_modes
@given(head=heads(), generator=generators())
def test_large_logits(mode, head, generator):
    """Up to 1e4, against the oracle: in float64 rounding is relative to the size of the logits."""
    bias = torch.rand(len(head.weight), generator=generator, dtype=torch.float64) * 2e4 - 1e4
    head = dataclasses.replace(head, bias=bias, softcap=None, temperature=1.0)
    assert_agrees(head, mode, kernels.weights_like(head, generator))


@all_modes
@given(head=heads(), generator=generators())
def test_large_products(mode, head, generator):
    head = dataclasses.replace(head, hidden=head.hidden * 3e3, softcap=None, temperature=1.0)
    assert_agrees(head, mode, kernels.weights_like(head, generator))


@all_modes
@given(head=heads(), generator=generators(), first_tiles=st.booleans())
def test_forbidden_tokens_are_the_limit_of_unlikely_ones(mode, head, generator, first_tiles):
    """-inf against -2000, where probabilities have underflowed; some labels forbidden, tiles without a finite logit."""
    n_vocab = len(head.weight)
    forbidden = torch.rand(n_vocab, generator=generator) < 0.5
    if first_tiles:
        forbidden[: 2 * head.tile.columns] = True
    forbidden[-1] = False
    bias = normal((n_vocab,), generator)
    weights = kernels.weights_like(head, generator)
    near = dataclasses.replace(head, bias=bias.masked_fill(forbidden, -2000.0)).run(mode, weights)
    there = dataclasses.replace(head, bias=bias.masked_fill(forbidden, -INF)).run(mode, weights)
    if head.softcap is None:
        impossible = head.counts & forbidden[head.labels.long().clamp(0, n_vocab - 1)]
        assert torch.equal(there.logps == -INF, impossible)
        assert torch.equal(there.logps[~impossible], near.logps[~impossible])
    assert_close(there.entropies, near.entropies)
    for name, gradient in there.gradients.items():
        assert gradient.isfinite().all()
        assert_close(gradient, near.gradients[name], scale=head.scale)


@all_modes
def test_infinite_gradients_stay_in_their_row(mode):
    """NaN that comes in is not hidden, and reaches no other row of hidden."""
    head = random_head(5, n_vocab=7, width=3)
    weights = torch.tensor([1.0, NAN, 1.0, 0.0, 1.0], dtype=torch.float64)
    gradient = head.run(mode, [weights]).gradients["hidden"]
    expected = head.expected([weights.nan_to_num(0.0)]).gradients["hidden"]
    assert gradient[1].isnan().all()
    assert_close(gradient[[0, 2, 3, 4]], expected[[0, 2, 3, 4]], scale=head.scale)


# Precision


def float64_logits(head: Head) -> Tensor:
    """The logits [n, V] of the head's inputs as they are."""
    bias = 0.0 if head.bias is None else head.bias.double()
    products = head.hidden.double().reshape(-1, head.hidden.shape[-1]) @ head.weight.double().T + bias
    return products if head.softcap is None else head.softcap * (products / head.softcap).tanh()


def absolute_sums(head: Head, weights: list[Tensor]) -> dict[str, Tensor]:
    """The gradients' sums with all terms positive: errors of the terms add up to their share of these."""
    logits = float64_logits(head) / head.temperature
    log_p = logits.log_softmax(-1)
    surprises = torch.special.entr(log_p.exp())
    entropies = surprises.sum(-1, keepdim=True)
    grad_logps, grad_entropies = (w.double().flatten().abs().unsqueeze(-1) for w in weights)
    one_hot = torch.nn.functional.one_hot(head.labels.flatten(), len(head.weight))
    # An error of log p counts as such, however small log p is.
    terms = grad_logps * (one_hot + log_p.exp()) + grad_entropies * (surprises + log_p.exp() * (1 + entropies))
    terms = terms * head.counts.flatten().unsqueeze(-1) / head.temperature
    hidden = head.hidden.double().reshape(-1, head.hidden.shape[-1])
    return {
        "hidden": (terms @ head.weight.double().abs()).view(head.hidden.shape),
        "weight": terms.T @ hidden.abs(),
        "bias": terms.sum(0),
    }


@all_modes
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_a_forbidden_tile_before_very_negative_logits(mode, dtype, precision):
    """Nothing that is 0 in all may meet the exponential of the distance to it, which overflows."""
    head = random_head(5, n_vocab=11, width=3)
    bias = torch.full((11,), -1e4, dtype=torch.float64)
    bias[:4] = -INF
    head = dataclasses.replace(head, bias=bias, labels=head.labels.clamp(min=4)).to(dtype)
    weights = [torch.ones(5, dtype=dtype)]
    result, expected = head.run(mode, weights), head.expected(weights)
    sums = absolute_sums(head, [*weights, torch.zeros(5)])
    for name, gradient in result.gradients.items():
        allowed = 2 * precision * 1e4 * sums[name]
        assert ((gradient.double() - expected.gradients[name]).abs() <= allowed).all()


@all_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(data=st.data())
def test_lower_precision_against_float64_of_the_same_inputs(mode, device, dtype, data):
    """Log-probabilities within 2e-6 max|z|, which is the relative error of a probability.

    To it come 1e-6 for the sums of some tens of terms, half a unit in the last place of a kept bfloat16 probability,
    and the rounding of a gradient to the dtype.
    """
    n_rows, n_vocab, width = data.draw(st.permutations([9, 14, 33]))
    head = random_head(
        n_rows,
        n_vocab=n_vocab,
        width=width,
        dtype=dtype,
        seed=data.draw(st.integers(0, 2**31)),
        softcap=data.draw(st.sampled_from([None, 10.0])),
        temperature=data.draw(st.sampled_from([1.0, 0.5])),
        tile=data.draw(kernels.sizes_of_tiles()),
    ).to(device)
    weights = kernels.weights_like(head, data.draw(generators()))[: 2 if mode != "kept" else 1]
    result, wide = head.run(mode, [w.float() for w in weights]), head.to(torch.float64)
    expected = wide.run("reference", [w.float().double() for w in weights])
    assert result.logps.dtype == torch.float32
    tolerance = 2e-6 * max(1.0, (float64_logits(head) / head.temperature).abs().max().item())
    torch.testing.assert_close(result.logps.double(), expected.logps, rtol=0.0, atol=tolerance)
    if result.entropies is not None:
        off = (result.entropies.double() - expected.entropies).abs()
        assert (off <= tolerance * (1 + 2 * expected.entropies)).all()
    kept = 2**-9 if dtype == torch.bfloat16 and "kept" in mode else 0.0
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    sums = absolute_sums(head, [*weights, torch.zeros_like(weights[0])][:2])
    for name, gradient in result.gradients.items():
        assert gradient.dtype == dtype
        wanted = expected.gradients[name]
        allowed = (tolerance + 1e-6 + kept) * sums[name] * 2 + rounding * wanted.abs() + torch.finfo(dtype).tiny
        assert ((gradient.double() - wanted).abs() <= allowed).all()


CONFIDENT = [(1e4, 10.0), (1e4, 8.0), (1000.0, 12.0), (30.0, 10.0)]


@pytest.mark.parametrize("mode", ["recompute", "kept"])
@pytest.mark.parametrize(("at", "below"), CONFIDENT)
def test_the_gradient_at_a_confident_label_keeps_its_digits(mode, at, below):
    """1 − p of the label is off by two roundings of 1, however large the logits: not by those of the logits."""
    logits = torch.full((6,), at - below)
    logits[2] = at
    head = Head(torch.ones(1, 1), logits.unsqueeze(1), torch.tensor([2]), torch.zeros(6))
    gradient = head.run(mode, [torch.ones(1)]).gradients["bias"][2].item()
    wanted = 1 - logits.double().softmax(0)[2].item()
    assert abs(gradient - wanted) <= 2**-23
    selected = logits.unsqueeze(0).clone().requires_grad_()
    with use_tiles():
        (gradient,) = torch.autograd.grad(selective_logps(selected, torch.tensor([2])).sum(), selected)
    assert abs(gradient[0, 2].item() - wanted) <= 2**-23


def test_kept_bfloat16_rounds_no_confident_label():
    """One token has probability 1 whatever the cap: nothing to learn, also from a store in half precision."""
    head = random_head(50, n_vocab=1, width=4, dtype=torch.bfloat16, softcap=30.0, bias=None)
    gradients = head.run("kept", [torch.ones(50)]).gradients
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("dtype", "mean", "largest"),
    [(torch.bfloat16, 1e-6, 4e-6), (torch.float16, 4e-5, 4e-5), (torch.float32, 4e-5, 4e-5)],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_accuracy_at_a_realistic_size(backend, device, dtype, mean, largest):
    """Logits up to 20, at the tiles that users get: 2e-6 of the largest, bfloat16 with its shorter products a tenth."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = normal((256, 512), generator), normal((8000, 512), generator)
    weight *= 20 / (hidden @ weight.T).abs().max()
    labels = torch.randint(8000, (256,), generator=generator)
    head = Head(hidden.to(dtype), weight.to(dtype), labels).to(device)
    exact = float64_logits(head)
    assert 19 < exact.abs().max().item() <= 20.1
    wanted = exact.log_softmax(-1).gather(1, head.labels.unsqueeze(1)).squeeze(1)
    error = (linear_logps(head.hidden, head.weight, head.labels, backend=backend).double() - wanted).abs()
    assert error.mean().item() <= mean
    assert error.max().item() <= largest
