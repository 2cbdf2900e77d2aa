"""Proximal policy optimisation: fresh samples at every step, a clipped ratio, a value baseline, KL in the reward."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from exo_toy import checks
from exo_toy.policies.autoregressive import AutoregressivePolicy
from exo_toy.spaces import SequenceSpace
from exo_toy.training.descent import Descent, look_up


def ppo_loss(
    logps: Float[Tensor, "*B T"],
    old_logps: Float[Tensor, "*B T"],
    advantages: Float[Tensor, "*B T"],
    mask: Bool[Tensor, "*B T"],
    *,
    clip: float | int,
) -> Float[Tensor, "*B"]:
    r"""PPO's clipped surrogate, summed over the tokens of each completion.

    .. math::
        -\sum_t \min\big(\rho_t A_t,\; \mathrm{clip}(\rho_t, 1 - c, 1 + c)\, A_t\big), \quad
        \rho_t = \frac{\pi_\theta(y_t \mid x, y_{<t})}{\pi_{old}(y_t \mid x, y_{<t})}

    At :math:`\theta = \theta_{old}` with the advantages of :func:`rewards_to_go` less any function of the prefix, its
    gradient expected over :math:`y \sim \pi_{old}` is :math:`-\nabla J_\beta`.

    Source: Schulman et al., arXiv:1707.06347, Eq. 7.

    Args:
        logps: [..., T] log-probabilities of the tokens, in nats.
        old_logps: [..., T] the same under the policy that drew them; no gradient goes there.
        advantages: [..., T]; no gradient goes there.
        mask: [..., T], True for the tokens that count.
        clip: c, above 0.

    Returns:
        [...] losses.

    Raises:
        ValueError: ``clip`` out of range.

    Example:
        >>> z = torch.zeros(1, 2)
        >>> ppo_loss(z, z, torch.ones(1, 2), torch.tensor([[True, False]]), clip=0.2)
        tensor([-1.])
    """
    checks.require_positive(clip=clip)
    ratio = (logps - old_logps.detach()).masked_fill(~mask, 0.0).exp()
    advantages = advantages.detach().masked_fill(~mask, 0.0)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).sum(-1)


def rewards_to_go(
    logps: Float[Tensor, "*B T"],
    ref_logps: Float[Tensor, "*B T"],
    reward: Float[Tensor, "*B"],
    *,
    beta: float | int,
) -> Float[Tensor, "*B T"]:
    r"""What is still to come at each token, with the KL penalty inside the reward.

    .. math::
        G_t = r(x, y) - \beta \sum_{s \ge t} \log \frac{\pi(y_s \mid x, y_{<s})}{\pi_{ref}(y_s \mid x, y_{<s})}

    Source: Stiennon et al., arXiv:2009.01325, with the penalty of each token paid where it is incurred.

    Args:
        logps: [..., T] of the tokens, 0 after the end.
        ref_logps: [..., T] the same under the reference.
        reward: [...] of the completions.
        beta: strength of the penalty, above 0.

    Returns:
        [..., T]; after the end the reward, which nothing should use.
    """
    checks.require_positive(beta=beta)
    penalty = beta * (logps - ref_logps)
    return reward.unsqueeze(-1) - penalty.flip(-1).cumsum(-1).flip(-1)


class ValueTable(nn.Module):
    """V(x, y_{<t}): a number [X, contexts] for every position and the k tokens before it."""

    def __init__(self, space: SequenceSpace, order: int, *, n_prompts: int) -> None:
        super().__init__()
        space.require_order(order)
        self.space, self.order = space, order
        shapes = [(n_prompts, space.n_contexts(t, order=order)) for t in range(space.length)]
        self.values = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes)

    def forward(self, tokens: Int[Tensor, "X M T"]) -> Float64[Tensor, "X M T"]:
        """What is expected to come from each token on, given those before it."""
        contexts = self.space.contexts(tokens, order=self.order)
        columns = [values.gather(-1, at) for values, at in zip(self.values, contexts.unbind(-1), strict=True)]
        return torch.stack(columns, -1)


def ppo(
    policy: AutoregressivePolicy,
    ref: AutoregressivePolicy,
    reward: Float[Tensor, "X N"],
    *,
    beta: float | int,
    batch_size: int,
    steps: int,
    epochs: int,
    learning_rate: float,
    value_order: int,
    value_learning_rate: float,
    generator: torch.Generator,
    clip: float | int = 0.2,
) -> Iterator[float]:
    r"""Maximise :math:`J_\beta` by proximal policy optimisation.

    Every step draws completions from the policy as it stands, takes advantages G_t - V(x, y_{<t}), and descends
    :func:`ppo_loss` for some epochs. V is a table over the last ``value_order`` tokens, fitted to the same G_t.

    Source: Schulman et al., arXiv:1707.06347, without the bonus on the entropy and with rewards to go for returns
    (λ = γ = 1), which leave the gradient unbiased.

    Args:
        policy: trained in place.
        ref: the reference.
        reward: [X, N].
        beta: strength of the KL penalty, above 0.
        batch_size: completions per prompt and step.
        steps: number of steps, at least 1.
        epochs: descents per step, at least 1.
        learning_rate: of Adam, at the start; it falls to zero along a cosine.
        value_order: k of the value table, in 0..T-1.
        value_learning_rate: of its Adam.
        generator: of the completions.
        clip: c of :func:`ppo_loss`.

    Yields:
        After each step, minus the mean over its completions of r - beta log(pi / pi_ref): an estimate of -J.

    Raises:
        ValueError: an argument out of range; at the first step, not at the call.
    """
    for name, number in {"batch_size": batch_size, "steps": steps, "epochs": epochs}.items():
        checks.require_integer(name, number, at_least=1)
    checks.require_positive(learning_rate=learning_rate, value_learning_rate=value_learning_rate)
    value = ValueTable(policy.space, value_order, n_prompts=policy.n_prompts)
    descent = Descent(policy.parameters(), steps * epochs, learning_rate)
    value_descent = Descent(value.parameters(), steps * epochs, value_learning_rate)
    for _ in range(steps):
        tokens = policy.sample(batch_size, generator)
        mask = policy.space.counted(tokens)
        with torch.no_grad():
            old_logps = policy.token_log_probs(tokens)
            of_tokens = look_up(reward, policy.space.index(tokens))
            to_go = rewards_to_go(old_logps, ref.token_log_probs(tokens), of_tokens, beta=beta)
            advantages = to_go - value(tokens)
        for _ in range(epochs):
            descent.step(ppo_loss(policy.token_log_probs(tokens), old_logps, advantages, mask, clip=clip).mean())
            value_descent.step(((value(tokens) - to_go).square() * mask).sum(-1).mean())
        yield -to_go[..., 0].mean().item()
