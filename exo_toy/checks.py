"""Shapes, dtypes and ranges: one clear ``ValueError`` per kind of bad input.

Every message names the argument, what it was and what is allowed. Shape and dtype checks always run. Checks that read
values are skipped where reading would break a trace or a transform (:func:`values_are_readable`).
"""

import math
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

# A table whose probabilities do not sum to one within this (in nats) is taken for logits passed by mistake.
NORMALISATION_TOLERANCE = 1e-4


def values_are_readable(*tensors: Tensor) -> bool:
    """Whether Python may branch on these tensors' values: not while compiling, transforming or capturing a graph."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:
            return False
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
    return True


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether a tensor is inside a ``torch.func`` transform or carries a forward-mode tangent.

    While compiling it cannot be asked of a tensor, only whether there is a transform around.
    """
    if torch.compiler.is_compiling():
        # Not "is not None", which is always true of what the tracer holds in its place.
        return isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter)
    given = [x for x in tensors if x is not None]
    if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in given):
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in given)


def autocast_off(device: torch.device) -> AbstractContextManager[None]:
    """No autocast inside, on devices that have one."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def require_values(tensors: Iterable[Tensor], *conditions: tuple[Tensor, Callable[[], str]]) -> None:
    """Raise the message of the first condition that holds anywhere; one device synchronisation in all."""
    if not values_are_readable(*tensors):
        return
    if torch.stack([bad.any() for bad, _ in conditions]).any():
        for bad, message in conditions:
            if bad.any():
                raise ValueError(message())


def first_bad(tensor: Tensor, bad: Tensor) -> str:
    """The first offending value and where it stands, for an error message."""
    index = tuple(bad.nonzero()[0].tolist())
    return f"{tensor[index].item()} at index {list(index)}"


def require_positive(**scalars: float | int) -> None:
    """Each scalar is a finite real number above zero."""
    for name, value in scalars.items():
        require_real(name, value, allowed="a finite number above 0", low=0.0, high=math.inf)


def require_temperature(dtype: torch.dtype, **scalars: float | int) -> None:
    """Each scalar is above zero, and neither it nor its inverse overflows or underflows in ``dtype``."""
    low = torch.finfo(dtype).tiny
    for name, value in scalars.items():
        require_positive(**{name: value})
        if not low <= value <= 1 / low:
            raise ValueError(f"{name} must be in [{low:.3g}, {1 / low:.3g}] to be computed in {dtype}; got {value!r}")


def require_real(
    name: str, value: float | int, *, allowed: str, low: float, high: float, low_allowed: bool = False
) -> None:
    """``low < value < high`` (``low <= value`` where allowed); tensors, strings, booleans and NaN are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be {allowed} (a Python number); got {value!r}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name} must be {allowed}; got an integer beyond all floats")
    if not (low < value < high or (low_allowed and value == low)):
        raise ValueError(f"{name} must be {allowed}; got {value!r}")


def require_integer(name: str, value: int, *, at_least: int, bits: int | None = None) -> None:
    """An integer no smaller than ``at_least``; one of so many ``bits`` if given."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}; got {value!r}")
    if bits is not None and value >= 2 ** (bits - 1):
        raise ValueError(f"{name} must be an integer below 2**{bits - 1}; got {value!r}")


def require_floating(**tensors: Tensor) -> None:
    """Each argument is a tensor of a real floating-point dtype."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype; got {tensor.dtype}")


def require_labels(labels: Tensor) -> None:
    """A tensor of integers."""
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be a tensor of an integer dtype; got {got}")


def labels_outside(labels: Tensor, n_vocab: Tensor | int, ignore_index: int) -> Tensor:
    """Where a label is neither a token nor ignored."""
    return (labels != ignore_index) & ((labels < 0) | (labels >= n_vocab))


def labels_message(labels: Tensor, outside: Tensor, n_vocab: Tensor | int, ignore_index: int) -> str:
    """What to say of them."""
    allowed = f"labels must be in [0, {int(n_vocab)}) (V tokens) or ignore_index, {ignore_index}"
    return f"{allowed}; got {first_bad(labels, outside)}"


def require_mask(**tensors: Tensor) -> None:
    """Each argument is a boolean tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be a torch.bool tensor, True where the entry counts; got {got}")


def require_shape(pattern: str, **tensors: Tensor) -> None:
    """All tensors have one and the same shape with the dimensions of ``pattern`` ("B K"); nothing broadcasts."""
    wanted = f"[{', '.join(pattern.split())}]"
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.ndim != len(pattern.split()):
            raise ValueError(f"{name} must have shape {wanted}; got {list(tensor.shape)}")
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} must have the same shape {wanted} as {first_name}, {list(first.shape)}; "
                f"got {list(tensor.shape)} (nothing is broadcast)"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}; got {tensor.device}")


def as_tables(**tables: Tensor) -> tuple[Tensor, ...]:
    """Tables [..., N] over one space, in float64; leading dimensions equal, or absent (shared by all prompts)."""
    require_floating(**tables)
    first_name, first = next(iter(tables.items()))
    batched_name, batched = next(((n, t) for n, t in tables.items() if t.ndim > 1), (first_name, first))
    for name, table in tables.items():
        if table.ndim == 0 or table.numel() == 0:
            raise ValueError(f"{name} must be a table [..., N] with no dimension of 0; got shape {list(table.shape)}")
        if table.shape[-1] != first.shape[-1]:
            raise ValueError(
                f"{name} must have as many completions (last dimension) as {first_name}, {first.shape[-1]}; "
                f"got shape {list(table.shape)}"
            )
        if table.ndim > 1 and table.shape[:-1] != batched.shape[:-1]:
            raise ValueError(
                f"{name} must have the leading dimensions of {batched_name}, {list(batched.shape[:-1])}, or none; "
                f"got shape {list(table.shape)}"
            )
        if table.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}; got {table.device}")
    return tuple(table.to(torch.float64) for table in tables.values())


def require_log_probabilities(**tables: Tensor) -> None:
    """Each row is a normalised table of log-probabilities: no NaN, no +inf, log-sum-exp 0."""
    for name, table in tables.items():
        values = table.detach()
        if not values_are_readable(values):
            continue
        off = values.logsumexp(-1).abs()
        # NaN and +inf both make the log-sum-exp fail this comparison.
        bad = ~(off <= NORMALISATION_TOLERANCE)
        if bad.any():
            raise ValueError(
                f"{name} must hold normalised log-probabilities (log-sum-exp 0 over the last dimension, "
                f"within {NORMALISATION_TOLERANCE}); |log-sum-exp| is {first_bad(off, bad)}"
            )


def require_rewards(reward: Tensor) -> None:
    """Finite, or -inf for a forbidden completion."""
    values = reward.detach()
    bad = values.isnan() | (values == math.inf)
    require_values(
        [values],
        (bad, lambda: f"reward must be finite, or -inf for a forbidden completion; got {first_bad(values, bad)}"),
    )
