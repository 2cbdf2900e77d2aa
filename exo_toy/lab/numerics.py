"""What arithmetic does to a loss: infinities, half types, second derivatives, and arguments written to."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from exo_toy.lab.laws import Finding
from exo_toy.lab.subject import LOG_RATIO, REWARDS, CallError, Subject, first_line, probe, shown

SIZES = (0.0, 1.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, torch.inf)
HALF = {torch.float16: 2**-10, torch.bfloat16: 2**-7}


def failures(subject: Subject) -> Iterator[Finding]:
    """Each kind of failure once, with the smallest input that shows it."""
    yield from _in_place(subject)
    changed = list(_dtypes(subject))
    yield from changed
    # In float32 there are no digits to compare differences with.
    if not any(finding.code == "dtype" for finding in changed):
        yield from _derivatives(subject)
    yield from _extremes(subject)


def _arguments(subject: Subject, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Two ordinary examples with two candidates or, for lists, four."""
    tensors = probe(subject, LOG_RATIO.to(dtype), (REWARDS * subject.beta_r).to(dtype))
    return [tensor.clone() for tensor in tensors]


def _in_place(subject: Subject) -> Iterator[Finding]:
    tensors = _arguments(subject)
    before = [tensor.clone() for tensor in tensors]
    subject.called(*tensors)
    for name, old, new in zip(subject.tensors, before, tensors, strict=True):
        # A write that changes nothing here changes something elsewhere.
        if new._version > 0 or not torch.equal(old, new):
            yield Finding("in-place", f"writes to its argument {name}")


def _dtypes(subject: Subject) -> Iterator[Finding]:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        try:
            returned = subject(*_arguments(subject, dtype)).dtype
        except CallError as error:
            yield Finding("dtype", f"fails on {_name(dtype)}: {error}")
            continue
        if returned != dtype:
            lost = "; what the laboratory finds has its digits" if dtype == torch.float64 else ""
            yield Finding("dtype", f"{_name(dtype)} in, {_name(returned)} out{lost}")
            return
    if subject.precision != torch.float64:
        # Float16 and bfloat16 are not told apart.
        computed = "float32" if subject.precision == torch.float32 else "a half type"
        computed = f"float64 in, computed in {computed}"
        yield Finding("dtype", f"{computed}; what the laboratory finds has its digits")
    for dtype, rounding in HALF.items():
        rounded = _delicate(subject, dtype)
        try:
            have = subject(*rounded).double()
        except CallError:
            return
        exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in rounded]
        # At least that of float32: what the inputs' own size costs there is not counted.
        want = subject(*exact)
        room = 2 * rounding * want.abs() + 1e-4
        # What the type cannot hold is infinite in it.
        held = want.abs() < torch.finfo(dtype).max
        off = ((have - want).abs() / room).nan_to_num(0.0).where(held, 0.0)
        if off.max() > 1:
            at = int(off.argmax())
            text = f"computed in {_name(dtype)}: {have[at]:.6g} for {want[at]:.6g}, rounding allows {room[at]:.1g}"
            yield Finding("low precision", text, shown(subject, [tensor[at : at + 1] for tensor in rounded]))
            return


def _delicate(subject: Subject, dtype: torch.dtype) -> list[Tensor]:
    """Examples whose losses a half type holds, though not what leads there: close policies, short against long."""
    generator = torch.Generator().manual_seed(0)
    n = 64 if subject.kind in ("list", "ranked") else 2
    extra = torch.randn(32, n, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(32, n, generator=generator, dtype=torch.float64)
    log_ratio = ((extra + noise) / subject.beta_pi).to(dtype)
    tensors = probe(subject, log_ratio, (extra * subject.beta_r).to(dtype))
    if len(tensors) >= 4 and subject.kind in ("pair", "rewarded pair"):
        chosen, rejected = torch.rand(2, 2, 32, generator=generator, dtype=torch.float64)
        tensors[:4] = [
            part.to(dtype) for part in (-1 - chosen[0], -100 - rejected[0], -1 - chosen[1], -100 - rejected[1])
        ]
    return tensors


def _derivatives(subject: Subject) -> Iterator[Finding]:
    """First and second derivatives in float64 against central differences."""
    tensors = _arguments(subject)
    policy, rest = tensors[: subject.n_policy], tensors[subject.n_policy :]
    shapes = [tensor.shape for tensor in policy]
    point = torch.cat([tensor.flatten() for tensor in policy])

    def gradient(vector: Tensor, *, graph: bool) -> tuple[Tensor, Tensor]:
        parts = vector.split([shape.numel() for shape in shapes])
        given = (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        value = subject.together(*given, *rest).sum()
        return value, torch.autograd.grad(value, vector, create_graph=graph, materialize_grads=True)[0]

    try:
        leaf = point.clone().requires_grad_()
        _, first = gradient(leaf, graph=False)
    except RuntimeError as error:
        yield Finding("gradient", f"no gradient: {first_line(error)}")
        return
    step = 1e-5
    moved = [(point + sign * step * unit) for unit in torch.eye(len(point), dtype=point.dtype) for sign in (1, -1)]
    around = [gradient(vector.requires_grad_(), graph=False) for vector in moved]
    values, gradients = (torch.stack(parts).detach() for parts in zip(*around, strict=True))
    if not (values.isfinite().all() and gradients.isfinite().all()):
        yield Finding("nan", "NaN, or infinite, at ordinary numbers", shown(subject, tensors))
        return
    difference = (values[::2] - values[1::2]) / (2 * step)
    # Differences of this step hold seven digits.
    if not torch.allclose(first, difference, rtol=1e-5, atol=1e-6):
        at = int((first - difference).abs().argmax())
        text = f"the gradient is not the derivative of the value: {first[at]:.6g} for {difference[at]:.6g}"
        yield Finding("gradient", f"{text}; something is detached", shown(subject, tensors))
    wanted = (gradients[::2] - gradients[1::2]) / (2 * step)
    try:
        leaf = point.clone().requires_grad_()
        _, graph = gradient(leaf, graph=True)
        rows = [_second(entry, leaf) for entry in graph]
    except RuntimeError as error:
        yield Finding("double backward", f"no second derivative: {first_line(error)}")
        return
    hessian = torch.stack(rows)
    if not torch.allclose(hessian, wanted, rtol=1e-5, atol=1e-6):
        off = (hessian - wanted).abs().max()
        yield Finding("double backward", f"second derivatives off by {off:.3g}", shown(subject, tensors))


def _second(entry: Tensor, leaf: Tensor) -> Tensor:
    if not entry.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(entry, leaf, retain_graph=True, materialize_grads=True)[0]


def _extremes(subject: Subject) -> Iterator[Finding]:
    """One entry far out; each code once, at the smallest whole number and then the widest dtype."""
    seen = set()
    for i, dtype in itertools.product(range(len(SIZES)), (torch.float64, torch.float32)):
        for place, tensors in enumerate(_far_out(subject, SIZES[i], dtype)):
            for code, text in _failure(subject, tensors):
                if code not in seen:
                    seen.add(code)
                    smallest = _smallest(subject, i, dtype, place, code)
                    yield Finding(code, f"{text} in {_name(dtype)}", shown(subject, smallest))


def _smallest(subject: Subject, i: int, dtype: torch.dtype, place: int, code: str) -> list[Tensor]:
    """By bisection, the smallest that fails between the last of ``SIZES`` and this one, if it fails from there on."""
    low, high = (SIZES[i - 1], SIZES[i]) if 0 < i and SIZES[i] < torch.inf else (0.0, SIZES[i])
    while 1 < high - low < torch.inf:
        middle = (low + high) // 2
        fails = code in dict(_failure(subject, list(_far_out(subject, middle, dtype))[place]))
        low, high = (low, middle) if fails else (middle, high)
    return list(_far_out(subject, high, dtype))[place]


def _far_out(subject: Subject, size: float, dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """One entry of the log ratios or of the rewards at plus or minus ``size``; the policy may also exclude."""
    for which, place, sign in itertools.product(("log_ratio", "rewards"), (0, 1), (1.0, -1.0)):
        if which == "rewards" and subject.kind not in ("list", "rewarded pair", "valued"):
            continue
        if size == torch.inf and (sign > 0 or (which == "rewards" and subject.kind != "list")):
            continue
        given = {name: torch.zeros(1, 2, dtype=dtype) for name in ("log_ratio", "rewards")}
        given[which][0, place] = sign * size
        if subject.kind == "unpaired" and place == 1:
            given["log_ratio"] = given["log_ratio"].flip(-1)
            given["rewards"][0, 1] = 1.0
        yield probe(subject, given["log_ratio"], given["rewards"])


def _failure(subject: Subject, tensors: list[Tensor]) -> Iterator[tuple[str, str]]:
    leaves = [tensor.clone() for tensor in tensors]
    for leaf in leaves[: subject.n_policy]:
        leaf.requires_grad_()
    try:
        loss = subject(*leaves)
    except CallError as error:
        # Refused in words, or not foreseen.
        if not isinstance(error.__cause__, ValueError | AssertionError):
            yield "raises", str(error)
        return
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())
    if loss.isnan().any():
        yield "nan", "NaN" if finite else "NaN where the policy or the reward excludes a completion"
    elif loss.isinf().any() and finite:
        yield "infinite", "an infinite loss of finite numbers"
    elif loss.isfinite().all() and loss.requires_grad:
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(loss.sum(), asked, materialize_grads=True)
        if any(gradient.isnan().any() for gradient in gradients):
            yield "nan gradient", "a finite loss with a gradient of NaN"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
