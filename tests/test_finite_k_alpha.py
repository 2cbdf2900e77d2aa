"""The exactly expected alpha loss: brute force through the loss that users call, its ends, its limit, its optimum."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.divergences import alpha_divergence, kl_divergence
from exo_toy.finite_k import expected_alpha_rw_loss, expected_dpo_rw_loss, expected_exo_rw_loss
from exo_toy.losses import alpha_rw_loss
from exo_toy.policies import TabularPolicy
from exo_toy.spaces import SequenceSpace
from exo_toy.targets import optimal_policy, tempered_policy
from exo_toy.training import minimize
from tests import strategies
from tests.tolerances import assert_close

LOG_REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
LOG_PI = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
REWARD = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
BETAS = {"beta_pi": 0.5, "beta_r": 1.0}
each_alpha = pytest.mark.parametrize("alpha", [-0.3, 0, 1e-9, 0.25, 0.5, 0.9, 1 - 1e-9, 1, 1.4])
alphas = st.one_of(st.sampled_from([0, 1, 0.5]), st.floats(0.0, 1.0))


def over_tuples(log_pi: Tensor, log_ref: Tensor, reward: Tensor, log_mu: Tensor, *, k: int, **options: float) -> Tensor:
    """The loss that users call, averaged over all N^K tuples of one proposal's candidates; differentiable."""
    draws = torch.cartesian_prod(*[torch.arange(len(log_mu))] * k)
    weights = (log_ref - log_mu)[draws]
    loss = alpha_rw_loss((log_pi - log_ref)[draws], reward[draws], log_weights=weights, **options)
    return (log_mu[draws].sum(-1).exp() * loss).sum()


def in_logits(function, *tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Hessian of a function of policy, reference, reward and proposal, in what defines them."""
    entries = torch.stack(tables).requires_grad_()

    def of(entries: Tensor) -> Tensor:
        log_pi, log_ref, reward, log_mu = entries
        return function(log_pi.log_softmax(-1), log_ref.log_softmax(-1), reward, log_mu.log_softmax(-1))

    value = of(entries)
    (gradient,) = torch.autograd.grad(value, entries, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, entries, retain_graph=True)[0] for g in gradient.flatten()])
    return value.detach(), gradient.detach(), hessian


@each_alpha
@pytest.mark.parametrize(("k", "n"), [(2, 4), (4, 3), (8, 2)])
def test_derivatives_are_those_of_the_loss_over_all_tuples(alpha, k, n):
    """In policy, reference, reward and proposal together."""
    generator = torch.Generator().manual_seed(10 * k + n)
    tables = 2 * torch.randn(4, n, generator=generator, dtype=torch.float64)
    options = {"k": k, "alpha": alpha, "beta_pi": 0.7, "beta_r": 0.6}
    ours = in_logits(lambda pi, ref, r, mu: expected_alpha_rw_loss(pi, ref, r, log_proposal=mu, **options), *tables)
    theirs = in_logits(lambda *given: over_tuples(*given, **options), *tables)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@given(problem=strategies.problems(n=st.integers(2, 3)), alpha=alphas)
def test_agrees_with_all_tuples_of_the_reference(problem, alpha):
    """Prompts in a batch, drawn temperatures, log ratios and rewards over some twenty nats."""
    k = 2 + problem.k % 4
    options = {"k": k, "alpha": alpha, "beta_pi": problem.beta_pi, "beta_r": problem.beta_r}
    value = expected_alpha_rw_loss(problem.log_pi, problem.log_ref, problem.reward, **options)
    rows = zip(problem.log_pi, problem.log_ref, problem.reward, problem.log_ref, strict=True)
    expected = torch.stack([over_tuples(*row, **options) for row in rows])
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)


@given(problem=strategies.problems())
def test_ends_are_exo_and_dpo_less_its_minimum(problem):
    tables, betas = (problem.log_ref, problem.reward), {"beta_pi": problem.beta_pi, "beta_r": problem.beta_r}
    log_pi_star, _ = optimal_policy(*tables, beta=problem.beta)
    exo = expected_exo_rw_loss(problem.log_pi, *tables, k=problem.k, **betas)
    dpo = expected_dpo_rw_loss(problem.log_pi, *tables, k=problem.k, **betas)
    least = expected_dpo_rw_loss(log_pi_star, *tables, k=problem.k, **betas)
    for alpha, expected in ((1, exo), (0, dpo - least)):
        value = expected_alpha_rw_loss(problem.log_pi, *tables, k=problem.k, alpha=alpha, **betas)
        # Of log weights up to some hundred nats, a few roundings each.
        assert_close(value, expected, scale=100.0)


@each_alpha
def test_loss_and_gradient_tend_to_those_of_the_divergence(alpha):
    """The tempered policy's from the optimal policy, at K = 2^30, from another proposal too; not close at K = 2."""
    log_pi_star, _ = optimal_policy(LOG_REF, REWARD, beta=1.0)

    def limit(log_pi: Tensor) -> Tensor:
        return alpha_divergence(tempered_policy(log_pi, LOG_REF, beta_pi=0.5), log_pi_star, alpha=alpha)

    def expected(log_pi: Tensor, k: int, log_mu: Tensor | None) -> Tensor:
        return expected_alpha_rw_loss(log_pi, LOG_REF, REWARD, k=k, alpha=alpha, log_proposal=log_mu, **BETAS)

    def gradient(function, *more) -> Tensor:
        logits = LOG_PI.clone().requires_grad_()
        return torch.autograd.grad(function(logits.log_softmax(-1), *more), logits)[0]

    for log_mu in (None, torch.tensor([0.1, 0.5, 0.3, 0.1]).double().log()):
        assert expected(LOG_PI, 2**30, log_mu).item() == pytest.approx(limit(LOG_PI).item(), abs=1e-7)
        torch.testing.assert_close(gradient(expected, 2**30, log_mu), gradient(limit), rtol=0, atol=1e-7)
    assert abs(expected(LOG_PI, 2, None) - limit(LOG_PI)) > 1e-2


@pytest.mark.parametrize("alpha", [0, 0.3, 0.8, 1, 1.3])
def test_at_the_reference_only_the_end_of_exo_is_parallel_to_its_limit(alpha):
    """(K-1)/K times the gradient of KL(pi||pi*) at alpha = 1; another direction at any other alpha."""
    log_pi_star, _ = optimal_policy(LOG_REF, REWARD, beta=1.0)

    def gradient(function) -> Tensor:
        logits = LOG_REF.clone().requires_grad_()
        return torch.autograd.grad(function(logits.log_softmax(-1)), logits)[0]

    limit = gradient(lambda log_pi: alpha_divergence(log_pi, log_pi_star, alpha=alpha))
    for k in (2, 7):
        options = {"k": k, "alpha": alpha, "beta_pi": 1.0, "beta_r": 1.0}
        found = gradient(lambda log_pi, o=options: expected_alpha_rw_loss(log_pi, LOG_REF, REWARD, **o))
        if alpha == 1:
            assert_close(found, (k - 1) / k * gradient(lambda log_pi: kl_divergence(log_pi, log_pi_star)))
        else:
            assert torch.cosine_similarity(found, limit, 0) < 1 - 1e-5


@pytest.mark.parametrize("alpha", [0, 0.4, 1, 1.3])
@pytest.mark.parametrize("k", [2, 16])
def test_with_a_full_table_the_optimum_is_the_optimal_policy(alpha, k):
    policy = TabularPolicy(SequenceSpace(2, 2))
    options = {"k": k, "alpha": alpha, "beta_pi": 0.5, "beta_r": 1.0}
    optimum = minimize(policy, lambda log_pi: expected_alpha_rw_loss(log_pi[0], LOG_REF, REWARD, **options))
    log_pi_star, _ = optimal_policy(LOG_REF, REWARD, beta=0.5)
    assert optimum.is_minimum()
    assert optimum.value == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(policy.log_probs().detach()[0], log_pi_star, rtol=0, atol=1e-6)


@pytest.mark.unchecked
@pytest.mark.parametrize("bad", [-0.6, 1.6, math.nan, "1", True, None, torch.tensor(0.5)], ids=str)
def test_alpha_outside_its_range_is_refused(bad):
    with pytest.raises(ValueError, match=r"^alpha must be in \[-0.5, 1.5\]"):
        expected_alpha_rw_loss(LOG_PI, LOG_REF, REWARD, k=2, alpha=bad, **BETAS)


def test_spreads_beyond_the_quadrature_are_refused():
    """At any alpha beyond a thousand nats; sooner beyond the ends."""
    with pytest.raises(ValueError, match=r"^beta_r must leave the rewards spread over at most 1e\+03 nats"):
        expected_alpha_rw_loss(LOG_PI, LOG_REF, REWARD, k=2, alpha=0.5, beta_pi=1.0, beta_r=1e-3)
    with pytest.raises(ValueError, match=r"^alpha must be within 0.3 of \[0, 1\] for weights spread over 100 nats"):
        expected_alpha_rw_loss(LOG_PI, LOG_REF, REWARD, k=2, alpha=1.4, beta_pi=1.0, beta_r=0.03)
    assert expected_alpha_rw_loss(LOG_PI, LOG_REF, REWARD, k=2, alpha=1.2, beta_pi=1.0, beta_r=0.03).isfinite()
