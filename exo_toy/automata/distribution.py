"""The full distribution of an integer-valued reward: what best-of-n and win rates need, and nothing more.

Policies that differ by a function of the reward alone (the optimal policy, best-of-n) have as log ratio that function,
so divergences between them are those between the distributions of their rewards. A distribution here is a table over
the values [R] of the reward, as other tables are over completions: :func:`exo_toy.targets.optimal_policy`,
:func:`exo_toy.targets.best_of_n` and :func:`exo_toy.divergences.kl_divergence` take it as it is.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from exo_toy import checks, logspace, targets
from exo_toy.automata.automaton import RewardAutomaton
from exo_toy.automata.chain import KGramModel
from exo_toy.automata.values import Starts, Values, tilted
from exo_toy.divergences import kl_divergence
from exo_toy.spaces import SequenceSpace

# Beyond this a reward and its successor are not told apart.
LARGEST = 2.0**52


@dataclass(frozen=True, eq=False)
class RewardDistribution:
    """The distribution of a reward under X policies.

    Args:
        values: [R] increasing, the first -inf where completions may be forbidden.
        log_probs: [X, R] normalised log-probabilities of the values.
    """

    values: Float64[Tensor, " R"]
    log_probs: Float64[Tensor, "X R"]

    def optimal(self, *, beta: float | int) -> "RewardDistribution":
        """The reward's distribution under the optimal policy, if this is that under the reference.

        Example:
            >>> fair = RewardDistribution(torch.tensor([0.0, 1.0]).double(), torch.tensor([[0.5, 0.5]]).double().log())
            >>> fair.optimal(beta=1.0).log_probs.exp()  # 1 : e
            tensor([[0.2689, 0.7311]], dtype=torch.float64)
        """
        log_probs, _ = targets.optimal_policy(self.log_probs, self.values.expand_as(self.log_probs), beta=beta)
        return RewardDistribution(self.values, log_probs)

    def best_of(self, n: int) -> "RewardDistribution":
        """The distribution of the best of n independent draws.

        Example:
            >>> fair = RewardDistribution(torch.tensor([0.0, 1.0]).double(), torch.tensor([[0.5, 0.5]]).double().log())
            >>> fair.best_of(2).log_probs.exp()
            tensor([[0.2500, 0.7500]], dtype=torch.float64)
        """
        log_probs = targets.best_of_n(self.log_probs, self.values.expand_as(self.log_probs), n=n)
        return RewardDistribution(self.values, log_probs)

    def mean(self) -> Float64[Tensor, " X"]:
        """[X] expected reward; -inf where completions may be forbidden."""
        return logspace.expectation(self.log_probs, self.values.expand_as(self.log_probs))

    def variance(self) -> Float64[Tensor, " X"]:
        """[X] variance of the reward; finite rewards only."""
        return logspace.expectation(self.log_probs, (self.values - self.mean().unsqueeze(-1)).square())

    def kl_to(self, other: "RewardDistribution") -> Float64[Tensor, " X"]:
        """[X] KL(self || other) in nats: that of the policies too, where their log ratio depends on the reward alone.

        Raises:
            ValueError: distributions over different values.
        """
        _require_one_support(self, other)
        return kl_divergence(self.log_probs, other.log_probs)

    def win_rate(self, other: "RewardDistribution") -> Float64[Tensor, " X"]:
        r"""[X] probability that a draw has the higher reward than an independent one of the other, ties counted half.

        .. math:: P(r > r') + \tfrac12 P(r = r')

        Raises:
            ValueError: distributions over different values.

        Example:
            >>> fair = RewardDistribution(torch.tensor([0.0, 1.0]).double(), torch.tensor([[0.5, 0.5]]).double().log())
            >>> fair.best_of(2).win_rate(fair)
            tensor([0.6250], dtype=torch.float64)
        """
        _require_one_support(self, other)
        q = other.log_probs.exp()
        return (self.log_probs.exp() * (q.cumsum(-1) - q / 2)).sum(-1)


def reward_distribution(model: KGramModel, automaton: RewardAutomaton, *, starts: Starts = None) -> RewardDistribution:
    r"""The distribution of an integer-valued reward under a k-gram model.

    The automaton's states times the R values that may still be missing are the states of another automaton, for which
    the recursion of log Z gives P(r = n) for all n, each to relative accuracy, however small: R times the cost of
    log Z. Values that no completion of the space's lengths can have are left out at both ends.

    Args:
        model: the distribution, for X prompts.
        automaton: the reward: integers, or -inf where forbidden.
        starts: [X] the automaton's state before the first token of each prompt; None for its start.

    Returns:
        The distribution, differentiable in the model's logits.

    Raises:
        ValueError: a reward that is no integer, more values than the space's memory budget allows, and as
            :func:`exo_toy.automata.log_partition`.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> fair = KGramModel(SequenceSpace(2, 3), 0, (torch.zeros(1, 1, 2).double(),))
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> reward_distribution(fair, ones).log_probs.exp()
        tensor([[0.1250, 0.3750, 0.3750, 0.1250]], dtype=torch.float64)
    """
    own = tilted(model, automaton, beta=1.0, starts=starts)
    rewards, final = automaton.rewards.detach(), automaton.final.detach()
    _require_integers("rewards", rewards)
    _require_integers("final", final)
    low, high = reward_range(model.space, automaton)
    n_counting = automaton.n_states * (high - low + 2)
    # Where each transition leads and what it weighs, and what that is made of.
    model.space.require_memory(
        6 * 8 * n_counting * automaton.vocab_size, what=f"rewards in {low}..{high}, counted by {n_counting} states,"
    )
    counted = _counting(automaton, low, high)
    n_states, n_values = automaton.n_states, high - low + 1
    values = Values(model, model.log_tables, counted.transitions, counted.edge, counted.end, own.starts)
    at_start, offset = values.checkpoints[0]
    by_state = (at_start.squeeze(-1) + offset.unsqueeze(-1))[:, : n_states * (n_values + 1)].unflatten(
        1, (n_states, -1)
    )
    n_prompts = max(len(by_state), len(own.starts))
    prompt = torch.arange(n_prompts, device=by_state.device)
    log_probs = by_state[prompt % len(by_state), own.starts.expand(n_prompts)]
    support = torch.arange(low - 1, high + 1, device=log_probs.device, dtype=torch.float64)
    support[0] = -torch.inf
    if not counted.forbids:
        support, log_probs = support[1:], log_probs[:, 1:]
    return RewardDistribution(support, log_probs)


@dataclass(frozen=True, eq=False)
class _Counting:
    """Transitions and final log-weights of the automaton that counts the reward still missing."""

    transitions: Tensor
    end: Tensor
    edge: Tensor
    forbids: bool


def _counting(automaton: RewardAutomaton, low: int, high: int) -> _Counting:
    """States (s, n): n = 0 if the rest must be forbidden, n >= 1 if it must earn low + n - 1; then two absorbing ones.

    The first of these weighs nothing, the second everything.
    """
    n_states, n_tokens = automaton.transitions.shape
    n_values = high - low + 1
    nothing, everything = n_states * (n_values + 1), n_states * (n_values + 1) + 1
    device = automaton.transitions.device
    forbidden = automaton.rewards.detach() == -torch.inf
    earned = automaton.rewards.detach().masked_fill(forbidden, 0.0).to(torch.int64)
    column = torch.arange(1, n_values + 1, device=device)[None, :, None]
    missing = column - earned.unsqueeze(1)
    there = automaton.transitions.unsqueeze(1) * (n_values + 1)
    possible = (missing >= 1) & (missing <= n_values) & ~forbidden.unsqueeze(1)
    counts = torch.where(possible, there + missing, nothing)
    must_be_forbidden = torch.where(forbidden.unsqueeze(1), everything, there)
    absorbing = torch.tensor([nothing, everything], device=device)[:, None].expand(2, n_tokens)
    transitions = torch.cat([torch.cat([must_be_forbidden, counts], 1).flatten(0, 1), absorbing])

    ended = automaton.final.detach()
    values = torch.arange(low, high + 1, device=device, dtype=torch.float64)
    accepted = torch.cat([(ended == -torch.inf).unsqueeze(1), ended.unsqueeze(1) == values], 1).flatten()
    accepted = torch.cat([accepted, torch.tensor([False, True], device=device)])
    end = torch.zeros_like(accepted, dtype=torch.float64).masked_fill(~accepted, -torch.inf)
    edge = torch.zeros_like(transitions, dtype=torch.float64)
    return _Counting(transitions, end, edge, bool(forbidden.any() | (ended == -torch.inf).any()))


def reward_range(space: SequenceSpace, automaton: RewardAutomaton) -> tuple[int, int]:
    """The least and the largest that any completion may still earn, from any position and state on.

    Integer rewards of an automaton; (0, 0) where everything is forbidden. The states that :func:`reward_distribution`
    needs are those of the automaton times (largest - least + 2).

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> reward_range(SequenceSpace(2, 9), ones)
        (0, 9)
    """
    found = []
    for sign in (-1.0, 1.0):
        final, rewards = (
            (sign * value.detach()).masked_fill(value == -torch.inf, -torch.inf)
            for value in (automaton.final, automaton.rewards)
        )
        best, most = final, final.max()
        for _ in range(space.length):
            after = best[automaton.transitions]
            if space.eos is not None:
                after[:, space.eos] = final[automaton.transitions[:, space.eos]]
            best = (rewards + after).amax(1)
            most = torch.maximum(most, best.max())
        found.append(most.item())
    if found[0] == -torch.inf:
        return 0, 0
    return round(-found[0]), round(found[1])


def _require_integers(name: str, value: Tensor) -> None:
    """Integers, or -inf."""
    bad = (value > -torch.inf) & ((value != value.round()) | (value.abs() > LARGEST))
    message = f"automaton.{name} must hold integers, or -inf, for the distribution of the reward"
    checks.require_values([value], (bad, lambda: f"{message}; got {checks.first_bad(value, bad)}"))


def _require_one_support(first: RewardDistribution, second: RewardDistribution) -> None:
    if not torch.equal(first.values, second.values):
        raise ValueError(
            f"distributions must be over the same values; got {len(first.values)} from {first.values[0].item()} and "
            f"{len(second.values)} from {second.values[0].item()}"
        )
