"""Hypothesis strategies for the library's inputs.

Distinct dimensions get distinct sizes, so that no two can be swapped.

All tensors are float64 on the CPU; ``.to(device)`` of a drawn dataclass moves it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Self

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class _Drawn:
    def to(self, target: torch.device | torch.dtype) -> Self:
        """The same with every tensor moved; masks keep their dtype."""
        keep = isinstance(target, torch.dtype)
        moved = {
            name: value.to(target) for name, value in self.tensors().items() if not (keep and value.dtype == torch.bool)
        }
        return dataclasses.replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclasses.dataclass(frozen=True)
class Problem(_Drawn):
    """Tables [X, N] over one space, with the split of beta into beta_r * beta_pi and a number of candidates."""

    log_pi: Tensor
    log_ref: Tensor
    reward: Tensor
    beta_pi: float
    beta_r: float
    k: int

    @property
    def beta(self) -> float:
        return self.beta_r * self.beta_pi


@dataclasses.dataclass(frozen=True)
class Candidates(_Drawn):
    """Arguments of the losses on K candidates."""

    log_ratio: Tensor
    rewards: Tensor
    mask: Tensor
    beta_pi: float
    beta_r: float

    @property
    def temperatures(self) -> dict[str, float]:
        return {"beta_pi": self.beta_pi, "beta_r": self.beta_r}

    @property
    def scale(self) -> float:
        """The largest number that enters a softmax."""
        return max(self.log_ratio.abs().max().item() * self.beta_pi, self.rewards.abs().max().item() / self.beta_r)


@dataclasses.dataclass(frozen=True)
class Pairs(_Drawn):
    """Arguments of the losses on pairs."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    beta: float

    @property
    def logps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.policy_chosen, self.policy_rejected, self.ref_chosen, self.ref_rejected

    @property
    def swapped(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same pairs labelled the other way round."""
        return self.policy_rejected, self.policy_chosen, self.ref_rejected, self.ref_chosen

    @property
    def margin(self) -> Tensor:
        return self.beta * (self.policy_chosen - self.ref_chosen - self.policy_rejected + self.ref_rejected)

    @property
    def scale(self) -> float:
        """The largest number that enters a margin."""
        return max(1.0, self.beta) * max(logps.abs().max().item() for logps in self.logps)


def temperatures(low: float = 0.1, high: float = 10.0) -> st.SearchStrategy[float]:
    """A temperature, as likely below 1 as above."""
    return st.floats(math.log(low), math.log(high)).map(math.exp)


def candidate_counts(high: int = 2**30) -> st.SearchStrategy[int]:
    """K from 2 up, small and huge ones alike."""
    return st.one_of(st.integers(2, min(8, high)), st.integers(2, high))


def sizes(count: int, low: int = 1, high: int = 7) -> st.SearchStrategy[list[int]]:
    """``count`` sizes, no two alike."""
    return st.lists(st.integers(low, high), min_size=count, max_size=count, unique=True)


@st.composite
def tensors(draw: st.DrawFn, shape: Sequence[int], low: float, high: float) -> Tensor:
    """A float64 tensor with entries in [low, high]."""
    count = math.prod(shape)
    entries = st.floats(low, high, allow_subnormal=False)
    values = draw(st.lists(entries, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


@st.composite
def masks(draw: st.DrawFn, shape: Sequence[int]) -> Tensor:
    """A boolean tensor with at least one True in every row."""
    count = math.prod(shape)
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool).reshape(shape)
    kept = [draw(st.integers(0, shape[-1] - 1)) for _ in range(math.prod(shape[:-1]))]
    return mask | torch.nn.functional.one_hot(torch.tensor(kept), shape[-1]).bool().reshape(shape)


@st.composite
def log_probabilities(draw: st.DrawFn, shape: Sequence[int], *, spread: float = 8.0, holes: bool = False) -> Tensor:
    """Normalised tables [..., N], log-sum-exp 0 over the last dimension; with ``holes``, some entries are -inf."""
    logits = draw(tensors(shape, -spread, spread))
    if holes:
        logits = logits.masked_fill(~draw(masks(shape)), -torch.inf)
    return logits.log_softmax(-1)


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    n: st.SearchStrategy[int] | None = None,
    max_k: int = 2**30,
    spread: float = 8.0,
    holes: bool = False,
) -> Problem:
    """Tables [X, N], X and N distinct; N from ``n`` if given. With ``holes``, -inf in all three tables.

    The reference is positive wherever the policy is, and every prompt keeps a completion that is allowed and possible.
    """
    n_completions = draw(n) if n is not None else draw(st.integers(2, 7))
    n_prompts = draw(st.integers(1, 4).filter(lambda size: size != n_completions))
    shape = (n_prompts, n_completions)
    log_ref, log_pi = draw(log_probabilities(shape, spread=spread)), draw(log_probabilities(shape, spread=spread))
    reward = draw(tensors(shape, -5.0, 5.0))
    if holes:
        in_ref, in_pi, allowed = draw(masks(shape)), draw(masks(shape)), draw(masks(shape))
        in_ref = in_ref | in_pi | allowed
        log_ref, log_pi = (
            log_p.masked_fill(~support, -torch.inf).log_softmax(-1)
            for log_p, support in ((log_ref, in_ref), (log_pi, in_pi))
        )
        reward = reward.masked_fill(~allowed, -torch.inf)
    return Problem(
        log_pi=log_pi,
        log_ref=log_ref,
        reward=reward,
        beta_pi=draw(temperatures(0.2, 3.0)),
        beta_r=draw(temperatures(0.2, 3.0)),
        k=draw(candidate_counts(max_k)),
    )


@st.composite
def candidates(draw: st.DrawFn, *, bound: float = 30.0, min_k: int = 2, holes: bool = False) -> Candidates:
    """Log ratios, rewards and a mask [B, K], B and K distinct; with ``holes``, -inf in log ratios and rewards."""
    n_candidates = draw(st.integers(min_k, 7))
    batch = draw(st.integers(1, 5).filter(lambda size: size != n_candidates))
    shape = (batch, n_candidates)
    log_ratio, rewards, mask = (
        draw(tensors(shape, -bound, bound)),
        draw(tensors(shape, -bound, bound)),
        draw(masks(shape)),
    )
    if holes:
        # Within the mask, so that a row's unmasked candidates are never all -inf.
        log_ratio = log_ratio.masked_fill(~_some_of(mask, draw(masks(shape))), -torch.inf)
        rewards = rewards.masked_fill(~_some_of(mask, draw(masks(shape))), -torch.inf)
    return Candidates(log_ratio, rewards, mask, beta_pi=draw(temperatures()), beta_r=draw(temperatures()))


def _some_of(mask: Tensor, wanted: Tensor) -> Tensor:
    """The part of ``mask`` that is wanted; all of it in the rows where that part is empty."""
    part = mask & wanted
    return torch.where(part.any(-1, keepdim=True), part, mask)


@st.composite
def pairs(draw: st.DrawFn, *, bound: float = 30.0) -> Pairs:
    """Log-probabilities [B] in [-bound, 0]."""
    batch = draw(st.integers(1, 6))
    chosen, rejected, ref_chosen, ref_rejected = (draw(tensors((batch,), -bound, 0.0)) for _ in range(4))
    return Pairs(chosen, rejected, ref_chosen, ref_rejected, beta=draw(temperatures()))
