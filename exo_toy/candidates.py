"""What candidates from a k-gram reference show of the losses' limits, the divergences and log Z: the exact beside them.

Candidates are groups of K, as the losses on candidates take them; the self-normalised estimates take all groups of a
prompt as one sample. Every estimate comes with a 95 % interval and the number that it estimates, which
:mod:`exo_toy.automata` computes at any length.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor

from exo_toy import automata, checks, estimators
from exo_toy.automata import KGramModel, RewardAutomaton, tempered_policy
from exo_toy.losses import dpo_rw_loss, exo_rw_loss

LEVEL = 0.95


@dataclass(frozen=True)
class Candidates:
    """Groups of K completions of the reference for every prompt, and what losses need of them.

    Args:
        tokens: [X, G, K, T].
        log_ratio: [X, G, K] log policy minus log reference, in nats.
        rewards: [X, G, K].
    """

    tokens: Int64[Tensor, "X G K T"]
    log_ratio: Float64[Tensor, "X G K"]
    rewards: Float64[Tensor, "X G K"]


class Beside(NamedTuple):
    """An estimate [X], its 95 % interval, and the exact answer [X]."""

    value: Tensor
    low: Tensor
    high: Tensor
    exact: Tensor


class Comparison(NamedTuple):
    r"""Estimates from candidates beside the exact answers, in nats, for :math:`\pi = \pi_\theta^{\beta_\pi}`.

    Attributes:
        exo_rw: mean EXO-rw loss of the groups; exact: its limit as K grows, KL(π || π*).
        dpo_rw: mean DPO-rw loss less log K; exact: its limit, KL(π* || π) - KL(π* || π_ref).
        log_z: log Z, self-normalised.
        kl_policy_to_optimal: KL(π || π*), self-normalised.
        kl_optimal_to_policy: KL(π* || π), self-normalised.
        kl_to_reference: KL(π || π_ref), self-normalised.
        objective: J_{β_r}(π), self-normalised, in the unit of the reward.
    """

    exo_rw: Beside
    dpo_rw: Beside
    log_z: Beside
    kl_policy_to_optimal: Beside
    kl_optimal_to_policy: Beside
    kl_to_reference: Beside
    objective: Beside


class Exact(NamedTuple):
    r"""What candidates estimate, [X] each in nats, for :math:`\pi = \pi_\theta^{\beta_\pi}`.

    Attributes:
        log_z: log Z.
        kl_policy_to_optimal: KL(π || π*).
        kl_optimal_to_policy: KL(π* || π).
        kl_to_reference: KL(π || π_ref).
        kl_optimal_to_reference: KL(π* || π_ref).
    """

    log_z: Tensor
    kl_policy_to_optimal: Tensor
    kl_optimal_to_policy: Tensor
    kl_to_reference: Tensor
    kl_optimal_to_reference: Tensor


class EffectiveSize(NamedTuple):
    """The effective sample size of M weighted candidates [X], and M times what its share of M tends to [X]."""

    value: Tensor
    exact: Tensor


def draw_candidates(
    pi: KGramModel,
    ref: KGramModel,
    automaton: RewardAutomaton,
    *,
    groups: int,
    k: int,
    generator: torch.Generator,
    starts: Int[Tensor, " X"] | None = None,
) -> Candidates:
    """Independent completions of the reference for every prompt, in groups of K.

    Args:
        pi: the policy, for X prompts or one.
        ref: the reference, for X prompts or one, over the same space.
        automaton: the reward.
        groups: G, at least 1.
        k: K, at least 2.
        generator: where the randomness comes from.
        starts: [X] the automaton's state before the first token of each prompt; None for its start.

    Returns:
        The candidates; log ratios are -inf where the policy cannot produce one, rewards where one is forbidden.

    Raises:
        ValueError: ``groups`` or ``k`` too small, models over different spaces, starts of another number of prompts.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> fair = KGramModel(SequenceSpace(2, 1000), 0, (torch.zeros(1, 1, 2).double(),))
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> drawn = draw_candidates(fair, fair, ones, groups=3, k=4, generator=torch.Generator().manual_seed(0))
        >>> drawn.tokens.shape, drawn.log_ratio.abs().max().item(), bool((drawn.rewards == drawn.tokens.sum(-1)).all())
        (torch.Size([1, 3, 4, 1000]), 0.0, True)
    """
    checks.require_integer("groups", groups, at_least=1)
    checks.require_integer("k", k, at_least=2)
    if automaton.vocab_size != ref.space.vocab_size:
        raise ValueError(
            f"automaton must read the {ref.space.vocab_size} tokens of the models; got {automaton.vocab_size}"
        )
    if pi.space != ref.space:
        raise ValueError(f"models must be over one space; got {pi.space} and {ref.space}")
    sizes = {pi.n_prompts, ref.n_prompts, 1 if starts is None else len(starts)} - {1}
    if len(sizes) > 1:
        raise ValueError(f"pi, ref and starts must be for the same prompts; got {sorted(sizes)}")
    n_prompts = max(sizes, default=1)
    per_prompt = groups * k * (n_prompts // ref.n_prompts)
    tokens = ref.sample(per_prompt, generator).reshape(n_prompts, groups * k, -1)
    log_ratio = _log_prob(pi, tokens) - _log_prob(ref, tokens)
    lengths = ref.space.counted(tokens).sum(-1)
    own = [automaton] * n_prompts if starts is None else [replace(automaton, start=s) for s in starts.tolist()]
    rewards = [one.reward(*each) for one, *each in zip(own, tokens, lengths, strict=True)]
    shape = (groups, k)
    return Candidates(
        tokens.unflatten(1, shape), log_ratio.unflatten(1, shape), torch.stack(rewards).unflatten(1, shape)
    )


@torch.no_grad()
def exact_answers(
    pi: KGramModel,
    ref: KGramModel,
    automaton: RewardAutomaton,
    *,
    beta_pi: float | int,
    beta_r: float | int,
    starts: Int[Tensor, " X"] | None = None,
) -> Exact:
    """What :func:`compare` sets beside the estimates; its arguments and errors.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> fair = KGramModel(SequenceSpace(2, 10), 0, (torch.zeros(1, 1, 2).double(),))
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> exact_answers(fair, fair, ones, beta_pi=1.0, beta_r=2.0).log_z
        tensor([2.8093], dtype=torch.float64)
    """
    policy = pi if beta_pi == 1 else tempered_policy(pi, ref, beta_pi=beta_pi)[0]
    return Exact(
        log_z=automata.log_partition(ref, automaton, beta=beta_r, starts=starts),
        kl_policy_to_optimal=automata.kl_policy_to_optimal(policy, ref, automaton, beta=beta_r, starts=starts),
        kl_optimal_to_policy=automata.kl_optimal_to_policy(policy, ref, automaton, beta=beta_r, starts=starts),
        kl_to_reference=automata.kl_divergence(policy, ref),
        kl_optimal_to_reference=automata.kl_optimal_to_policy(ref, ref, automaton, beta=beta_r, starts=starts),
    )


def compare(
    pi: KGramModel,
    ref: KGramModel,
    automaton: RewardAutomaton,
    candidates: Candidates,
    *,
    beta_pi: float | int,
    beta_r: float | int,
    starts: Int[Tensor, " X"] | None = None,
    exact: Exact | None = None,
) -> Comparison:
    r"""Losses and self-normalised estimates of candidates beside what they estimate.

    The intervals know nothing of completions that were not drawn, nor of the losses' bias at finite K: where the
    effective sample size is small they are too narrow, which the exact answer shows.

    Source: Ji et al., arXiv:2402.00856v4, sections 3 and 4; the exact answers are those of :mod:`exo_toy.automata`.

    Args:
        pi: the policy.
        ref: the reference.
        automaton: the reward.
        candidates: as :func:`draw_candidates` draws them from these; G at least 2 for an interval of the losses.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.
        starts: as for :func:`draw_candidates`.
        exact: :func:`exact_answers` of the same arguments, where they are known already.

    Returns:
        [X] of each, without gradients.

    Raises:
        ValueError: as the losses and the measures of :mod:`exo_toy.automata`.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> fair = KGramModel(SequenceSpace(2, 10), 0, (torch.zeros(1, 1, 2).double(),))
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> drawn = draw_candidates(fair, fair, ones, groups=64, k=16, generator=torch.Generator().manual_seed(0))
        >>> found = compare(fair, fair, ones, drawn, beta_pi=1.0, beta_r=2.0).log_z
        >>> found.exact, bool((found.low < found.exact).all() and (found.exact < found.high).all())
        (tensor([2.8093], dtype=torch.float64), True)
    """
    log_ratio, rewards = candidates.log_ratio.detach(), candidates.rewards.detach()
    rows = log_ratio.flatten(0, 1), rewards.flatten(0, 1)
    exo, dpo = (
        loss(*rows, beta_pi=beta_pi, beta_r=beta_r).unflatten(0, log_ratio.shape[:2])
        for loss in (exo_rw_loss, dpo_rw_loss)
    )
    f, h = beta_pi * log_ratio.flatten(1), rewards.flatten(1) / beta_r
    if exact is None:
        exact = exact_answers(pi, ref, automaton, beta_pi=beta_pi, beta_r=beta_r, starts=starts)
    zero, objective = torch.zeros_like(f), beta_r * (exact.log_z - exact.kl_policy_to_optimal)
    return Comparison(
        exo_rw=_mean(exo, exact.kl_policy_to_optimal),
        dpo_rw=_mean(dpo - math.log(log_ratio.shape[-1]), exact.kl_optimal_to_policy - exact.kl_optimal_to_reference),
        log_z=_beside(estimators.snis_log_normalizer(h), exact.log_z),
        kl_policy_to_optimal=_beside(estimators.snis_kl(f, h), exact.kl_policy_to_optimal),
        kl_optimal_to_policy=_beside(estimators.snis_kl(h, f), exact.kl_optimal_to_policy),
        kl_to_reference=_beside(estimators.snis_kl(f, zero), exact.kl_to_reference),
        objective=_beside(estimators.snis_objective(f, rewards.flatten(1), beta=beta_r), objective),
    )


@torch.no_grad()
def effective_sizes(
    pi: KGramModel,
    ref: KGramModel,
    automaton: RewardAutomaton,
    candidates: Candidates,
    *,
    beta_pi: float | int,
    beta_r: float | int,
    starts: Int[Tensor, " X"] | None = None,
) -> tuple[EffectiveSize, EffectiveSize]:
    r"""What all candidates of a prompt together are worth: under the policy's weights, and the optimal policy's.

    .. math::
        \frac{(\sum_i w_i)^2}{\sum_i w_i^2} \quad\text{and}\quad M \frac{E_{ref}[w]^2}{E_{ref}[w^2]}, \qquad
        w = (\pi_\theta / \pi_{ref})^{\beta_\pi} \text{ or } e^{r / \beta_r}

    Weights that were not drawn are in the second alone: where it is the smaller one, the first is too large.

    Source: Kong, A Note on Importance Sampling using Standardized Weights, 1992.

    Args:
        pi: as for :func:`compare`, and so are the others.
        ref: the reference.
        automaton: the reward.
        candidates: G K of each prompt, M together.
        beta_pi: policy temperature, above 0.
        beta_r: reward temperature, above 0.
        starts: as for :func:`draw_candidates`.

    Returns:
        (of the policy, of the optimal policy), the drawn one in [1, M], the exact one in [0, M].

    Raises:
        ValueError: as :func:`exo_toy.automata.log_partition` and
            :func:`exo_toy.automata.log_tempered_normalizer` at twice the temperature; a prompt with nothing but
            forbidden candidates.

    Example:
        >>> from exo_toy.spaces import SequenceSpace
        >>> fair = KGramModel(SequenceSpace(2, 10), 0, (torch.zeros(1, 1, 2).double(),))
        >>> ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
        >>> drawn = draw_candidates(fair, fair, ones, groups=5, k=2, generator=torch.Generator().manual_seed(0))
        >>> effective_sizes(fair, fair, ones, drawn, beta_pi=1.0, beta_r=2.0)[1].exact  # 10 ((1 + √e)² / (2 + 2e))¹⁰
        tensor([5.5847], dtype=torch.float64)
    """
    checks.require_positive(beta_pi=beta_pi, beta_r=beta_r)
    n_candidates = candidates.rewards[0].numel()
    f, h = beta_pi * candidates.log_ratio.flatten(1), candidates.rewards.flatten(1) / beta_r
    log_w, log_w2 = (automata.log_tempered_normalizer(pi, ref, beta_pi=b) for b in (beta_pi, 2 * beta_pi))
    log_v, log_v2 = (automata.log_partition(ref, automaton, beta=b, starts=starts) for b in (beta_r, beta_r / 2))
    return (
        EffectiveSize(estimators.effective_sample_size(f), n_candidates * (2 * log_w - log_w2).exp().expand(len(f))),
        EffectiveSize(estimators.effective_sample_size(h), n_candidates * (2 * log_v - log_v2).exp().expand(len(f))),
    )


def _log_prob(model: KGramModel, tokens: Tensor) -> Tensor:
    """[X, M] of each prompt's own completions [X, M, T], from a model for X prompts or one."""
    if model.n_prompts == len(tokens):
        return model.log_prob(tokens)
    return model.log_prob(tokens.flatten(0, 1)).reshape(tokens.shape[:2])


def _beside(estimate: estimators.Estimate, exact: Tensor) -> Beside:
    return Beside(estimate.value, *estimate.interval(level=LEVEL), exact.expand_as(estimate.value))


def _mean(losses: Tensor, exact: Tensor) -> Beside:
    """The mean over groups [X, G], with its normal interval."""
    n_groups = losses.shape[1]
    error = losses.std(1) / math.sqrt(n_groups) if n_groups > 1 else torch.full_like(losses[:, 0], torch.nan)
    return _beside(estimators.Estimate(losses.mean(1), error, torch.zeros_like(error)), exact)
