"""From rows of a dataset to padded batches of candidates.

A row is ``{"prompt", "completions", "rewards"}``, or ``{"prompt", "chosen", "rejected"}``; texts are strings, or chats
(lists of ``{"role", "content"}``) that go through the tokenizer's chat template. ``finished`` in a row says of each
completion, or of chosen and rejected, whether it came to its end or was cut while it was sampled.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from exo_toy import checks
from exo_toy.integrations.texts import abridged, row_error, token_ids


@dataclass(frozen=True)
class Candidates:
    """A prompt with its candidate completions, as token ids.

    Attributes:
        prompt_ids: tokens of the prompt, at least one.
        completion_ids: K lists of tokens, at least one token each; K is at least 2, for losses on single completions 1.
        rewards: K finite numbers; [1, 0] for (chosen, rejected).
        preference: whether the row was a pair of chosen and rejected.
    """

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    rewards: list[float]
    preference: bool = False


@dataclass(frozen=True)
class Report:
    """What is in a dataset.

    Attributes:
        rows: how many rows were read.
        skipped: how many of them teach nothing and are left out, by reason.
        counted: how many others are worth knowing of, by what they are; they are kept.
        kept: indices of the rows that are left.
        longest: tokens of the longest prompt with its completion, of the rows that are left.
    """

    rows: int
    skipped: dict[str, int]
    counted: dict[str, int]
    kept: list[int]
    longest: int = 0

    def __str__(self) -> str:
        said = [f"{count} skipped: {reason}" for reason, count in self.skipped.items() if count]
        said += [f"{count} kept: {reason}" for reason, count in self.counted.items() if count]
        return "; ".join([f"{self.rows} rows", *said])


def tokenize_row(
    row: Mapping[str, Any],
    tokenizer: Any,
    *,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    index: int | None = None,
    single: bool = False,
) -> Candidates:
    """Token ids of a row's prompt and candidates.

    Strings: prompt and completion are tokenised apart and their ids joined, so that no token spans the boundary. The
    prompt gets the special tokens that the tokenizer puts first, each completion the end-of-sequence token unless it
    has it. Chats: a completion's ids are those that the chat template adds to the ids of the prompt with its
    generation prompt, and nothing is appended. A completion that is not ``finished`` is not ended, neither by the token
    nor by the template.

    Too long a prompt loses its start; too long a completion loses its end, and with it the end-of-sequence token,
    which counts towards the length.

    Args:
        row: the columns named above; others are ignored.
        tokenizer: a ``transformers`` tokenizer with an end-of-sequence token.
        max_prompt_length: tokens of the prompt to keep, at least 1; None for all.
        max_completion_length: tokens of each completion to keep, at least 1; None for all.
        index: of the row, for error messages.
        single: whether one completion is enough.

    Returns:
        The row as token ids.

    Raises:
        ValueError: a missing column, fewer than two completions, another number of rewards than of completions, a
            reward that is no finite float32 number, ``finished`` that is not one truth value per completion, a text
            that is neither string nor chat, an empty prompt or completion, a chat template that does not extend the
            prompt, a tokenizer without end-of-sequence token. The message names row and column.

    Example:
        >>> class Letters:  # a tokenizer
        ...     eos_token_id = 0
        ...     def __call__(self, text, add_special_tokens=True):
        ...         return {"input_ids": [ord(letter) - 96 for letter in text]}
        >>> tokenize_row({"prompt": "ab", "chosen": "c", "rejected": "de"}, Letters())
        Candidates(prompt_ids=[1, 2], completion_ids=[[3, 0], [4, 5, 0]], rewards=[1.0, 0.0], preference=True)
    """
    for name, length in {
        "max_prompt_length": max_prompt_length,
        "max_completion_length": max_completion_length,
    }.items():
        if length is not None:
            checks.require_integer(name, length, at_least=1)
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError("tokenizer must have an end-of-sequence token; got eos_token_id None")
    where = "row" if index is None else f"row {index}"

    prompt, completions, rewards, preference = _columns(row, where, 1 if single else 2)
    finished = _finished(row, len(completions), where)
    prompt_ids, completion_ids = token_ids(prompt, completions, tokenizer, where, finished=finished)
    if max_prompt_length is not None:
        prompt_ids = prompt_ids[-max_prompt_length:]
    if max_completion_length is not None:
        completion_ids = [ids[:max_completion_length] for ids in completion_ids]
    return Candidates(prompt_ids, completion_ids, rewards, preference)


def check_dataset(
    dataset: Iterable[Mapping[str, Any] | Candidates],
    tokenizer: Any,
    *,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    single: bool = False,
) -> Report:
    """What a pass over a dataset finds: an error for a bad row, a count of those that teach nothing.

    Args:
        dataset: rows as :func:`tokenize_row` takes them, or :class:`Candidates`.
        tokenizer: as in :func:`tokenize_row`.
        max_prompt_length: as in :func:`tokenize_row`.
        max_completion_length: as in :func:`tokenize_row`.
        single: for losses on single completions: as in :func:`tokenize_row`, and no row is left out.

    Returns:
        The counts. Rows whose candidates are the same tokens (after truncation) are left out of ``kept``: no loss on
        candidates has a gradient there. Rows with equal rewards are counted and kept: their target is the reference.

    Raises:
        ValueError: a row that :func:`tokenize_row` refuses; a dataset without a row that is kept.

    Example:
        >>> row = Candidates([1], [[2], [2]], [0.0, 1.0])
        >>> print(check_dataset([row, Candidates([1], [[2], [3]], [0.0, 0.0])], None))
        2 rows; 1 skipped: all candidates are the same; 1 kept: all rewards are equal
    """
    same, equal, kept, rows, longest = 0, 0, [], 0, 0
    for index, row in enumerate(dataset):
        rows += 1
        candidates = (
            row
            if isinstance(row, Candidates)
            else tokenize_row(
                row,
                tokenizer,
                max_prompt_length=max_prompt_length,
                max_completion_length=max_completion_length,
                index=index,
                single=single,
            )
        )
        if not single and all(ids == candidates.completion_ids[0] for ids in candidates.completion_ids):
            same += 1
            continue
        kept.append(index)
        longest = max(longest, len(candidates.prompt_ids) + max(map(len, candidates.completion_ids)))
        equal += all(reward == candidates.rewards[0] for reward in candidates.rewards)
    skipped, counted = {"all candidates are the same": same}, {"all rewards are equal": equal}
    report = Report(rows, skipped, counted, kept, longest)
    if not kept:
        raise ValueError(f"dataset must have a row with two different candidates; got {report}")
    return report


def is_finite_number(value: Any) -> bool:
    """Whether a reward is a finite number, in float32, too, in which rewards reach the loss.

    Args:
        value: of any type.

    Example:
        >>> is_finite_number(1e38), is_finite_number(1e39), is_finite_number("1")
        (True, False, False)
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return False
    try:
        return abs(float(value)) <= torch.finfo(torch.float32).max
    except (OverflowError, RuntimeError, TypeError, ValueError):  # an integer beyond all floats; an array
        return False


def check_reward_scale(name: str, largest: float, *, beta_r: float | int) -> None:
    r"""Differences of rewards stay finite in float32, and so when the loss divides them by the temperature.

    .. math:: 2 \max|r| \max(1, 1/\beta_r) \le \max(\mathrm{float32})

    Args:
        name: of the rewards, for the message.
        largest: the largest absolute reward.
        beta_r: reward temperature, above 0.

    Raises:
        ValueError: they may not.

    Example:
        >>> check_reward_scale("rewards of train_dataset", 1e37, beta_r=0.1)
        >>> check_reward_scale("rewards of train_dataset", 1e38, beta_r=0.1)
        Traceback (most recent call last):
        ...
        ValueError: rewards of train_dataset must be at most 1.7e+37 in size with beta_r=0.1; got 1e+38
    """
    most = torch.finfo(torch.float32).max / 2 * min(1.0, beta_r)
    if not largest <= most:  # NaN, too
        raise ValueError(f"{name} must be at most {most:.2g} in size with beta_r={beta_r:g}; got {largest:g}")


@dataclass(frozen=True)
class CandidateCollator:
    """Rows of candidates to one padded batch.

    Attributes:
        pad_token_id: fills up the rows; never attended to.
        padding_side: where, "right" or "left".
        pad_to_multiple_of: the width is a multiple of this; None for the longest row's.
        dtype: of rewards, ref_logps and log_weights.
    """

    pad_token_id: int
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        checks.require_integer("pad_token_id", self.pad_token_id, at_least=0)
        if self.padding_side not in ("right", "left"):
            raise ValueError(f'padding_side must be "right" or "left"; got {self.padding_side!r}')
        if self.pad_to_multiple_of is not None:
            checks.require_integer("pad_to_multiple_of", self.pad_to_multiple_of, at_least=1)

    def __call__(self, features: Sequence[Candidates | Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch of B prompts, with K the largest number of candidates and R the number of all.

        Args:
            features: :class:`Candidates`, or mappings with the same keys and possibly ``ref_logps`` and
                ``log_weights``, K numbers each; both in all features or in none.

        Returns:
            ``input_ids``, ``attention_mask`` and ``completion_mask`` [R, T] int64, the candidates of a prompt next to
            one another, the last 1 on tokens of the completion; ``candidate_rows`` [B, K] int64, the row of each
            candidate; ``candidate_mask`` [B, K] bool, False where a prompt has fewer candidates; ``rewards`` [B, K],
            ``ref_logps`` and ``log_weights`` [B, K] where given. Masked entries of [B, K] are 0.

        Raises:
            ValueError: no features; a feature without candidates or without tokens; numbers that are not one per
                candidate; an optional key that only some features have.

        Example:
            >>> batch = CandidateCollator(0)([Candidates([1, 2], [[3], [4, 5]], [1.0, 0.0])])
            >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
            ([[1, 2, 3, 0], [1, 2, 4, 5]], [[0, 0, 1, 0], [0, 0, 1, 1]])
        """
        rows = [vars(feature) if isinstance(feature, Candidates) else feature for feature in features]
        if not rows:
            raise ValueError("features must hold at least one prompt; got none")
        optional = [name for name in ("ref_logps", "log_weights") if any(row.get(name) is not None for row in rows)]
        for place, row in enumerate(rows):
            _check_feature(row, place, optional)

        sequences = [(row["prompt_ids"], ids) for row in rows for ids in row["completion_ids"]]
        width = max(len(prompt) + len(completion) for prompt, completion in sequences)
        if self.pad_to_multiple_of is not None:
            width = math.ceil(width / self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": torch.full((len(sequences), width), self.pad_token_id),
            "attention_mask": torch.zeros(len(sequences), width, dtype=torch.int64),
            "completion_mask": torch.zeros(len(sequences), width, dtype=torch.int64),
        }
        for r, (prompt, completion) in enumerate(sequences):
            length = len(prompt) + len(completion)
            start = width - length if self.padding_side == "left" else 0
            batch["input_ids"][r, start : start + length] = torch.tensor([*prompt, *completion])
            batch["attention_mask"][r, start : start + length] = 1
            batch["completion_mask"][r, start + len(prompt) : start + length] = 1

        counts = torch.tensor([len(row["completion_ids"]) for row in rows])
        batch["candidate_mask"] = torch.arange(int(counts.max())) < counts[:, None]
        batch["candidate_rows"] = torch.zeros(batch["candidate_mask"].shape, dtype=torch.int64)
        batch["candidate_rows"][batch["candidate_mask"]] = torch.arange(len(sequences))
        for name in ["rewards", *optional]:
            numbers = [float(number) for row in rows for number in row[name]]
            batch[name] = torch.zeros(batch["candidate_mask"].shape, dtype=self.dtype)
            batch[name][batch["candidate_mask"]] = torch.tensor(numbers, dtype=self.dtype)
        return batch


def _check_feature(row: Mapping[str, Any], place: int, optional: list[str]) -> None:
    """Tokens everywhere, and one number per candidate in each column of numbers."""
    count = len(row["completion_ids"])
    if count == 0 or not row["prompt_ids"] or not all(row["completion_ids"]):
        raise ValueError(f"feature {place} must have candidates, and tokens in its prompt and in each candidate")
    for name in ["rewards", *optional]:
        if row.get(name) is None:
            raise ValueError(f"{name} must be in every feature or in none; feature {place} has none")
        if len(row[name]) != count:
            raise ValueError(
                f"{name} of feature {place} must have one number per candidate, {count}; got {len(row[name])}"
            )


def _columns(row: Mapping[str, Any], where: str, least: int) -> tuple[Any, dict[str, Any], list[float], bool]:
    """Prompt, completions by where they stand, rewards, and whether they came as chosen and rejected."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: must be a mapping with columns; got {abridged(row)}")
    present = {name for name in row if row[name] is not None}
    candidates, pair = {"completions", "rewards"}, {"chosen", "rejected"}
    if present & candidates and present & pair:
        allowed = "must have the columns completions and rewards, or chosen and rejected, not both"
        raise ValueError(f"{where}: {allowed}; got {sorted(present)}")
    wanted = {"prompt"} | (pair if present & pair else candidates)
    for name in sorted(wanted - present):
        raise row_error(where, name, "be there", f"columns {sorted(present)}")
    if present & pair:
        return row["prompt"], {"chosen": row["chosen"], "rejected": row["rejected"]}, [1.0, 0.0], True

    completions = _list(row["completions"], "completions", where)
    rewards = _list(row["rewards"], "rewards", where)
    if len(completions) < least:
        plural = "s" if least > 1 else ""
        raise row_error(where, "completions", f"hold at least {least} completion{plural}", str(len(completions)))
    if len(rewards) != len(completions):
        raise row_error(where, "rewards", f"hold one number per completion, {len(completions)}", str(len(rewards)))
    for k, reward in enumerate(rewards):
        if not is_finite_number(reward):
            raise row_error(where, f"rewards[{k}]", "be a finite number (in float32)", repr(reward))
    named = {f"completions[{k}]": completion for k, completion in enumerate(completions)}
    return row["prompt"], named, [float(reward) for reward in rewards], False


def _list(value: Any, column: str, where: str) -> list[Any]:
    """A list, tuple, array or tensor as a list."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise row_error(where, column, "be a list", type(value).__name__)
    return list(value)


def _finished(row: Mapping[str, Any], count: int, where: str) -> list[bool] | None:
    """Whether each completion came to its end; None where the row does not say."""
    if row.get("finished") is None:
        return None
    finished = _list(row["finished"], "finished", where)
    if len(finished) != count or not all(isinstance(ended, bool) for ended in finished):
        raise row_error(where, "finished", f"hold true or false for each completion, {count}", abridged(finished))
    return finished
