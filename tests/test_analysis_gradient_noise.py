"""Noise of gradients along training: against plain loops over completions and pairs, and what must hold of any run."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from analysis import gradient_noise, storage
from analysis.claims import CLAIMS, Outcome, Verdict, judge
from analysis.gradient_noise import (
    ESTIMATORS,
    LOSSES,
    PRESETS,
    STATES,
    TRAININGS,
    Config,
    at_policy,
    fitted_values,
    measured,
    over_progress,
)
from analysis.pipeline import Setting, drawn, fine_tuned, setting_of, trained
from exo_toy.losses import dpo_rw_loss, exo_rw_loss
from exo_toy.objectives import alignment_objective
from figures import gradient_noise as figure
from figures import style
from tests import oracles

TINY = Config(
    length=2, size=2, tuning_steps=5, tuning_batch=8, completions=32, steps=4, batch=16, checkpoints=2, rate=0.1,
    value_order=1, betas=(0.2, 1.0), seeds=2, ks=(2, 3), resamples=50,
)  # fmt: skip
SETTING = setting_of(TINY)
OPTIONS = Setting(**SETTING)
BETA = 0.3
# Sums of a few thousand products of numbers of order one; noise and signal are of order 0.01 to 10.
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def result():
    return gradient_noise.run(TINY)


@pytest.fixture(scope="module")
def policy():
    """Somewhere on the way, where no gradient is special."""
    policy = copy.deepcopy(fine_tuned(OPTIONS).policy)
    for _ in trained(policy, fine_tuned(OPTIONS), drawn(OPTIONS, 0), OPTIONS, "exo_rw", BETA, 0):
        pass
    return policy


@pytest.fixture(scope="module")
def found(policy):
    values = at_policy(policy, fine_tuned(OPTIONS), drawn(OPTIONS, 0), OPTIONS, BETA, [2, 3])
    return {
        name: {key: dict(zip((2, 3), row, strict=True)) for key, row in zip(ESTIMATORS, values[name], strict=True)}
        for name in ("variance", "signal")
    } | {
        "cosines": [values["cosine"], values["cosine_to_limit"]],
        "state": dict(zip(STATES, values["state"], strict=True)),
    }


def flat_gradient(value: torch.Tensor, policy: torch.nn.Module) -> np.ndarray:
    gradients = torch.autograd.grad(value, list(policy.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients]).numpy()


def moments(weighted: list[tuple[float, np.ndarray]]) -> tuple[np.ndarray, float]:
    """Mean and trace of the covariance of gradients with probabilities."""
    mean = sum(w * g for w, g in weighted)
    return mean, math.fsum(w * float(((g - mean) ** 2).sum()) for w, g in weighted)


def joined(prompts: list[tuple[np.ndarray, float]]) -> tuple[float, float]:
    """Variance and squared length of the mean of independent prompts' means."""
    mean = mean_over(prompts)
    return math.fsum(variance for _, variance in prompts) / len(prompts) ** 2, float((mean**2).sum())


def mean_over(prompts: list[tuple[np.ndarray, float]]) -> np.ndarray:
    return sum(mean for mean, _ in prompts) / len(prompts)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_over_all_pairs_of_candidates(policy, found, name):
    """The gradient of the loss that is trained on, by autograd, for every pair of completions of every prompt."""
    reference, data = fine_tuned(OPTIONS), drawn(OPTIONS, 0)
    table, beta_half = policy.log_probs(), math.sqrt(BETA)
    prompts = []
    for x in range(len(table)):
        scores = [flat_gradient(entry, policy) for entry in table[x]]
        pairs = list(itertools.product(range(table.shape[1]), repeat=2))
        log_ratio = (table[x] - reference.log_ref[x]).detach()[torch.tensor(pairs)].requires_grad_()
        of_pairs = {"exo_rw": exo_rw_loss, "dpo_rw": dpo_rw_loss}[name]
        loss = of_pairs(log_ratio, data.model[x][torch.tensor(pairs)], beta_pi=beta_half, beta_r=beta_half)
        (weights,) = torch.autograd.grad(loss.sum(), log_ratio)
        ref = reference.log_ref[x].exp().tolist()
        prompts.append(
            moments(
                [
                    (ref[i] * ref[j], a * scores[i] + b * scores[j])
                    for (i, j), (a, b) in zip(pairs, weights.tolist(), strict=True)
                ]
            )
        )
    variance, signal = joined(prompts)
    assert found["variance"][name][2] == pytest.approx(variance, rel=TOLERANCE)
    assert found["signal"][name][2] == pytest.approx(signal, rel=TOLERANCE)
    # Along the gradient of J, and along that of the loss at any number of candidates: a KL of either direction.
    objective = alignment_objective(table, reference.log_ref, data.model, beta=BETA).mean()
    optimum = (reference.log_ref + data.model / beta_half).log_softmax(-1)
    tempered = (beta_half * table + (1 - beta_half) * reference.log_ref).log_softmax(-1)
    p, q = (tempered, optimum) if name == "exo_rw" else (optimum, tempered)
    limit = (p.exp() * (p - q)).sum(-1).mean()
    mean = mean_over(prompts)
    to_objective, to_limit = (cosines[LOSSES.index(name), 0] for cosines in found["cosines"])
    assert to_objective == pytest.approx(-cosine(mean, flat_gradient(objective, policy)), rel=1e-8)
    assert to_limit == pytest.approx(cosine(mean, flat_gradient(limit, policy)), rel=1e-8)


def test_ppo_and_policy_gradient_by_loops(policy, found):
    """Token by token: rewards to go, their means by the token before, and the gradient of each token."""
    reference, data, space = fine_tuned(OPTIONS), drawn(OPTIONS, 0), policy.space
    tokens = space.tokens()
    counted = space.counted(tokens)
    logps, ref_logps = (p.token_log_probs(tokens) for p in (policy, reference.policy))
    prompts, plain = [], []
    for x in range(len(logps)):
        p = [math.exp(logps[x, y].sum().item()) for y in range(len(tokens))]
        length = [int(counted[y].sum()) for y in range(len(tokens))]
        penalty = [
            [BETA * (logps[x, y, t] - ref_logps[x, y, t]).item() for t in range(length[y])] for y in range(len(p))
        ]
        to_go = [[data.model[x, y].item() - math.fsum(penalty[y][t:]) for t in range(length[y])] for y in range(len(p))]
        contexts = [[tuple(tokens[y, max(0, t - 1) : t].tolist()) for t in range(length[y])] for y in range(len(p))]
        value = {}
        for t in range(space.length):
            for context in {c[t] for c in contexts if len(c) > t}:
                here = [y for y in range(len(p)) if length[y] > t and contexts[y][t] == context]
                total = math.fsum(p[y] * to_go[y][t] for y in here)
                value[t, context] = total / math.fsum(p[y] for y in here)
        surrogate, single = [], []
        for y in range(len(p)):
            by_token = [flat_gradient(logps[x, y, t], policy) for t in range(length[y])]
            advantages = [to_go[y][t] - value[t, contexts[y][t]] for t in range(length[y])]
            surrogate.append((p[y], -sum(a * g for a, g in zip(advantages, by_token, strict=True))))
            single.append((p[y], to_go[y][0] * sum(by_token)))
        prompts.append(moments(surrogate))
        plain.append(moments(single))
    for name, expected in (("ppo", prompts), ("none", plain)):
        variance, signal = joined(expected)
        for k in (2, 3):
            assert found["variance"][name][k] == pytest.approx(variance / k, rel=TOLERANCE)
            assert found["signal"][name][k] == pytest.approx(signal, rel=TOLERANCE)


def test_values_minimise_the_squared_distance(policy):
    """No table over the same contexts is closer: the gradient of PPO's squared distance is zero."""
    space = policy.space
    log_pi = policy.log_probs().detach()
    to_go = torch.randn(*log_pi.shape, space.length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = space.tokens()
    mask, contexts = space.counted(tokens), space.contexts(tokens, order=1)
    values = fitted_values(space, log_pi, to_go, order=1)
    rest = (values - to_go) * mask * log_pi.exp().unsqueeze(-1)
    for t in range(space.length):
        for context in range(space.n_contexts(t, order=1)):
            at = (contexts[:, t] == context) & mask[:, t]
            assert rest[:, at, t].sum(-1).abs().max().item() < 1e-14


def test_state_by_loops(policy, found):
    reference, data = fine_tuned(OPTIONS), drawn(OPTIONS, 0)
    log_pi = policy.log_probs()
    kl, gap, share = [], [], []
    for pi, ref, r in zip(log_pi.tolist(), reference.log_ref.tolist(), data.model.tolist(), strict=True):
        kl.append(oracles.kl(pi, ref))
        gap.append(BETA * oracles.kl(pi, oracles.optimal_policy(ref, r, BETA)[0]))
        w = [math.exp(math.sqrt(BETA) * (p - q)) for p, q in zip(pi, ref, strict=True)]
        first, second = (sum(math.exp(q) * a**n for q, a in zip(ref, w, strict=True)) for n in (1, 2))
        share.append(first**2 / second)
    for name, values in zip(STATES, (kl, gap, share), strict=True):
        assert found["state"][name] == pytest.approx(math.fsum(values) / len(values), rel=TOLERANCE)


def test_the_start_is_leave_one_out(result):
    """At the reference EXO-rw's gradient is -(K-1)/K of the leave-one-out policy gradient's: all of it alike."""
    ks = result.arrays["ks"]
    factor = ((ks - 1) / ks) ** 2
    exo, other = (ESTIMATORS.index(name) for name in ("exo_rw", "leave_one_out"))
    for training in TRAININGS:
        for name in ("variance", "signal"):
            values = result.arrays[f"{training}.{name}"][:, :, 0]
            np.testing.assert_allclose(values[:, :, exo], factor * values[:, :, other], rtol=TOLERANCE)
        np.testing.assert_allclose(result.arrays[f"{training}.cosine"][:, :, 0, 0], 1.0, rtol=TOLERANCE)
    for beta in ("0.2", "1"):
        for ratio in result.numbers["trainings"]["ppo"][beta]["start"]["exo_over_other"]["leave_one_out"].values():
            assert ratio["mean"] == pytest.approx(1.0, rel=TOLERANCE)


def test_policy_gradients_have_one_mean(result):
    """PPO's and those with any baseline: the gradient of J."""
    assert result.numbers["bias"] < TOLERANCE


def test_best_baseline_and_shares_of_samples(result):
    best, mean, none = (ESTIMATORS.index(name) for name in ("best", "mean", "none"))
    for training in TRAININGS:
        variance = result.arrays[f"{training}.variance"]
        assert variance.shape == (2, 2, 3, len(ESTIMATORS), 2)
        assert (variance > 0).all()
        assert (variance[..., best, :] <= variance[..., [mean, none], :].min(-2) * (1 + 1e-12)).all()
        np.testing.assert_allclose(2 * variance[..., best, 0], 3 * variance[..., best, 1], rtol=1e-12)


def test_progress_is_what_a_mean_has_along_the_gradient_of_the_objective():
    """A cosine of 1/2 quarters the square; none is left where it is not above 0; policy gradients keep theirs."""
    ratio = np.zeros((len(ESTIMATORS), 3))
    found = over_progress(ratio, np.array([[0.5, 1.0, -0.5], [0.25, 0.0, 1.0]]))
    np.testing.assert_allclose(found[:2], np.log([[4, 1, np.inf], [16, np.inf, 1]]), rtol=1e-12)
    assert (found[2:] == 0).all() and (ratio == 0).all()


def test_numbers_are_means_of_the_arrays(result):
    steps = result.numbers["stages"]
    assert steps == {"start": 0, "middle": int(result.arrays["steps"][1]), "end": TINY.steps}
    here = result.numbers["trainings"]["exo_rw"]["1"]["end"]
    variance, signal = (result.arrays[f"exo_rw.{name}"][1, :, -1] for name in ("variance", "signal"))
    exo, ppo = (ESTIMATORS.index(name) for name in ("exo_rw", "ppo"))
    noise = {name: 3 * variance[:, e, 1] / signal[:, e, 1] for name, e in (("exo_rw", exo), ("ppo", ppo))}
    by_hand = {name: math.sqrt(values[0] * values[1]) for name, values in noise.items()}
    assert here["noise_to_signal"]["exo_rw"]["3"]["mean"] == pytest.approx(by_hand["exo_rw"], rel=1e-12)
    assert here["noise_to_signal"]["ppo"]["mean"] == pytest.approx(by_hand["ppo"], rel=1e-12)
    cosines = result.arrays["exo_rw.cosine"][1, :, -1, LOSSES.index("exo_rw"), 1]
    ratio = here["exo_over_other"]["ppo"]["3"]
    if (cosines > 0).all():
        along = by_hand["exo_rw"] / abs(cosines[0] * cosines[1])
        assert ratio["mean"] == pytest.approx(along / by_hand["ppo"], rel=1e-12)
        assert ratio["low"] <= ratio["mean"] <= ratio["high"]
    else:
        assert ratio is None
    none, leave_one_out = (
        variance[:, ESTIMATORS.index(name), 1] / signal[:, ESTIMATORS.index(name), 1]
        for name in ("none", "leave_one_out")
    )
    paired = math.sqrt(np.prod(none / leave_one_out))
    assert here["none_over_leave_one_out"]["3"]["mean"] == pytest.approx(paired, rel=1e-12)


def test_a_run_is_reproducible():
    first, again = (measured(SETTING, "ppo", 0.2, 1, [2]) for _ in range(2))
    for name, values in first.items():
        assert np.array_equal(values, again[name])


def test_figures_are_drawn(result, tmp_path):
    storage.store("gradient_noise", "full", TINY, result.numbers, result.arrays, folder=tmp_path)
    with style.theme():
        paths = figure.draw(storage.load("gradient_noise", "full", tmp_path), tmp_path)
    assert {path.stem for path in paths} == set(figure.CAPTIONS)
    assert all(path.stat().st_size > 1000 for path in paths)


def c11(result, *, less: dict[str, list[bool | None]], gain: dict[str, tuple[float, float]]) -> Outcome:
    """The outcome of the claim with other ratios after the start.

    EXO-rw less noisy than PPO or not, or nothing to compare (None), by training and in turn; by K, no baseline over
    leave-one-out at the start and later.
    """
    numbers = copy.deepcopy(result.numbers)
    for training, by_beta in numbers["trainings"].items():
        turns = itertools.cycle(less[training])
        for stages in by_beta.values():
            for stage, found in stages.items():
                ratios = {k: around(early if stage == "start" else late) for k, (early, late) in gain.items()}
                found["none_over_leave_one_out"] = ratios
                if stage != "start":
                    cases = ((k, next(turns)) for k in ("2", "3"))
                    found["exo_over_other"]["ppo"] = {
                        k: None if case is None else around(0.5 if case else 1.0) for k, case in cases
                    }
    claim = next(claim for claim in CLAIMS if claim.id == "C11")
    return judge(claim, {"gradient_noise": storage.StoredResult("gradient_noise", "full", {}, {}, numbers, {})})


def around(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": 0.9 * mean, "high": 1.1 * mean}


PAYS = {"2": (0.5, 0.8), "3": (0.7, 4.0)}


def test_verdict_of_the_claim(result):
    """Counted by whose policies they are; a mean that points away from the gradient of J never counts as less noisy."""
    always = {"exo_rw": [True], "ppo": [True]}
    assert c11(result, less=always, gain=PAYS).verdict == Verdict.HOLDS
    mixed = c11(result, less={"exo_rw": [False], "ppo": [True]}, gain=PAYS)
    assert mixed.verdict == Verdict.CONDITIONAL
    assert "0 of 8 on EXO-rw's policies and 8 of 8 on PPO's policies" in mixed.ours
    assert "Noise alone does not decide" in mixed.practice and "0 of 8 on EXO-rw's" in mixed.practice
    away = c11(result, less={"exo_rw": [False], "ppo": [None, True]}, gain=PAYS)
    assert "0 of 8 on EXO-rw's policies and 4 of 8 on PPO's policies" in away.ours


def test_no_advice_where_the_claim_fails(result):
    nowhere = c11(result, less={"exo_rw": [False], "ppo": [None]}, gain=PAYS)
    assert nowhere.verdict == Verdict.FAILS
    assert nowhere.practice == ""


def test_advice_on_leave_one_out_follows_from_where_it_pays(result):
    def advice(gain: dict[str, tuple[float, float]]) -> str:
        return c11(result, less={"exo_rw": [True], "ppo": [False]}, gain=gain).practice

    assert "from K=3 on, while near the reference it adds noise (2 times at K=2)" in advice(PAYS)
    assert advice({"2": (2.0, 2.0), "3": (2.0, 2.0)}).endswith("from K=2 on.")
    # Where it pays at few and not at more, it pays from none on.
    assert "at no K measured" in advice({"2": (1.0, 2.0), "3": (1.0, 0.9)})


def test_presets_are_complete():
    assert PRESETS["full"] == Config()
    assert set(PRESETS) == {"quick", "default", "full"}
    for preset in PRESETS.values():
        assert preset.seeds >= 2
        assert preset.batch % preset.k == 0
