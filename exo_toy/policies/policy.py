"""What exact computations ask of a policy, and what all policies share."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from exo_toy import checks
from exo_toy.spaces import SequenceSpace


@runtime_checkable
class Policy(Protocol):
    """What exact computations ask of a policy: a table that depends on parameters. Any ``nn.Module`` may provide it."""

    def log_probs(self) -> Float64[Tensor, "X N"]:
        """[X, N] log-probability of every completion, in nats."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, as those of an ``nn.Module``."""
        ...


@runtime_checkable
class SequencePolicy(Policy, Protocol):
    """What training on samples asks of a policy besides."""

    space: SequenceSpace

    def log_prob(self, tokens: Tensor) -> Float64[Tensor, "X M"]:
        """[X, M] log-probability of completions [X, M, T], in nats."""
        ...

    def sample(self, n: int, generator: torch.Generator | None = None) -> Int64[Tensor, "X n T"]:
        """[X, n, T] independent completions."""
        ...


def log_softmax(name: str, logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension; a row that is no distribution is an error."""
    log_probs = logits.log_softmax(-1)
    # NaN and +inf, or -inf throughout, make the normaliser and hence the whole row NaN: one column shows it.
    bad = log_probs[..., 0].detach().isnan()
    allowed = "finite or -inf, with a finite entry in every row of the last dimension"
    checks.require_values(
        [logits], (bad, lambda: f"{name} must be {allowed}; not so in the row at {bad.nonzero()[0].tolist()}")
    )
    return log_probs


def draw(log_probs: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """n indices [..., n] from each distribution [..., N]; never one of probability zero."""
    # Not torch.multinomial, which stops at 2**24 categories.
    cumulative = log_probs.exp().cumsum(-1)
    uniform = torch.rand(
        (*log_probs.shape[:-1], n), generator=generator, dtype=log_probs.dtype, device=log_probs.device
    )
    # Scaled by the sum as it came out in floating point, the threshold stays strictly below it.
    return torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)


def by_prompt(space: SequenceSpace, tokens: Tensor, n_prompts: int) -> Tensor:
    """Completions [M, T] or [X, M, T] as int64 [1, M, T], shared by all prompts, or [X, M, T]."""
    space.require_completions(tokens)
    if tokens.ndim == 2:
        return tokens.to(torch.int64).unsqueeze(0)
    if tokens.ndim != 3 or len(tokens) != n_prompts:
        wanted = f"[M, {space.length}], or [{n_prompts}, M, {space.length}] with completions for every prompt"
        raise ValueError(f"tokens must have shape {wanted}; got {list(tokens.shape)}")
    return tokens.to(torch.int64)
