"""Log-probabilities of labels by tiles of the vocabulary, forward and backward, as two registered operators.

A tile is the product of some rows of ``hidden`` with a slice of ``weight``: the only piece of the logits [n, V] in
existence. Products are the library's; what happens between them is a row pass (:mod:`exo_toy.kernels.rows`, or its
Triton twin). Ignored rows are dropped before the first product.

The backward needs each tile's probabilities again, and has them in one of three ways (products of n·d·V in all):

* frozen head, 2: where ``weight`` gets no gradient, ∂logp/∂h = J_y W_y − E_p[J W] accumulates during the forward;
* keep, 3: tiles of exp(z − m) J that fit in ``save_budget`` bytes are kept, m the maximum when the tile was seen;
* recompute, 4: only log Σ exp z is kept.

Rows are padded with zeros, so that a row's result does not depend on how many others there are.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from exo_toy.checks import autocast_off
from exo_toy.kernels import rows as rows_torch
from exo_toy.kernels import second, sharded
from exo_toy.kernels.reference import linear_logps as reference_logps
from exo_toy.kernels.rows import Shape, Statistics
from exo_toy.kernels.tiles import (
    TILES,  # noqa: F401
    Rows,
    Tile,
    accumulator_dtype,
    operand_dtype,
    piece,
    product,
    product_of_rows,
    row_passes,
    storage_dtype,
)

VocabularyTile = tuple[int, int, Tensor, Tensor | None]


def kept_columns(padded: int, n_vocab: int, elements: int, tile: Tile) -> int:
    """Columns of the vocabulary whose tiles fit: a multiple of the tile's, or all."""
    columns = elements // max(padded, 1)
    return n_vocab if columns >= n_vocab else columns // tile.columns * tile.columns


def vocabulary_tiles(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, tile: Tile) -> Iterator[VocabularyTile]:
    """(start, stop, weight [c, d], bias [c]) of each slice of the vocabulary."""
    sums = accumulator_dtype(dtype)
    for start in range(0, len(weight), tile.columns):
        stop = min(start + tile.columns, len(weight))
        yield start, stop, weight[start:stop].to(dtype), None if bias is None else bias[start:stop].to(sums)


def stored_tile(kept: Tensor, padded: int, start: int, stop: int, block: slice) -> Tensor | None:
    """The place of a tile in the store, None if it is beyond the store's end."""
    if padded * stop > len(kept):
        return None
    return kept[padded * start : padded * stop].view(padded, stop - start)[block]


@torch.library.custom_op("exo_toy::linear_logps", mutates_args=())
def forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    frozen: bool,
    save_budget: int,
    sizes: list[int],
    passes: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [n], entropies [n], and what the backward needs of the forward.

    That is: log Σ exp z [n]; the kept tiles and their maxima; with a frozen head ∂logp/∂h and ∂H/∂h of the rows that
    count (in a process group, this rank's share of them). What is not wanted has no elements.
    """
    tile, shape, row_pass = Tile(*sizes), Shape(softcap, temperature), row_passes(passes)
    outputs = empty_outputs(hidden, weight, entropy, frozen, save_budget, tile)
    logps, entropies, lse, kept, kept_maxima, slopes, entropy_slopes = outputs
    with autocast_off(hidden.device):
        first_label, n_vocab = sharded.place(weight, group)
        rows = Rows(labels, labels != ignore_index, n_vocab, first_label, ignore_index, tile)
        if rows.n_live == 0:
            for output in outputs:
                output.zero_()
            return outputs
        dtype, sums = operand_dtype(hidden), lse.dtype
        seen = Statistics.empty(hidden, rows.padded, sums, entropy)
        targets = rows.vector(labels - rows.first, -1)
        blocks = rows.matrix_blocks(hidden, dtype, tile)
        size = len(blocks[0]) * min(tile.columns, len(weight))
        memory = hidden.new_empty(size, dtype=sums)
        head = FrozenHead(slopes, entropy_slopes, memory, dtype) if frozen else None

        for step, (start, stop, w, b) in enumerate(vocabulary_tiles(weight, bias, dtype, tile)):
            for block, h in zip(rows.blocks, blocks, strict=True):
                z = piece(memory, len(h), stop - start)
                weights: Tensor | None
                moments: Tensor | None = None
                if head is not None:
                    weights, moments = head.tiles(*z.shape)
                else:
                    weights = stored_tile(kept, rows.padded, start, stop, block)
                    z = weights if weights is not None and weights.dtype == sums else z
                product_of_rows(z, h, w.t(), tile.rows)
                here = seen.of(block)
                moved = row_pass.observe(z, targets[block] - start, b, shape, here, weights, moments)
                if head is not None:
                    row_pass.rescale(*head.of(block), *moved)
                    head.add(block, w, tile.rows)
                elif weights is not None:
                    kept_maxima[step, block] = here.maximum

        seen, to_all = sharded.combine(seen, group)
        log_total = seen.total.log()
        logps = rows.scatter(seen.label - seen.shift() - log_total, sums)
        lse = rows.scatter(seen.shift() + log_total, sums)
        if seen.moment is not None:
            entropies = rows.scatter(log_total - seen.moment / seen.total, sums)
        if head is not None:
            if to_all is not None:
                row_pass.rescale(*head.of(slice(0, rows.padded)), *to_all)
            head.finish(weight, targets, shape, seen, tile.rows)
    return logps, entropies, lse, kept, kept_maxima, slopes, entropy_slopes


@forward.register_fake
def _(hidden, weight, labels, bias, softcap, temperature, ignore_index, entropy, frozen, save_budget, sizes, *_):  # type: ignore[no-untyped-def]
    return empty_outputs(hidden, weight, entropy, frozen, save_budget, Tile(*sizes))


def empty_outputs(
    hidden: Tensor, weight: Tensor, entropy: bool, frozen: bool, save_budget: int, tile: Tile
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for all that ``forward`` returns; only the sums start from zero."""
    sums = accumulator_dtype(hidden.dtype)
    n, d = hidden.shape
    padded = tile.padded(n)
    stored = storage_dtype(hidden)
    columns = kept_columns(padded, len(weight), save_budget // stored.itemsize, tile)
    kept_tiles = -(-len(weight) // tile.columns) if columns > 0 else 0
    return (
        hidden.new_empty(n, dtype=sums),
        hidden.new_empty(n if entropy else 0, dtype=sums),
        hidden.new_empty(n, dtype=sums),
        hidden.new_empty(padded * columns, dtype=stored),
        hidden.new_zeros(kept_tiles, padded, dtype=sums),
        hidden.new_zeros(padded if frozen else 0, d, dtype=sums),
        hidden.new_zeros(padded if frozen and entropy else 0, d, dtype=sums),
    )


class FrozenHead:
    """Sums over the vocabulary, next to those of the logits, that end as ∂logp/∂h and ∂H/∂h.

    ∂logp/∂h = J_y W_y − E_p[J W]; ∂H/∂h = E_p[z − m] E_p[J W] − E_p[(z − m) J W].
    """

    def __init__(self, slopes: Tensor, entropy_slopes: Tensor, memory: Tensor, dtype: torch.dtype) -> None:
        self.slopes = slopes
        self.entropy_slopes = entropy_slopes if len(entropy_slopes) else None
        # What is multiplied by W is in its dtype; where that is the logits' too, it takes their place.
        self.weights = memory if memory.dtype == dtype else torch.empty_like(memory, dtype=dtype)
        self.moments = None if self.entropy_slopes is None else torch.empty_like(memory, dtype=dtype)

    def tiles(self, n_rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        """Places for exp(z − m) J and exp(z − m) (z − m) J."""
        moments = None if self.moments is None else piece(self.moments, n_rows, columns)
        return piece(self.weights, n_rows, columns), moments

    def of(self, block: slice) -> tuple[Tensor, Tensor | None]:
        """The sums of some rows."""
        return self.slopes[block], None if self.entropy_slopes is None else self.entropy_slopes[block]

    def add(self, block: slice, w: Tensor, n_rows: int) -> None:
        """The share of the tile in place."""
        for total, share in zip(self.of(block), self.tiles(block.stop - block.start, len(w)), strict=True):
            if total is not None and share is not None:
                product_of_rows(total, share, w, n_rows, add=True)

    def finish(self, weight: Tensor, targets: Tensor, shape: Shape, seen: Statistics, n_rows: int) -> None:
        """Sums to derivatives, in place; a few rows at a time, since each takes its label's row of W."""
        mine = (targets >= 0) & (targets < len(weight))
        slope = mine * rows_torch.slope(seen.label, shape)
        for start in range(0, len(targets), n_rows):
            block = slice(start, start + n_rows)
            total = seen.total[block].unsqueeze(1)
            mean, second_mean = self.of(block)
            mean.div_(total)
            if second_mean is not None and seen.moment is not None:
                second_mean.div_(-total).addcmul_(mean, seen.moment[block].unsqueeze(1) / total)
            label_rows = weight[targets[block].clamp(0, len(weight) - 1)].to(mean.dtype)
            mean.neg_().addcmul_(label_rows, slope[block].unsqueeze(1))


@torch.library.custom_op("exo_toy::linear_logps_backward", mutates_args=())
def backward(
    grad_logps: Tensor,
    grad_entropies: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logps: Tensor,
    entropies: Tensor,
    lse: Tensor,
    kept: Tensor,
    kept_maxima: Tensor,
    slopes: Tensor,
    entropy_slopes: Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    frozen: bool,
    wanted: list[bool],
    sizes: list[int],
    passes: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂hidden, ∂L/∂weight, ∂L/∂bias; those not ``wanted`` have no elements."""
    tile, shape, row_pass = Tile(*sizes), Shape(softcap, temperature), row_passes(passes)
    want_hidden, want_weight, want_bias = wanted
    grad_hidden, grad_weight, grad_bias = empty_gradients(hidden, weight, bias, wanted)
    with autocast_off(hidden.device):
        live = labels != ignore_index
        if not frozen and len(kept) == 0 and group is None:
            # What the forward saved for its rows leaves no choice; nor may ranks differ.
            live = live & ((grad_logps != 0) | (grad_entropies != 0 if grad_entropies is not None else False))
        first_label, n_vocab = sharded.place(weight, group)
        rows = Rows(labels, live, n_vocab, first_label, ignore_index, tile)
        if rows.n_live == 0:
            return grad_hidden.zero_(), grad_weight.zero_(), grad_bias.zero_()
        dtype = operand_dtype(hidden)
        sums = lse.dtype
        g = rows.vector(grad_logps.to(sums), 0.0)
        g_entropy = None if grad_entropies is None else rows.vector(grad_entropies.to(sums), 0.0)
        if frozen:
            sum_hidden = slopes[: rows.padded] * g.unsqueeze(1)
            if g_entropy is not None:
                sum_hidden.addcmul_(entropy_slopes[: rows.padded], g_entropy.unsqueeze(1))
            sharded.add_up(sum_hidden[: rows.n_live], group)
            return rows.scatter(sum_hidden, hidden.dtype), grad_weight, grad_bias

        targets = rows.vector(labels - rows.first, -1)
        # exp(z − ∞) = 0: padding has no probabilities.
        lse_rows = rows.vector(lse, torch.inf)
        entropy_rows = None if g_entropy is None else rows.vector(entropies, 0.0)
        label_logps = rows.vector(logps, 0.0)
        at_label = rows_torch.label_gradient(label_logps, g, entropy_rows, g_entropy)
        at_label_product = at_label * rows_torch.slope(label_logps + rows.vector(lse, 0.0), shape)
        blocks = rows.matrix_blocks(hidden, dtype, tile)
        sum_hidden = hidden.new_zeros(rows.padded if want_hidden else 0, hidden.shape[1], dtype=sums)
        size = len(blocks[0]) * min(tile.columns, len(weight))
        memory = hidden.new_empty(size, dtype=sums)
        memory_grad = memory if dtype == sums else hidden.new_empty(size, dtype=dtype)
        # One block's products are the gradient of W's rows; those of several add up in a dtype that can.
        apart = want_weight and (len(blocks) > 1 or grad_weight.dtype != dtype) and grad_weight.dtype != sums
        memory_weight = hidden.new_empty(tile.columns if apart else 0, hidden.shape[1], dtype=sums)

        for step, (start, stop, w, b) in enumerate(vocabulary_tiles(weight, bias, dtype, tile)):
            sum_weight = memory_weight[: stop - start] if apart else grad_weight[start:stop]
            sum_bias = hidden.new_zeros(stop - start, dtype=sums) if want_bias else None
            for block, h in zip(rows.blocks, blocks, strict=True):
                here = targets[block] - start
                grad_z = piece(memory_grad, len(h), stop - start)
                weights = stored_tile(kept, rows.padded, start, stop, block)
                if weights is not None:
                    coefficient = g[block] * (kept_maxima[step, block] - lse_rows[block]).exp()
                    row_pass.weigh(weights, here, coefficient, at_label_product[block], grad_z)
                else:
                    z = piece(memory, len(h), stop - start)
                    product_of_rows(z, h, w.t(), tile.rows)
                    row_pass.differentiate(
                        z,
                        here,
                        b,
                        shape,
                        lse_rows[block],
                        g[block],
                        None if entropy_rows is None else entropy_rows[block],
                        None if g_entropy is None else g_entropy[block],
                        at_label[block],
                        grad_z,
                    )
                if want_hidden:
                    product_of_rows(sum_hidden[block], grad_z, w, tile.rows, add=True)
                if want_weight:
                    product(sum_weight, grad_z.t(), h, add=block.start > 0)
                if sum_bias is not None:
                    sum_bias += grad_z.sum(0, dtype=sums)
            if apart:
                grad_weight[start:stop] = sum_weight
            if sum_bias is not None:
                grad_bias[start:stop] = sum_bias
        if want_hidden:
            sharded.add_up(sum_hidden[: rows.n_live], group)
            grad_hidden = rows.scatter(sum_hidden, hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


@backward.register_fake
def _(grad_logps, grad_entropies, hidden, weight, labels, bias, *rest):  # type: ignore[no-untyped-def]
    return empty_gradients(hidden, weight, bias, rest[11])


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients wanted."""
    want_hidden, want_weight, want_bias = wanted
    return (
        hidden.new_empty(hidden.shape if want_hidden else 0),
        weight.new_empty(weight.shape if want_weight else 0),
        hidden.new_empty(0) if bias is None or not want_bias else bias.new_empty(bias.shape),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, *options = inputs
    _, entropies, *saved = output
    softcap, temperature, ignore_index, ctx.entropy, frozen, _, sizes, passes, group = options
    ctx.options = (softcap, temperature, ignore_index, frozen), (sizes, passes, group)
    ctx.mark_non_differentiable(*saved, *([] if ctx.entropy else [entropies]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, labels, bias, *output)


def _backward(
    ctx: Any, grad_logps: Tensor | None, grad_entropies: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    hidden, weight, labels, bias, logps, *saved = ctx.saved_tensors
    before, after = ctx.options
    n_options = 9
    if grad_logps is None:
        grad_logps = torch.zeros_like(logps) if ctx.entropy and grad_entropies is not None else None
    if grad_logps is None:
        return (None,) * (4 + n_options)
    needed = ctx.needs_input_grad
    wanted = [needed[0], needed[1], bias is not None and needed[3]]
    gradients = backward(
        grad_logps, grad_entropies, hidden, weight, labels, bias, logps, *saved, *before, wanted, *after
    )
    g_hidden, g_weight, g_bias = (g if want else None for g, want in zip(gradients, wanted, strict=True))
    return g_hidden, g_weight, None, g_bias, *(None,) * n_options


forward.register_autograd(_backward, setup_context=_save_for_backward)


def _save_for_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_logps, grad_entropies, hidden, weight, labels, bias, *_ = inputs
    ctx.options, ctx.group, ctx.n_inputs = inputs[13:16], inputs[-1], len(inputs)
    ctx.save_for_backward(grad_logps, grad_entropies, hidden, weight, labels, bias)


def _second(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.group is not None:
        raise RuntimeError("linear_logps has no second derivatives with a group; leave group out")
    grad_logps, grad_entropies, hidden, weight, labels, bias = ctx.saved_tensors
    (g_logps, g_entropies), (g_hidden, g_weight, g_bias) = second.derivatives(
        lambda h, w, b: reference_logps(h, w, labels, b, *ctx.options),
        (hidden, weight, bias),
        (grad_logps, grad_entropies),
        [c if c is not None and c.numel() else None for c in cotangents],
    )
    gradients = (g_logps, g_entropies, g_hidden, g_weight, None, g_bias)
    return *gradients, *(None,) * (ctx.n_inputs - len(gradients))


backward.register_autograd(_second, setup_context=_save_for_second)
