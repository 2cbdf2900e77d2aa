"""Every refusal of the four losses: a ValueError that names the argument, what it was and what is allowed."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from exo_toy.losses import dpo_loss, dpo_rw_loss, exo_pref_loss, exo_rw_loss

pytestmark = pytest.mark.unchecked

INF, NAN = math.inf, math.nan
LISTWISE = pytest.mark.parametrize("loss", [exo_rw_loss, dpo_rw_loss], ids=lambda loss: loss.__name__)
PAIRWISE = pytest.mark.parametrize("loss", [exo_pref_loss, dpo_loss], ids=lambda loss: loss.__name__)
LOGPS = ["policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]


def refuses(call: Callable, **arguments) -> str:
    with pytest.raises(ValueError) as refusal:
        call(**arguments)
    return str(refusal.value)


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def list_arguments(**changed) -> dict:
    return {
        "log_ratio": table([0.1, 0.2, 0.3], [0.0, -1.0, 1.0]),
        "rewards": table([1.0, 0.0, 0.5], [0.2, 0.1, 0.0]),
        "beta_pi": 0.5,
        "beta_r": 2.0,
        **changed,
    }


def pair_arguments(**changed) -> dict:
    logps = {name: torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64) for name in LOGPS}
    return {**logps, "beta": 0.1, **changed}


@LISTWISE
def test_the_unchanged_list_arguments_are_accepted(loss):
    assert loss(**list_arguments()).shape == (2,)
    assert loss(**list_arguments(mask=torch.ones(2, 3, dtype=torch.bool))).shape == (2,)


@PAIRWISE
def test_the_unchanged_pair_arguments_are_accepted(loss):
    assert loss(**pair_arguments()).losses.shape == (3,)


# Temperatures

BAD_TEMPERATURES = [0, 0.0, -1, -0.1, NAN, INF, True, False, "0.1", None, 1j]


@LISTWISE
@pytest.mark.parametrize("name", ["beta_pi", "beta_r"])
@pytest.mark.parametrize("value", BAD_TEMPERATURES, ids=repr)
def test_list_temperatures(loss, name, value):
    message = refuses(loss, **list_arguments(**{name: value}))
    assert re.match(rf"{name} must be a finite number above 0.*; got {re.escape(repr(value))}$", message)


@PAIRWISE
@pytest.mark.parametrize("value", BAD_TEMPERATURES, ids=repr)
def test_pair_temperatures(loss, value):
    message = refuses(loss, **pair_arguments(beta=value))
    assert re.match(rf"beta must be a finite number above 0.*; got {re.escape(repr(value))}$", message)


def test_temperatures_that_are_tensors():
    """A broadcastable temperature would pass for one per row or one per candidate."""
    for call, arguments in [
        (exo_rw_loss, list_arguments(beta_pi=torch.ones(2, 1))),
        (dpo_loss, pair_arguments(beta=torch.tensor(0.1))),
    ]:
        assert "must be a finite number above 0 (a Python number); got tensor(" in refuses(call, **arguments)


def test_temperatures_beyond_the_dtype():
    """In float32 1e-40 divides as 0 does, and the loss would be NaN."""
    single = {name: value.float() for name, value in list_arguments().items() if isinstance(value, torch.Tensor)}
    for loss in (exo_rw_loss, dpo_rw_loss):
        for name, value in [("beta_r", 1e-40), ("beta_pi", 1e39), ("beta_r", 10**300)]:
            message = refuses(loss, **list_arguments(**single, **{name: value}))
            assert message.startswith(f"{name} must be in [1.18e-38, 8.51e+37] to be computed in torch.float32; got ")
        assert loss(**list_arguments(beta_r=1e-40)).shape == (2,)
    half = {name: torch.tensor([-1.0], dtype=torch.float16) for name in LOGPS}
    for loss in (exo_pref_loss, dpo_loss):
        assert refuses(loss, **pair_arguments(**half, beta=1e-39)).endswith("got 1e-39")
        assert loss(**pair_arguments(**half, beta=1e-30)).losses.dtype == torch.float16


def test_numpy_numbers_are_python_numbers_or_refused():
    assert exo_rw_loss(**list_arguments(beta_pi=np.float64(0.5))).shape == (2,)
    assert "beta_pi" in refuses(exo_rw_loss, **list_arguments(beta_pi=np.float32(0.5)))


# Label smoothing


@pytest.mark.parametrize("value", [0, 0.0, 0.5, -0.1, 1.0, 1.5, NAN, INF, True, "0.1", None], ids=repr)
def test_label_smoothing_of_exo_pref(value):
    message = refuses(exo_pref_loss, **pair_arguments(label_smoothing=value))
    assert re.match(rf"label_smoothing must be in \(0, 1/2\).*; got {re.escape(repr(value))}$", message)


@pytest.mark.parametrize("value", [0.5, -0.1, 1.0, 1.5, NAN, INF, True, False, "0.1", None], ids=repr)
def test_label_smoothing_of_dpo(value):
    message = refuses(dpo_loss, **pair_arguments(label_smoothing=value))
    assert re.match(rf"label_smoothing must be in \[0, 1/2\).*; got {re.escape(repr(value))}$", message)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, NAN])
def test_label_probabilities_out_of_range(value):
    eps = torch.tensor([0.1, value, 0.3], dtype=torch.float64)
    message = refuses(exo_pref_loss, **pair_arguments(label_smoothing=eps))
    assert message == f"label_smoothing must be in (0, 1); got {value} at index [1]"


def test_label_probabilities_of_another_shape():
    for eps in (torch.tensor(0.1), torch.full((3, 1), 0.1), torch.full((1,), 0.1)):
        message = refuses(exo_pref_loss, **pair_arguments(label_smoothing=eps))
        assert message.startswith("label_smoothing must have ")
        assert f"got {list(eps.shape)}" in message
    message = refuses(exo_pref_loss, **pair_arguments(label_smoothing=torch.tensor([0, 1, 0])))
    assert message == "label_smoothing must have a floating-point dtype; got torch.int64"


def test_dpo_takes_no_label_probabilities():
    message = refuses(dpo_loss, **pair_arguments(label_smoothing=torch.full((3,), 0.1)))
    assert message.startswith("label_smoothing must be in [0, 1/2) (a Python number); got tensor(")


# Shapes: nothing broadcasts


@LISTWISE
@pytest.mark.parametrize("shape", [(2, 1), (1, 3), (3, 2), (2, 4)])
def test_rewards_of_another_shape(loss, shape):
    message = refuses(loss, **list_arguments(rewards=torch.zeros(shape).double()))
    assert message.startswith("rewards must have the same shape [B, K] as log_ratio, [2, 3]; ")
    assert f"got {list(shape)}" in message


@LISTWISE
@pytest.mark.parametrize("name", ["log_ratio", "rewards"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 1)])
def test_list_arguments_of_another_rank(loss, name, shape):
    message = refuses(loss, **list_arguments(**{name: torch.zeros(shape).double()}))
    assert message == f"{name} must have shape [B, K]; got {list(shape)}"


@LISTWISE
@pytest.mark.parametrize("shape", [(2,), (3,), (2, 1), (1, 3), (3, 2)])
def test_mask_of_another_shape(loss, shape):
    message = refuses(loss, **list_arguments(mask=torch.ones(shape, dtype=torch.bool)))
    assert message.startswith("mask must have ")
    assert f"got {list(shape)}" in message


@PAIRWISE
@pytest.mark.parametrize("name", LOGPS)
@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (1, 3), (4,)])
def test_pair_arguments_of_another_shape(loss, name, shape):
    """[B] against [B, 1] would broadcast to [B, B] and train on every pair of pairs."""
    message = refuses(loss, **pair_arguments(**{name: torch.zeros(shape).double()}))
    # Whichever is named, the odd one out and its shape are in the message; the first argument sets the size.
    assert re.search(r"_logps must have (the same )?shape \[B\]", message)
    assert str(list(shape)) in message
    if name != LOGPS[0] or len(shape) != 1:
        assert message.startswith(f"{name} must have ")


# Types and dtypes


@LISTWISE
@pytest.mark.parametrize("name", ["log_ratio", "rewards"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_list_arguments_of_another_dtype(loss, name, dtype):
    message = refuses(loss, **list_arguments(**{name: torch.ones(2, 3, dtype=dtype)}))
    assert message == f"{name} must have a floating-point dtype; got {dtype}"


@PAIRWISE
@pytest.mark.parametrize("name", LOGPS)
def test_pair_arguments_of_another_dtype(loss, name):
    message = refuses(loss, **pair_arguments(**{name: torch.ones(3, dtype=torch.int32)}))
    assert message == f"{name} must have a floating-point dtype; got torch.int32"


@LISTWISE
@pytest.mark.parametrize(
    "value", [[[0.1, 0.2, 0.3]] * 2, np.zeros((2, 3)), 0.5, None], ids=["list", "array", "float", "None"]
)
def test_list_arguments_that_are_no_tensors(loss, value):
    message = refuses(loss, **list_arguments(rewards=value))
    assert message == f"rewards must be a torch.Tensor; got {type(value).__name__}"


@PAIRWISE
@pytest.mark.parametrize("name", LOGPS)
def test_pair_arguments_that_are_no_tensors(loss, name):
    message = refuses(loss, **pair_arguments(**{name: [-1.0, -2.0, -3.0]}))
    assert message == f"{name} must be a torch.Tensor; got list"


@LISTWISE
@pytest.mark.parametrize(
    "mask", [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64), [[True] * 3] * 2], ids=["float", "int", "list"]
)
def test_masks_that_are_not_boolean(loss, mask):
    message = refuses(loss, **list_arguments(mask=mask))
    got = mask.dtype if isinstance(mask, torch.Tensor) else "list"
    assert message == f"mask must be a torch.bool tensor, True where the entry counts; got {got}"


# Values


@LISTWISE
@pytest.mark.parametrize("name", ["log_ratio", "rewards"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_values_of_list_arguments(loss, name, value):
    values = list_arguments()[name].clone()
    values[1, 2] = value
    message = refuses(loss, **list_arguments(**{name: values}))
    assert message == f"{name} must be finite or -inf where unmasked; got {value} at index [1, 2]"
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[1, 2] = False
    assert loss(**list_arguments(**{name: values}, mask=keep)).isfinite().all()


@LISTWISE
@pytest.mark.parametrize("name", ["log_ratio", "rewards"])
def test_rows_without_a_possible_candidate(loss, name):
    values = list_arguments()[name].clone()
    values[1] = -INF
    message = refuses(loss, **list_arguments(**{name: values}))
    assert message == f"{name} must be above -inf for a candidate of each row; got -inf throughout row 1"
    # A finite value that is masked does not help.
    values[1, 0] = 0.0
    keep = torch.tensor([[True] * 3, [False, True, True]])
    assert refuses(loss, **list_arguments(**{name: values}, mask=keep)).startswith(f"{name} must be above -inf")
    keep[1, 0] = True
    loss(**list_arguments(**{name: values}, mask=keep))


@LISTWISE
def test_rows_that_are_all_masked(loss):
    keep = torch.tensor([[True, False, True], [False, False, False]])
    message = refuses(loss, **list_arguments(mask=keep))
    assert message == "mask must keep at least one candidate per row; got all False at index [1]"


@LISTWISE
@pytest.mark.parametrize("k", [0, 1])
def test_fewer_than_two_candidates(loss, k):
    few = torch.zeros(2, k)
    message = refuses(loss, **list_arguments(log_ratio=few, rewards=few))
    assert message == f"log_ratio must have K >= 2 candidates per row; got shape [2, {k}]"


@PAIRWISE
@pytest.mark.parametrize("name", LOGPS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_values_of_pair_arguments(loss, name, value):
    logps = torch.tensor([-1.0, value, -3.0], dtype=torch.float64)
    if name.startswith("policy") and value == -INF:
        assert not loss(**pair_arguments(**{name: logps})).losses.isnan().any()
        return
    allowed = "finite or -inf" if name.startswith("policy") else "finite"
    message = refuses(loss, **pair_arguments(**{name: logps}))
    assert message == f"{name} must be {allowed}; got {value} at index [1]"


@PAIRWISE
def test_a_pair_of_impossible_completions(loss):
    impossible = torch.tensor([-1.0, -2.0, -INF], dtype=torch.float64)
    message = refuses(loss, **pair_arguments(policy_chosen_logps=impossible, policy_rejected_logps=impossible))
    assert (
        message == "policy_chosen_logps must be above -inf where policy_rejected_logps is -inf; got -inf at index [2]"
    )


@LISTWISE
def test_gradients_do_not_hide_bad_values(loss):
    values = table([0.1, NAN, 0.3], [0.0, 1.0, 2.0]).requires_grad_()
    assert "nan at index [0, 1]" in refuses(loss, **list_arguments(log_ratio=values))


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [
        (exo_rw_loss, list_arguments),
        (dpo_rw_loss, list_arguments),
        (exo_pref_loss, pair_arguments),
        (dpo_loss, pair_arguments),
    ],
    ids=["exo_rw", "dpo_rw", "exo_pref", "dpo"],
)
def test_temperatures_have_no_default_and_no_position(loss, arguments):
    tensors = [value for value in arguments().values() if isinstance(value, torch.Tensor)]
    scalars = [value for value in arguments().values() if not isinstance(value, torch.Tensor)]
    with pytest.raises(TypeError):
        loss(*tensors)
    with pytest.raises(TypeError):
        loss(*tensors, *scalars)


@LISTWISE
def test_shape_checks_run_under_transforms(loss):
    """Value checks are skipped there, shape checks never."""
    rewards = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="rewards must have the same shape"):
        torch.func.grad(lambda values: loss(**list_arguments(log_ratio=values, rewards=rewards)).sum())(
            list_arguments()["log_ratio"]
        )
