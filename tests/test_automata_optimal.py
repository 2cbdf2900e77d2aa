"""The optimal and the tempered policy token by token, the nearest k-gram models, and reward distributions."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from exo_toy import divergences, targets
from exo_toy.automata import RewardAutomaton
from exo_toy.automata import measures as exact
from exo_toy.automata.chain import KGramModel
from exo_toy.automata.distribution import RewardDistribution, reward_distribution
from exo_toy.automata.optimal import OptimalPolicy, log_tempered_normalizer, tempered_policy
from exo_toy.policies import closest_kgram
from exo_toy.spaces import SequenceSpace
from tests import automata_cases
from tests.automata_cases import INF
from tests.tolerances import assert_close


def by_conditionals(policy, case, n_prompts):
    """Log-probabilities [X, N] by walking through the conditional tables, as a sampler does."""
    space, own = case.space, case.automaton
    contexts = space.contexts(case.tokens, order=case.ref.order)
    states, counted = own.states(case.tokens), space.counted(case.tokens)
    total = torch.zeros(n_prompts, len(case.tokens), dtype=torch.float64)
    for t in range(space.length):
        table = policy.conditionals(t)
        found = table[:, contexts[:, t].where(counted[:, t], 0), states[:, t], case.tokens[:, t]]
        total = total + torch.where(counted[:, t], found, 0.0)
    return total


@automata_cases.few
@given(case=automata_cases.cases())
def test_optimal_policy_is_that_of_enumeration(case):
    assume(case.possible)
    log_star, log_z = targets.optimal_policy(case.log_ref, case.reward, beta=case.beta)
    policy = OptimalPolicy(case.ref, case.automaton, beta=case.beta)
    assert_close(policy.log_z, log_z, scale=case.scale)
    assert_close(policy.log_prob(case.tokens), log_star, scale=case.scale)
    # Its own conditionals, of which samples are made, are the same distribution.
    assert_close(by_conditionals(policy, case, len(log_star)), log_star, scale=case.scale)
    for t in range(case.space.length):
        sums = policy.conditionals(t).exp().sum(-1)
        assert (((sums - 1).abs() < 1e-11) | (sums == 0)).all()


@given(case=automata_cases.cases(holes=True), seed=st.integers(0, 99))
def test_samples_are_allowed_completions_drawn_by_inversion(case, seed):
    """Each token is the quantile of a uniform number under the conditionals checked above."""
    assume(case.possible)
    policy = OptimalPolicy(case.ref, case.automaton, beta=case.beta)
    found = policy.sample(5, torch.Generator().manual_seed(seed))
    assert (policy.log_prob(found) > -INF).all()
    generator = torch.Generator().manual_seed(seed)
    space, n_prompts = case.space, len(case.log_ref)
    states, contexts = case.automaton.states(found), space.contexts(found, order=case.ref.order)
    counted = space.counted(found)
    for t in range(space.length):
        uniform = torch.rand(n_prompts, 5, 1, generator=generator, dtype=torch.float64).squeeze(-1)
        table = policy.conditionals(t).expand(n_prompts, -1, -1, -1).exp()
        for x in range(n_prompts):
            for i in range(5):
                if counted[x, i, t]:
                    row, token = table[x, contexts[x, i, t], states[x, i, t]], found[x, i, t]
                    below = row[:token].sum() - 1e-9
                    assert below <= uniform[x, i] <= row[: token + 1].sum() + 1e-9


@automata_cases.few
@given(case=automata_cases.cases(), data=st.data())
def test_closest_kgram_is_that_of_enumeration(case, data):
    assume(case.possible)
    order = data.draw(st.integers(0, case.space.length - 1))
    log_star, _ = targets.optimal_policy(case.log_ref, case.reward, beta=case.beta)
    policy = OptimalPolicy(case.ref, case.automaton, beta=case.beta)
    wanted = closest_kgram(case.space, log_star, order).log_probs()
    found = policy.closest_kgram(order)
    log_found = found.log_prob(case.tokens)
    assert_close(log_found.exp(), wanted.exp(), scale=case.scale)
    if case.scale > 500:
        return  # conditionals below 1e-308 come out as 0
    # One table for all positions: no other such model is nearer, so the gradient at the minimum is 0.
    shared = policy.closest_kgram(order, homogeneous=True)
    logits = [table.clone().requires_grad_() for table in shared.logits]
    model = KGramModel(case.space, order, tuple(logits))
    kl = divergences.kl_divergence(log_star, model.log_prob(case.tokens).expand_as(log_star)).sum()
    for gradient in torch.autograd.grad(kl, logits):
        assert_close(gradient, torch.zeros_like(gradient), scale=10 * case.scale)


@automata_cases.few
@given(case=automata_cases.cases(holes=False), beta_pi=st.sampled_from([0.3, 1.0, 2.5]))
def test_tempered_policy_is_that_of_enumeration(case, beta_pi):
    log_pi = case.log_pi.expand_as(case.log_ref)
    model, log_sum = tempered_policy(case.pi, case.ref, beta_pi=beta_pi)
    wanted = targets.tempered_policy(log_pi, case.log_ref, beta_pi=beta_pi)
    assert_close(model.log_prob(case.tokens), wanted, scale=case.scale)
    normaliser = (beta_pi * log_pi + (1 - beta_pi) * case.log_ref).logsumexp(-1)
    assert_close(log_sum, normaliser, scale=case.scale)
    assert_close(log_tempered_normalizer(case.pi, case.ref, beta_pi=beta_pi), normaliser, scale=case.scale)


def integer(case):
    """The case's automaton with integer rewards."""
    own = case.automaton
    return RewardAutomaton(own.transitions, own.rewards.round(), own.final.round(), own.start)


@given(case=automata_cases.cases(scale=2.0))
def test_reward_distribution_is_that_of_enumeration(case):
    own = integer(case)
    reward = own.reward(case.tokens, case.space.lengths())
    found = reward_distribution(case.ref, own)
    wanted = torch.stack([case.log_ref.masked_fill(reward != value, -INF).logsumexp(-1) for value in found.values], -1)
    assert_close(found.log_probs, wanted)
    assert_close(found.log_probs.logsumexp(-1), torch.zeros(len(wanted)).tolist())


@automata_cases.few
@given(case=automata_cases.cases(scale=2.0), n=st.sampled_from([1, 2, 17]))
def test_best_of_n_and_win_rates_through_the_distribution(case, n):
    assume(case.possible)
    own = integer(case)
    reward = own.reward(case.tokens, case.space.lengths()).expand_as(case.log_ref)
    ref = reward_distribution(case.ref, own)
    best, wanted = ref.best_of(n), targets.best_of_n(case.log_ref, reward, n=n)
    assert_close(best.kl_to(ref), divergences.kl_divergence(wanted, case.log_ref))
    higher = (reward.unsqueeze(-1) > reward.unsqueeze(-2)).double()
    tied = (reward.unsqueeze(-1) == reward.unsqueeze(-2)).double()
    wins = torch.einsum("xi,xij,xj->x", wanted.exp(), higher + tied / 2, case.log_ref.exp())
    assert_close(best.win_rate(ref), wins)
    log_star, _ = targets.optimal_policy(case.log_ref, reward, beta=case.beta)
    star = ref.optimal(beta=case.beta)
    assert_close(star.kl_to(ref), divergences.kl_divergence(log_star, case.log_ref), scale=20.0)
    moments = exact.optimal_reward_moments(case.ref, own, beta=case.beta)
    assert_close(star.mean(), moments.mean, scale=20.0)


def test_distribution_of_a_count_at_length_200():
    """Ones among fair tokens: binomial, down to 2^-200."""
    fair = KGramModel(SequenceSpace(2, 200), 0, (torch.zeros(1, 1, 2).double(),))
    ones = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.0, 1.0]]).double(), torch.zeros(1).double())
    n = torch.arange(201, dtype=torch.float64)
    wanted = torch.lgamma(torch.tensor(201.0).double()) - torch.lgamma(n + 1) - torch.lgamma(201 - n)
    found = reward_distribution(fair, ones)
    assert_close(found.log_probs[0], (wanted - 200 * torch.tensor(2.0).double().log()).tolist(), scale=1000.0)
    assert_close(found.mean(), [100.0])
    assert_close(found.variance(), [50.0], scale=100.0)


@pytest.mark.unchecked
def test_errors():
    fair = KGramModel(SequenceSpace(2, 3), 0, (torch.zeros(1, 1, 2).double(),))
    halves = RewardAutomaton(torch.tensor([[0, 0]]), torch.tensor([[0.5, 1.0]]).double(), torch.zeros(1).double())
    with pytest.raises(ValueError, match=r"automaton\.rewards must hold integers.*0\.5"):
        reward_distribution(fair, halves)
    policy = OptimalPolicy(fair, halves, beta=1.0)
    with pytest.raises(ValueError, match=r"t must be in 0\.\.2; got 3"):
        policy.conditionals(3)
    with pytest.raises(ValueError, match="n must be an integer of at least 1"):
        policy.sample(0)
    with pytest.raises(ValueError, match=r"order must be in 0\.\.2"):
        policy.closest_kgram(3)
    certain = torch.zeros(1, 2).double()
    first, second = (RewardDistribution(torch.tensor([x, 9.0]).double(), certain) for x in (0.0, 1.0))
    with pytest.raises(ValueError, match="distributions must be over the same values"):
        first.kl_to(second)
