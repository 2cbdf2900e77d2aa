"""What a table of log-probabilities costs, against one copy of it: ``python -m benchmarks.policies``.

Every row is measured in one process, the candidates taking turns, so that whatever else the machine does falls on all
of them; medians over the rounds after a warm-up. The copy is ``table.clone()``. For comparison, the same table by a
gather per token: T look-ups for each of the N completions, their tokens given.

Then the policies that compute: the table over the trie, where a prefix is evaluated once for all that share it, against
``log_prob`` of all completions, where each is evaluated by itself (in batches that stay in the cache, step by step with
what it remembers of its past, so that sharing is the only difference).
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from exo_toy.policies import GRUPolicy, KGramPolicy, LowRankPolicy, TransformerPolicy
from exo_toy.policies.autoregressive import AutoregressivePolicy
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


def measure_sharing(policy: AutoregressivePolicy, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of forward and forward + backward over the trie, and of every completion by itself."""
    parameters = list(policy.parameters())
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    weights = torch.rand(policy.n_prompts, policy.space.size, generator=generator, dtype=torch.float64)
    batches = list(zip(policy.space.tokens().split(4096), weights.split(4096, 1), strict=True))

    def forward(by_itself: bool) -> Tensor:
        with torch.no_grad():
            return torch.cat([policy.log_prob(tokens) for tokens, _ in batches], 1) if by_itself else policy.log_probs()

    def both_by_itself() -> None:
        for tokens, weight in batches:
            torch.autograd.grad(policy.log_prob(tokens), parameters, weight, materialize_grads=True)

    torch.testing.assert_close(forward(True), forward(False), rtol=1e-12, atol=1e-12)
    over_trie = {
        "forward": lambda: forward(False),
        "both": lambda: torch.autograd.grad(policy.log_probs(), parameters, weights, materialize_grads=True),
    }
    by_itself = {"alone forward": lambda: forward(True), "alone both": both_by_itself}
    return {**medians(over_trie, rounds, clock), **medians(by_itself, max(1, rounds // 10), clock)}


def print_sharing(arguments: argparse.Namespace, clock: Callable[[], float]) -> None:
    vocab_size, length, width = arguments.vocab_size, arguments.neural_length, arguments.width
    print(f"\nV = {vocab_size}, T = {length}, d = {width} (Transformer: 4 heads, 2 layers), rank {width // 4}")
    print("milliseconds over the trie, microseconds for each prefix, and how many times as long it takes by itself")
    print(f"{'eos':>4} {'policy':>18} {'N':>9} {'prefixes':>9} {'f':>15} {'f+b':>15} {'alone f':>9} {'alone f+b':>9}")
    for eos in (None, vocab_size // 2):
        space = SequenceSpace(vocab_size, length, eos)
        generator = torch.Generator().manual_seed(0)
        for policy in (
            LowRankPolicy(space, width // 4, generator=generator),
            GRUPolicy(space, width, generator=generator),
            TransformerPolicy(space, width, 4, 2, generator=generator),
        ):
            seconds = measure_sharing(policy, arguments.rounds, clock)
            prefixes = sum(space.n_live**t for t in range(length))
            cells = [
                f"{1e3 * seconds[name]:.1f} ({1e6 * seconds[name] / prefixes:.1f})".rjust(15)
                for name in ("forward", "both")
            ]
            cells += [f"{seconds[f'alone {name}'] / seconds[name]:.1f}x".rjust(9) for name in ("forward", "both")]
            print(
                f"{'-' if eos is None else eos:>4} {type(policy).__name__:>18} {space.size:>9,} {prefixes:>9,}",
                *cells,
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=8)
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--neural-length", type=int, default=5, help="T of the policies that compute")
    parser.add_argument("--width", type=int, default=32, help="of the policies that compute; a multiple of 4")
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
    print_sharing(arguments, clock)


if __name__ == "__main__":
    main()
