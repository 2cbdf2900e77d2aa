"""Expected losses over labelled pairs: against loops over pairs and labels, and where they are another loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exo_toy.finite_k import expected_dpo_rw_loss
from exo_toy.losses import dpo_loss, exo_pref_loss
from exo_toy.preferences import bradley_terry, expected_preference_loss
from exo_toy.targets import optimal_policy


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
