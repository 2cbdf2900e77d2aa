"""What an exact expectation over K candidates costs, against its exponentials: ``python -m benchmarks.finite_k``.

The floor is the time of 200 N exponentials, in a buffer that stays in cache. For comparison, the same integral by plain
chunking: an exponential for every node and completion, and autograd through checkpointed chunks of nodes. All take
turns in one process; medians over the rounds after a warm-up.
"""

import argparse
import math
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.policies import medians
from exo_toy import laplace
from exo_toy.finite_k import expected_exo_rw_loss

EXPONENTIALS = 200
CHUNK = 8  # nodes of a chunk of the plain way


def exponentials(n: int) -> Callable[[], None]:
    """200 N exponentials in float64."""
    buffer = torch.randn(2**16, dtype=torch.float64)
    out = torch.empty_like(buffer)
    repeats = round(EXPONENTIALS * n / len(buffer))

    def run() -> None:
        for _ in range(repeats):
            torch.exp(buffer, out=out)

    return run


def plain_chunk(log_w: Tensor, g: Tensor, p: Tensor, nodes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A chunk of nodes of both integrals, by an exponential for each node and completion."""
    t = nodes.exp()
    x = t.unsqueeze(-1) * log_w.exp()
    deviation = torch.expm1(-x) @ p
    log_transform = torch.log1p(deviation.clamp(min=-1 + 1e-16))
    log_sum = (torch.expm1(-t) - torch.expm1(k * log_transform)).sum()
    ratio = ((x * torch.exp(-x)) @ (p * g) * torch.exp((k - 1) * log_transform)).sum()
    return laplace.STEP * log_sum, k * laplace.STEP * ratio


def plain_loss(log_pi: Tensor, log_ref: Tensor, reward: Tensor, k: int, beta_pi: float, beta_r: float) -> Tensor:
    """The expected EXO-rw loss by plain chunking."""
    f, scaled_reward = beta_pi * (log_pi - log_ref), reward / beta_r
    p = log_ref.exp()

    def integrals(log_w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        shift = log_w.detach().max()
        low, high = math.floor(-4 * math.log(k) - 180), math.ceil(4 * (5 + (shift - log_w.detach().min()).item()))
        nodes = torch.arange(low, high + 1, dtype=torch.float64) / 4
        parts = [
            checkpoint(plain_chunk, log_w - shift, g, p, chunk, k, use_reentrant=False) for chunk in nodes.split(CHUNK)
        ]
        return shift + sum(part[0] for part in parts), sum(part[1] for part in parts)

    log_sum_w, expected_h = integrals(f, f - scaled_reward)
    log_sum_v, _ = integrals(scaled_reward, torch.zeros_like(reward))
    return expected_h - log_sum_w + log_sum_v


def measure(n: int, k: int, rounds: int, *, plain: bool) -> dict[str, float]:
    """Seconds of the floor and of forward and forward + backward by either implementation."""
    generator = torch.Generator().manual_seed(0)
    log_ref, log_pi, reward = torch.randn(3, n, generator=generator, dtype=torch.float64)
    log_ref, log_pi = log_ref.log_softmax(-1), log_pi.log_softmax(-1).requires_grad_()
    betas = {"beta_pi": 0.5, "beta_r": 1.0}

    def ours() -> Tensor:
        return expected_exo_rw_loss(log_pi, log_ref, reward, k=k, **betas)

    def theirs() -> Tensor:
        return plain_loss(log_pi, log_ref, reward, k, **betas)

    candidates: dict[str, Callable[[], object]] = {
        "floor": exponentials(n),
        "forward": ours,
        "both": lambda: torch.autograd.grad(ours(), log_pi),
    }
    if plain:
        torch.testing.assert_close(ours(), theirs(), rtol=1e-10, atol=1e-10)
        candidates |= {"plain forward": theirs, "plain both": lambda: torch.autograd.grad(theirs(), log_pi)}
    return medians(candidates, rounds, time.perf_counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(
        f"float64, {torch.get_num_threads()} threads; milliseconds, and in brackets the multiple of 200 N exponentials"
    )
    header = ("forward", "f+b", "plain f", "plain f+b")
    print(f"{'N':>9} {'K':>11} {'floor':>8}", *(f"{name:>15}" for name in header), f"{'peak RSS':>10}")
    for n, k, plain in ((10**5, 64, True), (10**5, 2**30, False), (10**6, 64, False)):
        seconds = measure(n, k, rounds, plain=plain)
        names = ("forward", "both", "plain forward", "plain both")
        cells = [
            f"{1e3 * seconds[name]:.0f} ({seconds[name] / seconds['floor']:.1f}x)" if name in seconds else "-"
            for name in names
        ]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        floor = f"{1e3 * seconds['floor']:>8.0f}"
        print(f"{n:>9,} {k:>11,} {floor}", *(f"{cell:>15}" for cell in cells), f"{peak:>6.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
