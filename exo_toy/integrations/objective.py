"""The loss of each prompt of a batch, by the name in the settings or by a callable."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from exo_toy.integrations.config import (
    LOSSES_ON_PAIRS,
    LOSSES_ON_PROPOSALS,
    LOSSES_ON_REWARDS,
    CandidateConfig,
    loss_settings,
)

Loss = Callable[..., Tensor]


def candidate_losses(
    policy_logps: Float[Tensor, "B K"],
    ref_logps: Float[Tensor, "B K"],
    batch: Mapping[str, Tensor],
    config: CandidateConfig,
    loss: Loss | None = None,
) -> Float[Tensor, " B"]:
    """The loss of each prompt.

    Args:
        policy_logps: [B, K] log-probabilities of the candidates under the policy, 0 where masked; for losses on pairs
            chosen and rejected, K = 2.
        ref_logps: [B, K] under the reference, 0 where masked.
        batch: ``rewards`` and ``candidate_mask`` [B, K], and ``log_weights`` [B, K] where candidates come from a
            proposal; a loss on pairs takes no such weights.
        config: the loss by name, and the temperatures.
        loss: in its place, called as ``loss(log_ratio, rewards, mask=mask)``, with ``log_weights=`` where they are.

    Returns:
        [B].

    Raises:
        ValueError: what the losses refuse; a callable that returns anything else than a tensor [B].
    """
    rewards, mask = batch["rewards"], batch["candidate_mask"]
    weights: dict[str, Any] = {"log_weights": batch["log_weights"]} if "log_weights" in batch else {}
    if loss is not None:
        result = loss(policy_logps - ref_logps, rewards, mask=mask, **weights)
        if not isinstance(result, Tensor) or result.shape != rewards.shape[:1]:
            got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"loss must return a tensor [B], one loss per prompt, [{len(rewards)}]; got {got}")
        return result
    settings = loss_settings(config)
    if weights and config.loss not in LOSSES_ON_PROPOSALS:
        raise ValueError(f"log_weights must be absent for loss={config.loss!r}, which knows no proposal; got them")
    if config.loss in LOSSES_ON_REWARDS:
        return LOSSES_ON_REWARDS[config.loss](policy_logps - ref_logps, rewards, mask=mask, **settings, **weights)
    pair = (policy_logps[:, 0], policy_logps[:, 1], ref_logps[:, 0], ref_logps[:, 1])
    return LOSSES_ON_PAIRS[config.loss](*pair, **settings).losses
