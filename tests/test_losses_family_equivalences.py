"""Losses that are one another, and those that only an oracle tells apart."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exo_toy import divergences, losses
from exo_toy.losses import LOSSES
from tests import loss_oracles, strategies
from tests.loss_cases import PAIR_CASES
from tests.loss_laws import LOG_RATIO, LOGPS, REWARDS, SCORES
from tests.tolerances import assert_close

smoothings = st.floats(1e-3, 0.49)
cases = pytest.mark.parametrize("case", PAIR_CASES, ids=lambda case: case.name)


def as_list(logps):
    """Log ratios [B, 2] of chosen and rejected."""
    return torch.stack([logps[0] - logps[2], logps[1] - logps[3]], -1)


# Losses that are others


@given(drawn=strategies.pairs())
def test_what_is_dpo(drawn):
    """Each at the setting where it is: DPO-rw with a one-hot target, f-DPO with KL, Plackett-Luce on two, and so on."""
    dpo = losses.dpo_loss(*drawn.logps, beta=drawn.beta).losses
    log_ratio = as_list(drawn.logps)
    one_hot = torch.tensor([0.0, -math.inf], dtype=torch.float64).expand_as(log_ratio)
    kl = functools.partial(losses.alpha_score, alpha=1)
    first = [logps[:1] for logps in drawn.logps]
    for same in [
        losses.robust_dpo_loss(*drawn.logps, beta=drawn.beta, label_smoothing=0.0).losses,
        losses.dpop_loss(*drawn.logps, beta=drawn.beta, penalty=0.0).losses,
        losses.f_dpo_loss(*drawn.logps, beta=drawn.beta, score=kl).losses,
        losses.f_dpo_loss(*drawn.logps, beta=drawn.beta, score=lambda x: x).losses,
        losses.plackett_luce_loss(log_ratio, beta=drawn.beta),
        losses.dpo_rw_loss(log_ratio, one_hot, beta_pi=drawn.beta, beta_r=1.0),
    ]:
        assert_close(same, dpo, scale=10.0)
    for sorted_loss in (losses.aot_loss, losses.aot_unpaired_loss):
        assert_close(sorted_loss(*first, beta=drawn.beta).losses, dpo[:1], scale=10.0 * drawn.beta)


@given(drawn=strategies.pairs(), data=st.data())
def test_what_is_exo(drawn, data):
    """Reward-aware preference optimisation: its KL, either way round, on two candidates."""
    scores = data.draw(strategies.tensors((2, drawn.policy_chosen.shape[0]), -5.0, 5.0))
    log_ratio, rewards = as_list(drawn.logps), scores.T
    settings = {"beta_pi": drawn.beta, "beta_r": 1 / 1.7}
    target = (1.7 * rewards).log_softmax(-1)
    entropy = -(target.exp() * target).sum(-1)
    rpo = losses.rpo_kl_loss(*drawn.logps, *scores, beta=drawn.beta, reward_scale=1.7).losses
    assert_close(rpo, losses.dpo_rw_loss(log_ratio, rewards, **settings) - entropy, scale=100.0)
    wrong = (-target[:, 1].exp()).neg().clamp(1e-300, 1 - 1e-16)
    if ((wrong > 1e-12) & (wrong < 1 - 1e-12)).all():
        exo = losses.exo_pref_loss(*drawn.logps, beta=drawn.beta, label_smoothing=wrong).losses
        assert_close(exo, losses.exo_rw_loss(log_ratio, rewards, **settings), scale=1e4)


@given(drawn=strategies.pairs())
def test_what_is_dpo_at_infinity(drawn):
    """Reward-aware preference optimisation, target first, as the gap of the rewards tells the label for certain."""
    certain, zero = torch.full_like(drawn.policy_chosen, 2000.0), torch.zeros_like(drawn.policy_chosen)
    rpo = losses.rpo_kl_loss(*drawn.logps, certain, zero, beta=drawn.beta, reward_scale=1.0).losses
    assert_close(rpo, losses.dpo_loss(*drawn.logps, beta=drawn.beta).losses)


@given(drawn=strategies.pairs())
def test_lists_of_two_and_pairs(drawn):
    log_ratio = as_list(drawn.logps)
    one_hot = torch.tensor([0.0, -math.inf], dtype=torch.float64).expand_as(log_ratio)
    nca = losses.nca_pair_loss(*drawn.logps, beta=drawn.beta).losses
    assert_close(losses.nca_rw_loss(log_ratio, one_hot, beta_pi=drawn.beta, beta_r=1.0), nca, scale=100.0)
    chosen, rejected = (torch.full(drawn.policy_chosen.shape, flag) for flag in (True, False))
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = drawn.logps
    bco = losses.bco_pair_loss(*drawn.logps, beta=drawn.beta, delta=0.4).losses
    singles = [
        losses.bco_loss(policy_chosen, ref_chosen, chosen, beta=drawn.beta, delta=0.4),
        losses.bco_loss(policy_rejected, ref_rejected, rejected, beta=drawn.beta, delta=0.4),
    ]
    assert_close(singles[0].losses + singles[1].losses, bco, scale=100.0)
    apo = losses.apo_zero_loss(*drawn.logps, beta=drawn.beta).losses
    singles = [
        losses.kto_loss(policy_chosen, ref_chosen, chosen, beta=drawn.beta, reference_point=0.0),
        losses.kto_loss(policy_rejected, ref_rejected, rejected, beta=drawn.beta, reference_point=0),
    ]
    assert_close(singles[0].losses + singles[1].losses, apo)


@given(drawn=strategies.pairs(bound=8.0))
def test_what_is_a_sum_of_others(drawn):
    """Cal-DPO is DPO at beta = 1 and SPPO; chi-PO without a clip is f-DPO; CPO is DPO and a likelihood."""
    dpo, sppo = losses.dpo_loss(*drawn.logps, beta=1.0).losses, losses.sppo_loss(*drawn.logps, beta=drawn.beta).losses
    cal = losses.cal_dpo_loss(*drawn.logps, beta=drawn.beta).losses
    assert_close(cal, dpo + sppo, scale=100.0)
    chi_po = losses.chi_po_loss(*drawn.logps, beta=drawn.beta, max_margin=math.inf).losses
    f_dpo = losses.f_dpo_loss(*drawn.logps, beta=drawn.beta, score=losses.chi_po_score).losses
    assert_close(chi_po, f_dpo)
    zero = torch.zeros_like(drawn.policy_chosen)
    cpo = losses.cpo_loss(*drawn.logps[:2], beta=drawn.beta, nll_weight=0.3).losses
    uniform = losses.dpo_loss(*drawn.logps[:2], zero, zero, beta=drawn.beta).losses
    assert_close(cpo, uniform - 0.3 * drawn.policy_chosen, scale=10.0)


def test_chi_po_link_is_a_sum_of_scores():
    x = torch.linspace(-5, 5, 11, dtype=torch.float64)
    by_alpha = losses.alpha_score(x, alpha=2) + 1 + losses.alpha_score(x, alpha=1)
    assert_close(losses.chi_po_score(x), by_alpha, scale=100.0)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.3, 0.5, 1.0, 1.5, 2.0])
def test_scores_are_derivatives_of_divergences(alpha):
    """f' as the derivative by pi(y) of pi_ref f(pi/pi_ref), for unnormalised pi, up to a constant."""
    ref = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    pi = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    tangents = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
    log_ratio, amari = pi.log() - ref.log(), functools.partial(divergences.alpha_divergence, alpha=alpha)
    for score, divergence, factor in [
        (losses.alpha_score(log_ratio, alpha=alpha), amari, 1),
        (losses.jensen_shannon_score(log_ratio), divergences.jensen_shannon, 2),
    ]:
        leaf = pi.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(factor * divergence(leaf.log(), ref.log()), leaf)
        assert_close(tangents @ gradient, tangents @ score)


def test_scores_near_the_ends_of_the_alpha_family():
    x = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64)
    for alpha in (1 - 1e-9, 1 + 1e-9):
        torch.testing.assert_close(losses.alpha_score(x, alpha=alpha), x, rtol=1e-8, atol=0)
    # The parameter of the f-DPO paper is 1 - alpha: the same score where they coincide only.
    published = (1 - torch.exp(-0.3 * x)) / 0.3
    assert_close(losses.alpha_score(x, alpha=0.7), published)
    assert (losses.alpha_score(x, alpha=0.3) - published).abs().max() > 0.1


def test_f_po_with_known_divergences():
    settings = {"beta_pi": 0.7, "beta_r": 1.3}
    target = (REWARDS / 1.3).log_softmax(-1)
    exo, dpo = (loss(LOG_RATIO, REWARDS, **settings) for loss in (losses.exo_rw_loss, losses.dpo_rw_loss))
    entropy = divergences.entropy(target)
    for divergence, wanted in [
        (divergences.kl_divergence, exo),
        (lambda log_p, log_q: divergences.kl_divergence(log_q, log_p), dpo - entropy),
        (losses.jensen_shannon, losses.fpo_loss(LOG_RATIO, REWARDS, divergence=divergences.jensen_shannon, **settings)),
    ]:
        assert_close(losses.fpo_loss(LOG_RATIO, REWARDS, divergence=divergence, **settings), wanted)
    weights = torch.tensor([[0.1, -0.5, 0.0, 0.4], [0.0, 0.3, -math.inf, 0.2]], dtype=torch.float64)
    weighted = losses.fpo_loss(
        LOG_RATIO, REWARDS, divergence=divergences.kl_divergence, log_weights=weights, **settings
    )
    assert_close(weighted, losses.exo_rw_loss(LOG_RATIO, REWARDS, log_weights=weights, **settings))


def test_authors_own_parameters():
    """REBEL's and f-PO's code: what they call eta and alpha, as they compute it."""
    delta = (LOGPS[0] - LOGPS[2]) - (LOGPS[1] - LOGPS[3])
    rebel = losses.rebel_loss(*LOGPS, *SCORES, eta=0.8).losses
    assert_close((delta - 0.8 * (SCORES[0] - SCORES[1])) ** 2, 0.8**2 * rebel, scale=10.0)
    log_p, log_q = (0.7 * LOG_RATIO).log_softmax(-1), (REWARDS / 1.3).log_softmax(-1)
    alpha, u = 0.3, (log_p - log_q).exp()
    theirs = (log_q.exp() * (u ** (1 - alpha) - (1 - alpha) * u - alpha)).sum(-1) / (alpha * (alpha - 1))
    assert_close(theirs, losses.alpha_rw_loss(LOG_RATIO, REWARDS, alpha=1 - alpha, beta_pi=0.7, beta_r=1.3))
    half = (log_p.exp() + log_q.exp()) / 2
    js = (log_p.exp() * (log_p - log_q) / 2 - half * (half.log() - log_q)).sum(-1)
    ours = losses.fpo_loss(LOG_RATIO, REWARDS, divergence=losses.jensen_shannon, beta_pi=0.7, beta_r=1.3)
    assert_close(js, ours)


@pytest.mark.parametrize("name", ["nca_rw", "fpo_js", "plackett_luce"])
@given(drawn=strategies.candidates(bound=5.0))
def test_lists_agree_with_the_oracle(name, drawn):
    oracle = getattr(loss_oracles, name)
    settings = dict(LOSSES[name].settings) | drawn.temperatures
    rows = zip(drawn.log_ratio, drawn.rewards, drawn.mask, strict=True)
    if name == "plackett_luce":
        value = losses.plackett_luce_loss(drawn.log_ratio, beta=drawn.beta_pi, mask=drawn.mask)
        expected = [oracle(x[kept].tolist(), beta=drawn.beta_pi) for x, _, kept in rows]
    else:
        value = LOSSES[name].function(drawn.log_ratio, drawn.rewards, mask=drawn.mask, **settings)
        expected = [oracle(x[kept].tolist(), r[kept].tolist(), **drawn.temperatures) for x, r, kept in rows]
    # Log ratios of 5 times a temperature of 10, some of each.
    assert_close(value, expected, scale=1e3)


@given(drawn=strategies.candidates(bound=5.0), data=st.data())
def test_shifts_of_lists(drawn, data):
    shift = data.draw(strategies.tensors((drawn.mask.shape[0], 1), -5.0, 5.0))
    ranked = functools.partial(losses.plackett_luce_loss, beta=drawn.beta_pi, mask=drawn.mask)
    assert_close(ranked(drawn.log_ratio + shift), ranked(drawn.log_ratio), scale=1e3)
    nca = functools.partial(losses.nca_rw_loss, drawn.log_ratio, mask=drawn.mask, **drawn.temperatures)
    assert_close(nca(drawn.rewards + shift), nca(drawn.rewards), scale=1e4)


def test_value_of_lists_at_the_reference():
    zero = torch.zeros(2, 4, dtype=torch.float64)
    assert_close(losses.plackett_luce_loss(zero, beta=0.3), [math.log(24)] * 2)
    assert_close(losses.nca_rw_loss(zero, REWARDS, beta_pi=0.3, beta_r=0.5), [2 * math.log(2)] * 2)
    masked = torch.tensor([[True, True, False, True], [True, False, False, False]])
    assert_close(losses.plackett_luce_loss(zero, beta=0.3, mask=masked), [math.log(6), 0.0])


# Anchors


def test_anchors():
    assert_close(losses.bco_shift(torch.tensor([1.0, 3.0]), torch.tensor([0.0, -3.0, 0.0])), 0.5)
    point = losses.kto_reference_point(LOGPS[0].clone().requires_grad_(), LOGPS[2])
    assert not point.requires_grad
    assert_close(point, max(0.0, (LOGPS[0] - LOGPS[2]).mean().item()))
    assert losses.kto_reference_point(LOGPS[2] - 3, LOGPS[2]).item() == 0
    flags = torch.tensor([True, False, True])
    for anchor in (0.4, torch.tensor(0.4, dtype=torch.float64)):
        kto = losses.kto_loss(
            LOGPS[0], LOGPS[2], flags, beta=0.7, reference_point=anchor, desirable_weight=1.3, undesirable_weight=0.6
        )
        rows = zip(LOGPS[0].tolist(), LOGPS[2].tolist(), flags.tolist(), strict=True)
        weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
        assert_close(kto.losses, [loss_oracles.kto(*row, beta=0.7, reference_point=0.4, **weights) for row in rows])
        assert_close(kto.rewards, 0.7 * (LOGPS[0] - LOGPS[2]))
        bco = losses.bco_loss(LOGPS[0], LOGPS[2], flags, beta=0.7, delta=-anchor)
        rows = zip(LOGPS[0].tolist(), LOGPS[2].tolist(), flags.tolist(), strict=True)
        assert_close(bco.losses, [loss_oracles.bco(*row, beta=0.7, delta=-0.4) for row in rows])
    delta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    losses.bco_loss(LOGPS[0], LOGPS[2], flags, beta=0.7, delta=delta).losses.sum().backward()
    assert delta.grad is not None and delta.grad.abs() > 1e-3  # no hidden detach


@given(drawn=strategies.pairs(bound=8.0), data=st.data())
def test_dro_agrees_with_the_oracle(drawn, data):
    rewards, values = data.draw(strategies.tensors((2, drawn.policy_chosen.shape[0]), -5.0, 5.0))
    got = losses.dro_loss(drawn.policy_chosen, drawn.ref_chosen, rewards, values, tau=drawn.beta).losses
    rows = zip(*(x.tolist() for x in (drawn.policy_chosen, drawn.ref_chosen, rewards, values)), strict=True)
    assert_close(got, [loss_oracles.dro(*row, tau=drawn.beta) for row in rows], scale=1e3)


@given(drawn=strategies.pairs(), data=st.data())
def test_losses_without_a_reference_agree_with_the_oracle(drawn, data):
    chosen, rejected = (logps - 1e-3 for logps in drawn.logps[:2])
    count = st.lists(st.integers(1, 9), min_size=len(chosen), max_size=len(chosen)).map(torch.tensor)
    n_w, n_l = data.draw(count), data.draw(count)
    rows = list(zip(*(x.tolist() for x in (chosen, rejected, n_w, n_l)), strict=True))
    simpo = losses.simpo_loss(chosen, rejected, n_w, n_l, beta=drawn.beta, gamma=0.8)
    assert_close(simpo.losses, [loss_oracles.simpo(*row, beta=drawn.beta, gamma=0.8) for row in rows], scale=100.0)
    assert_close(simpo.chosen_rewards, drawn.beta * chosen / n_w)
    orpo = losses.orpo_loss(chosen, rejected, n_w, n_l, odds_weight=0.4).losses
    # The oracle spells out 1 - p, which loses digits to a p near 1.
    assert_close(orpo, [loss_oracles.orpo(*row, odds_weight=0.4) for row in rows], scale=1e4)
    for lengths in (None, n_w):
        cpo = losses.cpo_loss(chosen, rejected, beta=drawn.beta, nll_weight=0.4, chosen_lengths=lengths).losses
        counts = [None] * len(rows) if lengths is None else lengths.tolist()
        expected = [
            loss_oracles.cpo(w, lo, n, beta=drawn.beta, nll_weight=0.4)
            for (w, lo, _, _), n in zip(rows, counts, strict=True)
        ]
        assert_close(cpo, expected, scale=100.0)
