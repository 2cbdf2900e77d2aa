"""Rewards as tables over a space, in float64: [N], or [X, N] where they differ between prompts.

Every function enumerates its space and raises ``ValueError`` where that exceeds the space's memory budget. What follows
the end of a completion counts nothing, unless the docstring says otherwise.
"""

import math

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from exo_toy import checks
from exo_toy.spaces import SequenceSpace, sum_over_trie

Table = Float64[Tensor, " N"] | Float64[Tensor, "X N"]


def planted_modes(
    space: SequenceSpace,
    modes: Int[Tensor, "M T"] | Int[Tensor, "X M T"],
    *,
    weights: Float[Tensor, " M"] | Float[Tensor, "X M"],
    widths: float | int | Float[Tensor, " M"] | Float[Tensor, "X M"],
) -> Table:
    r"""A reward with a peak at each of several completions.

    .. math::
        r(y) = \log \sum_m w_m \exp\big(-d(y, y_m) / \sigma_m\big)

    with d the Hamming distance between the completions as filled with the eos to length T.

    Args:
        space: N completions.
        modes: [M, T], or [X, M, T] for X prompts: completions of the space, as :meth:`SequenceSpace.tokens` has them.
        weights: [M] (or [X, M]) heights of the peaks before the logarithm, above 0.
        widths: distance over which a peak falls by a factor e, above 0; a number, or [M] (or [X, M]).

    Returns:
        [N], or [X, N] for modes of X prompts; finite.

    Raises:
        ValueError: modes that are not completions, a wrong shape, a weight or width that is not above 0 and finite.

    Example:
        >>> space = SequenceSpace(2, 2)
        >>> planted_modes(space, torch.tensor([[0, 0]]), weights=torch.ones(1), widths=0.5)
        tensor([ 0., -2., -2., -4.], dtype=torch.float64)
    """
    space.require_completions(modes, "modes")
    if modes.ndim not in (2, 3) or modes.numel() == 0:
        raise ValueError(
            f"modes must have shape [M, {space.length}] or [X, M, {space.length}]; got {list(modes.shape)}"
        )
    weights = _per_mode("weights", weights, modes)
    if not isinstance(widths, Tensor):
        checks.require_positive(widths=widths)
        widths = torch.full_like(weights, widths)
    widths = _per_mode("widths", widths, modes)
    space.require_enumerable(bytes_per_completion=8 * weights.numel(), what="planted_modes")

    # [modes, T, V] mismatches; an eos stands for every position that it fills.
    mismatch = (modes.reshape(-1, space.length, 1) != torch.arange(space.vocab_size, device=modes.device)).double()
    if space.eos is not None:
        mismatch[..., space.eos] = mismatch[..., space.eos].flip(-1).cumsum(-1).flip(-1)
    distances = sum_over_trie(space, _position_tables(mismatch), order=0).unflatten(0, weights.shape)
    return (weights.log().unsqueeze(-1) - distances / widths.unsqueeze(-1)).logsumexp(-2)


def parity(
    space: SequenceSpace,
    *,
    bonus: float | int | Float[Tensor, " X"],
    counted: Bool[Tensor, " V"] | Bool[Tensor, "X V"] | None = None,
) -> Table:
    r"""A bonus for completions in which the counted tokens occur an even number of times.

    .. math::
        r(y) = b \cdot \mathbb{1}\big[\, |\{t < |y| : y_t \in S\}| \text{ is even} \,\big]

    No proper subset of the tokens settles it, yet one bit of memory is enough to follow it.

    Args:
        space: N completions.
        bonus: b, finite; [X] for X prompts.
        counted: [V] (or [X, V]) True for the tokens in S; None for those of odd number except the eos, so that without
            an eos the tokens' sum has to be even.

    Returns:
        [N], or [X, N] where an argument has X prompts: 0 or the bonus.

    Raises:
        ValueError: a wrong shape or dtype, a bonus that is not finite, prompts that differ in number.

    Example:
        >>> parity(SequenceSpace(2, 2), bonus=1.0)
        tensor([1., 0., 0., 1.], dtype=torch.float64)
    """
    bonus = _as_bonus(bonus)
    if counted is None:
        counted = torch.arange(space.vocab_size, device=bonus.device) % 2 == 1
        if space.eos is not None:
            counted[space.eos] = False
    checks.require_mask(counted=counted)
    if counted.ndim not in (1, 2) or counted.shape[-1] != space.vocab_size:
        raise ValueError(
            f"counted must have shape [{space.vocab_size}] or [X, {space.vocab_size}]; got {list(counted.shape)}"
        )
    if counted.ndim == 2 and bonus.ndim == 1 and len(counted) != len(bonus):
        raise ValueError(f"counted must have as many prompts as bonus, {len(bonus)}; got {len(counted)}")
    space.require_enumerable(bytes_per_completion=8 * math.prod(counted.shape[:-1]), what="parity")
    per_position = counted.to(torch.int64).reshape(-1, 1, space.vocab_size).expand(-1, space.length, -1)
    count = sum_over_trie(space, _position_tables(per_position), order=0).reshape(*counted.shape[:-1], -1)
    return _where(count % 2 == 0, bonus)


def palindrome(space: SequenceSpace, *, bonus: float | int | Float[Tensor, " X"]) -> Table:
    r"""A bonus for completions whose tokens before the eos read the same from either end.

    .. math::
        r(y) = b \cdot \mathbb{1}\big[\, y_i = y_{n-1-i} \text{ for all } i < n \,\big]

    with n the number of tokens but the eos. To follow it, a machine has to remember the whole first half.

    Args:
        space: N completions.
        bonus: b, finite; [X] for X prompts.

    Returns:
        [N], or [X, N] for a bonus [X]: 0 or the bonus.

    Raises:
        ValueError: a bonus that is not finite, or of a wrong shape.

    Example:
        >>> palindrome(SequenceSpace(2, 2), bonus=1.0)
        tensor([1., 0., 0., 1.], dtype=torch.float64)
    """
    bonus = _as_bonus(bonus)
    tokens = space.tokens()
    body = (tokens != space.eos).sum(-1, keepdim=True) if space.eos is not None else space.length
    position = torch.arange(space.length)
    mirror = (body - 1 - position).clamp(min=0).expand_as(tokens)
    same = (tokens == tokens.gather(-1, mirror)) | (position >= body)
    return _where(same.all(-1).to(bonus.device), bonus)


def additive(space: SequenceSpace, token_rewards: Float[Tensor, "T V"] | Float[Tensor, "X T V"]) -> Table:
    r"""The sum of a reward for each token at its position.

    .. math::
        r(y) = \sum_{t < |y|} \rho_t(y_t)

    The eos that ends a completion counts, its fill does not. Under a reference whose tokens are independent the
    optimal policy is one whose tokens are independent.

    Args:
        space: N completions.
        token_rewards: [T, V], or [X, T, V] for X prompts: finite, or -inf for a forbidden token.

    Returns:
        [N], or [X, N]; differentiable in ``token_rewards``.

    Raises:
        ValueError: a wrong shape or dtype, NaN or +inf.

    Example:
        >>> additive(SequenceSpace(2, 2), torch.tensor([[0.0, 10.0], [0.0, 1.0]]))
        tensor([ 0.,  1., 10., 11.], dtype=torch.float64)
    """
    checks.require_floating(token_rewards=token_rewards)
    if token_rewards.ndim not in (2, 3) or token_rewards.shape[-2:] != (space.length, space.vocab_size):
        wanted = f"{space.length}, {space.vocab_size}]"
        raise ValueError(f"token_rewards must have shape [{wanted} or [X, {wanted}; got {list(token_rewards.shape)}")
    values = token_rewards.detach()
    bad = ~(values < torch.inf)
    checks.require_values(
        [values], (bad, lambda: f"token_rewards must be finite or -inf; got {checks.first_bad(values, bad)}")
    )
    per_position = token_rewards.double().reshape(-1, space.length, space.vocab_size)
    reward = sum_over_trie(space, _position_tables(per_position), order=0)
    return reward if token_rewards.ndim == 3 else reward.squeeze(0)


def random(
    space: SequenceSpace, *, scale: float | int, generator: torch.Generator, n_prompts: int | None = None
) -> Table:
    r"""Independent normal rewards: nothing about one completion tells anything about another.

    .. math::
        r(y) \sim \mathcal{N}(0, \mathrm{scale}^2)

    Args:
        space: N completions.
        scale: standard deviation, above 0.
        generator: where the randomness comes from; its device is the table's.
        n_prompts: X; None for a single table [N].

    Returns:
        [N], or [X, N]; finite.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> random(SequenceSpace(2, 2), scale=1.0, generator=torch.Generator().manual_seed(0), n_prompts=3).shape
        torch.Size([3, 4])
    """
    checks.require_positive(scale=scale)
    if n_prompts is not None:
        checks.require_integer("n_prompts", n_prompts, at_least=1)
    space.require_enumerable(bytes_per_completion=8 * (n_prompts or 1), what="random")
    shape = (space.size,) if n_prompts is None else (n_prompts, space.size)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)


def _position_tables(per_position: Tensor) -> list[Tensor]:
    """[X, T, V] as T tables of order 0, [X, 1, V]."""
    return list(per_position.unsqueeze(2).unbind(1))


def _per_mode(name: str, values: Tensor, modes: Tensor) -> Tensor:
    """Positive values [M], or [X, M], one for each of the modes; shared by the prompts where they have none."""
    checks.require_floating(**{name: values})
    if values.shape not in (modes.shape[:-1], modes.shape[-2:-1]):
        raise ValueError(
            f"{name} must have the shape of modes without T, {list(modes.shape[:-1])}, or [M]; got {list(values.shape)}"
        )
    bad = ~((values > 0) & (values < torch.inf))
    checks.require_values(
        [values], (bad, lambda: f"{name} must be above 0 and finite; got {checks.first_bad(values, bad)}")
    )
    return values.double().expand(modes.shape[:-1])


def _as_bonus(bonus: float | int | Tensor) -> Tensor:
    """A finite bonus as a tensor [] or [X]."""
    if not isinstance(bonus, Tensor):
        checks.require_real("bonus", bonus, allowed="a finite number", low=-math.inf, high=math.inf)
        return torch.tensor(bonus, dtype=torch.float64)
    checks.require_floating(bonus=bonus)
    checks.require_shape("X", bonus=bonus)
    bad = ~bonus.detach().isfinite()
    checks.require_values([bonus], (bad, lambda: f"bonus must be finite; got {checks.first_bad(bonus, bad)}"))
    return bonus.double()


def _where(holds: Tensor, bonus: Tensor) -> Tensor:
    """The bonus where the condition [N] or [X, N] holds, else 0."""
    return torch.where(holds, bonus.unsqueeze(-1) if bonus.ndim == 1 else bonus, 0.0)


class KGramReward(nn.Module):
    r"""A reward that adds up one number for every token, which depends on the k tokens before it.

    .. math::
        r_w(x, y) = \sum_{t < |y|} w_{x,t}(y_{t-k}, \dots, y_{t-1};\, y_t)

    Its parameters are what a reward model learns. At order T - 1 it can express every reward over the space.

    Args:
        space: the completions.
        order: k, in 0..T-1.
        n_prompts: X, at least 1; every prompt has tables of its own.

    Attributes:
        weights: T parameters [X, A**min(t, k), V], zero at first; contexts as in :class:`exo_toy.policies.KGramPolicy`.

    Raises:
        ValueError: an argument out of range; tables that exceed the space's memory budget.

    Example:
        >>> KGramReward(SequenceSpace(2, 2), 0).table().detach()
        tensor([[0., 0., 0., 0.]], dtype=torch.float64)
    """

    def __init__(self, space: SequenceSpace, order: int, *, n_prompts: int = 1) -> None:
        super().__init__()
        checks.require_integer("n_prompts", n_prompts, at_least=1)
        space.require_order(order)
        self.space, self.order = space, order
        shapes = [(n_prompts, space.n_contexts(t, order=order), space.vocab_size) for t in range(space.length)]
        space.require_memory(8 * sum(map(math.prod, shapes)), what=f"the tables of KGramReward of order {order}")
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes)

    def table(self) -> Float64[Tensor, "X N"]:
        """The reward of every completion."""
        return sum_over_trie(self.space, list(self.weights), order=self.order)

    def reward(self, tokens: Int[Tensor, "X M T"]) -> Float64[Tensor, "X M"]:
        """The reward of given completions of every prompt; enumerates nothing."""
        self.space.require_completions(tokens)
        n_prompts = len(self.weights[0])
        if tokens.ndim != 3 or len(tokens) != n_prompts:
            wanted = f"[{n_prompts}, M, {self.space.length}]"
            raise ValueError(f"tokens must have shape {wanted}; got {list(tokens.shape)}")
        tokens = tokens.to(torch.int64)
        prompts = torch.arange(n_prompts).unsqueeze(-1)
        contexts = self.space.contexts(tokens, order=self.order)
        terms = [
            weights[prompts, context, token]
            for weights, context, token in zip(self.weights, contexts.unbind(-1), tokens.unbind(-1), strict=True)
        ]
        return torch.where(self.space.counted(tokens), torch.stack(terms, -1), 0.0).sum(-1)
