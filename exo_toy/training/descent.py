"""What every training on samples shares: the descent, draws from a table, batches of a data set."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from exo_toy import checks


class Descent:
    """Adam with a learning rate that falls to zero along a cosine (Kingma and Ba, arXiv:1412.6980)."""

    def __init__(self, parameters: Iterable[nn.Parameter], steps: int, learning_rate: float) -> None:
        checks.require_integer("steps", steps, at_least=1)
        checks.require_positive(learning_rate=learning_rate)
        self._optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps)

    def step(self, loss: Tensor) -> float:
        """One step down the gradient of the loss; its value before. A loss that is not finite leaves all as it is."""
        if not loss.isfinite():
            raise ValueError(f"loss must be finite; got {loss.item()} (the parameters are as before this step)")
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        return loss.item()


class Draws:
    """Independent indices from each distribution of a table [X, N] of log-probabilities."""

    def __init__(self, log_p: Tensor) -> None:
        checks.require_shape("X N", log_p=log_p)
        checks.require_log_probabilities(log_p=log_p)
        cumulative = log_p.exp().cumsum(-1)
        self._cumulative = cumulative / cumulative[:, -1:]

    def __call__(self, n: int, generator: torch.Generator) -> Tensor:
        """[X, n]; never an index of probability zero."""
        uniform = torch.rand(len(self._cumulative), n, generator=generator, dtype=self._cumulative.dtype)
        return torch.searchsorted(self._cumulative, uniform, right=True)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table [X, N] at [X, ...]."""
    return table.gather(-1, index.flatten(1)).view(index.shape)


def shuffled_batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Places of a data set in random order without end, each once in a pass; what is left of a pass is skipped."""
    while True:
        order = torch.randperm(n, generator=generator)
        yield from order[: n - n % size].split(size)
