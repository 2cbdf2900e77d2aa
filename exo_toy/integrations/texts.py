"""From texts to token ids."""

from collections.abc import Mapping, Sequence
from typing import Any


def token_ids(
    prompt: Any, completions: Mapping[str, Any], tokenizer: Any, where: str, *, finished: Sequence[bool] | None = None
) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt and of each completion, before truncation.

    Args:
        prompt: a string, or a chat.
        completions: of the prompt's kind, by the names of their columns.
        tokenizer: with an end-of-sequence token.
        where: the row, for messages.
        finished: of each completion, whether it has come to its end, which is a token, too; None for all.

    Raises:
        ValueError: a text that is neither string nor chat, or has no tokens; a chat template that does not extend the
            prompt.
    """
    if isinstance(prompt, str):
        prompt_ids = _prompt_ids(prompt, tokenizer)
    elif is_chat(prompt):
        if getattr(tokenizer, "chat_template", None) is None:
            raise row_error(where, "prompt", "be a string where the tokenizer has no chat template", "messages")
        prompt_ids = list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
    else:
        raise row_error(where, "prompt", "be a string or a list of messages with role and content", abridged(prompt))
    if not prompt_ids:
        raise row_error(where, "prompt", "have at least one token", abridged(prompt))

    completion_ids = []
    ends = [True] * len(completions) if finished is None else finished
    for (column, completion), ended in zip(completions.items(), ends, strict=True):
        if isinstance(prompt, str):
            ids = _plain_ids(completion, tokenizer, column, where, ended=ended)
        else:
            ids = _chat_ids(prompt, prompt_ids, completion, tokenizer, column, where, ended=ended)
        if not ids:
            raise row_error(where, column, "have at least one token", abridged(completion))
        completion_ids.append(ids)
    return prompt_ids, completion_ids


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages.

    Args:
        value: of a row's column.

    Example:
        >>> is_chat([{"role": "user", "content": "hello"}]), is_chat("hello"), is_chat([])
        (True, False, False)
    """
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)
    )


def abridged(value: Any) -> str:
    """A value, short enough for a message.

    Args:
        value: of a row's column.
    """
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def row_error(where: str, column: str, allowed: str, got: str) -> ValueError:
    """The error of a row's column.

    Args:
        where: the row.
        column: its name.
        allowed: what it must.
        got: what it is instead.

    Example:
        >>> row_error("row 3", "prompt", "be a string", "7")
        ValueError('row 3, column "prompt": must be a string; got 7')
    """
    return ValueError(f'{where}, column "{column}": must {allowed}; got {got}')


def _prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """With the special tokens that go first, without an end-of-sequence token that the tokenizer adds."""
    ids = list(tokenizer(prompt)["input_ids"])
    plain = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ended = ids[-len(plain) - 1 :] == [*plain, tokenizer.eos_token_id]
    return ids[:-1] if ended else ids


def _plain_ids(completion: Any, tokenizer: Any, column: str, where: str, *, ended: bool) -> list[int]:
    """Of a string, with the end-of-sequence token where it has come to its end; none of an empty string."""
    if not isinstance(completion, str):
        raise row_error(where, column, "be a string, as the prompt is", abridged(completion))
    ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if ids and ended and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids


def _chat_ids(
    prompt: Any, prompt_ids: list[int], completion: Any, tokenizer: Any, column: str, where: str, *, ended: bool
) -> list[int]:
    """What the messages of a completion add to the prompt's ids; none where they have no content."""
    if not is_chat(completion):
        raise row_error(
            where, column, "be a list of messages with role and content, as the prompt is", abridged(completion)
        )
    if not any(message["content"] for message in completion):
        return []
    # A message that is to be continued is not ended by the template.
    chat = [*prompt, *completion]
    try:
        ids = list(tokenizer.apply_chat_template(chat, return_dict=False, continue_final_message=not ended))
    except ValueError as error:
        raise row_error(where, column, "go through the chat template", f"{abridged(completion)}: {error}") from error
    if ids[: len(prompt_ids)] != prompt_ids:
        allowed = "extend the tokens of the prompt under the chat template"
        raise row_error(where, column, allowed, f"a template that changes them when {abridged(completion)} follows")
    return ids[len(prompt_ids) :]
