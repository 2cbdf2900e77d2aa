"""The paper's measures of aligned policies: reward, KL to the reference, win rates, density ratios."""

import glob
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exo_toy.estimators import bootstrap_mean
from exo_toy.integrations.candidates import CandidateCollator, Candidates
from exo_toy.integrations.lm.data import check_texts
from exo_toy.integrations.lm.generation import Prompts
from exo_toy.integrations.lm.models import load_policy, require_model
from exo_toy.integrations.lm.records import CONTENT, Lines, LmError, Row, digest, read_rows, write_whole
from exo_toy.integrations.lm.rewarding import reward_source, scorer
from exo_toy.integrations.lm.settings import EvaluateSettings
from exo_toy.integrations.lm.stages import batches, identity
from exo_toy.integrations.sampling import as_texts, end_tokens
from exo_toy.integrations.scoring import completion_logps

REFERENCE, SAMPLES, CANDIDATES, SUMMARY = "reference", "samples.jsonl", "candidates.jsonl", "summary.json"
# Of the means over prompts.
LEVEL = 0.95
INTERVALS = "95 % percentile bootstrap over prompts"
# Settings that the samples do not depend on.
NOT_OF_SAMPLES = ("models", "beta", "figures")
HEADER = ("policy", "reward", "KL to the reference", "wins against reference", "wins against chosen")


def evaluate(settings: EvaluateSettings) -> None:
    """Evaluate checkpoints: a table, ``summary.json``, figures, and the samples that all of it comes from.

    Every policy and the reference draw completions of the same prompts at one temperature, which are rewarded and
    whose log-probabilities are taken under both, at that temperature and on the very tokens that were drawn.

    * reward: the mean over the policy's own completions.
    * KL to the reference: the mean of log policy minus log reference over them, which is unbiased.
    * win rates: the share of pairs of a completion of the policy and one of the reference, or the row's ``chosen``
      where the data have it, in which the policy's has the higher reward, ties counted half. The two draw
      independently.

    Below the output's folder ``NAME/candidates.jsonl`` holds the reference's completions with the log-probabilities
    under both, as ``exo-toy audit`` reads them; ``NAME/samples.jsonl`` the policy's own.

    Args:
        settings: of the stage.

    Raises:
        LmError: bad data or settings, a model that cannot be loaded, a reward that is no finite number.
    """
    models = named_models(settings.models)
    require_model("ref_model", settings.ref_model)
    reward_source(settings)
    missing = [name for name in ("matplotlib", "seaborn") if not importlib.util.find_spec(name)]
    if settings.figures and missing:
        raise LmError(f"figures need {', '.join(missing)}: install the extra figures, or pass --no_figures")
    rows = read_rows(settings.data, ["prompt"], limit=settings.limit)
    check_texts(settings.data, rows, ["chosen"])
    work = _Evaluation(settings, rows, models)
    work.complete_all()

    output = Path(settings.output)
    reference = read_rows(output / REFERENCE / SAMPLES)
    entries = [_measures(REFERENCE, settings.ref_model, reference, reference)]
    for name, path in models.items():
        entries.append(_measures(name, path, read_rows(output / name / SAMPLES), reference))
    summary = {
        "settings": identity("evaluate", settings, data=settings.data),
        "prompts": len(rows),
        "samples_per_prompt": settings.num_samples,
        "intervals": INTERVALS,
        "policies": entries,
    }
    write_whole(output / SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")
    written = [output / SUMMARY]
    if settings.figures:
        from exo_toy.integrations.lm import figures

        written += figures.frontier(entries, output)
        if settings.beta is not None:
            for name in models:
                candidates = read_rows(output / name / CANDIDATES)
                written += figures.density_ratios(candidates, beta=settings.beta, folder=output / name)
    _print_table(entries)
    print(*written, sep="\n")


def named_models(patterns: Sequence[str]) -> dict[str, str]:
    """Paths of checkpoints by a short name: the folder's, after its parent's where that is not unique.

    Args:
        patterns: folders, names on the hub, or patterns of folders with ``*``.

    Returns:
        Paths by name; those of a pattern in the order of the numbers in them.

    Raises:
        LmError: a pattern that nothing fits, a folder without a model, one that is named twice.
    """
    paths: list[str] = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern), key=_by_number) if "*" in pattern else [pattern]
        if not found:
            raise LmError(f"models: there is no folder {pattern}")
        paths += found
    for path in paths:
        require_model("models", path)
    if len(set(paths)) < len(paths):
        raise LmError(f"models must each be named once; got {paths}")
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part for part in some[-depth:] if part != "/") for some in parts]
        if len({*names, REFERENCE}) == len(names) + 1:
            return dict(zip(names, paths, strict=True))
    raise LmError(f"models must have different names, and none {REFERENCE}; got {paths}")


def _by_number(path: str) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


class _Evaluation:
    """The samples of all policies, those that an interruption left computed once."""

    def __init__(self, settings: EvaluateSettings, rows: list[Row], models: dict[str, str]) -> None:
        self.settings, self.rows, self.models = settings, rows, models
        paths = {"data": settings.data, "ref_model": settings.ref_model, "rewards": reward_source(settings)}
        common = identity("evaluate", settings, **paths)
        common = {name: value for name, value in common.items() if name not in NOT_OF_SAMPLES}
        # All of them before anything is loaded: a folder of other settings is refused first.
        self.lines = {(REFERENCE, SAMPLES): self._lines(REFERENCE, SAMPLES, common)}
        for name, path in models.items():
            own = {**common, "model": path, f"{CONTENT}model": digest(path)}
            for file in (SAMPLES, CANDIDATES):
                self.lines[name, file] = self._lines(name, file, own)

    def _lines(self, name: str, file: str, made_with: dict[str, Any]) -> Lines:
        return Lines(Path(self.settings.output) / name / file, made_with)

    def complete_all(self) -> None:
        """Compute what is not there."""
        if all(lines.complete for lines in self.lines.values()):
            return
        name = self.settings.ref_model
        self.prompts = Prompts(self.rows, "ref_model", name, self.settings)
        self.ref = load_policy("ref_model", name, self.settings)
        self.ends = end_tokens(self.ref, self.prompts.tokenizer)
        self.score = scorer(self.settings)
        self._fill(REFERENCE, SAMPLES, self.ref, self._samples)
        self.reference = self.lines[REFERENCE, SAMPLES].rows()
        for name, path in self.models.items():
            if not all(self.lines[name, file].complete for file in (SAMPLES, CANDIDATES)):
                self._complete(name, path)

    def _complete(self, name: str, path: str) -> None:
        """Of one policy."""
        policy = load_policy("models", path, self.settings)
        models: tuple[Any, ...] = (policy, self.ref)
        sizes = [model.get_input_embeddings().weight.shape[0] for model in models]
        if sizes[0] != sizes[1]:
            raise LmError(f"models: {path} must have the vocabulary of ref_model, {sizes[1]}; it has {sizes[0]}")
        self._fill(name, SAMPLES, policy, self._samples)
        self._fill(name, CANDIDATES, policy, self._candidates)

    def _fill(self, name: str, file: str, policy: Any, compute: Callable[[Any, int, int], list[Row]]) -> None:
        lines = self.lines[name, file]
        if lines.complete:
            return
        title = f"{name}: {Path(file).stem}"
        for start, stop in batches(title, lines.done, len(self.rows), self.settings.batch_size):
            lines.append(compute(policy, start, stop))
        lines.finish()

    def _samples(self, policy: Any, start: int, stop: int) -> list[Row]:
        """Completions that a policy draws, with rewards and log-probabilities."""
        rows, is_reference = self.rows[start:stop], policy is self.ref
        # Win rates are of draws that are independent of the reference's.
        source = 0 if is_reference else 1
        drawn = self.prompts.draw(policy, start, stop, count=self.settings.num_samples, ends=self.ends, source=source)
        texts = [as_texts(row["prompt"], some, self.prompts.tokenizer) for row, some in zip(rows, drawn, strict=True)]
        columns = {
            "completions": texts,
            "rewards": self.score([{**row, "completions": some} for row, some in zip(rows, texts, strict=True)]),
            "policy_logps": self._logps(policy, start, drawn),
            "ref_logps": self._logps(self.ref, start, drawn),
            "completion_ids": drawn,
            "finished": [[tokens[-1] in self.ends for tokens in some] for some in drawn],
        }
        made = [
            {"prompt": row["prompt"], **{name: values[place] for name, values in columns.items()}}
            for place, row in enumerate(rows)
        ]
        judged = [place for place, row in enumerate(rows) if row.get("chosen") is not None] if is_reference else []
        if judged:
            numbers = self.score([{**rows[place], "completions": [rows[place]["chosen"]]} for place in judged])
            for place, (number,) in zip(judged, numbers, strict=True):
                made[place]["chosen_reward"] = number
        return made

    def _candidates(self, policy: Any, start: int, stop: int) -> list[Row]:
        """The reference's completions under a policy."""
        rows = self.reference[start:stop]
        logps = self._logps(policy, start, [row["completion_ids"] for row in rows])
        kept = ("prompt", "completions", "rewards", "ref_logps")
        return [
            {**{name: row[name] for name in kept}, "policy_logps": numbers}
            for row, numbers in zip(rows, logps, strict=True)
        ]

    @torch.no_grad()
    def _logps(self, policy: Any, start: int, drawn: list[list[list[int]]]) -> list[list[float]]:
        """Log-probabilities, in nats, of the very tokens that were drawn."""
        prompts = self.prompts.tokens[start : start + len(drawn)]
        features = [Candidates(prompt, some, [0.0] * len(some)) for prompt, some in zip(prompts, drawn, strict=True)]
        batch = CandidateCollator(self.prompts.tokenizer.pad_token_id)(features)
        tokens = (batch[name].to(policy.device) for name in ("input_ids", "attention_mask", "completion_mask"))
        logps = iter(completion_logps(policy, *tokens, temperature=self.settings.temperature).tolist())
        return [[next(logps) for _ in some] for some in drawn]


def _measures(name: str, path: str, rows: list[Row], reference: list[Row]) -> dict[str, Any]:
    """Means over prompts with their intervals, of one policy."""
    rewards, ref_rewards = _table(rows, "rewards"), _table(reference, "rewards")
    entry: dict[str, Any] = {"name": name, "path": path, "reward": _mean(rewards.mean(-1))}
    lengths = [len(tokens) for row in rows for tokens in row["completion_ids"]]
    entry["length"] = sum(lengths) / len(lengths)
    entry["finished"] = _table(rows, "finished").mean().item()
    if name != REFERENCE:
        entry["kl"] = _mean((_table(rows, "policy_logps") - _table(rows, "ref_logps")).mean(-1))
        entry["win_rate_reference"] = _mean(_wins(rewards, ref_rewards))
    judged = [place for place, row in enumerate(reference) if "chosen_reward" in row]
    if judged:
        chosen = torch.tensor([[reference[place]["chosen_reward"]] for place in judged], dtype=torch.float64)
        entry["win_rate_chosen"] = _mean(_wins(rewards[judged], chosen))
    return entry


def _table(rows: list[Row], column: str) -> Tensor:
    return torch.tensor([row[column] for row in rows], dtype=torch.float64)


def _wins(rewards: Tensor, others: Tensor) -> Tensor:
    """Share of the pairs of a row in which the first is above the second, ties counted half."""
    difference = rewards[:, :, None] - others[:, None, :]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean((1, 2))


def _mean(values: Tensor) -> dict[str, float | None]:
    if len(values) == 1:
        return {"mean": values.item(), "low": None, "high": None}
    low, high = bootstrap_mean(values, generator=torch.Generator().manual_seed(0), level=LEVEL)
    return {"mean": values.mean().item(), "low": low.item(), "high": high.item()}


def _print_table(entries: list[dict[str, Any]]) -> None:
    columns = ("reward", "kl", "win_rate_reference", "win_rate_chosen")
    table = [HEADER, *((entry["name"], *(_cell(entry.get(column)) for column in columns)) for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(measure: dict[str, float | None] | None) -> str:
    if measure is None:
        return ""
    interval = "" if measure["low"] is None else f" ({measure['low']:.4g} … {measure['high']:.4g})"
    return f"{measure['mean']:.4g}{interval}"
