"""The family of losses under torch.func, torch.compile and odd memory layouts."""

import functools

import pytest
import torch
from torch import Tensor

from exo_toy import losses
from exo_toy.losses import LOSSES
from tests.loss_laws import LOGPS, NEGATIVE, arguments, per_example
from tests.tolerances import assert_close

# torch's own: its forward-mode rules are compiled by the deprecated torch.jit on first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

by_name = pytest.mark.parametrize("name", LOSSES)


def split(name: str) -> tuple[list[int], list[Tensor]]:
    """Where the floating-point arguments stand, and all arguments."""
    tensors = list(arguments(name))
    return [index for index, x in enumerate(tensors) if x.is_floating_point()], tensors


def call(name: str, *tensors: Tensor) -> Tensor:
    return per_example(LOSSES[name].function(*tensors, **LOSSES[name].settings))


def gradients(name: str) -> tuple[Tensor, ...]:
    """By autograd."""
    places, tensors = split(name)
    leaves = [x.clone().requires_grad_() if i in places else x for i, x in enumerate(tensors)]
    return torch.autograd.grad(call(name, *leaves).sum(), [leaves[i] for i in places])


@by_name
def test_func_grad(name):
    places, tensors = split(name)
    ours = torch.func.grad(lambda *x: call(name, *x).sum(), argnums=tuple(places))(*tensors)
    for gradient, wanted in zip(ours, gradients(name), strict=True):
        assert_close(gradient, wanted)


@by_name
def test_jvp(name):
    places, tensors = split(name)
    tangents = tuple(tensors[i].cos() for i in places)

    def function(*values):
        changed = list(tensors)
        for i, value in zip(places, values, strict=True):
            changed[i] = value
        return call(name, *changed).sum()

    value, derivative = torch.func.jvp(function, tuple(tensors[i] for i in places), tangents)
    assert_close(value, call(name, *tensors).sum())
    assert_close(derivative, sum((g * t).sum() for g, t in zip(gradients(name), tangents, strict=True)), scale=100.0)


@by_name
def test_vmap_is_a_loop(name):
    _, tensors = split(name)
    stacked = [torch.stack([x, x.flip(0), x.roll(1, 0)]) for x in tensors]
    mapped = torch.func.vmap(functools.partial(call, name))(*stacked)
    looped = torch.stack([call(name, *rows) for rows in zip(*stacked, strict=True)])
    assert_close(mapped, looped)


def compiled(function, **kwargs):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **kwargs)


# Of pairs and of single completions one each; the others, whose checks are the same, with the slow tests.
QUICK = {"ipo", "kto"}
compiled_names = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LOSSES]


@pytest.mark.unchecked
@pytest.mark.parametrize("name", compiled_names)
def test_compiled(name):
    """Value and gradients, by the backend that traces both but needs no C compiler."""
    record = LOSSES[name]
    places, tensors = split(name)
    leaves = [x.clone().requires_grad_() if i in places else x for i, x in enumerate(tensors)]
    value = per_example(compiled(record.function)(*leaves, **record.settings))
    assert_close(value, call(name, *tensors))
    ours = torch.autograd.grad(value.sum(), [leaves[i] for i in places])
    for gradient, wanted in zip(ours, gradients(name), strict=True):
        assert_close(gradient, wanted)


@pytest.mark.unchecked
def test_compiled_modifiers():
    """Robust and smoothed losses are one function with other weights."""
    scored = losses.scored(losses.ipo_loss, score=losses.jensen_shannon_score)
    loss = losses.robust(scored, label_smoothing=0.2)
    assert_close(compiled(loss)(*LOGPS, beta=0.5).losses, loss(*LOGPS, beta=0.5).losses)


@pytest.mark.unchecked
def test_compiled_functions_of_tokens():
    tokens, mask = torch.stack(LOGPS[:2]), torch.tensor([[True, True, False], [True, True, True]])
    for function, tensors, settings in [
        (losses.length_desensitized, (tokens, mask, torch.tensor([1, 2])), {"alpha": 0.4}),
        (losses.wpo_weights, (tokens, mask), {}),
        (losses.length_normalized, (tokens[0], torch.tensor([1, 2, 3])), {}),
        (losses.kto_reference_point, (LOGPS[0], LOGPS[2]), {}),
    ]:
        assert_close(compiled(function)(*tensors, **settings), function(*tensors, **settings))


@by_name
def test_no_argument_is_changed(name):
    places, tensors = split(name)
    leaves = [x.clone().requires_grad_() if i in places else x.clone() for i, x in enumerate(tensors)]
    call(name, *leaves).sum().backward()
    for leaf, original in zip(leaves, tensors, strict=True):
        assert torch.equal(leaf, original)
        assert leaf._version == 0


@by_name
def test_every_argument_gets_a_gradient(name):
    """No hidden detach: rewards, values and references are treated like the policy."""
    for gradient in gradients(name):
        assert gradient.abs().sum() > 0


@by_name
def test_memory_layout_does_not_matter(name):
    _, tensors = split(name)
    strided = [torch.stack([x, x], -1)[..., 0] for x in tensors]
    assert not strided[0].is_contiguous()
    assert_close(call(name, *strided), call(name, *tensors))


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")  # torch's own
def test_per_example_hessian():
    """Forward over reverse, as influence computations have it, of a loss with branches."""

    def one(chosen, rejected):
        orpo = losses.orpo_loss(chosen[None], rejected[None], torch.tensor([3]), torch.tensor([2]), odds_weight=0.3)
        return orpo.losses[0]

    mapped = torch.func.vmap(torch.func.hessian(one))(*NEGATIVE)
    for chosen, rejected, wanted in zip(*NEGATIVE, mapped, strict=True):
        twice = torch.autograd.functional.hessian(lambda x, rejected=rejected: one(x, rejected), chosen)
        assert_close(wanted, twice)
