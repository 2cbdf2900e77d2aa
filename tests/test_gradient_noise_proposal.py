"""Noise of DPO-rw's gradient, and of both losses on candidates from a proposal: all tuples, laws, limits, refusals.

Tolerances are those of tests/test_gradient_noise.py: 1e-13 of the largest squared gradient that a sample can have.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.finite_k import expected_dpo_rw_loss, expected_exo_rw_loss
from exo_toy.gradient_noise import (
    Noise,
    dpo_rw_noise,
    dpo_rw_noises,
    exo_rw_noise,
    exo_rw_noises,
    leave_one_out_noise,
    sample_noise,
)
from exo_toy.losses import dpo_rw_loss, exo_rw_loss
from exo_toy.targets import tempered_policy
from tests import strategies
from tests.tolerances import assert_close

INF = math.inf
RTOL = 1e-11
BETAS = {"beta_pi": 0.7, "beta_r": 0.6}
NOISE = {"exo": exo_rw_noise, "dpo": dpo_rw_noise}
NOISES = {"exo": exo_rw_noises, "dpo": dpo_rw_noises}
LOSS = {"exo": exo_rw_loss, "dpo": dpo_rw_loss}
EXPECTED = {"exo": expected_exo_rw_loss, "dpo": expected_dpo_rw_loss}
both = pytest.mark.parametrize("kind", NOISE)
Tables = tuple[Tensor, Tensor, Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(n: int, seed: int, *, spread: float = 1.0) -> tuple[Tables, Tensor]:
    """Policy, reference and reward [N], and a proposal, some nats apart."""
    log_pi, log_ref, reward, log_mu = normal(4, n, seed=seed)
    log_pi, log_mu = ((log_ref + spread * table).log_softmax(-1) for table in (log_pi, log_mu))
    return (log_pi, log_ref.log_softmax(-1), 2 * reward), log_mu


def assert_over_tuples(
    kind: str, noise: Noise, scores: Tensor, tables: Tables, log_mu: Tensor, k: int, betas: dict[str, float]
) -> None:
    """Mean and trace are those of the gradient of the loss that users call, over all N^K tuples."""
    log_pi, log_ref, reward = tables
    draws = torch.tensor(list(itertools.product(range(len(scores)), repeat=k)))
    log_ratio = (log_pi - log_ref)[draws].requires_grad_()
    loss = LOSS[kind](log_ratio, reward[draws], log_weights=(log_ref - log_mu)[draws], **betas)
    (weights,) = torch.autograd.grad(loss.sum(), log_ratio)
    gradients = torch.einsum("mk,mkp->mp", weights, scores[draws])
    probability = log_mu[draws].sum(-1).exp().tolist()
    columns = gradients.T.tolist()
    mean = [math.fsum(p * g for p, g in zip(probability, column, strict=True)) for column in columns]
    variance = math.fsum(
        p * (g - m) ** 2
        for column, m in zip(columns, mean, strict=True)
        for p, g in zip(probability, column, strict=True)
    )
    h = betas["beta_pi"] * (log_pi - log_ref) - reward / betas["beta_r"]
    spread = max(1.0, (h.max() - h.min()).item()) if kind == "exo" else 2.0
    scale = (betas["beta_pi"] * spread) ** 2 * scores.square().sum(-1).max().item()
    torch.testing.assert_close(noise.mean, torch.tensor(mean, dtype=torch.float64), rtol=RTOL, atol=1e-13 * scale**0.5)
    assert noise.variance.item() == pytest.approx(variance, rel=RTOL, abs=1e-13 * scale)


# All tuples


@both
@pytest.mark.parametrize(("n", "k"), [(4, 2), (4, 3), (3, 4), (3, 5)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("size", [2, 9])
def test_agrees_with_all_tuples(kind, n, k, spread, size):
    """With fewer parameters than completions, and with more."""
    tables, log_mu = drawn(n, seed=10 * n + k, spread=spread)
    scores = normal(n, size, seed=k)
    for proposal in (None, log_mu):
        noise = NOISE[kind](scores, *tables, k=k, log_proposal=proposal, **BETAS)
        assert_over_tuples(kind, noise, scores, tables, tables[1] if proposal is None else log_mu, k, BETAS)


@both
@given(problem=strategies.problems(n=st.integers(2, 4)), data=st.data(), seed=st.integers(0, 99))
def test_agrees_with_all_tuples_of_drawn_problems(kind, problem, data, seed):
    """Temperatures and weights of any kind, spread over up to a hundred nats."""
    k, n = 2 + problem.k % 3, problem.log_ref.shape[-1]
    log_mu = data.draw(strategies.log_probabilities((n,), spread=4.0))
    tables = (problem.log_pi[0], problem.log_ref[0], problem.reward[0])
    betas = {"beta_pi": problem.beta_pi, "beta_r": problem.beta_r}
    scores = normal(n, n + 1, seed=seed)
    noise = NOISE[kind](scores, *tables, k=k, log_proposal=log_mu, **betas)
    assert_over_tuples(kind, noise, scores, tables, log_mu, k, betas)


def test_digits_of_the_noise_itself():
    """Where the gradient is not small beside its parts, all digits are right."""
    for n, k in ((4, 2), (4, 4), (3, 6)):
        tables, log_mu = drawn(n, seed=k)
        scores = normal(n, 3, seed=20 + k)
        noise = dpo_rw_noise(scores, *tables, k=k, log_proposal=log_mu, **BETAS)
        draws = torch.tensor(list(itertools.product(range(n), repeat=k)))
        log_w, log_v = (tables[1] - log_mu + part for part in (0.7 * (tables[0] - tables[1]), tables[2] / 0.6))
        difference = log_w[draws].softmax(-1) - log_v[draws].softmax(-1)
        direct = 0.7 * torch.einsum("mk,mkp->mp", difference, scores[draws])
        p = log_mu[draws].sum(-1).exp()
        variance = (p @ (direct - p @ direct).square().sum(-1)).item()
        assert noise.variance.item() == pytest.approx(variance, rel=1e-11)


@both
@pytest.mark.parametrize("k", [1, 2, 3, 7, 64, 2**20])
def test_mean_is_the_gradient_of_the_expected_loss(kind, k):
    (log_pi, log_ref, reward), log_mu = drawn(7, seed=3, spread=1.5)
    scores = normal(7, 4, seed=4)
    leaf = log_pi.clone().requires_grad_()
    expected = EXPECTED[kind](leaf, log_ref, reward, k=k, log_proposal=log_mu, **BETAS)
    (weights,) = torch.autograd.grad(expected, leaf)
    noise = NOISE[kind](scores, log_pi, log_ref, reward, k=k, log_proposal=log_mu, **BETAS)
    # By quadrature with another rule: both err by rounding of sums of a hundred nodes.
    assert_close(noise.mean, weights @ scores, scale=10.0)


# Laws


@both
def test_the_reference_as_a_proposal_is_the_default(kind):
    tables, _ = drawn(5, seed=5)
    scores = normal(5, 3, seed=6)
    default, given_ = (NOISE[kind](scores, *tables, k=3, log_proposal=log_mu, **BETAS) for log_mu in (None, tables[1]))
    assert torch.equal(default.mean, given_.mean)
    assert torch.equal(default.variance, given_.variance)


@both
def test_several_k_at_once_are_those_alone(kind):
    tables, log_mu = drawn(5, seed=7, spread=2.0)
    scores = normal(5, 3, seed=8)
    ks = (64, 2, 1, 3, 2**20)
    for k, noise in zip(ks, NOISES[kind](scores, *tables, ks=ks, log_proposal=log_mu, **BETAS), strict=True):
        alone = NOISE[kind](scores, *tables, k=k, log_proposal=log_mu, **BETAS)
        assert_close(noise.mean, alone.mean)
        assert noise.variance.item() == pytest.approx(alone.variance.item(), rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("k", [2, 3, 16])
def test_dpo_teaches_nothing_where_policy_and_target_agree(k):
    log_ref, reward, log_mu = (table.clone() for table in normal(3, 6, seed=9))
    log_ref, log_mu = log_ref.log_softmax(-1), log_mu.log_softmax(-1)
    log_pi = (log_ref + reward / 0.42).log_softmax(-1)
    noise = dpo_rw_noise(normal(6, 4, seed=10), log_pi, log_ref, reward, k=k, log_proposal=log_mu, **BETAS)
    assert_close(noise.mean, torch.zeros(4))
    assert_close(noise.variance, 0.0)


def test_a_single_candidate_teaches_dpo_nothing():
    tables, _ = drawn(5, seed=11)
    noise = dpo_rw_noise(normal(5, 3, seed=12), *tables, k=1, **BETAS)
    assert_close(noise.mean, torch.zeros(3))
    assert_close(noise.variance, 0.0)


def test_constants_and_common_scores_change_nothing():
    (log_pi, log_ref, reward), log_mu = drawn(5, seed=13)
    scores = normal(5, 3, seed=14)
    call = {"k": 3, "log_proposal": log_mu, **BETAS}
    noise = dpo_rw_noise(scores, log_pi, log_ref, reward, **call)
    for other in (
        dpo_rw_noise(scores, log_pi - 3.0, log_ref, reward, **call),
        dpo_rw_noise(scores, log_pi, log_ref, reward + 100.0, **call),
        dpo_rw_noise(scores + 7.0, log_pi, log_ref, reward, **call),
    ):
        assert_close(other.mean, noise.mean, scale=100.0)
        assert_close(other.variance, noise.variance, scale=100.0)


def test_dpo_tends_to_the_delta_method():
    r"""K variance -> beta_pi^2 E_mu|rho (s - E rho s) - rho* (s - E rho* s)|^2, density ratios to the proposal."""
    (log_pi, log_ref, reward), log_mu = drawn(6, seed=15)
    scores = normal(6, 4, seed=16)
    log_w, log_v = 0.7 * (log_pi - log_ref) + log_ref, reward / 0.6 + log_ref
    influence = torch.zeros(6, 4).double()
    for sign, log_weight in ((1, log_w), (-1, log_v)):
        tilted = log_weight.softmax(-1)
        influence += sign * (tilted / log_mu.exp()).unsqueeze(-1) * (scores - tilted @ scores)
    expected = 0.49 * (log_mu.exp() @ influence.square().sum(-1)).item()
    ks = [2**12, 2**13, 2**14]
    errors = [
        k * noise.variance.item() / expected - 1
        for k, noise in zip(
            ks, dpo_rw_noises(scores, log_pi, log_ref, reward, ks=ks, log_proposal=log_mu, **BETAS), strict=True
        )
    ]
    assert abs(errors[0]) < 1e-2
    for this, next_one in itertools.pairwise(errors):
        assert next_one / this == pytest.approx(0.5, abs=5e-3)


@pytest.mark.parametrize("k", [2, 3, 8, 64])
def test_exo_on_the_policy_s_own_candidates_is_leave_one_out(k):
    """At beta_pi = 1 and at any policy: all weights are equal, and -h beta_r is the reward less its KL penalty."""
    (log_pi, log_ref, reward), _ = drawn(6, seed=17, spread=2.0)
    scores = normal(6, 4, seed=18)
    noise = exo_rw_noise(scores, log_pi, log_ref, reward, k=k, beta_pi=1, beta_r=0.6, log_proposal=log_pi)
    rl = leave_one_out_noise(scores, log_pi, log_ref, reward, beta=0.6, k=k)
    factor = -(k - 1) / (k * 0.6)
    assert_close(noise.mean, factor * rl.mean, scale=10.0)
    assert noise.variance.item() == pytest.approx(factor**2 * rl.variance.item(), rel=RTOL)


@pytest.mark.parametrize("k", [2, 5])
def test_exo_on_tempered_candidates_has_a_group_baseline(k):
    """At any beta_pi the tempered policy makes all weights equal: the mean is (K-1)/K of a covariance under it."""
    (log_pi, log_ref, reward), _ = drawn(6, seed=19)
    scores = normal(6, 4, seed=20)
    log_mu = tempered_policy(log_pi, log_ref, beta_pi=0.7)
    mu, h = log_mu.exp(), 0.7 * (log_pi - log_ref) - reward / 0.6
    covariance = sample_noise((h - mu @ h).unsqueeze(-1) * scores, log_mu).mean
    noise = exo_rw_noise(scores, log_pi, log_ref, reward, k=k, log_proposal=log_mu, **BETAS)
    assert_close(noise.mean, 0.7 * (k - 1) / k * covariance, scale=10.0)


@both
def test_completions_outside_the_support_count_nothing(kind):
    tables, log_mu = drawn(4, seed=21)
    scores = normal(4, 3, seed=22)
    wide = [torch.cat([table, torch.tensor([-INF])]) for table in (*tables, log_mu)]
    noise = NOISE[kind](torch.cat([scores, torch.full((1, 3), INF)]), *wide[:3], k=3, log_proposal=wide[3], **BETAS)
    expected = NOISE[kind](scores, *tables, k=3, log_proposal=log_mu, **BETAS)
    assert_close(noise.mean, expected.mean)
    assert_close(noise.variance, expected.variance)


@pytest.mark.parametrize("spread", [30.0, 100.0])
def test_wide_spreads_stay_finite_and_exact(spread):
    """Policy and target that each put all on the candidate that they like best: 1 or 0, by enumeration."""
    log_ref = normal(3, seed=26).log_softmax(-1)
    log_pi, reward = (
        log_ref + spread * torch.tensor([0.0, -1.0, -2.0]),
        spread * torch.tensor([-1.0, 0.0, -2.0]).double(),
    )
    scores = normal(3, 2, seed=23)
    noise = dpo_rw_noise(scores, log_pi, log_ref, reward, k=2, beta_pi=1.0, beta_r=1.0)
    assert_over_tuples("dpo", noise, scores, (log_pi, log_ref, reward), log_ref, 2, {"beta_pi": 1.0, "beta_r": 1.0})


@both
def test_half_types_are_computed_in_float64(kind):
    tables, _ = drawn(4, seed=24)
    scores = normal(4, 3, seed=25).float()
    noise = NOISE[kind](scores, *tables, k=2, **BETAS)
    assert noise.mean.dtype == noise.variance.dtype == torch.float64
    assert_close(noise.variance, NOISE[kind](scores.double(), *tables, k=2, **BETAS).variance)


@both
@pytest.mark.parametrize("k", [2**33, 2**53 - 1])
def test_more_candidates_than_square_to_an_integer(kind, k):
    """The mean is that of 2**20 candidates up to 1/K: the limit's; the noise is below what rounding leaves of it."""
    tables, log_mu = drawn(5, seed=27)
    scores = normal(5, 3, seed=28)
    many, more = NOISES[kind](scores, *tables, ks=(2**20, k), log_proposal=log_mu, **BETAS)
    torch.testing.assert_close(more.mean, many.mean, rtol=1e-4, atol=1e-4)
    assert 0 <= many.variance.item() < 1e-3
    assert abs(more.variance.item()) < 1e-8


# Refusals


@pytest.mark.unchecked
@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_r": 1e-300}, "beta_r must leave the rewards spread over at most"),
        ({"beta_pi": 1e308}, "beta_pi must leave the log ratios spread over at most"),
        ({"beta_pi": 1e4}, "beta_pi must leave the log ratios spread over at most"),
        ({"log_proposal": torch.tensor([0.0, -2e4, -1.0])}, "beta_pi must leave the log ratios spread"),
    ],
)
def test_spreads_that_would_take_for_ever_are_refused(kind, change, message):
    log_pi, reward = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([0.0, 1.0, 2.0]).double()
    call = {"k": 2, "beta_pi": 1.0, "beta_r": 1.0, **change}
    if "log_proposal" in call:
        call["log_proposal"] = call["log_proposal"].double().log_softmax(-1)
    with pytest.raises(ValueError, match=message):
        NOISE[kind](torch.eye(3), log_pi, log_pi.flip(0), reward, **call)


def test_dpo_takes_fewer_nats_than_exo():
    """Its integral is in two variables."""
    log_p = torch.tensor([0.5, 0.5]).double().log()
    call = {"k": 2, "beta_pi": 1.0, "beta_r": 1.0}
    exo_rw_noise(torch.eye(2), log_p, log_p, torch.tensor([0.0, 1001.0]), **call)
    with pytest.raises(ValueError, match=r"at most 1e\+03 nats .* got 1.0, over 1e\+03 nats"):
        dpo_rw_noise(torch.eye(2), log_p, log_p, torch.tensor([0.0, 1001.0]), **call)


@pytest.mark.unchecked
@both
def test_refusals(kind):
    log_p, reward = torch.tensor([0.5, 0.5, 0.0]).log(), torch.zeros(3)
    scores = torch.zeros(3, 2)
    for log_proposal, message in [
        (torch.tensor([1.0, 0.0, 0.0]).log(), "log_proposal must be finite where log_ref is; got -inf at index [1]"),
        (torch.full((3,), 1 / 3).log(), "log_proposal must be -inf where log_ref is; got -1.09"),
        (torch.zeros(3), "log_proposal must hold normalised log-probabilities"),
        (torch.zeros(2), "log_proposal must have as many completions"),
    ]:
        with pytest.raises(ValueError) as refusal:
            NOISE[kind](scores, log_p, log_p, reward, k=2, log_proposal=log_proposal, **BETAS)
        assert str(refusal.value).startswith(message)
    for ks, message in [((), "ks must hold at least one"), ((2, 0), "k must be an integer of at least 1; got 0")]:
        with pytest.raises(ValueError, match=message):
            NOISES[kind](scores, log_p, log_p, reward, ks=ks, **BETAS)
    with pytest.raises(ValueError, match="beta_r must be a finite number above 0"):
        NOISE[kind](scores, log_p, log_p, reward, k=2, beta_pi=1, beta_r=0)
