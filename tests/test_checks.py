"""checks: what is refused, in which words, and when values are not read."""

import math

import pytest
import torch

from exo_toy import checks

pytestmark = pytest.mark.unchecked

INF, NAN = math.inf, math.nan


def message_of(check, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as refusal:
        check(*args, **kwargs)
    return str(refusal.value)


# Numbers


@pytest.mark.parametrize("value", [1, 0.5, 1e-300, 1e300, 5e-324, 10**300])
def test_positive_numbers(value):
    checks.require_positive(beta=value)


@pytest.mark.parametrize("value", [0, -1, -0.0, NAN, INF, -INF])
def test_numbers_that_are_not_positive(value):
    assert message_of(checks.require_positive, fine=1.0, beta=value) == (
        f"beta must be a finite number above 0; got {value!r}"
    )


@pytest.mark.parametrize("value", [True, "1", None, [1.0], 1j, torch.tensor(1.0)], ids=repr)
def test_what_is_no_number(value):
    assert message_of(checks.require_positive, beta=value) == (
        f"beta must be a finite number above 0 (a Python number); got {value!r}"
    )


@pytest.mark.parametrize(
    ("low_allowed", "accepted", "refused"),
    [(False, [1e-9, 0.25, 0.499999], [0.0, 0.5, -1e-9, 0.6, NAN]), (True, [0, 0.0, 0.25], [-1e-9, 0.5, NAN])],
)
def test_ranges(low_allowed, accepted, refused):
    def check(value):
        checks.require_real("eps", value, allowed="in range", low=0.0, high=0.5, low_allowed=low_allowed)

    for value in accepted:
        check(value)
    for value in refused:
        assert message_of(check, value) == f"eps must be in range; got {value!r}"


def test_integers_beyond_all_floats():
    for value in (10**400, -(10**400), 10**5000):  # the last one has too many digits to be printed
        assert message_of(checks.require_positive, beta=value) == (
            "beta must be a finite number above 0; got an integer beyond all floats"
        )


def test_temperatures_that_a_dtype_holds():
    for dtype, accepted, refused in [
        (torch.float32, [1e-37, 1e37], [1e-39, 1e38]),
        (torch.float64, [1e-307, 1e307], [1e-310, 1e308, 10**308]),
    ]:
        for value in accepted:
            checks.require_temperature(dtype, beta=value)
            assert (torch.zeros(1, dtype=dtype) / value).item() == 0.0
            assert (torch.ones(1, dtype=dtype) * value / value).item() == pytest.approx(1.0)
        for value in refused:
            message = message_of(checks.require_temperature, dtype, beta=value)
            assert message.startswith("beta must be in [")
            assert message.endswith(f"to be computed in {dtype}; got {value!r}")
    assert message_of(checks.require_temperature, torch.float32, beta=0.0) == (
        "beta must be a finite number above 0; got 0.0"
    )


def test_integers():
    checks.require_integer("k", 2, at_least=2)
    checks.require_integer("k", 2**40, at_least=2)
    for value in (1, -3, 2.0, 2.5, "2", None, True, NAN):
        assert message_of(checks.require_integer, "k", value, at_least=2) == (
            f"k must be an integer of at least 2; got {value!r}"
        )
    with pytest.raises(ValueError):
        checks.require_integer("k", True, at_least=0)


# Tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_floating_dtypes(dtype):
    checks.require_floating(a=torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64], ids=str)
def test_dtypes_that_are_not_floating(dtype):
    assert message_of(checks.require_floating, a=torch.zeros(1), b=torch.zeros(1, dtype=dtype)) == (
        f"b must have a floating-point dtype; got {dtype}"
    )


def test_what_is_no_tensor():
    assert message_of(checks.require_floating, a=[1.0]) == "a must be a torch.Tensor; got list"
    assert message_of(checks.require_mask, mask=None).endswith("got NoneType")


def test_masks():
    checks.require_mask(mask=torch.tensor([True]))
    for dtype in (torch.float32, torch.int64, torch.uint8):
        assert message_of(checks.require_mask, mask=torch.ones(1, dtype=dtype)) == (
            f"mask must be a torch.bool tensor, True where the entry counts; got {dtype}"
        )


def test_shapes():
    checks.require_shape("B K", a=torch.zeros(2, 3), b=torch.ones(2, 3))
    checks.require_shape("B", a=torch.zeros(0), b=torch.zeros(0))
    assert message_of(checks.require_shape, "B K", a=torch.zeros(2)) == "a must have shape [B, K]; got [2]"
    assert message_of(checks.require_shape, "B", a=torch.zeros(2), b=torch.zeros(2, 1)) == (
        "b must have shape [B]; got [2, 1]"
    )
    assert message_of(checks.require_shape, "B K", a=torch.zeros(2, 3), b=torch.zeros(2, 1)) == (
        "b must have the same shape [B, K] as a, [2, 3]; got [2, 1] (nothing is broadcast)"
    )


def test_devices():
    on_meta = torch.zeros(2, 3, device="meta")
    assert message_of(checks.require_shape, "B K", a=torch.zeros(2, 3), b=on_meta) == (
        "b must be on the device of a, cpu; got meta"
    )
    assert message_of(checks.as_tables, a=torch.zeros(2, 3), b=on_meta) == "b must be on the device of a, cpu; got meta"


# Tables


def test_tables_become_float64_and_are_not_changed():
    shared, batched = torch.zeros(3), torch.ones(2, 3, dtype=torch.float16)
    first, second = checks.as_tables(a=shared, b=batched)
    assert first.dtype == second.dtype == torch.float64
    assert first.shape == (3,) and second.shape == (2, 3)
    assert shared.dtype == torch.float32
    double = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    assert checks.as_tables(a=double)[0] is double


def test_tables_of_any_leading_dimensions():
    checks.as_tables(a=torch.zeros(4, 2, 3), b=torch.zeros(4, 2, 3), c=torch.zeros(3))


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ([()], "a must be a table"),
        ([(2, 0)], "a must be a table"),
        ([(3,), (4,)], "b must have as many completions (last dimension) as a, 3; got shape [4]"),
        ([(2, 3), (4, 3)], "b must have the leading dimensions of a, [2], or none; got shape [4, 3]"),
        ([(2, 3), (1, 3)], "b must have the leading dimensions of a, [2], or none; got shape [1, 3]"),
        ([(3,), (2, 3), (4, 3)], "c must have the leading dimensions of b, [2], or none; got shape [4, 3]"),
        ([(2, 3), (5, 2, 3)], "b must have the leading dimensions of a, [2], or none; got shape [5, 2, 3]"),
    ],
)
def test_tables_that_do_not_fit(shapes, named):
    tables = {name: torch.zeros(shape) for name, shape in zip("abc", shapes, strict=False)}
    assert message_of(checks.as_tables, **tables).startswith(named)


def test_normalised_log_probabilities():
    good = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64).log()
    checks.require_log_probabilities(log_pi=good)
    checks.require_log_probabilities(log_pi=good + 1e-5)
    for bad in (good + 1e-3, good - 1e-3, good.exp(), torch.zeros_like(good), torch.full_like(good, -INF)):
        message = message_of(checks.require_log_probabilities, fine=good, log_pi=bad)
        assert message.startswith("log_pi must hold normalised log-probabilities")
        assert message.endswith("at index [0]")
    for value in (NAN, INF):
        bad = good.clone()
        bad[1, 2] = value
        assert message_of(checks.require_log_probabilities, log_pi=bad).endswith("at index [1]")


def test_rewards():
    checks.require_rewards(torch.tensor([0.0, -INF, 1e300], dtype=torch.float64))
    for value in (NAN, INF):
        assert message_of(checks.require_rewards, torch.tensor([0.0, value])) == (
            f"reward must be finite, or -inf for a forbidden completion; got {value} at index [1]"
        )


# Values are read only where reading is possible


def test_values_are_read_where_they_can_be():
    for tensor in (torch.zeros(2), torch.zeros(2, requires_grad=True), torch.nn.Parameter(torch.zeros(2))):
        assert checks.values_are_readable(tensor)
    assert checks.values_are_readable()


def test_values_are_not_read_under_transforms_or_without_storage():
    seen = []

    def spy(tensor):
        seen.append(checks.values_are_readable(tensor))
        checks.require_values([tensor], (tensor.isnan(), lambda: "never"))
        return tensor.sum()

    nan = torch.full((2, 3), NAN)
    torch.func.grad(spy)(nan)
    torch.func.vmap(spy)(nan)
    with torch.device("meta"):
        spy(torch.zeros(2))
    assert seen == [False, False, False]


def test_values_are_not_read_while_compiling():
    @torch.compile(fullgraph=True, backend="eager")
    def function(tensor):
        checks.require_values([tensor], (tensor.isnan(), lambda: "never"))
        return tensor + 1

    assert function(torch.tensor([NAN, 1.0]))[1].item() == 2.0


def test_first_condition_that_holds_is_raised():
    tensor = torch.tensor([1.0, -2.0, 3.0, -4.0])
    negative, large = tensor < 0, tensor > 2
    assert message_of(
        checks.require_values,
        [tensor],
        (tensor > 10, lambda: "above 10"),
        (negative, lambda: f"negative: {checks.first_bad(tensor, negative)}"),
        (large, lambda: "large"),
    ) == "negative: -2.0 at index [1]"  # fmt: skip
    checks.require_values([tensor], (tensor > 10, lambda: "above 10"))


def test_first_bad_entry_of_a_table():
    table = torch.tensor([[0.0, 1.0], [NAN, 2.0]])
    assert checks.first_bad(table, table.isnan()) == "nan at index [1, 0]"
