"""What the losses are said to optimise: the gradient of the exact expected loss vanishes at the claimed policy.

Both completions of a pair are drawn from mu, among five, and labelled by Bradley and Terry; every pair counts. The
gradient is by the logits of the whole table, so that a policy which is best along some directions only fails.
"""

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

from exo_toy import losses
from exo_toy.targets import optimal_policy
from tests.loss_optima import (
    LENGTHS,
    LOG_REF,
    MU,
    PI_STAR,
    PREFERENCE,
    REF,
    REWARD,
    WIN_RATE,
    assert_optimal,
    expected_pair_loss,
    gradient_at,
    normalised_root,
    with_reference,
)
from tests.tolerances import assert_close


def test_dpo_and_ipo():
    assert_optimal(lambda log_pi: expected_pair_loss(with_reference(losses.dpo_loss, beta=0.7), log_pi), PI_STAR)
    ipo = functools.partial(expected_pair_loss, with_reference(losses.ipo_loss, beta=0.7))
    assert_optimal(ipo, (LOG_REF + WIN_RATE / 0.7).log_softmax(-1))


def test_dpop_stays_at_the_reference_from_a_penalty_on():
    """It is convex in the logits, and every direction there is a sum of transfers between two completions."""
    win_rate = PREFERENCE @ REF
    threshold = 2 * (win_rate.max() / win_rate.min() - 1).item()

    def steepest(penalty):
        dpop = with_reference(losses.dpop_loss, beta=0.7, penalty=penalty)
        step, identity = 1e-6, torch.eye(5, dtype=torch.float64)
        moved = [REF + step * (identity[i] - identity[j]) for i in range(5) for j in range(5) if i != j]
        values = torch.stack([expected_pair_loss(dpop, policy.log(), mu=REF) for policy in moved])
        return (values.min() - expected_pair_loss(dpop, LOG_REF, mu=REF)).item() / step

    assert steepest(1.01 * threshold) > 1e-3 and steepest(0.99 * threshold) < -1e-3


def test_robust_dpo_under_flipped_labels():
    flipped = 0.9 * PREFERENCE + 0.1 * (1 - PREFERENCE)
    robust = with_reference(losses.robust_dpo_loss, beta=0.7, label_smoothing=0.1)
    assert_optimal(functools.partial(expected_pair_loss, robust, preference=flipped), PI_STAR)
    # What smoothing does to such labels twice over, and robustness undoes.
    both = losses.robust(losses.smoothed(losses.dpo_loss, label_smoothing=0.1), label_smoothing=0.1)
    assert_optimal(functools.partial(expected_pair_loss, with_reference(both, beta=0.7)), PI_STAR)


def test_robust_dpo_is_unbounded_where_labels_are_cleaner_than_it_believes():
    clean = torch.full((5, 5), 0.95, dtype=torch.float64).triu(1) + torch.full((5, 5), 0.05).double().tril(-1)
    robust = with_reference(losses.robust_dpo_loss, beta=1.0, label_smoothing=0.1)
    order = torch.arange(5.0, 0.0, -1.0, dtype=torch.float64)
    values = [
        expected_pair_loss(robust, (LOG_REF + scale * order).log_softmax(-1), preference=clean).item()
        for scale in (10.0, 100.0, 1000.0)
    ]
    assert values[0] > values[1] > values[2] and values[2] < -10


@pytest.mark.parametrize("label", [0.3, 0.6, 0.8, 0.99])
def test_two_completions(label):
    """Margins of the losses that have no closed form for more: where the derivative of the expected loss is zero."""
    eps, odds = 0.1, math.log(0.9 / 0.1)
    smooth = (1 - 2 * eps) * label + eps
    claimed = {
        losses.dpo_loss: ({"label_smoothing": eps}, math.log(smooth / (1 - smooth))),
        losses.exo_pref_loss: ({"label_smoothing": eps}, (2 * label - 1) * odds),
        losses.ipo_loss: ({}, 2 * label - 1),
    }
    for loss, (settings, best) in claimed.items():
        margin = torch.tensor([best], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        beta = 0.5 if loss is losses.ipo_loss else 1.0
        right = loss(margin, zero, zero, zero, beta=beta, **settings).losses
        wrong = loss(zero, margin, zero, zero, beta=beta, **settings).losses
        (slope,) = torch.autograd.grad((label * right + (1 - label) * wrong).sum(), margin)
        assert_close(slope, [0.0], scale=10.0)
    # The hinge: margin 1 for the majority, whatever its size.
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)
    zero = torch.zeros_like(grid)
    hinge = functools.partial(losses.hinge_loss, beta=1.0)
    total = label * hinge(grid, zero, zero, zero).losses + (1 - label) * hinge(zero, grid, zero, zero).losses
    assert_close(grid[total.argmin()], math.copysign(1.0, label - 0.5))


@pytest.mark.parametrize(
    ("score", "inverse"),
    [
        (functools.partial(losses.alpha_score, alpha=1), lambda s: s),
        (functools.partial(losses.alpha_score, alpha=0), lambda s: -torch.log1p(-s)),
        (functools.partial(losses.alpha_score, alpha=0.5), lambda s: -2 * torch.log1p(-s / 2)),
        (losses.jensen_shannon_score, lambda s: -torch.log(2 * torch.exp(-s) - 1)),
    ],
    ids=["kl", "kl_ref_pi", "alpha", "js"],
)
def test_f_dpo(score, inverse):
    """beta f'(rho) = r - c, with c such that the policy is normalised; c is sought where the inverse exists."""
    beta = 0.9
    assert_close(score(inverse(torch.tensor([-2.0, 0.3], dtype=torch.float64))), [-2.0, 0.3])

    def log_pi_of(c: float) -> Tensor:
        values = inverse((REWARD - REWARD.max()) / beta - c)
        return LOG_REF + torch.where(values.isfinite(), values, 100.0)

    expected = functools.partial(expected_pair_loss, with_reference(losses.f_dpo_loss, beta=beta, score=score))
    assert_optimal(expected, normalised_root(log_pi_of))


def test_chi_po():
    """rho + log rho = (r - Z)/beta, solved by Newton for log rho: Lambert's function."""

    def log_rho(s: Tensor) -> Tensor:
        x = torch.where(s > 1, s.clamp(min=1).log(), s - 1)
        for _ in range(60):
            x = x - (x.exp() + x - s) / (x.exp() + 1)
        return x

    log_pi = normalised_root(lambda c: LOG_REF + log_rho((REWARD - c) / 0.6))
    for max_margin in (3.5, math.inf):
        loss = with_reference(losses.chi_po_loss, beta=0.6, max_margin=max_margin)
        assert_optimal(functools.partial(expected_pair_loss, loss), log_pi)


def test_regression_on_rewards():
    """Whichever pairs are drawn, and at a value of 0 where that is a square."""

    def with_rewards(loss, **settings):
        return lambda log_pi, one, two: (
            loss(log_pi[one], log_pi[two], LOG_REF[one], LOG_REF[two], REWARD[one], REWARD[two], **settings).losses
        )

    for loss in [
        with_rewards(losses.rebel_loss, eta=1 / 0.7),
        with_rewards(losses.rpo_squared_loss, beta=1.4, reward_scale=2.0),
        with_rewards(losses.rpo_kl_loss, beta=1.4, reward_scale=2.0),
    ]:
        assert_optimal(functools.partial(expected_pair_loss, loss), PI_STAR)
        assert_close(expected_pair_loss(loss, PI_STAR), 0.0)


def test_dro():
    _, log_z = optimal_policy(LOG_REF, REWARD, beta=0.7)

    def expected(log_pi: Tensor, value: Tensor = 0.7 * log_z) -> Tensor:
        return (MU * losses.dro_loss(log_pi, LOG_REF, REWARD, value.expand(5), tau=0.7).losses).sum()

    assert_optimal(expected, PI_STAR)
    assert gradient_at(functools.partial(expected, value=0.7 * log_z + 1), PI_STAR).abs().max() > 1e-2


def test_nca_and_bco_on_pairs():
    """Win rates, where what they make is normalised: on the reference's own pairs, or by choice of delta."""
    nca = functools.partial(expected_pair_loss, with_reference(losses.nca_pair_loss, beta=1.0), mu=REF)
    assert_optimal(nca, LOG_REF + (2 * PREFERENCE @ REF).log())
    log_pi = normalised_root(lambda c: LOG_REF + (WIN_RATE.logit() - c) / 0.7)
    delta = (0.7 * (log_pi - LOG_REF) - WIN_RATE.logit())[0].item()
    bco = with_reference(losses.bco_pair_loss, beta=0.7, delta=delta)
    assert_optimal(functools.partial(expected_pair_loss, bco), log_pi)


def test_sppo_is_a_distance_from_win_rates():
    """Up to a constant, twice the mean square of log ratio minus (win rate - 1/2)/beta."""
    sppo = with_reference(losses.sppo_loss, beta=0.7)
    target = (WIN_RATE - 0.5) / 0.7
    rest = [
        expected_pair_loss(sppo, log_pi) - 2 * (MU * (log_pi - LOG_REF - target) ** 2).sum()
        for log_pi in (LOG_REF, PI_STAR, MU.log())
    ]
    assert_close(rest[1], rest[0], scale=10.0)
    assert_close(rest[2], rest[0], scale=10.0)


def test_bco_on_single_completions():
    """Desirable with probability sigma(r - c)."""
    _, log_z = optimal_policy(LOG_REF, REWARD, beta=0.7)
    wanted = (REWARD - 0.4).sigmoid()

    def expected(log_pi: Tensor, delta: Tensor = 0.4 - 0.7 * log_z) -> Tensor:
        def loss(desirable: bool) -> Tensor:
            flags = torch.full((5,), desirable)
            return losses.bco_loss(log_pi, LOG_REF, flags, beta=0.7, delta=delta).losses

        return (MU * (wanted * loss(True) + (1 - wanted) * loss(False))).sum()

    assert_optimal(expected, PI_STAR)
    assert gradient_at(functools.partial(expected, delta=torch.tensor(1.0)), PI_STAR).abs().max() > 1e-3


def test_without_a_reference():
    simpo = functools.partial(losses.simpo_loss, beta=0.7, gamma=0.0)
    expected = functools.partial(
        expected_pair_loss,
        lambda log_pi, won, lost: simpo(log_pi[won], log_pi[lost], LENGTHS[won], LENGTHS[lost]).losses,
    )
    assert_optimal(expected, normalised_root(lambda c: LENGTHS * (REWARD - c) / 0.7))
    cpo = functools.partial(losses.cpo_loss, beta=0.7, nll_weight=0.0)
    expected = functools.partial(expected_pair_loss, lambda log_pi, won, lost: cpo(log_pi[won], log_pi[lost]).losses)
    assert_optimal(expected, (REWARD / 0.7).log_softmax(-1))


def test_losses_that_push_to_the_boundary():
    """APO-zero and KTO: the expected loss falls until a completion that mostly loses has no probability left."""
    apo = functools.partial(expected_pair_loss, with_reference(losses.apo_zero_loss, beta=1.0))

    def kto(log_pi: Tensor) -> Tensor:
        def loss(desirable: bool) -> Tensor:
            flags = torch.full((5,), desirable)
            return losses.kto_loss(log_pi, LOG_REF, flags, beta=1.0, reference_point=0.0).losses

        return (MU * (WIN_RATE * loss(True) + (1 - WIN_RATE) * loss(False))).sum()

    loser = int(WIN_RATE.argmin())
    assert WIN_RATE[loser] < 0.45
    for expected in (apo, kto):
        values = [
            expected(LOG_REF.index_fill(0, torch.tensor(loser), log_p).log_softmax(-1)).item()
            for log_p in (-3.0, -6.0, -12.0, -60.0)
        ]
        assert values == sorted(values, reverse=True) and values[-1] < values[0] - 1e-3


def test_lists():
    """All rankings of all five, and all five as one list: Plackett-Luce and f-PO aim at pi*."""
    orders = torch.tensor(list(itertools.permutations(range(5))))
    ordered = REWARD[orders]
    log_p = sum(ordered[:, k] - ordered[:, k:].logsumexp(-1) for k in range(5))

    def ranked(log_pi: Tensor) -> Tensor:
        return (log_p.exp() * losses.plackett_luce_loss((log_pi - LOG_REF)[orders], beta=0.7)).sum()

    assert_optimal(ranked, PI_STAR)

    def js(log_pi: Tensor) -> Tensor:
        return losses.fpo_loss(
            (log_pi - LOG_REF)[None], REWARD[None], divergence=losses.jensen_shannon, beta_pi=0.7, beta_r=1.0
        ).sum()

    assert_optimal(js, PI_STAR)
    assert_close(js(PI_STAR), 0.0)
