"""Every refusal of the kernels: an error that names the argument, what it was and what is allowed."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from exo_toy.kernels import candidate_log_ratios, linear_logps, selective_logps, sequence_logps
from exo_toy.kernels import selective as selective_module
from exo_toy.kernels import tiled as tiled_module
from tests import kernel_strategies as kernels

pytestmark = pytest.mark.unchecked

INF, NAN = math.inf, math.nan
backends = pytest.mark.parametrize("backend", [None, "reference", "tiled"])


def refuses(call: Callable, error: type[Exception] = ValueError, **arguments) -> str:
    with pytest.raises(error) as refusal:
        call(**arguments)
    return str(refusal.value)


def linear(**changed) -> dict[str, Any]:
    """n = 3, d = 2, V = 5."""
    return {
        "hidden": torch.zeros(3, 2),
        "weight": torch.zeros(5, 2),
        "labels": torch.tensor([0, 4, -100]),
        "bias": torch.zeros(5),
        **changed,
    }


def selective(**changed) -> dict[str, Any]:
    return {"logits": torch.zeros(3, 5), "labels": torch.tensor([0, 4, -100]), **changed}


def sequences(**changed) -> dict[str, Any]:
    return {"token_logps": torch.zeros(4, 3), "mask": torch.ones(4, 3, dtype=torch.bool), **changed}


def candidates(**changed) -> dict[str, Any]:
    return {
        "policy_token_logps": torch.zeros(4, 3),
        "ref_token_logps": torch.zeros(4, 3),
        "mask": torch.ones(4, 3, dtype=torch.bool),
        "k": 2,
        **changed,
    }


@backends
def test_the_unchanged_arguments_are_accepted(backend):
    assert linear_logps(**linear(backend=backend)).shape == (3,)
    assert linear_logps(**linear(bias=None, softcap=3, temperature=2, backend=backend)).shape == (3,)
    assert selective_logps(**selective()).shape == (3,)
    assert sequence_logps(**sequences()).shape == (4,)
    assert candidate_log_ratios(**candidates()).shape == (2, 2)


# Labels


@backends
@pytest.mark.parametrize("value", [5, -1, -101, 2**40])
def test_labels_out_of_range(backend, value):
    labels = torch.tensor([[0, 4], [value, -100]])
    message = refuses(linear_logps, **linear(hidden=torch.zeros(2, 2, 2), labels=labels, backend=backend))
    assert message == f"labels must be in [0, 5) (V tokens) or ignore_index, -100; got {value} at index [2]"
    message = refuses(selective_logps, **selective(logits=torch.zeros(2, 2, 5), labels=labels))
    assert message == f"labels must be in [0, 5) (V tokens) or ignore_index, -100; got {value} at index [2]"


@backends
def test_the_usual_ignored_label_is_out_of_range_where_another_is_ignored(backend):
    message = refuses(linear_logps, **linear(ignore_index=0, backend=backend))
    assert message == "labels must be in [0, 5) (V tokens) or ignore_index, 0; got -100 at index [2]"
    message = refuses(selective_logps, **selective(ignore_index=-1))
    assert message == "labels must be in [0, 5) (V tokens) or ignore_index, -1; got -100 at index [2]"
    labels = torch.tensor([7, 7, 4])
    assert linear_logps(**linear(labels=labels, ignore_index=7, backend=backend))[:2].tolist() == [0.0, 0.0]


def test_labels_out_of_range_inside_the_operators():
    """Forward and backward look at what they index with, whoever calls them."""
    hidden, weight, logits, rows = torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(3, 5), torch.ones(3)
    labels, empty, sizes = torch.tensor([0, 5, 1]), torch.zeros(0), list(kernels.SMALL)
    calls = [
        lambda: tiled_module.forward(
            hidden, weight, labels, None, None, 1.0, -100, False, False, 0, sizes, "torch", None
        ),
        lambda: tiled_module.backward(
            rows, None, hidden, weight, labels, None, rows, empty, rows, empty, empty, empty, empty,
            None, 1.0, -100, False, [True, True, False], sizes, "torch", None,
        ),
        lambda: selective_module.forward(logits, labels, 1.0, -100, sizes, "torch"),
        lambda: selective_module.backward(rows, logits, labels, rows, rows, 1.0, -100, sizes, "torch"),
    ]  # fmt: skip
    for call in calls:
        message = refuses(call)
        assert message == "labels must be in [0, 5) (V tokens) or ignore_index, -100; got 5 at index [1]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64, torch.float64], ids=str)
def test_labels_of_another_dtype(dtype):
    for call, arguments in [(linear_logps, linear()), (selective_logps, selective())]:
        arguments["labels"] = torch.zeros(3, dtype=dtype)
        assert refuses(call, **arguments) == f"labels must be a tensor of an integer dtype; got {dtype}"


@pytest.mark.parametrize("value", [[0, 1, 2], np.zeros(3, dtype=np.int64), None, 3], ids=["list", "array", "None", "3"])
def test_labels_that_are_no_tensors(value):
    for call, arguments in [(linear_logps, linear(labels=value)), (selective_logps, selective(labels=value))]:
        message = refuses(call, **arguments)
        assert message == f"labels must be a tensor of an integer dtype; got {type(value).__name__}"


# Numbers

BAD_TEMPERATURES = [0, 0.0, -1.0, NAN, INF, -INF, True, "1", None, 1j]


@backends
@pytest.mark.parametrize("value", BAD_TEMPERATURES, ids=repr)
def test_temperatures(backend, value):
    wanted = rf"temperature must be a finite number above 0.*; got {re.escape(repr(value))}$"
    assert re.match(wanted, refuses(linear_logps, **linear(temperature=value, backend=backend)))
    assert re.match(wanted, refuses(selective_logps, **selective(temperature=value)))


@pytest.mark.parametrize("value", [value for value in BAD_TEMPERATURES if value is not None], ids=repr)
def test_softcaps(value):
    message = refuses(linear_logps, **linear(softcap=value))
    assert re.match(rf"softcap must be a finite number above 0.*; got {re.escape(repr(value))}$", message)


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.ones(3)], ids=["scalar", "vector"])
def test_numbers_that_are_tensors(value):
    for name in ("temperature", "softcap"):
        message = refuses(linear_logps, **linear(**{name: value}))
        assert message.startswith(f"{name} must be a finite number above 0 (a Python number); got tensor(")
    message = refuses(selective_logps, **selective(temperature=value))
    assert message.startswith("temperature must be a finite number above 0 (a Python number); got tensor(")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_beyond_the_dtype_of_the_sums(dtype):
    head = {name: torch.zeros(shape, dtype=dtype) for name, shape in (("hidden", (3, 2)), ("weight", (5, 2)))}
    for name, value in [("temperature", 1e-40), ("temperature", 1e39), ("softcap", 1e-40)]:
        message = refuses(linear_logps, **linear(**head, bias=None, **{name: value}))
        assert message == f"{name} must be in [1.18e-38, 8.51e+37] to be computed in torch.float32; got {value!r}"
    message = refuses(selective_logps, **selective(logits=torch.zeros(3, 5, dtype=dtype), temperature=1e-40))
    assert message == "temperature must be in [1.18e-38, 8.51e+37] to be computed in torch.float32; got 1e-40"
    wide = {name: value.double() for name, value in head.items()}
    assert linear_logps(**linear(**wide, bias=None, temperature=1e-40)).shape == (3,)


@pytest.mark.parametrize("value", [-1, True, False, 1.0, 1e9, "1", None, NAN, 2**63], ids=repr)
def test_save_budgets(value):
    message = refuses(linear_logps, **linear(save_budget=value))
    assert message.startswith("save_budget must be an integer ")
    assert message.endswith(f"; got {value!r}")


@pytest.mark.parametrize("value", [True, 1.0, "1", None, NAN, torch.tensor(1), 2**63, -(2**63) - 1], ids=repr)
def test_ignored_labels(value):
    for call, arguments in [(linear_logps, linear), (selective_logps, selective)]:
        message = refuses(call, **arguments(ignore_index=value))
        assert message.startswith("ignore_index must be an integer ")
        assert message.endswith(f"; got {value!r}")


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None, torch.tensor(2)], ids=repr)
def test_numbers_of_candidates(value):
    assert refuses(candidate_log_ratios, **candidates(k=value)) == f"k must be an integer of at least 1; got {value!r}"


def test_candidates_that_do_not_divide_the_rows():
    for value in (3, 5, 8):
        message = refuses(candidate_log_ratios, **candidates(k=value))
        assert message == f"k must divide the number of rows, 4; got {value}"


# Backends


@pytest.mark.parametrize("value", ["foo", "", "Tiled", 1, True], ids=repr)
def test_backends(value):
    message = refuses(linear_logps, **linear(backend=value))
    assert message == f'backend must be None, "reference", "tiled" or "triton"; got {value!r}'


def test_triton_without_cuda(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = refuses(linear_logps, RuntimeError, **linear(backend="triton"))
    assert message.startswith('backend="triton" needs CUDA tensors')
    assert message.endswith("got cpu")


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refuses(linear_logps, RuntimeError, **linear(backend="triton"))
    assert message == 'backend="triton" needs the package triton, which is not installed'


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_backends_under_a_transform(backend):
    def call(hidden):
        return linear_logps(**linear(hidden=hidden, backend=backend)).sum()

    with pytest.raises(ValueError) as refusal:
        torch.func.grad(call)(torch.zeros(3, 2))
    message = str(refusal.value)
    assert message.startswith('inside a torch.func transform backend must be None or "reference"')
    assert f"got backend {backend!r}" in message


# Shapes: nothing broadcasts


@backends
@pytest.mark.parametrize("shape", [(), (2,), (4,), (1,), (3, 1), (1, 3), (3, 2)], ids=str)
def test_labels_of_another_shape(backend, shape):
    labels = torch.zeros(shape, dtype=torch.int64)
    message = refuses(linear_logps, **linear(labels=labels, backend=backend))
    assert message == f"labels must have hidden's leading shape [3]; got {list(shape)} (nothing is broadcast)"
    message = refuses(selective_logps, **selective(labels=labels))
    assert message == f"labels must have the leading shape of logits, [3]; got {list(shape)} (nothing is broadcast)"


@pytest.mark.parametrize("shape", [(), (3,), (3, 1), (3, 5), (0,)], ids=str)
def test_hidden_of_another_shape(shape):
    message = refuses(linear_logps, **linear(hidden=torch.zeros(shape)))
    assert message == f"hidden must have shape [..., d] with weight's d, 2; got {list(shape)}"


@pytest.mark.parametrize("shape", [(), (5,), (0, 2), (5, 2, 1)], ids=str)
def test_weight_of_another_shape(shape):
    message = refuses(linear_logps, **linear(weight=torch.zeros(shape)))
    assert message == f"weight must have shape [V, d] with V at least 1; got {list(shape)}"


@pytest.mark.parametrize("shape", [(), (1,), (4,), (5, 1), (1, 5), (3,)], ids=str)
def test_bias_of_another_shape(shape):
    message = refuses(linear_logps, **linear(bias=torch.zeros(shape)))
    assert message == f"bias must have shape [V] with weight's V, 5; got {list(shape)}"


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_logits_of_another_shape(shape):
    message = refuses(selective_logps, **selective(logits=torch.zeros(shape)))
    assert message == f"logits must have shape [..., V] with V at least 1; got {list(shape)}"


@pytest.mark.parametrize("shape", [(), (4,), (1, 3), (4, 1), (3, 4), (4, 3, 1)], ids=str)
def test_sequences_of_another_shape(shape):
    """[N, T] against [N, 1] would broadcast, and count each token T times."""
    message = refuses(sequence_logps, **sequences(mask=torch.ones(shape, dtype=torch.bool)))
    assert message.startswith("mask must have ") and f"got {list(shape)}" in message
    for name in ("ref_token_logps", "mask"):
        value = torch.ones(shape, dtype=torch.bool if name == "mask" else torch.float32)
        message = refuses(candidate_log_ratios, **candidates(**{name: value}))
        assert message.startswith(f"{name} must have ") and f"got {list(shape)}" in message


# Dtypes and devices


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_tensors_that_are_not_floating(dtype):
    calls = [
        (linear_logps, linear, ["hidden", "weight", "bias"]),
        (selective_logps, selective, ["logits"]),
        (sequence_logps, sequences, ["token_logps"]),
        (candidate_log_ratios, candidates, ["policy_token_logps", "ref_token_logps"]),
    ]
    for call, arguments, names in calls:
        for name in names:
            message = refuses(call, **arguments(**{name: arguments()[name].to(dtype)}))
            assert message == f"{name} must have a floating-point dtype; got {dtype}"
            message = refuses(call, **arguments(**{name: arguments()[name].tolist()}))
            assert message == f"{name} must be a torch.Tensor; got list"


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_masks_that_are_not_boolean(dtype):
    for call, arguments in [(sequence_logps, sequences), (candidate_log_ratios, candidates)]:
        message = refuses(call, **arguments(mask=torch.ones(4, 3, dtype=dtype)))
        assert message == f"mask must be a torch.bool tensor, True where the entry counts; got {dtype}"


@backends
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_mixed_dtypes(backend, name):
    """A float32 head over bfloat16 hidden states is cast by the caller, who knows which of the two is meant."""
    arguments = linear(backend=backend)
    arguments[name] = arguments[name].bfloat16()
    message = refuses(linear_logps, **arguments)
    assert message.startswith("hidden, weight and bias must have one dtype; got hidden ")
    assert "torch.bfloat16" in message and "torch.float32" in message
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_logps(**arguments).dtype == torch.float32


@pytest.mark.parametrize("name", ["weight", "labels", "bias"])
def test_tensors_on_another_device(name):
    message = refuses(linear_logps, **linear(**{name: linear()[name].to("meta")}))
    assert message == f"{name} must be on the device of hidden, cpu; got meta"


def test_other_tensors_on_another_device():
    message = refuses(selective_logps, **selective(labels=selective()["labels"].to("meta")))
    assert message == "labels must be on the device of logits, cpu; got meta"
    message = refuses(sequence_logps, **sequences(mask=sequences()["mask"].to("meta")))
    assert message == "mask must be on the device of token_logps, cpu; got meta"
    for name in ("ref_token_logps", "mask"):
        message = refuses(candidate_log_ratios, **candidates(**{name: candidates()[name].to("meta")}))
        assert message == f"{name} must be on the device of policy_token_logps, cpu; got meta"
