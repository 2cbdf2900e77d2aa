"""Policies made of free logits: a table over the whole space, or a table per position for every context."""

import math

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor, nn

from exo_toy import checks
from exo_toy.policies.autoregressive import AutoregressivePolicy, State
from exo_toy.policies.policy import by_prompt, draw, log_softmax
from exo_toy.spaces import SequenceSpace, join_children, split_children, sum_over_trie


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

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        """:meth:`log_probs`, or :meth:`log_prob` of given tokens: what ``torch.func.functional_call`` calls."""
        return self.log_probs() if tokens is None else self.log_prob(tokens)

    def log_probs(self) -> Float64[Tensor, "X N"]:
        """Log-probability of every completion, in nats.

        Returns:
            [X, N] float64, log-sum-exp 0 in each row; -inf where the logit is.

        Raises:
            ValueError: a prompt whose logits define no distribution (NaN, +inf, or -inf throughout).
        """
        return log_softmax("logits", self.logits)

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
        log_probs = self.log_probs()
        index = self.space.index(by_prompt(self.space, tokens, len(log_probs)))
        return log_probs.gather(-1, index.expand(len(log_probs), -1))

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
        return self.space.tokens(draw(self.log_probs(), n, generator))


class KGramPolicy(AutoregressivePolicy):
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
        >>> policy = KGramPolicy(SequenceSpace(10, 50), 1)  # no need to enumerate these 10**50
        >>> round(policy.log_prob(torch.zeros(1, 50, dtype=torch.int64)).item() / -math.log(10), 9)
        50.0
    """

    def __init__(self, space: SequenceSpace, order: int, *, n_prompts: int = 1) -> None:
        super().__init__(space, n_prompts, width=1)
        space.require_order(order)
        self.order = order
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
        tables = [self._table(t) for t in range(self.space.length)]
        return sum_over_trie(self.space, tables, order=self.order)

    def _start(self) -> State:
        # Numbers of contexts.
        return (torch.zeros(1, 1, dtype=torch.int64, device=self.logits[0].device),)

    def _extend(self, state: State, tokens: Tensor, t: int) -> State:
        return (self.space.next_context(state[0].unsqueeze(2), tokens, order=self.order).flatten(1, 2),)

    def _next(self, state: State, t: int) -> Tensor:
        return self._table(t)[self._prompts(), state[0]]

    def _given(self, state: State, token: Tensor, t: int) -> Tensor:
        return self._table(t)[self._prompts(), state[0], token]

    def _prompts(self) -> Tensor:
        return torch.arange(self.n_prompts, device=self.logits[0].device).unsqueeze(-1)

    def _table(self, t: int) -> Tensor:
        """Log-probabilities of the token at position t, [X, contexts, V]."""
        return log_softmax(f"logits[{t}]", self.logits[t])


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
