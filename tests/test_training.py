"""Exact minimisation and its certificate, and training on sampled candidates: closed forms, fixed points, errors."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.finite_k import expected_dpo_rw_loss, expected_exo_rw_loss
from exo_toy.losses import dpo_rw_loss, exo_rw_loss
from exo_toy.policies import KGramPolicy, TabularPolicy, closest_kgram
from exo_toy.spaces import SequenceSpace
from exo_toy.targets import optimal_policy
from exo_toy.training import Optimum, minimize, train
from tests import sequence_strategies
from tests.tolerances import assert_close

INF = math.inf
BETAS = {"beta_pi": 0.5, "beta_r": 1.5}
SETTINGS = {"k": 8, "batch_size": 16, "steps": 3, "learning_rate": 0.1, **BETAS}
both_losses = pytest.mark.parametrize("loss", [exo_rw_loss, dpo_rw_loss], ids=["exo_rw", "dpo_rw"])


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum over prompts of KL(p||q), without zeros."""
    return (log_p.exp() * (log_p - log_q)).sum()


def randomised(policy: torch.nn.Module, generator: torch.Generator) -> torch.nn.Module:
    for parameter in policy.parameters():
        parameter.data = sequence_strategies.normal(parameter.shape, generator)
    return policy


def problem(
    n_prompts: int = 2, vocab_size: int = 3, length: int = 2, seed: int = 0
) -> tuple[SequenceSpace, Tensor, Tensor]:
    """A space, a reference and rewards that differ between prompts."""
    generator = torch.Generator().manual_seed(seed)
    space = SequenceSpace(vocab_size, length)
    log_ref, reward = sequence_strategies.normal((2, n_prompts, space.size), generator).unbind()
    return space, log_ref.log_softmax(-1), reward


def two_equal_modes(vocab_size: int, length: int) -> Tensor:
    """[N] log-probabilities: 00..0 and (V-1)..(V-1) share nine tenths, the rest is shared by the rest."""
    n_completions = vocab_size**length
    p = torch.full((n_completions,), 0.1 / (n_completions - 2), dtype=torch.float64)
    p[0] = p[-1] = 0.45
    return p.log()


# minimize


@given(sequence_strategies.spaces(min_vocab=2, max_vocab=3, max_length=3), sequence_strategies.generators(), st.data())
def test_finds_the_closest_kgram(space, generator, data):
    order = data.draw(st.integers(0, min(2, space.length - 1)))
    log_p = sequence_strategies.normal((1, space.size), generator).log_softmax(-1)
    policy = randomised(KGramPolicy(space, order), generator)
    optimum = minimize(policy, partial(kl, log_p))
    closest = closest_kgram(space, log_p, order).log_probs()
    # L-BFGS and Newton's method stop at gradients of 1e-10; the value is right to the square of that.
    torch.testing.assert_close(policy.log_probs(), closest, rtol=0, atol=1e-7)
    assert optimum.value == pytest.approx(kl(log_p, closest).item(), abs=1e-12)
    assert optimum.is_minimum() and optimum.gradient < 1e-9 and optimum.curvature > 0


@given(sequence_strategies.generators())
def test_finds_the_target_of_a_full_table_for_every_prompt(generator):
    space = SequenceSpace(2, 2)
    log_p = sequence_strategies.normal((3, space.size), generator).log_softmax(-1)
    policy = randomised(TabularPolicy(space, n_prompts=3), generator)
    optimum = minimize(policy, lambda log_pi: kl(log_pi, log_p))
    torch.testing.assert_close(policy.log_probs(), log_p, rtol=0, atol=1e-6)
    assert abs(optimum.value) < 1e-12 and optimum.is_minimum()


def test_curvature_is_that_of_the_closed_form_hessian():
    """KL(p||softmax) has the Hessian diag(p) - p p^T at its minimum, here with eigenvalues 0, 0.216..., 0.4...."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    optimum = minimize(TabularPolicy(SequenceSpace(3, 1)), partial(kl, p.log()))
    # Trace 1 - sum p^2 = 0.62, second coefficient p1 p2 + ... minus the minors: 3 p1 p2 p3 = 0.09.
    root = math.sqrt(0.62**2 - 4 * 0.09)
    assert optimum.curvature == pytest.approx((0.62 - root) / (0.62 + root), rel=1e-6)
    assert optimum.saturation == pytest.approx(math.log(0.5 / 0.2), rel=1e-6)


def test_leaves_the_policy_at_the_optimum():
    policy = TabularPolicy(SequenceSpace(3, 1))
    optimum = minimize(policy, partial(kl, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()))
    assert torch.nn.utils.parameters_to_vector(policy.parameters()).equal(optimum.parameters)
    with torch.no_grad():
        policy.logits.zero_()
    assert not optimum.parameters.equal(torch.zeros(3, dtype=torch.float64)), "the record shares the policy's memory"


def test_without_a_certificate():
    policy = TabularPolicy(SequenceSpace(2, 1))
    optimum = minimize(policy, partial(kl, torch.tensor([0.2, 0.8], dtype=torch.float64).log()), certify=False)
    assert math.isnan(optimum.curvature) and not optimum.is_minimum()
    assert policy.log_probs().exp()[0].tolist() == pytest.approx([0.2, 0.8], abs=1e-6)


@pytest.mark.parametrize("gap", [26, 30.0, 39.0, 60.0, 800.0])
def test_corner_of_the_softmax_is_no_minimum(gap):
    """KL(pi||p) pulls a token of probability e^-gap so little that the search ends where it starts."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    policy = TabularPolicy(SequenceSpace(3, 1))
    policy.logits.data = torch.tensor([[0.0, 0.0, -float(gap)]], dtype=torch.float64)
    optimum = minimize(policy, lambda log_pi: kl(log_pi, p.log()))
    assert optimum.value > 0.2 and not optimum.is_minimum()


def test_vertex_of_the_softmax_is_no_minimum():
    """Every derivative underflows to zero."""
    policy = TabularPolicy(SequenceSpace(3, 1))
    policy.logits.data = torch.tensor([[0.0, -800.0, -800.0]], dtype=torch.float64)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    optimum = minimize(policy, lambda log_pi: kl(log_pi, p.log()))
    assert optimum.gradient == 0.0 and optimum.curvature == 0.0 and not optimum.is_minimum()


def test_saddle_is_no_minimum():
    """From the symmetric start the gradient never leaves the symmetric policies; between two modes that is a saddle."""
    log_p = two_equal_modes(2, 4)
    policy = KGramPolicy(SequenceSpace(2, 4), 0)
    saddle = minimize(policy, lambda log_pi: kl(log_pi, log_p))
    assert saddle.gradient < 1e-8 and saddle.curvature < 0 and not saddle.is_minimum()
    policy.logits[0].data[..., 0] += 0.1
    minimum = minimize(policy, lambda log_pi: kl(log_pi, log_p))
    assert minimum.is_minimum() and minimum.value < saddle.value - 0.1


@pytest.mark.parametrize(
    ("changes", "certified"),
    [
        ({}, True),
        ({"gradient": 1e-7}, False),
        ({"gradient": math.nan}, False),
        ({"curvature": -1e-3}, False),
        ({"curvature": 0.0}, False),
        ({"saturation": 19.0}, False),
        ({"saturation": math.nan}, True),
    ],
)
def test_certificate_needs_all_its_parts(changes, certified):
    good = {"value": 0.0, "gradient": 1e-10, "curvature": 0.1, "saturation": 3.0}
    assert Optimum(parameters=torch.zeros(1), **{**good, **changes}).is_minimum() is certified


def test_objective_without_a_finite_start():
    policy = TabularPolicy(SequenceSpace(2, 1))
    with pytest.raises(ValueError, match="objective must be finite at the policy's start"):
        minimize(policy, lambda log_pi: log_pi.sum() * math.nan)


# train


def trained(policy: torch.nn.Module, log_ref: Tensor, reward: Tensor, loss, *, seed: int = 0, **changes) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return list(train(policy, log_ref, reward, loss, generator=generator, **{**SETTINGS, **changes}))


@both_losses
def test_full_table_comes_to_the_optimal_policy(loss):
    """There the loss of every group of candidates is least, so that no noise is left: sampling does not blur it."""
    space, log_ref, reward = problem()
    policy = TabularPolicy(space, n_prompts=2)
    trained(policy, log_ref, reward, loss, k=64, steps=500, learning_rate=0.5)
    log_pi_star, _ = optimal_policy(log_ref, reward, beta=BETAS["beta_pi"] * BETAS["beta_r"])
    torch.testing.assert_close(policy.log_probs(), log_pi_star, rtol=0, atol=1e-6)


@both_losses
def test_temperatures_enter_apart(loss):
    """A limited policy's solution depends on the split of beta, so both must reach the loss."""
    log_ref = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    reward = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    seen = []

    def spy(log_ratio: Tensor, rewards: Tensor, **temperatures: float) -> Tensor:
        seen.append((tuple(log_ratio.shape), tuple(rewards.shape), temperatures))
        return loss(log_ratio, rewards, **temperatures)

    trained(TabularPolicy(SequenceSpace(4, 1)), log_ref, reward, spy, k=7, batch_size=5, steps=2)
    assert seen == [((5, 7), (5, 7), BETAS)] * 2


@pytest.mark.parametrize(
    ("loss", "expected"), [(exo_rw_loss, expected_exo_rw_loss), (dpo_rw_loss, expected_dpo_rw_loss)]
)
@pytest.mark.parametrize("k", [2, 32])
def test_training_lowers_the_exactly_expected_loss(loss, expected, k):
    """A limited policy, to within a hundredth of what the exact optimiser of the expected loss reaches."""
    space, log_ref, reward = problem(n_prompts=1, vocab_size=2, length=3)
    tables = {"log_ref": log_ref, "reward": reward, "k": k, **BETAS}

    def objective(log_pi: Tensor) -> Tensor:
        return expected(log_pi, **tables).sum()

    policy, exact = KGramPolicy(space, 0), KGramPolicy(space, 0)
    before = objective(policy.log_probs()).item()
    trained(policy, log_ref, reward, loss, k=k, batch_size=2048 // k, steps=300)
    after, least = objective(policy.log_probs()).item(), minimize(exact, objective, certify=False).value
    assert least <= after + 1e-12 and after - least < 0.01 * (before - least)


@both_losses
def test_first_step_moves_every_logit_by_the_learning_rate(loss):
    """Adam's first step is the sign of the gradient: up for the better completion, down for the worse."""
    log_ref = torch.full((1, 2), 0.5, dtype=torch.float64).log()
    reward = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    policy = TabularPolicy(SequenceSpace(2, 1))
    (value,) = trained(policy, log_ref, reward, loss, steps=1, learning_rate=0.25)
    assert value > 0
    assert policy.logits.tolist()[0] == pytest.approx([-0.25, 0.25], rel=1e-5)


def test_learning_rate_falls_along_a_cosine():
    """A loss that is linear in the log ratios has a constant gradient, and Adam then moves by the learning rate."""
    log_ref = torch.tensor([[-INF, 0.0]], dtype=torch.float64)
    policy = torch.nn.Module()
    policy.log_ratio = torch.nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
    policy.log_probs = lambda: policy.log_ratio
    positions = [0.0]
    steps = train(
        policy,
        log_ref,
        torch.zeros(1, 2, dtype=torch.float64),
        lambda log_ratio, rewards, **_: -log_ratio.mean(-1),
        generator=torch.Generator(),
        **{**SETTINGS, "steps": 4},
    )
    for _ in steps:
        positions.append(policy.log_ratio[0, 1].item())
    moves = [after - before for before, after in itertools.pairwise(positions)]
    assert moves == pytest.approx([0.1 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)], rel=1e-6)
    assert policy.log_ratio[0, 0].item() == 0.0, "a completion outside the reference's support was drawn"


@both_losses
def test_candidates_come_from_the_reference_of_their_own_prompt(loss):
    """Each prompt's reference supports two completions of its own; only their rewards can matter."""
    log_ref = torch.tensor([[0.0, 0.5, 0.0, 0.5], [0.25, 0.0, 0.75, 0.0]], dtype=torch.float64).log()
    reward = torch.tensor([[9.0, 0.0, -9.0, 1.0], [2.0, 9.0, 0.0, -9.0]], dtype=torch.float64)
    policy = TabularPolicy(SequenceSpace(4, 1), n_prompts=2)
    trained(policy, log_ref, reward, loss, steps=600, learning_rate=0.3)
    log_pi = policy.log_probs()
    beta = BETAS["beta_pi"] * BETAS["beta_r"]
    log_odds = torch.stack([log_pi[0, 3] - log_pi[0, 1], log_pi[1, 0] - log_pi[1, 2]])
    wanted = torch.tensor([1 / beta, 2 / beta + math.log(0.25 / 0.75)], dtype=torch.float64)
    torch.testing.assert_close(log_odds, wanted, rtol=0, atol=1e-6)


def test_candidates_have_the_frequencies_of_the_reference():
    """Hoeffding: n draws miss a probability by more than sqrt(log(2/delta) / 2n) with probability delta."""
    log_ref = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    drawn = []

    def spy(log_ratio: Tensor, rewards: Tensor, **_: float) -> Tensor:
        drawn.append(rewards)
        return log_ratio.mean(-1)

    reward = torch.arange(4, dtype=torch.float64).unsqueeze(0)
    trained(TabularPolicy(SequenceSpace(4, 1)), log_ref, reward, spy, k=100, batch_size=100, steps=2)
    first, second = drawn
    assert not first.equal(second)
    draws = torch.cat(drawn).flatten()
    bound = math.sqrt(math.log(2 / 1e-11) / (2 * len(draws)))
    for completion, probability in enumerate(log_ref.exp()[0].tolist()):
        assert abs((draws == completion).double().mean().item() - probability) < bound


def test_generator_decides():
    space, log_ref, reward = problem()
    runs = [trained(TabularPolicy(space, n_prompts=2), log_ref, reward, exo_rw_loss, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] and runs[0] != runs[2]
    assert len(runs[0]) == SETTINGS["steps"]


def test_yields_the_loss_that_it_descended():
    """At a constant reward and the reference every group's loss is zero (Adam blows up what rounding leaves)."""
    log_ref = torch.full((1, 3), 1 / 3, dtype=torch.float64).log()
    policy = TabularPolicy(SequenceSpace(3, 1))
    assert trained(policy, log_ref, torch.zeros(1, 3, dtype=torch.float64), exo_rw_loss) == pytest.approx(
        [0.0] * 3, abs=1e-9
    )
    policy.logits.data[0, 0] = 2.0
    values = trained(policy, log_ref, torch.zeros(1, 3, dtype=torch.float64), exo_rw_loss, steps=200)
    assert values[0] > 0.1 and values[-1] < 1e-4


def test_tables_are_not_written_to():
    space, log_ref, reward = problem()
    before = log_ref.clone(), reward.clone()
    trained(TabularPolicy(space, n_prompts=2), log_ref, reward, exo_rw_loss)
    assert log_ref.equal(before[0]) and reward.equal(before[1])
    assert_close(log_ref.logsumexp(-1), torch.zeros(2))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 1}, "k must be an integer of at least 2; got 1"),
        ({"k": 2.0}, r"k must be an integer of at least 2; got 2\.0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1; got 0"),
        ({"steps": 0}, "steps must be an integer of at least 1; got 0"),
        ({"beta_r": 0.0}, "beta_r must be"),
    ],
)
def test_errors(changes, message):
    space, log_ref, reward = problem()
    with pytest.raises(ValueError, match=message):
        trained(TabularPolicy(space, n_prompts=2), log_ref, reward, exo_rw_loss, **changes)
