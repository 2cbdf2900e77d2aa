"""What a loss is fed, with the probability of each draw: everything is enumerated and nothing sampled."""

import itertools
import math

import torch
from torch import Tensor

from exo_toy.lab.subject import Kind, Scene, Subject


def tuples(n: int, k: int) -> Tensor:
    """All k-tuples [n**k, k] of n completions."""
    return torch.tensor(list(itertools.product(range(n), repeat=k)))


def multisets(n: int, k: int) -> Tensor:
    """All multisets [M, k] of n completions."""
    return torch.tensor(list(itertools.combinations_with_replacement(range(n), k)))


def multinomial(log_p: Tensor, index: Tensor) -> Tensor:
    """Probability [M] that k draws from p are these multisets."""
    counts = torch.nn.functional.one_hot(index, len(log_p)).sum(-2).double()
    orders = math.lgamma(index.shape[-1] + 1) - torch.lgamma(counts + 1).sum(-1)
    return (orders + counts @ log_p).exp()


def n_candidates(kind: Kind, k: int) -> int:
    """How many completions a loss of this kind reads at once, K for those on candidates."""
    return {"list": k, "ranked": k, "unpaired": 1, "valued": 1}.get(kind, 2)


def draws(kind: Kind, scene: Scene, k: int, *, ordered: bool) -> tuple[Tensor, Tensor]:
    """Completions [M, K] as the loss reads them, and the probability [M] of each draw.

    Candidates are drawn from the reference. Rankings, of pairs too, are Plackett and Luce's with the reward, for two
    those of Bradley and Terry; single completions are desirable, as a second column says, with probability sigma(r).
    """
    n, log_ref = len(scene.log_ref), scene.log_ref
    if kind == "list":
        if not ordered:
            index = multisets(n, k)
            return index, multinomial(log_ref, index)
        index = tuples(n, k)
        return index, log_ref[index].sum(-1).exp()
    if kind == "valued":
        return torch.arange(n)[:, None], log_ref.exp()
    if kind == "unpaired":
        index = torch.cartesian_prod(torch.arange(n), torch.arange(2))
        sign = 2.0 * index[:, 1] - 1
        return index, log_ref[index[:, 0]].exp() * (sign * scene.reward[index[:, 0]]).sigmoid()
    # Each of the k! orders in which a ranked tuple may have been drawn counts.
    index = tuples(n, n_candidates(kind, k))
    reward = scene.reward[index]
    later = reward.flip(-1).logcumsumexp(-1).flip(-1)
    log_weight = log_ref[index].sum(-1) + (reward - later).sum(-1) + math.lgamma(index.shape[-1] + 1)
    return index, log_weight.exp()


def expected_loss(subject: Subject, scene: Scene, log_pi: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Its exact expectation over draws; of one that mixes its examples, over batches of two (lists are too many)."""
    if subject.batching != "mixed" or subject.kind == "list":
        return (weight * subject.of(scene, log_pi, index)).sum()
    total = torch.zeros((), dtype=log_pi.dtype)
    for i, j in itertools.combinations_with_replacement(range(len(index)), 2):
        both = subject.call(*subject.arguments(scene, log_pi, index[[i, j]])).mean()
        total = total + (1 if i == j else 2) * weight[i] * weight[j] * both
    return total
