"""Models and tokenizers, from folders on disk or from the hub; what cannot be found is refused before it is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from exo_toy.integrations.lm.records import LmError
from exo_toy.integrations.lm.settings import Loading

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
CONFIGS = (CONFIG, ADAPTER_CONFIG)


def require_model(setting: str, name: str) -> None:
    """A name of a model is a folder of one, or can be a name on the hub.

    Args:
        setting: which holds the name, for the message.
        name: of the model.

    Raises:
        LmError: a folder without a model, or a path to nothing.
    """
    path = Path(name)
    if path.is_dir():
        if not any((path / config).is_file() for config in CONFIGS):
            raise LmError(f"{setting}: {name} must be a folder with one of {', '.join(CONFIGS)}; it has none")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise LmError(f"{setting}: there is no folder {name}")


def require_whole(setting: str, name: str) -> None:
    """A model is no adapter, on which a further training would forget what it was trained on.

    Args:
        setting: which holds the name, for the message.
        name: of the model.

    Raises:
        LmError: a folder with an adapter alone.
    """
    if (Path(name) / ADAPTER_CONFIG).is_file():
        raise LmError(
            f"{setting}: {name} must be a whole model, not an adapter: merge it first (merge_and_unload of peft)"
        )


def load_tokenizer(setting: str, name: str, *, offline: bool) -> Any:
    """The tokenizer of a model, which pads with the end-of-sequence token where it has no padding.

    Args:
        setting: which holds the name, for the message.
        name: folder or name on the hub.
        offline: do not look on the hub.

    Raises:
        LmError: it cannot be loaded, or has no end-of-sequence token to pad with.
    """
    require_model(setting, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=offline or Path(name).is_dir())
    except (OSError, ValueError) as error:
        raise LmError(f"{setting}: no tokenizer of {name} can be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise LmError(f"{setting}: the tokenizer of {name} must have an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_room(setting: str, name: str, prompts: Sequence[Sequence[int]], new: int, *, offline: bool) -> None:
    """Prompts and what follows them fit into the positions of a model, as far as its config tells.

    Args:
        setting: which holds the name, for the message.
        name: folder or name on the hub.
        prompts: tokens of each.
        new: tokens that follow.
        offline: do not look on the hub.

    Raises:
        LmError: they do not; the message names the row.
    """
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=offline or Path(name).is_dir())
    except (OSError, ValueError):
        return  # An adapter has no config of its own.
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = [len(prompt) for prompt in prompts]
    if most is not None and max(lengths) + new > most:
        row = lengths.index(max(lengths))
        raise LmError(
            f"max_new_tokens must leave room for the prompts in the {most} positions of {setting}; got {new} after the "
            f"{max(lengths)} tokens of row {row}: max_prompt_length cuts prompts"
        )


def load_policy(setting: str, name: str, loading: Loading) -> PreTrainedModel:
    """A causal language model on its device, in evaluation mode.

    Args:
        setting: which holds the name, for the message.
        name: folder or name on the hub.
        loading: dtype, device and where to look.

    Raises:
        LmError: it cannot be loaded.
    """
    return _placed(AutoModelForCausalLM, setting, name, loading)


def load_classifier(setting: str, name: str, loading: Loading) -> PreTrainedModel:
    """A sequence classifier on its device, in evaluation mode.

    Args:
        setting: which holds the name, for the message.
        name: folder or name on the hub.
        loading: dtype, device and where to look.

    Raises:
        LmError: it cannot be loaded, or has neither one nor two outputs.
    """
    model = _placed(AutoModelForSequenceClassification, setting, name, loading)
    if model.config.num_labels not in (1, 2):
        raise LmError(f"{setting}: {name} must have one output or two; it has {model.config.num_labels}")
    return model


def load(kind: Any, setting: str, name: str, *, offline: bool, new_head: bool = False, **given: Any) -> Any:
    """A model as it is in its files, all of it.

    Args:
        kind: class with ``from_pretrained``.
        setting: which holds the name, for the message.
        name: folder or name on the hub.
        offline: do not look on the hub.
        new_head: the output head may be missing, where it is to be trained.
        given: for ``from_pretrained``.

    Raises:
        LmError: it cannot be loaded, or lacks weights: it is of another kind, such as a reward model for a policy.
    """
    require_model(setting, name)
    local = offline or Path(name).is_dir()
    try:
        model, found = kind.from_pretrained(name, local_files_only=local, output_loading_info=True, **given)
    except Exception as error:  # what broken files raise is of many packages
        raise LmError(f"{setting}: {name} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(key for key in found["missing_keys"] if not new_head or key.startswith(model.base_model_prefix))
    if missing:
        raise LmError(
            f"{setting}: {name} must have all weights of {type(model).__name__}; it lacks {len(missing)}, the first "
            f"{missing[0]}"
        )
    return model


def _placed(kind: Any, setting: str, name: str, loading: Loading) -> Any:
    if loading.device == "auto":
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    else:
        device = torch.device(loading.device)
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError) as error:
            raise LmError(f"device: {device} cannot be used: {_first_line(error)}") from error
    model = load(kind, setting, name, offline=loading.offline, dtype=loading.dtype)
    return model.eval().to(device or torch.device("cpu"))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
