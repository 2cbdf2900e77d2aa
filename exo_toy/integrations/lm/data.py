"""The rows of files as the trainers take them, checked before a model is loaded."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
from tqdm.auto import tqdm

from exo_toy.integrations.candidates import check_dataset, tokenize_row
from exo_toy.integrations.config import LOSSES_ON_LABELS, CandidateConfig, columns_are_pairs
from exo_toy.integrations.lm.records import LmError, Row, read_rows
from exo_toy.integrations.objective import check_rewards
from exo_toy.integrations.rows import PROGRESS_FROM
from exo_toy.integrations.texts import abridged, is_chat, row_error

# Of files without prompts: the column that the trainer of the fine-tuning reads.
WHOLE_TEXTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "text": (lambda value: isinstance(value, str), "be a string"),
    "messages": (is_chat, "be a list of messages with role and content"),
}


def check_texts(path: str, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Texts are strings, or messages where the prompt of their row is.

    Args:
        path: of the file, for the message.
        rows: with a prompt each.
        columns: of texts; "completions" holds lists of them. A row may lack one.

    Raises:
        LmError: one is something else; the message names file, row and column.
    """
    for index, row in enumerate(rows):
        chat = not isinstance(row["prompt"], str)
        if chat and not is_chat(row["prompt"]):
            allowed = "be a string or a list of messages with role and content"
            raise LmError(f"{path}: {row_error(f'row {index}', 'prompt', allowed, abridged(row['prompt']))}")
        named = {column: row[column] for column in columns if row.get(column) is not None}
        texts = {f"completions[{k}]": text for k, text in enumerate(named.pop("completions", []))}
        for name, text in (texts | named).items():
            if not (is_chat(text) if chat else isinstance(text, str)):
                allowed = f"be a {'list of messages with role and content' if chat else 'string'}, as the prompt is"
                raise LmError(f"{path}: {row_error(f'row {index}', name, allowed, abridged(text))}")


def for_sft(name: str, path: str) -> datasets.Dataset:
    """Prompt and completion, which the official format calls chosen; or whole texts or chats, as they are.

    Rows without text to learn are left out and counted.

    Args:
        name: of the dataset, for the count.
        path: of the file.

    Raises:
        LmError: other columns, or no row left.
    """
    first = read_rows(path, limit=1)[0]
    if "prompt" not in first:
        column = next((column for column in WHOLE_TEXTS if column in first), None)
        if column is None:
            allowed = "prompt and chosen, prompt and completion, text, or messages"
            raise LmError(f"{path}: row 0: must have the columns {allowed}; got {sorted(first)}")
        rows = read_rows(path, [column])
        fits, allowed = WHOLE_TEXTS[column]
        for index, row in enumerate(rows):
            if not fits(row[column]):
                raise LmError(f"{path}: {row_error(f'row {index}', column, allowed, abridged(row[column]))}")
        return datasets.Dataset.from_list([{column: row[column]} for row in rows])
    column = "completion" if "completion" in first else "chosen"
    rows = read_rows(path, ["prompt", column])
    check_texts(path, rows, [column])
    pairs = [{"prompt": row["prompt"], "completion": row[column]} for row in rows]
    return _dataset(name, path, [pair for pair in pairs if not is_empty(pair["completion"])], len(pairs), "no text")


def for_reward(name: str, path: str) -> datasets.Dataset:
    """Prompt, chosen and rejected; rows where one has no text, or both are the same, are left out and counted.

    Args:
        name: of the dataset, for the count.
        path: of the file.

    Raises:
        LmError: a missing column, a text that is none, or no row left.
    """
    columns = ("prompt", "chosen", "rejected")
    rows = [{column: row[column] for column in columns} for row in read_rows(path, columns)]
    check_texts(path, rows, columns[1:])
    kept = [
        row
        for row in rows
        if not is_empty(row["chosen"]) and not is_empty(row["rejected"]) and row["chosen"] != row["rejected"]
    ]
    return _dataset(name, path, kept, len(rows), "no text, or chosen and rejected the same")


def for_alignment(
    name: str, path: str, args: CandidateConfig, tokenizer: Any, *, count: int | None = None
) -> list[Row]:
    """Rows for the trainer on candidates, without completions that have no text; what is left out is counted.

    Args:
        name: of the dataset, for the count.
        path: of the file.
        args: of the trainer.
        tokenizer: of the policy.
        count: use the first so many completions of each row; None for all.

    Raises:
        LmError: a bad row, or none left; the message names file, row and column.
    """
    pairs, single = columns_are_pairs(args.loss), args.loss in LOSSES_ON_LABELS
    if pairs is None:
        pairs = "chosen" in read_rows(path, ("prompt",), limit=1)[0]
    columns = ("prompt", "chosen", "rejected") if pairs else ("prompt", "completions", "rewards")
    rows = read_rows(path, columns)
    kept: dict[int, Row] = {}  # by their numbers in the file, which messages name
    empty, least = 0, 1 if single else 2
    for index, row in enumerate(rows):
        selected = {column: row[column] for column in (*columns, "finished") if row.get(column) is not None}
        if pairs:
            lacking = is_empty(row["chosen"]) + is_empty(row["rejected"])
            left = 2 * (lacking == 0)
        else:
            lacking, left = _without_empty(path, index, selected, count)
        empty += lacking
        if left >= least:
            kept[index] = selected
    if empty:
        few = f"{len(rows) - len(kept)} rows with fewer than {least} left out"
        print(f"{name}: {empty} completions without text and {few}")
    if not kept:
        raise LmError(f"{path}: no row has {'a completion' if single else 'two completions'} with text")
    given: dict[str, Any] = {
        "max_prompt_length": args.max_prompt_length,
        "max_completion_length": args.max_completion_length,
        "single": single,
    }
    shown = tqdm(kept.items(), desc=f"Tokenizing {name}", disable=len(kept) < PROGRESS_FROM)
    try:
        tokenized = {index: tokenize_row(row, tokenizer, index=index, **given) for index, row in shown}
        report = check_dataset(tokenized.values(), tokenizer, single=single)
        rewards = [(index, row.rewards) for index, row in tokenized.items()]
        check_rewards((rewards[place] for place in report.kept), args)
    except ValueError as error:
        raise LmError(f"{path}: {error}") from error
    print(f"{name}: {report}")
    return list(kept.values())


def is_empty(completion: Any) -> bool:
    """Whether a string, or messages, have no text; what is neither is not for this function to refuse.

    Args:
        completion: of a row.

    Example:
        >>> is_empty(""), is_empty([{"role": "assistant", "content": None}]), is_empty(" a")
        (True, True, False)
    """
    if isinstance(completion, list):
        return all(isinstance(turn, Mapping) and not turn.get("content") for turn in completion)
    return completion == ""


def _without_empty(path: str, index: int, row: Row, count: int | None) -> tuple[int, int]:
    """Take the first so many completions of a row, those with text; say how many have none and how many are left."""
    beside = {name: row[name] for name in ("rewards", "finished") if name in row}
    for name, values in beside.items():
        if not isinstance(values, list) or len(values) != len(row["completions"]):
            what = "number" if name == "rewards" else "truth value"
            allowed = f"be a list of one {what} per completion, {len(row['completions'])}"
            raise LmError(f"{path}: {row_error(f'row {index}', name, allowed, abridged(values))}")
    places = range(len(row["completions"]))[:count]
    full = [k for k in places if not is_empty(row["completions"][k])]
    row |= {name: [row[name][k] for k in full] for name in ("completions", *beside)}
    return len(places) - len(full), len(full)


def _dataset(name: str, path: str, kept: list[Row], count: int, reason: str) -> datasets.Dataset:
    """Of the rows that are kept."""
    if len(kept) < count:
        print(f"{name}: {count - len(kept)} of {count} rows left out: {reason}")
    if not kept:
        raise LmError(f"{path}: no row is left")
    # Of the columns of a dataset each has one type.
    if len({isinstance(row["prompt"], str) for row in kept}) > 1:
        raise LmError(f"{path}: prompts must be of one kind, strings or lists of messages; got both")
    return datasets.Dataset.from_list(kept)
