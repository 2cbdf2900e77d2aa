"""Noise of sampled gradients: brute force over all tuples of completions, laws, limits at huge K, errors.

Brute force and closed form are sums of positive terms, or of terms no larger than the squared gradients, a few hundred
operations deep: they agree to 1e-13 of the largest squared gradient that a sample can have (``scale``), and where the
weights are within some nats of each other to 1e-11 of the result itself.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from exo_toy.finite_k import expected_exo_rw_loss
from exo_toy.gradient_noise import (
    Noise,
    exo_rw_noise,
    exo_rw_noises,
    leave_one_out_noise,
    mean_of_independent,
    per_sample_gradients,
    policy_gradient_noise,
    sample_noise,
)
from exo_toy.losses import exo_rw_loss
from exo_toy.objectives import alignment_objective
from exo_toy.policies import GRUPolicy, KGramPolicy, TransformerPolicy
from exo_toy.spaces import SequenceSpace
from tests import sequence_strategies, strategies
from tests.strategies import Problem
from tests.tolerances import assert_close

INF = math.inf
RTOL = 1e-11


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tuples(n: int, k: int) -> Tensor:
    """All tuples [n^k, k] of k completions."""
    return torch.tensor(list(itertools.product(range(n), repeat=k)))


def plain_noise(gradients: list[list[float]], weights: list[float]) -> tuple[list[float], float]:
    """Mean and trace of the covariance, by loops."""
    size = len(gradients[0])
    mean = [math.fsum(w * g[i] for w, g in zip(weights, gradients, strict=True)) for i in range(size)]
    terms = (w * (g[i] - mean[i]) ** 2 for w, g in zip(weights, gradients, strict=True) for i in range(size))
    return mean, math.fsum(terms)


def assert_noise(noise: Noise, gradients: Tensor, probability: Tensor) -> None:
    """Equal to the moments of these gradients [M, P] with these probabilities [M]."""
    mean, variance = plain_noise(gradients.tolist(), probability.tolist())
    scale = gradients.square().sum(-1).max().item()
    torch.testing.assert_close(noise.mean, torch.tensor(mean, dtype=torch.float64), rtol=RTOL, atol=1e-13 * scale**0.5)
    assert noise.variance.item() == pytest.approx(variance, rel=RTOL, abs=1e-13 * scale)


def exo_gradients(scores: Tensor, problem: Problem, k: int) -> tuple[Tensor, Tensor]:
    """Gradients [N^K, P] of the loss that users call on every tuple of candidates, and the tuples' probabilities."""
    draws = tuples(len(scores), k)
    log_ratio = (problem.log_pi - problem.log_ref)[0][draws].requires_grad_()
    loss = exo_rw_loss(log_ratio, problem.reward[0][draws], beta_pi=problem.beta_pi, beta_r=problem.beta_r)
    (weights,) = torch.autograd.grad(loss.sum(), log_ratio)
    return torch.einsum("mk,mkp->mp", weights, scores[draws]), problem.log_ref[0][draws].sum(-1).exp()


def exo_noise(scores: Tensor, problem: Problem, k: int) -> Noise:
    tables = (problem.log_pi[0], problem.log_ref[0], problem.reward[0])
    return exo_rw_noise(scores, *tables, k=k, beta_pi=problem.beta_pi, beta_r=problem.beta_r)


def drawn(n: int, spread: float, seed: int, beta_pi: float = 0.7, beta_r: float = 0.6) -> Problem:
    """One prompt, its policy some nats away from the reference."""
    log_ref, log_ratio, reward = normal(3, 1, n, seed=seed)
    log_pi = (log_ref + spread * log_ratio).log_softmax(-1)
    return Problem(log_pi, log_ref.log_softmax(-1), 2 * reward, beta_pi, beta_r, 2)


# EXO on K candidates


@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_exo_agrees_with_all_tuples(k, spread):
    problem, scores = drawn(4, spread, seed=k), normal(4, 3, seed=10 + k)
    gradients, probability = exo_gradients(scores, problem, k)
    noise = exo_noise(scores, problem, k)
    assert_noise(noise, gradients, probability)
    # Here the weights are close enough for all digits of the result itself.
    _, variance = plain_noise(gradients.tolist(), probability.tolist())
    assert noise.variance.item() == pytest.approx(variance, rel=RTOL)


@given(problem=strategies.problems(n=st.integers(2, 4)), seed=st.integers(0, 99))
def test_exo_agrees_with_all_tuples_of_drawn_problems(problem, seed):
    """Temperatures and weights of any kind, spread over up to a hundred nats."""
    k = 2 + problem.k % 3
    n = problem.log_ref.shape[-1]
    scores = normal(n, n + 1, seed=seed)
    noise = exo_noise(scores, problem, k)
    gradients, probability = exo_gradients(scores, problem, k)
    mean, variance = plain_noise(gradients.tolist(), probability.tolist())
    h = problem.beta_pi * (problem.log_pi - problem.log_ref)[0] - problem.reward[0] / problem.beta_r
    # The loss takes differences of log-probabilities, which round like numbers of at least one.
    spread = max(1.0, (h.max() - h.min()).item())
    scale = (problem.beta_pi * spread) ** 2 * scores.square().sum(-1).max().item()
    torch.testing.assert_close(noise.mean, torch.tensor(mean, dtype=torch.float64), rtol=RTOL, atol=1e-13 * scale**0.5)
    assert noise.variance.item() == pytest.approx(variance, rel=RTOL, abs=1e-13 * scale)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 64, 2**20])
def test_exo_mean_is_the_gradient_of_the_expected_loss(k):
    problem, scores = drawn(7, 1.5, seed=3), normal(7, 4, seed=4)
    log_pi = problem.log_pi.clone().requires_grad_()
    betas = {"beta_pi": problem.beta_pi, "beta_r": problem.beta_r}
    expected = expected_exo_rw_loss(log_pi, problem.log_ref, problem.reward, k=k, **betas)
    (weights,) = torch.autograd.grad(expected.sum(), log_pi)
    assert_close(exo_noise(scores, problem, k).mean, weights[0] @ scores, scale=10.0)


def test_a_single_candidate_teaches_nothing():
    noise = exo_noise(normal(5, 3, seed=0), drawn(5, 1.0, seed=0), 1)
    assert torch.equal(noise.mean, torch.zeros(3).double())
    assert noise.variance.item() == 0.0


@pytest.mark.parametrize("k", [2, 3, 4, 8, 64, 1000])
def test_exo_at_the_reference_is_leave_one_out(k):
    """There every weight is 1/K: (K-1)/K of the gradient with the others' mean as a baseline, over -beta_r."""
    problem, scores = drawn(6, 0.0, seed=5), normal(6, 4, seed=6)
    noise = exo_noise(scores, problem, k)
    tables = (problem.log_pi[0], problem.log_ref[0], problem.reward[0])
    rl = leave_one_out_noise(scores, *tables, beta=problem.beta, k=k)
    factor = -problem.beta_pi / problem.beta_r * (k - 1) / k
    assert_close(noise.mean, factor * rl.mean, scale=10.0)
    assert noise.variance.item() == pytest.approx(factor**2 * rl.variance.item(), rel=RTOL)
    assert noise.to_signal().item() == pytest.approx(rl.to_signal().item(), rel=RTOL)


def test_exo_tends_to_the_delta_method():
    r"""K variance -> beta_pi^2 E_ref|rho (h - h_mean)(s - s_mean) - E g|^2, with rho = pi^beta_pi / pi_ref."""
    problem, scores = drawn(6, 1.0, seed=7), normal(6, 4, seed=8)
    log_w = problem.beta_pi * (problem.log_pi - problem.log_ref)[0]
    log_ref = problem.log_ref[0]
    rho = (log_w - (log_ref + log_w).logsumexp(-1)).exp()
    tilted = rho * log_ref.exp()
    h = log_w - problem.reward[0] / problem.beta_r
    h = h - tilted @ h
    limit = tilted @ (h.unsqueeze(-1) * scores)
    # Influence of one candidate on sum_i p_i (h_i - h_mean) s_i, a covariance under normalised weights.
    centred = scores - tilted @ scores
    influence = problem.beta_pi * rho.unsqueeze(-1) * (h.unsqueeze(-1) * centred - limit)
    expected = (log_ref.exp() @ influence.square().sum(-1)).item()
    # The next term is of order 1/K^2: the distance halves as K doubles.
    ks = [2**14, 2**15, 2**16]
    errors = [k * exo_noise(scores, problem, k).variance.item() / expected - 1 for k in ks]
    assert abs(errors[0]) < 1e-2
    for this, next_one in itertools.pairwise(errors):
        assert next_one / this == pytest.approx(0.5, abs=1e-3)


def test_several_k_at_once_are_those_alone():
    problem, scores = drawn(5, 2.0, seed=9), normal(5, 3, seed=10)
    ks = (64, 2, 1, 3, 2**20)
    tables = (problem.log_pi[0], problem.log_ref[0], problem.reward[0])
    together = exo_rw_noises(scores, *tables, ks=ks, beta_pi=problem.beta_pi, beta_r=problem.beta_r)
    for k, noise in zip(ks, together, strict=True):
        alone = exo_noise(scores, problem, k)
        assert_close(noise.mean, alone.mean)
        assert noise.variance.item() == pytest.approx(alone.variance.item(), rel=1e-9, abs=1e-14)


def test_constants_and_common_scores_change_nothing():
    """Added to the reward, to log pi, or, where only differences of scores count, to all scores."""
    problem, scores = drawn(5, 1.0, seed=11), normal(5, 3, seed=12)
    log_pi, log_ref, reward = problem.log_pi[0], problem.log_ref[0], problem.reward[0]
    betas = {"k": 3, "beta_pi": 0.4, "beta_r": 0.9}
    noise = exo_rw_noise(scores, log_pi, log_ref, reward, **betas)
    for other in (
        exo_rw_noise(scores, log_pi, log_ref, reward + 100.0, **betas),
        exo_rw_noise(scores, log_pi - 3.0, log_ref, reward, **betas),
        exo_rw_noise(scores + 7.0, log_pi, log_ref, reward, **betas),
    ):
        assert_close(other.mean, noise.mean, scale=100.0)
        assert_close(other.variance, noise.variance, scale=100.0)


def test_equal_h_gives_no_gradient():
    """At the tempered optimum every sampled gradient is zero, at any K: the noise goes with the signal."""
    log_ref, reward = normal(6, seed=13).log_softmax(-1), normal(6, seed=14)
    log_pi = (log_ref + reward / 0.35).log_softmax(-1)
    for k in (2, 3, 16):
        noise = exo_rw_noise(normal(6, 4, seed=15), log_pi, log_ref, reward, k=k, beta_pi=0.7, beta_r=0.5)
        assert_close(noise.mean, torch.zeros(4))
        assert_close(noise.variance, 0.0)


def test_completions_outside_the_support_count_nothing():
    problem, scores = drawn(4, 1.0, seed=16), normal(4, 3, seed=17)
    for missing in (-INF, math.nan):
        log_ref = torch.cat([problem.log_ref[0], torch.tensor([-INF])])
        log_pi = torch.cat([problem.log_pi[0], torch.tensor([-INF])])
        reward = torch.cat([problem.reward[0], torch.tensor([missing])])
        wide = torch.cat([scores, torch.full((1, 3), missing)])
        tables = (wide, log_pi, log_ref, reward)
        pairs = [
            (exo_rw_noise(*tables, k=3, beta_pi=0.7, beta_r=0.6), exo_noise(scores, problem, 3)),
            (
                leave_one_out_noise(*tables, beta=0.5, k=3),
                leave_one_out_noise(scores, problem.log_pi[0], problem.log_ref[0], problem.reward[0], beta=0.5, k=3),
            ),
            (sample_noise(wide, log_ref), sample_noise(scores, problem.log_ref[0])),
        ]
        for noise, expected in pairs:
            assert_close(noise.mean, expected.mean)
            assert_close(noise.variance, expected.variance)


@pytest.mark.parametrize("spread", [100.0, 1000.0])
def test_wide_spreads_stay_finite_and_exact(spread):
    """Where one of a pair has all the weight its gradient is zero to float64, and so are mean and variance."""
    log_ref = torch.tensor([0.5, 0.3, 0.2]).double().log()
    log_pi = torch.tensor([0.0, -spread, -2 * spread]).double()
    scores = normal(3, 2, seed=18)
    noise = exo_rw_noise(scores, log_pi, log_ref, torch.zeros(3), k=2, beta_pi=1.0, beta_r=1.0)
    scale = (2 * spread) ** 2 * scores.square().sum(-1).max().item()
    assert abs(noise.variance.item()) <= 1e-13 * scale
    assert noise.mean.abs().max().item() <= 1e-13 * scale**0.5


@pytest.mark.parametrize("k", [2**33, 2**53 - 1])
def test_leave_one_out_of_more_completions_than_square_to_an_integer(k):
    """K times the noise is then that of a single completion with the mean for a baseline."""
    scores, log_pi, log_ref, reward, _ = policy_problem(3)
    noise = leave_one_out_noise(scores, log_pi, log_ref, reward, beta=0.4, k=k)
    single = policy_gradient_noise(scores, log_pi, log_ref, reward, beta=0.4, baseline="mean")
    # The rest is at most 1/K of it, 1e-10, times a number of order one.
    assert k * noise.variance.item() == pytest.approx(single.variance.item(), rel=1e-9)


def test_half_types_are_computed_in_float64():
    problem, scores = drawn(4, 1.0, seed=19), normal(4, 3, seed=20).float()
    noise = exo_noise(scores, problem, 2)
    assert noise.mean.dtype == noise.variance.dtype == torch.float64
    assert_close(noise.variance, exo_noise(scores.double(), problem, 2).variance)


# Policy gradients


def policy_problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores of a full table, of mean zero under the policy, with the tables and R."""
    log_pi, log_ref, reward = normal(3, 5, seed=seed)
    log_pi, log_ref = log_pi.log_softmax(-1), log_ref.log_softmax(-1)
    scores = torch.eye(5).double() - log_pi.exp()
    return scores, log_pi, log_ref, reward, reward - 0.4 * (log_pi - log_ref)


@pytest.mark.parametrize("baseline", ["none", "mean", "best"])
def test_policy_gradient_by_loops(baseline):
    scores, log_pi, log_ref, reward, returns = policy_problem(0)
    p, norms = log_pi.exp().tolist(), scores.square().sum(-1).tolist()
    weights = {"none": [0.0] * 5, "mean": p, "best": [a * b for a, b in zip(p, norms, strict=True)]}[baseline]
    b = math.fsum(w * r for w, r in zip(weights, returns.tolist(), strict=True)) / (math.fsum(weights) or 1.0)
    gradients = torch.stack([(r - b) * s for r, s in zip(returns, scores, strict=True)])
    noise = policy_gradient_noise(scores, log_pi, log_ref, reward, beta=0.4, baseline=baseline)
    assert_noise(noise, gradients, log_pi.exp())


def test_policy_gradient_has_the_objective_for_mean():
    scores, log_pi, log_ref, reward, _ = policy_problem(1)
    logits = log_pi.clone().requires_grad_()
    objective = alignment_objective(logits.log_softmax(-1), log_ref, reward, beta=0.4)
    (gradient,) = torch.autograd.grad(objective, logits)
    for baseline in ("none", "mean", "best"):
        noise = policy_gradient_noise(scores, log_pi, log_ref, reward, beta=0.4, baseline=baseline)
        assert_close(noise.mean, gradient)
    assert_close(leave_one_out_noise(scores, log_pi, log_ref, reward, beta=0.4, k=4).mean, gradient)


@given(seed=st.integers(0, 999))
def test_no_constant_does_better_than_the_best(seed):
    scores, log_pi, log_ref, reward, returns = policy_problem(seed)
    best = policy_gradient_noise(scores, log_pi, log_ref, reward, beta=0.4, baseline="best").variance.item()
    for constant in (*returns.tolist(), 0.0, (log_pi.exp() @ returns).item()):
        other = sample_noise((returns - constant).unsqueeze(-1) * scores, log_pi).variance.item()
        assert best <= other + 1e-12 * max(1.0, other)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_leave_one_out_agrees_with_all_tuples(k):
    scores, log_pi, log_ref, reward, returns = policy_problem(2)
    # Not of mean zero: only differences of scores count.
    scores = scores + normal(5, seed=21)
    draws = tuples(5, k)
    gradients = []
    for draw in draws.tolist():
        terms = [
            (returns[i] - sum(returns[draw[b]] for b in range(k) if b != a) / (k - 1)) * scores[i]
            for a, i in enumerate(draw)
        ]
        gradients.append(sum(terms) / k)
    noise = leave_one_out_noise(scores, log_pi, log_ref, reward, beta=0.4, k=k)
    assert_noise(noise, torch.stack(gradients), log_pi[draws].sum(-1).exp())


def test_leave_one_out_tends_to_the_mean_baseline():
    tables = policy_problem(3)[:4]
    single = policy_gradient_noise(*tables, beta=0.4, baseline="mean").variance.item()
    many = leave_one_out_noise(*tables, beta=0.4, k=2**20).variance.item()
    # What is left is of order 1/K, relative.
    assert 2**20 * many == pytest.approx(single, rel=1e-4)
    assert 2**20 * many > single


def test_no_score_no_noise():
    _, log_pi, log_ref, reward, _ = policy_problem(4)
    noise = policy_gradient_noise(torch.zeros(5, 2), log_pi, log_ref, reward, beta=1, baseline="best")
    assert noise.variance.item() == 0.0
    assert noise.to_signal().isnan()


# Gradients of single samples, joined prompts


POLICIES = {
    "kgram": lambda space: KGramPolicy(space, 1, n_prompts=2),
    "gru": lambda space: GRUPolicy(space, 3, n_prompts=2, generator=torch.Generator().manual_seed(0)),
    "transformer": lambda space: TransformerPolicy(
        space, 4, 2, 1, n_prompts=2, generator=torch.Generator().manual_seed(0)
    ),
}


@pytest.mark.parametrize("build", POLICIES.values(), ids=POLICIES)
def test_gradients_of_samples_are_those_of_autograd(build):
    space = SequenceSpace(3, 3, eos=0)
    policy = build(space)
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        parameter.data += 0.5 * sequence_strategies.normal(tuple(parameter.shape), generator)

    def log_prob(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return functional_call(policy, parameters, (tokens.unsqueeze(0),))[:, 0]

    scores = per_sample_gradients(log_prob, dict(policy.named_parameters()), space.tokens())
    assert scores.shape == (space.size, 2, sum(p.numel() for p in policy.parameters()))
    table = policy.log_probs()
    for x, y in itertools.product(range(2), range(space.size)):
        gradients = torch.autograd.grad(
            table[x, y], list(policy.parameters()), retain_graph=True, materialize_grads=True
        )
        assert_close(scores[y, x], torch.cat([gradient.flatten() for gradient in gradients]), scale=10.0)
    # Scores have mean zero.
    assert_close(torch.einsum("xn,nxp->xp", table.exp(), scores), torch.zeros(scores.shape[1:]), scale=10.0)


def test_noise_of_a_mean_over_prompts():
    """Over all pairs of completions of two independent prompts."""
    gradients, log_p = normal(2, 3, 4, seed=22), normal(2, 3, seed=23).log_softmax(-1)
    joined = mean_of_independent([sample_noise(g, p) for g, p in zip(gradients, log_p, strict=True)])
    draws = tuples(3, 2)
    pairs = (gradients[0][draws[:, 0]] + gradients[1][draws[:, 1]]) / 2
    assert_noise(joined, pairs, (log_p[0][draws[:, 0]] + log_p[1][draws[:, 1]]).exp())


def test_sample_noise_by_hand():
    # Two completions, 3/4 and 1/4, at (0, 0) and (4, 8): mean (1, 2), 3/4 * 5 + 1/4 * 45 = 15.
    gradients = torch.tensor([[0.0, 0.0], [4.0, 8.0]]).double()
    noise = sample_noise(gradients, torch.tensor([0.75, 0.25]).double().log())
    assert_close(noise.mean, [1.0, 2.0])
    assert_close(noise.variance, 15.0)
    assert_close(noise.to_signal(), 3.0)


def test_neither_noise_nor_signal():
    nothing = torch.zeros(2).double()
    assert Noise(nothing, torch.tensor(0.0).double()).to_signal().isnan()
    assert Noise(nothing, torch.tensor(1.0).double()).to_signal() == INF


def test_noise_is_not_lost_in_a_large_mean():
    """A variance of 1 beside a squared mean of 1e16."""
    gradients = torch.tensor([[1e8 - 1], [1e8 + 1]], dtype=torch.float64)
    noise = sample_noise(gradients, torch.tensor([0.5, 0.5]).double().log())
    assert noise.variance.item() == pytest.approx(1.0, rel=1e-12)


# Errors


LOG_P = torch.tensor([0.5, 0.5]).double().log()
SCORES, REWARD = torch.eye(2).double(), torch.zeros(2).double()


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be an integer of at least 1"),
        ({"k": 2.0}, "k must be an integer"),
        ({"k": 2**53}, r"k must be an integer below 2\*\*53"),
        ({"beta_pi": 0.0}, "beta_pi must be"),
        ({"beta_r": -1.0}, "beta_r must be"),
        ({"scores": SCORES[:1]}, "scores must be"),
        ({"scores": SCORES[0]}, "scores must be"),
        ({"scores": SCORES.long()}, "scores must have a floating-point dtype"),
        ({"scores": SCORES * math.nan}, "scores must be finite"),
        ({"log_ref": LOG_P + 1}, "log_ref must hold normalised"),
        ({"log_pi": torch.tensor([0.0, -INF])}, "log_pi must be finite where log_ref is"),
        ({"reward": torch.tensor([0.0, INF])}, "reward must be finite where log_ref is"),
        ({"reward": torch.zeros(3)}, "reward must have as many completions"),
    ],
)
def test_errors_of_exo(change, message):
    arguments = {"scores": SCORES, "log_pi": LOG_P, "log_ref": LOG_P, "reward": REWARD}
    arguments |= {"k": 2, "beta_pi": 1.0, "beta_r": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        exo_rw_noise(**arguments)


@pytest.mark.unchecked
def test_errors_of_the_others():
    tables = (SCORES, LOG_P, LOG_P, REWARD)
    with pytest.raises(ValueError, match="ks must hold"):
        exo_rw_noises(*tables, ks=(), beta_pi=1, beta_r=1)
    with pytest.raises(ValueError, match="baseline must be"):
        policy_gradient_noise(*tables, beta=1, baseline="median")
    with pytest.raises(ValueError, match="beta must be"):
        policy_gradient_noise(*tables, beta=0, baseline="none")
    for k, message in ((1, "k must be an integer of at least 2"), (2**53, "k must be an integer below")):
        with pytest.raises(ValueError, match=message):
            leave_one_out_noise(*tables, beta=1, k=k)
    with pytest.raises(ValueError, match="log_ref must be finite where log_pi is"):
        policy_gradient_noise(SCORES, LOG_P, torch.tensor([0.0, -INF]), REWARD, beta=1, baseline="none")
    with pytest.raises(ValueError, match="gradients must be"):
        sample_noise(SCORES, torch.zeros(1))
    with pytest.raises(ValueError, match="log_p must hold normalised"):
        sample_noise(SCORES, LOG_P + 1)
    with pytest.raises(ValueError, match="noises must hold"):
        mean_of_independent([])
    for samples in ((), (torch.zeros(0),), (torch.zeros(2), torch.zeros(3)), (torch.tensor(1.0),)):
        with pytest.raises(ValueError, match="samples must be"):
            per_sample_gradients(lambda parameters, *_: parameters["a"], {"a": torch.zeros(1)}, *samples)
