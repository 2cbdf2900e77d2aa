"""The optimal and the tempered policy as distributions to draw from, token by token, and the nearest k-gram models."""

import math

import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor

from exo_toy import checks
from exo_toy.automata.automaton import RewardAutomaton
from exo_toy.automata.chain import KGramModel
from exo_toy.automata.recursion import Conditionals
from exo_toy.automata.values import Beta, Starts, Values, aligned, possible, tilted
from exo_toy.policies.policy import by_prompt, draw


class OptimalPolicy:
    r"""The optimal policy for a k-gram reference and an automaton's reward, as an autoregressive policy.

    .. math::
        \pi^*_\beta(a \mid c, s) \propto \pi_{ref}(a \mid c)\, e^{\rho(s, a) / \beta}\, v(c a, \delta(s, a))

    The next token depends on the context c of k tokens and on the automaton's state s; v is what completions still
    weigh from there, kept at every √T-th position and computed again in between.

    Source: Ji et al., arXiv:2402.00856v4, section 2; the recursion is Mohri's, Computational Linguistics 23(2), 1997.

    Args:
        ref: the reference, for X prompts.
        automaton: the reward.
        beta: strength of the KL penalty, above 0, in the unit of the reward; a scalar tensor for gradients.
        starts: [X] the automaton's state before the first token of each prompt; None for its start.

    Attributes:
        log_z: [X] float64, log partition function.

    Raises:
        ValueError: another vocabulary or number of prompts, a state out of range, beta not above 0; a prompt for which
            everything is forbidden.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> fair = KGramModel(SequenceSpace(2, 1000), 0, (torch.zeros(1, 1, 2).double(),))
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> OptimalPolicy(fair, ones, beta=1.0).conditionals(500).exp().flatten()  # 1 : e
        tensor([0.2689, 0.7311], dtype=torch.float64)
    """

    def __init__(self, ref: KGramModel, automaton: RewardAutomaton, *, beta: Beta, starts: Starts = None) -> None:
        self.ref, self.space = ref, ref.space
        self._values = possible(tilted(ref, automaton, beta=beta, starts=starts))
        self.log_z: Float64[Tensor, " X"] = self._values.log_sum()

    def conditionals(self, t: int) -> Float64[Tensor, "X C S V"]:
        """Log-probabilities of the token at a position, given a context of min(t, k) tokens and a state.

        Args:
            t: in 0..T-1.

        Returns:
            [X or 1, A**min(t, k), S, V] float64; -inf throughout where nothing that is allowed can follow.

        Raises:
            ValueError: a position out of range.
        """
        checks.require_integer("t", t, at_least=0)
        if t >= self.space.length:
            raise ValueError(f"t must be in 0..{self.space.length - 1}; got {t}")
        return _conditionals(self._values, t, self._values.following_at(t))

    def log_prob(self, tokens: Int[Tensor, "M T"] | Int[Tensor, "X M T"]) -> Float64[Tensor, "X M"]:
        """Log-probability of given completions, in nats: that of the reference, plus r / beta, less log Z.

        Args:
            tokens: [M, T] completions, as :meth:`SequenceSpace.tokens` has them, scored for every prompt; or
                [X, M, T], each prompt's own.

        Returns:
            [X, M] float64, -inf where forbidden.

        Raises:
            ValueError: ``tokens`` are not completions of the space, or of another shape.
        """
        n_prompts = len(self.log_z)
        tokens = by_prompt(self.space, tokens, n_prompts).expand(n_prompts, -1, -1)
        log_ref = self.ref.log_prob(tokens if self.ref.n_prompts > 1 else tokens.reshape(1, -1, tokens.shape[-1]))
        state = self._values.starts.expand(n_prompts).unsqueeze(-1).expand(tokens.shape[:2])
        edge, counted = self._values.edge, self.space.counted(tokens)
        earned = []
        for token, counts in zip(tokens.unbind(-1), counted.unbind(-1), strict=True):
            earned.append(torch.where(counts, edge[state, token], 0.0))
            state = torch.where(counts, self._values.transitions[state, token], state)
        reward = torch.stack(earned, -1).sum(-1) + self._values.end[state]
        return log_ref.reshape(reward.shape) + reward - self.log_z.unsqueeze(-1)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Int64[Tensor, "X n T"]:
        """Independent completions of every prompt, drawn token by token from the exact conditionals.

        Args:
            n: how many per prompt, at least 1.
            generator: where the randomness comes from; None for torch's default generator.

        Returns:
            [X, n, T] int64 tokens, filled with the eos after the end; never a forbidden completion.

        Raises:
            ValueError: n below 1.
        """
        checks.require_integer("n", n, at_least=1)
        values, lattice = self._values, self._values.lattice
        n_prompts = len(self.log_z)
        state = values.starts.expand(n_prompts).unsqueeze(-1).expand(-1, n)
        prompt = torch.arange(n_prompts, device=state.device).unsqueeze(-1)
        context, running = torch.zeros_like(state), torch.ones_like(state, dtype=torch.bool)
        tokens: list[Tensor] = []
        for t, following in values.following():
            table = self._log_tables[min(t, len(self._log_tables) - 1)]
            group = context % lattice.n_groups(t)
            logits = table[prompt % len(table), context] + following[prompt % len(following), group, state]
            # What has ended may stand in a context from which nothing is allowed.
            log_probs = logits.masked_fill(~running.unsqueeze(-1), 0.0).log_softmax(-1)
            token = draw(log_probs, 1, generator).squeeze(-1)
            if self.space.eos is not None:
                token = torch.where(running, token, self.space.eos)
            state = torch.where(running, values.transitions[state, token], state)
            context = self.space.next_context(context, token, order=lattice.order)
            running = running & self.space.is_live(token)
            tokens.append(token)
        return torch.stack(tokens, -1)

    @property
    def _log_tables(self) -> tuple[Tensor, ...]:
        return tuple(self._values.tables.log_tables)

    def closest_kgram(self, order: int, *, homogeneous: bool = False) -> KGramModel:
        r"""The k-gram model nearest to the optimal policy: the minimiser of KL(π* || π) over π, in closed form.

        Its tables are the k-gram conditionals of π* at each position; or, for ``homogeneous``, at all positions from k
        on together, which is the nearest among models with one table for these. Their counts are the derivatives of
        log Z in the reference's log-probabilities. A context that π* never reaches gets the uniform conditional.

        Args:
            order: k, in 0..T-1, higher than the reference's or lower.
            homogeneous: whether positions share a table, [A**k, V] in place of T of them, and prompts too.

        Returns:
            A model without gradients, for X prompts; with shared tables, for all of them together, the nearest on
            average over prompts.

        Raises:
            ValueError: an order out of range.

        Example:
            >>> from exo_toy.spaces import SequenceSpace
            >>> fair = KGramModel(SequenceSpace(2, 1000), 0, (torch.zeros(1, 1, 2).double(),))
            >>> ones = torch.tensor([[0.0, 1.0]]).double()
            >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), ones, torch.zeros(1).double())
            >>> OptimalPolicy(fair, ones, beta=1.0).closest_kgram(0, homogeneous=True).table(0).exp()
            tensor([[[0.2689, 0.7311]]], dtype=torch.float64)
        """
        self.space.require_order(order)
        model = self.ref.lifted(max(order, self.ref.order))
        n_prompts = 1 if homogeneous else len(self.log_z)
        n_tables = len(model.logits) if homogeneous and model.is_homogeneous else self.space.length
        logs = [table.detach() for table in model.log_tables]
        own = self._values
        edge, end = own.edge.detach(), own.end.detach()

        def counts(logs: list[Tensor], edge: Tensor, end: Tensor) -> list[Tensor]:
            """How often each token is expected behind each context, at each position or at all from k on."""
            with torch.enable_grad():
                leaves = []
                for t in range(n_tables):
                    table = logs[min(t, len(logs) - 1)]
                    # Views of one table, each a leaf of its own.
                    shared = table if homogeneous else table.expand(n_prompts, -1, -1)
                    leaves.append(shared.detach().requires_grad_())
                values = Values(model, leaves, own.transitions, edge, end, own.starts)
                found = torch.autograd.grad(values.log_sum().sum(), leaves)
            tables = []
            for t, count in enumerate(found):
                n_contexts = self.space.n_contexts(t, order=order)
                # Older tokens come first in the number of a context: they are summed out.
                count = count.unflatten(1, (-1, n_contexts)).sum(1)
                tables.append(count.sum(0, keepdim=True) if homogeneous else count)
            return [*tables[:order], torch.stack(tables[order:]).sum(0)] if homogeneous else tables

        expected = counts(logs, edge, end)
        alike = [_alike(x, 1 / self.space.vocab_size) for x in logs]
        underflown = any((count == 0).any() for count in expected)
        # What is never allowed counts 0 when all that is allowed weighs the same, too.
        possible_at = counts(alike, _alike(edge, 1.0), _alike(end, 1.0)) if underflown else expected
        tables = (_normalised(count, where > 0) for count, where in zip(expected, possible_at, strict=True))
        return KGramModel(self.space, order, tuple(tables))


def tempered_policy(pi: KGramModel, ref: KGramModel, *, beta_pi: float | int) -> tuple[KGramModel, Tensor]:
    r"""The normalised geometric mean of a k-gram policy and the reference, itself k-gram, and its log normaliser.

    .. math::
        \pi^{\beta_\pi}(y) = \pi(y)^{\beta_\pi}\, \pi_{ref}(y)^{1 - \beta_\pi} / e^{\lambda}, \quad
        \lambda = \log \sum_y \pi(y)^{\beta_\pi}\, \pi_{ref}(y)^{1 - \beta_\pi}

    Source: Ji et al., arXiv:2402.00856v4, section 3.

    Args:
        pi: the policy, for X prompts.
        ref: the reference, over the same space, of any order.
        beta_pi: policy temperature, above 0.

    Returns:
        The policy, a model with a table for every position (T V^k V numbers for order k), and λ [X], at most 0 for
        beta_pi below 1. Both are differentiable in the logits. :func:`log_tempered_normalizer` has λ alone.

    Raises:
        ValueError: as :func:`log_tempered_normalizer`.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> space = SequenceSpace(2, 1000)
        >>> fair = KGramModel(space, 0, (torch.zeros(1, 1, 2).double(),))
        >>> bent = KGramModel(space, 0, (torch.tensor([[[0.0, 2.0]]]).double(),))
        >>> tempered_policy(bent, fair, beta_pi=0.5)[0].table(0).exp()  # 1 : e
        tensor([[[0.2689, 0.7311]]], dtype=torch.float64)
    """
    values, log_sum = _tempered(pi, ref, beta_pi)
    tables = []
    for t, following in values.following():
        table = _conditionals(values, t, following).squeeze(2)
        # A context that the policy cannot be in needs a distribution too.
        unreached = (table == -torch.inf).all(-1, keepdim=True)
        tables.append(table.masked_fill(unreached, 0.0))
    n_prompts = max(len(table) for table in tables)
    tables = [table if len(table) in (1, n_prompts) else table.expand(n_prompts, -1, -1) for table in tables]
    return KGramModel(pi.space, values.lattice.order, tuple(tables)), log_sum


def log_tempered_normalizer(pi: KGramModel, ref: KGramModel, *, beta_pi: float | int) -> Float64[Tensor, " X"]:
    r"""Log normaliser of the tempered policy, :math:`\log \sum_y \pi(y)^{\beta_\pi} \pi_{ref}(y)^{1 - \beta_\pi}`.

    Args:
        pi: the policy, for X prompts.
        ref: the reference, over the same space, of any order.
        beta_pi: policy temperature, above 0.

    Returns:
        [X] float64 in nats: β_π - 1 times the Rényi divergence of order β_π from the reference.

    Raises:
        ValueError: models over different spaces or for different prompts, beta_pi not above 0; for beta_pi above 1, a
            token that the policy may draw where the reference cannot; supports that do not meet.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> fair = KGramModel(SequenceSpace(2, 1000), 0, (torch.zeros(1, 1, 2).double(),))
        >>> abs(log_tempered_normalizer(fair, fair, beta_pi=0.5).item()) < 1e-10
        True
    """
    return _tempered(pi, ref, beta_pi)[1]


def _tempered(pi: KGramModel, ref: KGramModel, beta_pi: float | int) -> tuple[Values, Tensor]:
    """Values of the tempered policy, and the log of its normaliser."""
    checks.require_positive(beta_pi=beta_pi)
    pi, ref = aligned(pi, ref)
    logs, others = pi.log_tables, ref.log_tables
    tables = []
    for t in range(max(len(logs), len(others))):
        p, q = logs[min(t, len(logs) - 1)], others[min(t, len(others) - 1)]
        outside = (q == -torch.inf) & (p > -torch.inf)
        if beta_pi > 1:
            checks.require_values(
                [p.detach()], (outside, lambda: "pi must have no token where ref has none, for beta_pi above 1")
            )
        zero = (p == -torch.inf) | (outside if beta_pi != 1 else False)
        p, q = p.masked_fill(p == -torch.inf, 0.0), q.masked_fill(q == -torch.inf, 0.0)
        tables.append((q + beta_pi * (p - q)).masked_fill(zero, -torch.inf))
    # Weights are at most 1: the largest of all is put on every token instead.
    largest = torch.stack([table.detach().max() for table in tables]).max()
    model = KGramModel(pi.space, pi.order, (pi if len(logs) == len(tables) else ref).logits)
    edge = largest.expand(1, pi.space.vocab_size)
    one = torch.zeros(1, dtype=torch.int64, device=edge.device)
    transitions = torch.zeros_like(edge, dtype=torch.int64)
    values = Values(model, [table - largest for table in tables], transitions, edge, edge.new_zeros(1), one)
    return values, possible_supports(values.log_sum())


def possible_supports(log_sum: Tensor) -> Tensor:
    """The same, unless no completion has a positive weight."""
    bad = log_sum.detach() == -torch.inf
    message = "pi must be above 0 on a completion where ref is; got disjoint supports"
    checks.require_values([log_sum.detach()], (bad, lambda: message))
    return log_sum


def _conditionals(values: Values, t: int, following: Tensor) -> Tensor:
    """Log-probabilities [X, C, S, V] of the next token."""
    table = values.tables.at(t)
    q = Conditionals(table, following)
    joint = table.log.unsqueeze(3) + following.unsqueeze(2)
    log_probs = joint - q.log_sum.transpose(2, 3).masked_fill(q.dead.transpose(2, 3), 0.0).unsqueeze(-1)
    # [X, B, D, S, V] to contexts, whose oldest token d comes first.
    return log_probs.transpose(1, 2).flatten(1, 2)


def _alike(logs: Tensor, weight: float) -> Tensor:
    """One weight for all that is allowed."""
    return torch.full_like(logs, math.log(weight)).masked_fill(logs == -torch.inf, -torch.inf)


def _normalised(count: Tensor, possible: Tensor) -> Tensor:
    """Log-probabilities of expected counts; uniform where there are none.

    What is possible, and so rare that its count underflows, has the smallest probability that float64 knows: with none,
    KL(π* || π) would be infinite.
    """
    total = count.sum(-1, keepdim=True)
    least = math.log(torch.finfo(count.dtype).tiny)
    log_probs = torch.where((count == 0) & possible, least, count.log() - total.log())
    return torch.where(total > 0, log_probs, 0.0)
