"""What vanishing gradients cost: EXO's losses forget pairs that are badly misordered, DPO's do not.

1. The gradient of each loss of a pair against the margin, in closed form and by autograd of the losses.
2. The time that gradient flow on the margin takes from a misordered pair to an ordered one; the same in steps of
   gradient descent, where they are few enough to take.
3. Training of a whole policy: gradient flow on the logits of a full table under the exactly expected losses, from a
   policy that gives the completion which pi* wants far too little. Either the reference does so too, and the margins
   start at zero ("reference"): what is rare is then hardly ever drawn. Or the policy alone has got there, the margins
   start far from zero ("policy") and EXO's weights are saturated. Reported: the time until J has made up nine tenths
   of what it lacks, times the largest curvature L on the way: the steps of gradient descent at the rate 1/L, half of
   that at which it becomes unstable; and the steps that Adam takes at one rate.

Everything is exact; nothing is sampled.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from analysis import runner
from analysis.alignment_ablations import expected_loss
from exo_toy.divergences import kl_divergence
from exo_toy.losses import dpo_loss, dpo_rw_loss, exo_pref_loss, exo_rw_loss
from exo_toy.margins import dpo_flow_time, dpo_margin_gradient, exo_flow_time, exo_margin_gradient
from exo_toy.objectives import kl_optimal_to_policy

LOSSES = ("exo_rw", "dpo_rw", "exo_pref", "dpo_pref")
# Losses at K = 2 and at more candidates, and the divergences that they tend to. On Bradley-Terry labels the expected
# DPO loss is that of DPO-rw at K = 2.
TRAININGS = ("exo_rw", "exo_pref", "dpo_pref", "exo_rw_many", "dpo_rw_many", "reverse_kl", "forward_kl")
SCENARIOS = ("reference", "policy")
# Of the path, at which the curvature is computed.
POINTS = 50


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the reported run."""

    # Difference of rewards over beta_r of the losses on rewards, and eps of EXO-pref.
    target: float = 2.0
    label_smoothing: float = 1e-3
    farthest: float = 30.0
    # Margins from which a pair is corrected, up to the one of even odds.
    misordered: tuple[float, ...] = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0)
    descent_rate: float = 0.5
    most_steps: int = 20_000
    n_completions: int = 6
    beta: float = 0.5
    many: int = 64
    # What pi* gives the completion that matters, and what the start gives it: e^-wrong.
    wanted: float = 0.8
    wrong_reference: tuple[float, ...] = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0)
    wrong_policy: tuple[float, ...] = (2.0, 4.0, 8.0, 12.0, 16.0, 20.0)
    # Gradient flow is given up after so long.
    longest: float = 1e12
    adam_rate: float = 0.02
    adam_steps: int = 2000
    # Of the gap in J at the start.
    remaining: float = 0.1
    seed: int = 0


PRESETS = {
    "quick": Config(
        misordered=(2.0, 6.0, 10.0),
        most_steps=2000,
        many=16,
        wrong_reference=(2.0, 4.0),
        wrong_policy=(4.0, 8.0),
        adam_steps=200,
    ),
    "default": Config(
        misordered=(2.0, 4.0, 8.0, 15.0, 30.0),
        wrong_reference=(2.0, 4.0, 6.0),
        wrong_policy=(4.0, 12.0, 20.0),
        adam_steps=800,
    ),
    "full": Config(),
}


@dataclass(frozen=True)
class Problem:
    """A start from which a completion, the first, is to be raised to what pi* gives it."""

    log_start: Tensor
    log_ref: Tensor
    reward: Tensor
    log_pi_star: Tensor


def run(config: Config) -> runner.Result:
    """All three parts."""
    arrays, largest_error = gradients(config)
    times = correction_times(config)
    descents = [
        {
            "loss": loss,
            "start": -misordered,
            "target": config.target,
            "label_smoothing": config.label_smoothing,
            "rate": config.descent_rate,
            "most": config.most_steps,
        }
        for loss in LOSSES
        for misordered in config.misordered
    ]
    steps = np.reshape(runner.map_cases(descent_steps, descents), (len(LOSSES), -1)).tolist()

    settings = {
        "n": config.n_completions,
        "beta": config.beta,
        "many": config.many,
        "wanted": config.wanted,
        "label_smoothing": config.label_smoothing,
        "remaining": config.remaining,
        "seed": config.seed,
    }
    wrong = {"reference": config.wrong_reference, "policy": config.wrong_policy}
    cases = [
        {"scenario": scenario, "training": training, "wrong": nats}
        for scenario in SCENARIOS
        for nats in reversed(wrong[scenario])  # the longest first
        for training in TRAININGS
    ]
    flows = runner.map_cases(flow_of, [{**settings, **case, "longest": config.longest} for case in cases])
    adams = runner.map_cases(
        adam_of, [{**settings, **case, "rate": config.adam_rate, "most": config.adam_steps} for case in cases]
    )
    found = [{**case, **flow, "adam_steps": adam} for case, flow, adam in zip(cases, flows, adams, strict=True)]
    numbers = {
        "largest_gradient_error": largest_error,
        "correction": {loss: {"time": times[loss], "steps": own} for loss, own in zip(LOSSES, steps, strict=True)},
        "training": found,
        "growth": {
            scenario: {training: growth(found, scenario, training) for training in TRAININGS} for scenario in SCENARIOS
        },
    }
    return runner.Result(numbers, arrays)


def growth(found: list[dict[str, Any]], scenario: str, training: str) -> float:
    """By how much the log of the steps grows with every nat, between the two starts that are most wrong."""
    own = [case for case in found if (case["scenario"], case["training"]) == (scenario, training)]
    before, last = sorted(own, key=lambda case: case["wrong"])[-2:]
    if math.isinf(last["steps"]):
        return math.inf
    return math.log(last["steps"] / before["steps"]) / (last["wrong"] - before["wrong"])


def gradients(config: Config) -> tuple[dict[str, np.ndarray], float]:
    """Gradients against the margin in closed form, [margins], and their largest distance from those of autograd."""
    margin = torch.linspace(-config.farthest, config.farthest, 601, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(margin)
    f = torch.stack([margin, zero], -1)
    r = torch.tensor([config.target, 0.0], dtype=torch.float64).expand_as(f)
    losses = {
        "exo_rw": exo_rw_loss(f, r, beta_pi=1.0, beta_r=1.0),
        "dpo_rw": dpo_rw_loss(f, r, beta_pi=1.0, beta_r=1.0),
        "exo_pref": exo_pref_loss(margin, zero, zero, zero, beta=1.0, label_smoothing=config.label_smoothing).losses,
        "dpo_pref": dpo_loss(margin, zero, zero, zero, beta=1.0).losses,
    }
    arrays, errors = {"margin": margin.detach().numpy()}, []
    for name, loss in losses.items():
        (by_autograd,) = torch.autograd.grad(loss.sum(), margin)
        closed = margin_gradient(name, margin.detach(), config.target, config.label_smoothing)
        errors.append((closed - by_autograd).abs().max().item())
        arrays[f"gradient_{name}"] = closed.numpy()
    return arrays, max(errors)


def target_of(loss: str, target: float, label_smoothing: float) -> float:
    """The margin that a loss aims at: of rewards, or of one label."""
    if loss == "dpo_pref":
        return math.inf
    return math.log((1 - label_smoothing) / label_smoothing) if loss == "exo_pref" else target


def margin_gradient(loss: str, margin: Tensor, target: float, label_smoothing: float) -> Tensor:
    """Closed form of a loss by name."""
    of_margin = exo_margin_gradient if loss.startswith("exo") else dpo_margin_gradient
    return of_margin(margin, target=target_of(loss, target, label_smoothing))


def correction_times(config: Config) -> dict[str, list[float]]:
    """Times of gradient flow from each misordered margin to even odds, by loss."""
    starts = -torch.tensor(config.misordered, dtype=torch.float64)
    end = torch.zeros_like(starts)
    times = {}
    for loss in LOSSES:
        flow_time = exo_flow_time if loss.startswith("exo") else dpo_flow_time
        target = target_of(loss, config.target, config.label_smoothing)
        times[loss] = flow_time(starts, end, target=target).tolist()
    return times


def descent_steps(*, loss: str, start: float, target: float, label_smoothing: float, rate: float, most: int) -> float:
    """Steps of gradient descent on the margin until even odds; infinite where more than ``most``."""
    margin = torch.tensor(start, dtype=torch.float64)
    for step in range(1, most + 1):
        margin = margin - rate * margin_gradient(loss, margin, target, label_smoothing)
        if margin >= 0:
            return float(step)
    return math.inf


def problem_of(*, scenario: str, wrong: float, n: int, beta: float, wanted: float, seed: int) -> Problem:
    """The first completion has probability e^-wrong at the start; the others share the rest of it in one proportion."""
    rest = torch.randn(n - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)

    def with_first(log_p: float) -> Tensor:
        return torch.cat([torch.tensor([log_p], dtype=torch.float64), rest + math.log(-math.expm1(log_p))])

    log_start = with_first(-wrong)
    # An even reference where only the policy is wrong.
    log_ref = log_start if scenario == "reference" else with_first(-math.log(n))
    log_pi_star = with_first(math.log(wanted))
    return Problem(log_start, log_ref, beta * (log_pi_star - log_ref), log_pi_star)


def objective_of(training: str, problem: Problem, *, beta: float, many: int, label_smoothing: float) -> Any:
    """The expected loss of a training, of log pi [1, N]; beta_pi = beta, beta_r = 1 as with labels."""
    log_ref, reward = problem.log_ref.unsqueeze(0), problem.reward.unsqueeze(0)
    if training == "forward_kl":
        return lambda log_pi: kl_optimal_to_policy(log_pi, log_ref, reward, beta_pi=1.0, beta_r=beta).mean()
    # Its J is in the unit of the reward, beta times the divergence.
    if training == "reverse_kl":
        return lambda log_pi: kl_divergence(log_pi, problem.log_pi_star).mean()
    method, k = training.removesuffix("_many"), many if training.endswith("_many") else 2
    return expected_loss(method, log_ref, reward, beta=beta, k=k, split=beta, label_smoothing=label_smoothing)


class Descent:
    """Gradient of an objective with respect to the logits [N] of a full table, and what J still lacks."""

    def __init__(self, training: str, problem: Problem, **settings: Any) -> None:
        self.problem = problem
        self.objective = objective_of(training, problem, **settings)
        self.at_start = self.gap(problem.log_start)

    def gap(self, logits: Tensor) -> float:
        """KL(pi || pi*), J's gap over beta."""
        return kl_divergence(logits.log_softmax(-1), self.problem.log_pi_star).item()

    def share(self, logits: Tensor) -> float:
        """Of the gap at the start."""
        return self.gap(logits) / self.at_start

    def gradient(self, logits: Tensor) -> Tensor:
        """[N]"""
        logits = logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.objective(logits.log_softmax(-1).unsqueeze(0)), logits)
        return gradient

    def curvature(self, logits: Tensor) -> float:
        """The largest eigenvalue of the Hessian."""
        logits = logits.detach().requires_grad_()
        value = self.objective(logits.log_softmax(-1).unsqueeze(0))
        (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
        rows = [torch.autograd.grad(entry, logits, retain_graph=True)[0] for entry in gradient]
        return torch.linalg.eigvalsh(torch.stack(rows)).max().item()


def descent_of(
    *, scenario: str, training: str, wrong: float, n: int, beta: float, many: int, wanted: float,
    label_smoothing: float, seed: int,
) -> Descent:  # fmt: skip
    """The start of one training."""
    problem = problem_of(scenario=scenario, wrong=wrong, n=n, beta=beta, wanted=wanted, seed=seed)
    return Descent(training, problem, beta=beta, many=many, label_smoothing=label_smoothing)


def flow_of(*, remaining: float, longest: float, **case: Any) -> dict[str, float]:
    """Gradient flow until the share of J's gap is ``remaining``: its time, and its largest curvature times that."""
    descent = descent_of(**case)

    def there(_: float, logits: np.ndarray) -> float:
        return descent.share(torch.from_numpy(logits)) - remaining

    there.terminal = True  # type: ignore[attr-defined]
    path = solve_ivp(
        lambda _, logits: -descent.gradient(torch.from_numpy(logits.copy())).numpy(),
        (0.0, longest), descent.problem.log_start.numpy(), method="LSODA", events=there, rtol=1e-8, atol=1e-10,
    )  # fmt: skip
    least = min(descent.share(torch.from_numpy(logits)) for logits in path.y.T)
    # A stop after the longest time may also be at the loss's own optimum.
    if path.status != 1:
        return {"time": math.inf, "steps": math.inf, "least_share": least}
    along = path.y.T[:: max(1, path.y.shape[1] // POINTS)]
    curvature = max(descent.curvature(torch.from_numpy(logits.copy())) for logits in along)
    return {"time": path.t[-1], "steps": path.t[-1] * curvature, "least_share": least}


def adam_of(*, remaining: float, rate: float, most: int, **case: Any) -> float:
    """Steps of Adam until the share of J's gap is ``remaining``; infinite where more than ``most``."""
    descent = descent_of(**case)
    logits = descent.problem.log_start.clone()
    adam = torch.optim.Adam([logits], lr=rate)
    for step in range(1, most + 1):
        logits.grad = descent.gradient(logits)
        adam.step()
        if descent.share(logits) <= remaining:
            return float(step)
    return math.inf


if __name__ == "__main__":
    runner.main("vanishing_gradients")
