"""What a run logs: numbers of each prompt, from log-probabilities and rewards of its candidates."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from exo_toy import checks, estimators

# Logged as a number of its own nowhere: the warning reads it.
SPARE = "ess_spare"


def prompt_metrics(
    policy_logps: Float[Tensor, "B K"],
    ref_logps: Float[Tensor, "B K"],
    rewards: Float[Tensor, "B K"],
    mask: Bool[Tensor, "B K"],
    *,
    beta_pi: float | int,
    beta: float | int,
    log_weights: Float[Tensor, "B K"] | None = None,
    preference: bool = False,
) -> dict[str, Tensor]:
    r"""The logged numbers of each prompt; their averages over prompts are what a trainer logs.

    With log ratio :math:`\ell = \log\pi_\theta - \log\pi_{ref}`, implicit reward :math:`\beta\ell`, and candidates
    from the reference (:math:`w = 0`) or from a proposal :math:`\mu` (:math:`w = \log\pi_{ref} - \log\mu`):

    * ``rewards/chosen``, ``rewards/rejected``: the implicit reward of the candidate with the highest reward, and of
      the one with the lowest (the mean over those where there are several); ``rewards/margins`` their difference,
      ``rewards/accuracies`` 1 where it is above 0; ``logps/chosen``, ``logps/rejected`` the policy's log-probabilities.
    * ``ess``: effective sample size of the candidate weights :math:`\mathrm{softmax}(\beta_\pi\ell + w)` as a share of
      the prompt's candidates, in [1/K, 1].
    * ``kl/ref``: self-normalised estimate of :math:`\mathrm{KL}(\pi_\theta\|\pi_{ref})`, at most log K.
    * ``kl/policy_to_optimal``, ``kl/optimal_to_policy``: of :math:`\mathrm{KL}(\pi_\theta\|\pi^*_\beta)` and
      :math:`\mathrm{KL}(\pi^*_\beta\|\pi_\theta)`; not for preferences, whose reward is unknown.
    * ``top_reward_leads``: 1 where the candidate with the highest log ratio has the highest reward; where several
      share the highest log ratio, the share of them that do. Not for preferences.

    Source: Ji et al., arXiv:2402.00856v4, section 3, for the estimates; Kong, 1992, for the effective sample size.

    Args:
        policy_logps: [B, K] log-probabilities of the candidates under the policy, in nats.
        ref_logps: [B, K] under the reference.
        rewards: [B, K]; (1, 0) on (chosen, rejected).
        mask: [B, K] bool, True for the candidates that there are, at least one per row.
        beta_pi: policy temperature, above 0, of the candidate weights.
        beta: :math:`\beta = \beta_r\beta_\pi`, above 0, of implicit rewards and of the optimal policy.
        log_weights: [B, K] log reference minus log proposal; None where the candidates come from the reference.
        preference: whether the candidates are a chosen and a rejected completion.

    Returns:
        float64 [B] by name, detached.

    Raises:
        ValueError: shapes that differ, a temperature not above 0.

    Example:
        >>> zeros, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
        >>> metrics = prompt_metrics(zeros, zeros, torch.tensor([[1.0, 0.0]]), mask, beta_pi=0.1, beta=0.01)
        >>> metrics["ess"].item(), metrics["top_reward_leads"].item()
        (1.0, 0.5)
    """
    checks.require_positive(beta_pi=beta_pi, beta=beta)
    checks.require_mask(mask=mask)
    checks.require_shape("B K", policy_logps=policy_logps, ref_logps=ref_logps, rewards=rewards, mask=mask)
    policy_logps, ref_logps, rewards = (x.detach().double() for x in (policy_logps, ref_logps, rewards))
    log_ratio = policy_logps - ref_logps
    shift = torch.zeros_like(log_ratio) if log_weights is None else log_weights.detach().double()
    counts = mask.sum(-1)

    def weights(log_weight: Tensor) -> Tensor:
        return (log_weight + shift).masked_fill(~mask, -torch.inf)

    top = _extreme(rewards, mask, largest=True)
    bottom = _extreme(rewards, mask, largest=False)
    ess = estimators.effective_sample_size(weights(beta_pi * log_ratio))
    metrics = {
        **_contrast(beta * log_ratio, policy_logps, top, bottom),
        "ess": ess / counts,
        "kl/ref": estimators.snis_kl(weights(log_ratio), weights(torch.zeros_like(log_ratio))).value,
    }
    if not preference:
        optimal = weights(rewards / beta)
        metrics["kl/policy_to_optimal"] = estimators.snis_kl(weights(log_ratio), optimal).value
        metrics["kl/optimal_to_policy"] = estimators.snis_kl(optimal, weights(log_ratio)).value
        leaders = _extreme(log_ratio, mask, largest=True)
        metrics["top_reward_leads"] = (leaders & top).sum(-1) / leaders.sum(-1).double()
        metrics[SPARE] = torch.where(counts > 1, (ess - 1) / (counts - 1).clamp(min=1), 1.0)
    return metrics


def pair_metrics(implicit: Float[Tensor, "B 2"], policy_logps: Float[Tensor, "B 2"]) -> dict[str, Tensor]:
    """The numbers of :func:`prompt_metrics` that need no reference: those of ``rewards/`` and ``logps/``.

    Args:
        implicit: [B, 2] implicit rewards of chosen and rejected.
        policy_logps: [B, 2] log-probabilities under the policy, in nats.

    Returns:
        float64 [B] by name, detached.

    Example:
        >>> pair_metrics(torch.tensor([[2.0, 1.0]]), torch.tensor([[-1.0, -2.0]]))["rewards/margins"].item()
        1.0
    """
    checks.require_shape("B K", implicit=implicit, policy_logps=policy_logps)
    first = torch.tensor([True, False], device=implicit.device).expand(implicit.shape)
    return _contrast(implicit.detach().double(), policy_logps.detach().double(), first, ~first)


def label_metrics(
    implicit: Float[Tensor, "B K"],
    policy_logps: Float[Tensor, "B K"],
    desirable: Bool[Tensor, "B K"],
    mask: Bool[Tensor, "B K"],
) -> dict[str, Tensor]:
    """Implicit rewards and log-probabilities of desirable completions and of the others, each averaged by itself.

    Args:
        implicit: [B, K] implicit rewards.
        policy_logps: [B, K] log-probabilities under the policy, in nats.
        desirable: [B, K] bool.
        mask: [B, K] bool, True for the completions that there are.

    Returns:
        ``rewards/chosen``, ``rewards/rejected``, ``logps/chosen`` and ``logps/rejected``: float64 [B, 2], detached, sum
        and number, as :class:`RunningMeans` takes them: a prompt may have several of one label and none of the other.

    Example:
        >>> implicit, mask = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> label_metrics(implicit, implicit, mask, mask)["rewards/chosen"].tolist()
        [[4.0, 2.0]]
    """
    checks.require_mask(mask=mask, desirable=desirable)
    checks.require_shape("B K", implicit=implicit, policy_logps=policy_logps, desirable=desirable, mask=mask)
    return {
        f"{name}/{label}": torch.stack(
            [torch.where(counts, values.detach().double(), 0.0).sum(-1), counts.sum(-1).double()], -1
        )
        for name, values in (("rewards", implicit), ("logps", policy_logps))
        for label, counts in (("chosen", mask & desirable), ("rejected", mask & ~desirable))
    }


class RunningMeans:
    """Averages over prompts, of any number of batches and processes.

    Example:
        >>> means = RunningMeans()
        >>> means.add({"loss": torch.tensor([1.0, 2.0, 9.0])}, torch.tensor([1.0, 1.0, 0.0]))
        >>> means.pop()
        {'loss': 1.5}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(
        self, values: Mapping[str, Float[Tensor, " B"] | Float[Tensor, "B 2"]], weights: Float[Tensor, " B"]
    ) -> None:
        """Take in a batch.

        Args:
            values: by name [B], or [B, 2] where a prompt has a sum and a number of its own; the same names in every
                batch.
            weights: [B], 1 for a prompt that counts and 0 for one that does not.
        """
        counts = weights > 0
        sums = {}
        for name, value in values.items():
            held = value.detach().double()
            pairs = held if held.ndim == 2 else torch.stack([held, torch.ones_like(held)], -1)
            sums[name] = torch.where(counts.unsqueeze(-1), pairs, 0.0).sum(0)
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in sums.items()}

    def pop(self, total: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, float]:
        """The averages since the last call; empty where there was no batch.

        Args:
            total: sums a tensor over processes; every process has to call.

        Returns:
            The averages by name, of those that anything was counted of.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        sums = total(torch.stack(list(self._sums.values()))).tolist()
        self._sums = {}
        return {name: value / count for name, (value, count) in zip(names, sums, strict=True) if count > 0}


def _contrast(implicit: Tensor, policy_logps: Tensor, top: Tensor, bottom: Tensor) -> dict[str, Tensor]:
    """Implicit rewards and log-probabilities of the best candidates beside the worst."""
    chosen, rejected = _mean(implicit, top), _mean(implicit, bottom)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).double(),
        "logps/chosen": _mean(policy_logps, top),
        "logps/rejected": _mean(policy_logps, bottom),
    }


def _extreme(values: Tensor, mask: Tensor, *, largest: bool) -> Tensor:
    """Where a row's largest (smallest) unmasked values stand, [B, K] bool."""
    filled = values.masked_fill(~mask, -torch.inf if largest else torch.inf)
    extreme = filled.amax(-1, keepdim=True) if largest else filled.amin(-1, keepdim=True)
    return mask & (filled == extreme)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Over the entries of each row."""
    return torch.where(where, values, 0.0).sum(-1) / where.sum(-1)
