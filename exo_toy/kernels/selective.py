"""Log-probabilities of labels from logits that exist already."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from exo_toy import checks
from exo_toy.kernels import reference, second
from exo_toy.kernels.rows import Shape, Statistics, label_gradient
from exo_toy.kernels.tiles import Rows, Tile, accumulator_dtype, default_passes, piece, row_passes, tile_for


def selective_logps(
    logits: Float[Tensor, "*tokens V"],
    labels: Int[Tensor, "*tokens"],
    *,
    temperature: float | int = 1.0,
    ignore_index: int = -100,
) -> Float[Tensor, "*tokens"]:
    r"""Log-probabilities of labels from logits, without a log-softmax [..., V].

    .. math::
        \log p(y_i) = z_{i y_i} / \tau - \log \sum_v e^{z_{iv} / \tau}

    Half types are computed and returned in float32. Forward and backward hold a few tiles beyond the logits and their
    gradient. Inside ``torch.func`` transforms, and for second derivatives, plain torch computes the same.

    Source: the streaming log-sum-exp of Milakov and Gimelshein, arXiv:1805.02867.

    Args:
        logits: [..., V], floating point; -inf forbids a token.
        labels: [...] integers in [0, V), or ``ignore_index``.
        temperature: τ, above 0; divides the logits.
        ignore_index: label of the rows that do not count, whatever they hold.

    Returns:
        [...] in [-inf, 0] up to rounding, float32 (float64 for float64 logits); 0 at ignored labels.

    Raises:
        ValueError: a wrong shape, dtype, device or temperature; a label outside its range.

    Example:
        >>> selective_logps(torch.zeros(2, 4), torch.tensor([1, -100])).exp()
        tensor([0.2500, 1.0000])
    """
    checks.require_floating(logits=logits)
    checks.require_labels(labels)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V at least 1; got {list(logits.shape)}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the leading shape of logits, {list(logits.shape[:-1])}; got {list(labels.shape)} "
            "(nothing is broadcast)"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels must be on the device of logits, {logits.device}; got {labels.device}")
    checks.require_temperature(accumulator_dtype(logits.dtype), temperature=temperature)
    checks.require_integer("ignore_index", ignore_index, at_least=-(2**63), bits=64)

    if checks.is_transformed(logits, labels):
        return reference.selective_logps(logits, labels.long(), float(temperature), ignore_index)
    rows = logits if logits.ndim > 1 else logits.unsqueeze(0)
    sizes, passes = list(tile_for(logits.device)), default_passes(logits.device)
    logps, _ = forward(rows, labels.reshape(-1).long(), float(temperature), ignore_index, sizes, passes)
    return logps.view(labels.shape).clone()  # which the caller may change


@torch.library.custom_op("exo_toy::selective_logps", mutates_args=())
def forward(
    logits: Tensor, labels: Tensor, temperature: float, ignore_index: int, sizes: list[int], passes: str
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and log Σ exp z, [n], of logits [..., V] with n rows."""
    tile, shape, row_pass = Tile(*sizes).of_rows(), Shape(None, temperature), row_passes(passes)
    sums = accumulator_dtype(logits.dtype)
    with checks.autocast_off(logits.device):
        rows = Rows(labels, labels != ignore_index, logits.shape[-1], 0, ignore_index, tile)
        logits, index = _rows(logits, rows)
        seen = Statistics.empty(logits, rows.padded, sums, entropy=False)
        targets = rows.vector(labels, -1)
        memory = logits.new_empty(min(tile.block, rows.padded) * tile.columns, dtype=sums)
        for block in rows.blocks:
            for start in range(0, logits.shape[-1], tile.columns):
                z = _tile(logits, index, block, start, tile, memory, passes)
                row_pass.observe(z, targets[block] - start, None, shape, seen.of(block))
        log_total = seen.total.log()
        logps = rows.scatter(seen.label - seen.shift() - log_total, sums)
        return logps, rows.scatter(seen.shift() + log_total, sums)


@forward.register_fake
def _(logits, labels, *_):  # type: ignore[no-untyped-def]
    return tuple(logits.new_empty(labels.shape, dtype=accumulator_dtype(logits.dtype)) for _ in range(2))


@torch.library.custom_op("exo_toy::selective_logps_backward", mutates_args=())
def backward(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    temperature: float,
    ignore_index: int,
    sizes: list[int],
    passes: str,
) -> Tensor:
    """∂L/∂logits [..., V]: g (1[label] − softmax z) / τ."""
    tile, shape, row_pass = Tile(*sizes).of_rows(), Shape(None, temperature), row_passes(passes)
    with checks.autocast_off(logits.device):
        rows = Rows(labels, (labels != ignore_index) & (grad_logps != 0), logits.shape[-1], 0, ignore_index, tile)
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        grad_rows = gradient.view(len(labels), logits.shape[-1])
        logits, index = _rows(logits, rows)
        if rows.index is not None:
            gradient.zero_()
        g, lse, targets = rows.vector(grad_logps.to(lse.dtype), 0.0), rows.vector(lse, 0.0), rows.vector(labels, -1)
        at_label = label_gradient(rows.vector(logps, 0.0), g, None, None)
        memory = logits.new_empty(min(tile.block, rows.padded) * tile.columns, dtype=lse.dtype)
        for block in rows.blocks:
            for start in range(0, logits.shape[-1], tile.columns):
                z = _tile(logits, index, block, start, tile, memory, passes)
                columns = grad_rows[:, start : start + tile.columns]
                out = columns[block] if rows.index is None else piece(memory, *z.shape)
                here = targets[block] - start
                row_pass.differentiate(z, here, None, shape, lse[block], g[block], None, None, at_label[block], out)
                if rows.index is not None:
                    columns.index_copy_(0, rows.index[block], out.to(gradient.dtype))
    return gradient


@backward.register_fake
def _(grad_logps, logits, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _rows(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Logits as a matrix where its strides allow one without a copy, and the index of the rows to take, None for all.

    A slice such as ``logits[:, :-1]`` is no such matrix; its rows are taken by index, a tile at a time.
    """
    try:
        return logits.view(rows.n_all, logits.shape[-1]), rows.index
    except RuntimeError:
        return logits, torch.arange(rows.n_all, device=logits.device) if rows.index is None else rows.index


def _tile(
    logits: Tensor, index: Tensor | None, block: slice, start: int, tile: Tile, memory: Tensor, passes: str
) -> Tensor:
    """A tile of logits to work on: a copy in the dtype of sums, but for Triton, which writes to outputs alone."""
    columns = logits[..., start : start + tile.columns]
    part = columns[block] if index is None else columns[torch.unravel_index(index[block], logits.shape[:-1])]
    if passes == "triton" and part.stride(1) == 1:
        return part
    return piece(memory, *part.shape).copy_(part)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, *ctx.options = inputs
    logps, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, logps, lse)


def _backward(ctx: Any, grad_logps: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_logps is None:
        return (None,) * 6
    return backward(grad_logps, *ctx.saved_tensors, *ctx.options), *(None,) * 5


def _save_for_second(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_logps, logits, labels, _, _, *options = inputs
    ctx.options = options[:2]
    ctx.save_for_backward(grad_logps, logits, labels)


def _second(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad_logps, logits, labels = ctx.saved_tensors
    (g_logps,), (g_logits,) = second.derivatives(
        lambda z: (reference.selective_logps(z, labels, *ctx.options),), (logits,), (grad_logps,), (cotangent,)
    )
    return g_logps, g_logits, *(None,) * 7


forward.register_autograd(_backward, setup_context=_save_for_backward)
backward.register_autograd(_second, setup_context=_save_for_second)
