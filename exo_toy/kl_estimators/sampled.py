"""The three estimators, and what is differentiated of them at sampled completions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from exo_toy import checks

Estimator = Literal["k1", "k2", "k3"]
Use = Literal["loss", "reward", "importance"]
Level = Literal["sequence", "token"]
Weights = Literal["none", "prefix", "token"]

# Below it the power series is summed instead of a difference that cancels; to this order nothing is left in float64.
SERIES_BELOW, SERIES_ORDER = 0.5, 16


def k1(log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""The plain estimator :math:`\ell`: its mean under the policy is KL(pi||pi_ref), its derivative 1.

    Args:
        log_ratio: log pi - log pi_ref in nats, any shape.

    Returns:
        The same, of any sign.

    Example:
        >>> k1(torch.tensor([-1.0, 2.0]))
        tensor([-1.,  2.])
    """
    return log_ratio


def k2(log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Half the square, :math:`\ell^2 / 2`: biased, of second order as the KL is; its derivative is :math:`\ell`.

    Args:
        log_ratio: log pi - log pi_ref in nats, any shape.

    Returns:
        The same shape and dtype (half types are computed in float32), at least 0.

    Example:
        >>> k2(torch.tensor([-1.0, 2.0]))
        tensor([0.5000, 2.0000])
    """
    return (_accumulated(log_ratio).square() / 2).to(log_ratio.dtype)


def k3(log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""The estimator :math:`e^{-\ell} - 1 + \ell`: unbiased under the policy, never negative.

    Its derivative is :math:`1 - e^{-\ell}`. Accurate relative to itself, derivatives included, however small the ratio.

    Args:
        log_ratio: log pi - log pi_ref in nats, any shape.

    Returns:
        The same shape and dtype (half types are computed in float32), in [0, inf]; inf at both infinities.

    Example:
        >>> k3(torch.tensor([-1.0, 1e-10, 2.0]))
        tensor([7.1828e-01, 5.0000e-21, 1.1353e+00])
    """
    x = _accumulated(log_ratio)
    small = x.abs() < SERIES_BELOW
    near, far = torch.where(small, x, 0.0), torch.where(small, 1.0, x)
    series = torch.ones_like(near)
    for n in range(SERIES_ORDER, 2, -1):
        series = 1 - near / n * series
    # At -inf the exponential wins, and inf - inf would say nothing.
    far = torch.expm1(-far) + far.clamp(min=torch.finfo(x.dtype).min)
    return torch.where(small, near.square() / 2 * series, far).to(log_ratio.dtype)


ESTIMATORS: dict[Estimator, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


@dataclass(frozen=True)
class Recipe:
    r"""How a gradient is made of an estimator k at completions that a sampler drew.

    A completion has one term, of its whole log ratio, or one for each token t, of that token's. With s the scores of
    the tokens, and w the importance weights:

    ==========  ========================================================  =============================================
    use         what is differentiated                                    its gradient, without weights
    ==========  ========================================================  =============================================
    loss        :math:`\sum_t [w_t] k_t`                                  :math:`\sum_t k'_t s_t`
    reward      :math:`\sum_t [\sum_{u \ge t} w_u k_u - w_t b] \log\pi_t` :math:`\sum_t (\sum_{u \ge t} k_u - b) s_t`
    importance  :math:`\sum_t w_t k_t`                                    :math:`\sum_t (k_t \sum_{u \le t} s_u + k'_t
                                                                          s_t)`
    ==========  ========================================================  =============================================

    Brackets are not differentiated.

    Args:
        estimator: "k1", "k2" or "k3".
        use: "loss", the estimate itself; "reward", a factor of the score (of tokens: what is still to come); or
            "importance", the estimate times the importance weight, both differentiated.
        level: "sequence", one term of the summed log ratio, or "token", one for each.
        weights: of policy over sampler: "none"; "prefix", the ratio of all tokens up to the term's; "token", the ratio
            of the term's token alone. Of a sequence the last two are one. Not "none" for "importance".

    Raises:
        ValueError: another word.

    Example:
        >>> Recipe("k3", "loss", level="token")
        Recipe(estimator='k3', use='loss', level='token', weights='none')
    """

    estimator: Estimator
    use: Use
    level: Level = "sequence"
    weights: Weights = "none"

    def __post_init__(self) -> None:
        for name, allowed in (("estimator", Estimator), ("use", Use), ("level", Level), ("weights", Weights)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}; got {getattr(self, name)!r}")
        if self.use == "importance" and self.weights == "none":
            raise ValueError("weights must be 'prefix' or 'token' where use is 'importance'; got 'none'")


def kl_surrogate(
    policy_logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    recipe: Recipe,
    sampler_logps: Float[Tensor, "B T"] | None = None,
    baseline: Float[Tensor, "#B #T"] | None = None,
) -> Float[Tensor, " B"]:
    r"""What a recipe differentiates, for sampled completions: its gradient is the sampled gradient of the penalty.

    The value itself means something for some recipes only. See :class:`Recipe` for the formulas.

    Source: Tang and Munos, arXiv:2506.09477.

    Args:
        policy_logps: [B, T] log-probabilities of the tokens, finite, differentiable.
        ref_logps: [B, T] the reference's, finite.
        mask: [B, T] True for the tokens that count; what a masked entry holds, NaN included, changes nothing.
        recipe: what is made of them.
        sampler_logps: [B, T] log-probabilities under what drew the completions, finite, for importance weights; None
            for the policy itself, as it is now. Not differentiated.
        baseline: of a reward, [B, T] or 1 in place of either; [B, 1] or [1, 1] for sequences. None for 0.

    Returns:
        [B] in the arguments' dtype (half types are computed in float32); no reduction.

    Raises:
        ValueError: shapes or dtypes that do not fit; a log-probability that is not finite where the mask is True; a
            sampler without weights or a baseline without a reward, which would have no effect.

    Example:
        >>> logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> recipe, mask = Recipe("k2", "loss"), torch.tensor([[True, True]])
        >>> kl_surrogate(logps, torch.tensor([[-1.5, -3.0]]), mask, recipe=recipe).sum().backward()
        >>> logps.grad
        tensor([[1.5000, 1.5000]])
    """
    given = {"policy_logps": policy_logps, "ref_logps": ref_logps}
    given |= {} if sampler_logps is None else {"sampler_logps": sampler_logps}
    checks.require_floating(**given)
    checks.require_mask(mask=mask)
    checks.require_shape("B T", **given, mask=mask)
    for name, values in given.items():
        bad = mask & ~values.detach().isfinite()
        checks.require_values([values], (bad, partial(_not_finite, name, values, bad)))
    if sampler_logps is not None and recipe.weights == "none":
        raise ValueError("sampler_logps must be None where the recipe's weights are 'none'")
    if baseline is not None and recipe.use != "reward":
        raise ValueError(f"baseline must be None where the recipe's use is not 'reward'; got use {recipe.use!r}")
    logps, terms, weights, mask = terms_of(policy_logps, ref_logps, mask, recipe, sampler_logps)
    if recipe.use == "importance":
        value = (weights * terms).sum(-1)
    elif recipe.use == "loss":
        value = (weights.detach() * terms).sum(-1)
    else:
        factor = to_go(weights * terms).detach()
        if baseline is not None:
            _require_baseline(baseline, factor)
            factor = factor - mask * weights.detach() * baseline.detach()
        value = (factor * logps).sum(-1)
    return value.to(policy_logps.dtype)


def terms_of(
    policy_logps: Tensor, ref_logps: Tensor, mask: Tensor, recipe: Recipe, sampler_logps: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, estimates, weights and mask of the terms: [B, T], or [B, 1] for sequences."""
    sampler_logps = policy_logps.detach() if sampler_logps is None else sampler_logps.detach()
    logps, ref_logps, sampler_logps = (
        torch.where(mask, _accumulated(values), 0.0) for values in (policy_logps, ref_logps, sampler_logps)
    )
    if recipe.level == "sequence":
        logps, ref_logps, sampler_logps = (values.sum(-1, keepdim=True) for values in (logps, ref_logps, sampler_logps))
        mask = torch.ones_like(logps, dtype=torch.bool)
    log_weights = torch.zeros_like(logps) if recipe.weights == "none" else logps - sampler_logps
    if recipe.weights == "prefix":
        log_weights = torch.where(mask, log_weights.cumsum(-1), 0.0)
    return logps, ESTIMATORS[recipe.estimator](logps - ref_logps.detach()), log_weights.exp(), mask


def to_go(rewards: Tensor) -> Tensor:
    """Sums from each position to the end."""
    return rewards.flip(-1).cumsum(-1).flip(-1)


def _require_baseline(baseline: Tensor, factor: Tensor) -> None:
    """It broadcasts to the terms, dimension by dimension."""
    wanted = list(factor.shape)
    if baseline.ndim != 2 or any(have not in (1, want) for have, want in zip(baseline.shape, wanted, strict=True)):
        raise ValueError(f"baseline must be {wanted}, or 1 in place of either; got {list(baseline.shape)}")
    bad = ~baseline.detach().isfinite()
    checks.require_values([baseline], (bad, lambda: f"baseline must be finite; got {checks.first_bad(baseline, bad)}"))


def _not_finite(name: str, values: Tensor, bad: Tensor) -> str:
    return f"{name} must be finite where mask is True; got {checks.first_bad(values, bad)}"


def _accumulated(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
