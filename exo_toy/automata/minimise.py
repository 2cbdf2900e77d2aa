"""The fewest states that compute a reward, and whether two automata compute the same one.

Two states may be one if what a string earns from them differs by a constant at most, whatever the string: the constant
can be earned earlier. *Pushing* earns everything as early as possible, after which such states look alike, and
partition refinement finds them.

Source: Mohri, "Minimization algorithms for sequential transducers", Theoretical Computer Science 234, 2000, in the
additive group of the reals with -inf, where what a state can still earn is measured by one string instead of the best.
"""

import math

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from exo_toy import checks
from exo_toy.automata.automaton import RewardAutomaton, reached

TOLERANCE = 1e-12


def minimise(automaton: RewardAutomaton, *, push: bool = True, tolerance: float | int = TOLERANCE) -> RewardAutomaton:
    r"""The automaton of fewest states with the reward of every string unchanged.

    With pushing, each state s is given a potential d(s), the reward from s of the first string (shortest, then smallest
    tokens) that s does not forbid, and

    .. math::
        \rho'(s, a) = \rho(s, a) + d(\delta(s, a)) - d(s), \qquad \phi'(s) = \phi(s) - d(s) + d(s_0)

    States are then one where they forbid the same strings and earn the same by every other. What can only end in -inf
    is forbidden at its first token; a forbidden transition leads to the start.

    Args:
        automaton: S states, no gradient: which states are one depends on the values.
        push: False leaves rewards where they stand and joins only the states that agree as they are.
        tolerance: rewards are the same where, in order of size, each is within this of the next, in units of the
            largest finite reward or potential. With 0, only rewards whose sums are exact (integers, halves) are safe.

    Returns:
        States numbered breadth first in token order from the start, 0: automata of one reward become the same one, up
        to the tolerance.

    Raises:
        ValueError: rewards that require grad, a negative tolerance.

    Example:
        >>> rewards = torch.tensor([[2.0], [0.0]]).double()
        >>> two = RewardAutomaton(torch.tensor([[1], [0]]), rewards, torch.tensor([0.0, -1.0]).double())
        >>> one = minimise(two)
        >>> one.n_states, one.rewards.tolist()
        (1, [[1.0]])
    """
    checks.require_real("tolerance", tolerance, allowed="a finite number of at least 0", low=0.0, high=math.inf,
                        low_allowed=True)  # fmt: skip
    if automaton.rewards.requires_grad or automaton.final.requires_grad:
        raise ValueError("automaton must not require grad to be minimised (which states merge depends on the values)")
    step = tolerance * _scale(automaton)
    if push:
        automaton = pushed(automaton)
    block = _blocks(automaton, step)
    # The first state of each block speaks for it.
    place = torch.arange(automaton.n_states, device=block.device)
    member = torch.full_like(place[: int(block.max()) + 1], automaton.n_states)
    member = member.scatter_reduce(0, block, place, "amin")
    joined = RewardAutomaton(
        block[automaton.transitions[member]], automaton.rewards[member], automaton.final[member],
        int(block[automaton.start]),
    )  # fmt: skip
    return joined.trim()


def equivalent(a: RewardAutomaton, b: RewardAutomaton, *, tolerance: float | int = TOLERANCE) -> bool:
    """Whether two automata give the same reward to every string, wherever they place it.

    Args:
        a: an automaton over V tokens.
        b: another over the same.
        tolerance: as for :func:`minimise`.

    Raises:
        ValueError: two vocabularies, or as for :func:`minimise`.

    Example:
        >>> early = RewardAutomaton(torch.tensor([[0]]), torch.tensor([[1.0]]).double(), torch.zeros(1).double())
        >>> equivalent(early, early + early), equivalent(early + early, 2 * early)
        (False, True)
    """
    if a.vocab_size != b.vocab_size:
        raise ValueError(f"automata must have one vocabulary to be compared; got {a.vocab_size} and {b.vocab_size}")
    first, second = minimise(a, tolerance=tolerance), minimise(b, tolerance=tolerance)
    if not torch.equal(first.transitions, second.transitions):
        return False
    step = tolerance * max(_scale(a), _scale(b))
    pairs = ((first.rewards, second.rewards), (first.final, second.final))
    return all(torch.allclose(x, y, rtol=0.0, atol=step) for x, y in pairs)


def pushed(automaton: RewardAutomaton) -> RewardAutomaton:
    """The same reward earned as early as it can be, on the start and the states that some allowed string passes.

    The formula stands at :func:`minimise`. Differentiable in the rewards.
    """
    transitions, rewards, final, start = automaton.transitions, automaton.rewards, automaton.final, automaton.start
    potential, alive = _potentials(automaton)
    allowed = (rewards > -math.inf) & alive[transitions]
    order = reached(transitions, allowed, start)
    number = torch.zeros_like(transitions[:, 0])
    number[order] = torch.arange(len(order), device=order.device)
    gained = rewards + potential[transitions] - potential.unsqueeze(-1)
    return RewardAutomaton(
        torch.where(allowed, number[transitions], 0)[order],
        torch.where(allowed, gained, -math.inf)[order],
        (final - potential + potential[start])[order],
    )


def _potentials(automaton: RewardAutomaton) -> tuple[Float64[Tensor, " S"], Bool[Tensor, " S"]]:
    """What the first allowed string earns from each state (0 where all are forbidden), and where there is one."""
    transitions, rewards = automaton.transitions, automaton.rewards
    alive = automaton.final > -math.inf
    potential = torch.where(alive, automaton.final, 0.0)
    while True:
        # Of strings one token longer than all before: the first token after which one of those will do.
        usable = (rewards > -math.inf) & alive[transitions] & ~alive.unsqueeze(-1)
        new = usable.any(-1)
        if not new.any():
            return potential, alive
        token = usable.to(torch.uint8).argmax(-1, keepdim=True)
        onward = rewards.gather(1, token) + potential[transitions.gather(1, token)]
        potential = torch.where(new, onward.squeeze(-1), potential)
        alive = alive | new


def _blocks(automaton: RewardAutomaton, step: float) -> Int64[Tensor, " S"]:
    """The coarsest partition of states that have equal rewards and whose successors stand in equal blocks."""
    earned = _classes(automaton.rewards, step)
    # Tokens that do the same in every state are one.
    columns = torch.cat([automaton.transitions, earned]).unique(dim=1)
    transitions, earned = columns.split(automaton.n_states)
    block = _classes(automaton.final, step)
    n_blocks = 0
    while int(block.max()) >= n_blocks:
        n_blocks = int(block.max()) + 1
        behaviour = torch.cat([block.unsqueeze(-1), earned, block[transitions]], -1)
        _, block = behaviour.unique(dim=0, return_inverse=True)
    return block


def _classes(values: Float64[Tensor, "*shape"], step: float) -> Int64[Tensor, "*shape"]:
    """Integers, the same where sorted values follow each other within the step, or both are -inf."""
    ordered, place = values.flatten().sort()
    # The difference of two -inf is NaN, which is no step.
    apart = ordered.diff() > step
    classes = torch.zeros_like(place)
    classes[place[1:]] = apart.cumsum(0)
    return classes.reshape(values.shape)


def _scale(automaton: RewardAutomaton) -> float:
    """The largest finite reward or potential in absolute value."""
    potential, _ = _potentials(automaton)
    values = torch.cat([automaton.rewards.flatten(), automaton.final, potential])
    return values.masked_fill(values == -math.inf, 0.0).abs().max().item()
