"""Density ratios of aligned policies: exact and estimated curves against plain loops, and what must hold of any run."""

import itertools
import math

import numpy as np
import pytest
import torch

from analysis import alignment_ratios, runner
from analysis.alignment_ratios import (
    CLAIMED,
    ESTIMATES,
    MEASURES,
    OPTIMUM,
    POLICIES,
    PRESETS,
    Axis,
    Config,
    error_slope,
    examined,
    log_density,
    measures,
    rank_correlation,
    ratio_by_rank,
    verdict,
)
from analysis.pipeline import Setting, drawn, fine_tuned, setting_of
from exo_toy.estimators import log_density_ratio_over_reward
from exo_toy.targets import optimal_policy
from exo_toy.training import draw_candidates
from tests import oracles

TINY = Config(
    length=3, size=3, tuning_steps=5, tuning_batch=8, completions=32, steps=4, batch=16, checkpoints=2, many=8,
    beta=0.5, seeds=2, sample_sizes=(16, 64), repetitions=3, grid_points=7, rank_bins=10, resamples=50,
)  # fmt: skip
OPTIONS = Setting(**setting_of(TINY))
ESTIMATION = {
    "beta": 0.5, "sample_sizes": [16, 64], "repetitions": 3, "bandwidth": 0.2, "grid_points": 7, "rank_bins": 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def result():
    return alignment_ratios.run(TINY)


def assert_close(actual, expected, *, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=atol)


def log_density_by_loops(at: float, rewards, weights, bandwidth: float) -> float:
    """Of a Gaussian kernel at every reward, weighted."""
    kernels = [math.exp(-(((at - reward) / bandwidth) ** 2) / 2) for reward in rewards]
    total = math.fsum(weight * kernel for weight, kernel in zip(weights, kernels, strict=True))
    return math.log(total / (bandwidth * math.sqrt(2 * math.pi)))


def drawn_problem(x: int = 0, kind: str = "model"):
    """Reward, reference, pi* and some policy of one opening, [N] each."""
    reference = fine_tuned(OPTIONS)
    reward = (drawn(OPTIONS, 0).model if kind == "model" else reference.oracle)[x]
    log_star, _ = optimal_policy(reference.log_ref[x], reward, beta=0.5)
    noise = torch.randn(reward.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return reward, reference.log_ref[x], log_star, (reference.log_ref[x] + noise).log_softmax(-1)


@pytest.mark.parametrize("bandwidth", [0.3, 2.0])
def test_density_is_the_sum_of_kernels(bandwidth):
    """Repeated rewards and a weight of zero are among them."""
    generator = np.random.default_rng(0)
    rewards = generator.normal(size=9)[[0, 1, 1, 2, 3, 4, 5, 5, 5, 6, 7, 8]]
    weights = generator.dirichlet(np.ones(12))
    weights[4] = 0.0
    weights /= weights.sum()
    grid = np.linspace(-2.0, 2.0, 5)
    expected = [log_density_by_loops(at, rewards, weights, bandwidth) for at in grid]
    assert_close(log_density(rewards, weights, grid, bandwidth), expected)


@pytest.mark.parametrize("kind", ["model", "oracle"])
def test_exact_curve_by_loops(kind):
    reward, log_ref, log_star, log_pi = drawn_problem(kind=kind)
    axis = Axis(reward, log_ref, log_star, [], 0.2, 7)
    rewards, ref = reward.tolist(), log_ref.exp().tolist()
    mean = math.fsum(p * r for p, r in zip(ref, rewards, strict=True))
    width = 0.2 * math.sqrt(math.fsum(p * (r - mean) ** 2 for p, r in zip(ref, rewards, strict=True)))
    for policy in (log_pi, log_star):
        pi = policy.exp().tolist()
        expected = [
            log_density_by_loops(at, rewards, pi, width) - log_density_by_loops(at, rewards, ref, width)
            for at in axis.grid
        ]
        found = log_density(axis.reward, policy.exp().numpy(), axis.grid, axis.bandwidth) - axis.log_ref
        # Rewards that agree to nine decimals count as one: 1e-9 of reward moves a kernel by this in logarithms.
        reach = (max(rewards) - min(rewards)) / width**2
        assert_close(found, expected, atol=1e-12 + 2e-9 * reach)
    outside_below = math.fsum(p for p, r in zip(ref, rewards, strict=True) if r < axis.grid[0])
    outside_above = math.fsum(p for p, r in zip(log_star.exp().tolist(), rewards, strict=True) if r > axis.grid[-1])
    assert outside_below <= alignment_ratios.TAIL + 1e-12
    assert outside_above <= alignment_ratios.TAIL + 1e-12


def test_every_completion_as_often_as_it_is_likely_gives_the_exact_curve():
    """With frequencies that are the reference, nothing is left of the estimate but its formula."""
    reward, _, _, log_pi = drawn_problem()
    n_completions = len(reward)
    counts = torch.arange(n_completions) % 3 + 1
    index = torch.repeat_interleave(torch.arange(n_completions), counts).unsqueeze(0)
    log_ref = (counts / counts.sum().double()).log()
    log_star, _ = optimal_policy(log_ref, reward, beta=0.5)
    axis = Axis(reward, log_ref, log_star, [index], 0.2, 7)
    for policy, log_weight in ((log_pi, log_pi - log_ref), (log_star, reward / 0.5)):
        found = axis.examined(policy, log_weight)
        assert_close(found["estimated"][0], np.broadcast_to(found["exact"], (3, 7)))
        assert_close(found["estimates"][0, ESTIMATES.index("error")], 0.0)
        # A weight w of every completion, as often as it was drawn.
        p, ratio = log_ref.exp().tolist(), (policy - log_ref).exp().tolist()
        ess = index.numel() / math.fsum(a * w**2 for a, w in zip(p, ratio, strict=True))
        assert found["estimates"][0, ESTIMATES.index("ess")] == pytest.approx(ess, rel=1e-12)
        assert found["estimates"][0, ESTIMATES.index("largest_ratio")] == pytest.approx(max(ratio), rel=1e-12)


def test_estimates_are_those_of_the_library_and_their_errors_by_loops():
    """Three samples: the middle one is the median, and the outer ones give the band."""
    reward, log_ref, log_star, log_pi = drawn_problem(2)
    index = torch.randint(len(reward), (3, 20), generator=torch.Generator().manual_seed(0))
    axis = Axis(reward, log_ref, log_star, [index], 0.2, 7)
    log_weight = log_pi - log_ref
    found = axis.examined(log_pi, log_weight)
    curves = np.stack(
        [
            log_density_ratio_over_reward(
                [log_weight[draw].unsqueeze(0)],
                [reward[draw].unsqueeze(0)],
                torch.from_numpy(axis.grid),
                bandwidth=float(axis.bandwidth),
            ).value.numpy()
            for draw in index
        ]
    )
    least, middle, largest = np.sort(curves, axis=0)
    # The 5 % quantile of three lies a tenth of the way from the least to the middle one.
    expected = np.stack([0.9 * least + 0.1 * middle, middle, 0.9 * largest + 0.1 * middle])
    assert_close(found["estimated"][0], expected, atol=1e-11)
    density = [
        math.exp(log_density_by_loops(at, reward.tolist(), log_pi.exp().tolist(), axis.bandwidth)) for at in axis.grid
    ]
    errors = [
        math.fsum(d * abs(c - e) for d, c, e in zip(density, curve, found["exact"], strict=True)) / math.fsum(density)
        for curve in curves
    ]
    assert found["estimates"][0, ESTIMATES.index("error")] == pytest.approx(math.fsum(errors) / 3, abs=1e-9)


def test_measures_by_loops():
    _, log_ref, log_star, log_pi = drawn_problem(1)
    found = {name: values.tolist() for name, values in measures(torch.stack([log_star, log_pi]), log_ref, 3).items()}
    ref, star, pi = log_ref.tolist(), log_star.tolist(), log_pi.tolist()
    modes = sorted(range(len(star)), key=lambda y: -star[y])[:3]
    masses = [math.fsum(math.exp(policy[y]) for y in modes) for policy in (star, pi)]
    distance = [abs(p - s) for p, s in zip(pi, star, strict=True)]
    expected = {
        "mode_mass": masses,
        "log_mode_share": [0.0, math.log(masses[1] / masses[0])],
        "kl_to_reference": [oracles.kl(star, ref), oracles.kl(pi, ref)],
        "kl_to_optimum": [0.0, oracles.kl(pi, star)],
        "kl_from_optimum": [0.0, oracles.kl(star, pi)],
        "distance_under_optimum": [0.0, oracles.expectation(star, distance)],
        "distance_under_policy": [0.0, oracles.expectation(pi, distance)],
        "largest_ratio": [max(math.exp(p - q) for p, q in zip(policy, ref, strict=True)) for policy in (star, pi)],
        "effective_share": [
            1 / math.fsum(math.exp(2 * p - q) for p, q in zip(policy, ref, strict=True)) for policy in (star, pi)
        ],
    }
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-11, abs=1e-12)
    assert set(MEASURES) - set(found) == {"distance_over_reward"}
    assert found["rank_correlation_under_optimum"][0] == pytest.approx(1.0, abs=1e-12)


def test_rank_correlation_by_loops():
    a, b = [0.3, -1.0, 0.3, 2.0, 0.0], [1.0, 0.5, -2.0, 3.0, 0.5]
    weight = [0.1, 0.3, 0.2, 0.25, 0.15]

    def ranks(values):
        return [
            math.fsum(w * ((other < value) + (other == value) / 2) for other, w in zip(values, weight, strict=True))
            for value in values
        ]

    def covariance(x, y):
        mean_x, mean_y = (math.fsum(w * v for w, v in zip(weight, values, strict=True)) for values in (x, y))
        return math.fsum(w * (p - mean_x) * (q - mean_y) for w, p, q in zip(weight, x, y, strict=True))

    x, y = ranks(a), ranks(b)
    expected = covariance(x, y) / math.sqrt(covariance(x, x) * covariance(y, y))
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (a, b, weight)]
    assert rank_correlation(*tensors).item() == pytest.approx(expected, abs=1e-12)
    # An increasing function of either column changes no rank.
    assert rank_correlation(tensors[0].exp(), tensors[1] ** 3, tensors[2]).item() == pytest.approx(expected, abs=1e-12)


def test_ratio_by_rank_by_loops():
    _, log_ref, log_star, log_pi = drawn_problem(3)
    rank, by_rank = ratio_by_rank(torch.stack([log_star, log_pi]), log_ref, 10)
    order = sorted(range(len(log_ref)), key=lambda y: -log_star[y].item())
    assert_close(by_rank[:, 0], [(p[order[0]] - log_ref[order[0]]).item() for p in (log_star, log_pi)])
    # Groups follow each other, leave nothing out, and are told by the geometric means of their ranks.
    start = 0
    for group, mean in enumerate(rank):
        stop, logs = start, 0.0
        while stop == start or not math.isclose(logs / (stop - start), math.log(mean), abs_tol=1e-9):
            stop += 1
            logs += math.log(stop)
        above = [math.fsum(math.exp(policy[y]) for y in order[start:stop]) for policy in (log_star, log_pi)]
        below = math.fsum(math.exp(log_ref[y]) for y in order[start:stop])
        assert_close(by_rank[:, group], np.log(above) - math.log(below))
        start = stop
    assert start == len(order)


def test_estimates_never_exceed_the_number_of_samples(result):
    for kind, policies in POLICIES.items():
        curves = result.arrays[f"{kind}_estimated"]
        assert curves.shape == (7, len(policies), 2, 3, TINY.grid_points)
        estimates = result.arrays[f"{kind}_estimates"]
        for i, size in enumerate(TINY.sample_sizes):
            assert (curves[:, :, i] <= math.log(size) + 1e-9).all()
            for name in ("ess", "largest_ratio"):
                values = estimates[:, :, :, i, ESTIMATES.index(name)]
                assert ((values >= 1 - 1e-9) & (values <= size + 1e-9)).all()
            assert (estimates[:, :, :, i, ESTIMATES.index("error")] > 0).all()


def test_numbers_are_means_over_seeds_and_openings(result):
    openings = result.numbers["openings"]
    assert len(openings) == 7
    for kind, policies in POLICIES.items():
        measured = result.arrays[f"{kind}_measures"]
        assert measured.shape == (TINY.seeds, 7, len(policies), len(MEASURES))
        found = result.numbers[kind]
        for (p, policy), (m, name) in itertools.product(enumerate(policies), enumerate(MEASURES)):
            for x, opening in enumerate(openings):
                assert found["exact"][policy][opening][name]["mean"] == pytest.approx(measured[:, x, p, m].mean())
            whole = found["exact"][policy][alignment_ratios.ALL][name]
            assert whole["mean"] == pytest.approx(measured[:, :, p, m].mean())
            assert whole["low"] <= whole["mean"] + 1e-12 and whole["mean"] <= whole["high"] + 1e-12
        for m, name in enumerate(MEASURES):
            exo, dpo = (
                measured[:, 4, policies.index(f"{way}_{kind.removesuffix('_many')}"), m] for way in ("exo", "dpo")
            )
            assert found["differences"][openings[4]][name]["mean"] == pytest.approx((exo - dpo).mean(), abs=1e-12)
        for name in ("kl_to_optimum", "kl_from_optimum", "distance_over_reward", "log_mode_share"):
            assert_close(measured[:, :, policies.index(OPTIMUM), MEASURES.index(name)], 0.0)


def test_both_kinds_on_rewards_have_one_reward_model(result):
    """Groups of another size are made of the same completions."""
    optimum = [result.arrays[f"{kind}_measures"][:, :, 0] for kind in ("rw", "rw_many")]
    assert_close(*optimum, atol=1e-9)
    exo = [result.arrays[f"{kind}_measures"][:, :, 1] for kind in ("rw", "rw_many")]
    assert (np.abs(exo[0] - exo[1]).max((1, 2)) > 1e-6).all()


@pytest.mark.parametrize("kind", ["rw", "pref"])
def test_weights_of_the_optimum_by_loops(kind, result):
    """They are made of rewards alone, and those of its exact density ratio, at completions drawn from the seed."""
    reference = fine_tuned(OPTIONS)
    reward = reference.oracle if kind == "pref" else drawn(OPTIONS, 1).model
    generator = torch.Generator().manual_seed(2_000_001)
    for i, size in enumerate(TINY.sample_sizes):
        index = draw_candidates(reference.log_ref, TINY.repetitions, size, generator)
        for x in range(7):
            ref = reference.log_ref[x].tolist()
            star, _ = oracles.optimal_policy(ref, reward[x].tolist(), TINY.beta)
            sizes, largest = [], []
            for draw in index[x].tolist():
                ratio = [math.exp(star[y] - ref[y]) for y in draw]
                sizes.append(math.fsum(ratio) ** 2 / math.fsum(w**2 for w in ratio))
                largest.append(size * max(ratio) / math.fsum(ratio))
            found = dict(zip(ESTIMATES, result.arrays[f"{kind}_estimates"][1, x, 0, i], strict=True))
            assert found["ess"] == pytest.approx(math.fsum(sizes) / len(sizes), rel=1e-11)
            assert found["largest_ratio"] == pytest.approx(math.fsum(largest) / len(largest), rel=1e-11)


def test_runs_are_reproducible():
    case = {"setting": setting_of(TINY), "kind": "pref", "k": 4, "seed": 1, **ESTIMATION}
    first, again = (examined(**case) for _ in range(2))
    assert first.keys() == again.keys()
    for name, values in first.items():
        assert np.array_equal(values, again[name])
        assert np.isfinite(values).all()


def test_verdicts_follow_the_intervals():
    def interval(sign: float) -> dict[str, float]:
        return {"mean": sign, "low": sign - 0.5, "high": sign + 0.5}

    def found(**signs: float):
        return verdict({name: interval(signs.get(name, 0.0) * sign) for name, sign in CLAIMED.items()})

    every = list(CLAIMED)
    assert found(**dict.fromkeys(every, 1.0)) == {"exo": every, "dpo": [], "verdict": "as claimed"}
    assert found(**dict.fromkeys(every[1:], 1.0)) == {"exo": every[1:], "dpo": [], "verdict": "in part"}
    assert found() == {"exo": [], "dpo": [], "verdict": "no clear difference"}
    mixed = found(**dict.fromkeys(every[1:], 1.0), **{every[0]: -1.0})
    assert mixed == {"exo": every[1:], "dpo": every[:1], "verdict": "mixed"}
    assert found(log_mode_share=-1.0) == {"exo": [], "dpo": ["log_mode_share"], "verdict": "the reverse"}


def test_error_slope():
    assert error_slope([2, 10, 1000], np.array([7.0, 3.0, 0.3])) == pytest.approx(-0.5)


def test_presets_are_complete():
    assert set(PRESETS) == set(runner.PRESETS)
    assert PRESETS["full"] == Config()
    for preset in PRESETS.values():
        for k in (preset.k, preset.many):
            assert preset.completions % (2 * k) == 0
            assert preset.batch % k == 0
        assert list(preset.sample_sizes) == sorted(preset.sample_sizes)
