"""Where the losses at finite K end, and which of them gets more on the way: EXO-rw against DPO-rw at equal K.

1. Full table: the minimisers of both exactly expected losses, which are the optimal policy at every K.
2. Limited capacity (k-gram policies): the minimisers of the expected losses at K candidates, how far they are from the
   minimisers of the divergences that the losses tend to, and from which K on they are near.
3. The objective at those minimisers, loss against loss, over K and temperature.
4. The expected reward along the gradient flow of each expected loss from the reference, where both policies stand at
   equal KL from it, over K and that distance.

Three worlds: planted modes under a uniform reference; reviews, and independent random rewards, both under a reference
whose tokens are independent but not uniform, so that every k-gram policy can start there. Temperatures are in units of
the reward's standard deviation under the reference. Nothing is sampled.
``python -m analysis.fixed_points --help`` lists the settings.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from analysis import runner
from analysis.mode_seeking import Problem, add_distinct, certified, describe, exact_ess_share, random_policy, two_modes
from exo_toy import laplace, rewards
from exo_toy.divergences import kl_divergence, total_variation
from exo_toy.evaluation import frontier
from exo_toy.finite_k import expected_dpo_rw_loss, expected_exo_rw_loss
from exo_toy.logspace import expectation
from exo_toy.policies import KGramPolicy, TabularPolicy, closest_kgram
from exo_toy.reviews import ReviewWorld
from exo_toy.spaces import SequenceSpace
from exo_toy.targets import optimal_policy
from exo_toy.training import Optimum, minimize
from exo_toy.training.flow import gradient_flow, natural_gradient, squared_length

LOSSES = {"exo": expected_exo_rw_loss, "dpo": expected_dpo_rw_loss}
# What each loss tends to as K grows, as the problem measures it.
LIMITS = {"exo": "kl_policy_to_optimal", "dpo": "kl_optimal_to_policy"}
# Rounding of an entry of an expected gradient, relative to its largest term: quadrature against brute force.
GRADIENT_ERROR = 5e-13
# From the first K at which the excess over the limit's minimum stays below this share of it.
NEAR = 0.1
MOST_ITERATIONS = 2000
# How sharply a start prefers a completion, in nats per token that agrees with it.
PULL = 2.0


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the reported run. Temperatures are in units of the reward's standard deviation."""

    table_problems: int = 6
    table_ks: tuple[int, ...] = (2, 4, 8, 64, 1024)
    planted_length: int = 6
    planted_beta: float = 0.5
    planted_ks: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 256, 1024, 4096)
    planted_orders: tuple[int, ...] = (0,)
    worlds: tuple[str, ...] = ("planted", "reviews", "random")
    orders: tuple[int, ...] = (0, 1, 2)
    temperatures: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0)
    ks: tuple[int, ...] = (2, 4, 8, 16, 64, 256, 1024, 4096)
    iterations: int = 300
    path_temperatures: tuple[float, ...] = (0.25, 1.0)
    path_ks: tuple[int, ...] = (2, 4, 16, 64)
    fractions: tuple[float, ...] = (0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    natural_orders: tuple[int, ...] = (1,)
    random_starts: int = 1
    rtol: float = 1e-6
    # Shares of a gain that differ by no more count as equal; solver_error has to stay below.
    equal: float = 1e-4
    seed: int = 0


# fmt: off
PRESETS = {
    "quick": Config(
        table_problems=1, table_ks=(2, 8), planted_length=2, planted_ks=(2, 64), worlds=("random",), orders=(0,),
        temperatures=(0.5, 1.0), ks=(2, 4, 64), iterations=60, path_temperatures=(0.5,), path_ks=(4,),
        fractions=(0.1, 0.3), natural_orders=(0,), random_starts=0, rtol=1e-4,
    ),
    "default": Config(
        table_problems=2, table_ks=(2, 8, 64), planted_length=4, planted_ks=(2, 32, 1024), worlds=("planted", "random"),
        orders=(0,), temperatures=(0.5, 1.0), ks=(2, 4, 256), iterations=100, path_temperatures=(0.5,),
        path_ks=(4,), fractions=(0.01, 0.1, 0.3, 0.6), natural_orders=(), random_starts=0, rtol=1e-5,
    ),
    "full": Config(),
}
# fmt: on


def run(config: Config) -> runner.Result:
    """Evaluate every case; all of it is numbers."""
    table_cases = [
        {"k": k, "loss": loss, "seed": config.seed + seed}
        for seed in range(config.table_problems)
        for k in config.table_ks
        for loss in LOSSES
    ]
    tables = runner.map_cases(full_table, table_cases)

    starts = {"random_starts": config.random_starts, "seed": config.seed}
    world = f"planted{config.planted_length}"
    planted = [
        {"world": world, "temperature": config.planted_beta / reward_spread(world), "order": order, "loss": loss}
        for order in config.planted_orders
        for loss in LOSSES
    ]
    grid = [
        {"world": world, "temperature": temperature, "order": order, "loss": loss}
        for world, order in limited(config)
        for temperature in config.temperatures
        for loss in LOSSES
    ]
    cases = [{**case, **starts, "ks": list(config.planted_ks), "iterations": None} for case in planted]
    cases += [{**case, **starts, "ks": list(config.ks), "iterations": config.iterations} for case in grid]
    found = runner.map_cases(fixed_points, cases)

    metrics = [("euclidean", *place) for place in limited(config)]
    metrics += [("natural", config.worlds[0], order) for order in config.natural_orders]
    following = {"fractions": list(config.fractions), "rtol": config.rtol}
    path_cases = [
        {"metric": metric, "world": world, "order": order, "temperature": t, "k": k, "loss": loss, **following}
        for metric, world, order in metrics
        for t in config.path_temperatures
        for k in config.path_ks
        for loss in LOSSES
    ]
    paths = runner.map_cases(path, path_cases)
    # Again, a hundred times as accurately: what is left of a difference is the solver's.
    checked = [i for i, case in enumerate(path_cases) if case["k"] == config.path_ks[-1] and case["order"] == 0]
    again = runner.map_cases(path, [{**path_cases[i], "rtol": config.rtol / 100} for i in checked])
    numbers = {
        "tables": tables,
        "planted": found[: len(planted)],
        "grid": found[len(planted) :],
        "paths": paths,
        "solver_error": _largest_difference([paths[i] for i in checked], again),
    }
    return runner.Result(numbers, {})


def limited(config: Config) -> list[tuple[str, int]]:
    """Worlds and orders of policies that cannot hold every distribution, the longest computation first."""
    pairs = [(world, order) for order in reversed(config.orders) for world in config.worlds]
    return [(world, order) for world, order in pairs if order < problem(world, 1.0).space.length - 1]


def _largest_difference(paths: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """Of the shares of two runs of the same paths, where both came as far; NaN where none did."""
    pairs = [zip(one["shares"], other["shares"], strict=True) for one, other in zip(paths, others, strict=True)]
    return max((abs(a - b) for pair in pairs for a, b in pair if not math.isnan(a - b)), default=math.nan)


def problem(world: str, beta: float) -> Problem:
    """A world by its name: "planted6" is the one of planted modes at length 6."""
    if world.startswith("planted"):
        length = int(world.removeprefix("planted") or 4)
        return two_modes(vocab_size=4, length=length, second_weight=0.8, width=1 / 1.5, beta=beta)
    if world == "reviews":
        reviews = ReviewWorld(length=3)
        space, reward = reviews.space, reviews.oracle_reward()[0]
        log_ref = closest_kgram(space, reviews.log_human()[0], 0).log_probs().detach()[0]
    else:
        space, generator = SequenceSpace(4, 3), torch.Generator().manual_seed(1)
        reward = rewards.random(space, scale=1.0, generator=generator)
        log_ref = random_policy(space, 0, generator).log_probs().detach()[0]
    log_pi_star, _ = optimal_policy(log_ref, reward, beta=beta)
    return Problem(space, log_ref, reward, log_pi_star, space.tokens()[log_pi_star.topk(2).indices], beta)


def reward_spread(world: str) -> float:
    """Standard deviation of the reward under the reference."""
    plain = problem(world, 1.0)
    mean = expectation(plain.log_ref, plain.reward)
    return math.sqrt(expectation(plain.log_ref, (plain.reward - mean) ** 2).item())


def expected(name: str, given: Problem, k: int) -> Callable[[Tensor], Tensor]:
    """The exactly expected loss at K candidates, of [1, N]: what :mod:`exo_toy.finite_k` gives.

    What does not depend on the policy is integrated only once: of EXO-rw's a constant, of DPO-rw's the share of the
    target that each completion expects to get.
    """
    log_ref, log_v = given.log_ref, given.reward / given.beta
    if name == "exo":
        constant = laplace.expected_log_sum(log_v, log_ref, k=k)

        def exo(log_pi: Tensor) -> Tensor:
            log_w = log_pi[0] - log_ref
            log_sum, h = laplace.expected_log_sum_and_ratio(log_w, log_w - log_v, log_ref, k=k)
            return h - log_sum + constant

        return exo
    zero = torch.zeros_like(log_ref, requires_grad=True)
    (share,) = torch.autograd.grad(laplace.expected_log_sum_and_ratio(log_v, zero, log_ref, k=k)[1], zero)

    def dpo(log_pi: Tensor) -> Tensor:
        log_w = log_pi[0] - log_ref
        return laplace.expected_log_sum(log_w, log_ref, k=k) - (share * log_w).sum()

    return dpo


def full_table(*, k: int, loss: str, seed: int) -> dict[str, Any]:
    """The minimiser found for a full table, its distance to the optimal policy, and how near it had to come.

    To first order a gradient g leaves the logits off by H^+ g, and the policy by half of that in total variation.
    """
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(3, 9, (), generator=generator))
    beta, split = (math.exp(x) for x in torch.empty(2).uniform_(-1.5, 1.0, generator=generator).tolist())
    beta_pi, beta_r = math.sqrt(beta * split), math.sqrt(beta / split)
    space = SequenceSpace(size, 1)
    log_ref = torch.randn(size, generator=generator, dtype=torch.float64).log_softmax(-1)
    reward = rewards.random(space, scale=1.0, generator=generator)
    log_pi_star, _ = optimal_policy(log_ref, reward, beta=beta_pi * beta_r)
    policy = TabularPolicy(space)

    def objective(log_pi: Tensor) -> Tensor:
        return LOSSES[loss](log_pi, log_ref, reward, k=k, beta_pi=beta_pi, beta_r=beta_r).mean()

    optimum = minimize(policy, objective)
    log_pi = policy.log_probs().detach()[0]
    hessian = torch.autograd.functional.hessian(lambda logits: objective(logits.log_softmax(-1)), log_pi_star[None])
    curvatures = torch.linalg.eigvalsh(hessian.reshape(size, size))
    # The least is the direction in which all logits shift together.
    tolerance = math.sqrt(size) * (optimum.gradient + GRADIENT_ERROR) / 2 / curvatures[1].item()
    return {
        "k": k,
        "loss": loss,
        "size": size,
        "beta_pi": beta_pi,
        "beta_r": beta_r,
        "total_variation": total_variation(log_pi, log_pi_star).item(),
        "kl": kl_divergence(log_pi, log_pi_star).item(),
        "tolerance": tolerance,
        "is_minimum": optimum.is_minimum(),
    }


def fixed_points(
    *, world: str, temperature: float, order: int, loss: str, ks: list[int], iterations: int | None,
    random_starts: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """The best minimiser found of an expected loss at each K, against the minimisers of both divergences.

    The starts are the minimisers of both divergences, the reference, policies near both modes and random ones. Without
    a limit to the ``iterations`` every K has them all and the minimisers are certified; with one, from the second K on
    these are the minimiser at the K before and that of the loss's own limit.
    """
    given = problem(world, temperature * reward_spread(world))
    generator = torch.Generator().manual_seed(seed)
    closest = closest_kgram(given.space, given.log_pi_star, order)
    others = [
        closest_kgram(given.space, given.log_ref, order),
        *(near(given, mode, order) for mode in given.modes),
        *(random_policy(given.space, order, generator) for _ in range(random_starts)),
    ]

    def reverse_kl(log_pi: Tensor) -> Tensor:
        return kl_divergence(log_pi, given.log_pi_star).mean()

    limits = {
        "exo": best(given, order, reverse_kl, map(vector, (closest, *others)), None)[:2],
        "dpo": (vector(closest), closest.log_probs().detach()[0]),
    }
    everywhere, points = [vector(policy) for policy in (closest, *others)], []
    warm = everywhere
    for k in ks:
        starts = [*warm, limits[loss][0], *(everywhere if iterations is None else [])]
        objective = expected(loss, given, k)
        parameters, log_pi, optimum = best(given, order, objective, starts, iterations)
        warm = [parameters]
        distances = {f"distance_{name}": total_variation(log_pi, end).item() for name, (_, end) in limits.items()}
        points.append({"k": k, **given.measure(log_pi), **distances, **describe(optimum)})
    limit = {name: given.measure(log_pi) for name, (_, log_pi) in limits.items()}
    least = limit[loss][LIMITS[loss]]
    excess = [point[LIMITS[loss]] / least - 1 for point in points]
    return {
        "world": world,
        "order": order,
        "beta": given.beta,
        "temperature": temperature,
        "loss": loss,
        "points": points,
        "limits": limit,
        "excess": excess,
        "near_from": near_from(ks, excess),
        "optimal": given.measure(given.log_pi_star),
        "reference": given.measure(given.log_ref),
        "ess_optimal": exact_ess_share(given.log_pi_star, given.log_ref),
    }


def near_from(ks: Iterable[int], excess: Iterable[float]) -> float:
    """The first K from which on the excess stays below its bound; infinite if it does not at the last."""
    far = [value >= NEAR for value in excess]
    after = len(far) - far[::-1].index(True) if any(far) else 0
    return float([*ks, math.inf][after])


def vector(policy: torch.nn.Module) -> Tensor:
    """A copy of all parameters."""
    return parameters_to_vector(policy.parameters()).detach().clone()


def near(given: Problem, mode: Tensor, order: int) -> KGramPolicy:
    """The reference, pulled towards one completion."""
    agreeing = (given.space.tokens() == mode).sum(-1)
    return closest_kgram(given.space, (given.log_ref + PULL * agreeing).log_softmax(-1), order)


def best(
    given: Problem,
    order: int,
    objective: Callable[[Tensor], Tensor],
    starts: Iterable[Tensor],
    iterations: int | None,
) -> tuple[Tensor, Tensor, Optimum]:
    """Parameters, table and certificate of the lowest minimum reached from any start."""
    optima: list[tuple[Optimum, Tensor]] = []
    for start in starts:
        policy = KGramPolicy(given.space, order)
        vector_to_parameters(start.clone(), policy.parameters())
        optimum = minimize(policy, objective, certify=False, max_iterations=iterations or MOST_ITERATIONS)
        add_distinct(optima, optimum, policy.log_probs().detach()[0])
    lowest, log_pi = min(optima, key=lambda found: found[0].value)
    if iterations is None:
        lowest, log_pi = certified(given.space, order, lowest, objective)
    return lowest.parameters, log_pi, lowest


def path(
    *, metric: str, world: str, order: int, temperature: float, k: int, loss: str, fractions: list[float], rtol: float
) -> dict[str, Any]:
    """The expected reward gained along a loss's gradient flow from the reference, by distance from the reference.

    Distances are shares of KL(pi*||pi_ref). Gains are shares of what the best of all policies gains at that distance;
    at distance 0 both are slopes.
    """
    given = problem(world, temperature * reward_spread(world))
    furthest = kl_divergence(given.log_pi_star, given.log_ref).item()
    levels = [fraction * furthest for fraction in fractions]
    policy = closest_kgram(given.space, given.log_ref, order)
    objective = expected(loss, given, k)
    at_start = first_share(policy, given, objective, metric)
    flow = gradient_flow(
        policy,
        objective,
        lambda log_pi: kl_divergence(log_pi, given.log_ref).mean(),
        levels,
        metric=metric,
        rtol=rtol,
    )
    base = expectation(given.log_ref, given.reward).item()
    shares = []
    for level, parameters in zip(levels, flow.parameters, strict=True):
        vector_to_parameters(parameters.nan_to_num(), policy.parameters())
        gained = expectation(policy.log_probs().detach()[0], given.reward).item() - base
        most = frontier(given.log_ref[None], given.reward[None], kl=level).reward - base
        shares.append(math.nan if parameters.isnan().any() else gained / most)
    return {
        "metric": metric,
        "world": world,
        "order": order,
        "temperature": temperature,
        "k": k,
        "loss": loss,
        "first_share": at_start,
        "shares": shares,
        "furthest": furthest,
        "reached": flow.clock,
        "speed": flow.speed,
    }


def first_share(policy: KGramPolicy, given: Problem, objective: Callable[[Tensor], Tensor], metric: str) -> float:
    r"""The share gained in the limit of no distance: the cosine, under the reference, of r and the change of log pi.

    A step :math:`u` has :math:`\mathrm{KL} \approx \tfrac12 u^T F u` and gains :math:`u^T \nabla E r`; the best
    of all policies gains :math:`\mathrm{sd}(r) \sqrt{2 \mathrm{KL}}`.
    """
    parameters = list(policy.parameters())
    step = list(torch.autograd.grad(objective(policy.log_probs()), parameters))
    if metric == "natural":
        step = natural_gradient(policy, step)
    gain = torch.autograd.grad(expectation(policy.log_probs()[0], given.reward), parameters)
    gained = -sum((u * g).sum().item() for u, g in zip(step, gain, strict=True))
    mean_reward = expectation(given.log_ref, given.reward)
    spread = expectation(given.log_ref, (given.reward - mean_reward) ** 2).item()
    return gained / math.sqrt(squared_length(policy, step) * spread)


if __name__ == "__main__":
    runner.main("fixed_points")
