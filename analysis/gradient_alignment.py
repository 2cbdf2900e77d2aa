"""What the expected gradients of EXO-rw and DPO-rw point at, exactly, for K = 2 to 2^20 candidates.

For drawn problems (a k-gram reference, independent normal rewards) and policies at the reference, near it and far from
it, the exact expected gradient of each loss is compared with the gradients of both KL divergences: cosine, relative
error, and the closed-form coefficient c of the bias c/K. Beside the exact curves stands what sampling would have
shown: gradients averaged over as many draws of K candidates as a fixed budget of completions allows.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import runner
from analysis.runner import Result
from exo_toy import finite_k, rewards, theorems
from exo_toy.divergences import kl_divergence
from exo_toy.losses import dpo_rw_loss, exo_rw_loss
from exo_toy.objectives import kl_optimal_to_policy, kl_policy_to_optimal
from exo_toy.policies import KGramPolicy, Policy, TabularPolicy
from exo_toy.spaces import SequenceSpace
from exo_toy.targets import optimal_policy
from exo_toy.theorems import parameter_gradient

LOSSES = ("exo_rw", "dpo_rw")
TARGETS = ("policy_to_optimal", "optimal_to_policy")
OWN_TARGET = dict(zip(LOSSES, TARGETS, strict=True))
POLICY_CLASSES = ("table", "kgram")
DISTANCES = ("reference", "near", "far")
PLACES = tuple(itertools.product(POLICY_CLASSES, DISTANCES))

SAMPLE_LOSS = {"exo_rw": exo_rw_loss, "dpo_rw": dpo_rw_loss}
EXPECTED_LOSS = {"exo_rw": finite_k.expected_exo_rw_loss, "dpo_rw": finite_k.expected_dpo_rw_loss}
COEFFICIENT = {"exo_rw": finite_k.exo_rw_bias_coefficient, "dpo_rw": finite_k.dpo_rw_bias_coefficient}
BIAS_RATE = {"exo_rw": theorems.exo_rw_bias_rate, "dpo_rw": theorems.dpo_rw_bias_rate}
DIVERGENCE = {"policy_to_optimal": kl_policy_to_optimal, "optimal_to_policy": kl_optimal_to_policy}


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the reported run.

    K runs over the powers of two up to ``2**largest_exponent``; slopes are fitted from ``2**fit_from_exponent`` on.
    ``near`` and ``far`` are about the standard deviation of log(policy / reference). The sampled curve averages, for
    each K up to ``2**sampled_largest_exponent``, over ``sampled_completions / K`` draws of K candidates, and that
    ``repetitions`` times; on the first seed's problem, with a full table, far from the reference.
    """

    seed: int = 0
    seeds: int = 48
    vocab_size: int = 4
    length: int = 4
    order: int = 1
    n_prompts: int = 2
    reference_scale: float = 1.0
    reward_scale: float = 1.0
    beta_pi: float = 0.5
    beta_r: float = 0.5
    near: float = 0.5
    far: float = 3.0
    largest_exponent: int = 20
    fit_from_exponent: int = 16
    sampled_completions: int = 2**16
    sampled_largest_exponent: int = 14
    repetitions: int = 200
    rate_exponents: tuple[int, ...] = (6, 10, 14)

    @property
    def betas(self) -> dict[str, Any]:
        """Both temperatures, as keyword arguments."""
        return {"beta_pi": self.beta_pi, "beta_r": self.beta_r}

    @property
    def ks(self) -> list[int]:
        """Numbers of candidates of the exact curves."""
        return [2**exponent for exponent in range(1, self.largest_exponent + 1)]

    @property
    def rate_ks(self) -> list[int]:
        """Numbers of candidates at which the extrapolated bias is compared with its closed form."""
        return [2**exponent for exponent in self.rate_exponents]

    @property
    def sampled_ks(self) -> list[int]:
        """Numbers of candidates of the sampled curves."""
        return [2**exponent for exponent in range(1, self.sampled_largest_exponent + 1)]


PRESETS = {
    "quick": Config(seeds=3, sampled_completions=2**14, sampled_largest_exponent=12, repetitions=20),
    "default": Config(seeds=12, repetitions=60),
    "full": Config(),
}


def run(config: Config) -> Result:
    """Exact curves over all seeds, policy classes and distances, and the sampled ones."""
    settings = asdict(config)
    cases = [
        {"settings": settings, "policy_class": policy_class, "distance": distance, "seed": config.seed + index}
        for policy_class, distance in PLACES
        for index in range(config.seeds)
    ]
    exact = runner.map_cases(exact_case, cases)
    sampled = runner.map_cases(sampled_case, [{"settings": settings, "k": k} for k in config.sampled_ks])

    arrays = {"k": np.array(config.ks), "sampled.k": np.array(config.sampled_ks)}
    for index, place in enumerate(PLACES):
        here = exact[index * config.seeds : (index + 1) * config.seeds]
        arrays |= {f"{'.'.join(place)}.{key}": np.stack([case[key] for case in here]) for key in here[0]}
    arrays |= {f"sampled.{key}": np.stack([case[key] for case in sampled]) for key in sampled[0]}
    return Result(_numbers(config, arrays), arrays)


def _numbers(config: Config, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the claims read, over all cases, and the same for each policy class and distance."""
    numbers: dict[str, Any] = {"largest_k": config.ks[-1], "problems": config.seeds * len(PLACES)}
    for loss in LOSSES:
        places = {place: _of_place(config, arrays, loss, ".".join(place)) for place in PLACES}
        numbers[loss] = {key: _worst(key, [place[key] for place in places.values()]) for key in places[PLACES[0]]}
        numbers[loss] |= {
            policy_class: {distance: places[policy_class, distance] for distance in DISTANCES}
            for policy_class in POLICY_CLASSES
        }
    at_reference = [f"{policy_class}.reference" for policy_class in POLICY_CLASSES]
    numbers["at_reference"] = {
        # The farthest of any K for EXO-rw, which is parallel at all; the nearest for DPO-rw, which is so at none.
        "exo_rw": max(arrays[f"{place}.exo_rw.rescaled_error"].max() for place in at_reference),
        "dpo_rw": max(arrays[f"{place}.dpo_rw.rescaled_error"].max() for place in at_reference),
        "exo_rw_least_cosine": min(arrays[f"{p}.exo_rw.cosine.policy_to_optimal"].min() for p in at_reference),
        "dpo_rw_median_cosine": {
            str(k): np.median([arrays[f"{p}.dpo_rw.cosine.policy_to_optimal"][:, i] for p in at_reference])
            for i, k in enumerate(config.ks)
        },
        # DPO-rw's loss is log K there, for any draw.
        "dpo_rw_largest_loss_bias": max(np.abs(arrays[f"{p}.dpo_rw.loss_bias"]).max() for p in at_reference),
    }
    numbers["median_kl_to_reference"] = {
        policy_class: {
            distance: np.median(arrays[f"{policy_class}.{distance}.kl_to_reference"]) for distance in DISTANCES
        }
        for policy_class in POLICY_CLASSES
    }
    numbers["sampled"] = {
        loss: {
            str(k): {
                "draws": int(arrays["sampled.draws"][i]),
                "median_relative_error": np.median(arrays[f"sampled.{loss}.relative_error"][i]),
                "exact_relative_error": arrays[f"sampled.{loss}.exact_relative_error"][i],
                "squared_distance_over_variance": arrays[f"sampled.{loss}.squared_distance_over_variance"][i],
            }
            for i, k in enumerate(config.sampled_ks)
        }
        for loss in LOSSES
    }
    return numbers


def _of_place(config: Config, arrays: dict[str, np.ndarray], loss: str, place: str) -> dict[str, Any]:
    """The numbers of one loss, policy class and distance: of all seeds, the worst."""
    own, other = TARGETS if loss == "exo_rw" else TARGETS[::-1]
    ks = arrays["k"]
    fitted = ks >= 2**config.fit_from_exponent
    error = arrays[f"{place}.{loss}.relative_error.{own}"]
    bias, coefficient = arrays[f"{place}.{loss}.loss_bias"], arrays[f"{place}.{loss}.loss_coefficient"]
    numbers = {
        "gradient_slope": farthest_from_minus_one(slope(ks[fitted], error[:, fitted])),
        "gradient_error": error[:, -1].max(),
        "gradient_coefficient_error": arrays[f"{place}.{loss}.gradient_coefficient_error"][:, -1].max(),
        "cosine": arrays[f"{place}.{loss}.cosine.{own}"][:, -1].min(),
        "cosine_to_other": arrays[f"{place}.{loss}.cosine.{other}"][:, -1].min(),
        "largest_cosine_to_other": arrays[f"{place}.{loss}.cosine.{other}"][:, -1].max(),
        "rate_error": arrays[f"{place}.{loss}.rate_error"][:, -1].max(),
        "loss_slope": None,
        "loss_coefficient_error": None,
    }
    if loss == "dpo_rw" and place.endswith("reference"):
        return numbers  # no bias there, hence no slope
    # The bias of a single problem may pass through zero; as a vector over the seeds it does not.
    norm = np.linalg.norm(bias, axis=0)
    numbers["loss_slope"] = float(slope(ks[fitted], norm[fitted]))
    difference = ks[-1] * bias[:, -1] - coefficient
    numbers["loss_coefficient_error"] = np.linalg.norm(difference) / np.linalg.norm(coefficient)
    return numbers


def _worst(key: str, values: list[float | None]) -> float:
    """Of several cases, the least favourable."""
    present = np.array([value for value in values if value is not None])
    if key.endswith("slope"):
        return farthest_from_minus_one(present)
    return present.min() if key.startswith("cosine") else present.max()


def farthest_from_minus_one(slopes: np.ndarray) -> float:
    """Of several slopes, the one that agrees least with -1."""
    return float(slopes[np.abs(slopes + 1).argmax()])


def draw_problem(config: Config, policy_class: str, distance: str, seed: int) -> tuple[Policy, Tensor, Tensor]:
    """A policy at a distance from a k-gram reference, the reference's table and a table of rewards, both [X, N].

    With the same seed, the reference, the rewards and (up to its size) the direction of the policy are the same.
    """
    space = SequenceSpace(config.vocab_size, config.length)
    generator = torch.Generator().manual_seed(seed)
    reference = KGramPolicy(space, config.order, n_prompts=config.n_prompts)
    add_noise(reference, config.reference_scale, generator)
    log_ref = reference.log_probs().detach()
    reward = rewards.random(space, scale=config.reward_scale, generator=generator, n_prompts=config.n_prompts)

    scale = {"reference": 0.0, "near": config.near, "far": config.far}[distance]
    if policy_class == "kgram":
        # The log-probability of a completion is a sum of one term per token.
        add_noise(reference, scale / math.sqrt(config.length), generator)
        return reference, log_ref, reward
    table = TabularPolicy(space, n_prompts=config.n_prompts)
    with torch.no_grad():
        table.logits.copy_(log_ref)
    add_noise(table, scale, generator)
    return table, log_ref, reward


@torch.no_grad()
def add_noise(policy: Policy, scale: float, generator: torch.Generator) -> None:
    """Independent normal noise on every logit."""
    for parameter in policy.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def exact_case(settings: dict[str, Any], policy_class: str, distance: str, seed: int) -> dict[str, np.ndarray]:
    """Curves over K of one problem, for each loss: its gradient against both targets, its bias against c/K."""
    config = Config(**settings)
    policy, log_ref, reward = draw_problem(config, policy_class, distance, seed)
    tables = (log_ref, reward)

    def value_and_gradient(function: Callable[..., Tensor], **more: int) -> tuple[float, Tensor]:
        value = function(policy.log_probs(), *tables, **config.betas, **more).mean()
        return value.item(), parameter_gradient(value, policy)

    out: dict[str, Any] = {"kl_to_reference": kl_divergence(policy.log_probs().detach(), log_ref).mean().item()}
    limits = {target: value_and_gradient(DIVERGENCE[target]) for target in TARGETS}
    for loss in LOSSES:
        values, gradients = zip(*(value_and_gradient(EXPECTED_LOSS[loss], k=k) for k in config.ks), strict=True)
        for target, (_, limit) in limits.items():
            out[f"{loss}.cosine.{target}"] = [cosine(gradient, limit) for gradient in gradients]
            out[f"{loss}.relative_error.{target}"] = [relative_error(gradient, limit) for gradient in gradients]

        limit_value, limit = limits[OWN_TARGET[loss]]
        coefficient, coefficient_gradient = value_and_gradient(COEFFICIENT[loss])
        k = torch.tensor(config.ks, dtype=torch.float64)
        constant = k.log() - _kl_optimal_to_reference(config, *tables) if loss == "dpo_rw" else torch.zeros_like(k)
        loss_bias = torch.tensor(values, dtype=torch.float64) - constant - limit_value
        gradient_bias = torch.stack(gradients) - limit
        out[f"{loss}.loss_bias"] = loss_bias
        out[f"{loss}.loss_coefficient"] = coefficient
        # ||grad c|| / ||limit||: over K, what the closed form alone predicts of the relative error.
        out[f"{loss}.relative_coefficient"] = coefficient_gradient.norm() / limit.norm()
        out[f"{loss}.gradient_coefficient_error"] = [
            relative_error(n * bias, coefficient_gradient) for n, bias in zip(config.ks, gradient_bias, strict=True)
        ]
        out[f"{loss}.rescaled_error"] = [
            relative_error(gradient, (n - 1) / n * limit) for n, gradient in zip(config.ks, gradients, strict=True)
        ]
        out[f"{loss}.rate_error"] = [
            BIAS_RATE[loss](policy, *tables, k=n, **config.betas).error for n in config.rate_ks
        ]
    return {key: np.asarray(value, dtype=np.float64) for key, value in out.items()}


def sampled_case(settings: dict[str, Any], k: int) -> dict[str, np.ndarray]:
    """Sampled gradients with K candidates against their targets, [repetitions] for each loss; and the exact curve."""
    config = Config(**settings)
    policy, log_ref, reward = draw_problem(config, "table", "far", config.seed)
    generator = torch.Generator().manual_seed(config.seed * 2**20 + k)
    draws = config.sampled_completions // k
    out: dict[str, Any] = {"draws": draws}
    for loss, target in OWN_TARGET.items():
        divergence = DIVERGENCE[target](policy.log_probs(), log_ref, reward, **config.betas).mean()
        limit = parameter_gradient(divergence, policy)
        expected = EXPECTED_LOSS[loss](policy.log_probs(), log_ref, reward, k=k, **config.betas).mean()
        exact = parameter_gradient(expected, policy)
        sampled = torch.stack(
            [
                sampled_gradient(SAMPLE_LOSS[loss], policy, log_ref, reward, k, draws, config.betas, generator)
                for _ in range(config.repetitions)
            ]
        )
        out[f"{loss}.cosine"] = [cosine(gradient, limit) for gradient in sampled]
        out[f"{loss}.relative_error"] = [relative_error(gradient, limit) for gradient in sampled]
        out[f"{loss}.exact_cosine"] = cosine(exact, limit)
        out[f"{loss}.exact_relative_error"] = relative_error(exact, limit)
        # Sampling is unbiased for the exact gradient: the squared distance of the repetitions' mean from it, over that
        # mean's variance, is 1 on average.
        variance = sampled.var(0).sum() / config.repetitions
        out[f"{loss}.squared_distance_over_variance"] = ((sampled.mean(0) - exact) ** 2).sum() / variance
    return {key: np.asarray(value, dtype=np.float64) for key, value in out.items()}


def sampled_gradient(
    loss: Callable[..., Tensor],
    policy: Policy,
    log_ref: Tensor,
    reward: Tensor,
    k: int,
    draws: int,
    betas: dict[str, Any],
    generator: torch.Generator,
) -> Tensor:
    """Gradient of a loss averaged over ``draws`` sets of K candidates for each prompt, flattened."""
    chosen = torch.multinomial(log_ref.exp(), draws * k, replacement=True, generator=generator)
    log_ratio, chosen_rewards = (
        table.gather(-1, chosen).reshape(-1, k) for table in (policy.log_probs() - log_ref, reward)
    )
    return parameter_gradient(loss(log_ratio, chosen_rewards, **betas).mean(), policy)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two vectors."""
    return torch.cosine_similarity(a, b, dim=0, eps=0.0).item()


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return ((a - b).norm() / b.norm()).item()


def slope(ks: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Least-squares slope of log error against log K, for every row of [..., K]."""
    log_k = np.log(ks) - np.log(ks).mean()
    return np.log(error) @ log_k / (log_k @ log_k)


def _kl_optimal_to_reference(config: Config, log_ref: Tensor, reward: Tensor) -> Tensor:
    log_pi_star, _ = optimal_policy(log_ref, reward, beta=config.beta_r)
    return kl_divergence(log_pi_star, log_ref).mean()


if __name__ == "__main__":
    runner.main("gradient_alignment")
