"""Density ratios pi / pi_ref of aligned policies, over the reward and by rank: exact, and as samples show them.

The methods of :mod:`analysis.pipeline` are trained at one temperature and seen beside the optimal policy of the reward
that they were given: the reward model's for methods on rewards ("rw", and "rw_many" on groups of more candidates, the
same completions), the oracle's for methods on the oracle's labels ("pref"). For each opening,

* over the reward: the density of a policy over that of the reference, both seen through one Gaussian kernel. Exact:
  all completions with their probabilities. Estimated: M completions of the reference with self-normalised importance
  weights, drawn again and again. As M grows the estimate tends to the exact curve; it never exceeds M;
* by rank: the completions sorted by pi*, with the exact ratio of each policy.

The reported temperature is one at which the methods on rewards can be told from each other and from pi*: at 0.4 and
above their curves lie on each other, and at 0.1 no method comes near pi*, whose weights are then worth a few samples.
``python -m analysis.alignment_ratios --help`` lists the settings.
"""

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import gaussian_kde
from torch import Tensor

from analysis import runner
from analysis.pipeline import Data, Reference, Setting, drawn, fine_tuned, mean_over_seeds, setting_of, trained
from exo_toy.divergences import kl_divergence
from exo_toy.estimators import effective_sample_size, snis_density_ratio
from exo_toy.evaluation import effective_share
from exo_toy.reviews import OPENINGS
from exo_toy.targets import optimal_policy
from exo_toy.training import draw_candidates

OPTIMUM = "optimum"
# The policies of each kind, all given the same reward: pi*, EXO, DPO, and others.
POLICIES = {
    "rw": (OPTIMUM, "exo_rw", "dpo_rw", "ppo"),
    "rw_many": (OPTIMUM, "exo_rw", "dpo_rw"),
    "pref": (OPTIMUM, "exo_pref", "dpo_pref"),
}
# Exact, of each policy and opening. Distances are means of |log rho - log rho*|.
MEASURES = (
    "mode_mass", "log_mode_share", "kl_to_reference", "kl_to_optimum", "kl_from_optimum", "distance_over_reward",
    "distance_under_optimum", "distance_under_policy", "rank_correlation_under_optimum",
    "rank_correlation_under_policy", "largest_ratio", "effective_share",
)  # fmt: skip
# Of M samples, means over repetitions.
ESTIMATES = ("ess", "largest_ratio", "error")
# For each, the sign of EXO's value less DPO's that the claim asks for. The mean under pi* minds most what a policy
# misses of pi*, the one under the policy what it has beside pi*.
CLAIMED = {"distance_over_reward": -1, "distance_under_optimum": -1, "distance_under_policy": -1, "log_mode_share": +1}
# Stands for the mean over openings.
ALL = "all openings"
# A band holds nine tenths of the repetitions.
BAND = (0.05, 0.5, 0.95)
# Rewards that agree to so many decimals differ by rounding alone.
DECIMALS = 9
# The axis begins where the reference, and ends where pi*, leaves this much outside.
TAIL = 1e-3


@dataclass(frozen=True)
class Config(Setting):
    """Settings; the defaults are the reported run."""

    beta: float = 0.2
    many: int = 32
    seeds: int = 6
    sample_sizes: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    repetitions: int = 20
    # In standard deviations of the reward under the reference; Scott's rule gives it for 3125 samples.
    bandwidth: float = 0.2
    grid_points: int = 41
    rank_bins: int = 60
    # Of the paired comparisons.
    resamples: int = 10_000


PRESETS = {
    "quick": Config(
        length=4, seeds=2, steps=60, tuning_steps=200, sample_sizes=(64, 256), repetitions=5, grid_points=31
    ),
    "default": Config(
        length=5,
        seeds=2,
        steps=100,
        tuning_steps=300,
        sample_sizes=(64, 512, 4096),
        repetitions=5,
        grid_points=31,
    ),
    "full": Config(),
}


def run(config: Config) -> runner.Result:
    """Examine the policies of every seed; numbers for the claim, curves of the first seed for the figures."""
    shared = {
        "setting": setting_of(config),
        "beta": config.beta,
        "sample_sizes": list(config.sample_sizes),
        "repetitions": config.repetitions,
        "bandwidth": config.bandwidth,
        "grid_points": config.grid_points,
        "rank_bins": config.rank_bins,
    }
    cases = [
        {**shared, "kind": kind, "k": config.many if kind == "rw_many" else config.k, "seed": seed}
        for kind in POLICIES
        for seed in range(config.seeds)
    ]
    results = dict(zip(((c["kind"], c["seed"]) for c in cases), runner.map_cases(examined, cases), strict=True))
    arrays: dict[str, np.ndarray] = {}
    for kind in POLICIES:
        for name in ("grid", "exact", "estimated", "rank"):
            arrays[f"{kind}_{name}"] = results[kind, 0][name]
        for name in ("measures", "estimates", "by_rank"):
            arrays[f"{kind}_{name}"] = np.stack([results[kind, seed][name] for seed in range(config.seeds)])
    return runner.Result(numbers(config, arrays), arrays)


def examined(
    *,
    setting: dict[str, Any],
    kind: str,
    k: int,
    beta: float,
    seed: int,
    sample_sizes: Sequence[int],
    repetitions: int,
    bandwidth: float,
    grid_points: int,
    rank_bins: int,
) -> dict[str, np.ndarray]:
    """One seed's policies of a kind at every opening; arrays [X, P, ...], but of the axes [X, G] and ranks [B]."""
    options = Setting(**setting)
    reference, data = fine_tuned(options), drawn(options, seed)
    # The same completions, in groups of k.
    data = data._replace(groups=data.groups.flatten(1).unflatten(1, (-1, k)))
    reward = reference.oracle if kind == "pref" else data.model
    log_star, _ = optimal_policy(reference.log_ref, reward, beta=beta)
    tables = [aligned_table(reference, data, options, method, beta, seed) for method in POLICIES[kind][1:]]
    log_pi = torch.stack([log_star, *tables], 1)
    log_weight = log_pi - reference.log_ref.unsqueeze(1)
    # Of pi* one has to know no more than the reward.
    log_weight[:, 0] = reward / beta
    # The same draws for all policies and kinds of a seed.
    generator = torch.Generator().manual_seed(2_000_000 + seed)
    draws = [draw_candidates(reference.log_ref, repetitions, size, generator) for size in sample_sizes]
    found = []
    for x, log_ref in enumerate(reference.log_ref):
        axis = Axis(reward[x], log_ref, log_star[x], [index[x] for index in draws], bandwidth, grid_points)
        policies = [axis.examined(pi, weight) for pi, weight in zip(log_pi[x], log_weight[x], strict=True)]
        of_opening = {name: np.stack([policy[name] for policy in policies]) for name in policies[0]}
        measured = measures(log_pi[x], log_ref, options.n_modes)
        measured["distance_over_reward"] = distance_over_reward(of_opening["exact"], of_opening["share"])
        of_opening["measures"] = np.stack([measured[name] for name in MEASURES], -1)
        of_opening["rank"], of_opening["by_rank"] = ratio_by_rank(log_pi[x], log_ref, rank_bins)
        found.append(of_opening | {"grid": axis.grid})
    return {name: np.stack([of_opening[name] for of_opening in found]) for name in found[0] if name != "share"}


def aligned_table(reference: Reference, data: Data, setting: Setting, method: str, beta: float, seed: int) -> Tensor:
    """[X, N] the policy at the end of one method's training."""
    policy = copy.deepcopy(reference.policy)
    for _ in trained(policy, reference, data, setting, method, beta, seed):
        pass
    with torch.no_grad():
        return policy.log_probs()


class Axis:
    """The reward of one opening's completions, and how densities and their ratios over it are computed."""

    def __init__(
        self,
        reward: Tensor,
        log_ref: Tensor,
        log_star: Tensor,
        draws: Sequence[Tensor],
        bandwidth: float,
        grid_points: int,
    ) -> None:
        self.reward, self.draws = reward.numpy(), draws
        ref = log_ref.exp().numpy()
        self.bandwidth = bandwidth * math.sqrt(ref @ (self.reward - ref @ self.reward) ** 2)
        low, _ = _range(self.reward, ref)
        _, high = _range(self.reward, log_star.exp().numpy())
        self.grid = np.linspace(low, high, grid_points)
        self.log_ref = self.log_density(self.reward, ref)
        # Of every sample, unweighted: [R, G] for each M.
        self.log_refs = [
            np.stack([self.log_density(r, np.full(len(r), 1 / len(r))) for r in self.reward[index]]) for index in draws
        ]

    def log_density(self, rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """[G] on the axis."""
        return log_density(rewards, weights, self.grid, self.bandwidth)

    def examined(self, log_pi: Tensor, log_weight: Tensor) -> dict[str, np.ndarray]:
        """A policy [N]: its exact log ratio [G]; its estimate from each sample, in bands, and how good it is."""
        log_density = self.log_density(self.reward, log_pi.exp().numpy())
        exact = log_density - self.log_ref
        # Errors count where the policy is, not where the axis happens to be long.
        share = np.exp(log_density)
        share /= share.sum()
        bands, estimates = [], []
        for index, log_refs in zip(self.draws, self.log_refs, strict=True):
            log_weights = log_weight[index]
            weighted = zip(self.reward[index], log_weights.softmax(-1).numpy(), strict=True)
            curves = np.stack([self.log_density(*sample) for sample in weighted]) - log_refs
            bands.append(np.quantile(curves, BAND, axis=0))
            of_each = {
                "ess": effective_sample_size(log_weights).numpy(),
                "largest_ratio": snis_density_ratio(log_weights).amax(-1).numpy(),
                "error": np.abs(curves - exact) @ share,
            }
            estimates.append([of_each[name].mean() for name in ESTIMATES])
        return {"exact": exact, "share": share, "estimated": np.stack(bands), "estimates": np.array(estimates)}


def log_density(rewards: np.ndarray, weights: np.ndarray, grid: np.ndarray, bandwidth: float) -> np.ndarray:
    """[G] log kernel density of rewards [M] with weights [M]."""
    # Completions of one reward are one point: several times faster, and the same sum.
    _, first, point = np.unique(rewards.round(DECIMALS), return_index=True, return_inverse=True)
    masses = np.bincount(point, weights)
    points, masses = rewards[first][masses > 0], masses[masses > 0]

    def factor(kernel: gaussian_kde) -> float:
        # scipy multiplies it by the standard deviation of the weighted points, which is not the same for two policies.
        return bandwidth / math.sqrt(np.cov(kernel.dataset, aweights=kernel.weights))

    density: np.ndarray = gaussian_kde(points, bw_method=factor, weights=masses).logpdf(grid)
    return density


def _range(rewards: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """The rewards between which all but ``TAIL`` on either side lies."""
    order = rewards.argsort()
    low, high = np.searchsorted(probabilities[order].cumsum(), (TAIL, 1 - TAIL))
    return rewards[order[low]], rewards[order[high]]


def distance_over_reward(exact: np.ndarray, share: np.ndarray) -> np.ndarray:
    """[P] mean distance of log ratios [P, G] from that of pi*, the first, under pi*'s shares of the axis."""
    distance: np.ndarray = np.abs(exact - exact[0]) @ share[0]
    return distance


def measures(log_pi: Tensor, log_ref: Tensor, n_modes: int) -> dict[str, np.ndarray]:
    """[P] each: how policies [P, N], pi* first, compare with pi* and with the reference."""
    log_star, log_ratio = log_pi[0], log_pi - log_ref
    modes = log_star.topk(n_modes).indices
    mode_mass = log_pi[:, modes].exp().sum(-1)
    distance = (log_pi - log_star).abs()
    star, every = log_star.exp(), log_star.expand_as(log_pi)
    measured = {
        "mode_mass": mode_mass,
        "log_mode_share": (mode_mass / mode_mass[0]).log(),
        "kl_to_reference": kl_divergence(log_pi, log_ref.expand_as(log_pi)),
        "kl_to_optimum": kl_divergence(log_pi, every),
        "kl_from_optimum": kl_divergence(every, log_pi),
        "distance_under_optimum": (star * distance).sum(-1),
        "distance_under_policy": (log_pi.exp() * distance).sum(-1),
        "largest_ratio": log_ratio.amax(-1).exp(),
        "effective_share": effective_share(log_ratio, log_ref.expand_as(log_pi)),
    }
    for name, weights in (("optimum", star.expand_as(log_pi)), ("policy", log_pi.exp())):
        correlations = [
            rank_correlation(of, log_ratio[0], weight) for of, weight in zip(log_ratio, weights, strict=True)
        ]
        measured[f"rank_correlation_under_{name}"] = torch.stack(correlations)
    return {name: values.numpy() for name, values in measured.items()}


def rank_correlation(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Spearman's correlation of two columns [N] under probabilities [N]: that of P(a' < a) + P(a' = a)/2."""
    a, b = (mid_rank(values, weight) for values in (a, b))
    a, b = a - weight @ a, b - weight @ b
    return (weight @ (a * b)) / ((weight @ a.square()) * (weight @ b.square())).sqrt()


def mid_rank(values: Tensor, weight: Tensor) -> Tensor:
    """[N] the probability of a smaller value, and half of that of an equal one."""
    levels, level = values.round(decimals=DECIMALS).unique(return_inverse=True)
    at = torch.zeros_like(levels).index_add_(0, level, weight)
    return (at.cumsum(0) - at / 2)[level]


def ratio_by_rank(log_pi: Tensor, log_ref: Tensor, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks under pi* in about ``bins`` groups, the first ones alone: their geometric mean [B], log ratios [P, B].

    A group's ratio is that of its joint probabilities.
    """
    order = log_pi[0].argsort(descending=True)
    n_completions = len(order)
    start = np.unique(np.geomspace(1, n_completions + 1, bins + 1).round().astype(int))
    group = np.searchsorted(start, np.arange(1, n_completions + 1), side="right") - 1
    masses = [np.bincount(group, table[order].exp().numpy()) for table in (*log_pi, log_ref)]
    rank = np.exp(np.bincount(group, np.log(np.arange(1, n_completions + 1))) / np.bincount(group))
    return rank, np.log(np.array(masses[:-1]) / masses[-1])


def numbers(config: Config, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Over seeds, of each kind, for every opening and their mean: policies, estimates, EXO less DPO and a verdict."""
    over_seeds = functools.partial(mean_over_seeds, resamples=config.resamples)
    openings = [opening.text for opening in OPENINGS]
    found: dict[str, Any] = {"openings": openings, "measures": list(MEASURES), "estimates": list(ESTIMATES)}
    for kind, policies in POLICIES.items():
        # [seeds, openings and their mean, policies, ...]
        measured, estimates = (_with_mean(arrays[f"{kind}_{name}"]) for name in ("measures", "estimates"))
        differences = measured[:, :, 1] - measured[:, :, 2]
        paired = {
            opening: {name: over_seeds(differences[:, x, m]) for m, name in enumerate(MEASURES)}
            for x, opening in enumerate((*openings, ALL))
        }
        found[kind] = {
            "policies": list(policies),
            "exact": {
                policy: {
                    opening: {name: over_seeds(measured[:, x, p, m]) for m, name in enumerate(MEASURES)}
                    for x, opening in enumerate((*openings, ALL))
                }
                for p, policy in enumerate(policies)
            },
            "estimated": {
                policy: {
                    opening: {
                        str(size): {name: estimates[:, x, p, i, e].mean() for e, name in enumerate(ESTIMATES)}
                        for i, size in enumerate(config.sample_sizes)
                    }
                    for x, opening in enumerate((*openings, ALL))
                }
                for p, policy in enumerate(policies)
            },
            "error_slope": {
                policy: error_slope(config.sample_sizes, estimates[:, -1, p, :, ESTIMATES.index("error")].mean(0))
                for p, policy in enumerate(policies)
            },
            "differences": paired,
            "verdicts": {opening: verdict(difference) for opening, difference in paired.items()},
        }
    return found


def _with_mean(values: np.ndarray) -> np.ndarray:
    """[S, X + 1, ...] of [S, X, ...]: the mean over openings behind them."""
    return np.concatenate([values, values.mean(1, keepdims=True)], 1)


def error_slope(sizes: Sequence[int], errors: np.ndarray) -> float:
    """Of the log error against log M, between the two largest M."""
    slope: float = np.diff(np.log(errors[-2:])).item() / np.diff(np.log(sizes[-2:])).item()
    return slope


def verdict(differences: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Which measures of ``CLAIMED`` speak for EXO and which for DPO, where the interval of the difference says so."""
    signs = {
        name: claimed * (int(differences[name]["low"] > 0) - int(differences[name]["high"] < 0))
        for name, claimed in CLAIMED.items()
    }
    exo, dpo = ([name for name, sign in signs.items() if sign == of] for of in (1, -1))
    said = {
        (False, False): "no clear difference",
        (True, False): "as claimed" if len(exo) == len(signs) else "in part",
        (True, True): "mixed",
        (False, True): "the reverse",
    }
    return {"exo": exo, "dpo": dpo, "verdict": said[bool(exo), bool(dpo)]}


if __name__ == "__main__":
    runner.main("alignment_ratios")
