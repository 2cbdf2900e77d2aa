"""What a table of log-probabilities costs, against one copy of it: ``python -m benchmarks.policies``.

Every row is measured in one process, the candidates taking turns, so that whatever else the machine does falls on all
of them; medians over the rounds after a warm-up. The copy is ``table.clone()``. For comparison, the same table by a
gather per token: T look-ups for each of the N completions, their tokens given.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from exo_toy.policies import KGramPolicy
from exo_toy.spaces import SequenceSpace


def always_take_fresh_pages() -> None:
    """Have glibc map every large block anew; left alone it hands some of them used pages, five times as fast."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold = -3
        libc.mallopt(mmap_threshold, 2**20)


def gather_per_token(policy: KGramPolicy, tokens: Tensor) -> Tensor:
    """log_probs [X, N] by looking up every token of every completion [N, T]."""
    n_live = policy.space.n_live
    context = torch.zeros_like(tokens[:, 0])
    running = torch.ones_like(context, dtype=torch.bool)
    log_probs = torch.zeros(policy.n_prompts, len(tokens), dtype=torch.float64)
    for logits, token in zip(policy.logits, tokens.unbind(-1), strict=True):
        entries = logits.log_softmax(-1)[:, context, token]
        digit = token
        if policy.space.eos is not None:
            entries = torch.where(running, entries, 0.0)
            running = running & (token != policy.space.eos)
            digit = torch.where(running, token - (token > policy.space.eos).long(), 0)
        log_probs = log_probs + entries
        context = (context * n_live + digit) % n_live**policy.order
    return log_probs


def medians(candidates: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each candidate over rounds in which all take turns, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, candidate in candidates.items():
            start = clock()
            candidate()
            times[name].append(clock() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def measure(policy: KGramPolicy, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of a copy, and of forward and forward + backward by either implementation."""
    tokens = policy.space.tokens()
    parameters = list(policy.parameters())
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data.normal_(generator=generator)
    table = policy.log_probs().detach()
    weights = torch.rand(table.shape, generator=generator, dtype=table.dtype)
    torch.testing.assert_close(gather_per_token(policy, tokens).detach(), table, rtol=1e-12, atol=1e-12)
    seconds = medians(
        {
            "copy": table.clone,
            "forward": policy.log_probs,
            "both": lambda: torch.autograd.grad(policy.log_probs(), parameters, weights),
        },
        rounds,
        clock,
    )
    by_gather = medians(
        {
            "copy": table.clone,
            "gather forward": lambda: gather_per_token(policy, tokens),
            "gather both": lambda: torch.autograd.grad(gather_per_token(policy, tokens), parameters, weights),
        },
        max(1, rounds // 10),
        clock,
    )
    return {**by_gather, **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=8)
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="one thread's CPU time, for a machine that is busy")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)

    always_take_fresh_pages()
    print(f"V = {arguments.vocab_size}, T = {arguments.length}, float64, {torch.get_num_threads()} threads")
    print("milliseconds, and in brackets the multiple of one copy of the table (f: forward, f+b: forward and backward)")
    print(f"{'eos':>4} {'k':>2} {'N':>11} {'copy':>8} {'f':>15} {'f+b':>15} {'gather f':>17} {'gather f+b':>17}")
    for eos in (None, 0, arguments.vocab_size // 2):
        space = SequenceSpace(arguments.vocab_size, arguments.length, eos)
        for order in arguments.orders:
            seconds = measure(KGramPolicy(space, order), arguments.rounds, clock)
            cells = [
                f"{1e3 * seconds[name]:.1f} ({seconds[name] / seconds['copy']:.1f}x)".rjust(width)
                for name, width in (("forward", 15), ("both", 15), ("gather forward", 17), ("gather both", 17))
            ]
            eos_cell = "-" if eos is None else str(eos)
            print(f"{eos_cell:>4} {order:>2} {space.size:>11,} {1e3 * seconds['copy']:>8.1f}", *cells, flush=True)


if __name__ == "__main__":
    main()
