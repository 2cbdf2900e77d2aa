"""SequenceSpace and sums over its trie: order, inverse maps, sizes, memory budget, errors."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exo_toy.spaces import SequenceSpace, join_children, split_children, sum_over_trie
from tests import sequence_oracles, sequence_strategies
from tests.tolerances import assert_close

# The oracles


def test_oracle_of_completions_by_hand():
    assert sequence_oracles.completions(2, 2, None) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert sequence_oracles.completions(3, 2, 1) == [(0, 0), (0, 1), (0, 2), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert sequence_oracles.filled((2, 1, 0), 1) == (2, 1, 1)
    assert [sequence_oracles.length(string, 1) for string in ((1, 1, 1), (0, 1, 1), (0, 2, 1), (0, 2, 2))] == [
        1,
        2,
        3,
        3,
    ]
    assert sequence_oracles.length((1, 1, 1), None) == 3


def test_oracle_of_path_sums_by_hand():
    assert list(sequence_oracles.steps((2, 0, 1, 1), 1, 1)) == [(0, (), 2), (1, (2,), 0), (2, (0,), 1)]
    assert list(sequence_oracles.steps((2, 0, 1), None, 2)) == [(0, (), 2), (1, (2,), 0), (2, (2, 0), 1)]
    assert [sequence_oracles.context_number(context, 3, 1) for context in ((), (2,), (2, 0))] == [0, 1, 2]
    tables = [[[1, 2, 3]], [[10, 20, 30], [40, 50, 60]], [[100, 200, 300], [400, 500, 600]]]
    assert sequence_oracles.path_sum((2, 0, 1), tables, 3, 1, 1) == 3 + 40 + 200
    assert sequence_oracles.path_sum((2, 1, 1), tables, 3, 1, 1) == 3 + 50


# Completions and indices


def test_an_eos_in_the_middle_of_the_vocabulary_by_hand():
    space = SequenceSpace(3, 2, eos=1)
    assert space.tokens().tolist() == [[0, 0], [0, 1], [0, 2], [1, 1], [2, 0], [2, 1], [2, 2]]
    assert space.lengths().tolist() == [2, 2, 2, 1, 2, 2, 2]
    assert space.size == len(space) == 7


@given(space=sequence_strategies.spaces())
def test_agrees_with_the_oracle(space):
    expected = sequence_strategies.completions(space)
    tokens = space.tokens()
    assert tokens.dtype == torch.int64
    assert [tuple(row) for row in tokens.tolist()] == expected
    assert space.size == len(space) == len(expected)
    assert space.lengths().tolist() == [sequence_oracles.length(string, space.eos) for string in expected]
    assert space.index(tokens).tolist() == list(range(len(expected)))


@given(vocab_size=st.integers(2, 9), length=st.integers(1, 9))
def test_sizes_are_those_of_the_formulas(vocab_size, length):
    n_live = vocab_size - 1
    assert SequenceSpace(vocab_size, length).size == vocab_size**length
    ended = sum(n_live ** (i - 1) for i in range(1, length + 1))
    assert SequenceSpace(vocab_size, length, eos=0).size == ended + n_live**length


@given(space=sequence_strategies.spaces(), data=st.data())
def test_tokens_of_given_indices_are_rows_of_all_tokens(space, data):
    index = torch.tensor(data.draw(st.lists(st.integers(0, space.size - 1), min_size=6, max_size=6)))
    for shaped in (index, index.reshape(2, 3), index[0], index[:0], index.to(torch.int16)):
        tokens = space.tokens(shaped)
        assert torch.equal(tokens, space.tokens()[shaped.long()])
        assert torch.equal(space.index(tokens), shaped.long())


@given(eos=st.none() | st.integers(0, 7), data=st.data())
def test_indices_are_exact_near_the_end_of_int64(eos, data):
    space = SequenceSpace(8, 20, eos)
    index = torch.tensor([data.draw(st.integers(0, space.size - 1)), 0, space.size - 1, space.size - 2])
    assert torch.equal(space.index(space.tokens(index)), index)
    if eos is None:
        digits = [index[0].item() // 8**power % 8 for power in reversed(range(20))]
        assert space.tokens(index)[0].tolist() == digits


def test_small_integer_dtypes_do_not_overflow():
    space = SequenceSpace(10, 6)
    assert space.index(torch.full((1, 6), 9, dtype=torch.int8)).tolist() == [999999]


def test_subtree_sizes_count_the_completions_under_a_prefix():
    assert SequenceSpace(3, 3, eos=0).subtree_sizes == (15, 7, 3, 1)
    assert SequenceSpace(3, 3).subtree_sizes == (27, 9, 3, 1)


# Contexts and counted tokens


def test_contexts_by_hand():
    """Base 2 over the tokens 0 and 2, first token most significant, no more than two of them."""
    space = SequenceSpace(3, 4, eos=1)
    tokens = torch.tensor([[2, 0, 2, 2], [0, 2, 1, 1]])
    assert space.contexts(tokens, order=0).tolist() == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert space.contexts(tokens, order=1).tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]
    assert space.contexts(tokens, order=2).tolist() == [[0, 1, 2, 1], [0, 0, 1, 0]]
    assert space.contexts(tokens, order=3)[0].tolist() == [0, 1, 2, 5]
    assert space.counted(tokens).tolist() == [[True] * 4, [True, True, True, False]]


@given(space=sequence_strategies.spaces(), data=st.data())
def test_contexts_of_counted_tokens_agree_with_the_oracle(device, space, data):
    order = data.draw(sequence_strategies.orders(space))
    tokens = space.tokens().to(device)
    contexts, counted = space.contexts(tokens, order=order), space.counted(tokens)
    assert contexts.shape == counted.shape == tokens.shape
    assert contexts.dtype == torch.int64 and counted.dtype == torch.bool
    for string, row, counts in zip(
        sequence_strategies.completions(space), contexts.tolist(), counted.tolist(), strict=True
    ):
        steps = list(sequence_oracles.steps(string, space.eos, order))
        assert counts == [t < len(steps) for t in range(space.length)]
        numbers = [sequence_oracles.context_number(context, space.vocab_size, space.eos) for _, context, _ in steps]
        assert row[: len(steps)] == numbers
    # Also where it means nothing the number is that of an entry, for look-ups to be masked afterwards.
    for t in range(space.length):
        assert 0 <= contexts[:, t].min() and contexts[:, t].max() < space.n_contexts(t, order=order)


@given(space=sequence_strategies.spaces(), data=st.data())
def test_contexts_and_counts_take_any_shape_and_integers(space, data):
    order = data.draw(sequence_strategies.orders(space))
    index = torch.tensor(data.draw(st.lists(st.integers(0, space.size - 1), min_size=6, max_size=6)))
    tokens, shaped = space.tokens(index), space.tokens(index).view(2, 3, -1)
    assert space.counted(tokens).sum(-1).tolist() == space.lengths()[index].tolist()
    for method in (lambda some: space.contexts(some, order=order), space.counted):
        assert method(shaped).flatten(0, 1).equal(method(tokens))
        assert method(tokens[0]).equal(method(tokens)[0])
        assert method(tokens[:0]).shape == (0, space.length)
        assert method(tokens.to(torch.int8)).equal(method(tokens))


def test_contexts_of_small_integers_do_not_overflow():
    """Base 10 to the ninth place, of tokens that fit in a byte."""
    space = SequenceSpace(10, 10)
    contexts = space.contexts(torch.full((1, 10), 9, dtype=torch.int8), order=9)
    assert contexts.tolist() == [[10**t - 1 for t in range(10)]]


# Identity, and spaces too large to enumerate


def test_equality_and_hash_are_by_vocabulary_length_and_eos():
    space = SequenceSpace(3, 2, eos=1)
    same = SequenceSpace(3, 2, eos=1, memory_budget=7)
    assert space == same
    assert hash(space) == hash(same)
    for other in (
        SequenceSpace(4, 2, eos=1),
        SequenceSpace(3, 4, eos=1),
        SequenceSpace(3, 2, eos=0),
        SequenceSpace(3, 2),
    ):
        assert space != other
    with pytest.raises(dataclasses.FrozenInstanceError):
        space.length = 3


def test_a_space_of_any_size_constructs_and_refuses_to_enumerate():
    space = SequenceSpace(256, 1000)
    assert space.size == 256**1000
    with pytest.raises(OverflowError):
        len(space)
    with pytest.raises(ValueError, match=r"tokens\(\) of 10\*\*2408\.24 completions .*take 10\*\*2403\.11 GiB.*4 GiB"):
        space.tokens()
    with pytest.raises(ValueError, match=r"lengths\(\) of 10\*\*2408\.24"):
        space.lengths()
    with pytest.raises(ValueError, match=r"at most 2\*\*63 - 1"):
        space.tokens(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"at most 2\*\*63 - 1"):
        space.index(torch.zeros(1, 1000, dtype=torch.int64))
    table = torch.zeros(1, 1, 256)
    with pytest.raises(ValueError, match="above the space's memory_budget"):
        sum_over_trie(space, [table] * 1000, order=0)


def test_the_memory_budget_is_exact():
    needed = 2**10 * 10 * 8
    assert SequenceSpace(2, 10, memory_budget=needed).tokens().shape == (2**10, 10)
    with pytest.raises(ValueError, match=r"tokens\(\) of 1,024 completions \(vocab_size=2, length=10, eos=None\)"):
        SequenceSpace(2, 10, memory_budget=needed - 1).tokens()
    table = torch.zeros(3, 1, 2)
    assert sum_over_trie(SequenceSpace(2, 1, memory_budget=24), [table], order=0).shape == (3, 2)
    with pytest.raises(ValueError, match="a table of 2 completions"):
        sum_over_trie(SequenceSpace(2, 1, memory_budget=23), [table], order=0)


# Sums over the trie


@given(data=st.data(), generator=sequence_strategies.generators())
def test_sums_over_the_trie_agree_with_the_oracle(device, data, generator):
    space = data.draw(sequence_strategies.spaces())
    order = data.draw(sequence_strategies.orders(space))
    n_prompts = data.draw(sequence_strategies.prompt_counts(space))
    shapes = sequence_strategies.table_shapes(space, order, n_prompts)
    tables = [sequence_strategies.normal(shape, generator) for shape in shapes]
    sums = sum_over_trie(space, [table.to(device) for table in tables], order=order)
    expected = [
        [
            sequence_oracles.path_sum(
                string, [table[x].tolist() for table in tables], space.vocab_size, space.eos, order
            )
            for string in sequence_strategies.completions(space)
        ]
        for x in range(n_prompts)
    ]
    assert_close(sums, expected)


@given(data=st.data(), generator=sequence_strategies.generators())
def test_the_backward_pass_counts_the_completions_through_each_entry(data, generator):
    space = data.draw(sequence_strategies.spaces())
    order = data.draw(sequence_strategies.orders(space))
    shapes = sequence_strategies.table_shapes(space, order, 1)
    tables = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weights = sequence_strategies.normal((space.size,), generator)
    gradients = torch.autograd.grad((weights * sum_over_trie(space, tables, order=order)).sum(), tables)
    expected = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    for string, weight in zip(sequence_strategies.completions(space), weights, strict=True):
        for t, context, token in sequence_oracles.steps(string, space.eos, order):
            number = sequence_oracles.context_number(context, space.vocab_size, space.eos)
            expected[t][0, number, token] += weight
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_close(gradient, wanted, scale=weights.abs().sum().item())


@pytest.mark.parametrize("eos", [None, 0, 1, 2])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_sums_over_the_trie_differentiate_twice(eos, order):
    space = SequenceSpace(3, 4, eos)
    generator = torch.Generator().manual_seed(0)
    shapes = sequence_strategies.table_shapes(space, order, 2)
    tables = [sequence_strategies.normal(shape, generator).requires_grad_() for shape in shapes]

    def curved(*tables):
        return sum_over_trie(space, [table.sin() for table in tables], order=order)

    assert torch.autograd.gradcheck(curved, tables)
    assert torch.autograd.gradgradcheck(curved, tables)


def test_sums_keep_dtype_and_infinities():
    space = SequenceSpace(2, 2)
    counts = sum_over_trie(space, [torch.tensor([[[0, 1]]])] * 2, order=0)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[0, 1, 1, 2]]
    forbidden = torch.tensor([[[0.0, -torch.inf]]])
    assert sum_over_trie(space, [forbidden] * 2, order=0).tolist() == [[0.0, -torch.inf, -torch.inf, -torch.inf]]


@given(data=st.data(), generator=sequence_strategies.generators())
def test_splitting_and_joining_children_are_inverse(data, generator):
    space = data.draw(sequence_strategies.spaces(max_length=3))
    table = sequence_strategies.normal((2, 3, space.size), generator)
    children, eos = split_children(space, table)
    assert children.shape == (2, 3, space.n_live, space.subtree_sizes[1])
    assert eos.shape == (2, 3, space.eos is not None)
    assert torch.equal(join_children(space, children, eos), table)


# Errors


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(vocab_size=0, length=2), "vocab_size must be an integer of at least 1; got 0"),
        (dict(vocab_size=2.0, length=2), "vocab_size must be an integer of at least 1; got 2.0"),
        (dict(vocab_size=2, length=0), "length must be an integer of at least 1; got 0"),
        (dict(vocab_size=2, length=True), "length must be an integer of at least 1; got True"),
        (dict(vocab_size=2, length=2, eos=2), r"eos must be None or a token in 0\.\.1; got 2"),
        (dict(vocab_size=2, length=2, eos=-1), "eos must be an integer of at least 0; got -1"),
        (dict(vocab_size=1, length=2, eos=0), "vocab_size must be at least 2 with an eos"),
        (dict(vocab_size=2, length=2, memory_budget=0), "memory_budget must be an integer of at least 1; got 0"),
    ],
)
def test_spaces_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        SequenceSpace(**arguments)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, 1, 2]], "tokens must be a torch.Tensor; got list"),
        (torch.zeros(1, 3), r"tokens must have an integer dtype; got torch\.float32"),
        (torch.zeros(1, 3, dtype=torch.bool), r"tokens must have an integer dtype; got torch\.bool"),
        (torch.tensor([[0, 1]]), r"tokens must have shape \[\.\.\., 3\]; got \[1, 2\]"),
        (torch.tensor(1), r"tokens must have shape \[\.\.\., 3\]; got \[\]"),
        (torch.tensor([[0, 0, 4]]), r"tokens must be in 0\.\.3; got 4 at index \[0, 2\]"),
        (torch.tensor([[0, 0, -1]]), r"tokens must be in 0\.\.3; got -1 at index \[0, 2\]"),
        (torch.tensor([[3, 2, 2], [0, 2, 0]]), r"nothing but the eos, 2, after an eos; got 0 at index \[1, 2\]"),
    ],
)
def test_index_refuses(tokens, message):
    with pytest.raises(ValueError, match=message):
        SequenceSpace(4, 3, eos=2).index(tokens)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, 8]), r"index must be in 0\.\.7; got 8 at index \[1\]"),
        (torch.tensor([-1]), r"index must be in 0\.\.7; got -1"),
        (torch.tensor([0.0]), r"index must have an integer dtype; got torch\.float32"),
        (3, "index must be a torch.Tensor; got int"),
    ],
)
def test_tokens_refuses(index, message):
    with pytest.raises(ValueError, match=message):
        SequenceSpace(2, 3).tokens(index)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("shapes", "order", "message"),
    [
        ([(1, 1, 2)], 0, "tables must be one per position, 2; got 1"),
        ([(1, 1, 2), (1, 1, 2)], 1, r"tables\[1\] must have shape \[1, 2, 2\] for order 1; got \[1, 1, 2\]"),
        ([(3, 1, 2), (1, 1, 2)], 0, r"tables\[1\] must have shape \[3, 1, 2\] for order 0; got \[1, 1, 2\]"),
        ([(1, 1, 3), (1, 1, 2)], 0, r"tables\[0\] must have shape \[1, 1, 2\] for order 0; got \[1, 1, 3\]"),
        ([(1, 2), (1, 2)], 0, r"tables\[0\] must have shape \[1, 1, 2\] for order 0; got \[1, 2\]"),
        ([(1, 1, 2), (1, 2, 2)], 2, r"order must be in 0\.\.1 .*; got 2"),
        ([(1, 1, 2), (1, 1, 2)], -1, "order must be an integer of at least 0; got -1"),
    ],
)
def test_sum_over_trie_refuses(shapes, order, message):
    with pytest.raises(ValueError, match=message):
        sum_over_trie(SequenceSpace(2, 2), [torch.zeros(shape) for shape in shapes], order=order)
