"""Alignment from samples: fine-tuning, candidates, labels, a reward model, and losses over K candidates.

Samples are indices of completions of an enumerable space, so that every log-probability and reward of them is a look-up
in a table [X, N] or, of the policy in training, its :meth:`log_prob`.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.nn.functional import logsigmoid

from exo_toy import checks
from exo_toy.policies import Policy, SequencePolicy
from exo_toy.rewards import KGramReward
from exo_toy.spaces import SequenceSpace
from exo_toy.training.descent import Descent, Draws, look_up, shuffled_batches

# Loss of B groups of K candidates, from log pi, log pi_ref and rewards, each [B, K], to [B].
GroupLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def draw_candidates(
    log_p: Float[Tensor, "X N"], groups: int, k: int, generator: torch.Generator
) -> Int64[Tensor, "X G K"]:
    """Independent completions of every prompt, in groups of K.

    Args:
        log_p: [X, N] normalised log-probabilities.
        groups: G, at least 1.
        k: K, at least 1.
        generator: where the randomness comes from.

    Returns:
        [X, G, K] indices; never one of probability zero.

    Raises:
        ValueError: ``groups`` or ``k`` below 1; a table that is not [X, N] or not normalised.

    Example:
        >>> draw_candidates(torch.tensor([[0.0, -torch.inf]]), 1, 3, torch.Generator())
        tensor([[[0, 0, 0]]])
    """
    checks.require_integer("groups", groups, at_least=1)
    checks.require_integer("k", k, at_least=1)
    return Draws(log_p)(groups * k, generator).unflatten(-1, (groups, k))


def label_pairs(
    pairs: Int[Tensor, "X P 2"], reward: Float[Tensor, "X N"], generator: torch.Generator | None
) -> Int64[Tensor, "X P 2"]:
    r"""Pairs as a labeller with this reward orders them, the chosen completion first.

    With a generator each label is a Bradley-Terry draw, :math:`P(y \succ y') = \sigma(r(y) - r(y'))`; without one the
    higher reward is chosen, and equal rewards keep their order.

    Args:
        pairs: [X, P, 2] indices of completions.
        reward: [X, N] finite rewards.
        generator: of the labels; None for hard labels.

    Returns:
        [X, P, 2] indices.

    Raises:
        ValueError: a reward of a pair that is not finite.

    Example:
        >>> label_pairs(torch.tensor([[[0, 1]]]), torch.tensor([[0.0, 1.0]]), None)
        tensor([[[1, 0]]])
    """
    of_pair = look_up(reward, pairs)
    bad = ~of_pair.isfinite()
    checks.require_values([of_pair], (bad, lambda: f"reward must be finite; got {checks.first_bad(of_pair, bad)}"))
    margin = of_pair[..., 0] - of_pair[..., 1]
    if generator is None:
        swapped = margin < 0
    else:
        swapped = torch.rand(margin.shape, generator=generator, dtype=margin.dtype) >= margin.sigmoid()
    return torch.where(swapped.unsqueeze(-1), pairs.flip(-1), pairs)


def fit_reward(
    space: SequenceSpace, pairs: Int[Tensor, "X P 2"], *, order: int, ridge: float | int, max_iterations: int = 500
) -> KGramReward:
    r"""A k-gram reward fitted to labelled pairs by maximum likelihood under the Bradley-Terry model.

    .. math::
        \min_w \; -\frac{1}{P} \sum_{x, (y_w, y_l)} \log \sigma\big(r_w(x, y_w) - r_w(x, y_l)\big)
        + \frac{\lambda}{2} \|w\|^2

    A convex problem with one minimum, found by L-BFGS; the ridge makes it finite where the labels are separable.

    Source: Bradley and Terry, 1952, as in Ji et al., arXiv:2402.00856v4, Eq. 2.

    Args:
        space: the completions.
        pairs: [X, P, 2] indices, the chosen completion first.
        order: k of the reward, in 0..T-1.
        ridge: λ, above 0.
        max_iterations: of L-BFGS.

    Returns:
        The reward, with tables of its own for each prompt.

    Raises:
        ValueError: an order or ridge out of range.

    Example:
        >>> space, pairs = SequenceSpace(2, 1), torch.tensor([[[1, 0]]])
        >>> reward = fit_reward(space, pairs, order=0, ridge=0.1).table()[0]
        >>> bool(reward[1] > reward[0])
        True
    """
    checks.require_positive(ridge=ridge)
    model = KGramReward(space, order, n_prompts=len(pairs))
    tokens = space.tokens(pairs.flatten(1))
    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=max_iterations, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=1e-9, tolerance_change=1e-14,
    )  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        reward = model.reward(tokens).unflatten(-1, (-1, 2))
        likelihood = logsigmoid(reward[..., 0] - reward[..., 1]).mean(-1).sum()
        value = ridge / 2 * sum((p.square().sum() for p in parameters), torch.zeros(())) - likelihood
        value.backward()
        return value.item()

    optimizer.step(closure)
    return model.requires_grad_(False)


def fine_tune(
    policy: SequencePolicy,
    log_data: Float[Tensor, "X N"],
    *,
    batch_size: int,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
) -> Iterator[float]:
    r"""Supervised fine-tuning on fresh completions of every prompt: maximum likelihood by Adam.

    .. math:: \min_\theta \; -E_{x,\, y \sim p(\cdot \mid x)} \log \pi_\theta(y \mid x)

    Args:
        policy: as in :mod:`exo_toy.policies`, trained in place.
        log_data: [X, N] log-probabilities p of the data.
        batch_size: completions per prompt and step.
        steps: number of steps, at least 1.
        learning_rate: at the start; it falls to zero along a cosine.
        generator: of the data.

    Yields:
        After each step, the loss that it descended, in nats.

    Raises:
        ValueError: no step, an empty batch; at the first step, not at the call.
    """
    checks.require_integer("batch_size", batch_size, at_least=1)
    draws, descent = Draws(log_data), Descent(policy.parameters(), steps, learning_rate)
    for _ in range(steps):
        tokens = policy.space.tokens(draws(batch_size, generator))
        yield descent.step(-policy.log_prob(tokens).mean())


def align(
    policy: SequencePolicy,
    groups: Int[Tensor, "X G K"],
    log_ref: Float[Tensor, "X N"],
    reward: Float[Tensor, "X N"],
    loss: GroupLoss,
    *,
    batch_size: int,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
) -> Iterator[float]:
    r"""Train a policy on a fixed data set of groups of K candidates, in shuffled passes, with Adam.

    Args:
        policy: as in :mod:`exo_toy.policies`, trained in place.
        groups: [X, G, K] indices of completions; for a loss on pairs the chosen one first.
        log_ref: [X, N] normalised log-probabilities of the reference.
        reward: [X, N].
        loss: of ``log_pi``, ``log_ref`` and ``rewards``, each [B, K], to [B]; for example
            ``lambda log_pi, log_ref, r: exo_rw_loss(log_pi - log_ref, r, beta_pi=0.5, beta_r=0.5)``.
        batch_size: groups per prompt and step, at most G.
        steps: number of steps, at least 1.
        learning_rate: at the start; it falls to zero along a cosine.
        generator: of the order of the groups.

    Yields:
        After each step, the loss that it descended.

    Raises:
        ValueError: no step, a batch that is empty or larger than the data, a loss that is not finite or not one per
            group; at a step, not at the call.
    """
    n_groups = groups.shape[1]
    checks.require_integer("batch_size", batch_size, at_least=1)
    if batch_size > n_groups:
        raise ValueError(f"batch_size must be at most the {n_groups} groups of a prompt; got {batch_size}")
    tokens = policy.space.tokens(groups)
    ref, rewards = (look_up(table, groups) for table in (log_ref, reward))
    descent = Descent(policy.parameters(), steps, learning_rate)
    for batch in itertools.islice(shuffled_batches(n_groups, batch_size, generator), steps):
        log_pi = policy.log_prob(tokens[:, batch].flatten(1, 2)).reshape(-1, groups.shape[-1])
        losses = loss(log_pi, ref[:, batch].flatten(0, 1), rewards[:, batch].flatten(0, 1))
        if losses.shape != log_pi.shape[:1]:
            raise ValueError(f"loss must give one value per group, [{len(log_pi)}]; got shape {list(losses.shape)}")
        yield descent.step(losses.mean())


def train(
    policy: Policy,
    log_ref: Float[Tensor, "X N"],
    reward: Float[Tensor, "X N"],
    loss: Callable[..., Tensor],
    *,
    k: int,
    beta_pi: float,
    beta_r: float,
    batch_size: int,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
) -> Iterator[float]:
    r"""Train a policy on K candidates sampled from the reference, with Adam and a learning rate that falls to zero.

    Each step draws ``batch_size`` groups of K candidates for every prompt and descends the mean of
    ``loss(log_ratio [B, K], rewards [B, K], beta_pi=, beta_r=)``.

    Source: the training of Ji et al., arXiv:2402.00856v4; Adam is Kingma and Ba, arXiv:1412.6980.

    Args:
        policy: as in :mod:`exo_toy.policies`, trained in place.
        log_ref: [X, N] normalised log-probabilities of the reference.
        reward: [X, N].
        loss: :func:`exo_toy.losses.exo_rw_loss`, :func:`exo_toy.losses.dpo_rw_loss` or one with their signature.
        k: number of candidates, at least 2.
        beta_pi: policy temperature.
        beta_r: reward temperature.
        batch_size: groups of candidates per prompt and step.
        steps: number of steps, at least 1.
        learning_rate: at the start; it falls to zero along a cosine.
        generator: of the candidates.

    Yields:
        After each step, the loss that it descended.

    Raises:
        ValueError: k below 2, no step, an empty batch, or what the loss refuses; at the first step, not at the call.

    Example:
        >>> from exo_toy import losses, policies, spaces
        >>> policy = policies.TabularPolicy(spaces.SequenceSpace(2, 1))
        >>> log_ref, reward = policy.log_probs().detach(), torch.tensor([[0.0, 1.0]]).double()
        >>> settings = dict(k=4, beta_pi=1.0, beta_r=1.0, batch_size=8, steps=3, learning_rate=0.1)
        >>> len(list(train(policy, log_ref, reward, losses.exo_rw_loss, generator=torch.Generator(), **settings)))
        3
    """
    checks.require_integer("k", k, at_least=2)
    checks.require_integer("batch_size", batch_size, at_least=1)
    draws, descent = Draws(log_ref), Descent(policy.parameters(), steps, learning_rate)
    for _ in range(steps):
        index = draws(batch_size * k, generator)
        log_ratio = (policy.log_probs() - log_ref).gather(-1, index).reshape(-1, k)
        losses = loss(log_ratio, reward.gather(-1, index).reshape(-1, k), beta_pi=beta_pi, beta_r=beta_r)
        yield descent.step(losses.mean())
