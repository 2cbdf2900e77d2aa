"""A loss characterised: everything that the laboratory finds out, on one page."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from exo_toy.lab.binding import bind, examine
from exo_toy.lab.gradients import FEW, NONE, UNDECIDED, UNDEFINED, Alignment, align, candidate_counts
from exo_toy.lab.laws import Curve, Finding, broken_laws, curve, invariances, with_alpha
from exo_toy.lab.numerics import failures
from exo_toy.lab.optimum import Capacity, TabularOptimum, capacity, tabular_optimum
from exo_toy.lab.scores import alpha_of
from exo_toy.lab.subject import ASSUMED, FOUND, TOLD, LabError, Subject, probe
from exo_toy.losses import LOSSES, LossRecord

FINDINGS: Mapping[str, str] = {
    "alpha": "an alpha-divergence, parameterised otherwise than its alpha says",
    "blind": "blind to the label",
    "double backward": "second derivatives wrong or missing",
    "dtype": "the dtype is changed or refused",
    "first candidates": "rewards that are not read",
    "gradient": "the gradient is not the value's",
    "ignored": "a setting that nothing reads",
    "in-place": "an argument is written to",
    "infinite": "infinite at finite numbers",
    "label_smoothing changed": "label smoothing silently changed",
    "label_smoothing ignored": "label smoothing ignored",
    "label_smoothing range": "label smoothing outside its range accepted",
    "low precision": "computed in low precision",
    "mask": "candidates that are masked count",
    "nan": "NaN",
    "nan gradient": "NaN gradient",
    "mixed": "examples mixed",
    "order": "the order of candidates matters",
    "raises": "an exception that is no refusal",
    "raw rewards": "raw rewards as weights",
    "reduced": "one number for a batch",
    "reversed": "prefers what was rejected",
    "reward shift": "changed by a constant added to the rewards",
    "ties": "ties resolved by position",
    "unnormalised target": "a target that does not sum to one",
}
# What is said of temperatures that were not told.
ORIGINS = {
    FOUND: "not told, but shown by the loss",
    ASSUMED: "assumed, neither told nor shown by the loss: others may change every verdict; tell with --set",
}
MARGINS = torch.linspace(-20, 20, 161, dtype=torch.float64)


@dataclass(frozen=True)
class Report:
    """What :func:`characterize` found.

    Attributes:
        name: of the function.
        kind: of the loss, as found or told.
        settings: its keywords.
        beta_pi: what multiplies the log ratio, as told, else as the loss shows, else 1.
        beta_r: what divides the rewards, likewise; 1 for losses on labels.
        temperatures: of either, or of "beta" where there is one, "told", "found" or "assumed": among the settings and
            defaults; shown by its optimum, of lists by the curvature there, too; 1, and the verdicts are those at 1.
        apart: whether it refuses equal completions, and saw them 1e-10 apart.
        equals: names in ``exo_toy.losses.LOSSES`` of the losses that it equals, up to a factor and a constant.
        alignment: expected gradients against divergences as K grows; for losses on lists only.
        optima: over full tables, for the smallest K and, of lists, for a larger one.
        capacities: minimisers in a family that cannot hold both modes, likewise.
        alpha: of the alpha-divergence whose score a loss on pairs compares, where it is one; 1 is the log ratio.
        curve: loss and gradient weight against the margin.
        unchanged_by: what leaves the loss as it is.
        findings: defects.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    beta_pi: float
    beta_r: float
    temperatures: Mapping[str, str]
    apart: bool
    equals: tuple[str, ...]
    alignment: Alignment | None
    optima: tuple[TabularOptimum, ...]
    capacities: tuple[Capacity, ...]
    alpha: float | None
    curve: Curve
    unchanged_by: Mapping[str, bool]
    findings: tuple[Finding, ...]

    @property
    def told(self) -> bool:
        """Whether all temperatures were."""
        return {*self.temperatures.values()} == {TOLD}

    @property
    def codes(self) -> set[str]:
        """Of the findings."""
        return {finding.code for finding in self.findings}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def characterize(
    function: Callable[..., Any],
    *,
    kind: str | None = None,
    settings: Mapping[str, Any] | None = None,
    candidates: tuple[int, ...] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Report:
    r"""Find out what a loss optimises, and where it breaks.

    Everything is enumerated on spaces of three and five completions, in float64: expected gradients on K candidates
    as sums over multisets, labels as Bradley and Terry's or, of rankings, Plackett and Luce's. No figure is sampled.

    * Lists: the exact expected gradient, on candidates from the reference, is compared with those of

      .. math:: \mathrm{KL}(\pi_\theta^{\beta_\pi} \| \pi^*_{\beta_r}), \quad
          \mathrm{KL}(\pi^*_{\beta_r} \| \pi_\theta^{\beta_\pi}), \quad D_\alpha, \quad \mathrm{JS}

      at four policies, for each K and in the limit (Richardson's extrapolation in 1/K).
    * The minimiser of the exact expected loss over full tables is compared with :math:`\pi^*_{\beta_\pi \beta_r}`.

    Args:
        function: a loss per example, returning [B], something with ``losses`` [B], or a tuple that begins so; also a
            module with such a ``forward``. It takes float64 on the CPU; equal completions, too, or it sees them 1e-10
            apart, which the page says. One number for a batch is examined example by example. Parameters without a
            default that are no tensors are keyword-only, annotated as numbers, or in ``settings``; ``beta``,
            ``beta_pi``, ``beta_r`` and ``label_smoothing`` without a default are given usual values.
        kind: which tensors it takes, where its signature does not tell: "list", log ratios and rewards [B, K];
            "ranked", log ratios [B, K], best first; "pair", log-probabilities [B] of chosen and rejected under the
            policy, then under the reference, perhaps with both lengths, or two log ratios [B]; "rewarded pair", four
            and both rewards;
            "reference-free", the policy's alone, perhaps with both lengths; "unpaired", policy, reference and a label
            [B]; "valued", policy, reference, reward and the value of the prompt, which is fitted with the policy.
            Candidates may also come as log-probabilities [B, K] under policy and reference, then rewards. Where names
            of parameters show it, tensors may be in another order.
        settings: parameters to call it with. ``beta_pi`` and ``beta_r``, or ``beta``, or ``tau`` of a loss on labels
            without these, are also the temperatures of the targets; a loss that does not take them is one that has
            them set. Those that nobody tells are read off the loss: off its optimum where that is the optimal policy,
            of lists off the curvature there, too, which is exact for divergences between both policies. Where nothing
            shows they are 1, and the page says so.
        candidates: the K, each twice the one before; 2 to 64, or to 8 where their order matters.
        on_step: called with the name of each part of the work as it begins.

    Returns:
        Report; ``str`` of it is the page.

    Raises:
        LabError: a ValueError; the loss cannot be called, and what to tell.

    Example:
        >>> from exo_toy.losses import dpo_loss, ipo_loss
        >>> [characterize(loss, settings={"beta": 0.1}).optima[0].verdict for loss in (dpo_loss, ipo_loss)]
        ['pi*', 'win rates']
    """
    subject = examine(function, kind=kind, settings=dict(settings or {}))
    step = on_step or (lambda _: None)
    lists = subject.kind == "list"
    many = lists and not subject.ordered
    counts = candidate_counts(subject) if candidates is None else tuple(candidates)
    whole = counts and all(isinstance(k, int) and k >= 2 for k in counts)
    if not whole or any(after != 2 * before for before, after in itertools.pairwise(counts)):
        raise LabError(f"candidates must be whole numbers of at least 2, each twice the one before; got {counts}")
    alignment = align(subject, candidates=counts, on_step=step) if lists else None
    step("optima over full tables")
    if subject.temperatures.get("beta") == ASSUMED and (beta := tabular_optimum(subject, k=2).temperature):
        subject = replace(subject, beta_pi=beta, temperatures={"beta": FOUND})
    optima = tuple(tabular_optimum(subject, k=k) for k in ((2, min(8, max(counts))) if many else (2,)))
    step("optima of a family with one mode")
    most = 8 if subject.by_row else max(counts)
    capacities = tuple(capacity(subject, k=k) for k in ((2, most) if many else (2,)))
    step("weights on the margin")
    alpha, weights = alpha_of(subject), curve(subject, MARGINS)
    step("invariances and defects")
    found = invariances(subject)
    return Report(
        name=subject.name,
        kind=subject.kind,
        settings=dict(subject.settings),
        beta_pi=subject.beta_pi,
        beta_r=subject.beta_r,
        temperatures=dict(subject.temperatures),
        apart=subject.apart,
        equals=tuple(_equal(subject)),
        alignment=alignment,
        optima=optima,
        capacities=capacities,
        alpha=alpha,
        curve=weights,
        unchanged_by=found,
        findings=tuple(_findings(subject, found, alignment)),
    )


def defects(
    function: Callable[..., Any], *, kind: str | None = None, settings: Mapping[str, Any] | None = None
) -> tuple[Finding, ...]:
    """The findings of :func:`characterize` alone, sooner.

    Args:
        function: a loss per example.
        kind: which tensors it takes, where its signature does not tell.
        settings: parameters to call it with.

    Returns:
        The findings, each with the smallest input that shows it.

    Raises:
        LabError: a ValueError; the loss cannot be called, and what to tell.

    Example:
        >>> from torch.nn.functional import logsigmoid
        >>> even = lambda chosen_ratio, rejected_ratio: logsigmoid((chosen_ratio - rejected_ratio).abs())
        >>> defects(even)[0].code
        'blind'
    """
    subject = examine(function, kind=kind, settings=dict(settings or {}))
    alphas = subject.kind == "list" and "alpha" in subject.settings
    alignment = align(subject, candidates=candidate_counts(subject)) if alphas else None
    return tuple(_findings(subject, invariances(subject), alignment))


def _findings(subject: Subject, found: dict[str, bool], alignment: Alignment | None) -> Iterator[Finding]:
    if subject.batching == "reduced":
        yield Finding("reduced", "one number for a batch, the mean or the sum of its examples'; examined one by one")
    elif subject.batching == "mixed":
        yield Finding("mixed", "an example's loss depends on the others of its batch")
    yield from broken_laws(subject, found)
    told = subject.settings.get("alpha")
    if alignment is not None and told is not None and alignment.bias and abs(told - alignment.alpha) > 1e-2:
        # Unless that alpha is something else, and turns no gradient.
        few = [align(each, candidates=FEW).alpha for each in (subject, with_alpha(subject, told + 0.1))]
        if abs(few[1] - few[0]) > 1e-2:
            yield Finding("alpha", f"alpha = {told:g} tends to the gradient of Amari's alpha = {alignment.alpha:.2f}")
    yield from failures(subject)


def _equal(subject: Subject) -> Iterator[str]:
    """Losses of the library that take the same tensors and keywords and give the same, up to factor and constant.

    One that mixes the examples of a batch is compared on a batch, and equals no other one.
    """
    generator = torch.Generator().manual_seed(1)
    log_ratio = 2 * torch.randn(12, 4, generator=generator, dtype=torch.float64)
    extra = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    have = subject.together(*probe(subject, log_ratio, extra)).detach().double().flatten()
    for name, record in LOSSES.items():
        want = _of_library(record, subject, log_ratio, extra)
        if want is not None and want.shape == have.shape:
            x, y = want - want.mean(), have - have.mean()
            factor = (x @ y) / (x @ x)
            if factor > 0 and subject.same(y, factor * x):
                yield name


def _of_library(record: LossRecord, subject: Subject, log_ratio: Tensor, extra: Tensor) -> Tensor | None:
    """A loss of the library with the temperatures of the subject and what else it shares, the rest as recorded."""
    names = inspect.signature(record.function).parameters
    shared = {"beta": subject.beta_pi, "beta_pi": subject.beta_pi, "beta_r": subject.beta_r} | dict(subject.settings)
    settings = dict(record.settings) | {
        name: value for name, value in shared.items() if name in names and not callable(value)
    }
    try:
        other = bind(record.function, settings=settings)
        alike = (other.kind, other.has_lengths) == (subject.kind, subject.has_lengths)
        return other.call(*probe(other, log_ratio, extra)).detach() if alike else None
    # What the subject takes may be out of another loss's range.
    except LabError:
        return None


def _lines(report: Report) -> Iterator[str]:
    settings = ", ".join(f"{name}={value!r}" for name, value in report.settings.items() if not callable(value))
    yield f"{report.name}({settings}): a loss of kind {report.kind!r}"
    for origin, says in ORIGINS.items():
        values = {"beta": report.beta_pi, "beta_pi": report.beta_pi, "beta_r": report.beta_r}
        named = [f"{name} = {values[name]:.4g}" for name, how in report.temperatures.items() if how == origin]
        if named:
            yield f"  {' and '.join(named)} {says}"
    if report.apart:
        yield "  equal completions are refused: it saw them 1e-10 apart"
    if report.equals:
        yield f"  equal to {', '.join(report.equals)} of exo_toy.losses, up to a factor and a constant"
    yield ""
    if report.alignment is not None:
        yield from _alignment_lines(report.alignment)
    for optimum in report.optima:
        beta = "" if optimum.temperature is None else f", beta = {optimum.temperature:.4g}"
        distance = f"TV to pi* {_rounded(optimum.distance):.2g}"
        yield f"Optimum over full tables, K = {optimum.k}: {optimum.verdict}{beta}; {distance}"
    if report.alpha is not None and abs(report.alpha - 1) > 1e-6:
        yield f"Compares the score of the alpha-divergence with Amari's alpha = {report.alpha:.4g}"
    for found in report.capacities:
        masses = " ".join(f"{mass:.3f}" for mass in found.masses)
        yield f"Two modes, one-mode family, K = {found.k}: mass at first mode, between, second {masses}"
    yield ""
    at = [int((report.curve.margin - margin).abs().argmin()) for margin in (-20, -5, -1, 0, 1, 5, 20)]
    yield "margin          " + " ".join(f"{report.curve.margin[i]:10.4g}" for i in at)
    yield "loss            " + " ".join(f"{_rounded(report.curve.losses[i]):10.3g}" for i in at)
    yield "gradient weight " + " ".join(f"{_rounded(report.curve.weight[i]):10.3g}" for i in at)
    yield ""
    for what, unchanged in report.unchanged_by.items():
        yield f"{'unchanged' if unchanged else 'changed'} by {what}"
    yield ""
    yield f"{len(report.findings) or 'No'} finding{'' if len(report.findings) == 1 else 's'}"
    for finding in report.findings:
        yield f"* {finding.code}: {finding.text}" + (f"\n    at {finding.example}" if finding.example else "")


def _rounded(value: Tensor | float) -> float:
    """Zero where it is rounding."""
    number = float(value)
    return 0.0 if abs(number) < 1e-12 else number


def _alignment_lines(alignment: Alignment) -> Iterator[str]:
    limit = f" (times {alignment.scale:.4g})" if alignment.bias else ""
    words = {
        UNDECIDED: "undecided, more K are needed",
        NONE: "that of none of these",
        UNDEFINED: "undefined, it has NaN",
    }
    which = words.get(alignment.target, f"that of {alignment.target}{limit}")
    yield f"Expected gradient as K grows: {which}"
    yield f"{'1 - cosine with':<24}" + "".join(f"{f'K = {k}':>10}" for k in alignment.candidates) + f"{'limit':>10}"
    for name, cosines in alignment.cosines.items():
        yield f"{name:<24}" + "".join(f"{_rounded(1 - cosine):10.2g}" for cosine in cosines)
    if alignment.bias:
        yield f"{'bias of the gradient':<24}" + "".join(f"{bias:10.2g}" for bias in alignment.bias)
        yield f"{'bias of the value':<24}" + "".join(f"{bias:10.2g}" for bias in alignment.value_bias)
    yield ""
