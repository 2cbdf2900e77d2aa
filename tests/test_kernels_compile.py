"""The kernels under torch.compile, and what torch checks of a registered operator."""

import pytest
import torch
from torch import Tensor

from exo_toy.kernels import candidate_log_ratios, linear_logps, selective_logps, sequence_logps
from exo_toy.kernels import selective as selective_module
from exo_toy.kernels import tiled as tiled_module
from exo_toy.losses import exo_rw_loss
from tests import kernel_strategies as kernels
from tests.kernel_strategies import random_head, use_tiles
from tests.tolerances import assert_close

# Tracing, with symbolic sizes, is nothing that the checks of annotations understand.
pytestmark = pytest.mark.unchecked

SIZES = list(kernels.SMALL)
N_VOCAB, WIDTH, K = 11, 6, 3


def compiled(function, **kwargs):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **kwargs)


def batch(n_prompts: int, n_tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """K candidates a prompt; labels are ignored outside the completion."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_prompts * K, n_tokens)
    mask = torch.rand(shape, generator=generator) < 0.7
    return {
        "features": torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64),
        "labels": torch.randint(N_VOCAB, shape, generator=generator).masked_fill(~mask, -100),
        "mask": mask,
        "ref": -torch.rand(shape, generator=generator, dtype=torch.float64),
        "rewards": torch.rand(n_prompts, K, generator=generator, dtype=torch.float64),
    }


class Step(torch.nn.Module):
    """A layer, the head, and EXO-rw on top."""

    def __init__(self, **options) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in {"layer": (WIDTH, WIDTH), "head": (N_VOCAB, WIDTH), "bias": (N_VOCAB,)}.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, torch.nn.Parameter(value))
        self.selective, self.frozen = options.pop("selective", False), options.pop("frozen", False)
        self.options = options
        self.head.requires_grad_(not self.frozen)
        self.bias.requires_grad_(not self.frozen)

    def forward(self, features: Tensor, labels: Tensor, mask: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
        hidden = (features @ self.layer).tanh()
        if self.selective:
            logps = selective_logps(hidden @ self.head.mT + self.bias, labels, temperature=0.7)
        else:
            logps = linear_logps(hidden, self.head, labels, bias=self.bias, temperature=0.7, **self.options)
        entropy = 0.0
        if isinstance(logps, tuple):
            logps, entropies = logps
            entropy = sequence_logps(entropies, mask).mean()
        ratios = candidate_log_ratios(logps, ref, mask, K)
        return exo_rw_loss(ratios, rewards, beta_pi=0.5, beta_r=1.5).mean() - 0.01 * entropy


STEPS = {
    "recompute": {},
    "kept": {"save_budget": kernels.ALL},
    "frozen": {"frozen": True},
    "frozen, entropy": {"frozen": True, "return_entropy": True},
    "entropy, cap": {"return_entropy": True, "softcap": 3.0},
    "reference": {"backend": "reference"},
    "selective": {"selective": True},
}


def run(step, module: Step, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The loss and the parameters' gradients."""
    module.zero_grad()
    loss = step(**inputs)
    loss.backward()
    return [loss.detach(), *(p.grad for p in module.parameters() if p.requires_grad)]


def assert_compiled_agrees(options: dict, **how) -> None:
    module = Step(**options)
    with use_tiles():
        step = compiled(module, **how)
        inputs = batch(2, 5)
        for actual, expected in zip(run(step, module, inputs), run(module, module, inputs), strict=True):
            assert_close(actual, expected)
        with torch.no_grad():
            assert_close(step(**inputs), module(**inputs))


@pytest.mark.parametrize("name", STEPS)
def test_compiled_training_step(name):
    """With the backend that traces forward and backward but needs no C compiler; fullgraph forbids graph breaks."""
    assert_compiled_agrees(STEPS[name], backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_by_the_default_backend(name):
    assert_compiled_agrees(STEPS[name])


@pytest.mark.parametrize("name", ["recompute", "kept", "frozen, entropy", "reference", "selective"])
def test_compiled_for_any_batch(name):
    """Compiled once for all numbers of prompts and tokens, also where the number of labels that count changes."""
    module = Step(**STEPS[name])
    step = compiled(module, backend="aot_eager")
    stances = ["default", "fail_on_recompile", "fail_on_recompile", "fail_on_recompile"]
    with use_tiles():
        for stance, sizes in zip(stances, [(2, 5), (4, 7), (3, 2), (7, 3)], strict=True):
            inputs = batch(*sizes, seed=sum(sizes))
            for argument, value in inputs.items():
                torch._dynamo.mark_dynamic(value, 0)
                if argument != "rewards":
                    torch._dynamo.mark_dynamic(value, 1)
            with torch.compiler.set_stance(stance):
                results = run(step, module, inputs)
            for actual, expected in zip(results, run(module, module, inputs), strict=True):
                assert_close(actual, expected)


@pytest.mark.parametrize("name", ["recompute", "frozen, entropy", "selective"])
def test_what_is_compiled_is_the_operator(name):
    """Not the reference, which agrees with it."""
    graphs = []

    def backend(module, _):
        graphs.append(str(module.graph))
        return module.forward

    with use_tiles():
        compiled(Step(**STEPS[name]), backend=backend)(**batch(2, 5))
    operator = "exo_toy.selective_logps" if name == "selective" else "exo_toy.linear_logps"
    assert operator in graphs[0]


def test_compiled_checks_still_run():
    step = torch.compile(lambda h, w, y: linear_logps(h, w, y), backend="aot_eager")
    hidden, weight = torch.zeros(3, 2), torch.zeros(5, 2)
    with pytest.raises(ValueError, match="labels must have hidden's leading shape"):
        step(hidden, weight, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\) .*; got 7 at index \[1\]"):
        step(hidden, weight, torch.tensor([0, 7, -100]))


# What torch checks of an operator: schema, no aliasing, fake results, autograd, dispatch with dynamic shapes


def check(operator, *arguments, **changed) -> None:
    results = torch.library.opcheck(operator, arguments, changed)
    assert set(results.values()) == {"SUCCESS"}, results


def forward_arguments(**options) -> dict:
    """Of the operator; two of seven rows ignored, none where tiles are kept: what they leave free holds anything."""
    head = random_head(7, n_vocab=N_VOCAB, width=WIDTH, dtype=options.pop("dtype", torch.float64))
    labels = head.labels.clone()
    if not options.get("save_budget"):
        labels[[1, 4]] = -100
    frozen = options.get("frozen", False)
    return {
        "hidden": head.hidden.requires_grad_(),
        "weight": head.weight.requires_grad_(not frozen),
        "labels": labels,
        "bias": None if options.pop("no_bias", False) else head.bias.requires_grad_(not frozen),
        "softcap": None,
        "temperature": 1.0,
        "ignore_index": -100,
        "entropy": False,
        "frozen": False,
        "save_budget": 0,
        "sizes": SIZES,
        "passes": "torch",
        "group": None,
        **options,
    }


OPTIONS = [
    {},
    {"no_bias": True, "softcap": 2.0, "temperature": 0.7, "dtype": torch.bfloat16},
    {"entropy": True, "softcap": 2.0},
    {"save_budget": kernels.ALL},
    {"save_budget": 8 * 4 * 8, "dtype": torch.float32},
    {"frozen": True, "entropy": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_opcheck_of_linear_logps(options):
    check(tiled_module.forward, **forward_arguments(**dict(options)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False]], ids=str)
def test_opcheck_of_its_backward(options, wanted):
    arguments = forward_arguments(**dict(options))
    logps, entropies, *saved = (x.detach() for x in tiled_module.forward(**arguments))
    entropy, frozen = arguments.pop("entropy"), arguments["frozen"]
    arguments.pop("save_budget")
    tensors = [arguments.pop(name) for name in ("hidden", "weight", "labels", "bias")]
    grad_logps = torch.linspace(1, 2, 7, dtype=logps.dtype, requires_grad=True)
    grad_entropies = torch.linspace(2, 1, 7, dtype=logps.dtype, requires_grad=True) if entropy else None
    if frozen:
        wanted = [True, False, False]
    wanted[2] = wanted[2] and tensors[3] is not None
    check(
        tiled_module.backward, grad_logps, grad_entropies, *tensors, logps, entropies, *saved, **arguments,
        wanted=wanted,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_of_selective_logps(dtype):
    logits = random_head(7, n_vocab=N_VOCAB, width=N_VOCAB, dtype=dtype).hidden.requires_grad_()
    labels = torch.tensor([0, -100, 10, 3, -100, 5, 6])
    options = 0.7, -100, SIZES, "torch"
    check(selective_module.forward, logits, labels, *options)
    logps, lse = selective_module.forward(logits.detach(), labels, *options)
    grad_logps = torch.linspace(1, 2, 7, dtype=lse.dtype, requires_grad=True)
    check(selective_module.backward, grad_logps, logits, labels, logps, lse, *options)
