"""What a test may assert of a loss: its oracle and its laws, written down once beside the loss's own tests.

A test file of one loss, ``tests/test_loss_<name>.py``, lists its cases in ``CASES``; tests/loss_cases.py collects them.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from exo_toy.losses import LOSSES


@dataclasses.dataclass(frozen=True)
class LossCase:
    """A loss of the library's table at some settings, and its oracle, of one example as numbers and lists."""

    name: str
    settings: Mapping[str, Any]
    oracle: Callable[..., float]
    oracle_settings: Mapping[str, Any]

    def __call__(self, *tensors: Tensor, **changed: Any) -> Any:
        return LOSSES[self.name].function(*tensors, **{**self.settings, **changed})

    def by_oracle(self, tensors: tuple[Tensor, ...]) -> list[float]:
        """The oracle of each example."""
        rows = zip(*(x.double().tolist() if x.is_floating_point() else x.tolist() for x in tensors), strict=True)
        return [self.oracle(*row, **self.oracle_settings) for row in rows]


@dataclasses.dataclass(frozen=True)
class PairCase(LossCase):
    """A loss of chosen and rejected log-probabilities under policy and reference, [B] each; perhaps of rewards, too."""

    at_reference: float
    # Adding a constant to both log ratios changes nothing.
    shift_invariant: bool = True
    # Where the policy excludes the chosen, or the rejected, and the other one is at its reference: the value, and the
    # slopes by both policy log-probabilities.
    no_chosen: tuple[float, float, float] = (math.inf, math.nan, math.nan)
    no_rejected: tuple[float, float, float] = (math.inf, math.nan, math.nan)
    # The oracle takes exponentials of log ratios, and overflows where the loss does not.
    exponential: bool = False


def pair_case(
    name: str, oracle: Callable[..., float], at_reference: float, *, laws: Mapping[str, Any], **settings: Any
):
    """The settings are the oracle's, too."""
    return PairCase(name, settings, oracle, settings, at_reference, **laws)


INF, LOG2, BETA = math.inf, math.log(2), 0.7
# Of every logistic loss on the margin: infinite with slope -beta, or 0.
LOGISTIC = {"no_chosen": (INF, -BETA, BETA), "no_rejected": (0.0, 0.0, 0.0)}

# Tensors that every loss of a kind accepts; none of the values coincide.
LOGPS = tuple(torch.tensor([[-1.0, -2.0, 0.5], [-1.5, 0.3, -0.7], [0.1, 0.2, -0.9], [-2.0, -1.1, 0.4]]).double())
SCORES = tuple(torch.tensor([[0.3, -1.0, 2.0], [0.1, 0.6, -0.5]]).double())
LENGTHS = (torch.tensor([3, 1, 7]), torch.tensor([2, 5, 4]))
NEGATIVE = tuple(torch.tensor([[-1.0, -2.0, -6.5], [-1.5, -4.3, -0.7]]).double())
LOG_RATIO = torch.tensor([[0.3, -1.2, 0.5, 1.0], [2.0, 0.1, -0.4, 0.6]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, 0.2, -0.7, 0.4], [0.0, 0.6, 0.3, -1.0]], dtype=torch.float64)


def arguments(name: str) -> tuple[Tensor, ...]:
    """Tensors for the loss of this name in the library's table, as many as it takes by position."""
    parameters = inspect.signature(LOSSES[name].function).parameters.values()
    tensors = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    labels = (torch.tensor([True, False, True]),) if "desirable" in tensors else SCORES
    every = {
        "pair": LOGPS,
        "batch": LOGPS,
        "rewarded pair": (*LOGPS, *SCORES),
        "reference-free": (*NEGATIVE, *LENGTHS),
        "unpaired": (LOGPS[0], LOGPS[2], *labels),
        "list": (LOG_RATIO, REWARDS),
        "ranked": (LOG_RATIO,),
    }[LOSSES[name].kind]
    return every[: len(tensors)]


def per_example(result: Any) -> Tensor:
    """The losses, of whatever a loss returns."""
    return getattr(result, "losses", result)
