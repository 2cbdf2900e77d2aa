"""What gradient a sampled KL penalty has in expectation, and how noisy the right ones are: exactly, near and far.

A policy of each class is moved away from its reference along a random direction of its parameters to given values of
KL(pi||pi_ref). There every way of making a gradient of k1, k2 and k3 (a row) meets every way of drawing completions
and weighting them (a column):

* rows: per sequence and per token, the estimate as a loss, as a reward with and without the mean for a baseline, and
  with its importance weight differentiated; of tokens that weight may be of the prefix or of the token alone;
* columns: completions of the policy; of the reference and of an old policy half way from it, with and without weights.

Expectation and noise are sums over all completions; nothing is sampled. Each expected gradient is compared with those
of KL(pi||pi_ref) and KL(pi_ref||pi), and with its closed form where one is known.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from analysis import runner
from exo_toy import kl_estimators
from exo_toy.divergences import kl_divergence
from exo_toy.gradient_noise import sample_noise
from exo_toy.kl_estimators import FROM_REF, TO_REF, Recipe, score_coefficients, token_log_probs
from exo_toy.kl_estimators.sampled import Estimator, Level, Use, Weights
from exo_toy.kl_estimators.tables import Baseline
from exo_toy.policies import GRUPolicy, KGramPolicy, TabularPolicy
from exo_toy.spaces import SequenceSpace

AnyPolicy = TabularPolicy | KGramPolicy | GRUPolicy

CLASSES = ("table", "bigram", "gru")
# Who draws, and whether the importance weight of policy over sampler is used.
COLUMNS = ("policy", "reference", "reference, weighted", "old policy", "old policy, weighted")
# What is told of a cell; the first five of its expected gradient, as :class:`exo_toy.kl_estimators.Comparison`.
MEASURES = ("error", "other_error", "cosine", "other_cosine", "component", "noise_to_signal", "closed_form_error")
# What follows for completions of the policy itself from scores having mean zero (after Tang and Munos).
DERIVED = {
    "sequence k1 loss": "zero",
    "sequence k2 loss": "right",
    "sequence k3 loss": "the other KL's",
    "sequence k1 reward": "right",
    "sequence k1 reward (baseline)": "right",
    "sequence k2 reward": "biased",
    "sequence k3 reward": "biased",
    "token k1 loss": "zero",
    "token k2 loss": "biased",
    "token k3 loss": "biased",
    "token k1 reward": "right",
    "token k3 reward": "biased",
}
# Directions are tried until one leads to the farthest distance within a step that is not yet a single completion's.
DRAWS, FARTHEST = 100, 8.0
STEP_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the reported run."""

    vocab_size: int = 4
    length: int = 4
    width: int = 3
    spread: float = 0.7
    distances: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    seeds: int = 8
    seed: int = 0


PRESETS = {
    "quick": Config(length=3, distances=(0.001, 0.01, 0.1, 1.0), seeds=2),
    "default": Config(distances=(0.001, 0.01, 0.1, 1.0, 3.0), seeds=3),
    "full": Config(),
}


class Row(NamedTuple):
    """One way of making a gradient; ``weights`` where the column has any."""

    level: Level
    estimator: Estimator
    use: Use
    baseline: Baseline
    weights: Weights

    @property
    def label(self) -> str:
        """As "token k3, importance (token)"."""
        detail = {"mean": " (baseline)"}.get(self.baseline, " (token ratio)" if self.weights == "token" else "")
        return f"{self.level} {self.estimator} {self.use}{detail}"

    def recipe(self, column: str) -> Recipe | None:
        """None where this row needs weights and the column has none."""
        if self.use == "importance":
            return None if column in ("reference", "old policy") else Recipe(*self._named, weights=self.weights)
        return Recipe(*self._named, weights=self.weights if "weighted" in column else "none")

    @property
    def _named(self) -> tuple[Estimator, Use, Level]:
        return self.estimator, self.use, self.level


def rows() -> Iterator[Row]:
    """All of them, sequences first."""
    ways: list[tuple[Use, Baseline, Weights]] = [
        ("loss", "none", "prefix"),
        ("reward", "none", "prefix"),
        ("reward", "mean", "prefix"),
        ("importance", "none", "prefix"),
        ("importance", "none", "token"),
    ]
    for level, estimator, way in itertools.product(get_args(Level), kl_estimators.ESTIMATORS, ways):
        # A sequence's two weights are one.
        if (level, way[-1]) != ("sequence", "token"):
            yield Row(level, estimator, *way)


ROWS = tuple(rows())


def run(config: Config) -> runner.Result:
    """Evaluate every case; numbers for the claim, arrays [classes, seeds, distances, rows, columns] for the figures."""
    shared = {name: getattr(config, name) for name in ("vocab_size", "length", "width", "spread")}
    cases = [
        {**shared, "kind": kind, "seed": config.seed + i, "distances": list(config.distances)}
        for kind in CLASSES
        for i in range(config.seeds)
    ]
    results = runner.map_cases(along_a_line, cases)
    arrays = {
        name: np.stack([result[name] for result in results]).reshape(
            len(CLASSES), config.seeds, *results[0][name].shape
        )
        for name in results[0]
    }
    arrays["distances"] = np.array(config.distances)
    return runner.Result(numbers(arrays), arrays)


def along_a_line(
    *, kind: str, seed: int, distances: list[float], vocab_size: int, length: int, width: int, spread: float
) -> dict[str, np.ndarray]:
    """Verdicts and measures [distances, rows, columns] of one class of policies in one direction."""
    space = SequenceSpace(vocab_size, length, eos=vocab_size - 1)
    generator = torch.Generator().manual_seed(seed)
    reference = random_policy(kind, space, width, spread, generator)
    with torch.no_grad():
        log_ref = reference.log_probs()[0]
    direction = far_direction(
        reference, log_ref, max(distances), lambda: random_policy(kind, space, width, 1.0, generator)
    )
    found = []
    for distance in distances:
        step = step_to(reference, direction, log_ref, distance)
        with torch.no_grad():
            log_old = moved(reference, direction, step / 2).log_probs()[0]
        found.append(at_policy(moved(reference, direction, step), log_ref, log_old, space))
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def random_policy(kind: str, space: SequenceSpace, width: int, spread: float, generator: torch.Generator) -> AnyPolicy:
    """One prompt, normal parameters of the given standard deviation."""
    policies: dict[str, Callable[[], AnyPolicy]] = {
        "table": lambda: TabularPolicy(space),
        "bigram": lambda: KGramPolicy(space, 1),
        "gru": lambda: GRUPolicy(space, width, generator=generator),
    }
    policy = policies[kind]()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return policy


def moved(start: AnyPolicy, direction: AnyPolicy, step: float) -> AnyPolicy:
    """A copy of a policy with its parameters so many steps further."""
    policy = copy.deepcopy(start)
    with torch.no_grad():
        for parameter, towards in zip(policy.parameters(), direction.parameters(), strict=True):
            parameter.add_(towards, alpha=step)
    return policy


def far_direction(start: AnyPolicy, log_ref: Tensor, distance: float, draw: Callable[[], AnyPolicy]) -> AnyPolicy:
    """The first drawn direction that leads so far: one that ends at a likely completion does not."""
    for _ in range(DRAWS):
        direction = draw()
        if kl_after(start, direction, log_ref, FARTHEST) >= distance:
            return direction
    raise ValueError(f"distances must be within reach of every class of policies; {distance} is not")


def kl_after(start: AnyPolicy, direction: AnyPolicy, log_ref: Tensor, step: float) -> float:
    """KL(pi||pi_ref) after a step."""
    with torch.no_grad():
        return kl_divergence(moved(start, direction, step).log_probs()[0], log_ref).item()


def step_to(start: AnyPolicy, direction: AnyPolicy, log_ref: Tensor, distance: float) -> float:
    """A step that leads to a given KL(pi||pi_ref), by bisection."""
    low, high = 0.0, FARTHEST
    while high - low > STEP_TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if kl_after(start, direction, log_ref, middle) >= distance else (middle, high)
    return high


def at_policy(policy: AnyPolicy, log_ref: Tensor, log_old: Tensor, space: SequenceSpace) -> dict[str, np.ndarray]:
    """Verdicts and measures [rows, columns] of a policy as it stands; NaN where a row has no such column."""
    log_pi = policy.log_probs()[0]
    parameters = list(policy.parameters())
    terms = {
        name: _jacobian(value.unsqueeze(0), parameters)[0]
        for name, value in kl_estimators.divergence_terms(log_pi, log_ref, space).items()
    }
    scores = _jacobian(token_log_probs(space, log_pi).flatten(), parameters).unflatten(0, (space.size, -1))
    log_pi = log_pi.detach()
    samplers = {"policy": log_pi, "reference": log_ref, "old policy": log_old}
    shape = (len(ROWS), len(COLUMNS))
    found = {name: np.full(shape, np.nan) for name in MEASURES} | {"verdict": np.full(shape, "", dtype="<U14")}
    for (i, row), (j, column) in itertools.product(enumerate(ROWS), enumerate(COLUMNS)):
        recipe = row.recipe(column)
        if recipe is None:
            continue
        drawn_by = column.removesuffix(", weighted")
        log_sampler = samplers[drawn_by]
        coefficients = score_coefficients(
            log_pi, log_ref, space, recipe=recipe, log_sampler=log_sampler, baseline=row.baseline
        )
        noise = sample_noise(torch.einsum("nt,ntp->np", coefficients, scores), log_sampler)
        comparison = kl_estimators.compare(noise.mean, terms[TO_REF], terms[FROM_REF])
        for name, value in comparison._asdict().items():
            found[name][i, j] = value
        found["noise_to_signal"][i, j] = (noise.variance / terms[TO_REF].square().sum()).item()
        form = known_form(recipe, drawn_by, row.baseline)
        if form is not None:
            wanted = sum((n * terms[term] for term, n in form.items()), torch.zeros_like(noise.mean))
            largest = max([terms[TO_REF].norm(), *(terms[term].norm() for term in form)])
            found["closed_form_error"][i, j] = ((noise.mean - wanted).norm() / largest).item()
    return found


def known_form(recipe: Recipe, drawn_by: str, baseline: Baseline) -> dict[str, int] | None:
    """The closed form that a cell is held against, None where there is none."""
    if drawn_by == "policy" or recipe.weights == "prefix":
        return kl_estimators.closed_form(recipe, "policy")
    if drawn_by == "reference" and baseline == "none":
        return kl_estimators.closed_form(recipe, "reference")
    return None


def _jacobian(values: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Derivatives [M, P] of values [M], which stay differentiable."""
    rows = torch.eye(len(values), dtype=values.dtype)
    parts = torch.autograd.grad(
        values, parameters, rows, retain_graph=True, is_grads_batched=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([part.flatten(1) for part in parts], -1)


def numbers(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Of every cell its verdicts over all cases, medians by distance and its closed form; then the noise of the right.

    ``order`` is the power of the KL with which the error falls, between the two distances nearest to the reference.
    """
    distances = [f"{distance:g}" for distance in arrays["distances"]]
    cells: dict[str, dict[str, Any]] = {}
    for i, row in enumerate(ROWS):
        cells[row.label] = {}
        for j, column in enumerate(COLUMNS):
            recipe = row.recipe(column)
            if recipe is None:
                continue
            here = {name: values[..., i, j] for name, values in arrays.items() if name != "distances"}
            verdicts, counts = np.unique(here["verdict"], return_counts=True)
            form = known_form(recipe, column.removesuffix(", weighted"), row.baseline)
            cells[row.label][column] = {
                "verdicts": dict(zip(verdicts.tolist(), counts.tolist(), strict=True)),
                **{
                    name: dict(zip(distances, np.median(here[name], (0, 1)).tolist(), strict=True))
                    for name in MEASURES[:-1]
                },
                "order": _order(arrays["distances"], here["error"]),
                "closed_form": None if form is None else written(form),
                "closed_form_error": None if form is None else here["closed_form_error"].max().item(),
            }
    right = arrays["verdict"] == "right"
    biased = arrays["verdict"] == "biased"
    return {
        "cases": int(np.prod(arrays["error"].shape[:3])),
        "distances": distances,
        "cells": cells,
        "not_as_derived": [
            label for label, verdict in DERIVED.items() if set(cells[label]["policy"]["verdicts"]) != {verdict}
        ],
        "largest_error_of_right": arrays["error"][right].max().item(),
        "smallest_error_of_biased": np.minimum(arrays["error"], arrays["other_error"])[biased].min().item(),
        "largest_closed_form_error": np.nanmax(arrays["closed_form_error"]).item(),
        "noise": {column: quietest(arrays, j) for j, column in enumerate(COLUMNS)},
    }


def quietest(arrays: dict[str, np.ndarray], column: int) -> dict[str, dict[str, Any]]:
    """By distance: noise over signal of every row that is right in all cases, geometric means, least first."""
    right = (arrays["verdict"][..., column] == "right").all((0, 1, 2))
    logs = np.log(arrays["noise_to_signal"][..., column]).mean((0, 1))
    found: dict[str, dict[str, Any]] = {}
    for d, distance in enumerate(arrays["distances"]):
        order = [i for i in np.argsort(logs[d], kind="stable") if right[i]]
        found[f"{distance:g}"] = {ROWS[i].label: float(np.exp(logs[d, i])) for i in order}
    return found


def written(form: dict[str, int]) -> str:
    """A closed form as text, such as "∇KL(π‖π_ref) − ∇KL(π_ref‖π)"."""
    text = "".join(f" {'−' if n < 0 else '+'} ∇{term}" for term, n in form.items())
    return text.removeprefix(" + ").replace(" − ", "−", 1) if text.startswith(" −") else text.removeprefix(" + ") or "0"


def _order(distances: np.ndarray, error: np.ndarray) -> float:
    """Slope of log median error over log KL; NaN for rounding errors and for a single distance."""
    if len(distances) < 2:
        return float("nan")
    near = np.median(error, (0, 1))[:2]
    if near.min() <= kl_estimators.TOLERANCE:
        return float("nan")
    return float(np.diff(np.log(near))[0] / np.diff(np.log(distances[:2]))[0])


if __name__ == "__main__":
    runner.main("kl_estimators")
