"""What the losses on K candidates share: their weights, and the Laplace transforms of sums of weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from exo_toy import checks
from exo_toy.gradient_noise.noise import require_finite, rows_inside

# The trapezoidal rule on t = exp(u) errs by 2 |Gamma(4 + 2 pi i / step)| / Gamma(4), relative, on t^4 exp(-t) du: below
# 1e-17 at this step, 5e-13 at 1/4. A multiple of a power of two, so that all nodes are exact.
STEP = 0.1875
LOG_ZERO = -1e4


class Candidates(NamedTuple):
    """What candidates are drawn from and how they are weighted, where the reference is positive.

    Attributes:
        scores: [n, P] gradients of log pi.
        p: [n] probabilities of being drawn.
        f: [n] beta_pi times the log ratio, up to a constant.
        scaled_reward: [n] r / beta_r, up to a constant.
        correction: [n] log reference minus log proposal.
    """

    scores: Tensor
    p: Tensor
    f: Tensor
    scaled_reward: Tensor
    correction: Tensor


def drawn_candidates(
    scores: Tensor,
    log_pi: Tensor,
    log_ref: Tensor,
    reward: Tensor,
    beta_pi: float | int,
    beta_r: float | int,
    log_proposal: Tensor | None,
    most_spread: float,
) -> Candidates:
    """Checked arguments of a loss on candidates from the proposal, by default the reference."""
    checks.require_positive(beta_pi=beta_pi, beta_r=beta_r)
    given = {"log_pi": log_pi, "log_ref": log_ref, "reward": reward}
    if log_proposal is not None:
        given["log_proposal"] = log_proposal
    tables = dict(zip(given, checks.as_tables(**given), strict=True))
    normalised = {name: tables[name] for name in ("log_ref", "log_proposal") if name in tables}
    checks.require_log_probabilities(**normalised)
    log_ref = tables.pop("log_ref")
    require_finite(log_ref, "log_ref", **tables)
    inside = log_ref > -torch.inf
    beyond = ~inside & (tables.get("log_proposal", log_ref) > -torch.inf)
    if beyond.any():
        got = checks.first_bad(tables["log_proposal"], beyond)
        raise ValueError(f"log_proposal must be -inf where log_ref is; got {got}")
    scores = rows_inside("scores", scores, log_ref)
    log_ref = log_ref[inside]
    log_pi, reward, log_mu = (tables.get(name, log_ref) for name in ("log_pi", "reward", "log_proposal"))
    log_pi, reward = log_pi[inside], reward[inside]
    log_mu = log_mu[inside] if log_proposal is not None else log_mu
    f, scaled_reward, correction = beta_pi * (log_pi - log_ref), (reward - reward.max()) / beta_r, log_ref - log_mu
    _require_spread("beta_pi", "log ratios", beta_pi, f + correction, most_spread)
    _require_spread("beta_r", "rewards", beta_r, scaled_reward + correction, most_spread)
    return Candidates(scores, log_mu.exp(), f, scaled_reward, correction)


def _require_spread(name: str, what: str, beta: float | int, log_weights: Tensor, most: float) -> None:
    """The quadrature takes nodes all the way from the largest weight to the smallest."""
    spread = (log_weights.max() - log_weights.min()).item()
    # Infinite scaled values differ by NaN.
    if not spread <= most:
        raise ValueError(
            f"{name} must leave the {what} spread over at most {most:.0e} nats once scaled and corrected for the "
            f"proposal; got {beta!r}, over {spread:.3g} nats"
        )


def log_transform(deviation: Tensor, plain: Tensor) -> Tensor:
    """log M from M - 1, exact near M = 1, and from M itself, exact far from it; a finite number stands for log 0."""
    return torch.where(deviation > -0.5, deviation.log1p(), plain.log()).clamp(min=LOG_ZERO)


def power(log_m: Tensor, n: int) -> Tensor:
    """M^n, of n further candidates; what has fewer than none of them counts nothing."""
    return torch.exp(max(n, 0) * log_m)
