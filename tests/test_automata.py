"""Automata: rewards of all short strings by plain loops, sums, fewest states by Myhill and Nerode, builders, errors."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exo_toy import rewards
from exo_toy.automata import (
    RewardAutomaton,
    at_positions,
    equivalent,
    even_count,
    from_function,
    from_keywords,
    minimise,
    once,
    per_token,
)
from exo_toy.automata.minimise import pushed
from exo_toy.spaces import SequenceSpace
from tests import automata_cases, sequence_strategies
from tests import automata_oracles as oracles
from tests import automata_strategies as strategies
from tests.tolerances import assert_close


def by_loops(automaton: RewardAutomaton, string: oracles.String) -> float:
    parts = (automaton.transitions.tolist(), automaton.rewards.tolist(), automaton.final.tolist())
    return oracles.run(*parts, automaton.start, string)


def all_rewards(automaton: RewardAutomaton, longest: int = 6) -> list[float]:
    """Rewards of all strings of at most so many tokens, the shorter first."""
    lengths = range(longest + 1)
    return [value for length in lengths for value in automaton.reward(all_of(automaton.vocab_size, length)).tolist()]


def all_of(vocab_size: int, length: int) -> torch.Tensor:
    """All strings of this length."""
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=length)), dtype=torch.int64)


def make(transitions, earned, final, start=0):
    double = torch.float64
    return RewardAutomaton(torch.tensor(transitions), torch.tensor(earned, dtype=double),
                           torch.tensor(final, dtype=double), start)  # fmt: skip


# The oracles


def test_oracles_by_hand():
    assert list(oracles.strings(2, 2)) == [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    assert oracles.run([[0, 1], [1, 0]], [[1, 2], [3, 4]], [10, 20], 0, (1, 0, 1)) == 2 + 3 + 4 + 10
    assert oracles.run([[0]], [[1]], [5], 0, ()) == 5
    assert oracles.occurrences((0, 0, 0, 1), (0, 0)) == 2
    assert oracles.occurrences((0,), (0, 0)) == 0

    def ends_in_one(string):
        return float(string[-1:] == (1,))

    def ones(string):
        return float(sum(string))

    def zeros_only(string):
        return -math.inf if 1 in string else 0.0

    sizes = {"prefixes": 3, "suffixes": 4}
    assert oracles.classes(ends_in_one, 2, up_to_a_constant=False, **sizes) == 2
    assert oracles.classes(ends_in_one, 2, up_to_a_constant=True, **sizes) == 2
    assert oracles.classes(ones, 2, up_to_a_constant=True, **sizes) == 1
    assert oracles.classes(ones, 2, up_to_a_constant=False, **sizes) == 4  # as many as there are sums of three
    assert oracles.classes(zeros_only, 2, up_to_a_constant=True, **sizes) == 1
    assert oracles.classes(zeros_only, 2, up_to_a_constant=False, **sizes) == 2
    assert oracles.classes(lambda _: -math.inf, 2, up_to_a_constant=True, **sizes) == 1


# Strings through one automaton


@given(parts=strategies.automata())
def test_rewards_of_all_short_strings(parts):
    automaton = RewardAutomaton(*parts)
    expected = [by_loops(automaton, string) for string in oracles.strings(automaton.vocab_size, 6)]
    assert all_rewards(automaton) == expected


@given(parts=strategies.automata(), generator=sequence_strategies.generators())
def test_what_stands_after_the_end_is_ignored(device, parts, generator):
    automaton = RewardAutomaton(*parts)
    tokens = torch.randint(automaton.vocab_size, (5, 2, 7), generator=generator)
    lengths = torch.randint(8, (5, 2), generator=generator)
    after = torch.arange(7) >= lengths.unsqueeze(-1)
    garbage = torch.randint(-100, 100, tokens.shape, generator=generator)
    found = automaton.to(device).reward(torch.where(after, garbage, tokens).to(device), lengths.to(device))
    expected = [
        by_loops(automaton, tuple(some[:n]))
        for some, n in zip(tokens.reshape(-1, 7).tolist(), lengths.flatten().tolist(), strict=True)
    ]
    assert found.dtype == torch.float64 and found.device.type == device.type
    assert found.flatten().tolist() == expected


def test_states_are_those_passed_through():
    automaton = make([[1, 2], [0, 0], [2, 1]], [[0, 0]] * 3, [0, 0, 0], start=2)
    assert automaton.states(torch.tensor([[0, 1, 1], [1, 1, 0]])).tolist() == [[2, 2, 1, 0], [2, 1, 0, 1]]
    assert automaton.states(torch.empty(3, 0, dtype=torch.int64)).tolist() == [[2], [2], [2]]


def test_rewards_are_differentiable_in_transitions_and_final_rewards():
    automaton = make([[1, 0], [1, 0]], [[0.0, 1.0], [2.0, -math.inf]], [3.0, 4.0])
    tokens, lengths = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 7]]), torch.tensor([3, 3])

    def of(earned, final):
        return RewardAutomaton(automaton.transitions, earned, final).reward(tokens, lengths)

    earned = automaton.rewards.clone().requires_grad_()
    final = automaton.final.clone().requires_grad_()
    of(earned, final).sum().backward()
    assert earned.grad.tolist() == [[2.0, 1.0], [3.0, 0.0]]
    assert final.grad.tolist() == [0.0, 2.0]
    jacobian = torch.func.jacrev(of)(automaton.rewards, automaton.final)
    assert jacobian.tolist() == [[[1.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [2.0, 0.0]]]


# Sums and multiples


@given(data=st.data(), vocab_size=st.integers(1, 3))
def test_a_sum_has_the_sum_of_rewards_on_the_pairs_that_are_reached(data, vocab_size):
    a, b = (RewardAutomaton(*data.draw(strategies.automata(vocab_size=vocab_size))) for _ in range(2))
    expected = [x + y for x, y in zip(all_rewards(a), all_rewards(b), strict=True)]
    assert all_rewards(a + b) == expected
    pairs = {(a.start, b.start)}
    for _ in range(a.n_states * b.n_states):
        pairs |= {
            (int(a.transitions[i, token]), int(b.transitions[j, token]))
            for i, j in pairs
            for token in range(vocab_size)
        }
    assert (a + b).n_states == len(pairs)


@given(parts=strategies.automata(), factor=st.sampled_from([3, 0.5]))
def test_a_multiple_has_the_multiple_of_rewards(parts, factor):
    automaton = RewardAutomaton(*parts)
    expected = [factor * x for x in all_rewards(automaton)]
    assert all_rewards(factor * automaton) == expected
    assert all_rewards(automaton * factor) == expected


@given(parts=strategies.automata(forbidding=False))
def test_an_automaton_and_its_negative_cancel(parts):
    automaton = RewardAutomaton(*parts)
    nothing = automaton + -1 * automaton
    assert set(all_rewards(nothing)) == {0.0}
    assert minimise(nothing).n_states == 1
    assert set(all_rewards(0 * automaton)) == {0.0}


def test_sums_and_multiples_are_differentiable():
    a = make([[1, 0], [0, 1]], [[1.0, 2.0], [3.0, 4.0]], [0.0, 1.0])
    table = torch.tensor([[0.5, 1.5], [2.5, 3.5]], dtype=torch.float64, requires_grad=True)
    (a + 3 * at_positions(table)).reward(torch.tensor([1, 1, 0])).backward()
    assert table.grad.tolist() == [[0.0, 3.0], [0.0, 3.0]]


# Fewest states


@automata_cases.few
@given(parts=strategies.automata())
def test_minimising_keeps_every_reward_with_the_fewest_states(parts):
    automaton = RewardAutomaton(*parts)
    fewest = minimise(automaton)
    n = automaton.n_states
    assert all_rewards(fewest) == all_rewards(automaton)
    assert fewest.start == 0
    assert fewest.n_states == oracles.classes(
        lambda string: by_loops(automaton, string),
        automaton.vocab_size,
        prefixes=n - 1,
        suffixes=2 * n - 1,
        up_to_a_constant=True,
    )


@pytest.mark.parametrize(
    "automaton",
    [
        at_positions(torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])),
        once((0, 1, 0), 2, reward=1.0),
        from_keywords({(0, 1, 0, 1): 1.0}, 2),
        make([[1, 2], [3, 3], [4, 4], [0, 0], [1, 1]], [[0, 0], [0, 0], [0, 0], [1, 0], [0, 0]], [0] * 5),
    ],
)
def test_states_that_part_late_stay_apart(automaton):
    """Rewards several tokens away, of which neither a reward nor a potential at hand tells."""
    kinds = oracles.classes(
        lambda string: by_loops(automaton, string),
        automaton.vocab_size,
        prefixes=automaton.n_states - 1,
        suffixes=automaton.n_states,
        up_to_a_constant=True,
    )
    assert (
        minimise(automaton).n_states == kinds >= automaton.n_states - 1
    )  # a whole keyword may be one of its beginnings


@given(parts=strategies.automata())
def test_without_pushing_rewards_stay_on_their_transitions(parts):
    automaton = RewardAutomaton(*parts)
    fewest = minimise(automaton, push=False)
    assert all_rewards(fewest) == all_rewards(automaton)
    tokens = all_of(automaton.vocab_size, 4)
    before, after = (one.rewards[one.states(tokens)[:, :-1], tokens] for one in (automaton, fewest))
    assert before.tolist() == after.tolist()


@given(data=st.data(), parts=strategies.automata())
def test_automata_of_one_reward_are_the_same_once_minimised(data, parts):
    automaton = RewardAutomaton(*parts)
    other = RewardAutomaton(*data.draw(strategies.copied(parts)))
    assert all_rewards(other) == all_rewards(automaton)
    first, second = minimise(automaton), minimise(other)
    assert first.transitions.tolist() == second.transitions.tolist()
    assert first.rewards.tolist() == second.rewards.tolist()
    assert first.final.tolist() == second.final.tolist()
    assert equivalent(automaton, other)


@automata_cases.few
@given(data=st.data(), parts=strategies.automata(), generator=sequence_strategies.generators())
def test_rewards_that_round_are_told_apart_up_to_the_tolerance(data, parts, generator):
    """Thirds and the like: potentials of the copies leave roundings behind, which must not part states."""
    automaton = RewardAutomaton(*parts)
    noise = sequence_strategies.normal(tuple(automaton.rewards.shape), generator)
    parts = (automaton.transitions, automaton.rewards + noise, automaton.final / 3, automaton.start)
    real, other = RewardAutomaton(*parts), RewardAutomaton(*data.draw(strategies.copied(parts, unit=math.pi)))
    assert equivalent(real, other)
    assert minimise(other).n_states == minimise(real).n_states
    nudged = RewardAutomaton(other.transitions, other.rewards, other.final + 1e-9, other.start)
    assert equivalent(real, nudged) == (set(all_rewards(real)) == {-math.inf})


@given(data=st.data(), vocab_size=st.integers(1, 3))
def test_equivalence_is_equality_of_all_rewards(data, vocab_size):
    # Few states and rewards, so that both answers come up.
    drawn = strategies.automata(vocab_size=vocab_size, max_states=2)
    a, b = (RewardAutomaton(*data.draw(drawn)) for _ in range(2))
    assert equivalent(a, b) == (all_rewards(a, 5) == all_rewards(b, 5))
    assert equivalent(a + b, b + a)


@given(parts=strategies.automata())
def test_pushing_keeps_every_reward_and_is_differentiable(parts):
    automaton = RewardAutomaton(*parts)
    assert all_rewards(pushed(automaton)) == all_rewards(automaton)
    earned = automaton.rewards.clone().requires_grad_()
    tokens = all_of(automaton.vocab_size, 3)
    parts = (automaton.transitions, earned, automaton.final, automaton.start)
    found = [one.reward(tokens) for one in (RewardAutomaton(*parts), pushed(RewardAutomaton(*parts)))]
    allowed = found[0] > -math.inf
    grads = [torch.autograd.grad(r[allowed].sum(), earned, allow_unused=True)[0] for r in found]
    assert_close(grads[1], grads[0].tolist())


@given(parts=strategies.automata())
def test_trimming_keeps_what_is_reached_in_order(parts):
    automaton = RewardAutomaton(*parts)
    trimmed = automaton.trim()
    assert all_rewards(trimmed) == all_rewards(automaton)
    assert trimmed.start == 0
    seen = list(dict.fromkeys([0, *trimmed.transitions.flatten().tolist()]))
    assert seen == list(range(trimmed.n_states))


# Builders


def test_a_function_is_explored_breadth_first():
    def step(remainder, digit):
        after = (2 * remainder + digit) % 5
        return after, 0.25 * digit

    automaton = from_function(step, 2, 0, max_states=5, final=lambda remainder: float(remainder == 0))
    assert automaton.n_states == 5
    for string in oracles.strings(2, 6):
        value = sum(digit << place for place, digit in enumerate(reversed(string)))
        assert automaton.reward(torch.tensor(string, dtype=torch.int64)).item() == (value % 5 == 0) + 0.25 * sum(string)
    assert automaton.trim().transitions.tolist() == automaton.transitions.tolist()


@given(generator=sequence_strategies.generators())
def test_rewards_of_positions(device, generator):
    table = sequence_strategies.normal((4, 3), generator)
    automaton = at_positions(table.to(device))
    assert automaton.n_states == 5
    tokens = torch.randint(3, (20, 6), generator=generator)
    expected = [sum(table[t, token].item() for t, token in enumerate(some[:4])) for some in tokens.tolist()]
    assert_close(automaton.reward(tokens.to(device)), expected, scale=10.0)


def test_rewards_of_tokens_and_parities_are_those_of_tables():
    space = SequenceSpace(3, 4, eos=1)
    values = torch.tensor([0.5, -1.0, 2.0])
    counted = torch.tensor([False, True, True])
    for automaton, table in (
        (per_token(values), rewards.additive(space, values.double().expand(4, 3))),
        (even_count(counted, reward=2.0), rewards.parity(space, bonus=2.0, counted=counted)),
        (
            at_positions(-2 * (torch.arange(3) != torch.tensor([[2], [0], [2], [2]])).double()),
            rewards.planted_modes(SequenceSpace(3, 4), torch.tensor([[2, 0, 2, 2]]), weights=torch.ones(1), widths=0.5),
        ),
    ):
        over = space if len(table) == space.size else SequenceSpace(3, 4)
        assert_close(automaton.reward(over.tokens(), over.lengths()), table.tolist(), scale=10.0)


KEYWORDS = [
    {(0, 1): 1.0},
    {(0, 0): 1.0, (0,): -0.5},
    {(0, 1, 0): 1.0, (1, 0): 2.0, (0,): 4.0, (1, 0, 1, 1): -8.0},
    {(1, 1, 1): 1.0, (1,): -math.inf},
    {(0, 1, 2): 1.0, (1, 2): 0.5, (2, 2, 2, 2): 3.0},
]


@pytest.mark.parametrize("keywords", KEYWORDS)
def test_keywords_are_counted_with_overlaps(keywords):
    automaton = from_keywords(keywords, 3)
    expected = []
    for string in oracles.strings(3, 6):
        counts = {word: oracles.occurrences(string, word) for word in keywords}
        expected.append(sum(keywords[word] * count for word, count in counts.items() if count))
    assert all_rewards(automaton) == expected
    beginnings = {word[:n] for word in keywords for n in range(len(word) + 1)}
    assert automaton.n_states == len(beginnings)


@given(
    keywords=st.dictionaries(
        st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple), st.integers(-4, 4), min_size=1, max_size=5
    )
)
def test_drawn_keywords(keywords):
    automaton = from_keywords(keywords, 2)
    expected = [sum(weight * oracles.occurrences(string, word) for word, weight in keywords.items())
                for string in oracles.strings(2, 7)]  # fmt: skip
    assert all_rewards(automaton, 7) == expected


def test_keywords_are_strings_of_characters_or_tuples_of_tokens():
    by_number = from_keywords({(2, 0): 1.0, (1,): 2.0}, 3)
    words = ["the", "a", "not"]
    for keywords, vocabulary in (
        ({"ca": 1.0, "b": 2.0}, "abc"),
        ({"ca": 1, ("b",): 2}, ["a", "b", "c"]),
        ({("not", "the"): 1.0, ("a",): 2.0}, words),
        ({("not", 0): 1.0, (1,): 2.0}, words),
    ):
        automaton = from_keywords(keywords, vocabulary)
        assert automaton.transitions.tolist() == by_number.transitions.tolist()
        assert automaton.rewards.tolist() == by_number.rewards.tolist()


@pytest.mark.parametrize("phrase", [(0,), (0, 0), (0, 1, 0), (2, 1, 2, 1)])
def test_a_planted_phrase_counts_once(phrase):
    automaton = once(phrase, 3, reward=1.5)
    assert automaton.n_states == len(phrase) + 1
    expected = [1.5 * (oracles.occurrences(string, phrase) > 0) for string in oracles.strings(3, 6)]
    assert all_rewards(automaton) == expected


# Errors


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make([0, 1], [0.0, 0.0], [0.0]), r"transitions must have shape \[S, V\]; got \[2\]"),
        (lambda: make([[0]], [[0.0, 0.0]], [0.0]), r"rewards must have the same shape \[S, V\] as transitions"),
        (lambda: make([[0]], [[0.0]], [0.0, 0.0]), r"final must have shape \[1\].*got \[2\]"),
        (lambda: make([[0.0]], [[0.0]], [0.0]), r"transitions must be a torch.int64 tensor; got torch.float32"),
        (lambda: make([[1]], [[0.0]], [0.0]), r"transitions must hold states in 0..0; got 1 at index \[0, 0\]"),
        (lambda: make([[-1]], [[0.0]], [0.0]), r"transitions must hold states in 0..0; got -1"),
        (lambda: make([[0]], [[math.nan]], [0.0]), r"rewards must be finite, or -inf .*got nan at index \[0, 0\]"),
        (lambda: make([[0]], [[0.0]], [math.inf]), r"final must be finite, or -inf .*got inf at index \[0\]"),
        (lambda: make([[0]], [[0.0]], [0.0], start=1), r"start must be a state in 0..0; got 1"),
        (lambda: make([[0]], [[0.0]], [0.0], start=True), r"start must be an integer"),
        (
            lambda: RewardAutomaton(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), torch.zeros(1).double()),
            r"rewards must be a torch.float64 tensor; got torch.float32",
        ),
        (
            lambda: RewardAutomaton(
                torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0).double(), torch.zeros(1).double()
            ),
            r"a state and a token at least; got shape \[1, 0\]",
        ),
        (lambda: ONES.reward(torch.tensor([0, 2])), r"tokens must be in 0..1; got 2 at index \[1\]"),
        (lambda: ONES.reward(torch.tensor([0, 2]), torch.tensor(2)), r"tokens must be in 0..1; got 2 at index \[1\]"),
        (lambda: ONES.reward(torch.tensor([0.0])), r"tokens must be a tensor of an integer dtype; got torch.float32"),
        (lambda: ONES.reward(torch.tensor(0)), r"tokens must have shape \[..., T\]; got a scalar"),
        (lambda: ONES.reward(torch.tensor([0]), torch.tensor(2)), r"lengths must be in 0..1; got 2"),
        (lambda: ONES.reward(torch.tensor([0]), torch.tensor([1])), r"lengths must have shape \[\]; got \[1\]"),
        (lambda: ONES.reward(torch.tensor([0]), torch.tensor(1.0)), r"lengths must be a tensor of an integer dtype"),
        (lambda: ONES + per_token(torch.zeros(3)), r"one vocabulary to be added; got 2 and 3 tokens"),
        (lambda: equivalent(ONES, per_token(torch.zeros(3))), r"one vocabulary to be compared; got 2 and 3"),
        (lambda: math.inf * ONES, r"factor must be a finite number.*got inf"),
        (
            lambda: 0 * per_token(torch.tensor([-math.inf, 0.0])),
            r"factor must be above 0 for an automaton that forbids",
        ),
        (lambda: minimise(ONES, tolerance=-1), r"tolerance must be a finite number of at least 0"),
        (lambda: minimise(per_token(torch.zeros(1, requires_grad=True))), r"must not require grad to be minimised"),
        (lambda: from_function(lambda s, a: (s + 1, 0.0), 1, 0, max_states=9), r"max_states must be at least .*got 9"),
        (lambda: from_function(lambda s, a: (s, math.nan), 1, 0, max_states=9), r"rewards must be finite.*got nan"),
        (
            lambda: from_function(lambda s, a: (s, 0.0), 0, 0, max_states=9),
            r"vocab_size must be an integer of at least",
        ),
        (lambda: at_positions(torch.zeros(3)), r"table must have shape \[T, V\]; got \[3\]"),
        (lambda: at_positions(torch.zeros(3, 2, dtype=torch.int64)), r"table must have a floating-point dtype"),
        (lambda: per_token(torch.zeros(3, 2)), r"values must have shape \[V\]; got \[3, 2\]"),
        (lambda: even_count(torch.zeros(3)), r"counted must be a torch.bool tensor"),
        (lambda: from_keywords({}, 2), r"keywords must hold one keyword at least"),
        (lambda: from_keywords({"": 1.0}, "ab"), r"not empty; got ''"),
        (lambda: from_keywords({"abd": 1.0}, "abc"), r"tokens of the vocabulary; got 'd' in 'abd'"),
        (lambda: from_keywords({(0, 2): 1.0}, 2), r"tokens of the vocabulary; got 2 in \(0, 2\)"),
        (lambda: from_keywords({(True,): 1.0}, 2), r"tokens of the vocabulary; got True"),
        (lambda: from_keywords({"ab": 1.0, ("a", "b"): 2.0}, "ab"), r"distinct as token strings; got \('a', 'b'\)"),
        (lambda: from_keywords({"a": math.nan}, "ab"), r"weight of 'a' must be finite.*got nan"),
        (lambda: from_keywords({"a": 1.0}, "aba"), r"vocabulary must hold distinct strings.*got 'a' at place 2"),
        (lambda: from_keywords({"a": 1.0}, ["a", ""]), r"vocabulary must hold distinct strings.*got '' at place 1"),
        (lambda: from_keywords({"a": 1.0}, []), r"vocabulary must hold one token at least"),
        (lambda: from_keywords({(0,): 1.0}, 0), r"vocabulary must be an integer of at least 1"),
    ],
)
def test_bad_input_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


ONES = per_token(torch.tensor([0.0, 1.0]))


def test_only_automata_are_added():
    with pytest.raises(TypeError):
        ONES + 1.0
