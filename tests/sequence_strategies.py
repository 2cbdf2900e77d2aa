"""Hypothesis strategies for spaces of completions and tables over their tries, all dimensions of distinct sizes.

Within a strategy the number of completions comes from the oracle: the run-time check of the annotation of
``SequenceSpace.subtree_sizes`` draws random numbers, which Hypothesis does not allow there.
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.spaces import SequenceSpace
from tests import sequence_oracles


@st.composite
def spaces(draw: st.DrawFn, *, min_vocab: int = 1, max_vocab: int = 4, max_length: int = 5) -> SequenceSpace:
    """Small spaces with V and T distinct, with the eos anywhere or without one."""
    vocab_size = draw(st.integers(min_vocab, max_vocab))
    length = draw(st.integers(1, max_length).filter(lambda size: size != vocab_size))
    eos = draw(st.none() | st.integers(0, vocab_size - 1)) if vocab_size > 1 else None
    return SequenceSpace(vocab_size, length, eos)


def orders(space: SequenceSpace) -> st.SearchStrategy[int]:
    """Orders of k-gram tables, 0..T-1."""
    return st.integers(0, space.length - 1)


def prompt_counts(space: SequenceSpace) -> st.SearchStrategy[int]:
    """X, distinct from V, T and N."""
    taken = (space.vocab_size, space.length, len(completions(space)))
    return st.integers(1, 7).filter(lambda size: size not in taken)


def generators() -> st.SearchStrategy[torch.Generator]:
    """Seeded generators, for tables too long to be drawn number by number."""
    return st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def with_holes(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the entries -inf, but for one in each row of the last dimension."""
    holes = torch.rand(logits.shape, generator=generator) < 0.5
    kept = torch.randint(logits.shape[-1], (*logits.shape[:-1], 1), generator=generator)
    return logits.masked_fill(holes.scatter(-1, kept, False), -torch.inf)


def table_shapes(space: SequenceSpace, order: int, n_prompts: int) -> list[tuple[int, int, int]]:
    """Shapes of T tables of an order: contexts hold tokens other than the eos."""
    n_live = space.vocab_size - (space.eos is not None)
    return [(n_prompts, n_live ** min(t, order), space.vocab_size) for t in range(space.length)]


def completions(space: SequenceSpace) -> list[sequence_oracles.Completion]:
    """The completions of a space by the oracle."""
    return sequence_oracles.completions(space.vocab_size, space.length, space.eos)
