"""What labels of pairs of completions target: exact expected losses, and the optimum of a pair in closed form.

Every pair and both labels count; nothing is sampled. A labeller is its table P, the probability that it prefers y to
y'; one label is drawn for a pair.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from exo_toy import checks
from exo_toy.logspace import expectation

# Loss of B pairs from log pi of the chosen and the rejected completion and log pi_ref of both, [B] each, to [B].
PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def bradley_terry(reward: Float[Tensor, "*X N"]) -> Float64[Tensor, "*X N N"]:
    r"""Probability :math:`\sigma(r(y) - r(y'))` that y is preferred to y'.

    Source: Bradley and Terry, 1952.

    Args:
        reward: [..., N], finite.

    Returns:
        [..., N, N] float64, y along the last dimension but one; P + P^T = 1.

    Raises:
        ValueError: a reward that is not finite.

    Example:
        >>> bradley_terry(torch.tensor([0.0, 0.0]))
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    (reward,) = checks.as_tables(reward=reward)
    bad = ~reward.isfinite()
    checks.require_values([reward], (bad, lambda: f"reward must be finite; got {checks.first_bad(reward, bad)}"))
    return (reward.unsqueeze(-1) - reward.unsqueeze(-2)).sigmoid()


def hard_labels(reward: Float[Tensor, "*X N"]) -> Float64[Tensor, "*X N N"]:
    """Labels that always go to the higher reward: 1, 0, and 1/2 between equal rewards.

    Args:
        reward: [..., N], finite.

    Returns:
        [..., N, N] float64, y along the last dimension but one; P + P^T = 1.

    Raises:
        ValueError: a reward that is not finite.

    Example:
        >>> hard_labels(torch.tensor([0.0, 1.0]))
        tensor([[0.5000, 0.0000],
                [1.0000, 0.5000]], dtype=torch.float64)
    """
    preference = bradley_terry(reward)
    # By the rewards themselves: sigmoid rounds a tiny difference to one half.
    difference = reward.double().unsqueeze(-1) - reward.double().unsqueeze(-2)
    return torch.where(difference == 0, preference, (difference > 0).double())


def noisy_labels(preference: Float[Tensor, "..."], *, flip: float | int) -> Float64[Tensor, "..."]:
    r"""Preferences of a labeller whose labels are turned over now and then: :math:`(1 - \eta) P + \eta (1 - P)`.

    Args:
        preference: probabilities in [0, 1], any shape.
        flip: eta in [0, 1/2), the probability that a label is turned over.

    Returns:
        The same shape, in [eta, 1 - eta], float64.

    Raises:
        ValueError: a probability outside [0, 1], ``flip`` out of range.

    Example:
        >>> noisy_labels(torch.tensor([0.0, 0.5, 1.0]), flip=0.1)
        tensor([0.1000, 0.5000, 0.9000], dtype=torch.float64)
    """
    checks.require_real("flip", flip, allowed="in [0, 1/2)", low=0.0, high=0.5, low_allowed=True)
    preference = _as_probabilities(preference)
    return preference + flip * (1 - 2 * preference)


def exo_pref_target(preference: Float[Tensor, "..."], *, label_smoothing: float) -> Float64[Tensor, "..."]:
    r"""The margin at which the expected EXO-pref loss of one pair is least.

    .. math:: (2P - 1) \log\frac{1-\varepsilon}{\varepsilon}

    The margin is beta times the difference of the log ratios of y and y', the implicit reward's difference. Up to a
    constant the expected loss of the pair is KL(p_f || p) with these log odds of p. They are linear in P, not logit P:
    for Bradley-Terry labels the true difference of rewards d becomes
    :math:`\tanh(d/2) \log\frac{1-\varepsilon}{\varepsilon}`. With two completions this is the optimum; with more,
    the pairs' targets need not be differences of one function, and the optimum is a compromise between them.

    Source: Ji et al., arXiv:2402.00856v4, Eq. 16, in expectation over labels; the optimum is not in the paper.

    Args:
        preference: P, probabilities in [0, 1] that y is preferred to y', any shape.
        label_smoothing: eps in (0, 1/2).

    Returns:
        The same shape, in nats, float64; 0 at P = 1/2, odd in P - 1/2, at most log((1 - eps)/eps) in size.

    Raises:
        ValueError: a probability outside [0, 1], eps out of range.

    Example:
        >>> exo_pref_target(torch.tensor([0.5, 0.75, 1.0]), label_smoothing=0.1)
        tensor([0.0000, 1.0986, 2.1972], dtype=torch.float64)
    """
    return (2 * _as_probabilities(preference) - 1) * _sharpness(label_smoothing)


def dpo_target(preference: Float[Tensor, "..."], *, label_smoothing: float | int = 0.0) -> Float64[Tensor, "..."]:
    r"""The margin at which the expected DPO loss of one pair is least.

    .. math:: \mathrm{logit}\big((1-\varepsilon) P + \varepsilon (1 - P)\big)

    For Bradley-Terry labels and eps = 0 it is the true difference of rewards. An infinite margin means that the loss
    has no minimum: it falls to its infimum as the margin grows.

    Source: Rafailov et al., arXiv:2305.18290, Eq. 7, in expectation over labels.

    Args:
        preference: P, probabilities in [0, 1] that y is preferred to y', any shape.
        label_smoothing: eps in [0, 1/2).

    Returns:
        The same shape, in nats, float64; 0 at P = 1/2, odd in P - 1/2; infinite at P = 0 or 1 where eps = 0. A
        probability holds its logit to about 1e-16 / min(P, 1 - P).

    Raises:
        ValueError: a probability outside [0, 1], eps out of range.

    Example:
        >>> dpo_target(torch.tensor([0.5, 0.75, 1.0]))
        tensor([0.0000, 1.0986,    inf], dtype=torch.float64)
    """
    checks.require_real("label_smoothing", label_smoothing, allowed="in [0, 1/2)", low=0.0, high=0.5, low_allowed=True)
    return noisy_labels(preference, flip=label_smoothing).logit()


def exo_pref_effective_beta(
    preference: Float[Tensor, "..."], *, beta: float | int, label_smoothing: float
) -> Float64[Tensor, "..."]:
    r"""The temperature that EXO-pref really uses on a pair: of the optimal policy whose log odds it aims at.

    .. math:: \beta\, \frac{\mathrm{logit}\, P}{(2P - 1) \log\frac{1-\varepsilon}{\varepsilon}}
        \;\to\; \frac{2 \beta}{\log\frac{1-\varepsilon}{\varepsilon}} \quad (P \to \tfrac12)

    The optimal policy at this temperature, for rewards that differ by logit P, has the log ratios at which the
    expected loss of the pair is least. It is beta for one P and 1 - P only, and for none where
    eps > 1/(1 + e^2) = 0.119.

    Source: not in the paper.

    Args:
        preference: P, probabilities in [0, 1] that y is preferred to y', any shape.
        beta: of the loss, above 0.
        label_smoothing: eps in (0, 1/2).

    Returns:
        The same shape, above 0, in the unit of beta, float64; least at P = 1/2, infinite at P = 0 and 1.

    Raises:
        ValueError: a probability outside [0, 1], beta or eps out of range.

    Example:
        >>> exo_pref_effective_beta(torch.tensor([0.5, 0.9, 1.0]), beta=0.1, label_smoothing=1e-3)
        tensor([0.0290, 0.0398,    inf], dtype=torch.float64)
    """
    checks.require_positive(beta=beta)
    x = 2 * _as_probabilities(preference) - 1
    # logit P = 2 artanh x; near 0 the series of artanh x / x, whose derivatives are right there too.
    near = x.abs() < 1e-3
    series = 1 + x**2 / 3 + x**4 / 5 + x**6 / 7
    ratio = torch.where(near, series, torch.atanh(x) / torch.where(near, 1.0, x))
    return 2 * beta * ratio / _sharpness(label_smoothing)


def dpo_optimum_exists(preference: Float[Tensor, "N N"]) -> bool:
    """Whether the expected DPO loss without smoothing has a minimum over all policies, at finite log ratios.

    It has one if and only if the completions cannot be split into two groups of which the first wins every comparison
    with the second. Otherwise raising the first group's log ratios lowers the loss for ever: hard labels, where two
    completions differ in reward, are such a case, Bradley-Terry and noisy labels are not.

    Source: Ford, Solution of a ranking problem from binary comparisons, 1957.

    Args:
        preference: [N, N] of the completions that the reference draws, in [0, 1], complementary.

    Returns:
        True where the minimum exists.

    Raises:
        ValueError: probabilities outside [0, 1], not complementary, or not square.

    Example:
        >>> reward = torch.tensor([0.0, 1.0])
        >>> dpo_optimum_exists(bradley_terry(reward)), dpo_optimum_exists(hard_labels(reward))
        (True, False)
    """
    preference = _as_preference(preference)
    n = len(preference)
    # Who wins sometimes against whom, then over others: every walk has at most n - 1 steps.
    reaches = (preference > 0) | torch.eye(n, dtype=torch.bool, device=preference.device)
    for _ in range(math.ceil(math.log2(max(n, 2)))):
        reaches = reaches.double() @ reaches.double() > 0
    return bool(reaches.all())


def expected_preference_loss(
    log_pi: Float[Tensor, " N"], log_ref: Float[Tensor, " N"], preference: Float[Tensor, "N N"], loss: PairLoss
) -> Float64[Tensor, ""]:
    r"""The expectation of a loss on a pair drawn from the reference and labelled once.

    .. math::
        \sum_{y, y'} \pi_{ref}(y)\, \pi_{ref}(y') \big[ P(y \succ y')\, \ell(y, y')
        + (1 - P(y \succ y'))\, \ell(y', y) \big]

    Pairs of one completion twice are among them, as among draws.

    Source: Rafailov et al., arXiv:2305.18290, Eq. 7, with the expectation over pairs and labels written out.

    Args:
        log_pi: [N] normalised log-probabilities of the policy, finite where the reference is positive.
        log_ref: [N] of the reference.
        preference: [N, N], P(y > y') in [0, 1], y along the rows; labels of a pair are complementary:
            :math:`P + P^T = 1`.
        loss: of log pi of the chosen, of the rejected, log pi_ref of the chosen, of the rejected, [B] each, to [B].

    Returns:
        Scalar, float64; differentiable in ``log_pi`` as the loss is.

    Raises:
        ValueError: tables of other shapes or not normalised, probabilities of preference outside [0, 1] or not
            complementary.

    Example:
        >>> from exo_toy.losses import dpo_loss
        >>> pi = ref = torch.tensor([0.5, 0.5]).log()
        >>> prefer = bradley_terry(torch.tensor([0.0, 1.0]))
        >>> expected_preference_loss(pi, ref, prefer, lambda *logps: dpo_loss(*logps, beta=1.0).losses)
        tensor(0.6931, dtype=torch.float64)
    """
    log_pi, log_ref = checks.as_tables(log_pi=log_pi, log_ref=log_ref)
    checks.require_log_probabilities(log_pi=log_pi, log_ref=log_ref)
    checks.require_shape("N N", preference=preference)
    if preference.shape != (len(log_ref), len(log_ref)):
        raise ValueError(f"preference must be [{len(log_ref)}, {len(log_ref)}]; got {list(preference.shape)}")
    preference = _as_preference(preference)
    inside = log_ref > -torch.inf
    log_pi, log_ref = log_pi[inside], log_ref[inside]
    preference = preference[inside][:, inside]
    n = len(log_ref)
    chosen = torch.arange(n, device=log_ref.device).repeat_interleave(n)
    rejected = torch.arange(n, device=log_ref.device).repeat(n)
    losses = loss(log_pi[chosen], log_pi[rejected], log_ref[chosen], log_ref[rejected]).unflatten(0, (n, n))
    # A label that is never given costs nothing, be its loss infinite. The sum holds both orders of a pair, so that
    # either label contributes one half of it.
    losses = torch.where(preference > 0, losses, 0.0)
    return 2 * expectation(log_ref, expectation(log_ref, preference * losses))


def _as_probabilities(preference: Tensor) -> Tensor:
    """In float64, after checking the range."""
    checks.require_floating(preference=preference)
    values = preference.detach()
    outside = ~((values >= 0) & (values <= 1))
    checks.require_values(
        [values], (outside, lambda: f"preference must lie in [0, 1]; got {checks.first_bad(values, outside)}")
    )
    return preference.double()


def _as_preference(preference: Tensor) -> Tensor:
    """A square table of complementary probabilities, in float64."""
    preference = _as_probabilities(preference)
    checks.require_shape("N N", preference=preference)
    if preference.shape[0] != preference.shape[1]:
        raise ValueError(f"preference must be square, [N, N]; got {list(preference.shape)}")
    one_sided = (preference + preference.mT - 1).detach().abs() > 1e-6
    checks.require_values(
        [preference], (one_sided, lambda: "preference must be complementary: preference + preference.T = 1")
    )
    return preference


def _sharpness(label_smoothing: float) -> float:
    """log((1 - eps)/eps)."""
    checks.require_real("label_smoothing", label_smoothing, allowed="in (0, 1/2)", low=0.0, high=0.5)
    return math.log1p(-label_smoothing) - math.log(label_smoothing)
