"""The trainer on candidates: EXO, DPO and losses of one's own, with any number of candidates per prompt."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from exo_toy.integrations.candidates import CandidateCollator
from exo_toy.integrations.config import (
    LOSSES_WITHOUT_REFERENCE,
    CandidateConfig,
    check_loss,
    check_metric_temperatures,
    check_support,
    columns_are_pairs,
    is_anchored,
    needs_other_completions,
)
from exo_toy.integrations.loading import RowsTrainer
from exo_toy.integrations.metrics import SPARE, RunningMeans
from exo_toy.integrations.objective import (
    Loss,
    anchor_of,
    candidate_losses,
    candidate_metrics,
    check_values,
    label_sums,
)
from exo_toy.integrations.policy import check_adapter, check_models, disable_dropout, dtype_of
from exo_toy.integrations.reference import ReferenceCache, autocast_dtype, fingerprint, precompute, reference_logps
from exo_toy.integrations.rows import OTHER, WeightedCollator
from exo_toy.integrations.scoring import check_kernel, completion_logps, evaluating, resolve_kernel, scatter

Batch = dict[str, Tensor]


class CandidateTrainer(RowsTrainer):
    r"""Trains a causal language model on candidate completions of prompts.

    A step's gradient is that of the mean loss over all its prompts, whatever the batch size per device, the number of
    accumulation steps and of processes, also where the last step of an epoch has fewer (but for ``aot``, which compares
    the prompts of a batch). The order of the prompts depends on the seed and the epoch alone. What is logged is
    averaged over the same prompts; the names are those of :mod:`exo_toy.integrations.metrics`, for the evaluation with
    its prefix. How each loss reads the data: :mod:`exo_toy.integrations.objective`.

    The reference is ``ref_model``; where there is none, the policy without its adapter if it has one (a PEFT model),
    else a copy of the policy as it is given. With ``args.ref_cache`` its log-probabilities are read from there and no
    second model is kept. At the first step policy and reference agree to the bit (where an adapter is fresh); with a
    cache, to the bit where it was computed in batches of the same rows, and to rounding otherwise. Losses without a
    reference (``simpo``, ``orpo``, ``cpo``) have none.

    Data-parallel training and FSDP2 (``accelerate launch``) are supported; DeepSpeed was not run.

    Args:
        model: the policy, a causal language model of ``transformers`` or a PEFT model around one.
        args: the settings.
        train_dataset: rows with columns prompt, completions and rewards, or prompt, chosen and rejected, as the loss
            asks, of plain text or chat messages: a ``datasets.Dataset`` or any sequence of mappings. A column
            ``finished`` says of each completion whether it came to its end or was cut while it was sampled.
        eval_dataset: the same, or several by name.
        processing_class: the tokenizer; it needs an end-of-sequence token, and no padding token.
        ref_model: the reference, where it is a model of its own; with the policy's dtype.
        loss: in place of ``args.loss``: called as ``loss(log_ratio, rewards, mask=mask)`` with [B, K] tensors, log
            ratio zero where masked, and with ``log_weights=`` where the data have them; returns [B].
        peft_config: of an adapter to put on the model.
        callbacks: as of ``transformers.Trainer``.
        optimizers: as of ``transformers.Trainer``.

    Attributes:
        reports: what was found in each dataset, by name: rows kept and skipped.

    Raises:
        ValueError: settings or data that do not fit, before any training; the message names the argument, or dataset,
            row and column.
    """

    # What the loss divides by is the number of prompts of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: CandidateConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        ref_model: nn.Module | None = None,
        loss: Loss | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        check_support(args)
        check_models(model, ref_model, cached=args.ref_cache is not None)
        if processing_class is None:
            raise ValueError("processing_class must be the tokenizer; got None")
        self._custom_loss = loss
        self._pairs = None if loss is not None else columns_are_pairs(args.loss)
        # Where a callable takes its place, nothing about the loss by name counts.
        named = loss is None
        self._no_reference = named and args.loss in LOSSES_WITHOUT_REFERENCE
        self._anchored = named and is_anchored(args)
        if named:
            check_loss(args)
            check_values(args)
        if self._no_reference and ref_model is not None:
            raise ValueError(f"ref_model must be None for loss={args.loss!r}, which knows no reference; got one")

        # `args` of transformers' Trainer has its type, and not the fields of ours.
        self._tokenizer, self._settings, self._model_given = processing_class, cast(Any, args), model
        self.reports: dict[str, Any] = {}
        train_rows = None if train_dataset is None else self._tokenized("train_dataset", train_dataset)
        eval_rows: Any = None
        if isinstance(eval_dataset, Mapping):
            eval_rows = {key: self._tokenized(f"eval_dataset[{key!r}]", rows) for key, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_rows = self._tokenized("eval_dataset", eval_dataset)
        if self._pairs is None:
            raise ValueError("train_dataset or eval_dataset must be given: its columns say what to do; got neither")
        if loss is not None:
            check_metric_temperatures(args, pairs=self._pairs)

        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        if ref_model is None and args.ref_cache is None and not self._no_reference:
            if isinstance(model, PeftModel):
                check_adapter(model)
            else:
                ref_model = copy.deepcopy(model)
        if args.disable_dropout:
            disable_dropout(model)
        check_kernel(args.kernel, model, *([] if ref_model is None else [ref_model]))
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if getattr(base, "generation_config", False) is None:
            base.generation_config = GenerationConfig()  # which saving a checkpoint asks for

        pad = processing_class.pad_token_id
        self._collator = CandidateCollator(
            processing_class.eos_token_id if pad is None else pad,
            padding_side=self._settings.padding_side,
            pad_to_multiple_of=args.pad_to_multiple_of,
            dtype=torch.promote_types(dtype_of(model), torch.float32),
        )
        self._means = {"train": RunningMeans(), "eval": RunningMeans()}
        self._warned = False
        super().__init__(
            model,
            args,
            data_collator=WeightedCollator(self._collator),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise ValueError("FSDP must be version 2; got version 1")
        self.ref_model: nn.Module | None = None
        self._cache: ReferenceCache | None = None
        if args.ref_cache is not None:
            self._read_reference(ref_model)
        elif ref_model is not None:
            self.ref_model = self._prepared(ref_model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's part of the mean loss over the prompts of a step, or the mean over the batch itself.

        Args:
            model: the policy, wrapped or not.
            inputs: a batch.
            return_outputs: also return the losses of the prompts.
            num_items_in_batch: prompts of the whole step, over all processes; None for the mean over the batch.

        Returns:
            The loss, or a pair with ``{"losses": [B]}``.
        """
        prompt_losses, metrics = self.prompt_losses(model, inputs)
        weights = inputs["prompt_weights"]
        # The weightless copies are left out by selection: a loss that is infinite times zero would be NaN.
        total = torch.where(weights > 0, prompt_losses, 0.0).sum()
        if model.training:
            self._means["train"].add(metrics, weights)
        else:
            self._means["eval"].add({**metrics, "loss": prompt_losses}, weights)
        if num_items_in_batch is None:
            loss = total / weights.sum().clamp(min=1)
        else:
            # Data-parallel wrappers average gradients over processes, where a mean over prompts needs their sum.
            loss = total * (self.accelerator.num_processes / num_items_in_batch)
        return (loss, {"losses": prompt_losses}) if return_outputs else loss

    def prompt_losses(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each prompt of a batch, and what is logged of it.

        Args:
            model: the policy, wrapped or not.
            inputs: a batch.

        Returns:
            ([B], by name what :class:`~exo_toy.integrations.metrics.RunningMeans` takes).
        """
        policy_logps, ref_logps = self._logps(model, inputs)
        if self._anchored and "anchor" not in inputs:
            # After the forward with a gradient: what autocast keeps of a forward without has none either.
            inputs = {**inputs, "anchor": self._anchor(model, [inputs])}
        given = (policy_logps, ref_logps, inputs, self._settings)
        prompt_losses = candidate_losses(*given, self._custom_loss)
        return prompt_losses, candidate_metrics(*given, self._custom_loss, pairs=bool(self._pairs))

    def _logps(self, model: nn.Module, inputs: Batch, prefix: str = "") -> tuple[Tensor, Tensor]:
        """Log-probabilities of a batch's candidates under policy and reference, [B, K]; zeros for no reference."""
        batch = {name.removeprefix(prefix): value for name, value in inputs.items() if name.startswith(prefix)}
        scoring = self._scoring(model, batch["input_ids"])
        # The reference first: its activations are gone when those of the policy have to be kept.
        ref_logps = None
        if not self._no_reference:
            ref_logps = reference_logps(batch, policy=model, ref_model=self.ref_model, **scoring)
        tokens = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        logps = completion_logps(model, *tokens, **scoring)
        policy_logps = scatter(logps, batch["candidate_rows"], batch["candidate_mask"])
        return policy_logps, torch.zeros_like(policy_logps) if ref_logps is None else ref_logps

    def _anchor(self, model: nn.Module, batches: Sequence[Batch]) -> Tensor:
        """KTO's reference point or BCO's delta over these batches of all processes."""
        sums = torch.zeros(2, 2, dtype=torch.float64, device=self.args.device)
        prefix = OTHER if needs_other_completions(self._settings) else ""
        with torch.no_grad(), evaluating(model), self.compute_loss_context_manager():
            for batch in batches:
                inputs = self._prepare_inputs(batch)
                policy_logps, ref_logps = self._logps(model, inputs, prefix)
                counts = inputs[f"{prefix}candidate_mask"] & (inputs["prompt_weights"] > 0).unsqueeze(-1)
                sums += label_sums(policy_logps - ref_logps, inputs[f"{prefix}rewards"], counts)
        return anchor_of(self._over_processes(sums), self._settings)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """The batches of an optimiser step, with what the loss compares all its prompts with."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._anchored and batches:
            anchor = self._anchor(self.model_wrapped, batches)
            batches = [{**batch, "anchor": anchor} for batch in batches]
        return batches, count

    def _scoring(self, policy: nn.Module, input_ids: Tensor) -> dict[str, Any]:
        """Temperature and kernel of the log-probabilities, the same for the policy and a second model."""
        kernel = self._settings.kernel
        if kernel == "auto" and self.ref_model is not None:
            kernel = resolve_kernel(policy, self.ref_model, input_ids=input_ids)
        return {"temperature": self._settings.temperature, "kernel": kernel}

    def _prepared(self, ref_model: nn.Module) -> nn.Module:
        """The second model on its device, in evaluation mode, sharded and cast as the policy will be."""
        ref_model.requires_grad_(False).eval()
        if self.is_fsdp_enabled:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            return fsdp2_prepare_model(self.accelerator, ref_model)
        # An evaluation before training asks this list whether the policy still has to be prepared.
        known = list(self.accelerator._models)
        prepared = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self.accelerator._models = known
        return prepared

    def _read_reference(self, ref_model: nn.Module | None) -> None:
        """The reference's log-probabilities of all rows, from the cache, after filling it where that is asked for."""
        args, accelerator = self._settings, self.accelerator
        reference = cast(nn.Module, self.model if ref_model is None else ref_model)
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, Mapping) else [self.eval_dataset]
        data = [rows for rows in (self.train_dataset, *evaluated) if rows is not None]
        if args.precompute_ref:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("precompute_ref must be False with sharded models: fill the cache in a run without")
            for rows in data:
                with accelerator.autocast():
                    precompute(
                        reference.to(accelerator.device),
                        rows,
                        args.ref_cache,
                        collator=self._collator,
                        temperature=args.temperature,
                        batch_size=args.eval_batch_size,
                        kernel=args.kernel,
                        shard=accelerator.process_index,
                        num_shards=accelerator.num_processes,
                        progress=not args.disable_tqdm,
                    )
            accelerator.wait_for_everyone()
        with accelerator.autocast():
            autocast = autocast_dtype(accelerator.device)
        self._cache = ReferenceCache(
            args.ref_cache, fingerprint=fingerprint(reference), temperature=args.temperature, autocast=autocast
        )
        for rows in data:
            rows.read_reference(self._cache)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The mean loss over a batch of the evaluation; its metrics are averaged by :meth:`evaluation_loop`."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As of ``transformers.Trainer``, with the metrics and the loss averaged over prompts."""
        self._means["eval"] = RunningMeans()  # without what an interrupted evaluation has left
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._means["eval"].pop(self._over_processes)
        means.pop(SPARE, None)
        named = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """As of Trainer, without what an earlier training has not logged."""
        self._means["train"] = RunningMeans()
        return super()._init_training_state(*args, **kwargs)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log, with the averages of the training steps since the last time where these are what is logged.

        Args:
            logs: numbers by name.
            start_time: of the training.
        """
        if "loss" in logs:
            means = self._means["train"].pop(self._over_processes)
            self._warn_of_unrepresentative_candidates(means.pop(SPARE, 1.0))
            logs = {**logs, **means}
        super().log(logs, start_time)

    def _warn_of_unrepresentative_candidates(self, spare: float) -> None:
        """Once, where the weights of the candidates have gathered on few of them."""
        if self._warned or spare >= self._settings.ess_warning:
            return
        self._warned = True
        if self.accelerator.is_main_process:
            warnings.warn(
                f"step {self.state.global_step}: the candidates no longer represent the policy. Of the candidates "
                f"beyond the first, the effective sample size of their weights leaves {spare:.1%} "
                f"(ess_warning={self._settings.ess_warning:g}). Refresh them (sample from the current policy, and give "
                "log_weights), take more per prompt, or choose a smaller beta_pi or a larger beta_r.",
                stacklevel=2,
            )

    def _over_processes(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return self.accelerator.reduce(values, reduction="sum")

    def _get_num_items_in_batch(self, batch_samples: Sequence[Batch], device: torch.device) -> Tensor:
        """Prompts of a step, over accumulation steps and processes."""
        counts = [batch["prompt_weights"].sum().to(device) for batch in batch_samples]
        return self._over_processes(torch.stack(counts).sum() if counts else torch.zeros((), device=device))
