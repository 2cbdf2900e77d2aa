"""A loss under examination: which tensors it takes, how to call it, and what it makes of completions of a space."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Kind = Literal["list", "ranked", "pair", "rewarded pair", "reference-free", "unpaired", "valued"]
KINDS: tuple[str, ...] = get_args(Kind)
# How the losses of a batch come: one for each example on its own, one number for all that is their mean or sum, or
# such that an example's depends on the others.
Batching = Literal["rows", "reduced", "mixed"]
# How a temperature came to be known.
TOLD, FOUND, ASSUMED = "told", "found", "assumed"
# What sets equal completions apart, for losses that refuse them: below the rounding of any comparison.
APART = 2.0**-34
# Low enough for any log ratio of ordinary size above it.
BELOW = -1000.0
# Relative to what a loss holds; of half types, if it is computed in float32.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
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
        kind: which tensors it takes, see :func:`exo_toy.lab.binding.bind`.
        tensors: the names of those parameters, in the order of the kind.
        positions: of those parameters in the function's own order.
        settings: keywords that it is called with.
        beta_pi: what multiplies the log ratio.
        beta_r: what divides the rewards; 1 for losses on labels.
        temperatures: by name, whether it was told, found or assumed to be 1.
        precision: the dtype in which it computes what comes in float64.
        batching: whether it has to be called for every example alone, because it reduces or mixes examples.
        ordered: whether the order of the candidates matters.
        apart: whether equal completions are set apart before it sees them, because it refuses them.
        size: of its losses, with which they are compared.
        level: the log-probability under the reference where none is given: 0, or ``BELOW`` where it refuses others
            above 0.
    """

    function: Callable[..., Any]
    kind: Kind
    tensors: tuple[str, ...]
    positions: tuple[int, ...]
    settings: Mapping[str, Any]
    beta_pi: float
    beta_r: float
    temperatures: Mapping[str, str]
    precision: torch.dtype = torch.float64
    batching: Batching = "rows"
    ordered: bool = False
    apart: bool = False
    size: float = 1.0
    level: float = 0.0

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
    def has_lengths(self) -> bool:
        """Whether it takes the lengths of both completions."""
        return len(self.tensors) == {"pair": 6, "reference-free": 4}.get(self.kind)

    @property
    def rounding(self) -> float:
        """How closely its losses are known, relative to what they hold."""
        return ROUNDING[self.precision]

    def same(self, first: Tensor, second: Tensor) -> bool:
        """Equal up to rounding."""
        atol = self.rounding * min(self.size, 1.0)
        return torch.allclose(first, second, rtol=self.rounding, atol=atol, equal_nan=True)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The losses [B]."""
        if self.by_row and len(tensors[0]) > 1:
            rows = (self.call(*(tensor[i : i + 1] for tensor in tensors)) for i in range(len(tensors[0])))
            return torch.stack([row.reshape(()) for row in rows])
        return self.call(*tensors).reshape(-1)

    def together(self, *tensors: Tensor) -> Tensor:
        """Likewise, and of one that mixes its examples each in the company of the others."""
        return self.call(*tensors) if self.batching == "mixed" else self(*tensors)

    def call(self, *tensors: Tensor, **changed: Any) -> Tensor:
        """The losses as the function returns them, of all that it returns; it works on copies."""
        return self.called(*self._set_apart([tensor.clone() for tensor in tensors]), **changed)

    def _set_apart(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.apart:
            # The policy's first, and the reward that is first or all there are.
            for i in {0, {"list": len(tensors) - 1, "rewarded pair": 4}.get(self.kind, 0)}:
                n = tensors[i].shape[-1] if tensors[i].ndim > 1 else 1
                tensors[i] = tensors[i] + APART * torch.arange(n, 0, -1, dtype=tensors[i].dtype)
        return tensors

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
        result = result[0] if isinstance(result, tuple) and result else result
        if not isinstance(result, Tensor) or not result.is_floating_point():
            got = result.dtype if isinstance(result, Tensor) else f"an object of type {type(result).__name__}"
            raise LabError(f"{self.name} must return a tensor of floating-point losses [B]; got {got}")
        if result.layout != torch.strided or result.device != tensors[0].device:
            got = f"{result.layout} on {result.device}"
            raise LabError(f"{self.name} must return a dense tensor on the device of its arguments; got {got}")
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
    """A function's name, or its class's; of one with arguments bound, its own."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def first_line(error: BaseException) -> str:
    """Of its message, if it has any."""
    return next(iter(str(error).splitlines()), "no message")


def probe(subject: Subject, log_ratio: Tensor, extra: Tensor) -> list[Tensor]:
    """Arguments of the subject's kind: log ratios [B, K] and, for lists, rewards [B, K]; a pair reads two columns."""
    ref = torch.full_like(log_ratio, subject.level)
    if subject.kind == "list":
        return [log_ratio + ref, ref, extra] if len(subject.tensors) == 3 else [log_ratio, extra]
    if subject.kind == "ranked":
        return [log_ratio]
    first, second = log_ratio[:, 0].clone(), log_ratio[:, 1].clone()
    if subject.kind == "reference-free":
        # Log-probabilities are below zero: log ratios are moved there, per token where the loss knows lengths.
        if len(subject.tensors) == 2:
            return [first - 40.0, second - 40.0]
        lengths = torch.full((len(first),), 2), torch.full((len(first),), 3)
        return [lengths[0] * (first - 40.0), lengths[1] * (second - 40.0), *lengths]
    if len(subject.tensors) == 2:
        return [first, second]
    refs = [ref[:, 0].clone(), ref[:, 0].clone()]
    if subject.kind == "unpaired":
        return [first + refs[0], refs[0], extra[:, 0] >= extra[:, 1]]
    rewards = [extra[:, 0].clone(), extra[:, 1].clone()]
    if subject.kind == "valued":
        return [first + refs[0], refs[0], *rewards]
    given = [first + refs[0], second + refs[1], *refs]
    if subject.kind == "rewarded pair":
        return [*given, *rewards]
    # Of one token each, so that sums are means.
    return [*given, *(torch.ones(len(first), dtype=torch.long) for _ in range(2))][: len(subject.tensors)]


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
