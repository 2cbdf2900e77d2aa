"""Row passes over one tile of logits, in plain torch: the mathematics between two matrix products.

A tile holds the products h·W of some rows [R] with a slice of the vocabulary [C]. Its logits are z/τ, with the cap
z = c tanh(x/c) where there is one. The passes keep, per row, statistics of all logits seen so far, from which every
result follows, and turn a tile of logits into the tile of ∂L/∂x that the products of the backward need.

``rows_triton`` has the same functions as one kernel each; a caller picks the module.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """What happens to a product on its way to a logit: x -> softcap·tanh(x / softcap) / temperature."""

    softcap: float | None
    temperature: float


class Statistics(NamedTuple):
    """Per row, over the logits seen so far; updated in place. Each [R], ``moment`` None where no entropy is wanted."""

    maximum: Tensor  # m = max z
    total: Tensor  # Σ exp(z − m)
    moment: Tensor | None  # Σ exp(z − m) (z − m)
    label: Tensor  # the label's logit, 0 until it is seen

    @classmethod
    def empty(cls, like: Tensor, n_rows: int, dtype: torch.dtype, entropy: bool) -> "Statistics":
        """No logit seen yet."""
        maximum = like.new_full((n_rows,), -torch.inf, dtype=dtype)
        total, label, moment = like.new_zeros(3, n_rows, dtype=dtype)
        return cls(maximum, total, moment if entropy else None, label)

    def of(self, rows: slice) -> "Statistics":
        """Those of some rows, sharing memory."""
        moment = None if self.moment is None else self.moment[rows]
        return Statistics(self.maximum[rows], self.total[rows], moment, self.label[rows])

    def shift(self) -> Tensor:
        """The maximum, or 0 where all logits were -inf: what exp may subtract without making NaN."""
        return torch.where(self.maximum == -torch.inf, 0.0, self.maximum)


def logits_(tile: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """Products to logits, in place."""
    if bias is not None:
        tile.add_(bias)
    if shape.softcap is not None:
        tile.div_(shape.softcap).tanh_().mul_(shape.softcap / shape.temperature)
    elif shape.temperature != 1.0:
        tile.div_(shape.temperature)
    return tile


def slope(logits: Tensor, shape: Shape) -> Tensor:
    """J = ∂logit/∂product, of the logits' shape or none."""
    if shape.softcap is None:
        return logits.new_full((), 1.0 / shape.temperature)
    tanh = logits * (shape.temperature / shape.softcap)
    # Rounded, the square can pass 1.
    return (1.0 - tanh.square_()).clamp_(min=0.0) / shape.temperature


def observe(
    tile: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    shape: Shape,
    seen: Statistics,
    weights: Tensor | None = None,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take a tile of products into the statistics; the tile's content is lost.

    ``labels`` count from the tile's first column; one outside the tile is not in it. Where they are given, ``weights``
    (which may be the tile) receives exp(z − m) J and ``moments`` exp(z − m) (z − m) J, m the new maximum.

    Returns old maximum − new [R], and its exponential: what accumulated sums are rescaled by.
    """
    logits_(tile, bias, shape)
    inside = (labels >= 0) & (labels < tile.shape[1])
    found = tile.gather(1, labels.clamp(0, tile.shape[1] - 1).unsqueeze(1)).squeeze(1)
    seen.label.copy_(torch.where(inside, found, seen.label))

    before = seen.shift()
    torch.maximum(seen.maximum, tile.amax(1), out=seen.maximum)
    after = seen.shift()
    # Before the first finite logit there is nothing to rescale.
    change = torch.where(seen.total == 0, 0.0, before - after)
    scale = change.exp()
    jacobian = slope(tile, shape) if weights is not None else tile

    tile.sub_(after.unsqueeze(1))
    if seen.moment is not None:
        # exp of less is 0 in every dtype, and 0 · −inf would be NaN.
        distance = tile.clamp(min=-1e4)
        tile.exp_()
        distance.mul_(tile)
        seen.moment.copy_(scale * (seen.moment + change * seen.total) + distance.sum(1))
        if moments is not None:
            torch.mul(distance, jacobian, out=moments)
    else:
        tile.exp_()
    seen.total.mul_(scale).add_(tile.sum(1))
    if weights is not None:
        if shape.softcap is not None or shape.temperature != 1.0:
            tile.mul_(jacobian)
        if weights is not tile:
            weights.copy_(tile)
    return change, scale


def rescale(first: Tensor, second: Tensor | None, change: Tensor, scale: Tensor) -> None:
    """Sums [R, d] of exp(z − m) a, and of exp(z − m) (z − m) a, to the new maximum, in place."""
    if second is not None:
        second.addcmul_(first, change.unsqueeze(1)).mul_(scale.unsqueeze(1))
    first.mul_(scale.unsqueeze(1))


def label_gradient(logps: Tensor, grad_logp: Tensor, entropy: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """∂L/∂z of the label's logit, g (1 − p) − g_H p (log p + H), from log p: 1 − p keeps its digits."""
    gradient = -grad_logp * logps.expm1()
    if entropy is None or grad_entropy is None:
        return gradient
    return gradient - grad_entropy * logps.exp() * (logps.clamp(min=-1e4) + entropy)


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
    """A tile of products to ∂L/∂x, in ``out`` (which may be the tile), whose content is lost.

    With p = exp(z − lse): ∂L/∂x = [g (1[label] − p) − g_H p (log p + H)] ⊙ J, at the label ``at_label`` J (see
    :func:`label_gradient`).
    """
    logits_(tile, bias, shape)
    jacobian = slope(tile, shape)
    tile.sub_(lse.unsqueeze(1))
    if entropy is None or grad_entropy is None:
        tile.exp_().mul_(-grad_logp.unsqueeze(1))
    else:
        surprise = tile.clamp(min=-1e4).add_(entropy.unsqueeze(1)).mul_(grad_entropy.unsqueeze(1))
        tile.exp_().mul_(surprise.add_(grad_logp.unsqueeze(1)).neg_())
    inside = (labels >= 0) & (labels < tile.shape[1])
    index = labels.clamp(0, tile.shape[1] - 1).unsqueeze(1)
    tile.scatter_(1, index, torch.where(inside.unsqueeze(1), at_label.unsqueeze(1), tile.gather(1, index)))
    if shape.softcap is not None or shape.temperature != 1.0:
        tile.mul_(jacobian)
    if out is not tile:
        out.copy_(tile)


def weigh(weights: Tensor, labels: Tensor, coefficient: Tensor, at_label: Tensor, out: Tensor) -> None:
    """∂L/∂x from a tile of kept ``weights`` exp(z − m) J, in ``out``: −coefficient · weights, ``at_label`` at labels.

    coefficient = g exp(m − lse) and at_label = ``label_gradient`` · J(label), each [R].
    """
    torch.mul(weights, -coefficient.unsqueeze(1), out=out)
    inside = (labels >= 0) & (labels < out.shape[1])
    index = labels.clamp(0, out.shape[1] - 1).unsqueeze(1)
    entry = torch.where(inside.unsqueeze(1), at_label.unsqueeze(1).to(out.dtype), out.gather(1, index))
    out.scatter_(1, index, entry)
