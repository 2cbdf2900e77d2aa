"""What the losses share: log ratios after every check, and the implicit rewards that go with a loss."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from exo_toy import checks

# Of log ratios, elementwise and increasing.
Score = Callable[[Tensor], Tensor]


class PreferenceLoss(NamedTuple):
    """What a loss on pairs returns, one entry per example.

    Attributes:
        losses: [B].
        chosen_rewards: [B] implicit rewards, beta times the log ratio of the chosen completion, in nats; detached.
        rejected_rewards: [B] the same of the rejected one.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class UnpairedLoss(NamedTuple):
    """What a loss on single completions returns, one entry per example.

    Attributes:
        losses: [B].
        rewards: [B] implicit rewards, beta times the log ratio, in nats; detached.
    """

    losses: Tensor
    rewards: Tensor


class Ratios(NamedTuple):
    """Log ratios of a batch of pairs, at least in float32, with what is needed to hand back a loss."""

    chosen: Tensor
    rejected: Tensor
    beta: float | int
    dtype: torch.dtype


def margin_of(ratios: Ratios) -> Tensor:
    """Beta times the difference of the log ratios."""
    # Scaled after the subtraction: where beta makes both rewards overflow, their difference would be NaN.
    return ratios.beta * (ratios.chosen - ratios.rejected)


def with_rewards(ratios: Ratios, losses: Tensor) -> PreferenceLoss:
    """The losses and both implicit rewards, detached, in the dtype to return."""
    chosen, rejected = ratios.beta * ratios.chosen.detach(), ratios.beta * ratios.rejected.detach()
    return PreferenceLoss(losses.to(ratios.dtype), chosen.to(ratios.dtype), rejected.to(ratios.dtype))


def pair_ratios(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float | int,
    **others: Tensor,
) -> Ratios:
    """Log ratios of both completions, after the checks of every pair loss; ``others`` [B] share shape and device."""
    policy = dict(policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps)
    ref = dict(ref_chosen_logps=ref_chosen_logps, ref_rejected_logps=ref_rejected_logps)
    checks.require_floating(**policy, **ref, **others)
    checks.require_shape("B", **policy, **ref, **others)
    _check_values(policy, ref)
    dtype = torch.promote_types(policy_chosen_logps.dtype, policy_rejected_logps.dtype)
    compute_dtype = compute_in(dtype, *ref.values(), *others.values())
    checks.require_temperature(compute_dtype, beta=beta)
    chosen = policy_chosen_logps.to(compute_dtype) - ref_chosen_logps.to(compute_dtype)
    rejected = policy_rejected_logps.to(compute_dtype) - ref_rejected_logps.to(compute_dtype)
    return Ratios(chosen, rejected, beta, dtype)


def single_ratio(policy_logps: Tensor, ref_logps: Tensor, **others: Tensor) -> Tensor:
    """The log ratio of a batch of single completions, at least in float32, after the checks."""
    given = dict(policy_logps=policy_logps, ref_logps=ref_logps)
    checks.require_floating(**given, **others)
    checks.require_shape("B", **given, **others)
    policy, ref = policy_logps.detach(), ref_logps.detach()
    not_policy, not_ref = ~(policy < torch.inf), ~ref.isfinite()
    checks.require_values(
        [policy_logps, ref_logps],
        (not_policy, message("policy_logps", "finite or -inf", policy, not_policy)),
        (not_ref, message("ref_logps", "finite", ref, not_ref)),
    )
    compute_dtype = compute_in(policy_logps.dtype, ref_logps, *others.values())
    return policy_logps.to(compute_dtype) - ref_logps.to(compute_dtype)


def policy_logps_of_pair(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> tuple[Tensor, Tensor]:
    """Both log-probabilities, at least in float32, after the checks of the losses without a reference."""
    policy = dict(policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps)
    checks.require_floating(**policy)
    checks.require_shape("B", **policy)
    _check_values(policy, {})
    dtype = torch.promote_types(policy_chosen_logps.dtype, policy_rejected_logps.dtype)
    compute_dtype = compute_in(dtype)
    return policy_chosen_logps.to(compute_dtype), policy_rejected_logps.to(compute_dtype)


def compute_in(dtype: torch.dtype, *others: Tensor) -> torch.dtype:
    """The widest dtype, at least float32."""
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return torch.promote_types(dtype, torch.float32)


def require_finite(**tensors: Tensor) -> None:
    """Every value is finite."""
    for name, tensor in tensors.items():
        bad = ~tensor.detach().isfinite()
        checks.require_values([tensor], (bad, message(name, "finite", tensor.detach(), bad)))


def message(name: str, allowed: str, tensor: Tensor, bad: Tensor) -> Callable[[], str]:
    """What require_values says if ``bad`` holds anywhere."""
    return lambda: f"{name} must be {allowed}; got {checks.first_bad(tensor, bad)}"


def _check_values(policy: dict[str, Tensor], ref: dict[str, Tensor]) -> None:
    """Policy log-probabilities finite or -inf, not both -inf; reference log-probabilities finite."""
    conditions = []
    for name, logps in policy.items():
        bad = ~(logps.detach() < torch.inf)
        conditions.append((bad, message(name, "finite or -inf", logps, bad)))
    for name, logps in ref.items():
        bad = ~logps.detach().isfinite()
        conditions.append((bad, message(name, "finite", logps, bad)))
    chosen, rejected = (logps.detach() for logps in policy.values())
    both = (chosen == -torch.inf) & (rejected == -torch.inf)
    allowed = "above -inf where policy_rejected_logps is -inf"
    conditions.append((both, message("policy_chosen_logps", allowed, chosen, both)))
    checks.require_values([*policy.values(), *ref.values()], *conditions)
