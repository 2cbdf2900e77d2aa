"""These losses on pairs inside TRL's ``DPOTrainer`` (run with TRL 1.16, whose insides it builds on)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.dpo_trainer import DPOTrainer

from exo_toy.kernels import sequence_logps
from exo_toy.losses import exo_pref_loss

# Fields of DPOConfig that change TRL's own losses and would have no effect here, with the value that changes nothing.
IDLE = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "use_weighting": False,
}


class ExoDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's ``DPOTrainer`` with a loss of this library, or one's own, in the place of its losses.

    Data, reference, log-probabilities and everything else are TRL's. What is logged: ``rewards/*`` and ``logps/*``.

    Args:
        *args: as of ``trl.DPOTrainer``.
        loss: called as :func:`~exo_toy.losses.dpo_loss` is, with [B] log-probabilities of policy and reference and
            ``beta`` and ``label_smoothing`` of the ``DPOConfig``; returns (losses, chosen_rewards, rejected_rewards),
            [B] each. EXO from preferences by default, which needs a ``label_smoothing`` above 0.
        **kwargs: as of ``trl.DPOTrainer``.

    Raises:
        ValueError: a temperature or label smoothing that the loss refuses, a loss that returns something else, a
            setting of one of TRL's own losses; all before training.

    Example:
        .. code-block:: python

            args = DPOConfig("out", beta=0.1, label_smoothing=1e-3)
            ExoDPOTrainer(model, ref_model, args, train_dataset=pairs, processing_class=tokenizer).train()
    """

    def __init__(self, *args: Any, loss: Callable[..., Any] = exo_pref_loss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings: Any = self.args
        for name, neutral in IDLE.items():
            if getattr(settings, name) != neutral:
                raise ValueError(
                    f"{name} must be {neutral!r}: it belongs to TRL's own losses; got {getattr(settings, name)!r}"
                )
        if self.aux_loss_enabled:
            raise ValueError(
                "router_aux_loss_coef must be 0: the auxiliary loss of a mixture of experts is not added here; "
                f"got {self.router_aux_loss_coef}"
            )
        self._loss = loss
        # A loss of two pairs, so that what it refuses is said before training.
        self._losses(*torch.zeros(4, 2))

    def _losses(self, *logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, chosen and rejected rewards of pairs."""
        result = self._loss(*logps, beta=self.beta, label_smoothing=self.label_smoothing)
        if not isinstance(result, tuple) or [getattr(part, "shape", None) for part in result] != [logps[0].shape] * 3:
            raise ValueError(
                "loss must return three tensors [B], losses, chosen_rewards and rejected_rewards; "
                f"got {type(result).__name__} {[list(getattr(part, 'shape', [])) for part in result]}"
            )
        return result

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """The mean loss over a batch whose first half are the chosen completions, the second the rejected ones."""
        mode = "train" if model.training else "eval"
        known = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
        arguments = {name: value for name, value in inputs.items() if name not in known}
        mask = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        outputs = model(**arguments, use_cache=False, labels=labels, fused_lm_head=True)
        token_logps = outputs.log_probs[:, 1 - mask.shape[1] :]
        chosen_logps, rejected_logps = sequence_logps(token_logps, mask[:, 1:].bool()).chunk(2)
        if self.precompute_ref_logps:
            ref = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            ref = self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs)
        losses, chosen_rewards, rejected_rewards = self._losses(chosen_logps, rejected_logps, *ref)

        numbers = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "logps/chosen": chosen_logps.detach(),
            "logps/rejected": rejected_logps.detach(),
        }
        for name, values in numbers.items():
            self._metrics[mode][name].append(self.accelerator.gather(values).mean().item())
        if mode == "train":
            self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return (losses.mean(), {"losses": losses.detach()}) if return_outputs else losses.mean()
