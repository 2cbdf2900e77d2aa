"""Checked tables of a problem as log weights of the candidates."""

import torch
from torch import Tensor

from exo_toy import checks

MOST_SPREAD = 1e5


def log_weights(
    log_pi: Tensor,
    log_ref: Tensor,
    reward: Tensor,
    k: int,
    beta_pi: float | int,
    beta_r: float | int,
    log_proposal: Tensor | None,
    most_spread: float = MOST_SPREAD,
) -> tuple[Tensor, Tensor, Tensor]:
    """log w and log v, up to constants and 0 outside the proposal's support, and the proposal."""
    checks.require_integer("k", k, at_least=1)
    log_pi, log_ref, reward, log_mu = _finite_tables(log_pi, log_ref, reward, beta_pi, beta_r, log_proposal)
    outside = log_ref == -torch.inf
    log_ref = log_ref.masked_fill(outside, 0.0)
    log_ratio = log_pi.masked_fill(outside, 0.0) - log_ref
    rewards = reward.masked_fill(outside, 0.0)
    # Neither loss sees a constant added to f or to the reward; taking maxima off before scaling keeps shifts exact.
    log_w = beta_pi * (log_ratio - _max_over(log_ratio, outside))
    log_v = (rewards - _max_over(rewards, outside)) / beta_r
    if log_proposal is not None:
        correction = log_ref - log_mu.masked_fill(outside, 0.0)
        log_w, log_v = log_w + correction, log_v + correction
    _require_spread("beta_pi", "log ratios", beta_pi, log_w, outside, most_spread)
    _require_spread("beta_r", "rewards", beta_r, log_v, outside, most_spread)
    return log_w, log_v, log_mu


def _finite_tables(
    log_pi: Tensor,
    log_ref: Tensor,
    reward: Tensor,
    beta_pi: float | int,
    beta_r: float | int,
    log_proposal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy, reference, reward and proposal in float64 and one shape, finite wherever the reference is positive."""
    checks.require_positive(beta_pi=beta_pi, beta_r=beta_r)
    given = {"log_pi": log_pi, "log_ref": log_ref, "reward": reward}
    if log_proposal is not None:
        given["log_proposal"] = log_proposal
    tables = dict(zip(given, checks.as_tables(**given), strict=True))
    checks.require_log_probabilities(**{name: table for name, table in tables.items() if name != "reward"})
    log_mu = tables.get("log_proposal", tables["log_ref"])
    log_pi, log_ref, reward, log_mu = torch.broadcast_tensors(*list(tables.values())[:3], log_mu)
    inside = log_ref > -torch.inf
    bad_pi, bad_reward = inside & ~log_pi.isfinite(), inside & ~reward.isfinite()
    missing, beyond = inside & (log_mu == -torch.inf), ~inside & (log_mu > -torch.inf)
    first_bad = checks.first_bad
    checks.require_values(
        [log_pi.detach(), reward.detach(), log_mu.detach()],
        (bad_pi, lambda: f"log_pi must be finite where log_ref is; got {first_bad(log_pi, bad_pi)}"),
        (bad_reward, lambda: f"reward must be finite where log_ref is; got {first_bad(reward, bad_reward)}"),
        (missing, lambda: f"log_proposal must be finite where log_ref is; got {first_bad(log_mu, missing)}"),
        (beyond, lambda: f"log_proposal must be -inf where log_ref is; got {first_bad(log_mu, beyond)}"),
    )
    return log_pi, log_ref, reward, log_mu


def _require_spread(name: str, what: str, beta: float | int, scaled: Tensor, outside: Tensor, most: float) -> None:
    """The quadrature needs a node for every quarter of a nat between the largest and the smallest."""
    above = _max_over(scaled, outside) - scaled.detach()
    spread = above.masked_fill(outside, 0.0).max().item()
    if not spread <= most:
        raise ValueError(
            f"{name} must leave the {what} spread over at most {most:.0e} nats once scaled; "
            f"got {beta!r}, over {spread:.3g} nats"
        )


def _max_over(values: Tensor, outside: Tensor) -> Tensor:
    """Maximum over the reference's support, kept as a last dimension, without gradient."""
    return values.detach().masked_fill(outside, -torch.inf).amax(-1, keepdim=True)
