r"""The loss of each prompt of a batch, by the name in the settings or by a callable.

How the losses of :data:`exo_toy.losses.LOSSES` read the data, by their kind:

* list: log ratios and rewards of a prompt's candidates. Ranked: the same, the highest reward first.
* rewarded pair: the mean over all pairs of a prompt's candidates.
* pair: chosen and rejected. Reference-free: their lengths in place of a reference. Batch: sorted over the prompts of a
  batch on one device, so that the gradient depends on how a step is split.
* unpaired with labels (KTO, BCO): the mean over a prompt's completions, one or more, of which those with reward 1 are
  desirable and those with reward 0 are not; of a pair the chosen and the rejected one.
* unpaired with rewards (DRO): the mean over a prompt's candidates, where the value minimises it:
  :math:`V = \frac1K \sum_k (r_k - \tau a_k)`. It is then :math:`\frac{K-1}{4K}` times REBEL at
  :math:`\eta = 1/\tau`.

KTO's reference point and BCO's delta, unless they are given, are estimated over all prompts of an optimiser step,
before it (:func:`label_sums`, :func:`anchor_of`), so that they do not depend on how the step is split.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from exo_toy import losses
from exo_toy.integrations.candidates import check_reward_scale
from exo_toy.integrations.config import (
    ANCHORS,
    LOSSES,
    LOSSES_ON_LABELS,
    LOSSES_ON_PROPOSALS,
    LOSSES_WITHOUT_REFERENCE,
    CandidateConfig,
    is_anchored,
    loss_settings,
    metric_temperatures,
    takes,
)
from exo_toy.integrations.metrics import label_metrics, pair_metrics, prompt_metrics

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
        ref_logps: [B, K] under the reference, 0 where masked; for losses without a reference anything.
        batch: ``rewards`` and ``candidate_mask`` [B, K]; ``log_weights`` [B, K] where candidates come from a proposal,
            for losses that know one; for those that need them ``prompt_weights`` [B] (0 for what does not count),
            ``completion_mask`` [R, T] with ``candidate_rows`` [B, K], and ``anchor``, of :func:`anchor_of`.
        config: the loss by name, and the temperatures.
        loss: in its place, called as ``loss(log_ratio, rewards, mask=mask)``, with ``log_weights=`` where they are.

    Returns:
        [B]; of a loss on the batch as a whole, entry b need not be what prompt b adds to the sum.

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
    if weights and config.loss not in LOSSES_ON_PROPOSALS:
        raise ValueError(f"log_weights must be absent for loss={config.loss!r}, which knows no proposal; got them")
    settings = {**loss_settings(config), **weights}
    if is_anchored(config):
        settings[ANCHORS[config.loss]] = batch["anchor"]
    kind = losses.LOSSES[config.loss].kind
    return _READINGS[kind](LOSSES[config.loss], _Given(policy_logps, ref_logps, batch, settings))


def candidate_metrics(
    policy_logps: Float[Tensor, "B K"],
    ref_logps: Float[Tensor, "B K"],
    batch: Mapping[str, Tensor],
    config: CandidateConfig,
    loss: Loss | None = None,
    *,
    pairs: bool,
) -> dict[str, Tensor]:
    """What is logged of each prompt, of what the loss knows: :mod:`exo_toy.integrations.metrics`.

    Args:
        policy_logps: as of :func:`candidate_losses`.
        ref_logps: as of :func:`candidate_losses`.
        batch: as of :func:`candidate_losses`.
        config: as of :func:`candidate_losses`.
        loss: as of :func:`candidate_losses`.
        pairs: whether the candidates are chosen and rejected.

    Returns:
        By name, as :class:`~exo_toy.integrations.metrics.RunningMeans` takes them.
    """
    name = config.loss if loss is None else None
    beta_pi, beta = metric_temperatures(config)
    rewards, mask = batch["rewards"].to(policy_logps.dtype), batch["candidate_mask"]
    if name in LOSSES_WITHOUT_REFERENCE:
        implicit = policy_logps / _lengths(batch) if takes(LOSSES[name], "rejected_lengths") else policy_logps
        return pair_metrics(beta * implicit, policy_logps)
    metrics = {}
    if loss is None and is_anchored(config):
        metrics[ANCHORS[config.loss]] = batch["anchor"].expand(len(mask))
    if name in LOSSES_ON_LABELS and not pairs:
        return metrics | label_metrics(beta * (policy_logps - ref_logps), policy_logps, rewards > 0.5, mask)
    ranked = name is not None and losses.LOSSES[name].kind == "ranked"
    return metrics | prompt_metrics(
        policy_logps,
        ref_logps,
        rewards,
        mask,
        beta_pi=beta_pi,
        beta=beta,
        log_weights=batch.get("log_weights"),
        preference=pairs or ranked,
    )


def check_values(config: CandidateConfig) -> None:
    """The named loss accepts the values of its settings, said before training: on made-up prompts.

    Args:
        config: the settings, with all that the loss needs.

    Raises:
        ValueError: what the loss refuses.
    """
    batch = {
        "rewards": torch.tensor([[1.0, 0.0]]),
        "candidate_mask": torch.ones(1, 2, dtype=torch.bool),
        "candidate_rows": torch.tensor([[0, 1]]),
        "completion_mask": torch.ones(2, 1, dtype=torch.int64),
        "prompt_weights": torch.ones(1),
        "anchor": torch.zeros(()),
    }
    logps = torch.full((1, 2), -1.0)
    candidate_losses(logps, logps, batch, config)


def check_rewards(rows: Iterable[tuple[int, Sequence[float]]], config: CandidateConfig) -> None:
    """The named loss can use the rewards of the rows, said before training.

    Args:
        rows: of each its number and its rewards.
        config: the settings.

    Raises:
        ValueError: a label that is neither 1 nor 0, rewards that rank no candidate above another, or a reward too large
            for its temperature; the message names the row.
    """
    for row, rewards in rows:
        where, got = f'row {row}, column "rewards"', f"for loss={config.loss!r}; got {list(rewards)!r:.60}"
        if config.loss in LOSSES_ON_LABELS and not set(rewards) <= {0.0, 1.0}:
            raise ValueError(f"{where}: must be 1 (desirable) or 0 {got}")
        if losses.LOSSES[config.loss].kind == "ranked" and len(set(rewards)) < len(rewards):
            raise ValueError(f"{where}: must differ, they are the ranking {got}")
        if config.beta_r is not None:
            check_reward_scale(f"{where}:", max(map(abs, rewards)), beta_r=config.beta_r)


def label_sums(
    log_ratio: Float[Tensor, "B K"], rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]
) -> Float[Tensor, "2 2"]:
    """Sum and number of the log ratios of desirable completions (reward 1), and of the others.

    Args:
        log_ratio: [B, K] log policy minus log reference, in nats.
        rewards: [B, K], 1 or 0.
        mask: [B, K] bool, True for the completions that count.

    Returns:
        float64, detached; a row for each label. Sums of batches and processes add up.
    """
    rows = []
    for counts in (mask & (rewards > 0.5), mask & (rewards <= 0.5)):
        rows.append(torch.stack([torch.where(counts, log_ratio.detach().double(), 0.0).sum(), counts.sum().double()]))
    return torch.stack(rows)


def anchor_of(sums: Float[Tensor, "2 2"], config: CandidateConfig) -> Float[Tensor, ""]:
    r"""KTO's reference point, or BCO's delta.

    .. math:: z_0 = \max(0, \bar a) \text{ of completions of other prompts}; \quad
        \delta = \tfrac{\beta}{2} (\bar a_w + \bar a_l)

    :func:`exo_toy.losses.kto_reference_point` and :func:`exo_toy.losses.bco_shift`, from sums.

    Args:
        sums: of :func:`label_sums`.
        config: the settings.

    Returns:
        One number; 0 where no completion counts, and the mean of the one label where there is one.
    """
    if config.loss == "kto":
        total, number = sums.sum(0)
        return torch.relu(total / number.clamp(min=1))
    present = sums[:, 1] > 0
    means = sums[:, 0] / sums[:, 1].clamp(min=1)
    return loss_settings(config)["beta"] * means.sum() / present.sum().clamp(min=1)


class _Given(NamedTuple):
    """What a loss is called with: log-probabilities [B, K] under policy and reference, the batch, its keywords."""

    policy: Tensor
    ref: Tensor
    batch: Mapping[str, Tensor]
    settings: dict[str, Any]


def _listed(loss: Callable[..., Any], given: _Given) -> Tensor:
    policy, ref, batch, settings = given
    return loss(policy - ref, batch["rewards"], mask=batch["candidate_mask"], **settings)


def _ranked(loss: Callable[..., Any], given: _Given) -> Tensor:
    policy, ref, batch, settings = given
    mask = batch["candidate_mask"]
    # What is masked comes last.
    order = batch["rewards"].masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return loss((policy - ref).gather(-1, order), mask=mask.gather(-1, order), **settings)


def _rated_pairs(loss: Callable[..., Any], given: _Given) -> Tensor:
    policy, ref, batch, settings = given
    i, j = torch.triu_indices(policy.shape[-1], policy.shape[-1], 1, device=policy.device)
    tensors = [x[:, k].flatten() for x in (policy, ref, batch["rewards"]) for k in (i, j)]
    of_pairs = loss(*tensors, **settings).losses.view(-1, len(i))
    mask = batch["candidate_mask"]
    return _mean(of_pairs, mask[:, i] & mask[:, j])


def _pairs(loss: Callable[..., Any], given: _Given) -> Tensor:
    return loss(*given.policy.unbind(-1), *given.ref.unbind(-1), **given.settings).losses


def _sorted_pairs(loss: Callable[..., Any], given: _Given) -> Tensor:
    # A prompt that does not count would take a place among those that do.
    counts = given.batch["prompt_weights"] > 0
    of_counted = _pairs(loss, given._replace(policy=given.policy[counts], ref=given.ref[counts]))
    return given.policy.new_zeros(len(counts)).index_put((counts,), of_counted)


def _without_reference(loss: Callable[..., Any], given: _Given) -> Tensor:
    lengths = _lengths(given.batch).unbind(-1) if takes(loss, "rejected_lengths") else ()
    return loss(*given.policy.unbind(-1), *lengths, **given.settings).losses


def _unpaired(loss: Callable[..., Any], given: _Given) -> Tensor:
    policy, ref, batch, settings = given
    rewards, mask = batch["rewards"], batch["candidate_mask"]
    if takes(loss, "desirable"):
        about = [rewards > 0.5]
    else:
        # No gradient passes through the value: at its minimum the loss has none there.
        residual = rewards - settings["tau"] * (policy - ref).detach()
        about = [rewards, _mean(residual, mask).unsqueeze(-1).expand_as(rewards)]
    of_completions = loss(*(x.flatten() for x in (policy, ref, *about)), **settings).losses
    return _mean(of_completions.view_as(policy), mask)


def _lengths(batch: Mapping[str, Tensor]) -> Tensor:
    """Tokens of chosen and rejected [B, 2]."""
    return batch["completion_mask"].sum(-1)[batch["candidate_rows"]]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over the entries of each row that count; 0 where none does."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


_READINGS: Mapping[str, Callable[..., Tensor]] = {
    "list": _listed,
    "ranked": _ranked,
    "rewarded pair": _rated_pairs,
    "pair": _pairs,
    "batch": _sorted_pairs,
    "reference-free": _without_reference,
    "unpaired": _unpaired,
}
