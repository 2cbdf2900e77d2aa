"""Tokenised datasets: checked before training, in an order that no number of processes changes."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from tqdm.auto import tqdm

from exo_toy import checks
from exo_toy.integrations.candidates import CandidateCollator, Candidates, Report, check_dataset, tokenize_row
from exo_toy.integrations.reference import ReferenceCache

# Shorter datasets are through before anyone could read a progress bar.
PROGRESS_FROM = 1000
# Before the names of what a batch holds of mismatched prompts and completions.
OTHER = "other_"


@dataclass(eq=False)
class Rows(Sequence[dict[str, Any]]):
    """The rows of a dataset that can teach something, as token ids.

    Attributes:
        rows: all of them, as :class:`Candidates` or mappings with their keys.
        report: which of them are kept, and why others are not.
        pairs: whether they are pairs of chosen and rejected.
        cache: from which each row gets its ``ref_logps``; None for none.
        mismatched: whether each row also gets ``other_completion_ids``, the completions of the row before it.
    """

    rows: Any
    report: Report
    pairs: bool
    cache: ReferenceCache | None = None
    mismatched: bool = False

    def __len__(self) -> int:
        return len(self.report.kept)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._row(index)
        if self.cache is not None:
            row["ref_logps"] = self.cache.logps(row, index=self.report.kept[index])
        if self.mismatched:
            row["other_completion_ids"] = self._row((index - 1) % len(self))["completion_ids"]
        return row

    def _row(self, index: int) -> dict[str, Any]:
        row = self.rows[self.report.kept[index]]
        return dict(row) if isinstance(row, Mapping) else dict(vars(row))

    def mismatch(self) -> None:
        """Give each row the completions of the one before it, too; the first row those of the last.

        Raises:
            ValueError: there is no other row.
        """
        if len(self) < 2:
            raise ValueError("must have two rows or more, for completions of other prompts; got 1")
        self.mismatched = True

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with a completion that it is given."""
        if not self.mismatched:
            return self.report.longest
        others = max(len(row["prompt_ids"]) + max(map(len, row["other_completion_ids"])) for row in self)
        return max(self.report.longest, others)

    def rewards(self) -> Iterator[tuple[int, list[float]]]:
        """Of each row its place in the dataset and its rewards."""
        column = self.rows["rewards"] if isinstance(self.rows, datasets.Dataset) else None
        for place in self.report.kept:
            yield place, self.rows[place].rewards if column is None else column[place]

    def read_reference(self, cache: ReferenceCache) -> None:
        """Give each row the reference's log-probabilities.

        Raises:
            StaleCacheError: the cache lacks a candidate.
        """
        self.cache = cache
        for _ in tqdm(self, desc="Reading the reference", disable=len(self) < PROGRESS_FROM):
            pass


def tokenize_dataset(
    name: str,
    dataset: Any,
    tokenizer: Any,
    *,
    pairs: bool | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    single: bool = False,
) -> Rows:
    """Tokenise and check every row.

    A ``datasets.Dataset`` is mapped, so that its tokens stay where the dataset is (on disk); any other sequence of rows
    becomes a list. Long datasets show their progress.

    Args:
        name: what to call the dataset in messages.
        dataset: of rows with columns prompt, completions and rewards, or prompt, chosen and rejected.
        tokenizer: as for :func:`~exo_toy.integrations.candidates.tokenize_row`.
        pairs: whether the columns must be chosen and rejected (True), completions and rewards (False), or either.
        max_prompt_length: tokens of a prompt that are kept.
        max_completion_length: tokens of a completion that are kept.
        single: for losses on single completions, for which one is enough.

    Returns:
        The rows.

    Raises:
        ValueError: no length, no row, a bad row, columns that do not fit, rows of both kinds, or no row left that can
            teach something. The message names dataset, row and column.
    """
    dataset = rows_by_index(name, dataset)

    def tokenize(row: Mapping[str, Any], index: int) -> Candidates:
        return tokenize_row(
            row,
            tokenizer,
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            index=index,
            single=single,
        )

    rows: Any
    try:
        # The first row alone: columns that do not fit must not wait for all the others.
        first = tokenize(dataset[0], 0)
        if pairs is not None and first.preference != pairs:
            raise ValueError(f"must have the columns {_columns(pairs)}; got those of {_columns(first.preference)}")
        if isinstance(dataset, datasets.Dataset):
            rows = dataset.map(
                lambda row, index: asdict(tokenize(row, index)),
                with_indices=True,
                remove_columns=dataset.column_names,
                desc=f"Tokenizing {name}",
                # Tokenised anew each time: a key that saw every change of tokenizer and library would cost more than
                # the tokens. The name is that of the file, which is written over.
                load_from_cache_file=False,
                new_fingerprint=hashlib.sha256(f"{name} {dataset._fingerprint}".encode()).hexdigest()[:16],
            )
        else:
            shown = tqdm(range(len(dataset)), desc=f"Tokenizing {name}", disable=len(dataset) < PROGRESS_FROM)
            rows = [tokenize(dataset[index], index) for index in shown]
        candidates = (row if isinstance(row, Candidates) else Candidates(**row) for row in rows)
        report = check_dataset(_of_one_kind(candidates, first.preference), tokenizer, single=single)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Rows(rows, report, first.preference)


def rows_by_index(name: str, dataset: Any) -> Any:
    """The dataset, whose rows are plain Python whatever its format, if it has rows by index.

    Args:
        name: what to call the dataset in messages.
        dataset: a ``datasets.Dataset`` or any sequence.

    Raises:
        ValueError: no length, no row, or something else by index than rows.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"{name} must have a length and rows by index (no stream); got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name} must have at least one row; got none")
    plain = dataset.with_format(None) if isinstance(dataset, datasets.Dataset) else dataset
    try:
        plain[0]
    except KeyError as error:
        raise ValueError(
            f"{name} must have rows by index, not columns or splits by name; got {type(dataset).__name__}"
        ) from error
    return plain


class Epochs(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows in the order of an epoch, which depends on seed and epoch alone.

    Where several processes share the batches, weightless copies of a row fill up the end, so that all have as many
    batches and no row counts twice.

    Args:
        rows: the rows.
        multiple: of which the length is one: rows that all processes take at a time; 1 for a single process.
        seed: of the order; None for the order in which the rows stand.
        drop_last: leave out the rows beyond the last multiple instead of filling up.

    Raises:
        ValueError: no row is left.
    """

    def __init__(self, rows: Rows, *, multiple: int, seed: int | None, drop_last: bool = False) -> None:
        checks.require_integer("multiple", multiple, at_least=1)
        self.rows, self.seed = rows, seed
        whole = len(rows) // multiple if drop_last else math.ceil(len(rows) / multiple)
        self._length = whole * multiple
        if self._length == 0:
            raise ValueError(
                f"dataloader_drop_last must be False where {len(rows)} rows are fewer than the {multiple} of one batch "
                "of all processes; got True"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take on the order of this epoch; the data loader calls it."""
        count = len(self.rows)
        generator = torch.Generator().manual_seed((self.seed or 0) + epoch)
        self._order = torch.arange(count) if self.seed is None else torch.randperm(count, generator=generator)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> dict[str, Any]:
        counts = position < len(self.rows)
        row = self.rows[int(self._order[position if counts else 0])]
        return {**row, "prompt_weight": float(counts)}


@dataclass(frozen=True)
class WeightedCollator:
    """A batch of candidates with ``prompt_weights`` [B], 0 for the copies that fill up an epoch.

    Attributes:
        collator: makes the rest of the batch.
    """

    collator: CandidateCollator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch of these features; of prompts with other prompts' completions, too, under "other_" names."""
        weights = torch.tensor([feature["prompt_weight"] for feature in features], dtype=self.collator.dtype)
        batch = {**self.collator(features), "prompt_weights": weights}
        if "other_completion_ids" in features[0]:
            others = [
                Candidates(row["prompt_ids"], row["other_completion_ids"], [0.0] * len(row["other_completion_ids"]))
                for row in features
            ]
            batch |= {f"{OTHER}{name}": value for name, value in self.collator(others).items()}
        return batch


def _columns(pairs: bool) -> str:
    return "prompt, chosen and rejected" if pairs else "prompt, completions and rewards"


def _of_one_kind(rows: Any, pairs: bool) -> Any:
    """The rows, after a look at the kind of each."""
    for index, row in enumerate(rows):
        if row.preference != pairs:
            raise ValueError(
                f"row {index}: must have the columns of row 0, {_columns(pairs)}; got {_columns(not pairs)}"
            )
        yield row
