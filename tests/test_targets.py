"""Optimal, tempered and best-of-n policies: oracle, laws, limits, gradients, errors."""

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.divergences import kl_divergence
from exo_toy.targets import best_of_n, optimal_policy, tempered_policy
from tests import oracles, strategies
from tests.families import FAMILIES
from tests.strategies import Problem
from tests.tolerances import assert_close

INF = math.inf
LOG_REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
LOG_PI = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
REWARD = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)


def log_table(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def softmax_reward(problem: Problem) -> float:
    """The largest number that enters pi*."""
    finite = problem.reward[problem.reward.isfinite()]
    return 1.0 + finite.abs().max().item() / problem.beta * 1e-2


# The optimal policy


@given(problem=strategies.problems(holes=True))
def test_optimal_policy_agrees_with_the_oracle(device, problem):
    problem = problem.to(device)
    log_pi_star, log_z = optimal_policy(problem.log_ref, problem.reward, beta=problem.beta)
    for x, (log_ref, reward) in enumerate(zip(problem.log_ref.tolist(), problem.reward.tolist(), strict=True)):
        expected, expected_log_z = oracles.optimal_policy(log_ref, reward, problem.beta)
        assert_close(log_pi_star[x], expected, scale=softmax_reward(problem))
        assert_close(log_z[x], expected_log_z, scale=softmax_reward(problem))


@pytest.mark.parametrize("family", FAMILIES)
def test_optimal_policy_of_problems_with_a_known_answer(family):
    solved = family()
    log_pi_star, log_z = optimal_policy(solved.log_ref, solved.reward, beta=solved.beta)
    assert_close(log_pi_star, solved.log_pi_star)
    assert_close(log_z, solved.log_z)


def test_optimal_policy_of_the_worked_example():
    log_pi_star, log_z = optimal_policy(LOG_REF, REWARD, beta=0.5)
    assert log_z.item() == pytest.approx(3.9867449896272564, rel=1e-15)
    assert log_pi_star.exp().tolist() == pytest.approx([0.00742401, 0.04114233, 0.20266865, 0.74876501], abs=5e-9)
    log_pi_star, log_z = optimal_policy(LOG_REF, REWARD, beta=1)
    assert log_z.item() == pytest.approx(1.5479559335786868, rel=1e-15)
    assert log_pi_star.exp().tolist() == pytest.approx([0.08507291, 0.17343910, 0.31430424, 0.42718375], abs=5e-9)


@given(problem=strategies.problems(), constant=st.floats(-1000.0, 1000.0))
def test_a_constant_in_the_reward_moves_log_z_alone(problem, constant):
    log_pi_star, log_z = optimal_policy(problem.log_ref, problem.reward, beta=problem.beta)
    shifted, shifted_log_z = optimal_policy(problem.log_ref, problem.reward + constant, beta=problem.beta)
    # Rewards of 1000 over beta are known to 1e-16 of themselves.
    scale = 1 + 1e-3 * abs(constant) / problem.beta
    assert_close(shifted, log_pi_star, scale=scale)
    assert_close(shifted_log_z, log_z + constant / problem.beta, scale=scale)


def test_optimal_policy_in_the_limits_of_beta():
    log_pi_star, _ = optimal_policy(LOG_REF, REWARD, beta=1e-6)
    assert_close(log_pi_star.exp(), [0.0, 0.0, 0.0, 1.0])
    log_pi_star, log_z = optimal_policy(LOG_REF, REWARD, beta=1e15)
    assert_close(log_pi_star, LOG_REF)
    assert_close(log_z, 0.0)


def test_forbidden_and_impossible_completions_get_probability_zero():
    log_pi_star, log_z = optimal_policy(log_table(0.5, 0.25, 0.0, 0.25), torch.tensor([0.0, -INF, 5.0, 1.0]), beta=1.0)
    assert log_pi_star[1].item() == log_pi_star[2].item() == -INF
    assert_close(log_z, math.log(0.5 + 0.25 * math.e))
    assert_close(log_pi_star.exp().sum(), 1.0)


def weighted(table: Tensor) -> Tensor:
    """A function of the finite entries of a log-table, for derivatives."""
    weights = torch.tensor([0.3, -1.1, 0.8, 0.4], dtype=torch.float64)
    return (weights * table.exp()).sum(-1)


def derivatives(function: Callable[..., Tensor], *arguments: Tensor) -> tuple[Tensor, ...]:
    """Value, gradients and one second derivative of ``weighted(function(log_softmax(...), ...))``."""
    free = [argument.clone().requires_grad_() for argument in arguments]
    value = weighted(function(*free))
    gradients = torch.autograd.grad(value, free, create_graph=True)
    weights = torch.tensor([0.5, 0.1, -0.9, 0.7], dtype=torch.float64)
    second = torch.autograd.grad(sum((gradient * weights).sum() for gradient in gradients), free)
    return value.detach(), *(gradient.detach() for gradient in gradients), *second


def from_logits(function: Callable[..., Tensor], tables: int, **kwargs: object) -> Callable[..., Tensor]:
    """The function with its first ``tables`` arguments passed through log_softmax."""

    def call(*arguments: Tensor) -> Tensor:
        result = function(*(a.log_softmax(-1) for a in arguments[:tables]), *arguments[tables:], **kwargs)
        return result[0] if isinstance(result, tuple) else result

    return call


LOGITS = torch.tensor([0.3, -0.4, 1.0, 0.2], dtype=torch.float64)
OTHER_LOGITS = torch.tensor([-0.5, 0.7, 0.1, 0.9], dtype=torch.float64)
CASES = {
    "optimal": (from_logits(optimal_policy, 1, beta=0.7), (LOGITS, REWARD)),
    "tempered below 1": (from_logits(tempered_policy, 2, beta_pi=0.6), (LOGITS, OTHER_LOGITS)),
    "tempered at 1": (from_logits(tempered_policy, 1, log_ref=LOG_REF, beta_pi=1.0), (LOGITS,)),
    "tempered above 1": (from_logits(tempered_policy, 2, beta_pi=1.7), (LOGITS, OTHER_LOGITS)),
}


@pytest.mark.parametrize("case", CASES)
def test_gradcheck_and_gradgradcheck(case):
    function, arguments = CASES[case]
    arguments = [argument.clone().requires_grad_() for argument in arguments]
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize(
    ("case", "zeros"),
    [
        ("optimal", (0,)),
        ("optimal", (1,)),
        ("optimal", (0, 1)),
        ("tempered below 1", (0,)),
        ("tempered below 1", (1,)),
        ("tempered below 1", (0, 1)),
        ("tempered at 1", (0,)),
        ("tempered above 1", (0,)),
    ],
)
def test_probability_zero_is_the_limit_of_small_probabilities(case, zeros):
    function, arguments = CASES[case]
    results = []
    for zero in (-INF, -3000.0):
        at = [argument.clone() for argument in arguments]
        for index in zeros:
            at[index][1] = zero
        results.append(derivatives(function, *at))
    assert results[0][0].abs() > 0.01
    for at_zero, near in zip(*results, strict=True):
        assert at_zero.isfinite().all()
        assert_close(at_zero, near)


# The tempered policy


@given(problem=strategies.problems(holes=True))
def test_tempered_policy_agrees_with_the_oracle(device, problem):
    problem = problem.to(device)
    log_tempered = tempered_policy(problem.log_pi, problem.log_ref, beta_pi=problem.beta_pi)
    for x, (log_pi, log_ref) in enumerate(zip(problem.log_pi.tolist(), problem.log_ref.tolist(), strict=True)):
        assert_close(log_tempered[x], oracles.tempered_policy(log_pi, log_ref, problem.beta_pi), scale=10.0)


def test_tempered_policy_of_the_worked_example():
    tempered = tempered_policy(LOG_PI, LOG_REF, beta_pi=0.5).exp()
    assert tempered.tolist() == pytest.approx([0.22474487, 0.27525513, 0.27525513, 0.22474487], abs=5e-9)


@given(problem=strategies.problems(holes=True), other=strategies.temperatures(0.2, 3.0))
def test_temperatures_multiply(problem, other):
    once = tempered_policy(problem.log_pi, problem.log_ref, beta_pi=problem.beta_pi)
    twice = tempered_policy(once, problem.log_ref, beta_pi=other)
    assert_close(twice, tempered_policy(problem.log_pi, problem.log_ref, beta_pi=other * problem.beta_pi), scale=100.0)


@given(problem=strategies.problems(holes=True))
def test_tempering_by_one_is_the_policy_and_tempering_the_reference_the_reference(problem):
    assert_close(tempered_policy(problem.log_pi, problem.log_ref, beta_pi=1), problem.log_pi)
    tempered = tempered_policy(problem.log_ref, problem.log_ref, beta_pi=problem.beta_pi)
    assert_close(tempered, problem.log_ref)


@given(problem=strategies.problems(holes=True))
def test_tempering_the_optimal_policy_divides_beta(problem):
    log_pi_star, _ = optimal_policy(problem.log_ref, problem.reward, beta=problem.beta)
    tempered = tempered_policy(log_pi_star, problem.log_ref, beta_pi=problem.beta_pi)
    expected, _ = optimal_policy(problem.log_ref, problem.reward, beta=problem.beta_r)
    assert_close(tempered, expected, scale=10 * softmax_reward(problem))


def test_supports_of_the_tempered_policy():
    log_pi, log_ref = log_table(0.5, 0.5, 0.0, 0.0), log_table(0.5, 0.0, 0.5, 0.0)
    assert tempered_policy(log_pi, log_ref, beta_pi=0.5).exp().tolist() == [1.0, 0.0, 0.0, 0.0]
    assert_close(tempered_policy(log_pi, log_ref, beta_pi=1).exp(), [0.5, 0.5, 0.0, 0.0])


# Best of n


@given(problem=strategies.problems(n=st.integers(2, 4), holes=True), n=st.integers(1, 5), data=st.data())
def test_best_of_n_goes_through_all_draws(device, problem, n, data):
    """Against brute force, with ties: rewards rounded to integers, so that most tables have some."""
    problem = problem.to(device)
    reward = (problem.reward / 3).round()
    log_best = best_of_n(problem.log_ref, reward, n=n)
    for x, (log_ref, rewards) in enumerate(zip(problem.log_ref.tolist(), reward.tolist(), strict=True)):
        assert_close(log_best[x].exp(), oracles.best_of_n(log_ref, rewards, n))


def test_best_of_n_of_the_worked_example():
    assert_close(best_of_n(LOG_REF, REWARD, n=2).exp(), [0.16, 0.33, 0.32, 0.19])
    assert_close(best_of_n(LOG_REF, REWARD, n=4).exp(), [0.0256, 0.2145, 0.4160, 0.3439])
    assert kl_divergence(best_of_n(LOG_REF, REWARD, n=2), LOG_REF).item() == pytest.approx(
        0.1571992419669525, rel=1e-13
    )
    assert kl_divergence(best_of_n(LOG_REF, REWARD, n=4), LOG_REF).item() == pytest.approx(
        0.5871136671886619, rel=1e-13
    )


@given(problem=strategies.problems(holes=True), n=st.integers(2, 10**6))
def test_best_of_n_is_normalised_bounded_and_better(problem, n):
    log_best = best_of_n(problem.log_ref, problem.reward, n=n)
    assert not log_best.isnan().any()
    assert torch.equal(log_best == -INF, problem.log_ref == -INF)
    # n times the rounding of a cumulative probability.
    torch.testing.assert_close(
        log_best.exp().sum(-1), torch.ones(len(log_best)).double(), rtol=0, atol=1e-15 * n + 1e-12
    )
    assert (kl_divergence(log_best, problem.log_ref) <= math.log(n) - (n - 1) / n + 1e-15 * n + 1e-12).all()


@given(problem=strategies.problems(holes=True))
def test_best_of_one_is_the_reference_itself(problem):
    assert_close(best_of_n(problem.log_ref, problem.reward, n=1), problem.log_ref)


def test_equal_rewards_leave_the_reference():
    assert_close(best_of_n(LOG_REF, torch.full((4,), 2.5), n=10**6), LOG_REF)


def exact_best_of_n(tail: list[str], n: int) -> list[float]:
    """At 60 digits, for distinct increasing rewards; masses of all completions but the first, which has the rest."""
    with mpmath.workdps(60):
        masses = [mpmath.mpf(mass) for mass in tail]
        masses = [1 - mpmath.fsum(masses), *masses]
        above = [mpmath.fsum(masses[y + 1 :]) for y in range(len(masses))]
        at_most = [1 - value for value in above]
        below = [mpmath.mpf(0), *at_most[:-1]]
        return [float(mpmath.log(high**n - low**n)) for high, low in zip(at_most, below, strict=True)]


@pytest.mark.parametrize("n", [2, 1000, 10**6])
@pytest.mark.parametrize(
    "tail",
    [["1e-10", "6.3e-16"], ["1e-3", "1e-18", "1e-25"], ["0.4", "1e-12", "1e-30"], ["1e-8", "0.5", "1e-20"]],
    ids=str,
)
def test_best_of_n_keeps_the_digits_that_a_difference_of_powers_loses(tail, n):
    masses = torch.tensor([float(mass) for mass in tail], dtype=torch.float64)
    log_ref = torch.cat([torch.log1p(-masses.sum()).reshape(1), masses.log()])
    log_best = best_of_n(log_ref, torch.arange(len(log_ref)).double(), n=n)
    expected = torch.tensor(exact_best_of_n(tail, n), dtype=torch.float64)
    torch.testing.assert_close(log_best, expected, rtol=1e-12, atol=1e-14)
    # The plain difference is wrong by more than a thousandth, or zero, somewhere in these tables.
    at_most = log_ref.exp().cumsum(0)
    plain = at_most**n - torch.cat([torch.zeros(1), at_most[:-1]]) ** n
    assert ((plain / expected.exp().clamp(min=1e-300) - 1).abs() > 1e-5).any() or n == 2


def test_best_of_n_of_probabilities_that_underflow():
    """e^-800 in the middle: its mass is n F^(n-1) times it; at the bottom: below e^-708 n, but not NaN."""
    log_ref = torch.tensor([math.log(0.5), -800.0, math.log(0.5)], dtype=torch.float64)
    log_best = best_of_n(log_ref, REWARD[:3], n=3)
    assert_close(log_best, [math.log(1 / 8), -800 + math.log(3 / 4), math.log(7 / 8)])
    log_best = best_of_n(log_ref, torch.tensor([1.0, 0.0, 2.0]), n=3)
    assert_close(log_best[[0, 2]], [math.log(1 / 8), math.log(7 / 8)])
    assert -INF <= log_best[1].item() < -2000


def test_forbidden_completions_are_the_worst_of_n():
    log_best = best_of_n(log_table(0.5, 0.25, 0.25), torch.tensor([-INF, 0.0, -INF]), n=2)
    assert_close(log_best.exp(), [0.5625 * 2 / 3, 1 - 0.5625, 0.5625 / 3])


@pytest.mark.parametrize("n", [1, 2, 7])
def test_best_of_n_gradcheck(n):
    reward = torch.tensor([1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    logits = torch.stack([LOGITS, OTHER_LOGITS]).requires_grad_()
    function = from_logits(best_of_n, 1, reward=reward, n=n)
    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)


@pytest.mark.parametrize("zero_at", [0, 1, 3], ids=["alone lowest", "tied", "alone highest"])
def test_best_of_n_at_probability_zero_is_the_limit(zero_at):
    reward = torch.tensor([0.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    results = []
    for zero in (-INF, -3000.0):
        logits = LOGITS.clone()
        logits[zero_at] = zero
        results.append(derivatives(from_logits(best_of_n, 1, reward=reward, n=3), logits))
    assert results[0][0].abs() > 0.01
    for at_zero, near in zip(*results, strict=True):
        assert at_zero.isfinite().all()
        assert_close(at_zero, near)


# Shapes and dtypes


@given(problem=strategies.problems(holes=True))
def test_a_table_is_shared_by_prompts(problem):
    # Supports may differ between prompts: temper below 1, where that is allowed.
    beta_pi = min(problem.beta_pi, 0.9)
    log_ref, log_pi, reward = problem.log_ref, problem.log_pi, problem.reward.clamp(min=-100)
    log_pi = torch.logaddexp(log_pi, log_ref) - math.log(2)

    def same(table: Tensor) -> Tensor:
        return table[:1].expand(len(log_ref), -1)

    for shared, expanded in [
        (optimal_policy(log_ref[0], reward, beta=1.0)[0], optimal_policy(same(log_ref), reward, beta=1.0)[0]),
        (optimal_policy(log_ref, reward[0], beta=1.0)[1], optimal_policy(log_ref, same(reward), beta=1.0)[1]),
        (best_of_n(log_ref[0], reward, n=3), best_of_n(same(log_ref), reward, n=3)),
        (best_of_n(log_ref, reward[0], n=3), best_of_n(log_ref, same(reward), n=3)),
        (tempered_policy(log_pi[0], log_ref[0], beta_pi=beta_pi), tempered_policy(log_pi, log_ref, beta_pi=beta_pi)[0]),
    ]:
        assert_close(shared, expanded)
    mixed = (log_ref.exp() / 2 + 0.5 / log_ref.shape[-1]).log()
    shared, expanded = tempered_policy(log_pi, mixed[0], beta_pi=2), tempered_policy(log_pi, same(mixed), beta_pi=2)
    assert_close(shared, expanded)
    assert optimal_policy(log_ref[0], reward[0], beta=1.0)[1].shape == ()


def test_float32_inputs_are_computed_in_float64():
    log_ref, log_pi, reward = LOG_REF.float(), LOG_PI.float(), REWARD.float()
    for function in (
        lambda ref, pi, r: optimal_policy(ref, r, beta=0.5)[0],
        lambda ref, pi, r: optimal_policy(ref, r, beta=0.5)[1],
        lambda ref, pi, r: tempered_policy(pi, ref, beta_pi=0.5),
        lambda ref, pi, r: best_of_n(ref, r, n=3),
    ):
        value = function(log_ref, log_pi, reward)
        assert value.dtype == torch.float64
        assert_close(value, function(log_ref.double(), log_pi.double(), reward.double()))


def test_arguments_are_left_alone():
    tables = [LOG_REF.clone(), LOG_PI.clone(), REWARD.clone()]
    optimal_policy(tables[0], tables[2], beta=0.5)
    tempered_policy(tables[1], tables[0], beta_pi=0.5)
    best_of_n(tables[0], tables[2], n=3)
    assert all(torch.equal(table, kept) for table, kept in zip(tables, (LOG_REF, LOG_PI, REWARD), strict=True))


# Errors


@pytest.mark.unchecked
@pytest.mark.parametrize("bad", [0, 0.0, -1.0, math.nan, INF, "1", True, None, torch.tensor(1.0)], ids=str)
def test_temperatures_must_be_positive_numbers(bad):
    message = message_of(lambda: optimal_policy(LOG_REF, REWARD, beta=bad))
    assert message.startswith("beta must be a finite number above 0") and repr(bad) in message
    message = message_of(lambda: tempered_policy(LOG_PI, LOG_REF, beta_pi=bad))
    assert message.startswith("beta_pi must be a finite number above 0") and repr(bad) in message


@pytest.mark.unchecked
@pytest.mark.parametrize("bad", [0, -3, 2.0, True, "2", None])
def test_n_must_be_a_positive_integer(bad):
    message = message_of(lambda: best_of_n(LOG_REF, REWARD, n=bad))
    assert message == f"n must be an integer of at least 1; got {bad!r}"


@pytest.mark.unchecked
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_rewards_must_be_finite_or_minus_infinity(bad):
    reward = REWARD.clone()
    reward[2] = bad
    for call in (lambda: optimal_policy(LOG_REF, reward, beta=1.0), lambda: best_of_n(LOG_REF, reward, n=2)):
        assert message_of(call) == f"reward must be finite, or -inf for a forbidden completion; got {bad} at index [2]"


@pytest.mark.unchecked
def test_a_row_without_an_allowed_completion_is_refused():
    log_ref = torch.stack([LOG_REF, log_table(0.5, 0.5, 0.0, 0.0)])
    reward = torch.tensor([-INF, -INF, 0.0, 0.0])
    message = message_of(lambda: optimal_policy(log_ref, reward, beta=1.0))
    assert message.startswith("reward must be above -inf for a completion of positive reference probability")
    best_of_n(log_ref, reward, n=2)


@pytest.mark.unchecked
def test_supports_that_cannot_be_tempered_are_refused():
    first, second = log_table(1.0, 0.0), log_table(0.0, 1.0)
    message = message_of(lambda: tempered_policy(first, second, beta_pi=0.5))
    assert message == "log_pi must be above -inf on a completion where log_ref is; got disjoint supports"
    message = message_of(lambda: tempered_policy(log_table(0.5, 0.5), second, beta_pi=1.5))
    assert message.startswith("log_pi must be -inf where log_ref is; got -0.69") and message.endswith("at index [0]")


@pytest.mark.unchecked
def test_tables_are_checked_by_name():
    logits, short, batch = torch.zeros(4), LOG_REF[:3], LOG_REF.expand(3, 4)
    words = "must hold normalised log-probabilities"
    assert f"log_ref {words}" in message_of(lambda: optimal_policy(logits, REWARD, beta=1.0))
    assert f"log_ref {words}" in message_of(lambda: best_of_n(logits, REWARD, n=2))
    assert f"log_pi {words}" in message_of(lambda: tempered_policy(logits, LOG_REF, beta_pi=1.0))
    assert f"log_ref {words}" in message_of(lambda: tempered_policy(LOG_PI, logits, beta_pi=1.0))
    words = "reward must have as many completions (last dimension) as log_ref, 4; got shape [3]"
    assert message_of(lambda: optimal_policy(LOG_REF, short, beta=1.0)) == words
    words = "reward must have the leading dimensions of log_ref, [3], or none; got shape [2, 4]"
    assert message_of(lambda: optimal_policy(batch, REWARD.expand(2, 4), beta=1.0)) == words
    words = "reward must have a floating-point dtype; got torch.int64"
    assert message_of(lambda: best_of_n(LOG_REF, REWARD.long(), n=2)) == words


def test_a_shift_of_the_rewards_moves_log_z_alone():
    generator = torch.Generator().manual_seed(0)
    log_ref = torch.randn(5, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    # Multiples of 2^-20: adding a million to them rounds nothing.
    reward = torch.randint(-(2**20), 2**20, (5, 7), generator=generator).double() / 2**20
    for beta in (0.001, 0.1, 10.0):
        log_pi, log_z = optimal_policy(log_ref, reward, beta=beta)
        for shift in (1000.0, 2.0**20):
            shifted_pi, shifted_z = optimal_policy(log_ref, reward + shift, beta=beta)
            assert torch.equal(shifted_pi, log_pi)
            torch.testing.assert_close(shifted_z, log_z + shift / beta, rtol=1e-15, atol=0)


def test_extreme_temperatures_have_their_limits():
    log_ref, reward = torch.tensor([0.2, 0.3, 0.5]).double().log(), torch.tensor([0.0, 2.0, 1.0]).double()
    assert optimal_policy(log_ref, reward, beta=1e-308)[0].exp().tolist() == [0.0, 1.0, 0.0]
    # The largest reward where the reference is zero: it counts nothing, and its overflow makes no NaN.
    without = torch.tensor([0.5, 0.0, 0.5]).double().log()
    assert optimal_policy(without, 10 * reward, beta=1e-308)[0].exp().tolist() == [0.0, 0.0, 1.0]
    log_pi = torch.tensor([0.3, 0.3, 0.4]).double().log()
    assert tempered_policy(log_pi, log_ref, beta_pi=1e308).exp().tolist() == [1.0, 0.0, 0.0]


@pytest.mark.unchecked
def test_more_draws_than_float64_can_count():
    log_ref, reward = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.0, 1.0]).double()
    with pytest.raises(ValueError, match=r"n must be at most 2\*\*53.*got"):
        best_of_n(log_ref, reward, n=2**100)
