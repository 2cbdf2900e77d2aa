"""Log-probabilities of completions under a causal language model of ``transformers``, wrapped or not."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from exo_toy import checks
from exo_toy.kernels import linear_logps, selective_logps, sequence_logps

Kernel = Literal["auto", "linear", "selective"]
IGNORED = -100


def completion_logps(
    model: nn.Module,
    input_ids: Int[Tensor, "R T"],
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float | int = 1.0,
    kernel: Kernel = "auto",
) -> Float[Tensor, " R"]:
    r"""Log-probabilities of completions given their prompts, summed over the completions' tokens.

    .. math:: \log \pi(y \mid x) = \sum_{t} \log \mathrm{softmax}(z_{t-1} / \tau)_{y_t}

    over the tokens t of the completion, with z the model's logits. Positions count attended tokens, so that padding on
    either side gives the same. Only positions that predict a completion's token go through the output head.

    The linear kernel (:func:`~exo_toy.kernels.linear_logps`) never holds logits: during the call it stands in for the
    forward of the output head, inside the model's own forward, so that data-parallel and sharding wrappers do their
    work around it. It needs an ``nn.Linear`` head followed by nothing but a soft-cap that the config names
    (``final_logit_softcapping``); a short forward finds out once per model. Otherwise the selective kernel reads the
    model's logits: where they are scaled, where the head is adapted, quantised or sharded itself, where FSDP2 rounds
    what the model returns (``output_dtype``), and under FSDP1, DeepSpeed's third stage and ``torch.compile``.

    Args:
        model: a causal language model, bare, with a PEFT adapter, or wrapped by ``DistributedDataParallel`` or FSDP2.
            Called in whatever mode it is in: dropout is the caller's to switch off.
        input_ids: [R, T] tokens.
        attention_mask: [R, T], 1 on tokens, 0 on padding.
        completion_mask: [R, T], 1 on the tokens of the completion; each follows an attended token.
        temperature: τ, above 0; divides the logits, as in sampling.
        kernel: "linear", "selective", or "auto" for linear where it is possible.

    Returns:
        [R] in [-inf, 0], in nats, summed in float64 and returned in float32 (float64 for a float64 model).

    Raises:
        ValueError: a wrong shape, dtype, temperature or kernel; a completion's token that follows no attended one;
            the linear kernel asked for where it is not possible; ``DataParallel`` or a prompt-learning adapter.
    """
    checks.require_shape("R T", input_ids=input_ids, attention_mask=attention_mask, completion_mask=completion_mask)
    attended, completion = attention_mask.bool(), completion_mask.bool()
    _check_masks(attended, completion)
    check_model(model)
    if kernel not in ("auto", "linear", "selective"):
        raise ValueError(f'kernel must be "auto", "linear" or "selective"; got {kernel!r}')

    # The token at t is predicted at t - 1; the last position predicts nothing.
    labels = torch.where(completion, input_ids, IGNORED).roll(-1, dims=1)
    inputs = _inputs(model, input_ids, attended)
    head = None if kernel == "selective" else _linear_head(model, inputs)
    if head is not None:
        token_logps = _linear(model, head, inputs, labels, temperature)
    elif kernel == "linear":
        raise _no_linear_kernel(model)
    else:
        token_logps, labels = _selective(model, inputs, labels, temperature)
    return sequence_logps(token_logps, labels.to(token_logps.device) != IGNORED)


def resolve_kernel(*models: nn.Module, input_ids: Int[Tensor, "R T"]) -> Literal["linear", "selective"]:
    """The kernel that "auto" stands for, if it is to be the same for several models.

    A policy and a reference whose heads differ (an adapter on one of them) would otherwise differ by rounding.

    Args:
        models: as :func:`completion_logps` takes them; called in the same order by all processes.
        input_ids: [R, T] tokens, of which two go through each model once.

    Returns:
        "linear" if it is possible for all of them.
    """
    everywhere = torch.ones_like(input_ids, dtype=torch.bool)
    heads = [_linear_head(model, _inputs(model, input_ids, everywhere)) for model in models]
    return "selective" if None in heads else "linear"


def check_kernel(kernel: str, *models: nn.Module) -> None:
    """A kernel that is asked for is possible.

    Two tokens go through each model, which need not be on its device yet. Wrappers that come later and take the
    linear kernel away (``torch.compile``, sharding of the head) are seen at the first call only.

    Args:
        kernel: as of :func:`completion_logps`.
        models: as :func:`completion_logps` takes them.

    Raises:
        ValueError: the linear kernel for a model that does not allow it.
    """
    for model in models if kernel == "linear" else ():
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=next(model.parameters()).device)
        if resolve_kernel(model, input_ids=tokens) != "linear":
            raise _no_linear_kernel(model)


def scatter(
    logps: Float[Tensor, " R"], candidate_rows: Int[Tensor, "B K"], candidate_mask: Bool[Tensor, "B K"]
) -> Float[Tensor, "B K"]:
    """Log-probabilities of rows as a table of prompts by candidates.

    Args:
        logps: [R] one per row.
        candidate_rows: [B, K] row of each candidate, any valid one where masked.
        candidate_mask: [B, K] bool, False where a prompt has no such candidate.

    Returns:
        [B, K], 0 where masked, with no gradient from there.

    Raises:
        ValueError: a wrong shape or dtype.

    Example:
        >>> rows, mask = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[True, True], [True, False]])
        >>> scatter(torch.tensor([-1.0, -2.0, -3.0]), rows, mask)
        tensor([[-1., -2.],
                [-3.,  0.]])
    """
    checks.require_mask(candidate_mask=candidate_mask)
    checks.require_shape("B K", candidate_rows=candidate_rows, candidate_mask=candidate_mask)
    return torch.where(candidate_mask, logps[candidate_rows], 0.0)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, FSDP1, DeepSpeed and ``torch.compile``; an adapter is kept."""
    *_, inner = _layers(model)
    return inner


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is back in its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _no_linear_kernel(model: nn.Module) -> ValueError:
    return ValueError(
        'kernel must be "auto" or "selective" for a model whose logits are not those of a plain nn.Linear, '
        f'with a soft-cap at most; got "linear" for {type(unwrap(model)).__name__}'
    )


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what its wrappers wrap, from the outside in."""
    yield model
    while inner := next(filter(None, map(model._modules.get, ("_orig_mod", "module", "_fsdp_wrapped_module"))), None):
        yield (model := inner)


def _check_masks(attended: Tensor, completion: Tensor) -> None:
    """Every token of a completion and the one before it are attended."""
    before = attended.roll(1, dims=1)
    before[:, 0] = False
    bad = completion & ~(attended & before)
    checks.require_values(
        [completion],
        (
            bad,
            lambda: (
                "completion_mask must be 1 only on attended tokens that follow an attended token; "
                f"got {checks.first_bad(completion.long(), bad)}"
            ),
        ),
    )


def check_model(model: nn.Module) -> None:
    """The model is not wrapped in a way, and has no adapter, that shifts tokens against their masks.

    Args:
        model: wrapped or not.

    Raises:
        ValueError: ``DataParallel`` or a prompt-learning adapter.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "model must not be in nn.DataParallel, which splits its arguments; use DistributedDataParallel"
        )
    adapter = getattr(unwrap(model), "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        raise ValueError(
            f"model must not have a prompt-learning adapter, which shifts positions; got {adapter.peft_type}"
        )


def _inputs(model: nn.Module, input_ids: Tensor, attended: Tensor) -> dict[str, Any]:
    """Keyword arguments of the forward, those that this model takes."""
    positions = (attended.long().cumsum(1) - 1).clamp(min=0)
    given = {
        "input_ids": input_ids,
        "attention_mask": attended.long(),
        "position_ids": positions,
        "use_cache": False,
    }
    taken = _parameters(model)
    return {name: value for name, value in given.items() if name in taken}


def _parameters(model: nn.Module) -> set[str]:
    """Names of the arguments of the causal model's forward, inside any adapter."""
    inner: Any = unwrap(model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return set(inspect.signature(type(base).forward).parameters)


def _selective(
    model: nn.Module, inputs: dict[str, Any], labels: Tensor, temperature: float | int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens at the positions where any row has a label, and the labels there."""
    positions = (labels != IGNORED).any(0).nonzero().squeeze(1)
    if "logits_to_keep" in _parameters(model):
        logits = model(**inputs, logits_to_keep=positions).logits
    else:
        logits = model(**inputs).logits[:, positions]
    labels = labels[:, positions].to(logits.device)
    return selective_logps(logits, labels, temperature=temperature, ignore_index=IGNORED), labels


class _Head(NamedTuple):
    """An output head that the linear kernel can stand in for, and the cap on its logits."""

    linear: nn.Linear
    softcap: float | None


def _linear(model: nn.Module, head: _Head, inputs: dict[str, Any], labels: Tensor, temperature: float | int) -> Tensor:
    """Log-probabilities of tokens [R, T], which leave the model in the place of logits [R, T, 1]."""

    def logps(hidden: Tensor) -> Tensor:
        return linear_logps(
            hidden,
            head.linear.weight,
            labels.to(hidden.device),
            bias=head.linear.bias,
            softcap=head.softcap,
            temperature=temperature,
            ignore_index=IGNORED,
        ).unsqueeze(-1)

    with _head_replaced(head.linear, logps), _cap_removed(model):
        return model(**inputs).logits.squeeze(-1)


# Of each model: what it was when asked, and the answer.
_HEADS: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], _Head | None]] = WeakKeyDictionary()


def _linear_head(model: nn.Module, inputs: dict[str, Any]) -> _Head | None:
    """The model's head if the linear kernel can stand in for it, else None; found out once per model."""
    inner: Any = unwrap(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    # Subclasses and patched instances (quantised, adapted, offloaded) do something else than a linear map.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return None
    # A compiled forward would be compiled again at each call for its new head; the others were not tried.
    if any(layer._compiled_call_impl is not None for layer in _layers(model)):
        return None
    if any({"_orig_mod", "_fsdp_wrapped_module"} & layer._modules.keys() for layer in _layers(model)):
        return None
    if hasattr(head.weight, "ds_id"):
        return None
    softcap = getattr(text_config(model), "final_logit_softcapping", None)
    state = (softcap, type(model), type(inner), head)
    if inner not in _HEADS or _HEADS[inner][0] != state:
        _HEADS[inner] = (state, _Head(head, softcap) if _only_caps(model, head, softcap, inputs) else None)
    return _HEADS[inner][1]


def _only_caps(model: nn.Module, head: nn.Linear, softcap: float | None, inputs: dict[str, Any]) -> bool:
    """Whether what leaves the head leaves the model: unchanged without the config's soft-cap, capped with it.

    Numbers put in the place of the head's result tell; scaled, cut or rounded logits come out as others.
    """
    weight_is_whole = []
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    sent = torch.linspace(-50, 50, head.out_features, dtype=dtype, device=inputs["input_ids"].device)

    def numbers(hidden: Tensor) -> Tensor:
        weight_is_whole.append(not hasattr(head.weight, "full_tensor"))
        return sent.expand(*hidden.shape[:-1], -1)

    short = {name: value[:1, :2] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    short |= {"attention_mask": torch.ones_like(short["input_ids"])} if "attention_mask" in short else {}
    with torch.no_grad(), evaluating(model), _head_replaced(head, numbers):
        capped = model(**short).logits
        with _cap_removed(model):
            plain = model(**short).logits
    shape = (1, 2, head.out_features)
    if capped.shape != shape or plain.shape != shape or not all(weight_is_whole):
        return False
    wanted = sent if softcap is None else softcap * (sent / softcap).tanh()
    return bool((plain == sent).all()) and torch.allclose(capped.to(dtype), wanted.expand(shape))


@contextmanager
def _head_replaced(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The head calls ``forward`` inside; its hooks, in which sharding gathers the weight, run as ever."""
    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


@contextmanager
def _cap_removed(model: nn.Module) -> Iterator[None]:
    """The model does not cap its logits inside."""
    config = text_config(model)
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is None:
        yield
        return
    config.final_logit_softcapping = None
    try:
        yield
    finally:
        config.final_logit_softcapping = softcap


def text_config(model: nn.Module) -> Any:
    """The language model's part of the config, None for a model that has none.

    Args:
        model: wrapped or not.
    """
    config: Any = getattr(unwrap(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
