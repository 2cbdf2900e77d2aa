"""Rewards over spaces: oracle, prompts, the two-mode reference case, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy import rewards
from exo_toy.spaces import SequenceSpace
from tests import sequence_oracles, sequence_strategies
from tests.tolerances import assert_close

# The oracles


def test_oracles_of_rewards_by_hand():
    assert sequence_oracles.hamming((0, 1, 2), (0, 2, 1)) == 2
    by_hand = math.log(2 * math.exp(-1 / 0.5) + 3 * math.exp(-2 / 4.0))
    modes = [(0, 0), (1, 1)]
    assert sequence_oracles.planted_modes((0, 2), modes, [2.0, 3.0], [0.5, 4.0]) == pytest.approx(by_hand)
    assert sequence_oracles.count((1, 0, 1, 2), None, {1, 2}) == 3
    assert sequence_oracles.count((1, 2, 2, 2), 2, {1, 2}) == 2
    palindromes = [
        string for string in sequence_oracles.completions(3, 2, 2) if sequence_oracles.is_palindrome(string, 2)
    ]
    assert palindromes == [(0, 0), (0, 2), (1, 1), (1, 2), (2, 2)]
    assert not sequence_oracles.is_palindrome((0, 1), None)


# Against the oracles


@given(data=st.data(), generator=sequence_strategies.generators())
def test_planted_modes_agree_with_the_oracle(device, data, generator):
    space = data.draw(sequence_strategies.spaces())
    n_prompts = data.draw(st.none() | sequence_strategies.prompt_counts(space))
    shape = (3,) if n_prompts is None else (n_prompts, 3)
    modes = space.tokens(torch.randint(space.size, shape, generator=generator))
    weights, widths = (sequence_strategies.normal(shape, generator).exp() for _ in range(2))
    reward = rewards.planted_modes(space, modes.to(device), weights=weights.to(device), widths=widths.to(device))
    expected = [
        [
            sequence_oracles.planted_modes(string, [tuple(mode) for mode in some], weight, width)
            for string in sequence_strategies.completions(space)
        ]
        for some, weight, width in zip(
            modes.reshape(-1, 3, space.length).tolist(),
            weights.reshape(-1, 3).tolist(),
            widths.reshape(-1, 3).tolist(),
            strict=True,
        )
    ]
    assert reward.dtype == torch.float64
    assert_close(reward, expected[0] if n_prompts is None else expected, scale=10.0)


@given(space=sequence_strategies.spaces(), generator=sequence_strategies.generators())
def test_weights_and_widths_are_shared_by_prompts_that_have_none(space, generator):
    modes = space.tokens(torch.randint(space.size, (5, 3), generator=generator))
    weights = sequence_strategies.normal((3,), generator).exp()
    shared = rewards.planted_modes(space, modes, weights=weights, widths=0.5)
    each = [rewards.planted_modes(space, some, weights=weights, widths=torch.full((3,), 0.5)) for some in modes]
    assert_close(shared, torch.stack(each))


@given(space=sequence_strategies.spaces(), data=st.data())
def test_parity_agrees_with_the_oracle(space, data):
    n_prompts = data.draw(sequence_strategies.prompt_counts(space))
    tokens = st.sets(st.integers(0, space.vocab_size - 1))
    sets = data.draw(st.lists(tokens, min_size=n_prompts, max_size=n_prompts))
    counted = torch.tensor([[token in some for token in range(space.vocab_size)] for some in sets])
    bonus = torch.arange(1, n_prompts + 1, dtype=torch.float64)
    even = [
        [sequence_oracles.count(string, space.eos, some) % 2 == 0 for string in sequence_strategies.completions(space)]
        for some in sets
    ]
    expected = torch.tensor(even).double()
    assert_close(rewards.parity(space, bonus=bonus, counted=counted), expected * bonus[:, None])
    assert_close(rewards.parity(space, bonus=bonus, counted=counted[0]), expected[0] * bonus[:, None])
    assert_close(rewards.parity(space, bonus=-2, counted=counted), -2 * expected)
    assert_close(rewards.parity(space, bonus=-2, counted=counted[0]), -2 * expected[0])


@given(space=sequence_strategies.spaces())
def test_parity_counts_odd_tokens_unless_told_otherwise(space):
    odd = {token for token in range(1, space.vocab_size, 2) if token != space.eos}
    even = [
        sequence_oracles.count(string, space.eos, odd) % 2 == 0 for string in sequence_strategies.completions(space)
    ]
    assert rewards.parity(space, bonus=1.0).tolist() == even
    if space.eos is None:
        assert even == [sum(string) % 2 == 0 for string in sequence_strategies.completions(space)]


@given(space=sequence_strategies.spaces(), data=st.data())
def test_palindrome_agrees_with_the_oracle(space, data):
    n_prompts = data.draw(sequence_strategies.prompt_counts(space))
    bonus = torch.arange(1, n_prompts + 1, dtype=torch.float64)
    expected = torch.tensor(
        [float(sequence_oracles.is_palindrome(string, space.eos)) for string in sequence_strategies.completions(space)]
    )
    assert_close(rewards.palindrome(space, bonus=bonus), expected * bonus[:, None])
    assert_close(rewards.palindrome(space, bonus=-0.5), -0.5 * expected)


@given(space=sequence_strategies.spaces(), data=st.data(), generator=sequence_strategies.generators())
def test_additive_agrees_with_the_oracle(device, space, data, generator):
    n_prompts = data.draw(sequence_strategies.prompt_counts(space))
    token_rewards = sequence_strategies.normal((n_prompts, space.length, space.vocab_size), generator)
    token_rewards[0, 0, 0] = -math.inf
    expected = [
        [
            sequence_oracles.path_sum(string, [[row] for row in some], space.vocab_size, space.eos, 0)
            for string in sequence_strategies.completions(space)
        ]
        for some in token_rewards.tolist()
    ]
    assert_close(rewards.additive(space, token_rewards.to(device)), expected)
    assert_close(rewards.additive(space, token_rewards[-1].to(device)), expected[-1])


def test_additive_differentiates_with_respect_to_the_token_rewards():
    token_rewards = torch.zeros(2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(rewards.additive(SequenceSpace(2, 2, eos=0), token_rewards).sum(), token_rewards)
    assert gradient.tolist() == [[1.0, 2.0], [1.0, 1.0]]


# Sums of k-grams


def kgram_reward(space: SequenceSpace, order: int, n_prompts: int, generator: torch.Generator) -> rewards.KGramReward:
    """Weights drawn for every prompt."""
    reward = rewards.KGramReward(space, order, n_prompts=n_prompts)
    for parameter in reward.parameters():
        parameter.data = sequence_strategies.normal(tuple(parameter.shape), generator)
    return reward


@given(data=st.data(), generator=sequence_strategies.generators())
def test_kgram_rewards_agree_with_the_oracle(device, data, generator):
    space = data.draw(sequence_strategies.spaces())
    order = data.draw(sequence_strategies.orders(space))
    n_prompts = data.draw(sequence_strategies.prompt_counts(space))
    reward = kgram_reward(space, order, n_prompts, generator)
    assert [tuple(w.shape) for w in reward.weights] == sequence_strategies.table_shapes(space, order, n_prompts)
    expected = [
        [
            sequence_oracles.path_sum(
                string, [w[x].tolist() for w in reward.weights], space.vocab_size, space.eos, order
            )
            for string in sequence_strategies.completions(space)
        ]
        for x in range(n_prompts)
    ]
    assert_close(reward.to(device).table(), expected)


@given(data=st.data(), generator=sequence_strategies.generators())
def test_kgram_rewards_of_given_completions_are_those_of_the_table(data, generator):
    """Each prompt has completions of its own; values and gradients."""
    space = data.draw(sequence_strategies.spaces())
    order = data.draw(sequence_strategies.orders(space))
    reward = kgram_reward(space, order, 2, generator)
    index = torch.randint(space.size, (2, 7), generator=generator)
    given_ones, looked_up = reward.reward(space.tokens(index)), reward.table().gather(-1, index)
    assert given_ones.dtype == torch.float64
    assert_close(given_ones, looked_up)
    pull = sequence_strategies.normal((2, 7), generator)
    gradients, wanted = (
        torch.autograd.grad((pull * values).sum(), list(reward.parameters())) for values in (given_ones, looked_up)
    )
    for gradient, one in zip(gradients, wanted, strict=True):
        assert_close(gradient, one)


@given(
    space=sequence_strategies.spaces(min_vocab=2, max_vocab=3, max_length=4), generator=sequence_strategies.generators()
)
def test_kgram_rewards_of_the_whole_past_express_every_reward(space, generator):
    """The weights of all tokens but the last are nothing, those of the last the reward."""
    wanted = sequence_strategies.normal((2, space.size), generator)
    reward = rewards.KGramReward(space, space.length - 1, n_prompts=2)
    assert_close(reward.table(), torch.zeros_like(wanted))
    with torch.no_grad():
        for i, string in enumerate(sequence_strategies.completions(space)):
            *_, (t, context, token) = sequence_oracles.steps(string, space.eos, space.length)
            number = sequence_oracles.context_number(context, space.vocab_size, space.eos)
            reward.weights[t][:, number, token] = wanted[:, i]
    assert torch.equal(reward.table(), wanted)


@pytest.mark.parametrize("eos", [None, 1])
def test_kgram_rewards_of_less_express_fewer(eos):
    """The projection of a drawn reward on their span leaves a rest."""
    space = SequenceSpace(3, 3, eos)
    wanted = sequence_strategies.normal((space.size,), torch.Generator().manual_seed(0))
    for order in (0, 1, 2):
        reward = rewards.KGramReward(space, order)
        parameters = list(reward.parameters())
        rows = [
            torch.cat([part.flatten() for part in torch.autograd.grad(value, parameters, retain_graph=True)])
            for value in reward.table()[0]
        ]
        features = torch.stack(rows)
        rest = wanted - features @ (torch.linalg.pinv(features) @ wanted)
        assert (rest.norm().item() < 1e-10) is (order == 2)


def test_kgram_rewards_need_not_enumerate():
    reward = rewards.KGramReward(SequenceSpace(10, 50, eos=3), 1)
    with torch.no_grad():
        for weights in reward.weights:
            weights.fill_(0.5)
    tokens = torch.full((1, 2, 50), 3)
    tokens[0, 1, :20] = 9
    assert reward.reward(tokens).tolist() == [[0.5, 10.5]]
    with pytest.raises(ValueError, match="above the space's memory_budget"):
        reward.table()


# The two-mode reference case


def test_the_two_modes_of_the_reference_case():
    space = SequenceSpace(4, 6)
    modes = torch.tensor([[0] * 6, [3] * 6])
    reward = rewards.planted_modes(space, modes, weights=torch.tensor([1.0, 0.8]).double(), widths=1 / 1.5)
    pi_star = (reward / 0.5).softmax(-1)[space.index(modes)]
    assert pi_star.tolist() == pytest.approx([0.2616, 0.1675], abs=5e-5)


# Random rewards


def normal_rewards(seed: int, **kwargs) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return rewards.random(SequenceSpace(4, 8), scale=kwargs.pop("scale", 1.0), generator=generator, **kwargs)


def test_random_rewards_come_from_the_generator_alone():
    before = torch.get_rng_state()
    assert torch.equal(normal_rewards(0), normal_rewards(0))
    assert not torch.equal(normal_rewards(0), normal_rewards(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_rewards_have_the_scale_and_the_prompts_asked_for():
    assert torch.equal(normal_rewards(0, scale=3.0), 3.0 * normal_rewards(0))
    assert normal_rewards(0).dtype == torch.float64
    assert normal_rewards(0).shape == (4**8,)
    table = normal_rewards(0, n_prompts=3)
    assert table.shape == (3, 4**8)
    # Chi-square tails (Laurent and Massart 2000, Lemma 1): beyond these with probability below 2 exp(-23) < 1e-9.
    n, x = table.numel(), 23.0
    assert table.square().mean().sub(1).abs() < 2 * math.sqrt(x / n) + 2 * x / n
    # A Gaussian tail: below 2 exp(-25) < 1e-10.
    assert table.mean().abs() < math.sqrt(2 * 25.0 / n)


# Errors

SPACE = SequenceSpace(3, 2, eos=2)
ONE = torch.ones(1)
MODE = torch.tensor([[0, 1]])


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rewards.planted_modes(SPACE, torch.tensor([[2, 0]]), weights=ONE, widths=1.0),
            "modes must hold nothing but the eos, 2, after an eos",
        ),
        (
            lambda: rewards.planted_modes(SPACE, torch.tensor([0, 1]), weights=ONE, widths=1.0),
            r"modes must have shape \[M, 2\] or \[X, M, 2\]; got \[2\]",
        ),
        (
            lambda: rewards.planted_modes(SPACE, MODE[:0], weights=ONE[:0], widths=1.0),
            r"modes must have shape .* got \[0, 2\]",
        ),
        (
            lambda: rewards.planted_modes(SPACE, MODE, weights=torch.ones(2), widths=1.0),
            r"weights must have the shape of modes without T, \[1\], or \[M\]; got \[2\]",
        ),
        (
            lambda: rewards.planted_modes(SPACE, MODE, weights=[1.0], widths=1.0),
            "weights must be a torch.Tensor; got list",
        ),
        (
            lambda: rewards.planted_modes(SPACE, MODE, weights=0 * ONE, widths=1.0),
            r"weights must be above 0 and finite; got 0\.0 at index \[0\]",
        ),
        (
            lambda: rewards.planted_modes(SPACE, MODE, weights=ONE, widths=-ONE),
            r"widths must be above 0 and finite; got -1\.0",
        ),
        (lambda: rewards.planted_modes(SPACE, MODE, weights=ONE, widths=0), "widths must be a finite number above 0"),
        (lambda: rewards.parity(SPACE, bonus=math.nan), "bonus must be a finite number; got nan"),
        (lambda: rewards.parity(SPACE, bonus=torch.tensor([math.inf])), "bonus must be finite; got inf"),
        (lambda: rewards.parity(SPACE, bonus=torch.ones(1, 1)), r"bonus must have shape \[X\]; got \[1, 1\]"),
        (lambda: rewards.parity(SPACE, bonus=1.0, counted=torch.ones(3)), "counted must be a torch.bool tensor"),
        (
            lambda: rewards.parity(SPACE, bonus=1.0, counted=torch.ones(2, dtype=torch.bool)),
            r"counted must have shape \[3\] or \[X, 3\]; got \[2\]",
        ),
        (
            lambda: rewards.parity(SPACE, bonus=torch.ones(4), counted=torch.ones(5, 3, dtype=torch.bool)),
            "counted must have as many prompts as bonus, 4; got 5",
        ),
        (lambda: rewards.palindrome(SPACE, bonus="1"), r"bonus must be a finite number \(a Python number\); got '1'"),
        (
            lambda: rewards.additive(SPACE, torch.zeros(3, 2)),
            r"token_rewards must have shape \[2, 3\] or \[X, 2, 3\]; got \[3, 2\]",
        ),
        (
            lambda: rewards.additive(SPACE, torch.full((2, 3), math.inf)),
            "token_rewards must be finite or -inf; got inf",
        ),
        (
            lambda: rewards.additive(SPACE, torch.full((2, 3), math.nan)),
            "token_rewards must be finite or -inf; got nan",
        ),
        (
            lambda: rewards.random(SPACE, scale=0.0, generator=torch.Generator()),
            "scale must be a finite number above 0",
        ),
        (
            lambda: rewards.random(SPACE, scale=1.0, generator=torch.Generator(), n_prompts=0),
            "n_prompts must be an integer of at least 1; got 0",
        ),
        (lambda: rewards.KGramReward(SPACE, 0, n_prompts=0), "n_prompts must be an integer of at least 1; got 0"),
        (lambda: rewards.KGramReward(SPACE, 2), r"order must be in 0\.\.1 .*; got 2"),
        (lambda: rewards.KGramReward(SPACE, -1), "order must be an integer of at least 0; got -1"),
        (lambda: rewards.KGramReward(SPACE, 1.0), r"order must be an integer of at least 0; got 1\.0"),
        (
            lambda: rewards.KGramReward(SequenceSpace(100, 9), 5),
            "the tables of KGramReward of order 5 would take .* above the space's memory_budget",
        ),
        (
            lambda: rewards.KGramReward(SPACE, 0).reward(torch.tensor([[[2, 0]]])),
            "tokens must hold nothing but the eos, 2, after an eos",
        ),
        (
            lambda: rewards.KGramReward(SPACE, 0).reward(torch.tensor([[[0, 3]]])),
            r"tokens must be in 0\.\.2; got 3",
        ),
    ],
)
def test_rewards_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


HUGE = SequenceSpace(100, 100)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rewards.planted_modes(HUGE, torch.zeros(1, 100, dtype=torch.int64), weights=ONE, widths=1.0),
        lambda: rewards.parity(HUGE, bonus=1.0),
        lambda: rewards.palindrome(HUGE, bonus=1.0),
        lambda: rewards.additive(HUGE, torch.zeros(100, 100)),
        lambda: rewards.random(HUGE, scale=1.0, generator=torch.Generator()),
    ],
)
def test_rewards_refuse_a_space_too_large_to_enumerate(call):
    with pytest.raises(ValueError, match=r"of 10\*\*200\.00 completions .* above the space's memory_budget"):
        call()
