"""What changes a loss and what does not, and the defects that this gives away."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from exo_toy.lab.scores import alpha_of
from exo_toy.lab.subject import LOG_RATIO, REWARDS, CallError, LabError, Subject, order_matters, probe

SMALL = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


@dataclass(frozen=True)
class Finding:
    """A defect.

    Attributes:
        code: a short name of the defect, one of the keys of ``exo_toy.lab.FINDINGS``.
        text: what was found.
        example: the smallest input that shows it, as text; empty where any does.
    """

    code: str
    text: str
    example: str = ""


@dataclass(frozen=True)
class Curve:
    """Loss and gradient weight of a pair against its margin.

    Attributes:
        margin: [M], beta_pi times the difference of the log ratios, half of it on either completion, in nats.
        losses: [M].
        weight: [M], minus the derivative of the loss by the margin.
    """

    margin: Tensor
    losses: Tensor
    weight: Tensor


def curve(subject: Subject, margins: Tensor) -> Curve:
    """Of two candidates, the first preferred; in a list by one unit of reward over beta_r."""
    at = margins.clone().requires_grad_()
    log_ratio = torch.stack([at, -at], -1) / (2 * subject.beta_pi)
    extra = torch.tensor([[subject.beta_r, 0.0]], dtype=margins.dtype).expand(len(margins), 2)
    losses = subject(*probe(subject, log_ratio, extra))
    (slope,) = torch.autograd.grad(losses.sum(), at, materialize_grads=True)
    return Curve(margins, losses.detach(), -slope)


def invariances(subject: Subject) -> dict[str, bool]:
    """What leaves the loss as it is: a constant added to all log ratios, or to all rewards; a reordering of candidates;
    another label.
    """
    rewards = REWARDS * subject.beta_r
    value = _value(subject, LOG_RATIO, rewards)
    found = {"a constant added to the log ratios": subject.same(value, _value(subject, LOG_RATIO + 0.7, rewards))}
    if subject.kind in ("list", "rewarded pair", "valued"):
        which = "the rewards and values" if subject.kind == "valued" else "the rewards"
        found[f"a constant added to {which}"] = subject.same(value, _value(subject, LOG_RATIO, rewards + 0.7))
        found["other rewards"] = subject.same(value, _value(subject, LOG_RATIO, rewards.flip(-1) * 1.3))
    if subject.kind in ("list", "ranked"):
        found["the order of the candidates"] = not order_matters(subject, rewards)
    if subject.kind in ("pair", "reference-free"):
        swapped = LOG_RATIO[:, [1, 0, 2, 3]]
        found["the label"] = subject.same(value, _value(subject, swapped, rewards))
    if subject.kind == "unpaired":
        found["the label"] = subject.same(value, _value(subject, LOG_RATIO, rewards[:, [1, 0, 2, 3]]))
    return found


def broken_laws(subject: Subject, found: dict[str, bool]) -> Iterator[Finding]:
    """Defects of the loss as a function, away from the limits of arithmetic."""
    if found.get("the label") or found.get("other rewards"):
        yield Finding("blind", "the same whichever completion is preferred: the data cannot teach it anything")
    else:
        yield from _steps(subject)
        margins = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
        ends = curve(subject, margins).losses - curve(subject, -margins).losses
        if (ends > 0).all():
            text = "lower where what is better is the less probable"
            if subject.n_policy == 2:
                text += f"; {subject.tensors[0]} is taken for the chosen one's, {subject.tensors[1]} for the rejected"
            yield Finding("reversed", text, "margin 0.5 and -0.5")
    if subject.kind in ("list", "ranked"):
        yield from _mask(subject)
    if subject.kind == "list":
        yield from _list_laws(subject, found)
    if subject.kind in ("pair", "reference-free"):
        yield from _below_zero(subject)
        yield from _alpha(subject)
    for name in subject.settings:
        yield from _label_smoothing(subject) if name == "label_smoothing" else _unread(subject, name)


def _steps(subject: Subject) -> Iterator[Finding]:
    """A loss that changes and has no slope anywhere."""
    # Alone, one that mixes its examples may be constant.
    if subject.batching == "mixed":
        return
    margins = torch.linspace(-20, 20, 81, dtype=torch.float64)
    found = curve(subject, margins)
    if not found.weight.any() and found.losses.isfinite().all():
        steps = (found.losses.diff() != 0).nonzero().flatten().tolist()
        if steps:
            text = "the gradient is 0 at every margin, though the loss changes: it moves in steps"
            yield Finding("gradient", text, f"margin {margins[steps[0]]:g} and {margins[steps[0] + 1]:g}")
        else:
            yield Finding("gradient", "the gradient is 0 at every margin: the policy changes nothing")


def _list_laws(subject: Subject, found: dict[str, bool]) -> Iterator[Finding]:
    rewards = REWARDS * subject.beta_r
    if not found["a constant added to the rewards"]:
        change = "a constant added to all rewards of an example changes the loss"
        zero = _value(subject, LOG_RATIO, 0 * rewards)
        whole = _value(subject, LOG_RATIO, rewards + rewards.flip(-1)) + zero
        parts = _value(subject, LOG_RATIO, rewards) + _value(subject, LOG_RATIO, rewards.flip(-1))
        if subject.same(whole, parts):
            yield Finding(
                "raw rewards", f"linear in the rewards: they are weights, not put through a softmax; {change}"
            )
        else:
            yield Finding("reward shift", change)
    value = _value(subject, LOG_RATIO, rewards).repeat(2)
    read = [j for j in range(4) if not subject.same(value, _nudged(subject, rewards, j))]
    if read and len(read) < 4:
        unread = ", ".join(str(j + 1) for j in range(4) if j not in read)
        yield Finding("first candidates", f"the rewards of candidates {unread} of 4 change nothing")
    elif subject.ordered and read:
        tied = rewards.clone()
        tied[:, :2] = tied[:, :1]
        if not order_matters(subject, rewards):
            first = "candidates of equal reward are not treated alike: ties are resolved by position"
            yield Finding("ties", first, f"rewards {_text(tied[0, :3])}")
        else:
            yield Finding("order", "changed by the order of the candidates")
    yield from _negative(subject, _least(subject, rewards[:1]), "the minimum")


def _nudged(subject: Subject, rewards: Tensor, j: int) -> Tensor:
    """The loss with one reward lowered below all others, and raised above."""
    unit = torch.nn.functional.one_hot(torch.tensor(j), rewards.shape[-1]) * 3.0 * subject.beta_r
    return torch.cat([_value(subject, LOG_RATIO, moved) for moved in (rewards - unit, rewards + unit)])


def _mask(subject: Subject) -> Iterator[Finding]:
    """Candidates that do not count, others in each example, must be as if they were not there."""
    function = subject.function.forward if isinstance(subject.function, torch.nn.Module) else subject.function
    if "mask" not in inspect.signature(function).parameters or subject.batching == "mixed":
        return
    rewards, mask = REWARDS * subject.beta_r, torch.tensor([[True, True, False, True], [False, True, True, False]])
    kept = [_value(subject, LOG_RATIO[i : i + 1, row], rewards[i : i + 1, row]) for i, row in enumerate(mask)]
    want = torch.cat(kept)
    # Ones are what counts or what is left out, and may have to be numbers.
    for sense in (mask, ~mask, mask.double(), (~mask).double()):
        try:
            have = subject.call(*probe(subject, LOG_RATIO, rewards), mask=sense)
        except CallError:
            continue
        wanted = [want] if have.shape == want.shape else [want.mean(), want.sum()]
        if any(subject.same(have.reshape(each.shape), each) for each in wanted):
            return
    yield Finding(
        "mask", "not that of the other candidates where a mask leaves some out", "mask (1, 1, 0, 1), (0, 1, 1, 0)"
    )


def _least(subject: Subject, rewards: Tensor) -> float:
    """The least loss of one list over all log ratios, where they are finite."""

    def value(vector: np.ndarray) -> tuple[float, np.ndarray]:
        log_ratio = torch.from_numpy(vector.copy())[None].requires_grad_()
        loss = _value(subject, log_ratio, rewards)
        (gradient,) = torch.autograd.grad(loss.sum(), log_ratio, materialize_grads=True)
        return loss.item(), gradient[0].numpy()

    found = scipy.optimize.minimize(
        value, np.zeros(rewards.shape[-1]), jac=True, method="L-BFGS-B", options={"maxfun": 200}
    )
    return float(found.fun) if np.abs(found.x).max() < 1e3 else math.nan


def _below_zero(subject: Subject) -> Iterator[Finding]:
    """A minimum below zero at a finite margin."""
    found = curve(subject, torch.linspace(-40, 40, 401, dtype=torch.float64))
    at = int(found.losses.argmin())
    if 0 < at < 400 and min(found.losses[0], found.losses[-1]) > found.losses[at] + 1e-12:
        yield from _negative(subject, float(found.losses[at]), f"margin {found.margin[at]:.4g}")


def _negative(subject: Subject, least: float, where: str) -> Iterator[Finding]:
    if least < -100 * subject.rounding:
        text = f"falls to {least:.3g}; a divergence from a normalised target does not fall below 0"
        yield Finding("unnormalised target", f"{text}: the target sums to 1 {math.expm1(-least):+.3g}", where)


def _alpha(subject: Subject) -> Iterator[Finding]:
    """A loss that names its alpha and means another one; unless that alpha is something else, and moves no score."""
    told, meant = subject.settings.get("alpha"), alpha_of(subject)
    if told is None or meant is None or abs(told - meant) <= 1e-6:
        return
    moved = alpha_of(with_alpha(subject, told + 0.1))
    if moved is None or abs(moved - meant) > 1e-6:
        yield Finding("alpha", f"alpha = {told:g} gives the optimum of Amari's alpha = {meant:.4g}")


def _unread(subject: Subject, name: str) -> Iterator[Finding]:
    """A number or a switch that may be anything."""
    value = subject.settings[name]
    if not isinstance(value, int | float) or value == 0:
        return
    other = not value if isinstance(value, bool) else 0.75 * value
    # Far apart, so that bounds are met.
    generator = torch.Generator().manual_seed(2)
    log_ratio, rewards = 10 * torch.randn(2, 64, 4, generator=generator, dtype=torch.float64)
    tensors = probe(subject, log_ratio, rewards)
    if subject.has_lengths:
        tensors[-2:] = torch.randint(1, 9, (2, 64), generator=generator).unbind()
    try:
        same = torch.equal(*(subject.call(*tensors, **{name: each}).nan_to_num() for each in (value, other)))
    except LabError:
        return
    if same:
        yield Finding("ignored", f"{name} = {value} and {other} give the same loss: nothing reads it")


def with_alpha(subject: Subject, alpha: float) -> Subject:
    """The same at another alpha."""
    return replace(subject, settings={**subject.settings, "alpha": alpha})


def _label_smoothing(subject: Subject) -> Iterator[Finding]:
    tensors = probe(subject, LOG_RATIO, REWARDS)

    def at(eps: float) -> Tensor | None:
        try:
            return subject.call(*tensors, label_smoothing=eps).detach()
        except CallError:
            return None

    usual, other, none = at(0.1), at(0.3), at(0.0)
    if usual is not None and other is not None and subject.same(usual, other):
        yield Finding("label_smoothing ignored", "label_smoothing = 0.1 and 0.3 give the same loss")
    else:
        for eps in SMALL:
            replaced = at(eps)
            if none is not None and replaced is not None and torch.equal(none, replaced):
                text = f"label_smoothing = 0 gives the loss of {eps:g}"
                yield Finding("label_smoothing changed", f"{text}: it is replaced without a word")
                break
    for eps in (-0.1, 1.5):
        loss = at(eps)
        if loss is not None:
            gives = "NaN" if loss.isnan().any() else "a number"
            yield Finding("label_smoothing range", f"label_smoothing = {eps:g} is accepted and gives {gives}")


def _value(subject: Subject, log_ratio: Tensor, rewards: Tensor) -> Tensor:
    return subject.together(*probe(subject, log_ratio, rewards))


def _text(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values.tolist()) + ")"
