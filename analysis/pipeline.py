"""Every stage of alignment in a world of reviews, from fine-tuning to a policy that is measured exactly.

A policy of limited capacity is fine-tuned on what people write (one for all runs: the reference). Each run then draws
completions from it, K to a prompt and group; an oracle labels pairs of them; a reward model is fitted to the labels;
and the reference is aligned with one method:

* exo_rw, dpo_rw: on the groups, with the reward model's rewards and beta_pi * beta_r = beta;
* exo_pref, dpo_pref: on the labelled pairs themselves, with beta;
* ppo: with the reward model's rewards and fresh completions at each step, as many as the others take from the data,
  so that in all it sees many more; ppo_few draws no more than the others have, and descends on each batch longer, to
  as many descents as theirs;
* sft: maximum likelihood of the chosen completions, without a beta.

Along its training everything is evaluated on all completions. Runs of one seed share completions, labels and reward
model, so that methods are compared in pairs.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from exo_toy import logspace
from exo_toy.divergences import entropy, kl_divergence
from exo_toy.estimators import bootstrap_mean
from exo_toy.evaluation import effective_share, frontier, win_rate
from exo_toy.losses import dpo_loss, dpo_rw_loss, exo_pref_loss, exo_rw_loss
from exo_toy.policies import GRUPolicy, KGramPolicy, LowRankPolicy, TransformerPolicy, closest_kgram
from exo_toy.policies.autoregressive import AutoregressivePolicy
from exo_toy.reviews import ReviewWorld
from exo_toy.targets import optimal_policy
from exo_toy.training import align, draw_candidates, fine_tune, fit_reward, label_pairs, ppo

METHODS = ("exo_rw", "dpo_rw", "exo_pref", "dpo_pref", "ppo", "ppo_few", "sft")
PAIRED = ("exo_pref", "dpo_pref", "sft")
# What is measured of each prompt at a checkpoint; "model" is the reward model, "optimum" belongs to either reward.
METRICS = (
    "oracle_reward", "model_reward", "kl_to_reference", "entropy",
    "oracle_objective", "model_objective",
    "oracle_kl_to_optimum", "oracle_kl_from_optimum", "model_kl_to_optimum", "model_kl_from_optimum",
    "win_against_reference", "win_against_chosen", "model_win_against_reference", "model_win_against_chosen",
    "mode_mass", "effective_share",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One world, one reference, one data set per seed: all of a run but its method, temperature and seed."""

    length: int = 6
    policy: str = "gru"
    size: int = 8
    tuning_steps: int = 1500
    tuning_batch: int = 64
    tuning_rate: float = 0.02
    # Completions of each prompt: the sample budget of all methods but PPO, which takes its own.
    completions: int = 1024
    k: int = 4
    hard_labels: bool = False
    reward_order: int = 1
    ridge: float = 0.01
    label_smoothing: float = 1e-3
    # beta_pi / beta_r of the losses on rewards.
    split: float = 1.0
    steps: int = 400
    batch: int = 64
    rate: float = 0.01
    epochs: int = 2
    value_order: int = 1
    value_rate: float = 0.05
    checkpoints: int = 10
    n_modes: int = 3

    def __post_init__(self) -> None:
        for name in ("completions", "batch"):
            if getattr(self, name) % self.k:
                raise ValueError(f"{name} must be a multiple of k = {self.k}; got {getattr(self, name)}")
        if self.completions % 2:
            raise ValueError(f"completions must be even, to make pairs; got {self.completions}")
        if self.batch > self.completions:
            raise ValueError(f"batch must be at most the {self.completions} completions; got {self.batch}")


class Reference(NamedTuple):
    """The fine-tuned policy, as module and as table, and the world it is of."""

    world: ReviewWorld
    policy: AutoregressivePolicy
    log_ref: Tensor
    oracle: Tensor


class Data(NamedTuple):
    """What a seed draws: groups [X, G, K], labelled pairs [X, P, 2], and the reward model's table [X, N]."""

    groups: Tensor
    pairs: Tensor
    model: Tensor


def setting_of(config: Setting, **changed: Any) -> dict[str, Any]:
    """The settings of a run in plain values, without those of the sweep that it belongs to."""
    own = {field.name for field in fields(Setting)}
    return {**{name: value for name, value in asdict(config).items() if name in own}, **changed}


def checkpoints(setting: Setting) -> np.ndarray:
    """Steps after which a policy is evaluated: the start, then ever farther apart to the end."""
    return np.unique(np.round(setting.steps * np.linspace(0, 1, setting.checkpoints + 1) ** 2).astype(int))


def aligned(setting: dict[str, Any], method: str, beta: float, seed: int) -> dict[str, np.ndarray]:
    """One run: metrics [C, M, X] and masses of the modes [C, X, m] at each checkpoint."""
    options = Setting(**setting)
    reference, data = fine_tuned(options), drawn(options, seed)
    policy = copy.deepcopy(reference.policy)
    # The losses on pairs have but one temperature.
    beta_pi = beta if method in PAIRED else math.sqrt(beta * options.split)
    evaluator = Evaluator(reference, data, beta, options, beta_pi)
    at, rows, modes = set(checkpoints(options).tolist()), [], []
    # The first comes before the first step.
    for step, _ in enumerate(itertools.chain((None,), trained(policy, reference, data, options, method, beta, seed))):
        if step in at:
            with torch.no_grad():
                log_pi = policy.log_probs()
            rows.append(evaluator.metrics(log_pi).numpy())
            modes.append(evaluator.modes(log_pi).numpy())
    kl, value = (rows[-1][METRICS.index(name)].mean().item() for name in ("kl_to_reference", "oracle_reward"))
    best = frontier(reference.log_ref, reference.oracle, kl=max(0.0, kl)).reward
    return {"metrics": np.stack(rows), "modes": np.stack(modes), "below_frontier": np.array(best - value)}


@functools.cache
def fine_tuned(setting: Setting) -> Reference:
    """The reference: the same in every process."""
    world = ReviewWorld(length=setting.length)
    generator = torch.Generator().manual_seed(0)
    log_human = world.log_human()
    policy = build(setting, world, generator)
    if isinstance(policy, KGramPolicy):
        # Its likelihood is maximised in closed form.
        policy = closest_kgram(world.space, log_human, setting.size)
    else:
        tuning = {"batch_size": setting.tuning_batch, "steps": setting.tuning_steps}
        for _ in fine_tune(policy, log_human, learning_rate=setting.tuning_rate, generator=generator, **tuning):
            pass
    with torch.no_grad():
        return Reference(world, policy, policy.log_probs(), world.oracle_reward())


def build(setting: Setting, world: ReviewWorld, generator: torch.Generator) -> AutoregressivePolicy:
    """An untrained policy for all prompts."""
    space, size, n_prompts = world.space, setting.size, world.n_prompts
    if setting.policy == "kgram":
        return KGramPolicy(space, size, n_prompts=n_prompts)
    if setting.policy == "low_rank":
        return LowRankPolicy(space, size, n_prompts=n_prompts, generator=generator)
    if setting.policy == "transformer":
        return TransformerPolicy(space, size, 2, 1, n_prompts=n_prompts, generator=generator)
    if setting.policy == "gru":
        return GRUPolicy(space, size, n_prompts=n_prompts, generator=generator)
    raise ValueError(f'policy must be "kgram", "low_rank", "gru" or "transformer"; got {setting.policy!r}')


@functools.lru_cache(maxsize=16)
def drawn(setting: Setting, seed: int) -> Data:
    """Completions, labels and reward model of a seed."""
    reference = fine_tuned(setting)
    generator = torch.Generator().manual_seed(1 + seed)
    groups = draw_candidates(reference.log_ref, setting.completions // setting.k, setting.k, generator)
    pairs = groups.flatten(1).unflatten(1, (-1, 2))
    pairs = label_pairs(pairs, reference.oracle, None if setting.hard_labels else generator)
    model = fit_reward(reference.world.space, pairs, order=setting.reward_order, ridge=setting.ridge)
    return Data(groups, pairs, model.table())


def trained(
    policy: AutoregressivePolicy,
    reference: Reference,
    data: Data,
    setting: Setting,
    method: str,
    beta: float,
    seed: int,
) -> Iterator[float]:
    """The steps of one method's training."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    shared: dict[str, Any] = {"steps": setting.steps, "learning_rate": setting.rate, "generator": generator}
    if method in ("ppo", "ppo_few"):
        # As many batches as the data would fill, and a descent on each for every step that is left out.
        batches = min(setting.steps, setting.completions // setting.batch)
        descents = setting.steps // batches
        few = {"steps": batches, "epochs": descents} if method == "ppo_few" else {"epochs": setting.epochs}
        steps = ppo(
            policy,
            reference.policy,
            data.model,
            beta=beta,
            batch_size=setting.batch,
            value_order=setting.value_order,
            value_learning_rate=setting.value_rate,
            **{**shared, **few},
        )
        if method == "ppo":
            return steps
        # Checkpoints count descents.
        counted = (value for value in steps for _ in range(descents))
        return itertools.chain(counted, itertools.repeat(math.nan, setting.steps - batches * descents))
    groups = data.pairs if method in PAIRED else data.groups
    loss = group_loss(method, beta, setting)
    batch_size = setting.batch // groups.shape[-1]
    return align(policy, groups, reference.log_ref, data.model, loss, batch_size=batch_size, **shared)


def group_loss(method: str, beta: float, setting: Setting) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss of groups of candidates [B, K] -> [B]; of pairs with the chosen completion first."""
    beta_pi, beta_r, eps = math.sqrt(beta * setting.split), math.sqrt(beta / setting.split), setting.label_smoothing
    losses: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "exo_rw": lambda log_pi, log_ref, r: exo_rw_loss(log_pi - log_ref, r, beta_pi=beta_pi, beta_r=beta_r),
        "dpo_rw": lambda log_pi, log_ref, r: dpo_rw_loss(log_pi - log_ref, r, beta_pi=beta_pi, beta_r=beta_r),
        "exo_pref": lambda log_pi, log_ref, _: (
            exo_pref_loss(*log_pi.T, *log_ref.T, beta=beta, label_smoothing=eps).losses
        ),
        "dpo_pref": lambda log_pi, log_ref, _: dpo_loss(*log_pi.T, *log_ref.T, beta=beta).losses,
        "sft": lambda log_pi, _, __: -log_pi[:, 0],
    }
    return losses[method]


class Evaluator:
    """All that is measured of a policy of one run, on all completions."""

    def __init__(self, reference: Reference, data: Data, beta: float, setting: Setting, beta_pi: float) -> None:
        self.log_ref, self.beta, self.beta_pi = reference.log_ref, beta, beta_pi
        self.rewards = {"oracle": reference.oracle, "model": data.model}
        self.optima = {name: optimal_policy(self.log_ref, r, beta=beta)[0] for name, r in self.rewards.items()}
        # The chosen completions, each as likely as it is frequent among them.
        chosen = data.pairs[..., 0]
        share = torch.full(chosen.shape, 1 / chosen.shape[-1], dtype=torch.float64)
        self.log_chosen = torch.zeros_like(self.log_ref).scatter_add_(-1, chosen, share).log()
        self.mode_index = self.optima["oracle"].topk(setting.n_modes).indices

    def metrics(self, log_pi: Tensor) -> Tensor:
        """[M, X] in the order of ``METRICS``."""
        kl = kl_divergence(log_pi, self.log_ref)
        values = {"kl_to_reference": kl, "entropy": entropy(log_pi)}
        for name, reward in self.rewards.items():
            values[f"{name}_reward"] = logspace.expectation(log_pi, reward)
            values[f"{name}_objective"] = values[f"{name}_reward"] - self.beta * kl
            values[f"{name}_kl_to_optimum"] = kl_divergence(log_pi, self.optima[name])
            values[f"{name}_kl_from_optimum"] = kl_divergence(self.optima[name], log_pi)
        for judge, prefix in (("oracle", ""), ("model", "model_")):
            values[f"{prefix}win_against_reference"] = win_rate(log_pi, self.log_ref, self.rewards[judge])
            values[f"{prefix}win_against_chosen"] = win_rate(log_pi, self.log_chosen, self.rewards[judge])
        values["mode_mass"] = self.modes(log_pi).sum(-1)
        values["effective_share"] = effective_share(self.beta_pi * (log_pi - self.log_ref), self.log_ref)
        return torch.stack([values[name] for name in METRICS])

    def modes(self, log_pi: Tensor) -> Tensor:
        """[X, m] masses of the completions that the optimum of the oracle's reward likes best."""
        return log_pi.gather(-1, self.mode_index).exp()


def point(log_pi: Tensor, log_ref: Tensor, reward: Tensor) -> tuple[float, float]:
    """(KL to the reference, reward), means over prompts."""
    return kl_divergence(log_pi, log_ref).mean().item(), logspace.expectation(log_pi, reward).mean().item()


def mean_over_seeds(values: np.ndarray, resamples: int) -> dict[str, float]:
    """Mean of [seeds] values and the 95 % bootstrap interval."""
    table = torch.from_numpy(np.ascontiguousarray(values))
    low, high = bootstrap_mean(table, generator=torch.Generator().manual_seed(0), n_resamples=resamples)
    return {"mean": table.mean().item(), "low": low.item(), "high": high.item()}
