"""How much an autoregressive policy must remember to hold the optimal policy exactly, and what remembering less costs.

Four rewards: parity and palindrome of binary tokens, two planted modes (all under a uniform reference), and the oracle
reward of the review world under its own writers.

1. At every cut of the completions, at each length and temperature: the rank of the matrix of prefixes by suffixes, the
   states of the smallest deterministic machine, what prefix and suffix tell of each other.
2. The least KL(pi*||pi_theta) of k-gram policies, in closed form and as a sum of conditional informations, and a lower
   bound of it for every machine with a given number of states.
3. The least KL(pi_theta||pi*) of k-gram policies found by minimisation from several starts.
4. GRUs of growing width, trained to minimise KL(pi*||pi_theta) on the enumerated space. What they reach is an upper
   bound of what they can: the optimisation is not certified.

1 and 2 are exact. ``python -m analysis.expressivity --help`` lists the settings.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from analysis import mode_seeking, runner
from exo_toy import expressivity, rewards
from exo_toy.divergences import entropy, kl_divergence
from exo_toy.policies import GRUPolicy, KGramPolicy, closest_kgram
from exo_toy.reviews import OPENINGS, ReviewWorld
from exo_toy.spaces import SequenceSpace
from exo_toy.targets import optimal_policy
from exo_toy.training import minimize
from exo_toy.training.descent import Descent

# A gap this small is rounding; one below CLOSE is closed for any use.
CLOSED, CLOSE = 1e-12, 1e-3


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the reported run.

    ``fitted_*`` are the lengths at which policies are fitted; every fit is at ``beta``.
    """

    bonus: float = 2.0
    second_weight: float = 0.8
    width: float = 1 / 1.5
    openings: tuple[int, ...] = (0, 5)
    beta: float = 0.5
    betas: tuple[float, ...] = (0.25, 0.4, 0.5, 1.0)
    binary_lengths: tuple[int, ...] = (2, 4, 6, 8, 10, 12, 14, 16)
    planted_lengths: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    review_lengths: tuple[int, ...] = (2, 3, 4, 5, 6)
    fitted_binary_lengths: tuple[int, ...] = (4, 6, 8)
    fitted_planted_lengths: tuple[int, ...] = (4,)
    fitted_review_lengths: tuple[int, ...] = (4,)
    kgram_starts: int = 4
    gru_widths: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    gru_starts: int = 8
    adam_steps: int = 500
    learning_rate: float = 0.05
    iterations: int = 1000
    seed: int = 0


PRESETS = {
    "quick": Config(
        openings=(0,),
        betas=(0.5,),
        binary_lengths=(2, 4, 6, 8),
        planted_lengths=(2, 3, 4),
        review_lengths=(2, 3, 4),
        fitted_binary_lengths=(4,),
        fitted_planted_lengths=(3,),
        fitted_review_lengths=(3,),
        kgram_starts=1,
        gru_widths=(1, 4),
        gru_starts=4,
        adam_steps=50,
        iterations=100,
    ),
    "default": Config(
        betas=(0.4, 0.5),
        binary_lengths=(2, 4, 6, 8, 10, 12),
        planted_lengths=(2, 4, 6),
        review_lengths=(2, 3, 4, 5),
        fitted_binary_lengths=(4, 6),
        kgram_starts=2,
        gru_widths=(1, 2, 4, 8),
        adam_steps=300,
        iterations=500,
    ),
    "full": Config(),
}


def run(config: Config) -> runner.Result:
    """Evaluate every case; numbers for the claims, the singular values for the record."""
    shared = {name: getattr(config, name) for name in ("bonus", "second_weight", "width")}
    counted = {
        "parity": config.binary_lengths,
        "palindrome": config.binary_lengths,
        "planted_modes": config.planted_lengths,
        "review": config.review_lengths,
    }
    exact_cases = [
        {"name": name, "length": length, "beta": beta, "opening": opening, **shared}
        for name, lengths in counted.items()
        for length in lengths
        for beta in config.betas
        for opening in (config.openings if name == "review" else (None,))
    ]
    exact = runner.map_cases(exactly, exact_cases)

    fitted = [
        {"name": name, "length": length, "beta": config.beta, "opening": opening, **shared}
        for name, lengths, opening in (
            ("parity", config.fitted_binary_lengths, None),
            ("palindrome", config.fitted_binary_lengths, None),
            ("planted_modes", config.fitted_planted_lengths, None),
            ("review", config.fitted_review_lengths, config.openings[0]),
        )
        for length in lengths
    ]
    kgram_cases = [
        {**case, "order": order, "starts": config.kgram_starts, "seed": config.seed}
        for case in fitted
        for order in range(case["length"])
    ]
    kgrams = runner.map_cases(best_kgram, kgram_cases)

    descent = {"steps": config.adam_steps, "learning_rate": config.learning_rate, "iterations": config.iterations}
    gru_cases = [
        {**case, **descent, "gru_width": width, "starts": config.gru_starts, "seed": config.seed + 1}
        for width in config.gru_widths
        for case in fitted
    ]
    grus = runner.map_cases(best_gru, gru_cases)

    arrays = {}
    for case in exact:
        spectra = case.pop("singular_values")
        if (case["beta"], case["opening"]) in ((config.beta, None), (config.beta, config.openings[0])):
            arrays[f"singular_values.{case['name']}.{case['length']}"] = spectra
    return runner.Result({"exact": exact, "kgrams": kgrams, "grus": grus}, arrays)


@dataclass(frozen=True)
class Target:
    """A space, its reference and the optimal policy [N]."""

    space: SequenceSpace
    log_ref: Tensor
    log_pi_star: Tensor


def target(
    *, name: str, length: int, beta: float, opening: int | None, bonus: float, second_weight: float, width: float
) -> Target:
    """The optimal policy of one of the four rewards; ``opening`` is the review world's prompt."""
    if name == "planted_modes":
        problem = mode_seeking.two_modes(
            vocab_size=4, length=length, second_weight=second_weight, width=width, beta=beta
        )
        return Target(problem.space, problem.log_ref, problem.log_pi_star)
    if name == "review":
        assert opening is not None
        world = ReviewWorld(length=length, openings=(OPENINGS[opening],))
        space, log_ref, reward = world.space, world.log_human()[0], world.oracle_reward()[0]
    else:
        space = SequenceSpace(2, length)
        log_ref = torch.full((space.size,), -math.log(space.size), dtype=torch.float64)
        reward = {"parity": rewards.parity, "palindrome": rewards.palindrome}[name](space, bonus=bonus)
    return Target(space, log_ref, optimal_policy(log_ref, reward, beta=beta)[0])


def exactly(**case: Any) -> dict[str, Any]:
    """Ranks, states, information and gaps in closed form of one target; nothing is optimised."""
    problem = target(**case)
    space, log_p = problem.space, problem.log_pi_star
    hankel = expressivity.hankel_ranks(space, log_p)
    states = expressivity.state_counts(space, log_p)
    orders = range(space.length)
    gaps = [kl_divergence(log_p, _table(closest_kgram(space, log_p, order))).item() for order in orders]
    informations = [expressivity.conditional_mutual_information(space, log_p, order) for order in orders]
    # As many states as any cut has, and every power of two below: what fewer than exact must lose.
    sizes = [2**i for i in range((int(states.max()) - 1).bit_length() + 1)]
    pairs = list(zip(hankel.singular_values, hankel.ranks.tolist(), strict=True))
    return {
        "name": case["name"],
        "length": case["length"],
        "beta": case["beta"],
        "opening": case["opening"],
        "vocab_size": space.vocab_size,
        "ranks": hankel.ranks.tolist(),
        "states": states.tolist(),
        "reference_states": expressivity.state_counts(space, problem.log_ref).tolist(),
        "smallest_kept": min(values[rank - 1].item() for values, rank in pairs),
        "largest_dropped": max([values[rank].item() for values, rank in pairs if rank < len(values)], default=0.0),
        "largest_tolerance": hankel.tolerances.max().item(),
        "information": expressivity.cut_information(space, log_p)[0].tolist(),
        "kgram_gaps": gaps,
        "largest_difference": max(
            abs(gap - information.sum().item()) for gap, information in zip(gaps, informations, strict=True)
        ),
        "closing_order": first_below(gaps, CLOSED),
        "close_order": first_below(gaps, CLOSE),
        "bound_states": sizes,
        "bounds": [expressivity.least_gap(space, log_p, n_states=n).item() for n in sizes],
        "singular_values": _stacked(hankel.singular_values),
    }


def best_kgram(*, order: int, starts: int, seed: int, **case: Any) -> dict[str, Any]:
    """The best minimiser found of KL(pi_theta||pi*), beside the one of KL(pi*||pi_theta)."""
    problem = target(**case)
    objective = partial(_kl_to, problem.log_pi_star)
    closest = closest_kgram(problem.space, problem.log_pi_star, order)
    optimal_to_policy = kl_divergence(problem.log_pi_star, _table(closest)).item()
    policy_to_optimal = kl_divergence(_table(closest), problem.log_pi_star).item()
    generator = torch.Generator().manual_seed(seed)
    randoms = [mode_seeking.random_policy(problem.space, order, generator) for _ in range(starts)]
    values = [minimize(policy, objective, certify=False).value for policy in (closest, *randoms)]
    return {
        "name": case["name"],
        "length": case["length"],
        "order": order,
        "optimal_to_policy": optimal_to_policy,
        "closest_policy_to_optimal": policy_to_optimal,
        "policy_to_optimal": min(values),
        "start_values": values,
    }


def best_gru(
    *,
    gru_width: int,
    starts: int,
    steps: int,
    learning_rate: float,
    iterations: int,
    seed: int,
    **case: Any,
) -> dict[str, Any]:
    """The least KL(pi*||pi_theta) found of a GRU: Adam from many starts side by side, the best of them by L-BFGS."""
    problem = target(**case)
    generator = torch.Generator().manual_seed(seed)
    policies = [GRUPolicy(problem.space, gru_width, generator=generator) for _ in range(starts)]
    by_adam = descend(policies, problem.log_pi_star, steps=steps, learning_rate=learning_rate)
    best = policies[int(by_adam.argmin())]
    # KL(pi*||pi) up to its constant, without the checks of tables: no minimum depends on it.
    negative_entropy, p = -entropy(problem.log_pi_star), problem.log_pi_star.exp()
    found = minimize(
        best, lambda log_pi: negative_entropy - (p * log_pi).sum(), certify=False, max_iterations=iterations
    )
    return {
        "name": case["name"],
        "length": case["length"],
        "width": gru_width,
        "n_parameters": found.parameters.numel(),
        "gap": kl_divergence(problem.log_pi_star, _table(best)).item(),
        "gaps_by_adam": by_adam.tolist(),
    }


def descend(policies: list[GRUPolicy], log_p: Tensor, *, steps: int, learning_rate: float) -> Tensor:
    """Adam on KL(p||pi) of policies of one shape, all at once; sets their parameters, returns their gaps [starts]."""
    stacked, _ = stack_module_state(policies)
    parameters = {name: nn.Parameter(value.detach()) for name, value in stacked.items()}
    one = copy.deepcopy(policies[0]).to("meta")
    negative_entropy, p = -entropy(log_p), log_p.exp()

    def gaps() -> Tensor:
        tables = vmap(lambda given: functional_call(one, given, ()))(parameters)
        return negative_entropy - (tables[:, 0] * p).sum(-1)

    descent = Descent(parameters.values(), steps, learning_rate)
    for _ in range(steps):
        descent.step(gaps().sum())
    with torch.no_grad():
        for i, policy in enumerate(policies):
            for name, parameter in policy.named_parameters():
                parameter.copy_(parameters[name][i])
        return gaps()


def first_below(gaps: list[float], bound: float) -> int:
    """The smallest order whose gap is at most the bound; the full order, T - 1, always is one."""
    return next(order for order, gap in enumerate(gaps) if gap <= bound)


def _stacked(values: tuple[Tensor, ...]) -> np.ndarray:
    """Rows of different lengths as one array, NaN behind their ends."""
    rows = np.full((len(values), max(map(len, values))), np.nan)
    for row, entries in zip(rows, values, strict=True):
        row[: len(entries)] = entries.numpy()
    return rows


def _table(policy: KGramPolicy | GRUPolicy) -> Tensor:
    """The policy's log-probabilities [N]."""
    return policy.log_probs().detach()[0]


def _kl_to(log_q: Tensor, log_p: Tensor) -> Tensor:
    return kl_divergence(log_p, log_q).mean()


if __name__ == "__main__":
    runner.main("expressivity")
