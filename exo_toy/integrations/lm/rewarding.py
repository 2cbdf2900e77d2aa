"""Rewards of completions, by a sequence classifier or by a Python function."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from exo_toy.integrations.lm.models import load_classifier, load_tokenizer, require_model
from exo_toy.integrations.lm.records import LmError, Row
from exo_toy.integrations.lm.settings import Rewarding
from exo_toy.integrations.sampling import RewardFunction, checked_rewards, passed_on, reward_model

# Rows with completions in, one number per completion of each row out.
Scorer = Callable[[Sequence[Row]], list[list[float]]]


def reward_source(settings: Rewarding) -> str | None:
    """The model that gives rewards, or the file of the function that does, found without loading a model.

    Args:
        settings: a model or a function.

    Returns:
        A folder, a name on the hub, or a file; None for a function that has no file.

    Raises:
        LmError: neither can be found.
    """
    if settings.reward_function is not None:
        return getattr(inspect.getmodule(_function(settings.reward_function)), "__file__", None)
    require_model("reward_model", str(settings.reward_model))
    return settings.reward_model


def scorer(settings: Rewarding) -> Scorer:
    """What gives rows of completions their rewards.

    A function is called as TRL's trainers call theirs: with ``prompts`` and ``completions``, and the rows' other
    columns by name, lists with one entry per completion (of ``finished``, which is a list in each row, the
    completion's own); it returns a list of numbers.

    Args:
        settings: a model or a function.

    Raises:
        LmError: neither can be found or loaded.
    """
    if settings.reward_function is not None:
        function: RewardFunction = _function(settings.reward_function)
        source = f"reward_function {settings.reward_function}"
    else:
        function, source = _model(settings), f"reward_model {settings.reward_model}"

    def score(rows: Sequence[Row]) -> list[list[float]]:
        counts = [len(row["completions"]) for row in rows]
        columns = passed_on(rows, counts)
        if [len(row["finished"]) if isinstance(row.get("finished"), list) else 0 for row in rows] == counts:
            columns["finished"] = [ended for row in rows for ended in row["finished"]]
        given = function(
            prompts=[row["prompt"] for row, count in zip(rows, counts, strict=True) for _ in range(count)],
            completions=[completion for row in rows for completion in row["completions"]],
            **columns,
        )
        try:
            numbers = iter(checked_rewards(given, sum(counts), source=source))
        except ValueError as error:
            raise LmError(str(error)) from error
        return [[next(numbers) for _ in range(count)] for count in counts]

    return score


def _function(name: str) -> Callable[..., Any]:
    """The function that ``MODULE:FUNCTION`` names, the working directory among the places to look."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise LmError(f"reward_function must be MODULE:FUNCTION; got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise LmError(f"reward_function: {name} cannot be imported: {error}") from error
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise LmError(f"reward_function: {name} must be a plain function; it is {type(function).__name__}")
    return function


def _model(settings: Rewarding) -> RewardFunction:
    """The classifier, as a function."""
    name = str(settings.reward_model)
    tokenizer = load_tokenizer("reward_model", name, offline=settings.offline)
    model = load_classifier("reward_model", name, settings)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return reward_model(model, tokenizer, batch_size=settings.reward_batch_size, max_length=settings.reward_max_length)
