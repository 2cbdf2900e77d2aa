"""Completions of the prompts of a file."""

from collections.abc import Sequence

from torch import nn

from exo_toy.integrations.lm.models import load_tokenizer, require_room
from exo_toy.integrations.lm.records import LmError, Row
from exo_toy.integrations.lm.settings import Sampling
from exo_toy.integrations.sampling import derived_seed, prompt_tokens, sample_completions


class Prompts:
    """The prompts of rows as a policy has them, and completions drawn of them.

    Args:
        rows: with a prompt each.
        setting: which holds the policy's name, for messages.
        name: of the policy.
        settings: how completions are drawn.

    Attributes:
        tokenizer: of the policy.
        tokens: of each prompt.

    Raises:
        LmError: no tokenizer; a prompt that is neither text nor messages, has no tokens, or leaves no room.
    """

    def __init__(self, rows: Sequence[Row], setting: str, name: str, settings: Sampling) -> None:
        self.tokenizer = load_tokenizer(setting, name, offline=settings.offline)
        self._settings = settings
        try:
            self.tokens = [
                prompt_tokens(
                    row["prompt"], self.tokenizer, max_prompt_length=settings.max_prompt_length, where=f"row {index}"
                )
                for index, row in enumerate(rows)
            ]
        except ValueError as error:
            raise LmError(f"{settings.data}: {error}") from error
        require_room(setting, name, self.tokens, settings.max_new_tokens, offline=settings.offline)

    def draw(
        self,
        policy: nn.Module,
        start: int,
        stop: int,
        *,
        count: int,
        ends: Sequence[int],
        source: int = 0,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[list[list[int]]]:
        """Completions of some of the prompts.

        Args:
            policy: that draws.
            start: the first prompt.
            stop: after the last prompt.
            count: completions of each prompt.
            ends: tokens that end a completion.
            source: draws of another number are independent.
            top_p: as in :func:`~exo_toy.integrations.sampling.sample_completions`.
            top_k: as there.

        Returns:
            Tokens of each completion of each prompt, the end-of-sequence token included where it was drawn.
        """
        return sample_completions(
            policy,
            self.tokens[start:stop],
            num_candidates=count,
            max_new_tokens=self._settings.max_new_tokens,
            temperature=self._settings.temperature,
            eos_token_ids=ends,
            pad_token_id=self.tokenizer.pad_token_id,
            seeds=[derived_seed(self._settings.seed, index, source) for index in range(start, stop)],
            top_p=top_p,
            top_k=top_k,
        )
