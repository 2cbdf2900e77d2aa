"""Win rates, the frontier and effective shares: loops, laws, what no policy can pass, end cases, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.divergences import kl_divergence
from exo_toy.estimators import effective_sample_size
from exo_toy.evaluation import effective_share, frontier, win_rate
from exo_toy.targets import best_of_n, optimal_policy
from tests import oracles, sequence_strategies
from tests.tolerances import assert_close

INF = math.inf


def table(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def normalised(shape: tuple[int, ...], generator: torch.Generator, *, holes: bool = False) -> Tensor:
    logits = sequence_strategies.normal(shape, generator)
    return (sequence_strategies.with_holes(logits, generator) if holes else logits).log_softmax(-1)


# The oracles


def wins(log_p: list[float], log_q: list[float], reward: list[float]) -> float:
    """All pairs, one by one."""
    points = {True: 1.0, False: 0.0}
    return math.fsum(
        math.exp(lp) * math.exp(lq) * (0.5 if reward[i] == reward[j] else points[reward[i] > reward[j]])
        for i, lp in enumerate(log_p)
        for j, lq in enumerate(log_q)
    )


def share(log_w: list[float], log_ref: list[float]) -> float:
    """(E w)^2 / E w^2, by powers of w itself."""
    w, p = ([math.exp(value) for value in row] for row in (log_w, log_ref))
    first = math.fsum(a * b for a, b in zip(p, w, strict=True))
    return first**2 / math.fsum(a * b * b for a, b in zip(p, w, strict=True))


def test_oracles_by_hand():
    half, quarter = math.log(0.5), math.log(0.25)
    # 1/2 * 1/4 tie at the top, 1/2 wins over 3/4, 1/2 ties below with 3/4.
    assert wins([half, half], [math.log(0.75), quarter], [0.0, 1.0]) == pytest.approx(
        0.5 * (0.75 + 0.125) + 0.5 * 0.375
    )
    assert wins([half, half], [half, half], [2.0, 2.0]) == pytest.approx(0.5)
    # Weights 1 and 3: 2^2 / 5.
    assert share([0.0, math.log(3)], [half, half]) == pytest.approx(0.8)


# Win rates


@given(generator=sequence_strategies.generators(), levels=st.sampled_from([1, 2, 3, 100]), holes=st.booleans())
def test_win_rate_agrees_with_loops(device, generator, levels, holes):
    """Rewards of few levels tie often."""
    log_p, log_q = (normalised((3, 7), generator, holes=holes) for _ in range(2))
    reward = torch.randint(levels, (3, 7), generator=generator).double() / 3
    rates = win_rate(log_p.to(device), log_q.to(device), reward.to(device))
    rows = zip(log_p.tolist(), log_q.tolist(), reward.tolist(), strict=True)
    assert_close(rates, [wins(*row) for row in rows])


@given(generator=sequence_strategies.generators(), ties=st.booleans())
def test_one_wins_what_the_other_loses(generator, ties):
    log_p, log_q = (normalised((3, 40), generator) for _ in range(2))
    reward = sequence_strategies.normal((3, 40), generator)
    reward = reward.round() if ties else reward
    ones = torch.ones(3, dtype=torch.float64)
    assert_close(win_rate(log_p, log_q, reward) + win_rate(log_q, log_p, reward), ones)
    assert_close(win_rate(log_p, log_p, reward), ones / 2)


@given(generator=sequence_strategies.generators())
def test_only_the_order_of_rewards_counts(generator):
    log_p, log_q = (normalised((3, 40), generator) for _ in range(2))
    reward = sequence_strategies.normal((3, 40), generator).round(decimals=2)
    rates = win_rate(log_p, log_q, reward)
    assert_close(win_rate(log_p, log_q, 7 * reward - 100), rates)
    assert_close(win_rate(log_p, log_q, reward.exp()), rates)
    assert_close(win_rate(log_p, log_q, -reward), 1 - rates)
    order = torch.randperm(40, generator=generator)
    assert_close(win_rate(log_p[:, order], log_q[:, order], reward[:, order]), rates)


@pytest.mark.parametrize(("gap", "decimals", "rate"), [(1e-12, 9, 0.5), (1e-6, 9, 0.75), (1e-6, 3, 0.5), (0.1, 0, 0.5)])
def test_rewards_that_agree_to_the_decimals_tie(gap, decimals, rate):
    log_p, log_q = table([[0.25, 0.75]]).log(), table([[0.75, 0.25]]).log()
    # The better one meets the worse with 9/16, the worse the better with 1/16; 6/16 are ties at any gap.
    assert wins(log_p[0].tolist(), log_q[0].tolist(), [0.0, 1.0]) == pytest.approx(0.75)
    assert_close(win_rate(log_p, log_q, table([[1.0, 1.0 + gap]]), decimals=decimals), [rate])


def test_certain_wins_and_losses():
    best, worst = table([[0.0, 0.0, 1.0]]).log(), table([[1.0, 0.0, 0.0]]).log()
    reward = table([[-1e6, 0.0, 1e6]])
    assert win_rate(best, worst, reward).tolist() == [1.0]
    assert win_rate(worst, best, reward).tolist() == [0.0]


@given(generator=sequence_strategies.generators(), n=st.integers(2, 9))
def test_best_of_n_wins_as_often_as_its_n_draws(generator, n):
    """Against one more draw, with rewards all different and many: n of n + 1 times, but for ties, which halve."""
    log_ref = normalised((2, 30), generator)
    reward = sequence_strategies.normal((2, 30), generator)
    found = win_rate(best_of_n(log_ref, reward, n=n), log_ref, reward)
    for x in range(2):
        # By the distribution function: F^n for the best of n.
        order = reward[x].argsort()
        below, rate = 0.0, []
        for p in log_ref[x, order].exp().tolist():
            rate.append(((below + p) ** n - below**n) * (below + p / 2))
            below += p
        assert found[x].item() == pytest.approx(math.fsum(rate), abs=1e-12)


# The frontier


def mean_variance(log_pi: Tensor, reward: Tensor) -> float:
    """Variance of the reward under a policy, a mean over prompts."""
    rows = list(zip(log_pi.tolist(), reward.tolist(), strict=True))
    means = [oracles.expectation(pi, r) for pi, r in rows]
    variances = [oracles.expectation(pi, [(v - m) ** 2 for v in r]) for (pi, r), m in zip(rows, means, strict=True)]
    return math.fsum(variances) / len(rows)


def of_policy(log_pi: Tensor, log_ref: Tensor, reward: Tensor) -> tuple[float, float]:
    """Mean divergence and mean reward, by the oracles."""
    rows = list(zip(log_pi.tolist(), log_ref.tolist(), reward.tolist(), strict=True))
    kls = [oracles.kl(pi, ref) for pi, ref, _ in rows]
    rewards = [oracles.expectation(pi, r) for pi, _, r in rows]
    return math.fsum(kls) / len(rows), math.fsum(rewards) / len(rows)


@given(generator=sequence_strategies.generators(), sharpness=st.sampled_from([0.1, 1.0, 5.0]))
def test_no_policy_has_more_reward_at_its_divergence(generator, sharpness):
    """Drawn tables; and optimal policies whose temperature differs between prompts, which come close."""
    log_ref, reward = normalised((3, 6), generator), sequence_strategies.normal((3, 6), generator)
    drawn = [(log_ref + sharpness * sequence_strategies.normal((3, 6), generator)).log_softmax(-1) for _ in range(2)]
    tilted = [
        (log_ref + reward * (sharpness * sequence_strategies.normal((3, 1), generator).exp())).log_softmax(-1)
        for _ in range(2)
    ]
    holes = [normalised((3, 6), generator, holes=True)]
    for log_pi in drawn + tilted + holes:
        kl, mean = of_policy(log_pi, log_ref, reward)
        most = frontier(log_ref, reward, kl=kl)
        # Above what the coldest temperature allows the reward falls short of its maximum by less than that.
        slack = 1e-10 if most.beta > 0 else 1e-3
        assert mean <= most.reward + slack


@given(
    generator=sequence_strategies.generators(),
    beta=st.floats(0.05, 20.0),
    n_prompts=st.sampled_from([1, 3]),
    shift=st.sampled_from([0.0, -50.0]),
)
def test_the_optimal_policy_lies_on_it(generator, beta, n_prompts, shift):
    """With its own temperature."""
    log_ref = normalised((n_prompts, 6), generator)
    reward = sequence_strategies.normal((n_prompts, 6), generator) + shift
    log_pi, _ = optimal_policy(log_ref, reward, beta=beta)
    kl, mean = of_policy(log_pi, log_ref, reward)
    point = frontier(log_ref, reward, kl=kl)
    # d KL / d log beta = -Var / beta^2 and d reward / d KL = beta: what a divergence off by its rounding does to both.
    rounding = 1e-13 * (1 + abs(shift) / beta)
    assert point.reward == pytest.approx(mean, abs=1e-12 * (1 + abs(shift)) + beta * rounding)
    assert point.beta == pytest.approx(beta, rel=1e-11 + 2 * rounding * beta**2 / mean_variance(log_pi, reward))


@pytest.mark.parametrize("seed", range(8))
def test_more_divergence_allows_more_reward_and_ever_less(seed):
    """Monotone and concave, its slope the temperature."""
    generator = torch.Generator().manual_seed(seed)
    log_ref, reward = normalised((3, 6), generator), sequence_strategies.normal((3, 6), generator)
    most = kl_divergence(optimal_policy(log_ref, reward, beta=1e-2)[0], log_ref).mean().item()
    kls = [most * i / 5 for i in range(6)]
    points = [frontier(log_ref, reward, kl=kl) for kl in kls]
    for (kl, point), (next_kl, further) in zip(
        zip(kls[:-1], points[:-1], strict=True), zip(kls[1:], points[1:], strict=True), strict=True
    ):
        slope = (further.reward - point.reward) / (next_kl - kl)
        assert further.reward > point.reward and further.beta < point.beta
        assert further.beta - 1e-9 <= slope <= point.beta + 1e-9


def test_two_completions_in_closed_form():
    """Uniform reference: the divergence of (1 - p, p) is log 2 minus its entropy, its reward p."""
    uniform, reward = table([[0.5, 0.5]]).log(), table([[0.0, 1.0]])
    for p in (0.501, 0.6, 0.9, 0.999):
        kl = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
        point = frontier(uniform, reward, kl=kl)
        assert point.reward == pytest.approx(p, abs=1e-9)
        assert point.beta == pytest.approx(1 / math.log(p / (1 - p)), rel=1e-6)


def test_divergence_goes_where_it_buys_most():
    """One temperature for all prompts, not one divergence: a prompt of constant reward gets none."""
    log_ref, reward = table([[0.5, 0.5], [0.5, 0.5]]).log(), table([[0.0, 1.0], [3.0, 3.0]])
    alone = frontier(log_ref[:1], reward[:1], kl=0.2)
    both = frontier(log_ref, reward, kl=0.1)
    assert both.reward == pytest.approx((alone.reward + 3.0) / 2, abs=1e-9)
    assert both.beta == pytest.approx(alone.beta, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_without_divergence_there_is_the_reference(seed):
    """Just beside it the reward rises with the root of the divergence: sd * sqrt(2 kl)."""
    generator = torch.Generator().manual_seed(seed)
    log_ref, reward = normalised((3, 6), generator), sequence_strategies.normal((3, 6), generator)
    _, mean = of_policy(log_ref, log_ref, reward)
    point = frontier(log_ref, reward, kl=0.0)
    assert point.reward == pytest.approx(mean, abs=1e-12) and point.beta == INF
    sd = math.sqrt(mean_variance(log_ref, reward))
    for kl in (1e-8, 1e-6):
        # The next term is of the order of kl times the skewness.
        assert frontier(log_ref, reward, kl=kl).reward == pytest.approx(mean + sd * math.sqrt(2 * kl), abs=10 * kl)
    assert mean - 1e-12 <= frontier(log_ref, reward, kl=1e-300).reward <= mean + 1e-6


def test_with_divergence_enough_there_is_the_maximum():
    log_ref, reward = table([[0.5, 0.5], [0.1, 0.9]]).log(), table([[0.0, 1.0], [4.0, 3.0]])
    needed = (math.log(2) + math.log(10)) / 2
    for kl in (needed, 5.0, 1e6):
        point = frontier(log_ref, reward, kl=kl)
        assert point.reward == pytest.approx(2.5, abs=1e-12) and point.beta == 0.0
    assert frontier(log_ref, reward, kl=0.9 * needed).reward < 2.5 - 1e-3


def test_constant_rewards_leave_nothing_to_gain():
    log_ref = table([[0.5, 0.5], [0.1, 0.9]]).log()
    assert frontier(log_ref, torch.full((2, 2), 3.0, dtype=torch.float64), kl=1.0) == (pytest.approx(3.0), INF)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_of_the_rewards_does_not_matter(scale):
    generator = torch.Generator().manual_seed(0)
    log_ref, reward = normalised((3, 6), generator), sequence_strategies.normal((3, 6), generator)
    point, scaled = frontier(log_ref, reward, kl=0.3), frontier(log_ref, scale * reward, kl=0.3)
    assert scaled.reward == pytest.approx(scale * point.reward, rel=1e-9)
    assert scaled.beta == pytest.approx(scale * point.beta, rel=1e-6)


# Effective shares


@given(generator=sequence_strategies.generators(), holes=st.booleans())
def test_effective_share_agrees_with_loops(device, generator, holes):
    log_w, log_ref = sequence_strategies.normal((3, 7), generator), normalised((3, 7), generator, holes=holes)
    shares = effective_share(log_w.to(device), log_ref.to(device))
    assert_close(shares, [share(*row) for row in zip(log_w.tolist(), log_ref.tolist(), strict=True)])
    # What is a constant of the weights cancels, however large.
    assert_close(effective_share(log_w + 1000.0, log_ref), shares, scale=1000.0)
    assert_close(effective_share(log_w - 1000.0, log_ref), shares, scale=1000.0)


@given(generator=sequence_strategies.generators())
def test_effective_share_is_one_for_equal_weights_alone(generator):
    log_w, log_ref = sequence_strategies.normal((3, 7), generator), normalised((3, 7), generator)
    assert_close(effective_share(torch.zeros(3, 7).double(), log_ref), torch.ones(3))
    assert (effective_share(log_w, log_ref) < 1 - 1e-6).all() and (effective_share(log_w, log_ref) > 0).all()
    # Weights that leave one completion leave its probability.
    alone = torch.full((3, 7), -INF, dtype=torch.float64)
    alone[:, 2] = 0.3
    assert_close(effective_share(alone, log_ref), log_ref[:, 2].exp())


@given(generator=sequence_strategies.generators())
def test_effective_share_is_the_limit_of_the_effective_sample_size(generator):
    """A sample in which every completion stands as often as it should has exactly this share."""
    counts = torch.randint(1, 9, (5,), generator=generator)
    log_w = sequence_strategies.normal((5,), generator)
    sample = log_w.repeat_interleave(counts)
    wanted = effective_sample_size(sample.unsqueeze(0)) / len(sample)
    assert_close(effective_share(log_w.unsqueeze(0), (counts / counts.sum().double()).log().unsqueeze(0)), wanted)


# Errors

UNIFORM = table([[0.5, 0.5]]).log()
REWARD = table([[0.0, 1.0]])


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: win_rate(UNIFORM + 1, UNIFORM, REWARD), "log_p must hold normalised log-probabilities"),
        (lambda: win_rate(UNIFORM, 0 * UNIFORM, REWARD), "log_q must hold normalised log-probabilities"),
        (lambda: win_rate(UNIFORM, UNIFORM, table([[0.0, INF]])), "reward must be finite"),
        (lambda: win_rate(UNIFORM, UNIFORM, table([[math.nan, 0.0]])), "reward must be finite"),
        (lambda: win_rate(UNIFORM, UNIFORM, REWARD[:, :1]), "reward must have as many completions"),
        (lambda: win_rate(UNIFORM, UNIFORM.expand(2, 2), REWARD), "log_q must have the leading dimensions of log_p"),
        (lambda: win_rate(UNIFORM, UNIFORM, REWARD.long()), "reward must have a floating-point dtype"),
        (lambda: frontier(UNIFORM, REWARD, kl=-1e-9), "kl must be at least 0 and finite; got -1e-09"),
        (lambda: frontier(UNIFORM, REWARD, kl=math.nan), "kl must be at least 0 and finite; got nan"),
        (lambda: frontier(UNIFORM, REWARD, kl=INF), "kl must be at least 0 and finite; got inf"),
        (lambda: frontier(UNIFORM, REWARD, kl=torch.tensor(0.1)), r"kl must be .* \(a Python number\); got tensor"),
        (lambda: frontier(UNIFORM + 1, REWARD, kl=0.1), "log_ref must hold normalised log-probabilities"),
        (lambda: effective_share(UNIFORM, UNIFORM[:, :1]), "log_ref must have as many completions"),
        (lambda: effective_share([[0.0]], UNIFORM), "log_p_weight must be a torch.Tensor; got list"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The ends of the frontier, and weights where the reference is zero


def log(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("p", "rewards", "best"),
    [
        ([[0.5, 0.5], [0.5, 0.5]], [[0.0, 1e5], [0.0, 1.0]], (1e5 + 1) / 2),
        ([[0.25, 0.25, 0.5]], [[0.0, 1 - 1e-5, 1.0]], 1.0),
        ([[0.5, 0.5, 0.0]], [[0.0, 1.0, 1e6]], 1.0),
    ],
    ids=["prompts of different scale", "a small gap at the top", "outside the support"],
)
def test_a_large_divergence_reaches_the_best(p, rewards, best):
    reward = torch.tensor(rewards, dtype=torch.float64)
    assert frontier(log(*p), reward, kl=5.0) == (best, 0.0)
    # The restriction to the best completions has exactly this divergence.
    end = sum(-math.log(max(row[i] for i in range(len(row)) if row[i] > 0)) for row in p) / len(p)
    almost = frontier(log(*p), reward, kl=end - 1e-3)
    assert almost.beta > 0
    assert almost.reward < best


def test_weights_count_only_where_the_reference_is():
    log_ref, log_pi = log([0.5, 0.5, 0.0]), log([0.2, 0.8, 0.0])
    share = effective_share(0.5 * (log_pi - log_ref), log_ref)
    assert_close(share, effective_share(0.5 * (log_pi - log_ref)[:, :2], log_ref[:, :2]))
