"""What the recursion over contexts and states costs, against its matrix products: ``python -m benchmarks.automata``.

The floor is the time of T products of S by V entries with V by V, alone. Value and gradient (in the logits, the rewards
and the final rewards) of log Z, and both divergences, take turns with it in one process; medians over the rounds,
on one thread. A divergence takes the recursion of log Z and one or two more, under the policy or under pi*. A counter
of many states, each with two successors, is set against its own products at a tenth of the length: transitions are
looked up, so that a sparse automaton costs what its S rows do, not S times S.
"""

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.policies import medians
from exo_toy.automata import RewardAutomaton
from exo_toy.automata import measures as exact
from exo_toy.automata.chain import KGramModel
from exo_toy.spaces import SequenceSpace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--states", type=int, default=8)
    parser.add_argument("--counter", type=int, default=1000, help="states of the counter")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wall", action="store_true", help="wall time rather than that of the processor")
    config = parser.parse_args()
    torch.set_num_threads(1)
    n_vocab, n_states = config.vocab_size, config.states
    space, generator = SequenceSpace(n_vocab, config.length), torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    ref, pi = ([normal(1, 1, n_vocab), normal(1, n_vocab, n_vocab)] for _ in range(2))
    rewards, final = normal(n_states, n_vocab), normal(n_states)
    transitions = torch.randint(n_states, (n_states, n_vocab), generator=generator)
    automaton = RewardAutomaton(transitions, rewards, final)
    table, rows = torch.rand(n_vocab, n_vocab).double(), torch.rand(n_states, n_vocab).double()

    state, token = torch.arange(config.counter).unsqueeze(1), torch.arange(n_vocab)
    counter_rewards, counter_final = normal(config.counter, n_vocab), normal(config.counter)
    counter = RewardAutomaton((state + token % 2) % config.counter, counter_rewards, counter_final)
    shorter = SequenceSpace(n_vocab, max(2, config.length // 10))
    many_rows = torch.rand(config.counter, n_vocab).double()

    def products() -> None:
        for _ in range(config.length):
            rows @ table.mT

    def log_z() -> torch.Tensor:
        return exact.log_partition(KGramModel(space, 1, tuple(ref)), automaton, beta=1.0).sum()

    def counter_products() -> None:
        for _ in range(shorter.length):
            many_rows @ table.mT

    def counter_log_z() -> torch.Tensor:
        return exact.log_partition(KGramModel(shorter, 1, tuple(ref)), counter, beta=1.0).sum()

    def to_optimal() -> torch.Tensor:
        models = KGramModel(space, 1, tuple(pi)), KGramModel(space, 1, tuple(ref))
        return exact.kl_policy_to_optimal(*models, automaton, beta=1.0).sum()

    def from_optimal() -> torch.Tensor:
        models = KGramModel(space, 1, tuple(pi)), KGramModel(space, 1, tuple(ref))
        return exact.kl_optimal_to_policy(*models, automaton, beta=1.0).sum()

    runs: dict[str, Callable[[], object]] = {
        "products alone": products,
        "log Z": torch.no_grad()(log_z),
        "log Z, gradient": lambda: torch.autograd.grad(log_z(), [*ref, rewards, final]),
        "KL(pi || pi*)": torch.no_grad()(to_optimal),
        "KL(pi || pi*), gradient": lambda: torch.autograd.grad(to_optimal(), pi),
        "KL(pi* || pi)": torch.no_grad()(from_optimal),
        "KL(pi* || pi), gradient": lambda: torch.autograd.grad(from_optimal(), pi),
        "counter: products alone": counter_products,
        "counter: log Z": torch.no_grad()(counter_log_z),
        "counter: log Z, gradient": lambda: torch.autograd.grad(
            counter_log_z(), [*ref, counter_rewards, counter_final]
        ),
    }
    times = medians(runs, config.rounds, clock=time.perf_counter if config.wall else time.process_time)
    for name, seconds in times.items():
        floor = times["counter: products alone" if name.startswith("counter") else "products alone"]
        print(f"{name:26} {1e3 * seconds:9.1f} ms {seconds / floor:7.2f} times the products")


if __name__ == "__main__":
    main()
