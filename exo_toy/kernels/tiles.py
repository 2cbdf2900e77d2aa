"""The pieces that matrices are worked through in: sizes, the rows that count, products, and who does the row passes."""

import importlib.util
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from exo_toy import checks
from exo_toy.kernels import rows as rows_torch


class Tile(NamedTuple):
    """Sizes of the pieces. Rows are padded to a multiple of ``rows``; a tile is ``block`` of them by ``columns``."""

    rows: int
    block: int
    columns: int

    def padded(self, n_rows: int) -> int:
        """Rows after padding."""
        return -(-n_rows // self.rows) * self.rows

    def of_rows(self) -> "Tile":
        """Where there are no products, which alone need rows to be padded."""
        return self._replace(rows=1)


# Measured on two AVX-512 cores: large products, and a tile of 16 MB in the cache that they share. On CUDA a product of
# 2048 × 4096 fills an H200 twice, and larger blocks read the accumulated gradient of W less often; fewer columns take
# less memory.
TILES = {"cpu": Tile(64, 2048, 2048), "cuda": Tile(2048, 8192, 4096)}


def tile_for(device: torch.device) -> Tile:
    """The sizes for a device."""
    return TILES.get(device.type, TILES["cuda"])


def has_triton() -> bool:
    """Whether Triton is installed; importing it is left to its first use."""
    return importlib.util.find_spec("triton") is not None


def default_passes(device: torch.device) -> str:
    """Triton's on CUDA where it is installed."""
    return "triton" if device.type == "cuda" and has_triton() else "torch"


def row_passes(name: str) -> ModuleType:
    """The module of the row passes; Triton's is imported when first asked for."""
    if name == "triton":
        from exo_toy.kernels import rows_triton

        return rows_triton
    return rows_torch


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are in float32, of float64 inputs in float64."""
    return torch.promote_types(dtype, torch.float32)


def operand_dtype(hidden: Tensor) -> torch.dtype:
    """What products take. Products of half types into float32 sums exist on CUDA alone, and were not always there."""
    if hidden.is_cuda and torch.__version__ >= "2.13":
        return hidden.dtype
    return accumulator_dtype(hidden.dtype)


def storage_dtype(hidden: Tensor) -> torch.dtype:
    """What kept probabilities are stored in: half precision only with the exponents of float32."""
    return accumulator_dtype(hidden.dtype) if hidden.dtype == torch.float16 else hidden.dtype


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; summed in ``out``'s dtype."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    else:
        torch.addmm(out, a, b, beta=int(add), out_dtype=out.dtype, out=out)


def product_of_rows(out: Tensor, a: Tensor, b: Tensor, n_rows: int, *, add: bool = False) -> None:
    """``product``, such that a row's result does not depend on how many rows there are.

    On CUDA the library picks its algorithm by the shape, so every product gets ``n_rows`` rows. On a CPU a row comes
    out the same from 16 rows on (a test looks).
    """
    if not out.is_cuda:
        product(out, a, b, add=add)
        return
    for out_rows, a_rows in zip(out.split(n_rows), a.split(n_rows), strict=True):
        product(out_rows, a_rows, b, add=add)


class Rows:
    """The rows that count, in blocks, padded; and the way back to all n."""

    def __init__(
        self,
        labels: Tensor,
        live: Tensor,
        n_vocab: Tensor | int,
        first: Tensor | int,
        ignore_index: int,
        tile: Tile,
    ) -> None:
        outside = checks.labels_outside(labels, n_vocab, ignore_index)
        first = first if isinstance(first, Tensor) else labels.new_full((), first)
        # The only host synchronisation.
        n_live, n_outside, self.first = torch.stack([live.sum(), outside.sum(), first]).tolist()
        if n_outside:
            raise ValueError(checks.labels_message(labels, outside, n_vocab, ignore_index))
        self.n_all = len(labels)
        self.n_live = n_live
        self.padded = tile.padded(n_live)
        self.index = None if n_live == self.n_all else torch.nonzero_static(live, size=n_live).squeeze(1)
        self.blocks = [slice(i, min(i + tile.block, self.padded)) for i in range(0, self.padded, tile.block)]

    def vector(self, x: Tensor, fill: float | int) -> Tensor:
        """[n] -> [padded]."""
        x = x if self.index is None else x[self.index]
        return F.pad(x, (0, self.padded - self.n_live), value=fill)

    def matrix_blocks(self, x: Tensor, dtype: torch.dtype, tile: Tile) -> list[Tensor]:
        """[n, d] -> blocks [b, d], the last one padded with zeros; no copy where none is needed."""
        x = x if self.index is None else x[self.index]
        blocks = list(x.to(dtype).split(tile.block))
        if self.padded > self.n_live:
            blocks[-1] = F.pad(blocks[-1], (0, 0, 0, self.padded - self.n_live))
        return blocks

    def scatter(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[padded, ...] -> [n, ...], 0 at ignored rows."""
        x = x[: self.n_live].to(dtype)
        if self.index is None:
            return x
        return x.new_zeros(self.n_all, *x.shape[1:]).index_copy_(0, self.index, x)


def piece(memory: Tensor, n_rows: int, columns: int) -> Tensor:
    """A contiguous tile at the start of the memory."""
    return memory[: n_rows * columns].view(n_rows, columns)
