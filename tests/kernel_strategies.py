"""Heads with hidden states and labels in every form that the kernels take, the ways of computing, and what they take.

Tiles are drawn small, so that a few rows and tokens make many of them, with ragged ends.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self
from unittest.mock import patch

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from exo_toy.kernels import linear_logps, tiles
from exo_toy.kernels.tiles import Tile
from tests import kernel_oracles
from tests.sequence_strategies import generators, normal

# Who computes, what is saved, and whether the head learns.
MODES = ["reference", "recompute", "part kept", "kept", "frozen"]
ALL = 10**9  # a budget for everything
SMALL = Tile(rows=2, block=4, columns=4)


@contextlib.contextmanager
def use_tiles(tile: Tile = SMALL) -> Iterator[None]:
    """Tiles of this size on every device."""
    with patch.dict(tiles.TILES, dict.fromkeys(tiles.TILES, tile)):
        yield


class Results(NamedTuple):
    """Outputs, and the gradients of their weighted sum by argument."""

    logps: Tensor
    entropies: Tensor | None
    gradients: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Head:
    """Arguments of ``linear_logps``."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    tile: Tile = SMALL

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("softcap", "temperature", "ignore_index")}

    @property
    def counts(self) -> Tensor:
        return self.labels != self.ignore_index

    @property
    def half_a_budget(self) -> int:
        """Bytes for the probabilities of half of the tiles."""
        n_tiles = -(-len(self.weight) // self.tile.columns)
        columns = -(-n_tiles // 2) * self.tile.columns
        return self.tile.padded(self.labels.numel()) * columns * self.hidden.dtype.itemsize

    def to(self, target: torch.device | torch.dtype) -> Self:
        moved = {name: x.to(target) for name in ("hidden", "weight", "bias") if (x := getattr(self, name)) is not None}
        labels = self.labels if isinstance(target, torch.dtype) else self.labels.to(target)
        return dataclasses.replace(self, labels=labels, **moved)

    def inputs(self, *learning: str) -> dict[str, Tensor | None]:
        """Hidden, weight and bias, of the same strides; those named require gradients."""
        given = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: None if x is None else x.detach().requires_grad_(name in learning) for name, x in given.items()}

    def outputs(self, mode: str, inputs: dict[str, Tensor | None], *, entropy: bool) -> tuple[Tensor, ...]:
        """(logps,) or (logps, entropies)."""
        budget = {"part kept": self.half_a_budget, "kept": ALL}.get(mode, 0)
        backend = "reference" if mode == "reference" else "tiled"
        with use_tiles(self.tile):
            outputs = linear_logps(
                **inputs,
                labels=self.labels,
                **self.options,
                return_entropy=entropy,
                save_budget=budget,
                backend=backend,
            )
        return outputs if entropy else (outputs,)

    def run(self, mode: str, weights: Sequence[Tensor]) -> Results:
        """Outputs and gradients; ``weights`` are those of the log-probabilities, and of the entropies if wanted."""
        learning = ["hidden"] if mode == "frozen" else ["hidden", "weight", "bias"]
        inputs = self.inputs(*learning)
        asked = {name: inputs[name] for name in learning if inputs[name] is not None}
        outputs = self.outputs(mode, inputs, entropy=len(weights) == 2)
        gradients = torch.autograd.grad(outputs, list(asked.values()), list(weights))
        logps, entropies = (*(x.detach() for x in outputs), None)[:2]
        return Results(logps, entropies, dict(zip(asked, gradients, strict=True)))

    def _plain(self) -> tuple[Any, ...]:
        """Arguments of the oracle."""
        rows = self.hidden.double().reshape(-1, self.hidden.shape[-1])
        bias = None if self.bias is None else self.bias.tolist()
        return rows.tolist(), self.weight.tolist(), self.labels.flatten().tolist(), bias, *self.options.values()

    def expected(self, weights: Sequence[Tensor]) -> Results:
        """What the oracle says, in float64."""
        grad_logps, grad_entropies = (*(x.flatten().tolist() for x in weights), [0.0] * self.labels.numel())[:2]
        logps, entropies = kernel_oracles.linear_logps(*self._plain())
        gradients = kernel_oracles.linear_gradients(*self._plain(), grad_logps, grad_entropies)
        tensors = [torch.tensor(x, dtype=torch.float64) for x in (logps, entropies, *gradients)]
        logps, entropies, hidden, weight, bias = tensors
        return Results(
            logps.view(self.labels.shape),
            entropies.view(self.labels.shape),
            {"hidden": hidden.view(self.hidden.shape), "weight": weight, "bias": bias},
        )

    @property
    def scale(self) -> float:
        """What roundings of outputs and gradients are in proportion to."""
        hidden, weight = (x.double().abs().nan_to_num(0.0).amax().item() for x in (self.hidden, self.weight))
        bias = 0.0 if self.bias is None else self.bias.double().abs().amax().item()
        logit = (hidden * weight * self.weight.shape[1] + bias) / self.temperature
        return (1 + logit) * (1 + max(hidden, weight) / self.temperature)


def leading_shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of the labels, from none at all to three dimensions."""
    return st.sampled_from([(), (1,), (2,), (3,), (9,), (11,), (3, 4), (4, 1), (2, 3, 2)])


def sizes_of_tiles() -> st.SearchStrategy[Tile]:
    """A block is some times the rows of a product."""
    return st.builds(
        lambda rows, times, columns: Tile(rows, rows * times, columns),
        st.integers(1, 5), st.integers(1, 3), st.integers(1, 9),
    )  # fmt: skip


def strided(x: Tensor, layout: str) -> Tensor:
    """The same content with other strides."""
    if layout == "transposed":
        return x.movedim(0, -1).contiguous().movedim(-1, 0) if x.ndim > 1 else x
    if layout == "every other":
        return torch.stack([x, -x], -1)[..., 0]
    return x


LAYOUTS = ["contiguous", "transposed", "every other"]
LABEL_TYPES = [torch.int64, torch.int32, torch.int16]


@st.composite
def heads(draw: st.DrawFn, *, shapes: st.SearchStrategy[tuple[int, ...]] | None = None, plain: bool = False) -> Head:
    """Float64 on the CPU; d, V and the number of rows are distinct. With ``plain``, no cap and no temperature."""
    shape = draw(shapes or leading_shapes())
    n_rows = torch.Size(shape).numel()
    width = draw(st.integers(1, 6).filter(lambda size: size != n_rows))
    n_vocab = draw(st.integers(1, 23).filter(lambda size: size not in (n_rows, width)))
    generator = draw(generators())
    ignore_index = draw(st.sampled_from([-100, -1, 0, n_vocab - 1, n_vocab + 3]))
    ignored = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    labels = torch.randint(n_vocab, shape, generator=generator).masked_fill(ignored, ignore_index)
    hidden = normal((*shape, width), generator).masked_fill((labels == ignore_index).unsqueeze(-1), torch.nan)
    return Head(
        strided(hidden, draw(st.sampled_from(LAYOUTS))),
        strided(normal((n_vocab, width), generator), draw(st.sampled_from(LAYOUTS))),
        strided(labels.to(draw(st.sampled_from(LABEL_TYPES))), draw(st.sampled_from(LAYOUTS))),
        normal((n_vocab,), generator) if draw(st.booleans()) else None,
        None if plain else draw(st.none() | st.sampled_from([0.7, 3.0, 30.0])),
        1.0 if plain else draw(st.sampled_from([1.0, 0.25, 2.5])),
        ignore_index,
        draw(sizes_of_tiles()),
    )


def weights_like(head: Head, generator: torch.Generator) -> list[Tensor]:
    """Weights of the outputs, some of them zero."""
    shape = tuple(head.labels.shape)
    return [
        normal(shape, generator).masked_fill(torch.rand(shape, generator=generator) < 0.3, 0.0).to(head.labels.device)
        for _ in range(2)
    ]


def random_head(
    *shape: int, n_vocab: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0, **changed: Any
) -> Head:
    """One head with a bias, no label ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        normal(size, generator).to(dtype) for size in ((*shape, width), (n_vocab, width), (n_vocab,))
    )
    labels = torch.randint(n_vocab, shape, generator=generator)
    return Head(**{"hidden": hidden, "weight": weight, "labels": labels, "bias": bias, **changed})


def choices(**options: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of the options."""
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def profiled() -> profile:
    """A record of what happens on the CPU, also within registered operators."""
    return profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True, with_flops=True)


def peak(record: profile) -> int:
    """The most bytes allocated at one time, beyond what there was before."""
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
