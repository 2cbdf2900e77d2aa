"""J, generalised J and the two limits of the losses: oracle, worked example, infinities, gradients, errors."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.objectives import (
    alignment_objective,
    generalized_objective,
    kl_optimal_to_policy,
    kl_policy_to_optimal,
)
from exo_toy.targets import optimal_policy
from tests import oracles, strategies
from tests.families import FAMILIES
from tests.strategies import Problem
from tests.tolerances import assert_close

INF = math.inf
LOG_REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
LOG_PI = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
REWARD = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
TWO_TEMPERATURES = [generalized_objective, kl_policy_to_optimal, kl_optimal_to_policy]
each_function = pytest.mark.parametrize("function", TWO_TEMPERATURES)


def temperatures(problem: Problem) -> dict[str, float]:
    return {"beta_pi": problem.beta_pi, "beta_r": problem.beta_r}


def scale(problem: Problem) -> float:
    """Numbers of up to 5 / 0.2 in the exponents of pi*, of up to 3 * 16 in the tempered policy's."""
    return 10.0 * max(1.0, problem.beta_pi) * max(1.0, 1 / problem.beta_r)


def policy_to_optimal(log_pi: list, log_ref: list, reward: list, beta_pi: float, beta_r: float) -> float:
    log_pi_star, _ = oracles.optimal_policy(log_ref, reward, beta_r)
    return oracles.kl(oracles.tempered_policy(log_pi, log_ref, beta_pi), log_pi_star)


def optimal_to_policy(log_pi: list, log_ref: list, reward: list, beta_pi: float, beta_r: float) -> float:
    log_pi_star, _ = oracles.optimal_policy(log_ref, reward, beta_r)
    return oracles.kl(log_pi_star, oracles.tempered_policy(log_pi, log_ref, beta_pi))


ORACLES = dict(
    zip(TWO_TEMPERATURES, [oracles.generalized_objective, policy_to_optimal, optimal_to_policy], strict=True)
)


def rows(problem: Problem) -> list[tuple[list, list, list]]:
    tables = (problem.log_pi.tolist(), problem.log_ref.tolist(), problem.reward.tolist())
    return list(zip(*tables, strict=True))


# Against the oracle


@given(problem=strategies.problems(holes=True))
def test_alignment_objective_agrees_with_the_oracle(device, problem):
    problem = problem.to(device)
    value = alignment_objective(problem.log_pi, problem.log_ref, problem.reward, beta=problem.beta)
    assert_close(value, [oracles.alignment_objective(*row, problem.beta) for row in rows(problem)], scale=10.0)


@each_function
@given(problem=strategies.problems(holes=True))
def test_functions_of_two_temperatures_agree_with_the_oracle(function, device, problem):
    problem = problem.to(device)
    value = function(problem.log_pi, problem.log_ref, problem.reward, **temperatures(problem))
    expected = [ORACLES[function](*row, problem.beta_pi, problem.beta_r) for row in rows(problem)]
    assert_close(value, expected, scale=scale(problem))


def test_worked_example():
    tables = (LOG_PI, LOG_REF, REWARD)
    assert alignment_objective(*tables, beta=0.5).item() == pytest.approx(1.7717825904266082, rel=1e-14)
    betas = {"beta_pi": 0.5, "beta_r": 1.0}
    assert generalized_objective(*tables, **betas).item() == pytest.approx(1.383351512626461, rel=1e-14)
    assert kl_policy_to_optimal(*tables, **betas).item() == pytest.approx(0.1646044209522257, rel=1e-14)
    assert kl_optimal_to_policy(*tables, **betas).item() == pytest.approx(0.1533032986215301, rel=1e-14)


def test_integer_temperatures_are_the_same_numbers():
    tables = (LOG_PI, LOG_REF, REWARD)
    assert_close(alignment_objective(*tables, beta=2), alignment_objective(*tables, beta=2.0))
    for function in TWO_TEMPERATURES:
        assert_close(function(*tables, beta_pi=2, beta_r=1), function(*tables, beta_pi=2.0, beta_r=1.0))


# Laws


@given(problem=strategies.problems(holes=True))
def test_no_policy_is_better_than_the_optimal_one(problem):
    log_pi_star, log_z = optimal_policy(problem.log_ref, problem.reward, beta=problem.beta)
    best = alignment_objective(log_pi_star, problem.log_ref, problem.reward, beta=problem.beta)
    assert_close(best, problem.beta * log_z, scale=10.0)
    value = alignment_objective(problem.log_pi, problem.log_ref, problem.reward, beta=problem.beta)
    assert (value <= best + 1e-11).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_divergences_vanish_at_the_optimum_of_problems_with_a_known_answer(family):
    solved = family()
    tables = (solved.log_pi_star, solved.log_ref, solved.reward)
    zero = torch.zeros_like(solved.log_z)
    for split in (1.0, 0.5, 2.0):
        betas = {"beta_pi": split, "beta_r": solved.beta / split}
        assert_close(kl_policy_to_optimal(*tables, **betas), zero, scale=10.0)
        assert_close(kl_optimal_to_policy(*tables, **betas), zero, scale=10.0)
    assert_close(alignment_objective(*tables, beta=solved.beta), solved.beta * solved.log_z)


@given(problem=strategies.problems(holes=True), constant=st.integers(-1000, 1000))
def test_a_constant_in_the_reward_moves_the_objective_alone(problem, constant):
    tables, shifted = (problem.log_pi, problem.log_ref, problem.reward), problem.reward + constant
    value = alignment_objective(*tables, beta=problem.beta)
    moved = alignment_objective(*tables[:2], shifted, beta=problem.beta)
    assert_close(moved, value + constant, scale=10.0)
    for function in (kl_policy_to_optimal, kl_optimal_to_policy):
        # Rewards of 1000 over beta_r are known to 1e-16 of themselves.
        bound = scale(problem) + 1e-2 * abs(constant) / problem.beta_r
        expected = function(*tables, **temperatures(problem))
        assert_close(function(*tables[:2], shifted, **temperatures(problem)), expected, scale=bound)


@given(problem=strategies.problems(holes=True))
def test_a_policy_temperature_of_one_is_no_tempering(problem):
    tables = (problem.log_pi, problem.log_ref, problem.reward)
    generalized = generalized_objective(*tables, beta_pi=1, beta_r=problem.beta)
    assert_close(generalized, alignment_objective(*tables, beta=problem.beta), scale=10.0)


def test_the_two_divergences_have_their_own_directions():
    """Two completions, pi = (.9, .1), a uniform reference and no reward: KL(pi||ref) and KL(ref||pi)."""
    pi, ref = torch.tensor([0.9, 0.1]).double().log(), torch.tensor([0.5, 0.5]).double().log()
    pi = pi.log_softmax(-1)
    tables = (pi, ref, torch.zeros(2))
    p = pi.exp()[0].item()
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert_close(kl_policy_to_optimal(*tables, beta_pi=1.0, beta_r=1.0), expected)
    assert_close(kl_optimal_to_policy(*tables, beta_pi=1.0, beta_r=1.0), -0.5 * math.log(4 * p * (1 - p)))


# Infinities


def test_mass_on_a_forbidden_or_impossible_completion():
    forbidden = torch.tensor([0.0, -INF, 2.0, 3.0], dtype=torch.float64)
    assert alignment_objective(LOG_PI, LOG_REF, forbidden, beta=0.5).item() == -INF
    assert generalized_objective(LOG_PI, LOG_REF, forbidden, beta_pi=0.5, beta_r=1.0).item() == -INF
    assert kl_policy_to_optimal(LOG_PI, LOG_REF, forbidden, beta_pi=0.5, beta_r=1.0).item() == INF
    assert kl_optimal_to_policy(LOG_PI, LOG_REF, forbidden, beta_pi=0.5, beta_r=1.0).isfinite()
    impossible = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64).log()
    assert alignment_objective(LOG_PI, impossible, REWARD, beta=0.5).item() == -INF
    # A policy temperature below 1 takes the policy back into the reference's support.
    assert generalized_objective(LOG_PI, impossible, REWARD, beta_pi=0.5, beta_r=1.0).isfinite()
    narrow = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64).log()
    assert kl_optimal_to_policy(narrow, LOG_REF, REWARD, beta_pi=0.5, beta_r=1.0).item() == INF
    assert alignment_objective(narrow, LOG_REF, forbidden, beta=0.5).isfinite()


def derivatives(function, *arguments: Tensor) -> tuple[Tensor, ...]:
    free = [argument.clone().requires_grad_() for argument in arguments]
    value = function(free[0].log_softmax(-1), free[1].log_softmax(-1), free[2])
    gradients = torch.autograd.grad(value, free, create_graph=True)
    weights = torch.tensor([0.5, 0.1, -0.9, 0.7], dtype=torch.float64)
    second = torch.autograd.grad(sum((gradient * weights).sum() for gradient in gradients), free)
    return value.detach(), *(gradient.detach() for gradient in gradients), *second


OF_TABLES = {
    "J": lambda *tables: alignment_objective(*tables, beta=0.5),
    "generalized J": lambda *tables: generalized_objective(*tables, beta_pi=0.6, beta_r=0.8),
    "KL(policy||optimal)": lambda *tables: kl_policy_to_optimal(*tables, beta_pi=0.6, beta_r=0.8),
    "KL(optimal||policy)": lambda *tables: kl_optimal_to_policy(*tables, beta_pi=0.6, beta_r=0.8),
}
LOGITS = torch.tensor([[0.3, -0.4, 1.0, 0.2], [-0.5, 0.7, 0.1, 0.9], [0.2, 1.5, -0.6, 0.8]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "zeros"),
    [
        *itertools.product(["J", "generalized J", "KL(policy||optimal)"], [(0,), (0, 1), (0, 2), (0, 1, 2)]),
        *itertools.product(["KL(optimal||policy)"], [(1,), (2,), (0, 1), (0, 2), (0, 1, 2)]),
    ],
)
def test_probability_zero_is_the_limit_of_small_probabilities(name, zeros):
    """Value, gradients and second derivatives where policy (0), reference (1) or exp(reward) (2) vanish."""
    results = []
    for policy_or_ref, reward in ((-INF, -INF), (-3000.0, -1000.0)):
        arguments = [row.clone() for row in LOGITS]
        for index in zeros:
            arguments[index][1] = reward if index == 2 else policy_or_ref
        results.append(derivatives(OF_TABLES[name], *arguments))
    assert results[0][1].abs().max() > 0.01
    for at_zero, near in zip(*results, strict=True):
        assert at_zero.isfinite().all()
        assert_close(at_zero, near)


@pytest.mark.parametrize("name", OF_TABLES)
def test_gradcheck_and_gradgradcheck(name):
    def of_logits(pi: Tensor, ref: Tensor, reward: Tensor) -> Tensor:
        return OF_TABLES[name](pi.log_softmax(-1), ref.log_softmax(-1), reward)

    arguments = [row.clone().requires_grad_() for row in LOGITS]
    assert torch.autograd.gradcheck(of_logits, arguments)
    assert torch.autograd.gradgradcheck(of_logits, arguments)


# Shapes and dtypes


@pytest.mark.parametrize("name", OF_TABLES)
@given(problem=strategies.problems(), data=st.data())
def test_tables_are_shared_by_prompts(name, problem, data):
    tables = [problem.log_pi, problem.log_ref, problem.reward]
    shared = data.draw(st.sets(st.sampled_from(range(3)), min_size=1, max_size=2))
    value = OF_TABLES[name](*(table[0] if index in shared else table for index, table in enumerate(tables)))
    expanded = (table[:1].expand_as(table) if index in shared else table for index, table in enumerate(tables))
    assert value.shape == problem.log_pi.shape[:1]
    assert_close(value, OF_TABLES[name](*expanded))
    assert OF_TABLES[name](*(table[0] for table in tables)).shape == ()


@pytest.mark.parametrize("name", OF_TABLES)
def test_float32_inputs_are_computed_in_float64(name):
    tables = [table.float() for table in (LOG_PI, LOG_REF, REWARD)]
    value = OF_TABLES[name](*tables)
    assert value.dtype == torch.float64
    assert_close(value, OF_TABLES[name](*(table.double() for table in tables)))


# Errors


def message_of(call) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


@pytest.mark.unchecked
@pytest.mark.parametrize("bad", [0, -0.5, math.nan, INF, "1", False, torch.tensor(1.0)], ids=str)
def test_temperatures_must_be_positive_numbers(bad):
    tables = (LOG_PI, LOG_REF, REWARD)
    assert "beta must be a finite number above 0" in message_of(lambda: alignment_objective(*tables, beta=bad))
    for function in TWO_TEMPERATURES:
        message = message_of(lambda function=function: function(*tables, beta_pi=bad, beta_r=1.0))
        assert message.startswith("beta_pi must be a finite number above 0") and repr(bad) in message
        message = message_of(lambda function=function: function(*tables, beta_pi=1.0, beta_r=bad))
        assert message.startswith("beta_r must be a finite number above 0") and repr(bad) in message


@pytest.mark.unchecked
@pytest.mark.parametrize("name", OF_TABLES)
def test_bad_tables_are_refused_by_name(name):
    function = OF_TABLES[name]
    words = "must hold normalised log-probabilities"
    assert f"log_pi {words}" in message_of(lambda: function(torch.zeros(4), LOG_REF, REWARD))
    assert f"log_ref {words}" in message_of(lambda: function(LOG_PI, torch.zeros(4), REWARD))
    message = message_of(lambda: function(LOG_PI, LOG_REF, REWARD + math.nan))
    assert "reward must be finite, or -inf for a forbidden completion; got nan at index [0]" in message
    assert "as many completions" in message_of(lambda: function(LOG_PI[:3], LOG_REF, REWARD))
    assert "as many completions" in message_of(lambda: function(LOG_PI, LOG_REF, REWARD[:3]))
    message = message_of(lambda: function(LOG_PI.expand(2, 4), LOG_REF.expand(3, 4), REWARD))
    assert "must have the leading dimensions of" in message
