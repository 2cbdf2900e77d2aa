"""Candidates sampled by vLLM, through what TRL has for it. Neither a GPU nor vLLM was there to run it: untested."""

from collections.abc import Callable
from typing import Any

from torch import nn


class VLLMSampler:
    """The ``sampler`` of :class:`~exo_toy.integrations.online.OnlineCandidateTrainer` that draws with vLLM.

    An engine of TRL's ``VLLMGeneration`` stands on each process's own GPU ("colocate"), and gets the policy's weights
    for each batch of prompts: ``sampling_batch_size`` should be as large as it can be. Its draws are its own: neither
    the seeds of the trainer nor its settings reach it, so that a run can be repeated only as far as vLLM can; the
    log-probabilities are computed by the trainer as ever.

    Only its calls were tested, against an engine made up for it; **vLLM itself was not run**.

    Args:
        engine: makes TRL's ``VLLMGeneration`` of the policy; at the temperature and the ``max_completion_length`` of
            the trainer's settings (``max_new_tokens``), with nothing that changes the distribution (top_p 1, top_k 0,
            min_p 0, no penalty).

    Example:
        .. code-block:: python

            from trl.generation.vllm_generation import VLLMGeneration

            def engine(policy):
                given = dict(temperature=args.temperature, max_completion_length=args.max_new_tokens)
                return VLLMGeneration(policy, Accelerator(), tokenizer, gpu_memory_utilization=0.3, **given)

            OnlineCandidateTrainer(model, args, prompts, sampler=VLLMSampler(engine), ...).train()
    """

    def __init__(self, engine: Callable[[nn.Module], Any]) -> None:
        self._make, self._engine = engine, None

    def __call__(
        self, policy: nn.Module, prompts: list[list[int]], num_candidates: int, seeds: list[int]
    ) -> list[list[list[int]]]:
        """Completions of prompts.

        Args:
            policy: the model that is trained.
            prompts: token ids of each.
            num_candidates: completions of each prompt, K.
            seeds: not used.

        Returns:
            K lists of token ids for each prompt.
        """
        engine = self._engine = self._engine or self._make(policy)
        engine.sync_weights()
        repeated = [prompt for prompt in prompts for _ in range(num_candidates)]
        _, drawn, *_ = engine.generate(prompts=repeated, images=None, num_generations=num_candidates)
        completions = [list(ids) for ids in drawn]
        return [completions[start : start + num_candidates] for start in range(0, len(completions), num_candidates)]
