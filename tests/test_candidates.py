"""Candidates from k-gram references: what they hold, and the exact answers beside them by enumeration."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from exo_toy import candidates, divergences, estimators, objectives, targets
from exo_toy.automata import KGramModel, RewardAutomaton
from exo_toy.losses import dpo_rw_loss, exo_rw_loss
from exo_toy.spaces import SequenceSpace
from tests import automata_cases, sequence_strategies
from tests.tolerances import assert_close


def drawn(case, seed=0, **sizes):
    generator = torch.Generator().manual_seed(seed)
    return candidates.draw_candidates(case.pi, case.ref, case.automaton, generator=generator, **sizes)


@given(case=automata_cases.cases(scale=2.0))
def test_candidates_hold_what_the_tables_hold(case):
    found = drawn(case, groups=3, k=2)
    index = case.space.index(found.tokens).flatten(1)
    for values, table in (
        (found.log_ratio, case.log_pi.expand_as(case.log_ref) - case.log_ref),
        (found.rewards, case.reward),
    ):
        assert_close(values.flatten(1), table.gather(1, index), scale=case.scale)


@automata_cases.few
@given(case=automata_cases.cases(holes=False, scale=2.0), beta_pi=st.sampled_from([0.5, 1]))
def test_exact_answers_are_those_of_enumeration(case, beta_pi):
    assume(case.possible)
    log_ref, log_pi, beta = case.log_ref, case.log_pi.expand_as(case.log_ref), case.beta
    tempered = targets.tempered_policy(log_pi, log_ref, beta_pi=beta_pi)
    log_star, log_z = targets.optimal_policy(log_ref, case.reward, beta=beta)
    found = candidates.compare(
        case.pi, case.ref, case.automaton, drawn(case, groups=2, k=3), beta_pi=beta_pi, beta_r=beta
    )
    from_optimal = divergences.kl_divergence(log_star, tempered)
    wanted = candidates.Comparison(
        exo_rw=divergences.kl_divergence(tempered, log_star),
        dpo_rw=-(log_star.exp() * (tempered - log_ref)).sum(-1),
        log_z=log_z,
        kl_policy_to_optimal=divergences.kl_divergence(tempered, log_star),
        kl_optimal_to_policy=from_optimal,
        kl_to_reference=divergences.kl_divergence(tempered, log_ref),
        objective=objectives.generalized_objective(log_pi, log_ref, case.reward, beta_pi=beta_pi, beta_r=beta),
    )
    for own, exact in zip(found, wanted, strict=True):
        assert_close(own.exact, exact, scale=10 * case.scale * max(1.0, beta))


@automata_cases.few
@given(case=automata_cases.cases(holes=False, scale=2.0))
def test_estimates_are_those_of_the_losses_and_of_all_groups_together(case):
    own = drawn(case, groups=4, k=3)
    found = candidates.compare(case.pi, case.ref, case.automaton, own, beta_pi=0.5, beta_r=2)
    for x in range(len(case.log_ref)):
        settings = {"beta_pi": 0.5, "beta_r": 2}
        for name, loss, constant in (("exo_rw", exo_rw_loss, 0.0), ("dpo_rw", dpo_rw_loss, math.log(3))):
            values = loss(own.log_ratio[x], own.rewards[x], **settings) - constant
            beside, half = getattr(found, name), 1.959963984540054 * values.std() / 2
            assert_close(beside.value[x], values.mean())
            assert_close(beside.high[x] - beside.low[x], 2 * half, scale=10.0)
        f, h = 0.5 * own.log_ratio[x].flatten(), own.rewards[x].flatten() / 2
        pairs = {
            "log_z": h.logsumexp(-1) - math.log(12),
            "kl_policy_to_optimal": divergences.kl_divergence(f.log_softmax(-1), h.log_softmax(-1)),
            "kl_optimal_to_policy": divergences.kl_divergence(h.log_softmax(-1), f.log_softmax(-1)),
            "kl_to_reference": f.log_softmax(-1).exp() @ (f.log_softmax(-1) + math.log(12)),
            "objective": estimators.snis_objective(f, 2 * h, beta=2).value,
        }
        for name, value in pairs.items():
            assert_close(getattr(found, name).value[x], value, scale=case.scale)


@automata_cases.few
@given(case=automata_cases.cases(holes=False, scale=2.0), beta_pi=st.sampled_from([0.5, 1]))
def test_effective_sizes_are_those_of_enumeration(case, beta_pi):
    assume(case.possible)
    own = drawn(case, groups=2, k=3)
    assume((own.rewards > -math.inf).any(-1).all())
    found = candidates.effective_sizes(case.pi, case.ref, case.automaton, own, beta_pi=beta_pi, beta_r=case.beta)
    f, h = beta_pi * own.log_ratio.flatten(1), own.rewards.flatten(1) / case.beta
    for size, weights, all_weights in (
        (found[0], f, beta_pi * (case.log_pi - case.log_ref)),
        (found[1], h, case.reward / case.beta),
    ):
        w = (weights - weights.amax(1, keepdim=True)).exp()
        assert_close(size.value, w.sum(1).square() / w.square().sum(1))
        share = 2 * (case.log_ref + all_weights).logsumexp(1) - (case.log_ref + 2 * all_weights).logsumexp(1)
        assert_close(size.exact, 6 * share.exp(), scale=10 * case.scale)


def test_known_answers_stand_beside():
    case = fair_case()
    own = candidates.draw_candidates(*case, groups=2, k=4, generator=torch.Generator())
    exact = candidates.exact_answers(*case[:3], beta_pi=0.5, beta_r=1.0)
    alone, given_exact = (
        candidates.compare(*case[:3], own, beta_pi=0.5, beta_r=1.0, exact=known) for known in (None, exact)
    )
    for a, b in zip(alone, given_exact, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    moved = candidates.compare(*case[:3], own, beta_pi=0.5, beta_r=1.0, exact=exact._replace(log_z=exact.log_z + 1))
    assert_close(moved.log_z.exact - alone.log_z.exact, [1.0])


def test_prompts_start_in_states_of_their_own():
    """From state 1 a zero earns, from state 0 a one."""
    table = torch.tensor([[0.0, 1.0], [2.0, 0.0]]).double()
    own = RewardAutomaton(torch.tensor([[0, 0], [1, 1]]), table, torch.zeros(2).double())
    fair = KGramModel(SequenceSpace(2, 5), 0, (torch.zeros(1, 1, 2).double(),))
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([0, 1, 1])
    found = candidates.draw_candidates(fair, fair, own, groups=2, k=4, generator=generator, starts=starts)
    ones = found.tokens.sum(-1).double()
    assert_close(found.rewards, torch.stack([ones[0], *(2 * (5 - ones[1:]))]))
    compared = candidates.compare(fair, fair, own, found, beta_pi=1, beta_r=1.0, starts=starts)
    wanted = [5 * math.log((1 + math.exp(r)) / 2) for r in (1, 2, 2)]
    assert_close(compared.log_z.exact, wanted)
    assert_close(compared.kl_to_reference.exact, [0.0] * 3)


def test_one_group_has_no_interval():
    case = fair_case()
    found = candidates.compare(*case[:3], candidates.draw_candidates(
        *case, groups=1, k=4, generator=torch.Generator()), beta_pi=1, beta_r=1.0)  # fmt: skip
    assert found.exo_rw.low.isnan().all() and found.log_z.low.isfinite().all()


def fair_case():
    fair = KGramModel(SequenceSpace(2, 5), 0, (torch.zeros(1, 1, 2).double(),))
    table = sequence_strategies.normal((1, 2), torch.Generator().manual_seed(0))
    return fair, fair, RewardAutomaton(torch.tensor([[0, 0]]), table, torch.zeros(1).double())


@pytest.mark.unchecked
def test_errors():
    generator = torch.Generator()
    fair, _, own = fair_case()
    other = KGramModel(SequenceSpace(2, 6), 0, (torch.zeros(1, 1, 2).double(),))
    two = KGramModel(SequenceSpace(2, 5), 0, (torch.zeros(2, 1, 2).double(),))
    with pytest.raises(ValueError, match="groups must be an integer of at least 1; got 0"):
        candidates.draw_candidates(fair, fair, own, groups=0, k=2, generator=generator)
    with pytest.raises(ValueError, match="k must be an integer of at least 2; got 1"):
        candidates.draw_candidates(fair, fair, own, groups=1, k=1, generator=generator)
    with pytest.raises(ValueError, match="models must be over one space"):
        candidates.draw_candidates(other, fair, own, groups=1, k=2, generator=generator)
    with pytest.raises(ValueError, match=r"must be for the same prompts; got \[2, 3\]"):
        candidates.draw_candidates(
            two, fair, own, groups=1, k=2, generator=generator, starts=torch.zeros(3, dtype=torch.int64)
        )
