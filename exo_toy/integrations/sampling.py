"""Completions sampled from a causal language model of ``transformers``, and the rewards that functions give them."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from exo_toy import checks
from exo_toy.integrations.candidates import is_finite_number
from exo_toy.integrations.scoring import evaluating
from exo_toy.integrations.texts import token_ids

# Called as TRL calls it: (prompts=, completions=, completion_ids=, **columns) -> one number per completion.
RewardFunction = Callable[..., Sequence[float]]
# Columns that a reward function is not given, since what it gets under these names is not the dataset's.
NOT_PASSED_ON = ("prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state")
# Above every length that a tokenizer or a model means.
LONGEST = 10**9


def sample_completions(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    num_candidates: int,
    max_new_tokens: int,
    temperature: float | int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    seeds: Sequence[int],
    top_p: float | int = 1.0,
    top_k: int = 0,
) -> list[list[list[int]]]:
    r"""Completions of prompts, drawn from the model's own distribution at a temperature, by its ``generate``.

    Nothing of the model's generation settings is applied (top-k, penalties, suppressed tokens): a completion y has
    the probability that :func:`~exo_toy.integrations.scoring.completion_logps` computes at the same temperature,
    unless ``top_p`` or ``top_k`` asks for other draws, which have no such probability. A prompt's completions depend
    on its seed, whatever other prompts are sampled beside it, up to rounding: a model computes slightly different
    logits in another batch, and where two tokens are as good as tied the other one may be drawn. The global random
    state is neither used nor changed.

    Args:
        model: a causal language model or a PEFT model, not wrapped; put in evaluation mode for the call.
        prompts: token ids of each prompt, at least one token.
        num_candidates: completions of each prompt, K.
        max_new_tokens: a completion that has not ended is cut here.
        temperature: above 0; divides the logits.
        eos_token_ids: each of them ends a completion, of which it is the last token.
        pad_token_id: fills up the rows; never attended to.
        seeds: one integer per prompt.
        top_p: draw from the smallest set of likeliest tokens with this probability at least, in (0, 1]; 1 for all.
        top_k: draw from so many tokens, the likeliest; 0 for all.

    Returns:
        K lists of token ids for each prompt, at least one token each.

    Raises:
        ValueError: a number out of range, an empty prompt, another number of seeds than of prompts.
    """
    checks.require_integer("num_candidates", num_candidates, at_least=1)
    checks.require_integer("max_new_tokens", max_new_tokens, at_least=1)
    checks.require_positive(temperature=temperature)
    require_cuts(top_p=top_p, top_k=top_k)
    if len(seeds) != len(prompts):
        raise ValueError(f"seeds must be one per prompt, {len(prompts)}; got {len(seeds)}")
    if not all(prompts):
        raise ValueError("prompts must have at least one token each; got an empty one")
    if not prompts:
        return []
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    padded = torch.tensor([[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    attended = torch.arange(width) >= torch.tensor([[width - len(prompt)] for prompt in prompts])
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    # In the order of ``generate``.
    cuts: list[Any] = [TopKLogitsWarper(top_k)] if top_k > 0 else []
    cuts += [TopPLogitsWarper(float(top_p))] if top_p < 1 else []
    noise = _GumbelNoise(temperature, cuts, generators, num_candidates)
    ends = set(eos_token_ids)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad_token_id,
    )
    with torch.no_grad(), evaluating(model), _own_settings_aside(model):
        tokens = model.generate(  # type: ignore[operator]
            input_ids=padded.repeat_interleave(num_candidates, 0).to(device),
            attention_mask=attended.long().repeat_interleave(num_candidates, 0).to(device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([noise]),
        )
    completions = [_until(ends, row) for row in tokens[:, width:].tolist()]
    return [completions[start : start + num_candidates] for start in range(0, len(completions), num_candidates)]


def require_cuts(*, top_p: float | int, top_k: int) -> None:
    """Tokens are left to draw from.

    Args:
        top_p: as in :func:`sample_completions`.
        top_k: as in :func:`sample_completions`.

    Raises:
        ValueError: a number out of range.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1]; got {top_p!r}")
    checks.require_integer("top_k", top_k, at_least=0)


def derived_seed(*numbers: int) -> int:
    """A seed that differs with each of the numbers, in [0, 2**63).

    Args:
        numbers: integers, such as a run's seed, a step and a row.

    Example:
        >>> derived_seed(0, 1) == derived_seed(0, 1), derived_seed(0, 1) == derived_seed(1, 0)
        (True, False)
    """
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8]) >> 1


def score_completions(
    reward_funcs: Sequence[RewardFunction],
    weights: Sequence[float],
    *,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    **columns: Any,
) -> tuple[list[float], dict[str, list[float]]]:
    """The rewards of completions: the weighted sum of what functions say of each.

    Args:
        reward_funcs: functions with the signature of TRL's, called once each with keyword arguments.
        weights: one per function.
        prompts: one per completion, as the dataset has it.
        completions: texts, or chats of one message where the prompts are chats.
        columns: further keyword arguments of the functions.

    Returns:
        One number per completion, and those of each function by its name.

    Raises:
        ValueError: a function that returns anything but one finite number per completion.

    Example:
        >>> def brevity(completions, **_):
        ...     return [-len(text) for text in completions]
        >>> score_completions([brevity], [0.5], prompts=["a", "a"], completions=["bc", "d"])
        ([-1.0, -0.5], {'brevity': [-2.0, -1.0]})
    """
    totals, by_name = [0.0] * len(completions), {}
    for weight, function in zip(weights, reward_funcs, strict=True):
        name = function_name(function)
        given = function(prompts=list(prompts), completions=list(completions), **columns)
        by_name[name] = checked_rewards(given, len(completions), source=name)
        totals = [total + weight * reward for total, reward in zip(totals, by_name[name], strict=True)]
    return totals, by_name


def checked_rewards(given: Any, count: int, *, source: str) -> list[float]:
    """What a reward function returned, as a list of numbers.

    Args:
        given: a list, tuple, array or tensor.
        count: completions that it was given.
        source: the function, for the message.

    Raises:
        ValueError: anything but one finite number per completion.

    Example:
        >>> checked_rewards((1, 0.5), 2, source="judge")
        [1.0, 0.5]
    """
    rewards = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(rewards, list | tuple) or len(rewards) != count:
        got = len(rewards) if isinstance(rewards, list | tuple) else type(rewards).__name__
        raise ValueError(f"{source} must return a list of one number per completion, {count}; got {got}")
    for place, reward in enumerate(rewards):
        if not is_finite_number(reward):
            raise ValueError(f"{source} must return finite numbers (in float32); got {reward!r} for completion {place}")
    return [float(reward) for reward in rewards]


def passed_on(rows: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, list[Any]]:
    """What reward functions get of a dataset's other columns: an entry per completion.

    Args:
        rows: of the dataset.
        counts: completions of each row.

    Example:
        >>> passed_on([{"prompt": "a", "source": "x"}, {"prompt": "b"}], [2, 1])
        {'source': ['x', 'x', None]}
    """
    names = sorted({name for row in rows for name in row if name not in NOT_PASSED_ON})
    return {
        name: [row.get(name) for row, count in zip(rows, counts, strict=True) for _ in range(count)] for name in names
    }


def function_name(function: Any) -> str:
    """What a function is called in logs and messages."""
    return getattr(function, "__name__", type(function).__name__)


def reward_model(
    model: nn.Module, tokenizer: Any, *, batch_size: int = 16, max_length: int | None = None
) -> RewardFunction:
    """A reward function from a reward model, such as TRL's ``RewardTrainer`` makes, or from a classifier of texts.

    A model with one output gives it as the reward; with two, the log odds of the second. Prompt and completion are
    tokenised together: a chat by the chat template; texts joined and, for a model with one output, ended by the
    end-of-sequence token, as that trainer does. Too long a text loses its start; special tokens that the tokenizer
    puts around it stay.

    Args:
        model: a sequence-classification model with one label or two; its config names the padding token.
        tokenizer: the model's own.
        batch_size: completions at a time.
        max_length: tokens that the model sees, the last ones; None for as many as it and the tokenizer can take.

    Returns:
        The function.

    Raises:
        ValueError: more labels than two, no padding token.
    """
    config: Any = model.config
    text_config = config.get_text_config()
    checks.require_integer("batch_size", batch_size, at_least=1)
    if max_length is not None:
        checks.require_integer("max_length", max_length, at_least=1)
    if config.num_labels not in (1, 2):
        raise ValueError(f"model must have one label, or two; got {config.num_labels}")
    if tokenizer.pad_token_id is None or text_config.pad_token_id != tokenizer.pad_token_id:
        raise ValueError(
            "model.config.pad_token_id must be the tokenizer's, by which the model finds the last token; "
            f"got {text_config.pad_token_id} and {tokenizer.pad_token_id}"
        )
    can_take = min(tokenizer.model_max_length, getattr(text_config, "max_position_embeddings", None) or math.inf)
    most = can_take if max_length is None else max_length
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.truncation_side = "left"
    # A tokenizer without a limit of its own has a very large number for it, which its own code does not take.
    cut = {"truncation": True, "max_length": int(most)} if most < LONGEST else {}

    def ids(prompt: Any, completion: Any) -> list[int]:
        if not isinstance(prompt, str):
            chat = [*prompt, *completion]
            return list(tokenizer.apply_chat_template(chat, return_dict=False, **cut))
        text, end = prompt + completion, tokenizer.eos_token
        # A classifier of two classes was trained on plain texts.
        if config.num_labels == 1 and end and not text.endswith(end):
            text += end
        return list(tokenizer(text, **cut)["input_ids"])

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        rows = [ids(*pair) for pair in zip(prompts, completions, strict=True)]
        device, rewards = next(model.parameters()).device, []
        with torch.no_grad(), evaluating(model):
            for start in range(0, len(rows), batch_size):
                some = {"input_ids": rows[start : start + batch_size]}
                batch = tokenizer.pad(some, padding_side="right", return_tensors="pt").to(device)
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
                rewards += (logits[:, 0] if config.num_labels == 1 else logits[:, 1] - logits[:, 0]).tolist()
        return rewards

    reward.__name__ = type(model).__name__
    return reward


class _GumbelNoise(LogitsProcessor):
    """Noise of each prompt's own on the logits: taking the largest is then sampling, in a batch as alone."""

    def __init__(
        self,
        temperature: float | int,
        cuts: list[Callable[[Any, Any], Tensor]],
        generators: list[torch.Generator],
        num_candidates: int,
    ) -> None:
        self.temperature, self.cuts = temperature, cuts
        self.generators, self.num_candidates = generators, num_candidates

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores of the next tokens, at the temperature, cut, noise added."""
        shape = (self.num_candidates, scores.shape[-1])
        # In float64, whose uniform numbers come near enough to 0 for the noise of rare tokens.
        draws = [
            torch.empty(shape, dtype=torch.float64, device=scores.device).exponential_(generator=generator)
            for generator in self.generators
        ]
        scores = scores.double() / self.temperature
        for cut in self.cuts:
            scores = cut(input_ids, scores)
        return scores - torch.cat(draws).log()


@contextmanager
def _own_settings_aside(model: nn.Module) -> Iterator[None]:
    """The model has no generation settings, which ``generate`` would take for those that it is not given."""
    adapted = hasattr(model, "get_base_model")
    places = [vars(m) for m in ([model, model.get_base_model()] if adapted else [model])]  # type: ignore[operator]
    before = [place.get("generation_config") for place in places]
    for place in places:
        place["generation_config"] = GenerationConfig()
    try:
        yield
    finally:
        for place, settings in zip(places, before, strict=True):
            place["generation_config"] = settings
            if settings is None:
                del place["generation_config"]


def _until(ends: set[int], tokens: list[int]) -> list[int]:
    """The tokens up to the first that ends a completion, which is the last."""
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation settings.

    Args:
        model: a causal language model or a PEFT model.
        tokenizer: with an end-of-sequence token.
    """
    own: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [] if own is None else own if isinstance(own, list | tuple) else [own]
    return sorted({tokenizer.eos_token_id, *own})


def prompt_tokens(prompt: Any, tokenizer: Any, *, max_prompt_length: int | None, where: str) -> list[int]:
    """Tokens of a prompt, as training tokenises it.

    Args:
        prompt: a text, or messages, which go through the chat template.
        tokenizer: of the policy.
        max_prompt_length: tokens that are kept, the last ones; None for all.
        where: the prompt's row, for the message.

    Raises:
        ValueError: neither text nor messages, or no tokens; a tokenizer without end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an end-of-sequence token; got eos_token_id None")
    prompt_ids, _ = token_ids(prompt, {}, tokenizer, where)
    return prompt_ids if max_prompt_length is None else prompt_ids[-max_prompt_length:]


def as_texts(prompt: Any, completions: Sequence[Sequence[int]], tokenizer: Any) -> list[Any]:
    """Completions in the form of their prompt, without special tokens.

    Args:
        prompt: a text or messages.
        completions: token ids of each.
        tokenizer: of the policy.

    Returns:
        Texts, or chats of one message each.
    """
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in completions]
    return texts if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in texts]
