"""Expected losses over labelled pairs: against loops over pairs and labels, and where they are another loss."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exo_toy.finite_k import expected_dpo_rw_loss
from exo_toy.losses import dpo_loss, exo_pref_loss
from exo_toy.policies import TabularPolicy
from exo_toy.preferences import (
    bradley_terry,
    dpo_optimum_exists,
    dpo_target,
    exo_pref_effective_beta,
    exo_pref_target,
    expected_preference_loss,
    hard_labels,
    noisy_labels,
)
from exo_toy.spaces import SequenceSpace
from exo_toy.targets import optimal_policy
from exo_toy.training import minimize


def dpo(beta):
    return lambda *logps: dpo_loss(*logps, beta=beta).losses


def exo(beta, eps):
    return lambda *logps: exo_pref_loss(*logps, beta=beta, label_smoothing=eps).losses


def drawn(seed: int, n: int):
    log_pi, log_ref = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)).double().log_softmax(-1)
    return log_pi, log_ref, torch.randn(n, generator=torch.Generator().manual_seed(seed + 1)).double()


@given(st.integers(0, 1000), st.integers(1, 6), st.sampled_from([0.1, 1.0, 5.0]))
def test_of_pairs_and_labels_one_by_one(seed, n, beta):
    log_pi, log_ref, reward = drawn(seed, n)
    preference = bradley_terry(reward)
    for loss in (dpo(beta), exo(beta, 0.1)):
        expected = 0.0
        for a in range(n):
            for b in range(n):
                weight = math.exp(log_ref[a] + log_ref[b])
                prefer = 1 / (1 + math.exp(reward[b] - reward[a]))
                for probability, chosen, rejected in ((prefer, a, b), (1 - prefer, b, a)):
                    pair = (log_pi[[chosen]], log_pi[[rejected]], log_ref[[chosen]], log_ref[[rejected]])
                    expected += weight * probability * loss(*pair).item()
        found = expected_preference_loss(log_pi, log_ref, preference, loss)
        assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-13)


@given(st.integers(0, 1000), st.integers(2, 8), st.sampled_from([0.1, 1.0, 5.0]))
def test_dpo_on_bradley_terry_labels_is_dpo_rw_of_two(seed, n, beta):
    log_pi, log_ref, reward = drawn(seed, n)
    found = expected_preference_loss(log_pi, log_ref, bradley_terry(reward), dpo(beta))
    as_rw = expected_dpo_rw_loss(log_pi, log_ref, reward, k=2, beta_pi=beta, beta_r=1.0)
    assert found.item() == pytest.approx(as_rw.item(), rel=1e-12)


def gradient_at_the_optimum(loss, preference, log_ref, reward, beta):
    logits = optimal_policy(log_ref, reward, beta=beta)[0].requires_grad_()
    value = expected_preference_loss(logits.log_softmax(-1), log_ref, preference, loss)
    return torch.autograd.grad(value, logits)[0].abs().max().item()


def test_which_loss_is_stationary_at_the_optimal_policy():
    _, log_ref, reward = drawn(3, 5)
    preference, beta = bradley_terry(reward), 0.5
    assert gradient_at_the_optimum(dpo(beta), preference, log_ref, reward, beta) < 1e-15
    for eps in (1e-3, 0.3):
        assert gradient_at_the_optimum(exo(beta, eps), preference, log_ref, reward, beta) > 1e-3
    # With the label's own probability for eps the target of each pair is the labeller's.
    wrong = preference.mT.flatten()
    matched = exo(beta, wrong)
    assert gradient_at_the_optimum(matched, preference, log_ref, reward, beta) < 1e-15


def test_what_the_reference_never_draws_counts_nothing():
    log_pi, log_ref, reward = drawn(5, 4)
    padded = [torch.cat([t, torch.tensor([fill]).double()]) for t, fill in ((log_pi, -math.inf), (log_ref, -math.inf))]
    preference = bradley_terry(torch.cat([reward, torch.tensor([7.0]).double()]))
    found = expected_preference_loss(*padded, preference, dpo(0.5))
    assert found.item() == expected_preference_loss(log_pi, log_ref, bradley_terry(reward), dpo(0.5)).item()


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def pair(p: float) -> torch.Tensor:
    return torch.tensor([[0.5, p], [1 - p, 0.5]], dtype=torch.float64)


def recovered_margin(loss, preference, beta):
    """Where the expected loss of two completions is least, by minimisation from the reference."""
    log_ref = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    policy = TabularPolicy(SequenceSpace(2, 1))
    optimum = minimize(policy, lambda log_pi: expected_preference_loss(log_pi[0], log_ref, preference, loss))
    assert optimum.is_minimum()
    log_ratio = policy.log_probs()[0].detach() - log_ref
    return (beta * (log_ratio[0] - log_ratio[1])).item()


@pytest.mark.parametrize("p", [0.05, 0.5, 0.731, 0.99])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_targets_are_where_the_expected_loss_of_a_pair_is_least(p, beta):
    """By hand, and by minimising the losses themselves."""
    for eps in (0.01, 0.3):
        by_hand = (2 * p - 1) * math.log((1 - eps) / eps)
        assert exo_pref_target(torch.tensor([p], dtype=torch.float64), label_smoothing=eps).item() == pytest.approx(
            by_hand, rel=1e-14
        )
        assert recovered_margin(exo(beta, eps), pair(p), beta) == pytest.approx(by_hand, abs=1e-7)
        smoothed = dpo_target(torch.tensor([p], dtype=torch.float64), label_smoothing=eps).item()
        assert smoothed == pytest.approx(logit(p * (1 - eps) + (1 - p) * eps), rel=1e-12, abs=1e-15)
        minimised = recovered_margin(
            lambda *x, eps=eps: dpo_loss(*x, beta=beta, label_smoothing=eps).losses, pair(p), beta
        )
        assert minimised == pytest.approx(smoothed, abs=1e-7)
    assert recovered_margin(dpo(beta), pair(p), beta) == pytest.approx(logit(p), abs=1e-7)


def test_effective_temperature_is_that_of_the_policy_aimed_at():
    probabilities = torch.tensor([1e-4, 0.3, 0.5, 0.5 + 1e-9, 0.6, 0.999], dtype=torch.float64)
    for eps, beta in itertools.product((1e-3, 0.1192, 0.4), (0.1, 2.0)):
        found = exo_pref_effective_beta(probabilities, beta=beta, label_smoothing=eps)
        sharpness = math.log((1 - eps) / eps)
        for p, value in zip(probabilities.tolist(), found.tolist(), strict=True):
            # Near one half by the limit, which is off by a share of (2p - 1)^2.
            near = abs(p - 0.5) < 1e-8
            by_hand = 2 * beta / sharpness if near else beta * logit(p) / ((2 * p - 1) * sharpness)
            assert value == pytest.approx(by_hand, rel=1e-12)
    # The one eps whose slope at small differences is 1.
    neutral = exo_pref_effective_beta(torch.tensor([0.5]), beta=0.7, label_smoothing=1 / (1 + math.exp(2)))
    assert neutral.item() == pytest.approx(0.7, rel=1e-15)
    assert exo_pref_effective_beta(torch.tensor([0.0, 1.0]), beta=1.0, label_smoothing=0.1).tolist() == [math.inf] * 2


@given(st.integers(0, 1000), st.integers(2, 7), st.floats(0, 0.49))
def test_noise_and_hard_labels(seed, n, flip):
    reward = drawn(seed, n)[2]
    clean = bradley_terry(reward)
    noisy = noisy_labels(clean, flip=flip)
    for a, b in itertools.product(range(n), repeat=2):
        p = clean[a, b].item()
        assert noisy[a, b].item() == pytest.approx((1 - flip) * p + flip * (1 - p), rel=1e-14)
        assert hard_labels(reward)[a, b].item() == (0.5 if reward[a] == reward[b] else float(reward[a] > reward[b]))
    tied = hard_labels(torch.tensor([1.0, 1.0, 1.0 + 1e-15], dtype=torch.float64))
    assert tied.tolist() == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 1.0, 0.5]]


def splits(n):
    for size in range(1, n):
        yield from itertools.combinations(range(n), size)


@given(st.integers(1, 5), st.data())
def test_dpo_has_an_optimum_unless_one_group_always_wins(n, data):
    preference = torch.full((n, n), 0.5, dtype=torch.float64)
    for a, b in itertools.combinations(range(n), 2):
        preference[a, b] = data.draw(st.sampled_from([0.0, 0.4, 1.0]))
        preference[b, a] = 1 - preference[a, b]
    always_wins = any(
        all(preference[a, b] == 1 for a in group for b in range(n) if b not in group) for group in splits(n)
    )
    assert dpo_optimum_exists(preference) is not always_wins


def test_with_hard_labels_the_dpo_loss_falls_for_ever_and_that_of_exo_does_not():
    _, log_ref, reward = drawn(4, 4)
    labels = hard_labels(reward)
    assert not dpo_optimum_exists(labels)
    # A pair of one completion twice costs log 2 whatever the policy.
    infimum = (2 * log_ref).exp().sum().item() * math.log(2)
    values = {name: [] for name in ("dpo", "exo")}
    for sharpness in (1, 10, 100):
        log_pi = (log_ref + sharpness * reward / reward.diff().abs().min()).log_softmax(-1)
        values["dpo"].append(expected_preference_loss(log_pi, log_ref, labels, dpo(1.0)).item() - infimum)
        values["exo"].append(expected_preference_loss(log_pi, log_ref, labels, exo(1.0, 0.1)).item())
    assert values["dpo"] == sorted(values["dpo"], reverse=True)
    assert values["dpo"][-1] == pytest.approx(0, abs=1e-15)
    # Certainty costs EXO log(1/(1 - eps)) a pair, more than a target that admits doubt.
    assert values["exo"][-1] > values["exo"][0]


def test_probability_of_the_label_makes_exo_blind_to_how_it_was_drawn():
    """With the reward's own preference for p_h either label pulls to the same margin, however noisy the labeller."""
    _, log_ref, reward = drawn(6, 5)
    clean, beta = bradley_terry(reward), 0.5
    for labels in (clean, noisy_labels(clean, flip=0.3), hard_labels(reward)):
        matched = exo(beta, clean.mT.flatten())
        assert gradient_at_the_optimum(matched, labels, log_ref, reward, beta) < 1e-15
    # The noisy frequencies lead to the noisy labeller's optimum instead.
    noisy = noisy_labels(clean, flip=0.3)
    assert gradient_at_the_optimum(exo(beta, noisy.mT.flatten()), noisy, log_ref, reward, beta) > 1e-3


@pytest.mark.unchecked
def test_bad_arguments_of_targets_are_named():
    half = torch.tensor([0.5])
    with pytest.raises(ValueError, match=r"preference must lie in \[0, 1\]; got 1.5 at index \[0\]"):
        exo_pref_target(half + 1, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"preference must lie in \[0, 1\]; got nan"):
        dpo_target(half * math.nan)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \(0, 1/2\); got 0.5"):
        exo_pref_effective_beta(half, beta=1.0, label_smoothing=0.5)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1/2\); got -0.1"):
        dpo_target(half, label_smoothing=-0.1)
    with pytest.raises(ValueError, match="beta must be a finite number above 0"):
        exo_pref_effective_beta(half, beta=0, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"flip must be in \[0, 1/2\); got 0.5"):
        noisy_labels(half, flip=0.5)
    with pytest.raises(ValueError, match=r"preference must be square, \[N, N\]; got \[1, 2\]"):
        dpo_optimum_exists(torch.tensor([[0.5, 0.5]]))
    with pytest.raises(ValueError, match="preference must be complementary"):
        dpo_optimum_exists(torch.tensor([[0.5, 0.7], [0.7, 0.5]]))
    with pytest.raises(ValueError, match=r"reward must be finite; got nan"):
        hard_labels(half * math.nan)


@pytest.mark.unchecked
def test_bad_input_is_named():
    log_pi, log_ref, reward = drawn(0, 3)
    preference = bradley_terry(reward)
    with pytest.raises(ValueError, match=r"reward must be finite; got .*inf"):
        bradley_terry(torch.tensor([0.0, math.inf]))
    with pytest.raises(ValueError, match=r"preference must lie in \[0, 1\]"):
        expected_preference_loss(log_pi, log_ref, preference + 1, dpo(1.0))
    with pytest.raises(ValueError, match="preference must be complementary"):
        expected_preference_loss(log_pi, log_ref, preference**2, dpo(1.0))
    with pytest.raises(ValueError, match=r"preference must be \[3, 3\]; got \[2, 2\]"):
        expected_preference_loss(log_pi, log_ref, preference[:2, :2], dpo(1.0))
    with pytest.raises(ValueError, match="log_pi"):
        expected_preference_loss(log_pi + 1, log_ref, preference, dpo(1.0))


def test_a_label_that_is_never_given_costs_nothing_be_its_loss_infinite():
    log_pi, log_ref = torch.tensor([0.0, -torch.inf]), torch.tensor([0.5, 0.5]).double().log()
    prefer = hard_labels(torch.tensor([1.0, 0.0]))

    def loss(chosen, rejected, ref_chosen, ref_rejected):
        return torch.where(chosen < rejected, torch.inf, 1.0)

    assert expected_preference_loss(log_pi, log_ref, prefer, loss).item() == 1.0


def test_effective_temperature_has_its_curvature_at_even_odds():
    p = torch.tensor([0.5, 0.5 + 1e-4, 0.5 + 1e-2], dtype=torch.float64, requires_grad=True)
    beta = exo_pref_effective_beta(p, beta=1.0, label_smoothing=1e-3)
    (slope,) = torch.autograd.grad(beta.sum(), p, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), p)
    # 2 / log((1-eps)/eps) times the series 1 + x^2/3 + x^4/5 of artanh(x)/x, x = 2P - 1.
    scale, x = 2 / math.log(999), (2 * p.detach() - 1)
    torch.testing.assert_close(curvature, scale * 4 * (2 / 3 + 12 / 5 * x**2), rtol=1e-4, atol=0)
