"""The vocabulary over the ranks of a process group: each holds some rows of the weight, in rank order.

Every rank sees all hidden states and labels and gets all results. The forward needs one all-reduce of the maxima and
one of the sums, the backward one of ∂L/∂hidden; which labels are whose is settled by one of the slices' sizes.
"""

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from exo_toy.kernels.rows import Statistics


def process_group(name: str) -> dist.ProcessGroup:
    """A group by name: an operator's arguments cannot be groups."""
    return c10d._resolve_process_group(c10d.GroupName(name))  # type: ignore[attr-defined]


def place(weight: Tensor, group: str | None) -> tuple[Tensor | int, Tensor | int]:
    """The first label of this rank's slice and the size of the whole vocabulary."""
    if group is None:
        return 0, len(weight)
    ranks = process_group(group)
    sizes = torch.zeros(dist.get_world_size(ranks), dtype=torch.int64, device=weight.device)
    rank = dist.get_rank(ranks)
    sizes[rank] = len(weight)
    dist.all_reduce(sizes, group=ranks)
    return sizes[:rank].sum(), sizes.sum()


def combine(seen: Statistics, group: str | None) -> tuple[Statistics, tuple[Tensor, Tensor] | None]:
    """Statistics of all slices, and what this rank's own sums are rescaled by (see ``rows.rescale``)."""
    if group is None:
        return seen, None
    ranks = process_group(group)
    maximum = seen.maximum.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=ranks)
    everywhere = seen._replace(maximum=maximum)
    change = torch.where(seen.total == 0, 0.0, seen.shift() - everywhere.shift())
    scale = change.exp()
    packed = [seen.total * scale, seen.label]
    if seen.moment is not None:
        packed.append((seen.moment + change * seen.total) * scale)
    sums = torch.stack(packed)
    dist.all_reduce(sums, group=ranks)
    moment = None if seen.moment is None else sums[2]
    return Statistics(maximum, sums[0], moment, sums[1]), (change, scale)


def add_up(share: Tensor, group: str | None) -> None:
    """Sum over the ranks, in place."""
    if group is not None:
        dist.all_reduce(share, group=process_group(group))
