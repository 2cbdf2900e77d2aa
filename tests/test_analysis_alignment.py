"""The miniature of the paper's experiment: what it measures against plain loops, and what must hold of any run."""

import math

import numpy as np
import pytest
import torch

from analysis import alignment, pipeline
from analysis.alignment import PRESETS, Config
from analysis.pipeline import (
    METHODS,
    METRICS,
    Evaluator,
    Setting,
    aligned,
    drawn,
    fine_tuned,
    group_loss,
    setting_of,
)
from exo_toy.losses import exo_rw_loss
from exo_toy.targets import optimal_policy
from tests import oracles

TINY = Config(
    length=3, size=3, tuning_steps=5, tuning_batch=8, completions=32, steps=4, batch=16, checkpoints=2,
    betas=(0.2, 1.0), seeds=2, resamples=50, best_of=(1, 4),
)  # fmt: skip
SETTING = setting_of(TINY)
OPTIONS = Setting(**SETTING)


@pytest.fixture(scope="module")
def result():
    return alignment.run(TINY)


def assert_close(actual, expected, *, scale: float = 1.0) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=1e-12 * scale)


def of(metrics: np.ndarray, name: str) -> np.ndarray:
    return metrics[..., METRICS.index(name), :]


def test_what_is_measured_by_loops():
    reference, data = fine_tuned(OPTIONS), drawn(OPTIONS, 0)
    log_pi = torch.randn(reference.log_ref.shape, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    beta = 0.7
    beta_pi = 0.3
    metrics = Evaluator(reference, data, beta, OPTIONS, beta_pi).metrics(log_pi).numpy()
    for x in range(reference.world.n_prompts):
        pi, ref = log_pi[x].tolist(), reference.log_ref[x].tolist()
        found = {name: metrics[m, x] for m, name in enumerate(METRICS)}
        assert_close(found["kl_to_reference"], oracles.kl(pi, ref))
        assert_close(found["entropy"], oracles.entropy(pi))
        for name, table in (("oracle", reference.oracle), ("model", data.model)):
            reward = table[x].tolist()
            star, _ = oracles.optimal_policy(ref, reward, beta)
            assert_close(found[f"{name}_reward"], oracles.expectation(pi, reward), scale=10.0)
            assert_close(found[f"{name}_objective"], oracles.alignment_objective(pi, ref, reward, beta), scale=10.0)
            assert_close(found[f"{name}_kl_to_optimum"], oracles.kl(pi, star), scale=10.0)
            assert_close(found[f"{name}_kl_from_optimum"], oracles.kl(star, pi), scale=10.0)
        chosen = data.pairs[x, :, 0].tolist()
        for table, prefix in ((reference.oracle, ""), (data.model, "model_")):
            reward = [round(r, 9) for r in table[x].tolist()]
            wins = sum(
                math.exp(p) * ((r > reward[c]) + (r == reward[c]) / 2)
                for p, r in zip(pi, reward, strict=True)
                for c in chosen
            )
            assert_close(found[f"{prefix}win_against_chosen"], wins / len(chosen))
        best, _ = oracles.optimal_policy(ref, reference.oracle[x].tolist(), beta)
        modes = sorted(range(len(best)), key=best.__getitem__)[-OPTIONS.n_modes :]
        assert_close(found["mode_mass"], sum(math.exp(pi[y]) for y in modes))
        w = [math.exp(beta_pi * (p - q)) for p, q in zip(pi, ref, strict=True)]
        first, second = (sum(math.exp(q) * a**n for q, a in zip(ref, w, strict=True)) for n in (1, 2))
        assert_close(found["effective_share"], first**2 / second)


def test_training_starts_at_the_reference_and_leaves_it(result):
    for method in METHODS:
        start, end = result.arrays[method][:, :, 0], result.arrays[method][:, :, -1]
        assert_close(of(start, "kl_to_reference"), np.zeros_like(of(start, "kl_to_reference")))
        assert_close(of(start, "win_against_reference"), np.full_like(of(start, "entropy"), 0.5))
        assert_close(of(start, "effective_share"), np.ones_like(of(start, "entropy")))
        assert (of(end, "kl_to_reference") > 1e-6).all()


def test_no_policy_passes_the_frontier_nor_the_optimum(result):
    assert result.numbers["least_room_below_frontier"] > 0
    for i, _ in enumerate(TINY.betas):
        best = result.arrays["optimal_model_objective"][i]
        for method in ("exo_rw", "dpo_rw", "ppo"):
            reached = of(result.arrays[method][i], "model_objective").mean(-1)
            assert (reached <= best[:, None] + 1e-12).all()
    for method in METHODS:
        assert (result.arrays[f"{method}_below"] > -1e-12).all()


def test_identity_of_objective_and_divergence(result):
    """J is its optimum less beta KL(pi || pi*), at every checkpoint."""
    reference = fine_tuned(OPTIONS)
    for i, beta in enumerate(TINY.betas):
        _, log_z = optimal_policy(reference.log_ref, reference.oracle, beta=beta)
        for method in ("exo_pref", "ppo"):
            metrics = result.arrays[method][i]
            expected = beta * (log_z.numpy() - of(metrics, "oracle_kl_to_optimum"))
            assert_close(of(metrics, "oracle_objective"), expected, scale=10.0)


def test_runs_of_a_seed_share_their_data_and_are_reproducible():
    first, again = (aligned(SETTING, "ppo", 0.2, 1) for _ in range(2))
    for name, values in first.items():
        assert np.array_equal(values, again[name])
    assert drawn(OPTIONS, 1) is drawn(OPTIONS, 1)
    assert not torch.equal(drawn(OPTIONS, 1).groups, drawn(OPTIONS, 0).groups)
    # The same completions, in pairs, the preferred one first.
    data = drawn(OPTIONS, 0)
    assert torch.equal(data.pairs.flatten(1).sort(-1).values, data.groups.flatten(1).sort(-1).values)


@pytest.mark.parametrize("split", [1.0, 4.0])
def test_the_split_keeps_the_product(split):
    loss = group_loss("exo_rw", 0.3, Setting(split=split))
    log_pi, log_ref, rewards = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    beta_pi, beta_r = math.sqrt(0.3 * split), math.sqrt(0.3 / split)
    assert_close(beta_pi * beta_r, 0.3)
    assert torch.equal(
        loss(log_pi, log_ref, rewards), exo_rw_loss(log_pi - log_ref, rewards, beta_pi=beta_pi, beta_r=beta_r)
    )


def test_labels_and_policies_by_setting():
    hard = Setting(**{**SETTING, "hard_labels": True})
    reward = fine_tuned(hard).oracle.unsqueeze(1).expand(-1, 16, -1).gather(-1, drawn(hard, 0).pairs)
    assert (reward[..., 0] >= reward[..., 1]).all()
    for policy in ("kgram", "low_rank", "transformer"):
        other = {**SETTING, "policy": policy, "size": 2}
        assert np.isfinite(aligned(other, "exo_rw", 0.2, 0)["metrics"]).all()
    with pytest.raises(ValueError, match="policy must be"):
        fine_tuned(Setting(**{**SETTING, "policy": "table"}))


def test_presets_are_complete():
    assert PRESETS["full"] == Config()
    for preset in PRESETS.values():
        assert preset.completions % (2 * preset.k) == 0
        assert preset.batch % preset.k == 0


def test_methods_on_one_curve_do_not_differ_at_equal_divergence():
    """Distances that are one multiple of the root of the divergence, wherever training ends."""
    near, far = np.array([[0.1, 0.2], [1.0, 0.9]]), np.array([[0.3, 0.15], [4.0, 5.0]])
    at = (0.3, 0.8, 2.0)
    first, second = (alignment.interpolated(kl, 0.7 * np.sqrt(kl), at) for kl in (near, far))
    np.testing.assert_allclose(first[:, :2], np.tile(0.7 * np.sqrt(at[:2]), (2, 1)), rtol=1e-12)
    np.testing.assert_allclose(second, np.tile(0.7 * np.sqrt(at), (2, 1)), rtol=1e-12)
    # Nothing is said of divergences where no training ends.
    assert np.isnan(first[:, 2]).all()


def test_ppo_on_as_few_completions_draws_no_more_than_the_others_have(monkeypatch):
    drawn_in_all = []
    sample = pipeline.GRUPolicy.sample
    monkeypatch.setattr(
        pipeline.GRUPolicy, "sample", lambda self, n, *rest: drawn_in_all.append(n) or sample(self, n, *rest)
    )
    found = aligned(SETTING, "ppo_few", 0.2, 0)
    assert sum(drawn_in_all) == OPTIONS.completions
    assert len(found["metrics"]) == len(pipeline.checkpoints(OPTIONS))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 3}, "completions must be a multiple of k = 3; got 1024"),
        ({"batch": 6}, "batch must be a multiple of k = 4; got 6"),
        ({"completions": 5, "k": 1}, "completions must be even"),
        ({"completions": 32}, "batch must be at most the 32 completions; got 64"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Setting(**changed)
