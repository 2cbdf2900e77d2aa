"""Policies that choose one token after the other: every prefix is evaluated once, whoever shares it."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor, nn

from exo_toy import checks
from exo_toy.policies.policy import by_prompt, draw
from exo_toy.spaces import SequenceSpace, join_children, split_children

# What a policy remembers of n prefixes: tensors [X, m, ...], or [1, m, ...] where prompts do not differ. Each group of
# n / m successive prefixes shares an entry; where m is not n, it is what their common ancestor left.
State = tuple[Tensor, ...]

# Large spaces are evaluated in blocks of prefixes that share an ancestor, of so many numbers at the last position (or
# fewer). These stay in the cache, and in memory that is used again; all at once it takes up to four times as long.
BLOCK = 2**19


class AutoregressivePolicy(nn.Module, ABC):
    r"""A policy given by the conditional distribution of the next token.

    .. math::
        \log \pi_\theta(y \mid x) = \sum_{t < |y|} \log \pi_\theta(y_t \mid x, y_{<t})

    A subclass says what is remembered of the empty prefix, how a further token changes that, and what it makes of the
    next token. All completions, given ones and drawn ones follow from these three.
    """

    def __init__(self, space: SequenceSpace, n_prompts: int, *, width: int) -> None:
        super().__init__()
        checks.require_integer("n_prompts", n_prompts, at_least=1)
        self.space = space
        self.n_prompts = n_prompts
        # Numbers that a prefix of the last position takes: its state and its next tokens, of every prompt.
        self._size = n_prompts * (width + space.vocab_size)

    @abstractmethod
    def _start(self) -> State:
        """The state of the empty prefix, n = 1."""

    @abstractmethod
    def _extend(self, state: State, tokens: Tensor, t: int) -> State:
        """The states of n * c prefixes with one more token, at position t: tokens are [c], or [X or 1, n, 1]."""

    @abstractmethod
    def _next(self, state: State, t: int) -> Tensor:
        """Log-probabilities [X, n, V] of the token at position t."""

    def _given(self, state: State, token: Tensor, t: int) -> Tensor:
        """Log-probabilities [X, M] of given tokens [X or 1, M] at position t."""
        token = token.expand(self.n_prompts, -1).unsqueeze(-1)
        return self._next(state, t).expand(*token.shape[:2], -1).gather(-1, token).squeeze(-1)

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        """:meth:`log_probs`, or :meth:`log_prob` of given tokens: what ``torch.func.functional_call`` calls."""
        return self.log_probs() if tokens is None else self.log_prob(tokens)

    def log_probs(self) -> Float64[Tensor, "X N"]:
        """Log-probability of every completion, in nats.

        Every prefix is evaluated once. Without gradients the working memory beside the table is small; with them, what
        the backward pass needs of every prefix is kept.

        Returns:
            [X, N] float64, log-sum-exp 0 in each row.

        Raises:
            ValueError: a space too large for its memory budget; parameters that define no distribution.
        """
        self.space.require_enumerable(bytes_per_completion=8 * self.n_prompts, what=f"{type(self).__name__}.log_probs")
        state = self._start()
        return self._below(state, state[0].new_zeros(self.n_prompts, 1), 0).squeeze(1)

    def log_prob(self, tokens: Int[Tensor, "M T"] | Int[Tensor, "X M T"]) -> Float64[Tensor, "X M"]:
        """Log-probability of given completions, in nats; enumerates nothing.

        Args:
            tokens: [M, T] completions, as :meth:`SequenceSpace.tokens` has them, scored for every prompt; or
                [X, M, T], each prompt's own.

        Returns:
            [X, M] float64.

        Raises:
            ValueError: ``tokens`` are not completions of the space, or of another shape; parameters that define no
                distribution.
        """
        return self.token_log_probs(tokens).sum(-1)

    def token_log_probs(self, tokens: Int[Tensor, "M T"] | Int[Tensor, "X M T"]) -> Float64[Tensor, "X M T"]:
        """Log-probability of each token given those before it, in nats; arguments and errors as in :meth:`log_prob`.

        Returns:
            [X, M, T] float64, 0 after the end.
        """
        tokens = by_prompt(self.space, tokens, self.n_prompts)
        state = self._start()
        running = torch.ones_like(tokens[..., 0], dtype=torch.bool)
        log_probs = []
        for t, token in enumerate(tokens.unbind(-1)):
            if t > 0:
                state = self._extend(state, tokens[..., t - 1].unsqueeze(-1), t - 1)
            log_probs.append(torch.where(running, self._given(state, token, t), 0.0))
            running = running & self.space.is_live(token)
        return torch.stack(log_probs, -1)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Int64[Tensor, "X n T"]:
        """Independent completions of every prompt, drawn token by token; enumerates nothing.

        Args:
            n: how many per prompt, at least 1.
            generator: where the randomness comes from; None for torch's default generator.

        Returns:
            [X, n, T] int64 tokens, filled with the eos after the end.

        Raises:
            ValueError: n below 1; parameters that define no distribution.
        """
        checks.require_integer("n", n, at_least=1)
        state = self._start()
        tokens: list[Tensor] = []
        for t in range(self.space.length):
            if t > 0:
                state = self._extend(state, tokens[-1].unsqueeze(-1), t - 1)
            token = draw(self._next(state, t).expand(self.n_prompts, n, -1), 1, generator).squeeze(-1)
            if self.space.eos is not None and t > 0:
                token = torch.where(self.space.is_live(tokens[-1]), token, self.space.eos)
            tokens.append(token)
        return torch.stack(tokens, -1)

    def _below(self, state: State, path: Tensor, t: int) -> Tensor:
        """Log-probabilities [X, n, S] of the completions below prefixes of length t, of log-probability ``path``."""
        n, n_live = path.shape[1], self.space.n_live
        if n > 1 and n * n_live ** (self.space.length - 1 - t) * self._size > BLOCK:
            return torch.cat([self._below(_pick(state, i, n), path[:, i : i + 1], t) for i in range(n)], 1)
        table = path.unsqueeze(-1) + self._next(state, t)
        if t == self.space.length - 1:
            return table
        children, eos = split_children(self.space, table)
        tokens = torch.arange(n_live, device=table.device)
        if self.space.eos is not None:
            tokens = tokens + (tokens >= self.space.eos)
        below = self._below(self._extend(state, tokens, t), children.flatten(1), t + 1)
        return join_children(self.space, below.unflatten(1, (n, n_live)), eos)


def _pick(state: State, i: int, n: int) -> State:
    """The state of the i-th of n prefixes."""
    return tuple(part[:, i * part.shape[1] // n, None] for part in state)
