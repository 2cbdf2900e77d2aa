"""The oracles against cases worked out by hand."""

import ast
import math
from pathlib import Path

import pytest

from tests import oracles

LOG2, LOG3, LOG5 = math.log(2), math.log(3), math.log(5)
INF = math.inf
HALF, THIRD, QUARTER, THREE_QUARTERS = -LOG2, -LOG3, -2 * LOG2, LOG3 - 2 * LOG2

# Four completions; pi*, the tempered policy and all figures below to 12 digits.
REF = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
PI = [math.log(p) for p in (0.1, 0.2, 0.3, 0.4)]
REWARD = [0.0, 1.0, 2.0, 3.0]


def near(expected, tolerance=1e-14):
    return pytest.approx(expected, rel=tolerance, abs=tolerance)


def probabilities(log_p):
    return [math.exp(value) for value in log_p]


def test_the_oracles_import_nothing_but_the_standard_library():
    tree = ast.parse(Path(oracles.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported == {"itertools", "math", "collections.abc"}


def test_log_sum_exp_and_log_softmax():
    assert oracles.log_sum_exp([LOG2, LOG3]) == near(LOG5)
    assert oracles.log_sum_exp([LOG2, -INF]) == near(LOG2)
    assert oracles.log_sum_exp([-INF, -INF]) == -INF
    assert oracles.log_sum_exp([1000.0 + LOG2, 1000.0 + LOG3]) == near(1000 + LOG5)
    assert oracles.log_softmax([LOG2, LOG3]) == near([LOG2 - LOG5, LOG3 - LOG5])
    assert oracles.log_softmax([7.0, -INF]) == [0.0, -INF]
    assert oracles.log_softmax([1e15 + 1, 1e15]) == oracles.log_softmax([1.0, 0.0])
    assert oracles.below_max([3.0, 5.0, -INF]) == [-2.0, 0.0, -INF]


def test_expectation():
    assert oracles.expectation([HALF, HALF], [1.0, 4.0]) == near(2.5)
    assert oracles.expectation([0.0, -INF], [2.0, INF]) == 2.0
    assert oracles.expectation([0.0, -1e4], [2.0, INF]) == INF
    assert oracles.expectation([HALF, HALF], [2.0, -INF]) == -INF


def test_kl():
    # (1/2, 1/2) against (1/4, 3/4): 1/2 log 2 + 1/2 log(2/3).
    assert oracles.kl([HALF, HALF], [QUARTER, THREE_QUARTERS]) == near(LOG2 - LOG3 / 2)
    # (1/4, 3/4) against (1/2, 1/2): -1/4 log 2 + 3/4 log(3/2).
    assert oracles.kl([QUARTER, THREE_QUARTERS], [HALF, HALF]) == near(3 * LOG3 / 4 - LOG2)
    assert oracles.kl([0.0, -INF], [HALF, HALF]) == near(LOG2)
    assert oracles.kl([HALF, HALF], [0.0, -INF]) == INF
    assert oracles.kl([0.0, -INF], [0.0, -INF]) == 0.0


def test_entropy():
    assert oracles.entropy([QUARTER, THREE_QUARTERS]) == near(2 * LOG2 - 3 * LOG3 / 4)
    assert oracles.entropy([THIRD] * 3) == near(LOG3)
    assert oracles.entropy([0.0, -INF]) == 0.0


def test_total_variation():
    assert oracles.total_variation([QUARTER, THREE_QUARTERS], [HALF, HALF]) == near(0.25)
    assert oracles.total_variation([0.0, -INF], [-INF, 0.0]) == 1.0


def test_jensen_shannon():
    assert oracles.jensen_shannon([0.0, -INF], [-INF, 0.0]) == near(LOG2)
    # (1, 0) and (1/2, 1/2), mean (3/4, 1/4): 1/2 log(4/3) + 1/4 log(2/3) + 1/4 log 2.
    assert oracles.jensen_shannon([0.0, -INF], [HALF, HALF]) == near(3 * LOG2 / 2 - 3 * LOG3 / 4)


def test_optimal_policy():
    # Reference (1/2, 1/2) tilted by (1, 3) at beta 2, r = (0, 2 log 3): Z = 2, pi* = (1/4, 3/4).
    log_pi_star, log_z = oracles.optimal_policy([HALF, HALF], [0.0, 2 * LOG3], 2.0)
    assert log_z == near(LOG2)
    assert log_pi_star == near([QUARTER, THREE_QUARTERS])
    assert oracles.optimal_policy([HALF, HALF], [-INF, 0.0], 1.0) == ([-INF, 0.0], near(-LOG2))


def test_tempered_policy():
    # Square roots of (9/16, 1/16) under a uniform reference: (3/4, 1/4).
    log_pi = [math.log(0.9), math.log(0.1)]
    assert oracles.tempered_policy(log_pi, [HALF, HALF], 0.5) == near([THREE_QUARTERS, QUARTER])
    assert oracles.tempered_policy(log_pi, [HALF, HALF], 1.0) == near(log_pi)
    assert oracles.tempered_policy([HALF, HALF], [0.0, -INF], 0.5) == [0.0, -INF]


def test_best_of_n():
    # Two draws of a fair coin: the better side wins unless both draws are the worse one.
    assert oracles.best_of_n([HALF, HALF], [0.0, 1.0], 2) == near([1 / 4, 3 / 4])
    # A tie between the last two: (1/3)^2 for the worst, the rest shared.
    assert oracles.best_of_n([THIRD] * 3, [0.0, 1.0, 1.0], 2) == near([1 / 9, 4 / 9, 4 / 9])
    # Unequal masses in a tie keep their proportion.
    assert oracles.best_of_n([QUARTER, THREE_QUARTERS], [5.0, 5.0], 3) == near([1 / 4, 3 / 4])
    assert oracles.best_of_n([HALF, HALF, -INF], [0.0, 1.0, 2.0], 2) == near([1 / 4, 3 / 4, 0.0])


def test_objectives():
    # E r = 1/2 * 4; KL of (1/2, 1/2) from (1/4, 3/4) is log 2 - log 3 / 2; beta 2.
    log_pi, log_ref = [HALF, HALF], [QUARTER, THREE_QUARTERS]
    assert oracles.alignment_objective(log_pi, log_ref, [0.0, 4.0], 2.0) == near(2 - 2 * LOG2 + LOG3)
    # At beta_pi = 1 the tempered policy is the policy.
    assert oracles.generalized_objective(log_pi, log_ref, [0.0, 4.0], 1.0, 2.0) == near(2 - 2 * LOG2 + LOG3)
    # (9/10, 1/10) tempered by 1/2 is (3/4, 1/4): E r = 1, KL from (1/2, 1/2) is 3/4 log 3 - log 2.
    log_pi = [math.log(0.9), math.log(0.1)]
    expected = 1 - 3 * (3 * LOG3 / 4 - LOG2)
    assert oracles.generalized_objective(log_pi, [HALF, HALF], [0.0, 4.0], 0.5, 3.0) == near(expected)
    assert oracles.alignment_objective([HALF, HALF], [HALF, HALF], [0.0, -INF], 1.0) == -INF


def test_list_losses():
    # p_f = (1/2, 1/2), p_r = (1/4, 3/4) from rewards (0, 2 log 3) at beta_r 2.
    assert oracles.exo_rw([5.0, 5.0], [0.0, 2 * LOG3], 0.7, 2.0) == near(LOG2 - LOG3 / 2)
    assert oracles.dpo_rw([5.0, 5.0], [0.0, 2 * LOG3], 0.7, 2.0) == near(LOG2)
    # p_f = (1/4, 3/4) from log ratios (0, 2 log 3) at beta_pi 1/2, p_r = (1/2, 1/2).
    assert oracles.exo_rw([0.0, 2 * LOG3], [1.0, 1.0], 0.5, 3.0) == near(3 * LOG3 / 4 - LOG2)
    assert oracles.dpo_rw([0.0, 2 * LOG3], [1.0, 1.0], 0.5, 3.0) == near(2 * LOG2 - LOG3 / 2)
    # Three candidates, p_f = (1/6, 2/6, 3/6), p_r = (1/3, 1/3, 1/3).
    expected = LOG3 - (LOG2 + LOG3) + LOG2 / 3 + LOG3 / 2
    assert oracles.exo_rw([0.0, LOG2, LOG3], [4.0] * 3, 1.0, 1.0) == near(expected)
    assert oracles.exo_rw([0.0], [3.0], 1.0, 1.0) == 0.0
    assert oracles.dpo_rw([0.0], [3.0], 1.0, 1.0) == 0.0
    # A forbidden candidate: infinite for EXO, without effect on DPO's target; a candidate the policy excludes: reverse.
    assert oracles.exo_rw([0.0, 0.0], [0.0, -INF], 1.0, 1.0) == INF
    assert oracles.dpo_rw([0.0, 0.0], [0.0, -INF], 1.0, 1.0) == near(LOG2)
    assert oracles.exo_rw([0.0, -INF], [0.0, 0.0], 1.0, 1.0) == near(LOG2)
    assert oracles.dpo_rw([0.0, -INF], [0.0, 0.0], 1.0, 1.0) == INF
    assert oracles.exo_rw([0.0, -INF], [0.0, -INF], 1.0, 1.0) == 0.0


def test_pair_losses():
    # Margin log 3: (3/4, 1/4). beta 1/2, difference of log ratios 2 log 3.
    pair = (LOG3, -LOG3, 0.0, 0.0, 0.5)
    # Target (2/3, 1/3): 3/4 log(9/8) + 1/4 log(3/4) = 3/4 (2 log 3 - 3 log 2) + 1/4 (log 3 - 2 log 2).
    assert oracles.exo_pref(*pair, 1 / 3) == near(7 * LOG3 / 4 - 11 * LOG2 / 4)
    assert oracles.exo_pref(*pair, 1 / 4) == near(0.0)
    assert oracles.dpo(*pair, 0.0) == near(2 * LOG2 - LOG3)
    assert oracles.dpo(*pair, 1 / 4) == near(2 * LOG2 - 3 * LOG3 / 4)
    # The reference enters with the opposite sign.
    assert oracles.dpo(0.0, 0.0, LOG3, -LOG3, 0.5, 0.0) == near(2 * LOG2)
    assert oracles.exo_pref(0.0, 0.0, LOG3, -LOG3, 0.5, 1 / 4) == near(LOG3 / 2)
    assert oracles.dpo(0.0, -INF, 0.0, 0.0, 1.0, 0.0) == 0.0
    assert oracles.dpo(0.0, -INF, 0.0, 0.0, 1.0, 0.1) == INF
    assert oracles.dpo(-INF, 0.0, 0.0, 0.0, 1.0, 0.0) == INF
    assert oracles.exo_pref(0.0, -INF, 0.0, 0.0, 1.0, 1 / 3) == near(LOG3 - LOG2)
    assert oracles.exo_pref(-INF, 0.0, 0.0, 0.0, 1.0, 1 / 3) == near(LOG3)


def test_expected_loss_over_two_completions():
    # K=2 under (1/2, 1/2): mixed pairs have probability 1/2 and EXO-rw of (1/2, 1/2) against (1/4, 3/4); equal
    # pairs give 0 for EXO-rw and log 2 for DPO-rw.
    log_pi, log_ref, reward = [HALF, HALF], [HALF, HALF], [0.0, 2 * LOG3]
    assert oracles.expected_loss(oracles.exo_rw, log_pi, log_ref, reward, 2, 0.7, 2.0) == near(LOG2 / 2 - LOG3 / 4)
    assert oracles.expected_loss(oracles.dpo_rw, log_pi, log_ref, reward, 2, 0.7, 2.0) == near(LOG2)
    assert oracles.expected_loss(oracles.exo_rw, log_pi, log_ref, reward, 1, 0.7, 2.0) == 0.0
    # A completion the reference never draws takes no part.
    wider = oracles.expected_loss(oracles.exo_rw, [*log_pi, -INF], [*log_ref, -INF], [*reward, 9.0], 2, 0.7, 2.0)
    assert wider == near(LOG2 / 2 - LOG3 / 4)


def test_worked_example_targets():
    star, log_z = oracles.optimal_policy(REF, REWARD, 0.5)
    assert probabilities(star) == near([0.00742401, 0.04114233, 0.20266865, 0.74876501], 5e-9)
    assert log_z == near(3.9867449896272564)
    star_1, log_z_1 = oracles.optimal_policy(REF, REWARD, 1.0)
    assert probabilities(star_1) == near([0.08507291, 0.17343910, 0.31430424, 0.42718375], 5e-9)
    assert log_z_1 == near(1.5479559335786868)
    tempered = oracles.tempered_policy(PI, REF, 0.5)
    assert probabilities(tempered) == near([0.22474487, 0.27525513, 0.27525513, 0.22474487], 5e-9)
    assert oracles.kl(tempered, star_1) == near(0.1646044209522257)
    assert oracles.kl(star_1, tempered) == near(0.1533032986215301)
    assert oracles.alignment_objective(PI, REF, REWARD, 0.5) == near(1.7717825904266082)
    assert oracles.generalized_objective(PI, REF, REWARD, 0.5, 1.0) == near(1.383351512626461)


@pytest.mark.parametrize(
    ("n", "expected", "divergence"),
    [(2, [0.16, 0.33, 0.32, 0.19], 0.1571992419669525), (4, [0.0256, 0.2145, 0.4160, 0.3439], 0.5871136671886619)],
)
def test_worked_example_best_of_n(n, expected, divergence):
    best = oracles.best_of_n(REF, REWARD, n)
    assert best == near(expected)
    assert oracles.kl([math.log(p) for p in best], REF) == near(divergence)


@pytest.mark.parametrize(
    ("loss", "k", "expected"),
    [
        (oracles.exo_rw, 2, 0.047856964556),
        (oracles.exo_rw, 3, 0.077314264452),
        (oracles.exo_rw, 4, 0.096124475439),
        (oracles.exo_rw, 8, 0.129777193422),
        (oracles.dpo_rw, 2, 0.574938198822),
        (oracles.dpo_rw, 3, 0.913479391488),
        (oracles.dpo_rw, 4, 1.159165780342),
    ],
)
def test_worked_example_expected_losses(loss, k, expected):
    assert oracles.expected_loss(loss, PI, REF, REWARD, k, 0.5, 1.0) == near(expected, 1e-12)
