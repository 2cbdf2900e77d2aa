"""Expected losses on candidates from a proposal: all tuples, the limit, the 1/K coefficients, the tempered proposal."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.finite_k import (
    dpo_rw_bias_coefficient,
    exo_rw_bias_coefficient,
    expected_dpo_rw_loss,
    expected_exo_rw_loss,
)
from exo_toy.losses import dpo_rw_loss, exo_rw_loss
from exo_toy.objectives import kl_policy_to_optimal
from exo_toy.targets import optimal_policy, tempered_policy
from tests import strategies
from tests.tolerances import assert_close

INF = math.inf
EXPECTED = {"exo": expected_exo_rw_loss, "dpo": expected_dpo_rw_loss}
LOSS = {"exo": exo_rw_loss, "dpo": dpo_rw_loss}
COEFFICIENT = {"exo": exo_rw_bias_coefficient, "dpo": dpo_rw_bias_coefficient}
BETAS = {"beta_pi": 0.7, "beta_r": 0.6}
both = pytest.mark.parametrize("kind", EXPECTED)


def drawn(n: int, seed: int, *, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy, reference, reward and proposal [2, N], some nats apart."""
    generator = torch.Generator().manual_seed(seed)
    tables = spread * torch.randn(4, 2, n, generator=generator, dtype=torch.float64)
    log_pi, log_ref, reward, log_mu = tables
    return log_pi.log_softmax(-1), log_ref.log_softmax(-1), reward, log_mu.log_softmax(-1)


def over_tuples(kind: str, log_pi: Tensor, log_ref: Tensor, reward: Tensor, log_mu: Tensor, *, k: int) -> Tensor:
    """Expectation [X] of the loss that users call over all N^K tuples of candidates from the proposal."""
    draws = torch.tensor(list(itertools.product(range(log_ref.shape[-1]), repeat=k)))
    return torch.stack(
        [
            m[draws].sum(-1).exp() @ LOSS[kind]((p - q)[draws], r[draws], log_weights=(q - m)[draws], **BETAS)
            for p, q, r, m in zip(log_pi, log_ref, reward, log_mu, strict=True)
        ]
    )


def with_gradients(function, *logits: Tensor) -> tuple[Tensor, ...]:
    """Value, and gradients in the logits of policy and reference, the reward, and the logits of the proposal."""
    leaves = [table.clone().requires_grad_() for table in logits]
    log_pi, log_ref, reward, log_mu = leaves
    value = function(log_pi.log_softmax(-1), log_ref.log_softmax(-1), reward, log_mu.log_softmax(-1))
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


@both
@pytest.mark.parametrize(("n", "k"), [(2, 2), (4, 2), (4, 3), (3, 4), (3, 5)])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_agrees_with_all_tuples(kind, n, k, spread):
    tables = drawn(n, seed=10 * n + k, spread=spread)
    ours = with_gradients(lambda *t: EXPECTED[kind](*t[:3], k=k, log_proposal=t[3], **BETAS), *tables)
    theirs = with_gradients(lambda *t: over_tuples(kind, *t, k=k), *tables)
    for actual, expected in zip(ours, theirs, strict=True):
        # Gradients are sums of some products of log weights, over up to 30 nats.
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@both
@given(problem=strategies.problems(n=st.integers(2, 3)), data=st.data())
def test_agrees_with_all_tuples_of_drawn_problems(kind, problem, data):
    """Without a correction of the weights, these could not agree."""
    log_mu = data.draw(strategies.log_probabilities(problem.log_ref.shape, spread=4.0))
    tables = (problem.log_pi, problem.log_ref, problem.reward)
    value = EXPECTED[kind](*tables, k=3, log_proposal=log_mu, **BETAS)
    expected = over_tuples(kind, *tables, log_mu, k=3)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=3e-13)


@both
def test_the_reference_as_a_proposal_is_the_default_bit_for_bit(kind):
    log_pi, log_ref, reward, _ = drawn(5, seed=0)
    for k in (1, 2, 1000):
        given_, default = (
            EXPECTED[kind](log_pi, log_ref, reward, k=k, log_proposal=log_mu, **BETAS) for log_mu in (log_ref, None)
        )
        assert torch.equal(given_, default)
    given_, default = (
        COEFFICIENT[kind](log_pi, log_ref, reward, log_proposal=log_mu, **BETAS) for log_mu in (log_ref, None)
    )
    assert torch.equal(given_, default)


def limit(kind: str, log_pi: Tensor, log_ref: Tensor, reward: Tensor, log_mu: Tensor) -> Tensor:
    """Of the expected loss, less log K for DPO-rw."""
    if kind == "exo":
        return kl_policy_to_optimal(log_pi, log_ref, reward, **BETAS)
    log_star, _ = optimal_policy(log_ref, reward, beta=BETAS["beta_r"])
    log_tempered = tempered_policy(log_pi, log_ref, beta_pi=BETAS["beta_pi"])
    return -(log_star.exp() * (log_tempered - log_mu)).sum(-1)


@pytest.mark.parametrize(
    ("kind", "proposal"),
    [("exo", "policy"), ("exo", "tempered"), ("exo", "drawn"), ("dpo", "policy"), ("dpo", "drawn")],
)
def test_limit_and_coefficient(kind, proposal):
    """The same KL whatever the proposal: what is left falls like 1/K^2 once c/K is taken off."""
    log_pi, log_ref, reward, log_mu = drawn(6, seed=1)
    log_mu = {"policy": log_pi, "tempered": tempered_policy(log_pi, log_ref, beta_pi=0.7), "drawn": log_mu}[proposal]
    tables = (log_pi, log_ref, reward)
    end, c = limit(kind, *tables, log_mu), COEFFICIENT[kind](*tables, log_proposal=log_mu, **BETAS)

    def rest(k: int) -> Tensor:
        value = EXPECTED[kind](*tables, k=k, log_proposal=log_mu, **BETAS)
        return value - (math.log(k) if kind == "dpo" else 0.0) - end - c / k

    # Small enough for 1/K^3 to be seen no more, large enough to stand above the rounding of 1e-14.
    ratio = rest(2**13) / rest(2**12)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.25), rtol=2e-2, atol=0)
    far = EXPECTED[kind](*tables, k=2**30, log_proposal=log_mu, **BETAS) - (math.log(2**30) if kind == "dpo" else 0.0)
    torch.testing.assert_close(far, end + c / 2**30, rtol=1e-12, atol=1e-12)
    other = COEFFICIENT[kind](*tables, **BETAS)
    assert ((c - other).abs() > 1e-3).all()


@pytest.mark.parametrize("k", [1, 2, 100])
def test_dpo_on_tempered_candidates_is_log_k(k):
    """All p_f are 1/K there."""
    log_pi, log_ref, reward, _ = drawn(5, seed=6)
    log_mu = tempered_policy(log_pi, log_ref, beta_pi=BETAS["beta_pi"])
    value = expected_dpo_rw_loss(log_pi, log_ref, reward, k=k, log_proposal=log_mu, **BETAS)
    assert_close(value, [math.log(k)] * 2)
    coefficient = dpo_rw_bias_coefficient(log_pi, log_ref, reward, log_proposal=log_mu, **BETAS)
    assert_close(coefficient, [0.0] * 2)


def test_coefficients_by_loops():
    """Of K times the bias of a ratio of means, all moments under the proposal."""
    log_pi, log_ref, reward, log_mu = (table[0] for table in drawn(4, seed=2))
    mu = log_mu.exp().tolist()
    rho, rho_star = (
        [math.exp(a - b) for a, b in zip(log_p.tolist(), log_mu.tolist(), strict=True)]
        for log_p in (
            tempered_policy(log_pi, log_ref, beta_pi=0.7),
            optimal_policy(log_ref, reward, beta=0.6)[0],
        )
    )

    def mean(values) -> float:
        return math.fsum(m * value for m, value in zip(mu, values, strict=True))

    def coefficient(weight: list[float], g: list[float]) -> float:
        """c of E[sum w g / S]: -cov(w g, w) + E[w g] var w, at E w = 1."""
        product, square = [a * b for a, b in zip(weight, g, strict=True)], mean([a * a for a in weight]) - 1
        covariance = mean([a * b for a, b in zip(product, weight, strict=True)]) - mean(product)
        return -covariance + mean(product) * square

    log_rho, log_star = ([math.log(a) for a in values] for values in (rho, rho_star))
    h = [a - b for a, b in zip(log_rho, log_star, strict=True)]
    var, var_star = (mean([a * a for a in values]) - 1 for values in (rho, rho_star))
    tables = (log_pi, log_ref, reward)
    exo = exo_rw_bias_coefficient(*tables, log_proposal=log_mu, **BETAS)
    assert exo.item() == pytest.approx(coefficient(rho, h) + var / 2 - var_star / 2, rel=1e-11)
    dpo = dpo_rw_bias_coefficient(*tables, log_proposal=log_mu, **BETAS)
    assert dpo.item() == pytest.approx(-coefficient(rho_star, log_rho) - var / 2, rel=1e-11)


@pytest.mark.parametrize("k", [2, 3, 17, 2**20])
def test_tempered_proposal_has_the_exact_direction_at_every_k(k):
    """All weights of EXO-rw are equal there: its expected gradient is (K-1)/K of its limit's, at any policy."""
    log_pi, log_ref, reward, log_mu = drawn(5, seed=3)
    logits = log_pi.clone().requires_grad_()
    (at_limit,) = torch.autograd.grad(
        kl_policy_to_optimal(logits.log_softmax(-1), log_ref, reward, **BETAS).sum(), logits
    )

    def gradient(log_proposal: Tensor, kind: str = "exo") -> Tensor:
        value = EXPECTED[kind](logits.log_softmax(-1), log_ref, reward, k=k, log_proposal=log_proposal, **BETAS)
        return torch.autograd.grad(value.sum(), logits)[0]

    tempered = tempered_policy(log_pi, log_ref, beta_pi=BETAS["beta_pi"])
    assert_close(gradient(tempered), (k - 1) / k * at_limit, scale=10.0)
    # Of no other proposal, unless K is huge.
    if k < 100:
        for other in (log_ref, log_pi, log_mu):
            assert torch.cosine_similarity(gradient(other).flatten(), at_limit.flatten(), 0) < 1 - 1e-4


def test_completions_outside_the_support_count_nothing():
    log_pi, log_ref, reward, log_mu = drawn(4, seed=4)
    outside = torch.full((2, 1), -INF).double()
    wide = [torch.cat([table, outside], -1) for table in (log_pi, log_ref, reward, log_mu)]
    for kind in EXPECTED:
        value = EXPECTED[kind](*wide[:3], k=3, log_proposal=wide[3], **BETAS)
        assert_close(value, EXPECTED[kind](log_pi, log_ref, reward, k=3, log_proposal=log_mu, **BETAS))


def test_a_proposal_is_shared_by_all_prompts():
    log_pi, log_ref, reward, log_mu = drawn(4, seed=5)
    shared = expected_exo_rw_loss(log_pi, log_ref, reward, k=3, log_proposal=log_mu[0], **BETAS)
    apart = expected_exo_rw_loss(log_pi, log_ref, reward, k=3, log_proposal=log_mu[:1].expand(2, 4), **BETAS)
    assert torch.equal(shared, apart)


@pytest.mark.unchecked
@pytest.mark.parametrize("function", [*EXPECTED.values(), *COEFFICIENT.values()], ids=lambda f: f.__name__)
def test_refusals(function):
    count = {"k": 2} if function in EXPECTED.values() else {}
    log_p = torch.tensor([0.5, 0.5, 0.0]).double().log()
    reward = torch.zeros(3).double()
    for log_proposal, message in [
        (torch.tensor([1.0, 0.0, 0.0]).log(), "log_proposal must be finite where log_ref is; got -inf at index [1]"),
        (torch.full((3,), 1 / 3).log(), "log_proposal must be -inf where log_ref is; got -1.09"),
        (torch.zeros(3), "log_proposal must hold normalised log-probabilities"),
        (torch.zeros(2), "log_proposal must have as many completions"),
        (torch.zeros(3, dtype=torch.int64), "log_proposal must have a floating-point dtype"),
    ]:
        with pytest.raises(ValueError) as refusal:
            function(log_p, log_p, reward, log_proposal=log_proposal, **count, **BETAS)
        assert str(refusal.value).startswith(message)
