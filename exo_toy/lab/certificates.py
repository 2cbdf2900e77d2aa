"""Certificates of the library's losses, one row each: ``python -m exo_toy.lab.certificates`` writes the page."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from exo_toy.divergences import kl_divergence, total_variation
from exo_toy.lab.binding import examine
from exo_toy.lab.claims import claim_of, settings_of
from exo_toy.lab.gradients import expected, extrapolated, target_gradients
from exo_toy.lab.optimum import FEWER, LABELLED, of_kind, pi_star, tabular_optimum
from exo_toy.lab.report import MARGINS, characterize
from exo_toy.lab.subject import Subject, loss_and_gradients, probe
from exo_toy.losses import LOSSES

PAGE = Path(__file__).parents[1] / "losses" / "CERTIFICATES.md"
AT = (-20, -2, 0, 2, 20)
# Log ratios of either candidate, over beta_pi; a log-probability without a reference cannot rise by more.
EXTREMES, HIGHEST = (-1e4, -1e3, -100.0, -20.0, -2.0, 0.0, 2.0, 20.0, 100.0, 1e3, 1e4), 20.0
DTYPES = (torch.float32, torch.bfloat16)
LIMIT = (2, 4, 8, 16, 32)
MARKDOWN = str.maketrans({"*": r"\*", "|": r"\|"})
# What is below these is said to be; below the first it is rounding.
BOUNDS = (1e-9, 1e-5)
PREAMBLE = """\
# Certificates of the losses

Written by `python -m exo_toy.lab.certificates`; nothing here is sampled, and a test compares the page with what it
would be now. Temperatures are β = β_π = 0.5, β_r = 1, ε = 0.1 where the first table does not say otherwise.

**Optimum.** The exact expected loss over full tables of five completions, of two where it says so, with
Bradley-Terry labels on pairs drawn from the reference (Plackett-Luce on rankings; batches of two for AOT), minimised
numerically. *Claimed*: by the loss's documentation. *Off*: total variation between the minimiser and the policy
claimed (the hinge's is a kink, which a minimiser approaches, DPOP's one at which it starts, and NCA's a limit,
extrapolated from K ≤ 32). *To π\\**: total variation between the minimiser and π\\* at β_π β_r there. *Found*: the
laboratory's words for the minimiser over five completions, or three for AOT.
"""
BEHAVIOUR = """
**At the reference**: the loss, and one minus the cosine of its expected gradient with that of KL(π_θ‖π\\*) by the
logits of the table, K = 2; a loss is parallel to RL there where it is 0. **Weight**: minus the derivative of a pair's
loss by its margin m = β(log ratio of the first − of the second), the first preferred, by a reward of one unit if there
is one, and m/2 on either. **Same under**: what leaves the loss as it is. **float32, bfloat16**: largest deviation from
float64 of losses and gradients at pairs of log ratios from −10⁴/β to 10⁴/β that the dtype holds, absolute or relative,
whichever is smaller; as a power of two, so 2⁻²⁴ is float32's rounding and 2⁻⁹ bfloat16's. **Found wrong**: by the
laboratory, in all dtypes; infinite at numbers that are finite, say.
"""


@dataclass(frozen=True)
class Certificate:
    """What is measured of a loss.

    Attributes:
        name: in ``LOSSES``.
        off: total variation between optimum and claim; NaN where no policy is claimed.
        to_pi_star: total variation between optimum and pi*.
        verdict: the laboratory's.
        at_reference: the loss.
        cosine: of its expected gradient there with that of KL(policy||optimal).
        weights: at the margins ``AT``.
        unchanged_by: what leaves the loss as it is.
        deviation: from float64, by dtype.
        findings: codes of the laboratory's findings.
    """

    name: str
    off: float
    to_pi_star: float
    verdict: str
    at_reference: float
    cosine: float
    weights: tuple[float, ...]
    unchanged_by: tuple[str, ...]
    deviation: Mapping[torch.dtype, float]
    findings: tuple[str, ...]

    def optimum(self) -> str:
        """The row of the first table."""
        claim = claim_of(self.name)
        off = "" if math.isnan(self.off) else _distance(self.off)
        at = claim.text if claim.policy is not None else ""
        return _row(self.name, LOSSES[self.name].optimum, at, off, _distance(self.to_pi_star), self.verdict)

    def behaviour(self) -> str:
        """The row of the second table."""
        deviation = (_power_of_two(self.deviation[dtype]) for dtype in DTYPES)
        weights = (_number(weight) for weight in self.weights)
        found = ", ".join(self.findings) or "nothing"
        numbers = (_number(self.at_reference), _number(1 - self.cosine))
        return _row(self.name, *numbers, *weights, "; ".join(self.unchanged_by), *deviation, found)


def certificate(name: str) -> Certificate:
    """Measure one loss of ``LOSSES``.

    Args:
        name: its key.

    Returns:
        Certificate.

    Raises:
        KeyError: there is no such loss.

    Example:
        >>> measured = certificate("dpo")
        >>> measured.verdict, measured.off < 1e-12, measured.weights[2]
        ('pi*', True, 0.5)
    """
    claim, function, settings = claim_of(name), LOSSES[name].function, settings_of(name)
    subject = examine(function, settings=settings)
    report = characterize(function, settings=settings, candidates=(2, 4))
    scene = FEWER if subject.by_row else claim.scene
    found = [tabular_optimum(subject, k=k, scene=scene).log_pi for k in ([claim.k] if claim.k else LIMIT)]
    log_pi = found[0] if claim.k else extrapolated(torch.stack(found))
    scene = of_kind(subject, scene)
    at = [int((MARGINS - margin).abs().argmin()) for margin in AT]
    return Certificate(
        name=name,
        off=math.nan if claim.policy is None else _off(log_pi, claim.policy(subject, scene)),
        to_pi_star=_off(log_pi, pi_star(subject, scene)),
        verdict=report.optima[0].verdict,
        at_reference=float(report.curve.losses[at[2]]),
        cosine=_cosine_at_reference(subject),
        weights=tuple(report.curve.weight[at].tolist()),
        unchanged_by=tuple(what for what, unchanged in report.unchanged_by.items() if unchanged),
        deviation={dtype: _deviation(subject, dtype) for dtype in DTYPES},
        findings=tuple(dict.fromkeys(finding.code for finding in report.findings)),
    )


def page() -> str:
    """The page: both tables, a row per loss each."""
    rows = [certificate(name) for name in LOSSES]
    optima = _table(("loss", "claimed", "where", "off", "to π*", "found"), [row.optimum() for row in rows])
    head = ("loss", "at the reference", "1 − cosine", *(f"weight at {margin}" for margin in AT), "same under")
    head += ("float32", "bfloat16", "found wrong")
    return PREAMBLE + optima + BEHAVIOUR + _table(head, [row.behaviour() for row in rows])


def _cosine_at_reference(subject: Subject) -> float:
    """Of the expected gradient with that of KL(policy||optimal), on two candidates."""
    scene = of_kind(subject, FEWER if subject.by_row else LABELLED)
    reference = scene.log_ref[None]
    _, gradient = expected(subject, scene, reference, 2)
    _, wanted = target_gradients(subject, scene, reference, kl_divergence)
    return float(cosine_similarity(gradient, wanted))


def _deviation(subject: Subject, dtype: torch.dtype) -> float:
    """The largest of losses and gradients from float64's on the same numbers, where the dtype holds those."""
    sizes = torch.tensor([size for size in EXTREMES if subject.kind != "reference-free" or size <= HIGHEST])
    log_ratio = torch.cartesian_prod(sizes, sizes).double() / subject.beta_pi
    rewards = torch.tensor([[subject.beta_r, 0.0]], dtype=torch.float64).expand_as(log_ratio)
    rounded = [part.to(dtype) if part.is_floating_point() else part for part in probe(subject, log_ratio, rewards)]
    exact = [part.double() if part.is_floating_point() else part for part in rounded]
    worst = 0.0
    for have, want in zip(loss_and_gradients(subject, rounded), loss_and_gradients(subject, exact), strict=True):
        held = (want.abs() < torch.finfo(dtype).max) & (have != want)
        off = (have - want).abs() / want.abs().clamp(min=1.0)
        worst = max(worst, float(off.where(held, 0.0).nan_to_num(torch.inf).max()))
    return worst


def _off(log_p: Tensor, log_q: Tensor) -> float:
    return float(total_variation(log_p.log_softmax(-1), log_q.log_softmax(-1)))


def _distance(value: float) -> str:
    return next((f"< {bound:g}" for bound in BOUNDS if value < bound), f"{value:.2g}")


def _number(value: float) -> str:
    return "0" if abs(value) < BOUNDS[0] else f"{value:.3g}"


def _power_of_two(value: float) -> str:
    """The next one above."""
    return "0" if value < 2**-40 else f"2^{math.ceil(math.log2(value))}"


def _row(*cells: str) -> str:
    """Of Markdown, to which stars and bars mean something."""
    return f"| {' | '.join(cell.translate(MARKDOWN) for cell in cells)} |"


def _table(head: tuple[str, ...], rows: list[str]) -> str:
    return "\n".join(["", _row(*head), _row(*("---" for _ in head)), *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
