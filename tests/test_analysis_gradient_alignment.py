"""The alignment experiment on a tiny space, against plain loops over all tuples of candidates."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from analysis import gradient_alignment
from exo_toy.losses import exo_rw_loss
from exo_toy.policies import TabularPolicy
from exo_toy.spaces import SequenceSpace
from tests import oracles

TINY = gradient_alignment.Config(
    seeds=2,
    vocab_size=2,
    length=2,
    order=1,
    n_prompts=3,
    largest_exponent=14,
    fit_from_exponent=10,
    sampled_completions=64,
    sampled_largest_exponent=2,
    repetitions=3,
    rate_exponents=(8,),
)


def gradients(log_pi, log_ref, reward, *, k, beta_pi, beta_r):
    """E[grad EXO-rw], E[grad DPO-rw] over all tuples and the gradients of both divergences, for a table's logits."""
    n = len(log_pi)
    exo, dpo = [0.0] * n, [0.0] * n
    for tuple_ in itertools.product(range(n), repeat=k):
        probability = math.exp(math.fsum(log_ref[y] for y in tuple_))
        f = [beta_pi * (log_pi[y] - log_ref[y]) for y in tuple_]
        p_f = [math.exp(value) for value in oracles.log_softmax(f)]
        p_r = [math.exp(value) for value in oracles.log_softmax([reward[y] / beta_r for y in tuple_])]
        h = [value - reward[y] / beta_r for value, y in zip(f, tuple_, strict=True)]
        h_mean = math.fsum(p * value for p, value in zip(p_f, h, strict=True))
        # The weights of the candidates sum to zero, so that of grad log pi(y_i) only 1[y_i = z] counts.
        for i, y in enumerate(tuple_):
            exo[y] += probability * beta_pi * p_f[i] * (h[i] - h_mean)
            dpo[y] += probability * beta_pi * (p_f[i] - p_r[i])
    tempered = oracles.tempered_policy(log_pi, log_ref, beta_pi)
    optimal, _ = oracles.optimal_policy(log_ref, reward, beta_r)
    divergence = oracles.kl(tempered, optimal)
    to_optimal = [beta_pi * math.exp(lp) * (lp - lq - divergence) for lp, lq in zip(tempered, optimal, strict=True)]
    from_optimal = [beta_pi * (math.exp(lp) - math.exp(lq)) for lp, lq in zip(tempered, optimal, strict=True)]
    return np.array([exo, dpo]), np.array([to_optimal, from_optimal])


@pytest.mark.parametrize("distance", gradient_alignment.DISTANCES)
def test_curves_of_a_full_table_are_those_of_plain_loops(distance):
    policy, log_ref, reward = gradient_alignment.draw_problem(TINY, "table", distance, seed=5)
    tables = [table.tolist() for table in (policy.log_probs().detach(), log_ref, reward)]
    case = gradient_alignment.exact_case(dataclasses.asdict(TINY), "table", distance, seed=5)
    for index, k in enumerate((2, 4)):
        of_prompts = [gradients(*rows, k=k, **TINY.betas) for rows in zip(*tables, strict=True)]
        losses, limits = (np.concatenate(both, axis=1) for both in zip(*of_prompts, strict=True))
        for loss, gradient in zip(gradient_alignment.LOSSES, losses, strict=True):
            for target, limit in zip(gradient_alignment.TARGETS, limits, strict=True):
                error = np.linalg.norm(gradient - limit) / np.linalg.norm(limit)
                cosine = gradient @ limit / np.linalg.norm(gradient) / np.linalg.norm(limit)
                assert case[f"{loss}.relative_error.{target}"][index] == pytest.approx(error, rel=1e-11)
                assert case[f"{loss}.cosine.{target}"][index] == pytest.approx(cosine, abs=1e-12)


def test_loss_bias_is_that_of_plain_loops():
    policy, log_ref, reward = gradient_alignment.draw_problem(TINY, "kgram", "far", seed=1)
    tables = [table.tolist() for table in (policy.log_probs().detach(), log_ref, reward)]
    exo, dpo = [], []
    for log_pi, ref, r in zip(*tables, strict=True):
        tempered = oracles.tempered_policy(log_pi, ref, TINY.beta_pi)
        optimal, _ = oracles.optimal_policy(ref, r, TINY.beta_r)
        loss = [oracles.expected_loss(one, log_pi, ref, r, 2, **TINY.betas) for one in (oracles.exo_rw, oracles.dpo_rw)]
        exo.append(loss[0] - oracles.kl(tempered, optimal))
        dpo.append(loss[1] - math.log(2) + oracles.kl(optimal, ref) - oracles.kl(optimal, tempered))
    case = gradient_alignment.exact_case(dataclasses.asdict(TINY), "kgram", "far", seed=1)
    assert case["exo_rw.loss_bias"][0] == pytest.approx(np.mean(exo), rel=1e-11)
    assert case["dpo_rw.loss_bias"][0] == pytest.approx(np.mean(dpo), rel=1e-11)


@pytest.mark.parametrize("policy_class", gradient_alignment.POLICY_CLASSES)
def test_distances_start_at_the_reference_and_grow(policy_class):
    kl = [
        gradient_alignment.exact_case(dataclasses.asdict(TINY), policy_class, distance, seed=0)["kl_to_reference"]
        for distance in gradient_alignment.DISTANCES
    ]
    assert kl[0] == pytest.approx(0.0, abs=1e-14)
    assert 0.01 < kl[1] < kl[2]


def test_numbers_say_what_the_curves_show():
    result = gradient_alignment.run(TINY)
    numbers = result.numbers
    assert numbers["largest_k"] == 2**14
    for loss in gradient_alignment.LOSSES:
        assert numbers[loss]["gradient_slope"] == pytest.approx(-1, abs=0.01)
        assert numbers[loss]["loss_slope"] == pytest.approx(-1, abs=0.01)
        assert numbers[loss]["gradient_coefficient_error"] < 0.01
        assert numbers[loss]["cosine"] > 0.999 > numbers[loss]["largest_cosine_to_other"]
    assert numbers["at_reference"]["exo_rw"] < 1e-12 < 0.01 < numbers["at_reference"]["dpo_rw"]
    for policy_class in gradient_alignment.POLICY_CLASSES:
        error = result.arrays[f"{policy_class}.reference.exo_rw.relative_error.policy_to_optimal"]
        np.testing.assert_allclose(error * result.arrays["k"], 1.0, rtol=1e-9)
    errors = result.arrays["table.far.dpo_rw.relative_error.optimal_to_policy"][:, -1]
    assert numbers["dpo_rw"]["table"]["far"]["gradient_error"] == errors.max()
    assert errors.shape == (TINY.seeds,)


def test_slope_is_that_of_a_power_law():
    ks = np.array([2.0, 8.0, 32.0])
    np.testing.assert_allclose(gradient_alignment.slope(ks, np.array([3 / ks, 5 / ks**2])), [-1, -2], rtol=1e-12)


def test_farthest_from_minus_one():
    assert gradient_alignment.farthest_from_minus_one(np.array([-1.02, -0.97, -1.0])) == -0.97


def test_sampled_gradient_of_all_tuples_is_the_expected_one(monkeypatch):
    """A uniform reference gives every tuple the same weight: drawing each once is exact."""
    policy = TabularPolicy(SequenceSpace(3, 1), n_prompts=2)
    log_pi = [[math.log(p) for p in row] for row in ((0.2, 0.3, 0.5), (0.6, 0.1, 0.3))]
    reward = [[0.0, 1.0, -1.0], [0.5, 0.5, 2.0]]
    with torch.no_grad():
        policy.logits.copy_(torch.tensor(log_pi, dtype=torch.float64))
    uniform = [math.log(1 / 3)] * 3
    every_tuple = torch.tensor(list(itertools.product(range(3), repeat=2))).flatten()
    monkeypatch.setattr(torch, "multinomial", lambda weights, n, **_: every_tuple.expand(len(weights), n))
    betas = {"beta_pi": 0.7, "beta_r": 0.4}
    sampled = gradient_alignment.sampled_gradient(
        exo_rw_loss,
        policy,
        torch.tensor([uniform] * 2, dtype=torch.float64),
        torch.tensor(reward, dtype=torch.float64),
        k=2,
        draws=9,
        betas=betas,
        generator=torch.Generator(),
    )
    exact = [gradients(log_pi[x], uniform, reward[x], k=2, **betas)[0][0] / 2 for x in range(2)]
    np.testing.assert_allclose(sampled, np.concatenate(exact), rtol=1e-12)
