"""The four losses under torch.func, torch.compile, odd memory layouts, and as an import of their own."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.losses import dpo_loss, dpo_rw_loss, exo_pref_loss, exo_rw_loss
from tests import strategies
from tests.tolerances import assert_close

# torch's own: its forward-mode rules are compiled by the deprecated torch.jit on first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

LISTWISE, PAIRWISE = [exo_rw_loss, dpo_rw_loss], [exo_pref_loss, dpo_loss]
listwise = pytest.mark.parametrize("loss", LISTWISE, ids=lambda loss: loss.__name__)
pairwise = pytest.mark.parametrize("loss", PAIRWISE, ids=lambda loss: loss.__name__)

LOG_RATIO = torch.tensor([[0.3, -1.2, 0.5], [2.0, 0.1, -0.4]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, 0.2, -0.7], [0.0, 0.6, 0.3]], dtype=torch.float64)
MASK = torch.tensor([[True, False, True], [True, True, True]])
LOGPS = tuple(torch.tensor([[-1.0, -2.0, 0.5], [-1.5, 0.3, -0.7], [0.1, 0.2, -0.9], [-2.0, -1.1, 0.4]]).double())
TEMPERATURES = {"beta_pi": 0.7, "beta_r": 1.3}


def gradients(function, *arguments: Tensor) -> tuple[Tensor, ...]:
    arguments = tuple(argument.clone().requires_grad_() for argument in arguments)
    return torch.autograd.grad(function(*arguments).sum(), arguments)


# torch.func


@listwise
@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
def test_func_grad_of_list_losses(loss, mask):
    def total(log_ratio, rewards):
        return loss(log_ratio, rewards, mask=mask, **TEMPERATURES).sum()

    expected = gradients(total, LOG_RATIO, REWARDS)
    for gradient, wanted in zip(torch.func.grad(total, argnums=(0, 1))(LOG_RATIO, REWARDS), expected, strict=True):
        assert_close(gradient, wanted)


@pairwise
def test_func_grad_of_pair_losses(loss):
    def total(*logps):
        return loss(*logps, beta=0.4, label_smoothing=0.1).losses.sum()

    expected = gradients(total, *LOGPS)
    for gradient, wanted in zip(torch.func.grad(total, argnums=(0, 1, 2, 3))(*LOGPS), expected, strict=True):
        assert_close(gradient, wanted)


@listwise
@given(data=st.data())
def test_vmap_of_list_losses_is_a_loop(loss, data):
    n_outer, batch, n_candidates = data.draw(strategies.sizes(3, low=2))
    shape = (n_outer, batch, n_candidates)
    log_ratio, rewards = (data.draw(strategies.tensors(shape, -5.0, 5.0)) for _ in range(2))
    mask = data.draw(strategies.masks(shape))

    def call(log_ratio, rewards, mask):
        return loss(log_ratio, rewards, mask=mask, **TEMPERATURES)

    looped = torch.stack([call(*arguments) for arguments in zip(log_ratio, rewards, mask, strict=True)])
    assert_close(torch.func.vmap(call)(log_ratio, rewards, mask), looped)
    # Rewards shared by all, as for several policies on the same candidates; no mask.
    shared = torch.func.vmap(lambda values: loss(values, rewards[0], **TEMPERATURES))(log_ratio)
    assert_close(shared, torch.stack([loss(values, rewards[0], **TEMPERATURES) for values in log_ratio]))


@pairwise
def test_vmap_of_pair_losses_is_a_loop(loss):
    batches = [torch.stack([logps, 2 * logps]) for logps in LOGPS]
    mapped = torch.func.vmap(lambda *logps: loss(*logps, beta=0.4))(*batches)
    looped = [loss(*logps, beta=0.4) for logps in zip(*batches, strict=True)]
    for values, wanted in zip(mapped, zip(*looped, strict=True), strict=True):
        assert_close(values, torch.stack(wanted))


def test_vmap_over_label_probabilities():
    eps = torch.tensor([[0.1, 0.2, 0.7], [0.4, 0.5, 0.6]], dtype=torch.float64)
    mapped = torch.func.vmap(lambda row: exo_pref_loss(*LOGPS, beta=0.4, label_smoothing=row).losses)(eps)
    looped = torch.stack([exo_pref_loss(*LOGPS, beta=0.4, label_smoothing=row).losses for row in eps])
    assert_close(mapped, looped)


@listwise
def test_jvp_of_list_losses(loss):
    def call(log_ratio, rewards):
        return loss(log_ratio, rewards, mask=MASK, **TEMPERATURES)

    tangents = REWARDS * 0.3 + 1, LOG_RATIO * 0.7 - 1
    value, derivative = torch.func.jvp(call, (LOG_RATIO, REWARDS), tangents)
    assert_close(value, call(LOG_RATIO, REWARDS))
    by_rows = sum((g * t).sum(-1) for g, t in zip(gradients(call, LOG_RATIO, REWARDS), tangents, strict=True))
    assert_close(derivative, by_rows)


@pairwise
def test_jvp_of_pair_losses(loss):
    def call(*logps):
        return loss(*logps, beta=0.4, label_smoothing=0.1).losses

    tangents = tuple(logps.cos() for logps in LOGPS)
    _, derivative = torch.func.jvp(call, LOGPS, tangents)
    assert_close(derivative, sum(g * t for g, t in zip(gradients(call, *LOGPS), tangents, strict=True)))


@listwise
def test_per_example_gradients_and_hessian(loss):
    """vmap of grad, and forward over reverse: what influence and curvature computations use."""

    def one(log_ratio, rewards):
        return loss(log_ratio[None], rewards[None], **TEMPERATURES)[0]

    per_example = torch.func.vmap(torch.func.grad(one))(LOG_RATIO, REWARDS)
    assert_close(per_example, gradients(lambda f, r: loss(f, r, **TEMPERATURES), LOG_RATIO, REWARDS)[0])
    hessian = torch.func.vmap(torch.func.hessian(one))(LOG_RATIO, REWARDS)
    for row, rewards, wanted in zip(LOG_RATIO, REWARDS, hessian, strict=True):
        reverse_twice = torch.autograd.functional.hessian(lambda f, rewards=rewards: one(f, rewards), row)
        assert_close(wanted, reverse_twice)


# torch.compile. The backend that traces forward and backward but needs no C compiler.


def compiled(function, **kwargs):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **kwargs)


def assert_compiled_agrees(function, plain, arguments, keywords):
    """Every output and every gradient of the compiled loss."""
    for value, wanted in zip(function(*arguments, **keywords), plain(*arguments, **keywords), strict=True):
        assert_close(value, wanted)
    losses = [lambda *a, call=call: getattr(out := call(*a, **keywords), "losses", out) for call in (function, plain)]
    for gradient, wanted in zip(*(gradients(call, *arguments) for call in losses), strict=True):
        assert_close(gradient, wanted)


@pytest.mark.unchecked
@pytest.mark.parametrize(("mask", "dynamic"), [(None, False), (MASK, True)], ids=["unmasked", "masked-dynamic"])
@listwise
def test_compiled_list_losses(loss, mask, dynamic):
    function = compiled(loss, dynamic=dynamic)
    assert_compiled_agrees(function, loss, (LOG_RATIO, REWARDS), {"mask": mask, **TEMPERATURES})


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("loss", "eps", "dynamic"),
    [
        (exo_pref_loss, 0.1, True),
        (exo_pref_loss, torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64), False),
        (dpo_loss, 0.1, True),
        (dpo_loss, 0.0, False),
    ],
)
def test_compiled_pair_losses(loss, eps, dynamic):
    function = compiled(loss, dynamic=dynamic)
    assert_compiled_agrees(function, loss, LOGPS, {"beta": 0.4, "label_smoothing": eps})


@pytest.mark.slow
@pytest.mark.unchecked
@pytest.mark.parametrize("loss", LISTWISE + PAIRWISE, ids=lambda loss: loss.__name__)
def test_compiled_by_the_default_backend(loss):
    torch._dynamo.reset()
    function = torch.compile(loss, fullgraph=True)
    arguments, keywords = ((LOG_RATIO, REWARDS), TEMPERATURES) if loss in LISTWISE else (LOGPS, {"beta": 0.4})
    assert_compiled_agrees(function, loss, arguments, keywords)


@pytest.mark.unchecked
@listwise
def test_compiled_shape_checks_still_run(loss):
    with pytest.raises(ValueError, match="rewards"):
        torch.compile(loss, backend="aot_eager")(LOG_RATIO, REWARDS[:, :2], **TEMPERATURES)


# Memory


@listwise
def test_list_losses_change_no_argument(loss):
    arguments = LOG_RATIO.clone(), REWARDS.clone(), MASK.clone()
    leaves = arguments[0].requires_grad_(), arguments[1].requires_grad_()
    loss(*leaves, mask=arguments[2], **TEMPERATURES).sum().backward()
    for argument, original in zip(arguments, (LOG_RATIO, REWARDS, MASK), strict=True):
        assert torch.equal(argument, original)
        assert argument._version == 0


@pairwise
def test_pair_losses_change_no_argument(loss):
    arguments = [logps.clone().requires_grad_() for logps in LOGPS]
    loss(*arguments, beta=0.4).losses.sum().backward()
    for argument, original in zip(arguments, LOGPS, strict=True):
        assert torch.equal(argument, original)
        assert argument._version == 0


def test_label_probabilities_are_not_changed():
    eps = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    original = eps.clone()
    exo_pref_loss(*LOGPS, beta=0.4, label_smoothing=eps)
    assert torch.equal(eps, original)
    assert eps._version == 0


@listwise
def test_memory_layout_does_not_matter(loss):
    transposed = LOG_RATIO.t().contiguous().t()
    strided = torch.stack([REWARDS, -REWARDS], -1)[..., 0]
    assert not transposed.is_contiguous() and not strided.is_contiguous()
    assert_close(
        loss(transposed, strided, mask=MASK, **TEMPERATURES), loss(LOG_RATIO, REWARDS, mask=MASK, **TEMPERATURES)
    )
    expanded = REWARDS[:1].expand(2, 3)
    assert_close(loss(LOG_RATIO, expanded, **TEMPERATURES), loss(LOG_RATIO, expanded.clone(), **TEMPERATURES))


@pairwise
def test_interleaved_pairs(loss):
    """Chosen and rejected as every other row of one batch: views with a stride."""
    policy, ref = (torch.stack([chosen, rejected], 1).flatten() for chosen, rejected in (LOGPS[:2], LOGPS[2:]))
    interleaved = loss(policy[::2], policy[1::2], ref[::2], ref[1::2], beta=0.4)
    for value, wanted in zip(interleaved, loss(*LOGPS, beta=0.4), strict=True):
        assert_close(value, wanted)


@listwise
def test_gradients_stop_where_the_caller_stops_them(loss):
    """Rewards and log ratios are treated alike: a gradient flows to whichever asks for one."""
    for needs in [(True, False), (False, True)]:
        leaves = [value.clone().requires_grad_(need) for value, need in zip((LOG_RATIO, REWARDS), needs, strict=True)]
        loss(*leaves, **TEMPERATURES).sum().backward()
        for leaf, need in zip(leaves, needs, strict=True):
            assert (leaf.grad is not None and leaf.grad.abs().sum() > 0) == need


# Import


def test_import_loads_torch_and_jaxtyping_alone():
    code = """
import sys
def loaded(): return {name.split(".")[0] for name in sys.modules}
import exo_toy
assert "torch" not in loaded()
import torch, jaxtyping
before = loaded()
import exo_toy.losses
print(*(loaded() - before))
print(*sorted(name for name in sys.modules if name.startswith("exo_toy.") and ".losses" not in name))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    newly_loaded, own_modules = run.stdout.splitlines()
    assert newly_loaded == ""
    assert own_modules.split() == ["exo_toy.checks", "exo_toy.logspace"]
