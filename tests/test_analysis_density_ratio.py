"""The density-ratio experiment: its curves against plain loops and scipy, its numbers against closed forms."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from analysis import density_ratio, storage
from analysis.mode_seeking import two_modes
from exo_toy.estimators import snis_density_ratio
from tests import oracles

TWO_MODES = {"vocab_size": 4, "length": 6, "second_weight": 0.8, "width": 1 / 1.5, "beta": 0.5}
SMALL = {"vocab_size": 3, "length": 2, "second_weight": 0.7, "width": 0.8, "beta": 0.5}
ESTIMATION = {"sample_sizes": (8, 32), "repetitions": 20, "bandwidth": 0.3, "grid_points": 7, "seed": 5}
TRAINING = {"order": 0, "k": 4, "batch_size": 8, "steps": 5, "learning_rate": 0.1, "training_seed": 3}
TINY = density_ratio.Config(
    **SMALL,
    orders=(0, 1),
    n_candidates=(2, 8),
    samples_per_step=32,
    steps=5,
    training_seeds=2,
    sample_sizes=(8, 32),
    repetitions=20,
    bandwidth=0.3,
    grid_points=31,
)


def rewards_by_loops(vocab_size, length, second_weight, width, beta):
    """The reward of every sequence, in order."""
    rewards = []
    for tokens in itertools.product(range(vocab_size), repeat=length):
        to_first = sum(token != 0 for token in tokens)
        to_second = sum(token != vocab_size - 1 for token in tokens)
        rewards.append(math.log(math.exp(-to_first / width) + second_weight * math.exp(-to_second / width)))
    return rewards


def log_density_by_loops(at, rewards, weights, bandwidth):
    """Of a Gaussian kernel at every reward, weighted."""
    kernels = [math.exp(-(((at - reward) / bandwidth) ** 2) / 2) for reward in rewards]
    total = math.fsum(weight * kernel for weight, kernel in zip(weights, kernels, strict=True))
    return math.log(total / (bandwidth * math.sqrt(2 * math.pi)))


@pytest.fixture
def axis():
    return density_ratio.RewardAxis(two_modes(**SMALL), bandwidth=0.3, grid_points=7)


def test_exact_curve_of_the_optimal_policy_is_that_of_plain_loops(axis):
    rewards = rewards_by_loops(**SMALL)
    n_completions = len(rewards)
    log_pi_star, _ = oracles.optimal_policy([-math.log(n_completions)] * n_completions, rewards, SMALL["beta"])
    weights, even = [math.exp(value) for value in log_pi_star], [1 / n_completions] * n_completions
    found = density_ratio.optimum(**SMALL, **ESTIMATION)
    wanted = [
        log_density_by_loops(at, rewards, weights, 0.3) - log_density_by_loops(at, rewards, even, 0.3)
        for at in axis.grid.tolist()
    ]
    assert found["arrays"]["exact"].tolist() == pytest.approx(wanted, abs=1e-12)
    assert (axis.grid[0].item(), axis.grid[-1].item()) == pytest.approx((min(rewards), max(rewards)), abs=1e-12)


def test_ratio_of_a_level_is_that_of_its_completions(axis):
    """The optimal policy's ratio is a function of the reward, so that a level has the ratio of its members."""
    found = density_ratio.optimum(**SMALL, **ESTIMATION)
    log_ratio = torch.from_numpy(found["log_ratio"])
    of_levels = torch.from_numpy(found["arrays"]["exact_of_levels"])
    torch.testing.assert_close(of_levels[axis.level_of], log_ratio, rtol=0, atol=1e-12)
    assert len(of_levels) == len({round(reward, 9) for reward in rewards_by_loops(**SMALL)})


def test_estimate_is_that_of_weighted_kernels_in_scipy(axis):
    """The same kernel and bandwidth; scipy scales by the weighted variance of its data, which is divided out here."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(axis.problem.space.size, (40,), generator=generator)
    ratio = snis_density_ratio(axis.problem.reward[index] / axis.problem.beta)
    even = torch.full_like(ratio, 1 / len(index))
    found = axis.log_ratio(axis.masses(ratio / len(index), index), axis.masses(even, index), axis.grid)
    samples = axis.problem.reward[index].numpy()
    densities = []
    for weights in (ratio.numpy(), even.numpy()):
        kernel = scipy.stats.gaussian_kde(samples, weights=weights)
        kernel.set_bandwidth(0.3 / math.sqrt(kernel._data_covariance.item()))
        densities.append(kernel(axis.grid.numpy()))
    np.testing.assert_allclose(found.exp().numpy(), densities[0] / densities[1], rtol=1e-9)


def test_estimate_from_every_completion_once_is_the_exact_curve(axis):
    """A uniform reference's own shares: what is left of the estimator is no randomness but its formula."""
    problem = axis.problem
    index = torch.arange(problem.space.size)
    ratio = snis_density_ratio(problem.reward / problem.beta)
    ref_masses = axis.masses(problem.log_ref.exp())
    found = axis.log_ratio(axis.masses(ratio / len(index), index), ref_masses, axis.grid)
    exact = axis.log_ratio(axis.masses(problem.log_pi_star.exp()), ref_masses, axis.grid)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_estimates_are_those_of_plain_loops(axis):
    """Three repetitions of eight draws: mean and median (the middle one) of every number and curve."""
    rewards, beta, size = rewards_by_loops(**SMALL), SMALL["beta"], 8
    n_completions = len(rewards)
    log_pi_star, _ = oracles.optimal_policy([-math.log(n_completions)] * n_completions, rewards, beta)
    weights, even = [math.exp(value) for value in log_pi_star], [1 / n_completions] * n_completions

    def log_ratio(at, sampled, weights, ref_weights):
        return log_density_by_loops(at, sampled, weights, 0.3) - log_density_by_loops(at, sampled, ref_weights, 0.3)

    found = density_ratio.optimum(**SMALL, **{**ESTIMATION, "sample_sizes": (size,), "repetitions": 3})
    draws = torch.randint(n_completions, (3, size), generator=torch.Generator().manual_seed(ESTIMATION["seed"]))
    curves, errors, sample_sizes, at_highest = [], [], [], []
    for draw in draws.tolist():
        sampled = [rewards[y] for y in draw]
        raw = [math.exp(reward / beta) for reward in sampled]
        estimated, ref_estimated = [weight / math.fsum(raw) for weight in raw], [1 / size] * size
        curves.append([log_ratio(at, sampled, estimated, ref_estimated) for at in axis.grid.tolist()])
        gaps = [
            log_ratio(at, sampled, estimated, ref_estimated) - log_ratio(at, rewards, weights, even) for at in rewards
        ]
        errors.append(math.fsum(weight * abs(gap) for weight, gap in zip(weights, gaps, strict=True)))
        sample_sizes.append(1 / math.fsum(weight**2 for weight in estimated))
        at_highest.append(math.exp(curves[-1][-1]))
    wanted = {"ess": sample_sizes, "mean_absolute_log_error": errors, "ratio_at_highest_reward": at_highest}
    assert set(found["numbers"][str(size)]) == set(wanted)
    for name, values in wanted.items():
        spread = found["numbers"][str(size)][name]
        assert spread["mean"] == pytest.approx(sum(values) / 3, rel=1e-10)
        assert spread["median"] == pytest.approx(sorted(values)[1], rel=1e-10)
        # Linear between the order statistics: the 5 % quantile of three is a tenth of the way to the second.
        least, middle, largest = sorted(values)
        assert spread["low"] == pytest.approx(0.9 * least + 0.1 * middle, rel=1e-10)
        assert spread["high"] == pytest.approx(0.9 * largest + 0.1 * middle, rel=1e-10)
    np.testing.assert_allclose(found["arrays"]["estimated"][0, 1], np.median(curves, axis=0), rtol=1e-9)


def test_estimates_are_bounded():
    """No weight is above M times the mean, so neither is a ratio of densities; 1 <= ESS <= M."""
    found = density_ratio.optimum(**SMALL, **ESTIMATION)
    assert found["arrays"]["estimated"].shape == (2, 3, 7)
    for size, curves in zip((8, 32), found["arrays"]["estimated"], strict=True):
        low, median, high = curves
        assert (low <= median).all() and (median <= high).all() and (low < high).any()
        assert (high <= math.log(size) + 1e-12).all()
        ess = found["numbers"][str(size)]["ess"]
        assert 1 <= ess["low"] <= ess["median"] <= ess["high"] <= size and ess["low"] < ess["high"]


def test_optimal_policy_in_numbers():
    measured = density_ratio.optimum(**TWO_MODES, **{**ESTIMATION, "sample_sizes": ()})["exact"]
    rewards = rewards_by_loops(**TWO_MODES)
    n_completions = len(rewards)
    log_pi_star, log_z = oracles.optimal_policy([-math.log(n_completions)] * n_completions, rewards, 0.5)
    assert measured["ratio_at_first_mode"] == pytest.approx(math.exp(rewards[0] / 0.5 - log_z), rel=1e-12)
    assert measured["ratio_at_second_mode"] == pytest.approx(math.exp(rewards[-1] / 0.5 - log_z), rel=1e-12)
    assert (round(measured["first_mode_mass"], 4), round(measured["second_mode_mass"], 4)) == (0.2616, 0.1675)
    assert measured["kl_policy_to_optimal"] == pytest.approx(0.0, abs=1e-12)
    assert measured["expected_reward"] == pytest.approx(oracles.expectation(log_pi_star, rewards), rel=1e-12)
    second_moment = math.fsum(math.exp(2 * value) for value in log_pi_star) * n_completions
    assert measured["ess_share"] == pytest.approx(1 / second_moment, rel=1e-12)
    assert measured["peaks_at_first_mode"] == 1.0
    assert measured["peak_over_reward"] == pytest.approx(rewards[0], abs=1e-12)


def test_uniform_policy_has_ratio_one_and_every_sample_counts():
    """Zero learning leaves the policy at the reference: the estimate has no error and ESS = M."""
    found = density_ratio.trained(
        loss="exo_rw", estimated=True, **{**TRAINING, "learning_rate": 1e-300}, **SMALL, **ESTIMATION
    )
    np.testing.assert_allclose(found["arrays"]["exact"], 0.0, atol=1e-12)
    np.testing.assert_allclose(found["arrays"]["estimated"], 0.0, atol=1e-12)
    for size, numbers in found["numbers"].items():
        assert numbers["ess"]["low"] == pytest.approx(int(size)) == numbers["ess"]["high"]
        assert numbers["mean_absolute_log_error"]["high"] < 1e-12


@pytest.mark.parametrize("loss", ["exo_rw", "dpo_rw"])
def test_training_is_that_of_its_loss_and_seed(loss):
    first, again, other = (
        density_ratio.trained(loss=loss, estimated=False, **{**TRAINING, "training_seed": seed}, **SMALL, **ESTIMATION)
        for seed in (1, 1, 2)
    )
    assert first["exact"] == again["exact"] and first["exact"] != other["exact"]
    assert first["exact"]["kl_to_reference"] > 0 and first["numbers"] == {}


def test_run_keeps_what_belongs_together():
    result = density_ratio.run(TINY)
    numbers, arrays = result.numbers, result.arrays
    by_rank = arrays["optimal_log_ratio_by_rank"]
    assert (np.diff(by_rank) <= 0).all()
    assert np.exp(by_rank).mean() == pytest.approx(1.0, rel=1e-12)
    assert arrays["level_share"].sum() == pytest.approx(1.0, rel=1e-12)
    assert numbers["samples_per_policy"] == 32 * 5
    for loss, order, k in itertools.product(("exo_rw", "dpo_rw"), (0, 1), (2, 8)):
        entry, prefix = numbers[loss][str(order)][str(k)], f"{loss}_{order}_{k}"
        settings = {**TRAINING, "order": order, "k": k, "batch_size": 32 // k, "learning_rate": 0.2}
        runs = [
            density_ratio.trained(
                loss=loss, estimated=False, **{**settings, "training_seed": seed}, **SMALL, **ESTIMATION
            )
            for seed in (1, 2)
        ]
        kls = [run["exact"]["kl_policy_to_optimal"] for run in runs]
        assert entry["kl_policy_to_optimal"] == {"mean": sum(kls) / 2, "min": min(kls), "max": max(kls)}
        # The first seed's, sorted like pi*, whose first is the first mode.
        by_rank = arrays[f"{prefix}_log_ratio_by_rank"]
        assert sorted(by_rank) == sorted(runs[0]["log_ratio"]) and by_rank[0] == runs[0]["log_ratio"][0]
        assert arrays[f"{prefix}_estimated"].shape == (2, 3, 31)


def test_presets():
    assert set(density_ratio.PRESETS) == {"quick", "default", "full"}
    assert density_ratio.PRESETS["full"] == density_ratio.Config()
    for config in density_ratio.PRESETS.values():
        assert all(config.samples_per_step % k == 0 for k in config.n_candidates), "budgets of samples differ"


def test_figure_shows_each_ess(tmp_path, monkeypatch):
    """From stored results alone, with the numbers that stand in them."""
    from figures import density_ratio as figure
    from figures import style

    shown = []
    text = figure.Axes.text
    monkeypatch.setattr(
        figure.Axes, "text", lambda ax, x, y, s, **more: (shown.append(s), text(ax, x, y, s, **more))[1]
    )
    result = density_ratio.run(dataclasses.replace(TINY, training_seeds=1))
    storage.store("density_ratio", "quick", TINY, result.numbers, result.arrays, folder=tmp_path)
    with style.theme():
        paths = figure.draw(storage.load("density_ratio", "quick", tmp_path), tmp_path)
    assert [path.suffix for path in paths] == [".pdf", ".png"] and all(path.stat().st_size > 10_000 for path in paths)
    for size in ("8", "32"):
        ess = result.numbers["exo_rw"]["0"]["8"]["estimates"][size]["ess"]["mean"]
        assert any(f"EXO {ess:.3g}" in lines for lines in shown)
