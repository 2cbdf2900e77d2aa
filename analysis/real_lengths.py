"""What holds at lengths that cannot be enumerated: which modes are sought, what reward costs, what candidates see.

Rewards that an automaton computes, over four tokens.

1. Two planted phrases, uniform reference. The phrase that occurs first decides which of them pays, at every occurrence:
   pi* has two modes, however long the completions. k-gram policies that share their table over positions: the
   closed-form minimiser of KL(pi*||pi_theta), and the best minimiser of KL(pi_theta||pi*) that descent on the
   differentiable recursion finds from three starts, with its gradient.
2. A bigram reference, and one phrase that pays at every occurrence: reward against divergence from the reference, for
   the optimal policy, best of n and k-gram policies, all exact.
3. The same phrase, at temperatures that keep the divergence per token fixed: the effective sample size of candidates
   from the reference, the exactly expected EXO-rw and DPO-rw losses of K of them beside their limits, the K that
   brings the loss within a share of its limit; and what self-normalised sampling believes of log Z and of both
   divergences of a bigram policy, with its intervals, and how often the interval of log Z holds it.

Everything but these estimates is exact, up to the optimisation in 1. ``python -m analysis.real_lengths --help`` lists
the settings.
"""

import bisect
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from analysis import runner
from exo_toy import automata
from exo_toy.automata import KGramModel, OptimalPolicy, RewardAutomaton, RewardDistribution
from exo_toy.candidates import compare, draw_candidates
from exo_toy.estimators import snis_log_normalizer
from exo_toy.finite_k import expected_dpo_rw_loss, expected_exo_rw_loss
from exo_toy.spaces import SequenceSpace

VOCAB_SIZE = 4
# Exchanging tokens turns one into the other: under a uniform reference neither has an advantage at any length.
PHRASES = ((0, 1, 2), (3, 2, 1))
# Where descent begins: nearest to what pi* would be if both phrases paid alike, or one alone.
STARTS = ("both", "first", "second")
ESTIMATES = ("log_z", "kl_policy_to_optimal", "kl_optimal_to_policy")
# K of the groups in which candidates are drawn.
GROUP = 64
# Candidates beyond 2 to this are not asked for.
MOST_DOUBLINGS = 60


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the reported run.

    ``planted_lengths`` increase, and ``iterations`` are those of descent at each; ``bonus`` is what an occurrence pays
    in units of beta = 1, ``head_start`` what deciding for the first phrase does; ``divergences`` are the fixed
    KL(pi*||pi_ref) per token, in nats; ``share`` the bias that is small enough, relative to the limit. Self-normalised
    estimates are made once from ``snis_samples``, and that of log Z ``snis_repeats`` times for the interval's coverage.
    """

    bonus: float = 3.0
    head_start: float = 0.4
    planted_lengths: tuple[int, ...] = (64, 512)
    orders: tuple[int, ...] = (0, 1, 2)
    iterations: tuple[int, ...] = (200, 200)
    frontier_lengths: tuple[int, ...] = (64, 512)
    betas: tuple[float, ...] = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0, 2.0, 5.0)
    best_of: tuple[int, ...] = (1, 2, 4, 16, 64, 256, 1024, 4096)
    frontier_orders: tuple[int, ...] = (1, 2)
    lengths: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    divergences: tuple[float, ...] = (0.01, 0.03)
    n_candidates: tuple[int, ...] = (2, 8, 64, 1024, 1048576)
    share: float = 0.1
    snis_samples: int = 4096
    snis_repeats: int = 1000
    seed: int = 0


PRESETS = {
    "quick": Config(
        planted_lengths=(64,),
        orders=(1,),
        iterations=(8,),
        frontier_lengths=(64,),
        betas=(0.3, 0.5, 1.0),
        frontier_orders=(1,),
        lengths=(16, 64),
        divergences=(0.03,),
        n_candidates=(2, 64),
        snis_samples=256,
        snis_repeats=200,
    ),
    "default": Config(
        planted_lengths=(64,),
        orders=(1, 2),
        iterations=(30,),
        frontier_lengths=(64,),
        betas=(0.2, 0.3, 0.5, 1.0, 2.0),
        frontier_orders=(1,),
        lengths=(16, 64, 256),
        divergences=(0.03,),
        n_candidates=(2, 64, 1024),
        snis_samples=1024,
        snis_repeats=400,
    ),
    "full": Config(),
}


def run(config: Config) -> runner.Result:
    """Evaluate every case; numbers for the claim and the figure."""
    planted_cases = [
        {"lengths": config.planted_lengths, "order": order, "start": start, "bonus": config.bonus,
         "head_start": config.head_start, "iterations": config.iterations}
        for order in reversed(config.orders)
        for start in STARTS
    ]  # fmt: skip
    frontier_cases = [
        {"length": length, "betas": config.betas, "best_of": config.best_of, "orders": config.frontier_orders,
         "seed": config.seed}
        for length in config.frontier_lengths
    ]  # fmt: skip
    candidate_cases = [
        {"length": length, "divergence": divergence, "n_candidates": config.n_candidates, "share": config.share,
         "snis_samples": config.snis_samples, "snis_repeats": config.snis_repeats, "seed": config.seed}
        for length in config.lengths
        for divergence in config.divergences
    ]  # fmt: skip
    return runner.Result(
        {
            "planted": best_of_starts([case for found in runner.map_cases(planted, planted_cases) for case in found]),
            "frontier": runner.map_cases(frontier, frontier_cases),
            "candidates": runner.map_cases(candidates, candidate_cases),
        },
        {},
    )


def reference(length: int, seed: int) -> KGramModel:
    """A bigram model whose logits are standard normal draws, the same at every length."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 1, VOCAB_SIZE), (1, VOCAB_SIZE, VOCAB_SIZE))
    tables = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return KGramModel(SequenceSpace(VOCAB_SIZE, length), 1, tables)


@functools.cache
def phrases(bonus: tuple[float, float], head_start: tuple[float, float]) -> RewardAutomaton:
    """Whichever phrase occurs first pays at every occurrence, and a head start at that one; then the other does not."""

    def step(state: tuple[int | None, tuple[int, ...]], token: int) -> tuple[Any, float]:
        decided, recent = state
        recent = (*recent, token)
        occurs = next((i for i, phrase in enumerate(PHRASES) if recent == phrase), None)
        first = decided is None and occurs is not None
        decided = occurs if first else decided
        earned = 0.0
        if occurs is not None and occurs == decided:
            earned = bonus[occurs] + (head_start[occurs] if first else 0.0)
        return (decided, recent[-2:]), earned

    return automata.minimise(automata.from_function(step, VOCAB_SIZE, (None, ()), max_states=99))


def paying(*, bonus: float, head_start: float) -> RewardAutomaton:
    """The reward with two modes."""
    return phrases((bonus, bonus), (head_start, 0.0))


def which() -> RewardAutomaton:
    """The mode that a completion is in: 0 where no phrase occurs, 1 for the first, 2 for the second."""
    return phrases((0.0, 0.0), (1.0, 2.0))


def uniform(length: int) -> KGramModel:
    """All completions alike."""
    table = torch.zeros(1, 1, VOCAB_SIZE, dtype=torch.float64)
    return KGramModel(SequenceSpace(VOCAB_SIZE, length), 0, (table,))


def planted(
    *,
    lengths: tuple[int, ...],
    order: int,
    start: str,
    bonus: float,
    head_start: float,
    iterations: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Both minimisers among k-gram policies of an order whose positions share a table, at each length.

    Descent begins at one start, at further lengths from where it ended at the one before.
    """
    automaton, found = paying(bonus=bonus, head_start=head_start), []
    only = {"both": (bonus, bonus), "first": (bonus, 0.0), "second": (0.0, bonus)}[start]
    policy = OptimalPolicy(uniform(lengths[0]), phrases(only, (0.0, 0.0)), beta=1.0)
    tables = policy.closest_kgram(order, homogeneous=True).logits
    for length, most in zip(lengths, iterations, strict=True):
        ref = uniform(length)
        closest = OptimalPolicy(ref, automaton, beta=1.0).closest_kgram(order, homogeneous=True)
        sought, gradient = descend(KGramModel(ref.space, order, tables), ref, automaton, most)
        tables = sought.logits
        found.append(
            {
                "length": length,
                "order": order,
                "start": start,
                "log_z": automata.log_partition(ref, automaton, beta=1.0).item(),
                "optimal": {
                    "modes": modes_of_optimal(ref, automaton),
                    "expected_reward": automata.optimal_reward_moments(ref, automaton, beta=1.0).mean.item(),
                    "kl_to_reference": automata.kl_optimal_to_policy(ref, ref, automaton, beta=1.0).item(),
                },
                "optimal_to_policy": _measured(closest, ref, automaton),
                "policy_to_optimal": _measured(sought, ref, automaton),
                "gradient": gradient,
            }
        )
    return found


def best_of_starts(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each length and order the lowest KL(pi_theta||pi*) that was found, with those of all starts."""
    best = []
    for length, order in dict.fromkeys((case["length"], case["order"]) for case in cases):
        mine = [case for case in cases if (case["length"], case["order"]) == (length, order)]
        values = {case["start"]: case["policy_to_optimal"]["kl_policy_to_optimal"] for case in mine}
        lowest = min(mine, key=lambda case: values[case["start"]])
        best.append({**lowest, "start_values": values})
    return best


def modes_of_optimal(ref: KGramModel, automaton: RewardAutomaton) -> list[float]:
    """Probability of either mode, and of neither, under pi* at beta = 1: what log Z loses with a mode forbidden."""
    log_z = automata.log_partition(ref, automaton, beta=1.0)
    shares = []
    for forbidden in ((-math.inf, -math.inf), (0.0, -math.inf), (-math.inf, 0.0)):
        left = automata.log_partition(ref, automaton + phrases((0.0, 0.0), forbidden), beta=1.0)
        shares.append((left - log_z).exp().item())
    return [shares[0], shares[1] - shares[0], shares[2] - shares[0]]


def descend(
    start: KGramModel, ref: KGramModel, automaton: RewardAutomaton, iterations: int
) -> tuple[KGramModel, float]:
    """L-BFGS on KL(pi_theta||pi*) from a model: where it ended, and the gradient's largest entry there."""
    shapes = [table.shape for table in start.logits]
    # Zero probabilities have no way back: a start gives them a little.
    logs = [(0.999 * table.exp() + 0.001 / VOCAB_SIZE).log() for table in start.log_tables]

    def model(vector: Tensor) -> KGramModel:
        parts = vector.split([shape.numel() for shape in shapes])
        tables = tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        return KGramModel(start.space, start.order, tables)

    def value_and_gradient(vector: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.from_numpy(vector).requires_grad_()
        value = automata.kl_policy_to_optimal(model(theta), ref, automaton, beta=1.0).sum()
        (gradient,) = torch.autograd.grad(value, theta)
        return value.item(), gradient.numpy()

    vector = torch.cat([table.flatten() for table in logs]).numpy()
    found = scipy.optimize.minimize(
        value_and_gradient, vector, jac=True, method="L-BFGS-B", options={"maxiter": iterations, "gtol": 1e-7}
    )
    return model(torch.from_numpy(found.x)), float(np.abs(found.jac).max())


def _measured(pi: KGramModel, ref: KGramModel, automaton: RewardAutomaton) -> dict[str, Any]:
    """Both divergences of a policy, what it earns, and the modes' probabilities."""
    modes = automata.reward_distribution(pi, which()).log_probs[0].exp().tolist()
    return {
        "kl_policy_to_optimal": automata.kl_policy_to_optimal(pi, ref, automaton, beta=1.0).item(),
        "kl_optimal_to_policy": automata.kl_optimal_to_policy(pi, ref, automaton, beta=1.0).item(),
        "kl_to_reference": automata.kl_divergence(pi, ref).item(),
        "expected_reward": automata.reward_moments(pi, automaton).mean.item(),
        "modes": modes,
    }


def occurrences() -> RewardAutomaton:
    """1 for every occurrence of the first phrase."""
    return automata.from_keywords({PHRASES[0]: 1.0}, VOCAB_SIZE)


def frontier(
    *, length: int, betas: tuple[float, ...], best_of: tuple[int, ...], orders: tuple[int, ...], seed: int
) -> dict[str, Any]:
    """Expected reward and KL from the reference of pi*_beta, best of n, and the k-gram policies nearest to pi*_beta."""
    ref, automaton = reference(length, seed), occurrences()
    own = automata.reward_distribution(ref, automaton)
    optimal, differences = [], []
    kgrams: dict[str, list[list[float]]] = {str(order): [] for order in orders}
    for beta in betas:
        tilted = own.optimal(beta=beta)
        moments = automata.optimal_reward_moments(ref, automaton, beta=beta)
        kl = automata.kl_optimal_to_policy(ref, ref, automaton, beta=beta)
        optimal.append([kl.item(), moments.mean.item(), moments.variance.item()])
        differences += [abs(tilted.mean() / moments.mean - 1).item(), abs(tilted.kl_to(own) / kl - 1).item()]
        policy = OptimalPolicy(ref, automaton, beta=beta)
        for order in orders:
            pi = policy.closest_kgram(order, homogeneous=True)
            mean = automata.reward_moments(pi, automaton).mean
            kgrams[str(order)].append([automata.kl_divergence(pi, ref).item(), mean.item()])
    drawn = [own.best_of(n) for n in best_of]
    return {
        "length": length,
        "reference": [own.mean().item(), own.variance().item()],
        "optimal": optimal,
        "best_of_n": [[each.kl_to(own).item(), each.mean().item()] for each in drawn],
        "kgrams": kgrams,
        # The recursions and the distribution of the reward are two ways to the same numbers.
        "largest_difference": max(differences),
    }


def candidates(
    *,
    length: int,
    divergence: float,
    n_candidates: tuple[int, ...],
    share: float,
    snis_samples: int,
    snis_repeats: int,
    seed: int,
) -> dict[str, Any]:
    """What K candidates from the reference show of a policy halfway to pi*, in temperature, at a divergence per token.

    The policy is pi*_{2 beta}, so that its log ratio is a function of the reward, and the losses' expectations are
    those over the reward's distribution. Self-normalised estimates are of the bigram policy nearest to it.
    """
    ref, automaton = reference(length, seed), occurrences()
    own = automata.reward_distribution(ref, automaton)
    beta = temperature(own, divergence * length)
    target, policy = own.optimal(beta=beta), own.optimal(beta=2 * beta)
    tables = (policy.log_probs[0], own.log_probs[0], own.values)
    log_ratio = (policy.log_probs - own.log_probs)[0].nan_to_num(nan=0.0)
    limits = {"exo": policy.kl_to(target).item(), "dpo": -(target.log_probs[0].exp() * log_ratio).sum().item()}

    def exo(k: int) -> float:
        return expected_exo_rw_loss(*tables, k=k, beta_pi=1.0, beta_r=beta).item()

    def dpo(k: int) -> float:
        # Less log K, so that it has a limit.
        return expected_dpo_rw_loss(*tables, k=k, beta_pi=1.0, beta_r=beta).item() - math.log(k)

    by_k = {str(k): {"exo": exo(k), "dpo": dpo(k)} for k in n_candidates}
    needed = {name: doublings(loss, limits[name], share) for name, loss in (("exo", exo), ("dpo", dpo))}
    closest = OptimalPolicy(ref, automaton, beta=2 * beta).closest_kgram(1, homogeneous=True)
    k = min(snis_samples, GROUP)
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = draw_candidates(closest, ref, automaton, groups=snis_samples // k, k=k, generator=generator)
    compared = compare(closest, ref, automaton, drawn, beta_pi=1, beta_r=beta)
    log_z = automata.log_partition(ref, automaton, beta=beta).item()
    return {
        "length": length,
        "divergence": divergence,
        "beta": beta,
        "log_z": log_z,
        # E_ref[(pi/pi_ref)^2] of an optimal policy is Z at half its temperature over the square of Z.
        "log_ess_share": {
            "optimal": 2 * log_z - automata.log_partition(ref, automaton, beta=beta / 2).item(),
            "policy": 2 * automata.log_partition(ref, automaton, beta=2 * beta).item() - log_z,
        },
        "limits": limits,
        "losses": by_k,
        "doublings_needed": needed,
        # Value, interval and exact answer.
        "estimates": {name: [x.item() for x in getattr(compared, name)] for name in ESTIMATES},
        "coverage": coverage(own, log_z, beta=beta, samples=snis_samples, repeats=snis_repeats, generator=generator),
    }


def coverage(
    own: RewardDistribution, log_z: float, *, beta: float, samples: int, repeats: int, generator: torch.Generator
) -> list[float]:
    """How often the 95 % interval of self-normalised sampling holds log Z: a share, and its own interval (Wilson's).

    The weights are a function of the reward, which is drawn from its exact distribution.
    """
    place = torch.multinomial(own.log_probs[0].exp(), repeats * samples, replacement=True, generator=generator)
    low, high = snis_log_normalizer(own.values[place].view(repeats, samples) / beta).interval(level=0.95)
    share = ((low <= log_z) & (log_z <= high)).double().mean().item()
    return [share, *wilson(share, repeats)]


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share of n draws."""
    z = NormalDist().inv_cdf(0.975)
    center, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return (center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)


def temperature(own: RewardDistribution, divergence: float) -> float:
    """The beta at which the optimal policy is a given KL from the reference."""

    def excess(log_beta: float) -> float:
        return own.optimal(beta=math.exp(log_beta)).kl_to(own).item() - divergence

    return math.exp(scipy.optimize.brentq(excess, math.log(0.02), math.log(1e3), xtol=1e-14))


def doublings(loss: Callable[[int], float], limit: float, share: float) -> float:
    """The least log2 K, a whole number, from which a loss that is 0 at K = 1 is within a share of its limit."""

    def is_near(log2_k: int) -> bool:
        return abs(loss(2**log2_k) - limit) <= share * abs(limit)

    if not is_near(MOST_DOUBLINGS):
        return math.inf
    return float(bisect.bisect_left(range(MOST_DOUBLINGS), True, key=is_near))


if __name__ == "__main__":
    runner.main("real_lengths")
