"""Policies over the completions of a space, one distribution per prompt.

A policy is a module with three methods: ``log_probs() -> [X, N]``, ``log_prob(tokens [M, T]) -> [X, M]`` and
``sample(n, generator) -> [X, n, T]``. Everything else takes the table that ``log_probs`` returns, so any module with
these three can stand in for the ones here, a recurrent network or a Transformer as well.

Parameters are logits in float64, zero at first (every token, or completion, equally likely). A logit may be -inf:
probability zero, exactly.
"""

import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor, nn

from exo_toy import checks
from exo_toy.spaces import SequenceSpace, join_children, split_children, sum_over_trie


@runtime_checkable
class Policy(Protocol):
    """What exact computations ask of a policy: a table that depends on parameters. Any ``nn.Module`` may provide it."""

    def log_probs(self) -> Float64[Tensor, "X N"]:
        """[X, N] log-probability of every completion, in nats."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, as those of an ``nn.Module``."""
        ...


class TabularPolicy(nn.Module):
    r"""A free logit for every completion: any distribution over the space.

    .. math::
        \pi_\theta(y) = \mathrm{softmax}(\theta)_y

    Args:
        space: N completions, few enough to enumerate.
        n_prompts: X, at least 1; every prompt has a distribution of its own.

    Raises:
        ValueError: a space too large for its memory budget; ``n_prompts`` out of range.

    Example:
        >>> TabularPolicy(SequenceSpace(2, 1)).log_probs().exp().tolist()
        [[0.5, 0.5]]
    """

    def __init__(self, space: SequenceSpace, *, n_prompts: int = 1) -> None:
        super().__init__()
        checks.require_integer("n_prompts", n_prompts, at_least=1)
        space.require_enumerable(bytes_per_completion=8 * n_prompts, what="TabularPolicy")
        self.space = space
        self.logits = nn.Parameter(torch.zeros(n_prompts, space.size, dtype=torch.float64))

    def log_probs(self) -> Float64[Tensor, "X N"]:
        """Log-probability of every completion, in nats.

        Returns:
            [X, N] float64, log-sum-exp 0 in each row; -inf where the logit is.

        Raises:
            ValueError: a prompt whose logits define no distribution (NaN, +inf, or -inf throughout).
        """
        return _log_softmax("logits", self.logits)

    def log_prob(self, tokens: Int[Tensor, "M T"]) -> Float64[Tensor, "X M"]:
        """Log-probability of given completions for every prompt, in nats.

        Args:
            tokens: [M, T] completions, as :meth:`SequenceSpace.tokens` has them.

        Returns:
            [X, M] float64.

        Raises:
            ValueError: ``tokens`` are not completions of the space, or not [M, T].
        """
        _require_rows(self.space, tokens)
        return self.log_probs()[:, self.space.index(tokens)]

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Int64[Tensor, "X n T"]:
        """Independent completions of every prompt, drawn by inversion of the distribution function.

        Args:
            n: how many per prompt, at least 1.
            generator: where the randomness comes from; None for torch's default generator.

        Returns:
            [X, n, T] int64 tokens.

        Raises:
            ValueError: n below 1; logits that define no distribution.
        """
        checks.require_integer("n", n, at_least=1)
        return self.space.tokens(_draw(self.log_probs(), n, generator))


class KGramPolicy(nn.Module):
    r"""A policy whose next token depends on the k tokens before it, with a table of free logits per position.

    .. math::
        \log \pi_\theta(y) = \sum_{t < |y|} \log \mathrm{softmax}(\theta_t[y_{t-k}, \dots, y_{t-1}])_{y_t}

    Order 0 draws every position by itself; order T - 1 can express every distribution over the space.

    Args:
        space: the completions; they need not be few enough to enumerate, except for :meth:`log_probs`.
        order: k, in 0..T-1 (beyond T - 1 nothing changes).
        n_prompts: X, at least 1; every prompt has tables of its own.

    Attributes:
        logits: T parameters [X, A**min(t, k), V], where A counts the tokens but the eos; contexts are numbered in
            base A, first token most significant (see :mod:`exo_toy.spaces`).

    Raises:
        ValueError: an argument out of range; tables that exceed the space's memory budget.

    Example:
        >>> policy = KGramPolicy(SequenceSpace(2, 3), 1)
        >>> [tuple(table.shape) for table in policy.logits]
        [(1, 1, 2), (1, 2, 2), (1, 2, 2)]
    """

    def __init__(self, space: SequenceSpace, order: int, *, n_prompts: int = 1) -> None:
        super().__init__()
        space.require_order(order)
        checks.require_integer("n_prompts", n_prompts, at_least=1)
        self.space = space
        self.order = order
        self.n_prompts = n_prompts
        shapes = [(n_prompts, space.n_contexts(t, order=order), space.vocab_size) for t in range(space.length)]
        space.require_memory(8 * sum(map(math.prod, shapes)), what=f"the tables of KGramPolicy of order {order}")
        self.logits = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes)

    def log_probs(self) -> Float64[Tensor, "X N"]:
        """Log-probability of every completion, in nats.

        Returns:
            [X, N] float64, log-sum-exp 0 in each row; -inf where a logit on the path is.

        Raises:
            ValueError: a space too large for its memory budget; a context whose logits define no distribution (NaN,
                +inf, or -inf throughout).

        Example:
            >>> KGramPolicy(SequenceSpace(2, 2), 0).log_probs().exp().tolist()
            [[0.25, 0.25, 0.25, 0.25]]
        """
        return sum_over_trie(self.space, self._conditionals(), order=self.order)

    def log_prob(self, tokens: Int[Tensor, "M T"]) -> Float64[Tensor, "X M"]:
        """Log-probability of given completions for every prompt, in nats; enumerates nothing.

        Args:
            tokens: [M, T] completions, as :meth:`SequenceSpace.tokens` has them.

        Returns:
            [X, M] float64.

        Raises:
            ValueError: ``tokens`` are not completions of the space, or not [M, T]; logits that define no distribution.

        Example:
            >>> policy = KGramPolicy(SequenceSpace(10, 50), 1)
            >>> round(policy.log_prob(torch.zeros(1, 50, dtype=torch.int64)).item() / -math.log(10), 9)
            50.0
        """
        _require_rows(self.space, tokens)
        tokens = tokens.to(torch.int64)
        context = tokens.new_zeros(tokens.shape[:1])
        running = torch.ones_like(context, dtype=torch.bool)
        log_prob = self.logits[0].new_zeros(self.n_prompts, len(tokens))
        for table, token in zip(self._conditionals(), tokens.unbind(-1), strict=True):
            log_prob = log_prob + torch.where(running, table[:, context, token], 0.0)
            running = running & self.space.is_live(token)
            context = self.space.next_context(context, token, order=self.order)
        return log_prob

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Int64[Tensor, "X n T"]:
        """Independent completions of every prompt, drawn token by token; enumerates nothing.

        Args:
            n: how many per prompt, at least 1.
            generator: where the randomness comes from; None for torch's default generator.

        Returns:
            [X, n, T] int64 tokens, filled with the eos after the end.

        Raises:
            ValueError: n below 1; logits that define no distribution.
        """
        checks.require_integer("n", n, at_least=1)
        prompt = torch.arange(self.n_prompts, device=self.logits[0].device).unsqueeze(-1)
        context = prompt.new_zeros(self.n_prompts, n)
        running = torch.ones_like(context, dtype=torch.bool)
        tokens = []
        for table in self._conditionals():
            token = _draw(table[prompt, context], 1, generator).squeeze(-1)
            if self.space.eos is not None:
                token = torch.where(running, token, self.space.eos)
            running = running & self.space.is_live(token)
            context = self.space.next_context(context, token, order=self.order)
            tokens.append(token)
        return torch.stack(tokens, -1)

    def _conditionals(self) -> list[Tensor]:
        """Log-probabilities of the next token, [X, contexts, V] for every position."""
        return [_log_softmax(f"logits[{t}]", table) for t, table in enumerate(self.logits)]


@torch.no_grad()
def closest_kgram(space: SequenceSpace, log_p: Float[Tensor, "X N"] | Float[Tensor, " N"], order: int) -> KGramPolicy:
    r"""The k-gram policy nearest to a distribution: the minimiser of KL(p || pi) over pi, in closed form.

    It is made of p's own k-gram conditionals, and what separates it from p is the dependence on older tokens,

    .. math::
        \min_\pi \mathrm{KL}(p \| \pi) = \sum_t I_p(y_t;\, y_{<t-k} \mid y_{t-k}, \dots, y_{t-1})

    where, with an eos, every term is conditional on the completion not having ended before t, and weighted by the
    probability of that. A context that p never reaches gets the uniform conditional.

    Source: the chain rule of relative entropy, Cover and Thomas, Elements of Information Theory, Theorem 2.5.3.

    Args:
        space: N completions.
        log_p: [X, N] or [N] normalised log-probabilities, -inf for zero.
        order: k, in 0..T-1; at T - 1 the policy is p itself.

    Returns:
        A policy of order k for X prompts (one for [N]) on the device of ``log_p``. Its logits carry no gradient to
        ``log_p``.

    Raises:
        ValueError: an order out of range, a table of another size, or not of normalised log-probabilities.

    Example:
        >>> log_p = torch.tensor([0.5, 0.0, 0.0, 0.5]).log()
        >>> closest_kgram(SequenceSpace(2, 2), log_p, 0).log_probs().exp().tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """
    space.require_order(order)
    (log_p,) = checks.as_tables(log_p=log_p)
    if log_p.ndim > 2 or log_p.shape[-1] != space.size:
        raise ValueError(f"log_p must have shape [X, {space.size}] or [{space.size}]; got {list(log_p.shape)}")
    checks.require_log_probabilities(log_p=log_p)

    # [X, contexts, completions below], summed over whatever came before the context.
    below = log_p.reshape(-1, 1, space.size)
    policy = KGramPolicy(space, order, n_prompts=below.shape[0]).to(log_p.device)
    for t, logits in enumerate(policy.logits):
        children, eos = split_children(space, below)
        joint = join_children(space, children.logsumexp(-1, keepdim=True), eos)
        reached = joint.logsumexp(-1, keepdim=True) > -torch.inf
        logits.copy_(torch.where(reached, joint.log_softmax(-1), 0.0))
        below = children.flatten(1, 2)
        if t >= order:
            below = below.unflatten(1, (space.n_live, -1)).logsumexp(1)
    return policy


def _log_softmax(name: str, logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension; a row that is no distribution is an error."""
    log_probs = logits.log_softmax(-1)
    # NaN and +inf, or -inf throughout, make the normaliser and hence the whole row NaN: one column shows it.
    bad = log_probs[..., 0].detach().isnan()
    allowed = "finite or -inf, with a finite entry in every row of the last dimension"
    checks.require_values(
        [logits], (bad, lambda: f"{name} must be {allowed}; not so in the row at {bad.nonzero()[0].tolist()}")
    )
    return log_probs


def _draw(log_probs: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """n indices [..., n] from each distribution [..., N]; never one of probability zero."""
    # Not torch.multinomial, which stops at 2**24 categories.
    cumulative = log_probs.exp().cumsum(-1)
    uniform = torch.rand(
        (*log_probs.shape[:-1], n), generator=generator, dtype=log_probs.dtype, device=log_probs.device
    )
    # Scaled by the sum as it came out in floating point, the threshold stays strictly below it.
    return torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)


def _require_rows(space: SequenceSpace, tokens: Tensor) -> None:
    """``tokens`` are completions, [M, T]."""
    space.require_completions(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have shape [M, {space.length}]; got {list(tokens.shape)}")
