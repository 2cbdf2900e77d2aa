"""The mode-seeking experiment against plain loops: its target, its minimisers and its fixed points."""

import itertools
import math

import pytest
import torch

from analysis import mode_seeking
from exo_toy.losses import dpo_rw_loss, exo_rw_loss

TWO_MODES = {"vocab_size": 4, "length": 6, "second_weight": 0.8, "width": 1 / 1.5, "beta": 0.5}
SMALL = {"vocab_size": 2, "length": 3, "second_weight": 0.7, "width": 0.8, "beta": 0.5}


def optimal_by_loops(vocab_size, length, second_weight, width, beta):
    """log pi* of every sequence under a uniform reference, as a dictionary."""
    log_weights = {}
    for tokens in itertools.product(range(vocab_size), repeat=length):
        to_first = sum(token != 0 for token in tokens)
        to_second = sum(token != vocab_size - 1 for token in tokens)
        reward = math.log(math.exp(-to_first / width) + second_weight * math.exp(-to_second / width))
        log_weights[tokens] = reward / beta
    log_z = math.log(math.fsum(math.exp(weight) for weight in log_weights.values()))
    return {tokens: weight - log_z for tokens, weight in log_weights.items()}


def mean_field(log_target, start, sweeps=60):
    """KL(q||target) at a fixed point of coordinate descent over independent positions: q_t prop. exp E[log target]."""
    q = [list(row) for row in start]
    for _ in range(sweeps):
        for t in range(len(q)):
            scores = [0.0] * len(q[t])
            for tokens, log_p in log_target.items():
                others = math.prod(q[s][a] for s, a in enumerate(tokens) if s != t)
                scores[tokens[t]] += others * log_p
            total = math.fsum(math.exp(score - max(scores)) for score in scores)
            q[t] = [math.exp(score - max(scores)) / total for score in scores]
    kl = 0.0
    for tokens, log_p in log_target.items():
        p = math.prod(q[s][a] for s, a in enumerate(tokens))
        kl += p * (math.log(p) - log_p)
    return kl


def test_target_is_that_of_plain_loops():
    log_target = optimal_by_loops(**TWO_MODES)
    measured = mode_seeking.target_numbers(**TWO_MODES)
    wanted = [math.exp(log_target[(0,) * 6]), math.exp(log_target[(3,) * 6])]
    assert measured["mode_masses"] == pytest.approx(wanted, rel=1e-12)
    assert [round(mass, 4) for mass in wanted] == [0.2616, 0.1675]


def test_minimisers_are_those_of_coordinate_descent():
    settings = {**TWO_MODES, "length": 4}
    log_target = optimal_by_loops(**settings)
    found = mode_seeking.local_minimisers(order=0, starts=12, certify=True, seed=3, **settings)
    near = [[[0.7 if a == mode else 0.1 for a in range(4)]] * 4 for mode in (0, 3)]
    wanted = sorted(mean_field(log_target, start) for start in near)
    assert [optimum["value"] for optimum in found["policy_to_optimal"][:1]] == pytest.approx(wanted[:1], rel=1e-10)
    values = [optimum["value"] for optimum in found["policy_to_optimal"]]
    assert any(value == pytest.approx(wanted[1], rel=1e-10) for value in values)
    assert all(optimum["is_minimum"] and optimum["gradient"] < 1e-10 for optimum in found["policy_to_optimal"])


def test_closest_policy_has_the_marginals_of_the_target():
    log_target = optimal_by_loops(**TWO_MODES)
    found = mode_seeking.local_minimisers(order=0, starts=1, certify=False, seed=0, **TWO_MODES)
    marginals = [[0.0] * 4 for _ in range(6)]
    for tokens, log_p in log_target.items():
        for t, token in enumerate(tokens):
            marginals[t][token] += math.exp(log_p)
    masses = [math.prod(row[0] for row in marginals), math.prod(row[3] for row in marginals)]
    assert found["optimal_to_policy"]["mode_masses"] == pytest.approx(masses, rel=1e-10)
    divergence = math.fsum(
        math.exp(log_p) * (log_p - math.log(math.prod(marginals[t][a] for t, a in enumerate(tokens))))
        for tokens, log_p in log_target.items()
    )
    assert found["optimal_to_policy"]["kl_optimal_to_policy"] == pytest.approx(divergence, rel=1e-10)


@pytest.mark.parametrize(("name", "loss"), [("exo", exo_rw_loss), ("dpo", dpo_rw_loss)])
def test_fixed_point_is_stationary_for_the_loss_over_all_pairs(name, loss):
    found = mode_seeking.fixed_point(k=2, loss=name, starts=4, seed=0, **SMALL)
    problem = mode_seeking.two_modes(**SMALL)
    # The policy again, from another start, this time on the loss averaged over all 64 pairs of candidates.
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))

    def over_pairs(log_pi):
        log_ratio = (log_pi[0] - problem.log_ref)[pairs]
        return loss(log_ratio, problem.reward[pairs], beta_pi=1.0, beta_r=0.5).mean()

    policy = mode_seeking.near_mode(problem, problem.modes[0])
    optimum = mode_seeking.minimize(policy, over_pairs)
    assert found["value"] == pytest.approx(optimum.value, rel=1e-9)
    assert found["is_minimum"]
    measured = problem.measure(policy.log_probs().detach()[0])
    assert found["mode_masses"] == pytest.approx(measured["mode_masses"], rel=1e-6)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_best_minimiser_is_at_least_as_good_as_the_other_divergence_s(order):
    found = mode_seeking.local_minimisers(order=order, starts=0, certify=True, seed=0, **TWO_MODES)
    best, other = found["policy_to_optimal"][0], found["optimal_to_policy"]
    assert best["is_minimum"]
    assert best["kl_policy_to_optimal"] <= other["kl_policy_to_optimal"] + 1e-12
    assert other["kl_optimal_to_policy"] <= best["kl_optimal_to_policy"] + 1e-12


def test_saturated_policy_is_no_minimum():
    problem = mode_seeking.two_modes(**SMALL)
    policy = mode_seeking.KGramPolicy(problem.space, 0)
    with torch.no_grad():
        for logits in policy.parameters():
            logits[..., 1] = 300.0
    optimum = mode_seeking.minimize(policy, lambda log_pi: mode_seeking._mean_kl(log_pi, problem.log_pi_star))
    assert optimum.gradient < 1e-10
    assert not optimum.is_minimum()


def test_line_minimisers():
    numbers, arrays = mode_seeking.line(50, 12, 0)
    assert arrays["line_optimal"].sum() == pytest.approx(1, rel=1e-12)
    # A Gaussian fitted by KL(pi*||pi) has the target's first two moments, up to the cut of the line.
    points, weights = arrays["line_points"], arrays["line_optimal"]
    [fitted] = numbers["optimal_to_policy"]
    policy = arrays["line_optimal_to_policy"][0]
    assert (policy * points).sum() == pytest.approx((weights * points).sum(), abs=1e-9)
    assert (policy * points**2).sum() == pytest.approx((weights * points**2).sum(), rel=1e-9)
    assert fitted["is_minimum"]
    best = numbers["policy_to_optimal"][0]
    assert best["is_minimum"] and best["mass_left_of_valley"] > 0.99


def test_tiny_run_has_what_claims_and_figure_read():
    config = mode_seeking.Config(
        n_points=20,
        line_starts=4,
        vocab_size=2,
        length=3,
        betas=(0.5,),
        orders=(0, 1),
        starts=(2, 2),
        certified_orders=(0,),
        n_candidates=(2, 4),
        fixed_point_starts=1,
        training_seeds=1,
        training_steps=2,
        training_batch=2,
    )
    result = mode_seeking.run(config)
    assert [case["order"] for case in result.numbers["capacity"]] == [1, 0]
    assert {(case["k"], case["loss"]) for case in result.numbers["fixed_points"]} == set(
        itertools.product((2, 4), ("exo", "dpo"))
    )
    assert len(result.numbers["trained"]) == 4
    assert {"line_points", "line_optimal", "line_policy_to_optimal", "line_optimal_to_policy"} == set(result.arrays)
