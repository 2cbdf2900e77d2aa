"""How noisy sampled gradients are, exactly: EXO's and DPO's on K candidates against policy gradients of K samples.

Along the training of EXO-rw and of PPO, at each checkpoint, mean and noise (trace of the covariance) of the sampled
gradient are computed on all completions, for one group of K per prompt, and joined over prompts:

* exo_rw, dpo_rw: the loss on K fresh candidates from the reference;
* ppo: its first descent after K completions are drawn from the policy, advantages being rewards to go less the value
  table that fits them best;
* none, mean, best: the policy gradient of K completions with no baseline, their expected reward or the best constant;
* leave_one_out: the same, each with the mean of the others for a baseline.

All use the reward model's rewards. The losses differ in scale. Of each there is noise over signal, the variance over
the squared length of its own expected gradient. The policy gradients have one, that of J; those of the losses on
candidates are others, at small K and away from the reference. What all can be compared by is noise over progress, the
variance over the square of what the expected gradient has along that of J.
"""

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from analysis import runner
from analysis.pipeline import (
    Data,
    Reference,
    Setting,
    checkpoints,
    drawn,
    fine_tuned,
    mean_over_seeds,
    setting_of,
    trained,
)
from exo_toy import gradient_noise as noise
from exo_toy.divergences import kl_divergence
from exo_toy.evaluation import effective_share
from exo_toy.gradient_noise import Noise
from exo_toy.objectives import kl_optimal_to_policy, kl_policy_to_optimal
from exo_toy.policies.autoregressive import AutoregressivePolicy
from exo_toy.spaces import SequenceSpace
from exo_toy.targets import optimal_policy
from exo_toy.training import ppo_loss
from exo_toy.training.proximal import rewards_to_go

TRAININGS = ("exo_rw", "ppo")
LOSSES = ("exo_rw", "dpo_rw")
BASELINES: tuple[noise.Baseline, ...] = ("none", "mean", "best")
ESTIMATORS = (*LOSSES, "ppo", "leave_one_out", *BASELINES)
# Whose noise per sample depends on how many there are; the others are means of independent samples.
BY_GROUP = (*LOSSES, "leave_one_out")
# What else is told of a policy, means over prompts; the gap is what its J lacks to the optimum of the reward model.
STATES = ("kl_to_reference", "gap_to_optimum", "effective_share")
COSINES = ("cosine", "cosine_to_limit")
# At the ratio 1, where gradients are compared, nothing is clipped.
CLIP = 0.2


@dataclass(frozen=True)
class Config(Setting):
    """Settings; the defaults are the reported run."""

    length: int = 3
    checkpoints: int = 5
    betas: tuple[float, ...] = (0.1, 0.4, 1.6)
    seeds: int = 5
    ks: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    # Of the comparisons, which are paired.
    resamples: int = 10_000


PRESETS = {
    "quick": Config(length=2, betas=(0.2,), seeds=2, steps=40, tuning_steps=200, checkpoints=2),
    "default": Config(betas=(0.4,), seeds=2, steps=100, tuning_steps=400, checkpoints=2),
    "full": Config(),
}


class Gradients(NamedTuple):
    """Of every completion of every prompt, with respect to all parameters: [X, N, P] each.

    Attributes:
        scores: of log pi.
        surrogate: of PPO's loss where the policy is the one that drew the completion.
    """

    scores: Tensor
    surrogate: Tensor


class _TokenLogProbs(nn.Module):
    """``policy.token_log_probs`` as a module, for functional_call."""

    def __init__(self, policy: AutoregressivePolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, tokens: Tensor) -> Tensor:
        return self.policy.token_log_probs(tokens)


def run(config: Config) -> runner.Result:
    """Evaluate every case; numbers for the claims, arrays [betas, seeds, checkpoints, ...] for the figures."""
    setting = setting_of(config)
    cases = [
        {"setting": setting, "training": training, "beta": beta, "seed": seed, "ks": list(config.ks)}
        for training in TRAININGS
        for beta in config.betas
        for seed in range(config.seeds)
    ]
    results = runner.map_cases(measured, cases)
    arrays: dict[str, np.ndarray] = {"steps": checkpoints(Setting(**setting)), "ks": np.array(config.ks)}
    shape = (len(TRAININGS), len(config.betas), config.seeds)
    for name in results[0]:
        joined = np.stack([result[name] for result in results])
        joined = joined.reshape(*shape, *joined.shape[1:])
        arrays |= {f"{training}.{name}": part for training, part in zip(TRAININGS, joined, strict=True)}
    return runner.Result(numbers(config, arrays), arrays)


def measured(setting: dict[str, Any], training: str, beta: float, seed: int, ks: list[int]) -> dict[str, np.ndarray]:
    """One training: all of :func:`at_policy` at each checkpoint."""
    options = Setting(**setting)
    reference, data = fine_tuned(options), drawn(options, seed)
    policy = copy.deepcopy(reference.policy)
    at, rows = set(checkpoints(options).tolist()), []
    # The first comes before the first step.
    for step, _ in enumerate(itertools.chain((None,), trained(policy, reference, data, options, training, beta, seed))):
        if step in at:
            rows.append(at_policy(policy, reference, data, options, beta, ks))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def at_policy(
    policy: AutoregressivePolicy, reference: Reference, data: Data, setting: Setting, beta: float, ks: list[int]
) -> dict[str, np.ndarray]:
    """Of a policy as it stands: variance and signal [E, K] of K samples of every prompt, state [S], and cosines [L, K].

    Cosines are those of minus the losses' means to the gradient of J, and of the means to the gradients of their limits
    at many candidates.
    """
    beta_pi, beta_r = math.sqrt(beta * setting.split), math.sqrt(beta / setting.split)
    log_ref, reward = reference.log_ref, data.model
    limits = limit_gradients(policy, log_ref, reward, beta_pi=beta_pi, beta_r=beta_r)
    with torch.no_grad():
        log_pi = policy.log_probs()
    gradients = all_gradients(policy, reference.policy, log_pi, reward, beta=beta, value_order=setting.value_order)
    found: dict[str, list[list[Noise]]] = {name: [] for name in ESTIMATORS}
    for x in range(len(log_pi)):
        tables = (gradients.scores[x], log_pi[x], log_ref[x], reward[x])
        found["exo_rw"].append(noise.exo_rw_noises(*tables, ks=ks, beta_pi=beta_pi, beta_r=beta_r))
        found["dpo_rw"].append(noise.dpo_rw_noises(*tables, ks=ks, beta_pi=beta_pi, beta_r=beta_r))
        found["leave_one_out"].append(noise.leave_one_out_noises(*tables, beta=beta, ks=ks))
        found["ppo"].append(_of_mean(noise.sample_noise(gradients.surrogate[x], log_pi[x]), ks))
        for name in BASELINES:
            found[name].append(_of_mean(noise.policy_gradient_noise(*tables, beta=beta, baseline=name), ks))
    # Each prompt has a group of its own.
    joined = {
        name: [noise.mean_of_independent(prompts) for prompts in zip(*found[name], strict=True)] for name in ESTIMATORS
    }
    ascent = joined["none"][0].mean
    kl, log_z = kl_divergence(log_pi, log_ref), optimal_policy(log_ref, reward, beta=beta)[1]
    objective = (log_pi.exp() * reward).sum(-1) - beta * kl
    share = effective_share(beta_pi * (log_pi - log_ref), log_ref)
    return {
        "variance": np.array([[one.variance.item() for one in joined[name]] for name in ESTIMATORS]),
        "signal": np.array([[one.mean.square().sum().item() for one in joined[name]] for name in ESTIMATORS]),
        "cosine": np.array([[_cosine(-one.mean, ascent) for one in joined[name]] for name in LOSSES]),
        "cosine_to_limit": np.array([[_cosine(one.mean, limits[name]) for one in joined[name]] for name in LOSSES]),
        "state": np.array([value.mean().item() for value in (kl, beta * log_z - objective, share)]),
    }


def limit_gradients(
    policy: AutoregressivePolicy, log_ref: Tensor, reward: Tensor, *, beta_pi: float, beta_r: float
) -> dict[str, Tensor]:
    """Where the expected gradients of the losses tend to as K grows, means over prompts: of the two KL divergences."""
    log_pi, parameters = policy.log_probs(), list(policy.parameters())
    limits = {"exo_rw": kl_policy_to_optimal, "dpo_rw": kl_optimal_to_policy}
    found = {}
    for name, limit in limits.items():
        value = limit(log_pi, log_ref, reward, beta_pi=beta_pi, beta_r=beta_r).mean()
        found[name] = torch.cat([part.flatten() for part in torch.autograd.grad(value, parameters, retain_graph=True)])
    return found


def _cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a, b, 0).item()


def _of_mean(one: Noise, ks: list[int]) -> list[Noise]:
    """Of the mean over K independent samples."""
    return [Noise(one.mean, one.variance / k) for k in ks]


def all_gradients(
    policy: AutoregressivePolicy,
    ref: AutoregressivePolicy,
    log_pi: Tensor,
    reward: Tensor,
    *,
    beta: float,
    value_order: int,
) -> Gradients:
    """Scores and gradients of PPO's loss, of every completion."""
    space, module = policy.space, _TokenLogProbs(policy)
    tokens = space.tokens()
    mask = space.counted(tokens)
    with torch.no_grad():
        old_logps = policy.token_log_probs(tokens)
        to_go = rewards_to_go(old_logps, ref.token_log_probs(tokens), reward, beta=beta)
        advantages = to_go - fitted_values(space, log_pi, to_go, order=value_order)

    def of_completion(
        parameters: dict[str, Tensor], tokens: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        logps = functional_call(module, parameters, (tokens.unsqueeze(0),)).squeeze(1)
        loss = ppo_loss(logps, old_logps, advantages, mask.expand_as(logps), clip=CLIP)
        return torch.stack([logps.sum(-1), loss])

    by_completion = (tokens, old_logps.transpose(0, 1), advantages.transpose(0, 1), mask)
    found = noise.per_sample_gradients(of_completion, dict(module.named_parameters()), *by_completion)
    return Gradients(*found.permute(1, 2, 0, 3).contiguous())


def fitted_values(space: SequenceSpace, log_pi: Tensor, to_go: Tensor, *, order: int) -> Tensor:
    """[X, N, T]: the mean under the policy of what is to come, given the last ``order`` tokens; where PPO's table ends.

    It is the minimum of the squared distance that PPO's value table descends.
    """
    tokens = space.tokens()
    contexts = space.contexts(tokens, order=order)
    weight = log_pi.exp().unsqueeze(-1) * space.counted(tokens)
    columns = []
    for t in range(space.length):
        at = contexts[:, t].expand_as(log_pi)
        sums = [
            log_pi.new_zeros(len(log_pi), space.n_contexts(t, order=order)).scatter_add_(-1, at, part)
            for part in (weight[..., t] * to_go[..., t], weight[..., t])
        ]
        # After the end contexts mean nothing: what is read there is not used.
        columns.append((sums[0] / sums[1].clamp(min=torch.finfo(sums[1].dtype).tiny)).gather(-1, at))
    return torch.stack(columns, -1)


def numbers(config: Config, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """At three stages of each training, per sample: trace, noise over signal, and ratios of noise over progress."""
    found: dict[str, Any] = {"estimators": list(ESTIMATORS), "losses": list(LOSSES), "states": list(STATES)}
    places = {"start": 0, "middle": len(arrays["steps"]) // 2, "end": len(arrays["steps"]) - 1}
    found["stages"] = {stage: int(arrays["steps"][place]) for stage, place in places.items()}
    found["trainings"] = {}
    none, loo = ESTIMATORS.index("none"), ESTIMATORS.index("leave_one_out")
    for training in TRAININGS:
        # Averaged on a logarithmic scale. [betas, seeds, checkpoints, E, K]
        trace = np.log(arrays[f"{training}.variance"] * arrays["ks"])
        ratio = trace - np.log(arrays[f"{training}.signal"])
        progress = over_progress(ratio, arrays[f"{training}.cosine"])
        cosines, state = {name: arrays[f"{training}.{name}"] for name in COSINES}, arrays[f"{training}.state"]
        found["trainings"][training] = {
            f"{beta:g}": {
                stage: {
                    "trace": _of_estimators(config, trace[b, :, place]),
                    "noise_to_signal": _of_estimators(config, ratio[b, :, place]),
                    "exo_over_other": {
                        name: _ratios(config, progress[b, :, place, 0], progress[b, :, place, e])
                        for e, name in enumerate(ESTIMATORS)
                        if e > 0
                    },
                    "none_over_leave_one_out": _ratios(config, ratio[b, :, place, none], ratio[b, :, place, loo]),
                    **{
                        name: {
                            loss: _by_k(config, cosine[b, :, place, i], geometric=False)
                            for i, loss in enumerate(LOSSES)
                        }
                        for name, cosine in cosines.items()
                    },
                    **{name: mean_over_seeds(state[b, :, place, s], config.resamples) for s, name in enumerate(STATES)},
                }
                for stage, place in places.items()
            }
            for b, beta in enumerate(config.betas)
        }
    found["bias"] = max(_bias(arrays[f"{training}.signal"]) for training in TRAININGS)
    return found


def over_progress(ratio: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Logarithms of noise over progress from those over signal [..., E, K]; infinite where there is no progress.

    Only the losses' means, with their cosines [..., L, K], are not along the gradient of J.
    """
    progress = ratio.copy()
    along = cosine > 0
    progress[..., : len(LOSSES), :] -= 2 * np.log(np.where(along, cosine, 1.0))
    progress[..., : len(LOSSES), :][~along] = np.inf
    return progress


def _ratios(config: Config, a: np.ndarray, b: np.ndarray) -> dict[str, dict[str, float] | None]:
    """Geometric means of a over b, from logarithms [seeds, K]; None where a seed has no finite ratio."""
    finite = (np.isfinite(a) & np.isfinite(b)).all(0)
    return {
        str(k): _geometric(mean_over_seeds(a[:, i] - b[:, i], config.resamples)) if finite[i] else None
        for i, k in enumerate(config.ks)
    }


def _of_estimators(config: Config, logs: np.ndarray) -> dict[str, dict[str, Any]]:
    """Of each estimator, from logarithms [seeds, E, K]: one number where it is a mean of independent samples."""
    return {
        name: _by_k(config, logs[:, e], geometric=True)
        if name in BY_GROUP
        else _geometric(mean_over_seeds(logs[:, e, 0], config.resamples))
        for e, name in enumerate(ESTIMATORS)
    }


def _by_k(config: Config, values: np.ndarray, *, geometric: bool) -> dict[str, dict[str, float]]:
    """Means over seeds with their intervals, of [seeds, K]; of logarithms, geometric means."""
    means = {str(k): mean_over_seeds(values[:, i], config.resamples) for i, k in enumerate(config.ks)}
    return {k: _geometric(mean) for k, mean in means.items()} if geometric else means


def _geometric(mean: dict[str, float]) -> dict[str, float]:
    return {key: math.exp(value) for key, value in mean.items()}


def _bias(signal: np.ndarray) -> float:
    """How far the lengths of the policy gradients' means are apart, relative: all are the gradient of J."""
    policy_gradients = signal[..., len(LOSSES) :, :]
    return float((np.ptp(policy_gradients, axis=(-2, -1)) / policy_gradients.max((-2, -1))).max())


if __name__ == "__main__":
    runner.main("gradient_noise")
