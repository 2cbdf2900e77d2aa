"""k-gram models of completions of any length: a table for every position, or one that all positions share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor

from exo_toy import checks
from exo_toy.policies import KGramPolicy
from exo_toy.policies.policy import by_prompt, draw, log_softmax
from exo_toy.spaces import SequenceSpace


@dataclass(frozen=True, eq=False)
class KGramModel:
    r"""A distribution over completions whose next token depends on the k tokens before it.

    .. math::
        \log \pi(y) = \sum_{t < |y|} \log \mathrm{softmax}(\theta_t[y_{t-k}, \dots, y_{t-1}])_{y_t}

    Unlike :class:`exo_toy.policies.KGramPolicy`, of which :meth:`of` makes one, it is no module, its tables need not
    differ from position to position, and prompts may share them.

    Args:
        space: the completions; never enumerated.
        order: k, in 0..T-1.
        logits: tables [X or 1, A**min(t, k), V], -inf allowed: k + 1 of them, the last for every position from k on,
            or T, one for each position. Contexts are numbered as in :mod:`exo_toy.spaces`. A table that all prompts
            share has 1 in place of X.

    Raises:
        ValueError: an order out of range; tables of a wrong number, shape, dtype or device, or with a row that defines
            no distribution (NaN, +inf, or -inf throughout).

    Example:
        >>> fair = KGramModel(SequenceSpace(2, 1000), 0, (torch.zeros(1, 1, 2).double(),))
        >>> round(fair.log_prob(torch.zeros(1, 1000, dtype=torch.int64)).item(), 6)
        -693.147181
    """

    space: SequenceSpace
    order: int
    logits: Sequence[Float64[Tensor, "_ _ V"]]

    def __post_init__(self) -> None:
        self.space.require_order(self.order)
        if not isinstance(self.logits, Sequence | Tensor) or not all(isinstance(x, Tensor) for x in self.logits):
            raise ValueError(f"logits must be a sequence of tensors; got {self.logits!r:.80}")
        if len(self.logits) not in (self.order + 1, self.space.length):
            raise ValueError(
                f"logits must be {self.order + 1} tables (order + 1, the last for all further positions) or "
                f"{self.space.length} (one per position); got {len(self.logits)}"
            )
        n_prompts = max((len(table) for table in self.logits if table.ndim > 0), default=1)
        for t, table in enumerate(self.logits):
            wanted = [self.space.n_contexts(t, order=self.order), self.space.vocab_size]
            if table.ndim != 3 or list(table.shape[1:]) != wanted or len(table) not in (1, n_prompts):
                raise ValueError(
                    f"logits[{t}] must have shape [X, {wanted[0]}, {wanted[1]}] with X = {n_prompts} or 1; "
                    f"got {list(table.shape)}"
                )
            if table.dtype != torch.float64 or table.device != self.logits[0].device:
                raise ValueError(
                    f"logits[{t}] must be torch.float64 on {self.logits[0].device}; got {table.dtype} on {table.device}"
                )
        self.log_tables  # noqa: B018 (a bad row is an error here, not later)

    @classmethod
    def of(cls, policy: KGramPolicy) -> "KGramModel":
        """The model of a policy's tables, through which gradients reach its parameters."""
        return cls(policy.space, policy.order, tuple(policy.logits))

    @classmethod
    def after_prompts(
        cls, space: SequenceSpace, logits: Float64[Tensor, "C V"], prompts: Int[Tensor, "X P"]
    ) -> "KGramModel":
        """The model of one table for all positions, where completions follow prompts.

        Args:
            space: the completions.
            logits: [A**k, V], -inf allowed.
            prompts: [X, P] tokens other than the eos, of which the last k count; P at least k.

        Returns:
            A model for X prompts; only its first k tables differ between them.

        Raises:
            ValueError: a table whose rows are no power of A; prompts too short or with other tokens.

        Example:
            >>> copy = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]).double()
            >>> model = KGramModel.after_prompts(SequenceSpace(2, 3), copy, torch.tensor([[0], [1]]))
            >>> model.log_prob(torch.tensor([[1, 1, 1]])).exp().tolist()
            [[0.0], [1.0]]
        """
        order = 0
        while space.n_live**order < len(logits) and order < space.length:
            order += 1
        if logits.shape != (space.n_live**order, space.vocab_size):
            wanted = f"[{space.n_live}**k, {space.vocab_size}] with k in 0..{space.length - 1}"
            raise ValueError(f"logits must have shape {wanted}; got {list(logits.shape)}")
        if prompts.shape[1] < order:
            raise ValueError(f"prompts must have at least {order} tokens (the order); got {prompts.shape[1]}")
        bad = (prompts < 0) | (prompts >= space.vocab_size) | ~space.is_live(prompts)
        checks.require_values(
            [prompts],
            (bad, lambda: f"prompts must hold tokens other than the eos; got {checks.first_bad(prompts, bad)}"),
        )
        context = torch.zeros(len(prompts), dtype=torch.int64, device=prompts.device)
        for token in prompts.to(torch.int64).unbind(1):
            context = space.next_context(context, token, order=order)
        # A context of the first t tokens is completed by the last k - t of the prompt.
        tables = []
        for t in range(order):
            older = context % space.n_live ** (order - t)
            tables.append(logits.unflatten(0, (-1, space.n_live**t))[older])
        return cls(space, order, (*tables, logits.unsqueeze(0)))

    @property
    def n_prompts(self) -> int:
        """X."""
        return max(len(table) for table in self.logits)

    @property
    def is_homogeneous(self) -> bool:
        """Whether all positions from k on share a table."""
        return len(self.logits) == self.order + 1

    @property
    def log_tables(self) -> tuple[Tensor, ...]:
        """Log-probabilities in place of the logits, in nats, computed anew: each use can be differentiated."""
        return tuple(log_softmax(f"logits[{t}]", logits) for t, logits in enumerate(self.logits))

    def table(self, t: int) -> Float64[Tensor, "_ _ V"]:
        """Log-probabilities of the token at position t, [X or 1, A**min(t, k), V]."""
        i = min(t, len(self.logits) - 1)
        return log_softmax(f"logits[{i}]", self.logits[i])

    def lifted(self, order: int) -> "KGramModel":
        """The same distribution with tables of a higher order (at most T - 1), gradients included.

        Raises:
            ValueError: an order out of range, or below that of the model.

        Example:
            >>> fair = KGramModel(SequenceSpace(2, 3), 0, (torch.zeros(1, 1, 2).double(),))
            >>> [tuple(table.shape) for table in fair.lifted(1).logits]
            [(1, 1, 2), (1, 2, 2)]
        """
        self.space.require_order(order)
        if order < self.order:
            raise ValueError(f"order must be at least {self.order}, the order of the model; got {order}")
        if order == self.order:
            return self
        tables = []
        for t in range(order + 1 if self.is_homogeneous else self.space.length):
            # The number of a context, modulo that of the contexts of lower order, leaves out the oldest tokens.
            n_contexts, table = self.space.n_contexts(t, order=order), self.logits[min(t, len(self.logits) - 1)]
            tables.append(table.repeat(1, n_contexts // table.shape[1], 1))
        return KGramModel(self.space, order, tuple(tables))

    def log_prob(self, tokens: Int[Tensor, "M T"] | Int[Tensor, "X M T"]) -> Float64[Tensor, "X M"]:
        """Log-probability of given completions, in nats.

        Args:
            tokens: [M, T] completions, as :meth:`SequenceSpace.tokens` has them, scored for every prompt; or
                [X, M, T], each prompt's own.

        Returns:
            [X, M] float64.

        Raises:
            ValueError: ``tokens`` are not completions of the space, or of another shape.
        """
        tokens = by_prompt(self.space, tokens, self.n_prompts).expand(self.n_prompts, -1, -1)
        contexts = self.space.contexts(tokens, order=self.order)
        prompt = torch.arange(self.n_prompts, device=tokens.device).unsqueeze(-1)
        tables = self.log_tables
        log_probs = []
        for t, (context, token) in enumerate(zip(contexts.unbind(-1), tokens.unbind(-1), strict=True)):
            table = tables[min(t, len(tables) - 1)]
            log_probs.append(table[prompt % len(table), context, token])
        return torch.where(self.space.counted(tokens), torch.stack(log_probs, -1), 0.0).sum(-1)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Int64[Tensor, "X n T"]:
        """Independent completions of every prompt, drawn token by token.

        Args:
            n: how many per prompt, at least 1.
            generator: where the randomness comes from; None for torch's default generator.

        Returns:
            [X, n, T] int64 tokens, filled with the eos after the end.

        Raises:
            ValueError: n below 1.
        """
        checks.require_integer("n", n, at_least=1)
        device = self.logits[0].device
        prompt = torch.arange(self.n_prompts, device=device).unsqueeze(-1)
        context = torch.zeros(self.n_prompts, n, dtype=torch.int64, device=device)
        running = torch.ones_like(context, dtype=torch.bool)
        tokens, tables = [], self.log_tables
        for t in range(self.space.length):
            table = tables[min(t, len(tables) - 1)]
            token = draw(table[prompt % len(table), context], 1, generator).squeeze(-1)
            token = token if self.space.eos is None else torch.where(running, token, self.space.eos)
            context = self.space.next_context(context, token, order=self.order)
            running = running & self.space.is_live(token)
            tokens.append(token)
        return torch.stack(tokens, -1)
