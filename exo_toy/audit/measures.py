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
    f"Over prompts: percentiles of {RESAMPLES} bootstrap means, the lines drawn again with replacement, taken for "
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


class Measured(NamedTuple):
    """Of X records, what is a number [X], NaN where it has no meaning, and what is estimated, by dotted name."""

    numbers: dict[str, Tensor]
    estimates: dict[str, Estimate]
    table: Table | None


def measure(records: Sequence[Record], settings: Settings) -> Measured:
    """All that can be said of records that are alike in K and in what is known of them."""
    policy, ref, rewards = (_table(records, name) for name in ("policy_logps", "ref_logps", "rewards"))
    numbers: dict[str, Tensor] = {}
    estimates: dict[str, Estimate] = {}
    log_ratio = None
    if policy is not None and ref is not None:
        log_ratio = policy - ref
        numbers |= _pair_losses(policy, ref, rewards, settings)
        numbers["top_leads"] = _top_leads(log_ratio, rewards)
    if rewards is None:
        return Measured(numbers, estimates, None)
    numbers["mean_reward"] = rewards.mean(-1)
    numbers["ess.reward_weights"] = effective_sample_size(rewards / settings.beta_r)
    numbers["ess.optimal"] = effective_sample_size(rewards / settings.beta)
    views = {"policy": (1.0, settings.beta), "tempered": (settings.beta_pi, settings.beta_r)}
    for view, (beta_pi, beta) in views.items():
        f = None if log_ratio is None else beta_pi * log_ratio
        estimates |= {f"{view}.{name}": estimate for name, estimate in _estimates(f, rewards, beta).items()}
    if log_ratio is not None:
        for name, loss in {"exo_rw": exo_rw_loss, "dpo_rw": dpo_rw_loss}.items():
            numbers[f"losses.{name}"] = loss(log_ratio, rewards, beta_pi=settings.beta_pi, beta_r=settings.beta_r)
        numbers["ess.exo_weights"] = effective_sample_size(settings.beta_pi * log_ratio)
        numbers["ess.policy"] = effective_sample_size(log_ratio)
        estimates["policy.log_mean_ratio"] = snis_log_normalizer(log_ratio)
    return Measured(numbers, estimates, Table([record.name for record in records], log_ratio, rewards))


def _estimates(log_ratio: Tensor | None, rewards: Tensor, beta: float) -> dict[str, Estimate]:
    """Of a policy with these log ratios up to a constant, and of the optimal policy for beta."""
    log_weight, reference = rewards / beta, torch.zeros_like(rewards)
    estimates = {
        "log_z": snis_log_normalizer(log_weight),
        "kl_optimal_to_reference": snis_kl(log_weight, reference),
    }
    if log_ratio is not None:
        estimates |= {
            "kl_policy_to_optimal": snis_kl(log_ratio, log_weight),
            "kl_optimal_to_policy": snis_kl(log_weight, log_ratio),
            "kl_policy_to_reference": snis_kl(log_ratio, reference),
            "expected_reward": snis_expectation(log_ratio, rewards),
            "objective": snis_objective(log_ratio, rewards, beta=beta),
        }
    return estimates


def _pair_losses(policy: Tensor, ref: Tensor, rewards: Tensor | None, settings: Settings) -> dict[str, Tensor]:
    """EXO-pref and DPO of a pair; of more candidates, of the best against the worst.

    NaN where there is no one pair: all rewards equal, or several candidates with different log ratios best or worst.
    """
    if rewards is None:
        rewards = torch.tensor([1.0, 0.0], dtype=policy.dtype).expand_as(policy)
    log_ratio = policy - ref
    best, worst = rewards == rewards.amax(-1, keepdim=True), rewards == rewards.amin(-1, keepdim=True)
    one_pair = rewards.amax(-1) > rewards.amin(-1)
    for extreme in (best, worst):
        largest = log_ratio.masked_fill(~extreme, -math.inf).amax(-1)
        one_pair &= largest == log_ratio.masked_fill(~extreme, math.inf).amin(-1)
    # The position of the first of each.
    chosen, rejected = (extreme.byte().argmax(-1, keepdim=True)[one_pair] for extreme in (best, worst))
    logps = [table[one_pair].gather(-1, index).squeeze(-1) for table in (policy, ref) for index in (chosen, rejected)]
    losses = {
        "losses.exo_pref": exo_pref_loss(*logps, beta=settings.beta_pi, label_smoothing=settings.label_smoothing),
        "losses.dpo": dpo_loss(*logps, beta=settings.beta_pi),
    }
    nan = torch.full(one_pair.shape, math.nan, dtype=policy.dtype)
    return {name: nan.masked_scatter(one_pair, loss.losses) for name, loss in losses.items()}


def _top_leads(log_ratio: Tensor, rewards: Tensor | None) -> Tensor:
    """1 where a candidate of the highest reward has a log ratio above all of lower reward, else 0; NaN with no other.

    Of a pair, where the chosen one has.
    """
    if rewards is None:
        return (log_ratio[:, 0] > log_ratio[:, 1]).double()
    best = rewards == rewards.amax(-1, keepdim=True)
    leads = log_ratio.masked_fill(~best, -math.inf).amax(-1) > log_ratio.masked_fill(best, -math.inf).amax(-1)
    return leads.double().masked_fill(best.all(-1), math.nan)


def _table(records: Sequence[Record], name: str) -> Tensor | None:
    """[X, K] of the records' field, None where they lack it."""
    if getattr(records[0], name) is None:
        return None
    return torch.tensor([getattr(record, name) for record in records], dtype=torch.float64)


class Totals:
    """The prompts' documents, made by the dozen, and what is kept of them for the summary."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tables: list[Table] = []
        self.counts = dict.fromkeys(("records", "pairs", "without_log_probabilities", "with_repeats"), 0)
        self._values: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
        self._biases: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
        self._prompts: set[int] = set()

    def add(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Measure records; their documents, in order."""
        alike: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, record in enumerate(records):
            logps, rewards = record.policy_logps, record.rewards
            alike[record.n_candidates, logps is None, rewards is None].append(i)
        documents: list[dict[str, Any]] = [{} for _ in records]
        for indices in alike.values():
            some = [records[i] for i in indices]
            measured = measure(some, self.settings)
            self._keep(some, measured)
            for i, document in zip(indices, _documents(some, measured), strict=True):
                documents[i] = document
        return documents

    def _keep(self, records: Sequence[Record], measured: Measured) -> None:
        self.counts["records"] += len(records)
        self.counts["pairs"] += (records[0].rewards is None) * len(records)
        self.counts["without_log_probabilities"] += (records[0].policy_logps is None) * len(records)
        self.counts["with_repeats"] += sum(record.distinct < record.n_candidates for record in records)
        self._prompts |= {hash(str(record.prompt)) for record in records}
        for name, values in measured.numbers.items():
            self._values[name].extend(values[~values.isnan()].tolist())
        for name, estimate in measured.estimates.items():
            self._values[name].extend(estimate.value.tolist())
            self._biases[name].extend(estimate.bias.tolist())
        if measured.table is not None:
            self.tables.append(measured.table)

    def over_prompts(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Of those names that occur: mean, bootstrap interval, bias, number of prompts."""
        by_count: defaultdict[int, list[str]] = defaultdict(list)
        for name in names:
            if name in self._values:
                by_count[len(self._values[name])].append(name)
        entries: dict[str, dict[str, Any]] = {}
        for count, same in by_count.items():
            values = torch.tensor([self._values[name] for name in same], dtype=torch.float64)
            lows, highs = [None] * len(same), [None] * len(same)
            if count > 1:
                generator = torch.Generator().manual_seed(self.settings.seed)
                low, high = bootstrap_mean(values, generator=generator, level=LEVEL, n_resamples=RESAMPLES)
                lows, highs = low.tolist(), high.tolist()
            for name, mean, low_, high_ in zip(same, values.mean(-1).tolist(), lows, highs, strict=True):
                biases = self._biases.get(name)
                bias = None if biases is None else math.fsum(biases) / count
                entries[name] = {"mean": mean, "low": low_, "high": high_, "bias": bias, "prompts": count}
        return {name: entries[name] for name in names if name in entries}

    def warnings(self, entries: dict[str, dict[str, Any]]) -> list[str]:
        """What a reader of the summary should know before believing it."""
        n_records = self.counts["records"]
        found = []
        if n_records < FEW_PROMPTS:
            found.append(f"intervals over prompts are too narrow for {n_records} of them")
        for name, weights in {"ess.policy": "π_θ/π_ref", "ess.optimal": "π*_β/π_ref"}.items():
            sizes = torch.tensor(self._values[name], dtype=torch.float64)
            small = int((sizes < SMALL_ESS).sum())
            if small:
                found.append(
                    f"the weights {weights} have an effective sample size below {SMALL_ESS} at {small} of {len(sizes)} "
                    f"prompts (median {sizes.median():.3g}): estimates there are biased, their intervals too narrow"
                )
        ratio = entries.get("policy.log_mean_ratio")
        if ratio and ratio["prompts"] >= FEW_PROMPTS and ratio["low"] > 0:
            found.append(
                f"the log mean of π_θ/π_ref is {ratio['mean']:.3g} ({ratio['low']:.3g} … {ratio['high']:.3g}), and at "
                "most 0 on average for draws from the reference: are the candidates the policy's own, or the "
                "log-probabilities of another temperature than the draws?"
            )
        if len(self._prompts) < n_records:
            found.append(
                f"{n_records} records have {len(self._prompts)} different prompts: the intervals over prompts take "
                "records for independent, and are too narrow"
            )
        return found


def _documents(records: Sequence[Record], measured: Measured) -> list[dict[str, Any]]:
    """A document per record: what it is, and its numbers and estimates under their paths."""
    documents: list[dict[str, Any]] = []
    for record in records:
        place = {"line": record.line} if record.element is None else {"line": record.line, "element": record.element}
        documents.append({**place, "prompt": record.prompt, "k": record.n_candidates, "distinct": record.distinct})
    columns: dict[str, list[Any]] = {name: values.tolist() for name, values in measured.numbers.items()}
    for name, estimate in measured.estimates.items():
        low, high = estimate.interval(level=LEVEL)
        parts = {"value": estimate.value, "low": low, "high": high, **estimate._asdict()}
        lists = {part: values.tolist() for part, values in parts.items()}
        columns[name] = [dict(zip(lists, entries, strict=True)) for entries in zip(*lists.values(), strict=True)]
    for name, entries in columns.items():
        *path, last = name.split(".")
        for document, entry in zip(documents, entries, strict=True):
            for part in path:
                document = document.setdefault(part, {})
            document[last] = None if entry != entry else entry
    return documents
