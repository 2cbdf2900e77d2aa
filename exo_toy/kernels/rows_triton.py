"""The row passes of :mod:`exo_toy.kernels.rows` as Triton kernels, one launch each.

A program takes one row of the tile and holds it in registers, so that device memory is touched once. For a tile
[R, C] of float32, outputs of b bytes (2 for bfloat16) and sums [R, d] of float32, the bytes moved, but for a few
vectors [R] and [C], are

* observe: 4 R C read, and b R C written per output asked for (none, weights, or weights and moments);
* differentiate: 4 R C read, b R C written;
* weigh: b R C read, b R C written;
* rescale: 4 d read and 4 d written per sum and row whose maximum moved: of rows in random order one in k at tile k.

A row of more than ``WIDEST`` bytes is taken in several blocks, and ``observe`` then reads it twice: once for the
maximum, once for the rest.

Accuracy in float32: exp is the hardware's exp2 of a rounded product, with a relative error of about
2e-7 + 7e-8 |z − m| in a term that weighs exp(z − m); tanh is good to 3 ulp, divisions to half of one, and sums are
trees. In float64 all is as accurate as in torch.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from exo_toy.kernels.rows import Shape, Statistics

# Bytes of a row that a program holds at once.
WIDEST = 65536


# Annotations of kernels are Triton's: no types, and not to be checked at calls; hence no_type_check.
@triton.jit
@no_type_check
def _tanh(x):
    """To 3 ulp, and within [-1, 1].

    From |x| = 1 on 1 − 2/(1 + exp 2|x|), below that |x| minus its distance to a truncated continued fraction. What is
    subtracted is small, and with it the errors of exp and of the division.
    """
    size = tl.abs(x)
    near = size < 1.0
    e = tl.exp(-2.0 * size)
    s = size * size
    if x.dtype == tl.float64:
        above = ((44.0 * s + 12870.0) * s + 810810.0) * s + 11486475.0
        below = (((45.0 * s + 13860.0) * s + 945945.0) * s + 16216200.0) * s + 34459425.0
    else:
        above = (27.0 * s + 2772.0) * s + 45045.0
        below = ((28.0 * s + 3150.0) * s + 62370.0) * s + 135135.0
    less = tl.where(near, size * s * above, 2.0 * e) / tl.where(near, below, 1.0 + e)
    tanh = tl.where(near, size, 1.0) - less
    return tl.where(x < 0.0, -tanh, tanh)


@triton.jit
@no_type_check
def _divide(x, divisor, inverse, dtype: tl.constexpr):
    """x / divisor to half an ulp: a product and a Newton step, 6 instructions where IEEE division takes 30."""
    quotient = x * tl.full((1,), inverse, dtype)
    rest = tl.fma(-quotient, tl.full(x.shape, divisor, dtype), x)
    finite = tl.abs(quotient) < float("inf")
    return tl.where(finite, tl.fma(rest, tl.full(x.shape, inverse, dtype), quotient), quotient)


@triton.jit
@no_type_check
def _logits(
    row, columns, inside, bias, width, inverse, height, CAPPED: tl.constexpr, SCALED: tl.constexpr, dtype: tl.constexpr
):
    """A row's logits height·tanh(x / width) or x / width, -inf outside the tile; and J, of one element if constant."""
    x = tl.load(row + columns, mask=inside, other=0.0).to(dtype)
    if bias is not None:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(dtype)
    slope = tl.full((1,), 1.0, dtype)
    if SCALED:
        slope = tl.full((1,), height * inverse, dtype)
        x = _divide(x, width, inverse, dtype)
    if CAPPED:
        tanh = _tanh(x)
        slope = slope * (1.0 - tanh * tanh)
        x = tanh * tl.full((1,), height, dtype)
    return tl.where(inside, x, float("-inf")), slope


@triton.jit
@no_type_check
def _label(labels, row, n_columns):
    """The row's label, -1 where it is outside the tile."""
    label = tl.load(labels + row)
    return tl.where((label >= 0) & (label < n_columns), label, -1).to(tl.int32)


@triton.jit
@no_type_check
def _finite(maximum):
    """What exp may subtract: the maximum, or 0 where it is -inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
@no_type_check
def _observe(
    tile,
    tile_stride,
    n_columns,
    labels,
    bias,
    maximum,
    total,
    moment,
    label_logit,
    weights,
    weights_stride,
    moments,
    moments_stride,
    change,
    scale,
    width: tl.float64,
    inverse: tl.float64,
    height: tl.float64,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    N_BLOCKS: tl.constexpr,
):
    dtype = maximum.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x = tile + row * tile_stride
    label = _label(labels, row, n_columns)
    old_maximum = tl.load(maximum + row)
    old_total = tl.load(total + row)

    columns = tl.arange(0, BLOCK)
    z, slope = _logits(x, columns, columns < n_columns, bias, width, inverse, height, CAPPED, SCALED, dtype)
    new_maximum = tl.maximum(old_maximum, tl.max(z, 0))
    for start in range(BLOCK, BLOCK * N_BLOCKS, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        beyond, _ = _logits(x, columns, columns < n_columns, bias, width, inverse, height, CAPPED, SCALED, dtype)
        new_maximum = tl.maximum(new_maximum, tl.max(beyond, 0))
    shift = _finite(new_maximum)

    new_total = tl.full((), 0.0, dtype)
    new_moment = tl.full((), 0.0, dtype)
    for start in range(0, BLOCK * N_BLOCKS, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < n_columns
        if N_BLOCKS > 1:
            z, slope = _logits(x, columns, inside, bias, width, inverse, height, CAPPED, SCALED, dtype)
        if (label >= start) & (label < start + BLOCK):
            tl.store(label_logit + row, tl.sum(tl.where(columns == label, z, 0.0), 0))
        exp = tl.exp(z - shift)
        new_total += tl.sum(exp, 0)
        if moment is not None:
            # exp of less is 0 in every dtype, and 0 · −inf would be NaN.
            first = exp * tl.maximum(z - shift, -1e4)
            new_moment += tl.sum(first, 0)
            if moments is not None:
                tl.store(moments + row * moments_stride + columns, first * slope, mask=inside)
        if weights is not None:
            tl.store(weights + row * weights_stride + columns, exp * slope, mask=inside)

    # Before the first finite logit there is nothing to rescale.
    by = tl.where(old_total == 0.0, 0.0, _finite(old_maximum) - shift)
    factor = tl.exp(by)
    if moment is not None:
        tl.store(moment + row, factor * (tl.load(moment + row) + by * old_total) + new_moment)
    tl.store(total + row, factor * old_total + new_total)
    tl.store(maximum + row, new_maximum)
    tl.store(change + row, by)
    tl.store(scale + row, factor)


@triton.jit
@no_type_check
def _rescale(
    first, first_stride, second, second_stride, n_columns, change, scale, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    by = tl.load(change + row)
    factor = tl.load(scale + row)
    if (by != 0.0) | (factor != 1.0):
        for start in range(0, BLOCK * N_BLOCKS, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < n_columns
            a = tl.load(first + row * first_stride + columns, mask=inside)
            if second is not None:
                b = tl.load(second + row * second_stride + columns, mask=inside)
                tl.store(second + row * second_stride + columns, (b + by * a) * factor, mask=inside)
            tl.store(first + row * first_stride + columns, a * factor, mask=inside)


@triton.jit
@no_type_check
def _differentiate(
    tile,
    tile_stride,
    n_columns,
    labels,
    bias,
    lse,
    grad_logp,
    entropy,
    grad_entropy,
    at_label,
    out,
    out_stride,
    width: tl.float64,
    inverse: tl.float64,
    height: tl.float64,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    N_BLOCKS: tl.constexpr,
):
    dtype = lse.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x = tile + row * tile_stride
    label = _label(labels, row, n_columns)
    log_total = tl.load(lse + row)
    g = tl.load(grad_logp + row)
    label_gradient = tl.load(at_label + row)
    for start in range(0, BLOCK * N_BLOCKS, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < n_columns
        z, slope = _logits(x, columns, inside, bias, width, inverse, height, CAPPED, SCALED, dtype)
        log_p = z - log_total
        per_p = g
        if grad_entropy is not None:
            per_p = g + tl.load(grad_entropy + row) * (tl.maximum(log_p, -1e4) + tl.load(entropy + row))
        gradient = tl.where(columns == label, label_gradient, -tl.exp(log_p) * per_p) * slope
        tl.store(out + row * out_stride + columns, gradient, mask=inside)


@triton.jit
@no_type_check
def _weigh(
    weights,
    weights_stride,
    n_columns,
    labels,
    coefficient,
    at_label,
    out,
    out_stride,
    BLOCK: tl.constexpr,
    N_BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = _label(labels, row, n_columns)
    per_weight = tl.load(coefficient + row)
    label_gradient = tl.load(at_label + row)
    for start in range(0, BLOCK * N_BLOCKS, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < n_columns
        w = tl.load(weights + row * weights_stride + columns, mask=inside, other=0.0)
        gradient = tl.where(columns == label, label_gradient, w * -per_weight)
        tl.store(out + row * out_stride + columns, gradient, mask=inside)


def _blocks(rows: Tensor) -> dict[str, Any]:
    """How rows are divided: 64 bytes a thread, as four loads of 16, until a program has 16 warps; then up to 128."""
    itemsize = max(rows.element_size(), 4)
    block = min(triton.next_power_of_2(rows.shape[1]), WIDEST // itemsize)
    return {
        "BLOCK": block,
        "N_BLOCKS": triton.cdiv(rows.shape[1], block),
        "num_warps": min(max(block * itemsize // 2048, 1), 16),
        # One rounding less; asked for because the default changes between versions of Triton.
        "enable_fp_fusion": True,
    }


def _scalars(shape: Shape) -> dict[str, Any]:
    """The way from a product to its logit. Numbers are no constants of compilation: a schedule may change them."""
    if shape.softcap is None:
        width, height = shape.temperature, 1.0
    else:
        width, height = shape.softcap, shape.softcap / shape.temperature
    return {
        "width": width,
        "inverse": 1.0 / width,
        "height": height,
        "CAPPED": shape.softcap is not None,
        "SCALED": shape.softcap is not None or width != 1.0,
    }


def _matrix(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A matrix and the stride of its rows."""
    if x is None:
        return None, 0
    assert x.stride(1) == 1 or x.shape[1] == 1, f"rows must be contiguous; got strides {x.stride()}"
    return x, x.stride(0)


def _vector(x: Tensor | None) -> Tensor | None:
    """A vector to read."""
    return None if x is None else x.contiguous()


def observe(
    tile: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    shape: Shape,
    seen: Statistics,
    weights: Tensor | None = None,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``rows.observe``; the tile's content is lost only where it is an output."""
    assert all(x is None or x.is_contiguous() for x in seen), "statistics must be contiguous"
    change, scale = seen.total.new_empty(2, len(tile))
    with torch.cuda.device_of(tile):
        _observe[(len(tile),)](
            *_matrix(tile),
            tile.shape[1],
            _vector(labels),
            _vector(bias),
            *seen,
            *_matrix(weights),
            *_matrix(moments),
            change,
            scale,
            **_scalars(shape),
            **_blocks(tile),
        )
    return change, scale


def rescale(first: Tensor, second: Tensor | None, change: Tensor, scale: Tensor) -> None:
    """See ``rows.rescale``; rows whose maximum stayed are not touched."""
    with torch.cuda.device_of(first):
        _rescale[(len(first),)](
            *_matrix(first),
            *_matrix(second),
            first.shape[1],
            _vector(change),
            _vector(scale),
            **_blocks(first),
        )


def differentiate(
    tile: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    shape: Shape,
    lse: Tensor,
    grad_logp: Tensor,
    entropy: Tensor | None,
    grad_entropy: Tensor | None,
    at_label: Tensor,
    out: Tensor,
) -> None:
    """See ``rows.differentiate``; the tile's content is lost only where it is the output."""
    with torch.cuda.device_of(tile):
        _differentiate[(len(tile),)](
            *_matrix(tile),
            tile.shape[1],
            _vector(labels),
            _vector(bias),
            _vector(lse),
            _vector(grad_logp),
            _vector(entropy),
            _vector(grad_entropy),
            _vector(at_label),
            *_matrix(out),
            **_scalars(shape),
            **_blocks(tile),
        )


def weigh(weights: Tensor, labels: Tensor, coefficient: Tensor, at_label: Tensor, out: Tensor) -> None:
    """See ``rows.weigh``; rounded once."""
    with torch.cuda.device_of(weights):
        _weigh[(len(weights),)](
            *_matrix(weights),
            weights.shape[1],
            _vector(labels),
            _vector(coefficient),
            _vector(at_label),
            *_matrix(out),
            **_blocks(weights),
        )
