"""Log-probabilities of labels from all logits at once: the definition, for reading and for checking against."""

import torch
from torch import Tensor

from exo_toy import checks, logspace


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [n]; differentiable to any order; holds the logits [n, V] several times."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    counts = labels != ignore_index
    # An ignored row's content, NaN included, must not reach the products.
    hidden = torch.where(counts.unsqueeze(-1), hidden, 0.0).to(dtype)
    with checks.autocast_off(hidden.device):
        logits = hidden @ weight.to(dtype).mT
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = (logits / temperature).log_softmax(-1)
    entropies = -logspace.expectation(log_p, log_p)
    return _label_logps(log_p, labels, counts), torch.where(counts, entropies, 0.0)


def selective_logps(logits: Tensor, labels: Tensor, temperature: float, ignore_index: int) -> Tensor:
    """Log-probability [n] from logits [n, V]."""
    counts = labels != ignore_index
    logits = torch.where(counts.unsqueeze(-1), logits, 0.0).to(torch.promote_types(logits.dtype, torch.float32))
    return _label_logps((logits / temperature).log_softmax(-1), labels, counts)


def _label_logps(log_p: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """The label's entry of each row, 0 in rows that do not count."""
    index = torch.where(counts, labels, 0).unsqueeze(-1)
    return torch.where(counts, log_p.gather(-1, index).squeeze(-1), 0.0)
