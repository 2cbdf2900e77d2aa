"""The oracles of the family of losses on cases worked out by hand: numbers with a closed form, mostly logarithms."""

import math

import pytest

from tests import loss_oracles as oracles

# Log ratios log 3 and log 1/2 at unit references; sigma(log 3) = 3/4, sigma(log 1/2) = 1/3, margin log 6.
PAIR = (math.log(3) - 1.0, math.log(1 / 2) - 2.0, -1.0, -2.0)
A, B = math.log(3), math.log(1 / 2)


def close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=1e-13, abs_tol=1e-13)


def test_building_blocks():
    assert close(oracles.sigma(math.log(3)), 0.75) and close(oracles.sigma(-math.log(3)), 0.25)
    assert close(oracles.logistic(math.log(3)), math.log(4 / 3)) and close(oracles.logistic(-math.log(3)), math.log(4))
    assert oracles.logistic(-1e4) == 1e4 and oracles.sigma(-1e4) == 0
    for got, wanted in zip(oracles.softmax([math.log(2), 0.0, 0.0]), [0.5, 0.25, 0.25], strict=True):
        assert close(got, wanted)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (oracles.dpo(*PAIR, beta=1.0), math.log(7 / 6)),
        (oracles.dpo(*PAIR, beta=1.0, label_smoothing=0.25), 0.75 * math.log(7 / 6) + 0.25 * math.log(7)),
        (oracles.robust_dpo(*PAIR, beta=1.0, label_smoothing=0.25), 1.5 * math.log(7 / 6) - 0.5 * math.log(7)),
        (
            oracles.exo_pref(*PAIR, beta=1.0, label_smoothing=0.25),
            6 / 7 * math.log(8 / 7) + 1 / 7 * math.log(4 / 7),
        ),
        (oracles.ipo(*PAIR, beta=0.25), (math.log(6) - 2) ** 2),
        (oracles.hinge(*PAIR, beta=0.5), 1 - math.log(6) / 2),
        (oracles.hinge(*PAIR, beta=1.0), 0.0),
        (oracles.sppo(*PAIR, beta=0.5), (A - 1) ** 2 + (B + 1) ** 2),
        (oracles.sppo(*PAIR, beta=0.5, win_rate=0.5), A**2 + B**2),
        (oracles.nca_pair(*PAIR, beta=1.0), math.log(4 / 3) + math.log(4) / 2 + math.log(3 / 2) / 2),
        (oracles.bco_pair(*PAIR, beta=1.0, delta=0.0), math.log(4 / 3) + math.log(3 / 2)),
        (oracles.bco_pair(*PAIR, beta=1.0, delta=math.log(3)), math.log(2) + math.log(7 / 6)),
        (oracles.apo_zero(*PAIR, beta=1.0), 1 / 4 + 1 / 3),
        (oracles.apo_down(*PAIR, beta=1.0), 3 / 4 + 1 / 7),
        (oracles.discopop(*PAIR, beta=1.0, tau=1.0), math.log(7 / 6) / 7 + 6 / 7 / 6),
        (oracles.dpop(*PAIR, beta=1.0, penalty=2.0), math.log(7 / 6)),
        (oracles.dpop(PAIR[1], PAIR[0], PAIR[3], PAIR[2], beta=1.0, penalty=1.0), math.log(13)),
        (oracles.cal_dpo(*PAIR, beta=0.5), math.log(7 / 6) + (A - 1) ** 2 + (B + 1) ** 2),
        (oracles.f_dpo(*PAIR, beta=1.0, derivative=math.log), math.log(7 / 6)),
        (oracles.f_dpo(*PAIR, beta=math.log(3), derivative=lambda t: 0.4 * t), math.log(4 / 3)),
        (oracles.chi_po(*PAIR, beta=1.0, max_margin=math.log(3)), math.log(4 / 3)),
        (oracles.chi_po(*PAIR, beta=1.0, max_margin=9.0), math.log1p(math.exp(-2.5) / 6)),
        (oracles.rebel(*PAIR, 3.0, 1.0, eta=0.5), (2 * math.log(6) - 2) ** 2),
        (oracles.rpo_squared(*PAIR, 3.0, 1.0, beta=2.0, reward_scale=0.5), (2 * math.log(6) - 1) ** 2),
        (
            oracles.rpo_kl(*PAIR, math.log(3), 0.0, beta=1.0, reward_scale=1.0),
            0.75 * math.log(7 / 8) + 0.25 * math.log(7 / 4),
        ),
        (oracles.simpo(-2.0, -6.0, 2, 3, beta=math.log(3), gamma=0.0), math.log(4 / 3)),
        (oracles.simpo(-2.0, -6.0, 2, 3, beta=2.0, gamma=2.0), math.log(2)),
        # Mean probabilities 3/4 and 1/2: odds 3 and 1.
        (oracles.orpo(2 * math.log(3 / 4), 3 * math.log(1 / 2), 2, 3, odds_weight=0.5), 1.5 * math.log(4 / 3)),
        (oracles.cpo(-2.0, -3.0, beta=math.log(3), nll_weight=0.5), math.log(4 / 3) + 1),
        (oracles.cpo(-2.0, -3.0, 4, beta=math.log(3), nll_weight=0.5), math.log(4 / 3) + 0.25),
        (oracles.kto(A, 0.0, True, beta=1.0, reference_point=0.0), 1 / 4),
        (oracles.kto(A, 0.0, False, beta=1.0, reference_point=0.0, undesirable_weight=2.0), 3 / 2),
        (oracles.kto(A + 1, 0.0, True, beta=1.0, reference_point=1.0, desirable_weight=2.0), 1 / 2),
        (oracles.bco(A, 0.0, True, beta=1.0, delta=0.0), math.log(4 / 3)),
        (oracles.bco(A + 1, 0.0, False, beta=1.0, delta=1.0), math.log(4)),
        (oracles.dro(-1.0, -3.0, 5.0, 1.0, tau=0.5), 4.5),
        (oracles.plackett_luce([math.log(2), 0.0, 0.0], beta=1.0), 2 * math.log(2)),
        (oracles.plackett_luce([0.0, 0.0, math.log(2)], beta=1.0), math.log(4) + math.log(3)),
        (
            oracles.nca_rw([A, B], [math.log(3), 0.0], beta_pi=1.0, beta_r=1.0),
            0.75 * math.log(4 / 3) + 0.25 * math.log(3) + math.log(4) / 2 + math.log(3 / 2) / 2,
        ),
        # (3/4, 1/4) against (1/4, 3/4): the mean is a fair coin.
        (oracles.fpo_js([A, 0.0], [0.0, A], beta_pi=1.0, beta_r=1.0), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
    ],
)  # fmt: skip
def test_by_hand(value, expected):
    assert close(value, expected)


def test_sorted_by_hand():
    """Margins 3 and 1 of the policy, 0 and 2 of the reference; log ratios sorted apart."""
    pairs = [(3.0, 0.0, 0.0, 0.0), (2.0, 1.0, 3.0, 1.0)]
    values = oracles.aot(pairs, beta=math.log(3))
    assert all(close(value, math.log(4 / 3)) for value in values)
    # Chosen 3 and -1, rejected 0 and 0.
    values = oracles.aot_unpaired(pairs, beta=1.0)
    assert close(values[0], oracles.logistic(-1.0)) and close(values[1], oracles.logistic(3.0))
