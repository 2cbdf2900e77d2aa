"""Noise of policy gradients: of one completion, and of K with the mean of the others for a baseline."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from exo_toy import checks
from exo_toy.gradient_noise.noise import Noise, require_counts, require_finite, rows_inside, sample_noise

Baseline = Literal["none", "mean", "best"]


def policy_gradient_noise(
    scores: Float[Tensor, "N P"],
    log_pi: Float[Tensor, " N"],
    log_ref: Float[Tensor, " N"],
    reward: Float[Tensor, " N"],
    *,
    beta: float | int,
    baseline: Baseline,
) -> Noise:
    r"""Mean and noise of the policy gradient of one completion drawn from the policy.

    .. math:: g = (R(y) - b)\, s(y), \quad R = r - \beta \log\frac{\pi}{\pi_{ref}}, \quad
        b \in \Big\{0,\; E_\pi R,\; \frac{E_\pi[R \|s\|^2]}{E_\pi \|s\|^2}\Big\}

    Its mean is the gradient of :math:`J_\beta` for any constant b, as the scores have mean zero; the last b makes its
    noise the least that a constant can.

    Source: Williams, Simple statistical gradient-following algorithms for connectionist reinforcement learning, 1992;
    the best constant is that of Greensmith, Bartlett and Baxter, Variance reduction techniques for gradient estimates
    in reinforcement learning, 2004.

    Args:
        scores: [N, P] gradients of log pi, of mean zero under the policy.
        log_pi: [N] normalised log-probabilities of the policy.
        log_ref: [N] of the reference, finite where the policy is positive.
        reward: [N], finite where the policy is positive.
        beta: strength of the KL penalty, above 0.
        baseline: "none", "mean" or "best", the three values of b.

    Returns:
        Noise; for the mean over K independent completions, divide its variance by K.

    Raises:
        ValueError: shapes that do not match, tables that are not normalised or not finite where they must be, another
            baseline, beta not above 0.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).double().log()
        >>> scores, reward = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]), torch.tensor([0.0, 1.0])
        >>> [policy_gradient_noise(scores, uniform, uniform, reward, beta=1, baseline=b).variance.item()
        ...  for b in ("none", "mean")]
        [0.125, 0.0]
    """
    if baseline not in ("none", "mean", "best"):
        raise ValueError(f'baseline must be "none", "mean" or "best"; got {baseline!r}')
    scores, log_pi, returns = _returns(scores, log_pi, log_ref, reward, beta)
    at = 0.0
    if baseline != "none":
        weight = log_pi.exp() if baseline == "mean" else log_pi.exp() * scores.square().sum(-1)
        # Without any score there is no gradient, whatever the baseline.
        at = ((weight @ returns) / weight.sum()).item() if weight.sum() > 0 else 0.0
    return sample_noise((returns - at).unsqueeze(-1) * scores, log_pi)


def leave_one_out_noise(
    scores: Float[Tensor, "N P"],
    log_pi: Float[Tensor, " N"],
    log_ref: Float[Tensor, " N"],
    reward: Float[Tensor, " N"],
    *,
    beta: float | int,
    k: int,
) -> Noise:
    """Mean and noise of the policy gradient with the others' mean as a baseline: :func:`leave_one_out_noises` at one K.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).double().log()
        >>> scores, reward = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]), torch.tensor([0.0, 1.0])
        >>> leave_one_out_noise(scores, uniform, uniform, reward, beta=1, k=2).variance
        tensor(0.1250, dtype=torch.float64)
    """
    (noise,) = leave_one_out_noises(scores, log_pi, log_ref, reward, beta=beta, ks=(k,))
    return noise


def leave_one_out_noises(
    scores: Float[Tensor, "N P"],
    log_pi: Float[Tensor, " N"],
    log_ref: Float[Tensor, " N"],
    reward: Float[Tensor, " N"],
    *,
    beta: float | int,
    ks: Sequence[int],
) -> list[Noise]:
    r"""Mean and noise of the policy gradient of K completions, each with the mean of the others for a baseline.

    .. math:: g = \frac1K \sum_i \Big(R_i - \frac{1}{K-1} \sum_{j \ne i} R_j\Big) s_i, \qquad
        \frac{E\|\tilde R \tilde s - C\|^2}{K} + \frac{\|C\|^2 + E\tilde R^2\, E\|\tilde s\|^2}{K (K-1)}

    with R as in :func:`policy_gradient_noise`, tildes for deviations from the mean under the policy and
    :math:`C = E[\tilde R \tilde s] = E g`. It is a U-statistic of :math:`(R_i - R_j)(s_i - s_j)/2`, so the noise
    follows from that of this kernel and of its projection.

    Source: Kool, van Hoof and Welling, Buy 4 REINFORCE samples, get a baseline for free, 2019; the noise is by
    Hoeffding's decomposition, not in the paper.

    Args:
        scores: [N, P] gradients of log pi.
        log_pi: [N] normalised log-probabilities of the policy.
        log_ref: [N] of the reference, finite where the policy is positive.
        reward: [N], finite where the policy is positive.
        beta: strength of the KL penalty, above 0.
        ks: numbers of completions, each at least 2.

    Returns:
        Noise of the K completions together, for each K.

    Raises:
        ValueError: as :func:`policy_gradient_noise`; no K, a K below 2 or not below 2**53.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).double().log()
        >>> scores, reward = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]), torch.tensor([0.0, 1.0])
        >>> [noise.variance.item()
        ...  for noise in leave_one_out_noises(scores, uniform, uniform, reward, beta=1, ks=(2, 5))]
        [0.125, 0.0125]
    """
    require_counts(ks, at_least=2)
    scores, log_pi, returns = _returns(scores, log_pi, log_ref, reward, beta)
    p = log_pi.exp()
    scores, returns = scores - p @ scores, returns - p @ returns
    single = sample_noise(returns.unsqueeze(-1) * scores, log_pi)
    product = (p @ returns.square()) * (p @ scores.square().sum(-1))
    rest = single.mean.square().sum() + product
    return [Noise(single.mean, single.variance / k + rest / float(k * (k - 1))) for k in ks]


def _returns(
    scores: Tensor, log_pi: Tensor, log_ref: Tensor, reward: Tensor, beta: float | int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [n, P], log-probabilities [n] and r - beta log(pi / pi_ref) [n], where the policy is positive."""
    checks.require_positive(beta=beta)
    log_pi, log_ref, reward = checks.as_tables(log_pi=log_pi, log_ref=log_ref, reward=reward)
    checks.require_log_probabilities(log_pi=log_pi, log_ref=log_ref)
    require_finite(log_pi, "log_pi", log_ref=log_ref, reward=reward)
    scores = rows_inside("scores", scores, log_pi)
    inside = log_pi > -torch.inf
    log_pi, log_ref, reward = log_pi[inside], log_ref[inside], reward[inside]
    return scores, log_pi, reward - beta * (log_pi - log_ref)
