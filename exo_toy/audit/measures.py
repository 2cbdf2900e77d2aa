"""What is measured of each prompt, and over prompts."""

import dataclasses
import math
from array import array
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exo_toy import checks
from exo_toy.audit.log import LARGEST, Record
from exo_toy.estimators import (
    Estimate,
    bootstrap_mean,
    effective_sample_size,
    snis_expectation,
    snis_kl,
    snis_log_normalizer,
    snis_objective,
)
from exo_toy.losses import dpo_loss, dpo_rw_loss, exo_pref_loss, exo_rw_loss

# Fewer effective samples than this, and a normal interval from their own spread means little.
SMALL_ESS = 10
# Fewer prompts than this, and so it is with their bootstrap.
FEW_PROMPTS = 10
LEVEL, RESAMPLES = 0.95, 1000
INTERVALS = (
    f"Intervals are of {LEVEL:.0%}. For a prompt: value -+ 1.96 standard errors over its K candidates (delta method). "
    f"Over prompts: percentiles of {RESAMPLES} bootstrap means, the records drawn again with replacement, taken for "
    "independent. None holds the bias of order 1/K, whose estimate stands under `bias`, nor completions that were not "
    "drawn: where the effective sample size is small, the intervals are too narrow and the biases too small."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an audit depends on besides the log.

    Attributes:
        beta_pi: policy temperature, multiplies the log ratio.
        beta_r: reward temperature, divides the reward.
        label_smoothing: of EXO-pref, in (0, 1/2).
        seed: of the resampling of prompts.
    """

    beta_pi: float
    beta_r: float
    label_smoothing: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("beta_pi", "beta_r"):
            value = getattr(self, name)
            checks.require_positive(**{name: value})
            if not 1 / LARGEST <= value <= LARGEST:
                raise ValueError(f"{name} must be in [{1 / LARGEST:g}, {LARGEST:g}]; got {value!r}")
        checks.require_real("label_smoothing", self.label_smoothing, allowed="in (0, 1/2)", low=0.0, high=0.5)
        checks.require_integer("seed", self.seed, at_least=0)

    @property
    def beta(self) -> float:
        """The strength of the KL penalty that both temperatures amount to."""
        return self.beta_r * self.beta_pi


class Table(NamedTuple):
    """Prompts with equally many candidates: names, log ratios [X, K] where known, rewards [X, K]."""

    names: list[str]
    log_ratio: Tensor | None
    rewards: Tensor


def measure(records: Sequence[Record], settings: Settings) -> tuple[Table, dict[str, Tensor | Estimate]]:
    """All that can be said of X records that are alike in K and in what is known of them.

    Returns:
        (their table, numbers and estimates [X] by dotted name; NaN where a number has no meaning).
    """
    names = [record.name for record in records]
    rewards = torch.tensor([record.rewards for record in records], dtype=torch.float64)
    log_weight, reference = rewards / settings.beta, torch.zeros_like(rewards)
    found: dict[str, Tensor | Estimate] = {
        "mean_reward": rewards.mean(-1),
        "ess.optimal": effective_sample_size(log_weight),
        "estimates.log_z": snis_log_normalizer(log_weight),
        "estimates.kl_optimal_to_reference": snis_kl(log_weight, reference),
    }
    if records[0].policy_logps is None:
        return Table(names, None, rewards), found
    policy = torch.tensor([record.policy_logps for record in records], dtype=torch.float64)
    ref = torch.tensor([record.ref_logps for record in records], dtype=torch.float64)
    log_ratio, beta_pi, beta_r = policy - ref, settings.beta_pi, settings.beta_r
    found |= {
        "losses.exo_rw": exo_rw_loss(log_ratio, rewards, beta_pi=beta_pi, beta_r=beta_r),
        "losses.dpo_rw": dpo_rw_loss(log_ratio, rewards, beta_pi=beta_pi, beta_r=beta_r),
        **_pair_losses(policy, ref, rewards, settings),
        "ess.exo_weights": effective_sample_size(beta_pi * log_ratio),
        "ess.policy": effective_sample_size(log_ratio),
        "estimates.kl_policy_to_optimal": snis_kl(log_ratio, log_weight),
        "estimates.kl_optimal_to_policy": snis_kl(log_weight, log_ratio),
        "estimates.kl_policy_to_reference": snis_kl(log_ratio, reference),
        "estimates.expected_reward": snis_expectation(log_ratio, rewards),
        "estimates.objective": snis_objective(log_ratio, rewards, beta=settings.beta),
        "estimates.log_mean_ratio": snis_log_normalizer(log_ratio),
    }
    return Table(names, log_ratio, rewards), found


def _pair_losses(policy: Tensor, ref: Tensor, rewards: Tensor, settings: Settings) -> dict[str, Tensor]:
    """EXO-pref and DPO of the best candidate against the worst; NaN where several have either reward."""
    highest, lowest = rewards.amax(-1, keepdim=True), rewards.amin(-1, keepdim=True)
    one_pair = ((rewards == highest).sum(-1) == 1) & ((rewards == lowest).sum(-1) == 1)
    best, worst = rewards.argmax(-1, keepdim=True), rewards.argmin(-1, keepdim=True)
    logps = [table.gather(-1, index).squeeze(-1) for table in (policy, ref) for index in (best, worst)]
    exo = exo_pref_loss(*logps, beta=settings.beta_pi, label_smoothing=settings.label_smoothing).losses
    dpo = dpo_loss(*logps, beta=settings.beta_pi).losses
    return {
        "losses.exo_pref": exo.masked_fill(~one_pair, math.nan),
        "losses.dpo": dpo.masked_fill(~one_pair, math.nan),
    }


class Totals:
    """What is kept of the prompts for the summary and the figure."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tables: list[Table] = []
        self.n_records, self.n_without_logps = 0, 0
        self._values: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
        self._biases: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))

    def add(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Measure records; their documents, in order."""
        alike: defaultdict[tuple[int, bool], list[int]] = defaultdict(list)
        for i, record in enumerate(records):
            alike[len(record.rewards), record.policy_logps is None].append(i)
        documents: list[dict[str, Any]] = [{} for _ in records]
        for (_, without_logps), indices in alike.items():
            some = [records[i] for i in indices]
            table, found = measure(some, self.settings)
            self.tables.append(table)
            self.n_records += len(some)
            self.n_without_logps += without_logps * len(some)
            for name, entry in found.items():
                values = entry.value if isinstance(entry, Estimate) else entry
                self._values[name].extend(values[~values.isnan()].tolist())
                if isinstance(entry, Estimate):
                    self._biases[name].extend(entry.bias.tolist())
            for i, document in zip(indices, _documents(some, found), strict=True):
                documents[i] = document
        return documents

    def over_prompts(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Of those names that have a value: mean, bootstrap interval, bias, number of prompts."""
        by_count: defaultdict[int, list[str]] = defaultdict(list)
        for name in names:
            by_count[len(self._values[name])].append(name)
        entries: dict[str, dict[str, Any]] = {}
        # What has equally many values is resampled together: the draws cost more than the sums.
        for count, same in by_count.items():
            if not count:
                continue
            values = torch.tensor([self._values[name] for name in same], dtype=torch.float64)
            lows: list[float | None] = [None] * len(same)
            highs = lows
            if count > 1:
                generator = torch.Generator().manual_seed(self.settings.seed)
                low, high = bootstrap_mean(values, generator=generator, level=LEVEL, n_resamples=RESAMPLES)
                lows, highs = low.tolist(), high.tolist()
            for name, mean, *ends in zip(same, values.mean(-1).tolist(), lows, highs, strict=True):
                bias = math.fsum(self._biases[name]) / count if name in self._biases else None
                entries[name] = {"mean": mean, "low": ends[0], "high": ends[1], "bias": bias, "prompts": count}
        return {name: entries[name] for name in names if name in entries}

    def warnings(self, entries: dict[str, dict[str, Any]]) -> list[str]:
        """What a reader of the summary should know before believing it."""
        found = []
        if self.n_records < FEW_PROMPTS:
            found.append(f"intervals over prompts are too narrow for {self.n_records} of them")
        for name, weights in {"ess.policy": "π_θ/π_ref", "ess.optimal": "π*_β/π_ref"}.items():
            sizes = torch.tensor(self._values[name], dtype=torch.float64)
            small = int((sizes < SMALL_ESS).sum())
            if small:
                found.append(
                    f"the weights {weights} have an effective sample size below {SMALL_ESS} at {small} of {len(sizes)} "
                    f"prompts (median {sizes.median():.3g}): estimates there are biased, their intervals too narrow"
                )
        ratio = entries.get("estimates.log_mean_ratio")
        if ratio and ratio["prompts"] >= FEW_PROMPTS and ratio["low"] > 0:
            found.append(
                f"the log mean of π_θ/π_ref is {ratio['mean']:.3g} ({ratio['low']:.3g} … {ratio['high']:.3g}), and at "
                "most 0 on average for draws from the reference: are the candidates the policy's own, or the "
                "log-probabilities of another temperature than the draws?"
            )
        return found


def _documents(records: Sequence[Record], found: dict[str, Tensor | Estimate]) -> list[dict[str, Any]]:
    """A document per record: what it is, and its numbers and estimates under their dotted names."""
    documents: list[dict[str, Any]] = []
    for record in records:
        place = {"line": record.line} if record.element is None else {"line": record.line, "element": record.element}
        documents.append({**place, "prompt": record.prompt, "k": len(record.rewards)})
    for name, entry in found.items():
        *group, last = name.split(".")
        for document, value in zip(documents, _column(entry), strict=True):
            (document.setdefault(group[0], {}) if group else document)[last] = value
    return documents


def _column(entry: Tensor | Estimate) -> list[Any]:
    """Of each record a number, None for NaN, or an estimate's value, interval and bias."""
    if isinstance(entry, Tensor):
        return [None if math.isnan(value) else value for value in entry.tolist()]
    low, high = entry.interval(level=LEVEL)
    parts = zip(*(part.tolist() for part in (entry.value, low, high, entry.bias)), strict=True)
    return [dict(zip(("value", "low", "high", "bias"), numbers, strict=True)) for numbers in parts]
