"""The models that a trainer is given: what it asks of them, and what it changes."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn

from exo_toy.integrations.reference import is_of_adapter
from exo_toy.integrations.scoring import check_model, text_config


def check_models(model: Any, ref_model: Any, *, cached: bool) -> None:
    """Policy and reference are models that go together.

    Args:
        model: the policy.
        ref_model: the reference, or None.
        cached: whether the reference's log-probabilities come from a cache.

    Raises:
        ValueError: no module, a prompt-learning adapter; a reference that is the policy itself, of another dtype, or
            that has an adapter, where a cache would hold those of the model without it.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a causal language model; got {type(model).__name__}")
    check_model(model)
    if ref_model is None:
        return
    if ref_model is model:
        raise ValueError("ref_model must be another object than model, which training changes; got model itself")
    if dtype_of(ref_model) != dtype_of(model):
        raise ValueError(f"ref_model must have the dtype of model, {dtype_of(model)}; got {dtype_of(ref_model)}")
    if cached and isinstance(ref_model, PeftModel):
        raise ValueError(
            "ref_model must have no adapter where ref_cache is given: merge_and_unload makes one model of the two; "
            f"got {type(ref_model).__name__}"
        )


def check_adapter(model: Any) -> None:
    """The policy without its adapter stays what it is while the adapter is trained.

    Args:
        model: a PEFT model.

    Raises:
        ValueError: a prompt-learning adapter; parameters outside the adapter are trained.
    """
    check_model(model)
    moving = [name for name, p in model.named_parameters() if p.requires_grad and not is_of_adapter(model, name)]
    if moving:
        raise ValueError(
            "ref_model or ref_cache must be given where parameters outside the adapter are trained (bias= of its "
            f"config), which stay when it is switched off; got {len(moving)} of them, the first {moving[0]}"
        )


def check_positions(name: str, longest: int, model: Any) -> None:
    """The rows fit into the positions that a model has learned.

    Args:
        name: of the dataset, for the message.
        longest: tokens of its longest row.
        model: whose config tells; rotary positions have no end.

    Raises:
        ValueError: a row is too long.
    """
    config = text_config(model)
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and longest > most and getattr(config, "rope_parameters", None) is None:
        raise ValueError(
            f"{name} must have at most {most} tokens a row, the positions of the model: max_prompt_length and "
            f"max_completion_length (max_new_tokens) cut them; got {longest}"
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to zero, in its modules and in their attributes.

    Args:
        model: changed in place; its config is not.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_probability = name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
            if isinstance(value, float) and (is_probability or "drop" in name):
                setattr(module, name, 0.0)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the first floating-point parameter.

    Args:
        model: the model.
    """
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
