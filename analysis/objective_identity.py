"""To how many digits the exact identities hold: their residuals over thousands of drawn problems.

Problems differ in space, prompts, policy class, temperatures and rewards, both over more than two decades, so that
rewards over their temperature reach a thousand nats. Every identity is evaluated twice: as stated, and with its
temperature (or label smoothing) one per cent off on one side only, which it must not survive. Beside that stand the
optimum itself, against perturbed policies and as found by maximising the objective under several splits of the penalty,
and what EXO on preference labels recovers of a reward.

A relative error is the largest difference of the sides over their largest entry. A side can be a small difference of
large terms: where a policy is almost a point mass, the gradient of an expectation is p(y) h(y) less p(y) E_p[h]. No
arithmetic knows it better than those terms, so a residual is relative to the largest of them (``LARGEST_TERM``), where
that is larger than the sides. The numbers hold both.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from analysis import runner
from analysis.runner import Result
from exo_toy import finite_k, theorems
from exo_toy.divergences import kl_divergence, total_variation
from exo_toy.logspace import expectation
from exo_toy.losses import dpo_rw_loss, exo_pref_loss, exo_rw_loss
from exo_toy.objectives import alignment_objective, generalized_objective
from exo_toy.policies import KGramPolicy, Policy, TabularPolicy
from exo_toy.spaces import SequenceSpace
from exo_toy.targets import optimal_policy, tempered_policy
from exo_toy.theorems import Theorem

# (V, T, eos): from 2 to 125 completions.
SPACES = ((2, 1, None), (2, 4, None), (3, 3, None), (4, 3, 0), (5, 3, None), (3, 4, 2), (2, 6, 1), (7, 2, None))
ENUMERABLE = 5  # completions whose tuples of candidates are enumerated
# With this factor on one side's temperature, an identity has to fail.
WRONG = 1.01
# Digits of a float64: a residual of zero counts as this many.
MOST_DIGITS = 16.0
SPLITS = ("ppo", "dpo", "geometric")


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the reported run. Scales and temperatures are drawn log-uniformly between bounds."""

    seed: int = 0
    problems: int = 3000
    chunk: int = 100
    lowest_temperature: float = 0.05
    highest_temperature: float = 20.0
    lowest_scale: float = 0.1
    highest_logit_scale: float = 5.0
    highest_reward_scale: float = 30.0
    largest_k: int = 2**20
    perturbations: int = 20
    split_problems: int = 60
    split_size: int = 9
    split_starts: int = 3
    lowest_split_beta: float = 0.1
    highest_split_beta: float = 2.0
    label_smoothing: tuple[float, ...] = (0.001, 0.01, 0.1192, 0.3)
    reward_gap: float = 0.01


PRESETS = {
    "quick": Config(problems=120, chunk=20, split_problems=3),
    "default": Config(problems=600, chunk=50, split_problems=10),
    "full": Config(),
}


@dataclass(frozen=True)
class Problem:
    """A policy, tables [X, N] of a reference and a reward, temperatures, and the indices [X, K] of some candidates."""

    policy: Policy
    log_ref: Tensor
    reward: Tensor
    beta_pi: float
    beta_r: float
    k: int
    candidates: Tensor
    label_smoothing: float

    @property
    def betas(self) -> dict[str, Any]:
        """Both temperatures, as keyword arguments."""
        return {"beta_pi": self.beta_pi, "beta_r": self.beta_r}

    @property
    def log_pi(self) -> Tensor:
        """[X, N] of the policy, without gradient."""
        return self.policy.log_probs().detach()

    @property
    def log_tempered(self) -> Tensor:
        """[X, N] of the tempered policy."""
        return tempered_policy(self.log_pi, self.log_ref, beta_pi=self.beta_pi)

    @property
    def log_pi_star(self) -> Tensor:
        """[X, N] of the optimal policy of the reward temperature."""
        return optimal_policy(self.log_ref, self.reward, beta=self.beta_r)[0]

    @property
    def candidate_tables(self) -> tuple[Tensor, Tensor]:
        """[X, K] log ratios and rewards of the candidates."""
        return (self.log_pi - self.log_ref).gather(-1, self.candidates), self.reward.gather(-1, self.candidates)

    @property
    def candidate_log_softmaxes(self) -> tuple[Tensor, Tensor]:
        """[X, K] log p_f and log p_r of the candidates."""
        log_ratio, rewards = self.candidate_tables
        return (self.beta_pi * log_ratio).log_softmax(-1), (rewards / self.beta_r).log_softmax(-1)

    @property
    def at_reference(self) -> "Problem":
        """The same with the policy as its own reference."""
        return dataclasses.replace(self, log_ref=self.log_pi)

    @property
    def small(self) -> "Problem":
        """The same on the first few completions, few enough for all tuples of candidates, with a full table."""
        policy = TabularPolicy(SequenceSpace(min(ENUMERABLE, self.log_ref.shape[-1]), 1), n_prompts=len(self.log_ref))
        n = policy.space.size
        with torch.no_grad():
            policy.logits.copy_(self.log_pi[:, :n])
        log_ref, reward = self.log_ref[:, :n].log_softmax(-1), self.reward[:, :n]
        return dataclasses.replace(self, policy=policy, log_ref=log_ref, reward=reward, k=2 + self.k % 3)


def run(config: Config) -> Result:
    """Residuals of all identities, the optimum found from several splits, and what preferences recover."""
    settings = asdict(config)
    firsts = range(0, config.problems, config.chunk)
    counts = [min(config.chunk, config.problems - first) for first in firsts]
    chunks = runner.map_cases(
        residuals_case,
        [{"settings": settings, "first": first, "count": count} for first, count in zip(firsts, counts, strict=True)],
    )
    splits = runner.map_cases(split_case, [{"settings": settings, "index": i} for i in range(config.split_problems)])
    arrays = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
    arrays |= {f"split_distance.{split}": np.array([case[split] for case in splits]) for split in SPLITS}
    return Result(_numbers(config, arrays), arrays)


def _numbers(config: Config, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The worst and the typical of every identity."""
    control = {name: digits(arrays[f"control.{name}"]) for name in IDENTITIES}
    return {
        "problems": config.problems,
        "worst_residual": {name: arrays[f"residual.{name}"].max() for name in IDENTITIES},
        "worst_problem": {name: int(arrays[f"residual.{name}"].argmax()) for name in IDENTITIES},
        "worst_relative_error": {name: arrays[f"relative_error.{name}"].max() for name in IDENTITIES},
        "median_digits": {name: np.median(digits(arrays[f"residual.{name}"])) for name in IDENTITIES},
        "control_median_digits": {name: np.median(control[name]) for name in IDENTITIES},
        "control_share_above_ten_digits": {name: (control[name] > 10).mean() for name in IDENTITIES},
        "optimum_excess": arrays["optimum_excess"].max(),
        "perturbed_policies": config.problems * config.perturbations,
        "split_problems": config.split_problems,
        # Of the best of several starts; and how many of all runs ended elsewhere, saturated.
        "split_distance": {split: arrays[f"split_distance.{split}"][:, 0].max() for split in SPLITS},
        "split_share_saturated": {split: (arrays[f"split_distance.{split}"] > 1e-6).mean() for split in SPLITS},
        "exo_pref_recovered_reward": {
            f"{eps:g}": recovered_reward(config.reward_gap, label_smoothing=eps) / config.reward_gap
            for eps in config.label_smoothing
        },
    }


def digits(residual: np.ndarray) -> np.ndarray:
    """Digits to which the sides agree."""
    return -np.log10(np.maximum(residual, 10.0**-MOST_DIGITS))


def draw_problem(config: Config, index: int) -> Problem:
    """The problem of this number; the same for any number of problems."""
    rng = np.random.default_rng([config.seed, index])

    def log_uniform(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    def normal(shape: tuple[int, ...], highest_scale: float) -> Tensor:
        return torch.from_numpy(log_uniform(config.lowest_scale, highest_scale) * rng.standard_normal(shape))

    vocab_size, length, eos = SPACES[rng.integers(len(SPACES))]
    space = SequenceSpace(vocab_size, length, eos)
    n_prompts = int(rng.integers(1, 4))
    shape = (n_prompts, space.size)
    order = int(rng.integers(-1, length))  # -1: a full table
    policy = TabularPolicy(space, n_prompts=n_prompts) if order < 0 else KGramPolicy(space, order, n_prompts=n_prompts)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(normal(tuple(parameter.shape), config.highest_logit_scale))
    return Problem(
        policy=policy,
        log_ref=normal(shape, config.highest_logit_scale).log_softmax(-1),
        reward=normal(shape, config.highest_reward_scale),
        beta_pi=log_uniform(config.lowest_temperature, config.highest_temperature),
        beta_r=log_uniform(config.lowest_temperature, config.highest_temperature),
        k=round(log_uniform(2, config.largest_k)),
        candidates=torch.from_numpy(rng.integers(space.size, size=(n_prompts, int(rng.integers(2, 17))))),
        label_smoothing=log_uniform(1e-4, 0.45),
    )


def _optimum(p: Problem) -> Theorem:
    """At pi*_beta the gradient of the reward balances that of the penalty, for the logits of a full table."""
    logits = p.log_pi_star.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    (of_reward,) = torch.autograd.grad(expectation(log_pi, p.reward).sum(), logits, retain_graph=True)
    (of_penalty,) = torch.autograd.grad(p.beta_r * kl_divergence(log_pi, p.log_ref).sum(), logits)
    return Theorem(of_reward, of_penalty, ("the policy is the optimal policy of beta",))


def _exo_pref(p: Problem) -> Theorem:
    """EXO-pref on the first two candidates against KL(p_f || p_h) written out, beta = beta_pi beta_r."""
    chosen, rejected = p.candidate_tables[0][:, :2].unbind(-1)
    zero = torch.zeros_like(chosen)
    loss = exo_pref_loss(
        chosen, rejected, zero, zero, beta=p.beta_pi * p.beta_r, label_smoothing=p.label_smoothing
    ).losses
    log_p_f, log_p_h = _pair_probabilities(p)
    return Theorem(loss, expectation(log_p_f, log_p_f - log_p_h), ("one human label, smoothed",))


def _pair_probabilities(p: Problem) -> tuple[Tensor, Tensor]:
    """log p_f [X, 2] and log p_h [2] of EXO-pref, the first candidate chosen."""
    chosen, rejected = p.candidate_tables[0][:, :2].unbind(-1)
    margin = p.beta_pi * p.beta_r * (chosen - rejected)
    zero = torch.zeros_like(margin)
    log_p_f = -torch.stack([torch.logaddexp(zero, -margin), torch.logaddexp(zero, margin)], -1)
    return log_p_f, torch.tensor([math.log1p(-p.label_smoothing), math.log(p.label_smoothing)], dtype=torch.float64)


def _enumeration(p: Problem) -> Theorem:
    """Expected losses by quadrature against the sum over all tuples of candidates."""
    p = p.small
    x, n = p.log_ref.shape
    tuples = torch.tensor(list(itertools.product(range(n), repeat=p.k)))
    probability = p.log_ref[:, tuples].sum(-1).exp()
    log_ratio, reward = (table[:, tuples].reshape(-1, p.k) for table in (p.log_pi - p.log_ref, p.reward))
    sums = [
        (probability * loss(log_ratio, reward, **p.betas).reshape(x, -1)).sum(-1) for loss in (exo_rw_loss, dpo_rw_loss)
    ]
    expected = [
        loss(p.log_pi, p.log_ref, p.reward, k=p.k, **p.betas)
        for loss in (finite_k.expected_exo_rw_loss, finite_k.expected_dpo_rw_loss)
    ]
    return Theorem(torch.stack(expected), torch.stack(sums), ())


IDENTITIES: dict[str, Callable[[Problem], Theorem]] = {
    "objective": lambda p: theorems.objective_identity(p.log_pi, p.log_ref, p.reward, beta=p.beta_r),
    "optimum": _optimum,
    "generalized": lambda p: theorems.generalized_objective_identity(p.log_pi, p.log_ref, p.reward, **p.betas),
    "generalized_gradient": lambda p: theorems.generalized_gradient_identity(p.policy, p.log_ref, p.reward, **p.betas),
    "optimum_split": lambda p: theorems.optimum_equivalence(p.log_ref, p.reward, **p.betas),
    "tabular_gradients": lambda p: theorems.tabular_gradients(p.log_pi, p.log_pi_star),
    "exo_rw_sample_gradient": lambda p: theorems.exo_rw_sample_gradient(*p.candidate_tables, **p.betas),
    "dpo_rw_sample_gradient": lambda p: theorems.dpo_rw_sample_gradient(*p.candidate_tables, **p.betas),
    "group_baseline": lambda p: theorems.group_baseline_gradient(*p.at_reference.candidate_tables, **p.betas),
    "exo_rw_at_reference": lambda p: theorems.exo_rw_gradient_at_reference(
        p.policy, p.log_pi, p.reward, k=p.k, **p.betas
    ),
    "dpo_bradley_terry": lambda p: theorems.dpo_bradley_terry_identity(p.policy, p.log_ref, p.reward, **p.betas),
    "exo_pref": _exo_pref,
    "finite_k_enumeration": _enumeration,
}

# The largest of the terms whose difference a side is, where it can be small beside them.
LARGEST_TERM: dict[str, Callable[[Problem], Tensor]] = {
    "objective": lambda p: _value_term(p.log_pi, p),
    "optimum": lambda p: (p.log_pi_star.exp() * (p.reward.abs() + p.beta_r)).max(),
    "generalized": lambda p: _value_term(p.log_tempered, p),
    "generalized_gradient": lambda p: p.beta_pi * p.beta_r * _gradient_term(p.log_tempered, p.log_pi_star),
    "tabular_gradients": lambda p: _gradient_term(p.log_pi, p.log_pi_star),
    "exo_rw_sample_gradient": lambda p: p.beta_pi * _gradient_term(*p.candidate_log_softmaxes),
    "dpo_rw_sample_gradient": lambda p: p.beta_pi * torch.stack(p.candidate_log_softmaxes).exp().max(),
    "group_baseline": lambda p: p.beta_pi / p.beta_r * p.candidate_tables[1].abs().max() / p.candidates.shape[-1],
    "exo_rw_at_reference": lambda p: p.beta_pi * _gradient_term(p.log_pi, p.at_reference.log_pi_star),
    "exo_pref": lambda p: _largest_pair_term(*_pair_probabilities(p)),
}


def _largest_pair_term(log_p_f: Tensor, log_p_h: Tensor) -> Tensor:
    """max p_f |log(p_f/p_h)|."""
    return (log_p_f.exp() * (log_p_f - log_p_h).abs()).max()


def _value_term(log_pi: Tensor, p: Problem) -> Tensor:
    """Of E_pi[r] - beta KL(pi || ref) and beta log Z - beta KL(pi || pi*), the largest with all terms made positive."""
    log_pi_star, log_z = optimal_policy(p.log_ref, p.reward, beta=p.beta_r)
    left = expectation(log_pi, p.reward.abs() + p.beta_r * (log_pi - p.log_ref).abs())
    right = p.beta_r * (log_z.abs() + expectation(log_pi, (log_pi - log_pi_star).abs()))
    return torch.maximum(left, right).max()


def _gradient_term(log_p: Tensor, log_q: Tensor) -> Tensor:
    """max p (|log(p/q)| + 1): the derivative of p log(p/q) with respect to log p is p (log(p/q) + 1)."""
    return (log_p.exp() * ((log_p - log_q).abs() + 1)).max()


def residuals_case(settings: dict[str, Any], first: int, count: int) -> dict[str, np.ndarray]:
    """For some problems: residual, relative error and control of every identity, and the optimum's excess; [count]."""
    config = Config(**settings)
    rows = []
    for index in range(first, first + count):
        problem = draw_problem(config, index)
        wrong = dataclasses.replace(
            problem, beta_r=WRONG * problem.beta_r, label_smoothing=WRONG * problem.label_smoothing
        )
        row = {"optimum_excess": optimum_excess(problem, np.random.default_rng([config.seed, index, 1]), config)}
        for name, identity in IDENTITIES.items():
            theorem = identity(problem)
            control = dataclasses.replace(theorem, right=identity(wrong).right)
            term = LARGEST_TERM[name](problem).item() if name in LARGEST_TERM else 0.0
            row[f"relative_error.{name}"] = theorem.error
            row[f"residual.{name}"] = residual(theorem, term)
            row[f"control.{name}"] = residual(control, term)
        rows.append(row)
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def residual(theorem: Theorem, term: float = 0.0) -> float:
    """Largest difference of the sides over their largest entry, or over a larger term that cancels in them."""
    largest = max(theorem.left.abs().max().item(), theorem.right.abs().max().item())
    return theorem.error * (largest / max(largest, term, math.ulp(0.0)))


def optimum_excess(problem: Problem, rng: np.random.Generator, config: Config) -> float:
    """The most by which a perturbed policy's objective exceeds that of the optimal one, relative; 0 or below."""
    log_pi_star = problem.log_pi_star
    shape = (config.perturbations, *log_pi_star.shape)
    scales = torch.from_numpy(10 ** rng.uniform(-3, 1, size=(config.perturbations, 1, 1)))
    perturbed = (log_pi_star + scales * torch.from_numpy(rng.standard_normal(shape))).log_softmax(-1)
    best, others = (
        alignment_objective(log_pi, problem.log_ref.expand(shape), problem.reward.expand(shape), beta=problem.beta_r)
        for log_pi in (log_pi_star.expand(shape), perturbed)
    )
    term = torch.maximum(_value_term(log_pi_star, problem), _value_term(perturbed, problem))
    return ((others - best).max() / term).item()


def split_case(settings: dict[str, Any], index: int) -> dict[str, list[float]]:
    """Total variation between pi*_beta and the maximisers of the objective, for each split of beta.

    One maximiser for each start, the first of them the reference; the one of largest objective comes first.
    """
    config = Config(**settings)
    rng = np.random.default_rng([config.seed, index, 2])
    beta = math.exp(rng.uniform(math.log(config.lowest_split_beta), math.log(config.highest_split_beta)))
    log_ref, reward, *starts = torch.from_numpy(rng.standard_normal((config.split_starts + 1, config.split_size)))
    log_ref = log_ref.log_softmax(-1)
    log_pi_star, _ = optimal_policy(log_ref, reward, beta=beta)
    betas = {"ppo": (1.0, beta), "dpo": (beta, 1.0), "geometric": (math.sqrt(beta), math.sqrt(beta))}
    out = {}
    for split, (beta_pi, beta_r) in betas.items():
        ends = [
            maximise_objective(log_ref, reward, start, beta_pi=beta_pi, beta_r=beta_r) for start in (log_ref, *starts)
        ]
        ends.sort(key=lambda end: end[0], reverse=True)
        out[split] = [total_variation(log_pi, log_pi_star).item() for _, log_pi in ends]
    return out


def maximise_objective(
    log_ref: Tensor, reward: Tensor, start: Tensor, *, beta_pi: float, beta_r: float
) -> tuple[float, Tensor]:
    """Where L-BFGS on the logits [N] of a full table ends from given ones: generalised objective and policy [N].

    A step that is too long can take a logit so low that its gradient vanishes; such a run ends below the maximum.
    """

    def loss_and_gradient(values: np.ndarray) -> tuple[float, np.ndarray]:
        logits = torch.from_numpy(values).requires_grad_()
        log_pi = logits.log_softmax(-1)
        loss = -generalized_objective(log_pi, log_ref, reward, beta_pi=beta_pi, beta_r=beta_r) / beta_r
        return loss.item(), torch.autograd.grad(loss, logits)[0].numpy()

    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 0.0, "gtol": 1e-13}
    found = scipy.optimize.minimize(loss_and_gradient, start.numpy(), jac=True, method="L-BFGS-B", options=options)
    return -beta_r * float(found.fun), torch.from_numpy(found.x).log_softmax(-1)


def recovered_reward(reward_gap: float, *, label_smoothing: float) -> float:
    """The reward gap of two completions at the optimum of EXO-pref on Bradley-Terry labels of the true gap, beta 1."""
    prefers_first = 1 / (1 + math.exp(-reward_gap))

    def slope(gap: float) -> float:
        margin = torch.tensor([gap], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros_like(margin)
        first, second = (
            exo_pref_loss(sign * margin, zero, zero, zero, beta=1.0, label_smoothing=label_smoothing).losses
            for sign in (1, -1)
        )
        expected = prefers_first * first + (1 - prefers_first) * second
        return torch.autograd.grad(expected.sum(), margin)[0].item()

    # Beyond the smoothed label's own log odds nothing is gained.
    most = math.log((1 - label_smoothing) / label_smoothing)
    return scipy.optimize.brentq(slope, -most, most, xtol=1e-15)


if __name__ == "__main__":
    runner.main("objective_identity")
