"""Partition function, rewards, entropies and divergences of k-gram models and of the optimal policies they lead to.

Each is log Z, a sum of terms local to a position, averaged by one recursion over pairs of a context and a state, or
both.
"""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from exo_toy import logspace
from exo_toy.automata.automaton import RewardAutomaton
from exo_toy.automata.carry import Own
from exo_toy.automata.chain import KGramModel
from exo_toy.automata.recursion import ByContext, Conditionals
from exo_toy.automata.sums import Chain, expected_sum, mean_cost, moments, sum_by_context
from exo_toy.automata.values import Beta, Starts, aligned, divided, first_states, over, possible, require_beta, tilted


class Moments(NamedTuple):
    """Mean and variance of a reward, [X] each."""

    mean: Tensor
    variance: Tensor


def log_partition(
    ref: KGramModel, automaton: RewardAutomaton, *, beta: Beta, starts: Starts = None
) -> Float64[Tensor, " X"]:
    r"""Log partition function of the optimal policy.

    .. math::
        \log Z_\beta = \log E_{\pi_{ref}}[e^{r/\beta}]

    One backward recursion: T products of S by V entries with V by V for k = 1, T V^k S V operations for order k. The
    backward pass recomputes it by blocks of √T positions.

    Source: the forward algorithm of weighted automata (Mohri, Computational Linguistics 23(2), 1997); π* as in Ji et
    al., arXiv:2402.00856v4, section 2.

    Args:
        ref: the reference, for X prompts.
        automaton: the reward.
        beta: strength of the KL penalty, above 0, in the unit of the reward; a scalar tensor for gradients.
        starts: [X] the automaton's state before the first token of each prompt; None for its start.

    Returns:
        [X] float64 in nats, differentiable in the reference's logits, the rewards and beta; -inf where all that the
        reference can produce is forbidden.

    Raises:
        ValueError: another vocabulary or number of prompts, a state out of range, beta not above 0.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> fair = KGramModel(SequenceSpace(2, 1000), 0, (torch.zeros(1, 1, 2).double(),))
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> log_partition(fair, ones, beta=1.0)  # 1000 log((1 + e) / 2)
        tensor([620.1145], dtype=torch.float64)
    """
    return tilted(ref, automaton, beta=beta, starts=starts).log_sum()


def reward_moments(model: KGramModel, automaton: RewardAutomaton, *, starts: Starts = None) -> Moments:
    r"""Mean and variance of the reward of a k-gram model.

    .. math::
        E_\pi[r], \quad \mathrm{Var}_\pi[r]

    Source: the law of total variance, position by position.

    Args:
        model: the distribution, for X prompts.
        automaton: the reward.
        starts: as in :func:`log_partition`.

    Returns:
        [X] each, float64, differentiable in logits and rewards; -inf and inf where the model may produce what is
        forbidden.

    Raises:
        ValueError: as :func:`log_partition`.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> fair = KGramModel(SequenceSpace(2, 1000), 0, (torch.zeros(1, 1, 2).double(),))
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> [value.item() for value in reward_moments(fair, ones)]
        [500.0, 250.0]
    """
    chain = Chain(model, automaton.transitions, first_states(model, automaton, starts))
    mean, variance = moments(chain, automaton)
    cost = torch.zeros_like(automaton.rewards).masked_fill(automaton.rewards == -torch.inf, torch.inf)
    end = torch.zeros_like(automaton.final).masked_fill(automaton.final == -torch.inf, torch.inf)
    if not (cost.any() or end.any()):
        return Moments(mean, variance)
    forbidden = expected_sum(chain, partial(mean_cost, chain, cost, end), end).isinf()
    return Moments(mean.masked_fill(forbidden, -torch.inf), variance.masked_fill(forbidden, torch.inf))


def optimal_reward_moments(
    ref: KGramModel, automaton: RewardAutomaton, *, beta: Beta, starts: Starts = None
) -> Moments:
    r"""Mean and variance of the reward of the optimal policy: the first two derivatives of log Z in 1/β.

    .. math::
        E_{\pi^*_\beta}[r], \quad \mathrm{Var}_{\pi^*_\beta}[r]

    Args:
        ref: the reference, for X prompts.
        automaton: the reward.
        beta: as in :func:`log_partition`.
        starts: as in :func:`log_partition`.

    Returns:
        [X] each, float64, differentiable in logits, rewards and beta.

    Raises:
        ValueError: as :func:`log_partition`; a prompt for which everything is forbidden.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> fair = KGramModel(SequenceSpace(2, 1000), 0, (torch.zeros(1, 1, 2).double(),))
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> optimal_reward_moments(fair, ones, beta=1.0).mean  # 1000 e / (1 + e)
        tensor([731.0586], dtype=torch.float64)
    """
    values = possible(tilted(ref, automaton, beta=beta, starts=starts))
    return Moments(*moments(values, automaton))


def entropy(model: KGramModel) -> Float64[Tensor, " X"]:
    r"""Shannon entropy of a k-gram model, differentiable in its logits.

    .. math:: H(\pi) = \sum_t E_\pi\, H(\pi(\cdot \mid y_{t-k}, \dots, y_{t-1}))

    Returns:
        [X] float64 in nats, at least 0.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> entropy(KGramModel(SequenceSpace(2, 1000), 0, (torch.zeros(1, 1, 2).double(),)))  # 1000 log 2
        tensor([693.1472], dtype=torch.float64)
    """
    local = [-logspace.expectation(table, table) for table in model.log_tables]
    return sum_by_context(model, local).expand(model.n_prompts)


def kl_divergence(model: KGramModel, other: KGramModel) -> Float64[Tensor, " X"]:
    r"""Divergence of two k-gram models, of any orders, in the order of the arguments.

    .. math:: \mathrm{KL}(\pi \| \pi') = \sum_t E_\pi\, \mathrm{KL}(\pi(\cdot \mid y_{<t}) \| \pi'(\cdot \mid y_{<t}))

    Args:
        model: π, for X prompts.
        other: π', over the same space, for as many prompts or one.

    Returns:
        [X] float64 in nats, at least 0, differentiable in both models' logits; inf where π has mass outside the
        support of π'.

    Raises:
        ValueError: models over different spaces or for different prompts.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> space = SequenceSpace(2, 1000)
        >>> fair = KGramModel(space, 0, (torch.zeros(1, 1, 2).double(),))
        >>> ones = KGramModel(space, 0, (torch.tensor([[[-torch.inf, 0.0]]]).double(),))
        >>> kl_divergence(ones, fair), kl_divergence(fair, ones)
        (tensor([693.1472], dtype=torch.float64), tensor([inf], dtype=torch.float64))
    """
    model, other = aligned(model, other)
    return sum_by_context(model, _local_divergences(model, other)).expand(max(model.n_prompts, other.n_prompts))


def alignment_objective(
    pi: KGramModel, ref: KGramModel, automaton: RewardAutomaton, *, beta: Beta, starts: Starts = None
) -> Float64[Tensor, " X"]:
    r"""KL-regularised expected reward of a k-gram model, the objective of RLHF.

    .. math:: J_\beta(\pi) = E_\pi[r] - \beta \, \mathrm{KL}(\pi \| \pi_{ref})
        = \beta \log Z_\beta - \beta \, \mathrm{KL}(\pi \| \pi^*_\beta)

    Source: Ji et al., arXiv:2402.00856v4, section 2.

    Args:
        pi: the policy, for X prompts.
        ref: the reference, over the same space.
        automaton: the reward.
        beta: as in :func:`log_partition`.
        starts: as in :func:`log_partition`.

    Returns:
        [X] float64 in [-inf, beta log Z], in the unit of the reward, differentiable in all.

    Raises:
        ValueError: as :func:`log_partition` and :func:`kl_divergence`.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> fair = KGramModel(SequenceSpace(2, 1000), 0, (torch.zeros(1, 1, 2).double(),))
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> alignment_objective(fair, fair, ones, beta=1.0)
        tensor([500.], dtype=torch.float64)
    """
    cost = _regularised_cost(pi, ref, automaton, beta, starts)
    # beta is shared: 0 times inf would be NaN in the gradient of the other prompts.
    return (-beta * cost.masked_fill(cost.isinf(), 0.0)).masked_fill(cost.isinf(), -torch.inf)


def kl_policy_to_optimal(
    pi: KGramModel, ref: KGramModel, automaton: RewardAutomaton, *, beta: Beta, starts: Starts = None
) -> Float64[Tensor, " X"]:
    r"""What the expected EXO-rw loss tends to, for a k-gram policy at β_π = 1.

    .. math:: \mathrm{KL}(\pi \| \pi^*_\beta) = \log Z_\beta + \mathrm{KL}(\pi \| \pi_{ref}) - E_\pi[r] / \beta

    Args:
        pi: the policy, for X prompts.
        ref: the reference, over the same space.
        automaton: the reward.
        beta: as in :func:`log_partition`.
        starts: as in :func:`log_partition`.

    Returns:
        [X] float64 in nats, at least 0 up to rounding, differentiable in all; inf where the policy has mass on what is
        forbidden or outside the reference's support.

    Raises:
        ValueError: as :func:`log_partition` and :func:`kl_divergence`; a prompt for which everything is forbidden.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> fair = KGramModel(SequenceSpace(2, 1000), 0, (torch.zeros(1, 1, 2).double(),))
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> kl_policy_to_optimal(fair, fair, ones, beta=1.0)  # 620.1145 - 500
        tensor([120.1145], dtype=torch.float64)
    """
    values = possible(tilted(ref, automaton, beta=beta, starts=starts))
    return values.log_sum() + _regularised_cost(pi, ref, automaton, beta, starts)


def kl_optimal_to_policy(
    pi: KGramModel, ref: KGramModel, automaton: RewardAutomaton, *, beta: Beta, starts: Starts = None
) -> Float64[Tensor, " X"]:
    r"""What the expected DPO-rw loss tends to up to a constant, for a k-gram policy at β_π = 1.

    .. math:: \mathrm{KL}(\pi^*_\beta \| \pi)

    Args:
        pi: the policy, for X prompts.
        ref: the reference, over the same space.
        automaton: the reward.
        beta: as in :func:`log_partition`.
        starts: as in :func:`log_partition`.

    Returns:
        [X] float64 in nats, at least 0 up to rounding, differentiable in all; inf where the optimal policy has mass
        outside the policy's support.

    Raises:
        ValueError: as :func:`log_partition` and :func:`kl_divergence`; a prompt for which everything is forbidden.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> fair = KGramModel(SequenceSpace(2, 1000), 0, (torch.zeros(1, 1, 2).double(),))
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> kl_optimal_to_policy(fair, fair, ones, beta=1.0)  # 731.0586 - 620.1145
        tensor([110.9441], dtype=torch.float64)
    """
    pi, ref = aligned(pi, ref)
    values = possible(tilted(ref, automaton, beta=beta, starts=starts))
    log_pi = pi.log_tables

    def divergence(positions: range, q: Conditionals) -> Tensor:
        # Masked first: -inf less -inf would be NaN, in the gradient too.
        outside = q.table.support == 0
        there = torch.where(outside, 0.0, over(values.lattice, log_pi, positions))
        log_ratio = ByContext.of(q.table.log.masked_fill(outside, 0.0) - there, q.table)
        return q.mean(q.relative, log_ratio) - q.log_of_sums

    return expected_sum(values, divergence, torch.zeros_like(values.end), log_pi)


def optimal_entropy(
    ref: KGramModel, automaton: RewardAutomaton, *, beta: Beta, starts: Starts = None
) -> Float64[Tensor, " X"]:
    r"""Shannon entropy of the optimal policy.

    .. math:: H(\pi^*_\beta) = \sum_t E_{\pi^*}\, H(\pi^*(\cdot \mid y_{<t}))

    Args:
        ref: the reference, for X prompts.
        automaton: the reward.
        beta: as in :func:`log_partition`.
        starts: as in :func:`log_partition`.

    Returns:
        [X] float64 in nats, at least 0 up to rounding, differentiable in all.

    Raises:
        ValueError: as :func:`log_partition`; a prompt for which everything is forbidden.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> fair = KGramModel(SequenceSpace(2, 1000), 0, (torch.zeros(1, 1, 2).double(),))
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> optimal_entropy(fair, ones, beta=1.0)  # 1000 times that of a token, 0.5822
        tensor([582.2031], dtype=torch.float64)
    """
    values = possible(tilted(ref, automaton, beta=beta, starts=starts))

    def uncertainty(_: range, q: Conditionals) -> Tensor:
        return q.mean(-q.relative, ByContext.of(-q.table.log, q.table)) + q.log_of_sums

    return expected_sum(values, uncertainty, torch.zeros_like(values.end))


def _regularised_cost(
    pi: KGramModel, ref: KGramModel, automaton: RewardAutomaton, beta: Beta, starts: Starts
) -> Float64[Tensor, " X"]:
    """KL(π || π_ref) - E_π[r] / β."""
    require_beta(beta)
    pi, ref = aligned(pi, ref)
    chain = Chain(pi, automaton.transitions, first_states(pi, automaton, starts))
    cost, end = -divided(automaton.rewards, beta), -divided(automaton.final, beta)
    to_ref = _local_divergences(pi, ref)

    def local(positions: range, q: Own) -> Tensor:
        return over(chain.lattice, to_ref, positions).unsqueeze(2) + mean_cost(chain, cost, end, positions, q)

    return expected_sum(chain, local, end, to_ref)


def _local_divergences(model: KGramModel, other: KGramModel) -> list[Tensor]:
    """KL of the next token's distributions [X, C], for every table."""
    logs, others = model.log_tables, other.log_tables
    n_tables = max(len(logs), len(others))
    pairs = [(logs[min(t, len(logs) - 1)], others[min(t, len(others) - 1)]) for t in range(n_tables)]
    # Two prompts' tables of one shape, as the sums over them need.
    return [_divergence(*torch.broadcast_tensors(p, q)) for p, q in pairs]


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL of rows of log-probabilities; where it is inf it has no gradient, not NaN: the row may never be reached."""
    outside = (q == -torch.inf) & (p > -torch.inf)
    finite = logspace.expectation(p, (p - q).masked_fill(outside, 0.0))
    return finite.masked_fill(outside.any(-1), torch.inf)
