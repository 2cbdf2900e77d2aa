"""PPO: its surrogate against loops, its gradient against that of the objective, the trainer's fixed point, errors."""

import copy
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.objectives import alignment_objective
from exo_toy.policies import GRUPolicy, KGramPolicy, LowRankPolicy, TransformerPolicy, closest_kgram
from exo_toy.policies.autoregressive import AutoregressivePolicy
from exo_toy.spaces import SequenceSpace
from exo_toy.targets import optimal_policy
from exo_toy.training import ppo, ppo_loss
from exo_toy.training.proximal import ValueTable, rewards_to_go
from tests import sequence_oracles, sequence_strategies
from tests.tolerances import assert_close

BETA = 0.7
SETTINGS = {
    "beta": BETA,
    "batch_size": 8,
    "steps": 3,
    "epochs": 2,
    "learning_rate": 0.05,
    "value_order": 1,
    "value_learning_rate": 0.1,
}
POLICIES = {
    "kgram": lambda space, generator: KGramPolicy(space, 1, n_prompts=2),
    "low_rank": lambda space, generator: LowRankPolicy(space, 2, n_prompts=2, generator=generator),
    "gru": lambda space, generator: GRUPolicy(space, 5, n_prompts=2, generator=generator),
    "transformer": lambda space, generator: TransformerPolicy(space, 6, 2, 2, n_prompts=2, generator=generator),
}
each_policy = pytest.mark.parametrize("build", POLICIES.values(), ids=POLICIES)
each_eos = pytest.mark.parametrize("eos", [None, 0, 1])


def randomised(policy: AutoregressivePolicy, generator: torch.Generator) -> AutoregressivePolicy:
    """A policy of which no parameter is where it began."""
    for parameter in policy.parameters():
        parameter.data += 0.5 * sequence_strategies.normal(tuple(parameter.shape), generator)
    return policy


def world(eos: int | None, build=POLICIES["kgram"], seed: int = 0):
    """A policy, a reference of the same kind and rewards, over three tokens and at most four positions."""
    generator = torch.Generator().manual_seed(seed)
    space = SequenceSpace(3, 4, eos)
    policy, ref = (randomised(build(space, generator), generator) for _ in range(2))
    return policy, ref.requires_grad_(False), sequence_strategies.normal((2, space.size), generator)


def flat(loss: Tensor, policy: AutoregressivePolicy) -> Tensor:
    """The gradient of a loss with respect to all parameters, in one vector."""
    gradients = torch.autograd.grad(loss, list(policy.parameters()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


# The surrogate


def surrogate(
    logps: list[float], old_logps: list[float], advantages: list[float], mask: list[bool], clip: float
) -> float:
    """Loops over the tokens that count."""
    terms = []
    for logp, old, advantage, counts in zip(logps, old_logps, advantages, mask, strict=True):
        if counts:
            ratio = math.exp(logp - old)
            clipped = min(max(ratio, 1 - clip), 1 + clip)
            terms.append(min(ratio * advantage, clipped * advantage))
    return -math.fsum(terms)


def test_oracle_of_the_surrogate_by_hand():
    # Ratios 2, 2, 1/2, 1/2, clipped to 1.25, 1.25, 0.75, 0.75; what is worse counts.
    logps, advantages = [math.log(2), math.log(2), -math.log(2), -math.log(2)], [1.0, -1.0, 1.0, -1.0]
    by_token = [1.25, -2.0, 0.5, -0.75]
    for t, value in enumerate(by_token):
        mask = [s == t for s in range(4)]
        assert surrogate(logps, [0.0] * 4, advantages, mask, 0.25) == pytest.approx(-value)
    assert surrogate(logps, [0.0] * 4, advantages, [True] * 4, 0.25) == pytest.approx(1.0)


@given(generator=sequence_strategies.generators(), clip=st.sampled_from([0.01, 0.2, 0.5, 1, 3.0]))
def test_surrogate_agrees_with_loops(device, generator, clip):
    logps, old, advantages = (sequence_strategies.normal((2, 3, 5), generator) for _ in range(3))
    logps = old + 0.5 * logps
    mask = torch.rand(2, 3, 5, generator=generator) < 0.6
    arguments = (logps, old, advantages, mask)
    expected = [
        [surrogate(*rows, clip) for rows in zip(*prompt, strict=True)]
        for prompt in zip(*(argument.tolist() for argument in arguments), strict=True)
    ]
    assert_close(ppo_loss(*(argument.to(device) for argument in arguments), clip=clip), expected)


@given(generator=sequence_strategies.generators())
def test_gradient_stops_where_clipping_makes_the_loss_flat(generator):
    """Only there: ratio * A where the ratio is inside or moving it back would help, nothing elsewhere."""
    old, advantages = (sequence_strategies.normal((7, 5), generator) for _ in range(2))
    logps = (old + 0.5 * sequence_strategies.normal((7, 5), generator)).requires_grad_()
    mask = torch.rand(7, 5, generator=generator) < 0.6
    (gradient,) = torch.autograd.grad(ppo_loss(logps, old, advantages, mask, clip=0.2).sum(), logps)
    for at in range(35):
        i, t = divmod(at, 5)
        ratio, advantage = math.exp(logps[i, t].item() - old[i, t].item()), advantages[i, t].item()
        flat_here = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
        wanted = 0.0 if flat_here or not mask[i, t] else -ratio * advantage
        assert gradient[i, t].item() == pytest.approx(wanted, rel=1e-12)


def test_no_gradient_reaches_what_was_before():
    generator = torch.Generator().manual_seed(0)
    logps, old, advantages = (sequence_strategies.normal((3, 4), generator).requires_grad_() for _ in range(3))
    loss = ppo_loss(logps, old, advantages, torch.ones(3, 4, dtype=torch.bool), clip=0.2).sum()
    gradient, *others = torch.autograd.grad(loss, [logps, old, advantages], allow_unused=True)
    assert gradient.abs().max() > 0 and others == [None, None]


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_masked_entries_may_hold_anything(junk):
    mask = torch.tensor([[True, False]])
    rows = [torch.tensor([[value, junk]], dtype=torch.float64, requires_grad=True) for value in (0.1, 0.0, 2.0)]
    loss = ppo_loss(*rows, mask, clip=0.5)
    assert_close(loss, [-2 * math.exp(0.1)])
    loss.sum().backward()
    assert rows[0].grad[0, 1].item() == 0.0
    assert_close(rows[0].grad[0, 0], -2 * math.exp(0.1))


def test_without_a_token_that_counts_the_loss_is_zero():
    rows = torch.ones(2, 3)
    assert ppo_loss(rows, rows, rows, torch.zeros(2, 3, dtype=torch.bool), clip=0.2).tolist() == [0.0, 0.0]


@given(generator=sequence_strategies.generators())
def test_rewards_to_go_agree_with_loops(device, generator):
    logps, ref_logps = (sequence_strategies.normal((2, 3, 5), generator) for _ in range(2))
    reward = sequence_strategies.normal((2, 3), generator)
    to_go = rewards_to_go(logps.to(device), ref_logps.to(device), reward.to(device), beta=BETA)
    for x in range(2):
        for i in range(3):
            for t in range(5):
                penalty = math.fsum((logps[x, i, s] - ref_logps[x, i, s]).item() for s in range(t, 5))
                assert to_go[x, i, t].item() == pytest.approx(reward[x, i].item() - BETA * penalty, abs=1e-12)


# The exact gradient


def population_loss(policy, ref, reward, *, baseline: Tensor | float, clip: float = 0.2) -> Tensor:
    """sum_y pi(y) ppo_loss(y) over all completions, the weights fixed, at theta = theta_old."""
    tokens = policy.space.tokens().expand(policy.n_prompts, -1, -1)
    logps = policy.token_log_probs(tokens)
    old = logps.detach()
    to_go = rewards_to_go(old, ref.token_log_probs(tokens), reward, beta=BETA)
    losses = ppo_loss(logps, old, to_go - baseline, policy.space.counted(tokens), clip=clip)
    return (old.sum(-1).exp() * losses).sum()


def random_values(policy, order: int, seed: int) -> Tensor:
    """[X, N, T] from a value table whose entries are drawn."""
    value = ValueTable(policy.space, order, n_prompts=policy.n_prompts)
    generator = torch.Generator().manual_seed(seed)
    for parameter in value.parameters():
        parameter.data = sequence_strategies.normal(tuple(parameter.shape), generator)
    return value(policy.space.tokens().expand(policy.n_prompts, -1, -1)).detach()


@each_eos
@each_policy
def test_expected_gradient_is_that_of_the_objective_whatever_the_values(build, eos):
    policy, ref, reward = world(eos, build)
    exact = flat(-alignment_objective(policy.log_probs(), ref.log_probs(), reward, beta=BETA).sum(), policy)
    size = exact.norm()
    assert size > 0.1
    for baseline in (0.0, *(random_values(policy, order, seed) for seed, order in enumerate((0, 1, 2, 3, 3)))):
        for clip in (1e-6, 0.2):
            found = flat(population_loss(policy, ref, reward, baseline=baseline, clip=clip), policy)
            assert (found - exact).norm() <= 1e-12 * size


@each_eos
def test_a_baseline_that_sees_its_own_token_bends_the_gradient(eos):
    """What makes the test above fail where the baseline is more than a function of the prefix."""
    policy, ref, reward = world(eos)
    exact = flat(-alignment_objective(policy.log_probs(), ref.log_probs(), reward, beta=BETA).sum(), policy)
    baseline = policy.space.tokens().double().expand(2, -1, -1)
    found = flat(population_loss(policy, ref, reward, baseline=baseline), policy)
    assert (found - exact).norm() > 0.1 * exact.norm()


@each_eos
def test_past_penalties_are_noise_and_future_ones_are_not(eos):
    """The whole return in place of rewards to go leaves the gradient as it is; the reward alone does not."""
    policy, ref, reward = world(eos)
    tokens = policy.space.tokens().expand(2, -1, -1)
    mask, old = policy.space.counted(tokens), policy.token_log_probs(tokens).detach()
    whole = rewards_to_go(old, ref.token_log_probs(tokens), reward, beta=BETA)[..., :1].expand_as(old)
    exact = flat(-alignment_objective(policy.log_probs(), ref.log_probs(), reward, beta=BETA).sum(), policy)
    for advantages, right in ((whole, True), (reward.unsqueeze(-1).expand_as(old), False)):
        losses = ppo_loss(policy.token_log_probs(tokens), old, advantages, mask, clip=0.2)
        found = flat((old.sum(-1).exp() * losses).sum(), policy)
        assert bool((found - exact).norm() <= 1e-12 * exact.norm()) is right


# Values


@given(data=st.data(), generator=sequence_strategies.generators())
def test_values_are_looked_up_by_the_context(data, generator):
    space = data.draw(sequence_strategies.spaces())
    order = data.draw(sequence_strategies.orders(space))
    value = ValueTable(space, order, n_prompts=2)
    for parameter in value.parameters():
        parameter.data = sequence_strategies.normal(tuple(parameter.shape), generator)
    tables = [parameter.tolist() for parameter in value.parameters()]
    strings = sequence_strategies.completions(space)
    found = value(torch.tensor(strings).expand(2, -1, -1)).tolist()
    for x in range(2):
        for i, string in enumerate(strings):
            for t, context, _ in sequence_oracles.steps(string, space.eos, order):
                number = sequence_oracles.context_number(context, space.vocab_size, space.eos)
                assert found[x][i][t] == tables[t][x][number]


# The trainer


def run(policy, ref, reward, *, seed: int = 0, **changes) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return list(ppo(policy, ref, reward, generator=generator, **{**SETTINGS, **changes}))


@each_eos
def test_at_the_optimum_every_sample_says_the_same(eos):
    """r - beta log(pi* / pi_ref) = beta log Z, whichever completion is drawn."""
    _, ref, reward = world(eos)
    log_pi_star, log_z = optimal_policy(ref.log_probs(), reward, beta=BETA)
    policy = closest_kgram(ref.space, log_pi_star, 3)
    for seed in range(2):
        first, *_ = run(copy.deepcopy(policy), ref, reward, seed=seed, steps=1)
        assert first == pytest.approx(-BETA * log_z.mean().item(), abs=1e-12)


@pytest.mark.parametrize("eos", [None, 1])
def test_full_tables_come_to_the_optimal_policy(eos):
    """There advantages vanish once the values are right: no noise is left, so that sampling does not blur it."""
    generator = torch.Generator().manual_seed(0)
    space = SequenceSpace(3, 2, eos)
    log_ref, reward = 0.5 * sequence_strategies.normal((2, 2, space.size), generator)
    ref = closest_kgram(space, log_ref.log_softmax(-1), 1).requires_grad_(False)
    policy = KGramPolicy(space, 1, n_prompts=2)
    settings = {"batch_size": 64, "steps": 250, "epochs": 2, "learning_rate": 0.1, "value_learning_rate": 0.1}
    values = run(policy, ref, reward, **settings)
    log_pi_star, log_z = optimal_policy(ref.log_probs(), reward, beta=BETA)
    torch.testing.assert_close(policy.log_probs(), log_pi_star, rtol=0, atol=1e-5)
    assert values[-1] == pytest.approx(-BETA * log_z.mean().item(), abs=1e-5)


def test_each_step_descends_fresh_samples_for_so_many_epochs(monkeypatch):
    """The ratio starts at 1, advantages and old log-probabilities stay, and the values are fitted meanwhile."""
    module = sys.modules["exo_toy.training.proximal"]
    policy, ref, reward = world(1)
    seen = []

    def spy(logps, old_logps, advantages, mask, *, clip):
        seen.append((logps.detach().clone(), old_logps, advantages, mask, clip))
        return ppo_loss(logps, old_logps, advantages, mask, clip=clip)

    drawn = []
    sample = policy.sample
    monkeypatch.setattr(policy, "sample", lambda n, generator: drawn.append(sample(n, generator)) or drawn[-1])
    monkeypatch.setattr(module, "ppo_loss", spy)
    values = run(policy, ref, reward, steps=2, epochs=3, clip=0.3)
    assert len(seen) == 6 and len(drawn) == 2 and not drawn[0].equal(drawn[1])
    for step, tokens in enumerate(drawn):
        first, *later = seen[3 * step : 3 * step + 3]
        assert first[0].equal(first[1]) and first[4] == 0.3
        assert first[3].equal(policy.space.counted(tokens))
        of_tokens = reward.gather(-1, policy.space.index(tokens))
        to_go = rewards_to_go(first[1], ref.token_log_probs(tokens), of_tokens, beta=BETA)
        # Nothing is known of the values at first; later they are no longer zero.
        assert first[2].equal(to_go) is (step == 0)
        assert values[step] == pytest.approx(-to_go[..., 0].mean().item(), abs=1e-12)
        for other in later:
            assert all(other[i].equal(first[i]) for i in (1, 2, 3))
            assert not other[0].equal(first[0])


def test_values_are_fitted_to_what_is_to_come(monkeypatch):
    """With the policy held still they come to the conditional mean of the samples' rewards to go."""
    module = sys.modules["exo_toy.training.proximal"]
    policy, ref, reward = world(1)
    tables = []

    class Recorded(ValueTable):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            tables.append(self)

    tokens = policy.sample(6, torch.Generator().manual_seed(0))
    monkeypatch.setattr(policy, "sample", lambda n, generator: tokens)
    monkeypatch.setattr(module, "ValueTable", Recorded)
    run(policy, ref, reward, steps=1, epochs=400, learning_rate=1e-300, value_order=1, value_learning_rate=0.3)
    to_go = rewards_to_go(
        policy.token_log_probs(tokens),
        ref.token_log_probs(tokens),
        reward.gather(-1, policy.space.index(tokens)),
        beta=BETA,
    )
    by_context = {}
    for x in range(2):
        for i, string in enumerate(tokens[x].tolist()):
            for t, context, _ in sequence_oracles.steps(tuple(string), 1, 1):
                by_context.setdefault((x, t, context), []).append(to_go[x, i, t].item())
    for (x, t, context), values in by_context.items():
        fitted = tables[0].values[t][x, sequence_oracles.context_number(context, 3, 1)].item()
        assert fitted == pytest.approx(math.fsum(values) / len(values), abs=1e-6)


def test_generator_decides():
    runs = []
    for seed in (1, 1, 2):
        policy, ref, reward = world(1)
        before = torch.get_rng_state()
        values = run(policy, ref, reward, seed=seed)
        assert torch.get_rng_state().equal(before)
        runs.append((values, torch.nn.utils.parameters_to_vector(policy.parameters()).tolist()))
    assert runs[0] == runs[1] and runs[0] != runs[2]
    assert len(runs[0][0]) == SETTINGS["steps"]


def test_reference_and_reward_are_not_written_to():
    policy, ref, reward = world(0)
    before = ref.log_probs(), reward.clone()
    run(policy, ref, reward)
    assert ref.log_probs().equal(before[0]) and reward.equal(before[1])


# Errors


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1; got 0"),
        ({"epochs": 1.5}, r"epochs must be an integer of at least 1; got 1\.5"),
        ({"steps": 0}, "steps must be an integer of at least 1; got 0"),
        ({"batch_size": 0}, "must be an integer of at least 1; got 0"),
        ({"beta": 0.0}, r"beta must be a finite number above 0; got 0\.0"),
        ({"clip": 0}, "clip must be a finite number above 0; got 0"),
        ({"clip": math.nan}, "clip must be a finite number above 0; got nan"),
        ({"learning_rate": -1.0}, r"learning_rate must be a finite number above 0; got -1\.0"),
        ({"value_learning_rate": 0.0}, r"learning_rate must be a finite number above 0; got 0\.0"),
        ({"value_order": 4}, r"order must be in 0\.\.3 .*; got 4"),
        ({"value_order": -1}, "order must be an integer of at least 0; got -1"),
    ],
)
def test_errors(changes, message):
    policy, ref, reward = world(1)
    with pytest.raises(ValueError, match=message):
        run(policy, ref, reward, **changes)
