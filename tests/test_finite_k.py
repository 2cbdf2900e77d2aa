"""Expected losses at finite K: brute force over tuples, sums over counts, laws at huge K, the 1/K coefficients.

Errors of the quadrature grow with the spread of the log weights (f and r / beta_r): :data:`PER_SPREAD` has the measured
rates. Brute force is in float64 as well, and has the same few roundings of its own.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.finite_k import (
    dpo_rw_bias_coefficient,
    exo_rw_bias_coefficient,
    expected_dpo_rw_loss,
    expected_exo_rw_loss,
)
from exo_toy.losses import dpo_rw_loss, exo_rw_loss
from exo_toy.objectives import kl_optimal_to_policy, kl_policy_to_optimal
from exo_toy.targets import optimal_policy
from tests import oracles, strategies
from tests.strategies import Problem
from tests.tolerances import assert_close

INF = math.inf
LOG_REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
LOG_PI = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
REWARD = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
BETAS = {"beta_pi": 0.5, "beta_r": 1.0}

EXPECTED = {"exo": expected_exo_rw_loss, "dpo": expected_dpo_rw_loss}
LOSS = {"exo": exo_rw_loss, "dpo": dpo_rw_loss}
ORACLE = {"exo": oracles.exo_rw, "dpo": oracles.dpo_rw}
COEFFICIENT = {"exo": exo_rw_bias_coefficient, "dpo": dpo_rw_bias_coefficient}
both = pytest.mark.parametrize("kind", EXPECTED)

# Absolute error of the value, the gradient and the Hessian per unit of spread, with a floor at spread 10. Measured over
# random tables: 1e-15, 2e-14, 5e-13 per unit of spread (value 2e-13, gradient 4e-12, Hessian 1e-10 at +-300).
PER_SPREAD = {0: 3e-15, 1: 5e-14, 2: 2e-12}


def temperatures(problem: Problem) -> dict[str, float]:
    return {"beta_pi": problem.beta_pi, "beta_r": problem.beta_r}


def spread_of(problem: Problem) -> float:
    """Range of the log weights."""
    inside = problem.log_ref > -INF
    weights = (problem.beta_pi * (problem.log_pi - problem.log_ref)[inside], problem.reward[inside] / problem.beta_r)
    return max((w.max() - w.min()).item() for w in weights)


def assert_within(actual: Tensor, expected: Tensor, *, order: int, spread: float, unit: float = 1.0) -> None:
    """Equal up to the error of the quadrature for derivatives of this order; ``unit`` is what they are made of."""
    bound = PER_SPREAD[order] * max(10.0, spread) * unit
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-12, atol=bound)


def over_tuples(kind: str, log_pi: Tensor, log_ref: Tensor, reward: Tensor, *, k: int, **betas: float) -> Tensor:
    """The expectation [X] of the loss that users call, over all N^K tuples; differentiable.

    The losses refuse a single candidate, from which nothing can be learnt: there 0.
    """
    if k == 1:
        return 0 * (log_pi + log_ref + reward).sum(-1)
    draws = torch.cartesian_prod(*[torch.arange(log_ref.shape[-1])] * k).reshape(-1, k)
    values = []
    for row_pi, row_ref, row_reward in zip(log_pi, log_ref, reward, strict=True):
        probability = row_ref[draws].sum(-1).exp()
        values.append((probability * LOSS[kind]((row_pi - row_ref)[draws], row_reward[draws], **betas)).sum())
    return torch.stack(values)


def derivatives(function: Callable[..., Tensor], *tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Hessian of the sum over prompts in the logits of policy and reference and in the reward."""
    shape = torch.stack(tables).shape

    def flat(entries: Tensor) -> Tensor:
        log_pi_logits, log_ref_logits, reward = entries.reshape(shape)
        return function(log_pi_logits.log_softmax(-1), log_ref_logits.log_softmax(-1), reward).sum()

    entries = torch.stack(tables).flatten().requires_grad_()
    value = flat(entries)
    (gradient,) = torch.autograd.grad(value, entries, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, entries, retain_graph=True)[0] for g in gradient])
    return value.detach(), gradient.detach(), hessian


# Brute force


@both
@given(problem=strategies.problems(n=st.integers(2, 3), max_k=4))
def test_agrees_with_plain_loops_over_all_tuples(kind, device, problem):
    problem = problem.to(device)
    tables = (problem.log_pi, problem.log_ref, problem.reward)
    value = EXPECTED[kind](*tables, k=min(problem.k, 4), **temperatures(problem))
    expected = [
        oracles.expected_loss(ORACLE[kind], *row, min(problem.k, 4), problem.beta_pi, problem.beta_r)
        for row in zip(*(table.tolist() for table in tables), strict=True)
    ]
    assert_within(value.cpu(), torch.tensor(expected, dtype=torch.float64), order=0, spread=spread_of(problem))


@both
@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("spread", [1.0, 10.0, 300.0])
def test_derivatives_are_those_of_the_loss_over_all_tuples(kind, k, n, spread):
    """Value, gradient and Hessian, in policy, reference and reward together, through the loss that users call."""
    generator = torch.Generator().manual_seed(100 * k + n)
    log_ref = 2 * torch.randn(2, n, generator=generator, dtype=torch.float64)
    log_ratio, reward = spread * (torch.rand(2, 2, n, generator=generator, dtype=torch.float64) - 0.5)
    tables = (log_ref + log_ratio, log_ref, reward)
    ours = derivatives(lambda *tables: EXPECTED[kind](*tables, k=k, beta_pi=1.0, beta_r=1.0), *tables)
    theirs = derivatives(lambda *tables: over_tuples(kind, *tables, k=k, beta_pi=1.0, beta_r=1.0), *tables)
    for order, (actual, expected) in enumerate(zip(ours, theirs, strict=True)):
        # Two prompts; probabilities of the reference enter through spread times K derivatives of log-probabilities.
        assert_within(actual, expected, order=order, spread=spread, unit=2 * max(1, k * order))


@both
@given(problem=strategies.problems(n=st.integers(2, 3)))
def test_gradients_are_those_of_the_loss_over_all_tuples(kind, problem):
    k = 2 + problem.k % 3
    tables = [table.clone().requires_grad_() for table in (problem.log_pi, problem.log_ref, problem.reward)]
    gradients = []
    for function in (EXPECTED[kind], lambda *tables, **options: over_tuples(kind, *tables, **options)):
        normalised = [tables[0].log_softmax(-1), tables[1].log_softmax(-1), tables[2]]
        value = function(*normalised, k=k, **temperatures(problem)).sum()
        gradients.append(torch.autograd.grad(value, tables))
    unit = 4 * k * max(problem.beta_pi, 1 / problem.beta_r, 1.0)
    for actual, expected in zip(*gradients, strict=True):
        assert_within(actual, expected, order=1, spread=spread_of(problem), unit=unit)


# The worked example, to all digits


@pytest.mark.parametrize(
    ("k", "value"),
    [
        (2, 0.047856964556),
        (3, 0.077314264452),
        (4, 0.096124475439),
        (8, 0.129777193422),
        (64, 0.160688195069),
        (1024, 0.164365719518),
        (10**6, 0.164604176946),
    ],
)
def test_exo_of_the_worked_example(k, value):
    assert expected_exo_rw_loss(LOG_PI, LOG_REF, REWARD, k=k, **BETAS).item() == pytest.approx(value, abs=6e-13)


@pytest.mark.parametrize(("k", "value"), [(2, 0.574938198822), (3, 0.913479391488), (4, 1.159165780342)])
def test_dpo_of_the_worked_example(k, value):
    assert expected_dpo_rw_loss(LOG_PI, LOG_REF, REWARD, k=k, **BETAS).item() == pytest.approx(value, abs=6e-13)


# Two completions: a sum over how many of the K are the first


def two_point(kind: str, f: list[float], s: list[float], p: float, k: int) -> float:
    """At 40 digits; f and s are the log weights of the policy and of the reward."""
    with mpmath.workdps(40):
        f, s, p = [mpmath.mpf(x) for x in f], [mpmath.mpf(x) for x in s], mpmath.mpf(p)
        total = mpmath.mpf(0)
        probability = (1 - p) ** k
        for j in range(k + 1):
            counts = (j, k - j)
            log_f_sum, log_s_sum = (
                mpmath.log(sum(c * mpmath.exp(x) for c, x in zip(counts, log_w, strict=True))) for log_w in (f, s)
            )
            loss = mpmath.mpf(0)
            for c, log_w, log_v in zip(counts, f, s, strict=True):
                log_p_f, log_p_r = log_w - log_f_sum, log_v - log_s_sum
                if kind == "exo":
                    loss += c * mpmath.exp(log_p_f) * (log_p_f - log_p_r)
                else:
                    loss -= c * mpmath.exp(log_p_r) * log_p_f
            total += probability * loss
            probability *= p / (1 - p) * (k - j) / (j + 1)
        return float(total)


@both
@pytest.mark.parametrize("k", [1, 2, 30, 400, 2000])
@pytest.mark.parametrize(
    ("log_odds_pi", "reward", "p"),
    [(1.0, (0.0, 1.5), 0.5), (-4.0, (3.0, -2.0), 0.25), (30.0, (0.0, 20.0), 0.125), (-300.0, (0.0, 250.0), 0.75)],
)
def test_two_completions(kind, k, log_odds_pi, reward, p):
    log_pi = torch.tensor([log_odds_pi, 0.0], dtype=torch.float64).log_softmax(-1)
    log_ref = torch.tensor([p, 1 - p], dtype=torch.float64).log()
    value = EXPECTED[kind](log_pi, log_ref, torch.tensor(reward), k=k, beta_pi=0.5, beta_r=2.0)
    f = [0.5 * (log_odds_pi - math.log(p / (1 - p))), 0.0]
    expected = two_point(kind, f, [r / 2 for r in reward], p, k)
    assert_close(value, expected, scale=max(1.0, abs(log_odds_pi) / 300))


# Laws at every K


@both
@pytest.mark.parametrize("spread", [1.0, 300.0, 3000.0])
def test_one_candidate_gives_zero(kind, spread):
    generator = torch.Generator().manual_seed(5)
    log_ratio, reward = spread * (torch.rand(2, 3, 6, generator=generator, dtype=torch.float64) - 0.5)
    log_pi, log_ref = log_ratio.log_softmax(-1), torch.full((6,), -math.log(6), dtype=torch.float64)
    value = EXPECTED[kind](log_pi, log_ref, reward, k=1, beta_pi=1.0, beta_r=1.0)
    assert_within(value, torch.zeros(3).double(), order=0, spread=spread)


@given(problem=strategies.problems())
def test_at_the_reference_dpo_is_log_k_and_exo_grows_with_k(problem):
    """There p_f is uniform. Leaving one of K + 1 candidates out at random gives K, and KL(joint) >= KL(given that)."""
    tables, betas = (problem.log_ref, problem.log_ref, problem.reward), temperatures(problem)
    dpo = expected_dpo_rw_loss(*tables, k=problem.k, **betas)
    assert_within(dpo, torch.full_like(dpo, math.log(problem.k)), order=0, spread=spread_of(problem))
    values = [expected_exo_rw_loss(*tables, k=k, **betas) for k in (1, 2, 3, 8, 100, problem.k + 100, 2**31)]
    for fewer, more in itertools.pairwise(values):
        assert (fewer <= more + PER_SPREAD[0] * max(10, spread_of(problem))).all()
    assert (values[-1] >= values[0] - 1e-12).all()


@given(problem=strategies.problems())
def test_at_the_optimal_policy_exo_is_zero_and_its_gradient_too(problem):
    log_pi_star, _ = optimal_policy(problem.log_ref, problem.reward, beta=problem.beta)
    logits = log_pi_star.clone().requires_grad_()
    value = expected_exo_rw_loss(
        logits.log_softmax(-1), problem.log_ref, problem.reward, k=problem.k, **temperatures(problem)
    )
    # h is 0 up to the rounding of pi*.
    spread = spread_of(problem) + 50 * (problem.beta_pi + 1 / problem.beta_r)
    assert_within(value, torch.zeros_like(value), order=0, spread=spread)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert_within(gradient, torch.zeros_like(gradient), order=1, spread=spread, unit=max(1.0, problem.beta_pi))


@given(problem=strategies.problems())
def test_dpo_less_its_minimum_is_exo_with_the_roles_exchanged(problem):
    """Cross-entropy less entropy is KL(p_r||p_f): EXO with the reward as log ratio and the log ratio as reward."""
    betas = temperatures(problem)
    dpo = expected_dpo_rw_loss(problem.log_pi, problem.log_ref, problem.reward, k=problem.k, **betas)
    log_pi_star, _ = optimal_policy(problem.log_ref, problem.reward, beta=problem.beta)
    entropy = expected_dpo_rw_loss(log_pi_star, problem.log_ref, problem.reward, k=problem.k, **betas)
    exchanged_pi, _ = optimal_policy(problem.log_ref, problem.reward, beta=problem.beta_r)
    exchanged_reward = problem.log_pi - problem.log_ref
    exo = expected_exo_rw_loss(
        exchanged_pi, problem.log_ref, exchanged_reward, k=problem.k, beta_pi=1.0, beta_r=1 / problem.beta_pi
    )
    assert_within(dpo - entropy, exo, order=0, spread=4 * spread_of(problem))


@given(problem=strategies.problems(holes=False))
def test_losses_are_not_negative_and_dpo_not_below_its_minimum(problem):
    tables, betas = (problem.log_ref, problem.reward), temperatures(problem)
    slack = PER_SPREAD[0] * max(10, spread_of(problem)) * 4
    assert (expected_exo_rw_loss(problem.log_pi, *tables, k=problem.k, **betas) >= -slack).all()
    log_pi_star, _ = optimal_policy(*tables, beta=problem.beta)
    least = expected_dpo_rw_loss(log_pi_star, *tables, k=problem.k, **betas)
    assert (expected_dpo_rw_loss(problem.log_pi, *tables, k=problem.k, **betas) >= least - slack).all()
    assert (least >= -slack).all()


@both
@given(problem=strategies.problems(), data=st.data())
def test_order_and_splitting_of_completions_do_not_matter(kind, problem, data):
    tables, betas = (problem.log_pi, problem.log_ref, problem.reward), temperatures(problem)
    value = EXPECTED[kind](*tables, k=problem.k, **betas)
    order = data.draw(st.permutations(range(problem.log_ref.shape[-1])))
    permuted = EXPECTED[kind](*(table[:, order] for table in tables), k=problem.k, **betas)
    assert_within(permuted, value, order=0, spread=spread_of(problem))
    # The first completion twice, each copy with half of both probabilities.
    halves = [torch.cat([table[:, :1], table], -1) for table in tables]
    for table in halves[:2]:
        table[:, :2] -= math.log(2)
    assert_within(EXPECTED[kind](*halves, k=problem.k, **betas), value, order=0, spread=spread_of(problem))


@both
@given(problem=strategies.problems(), factor=strategies.temperatures())
def test_only_the_reward_over_its_temperature_matters(kind, problem, factor):
    value = EXPECTED[kind](problem.log_pi, problem.log_ref, problem.reward, k=problem.k, **temperatures(problem))
    scaled = EXPECTED[kind](
        problem.log_pi,
        problem.log_ref,
        problem.reward * factor,
        k=problem.k,
        beta_pi=problem.beta_pi,
        beta_r=problem.beta_r * factor,
    )
    assert_within(scaled, value, order=0, spread=spread_of(problem))


@both
@given(problem=strategies.problems(), data=st.data())
def test_rewards_shifted_by_a_thousand_change_nothing(kind, problem, data):
    """Multiples of 1/1024, to which a thousand can be added without rounding: the same to the last bit."""
    reward = (problem.reward * 1024).round() / 1024
    shift = data.draw(st.sampled_from([1000.0, -1000.0]))
    tables, options = (problem.log_pi, problem.log_ref), {"k": problem.k, **temperatures(problem)}
    gradients = []
    for table in (reward, reward + shift):
        logits = problem.log_pi.clone().requires_grad_()
        value = EXPECTED[kind](logits.log_softmax(-1), problem.log_ref, table, **options)
        gradients.append((value.detach(), *torch.autograd.grad(value.sum(), logits)))
    for plain, shifted in zip(*gradients, strict=True):
        assert_close(shifted, plain)
    # Any other reward loses 1e-13 of itself when a thousand is added to it.
    assert_within(
        EXPECTED[kind](*tables, problem.reward + shift, **options),
        EXPECTED[kind](*tables, problem.reward, **options),
        order=0,
        spread=spread_of(problem) + 1000 / problem.beta_r,
    )


# Wide spreads


@both
@pytest.mark.parametrize("k", [1, 2, 64, 2**30])
@pytest.mark.parametrize("spread", [300.0, 3000.0])
def test_wide_spreads_are_finite_through_second_derivatives(kind, k, spread):
    generator = torch.Generator().manual_seed(7)
    log_ratio, reward = spread * (2 * torch.rand(2, 2, 5, generator=generator, dtype=torch.float64) - 1)
    log_ref, direction = torch.randn(2, 2, 5, generator=generator, dtype=torch.float64)
    free = [table.requires_grad_() for table in (log_ratio + log_ref, log_ref, reward)]
    value = EXPECTED[kind](
        free[0].log_softmax(-1), free[1].log_softmax(-1), free[2], k=k, beta_pi=1.0, beta_r=1.0
    ).sum()
    gradients = torch.autograd.grad(value, free, create_graph=True)
    second = torch.autograd.grad(sum((gradient * direction).sum() for gradient in gradients), free)
    assert all(result.isfinite().all() for result in (value, *gradients, *second))
    # K = 1 is 0 throughout; a sum over two candidates or more is of the size of the spread and of its gradient.
    assert (value > spread / 100) == (k > 1)
    assert (max(gradient.abs().max() for gradient in gradients) > 1e-3) == (k > 1)


# Zero reference entries


@both
@pytest.mark.parametrize("garbage", [math.nan, INF, -INF, 1e6])
@pytest.mark.parametrize("outside", [-INF, math.log(0.5)], ids=["no mass", "mass"])
def test_what_stands_where_the_reference_is_zero_changes_nothing(kind, garbage, outside):
    inside = [0, 1, 3, 4]
    expected = EXPECTED[kind](LOG_PI, LOG_REF, REWARD, k=7, **BETAS)
    log_pi, log_ref, reward = (torch.full((5,), fill, dtype=torch.float64) for fill in (outside, -INF, garbage))
    log_pi[inside] = LOG_PI + math.log1p(-math.exp(outside))
    log_ref[inside], reward[inside] = LOG_REF, REWARD
    free = [table.requires_grad_() for table in (log_pi, log_ref, reward)]
    value = EXPECTED[kind](*free, k=7, **BETAS)
    assert_close(value, expected)
    for gradient in torch.autograd.grad(value, free):
        assert gradient.isfinite().all()
        assert gradient[2].item() == 0.0
    coefficient = COEFFICIENT[kind](*free, **BETAS)
    assert_close(coefficient, COEFFICIENT[kind](LOG_PI, LOG_REF, REWARD, **BETAS))
    for gradient in torch.autograd.grad(coefficient, free):
        assert gradient.isfinite().all()
        assert gradient[2].item() == 0.0


@both
@pytest.mark.parametrize("beta_pi", [0.5, 1.0, 2.0])
def test_mass_outside_the_reference_is_never_drawn(kind, beta_pi):
    """The loss is that of the policy given the reference's support, and so is its coefficient, at any temperature."""
    log_ref = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64).log()
    log_pi = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    given_support = log_pi.masked_fill(log_ref == -INF, -INF).log_softmax(-1)
    for function in (lambda *tables: EXPECTED[kind](*tables, k=5, beta_pi=beta_pi, beta_r=1.0),
                     lambda *tables: COEFFICIENT[kind](*tables, beta_pi=beta_pi, beta_r=1.0)):  # fmt: skip
        assert_close(function(log_pi, log_ref, REWARD), function(given_support, log_ref, REWARD))


@both
def test_reference_probability_zero_is_the_limit_of_small_ones(kind):
    """A completion with pi = pi_ref = e^-3000 or 0: value, gradient and Hessian."""
    results = []
    for zero in (-INF, -3000.0):
        log_pi, log_ref = torch.tensor([[[0.3, 0.0, 1.0]], [[-0.2, 0.0, 0.4]]], dtype=torch.float64)
        log_pi[0, 1] = log_ref[0, 1] = zero
        reward = torch.tensor([[0.5, 2.0, -1.0]], dtype=torch.float64)
        results.append(
            derivatives(lambda *t: EXPECTED[kind](*t, k=4, beta_pi=0.7, beta_r=0.9), log_pi, log_ref, reward)
        )
    for at_zero, near in zip(*results, strict=True):
        assert at_zero.isfinite().all()
        assert_close(at_zero, near)
    assert results[0][1].abs().max() > 0.01


# Shapes, dtypes, batches


@both
@given(problem=strategies.problems(holes=False))
def test_a_batch_of_prompts_is_its_rows_one_by_one(kind, problem):
    tables, options = (problem.log_pi, problem.log_ref, problem.reward), {"k": problem.k, **temperatures(problem)}
    value = EXPECTED[kind](*tables, **options)
    rows = torch.stack([EXPECTED[kind](*row, **options) for row in zip(*tables, strict=True)])
    assert_within(value, rows, order=0, spread=spread_of(problem))
    deeper = EXPECTED[kind](*(table[None, :, None] for table in tables), **options)
    assert_within(deeper, value[None, :, None], order=0, spread=spread_of(problem))
    coefficient = COEFFICIENT[kind](*tables, **temperatures(problem))
    rows = torch.stack([COEFFICIENT[kind](*row, **temperatures(problem)) for row in zip(*tables, strict=True)])
    assert_close(coefficient, rows)


@both
@given(problem=strategies.problems(), data=st.data())
def test_prompts_share_tables(kind, problem, data):
    tables, betas = (problem.log_pi, problem.log_ref, problem.reward), temperatures(problem)
    shared = data.draw(st.sets(st.sampled_from(range(3)), min_size=1, max_size=2))
    some = [table[0] if index in shared else table for index, table in enumerate(tables)]
    expanded = [table[:1].expand_as(table) if index in shared else table for index, table in enumerate(tables)]
    bound = spread_of(problem) + 40 * (problem.beta_pi + 1)
    value = EXPECTED[kind](*some, k=problem.k, **betas)
    assert value.shape == problem.log_pi.shape[:1]
    assert_within(value, EXPECTED[kind](*expanded, k=problem.k, **betas), order=0, spread=bound)
    torch.testing.assert_close(
        COEFFICIENT[kind](*some, **betas), COEFFICIENT[kind](*expanded, **betas), rtol=1e-12, atol=0
    )


@both
def test_gradients_of_shared_tables_are_summed_over_prompts(kind):
    rewards = torch.stack([REWARD, REWARD.flip(0), REWARD**2])
    shared = LOG_PI.clone().requires_grad_()
    (ours,) = torch.autograd.grad(EXPECTED[kind](shared.log_softmax(-1), LOG_REF, rewards, k=6, **BETAS).sum(), shared)
    rows = [EXPECTED[kind](shared.log_softmax(-1), LOG_REF, reward, k=6, **BETAS) for reward in rewards]
    assert_close(ours, torch.autograd.grad(sum(rows), shared)[0])


@both
def test_float32_inputs_are_computed_in_float64(kind):
    tables = [table.float() for table in (LOG_PI, LOG_REF, REWARD)]
    for function in (lambda *t: EXPECTED[kind](*t, k=3, **BETAS), lambda *t: COEFFICIENT[kind](*t, **BETAS)):
        value = function(*tables)
        assert value.dtype == torch.float64
        assert_close(value, function(*(table.double() for table in tables)))


@both
@pytest.mark.parametrize("k", [1, 2, 100, 2**30])
def test_gradcheck_and_gradgradcheck(kind, k):
    generator = torch.Generator().manual_seed(2)
    tables = [table.requires_grad_() for table in torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)]

    def function(pi: Tensor, ref: Tensor, reward: Tensor) -> Tensor:
        return EXPECTED[kind](pi.log_softmax(-1), ref.log_softmax(-1), reward, k=k, beta_pi=0.7, beta_r=1.3)

    assert torch.autograd.gradcheck(function, tables)
    assert torch.autograd.gradgradcheck(function, tables)


# Large K and the coefficient of 1/K


def limit(kind: str, problem: Problem) -> Tensor:
    """What the expected loss tends to; less log K for DPO."""
    tables, betas = (problem.log_pi, problem.log_ref, problem.reward), temperatures(problem)
    if kind == "exo":
        return kl_policy_to_optimal(*tables, **betas)
    log_pi_star, _ = optimal_policy(problem.log_ref, problem.reward, beta=problem.beta_r)
    reference = kl_optimal_to_policy(problem.log_ref, problem.log_ref, problem.reward, **betas)
    assert log_pi_star.shape == problem.log_pi.shape
    return kl_optimal_to_policy(*tables, **betas) - reference


def bias(kind: str, problem: Problem, k: int) -> Tensor:
    tables = (problem.log_pi, problem.log_ref, problem.reward)
    value = EXPECTED[kind](*tables, k=k, **temperatures(problem)) - limit(kind, problem)
    return value - math.log(k) if kind == "dpo" else value


def coefficient_by_moments(kind: str, log_pi: list, log_ref: list, reward: list, beta_pi: float, beta_r: float):
    """The delta method with unnormalised weights and moments about their means, over Python floats."""
    p = [math.exp(lr) for lr in log_ref]
    f = [beta_pi * (lp - lr) for lp, lr in zip(log_pi, log_ref, strict=True)]
    s = [r / beta_r for r in reward]

    def mean(values: list[float]) -> float:
        return math.fsum(a * b for a, b in zip(p, values, strict=True))

    def moments(log_w: list[float], g: list[float]) -> tuple[float, float]:
        """var(w) / mu^2 and the 1/K term of E[sum w g / S] with its sign turned."""
        w = [math.exp(x - max(log_w)) for x in log_w]
        mu, nu = mean(w), mean([a * b for a, b in zip(w, g, strict=True)])
        variance = mean([(a - mu) ** 2 for a in w])
        covariance = mean([(a * b - nu) * (a - mu) for a, b in zip(w, g, strict=True)])
        return variance / mu**2, covariance / mu**2 - nu * variance / mu**3

    if kind == "exo":
        relative_w, ratio = moments(f, [a - b for a, b in zip(f, s, strict=True)])
        relative_v, _ = moments(s, s)
        return -ratio + relative_w / 2 - relative_v / 2
    relative_w, _ = moments(f, f)
    _, ratio = moments(s, f)
    return ratio - relative_w / 2


@both
@given(problem=strategies.problems(spread=3.0))
def test_coefficient_agrees_with_moments_of_the_weights(kind, problem):
    tables = (problem.log_pi, problem.log_ref, problem.reward)
    expected = [
        coefficient_by_moments(kind, *row, problem.beta_pi, problem.beta_r)
        for row in zip(*(table.tolist() for table in tables), strict=True)
    ]
    coefficient = COEFFICIENT[kind](*tables, **temperatures(problem))
    # Squares of density ratios, whose parts cancel: relative to the largest of them.
    squares = (2 * (problem.beta_pi * (problem.log_pi - problem.log_ref)).abs().amax(-1)).exp()
    squares = squares + 1 / problem.log_ref.exp().amin(-1)
    error = (coefficient - torch.tensor(expected, dtype=torch.float64)).abs()
    assert (error <= 1e-12 * squares).all()


SMOOTH = strategies.problems(spread=0.5)
"""Tables close enough to uniform that the series in 1/K is good from K = 2^6 on; the rewards are scaled below."""


def smooth(problem: Problem) -> Problem:
    return dataclasses.replace(
        problem, reward=problem.reward / 10, beta_r=max(problem.beta_r, 0.5), beta_pi=min(problem.beta_pi, 2.0)
    )


def richardson(kind: str, problem: Problem, k: int) -> Tensor:
    """2 b(2K) - b(K), b(K) = K * bias."""
    return 2 * (2 * k) * bias(kind, problem, 2 * k) - k * bias(kind, problem, k)


def assert_falls_as_inverse_square(error: Callable[[int], float]) -> None:
    """The error at 2^10 lies under c / K^2, with c four times what it is at small K; below 1e-10 there is rounding.

    Three small K, because the error may cross zero at one of them.
    """
    envelope = max(k**2 * error(k) for k in (2**5, 2**6, 2**7))
    assert error(2**10) <= 4 * envelope / 2**20 + 1e-10
    # And far below what a wrong coefficient is off by, a tenth and more; an envelope from small K could be anything.
    assert error(2**10) <= 1e-3


@both
@given(problem=SMOOTH)
def test_coefficient_is_the_limit_of_k_times_the_bias(kind, problem):
    """Extrapolated once the error is O(K^-2)."""
    problem = smooth(problem)
    coefficient = COEFFICIENT[kind](problem.log_pi, problem.log_ref, problem.reward, **temperatures(problem))
    assert_falls_as_inverse_square(lambda k: (richardson(kind, problem, k) - coefficient).abs().max().item())


@both
def test_no_other_coefficient_will_do(kind):
    """The test above with a coefficient for other temperatures: off by a tenth and more."""
    problem = Problem(LOG_PI[None], LOG_REF[None], REWARD[None], 0.5, 1.0, 2)
    extrapolated = richardson(kind, problem, 2**10).item()
    coefficient = COEFFICIENT[kind](LOG_PI, LOG_REF, REWARD, **BETAS).item()
    assert extrapolated == pytest.approx(coefficient, rel=1e-4)
    for betas in ({"beta_pi": 0.6, "beta_r": 1.0}, {"beta_pi": 0.5, "beta_r": 1.2}):
        assert abs(COEFFICIENT[kind](LOG_PI, LOG_REF, REWARD, **betas).item() - extrapolated) > 0.05 * abs(extrapolated)


@both
@given(problem=SMOOTH)
def test_at_two_to_the_thirty_the_loss_is_its_limit_and_the_coefficient(kind, problem):
    problem = smooth(problem)
    coefficient = COEFFICIENT[kind](problem.log_pi, problem.log_ref, problem.reward, **temperatures(problem))
    torch.testing.assert_close(bias(kind, problem, 2**30), coefficient / 2**30, rtol=0, atol=2e-13)
    # At 2^17 the coefficient shows in the sixth digit and the next one, c'/K^2, not above 1e-10.
    torch.testing.assert_close(bias(kind, problem, 2**17), coefficient / 2**17, rtol=0, atol=1e-9)


@both
@given(problem=SMOOTH)
def test_gradient_of_the_coefficient_is_the_coefficient_of_the_gradient(kind, problem):
    problem = smooth(problem)
    logits = problem.log_pi.clone().requires_grad_()

    def at(log_pi: Tensor) -> Problem:
        return Problem(log_pi, problem.log_ref, problem.reward, problem.beta_pi, problem.beta_r, 2)

    coefficient = COEFFICIENT[kind](logits.log_softmax(-1), problem.log_ref, problem.reward, **temperatures(problem))
    (expected,) = torch.autograd.grad(coefficient.sum(), logits)

    def error(k: int) -> float:
        (gradient,) = torch.autograd.grad(richardson(kind, at(logits.log_softmax(-1)), k).sum(), logits)
        return (gradient - expected).abs().max().item()

    assert_falls_as_inverse_square(error)


@both
def test_coefficient_gradcheck(kind):
    generator = torch.Generator().manual_seed(4)
    tables = [table.requires_grad_() for table in torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)]

    def function(pi: Tensor, ref: Tensor, reward: Tensor) -> Tensor:
        return COEFFICIENT[kind](pi.log_softmax(-1), ref.log_softmax(-1), reward, beta_pi=0.7, beta_r=1.3)

    assert torch.autograd.gradcheck(function, tables)
    assert torch.autograd.gradgradcheck(function, tables)


# Errors


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


@pytest.mark.unchecked
@both
@pytest.mark.parametrize("bad", [0, -1, 2.0, "2", True, None, torch.tensor(2)], ids=str)
def test_k_must_be_a_positive_integer(kind, bad):
    message = message_of(lambda: EXPECTED[kind](LOG_PI, LOG_REF, REWARD, k=bad, **BETAS))
    assert message == f"k must be an integer of at least 1; got {bad!r}"


FUNCTIONS = {
    **{f"expected {kind}": lambda *t, kind=kind, **b: EXPECTED[kind](*t, k=2, **b) for kind in EXPECTED},
    **{f"coefficient {kind}": lambda *t, kind=kind, **b: COEFFICIENT[kind](*t, **b) for kind in EXPECTED},
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.mark.unchecked
@each_function
@pytest.mark.parametrize("bad", [0, -0.1, math.nan, INF, "1", True, torch.tensor(1.0)], ids=str)
def test_temperatures_must_be_positive_numbers(name, bad):
    for argument in BETAS:
        message = message_of(
            lambda argument=argument: FUNCTIONS[name](LOG_PI, LOG_REF, REWARD, **{**BETAS, argument: bad})
        )
        assert message.startswith(f"{argument} must be a finite number above 0") and repr(bad) in message


@pytest.mark.unchecked
@each_function
def test_bad_tables_are_refused_by_name(name):
    def call(log_pi: Tensor, log_ref: Tensor, reward: Tensor) -> str:
        return message_of(lambda: FUNCTIONS[name](log_pi, log_ref, reward, **BETAS))

    words = "must hold normalised log-probabilities"
    assert call(torch.zeros(4), LOG_REF, REWARD).startswith(f"log_pi {words}")
    assert call(LOG_PI, LOG_REF + 0.01, REWARD).startswith(f"log_ref {words}")
    assert call(LOG_PI * math.nan, LOG_REF, REWARD).startswith(f"log_pi {words}")
    zero = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64).log()
    assert call(zero, LOG_REF, REWARD) == "log_pi must be finite where log_ref is; got -inf at index [2]"
    for bad in (math.nan, INF, -INF):
        reward = REWARD.clone()
        reward[1] = bad
        assert call(LOG_PI, LOG_REF, reward) == f"reward must be finite where log_ref is; got {bad} at index [1]"
    assert call(LOG_PI, LOG_REF[:3], REWARD).startswith("log_ref must have as many completions")
    assert call(LOG_PI, LOG_REF, REWARD[:3]).startswith("reward must have as many completions")
    words = "reward must have the leading dimensions of log_pi, [2], or none; got shape [3, 4]"
    assert call(LOG_PI.expand(2, 4), LOG_REF, REWARD.expand(3, 4)) == words
    assert call(LOG_PI, LOG_REF, REWARD.long()) == "reward must have a floating-point dtype; got torch.int64"
    assert call(LOG_PI, LOG_REF, REWARD.tolist()) == "reward must be a torch.Tensor; got list"


@pytest.mark.unchecked
@both
@pytest.mark.parametrize(("name", "beta_pi", "beta_r"), [("beta_pi", 1e9, 1.0), ("beta_r", 1.0, 1e-9)])
def test_spreads_beyond_the_quadrature_are_refused(kind, name, beta_pi, beta_r):
    with pytest.raises(ValueError, match=f"^{name} must leave the .* spread over at most 1e\\+05 nats"):
        EXPECTED[kind](LOG_PI, LOG_REF, REWARD, k=4, beta_pi=beta_pi, beta_r=beta_r)


@pytest.mark.unchecked
def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match=r"log_pi must be a table .* got shape \[0, 4\]"):
        expected_exo_rw_loss(LOG_PI.expand(0, 4), LOG_REF, REWARD, k=4, **BETAS)
