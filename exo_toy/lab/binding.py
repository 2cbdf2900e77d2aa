"""What a loss takes, read off its signature, and what calling it shows: all that must be known to examine it."""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from exo_toy.lab.subject import (
    ASSUMED,
    BELOW,
    KINDS,
    REWARDS,
    TOLD,
    Batching,
    CallError,
    Kind,
    LabError,
    Subject,
    first_line,
    name_of,
    order_matters,
    probe,
    shown,
)
from exo_toy.lab.temperatures import with_temperatures

# How many tensors a kind may take, in the order in which they are told apart.
SIZES: Mapping[str, tuple[int, ...]] = {
    "list": (2, 3),
    "ranked": (1,),
    "pair": (4, 2, 6),
    "rewarded pair": (6,),
    "reference-free": (4, 2),
    "unpaired": (3,),
    "valued": (4,),
}
TEMPERATURES = ("beta", "beta_pi", "beta_r")
# Keywords that the laboratory fills in where a loss needs them and nothing was said.
USUAL = {"beta": 0.5, "beta_pi": 0.5, "beta_r": 1.0, "label_smoothing": 0.1}
# How words begin that stand for the rejected completion.
REJECTED = ("reject", "dispreferred", "lose", "losing", "neg", "worse", "bad")
LENGTHS = re.compile("(^|_)len|length")
SCALARS = (bool, float, int, str)
# Log ratios and rewards of three examples of which any loss must make sense.
ORDINARY = (
    torch.tensor([[0.3, -0.8], [-1.1, 0.4], [0.9, 0.2]], dtype=torch.float64),
    torch.tensor([[1.0, 0.2], [0.1, 0.7], [0.5, 0.4]], dtype=torch.float64),
)
# Steps that are seen in one dtype and lost in the rounding of the next.
STEPS = {torch.float64: 2**-32, torch.float32: 2**-11}


def examine(function: Callable[..., Any], *, kind: str | None = None, settings: Mapping[str, Any]) -> Subject:
    """Bind a loss as :func:`bind` does, and find out by calling it what else must be known to examine it."""
    subject = bind(function, kind=kind, settings=settings)
    subject = replace(subject, level=_level(subject))
    subject = replace(subject, size=_size(subject))
    subject = replace(subject, apart=_refuses_ties(subject))
    subject = replace(subject, precision=_precision(subject))
    subject = with_temperatures(replace(subject, batching=_batching(subject)))
    rewards = REWARDS * subject.beta_r
    tied = torch.cat([rewards[:, :1], rewards[:, :1], rewards[:, 2:]], -1)
    ordered = subject.kind == "list" and (
        order_matters(subject, rewards) or (not subject.apart and order_matters(subject, tied))
    )
    return replace(subject, ordered=ordered)


def bind(function: Callable[..., Any], *, kind: str | None = None, settings: Mapping[str, Any]) -> Subject:
    """Read off its signature which tensors a loss takes, and bind its keywords.

    Parameters without a default are tensors, but for keyword-only ones, those annotated as numbers, and those named in
    ``settings`` or ``USUAL``. Temperatures among the settings that the loss does not take are those that it has. The
    kinds are told apart by the number of tensors and their names: see :func:`exo_toy.lab.characterize`.
    """
    if kind is not None and kind not in KINDS:
        raise LabError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if not callable(function):
        raise LabError(f"the loss must be a function; got an object of type {type(function).__name__}")
    if isinstance(function, type):
        raise LabError(
            f"the loss must be a function, or an object that can be called; got the class {name_of(function)}"
        )
    signed = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        parameters = list(inspect.signature(signed).parameters.values())
    except (TypeError, ValueError) as error:
        how = "wrap it in one, as lambda chosen, rejected: ..."
        raise LabError(
            f"the loss must have a signature, as functions in Python have; {how}; got {function!r}"
        ) from error
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    tensors, bound = [], dict(settings)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        unknown = set(settings) - set(named) - set(TEMPERATURES)
        if unknown:
            raise LabError(f"{name_of(function)} has no parameter {', '.join(sorted(unknown))}")
        bound = {name: value for name, value in settings.items() if name in named}
    for name, parameter in named.items():
        if name in settings:
            continue
        if parameter.default is not parameter.empty:
            # With a default the temperatures count as set; the value is read, never guessed.
            if name in (*USUAL, "alpha", "tau") and isinstance(parameter.default, int | float):
                bound[name] = parameter.default
        elif name in USUAL:
            bound[name] = USUAL[name]
        elif name == "mask" or parameter.kind is parameter.KEYWORD_ONLY or _scalar(parameter.annotation):
            how = f"as settings={{'{name}': ...}} or --set {name}=..., or let it come by position if it is a tensor"
            raise LabError(f"{name} has no default: give it a value, {how}")
        else:
            tensors.append(name)
    if not tensors and not starred:
        raise LabError(f"{name_of(function)} must take tensors by position; it takes none")
    if tensors[:1] == ["self"]:
        raise LabError(f"{name_of(function)} must be the method of an object; got that of a class")
    if kind is not None and not tensors:
        tensors = [f"argument {i + 1}" for i in range(SIZES[kind][0])]
    found = cast(Kind, kind or _kind(tensors))
    if len(tensors) not in SIZES[found]:
        wanted = " or ".join(str(size) for size in sorted(SIZES[found]))
        raise LabError(f"a loss of kind {found!r} takes {wanted} tensors; got {len(tensors)} ({', '.join(tensors)})")
    roles = [_role(found, name.lower()) for name in tensors]
    # Names that do not tell all apart tell nothing: the order is the kind's.
    positions = sorted(range(len(tensors)), key=roles.__getitem__) if len({*roles}) == len(roles) else range(len(roles))
    names = tuple(tensors[i] for i in positions)
    told = {**bound, **settings}
    # Some call it tau; of lists that might be either temperature.
    beta = told.get("beta", 1.0 if found == "list" else told.get("tau", 1.0))
    beta_pi, beta_r = told.get("beta_pi", beta), told.get("beta_r", 1.0)
    for name, value in (("beta", beta_pi), ("beta_r", beta_r)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise LabError(f"{name} must be a number above 0; got {value!r}")
    ways = (
        {"beta_pi": {"beta", "beta_pi"}, "beta_r": {"beta_r"}} if found == "list" else {"beta": {*TEMPERATURES, "tau"}}
    )
    temperatures = {name: TOLD if told.keys() & by else ASSUMED for name, by in ways.items()}
    return Subject(function, found, names, tuple(positions), bound, float(beta_pi), float(beta_r), temperatures)


def _scalar(annotation: Any) -> bool:
    """Also where annotations are strings."""
    return annotation in SCALARS or annotation in [scalar.__name__ for scalar in SCALARS]


def _kind(tensors: Sequence[str]) -> str:
    """From the names of the parameters that are tensors."""
    text = " ".join(tensors).lower()
    rewarded = "reward" in text or "score" in text
    pairs = "chosen" in text or "rejected" in text
    lengths = any(LENGTHS.search(name.lower()) for name in tensors)
    match len(tensors):
        case 1:
            return "ranked"
        case 2 if pairs:
            return "pair" if "ratio" in text else "reference-free"
        case 2:
            return "list"
        case 3:
            return "list" if rewarded else "unpaired"
        case 4 if not rewarded:
            return "reference-free" if lengths else "pair"
        case 4 if "value" in text:
            return "valued"
        case 6 if rewarded and pairs:
            return "rewarded pair"
        case 6 if lengths and not rewarded:
            return "pair"
    listed = f"{len(tensors)} tensors ({', '.join(tensors)})" if tensors else "no named tensors"
    raise LabError(f"kind must be told, one of {', '.join(KINDS)}: a loss of {listed} is none of the known")


def _role(kind: Kind, name: str) -> tuple[bool, ...]:
    """What a tensor is by its name, so that sorted they are in the order of the kind."""
    extra = any(word in name for word in ("reward", "score", "label", "desirable")) or bool(LENGTHS.search(name))
    # "Preferred" is no reference.
    ref = re.search("(?<!p)ref", name) is not None
    if kind in ("pair", "rewarded pair", "reference-free"):
        return extra, ref, any(word.startswith(REJECTED) or word in ("l", "yl") for word in name.split("_"))
    return "value" in name, extra, ref


def _level(subject: Subject) -> float:
    """Where the reference is: below 0 for losses that refuse positive log-probabilities."""
    for level in (0.0, BELOW):
        moved = replace(subject, level=level)
        try:
            moved.call(*probe(moved, *ORDINARY))
        except LabError:
            continue
        return level
    return 0.0


def _size(subject: Subject) -> float:
    """The largest loss of ordinary examples, 1 if all are 0; here is refused what cannot be examined at all."""
    tensors = probe(subject, ORDINARY[0], ORDINARY[1] * subject.beta_r)
    policy = [tensor.clone().requires_grad_() for tensor in tensors[: subject.n_policy]]
    given = [*policy, *tensors[subject.n_policy :]]
    state = torch.get_rng_state()
    try:
        loss = subject.call(*given)
    except CallError as error:
        raise _only_in(subject, tensors) or error from error.__cause__
    if loss.shape != (3,) and loss.numel() != 1:
        raise LabError(f"{subject.name} must return one loss per example, [3] here; got {list(loss.shape)}")
    if not loss.isfinite().all():
        got = "NaN" if loss.isnan().any() else "an infinite loss"
        raise LabError(f"{subject.name} gives {got} on ordinary numbers: {shown(subject, tensors)}")
    # What is drawn may leave three losses as they were.
    if not torch.equal(state, torch.get_rng_state()) or not torch.equal(loss, subject.call(*given)):
        raise LabError(f"{subject.name} gives another loss when called again: it keeps a state, or draws numbers")
    if not loss.requires_grad:
        raise LabError(f"{subject.name} gives a loss without a gradient by the policy: it is detached, or not torch's")
    try:
        torch.autograd.grad(loss.sum(), policy, materialize_grads=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise LabError(f"{subject.name} gives a loss whose backward pass fails: {reason}") from error
    return float(loss.detach().abs().max()) or 1.0


def _only_in(subject: Subject, tensors: Sequence[Tensor]) -> LabError | None:
    """An error that says so, if a loss takes a narrower dtype than float64."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        try:
            subject.call(*(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors))
        except LabError:
            continue
        name = str(dtype).removeprefix("torch.")
        how = f"convert them in a function around it, as {subject.tensors[0]}.to(torch.{name})"
        return LabError(f"{subject.name} takes tensors in {name} and not in float64, in which it is examined: {how}")
    return None


def _refuses_ties(subject: Subject) -> bool:
    """Whether it raises on equal completions, of which candidates drawn with repetition have many."""
    if subject.kind in ("unpaired", "valued"):
        return False
    zero = torch.zeros(3, 2, dtype=torch.float64)
    try:
        subject.call(*probe(subject, zero, zero))
        return False
    except CallError:
        pass
    try:
        replace(subject, apart=True).call(*probe(subject, zero, zero))
    except CallError as error:
        why = "candidates are drawn with repetition: let it take ties"
        raise LabError(f"{subject.name} must take equal completions, for {why}; {error}") from error
    return True


def _precision(subject: Subject) -> torch.dtype:
    """The widest dtype whose digits are all in the loss: of two small steps, the second changes it as the first."""
    tensors = probe(subject, ORDINARY[0], ORDINARY[1] * subject.beta_r)
    policy = [tensor.clone().requires_grad_() for tensor in tensors[: subject.n_policy]]
    rest = tensors[subject.n_policy :]
    loss = subject.call(*policy, *rest)
    gradients = torch.autograd.grad(loss.sum(), policy, materialize_grads=True)
    # What is flat has steps of its own.
    if not any(gradient.any() for gradient in gradients):
        return torch.float64

    def change(step: float) -> Tensor:
        shifts = [
            step * torch.linspace(i + 0.5, 2 * i + 1, each.numel()).reshape(each.shape) for i, each in enumerate(policy)
        ]
        moved = [each.detach() + shift for each, shift in zip(policy, shifts, strict=True)]
        return (subject.call(*moved, *rest) - loss).detach()

    for dtype, step in STEPS.items():
        one, two = change(step), change(2 * step)
        if ((one != 0) & ((two - 2 * one).abs() <= 0.1 * one.abs())).any():
            return dtype
    return torch.bfloat16 if change(1.0).any() else torch.float64


def _batching(subject: Subject) -> Batching:
    """How the losses of three examples together compare with each alone."""
    tensors = probe(subject, ORDINARY[0], ORDINARY[1] * subject.beta_r)
    together = subject.call(*tensors)
    alone = torch.stack([subject.call(*(tensor[i : i + 1] for tensor in tensors)).reshape(()) for i in range(3)])
    if together.shape == (3,):
        return "rows" if subject.same(together, alone) else "mixed"
    whole = together.reshape(())
    return "reduced" if subject.same(whole, alone.mean()) or subject.same(whole, alone.sum()) else "mixed"
