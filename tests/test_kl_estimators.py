"""KL estimators and the gradients made of them: plain loops over completions and tokens, laws, extremes, errors.

The oracle knows nothing of autograd: it multiplies scores of tokens, taken from the policy's own conditional
distributions, by coefficients written out by hand, and sums over completions.
"""

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.divergences import kl_divergence
from exo_toy.kl_estimators import (
    ESTIMATORS,
    FROM_REF,
    TO_REF,
    TOLERANCE,
    Recipe,
    closed_form,
    compare,
    divergence_terms,
    expected_kl_surrogate,
    k1,
    k2,
    k3,
    kl_surrogate,
    score_coefficients,
    token_log_probs,
)
from exo_toy.kl_estimators.sampled import Level, Use
from exo_toy.policies import GRUPolicy, KGramPolicy, TabularPolicy
from exo_toy.spaces import SequenceSpace
from tests.tolerances import TOLERANCES, assert_close

INF = math.inf
RTOL = 1e-11
SPACES = (SequenceSpace(3, 3), SequenceSpace(3, 3, eos=1))
RECIPES = [
    Recipe(estimator, use, level, weights)
    for estimator, use, level in itertools.product(ESTIMATORS, get_args(Use), get_args(Level))
    for weights in ("none", "prefix", "token")
    if (use, weights) != ("importance", "none") and (level, weights) != ("sequence", "token")
]


def name(recipe: Recipe) -> str:
    return "-".join((recipe.estimator, recipe.use, recipe.level, recipe.weights))


def random_policy(policy: torch.nn.Module, seed: int, scale: float = 1.0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return policy


def flat_gradient(value: Tensor, policy: torch.nn.Module) -> Tensor:
    gradients = torch.autograd.grad(value, list(policy.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


# The oracle


class Loops:
    """Everything about three policies by loops over completions; scores of tokens by autograd, one at a time."""

    def __init__(self, space: SequenceSpace, policy: KGramPolicy, ref: KGramPolicy, sampler: KGramPolicy) -> None:
        tokens = space.tokens()
        logps = policy.token_log_probs(tokens)[0]
        self.length = space.lengths().tolist()
        self.completions = range(len(tokens))
        self.scores = [[flat_gradient(logps[y, t], policy) for t in range(self.length[y])] for y in self.completions]
        self.pi, self.ref, self.mu = (
            [row[:n] for row, n in zip(p.token_log_probs(tokens)[0].tolist(), self.length, strict=True)]
            for p in (policy, ref, sampler)
        )

    def probability(self, table: list[list[float]], y: int) -> float:
        return math.exp(math.fsum(table[y]))

    def coefficients(
        self, y: int, recipe: Recipe, weighted_by: list[list[float]], baseline: list[float]
    ) -> list[float]:
        """What multiplies the score of each token of completion y."""
        pi, ref, mu = self.pi[y], self.ref[y], weighted_by[y]
        steps = range(len(pi))
        if recipe.level == "sequence":
            ell, ratio = math.fsum(pi) - math.fsum(ref), math.exp(math.fsum(pi) - math.fsum(mu))
            w = 1.0 if recipe.weights == "none" else ratio
            k, slope = VALUE[recipe.estimator](ell), SLOPE[recipe.estimator](ell)
            found = {"loss": w * slope, "reward": w * (k - baseline[0]), "importance": w * (k + slope)}
            return [found[recipe.use]] * len(pi)
        ratios = {
            "none": [1.0 for _ in steps],
            "token": [math.exp(pi[t] - mu[t]) for t in steps],
            "prefix": [math.exp(math.fsum(pi[: t + 1]) - math.fsum(mu[: t + 1])) for t in steps],
        }
        w = ratios[recipe.weights]
        k = [VALUE[recipe.estimator](pi[t] - ref[t]) for t in steps]
        slope = [SLOPE[recipe.estimator](pi[t] - ref[t]) for t in steps]
        if recipe.use == "loss":
            return [w[t] * slope[t] for t in steps]
        if recipe.use == "reward":
            return [math.fsum(w[u] * k[u] for u in steps[t:]) - w[t] * baseline[t] for t in steps]
        # A weight of prefixes holds the scores of all earlier tokens, one of tokens its own.
        reach = {t: steps[t:] if recipe.weights == "prefix" else [t] for t in steps}
        return [w[t] * slope[t] + math.fsum(w[u] * k[u] for u in reach[t]) for t in steps]

    def expected(self, recipe: Recipe, sampler: list[list[float]], baseline: list[float]) -> Tensor:
        total = torch.zeros_like(self.scores[0][0])
        for y in self.completions:
            c = self.coefficients(y, recipe, sampler, baseline)
            total += self.probability(sampler, y) * sum(a * s for a, s in zip(c, self.scores[y], strict=True))
        return total


VALUE = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: math.exp(-x) - 1 + x}
SLOPE = {"k1": lambda x: 1.0, "k2": lambda x: x, "k3": lambda x: 1 - math.exp(-x)}


@pytest.fixture(scope="module", params=SPACES, ids=["fixed length", "eos"])
def problem(request):
    space = request.param
    policy, ref, sampler = (random_policy(KGramPolicy(space, 1), seed, 0.7) for seed in (1, 2, 3))
    tables = [p.log_probs()[0] for p in (policy, ref, sampler)]
    return space, policy, tables, Loops(space, policy, ref, sampler)


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
@pytest.mark.parametrize("off_policy", [False, True])
def test_expected_gradient_is_that_of_loops(problem, recipe, off_policy):
    space, policy, (log_pi, log_ref, log_mu), loops = problem
    sampler = {"log_sampler": log_mu} if off_policy else {}
    found = flat_gradient(expected_kl_surrogate(log_pi, log_ref, space, recipe=recipe, **sampler), policy)
    wanted = loops.expected(recipe, loops.mu if off_policy else loops.pi, [0.0] * space.length)
    assert_close(found, wanted, scale=10)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.use == "reward"], ids=name)
def test_mean_baseline_is_that_of_loops(problem, recipe):
    """The mean return of a position over completions that reach it, weighted as the rewards are."""
    space, policy, (log_pi, log_ref, log_mu), loops = problem
    returns, weight = [0.0] * space.length, [0.0] * space.length
    for y in loops.completions:
        p = loops.probability(loops.mu, y)
        if recipe.level == "sequence":
            ell = math.fsum(loops.pi[y]) - math.fsum(loops.ref[y])
            w = 1.0 if recipe.weights == "none" else math.exp(math.fsum(loops.pi[y]) - math.fsum(loops.mu[y]))
            returns[0] += p * w * VALUE[recipe.estimator](ell)
            weight[0] += p * w
            continue
        to_go = loops.coefficients(y, recipe, loops.mu, [0.0] * space.length)
        ratios = [
            a - b for a, b in zip(to_go, loops.coefficients(y, recipe, loops.mu, [1.0] * space.length), strict=True)
        ]
        for t, (g, w) in enumerate(zip(to_go, ratios, strict=True)):
            returns[t] += p * g
            weight[t] += p * w
    baseline = [r / w if w else 0.0 for r, w in zip(returns, weight, strict=True)]
    value = expected_kl_surrogate(log_pi, log_ref, space, recipe=recipe, log_sampler=log_mu, baseline="mean")
    assert_close(flat_gradient(value, policy), loops.expected(recipe, loops.mu, baseline), scale=10)


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_coefficients_times_scores_are_the_sampled_gradients(problem, recipe):
    space, _, (log_pi, log_ref, log_mu), loops = problem
    sampler = {} if recipe.weights == "none" else {"log_sampler": log_mu}
    found = score_coefficients(log_pi, log_ref, space, recipe=recipe, **sampler)
    for y in loops.completions:
        wanted = loops.coefficients(y, recipe, loops.mu, [0.0] * space.length)
        assert_close(found[y], wanted + [0.0] * (space.length - len(wanted)), scale=10)


def test_token_log_probs_are_the_policy_s_own(problem):
    space, policy, tables, _ = problem
    assert_close(token_log_probs(space, tables[0]), policy.token_log_probs(space.tokens())[0], scale=10)


# Which gradient it is


def policies() -> list[tuple[str, torch.nn.Module, torch.nn.Module]]:
    space = SPACES[1]
    makers = {
        "tabular": lambda: TabularPolicy(space),
        "bigram": lambda: KGramPolicy(space, 1),
        "gru": lambda: GRUPolicy(space, 2, generator=torch.Generator().manual_seed(0)),
    }
    return [(kind, random_policy(make(), 4), random_policy(make(), 5)) for kind, make in makers.items()]


@pytest.mark.parametrize(
    ("kind", "policy", "ref"), policies(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_closed_forms(kind, policy, ref):
    space, log_pi, log_ref = policy.space, policy.log_probs()[0], ref.log_probs()[0]
    terms = {key: flat_gradient(value, policy) for key, value in divergence_terms(log_pi, log_ref, space).items()}
    size = terms[TO_REF].norm().item()
    known = 0
    for recipe, sampler in itertools.product(RECIPES, ("policy", "reference")):
        form = closed_form(recipe, sampler)
        if form is None:
            continue
        known += 1
        off_policy = {"log_sampler": log_ref} if sampler == "reference" else {}
        found = flat_gradient(expected_kl_surrogate(log_pi, log_ref, space, recipe=recipe, **off_policy), policy)
        wanted = sum((n * terms[term] for term, n in form.items()), torch.zeros_like(found))
        assert (found - wanted).norm().item() <= RTOL * max(size, terms["χ²(π_ref‖π)"].norm().item()), (recipe, sampler)
    # Under the policy all but k2 with the weights of tokens; under the reference 18 with prefix weights, 6 without.
    assert known == 38 + 18 + 6


@pytest.mark.parametrize(
    ("recipe", "verdict"),
    [
        (Recipe("k1", "loss"), "zero"),
        (Recipe("k2", "loss"), "right"),
        (Recipe("k3", "loss"), "the other KL's"),
        (Recipe("k1", "reward"), "right"),
        (Recipe("k2", "reward"), "biased"),
        (Recipe("k3", "reward"), "biased"),
        (Recipe("k1", "importance", weights="prefix"), "right"),
        (Recipe("k2", "importance", weights="prefix"), "biased"),
        (Recipe("k3", "importance", weights="prefix"), "right"),
        (Recipe("k1", "loss", "token"), "zero"),
        (Recipe("k2", "loss", "token"), "biased"),
        (Recipe("k3", "loss", "token"), "biased"),
        (Recipe("k1", "reward", "token"), "right"),
        (Recipe("k3", "reward", "token"), "biased"),
        (Recipe("k3", "importance", "token", "prefix"), "right"),
        (Recipe("k3", "importance", "token", "token"), "biased"),
    ],
    ids=lambda value: name(value) if isinstance(value, Recipe) else value,
)
def test_verdicts_on_policy(recipe, verdict):
    """By hand from the score having mean zero; the terms are those of plain loops over completions."""
    space = SPACES[1]
    policy, ref = random_policy(KGramPolicy(space, 2), 6), random_policy(KGramPolicy(space, 2), 7)
    log_pi, log_ref = policy.log_probs()[0], ref.log_probs()[0]
    right, other = (
        flat_gradient(kl, policy) for kl in (kl_divergence(log_pi, log_ref), kl_divergence(log_ref, log_pi))
    )
    gradient = flat_gradient(expected_kl_surrogate(log_pi, log_ref, space, recipe=recipe), policy)
    assert compare(gradient, right, other).verdict == verdict


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_independent_positions_leave_nothing_out(estimator):
    """Where no token depends on those before it, in either policy, the fixed prefixes do no harm."""
    space = SPACES[0]
    policy, ref = random_policy(KGramPolicy(space, 0), 8), random_policy(KGramPolicy(space, 0), 9)
    terms = divergence_terms(policy.log_probs()[0], ref.log_probs()[0], space)
    gradients = {key: flat_gradient(value, policy) for key, value in terms.items()}
    assert_close(gradients["KL(π‖π_ref), prefixes fixed"], gradients[TO_REF])
    assert_close(gradients["KL(π_ref‖π), prefixes fixed"], gradients[FROM_REF])
    recipe = Recipe(estimator, "importance", "token", "token")
    found = flat_gradient(
        expected_kl_surrogate(*(p.log_probs()[0] for p in (policy, ref)), space, recipe=recipe), policy
    )
    assert compare(found, gradients[TO_REF], gradients[FROM_REF]).verdict == (
        "biased" if estimator == "k2" else "right"
    )


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.weights == "prefix"], ids=name)
def test_prefix_weights_make_any_sampler_the_policy(problem, recipe):
    space, policy, (log_pi, log_ref, log_mu), _ = problem
    baselines = ("none", "mean") if recipe.use == "reward" else ("none",)
    wanted = flat_gradient(expected_kl_surrogate(log_pi, log_ref, space, recipe=recipe), policy)
    for log_sampler, baseline in itertools.product((log_ref, log_mu), baselines):
        value = expected_kl_surrogate(log_pi, log_ref, space, recipe=recipe, log_sampler=log_sampler, baseline=baseline)
        assert_close(flat_gradient(value, policy), wanted, scale=10)


@pytest.mark.parametrize("level", get_args(Level))
def test_k1_as_a_loss_leads_away_from_any_other_sampler(problem, level):
    space, policy, (log_pi, log_ref, log_mu), _ = problem
    value = expected_kl_surrogate(log_pi, log_ref, space, recipe=Recipe("k1", "loss", level), log_sampler=log_mu)
    assert_close(flat_gradient(value, policy), -flat_gradient(kl_divergence(log_mu.detach(), log_pi), policy))


def test_three_recipes_are_one_sample_by_sample(problem):
    """k1 as a reward, k2 as a loss and k3 with its weight: the log ratio times the score, on-policy."""
    space, _, (log_pi, log_ref, _), _ = problem
    recipes = (Recipe("k1", "reward"), Recipe("k2", "loss"), Recipe("k3", "importance", weights="prefix"))
    log_ratio = (log_pi - log_ref).detach()
    counted = space.counted(space.tokens())
    for recipe in recipes:
        found = score_coefficients(log_pi, log_ref, space, recipe=recipe)
        assert_close(found, torch.where(counted, log_ratio.unsqueeze(-1), 0.0), scale=10)


# The estimators


@given(st.floats(-30, 30))
def test_estimators_against_the_formulas(x):
    values = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    for key, estimator in ESTIMATORS.items():
        value = estimator(values)
        (slope,) = torch.autograd.grad(value.sum(), values)
        assert value.item() == pytest.approx(VALUE[key](x), rel=1e-12, abs=1e-14 * max(1, abs(x)))
        assert slope.item() == pytest.approx(SLOPE[key](x), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("x", [1e-300, -1e-12, 1e-8, -3e-5, 0.01, -0.3, 0.4999999, 0.5, -0.5000001])
def test_k3_keeps_its_digits(x):
    """Against the power series in exact arithmetic; derivatives too, through the second."""
    values = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = k3(values)
    (slope,) = torch.autograd.grad(value, values, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, values)
    terms = [(-x) ** n / math.factorial(n) for n in range(2, 40)]
    assert value.item() == pytest.approx(math.fsum(terms), rel=1e-14, abs=1e-320)
    assert slope.item() == pytest.approx(-math.expm1(-x), rel=1e-14)
    assert curvature.item() == pytest.approx(math.exp(-x), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extremes_and_dtypes(dtype):
    x = torch.tensor([-INF, -1e4, 1e4, INF, 0.0, 2.0], dtype=dtype)
    assert k1(x).equal(x)
    e = math.exp(-2)
    expected = {k2: [INF, 5e7, 5e7, INF, 0.0, 2.0], k3: [INF, INF, 1e4 - 1, INF, 0.0, e + 1]}
    for estimator, wanted in expected.items():
        found = estimator(x)
        assert found.dtype == dtype
        assert_close(found, wanted)
    assert k3(torch.tensor(math.nan, dtype=dtype)).isnan()


def test_infinite_ratios_have_the_limits_of_the_slope():
    x = torch.tensor([-INF, INF, 800.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(k3(x).sum(), x)
    assert slope.tolist() == [-INF, 1.0, 1.0]


# The surrogate on samples


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_masked_entries_change_nothing(recipe):
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, True, False, False], [True, False, False, False], [True, True, True, True]])
    logps, ref, old = (-torch.rand(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))

    def value_and_gradient(junk: float) -> tuple[Tensor, Tensor]:
        policy, *others = (torch.where(mask, table, junk) for table in (logps, ref, old))
        policy.requires_grad_()
        sampler = {} if recipe.weights == "none" else {"sampler_logps": others[1]}
        value = kl_surrogate(policy, others[0], mask, recipe=recipe, **sampler)
        return value, torch.autograd.grad(value.sum(), policy)[0]

    for found, wanted in zip(value_and_gradient(math.nan), value_and_gradient(0.0), strict=True):
        assert_close(found, wanted)
        assert found.shape == wanted.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype):
    logps = torch.tensor([[-1.0, -0.5], [-0.25, -2.0]])
    ref = torch.tensor([[-0.5, -0.75], [-1.0, -1.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    for recipe in RECIPES:
        found = kl_surrogate(logps.to(dtype), ref.to(dtype), mask, recipe=recipe)
        assert found.dtype == dtype
        wanted = kl_surrogate(logps.double(), ref.double(), mask, recipe=recipe)
        assert_close(found, wanted, scale=TOLERANCES[dtype].rtol / TOLERANCES[dtype].atol)


@pytest.mark.unchecked
def test_errors():
    space, table = SPACES[0], torch.full((27,), -math.log(27), dtype=torch.float64)
    logps, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    recipe = Recipe("k1", "reward")
    for arguments in (("k4", "loss"), ("k1", "penalty"), ("k1", "loss", "word"), ("k1", "loss", "token", "all")):
        with pytest.raises(ValueError, match="must be one of"):
            Recipe(*arguments)
    with pytest.raises(ValueError, match="weights must be"):
        Recipe("k1", "importance")
    with pytest.raises(ValueError, match="sampler_logps must be None"):
        kl_surrogate(logps, logps, mask, recipe=recipe, sampler_logps=logps)
    with pytest.raises(ValueError, match="baseline must be None"):
        kl_surrogate(logps, logps, mask, recipe=Recipe("k1", "loss"), baseline=torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"baseline must be \[2, 1\]"):
        kl_surrogate(logps, logps, mask, recipe=recipe, baseline=torch.zeros(2))
    with pytest.raises(ValueError, match=r"ref_logps must have the same shape \[B, T\]"):
        kl_surrogate(logps, logps[:1], mask, recipe=recipe)
    with pytest.raises(ValueError, match="ref_logps must be finite"):
        kl_surrogate(logps, logps - INF, mask, recipe=recipe)
    with pytest.raises(ValueError, match=r"mask must be a torch\.bool"):
        kl_surrogate(logps, logps, mask.float(), recipe=recipe)
    with pytest.raises(ValueError, match=r"log_ref must be .* 27 completions"):
        expected_kl_surrogate(table, table[:9], space, recipe=recipe)
    with pytest.raises(ValueError, match="log_pi must hold normalised"):
        expected_kl_surrogate(table + 1, table, space, recipe=recipe)
    with pytest.raises(ValueError, match="log_p must be finite"):
        token_log_probs(SequenceSpace(2, 1), torch.tensor([0.0, -INF]))
    with pytest.raises(ValueError, match="baseline must be one of"):
        expected_kl_surrogate(table, table, space, recipe=recipe, baseline="best")
    right, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match="must differ"):
        compare(right, right, right)
    with pytest.raises(ValueError, match="gradient must be finite"):
        compare(right / 0, right, other)


def test_comparison_by_hand():
    right, other = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
    zero = compare(torch.tensor([0.0, TOLERANCE]), right, other)
    assert (zero.verdict, zero.error, zero.component) == ("zero", 1.0, 0.0)
    assert math.isnan(zero.cosine)
    assert math.isnan(zero.other_cosine)
    away = compare(torch.tensor([-1.0, 1.0]), right, other)
    assert away == (
        "biased",
        pytest.approx(math.sqrt(10) / 2),
        pytest.approx(math.sqrt(2)),
        pytest.approx(-math.sqrt(0.5)),
        pytest.approx(0.0, abs=1e-7),
        -0.5,
    )
    assert compare(right * (1 + 1e-11), right.double(), other.double()).verdict == "right"
    assert compare(right.double() * (1 + 1e-9), right.double(), other.double()).verdict == "biased"
