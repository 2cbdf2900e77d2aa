"""Every theorem on drawn spaces, prompts, temperatures and policies, and every theorem with an assumption broken."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy import theorems
from exo_toy.finite_k import (
    dpo_rw_bias_coefficient,
    exo_rw_bias_coefficient,
    expected_dpo_rw_loss,
    expected_exo_rw_loss,
)
from exo_toy.losses import dpo_rw_loss, exo_rw_loss
from exo_toy.objectives import kl_optimal_to_policy, kl_policy_to_optimal
from exo_toy.policies import KGramPolicy, TabularPolicy
from exo_toy.spaces import SequenceSpace
from exo_toy.targets import optimal_policy, tempered_policy
from exo_toy.theorems import Theorem, parameter_gradient
from exo_toy.training import minimize
from tests import strategies

INF = math.inf
GROWING_K = (2**8, 2**12, 2**16, 2**20)


@dataclasses.dataclass(frozen=True)
class Case:
    """A policy over a space with prompts, a reference and a reward [X, N] or [N], temperatures: all from a few numbers.

    Tables are made when first asked for: the checks of annotations use Python's random numbers, which Hypothesis does
    not allow while it draws.
    """

    space: SequenceSpace
    n_prompts: int
    order: int | None
    """None for a full table."""
    seed: int
    spread: float
    """Size of the logits, of policy and reference, and of the rewards."""
    at_reference: bool
    shared: str
    """Which of reward and reference is one table for all prompts."""
    beta_pi: float
    beta_r: float

    @functools.cached_property
    def policy(self) -> TabularPolicy | KGramPolicy:
        if self.order is None:
            policy = TabularPolicy(self.space, n_prompts=self.n_prompts)
        else:
            policy = KGramPolicy(self.space, self.order, n_prompts=self.n_prompts)
        generator = torch.Generator().manual_seed(self.seed)
        for parameter in policy.parameters():
            parameter.data = self.spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return policy

    @functools.cached_property
    def log_ref(self) -> Tensor:
        if self.at_reference:
            return self.policy.log_probs().detach()
        log_ref = self._normal(seed=self.seed + 1).log_softmax(-1)
        return log_ref[0] if self.shared == "reference" else log_ref

    @functools.cached_property
    def reward(self) -> Tensor:
        reward = self._normal(seed=self.seed + 2)
        return reward[0] if self.shared == "reward" else reward

    def _normal(self, seed: int) -> Tensor:
        shape = (self.n_prompts, self.space.size)
        return self.spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    @property
    def betas(self) -> dict[str, float]:
        return {"beta_pi": self.beta_pi, "beta_r": self.beta_r}

    @property
    def problem(self) -> tuple[TabularPolicy | KGramPolicy, Tensor, Tensor]:
        return self.policy, self.log_ref, self.reward

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.policy.log_probs().detach(), self.log_ref, self.reward


@st.composite
def cases(draw: st.DrawFn, *, at_reference: bool = False, gentle: bool = False) -> Case:
    """Spaces of 2 to 27 completions with and without an eos, one to three prompts, tables and k-grams of any order.

    ``gentle`` draws log weights small enough for the series in 1/K to be good from K = 2^6 on.
    """
    vocab_size, length = draw(st.sampled_from([(2, 1), (2, 2), (2, 3), (2, 4), (3, 1), (3, 2), (3, 3), (5, 1), (4, 2)]))
    low, high = (0.5, 1.5) if gentle else (0.2, 3.0)
    return Case(
        SequenceSpace(vocab_size, length, draw(st.one_of(st.none(), st.integers(0, vocab_size - 1)))),
        n_prompts=draw(st.integers(1, 3)),
        order=draw(st.one_of(st.none(), st.integers(0, length - 1))),
        seed=draw(st.integers(0, 2**31)),
        spread=0.3 if gentle else draw(st.floats(0.1, 2.0)),
        at_reference=at_reference,
        shared=draw(st.sampled_from(["nothing", "reference", "reward"])),
        beta_pi=draw(strategies.temperatures(low, high)),
        beta_r=draw(strategies.temperatures(low, high)),
    )


def assert_holds(theorem: Theorem, *, scale: float = 1.0) -> None:
    """Both sides agree to 1e-12 of the largest entry, or of ``scale`` where that is larger."""
    assert theorem.left.shape == theorem.right.shape
    assert theorem.left.dtype == theorem.right.dtype == torch.float64
    assert theorem.assumptions and all(theorem.assumptions)
    bound = 1e-12 * max(scale, theorem.left.abs().max().item())
    torch.testing.assert_close(theorem.left.detach(), theorem.right.detach(), rtol=0, atol=bound)


def error_between(left: Tensor, right: Tensor) -> float:
    """The error of a theorem with these sides."""
    return Theorem(left.detach(), right.detach(), ()).error


def softness(case: Case) -> float:
    """Numbers in the exponents: log ratios of 10 or 20 times beta_pi, rewards of 5 over beta_r."""
    return 20 * max(1.0, case.beta_pi, 1 / case.beta_r)


def fixed_cases() -> list[Case]:
    """Where the theorems are shown to fail when an assumption breaks: off the reference, a table and two k-grams."""
    return [
        Case(space, 2, order, 10 * seed, 1.0, at_reference=False, shared="nothing", beta_pi=0.6, beta_r=0.8)
        for space, seed, order in itertools.product([SequenceSpace(2, 3), SequenceSpace(3, 2, 1)], (1, 2), (None, 0, 1))
    ]


FIXED = fixed_cases()
each_fixed = pytest.mark.parametrize(
    "case", FIXED, ids=lambda case: f"{case.space.size} completions, order {case.order}, {case.seed}"
)


# What a theorem says of itself


def test_error_and_cosine():
    theorem = Theorem(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 2.0]), ())
    assert theorem.error == 0.5
    assert theorem.cosine == pytest.approx(17 / (5 * math.sqrt(13)), rel=1e-6)
    assert Theorem(torch.zeros(3), torch.zeros(3), ()).error == 0.0
    assert Theorem(torch.tensor([-INF, 1.0]), torch.tensor([-INF, 1.0]), ()).error == 0.0
    assert not Theorem(torch.tensor([-INF]), torch.tensor([1.0]), ()).error < 1
    assert not Theorem(torch.tensor([math.nan]), torch.tensor([1.0]), ()).error < 1


def test_parameter_gradient_is_flat_in_the_order_of_the_parameters_and_leaves_grad_alone():
    policy = FIXED[2].policy
    assert isinstance(policy, KGramPolicy) and policy.order == 1
    weights = torch.linspace(-1, 1, 16).double().reshape(2, 8)
    gradient = parameter_gradient((policy.log_probs() * weights).sum(), policy)
    assert all(parameter.grad is None for parameter in policy.parameters())
    expected = torch.autograd.grad((policy.log_probs() * weights).sum(), list(policy.logits))
    assert torch.equal(gradient, torch.cat([part.flatten() for part in expected]))
    assert len(gradient) == sum(parameter.numel() for parameter in policy.parameters())


# The objective is a KL divergence


@given(case=cases())
def test_objective_identity(case):
    assert_holds(theorems.objective_identity(*case.tables, beta=case.beta_r * case.beta_pi), scale=softness(case))


def test_objective_identity_with_a_forbidden_completion():
    """Both sides finite where the policy avoids it, both -inf where it does not."""
    log_ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    log_pi = torch.tensor([[0.4, 0.6, 0.0], [0.2, 0.4, 0.4]], dtype=torch.float64).log()
    theorem = theorems.objective_identity(log_pi, log_ref, torch.tensor([1.0, 0.0, -INF]).double(), beta=0.5)
    assert theorem.left[0].isfinite() and theorem.left[1].item() == -INF
    assert theorem.error < 1e-14


@each_fixed
def test_objective_identity_needs_the_right_beta_reference_and_reward(case):
    log_pi, log_ref, reward = case.tables
    left = theorems.objective_identity(log_pi, log_ref, reward, beta=0.5).left
    assert error_between(left, theorems.objective_identity(log_pi, log_ref, reward, beta=0.6).right) > 0.01
    other = log_ref.flip(-1)
    assert error_between(left, theorems.objective_identity(log_pi, other, reward, beta=0.5).right) > 0.01
    assert error_between(left, theorems.objective_identity(log_pi, log_ref, reward.flip(-1), beta=0.5).right) > 0.01


@given(case=cases())
def test_generalized_objective_identity(case):
    assert_holds(theorems.generalized_objective_identity(*case.tables, **case.betas), scale=softness(case))


@given(case=cases())
def test_generalized_gradient_identity(case):
    theorem = theorems.generalized_gradient_identity(*case.problem, **case.betas)
    assert_holds(theorem, scale=softness(case))


@each_fixed
def test_generalized_identities_need_the_same_temperatures_on_both_sides(case):
    exchanged = {"beta_pi": case.beta_r, "beta_r": case.beta_pi}
    for function, problem in (
        (theorems.generalized_objective_identity, case.tables),
        (theorems.generalized_gradient_identity, case.problem),
    ):
        assert function(*problem, **case.betas).error < 1e-12
        left, right = function(*problem, **case.betas).left, function(*problem, **exchanged).right
        assert error_between(left, right) > 0.01


# Equivalence of optima


@given(case=cases())
def test_optimum_equivalence(case):
    assert_holds(theorems.optimum_equivalence(case.log_ref, case.reward, **case.betas))


@each_fixed
def test_optimum_equivalence_needs_the_product_of_the_temperatures(case):
    theorem = theorems.optimum_equivalence(case.log_ref, case.reward, beta_pi=0.6, beta_r=0.8)
    for betas in ({"beta_pi": 0.6, "beta_r": 0.4}, {"beta_pi": 1.2, "beta_r": 0.8}):
        other = theorems.optimum_equivalence(case.log_ref, case.reward, **betas)
        assert error_between(theorem.left, other.right) > 0.05
    # pi*_{beta_r} itself, instead of pi*_{beta_r beta_pi}, is not the policy to be tempered.
    wrong, _ = optimal_policy(case.log_ref, case.reward, beta=0.8)
    tempered = tempered_policy(wrong, case.log_ref, beta_pi=0.6).exp()
    assert error_between(tempered, theorem.right[0]) > 0.05


def test_optimum_equivalence_needs_a_class_that_holds_the_optimum():
    """Independent tokens under a reward of both tokens together: each split of beta = 1/2 has an optimum of its own."""
    space = SequenceSpace(2, 2)
    log_ref = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    reward = torch.tensor([[0.5, 0.0, 0.0, 0.4]], dtype=torch.float64)
    splits = [{"beta_pi": 1.0, "beta_r": 0.5}, {"beta_pi": 0.25, "beta_r": 2.0}]

    def distance(**betas: float) -> Callable[[Tensor], Tensor]:
        return lambda log_pi: kl_policy_to_optimal(log_pi, log_ref, reward, **betas).mean()

    optima = []
    for betas, other in (splits, reversed(splits)):
        policy = KGramPolicy(space, 0)
        assert minimize(policy, distance(**betas)).is_minimum(gradient=1e-11)
        assert parameter_gradient(distance(**other)(policy.log_probs()), policy).norm() > 1e-3
        optima.append(policy.log_probs().exp().detach())
    assert (optima[0] - optima[1]).abs().max() > 0.01
    # With order 1 the class is full, and the optimum of either split is that of the theorem.
    for betas in splits:
        policy = KGramPolicy(space, 1)
        assert minimize(policy, distance(**betas)).is_minimum(gradient=1e-11)
        expected, _ = optimal_policy(log_ref, reward, beta=0.5)
        torch.testing.assert_close(policy.log_probs().detach(), expected, rtol=0, atol=1e-9)


# T1 and T2: any policy, K to infinity

LIMITS = {
    "exo": (theorems.exo_rw_gradient_limit, exo_rw_bias_coefficient),
    "dpo": (theorems.dpo_rw_gradient_limit, dpo_rw_bias_coefficient),
}
both = pytest.mark.parametrize("kind", LIMITS)


def coefficient_gradient(kind: str, case: Case) -> Tensor:
    _, coefficient = LIMITS[kind]
    return parameter_gradient(
        coefficient(case.policy.log_probs(), case.log_ref, case.reward, **case.betas).mean(), case.policy
    )


@both
@given(case=cases(gentle=True))
def test_gradient_limits(kind, case):
    """K times the difference of the sides tends to the gradient of the coefficient, with an error of c'/K."""
    function, _ = LIMITS[kind]
    slope = coefficient_gradient(kind, case)

    def gap(k: int) -> Tensor:
        theorem = function(*case.problem, k=k, **case.betas)
        return theorem.left - theorem.right

    def error(k: int) -> float:
        return (k * gap(k) - slope).abs().max().item()

    # Two small K, because the error may cross zero at one of them; K times the rounding of gradients comes on top.
    envelope = max(k * error(k) for k in (2**6, 2**8))
    for k in (2**12, 2**16, 2**20):
        assert error(k) <= 4 * envelope / k + 1e-13 * k
        assert gap(k).abs().max() <= 2 * slope.abs().max() / k + 100 / k**2 + 1e-12


@both
@given(case=cases())
def test_gradient_limits_of_any_policy(kind, case):
    """Far from the reference the coefficient is large; at K = 2^30 the limit is there all the same."""
    function, _ = LIMITS[kind]
    slope = coefficient_gradient(kind, case)
    theorem = function(*case.problem, k=2**40, **case.betas)
    scale = max(1.0, theorem.right.abs().max().item())
    assert (theorem.left - theorem.right).abs().max() <= 2 * slope.abs().max() * 2.0**-40 + 1e-11 * scale


@both
@each_fixed
def test_gradient_limits_fall_with_slope_minus_one(kind, case):
    function, _ = LIMITS[kind]
    gaps = []
    for k in GROWING_K:
        theorem = function(*case.problem, k=k, **case.betas)
        gaps.append((theorem.left - theorem.right).norm().item())
    slopes = [math.log2(more / fewer) / 4 for fewer, more in itertools.pairwise(gaps)]
    assert slopes == pytest.approx([-1.0] * 3, abs=0.05)
    assert theorem.error < 1e-4 and theorem.cosine > 1 - 1e-8


@both
@each_fixed
def test_gradient_limits_are_not_there_at_two_candidates(kind, case):
    function, _ = LIMITS[kind]
    assert function(*case.problem, k=2, **case.betas).error > 0.1


@each_fixed
def test_neither_loss_tends_to_the_other_divergence(case):
    exo = theorems.exo_rw_gradient_limit(*case.problem, k=2**20, **case.betas)
    dpo = theorems.dpo_rw_gradient_limit(*case.problem, k=2**20, **case.betas)
    assert error_between(exo.left, dpo.right) > 0.05
    assert error_between(dpo.left, exo.right) > 0.05


@both
@each_fixed
def test_gradient_limits_need_candidates_from_the_reference(kind, case):
    """Candidates from another distribution q, the loss unchanged: w = (pi/pi_ref)^beta_pi as before, E over q."""
    expected = {"exo": expected_exo_rw_loss, "dpo": expected_dpo_rw_loss}[kind]
    log_q = case.log_ref.flip(-1)
    log_ratio = case.beta_pi * (case.policy.log_probs() - case.log_ref)
    # A policy whose log ratio to q is the true one to the reference, up to a constant that no loss sees.
    stand_in = (log_q + log_ratio).log_softmax(-1)
    loss = expected(stand_in, log_q, case.reward, k=2**20, beta_pi=1.0, beta_r=case.beta_r).mean()
    left = parameter_gradient(loss, case.policy)
    function, _ = LIMITS[kind]
    assert error_between(left, function(*case.problem, k=2, **case.betas).right) > 0.1
    # The same construction with q = the reference is the theorem's left side.
    stand_in = (case.log_ref + case.beta_pi * (case.policy.log_probs() - case.log_ref)).log_softmax(-1)
    loss = expected(stand_in, case.log_ref, case.reward, k=2**20, beta_pi=1.0, beta_r=case.beta_r).mean()
    true_left = function(*case.problem, k=2**20, **case.betas).left
    torch.testing.assert_close(parameter_gradient(loss, case.policy), true_left, rtol=0, atol=1e-12)


@both
@each_fixed
def test_gradient_limits_need_the_loss_s_own_temperatures(kind, case):
    function, _ = LIMITS[kind]
    left = function(*case.problem, k=2**20, **case.betas).left
    for betas in ({"beta_pi": 0.6, "beta_r": 0.5}, {"beta_pi": 0.9, "beta_r": 0.8}):
        assert error_between(left, function(*case.problem, k=2, **betas).right) > 0.05


@both
@pytest.mark.parametrize("k", [2, 3])
@given(case=cases())
def test_left_sides_are_expected_gradients_of_the_losses_that_users_call(kind, k, case):
    """All N^K tuples through exo_rw_loss or dpo_rw_loss, differentiated as a user would."""
    n = case.policy.space.size
    k = 2 if n > 9 else k
    loss = {"exo": exo_rw_loss, "dpo": dpo_rw_loss}[kind]
    draws = torch.cartesian_prod(*[torch.arange(n)] * k).reshape(-1, k)
    log_pi, log_ref, reward = torch.broadcast_tensors(case.policy.log_probs(), case.log_ref, case.reward)
    expected = []
    for row_pi, row_ref, row_reward in zip(log_pi, log_ref, reward, strict=True):
        probability = row_ref[draws].sum(-1).exp()
        expected.append((probability * loss((row_pi - row_ref)[draws], row_reward[draws], **case.betas)).sum())
    gradient = parameter_gradient(torch.stack(expected).mean(), case.policy)
    function, _ = LIMITS[kind]
    theorem = function(*case.problem, k=k, **case.betas)
    bound = 1e-12 * softness(case)
    torch.testing.assert_close(theorem.left, gradient, rtol=1e-12, atol=bound)


# T3: at the reference, every K


@given(case=cases(at_reference=True), k=strategies.candidate_counts())
def test_exo_rw_at_the_reference(case, k):
    theorem = theorems.exo_rw_gradient_at_reference(*case.problem, k=k, **case.betas)
    assert_holds(theorem, scale=softness(case))
    if theorem.right.norm() > 1e-6:
        assert theorem.cosine == pytest.approx(1.0, abs=1e-9)


def at_reference(case: Case) -> Case:
    return dataclasses.replace(case, at_reference=True)


@each_fixed
def test_exo_rw_away_from_the_reference_is_not_parallel(case):
    for k in (2, 8):
        theorem = theorems.exo_rw_gradient_at_reference(*case.problem, k=k, **case.betas)
        assert theorem.error > 0.05
        # Not merely another factor.
        assert theorem.cosine < 0.9999
    assert theorems.exo_rw_gradient_at_reference(*at_reference(case).problem, k=2, **case.betas).error < 1e-11


@each_fixed
def test_dpo_rw_at_the_reference_is_not_parallel(case):
    case = at_reference(case)
    for k in (2, 8):
        dpo = theorems.dpo_rw_gradient_limit(*case.problem, k=k, **case.betas)
        exo = theorems.exo_rw_gradient_limit(*case.problem, k=k, **case.betas)
        for target in (dpo.right, exo.right):
            assert error_between(dpo.left, (k - 1) / k * target) > 0.01
            assert Theorem(dpo.left, target, ()).cosine < 1 - 1e-5


@each_fixed
def test_the_factor_at_the_reference_depends_on_k(case):
    case = at_reference(case)
    left = theorems.exo_rw_gradient_at_reference(*case.problem, k=4, **case.betas).left
    for k in (2, 3, 5, 2**20):
        assert error_between(left, theorems.exo_rw_gradient_at_reference(*case.problem, k=k, **case.betas).right) > 0.04


# T4: the rate

RATES = {"exo": theorems.exo_rw_bias_rate, "dpo": theorems.dpo_rw_bias_rate}


@both
@given(case=cases(gentle=True))
def test_bias_rates(kind, case):
    """Value and gradient; extrapolated once, so that the sides differ by O(1/K^2), down to the rounding of K times."""

    def error(k: int) -> float:
        theorem = RATES[kind](*case.problem, k=k, **case.betas)
        assert len(theorem.left) == 1 + sum(parameter.numel() for parameter in case.policy.parameters())
        return (theorem.left - theorem.right).abs().max().item()

    # Three small K, because the error may cross zero at one of them.
    envelope = max(k**2 * error(k) for k in (2**5, 2**6, 2**7))
    assert error(2**11) <= 4 * envelope / 2**22 + 1e-9
    assert error(2**11) <= 1e-3 * max(1.0, RATES[kind](*case.problem, k=2, **case.betas).right.abs().max().item())


@both
@each_fixed
def test_bias_rates_need_large_k_and_the_right_temperatures(kind, case):
    theorem = RATES[kind](*case.problem, k=2**12, **case.betas)
    assert theorem.error < 1e-3
    assert RATES[kind](*case.problem, k=2, **case.betas).error > 0.05
    for betas in ({"beta_pi": 0.6, "beta_r": 0.6}, {"beta_pi": 0.9, "beta_r": 0.8}):
        assert error_between(theorem.left, RATES[kind](*case.problem, k=2, **betas).right) > 0.05


@both
@each_fixed
def test_bias_rates_of_one_loss_are_not_the_other_s(kind, case):
    other = {"exo": "dpo", "dpo": "exo"}[kind]
    left = RATES[kind](*case.problem, k=2**12, **case.betas).left
    assert error_between(left, RATES[other](*case.problem, k=2, **case.betas).right) > 0.1


# DPO and Bradley-Terry labels


@given(case=cases())
def test_dpo_bradley_terry_identity(case):
    theorem = theorems.dpo_bradley_terry_identity(*case.problem, **case.betas)
    assert_holds(theorem, scale=softness(case))
    assert len(theorem.left) == 1 + sum(parameter.numel() for parameter in case.policy.parameters())


@each_fixed
def test_dpo_bradley_terry_identity_needs_bradley_terry_labels(case):
    right = theorems.dpo_bradley_terry_identity(*case.problem, **case.betas).right
    policy, log_ref, reward = case.problem
    # A labeller who always prefers the higher reward, and one who is noisier than the reward says.
    hard = theorems.dpo_bradley_terry_identity(policy, log_ref, 1e3 * reward, **case.betas).left
    noisy = theorems.dpo_bradley_terry_identity(policy, log_ref, reward / 2, **case.betas).left
    # Of the gradient, which is smaller than the value by a factor of ten.
    assert error_between(hard[1:], right[1:]) > 0.1
    assert error_between(noisy[1:], right[1:]) > 0.1


@each_fixed
def test_dpo_bradley_terry_identity_is_about_two_candidates_from_the_reference(case):
    theorem = theorems.dpo_bradley_terry_identity(*case.problem, **case.betas)
    three = expected_dpo_rw_loss(*case.tables, k=3, **case.betas).mean()
    assert abs(theorem.left[0] - three) > 0.1
    policy, log_ref, reward = case.problem
    log_q = log_ref.flip(-1)
    stand_in = (log_q + case.beta_pi * (policy.log_probs() - log_ref)).log_softmax(-1)
    other = expected_dpo_rw_loss(stand_in, log_q, reward, k=2, beta_pi=1.0, beta_r=case.beta_r).mean()
    gradient = torch.cat([other.detach().reshape(1), parameter_gradient(other, policy)])
    assert error_between(theorem.left, gradient) > 0.01


# Per-sample gradients


@given(drawn=strategies.candidates(bound=10.0))
def test_sample_gradients(drawn):
    for function in (theorems.exo_rw_sample_gradient, theorems.dpo_rw_sample_gradient):
        theorem = function(drawn.log_ratio, drawn.rewards, **drawn.temperatures)
        assert_holds(theorem, scale=max(1.0, drawn.beta_pi) * max(1.0, drawn.scale))


def test_sample_gradients_are_those_of_their_own_loss_and_temperatures():
    log_ratio = torch.tensor([[0.3, -1.2, 0.5], [2.0, 0.1, -0.4]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0.2, -0.7], [0.0, 0.6, 0.3]], dtype=torch.float64)
    functions = (theorems.exo_rw_sample_gradient, theorems.dpo_rw_sample_gradient)
    for function, other in (functions, reversed(functions)):
        left = function(log_ratio, rewards, beta_pi=0.7, beta_r=1.3).left
        assert error_between(left, other(log_ratio, rewards, beta_pi=0.7, beta_r=1.3).right) > 0.1
        assert error_between(left, function(log_ratio, rewards, beta_pi=0.7, beta_r=0.9).right) > 0.05
        assert error_between(left, function(log_ratio, rewards, beta_pi=1.0, beta_r=1.3).right) > 0.05
        assert error_between(left, function(log_ratio, rewards.flip(-1), beta_pi=0.7, beta_r=1.3).right) > 0.05


def test_sample_gradient_of_exo_needs_finite_rewards():
    """With a forbidden candidate the closed form is NaN, or infinite, and no gradient."""
    theorem = theorems.exo_rw_sample_gradient(
        torch.zeros(1, 2).double(), torch.tensor([[0.0, -INF]]).double(), beta_pi=1.0, beta_r=1.0
    )
    assert not theorem.error < 1


@given(drawn=strategies.candidates(bound=10.0, min_k=2))
def test_group_baseline_gradient(drawn):
    zero = torch.zeros_like(drawn.log_ratio)
    theorem = theorems.group_baseline_gradient(zero, drawn.rewards, **drawn.temperatures)
    assert_holds(theorem, scale=max(1.0, drawn.beta_pi) * max(1.0, drawn.scale))
    # (K - 1) / K of leave-one-out: r_i less the mean of the others.
    k = zero.shape[-1]
    others = (drawn.rewards.sum(-1, keepdim=True) - drawn.rewards) / (k - 1)
    rloo = -(drawn.beta_pi / drawn.beta_r) / k * (drawn.rewards - others)
    bound = 1e-12 * max(1.0, drawn.beta_pi) * max(1.0, drawn.scale)
    torch.testing.assert_close(theorem.left, (k - 1) / k * rloo, rtol=1e-12, atol=bound)


def test_group_baseline_gradient_needs_the_reference():
    rewards = torch.tensor([[1.0, 0.2, -0.7]], dtype=torch.float64)
    log_ratio = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)
    assert theorems.group_baseline_gradient(0 * log_ratio, rewards, beta_pi=0.7, beta_r=1.3).error < 1e-14
    assert theorems.group_baseline_gradient(log_ratio, rewards, beta_pi=0.7, beta_r=1.3).error > 0.1
    # GRPO divides by the standard deviation: another length.
    right = theorems.group_baseline_gradient(0 * log_ratio, rewards, beta_pi=0.7, beta_r=1.3).right
    left = theorems.group_baseline_gradient(0 * log_ratio, rewards, beta_pi=0.7, beta_r=1.3).left
    assert error_between(left, right / rewards.std()) > 0.1
    constant = log_ratio * 0 + 3.0
    assert theorems.group_baseline_gradient(constant, rewards, beta_pi=0.7, beta_r=1.3).error < 1e-14


# Tabular softmax


@given(case=cases())
def test_tabular_gradients(case):
    log_pi, log_ref, reward = torch.broadcast_tensors(*case.tables)
    log_pi_star, _ = optimal_policy(log_ref, reward, beta=case.beta_r)
    theorem = theorems.tabular_gradients(log_pi, log_pi_star)
    assert_holds(theorem, scale=softness(case))
    assert theorem.left.shape == (2, *log_pi.shape)


@each_fixed
def test_tabular_gradients_are_one_for_each_direction_and_need_a_table_of_logits(case):
    log_pi, log_ref, reward = case.tables
    log_pi_star, _ = optimal_policy(log_ref, reward, beta=0.8)
    theorem = theorems.tabular_gradients(log_pi, log_pi_star)
    assert theorem.error < 1e-13
    assert error_between(theorem.left[0], theorem.right[1]) > 0.1
    assert error_between(theorem.left[1], theorem.right[0]) > 0.1
    # Square roots of the probabilities as parameters, instead of logits.
    roots = (log_pi / 2).exp().requires_grad_()
    policy = (2 * roots.abs().log()).log_softmax(-1)
    divergence = (policy.exp() * (policy - log_pi_star)).sum()
    assert error_between(torch.autograd.grad(divergence, roots)[0], theorem.right[0]) > 0.1


# The same in numbers: the example of four completions


def test_worked_example_of_the_gradient_theorems():
    """pi_ref = (.4, .3, .2, .1), r = (0, 1, 2, 3), pi = (.1, .2, .3, .4), beta_pi = 1/2, beta_r = 1."""
    policy = TabularPolicy(SequenceSpace(4, 1))
    policy.logits.data = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
    log_ref = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    reward = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    betas = {"beta_pi": 0.5, "beta_r": 1.0}
    limit = theorems.exo_rw_gradient_limit(policy, log_ref, reward, k=2**20, **betas)
    tempered = tempered_policy(policy.log_probs().detach(), log_ref, beta_pi=0.5)
    target, _ = optimal_policy(log_ref, reward, beta=1.0)
    # The logits of the tempered policy are half of the policy's, up to the reference.
    closed = 0.5 * theorems.tabular_gradients(tempered, target).right
    torch.testing.assert_close(limit.right, closed[0].flatten(), rtol=0, atol=1e-14)
    forward = theorems.dpo_rw_gradient_limit(policy, log_ref, reward, k=2**20, **betas)
    torch.testing.assert_close(forward.right, closed[1].flatten(), rtol=0, atol=1e-14)
    values = theorems.generalized_objective_identity(policy.log_probs().detach(), log_ref, reward, **betas)
    assert values.left.item() == pytest.approx(1.383351512626461, rel=1e-14)
    rate = theorems.exo_rw_bias_rate(policy, log_ref, reward, k=2**12, **betas)
    direct = 10**6 * (0.164604176946 - 0.1646044209522257)
    assert rate.right[0].item() == pytest.approx(direct, rel=1e-4)
    assert kl_optimal_to_policy(policy.log_probs(), log_ref, reward, **betas).item() == pytest.approx(
        0.1533032986215301, rel=1e-14
    )


def test_sides_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"right must have the shape of left, \[3\]; got \[1\]"):
        Theorem(torch.zeros(3), torch.zeros(1), ())


def test_parameter_gradient_leaves_frozen_parameters_out_and_gives_unused_ones_zero():
    policy = KGramPolicy(SequenceSpace(2, 2), 0)
    policy.logits[0].requires_grad_(False)
    assert parameter_gradient(policy.logits[1][0, 0, 0] * 3.0, policy).tolist() == [3.0, 0.0]
    policy.logits[0].requires_grad_(True)
    assert parameter_gradient(policy.logits[1][0, 0, 0] * 3.0, policy).tolist() == [0.0, 0.0, 3.0, 0.0]
