"""The alpha-divergences between DPO-rw (alpha = 0) and EXO-rw (alpha = 1), and beyond, on policies and on candidates.

Two planted modes on sequences under a uniform reference, and a policy without memory, which cannot hold both modes:

1. The minimiser of D_alpha(pi_theta||pi*), the limit K to infinity, and of the exactly expected loss at K candidates,
   along alpha: from the reference, from near either mode, and from the optima of the neighbouring alphas, upwards and
   downwards; its mode masses, both KL divergences and J. Sequences with as many tokens of either mode are alike, and so
   is each position to the policy: the completions are counted in classes, and the policy has two parameters.
2. The same optima among all policies without memory, every position its own logits: gradient, Hessian, other starts.
3. At the reference and with a full table: the cosine of the expected gradient at K to that of its limit and to that of
   KL(pi_theta||pi*), reinforcement learning's.

Everything is exact. ``python -m analysis.alpha_divergences --help`` lists the settings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import runner
from analysis.mode_seeking import add_distinct, describe, random_policy, two_modes
from exo_toy.divergences import alpha_divergence, kl_divergence
from exo_toy.finite_k import expected_alpha_rw_loss
from exo_toy.objectives import alignment_objective
from exo_toy.policies import KGramPolicy
from exo_toy.targets import optimal_policy
from exo_toy.training import Optimum, minimize

# Logits of the two modes' tokens stay between plus and minus this: beyond alpha = 1 the quadrature is exact for weights
# spread over no more than 60 nats, ten for each position, and a line search would leave them.
STEEPEST = 4.9
# Free parameters, near the logits.
STARTS = ((0.0, 0.0), (2.0, 0.0), (0.0, 2.0))
LIMIT = "inf"


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the reported run."""

    vocab_size: int = 4
    length: int = 6
    second_weight: float = 0.8
    width: float = 1 / 1.5
    beta: float = 0.5
    betas: tuple[float, ...] = (0.25, 0.5, 1.0)
    alphas: tuple[float, ...] = tuple(i / 8 for i in range(-2, 13))
    ks: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 256)
    # Optima held against all policies without memory; those of the limit always are.
    checked_ks: tuple[int, ...] = (4, 32)
    checked_alphas: tuple[float, ...] = (0.5, 1.0)
    checked_starts: int = 2
    reference_alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    seed: int = 0


PRESETS = {
    "quick": Config(
        length=3, betas=(0.5,), alphas=(0.0, 1.0, 1.25), ks=(4,), checked_ks=(), checked_starts=1,
        reference_alphas=(0.0, 0.5, 1.0),
    ),
    "default": Config(
        betas=(0.5,), alphas=(0.0, 0.25, 0.5, 0.75, 1.0, 1.25), ks=(4, 16, 256), checked_ks=(),
    ),
    "full": Config(),
}  # fmt: skip


def run(config: Config) -> runner.Result:
    """Evaluate every case; numbers for the claims, arrays [betas, ks and the limit, alphas] for the figure."""
    problem = {name: getattr(config, name) for name in ("vocab_size", "length", "second_weight", "width")}
    alphas = sorted(config.alphas)
    cases: list[dict[str, Any]] = [
        {**problem, "beta": beta, "k": k, "alphas": alphas} for beta in config.betas for k in (*config.ks, None)
    ]
    sweeps = runner.map_cases(sweep, cases)
    optima = [optimum for found in sweeps for optimum in found]

    checked = [
        {**problem, **{key: optimum[key] for key in ("beta", "k", "alpha", "logits", "value")}}
        for optimum in optima
        if optimum["beta"] == config.beta
        and optimum["alpha"] in config.checked_alphas
        and optimum["k"] in (None, *config.checked_ks)
    ]
    extra = {"starts": config.checked_starts, "seed": config.seed}
    full_space = runner.map_cases(in_full_space, [{**case, **extra} for case in checked])
    at_reference = runner.map_cases(
        gradients_at_reference,
        [{**problem, "beta": config.beta, "ks": list(config.ks), "alpha": alpha} for alpha in config.reference_alphas],
    )
    shape = (len(config.betas), len(config.ks) + 1, len(alphas))
    arrays = {
        name: np.array([optimum[name] for optimum in optima]).reshape(*shape, *tail)
        for name, tail in (
            ("share_of_gain", ()),
            ("mode_masses", (2,)),
            ("kl_policy_to_optimal", ()),
            ("kl_optimal_to_policy", ()),
            ("n_optima", ()),
        )
    }
    targets = {str(beta): TwoModes(beta=beta, **problem).target_numbers() for beta in config.betas}
    numbers = {
        "target": targets,
        "optima": optima,
        "best": {
            str(beta): {
                str(k or LIMIT): best_alpha(alphas, arrays["share_of_gain"][i, j], arrays["mode_masses"][i, j], target)
                for j, k in enumerate((*config.ks, None))
            }
            for i, (beta, target) in enumerate(zip(config.betas, targets.values(), strict=True))
        },
        "full_space": full_space,
        "at_reference": at_reference,
    }
    return runner.Result(numbers, {"alphas": np.array(alphas), "ks": np.array(config.ks), **arrays})


class TwoModes:
    """Two planted modes, completions in classes of as many tokens of the first and of the second mode."""

    def __init__(self, **settings: Any) -> None:
        self.problem = two_modes(**settings)
        self.beta = self.problem.beta
        tokens = self.problem.space.tokens()
        self.length, self.vocab_size = self.problem.space.length, self.problem.space.vocab_size
        counts = torch.stack([(tokens == mode[0]).sum(-1) for mode in self.problem.modes], -1)
        self.counts, of_class, sizes = counts.unique(dim=0, return_inverse=True, return_counts=True)
        member = torch.empty(len(sizes), dtype=torch.int64).scatter_(0, of_class, torch.arange(len(tokens)))
        self.log_size = sizes.double().log()
        self.log_ref = self.problem.log_ref[member] + self.log_size
        self.reward = self.problem.reward[member]
        self.log_pi_star, _ = optimal_policy(self.log_ref, self.reward, beta=self.beta)
        self.mode_classes = (self.counts == self.length).any(-1).nonzero()[:, 0].flip(0)

    def objective(self, alpha: float, k: int | None) -> Callable[[Tensor], Tensor]:
        """Of the policy's table [1, classes]."""
        return objective(self.log_ref, self.reward, self.log_pi_star, beta=self.beta, alpha=alpha, k=k)

    def j(self, log_pi: Tensor) -> float:
        """The regularised reward."""
        return alignment_objective(log_pi, self.log_ref, self.reward, beta=self.beta).item()

    def measure(self, log_pi: Tensor) -> dict[str, Any]:
        """Everything reported of a policy [classes]."""
        start = self.j(self.log_ref)
        return {
            "mode_masses": log_pi[self.mode_classes].exp().tolist(),
            "kl_policy_to_optimal": kl_divergence(log_pi, self.log_pi_star).item(),
            "kl_optimal_to_policy": kl_divergence(self.log_pi_star, log_pi).item(),
            "objective": self.j(log_pi),
            "share_of_gain": (self.j(log_pi) - start) / (self.j(self.log_pi_star) - start),
        }

    def target_numbers(self) -> dict[str, Any]:
        """The optimal policy, measured like any other."""
        return self.measure(self.log_pi_star)


class AlikePolicy(torch.nn.Module):
    """Independent positions, all alike: a logit for the token of either mode, 0 for the others."""

    def __init__(self, problem: TwoModes, free: tuple[float, ...] | list[float]) -> None:
        super().__init__()
        self.problem = problem
        self.free = torch.nn.Parameter(torch.tensor(free, dtype=torch.float64))

    @property
    def logits(self) -> Tensor:
        """[2]: of the first mode's token and of the second's."""
        return STEEPEST * torch.tanh(self.free / STEEPEST)

    def log_token_probs(self) -> Tensor:
        """[3]: the first mode's token, the second's, any other."""
        n_others = self.problem.vocab_size - 2
        return torch.cat([self.logits, self.free.new_zeros(n_others)]).log_softmax(-1)[:3]

    def log_probs(self) -> Tensor:
        """[1, classes]"""
        counts = self.problem.counts.double()
        others = self.problem.length - counts.sum(-1, keepdim=True)
        each = torch.cat([counts, others], -1) @ self.log_token_probs()
        return (self.problem.log_size + each).unsqueeze(0)


def objective(
    log_ref: Tensor, reward: Tensor, log_pi_star: Tensor, *, beta: float, alpha: float, k: int | None
) -> Callable[[Tensor], Tensor]:
    """The expected loss at K candidates, or its limit, of a policy's table [1, N]."""
    if k is None:
        return lambda log_pi: alpha_divergence(log_pi[0], log_pi_star, alpha=alpha)
    return lambda log_pi: expected_alpha_rw_loss(log_pi[0], log_ref, reward, k=k, alpha=alpha, beta_pi=1.0, beta_r=beta)


def sweep(*, k: int | None, alphas: list[float], **settings: Any) -> list[dict[str, Any]]:
    """The best minimiser at each alpha, in increasing order, and how many distinct ones were found."""
    problem = TwoModes(**settings)
    found: dict[float, list[tuple[Optimum, Tensor]]] = {alpha: [] for alpha in alphas}

    def search(alpha: float, starts: list[Any]) -> None:
        for start in starts:
            policy = AlikePolicy(problem, start)
            optimum = minimize(policy, problem.objective(alpha, k), certify=False)
            add_distinct(found[alpha], optimum, policy.log_probs().detach()[0])

    before: list[list[float]] = []
    for alpha in alphas:
        search(alpha, [*STARTS, *before])
        before = [optimum.parameters.tolist() for optimum, _ in found[alpha]]
    for alpha in reversed(alphas[:-1]):
        # Downwards only what is not known there yet: a branch of minima that the starts and the way up missed.
        if len(before) > len(found[alpha]):
            search(alpha, before)
        before = [optimum.parameters.tolist() for optimum, _ in found[alpha]]
    return [summary(problem, k, alpha, [optimum for optimum, _ in found[alpha]]) for alpha in alphas]


def summary(problem: TwoModes, k: int | None, alpha: float, optima: list[Optimum]) -> dict[str, Any]:
    """The best of the minimisers, certified and measured."""
    optima = sorted(optima, key=lambda optimum: optimum.value)
    policy = AlikePolicy(problem, optima[0].parameters.tolist())
    best = minimize(policy, problem.objective(alpha, k), newton_steps=2)
    return {
        "beta": problem.beta,
        "k": k,
        "alpha": alpha,
        "n_optima": len(optima),
        "optima_values": [optimum.value for optimum in optima],
        "logits": policy.logits.tolist(),
        **describe(best),
        **problem.measure(policy.log_probs().detach()[0]),
    }


def in_full_space(
    *, k: int | None, alpha: float, logits: list[float], value: float, starts: int, seed: int, **settings: Any
) -> dict[str, Any]:
    """An optimum among all policies without memory: its certificate there, and what other starts reach."""
    problem = two_modes(**settings)
    function = objective(problem.log_ref, problem.reward, problem.log_pi_star, beta=problem.beta, alpha=alpha, k=k)
    policy = KGramPolicy(problem.space, 0)
    with torch.no_grad():
        for table in policy.parameters():
            for mode, logit in zip(problem.modes, logits, strict=True):
                table[..., mode[0]] = logit
    certificate = minimize(policy, function, newton_steps=0)
    generator = torch.Generator().manual_seed(seed)
    others = [
        minimize(random_policy(problem.space, 0, generator), function, certify=False).value for _ in range(starts)
    ]
    return {
        "beta": problem.beta,
        "k": k,
        "alpha": alpha,
        **describe(certificate),
        # Below 0 would be a better policy, or a better value than the one of the two parameters.
        "least_excess": min(other - value for other in (*others, certificate.value)),
    }


def gradients_at_reference(*, ks: list[int], alpha: float, **settings: Any) -> dict[str, Any]:
    """With a full table: cosines of the expected gradient to the limit's and RL's; its projection, times K/(K-1)."""
    problem = TwoModes(**settings)

    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        logits = problem.log_ref.clone().requires_grad_()
        (found,) = torch.autograd.grad(function(logits.log_softmax(-1).unsqueeze(0)), logits)
        # Of a class of n completions each has 1/n: the length is that of all completions' gradients.
        return found * torch.exp(-problem.log_size / 2)

    limit, rl = gradient(problem.objective(alpha, None)), gradient(problem.objective(1.0, None))
    at = {k: gradient(problem.objective(alpha, k)) for k in ks}
    return {
        "alpha": alpha,
        "cosine_to_limit": {str(k): torch.cosine_similarity(g, limit, 0).item() for k, g in at.items()},
        "cosine_to_rl": {str(k): torch.cosine_similarity(g, rl, 0).item() for k, g in at.items()},
        "scale": {str(k): (g @ limit / (limit @ limit)).item() * k / (k - 1) for k, g in at.items()},
    }


def best_alpha(alphas: list[float], share: np.ndarray, masses: np.ndarray, target: dict[str, Any]) -> dict[str, Any]:
    """Which alpha gives the highest J, of all and of those in [0, 1]; from which on the policy chooses a mode."""
    within = [i for i, alpha in enumerate(alphas) if 0 <= alpha <= 1]
    best, best_within = int(share.argmax()), max(within, key=lambda i: share[i])
    wanted = np.array(target["mode_masses"])
    chooses = [alpha for alpha, mass in zip(alphas, masses, strict=True) if (mass >= wanted).sum() == 1]
    return {
        "alpha": alphas[best],
        "share": float(share[best]),
        "alpha_within": alphas[best_within],
        "share_within": float(share[best_within]),
        "share_by_alpha": {str(alpha): float(value) for alpha, value in zip(alphas, share, strict=True)},
        "chooses_a_mode_from": min(chooses) if chooses else None,
    }


if __name__ == "__main__":
    runner.main("alpha_divergences")
