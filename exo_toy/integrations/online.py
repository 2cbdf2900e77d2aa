"""The trainer on candidates that are sampled as it goes, from the policy that it trains."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from exo_toy import checks
from exo_toy.integrations.candidates import Report, check_reward_scale
from exo_toy.integrations.config import LOSSES_ON_PROPOSALS, CandidateConfig, option
from exo_toy.integrations.policy import check_positions
from exo_toy.integrations.reference import reference_logps, reference_policy
from exo_toy.integrations.rows import Rows, WeightedCollator, rows_by_index
from exo_toy.integrations.sampling import (
    RewardFunction,
    as_texts,
    derived_seed,
    end_tokens,
    function_name,
    passed_on,
    prompt_tokens,
    sample_completions,
    score_completions,
)
from exo_toy.integrations.scoring import completion_logps, evaluating, scatter
from exo_toy.integrations.trainer import Batch, CandidateTrainer

# (policy, token ids of prompts, candidates of each, seeds of the prompts) -> token ids of the candidates.
Sampler = Callable[[nn.Module, list[list[int]], int, list[int]], list[list[list[int]]]]


@dataclass
class OnlineConfig(CandidateConfig):
    """:class:`~exo_toy.integrations.config.CandidateConfig`, and how candidates are sampled.

    Attributes:
        refresh_every: optimiser steps between two samplings; in an epoch's first step there is always one.
        num_candidates: of each prompt, K, at least 2.
        max_new_tokens: a completion that has not ended is cut here.
        half_reference: half of the candidates come from the reference, so that no weight exceeds 2.
        sampling_batch_size: prompts that are sampled and scored at a time.
        temperature: CandidateConfig's; the candidates are sampled at it.

    Raises:
        ValueError: a setting out of range, or one that could have no effect here.

    Example:
        >>> given = dict(beta_r=0.1, beta_pi=1.0, num_candidates=8, use_cpu=True, report_to="none")
        >>> OnlineConfig("out", refresh_every=4, **given).refresh_every
        4
    """

    refresh_every: int = option(1, "optimiser steps between two samplings")
    num_candidates: int = option(4, "candidates of each prompt")
    max_new_tokens: int = option(64, "a completion that has not ended is cut here")
    half_reference: bool = option(False, "half of the candidates come from the reference")
    sampling_batch_size: int = option(8, "prompts that are sampled at a time")

    def __post_init__(self) -> None:
        for name, least in {
            "refresh_every": 1,
            "num_candidates": 2,
            "max_new_tokens": 1,
            "sampling_batch_size": 1,
        }.items():
            checks.require_integer(name, getattr(self, name), at_least=least)
        if self.half_reference and self.num_candidates % 2:
            raise ValueError(
                f"num_candidates must be even where half come from the reference; got {self.num_candidates}"
            )
        if self.loss not in LOSSES_ON_PROPOSALS:
            allowed = ", ".join(LOSSES_ON_PROPOSALS)
            raise ValueError(f"loss must be one of {allowed}, which know proposals; got {self.loss!r}")
        if self.max_completion_length is not None:
            raise ValueError(
                "max_completion_length must be None: max_new_tokens is the length of sampled completions; "
                f"got {self.max_completion_length!r}"
            )
        if self.ref_cache is not None or self.precompute_ref:
            raise ValueError("ref_cache must be None: no cache knows candidates that are still to be sampled")
        super().__post_init__()


class OnlineCandidateTrainer(CandidateTrainer):
    r"""Trains on candidates sampled from the policy itself, every ``refresh_every`` steps anew, scored by functions.

    Log ratios are against the reference, as ever. The candidates come from the policy :math:`\mu` as it was when it
    sampled, so that :math:`\log\pi_{ref} - \log\mu` of each is added inside both softmaxes of the loss
    (``log_weights``), with both at the temperature of the sampling; with ``half_reference`` from
    :math:`\mu = (\pi_{old} + \pi_{ref})/2`. As the number of candidates grows, the losses tend to the same
    divergences as with candidates from the reference. With ``beta_pi`` 1 the weights of the candidates are uniform
    whenever policy and sampler agree.

    A completion with no token but the end-of-sequence one is a sample as any other and is kept; candidates that are
    equal are too, each with its weight. Their shares are logged: ``sampled/empty``, ``sampled/identical`` (beyond the
    first of its kind), ``sampled/all_identical`` (prompts without a gradient), ``sampled/truncated``,
    ``sampled/length`` in tokens, and ``reward``, ``rewards/NAME/mean`` of each function.

    A prompt's candidates depend on the seed, the step at which they are sampled and the weights; neither on the batch
    size nor on the number of processes, beyond rounding. They are saved with each checkpoint: a resumed run goes on
    with them. One GPU or data-parallel training; no sharded models.

    Args:
        model: as of :class:`~exo_toy.integrations.trainer.CandidateTrainer`.
        args: the settings.
        train_dataset: rows with a column prompt, a text or chat messages; other columns go to the reward functions.
        eval_dataset: of CandidateTrainer's kind, with completions and rewards.
        processing_class: the tokenizer.
        ref_model: as of CandidateTrainer.
        reward_funcs: one or several functions with the signature of TRL's reward functions: called with keyword
            arguments prompts, completions, completion_ids, trainer_state and the dataset's other columns, one entry
            per completion, they return one finite number each. Completions are texts, or chats of one message where
            prompts are chats. :func:`~exo_toy.integrations.sampling.reward_model` makes one of a reward model.
        reward_weights: one number per function; the reward is the weighted sum. 1 each where not given.
        loss: as of CandidateTrainer; called with ``log_weights=``, too.
        peft_config: as of CandidateTrainer.
        callbacks: as of CandidateTrainer.
        optimizers: as of CandidateTrainer.
        sampler: in place of ``generate`` of ``transformers`` for the policy's candidates: called as
            ``sampler(policy, prompts, k, seeds)`` with token ids of prompts and a seed for each, it returns k lists of
            token ids for each prompt. It has to sample from the policy's present weights at ``args.temperature`` and
            no other transformation; log-probabilities are computed here. For vLLM, which was not run with it,
            :class:`~exo_toy.integrations.vllm.VLLMSampler`.

    Raises:
        ValueError: settings or data that do not fit, before any training.
    """

    def __init__(
        self,
        model: Any,
        args: OnlineConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        ref_model: nn.Module | None = None,
        reward_funcs: RewardFunction | Sequence[RewardFunction] = (),
        reward_weights: Sequence[float] | None = None,
        sampler: Sampler | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, OnlineConfig):
            raise ValueError(f"args must be an OnlineConfig; got {type(args).__name__}")
        if train_dataset is None:
            raise ValueError("train_dataset must be rows with a prompt; got None")
        functions: Any = [reward_funcs] if callable(reward_funcs) else reward_funcs
        self.reward_funcs: list[RewardFunction] = list(functions)
        self.reward_weights = [1.0] * len(self.reward_funcs) if reward_weights is None else list(reward_weights)
        _check_rewards(self.reward_funcs, self.reward_weights)
        self._sampler = sampler
        self._window: list[Batch] = []
        self._iterator: Any = None
        self._restored: list[Batch] = []
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, ref_model, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("args must not shard the model (FSDP, DeepSpeed): it could not sample; got one that does")
        self._ends = end_tokens(cast(nn.Module, self.model), processing_class)
        self.data_collator = _PromptCollator(cast(WeightedCollator, self.data_collator))

    def sample(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Fresh candidates of prompts, scored and weighted.

        Args:
            indices: of rows of the training dataset.

        Returns:
            For each, what the collator takes: ``prompt_ids``, ``completion_ids``, ``rewards``, ``ref_logps`` and
            ``log_weights``; and ``sampled``, numbers to log by name.
        """
        size = self._settings.sampling_batch_size
        return [
            row for start in range(0, len(indices), size) for row in self._sample(list(indices[start : start + size]))
        ]

    def _sample(self, indices: list[int]) -> list[dict[str, Any]]:
        """As many as fit into one batch."""
        args, policy = self._settings, self.accelerator.unwrap_model(self.model)
        prompts = [cast(Rows, self.train_dataset)[index]["prompt_ids"] for index in indices]
        from_reference = args.num_candidates // 2 if args.half_reference else 0
        from_policy = args.num_candidates - from_reference
        with torch.no_grad(), evaluating(policy), self.compute_loss_context_manager():
            draw = self._generate if self._sampler is None else self._sampler
            completions = draw(policy, prompts, from_policy, self._seeds(indices, 0))
            _check_sampled(completions, len(prompts), from_policy)
            if from_reference:
                with reference_policy(policy, self.ref_model) as reference:
                    more = self._generate(reference, prompts, from_reference, self._seeds(indices, 1))
                completions = [[*first, *second] for first, second in zip(completions, more, strict=True)]
            features: list[dict[str, Any]] = [
                {"prompt_ids": prompt, "completion_ids": ids, "rewards": [0.0] * len(ids)}
                for prompt, ids in zip(prompts, completions, strict=True)
            ]
            batch = {name: value.to(args.device) for name, value in self._collator(features).items()}
            scoring = self._scoring(policy, batch["input_ids"])
            tokens = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
            logps = completion_logps(policy, *tokens, **scoring)
            policy_logps = scatter(logps, batch["candidate_rows"], batch["candidate_mask"])
            ref_logps = reference_logps(batch, policy=policy, ref_model=self.ref_model, **scoring)
        proposal = policy_logps
        if args.half_reference:
            proposal = torch.logaddexp(policy_logps, ref_logps) - math.log(2)
        rewards = self._rewards(indices, features)
        for row, feature in enumerate(features):
            feature["ref_logps"] = ref_logps[row].tolist()
            feature["log_weights"] = (ref_logps - proposal)[row].tolist()
            feature["rewards"] = rewards["reward"][row]
            feature["sampled"] = {name: sum(values[row]) / args.num_candidates for name, values in rewards.items()}
            feature["sampled"] |= self._shares(feature["completion_ids"])
        return features

    def _generate(self, model: Any, prompts: list[list[int]], k: int, seeds: list[int]) -> list[list[list[int]]]:
        args, pad = self._settings, self._collator.pad_token_id
        return sample_completions(
            model,
            prompts,
            num_candidates=k,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            eos_token_ids=self._ends,
            pad_token_id=pad,
            seeds=seeds,
        )

    def _seeds(self, indices: list[int], source: int) -> list[int]:
        return [derived_seed(self._settings.seed, self.state.global_step, index, source) for index in indices]

    def _rewards(self, indices: list[int], features: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
        """By what is logged, lists of the candidates' numbers for each prompt; "reward" is what is trained on."""
        rows = [self._prompts[index] for index in indices]
        k = self._settings.num_candidates
        ids = [candidate for feature in features for candidate in feature["completion_ids"]]
        prompts = [row["prompt"] for row in rows for _ in range(k)]
        completions = [
            completion
            for row, feature in zip(rows, features, strict=True)
            for completion in as_texts(row["prompt"], feature["completion_ids"], self._tokenizer)
        ]
        columns = passed_on(rows, [k] * len(rows))
        total, by_name = score_completions(
            self.reward_funcs,
            self.reward_weights,
            prompts=prompts,
            completions=completions,
            completion_ids=ids,
            trainer_state=self.state,
            **columns,
        )
        check_reward_scale("rewards of reward_funcs", max(map(abs, total)), beta_r=self._settings.beta_r)
        numbers = {"reward": total, **{f"rewards/{name}/mean": values for name, values in by_name.items()}}
        return {
            name: [values[start : start + k] for start in range(0, len(values), k)] for name, values in numbers.items()
        }

    def _shares(self, completion_ids: list[list[int]]) -> dict[str, float]:
        """What is logged of a prompt's candidates."""
        k, different = len(completion_ids), len({tuple(ids) for ids in completion_ids})
        ended = [ids[-1] in self._ends for ids in completion_ids]
        return {
            "sampled/identical": 1 - different / k,
            "sampled/all_identical": float(different == 1),
            "sampled/empty": sum(end and len(ids) == 1 for end, ids in zip(ended, completion_ids, strict=True)) / k,
            "sampled/truncated": 1 - sum(ended) / k,
            "sampled/length": sum(map(len, completion_ids)) / k,
        }

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The batches of an optimiser step, after sampling for this and the next steps where that is due."""
        if epoch_iterator is not self._iterator:
            self._iterator, self._window = epoch_iterator, []
        if not self._window:
            wanted = self._settings.refresh_every * self._settings.gradient_accumulation_steps
            known, self._restored = self._restored, []
            drawn = [batch for _, batch in zip(range(len(known) or wanted), epoch_iterator, strict=False)]
            self._window = self._restore(known, drawn) if known else self._filled(drawn)
        batches, self._window = self._window[:num_batches], self._window[num_batches:]
        return batches, self._get_num_items_in_batch(batches, device)

    def _filled(self, drawn: list[Batch]) -> list[Batch]:
        """Batches of prompts as batches of candidates."""
        indices = list(dict.fromkeys(index for batch in drawn for index in batch["index"].tolist()))
        rows = dict(zip(indices, self.sample(indices), strict=True))
        filled = []
        for batch in drawn:
            features = [rows[index] for index in batch["index"].tolist()]
            # The numbers to log stand beside the candidates, under names that no model takes.
            numbers = {
                name: torch.tensor([feature["sampled"][name] for feature in features], dtype=self._collator.dtype)
                for name in features[0]["sampled"]
            }
            filled.append({**batch, **self._collator(features), **numbers})
        return filled

    def _restore(self, known: list[Batch], drawn: list[Batch]) -> list[Batch]:
        """The batches of a checkpoint, if they are those that come next."""
        same = [batch["index"].tolist() for batch in known] == [batch["index"].tolist() for batch in drawn]
        if not same:
            raise ValueError("train_dataset and batch size must be those of the checkpoint; got other prompts next")
        return known

    def prompt_losses(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As of CandidateTrainer, with what was noted when the candidates were sampled."""
        losses, metrics = super().prompt_losses(model, inputs)
        noted = {name: value for name, value in inputs.items() if name == "reward" or "/" in name}
        return losses, {**metrics, **noted}

    def _save_rng_state(self, output_dir: str) -> None:
        """With the state of the random numbers, the candidates that are sampled and not yet trained on."""
        super()._save_rng_state(output_dir)
        batches = [{name: value.cpu() for name, value in batch.items()} for batch in self._window]
        torch.save({"refresh_every": self._settings.refresh_every, "batches": batches}, self._file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """With the optimiser, the candidates of a checkpoint."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = self._file(checkpoint)
        if not file.exists():
            raise ValueError(f"resume_from_checkpoint must hold {file.name}, of a run on as many processes; got none")
        saved = torch.load(file, weights_only=True)
        if saved["refresh_every"] != self._settings.refresh_every:
            raise ValueError(
                f"refresh_every must be that of the checkpoint, {saved['refresh_every']}; "
                f"got {self._settings.refresh_every}"
            )
        self._restored = saved["batches"]

    def _file(self, folder: str) -> Path:
        return Path(folder) / f"candidates_{self.accelerator.process_index}_of_{self.accelerator.num_processes}.pt"

    def _tokenized(self, name: str, dataset: Any) -> Rows:
        """Prompts for the training, candidates for evaluations."""
        if name != "train_dataset":
            return super()._tokenized(name, dataset)
        self._prompts = rows_by_index(name, dataset)
        ids = [self._prompt_ids(self._prompts[index], index) for index in range(len(dataset))]
        rows = [{"prompt_ids": prompt_ids, "index": index} for index, prompt_ids in enumerate(ids)]
        longest = max(map(len, ids)) + self._settings.max_new_tokens
        check_positions(name, longest, self._model_given)
        self._pairs, self.reports[name] = False, Report(len(rows), {}, {}, list(range(len(rows))), longest)
        return Rows(rows, self.reports[name], pairs=False)

    def _prompt_ids(self, row: Mapping[str, Any], index: int) -> list[int]:
        where = f"train_dataset: row {index}"
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: must be a mapping with columns; got {row!r:.60}")
        if row.get("prompt") is None:
            raise ValueError(f'{where}, column "prompt": must be there; got columns {sorted(row)}')
        kept = self._settings.max_prompt_length
        return prompt_tokens(row["prompt"], self._tokenizer, max_prompt_length=kept, where=where)


@dataclass(frozen=True)
class _PromptCollator:
    """Batches of prompts as their row numbers; of candidates, for an evaluation, as ever."""

    collator: WeightedCollator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        if "index" not in features[0]:
            return self.collator(features)
        weights = torch.tensor([row["prompt_weight"] for row in features], dtype=self.collator.collator.dtype)
        return {"index": torch.tensor([row["index"] for row in features]), "prompt_weights": weights}


def _check_rewards(functions: list[Any], weights: list[float]) -> None:
    """At least one function, no bare model, a finite weight for each."""
    if not functions:
        raise ValueError("reward_funcs must hold at least one function; got none")
    for function in functions:
        if isinstance(function, nn.Module) or not callable(function):
            raise ValueError(
                "reward_funcs must be functions (reward_model of exo_toy.integrations.sampling makes one of a model); "
                f"got {function!r:.60}"
            )
    names = [function_name(function) for function in functions]
    if len(set(names)) < len(names):
        raise ValueError(f"reward_funcs must have different names; got {names}")
    if len(weights) != len(functions):
        raise ValueError(f"reward_weights must be one per function, {len(functions)}; got {len(weights)}")
    for weight in weights:
        checks.require_real("reward_weights", weight, allowed="finite numbers", low=-math.inf, high=math.inf)


def _check_sampled(completions: Any, n_prompts: int, k: int) -> None:
    """K lists of at least one token for each prompt."""
    counts = [len(ids) for ids in completions]
    if counts != [k] * n_prompts:
        raise ValueError(f"sampler must return {k} completions for each of {n_prompts} prompts; got {counts}")
    if not all(ids for candidates in completions for ids in candidates):
        raise ValueError("sampler must return completions of at least one token (the end counts); got an empty one")
