"""The identity experiment: what it measures, against plain loops and closed forms."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from analysis import objective_identity
from exo_toy.theorems import Theorem
from tests import oracles

TINY = objective_identity.Config(problems=3, chunk=2, perturbations=3, split_problems=2, split_size=4)


def float64(*entries):
    return torch.tensor(entries, dtype=torch.float64)


@pytest.fixture(scope="module")
def result():
    return objective_identity.run(TINY)


def test_every_identity_holds_and_none_survives_a_wrong_temperature(result):
    for name in objective_identity.IDENTITIES:
        assert result.arrays[f"residual.{name}"].shape == (TINY.problems,)
        assert result.numbers["worst_residual"][name] == result.arrays[f"residual.{name}"].max() < 1e-12
        assert result.numbers["control_median_digits"][name] < 8


def test_chunks_change_nothing(result):
    again = objective_identity.run(dataclasses.replace(TINY, chunk=3)).arrays
    assert result.arrays.keys() == again.keys()
    for key, values in result.arrays.items():
        np.testing.assert_array_equal(values, again[key])


def test_the_optimum_is_found_from_every_split_and_not_exceeded(result):
    assert max(result.numbers["split_distance"].values()) < 1e-6
    assert result.numbers["optimum_excess"] < 1e-12


def test_residual_is_relative_to_the_sides_or_to_a_larger_term():
    theorem = Theorem(float64(3.0, 4.0), float64(3.0, 5.0), ())
    assert objective_identity.residual(theorem) == pytest.approx(0.2, rel=1e-15)
    assert objective_identity.residual(theorem, 2.0) == pytest.approx(0.2, rel=1e-15)
    assert objective_identity.residual(theorem, 100.0) == pytest.approx(0.01, rel=1e-15)
    assert objective_identity.residual(Theorem(float64(0.0), float64(0.0), ())) == 0.0


def test_digits():
    np.testing.assert_allclose(objective_identity.digits(np.array([1e-3, 0.0, 10.0])), [3.0, 16.0, -1.0], rtol=1e-15)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_sides_are_those_of_plain_loops(index):
    problem = objective_identity.draw_problem(TINY, index)
    rows = [table.tolist() for table in (problem.log_pi, problem.log_ref, problem.reward)]
    wanted = [oracles.alignment_objective(*row, problem.beta_r) for row in zip(*rows, strict=True)]
    objective = objective_identity.IDENTITIES["objective"](problem)
    term = objective_identity.LARGEST_TERM["objective"](problem).item()
    np.testing.assert_allclose(objective.left, wanted, rtol=1e-12, atol=1e-12 * term)

    small = problem.small
    rows = [table.tolist() for table in (small.log_pi, small.log_ref, small.reward)]
    wanted = [
        [oracles.expected_loss(loss, *row, small.k, small.beta_pi, small.beta_r) for row in zip(*rows, strict=True)]
        for loss in (oracles.exo_rw, oracles.dpo_rw)
    ]
    np.testing.assert_allclose(objective_identity.IDENTITIES["finite_k_enumeration"](problem).right, wanted, rtol=1e-11)

    log_ratio = problem.candidate_tables[0][:, :2].tolist()
    beta = problem.beta_pi * problem.beta_r
    wanted = [oracles.exo_pref(*row, 0.0, 0.0, beta, problem.label_smoothing) for row in log_ratio]
    np.testing.assert_allclose(objective_identity.IDENTITIES["exo_pref"](problem).right, wanted, rtol=1e-11)


def test_a_wrong_temperature_is_off_by_one_per_cent_of_a_gradient_that_is_linear_in_its_inverse(result):
    for index in range(TINY.problems):
        rewards = objective_identity.draw_problem(TINY, index).candidate_tables[1]
        centred = (rewards - rewards.mean(-1, keepdim=True)).abs().max().item()
        wanted = (1 - 1 / objective_identity.WRONG) * centred / max(centred, rewards.abs().max().item())
        assert result.arrays["control.group_baseline"][index] == pytest.approx(wanted, rel=1e-10)


class NotOptimal(objective_identity.Problem):
    """Takes the reference for the optimum."""

    @property
    def log_pi_star(self):
        return self.log_ref


def test_a_policy_that_is_not_optimal_is_exceeded():
    problem = objective_identity.draw_problem(TINY, 1)
    fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    config = dataclasses.replace(TINY, perturbations=50)
    excess = [
        objective_identity.optimum_excess(one, np.random.default_rng(3), config)
        for one in (problem, NotOptimal(**fields))
    ]
    assert excess[0] < 1e-12 < 1e-3 < excess[1]


@pytest.mark.parametrize("beta_pi, beta_r", [(1.0, 0.3), (0.3, 1.0), (2.0, 0.15)])
def test_maximised_objective_ends_at_the_optimal_policy(beta_pi, beta_r):
    log_ref = [math.log(p) for p in (0.5, 0.2, 0.3)]
    reward = [0.0, 1.0, 0.4]
    wanted, _ = oracles.optimal_policy(log_ref, reward, beta_pi * beta_r)
    value, log_pi = objective_identity.maximise_objective(
        float64(log_ref), float64(reward), float64(0.3, -1.0, 2.0), beta_pi=beta_pi, beta_r=beta_r
    )
    np.testing.assert_allclose(log_pi.exp(), np.exp(wanted), atol=1e-6)
    assert value == pytest.approx(oracles.generalized_objective(wanted, log_ref, reward, beta_pi, beta_r), rel=1e-12)


@pytest.mark.parametrize("eps", [0.001, 0.3])
@pytest.mark.parametrize("gap", [0.01, 2.0])
def test_recovered_reward_is_the_smoothed_labels_log_odds_times_the_preference(eps, gap):
    preference = 1 / (1 + math.exp(-gap))
    wanted = (2 * preference - 1) * math.log((1 - eps) / eps)
    assert objective_identity.recovered_reward(gap, label_smoothing=eps) == pytest.approx(wanted, rel=1e-9)
