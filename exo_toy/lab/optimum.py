"""Where the exact expected loss is least: over a full table, and over a family that cannot hold two modes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from exo_toy.divergences import total_variation
from exo_toy.lab.draws import draws, expected_loss, n_candidates
from exo_toy.lab.scores import score_of
from exo_toy.lab.subject import Scene, Subject
from exo_toy.targets import optimal_policy

# A probability below this is on its way to zero; those of pi* here are above 1e-3.
VANISHED = 1e-7
# Stands for NaN and infinity where something is minimised.
UNDEFINED = 1e30
# A smooth loss takes some tens; an unbounded one any number.
MOST_EVALUATIONS = 300
# Relative departure up to which a function counts as found; the minimiser's own error is some hundred times smaller.
FOUND = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 1e-2}
LABELLED = Scene(
    torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64).log(),
    torch.tensor([0.0, 0.7, -0.4, 1.1, 0.3], dtype=torch.float64),
    torch.tensor([1, 3, 2, 2, 4]),
)
# Where to start besides the reference. Not towards pi*, where what cannot move would seem to have arrived.
AROUND = np.array([1.0, -1.0, 0.5, -0.5, 1.0])
FEWER = Scene(LABELLED.log_ref[:3].log_softmax(-1), LABELLED.reward[:3], LABELLED.lengths[:3])


@dataclass(frozen=True)
class TabularOptimum:
    """The minimiser over full tables.

    Attributes:
        verdict: "undefined" where no finite expected loss with its gradient was met, "no gradient" where that is 0 at
            all starts, "pi*", "pi* at another temperature", "f-divergence", "win rates", "increasing in the reward",
            "not increasing in the reward", "the reference", "on the boundary" or "unbounded".
        k: number of completions that the loss reads at once.
        log_pi: [N]; NaN where undefined.
        log_pi_star: [N].
        distance: total variation between both; NaN where undefined.
        temperature: beta of the optimal policy that it is, where it is one.
        gradient: largest entry of the gradient there, by beta_pi times the logits.
    """

    verdict: str
    k: int
    log_pi: Tensor
    log_pi_star: Tensor
    distance: float
    temperature: float | None
    gradient: float


@dataclass(frozen=True)
class Capacity:
    """The minimiser among binomial policies on three completions; probability at either mode, and between.

    NaN where no expected loss is finite.
    """

    k: int
    masses: tuple[float, float, float]


def of_kind(subject: Subject, scene: Scene) -> Scene:
    """The scene for this loss: rewards in units of beta_r; a uniform reference where the loss knows none."""
    scale = subject.beta_r if subject.kind == "list" else 1.0
    n = len(scene.log_ref)
    uniform = torch.full_like(scene.log_ref, -math.log(n))
    log_ref = uniform if subject.kind == "reference-free" else scene.log_ref
    return Scene(log_ref, scene.reward * scale, scene.lengths)


def pi_star(subject: Subject, scene: Scene) -> Tensor:
    """The optimal policy of the scene's reward at beta_pi beta_r."""
    return optimal_policy(scene.log_ref, scene.reward, beta=subject.beta_pi * subject.beta_r)[0]


def tabular_optimum(subject: Subject, *, k: int, scene: Scene | None = None) -> TabularOptimum:
    """Minimise the exact expected loss over full tables, from the reference and from around it."""
    # Three completions where every pair takes a call of its own.
    scene = of_kind(subject, scene or (FEWER if subject.by_row else LABELLED))
    n = len(scene.log_ref)
    index, weight = draws(subject.kind, scene, k, ordered=subject.ordered)
    target = pi_star(subject, scene)

    def table(vector: Tensor) -> Tensor:
        # In units of the log ratios that the loss sees, whatever beta is.
        return (scene.log_ref + vector[:n] / subject.beta_pi).log_softmax(-1)

    def value_and_gradient(vector: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(vector.copy()).requires_grad_()
        there = replace(scene, value=x[n]) if subject.kind == "valued" else scene
        value = expected_loss(subject, there, table(x), index, weight) / subject.size
        (gradient,) = torch.autograd.grad(value, x)
        if not (math.isfinite(value.item()) and gradient.isfinite().all()):
            return UNDEFINED, np.zeros_like(vector)
        return value.item(), gradient.numpy()

    n_values = int(subject.kind == "valued")
    starts = [np.append(sign * AROUND[:n], np.zeros(n_values)) for sign in (0.0, 1.0, -1.0)]
    slopes = [value_and_gradient(start) for start in starts]
    flat = all(value < UNDEFINED and not gradient.any() for value, gradient in slopes)
    best = None
    for start in starts[:1] if subject.by_row else starts:
        options = {"maxfun": MOST_EVALUATIONS, "ftol": 1e-16, "gtol": 1e-11, "maxcor": 20}
        found = scipy.optimize.minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
        if best is None or found.fun < best.fun - 1e-12 * max(1.0, abs(best.fun)):
            best = found
    assert best is not None
    at, gradient = _polished(value_and_gradient, best.x)
    log_pi = table(torch.from_numpy(at)).detach()
    distance = float(total_variation(log_pi, target))
    verdict, temperature = _verdict(subject, scene, log_pi, distance, float(best.fun))
    if flat:
        verdict, temperature = "no gradient", None
    if verdict == "undefined":
        log_pi, distance = torch.full_like(log_pi, math.nan), math.nan
    return TabularOptimum(verdict, n_candidates(subject.kind, k), log_pi, target, distance, temperature, gradient)


def _polished(
    value_and_gradient: Callable[[np.ndarray], tuple[float, np.ndarray]], x: np.ndarray
) -> tuple[np.ndarray, float]:
    """Newton's steps for as long as they make the largest entry of the gradient smaller; that entry."""
    step = 1e-5 * np.eye(len(x))
    value, gradient = value_and_gradient(x)
    for _ in range(3):
        hessian = [(value_and_gradient(x + row)[1] - value_and_gradient(x - row)[1]) / 2e-5 for row in step]
        # A constant added to all logits changes nothing: that direction has no curvature.
        nearer = x - np.linalg.pinv(np.stack(hessian), rcond=1e-7) @ gradient
        lower, there = value_and_gradient(nearer)
        # To a minimum, and not to any point without a gradient.
        if lower > value + 1e-9 * max(1.0, abs(value)) or not np.abs(there).max() < np.abs(gradient).max():
            break
        x, value, gradient = nearer, lower, there
    return x, float(np.abs(gradient).max())


def _verdict(subject: Subject, scene: Scene, log_pi: Tensor, distance: float, value: float) -> tuple[str, float | None]:
    """In words, and the temperature where there is one."""
    if value >= UNDEFINED:
        return "undefined", None
    if value < -100 or not math.isfinite(value):
        return "unbounded", None
    if log_pi.min() < math.log(VANISHED) and pi_star(subject, scene).min() > math.log(VANISHED) + 3:
        return "on the boundary", None
    found = FOUND[subject.precision]
    if distance < found:
        return "pi*", subject.beta_pi * subject.beta_r
    log_ratio = log_pi - scene.log_ref
    if log_ratio.abs().max() < found:
        return "the reference", None
    slope = _affine(log_ratio, scene.reward, found)
    if slope is not None and slope > 0:
        return "pi* at another temperature", 1 / slope
    score = score_of(subject)
    if score is not None and _affine(score(log_ratio), scene.reward, found) is not None:
        return "f-divergence", None
    win_rate = (scene.reward[:, None] - scene.reward).sigmoid() @ scene.log_ref.exp()
    if _affine(log_ratio, win_rate, found) is not None:
        return "win rates", None
    increasing = bool((log_ratio[scene.reward.argsort()].diff() > -found).all())
    return ("increasing in the reward" if increasing else "not increasing in the reward"), None


def _affine(values: Tensor, of: Tensor, found: float) -> float | None:
    """The slope if one is an affine function of the other."""
    x, y = of - of.mean(), values - values.mean()
    slope = float((x @ y) / (x @ x))
    return slope if (y - slope * x).abs().max() < found * max(float(y.abs().max()), 1e-3) else None


# Two modes at the ends, which the binomial policies with their one parameter cannot both hold.
TWO_MODES = Scene(
    torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log(),
    torch.tensor([6.0, 0.0, 6.5], dtype=torch.float64),
    torch.tensor([1, 1, 1]),
)


def capacity(subject: Subject, *, k: int) -> Capacity:
    """The best of the policies (q^2, 2 q (1-q), (1-q)^2) under the exact expected loss, by a grid and refinement."""
    scene = of_kind(subject, TWO_MODES)
    scene = Scene(scene.log_ref, scene.reward * subject.beta_pi, scene.lengths)
    index, weight = draws(subject.kind, scene, k, ordered=subject.ordered)

    def at(logit: float, fitted: float = 0.0) -> float:
        there = replace(scene, value=torch.tensor(fitted, dtype=torch.float64))
        with torch.no_grad():
            total = expected_loss(subject, there, binomial(logit), index, weight).item() / subject.size
        return total if math.isfinite(total) else UNDEFINED

    def value(logit: float) -> float:
        if subject.kind != "valued":
            return at(logit)
        return float(scipy.optimize.minimize_scalar(lambda fitted: at(logit, fitted)).fun)

    grid = np.linspace(-8, 8, 33)
    best = grid[int(np.argmin([value(float(logit)) for logit in grid]))]
    found = scipy.optimize.minimize_scalar(value, bounds=(best - 0.5, best + 0.5), method="bounded")
    low, middle, high = binomial(float(found.x) if found.fun < UNDEFINED else math.nan).exp().tolist()
    return Capacity(n_candidates(subject.kind, k), (low, middle, high))


def binomial(logit: float) -> Tensor:
    """Log-probabilities of the number of heads in two throws."""
    heads, tails = torch.nn.functional.logsigmoid(torch.tensor([logit, -logit], dtype=torch.float64))
    return torch.stack([2 * tails, math.log(2) + heads + tails, 2 * heads])
