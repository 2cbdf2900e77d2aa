"""The kernels under second derivatives, torch.func, checkpointing, autocast and the modes of autograd."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from exo_toy.kernels import linear_logps, reference, selective_logps
from tests import kernel_strategies as kernels
from tests.kernel_strategies import MODES, Head, random_head, use_tiles
from tests.tolerances import assert_close

# torch's own: its forward-mode rules are compiled by the deprecated torch.jit on first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

all_modes = pytest.mark.parametrize("mode", MODES)
ALL_LEARN = ("hidden", "weight", "bias")


def learning(mode: str) -> tuple[str, ...]:
    return ("hidden",) if mode == "frozen" else ALL_LEARN


def small_head(**changed) -> Head:
    """Two of five rows ignored, three tiles of the vocabulary."""
    head = random_head(5, n_vocab=9, width=2, **changed)
    labels = head.labels.clone()
    labels[[1, 4]] = head.ignore_index
    return dataclasses.replace(head, labels=labels)


# Derivatives


@all_modes
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck_and_gradgradcheck(mode, softcap, entropy):
    head = small_head(softcap=softcap, temperature=0.8)
    names = learning(mode)
    inputs = head.inputs(*names)

    def call(*values):
        return head.outputs(mode, {**inputs, **dict(zip(names, values, strict=True))}, entropy=entropy)

    assert torch.autograd.gradcheck(call, [inputs[name] for name in names])
    assert torch.autograd.gradgradcheck(call, [inputs[name] for name in names])


@all_modes
@pytest.mark.parametrize("n_rows", [0, 3], ids=["no rows", "all ignored"])
def test_second_derivatives_of_nothing(mode, n_rows):
    head = random_head(n_rows, n_vocab=9, width=2)
    head = dataclasses.replace(head, labels=torch.full((n_rows,), head.ignore_index))
    inputs = head.inputs(*learning(mode))
    asked = [inputs[name] for name in learning(mode)]
    (logps,) = head.outputs(mode, inputs, entropy=False)
    first = torch.autograd.grad(logps.sum(), asked, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), asked, allow_unused=True, materialize_grads=True)
    for gradient, x in zip(second, asked, strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


def test_derivatives_of_selective_logps():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    labels = torch.tensor([3, -100, 8, 0])
    for layout in kernels.LAYOUTS:

        def call(logits, layout=layout):
            return selective_logps(kernels.strided(logits, layout), labels, temperature=0.8)

        with use_tiles():
            assert torch.autograd.gradcheck(call, logits)
            assert torch.autograd.gradgradcheck(call, logits)


# torch.func. The kernels under a transform are compared with themselves outside.


def by_autograd(head: Head, weights: list[Tensor]) -> dict[str, Tensor]:
    return head.run("recompute", weights).gradients


@pytest.mark.parametrize("entropy", [False, True])
def test_func_grad(entropy):
    head = small_head(softcap=2.0)
    weights = kernels.weights_like(head, torch.Generator().manual_seed(0))[: 1 + entropy]

    def total(hidden, weight, bias):
        outputs = linear_logps(
            hidden, weight, head.labels, bias=bias, **head.options, return_entropy=entropy, backend=None
        )
        return sum((x * w).sum() for x, w in zip(outputs if entropy else (outputs,), weights, strict=True))

    gradients = torch.func.grad(total, argnums=(0, 1, 2))(head.hidden, head.weight, head.bias)
    for gradient, expected in zip(gradients, by_autograd(head, weights).values(), strict=True):
        assert_close(gradient, expected, scale=head.scale)


def test_jacobian_of_rows():
    head = small_head()

    def call(hidden):
        return linear_logps(hidden, head.weight, head.labels, bias=head.bias)

    reverse, forward = torch.func.jacrev(call)(head.hidden), torch.func.jacfwd(call)(head.hidden)
    gradient = by_autograd(head, [torch.ones(5, dtype=torch.float64)])["hidden"]
    for jacobian in (reverse, forward):
        assert_close(jacobian.diagonal(dim1=0, dim2=1).T, gradient, scale=head.scale)
        assert_close(jacobian.sum(1), gradient, scale=head.scale)


def test_jvp():
    head = small_head(temperature=0.7)
    inputs = head.hidden, head.weight, head.bias

    def call(*inputs):
        return linear_logps(*inputs[:2], head.labels, bias=inputs[2], temperature=0.7)

    tangents = [x.cos() for x in inputs]
    value, derivative = torch.func.jvp(call, inputs, tuple(tangents))
    assert_close(value, call(*inputs), scale=head.scale)
    one_row_at_a_time = [by_autograd(head, [one]) for one in torch.eye(5, dtype=torch.float64)]
    expected = [sum((g * t).sum() for g, t in zip(row.values(), tangents, strict=True)) for row in one_row_at_a_time]
    assert_close(derivative, torch.stack(expected), scale=head.scale)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_is_a_loop(dim):
    """Over hidden states, weights, labels, or all of them."""
    heads = [random_head(4, n_vocab=9, width=2, seed=seed) for seed in range(3)]
    hidden, weight = (torch.stack([getattr(h, name) for h in heads], dim) for name in ("hidden", "weight"))
    labels = torch.stack([head.labels for head in heads], min(dim, 1))

    def call(hidden, weight, labels):
        return torch.stack(linear_logps(hidden, weight, labels, return_entropy=True))

    for batched in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        stacked, dims = (hidden, weight, labels), (dim, dim, min(dim, 1))
        first = heads[0].hidden, heads[0].weight, heads[0].labels
        arguments = [x if b else y for x, y, b in zip(stacked, first, batched, strict=True)]
        in_dims = tuple(d if b else None for d, b in zip(dims, batched, strict=True))
        mapped = torch.func.vmap(call, in_dims=in_dims)(*arguments)
        for index, head in enumerate(heads):
            own = head.hidden, head.weight, head.labels
            expected = call(*(x if b else y for x, y, b in zip(own, first, batched, strict=True)))
            assert_close(mapped[index], expected, scale=head.scale)


def test_gradients_of_each_row():
    """vmap over grad, as for influence of single tokens."""
    head = small_head()

    def one(hidden, label, weight):
        return linear_logps(hidden, weight, label, bias=head.bias)

    each = torch.func.vmap(torch.func.grad(one, argnums=2), in_dims=(0, 0, None))(head.hidden, head.labels, head.weight)
    for row, weights in zip(each, torch.eye(5, dtype=torch.float64), strict=True):
        assert_close(row, by_autograd(head, [weights])["weight"], scale=head.scale)


def test_selective_logps_under_transforms():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(9, (3, 4), generator=generator)
    expected = selective_logps(logits, labels)
    assert_close(torch.func.vmap(selective_logps)(logits, labels), expected)
    assert_close(torch.func.vmap(selective_logps, in_dims=(None, 0))(logits[0], labels)[0], expected[0])
    gradient = torch.func.grad(lambda z: selective_logps(z, labels).sum())(logits)
    leaf = logits.clone().requires_grad_()
    assert_close(gradient, torch.autograd.grad(selective_logps(leaf, labels).sum(), leaf)[0])
    _, derivative = torch.func.jvp(lambda z: selective_logps(z, labels), (logits,), (logits.cos(),))
    assert_close(derivative, (gradient * logits.cos()).sum(-1))
    jacobian = torch.func.jacrev(lambda z: selective_logps(z, labels[0]))(logits[0])
    assert_close(jacobian.sum(0), gradient[0])


# Checkpointing, and graphs used more than once


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@all_modes
def test_gradient_checkpointing(mode, use_reentrant):
    head = small_head(softcap=2.0)
    weights = kernels.weights_like(head, torch.Generator().manual_seed(0))[:1]
    inputs = head.inputs(*learning(mode))
    asked = [inputs[name] for name in learning(mode)]

    def block(hidden, weight, bias):
        return head.outputs(mode, {"hidden": hidden, "weight": weight, "bias": bias}, entropy=False)[0]

    logps = checkpoint(block, *inputs.values(), use_reentrant=use_reentrant)
    (logps * weights[0]).sum().backward()
    expected = head.run(mode, weights)
    assert torch.equal(logps, expected.logps)
    for x, gradient in zip(asked, expected.gradients.values(), strict=True):
        assert torch.equal(x.grad, gradient)


@all_modes
def test_a_graph_may_be_used_twice(mode):
    """The kept tiles survive the first backward; gradients accumulate."""
    head = small_head()
    inputs = head.inputs(*learning(mode))
    (logps,) = head.outputs(mode, inputs, entropy=False)
    logps.sum().backward(retain_graph=True)
    once = {name: inputs[name].grad.clone() for name in learning(mode)}
    logps.sum().backward(retain_graph=True)
    (3 * logps).sum().backward()
    for name, gradient in once.items():
        assert_close(inputs[name].grad, 5 * gradient)
    for name in set(ALL_LEARN) - set(learning(mode)):
        assert inputs[name].grad is None


@all_modes
def test_backward_after_an_input_was_changed_in_place_is_an_error(mode):
    head = small_head()
    inputs = head.inputs(*learning(mode))
    (logps,) = head.outputs(mode, inputs, entropy=False)
    with torch.no_grad():
        inputs["weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


# Autocast


@pytest.mark.parametrize(
    ("backend", "inside"),
    [("reference", False), ("tiled", False), ("tiled", True)],
    ids=["reference", "tiled", "tiled, backward inside"],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_autocast(backend, inside, frozen):
    """As F.linear under autocast followed by a log-softmax in float32, but for the logits, which are not rounded.

    (A backward under autocast rounds the operands of the reference, as it does those of any plain function.)
    """
    head = random_head(6, n_vocab=33, width=5, dtype=torch.float32)
    leaves = [x.clone().requires_grad_() for x in (head.hidden, head.weight, head.bias)]
    if frozen:
        leaves[1:] = [x.detach() for x in leaves[1:]]
    asked = [x for x in leaves if x.requires_grad]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = linear_logps(*leaves[:2], head.labels, bias=leaves[2], backend=backend)
        if inside:
            gradients = torch.autograd.grad(logps.sum(), asked)
    if not inside:
        gradients = torch.autograd.grad(logps.sum(), asked)
    assert logps.dtype == torch.float32
    rounded = dataclasses.replace(head, **{name: x.bfloat16() for name, x in head.inputs().items()})
    exact = rounded.to(torch.float64).run("reference", [torch.ones(6, dtype=torch.float64)])
    torch.testing.assert_close(logps.double(), exact.logps, rtol=0.0, atol=2e-6 * head.scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(*leaves[:2], leaves[2])
    assert logits.dtype == torch.bfloat16
    # A bfloat16 logit is off by 2^-9 of itself, a log-probability by as much again.
    naive = logits.float().log_softmax(-1).gather(1, head.labels.unsqueeze(1)).squeeze(1)
    assert (logps - naive).abs().max().item() <= 2 * 2**-9 * logits.abs().max().item()
    for gradient, wanted in zip(gradients, exact.gradients.values(), strict=False):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), wanted, rtol=2**-8, atol=2e-6 * head.scale)


def test_autocast_leaves_float64_and_logits_alone():
    head = random_head(6, n_vocab=33, width=5)
    weights = kernels.weights_like(head, torch.Generator().manual_seed(0))
    logits = head.hidden.float() @ head.weight.float().T
    expected = head.run("recompute", weights), selective_logps(logits, head.labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, selected = head.run("recompute", weights), selective_logps(logits, head.labels)
    assert torch.equal(result.logps, expected[0].logps)
    for name, gradient in result.gradients.items():
        assert torch.equal(gradient, expected[0].gradients[name])
    assert torch.equal(selected, expected[1])


def test_second_derivatives_under_autocast():
    """Of the rounded inputs, whether autocast is on or off when they are taken."""
    head = random_head(6, n_vocab=33, width=5, dtype=torch.float32)
    found = []
    for inside in (True, False):
        hidden = head.hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logps = linear_logps(hidden, head.weight, head.labels)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            (first,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), hidden)[0])
    assert torch.equal(*found)


# Modes of autograd


def test_without_gradients():
    head = small_head()
    expected = head.run("recompute", [torch.ones(5, dtype=torch.float64)]).logps
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            (logps,) = head.outputs("kept", head.inputs(*ALL_LEARN), entropy=False)
            selected = selective_logps((head.hidden @ head.weight.T + head.bias).requires_grad_(), head.labels)
        assert not logps.requires_grad and not selected.requires_grad
        assert torch.equal(logps, expected)
        assert_close(selected, expected, scale=head.scale)
    with torch.inference_mode():
        made_inside = random_head(5, n_vocab=9, width=2)
        (logps,) = made_inside.outputs("recompute", made_inside.inputs(), entropy=False)
    assert logps.is_inference()
    (logps,) = head.outputs("recompute", head.inputs(), entropy=False)
    assert not logps.requires_grad


def test_gradients_reach_the_layers_before():
    """Through a model, with a head tied to the embedding that the hidden states come from."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    tokens, labels = torch.randint(9, (2, 3, 5), generator=generator)
    found = []
    for backend in ("tiled", "plain"):
        weight = table.clone().requires_grad_()
        hidden = torch.nn.functional.embedding(tokens, weight).tanh()
        if backend == "tiled":
            with use_tiles():
                logps = linear_logps(hidden, weight, labels)
        else:
            logps = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        logps.square().sum().backward()
        found.append(weight.grad)
    assert_close(found[0], found[1], scale=100)


# Higher derivatives, forward mode, changes in place


def third_derivatives(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Of a scalar function: gradient, and twice the gradient of its product with a fixed direction."""
    direction = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).sin().view_as(x)
    found = [torch.autograd.grad(function(x), x, create_graph=True)[0]]
    for _ in range(2):
        found.append(torch.autograd.grad((found[-1] * direction).sum(), x, create_graph=True)[0])
    return found


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@all_modes
def test_third_derivatives(mode, name):
    head = small_head(softcap=2.0)
    if mode == "frozen" and name != "hidden":
        pytest.skip("frozen")
    inputs = head.inputs(name)

    def value(mode):
        return lambda x: head.outputs(mode, {**inputs, name: x}, entropy=False)[0].square().sum()

    for have, want in zip(
        third_derivatives(value(mode), inputs[name]), third_derivatives(value("reference"), inputs[name]), strict=True
    ):
        assert want.abs().max() > 1e-3
        assert_close(have, want, scale=1e3)


def test_third_derivatives_of_selective_logps():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    labels = torch.tensor([3, -100, 8, 0])
    plain = third_derivatives(lambda z: reference.selective_logps(z, labels, 1.0, -100).square().sum(), logits)
    with use_tiles():
        ours = third_derivatives(lambda z: selective_logps(z, labels).square().sum(), logits)
    for have, want in zip(ours, plain, strict=True):
        assert_close(have, want, scale=1e2)


def test_dual_numbers():
    """Forward-mode differentiation without a transform: the reference computes the tangent."""
    head = small_head()
    tangent = torch.ones_like(head.hidden)
    logits = head.hidden @ head.weight.T + head.bias

    def directional(function, x, direction):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent

    def plain(hidden):
        log_p = (hidden @ head.weight.T + head.bias).log_softmax(-1)
        return log_p.gather(1, head.labels.clamp(min=0).unsqueeze(1)).squeeze(1) * head.counts

    wanted = torch.func.jvp(plain, (head.hidden,), (tangent,))[1]
    ours = directional(lambda h: linear_logps(h, head.weight, head.labels, bias=head.bias), head.hidden, tangent)
    assert_close(ours, wanted, scale=10.0)
    selected = directional(lambda z: selective_logps(z, head.labels), logits, tangent @ head.weight.T)
    assert_close(selected, wanted, scale=10.0)


@pytest.mark.unchecked
@pytest.mark.parametrize("transform", ["jvp", "grad", "hessian"])
def test_compiled_transforms(transform):
    """The reference is taken inside a transform while compiling too."""
    head = small_head()

    def value(h):
        return linear_logps(h, head.weight, head.labels).square().sum()

    calls = {
        "jvp": lambda h: torch.func.jvp(value, (h,), (torch.ones_like(h),))[1],
        "grad": torch.func.grad(value),
        "hessian": torch.func.hessian(value),
    }
    torch._dynamo.reset()
    compiled = torch.compile(calls[transform], backend="aot_eager", fullgraph=True)
    expected = calls[transform](head.hidden)
    assert expected.abs().max() > 0.1
    assert_close(compiled(head.hidden), expected, scale=100.0)


@pytest.mark.parametrize("ignored", [False, True])
def test_results_may_be_changed_in_place(ignored):
    """Whether rows are ignored or not, and with the right gradient after."""
    head = small_head()
    labels = head.labels.clone()
    if ignored:
        labels[0] = -100
    factor = torch.arange(1.0, len(labels) + 1, dtype=torch.float64)

    def gradients(change) -> list[Tensor]:
        inputs = head.inputs("hidden", "weight")
        logits = (head.hidden @ head.weight.T).requires_grad_()
        outputs = (
            *linear_logps(inputs["hidden"], inputs["weight"], labels, return_entropy=True),
            selective_logps(logits, labels),
        )
        outputs = [change(x) for x in outputs]
        return list(torch.autograd.grad(sum(x.sum() for x in outputs), [inputs["hidden"], inputs["weight"], logits]))

    for have, want in zip(gradients(lambda x: x.mul_(factor)), gradients(lambda x: x * factor), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_meta_tensors_have_shapes_alone(backend):
    hidden, weight = torch.zeros(4, 3, device="meta"), torch.zeros(6, 3, device="meta")
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    assert linear_logps(hidden, weight, labels, backend=backend).shape == (4,)
    assert selective_logps(torch.zeros(4, 6, device="meta"), labels).shape == (4,)
