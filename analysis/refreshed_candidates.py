"""What refreshing EXO's candidates repairs, exactly: their weights, the gradient's bias and noise, the fixed points.

Candidates of a proposal mu carry the log weight log pi_ref - log mu in both softmaxes of the loss. Proposals:

* reference: the usual candidates, log weight 0;
* policy: the current policy;
* tempered: pi_ref^(1 - beta_pi) pi^beta_pi, normalised over whole completions; all p_f are 1/K there. No language model
  can sample it token by token, unless beta_pi is 1 and it is the current policy;
* token_tempered: the same mixture of the two next-token distributions, normalised at each token: what can be sampled;
* half: half policy, half reference;
* stale: token_tempered of the checkpoint before (at the first, the reference);
* uncorrected: the current policy, log weights forgotten.

1. Along EXO-rw's training in a world of reviews, on all completions: the effective share of the weights, and for K
   candidates the noise over signal of EXO-rw's gradient and how far its mean is from the gradient of its limit,
   KL(tempered policy||pi*); beside it the noise of DPO-rw's gradient on the reference's candidates, and of the
   leave-one-out policy gradient on the policy's.
2. Two planted modes and a policy without memory: the minimiser of the exactly expected loss on the reference's
   candidates, then again and again on candidates of the last minimiser.
"""

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import runner
from analysis.gradient_noise import all_gradients, fitted_values
from analysis.mode_seeking import near_mode, two_modes
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
from exo_toy.finite_k import expected_exo_rw_loss
from exo_toy.gradient_noise import Noise
from exo_toy.objectives import kl_policy_to_optimal
from exo_toy.policies import KGramPolicy
from exo_toy.policies.autoregressive import AutoregressivePolicy
from exo_toy.spaces import SequenceSpace
from exo_toy.targets import tempered_policy
from exo_toy.training import minimize

PROPOSALS = ("reference", "policy", "tempered", "token_tempered", "half", "stale", "uncorrected")
# What a language model can draw from as it stands, with exact log-probabilities.
SAMPLED = ("reference", "policy", "token_tempered", "half")
# Other gradients on the same policies: DPO-rw's on the reference's candidates, the policy gradient's on the policy's.
OTHERS = ("dpo_rw", "leave_one_out")
CORRECTIONS = ("corrected", "uncorrected")


@dataclass(frozen=True)
class Config(Setting):
    """Settings; the defaults are the reported run."""

    length: int = 3
    checkpoints: int = 4
    beta: float = 0.2
    beta_pis: tuple[float, ...] = (0.1, 0.5, 1.0)
    seeds: int = 3
    ks: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    # Of the comparisons, which are paired.
    resamples: int = 10_000
    # The space of two modes, as in mode_seeking but shorter.
    mode_vocab_size: int = 4
    mode_length: int = 5
    mode_second_weight: float = 0.8
    mode_width: float = 1 / 1.5
    mode_beta: float = 0.5
    mode_ks: tuple[int, ...] = (2, 4, 8, 32)
    refreshes: int = 8


PRESETS = {
    "quick": Config(
        length=2, beta_pis=(0.1, 1.0), seeds=2, steps=60, tuning_steps=200, checkpoints=2, ks=(2, 8), mode_length=3,
        mode_ks=(2, 8), refreshes=4,
    ),
    "default": Config(
        beta_pis=(0.1, 1.0), seeds=2, steps=100, tuning_steps=400, checkpoints=2, ks=(2, 4, 16, 64), mode_length=4,
    ),
    "full": Config(),
}  # fmt: skip


def run(config: Config) -> runner.Result:
    """Evaluate every case; numbers for the claims, arrays [beta_pis, seeds, checkpoints, ...] for the figure."""
    cases: list[dict[str, Any]] = [
        {
            # beta_pi beta_r = beta.
            "setting": setting_of(config, split=beta_pi**2 / config.beta),
            "beta": config.beta,
            "seed": seed,
            "ks": list(config.ks),
        }
        for beta_pi in config.beta_pis
        for seed in range(config.seeds)
    ]
    results = runner.map_cases(measured, cases)
    steps = checkpoints(Setting(**cases[0]["setting"]))
    arrays: dict[str, np.ndarray] = {"steps": steps, "ks": np.array(config.ks)}
    for name in results[0]:
        joined = np.stack([result[name] for result in results])
        arrays[name] = joined.reshape(len(config.beta_pis), config.seeds, *joined.shape[1:])

    problem: dict[str, Any] = {
        "vocab_size": config.mode_vocab_size,
        "length": config.mode_length,
        "second_weight": config.mode_second_weight,
        "width": config.mode_width,
        "beta": config.mode_beta,
    }
    refreshed_cases: list[dict[str, Any]] = [
        {**problem, "k": k, "refreshes": config.refreshes, "corrected": correction == "corrected"}
        for correction in CORRECTIONS
        for k in config.mode_ks
    ]
    paths = np.stack(runner.map_cases(refreshed, refreshed_cases))
    arrays["refreshed_kl"] = paths.reshape(len(CORRECTIONS), len(config.mode_ks), -1)
    found = numbers(config, arrays)
    found["best_kl"] = best_kl(**problem)
    return runner.Result(found, arrays)


def measured(setting: dict[str, Any], beta: float, seed: int, ks: list[int]) -> dict[str, np.ndarray]:
    """One training: all of :func:`at_policy` at each checkpoint."""
    options = Setting(**setting)
    reference, data = fine_tuned(_untempered(options)), drawn(_untempered(options), seed)
    policy = copy.deepcopy(reference.policy)
    at, rows = set(checkpoints(options).tolist()), []
    before = token_logps(reference.policy)
    # The first comes before the first step.
    for step, _ in enumerate(itertools.chain((None,), trained(policy, reference, data, options, "exo_rw", beta, seed))):
        if step in at:
            rows.append(at_policy(policy, before, reference, data, options, beta, ks))
            before = token_logps(policy)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _untempered(setting: Setting) -> Setting:
    """The setting of the reference and of the data, which do not depend on the split: both are kept by setting."""
    return Setting(**{**vars(setting), "split": 1.0})


def at_policy(
    policy: AutoregressivePolicy,
    before: Tensor,
    reference: Reference,
    data: Data,
    setting: Setting,
    beta: float,
    ks: list[int],
) -> dict[str, np.ndarray]:
    """Of a policy as it stands, by proposal Q: variance, signal, cosine and distance [Q, K], share [Q]; of others too.

    The distance is that of K/(K-1) times the expected gradient from the limit's, relative to the limit's.
    """
    betas: dict[str, Any] = {"beta_pi": math.sqrt(beta * setting.split), "beta_r": math.sqrt(beta / setting.split)}
    log_pi, log_ref, reward = policy.log_probs(), reference.log_ref, data.model
    target = kl_policy_to_optimal(log_pi, log_ref, reward, **betas).mean()
    limit = torch.cat([part.flatten() for part in torch.autograd.grad(target, list(policy.parameters()))])
    log_pi = log_pi.detach()
    gradients = all_gradients(policy, reference.policy, log_pi, reward, beta=beta, value_order=setting.value_order)
    tokens = (token_logps(policy), token_logps(reference.policy), before)
    proposals = proposals_of(policy.space, *tokens, beta_pi=betas["beta_pi"])
    found: dict[str, list[list[Noise]]] = {name: [] for name in (*PROPOSALS, *OTHERS)}
    for x, scores in enumerate(gradients.scores):
        tables = (log_pi[x], log_ref[x], reward[x])
        for name in PROPOSALS:
            mu = proposals[name][x]
            found[name].append(
                # Without log weights the loss is that of a reference mu at the same log ratio.
                noise.exo_rw_noises(scores, tables[0] - tables[1] + mu, mu, tables[2], ks=ks, **betas)
                if name == "uncorrected"
                else noise.exo_rw_noises(scores, *tables, ks=ks, log_proposal=mu, **betas)
            )
        found["dpo_rw"].append(noise.dpo_rw_noises(scores, *tables, ks=ks, **betas))
        found["leave_one_out"].append(noise.leave_one_out_noises(scores, *tables, beta=beta, ks=ks))
    # Each prompt has a group of its own.
    joined = {name: [noise.mean_of_independent(one) for one in zip(*found[name], strict=True)] for name in found}
    shares = [
        effective_share(_log_weights(name, log_pi, log_ref, proposals[name], betas["beta_pi"]), proposals[name])
        for name in PROPOSALS
    ]
    exo = [[(one.mean, k / (k - 1)) for one, k in zip(joined[name], ks, strict=True)] for name in PROPOSALS]
    return {
        "variance": np.array([[one.variance.item() for one in joined[name]] for name in PROPOSALS]),
        "signal": np.array([[one.mean.square().sum().item() for one in joined[name]] for name in PROPOSALS]),
        "cosine": np.array([[torch.cosine_similarity(mean, limit, 0).item() for mean, _ in row] for row in exo]),
        "distance": np.array([[((c * mean - limit).norm() / limit.norm()).item() for mean, c in row] for row in exo]),
        "share": np.array([share.mean().item() for share in shares]),
        "other_ratio": np.array([[one.to_signal().item() for one in joined[name]] for name in OTHERS]),
        "kl_to_reference": np.array(kl_divergence(log_pi, log_ref).mean().item()),
    }


@torch.no_grad()
def token_logps(policy: AutoregressivePolicy) -> Tensor:
    """[X, N, T] of every completion."""
    return policy.token_log_probs(policy.space.tokens())


def proposals_of(
    space: SequenceSpace, policy: Tensor, ref: Tensor, before: Tensor, *, beta_pi: float
) -> dict[str, Tensor]:
    """What candidates are drawn from, tables [X, N], from token log-probabilities [X, N, T]."""
    log_pi, log_ref = policy.sum(-1), ref.sum(-1)
    return {
        "reference": log_ref,
        "policy": log_pi,
        "tempered": tempered_policy(log_pi, log_ref, beta_pi=beta_pi),
        "token_tempered": token_tempered(space, policy, ref, beta_pi=beta_pi),
        "half": torch.logaddexp(log_pi, log_ref) - math.log(2),
        "stale": token_tempered(space, before, ref, beta_pi=beta_pi),
        "uncorrected": log_pi,
    }


def token_tempered(space: SequenceSpace, policy: Tensor, ref: Tensor, *, beta_pi: float) -> Tensor:
    """log mu [X, N], mu(a | prefix) proportional to policy(a | prefix)^beta_pi ref(a | prefix)^(1 - beta_pi)."""
    scaled = beta_pi * (policy - ref)
    # The sum over next tokens is a mean under the reference, given all tokens before.
    log_z = fitted_values(space, ref.sum(-1), scaled.exp(), order=space.length - 1).log()
    counted = space.counted(space.tokens())
    return torch.where(counted, ref + scaled - log_z, 0.0).sum(-1)


def _log_weights(name: str, log_pi: Tensor, log_ref: Tensor, log_mu: Tensor, beta_pi: float) -> Tensor:
    """Of which p_f is the softmax over candidates."""
    f = beta_pi * (log_pi - log_ref)
    return f if name == "uncorrected" else f + log_ref - log_mu


def refreshed(*, k: int, refreshes: int, corrected: bool, **settings: Any) -> np.ndarray:
    """KL(pi_theta||pi*) [1 + refreshes] of the minimisers of the expected loss, each on candidates of the last."""
    problem = two_modes(**settings)
    log_ref = log_mu = problem.log_ref
    policy = KGramPolicy(problem.space, 0)
    path = []
    for _ in range(refreshes + 1):

        def objective(log_pi: Tensor, log_mu: Tensor = log_mu) -> Tensor:
            call: dict[str, Any] = {"k": k, "beta_pi": 1.0, "beta_r": problem.beta}
            if corrected:
                return expected_exo_rw_loss(log_pi[0], log_ref, problem.reward, log_proposal=log_mu, **call)
            at_mu = torch.log_softmax(log_pi[0] - log_ref + log_mu, -1)
            return expected_exo_rw_loss(at_mu, log_mu, problem.reward, **call)

        minimize(policy, objective, certify=False)
        log_mu = policy.log_probs().detach()[0]
        path.append(kl_divergence(log_mu, problem.log_pi_star).item())
    return np.array(path)


def best_kl(**settings: Any) -> float:
    """The least KL(pi_theta||pi*) of a policy without memory, from a start near the better mode."""
    problem = two_modes(**settings)
    policy = near_mode(problem, problem.modes[0])
    return minimize(policy, lambda log_pi: kl_divergence(log_pi[0], problem.log_pi_star), certify=False).value


def numbers(config: Config, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Of each proposal at the start, in the middle and at the end; what it has more than the reference's candidates.

    Progress over noise, per sample: what the mean gradient has along that of its limit, negative if it points away,
    over the square root of K times the trace of the covariance.
    """
    places = {"start": 0, "middle": len(arrays["steps"]) // 2, "end": len(arrays["steps"]) - 1}
    ratio = np.log(arrays["variance"] * arrays["ks"]) - np.log(arrays["signal"])
    progress = arrays["cosine"] * np.exp(-ratio / 2)
    by_beta_pi = {}
    for b, beta_pi in enumerate(config.beta_pis):
        by_beta_pi[f"{beta_pi:g}"] = {
            stage: {
                "kl_to_reference": float(arrays["kl_to_reference"][b, :, place].mean()),
                "proposals": {
                    name: {
                        "share": float(arrays["share"][b, :, place, q].mean()),
                        "noise_to_signal": dict(_named(config, np.exp(ratio[b, :, place, q].mean(0)))),
                        "progress_over_noise": dict(_named(config, progress[b, :, place, q].mean(0))),
                        "more_progress": _by_k(config, progress[b, :, place, q] - progress[b, :, place, 0]),
                        "cosine": dict(_named(config, arrays["cosine"][b, :, place, q].mean(0))),
                        "distance": dict(_named(config, arrays["distance"][b, :, place, q].mean(0))),
                    }
                    for q, name in enumerate(PROPOSALS)
                },
                "others": {
                    name: dict(
                        _named(config, np.exp(np.log(arrays["other_ratio"] * arrays["ks"])[b, :, place, o].mean(0)))
                    )
                    for o, name in enumerate(OTHERS)
                },
            }
            for stage, place in places.items()
        }
    tempered = PROPOSALS.index("tempered")
    return {
        "proposals": list(PROPOSALS),
        "sampled": list(SAMPLED),
        "others": list(OTHERS),
        "stages": {stage: int(arrays["steps"][place]) for stage, place in places.items()},
        "by_beta_pi": by_beta_pi,
        "worst_tempered_distance": float(arrays["distance"][..., tempered, :].max()),
        "refreshed": {
            correction: {str(k): arrays["refreshed_kl"][c, i].tolist() for i, k in enumerate(config.mode_ks)}
            for c, correction in enumerate(CORRECTIONS)
        },
    }


def _named(config: Config, values: np.ndarray) -> list[tuple[str, float]]:
    """Each K with its number of [K]."""
    return [(str(k), float(value)) for k, value in zip(config.ks, values, strict=True)]


def _by_k(config: Config, values: np.ndarray) -> dict[str, dict[str, float]]:
    """Means over seeds with their intervals, of [seeds, K]."""
    return {str(k): mean_over_seeds(values[:, i], config.resamples) for i, k in enumerate(config.ks)}


if __name__ == "__main__":
    runner.main("refreshed_candidates")
