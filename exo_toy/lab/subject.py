"""A loss under examination: which tensors it takes, how to call it, and what it makes of completions of a space."""

import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

Kind = Literal["list", "ranked", "pair", "rewarded pair", "reference-free", "unpaired", "valued"]
KINDS: tuple[str, ...] = get_args(Kind)
# How the losses of a batch come: one for each example on its own, one number for all that is their mean or sum, or
# such that an example's depends on the others.
Batching = Literal["rows", "reduced", "mixed"]
# How many tensors a kind may take, in the order in which they are told apart.
SIZES: Mapping[str, tuple[int, ...]] = {
    "list": (2, 3),
    "ranked": (1,),
    "pair": (4, 2),
    "rewarded pair": (6,),
    "reference-free": (4, 2),
    "unpaired": (3,),
    "valued": (4,),
}
TEMPERATURES = ("beta", "beta_pi", "beta_r")
# Keywords that the laboratory fills in where a loss needs them and nothing was said.
USUAL = {"beta": 0.5, "beta_pi": 0.5, "beta_r": 1.0, "label_smoothing": 0.1}
# Relative to what a loss holds; of half types, if it is computed in float32.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
# How words begin that stand for the rejected completion.
REJECTED = ("reject", "dispreferred", "lose", "losing", "neg", "worse", "bad")
SCALARS = (bool, float, int, str)
# Log ratios and rewards of three examples of which any loss must make sense.
ORDINARY = (
    torch.tensor([[0.3, -0.8], [-1.1, 0.4], [0.9, 0.2]], dtype=torch.float64),
    torch.tensor([[1.0, 0.2], [0.1, 0.7], [0.5, 0.4]], dtype=torch.float64),
)
# Steps that are seen in one dtype and lost in the rounding of the next.
STEPS = {torch.float64: 2**-32, torch.float32: 2**-11}
# Two ordinary examples with four candidates, none alike.
LOG_RATIO = torch.tensor([[0.3, -1.2, 0.5, 1.0], [2.0, 0.1, -0.4, 0.6]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, 0.2, 0.7, 0.4], [0.1, 0.6, 0.3, 1.5]], dtype=torch.float64)


class LabError(ValueError):
    """The loss cannot be examined; the message says why and what to tell the laboratory."""


class CallError(LabError):
    """The loss raised something, which is the cause of this."""


@dataclass(frozen=True)
class Scene:
    """A space small enough to enumerate: log reference, reward and length of each of N completions.

    And, for losses that fit one, the value of the prompt.
    """

    log_ref: Tensor
    reward: Tensor
    lengths: Tensor
    value: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))


@dataclass(frozen=True)
class Subject:
    """A loss with its keywords bound.

    Attributes:
        function: as it was given.
        kind: which tensors it takes, see :func:`bind`.
        tensors: the names of those parameters, in the order of the kind.
        positions: of those parameters in the function's own order.
        settings: keywords that it is called with.
        beta_pi: what multiplies the log ratio.
        beta_r: what divides the rewards; 1 for losses on labels.
        precision: the dtype in which it computes what comes in float64.
        batching: whether it has to be called for every example alone, because it reduces or mixes examples.
        ordered: whether the order of the candidates matters.
    """

    function: Callable[..., Any]
    kind: Kind
    tensors: tuple[str, ...]
    positions: tuple[int, ...]
    settings: Mapping[str, Any]
    beta_pi: float
    beta_r: float
    precision: torch.dtype = torch.float64
    batching: Batching = "rows"
    ordered: bool = False

    @property
    def name(self) -> str:
        """Of the function."""
        return name_of(self.function)

    @property
    def by_row(self) -> bool:
        """Whether every example takes a call of its own."""
        return self.batching != "rows"

    @property
    def n_policy(self) -> int:
        """How many of the tensors, the first ones, are the policy's."""
        return 2 if self.kind in ("pair", "rewarded pair", "reference-free") else 1

    @property
    def rounding(self) -> float:
        """How closely its losses are known, relative to what they hold."""
        return ROUNDING[self.precision]

    def same(self, first: Tensor, second: Tensor) -> bool:
        """Equal up to rounding."""
        return torch.allclose(first, second, rtol=self.rounding, atol=self.rounding, equal_nan=True)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The losses [B]."""
        if self.by_row and len(tensors[0]) > 1:
            rows = (self.call(*(tensor[i : i + 1] for tensor in tensors)) for i in range(len(tensors[0])))
            return torch.stack([row.reshape(()) for row in rows])
        return self.call(*tensors).reshape(-1)

    def call(self, *tensors: Tensor, **changed: Any) -> Tensor:
        """The losses as the function returns them, of all that it returns; it works on copies."""
        return self.called(*(tensor.clone() for tensor in tensors), **changed)

    def called(self, *tensors: Tensor, **changed: Any) -> Tensor:
        """Likewise, on these very tensors."""
        given = dict(zip(self.positions, tensors, strict=True))
        try:
            result = self.function(*(given[i] for i in range(len(given))), **{**self.settings, **changed})
        except (Exception, SystemExit) as error:
            shapes = ", ".join(
                f"{name} {list(tensor.shape)}" for name, tensor in zip(self.tensors, tensors, strict=True)
            )
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise CallError(f"{self.name} fails as a loss of kind {self.kind!r} on {shapes}: {reason}") from error
        for name in ("losses", "loss"):
            result = result.get(name, result) if isinstance(result, Mapping) else getattr(result, name, result)
        result = result[0] if isinstance(result, tuple | list) and result else result
        if not isinstance(result, Tensor) or not result.is_floating_point():
            got = result.dtype if isinstance(result, Tensor) else f"an object of type {type(result).__name__}"
            raise LabError(f"{self.name} must return a tensor of floating-point losses [B]; got {got}")
        return result

    def of(self, scene: Scene, log_pi: Tensor, index: Tensor) -> Tensor:
        """The losses [M] of completions [M, K] of a scene: candidates, best first, chosen and rejected, or labelled."""
        return self(*self.arguments(scene, log_pi, index))

    def arguments(self, scene: Scene, log_pi: Tensor, index: Tensor) -> list[Tensor]:
        """What :meth:`of` calls the loss with."""
        log_ratio = log_pi - scene.log_ref
        if self.kind == "list" and len(self.tensors) == 3:
            return [log_pi[index], scene.log_ref[index], scene.reward[index]]
        if self.kind == "list":
            return [log_ratio[index], scene.reward[index]]
        if self.kind == "ranked":
            return [log_ratio[index]]
        if self.kind == "valued":
            only = index.squeeze(-1)
            return [log_pi[only], scene.log_ref[only], scene.reward[only], scene.value.expand(len(only))]
        first, second = index.unbind(-1)
        if self.kind == "unpaired":
            return [log_pi[first], scene.log_ref[first], second.bool()]
        if self.kind == "pair" and len(self.tensors) == 2:
            return [log_ratio[first], log_ratio[second]]
        given = [log_pi[first], log_pi[second]]
        if self.kind in ("pair", "rewarded pair"):
            given += [scene.log_ref[first], scene.log_ref[second]]
        if self.kind == "rewarded pair":
            given += [scene.reward[first], scene.reward[second]]
        return given + [scene.lengths[index] for index in (first, second)][: len(self.tensors) - len(given)]


def name_of(function: Callable[..., Any]) -> str:
    """A function's name, or its class's."""
    return str(getattr(function, "__name__", type(function).__name__))


def first_line(error: BaseException) -> str:
    """Of its message, if it has any."""
    return next(iter(str(error).splitlines()), "no message")


def examine(function: Callable[..., Any], *, kind: str | None = None, settings: Mapping[str, Any]) -> Subject:
    """Bind a loss as :func:`bind` does, and find out by calling it what else must be known to examine it."""
    subject = bind(function, kind=kind, settings=settings)
    subject = replace(subject, precision=_precision(subject))
    subject = replace(subject, batching=_batching(subject))
    rewards = REWARDS * subject.beta_r
    tied = torch.cat([rewards[:, :1], rewards[:, :1], rewards[:, 2:]], -1)
    ordered = subject.kind == "list" and (order_matters(subject, rewards) or order_matters(subject, tied))
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
    signed = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        parameters = list(inspect.signature(signed).parameters.values())
    except (TypeError, ValueError) as error:
        raise LabError(f"the loss must have a signature; got {function!r}") from error
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
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
            raise LabError(f"{name} has no default: give it a value, as settings={{'{name}': ...}} or --set {name}=...")
        else:
            tensors.append(name)
    if kind is not None and not tensors and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        tensors = [f"argument {i + 1}" for i in range(SIZES[kind][0])]
    found = cast(Kind, kind or _kind(tensors))
    if len(tensors) not in SIZES[found]:
        wanted = " or ".join(str(size) for size in SIZES[found])
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
        if not isinstance(value, int | float) or not value > 0:
            raise LabError(f"{name} must be a number above 0; got {value!r}")
    return Subject(function, found, names, tuple(positions), bound, float(beta_pi), float(beta_r))


def _scalar(annotation: Any) -> bool:
    """Also where annotations are strings."""
    return annotation in SCALARS or annotation in [scalar.__name__ for scalar in SCALARS]


def _kind(tensors: Sequence[str]) -> str:
    """From the names of the parameters that are tensors."""
    text = " ".join(tensors).lower()
    rewarded = "reward" in text or "score" in text
    pairs = "chosen" in text or "rejected" in text
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
            return "reference-free" if "length" in text else "pair"
        case 4 if "value" in text:
            return "valued"
        case 6 if rewarded and pairs:
            return "rewarded pair"
    listed = f"{len(tensors)} tensors ({', '.join(tensors)})" if tensors else "no tensors"
    raise LabError(f"kind must be told, one of {', '.join(KINDS)}: a loss of {listed} is none of the known")


def _role(kind: Kind, name: str) -> tuple[bool, ...]:
    """What a tensor is by its name, so that sorted they are in the order of the kind."""
    extra = any(word in name for word in ("reward", "score", "length", "label", "desirable"))
    # "Preferred" is no reference.
    ref = re.search("(?<!p)ref", name) is not None
    if kind in ("pair", "rewarded pair", "reference-free"):
        return extra, ref, any(word.startswith(REJECTED) or word in ("l", "yl") for word in name.split("_"))
    return "value" in name, extra, ref


def probe(subject: Subject, log_ratio: Tensor, extra: Tensor) -> list[Tensor]:
    """Arguments of the subject's kind: log ratios [B, K] and, for lists, rewards [B, K]; a pair reads two columns."""
    if subject.kind == "list":
        return [log_ratio, torch.zeros_like(log_ratio), extra] if len(subject.tensors) == 3 else [log_ratio, extra]
    if subject.kind == "ranked":
        return [log_ratio]
    first, second = log_ratio[:, 0].clone(), log_ratio[:, 1].clone()
    if subject.kind == "unpaired":
        return [first, torch.zeros_like(first), extra[:, 0] >= extra[:, 1]]
    if subject.kind == "valued":
        return [first, torch.zeros_like(first), extra[:, 0].clone(), extra[:, 1].clone()]
    if subject.kind == "reference-free":
        # Log-probabilities are below zero: log ratios are moved there, per token where the loss knows lengths.
        if len(subject.tensors) == 2:
            return [first - 40.0, second - 40.0]
        lengths = torch.full((len(first),), 2), torch.full((len(first),), 3)
        return [lengths[0] * (first - 40.0), lengths[1] * (second - 40.0), *lengths]
    given = [first, second, torch.zeros_like(first), torch.zeros_like(first)]
    if subject.kind == "pair":
        return given[: len(subject.tensors)]
    return [*given, extra[:, 0].clone(), extra[:, 1].clone()]


def loss_and_gradients(subject: Subject, tensors: Sequence[Tensor], *, whole: bool = False) -> tuple[Tensor, Tensor]:
    """The losses, or their mean if of a batch as a whole, and the derivatives by the policy's tensors; in float64."""
    policy = [tensor.clone().requires_grad_() for tensor in tensors[: subject.n_policy]]
    given = (*policy, *tensors[subject.n_policy :])
    loss = subject.call(*given).mean().reshape(1) if whole else subject(*given)
    gradients = torch.autograd.grad(loss.sum(), policy, materialize_grads=True)
    return loss.detach().double(), torch.cat([gradient.flatten() for gradient in gradients]).double()


def shown(subject: Subject, tensors: Sequence[Tensor]) -> str:
    """Arguments as text, the first example of each."""
    parts = []
    for name, tensor in zip(subject.tensors, tensors, strict=True):
        row = tensor[0].flatten().tolist()
        values = ", ".join(f"{value:g}" for value in row[:8]) + (", ..." if len(row) > 8 else "")
        parts.append(f"{name} ({values})" if len(row) > 1 else f"{name} {values}")
    return ", ".join(parts)


def order_matters(subject: Subject, rewards: Tensor) -> bool:
    """Whether candidates in another order, with their rewards, have another loss."""
    value = subject(*probe(subject, LOG_RATIO[:, :3], rewards[:, :3]))
    orders = (list(order) for order in itertools.permutations(range(3)))
    return any(not subject.same(value, subject(*probe(subject, LOG_RATIO[:, o], rewards[:, o]))) for o in orders)


def _precision(subject: Subject) -> torch.dtype:
    """The widest dtype whose digits are all in the loss: of two small steps, the second changes it as the first."""
    tensors = probe(subject, ORDINARY[0], ORDINARY[1] * subject.beta_r)
    policy = [tensor.clone().requires_grad_() for tensor in tensors[: subject.n_policy]]
    tensors = [*policy, *tensors[subject.n_policy :]]
    loss = subject.call(*tensors)
    if loss.isnan().any():
        raise LabError(f"{subject.name} gives NaN on ordinary numbers: {shown(subject, tensors)}")
    if not torch.equal(loss, subject.call(*tensors)):
        raise LabError(f"{subject.name} gives another loss when called again: it keeps a state, or draws numbers")
    if not loss.requires_grad:
        raise LabError(f"{subject.name} gives a loss without a gradient by the policy: it is detached, or not torch's")

    def change(step: float) -> Tensor:
        shifts = [
            step * torch.linspace(i + 0.5, i + 1, each.numel()).reshape(each.shape) for i, each in enumerate(policy)
        ]
        moved = [each.detach() + shift for each, shift in zip(policy, shifts, strict=True)]
        return (subject.call(*moved, *tensors[subject.n_policy :]) - loss).detach()

    for dtype, step in STEPS.items():
        one, two = change(step), change(2 * step)
        if ((one != 0) & ((two - 2 * one).abs() <= 0.1 * one.abs())).any():
            return dtype
    return torch.bfloat16 if change(1.0).any() else torch.float64


def _batching(subject: Subject) -> Batching:
    """How the losses of three examples together compare with each alone."""
    tensors = probe(subject, ORDINARY[0], ORDINARY[1] * subject.beta_r)
    together = subject.call(*tensors)
    if together.shape != (3,) and together.numel() != 1:
        raise LabError(f"{subject.name} must return one loss per example, [3] here; got {list(together.shape)}")
    alone = torch.stack([subject.call(*(tensor[i : i + 1] for tensor in tensors)).reshape(()) for i in range(3)])
    if together.shape == (3,):
        return "rows" if subject.same(together, alone) else "mixed"
    whole = together.reshape(())
    return "reduced" if subject.same(whole, alone.mean()) or subject.same(whole, alone.sum()) else "mixed"
