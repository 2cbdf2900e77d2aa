"""States, ranks and informations against plain loops and exact fractions, against closed forms, laws, errors."""

import math
from collections import defaultdict
from fractions import Fraction

import pytest
import torch

from exo_toy import rewards
from exo_toy.divergences import kl_divergence
from exo_toy.expressivity import (
    conditional_mutual_information,
    cut_information,
    hankel_ranks,
    least_gap,
    state_counts,
)
from exo_toy.policies import KGramPolicy, closest_kgram
from exo_toy.reviews import OPENINGS, ReviewWorld
from exo_toy.spaces import SequenceSpace
from exo_toy.targets import optimal_policy

SPACES = [
    SequenceSpace(2, 4),
    SequenceSpace(3, 3),
    SequenceSpace(2, 4, eos=0),
    SequenceSpace(3, 3, eos=1),
    SequenceSpace(3, 3, eos=2),
    SequenceSpace(4, 1),
]
# Sums of at most a few hundred positive terms, and their logarithms.
ATOL = 1e-12


def weights(space: SequenceSpace, *, seed: int, kind: str) -> list[int]:
    """Integer weights of completions: any, with many zeros, or of few states (made by a small machine)."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "machine":
        factors = torch.randint(1, 4, (space.length, 2, space.vocab_size), generator=draw)
        values = []
        for tokens, length in zip(space.tokens().tolist(), space.lengths().tolist(), strict=True):
            state, product = 0, 1
            for t, token in enumerate(tokens[:length]):
                product *= int(factors[t, state, token])
                state = (state + token) % 2
            values.append(product)
        return values
    values = torch.randint(1, 10, (space.size,), generator=draw)
    if kind == "zeros":
        values = values * torch.randint(0, 2, (space.size,), generator=draw)
        values[0] = 1
    return values.tolist()


def table(values: list[int]) -> torch.Tensor:
    total = torch.tensor(values, dtype=torch.float64)
    return (total / total.sum()).log()


def cuts(space: SequenceSpace, values: list[int]) -> list[dict[tuple, dict[tuple, Fraction]]]:
    """At every position: live prefix -> suffix -> weight, the zeros left out."""
    found = [defaultdict(lambda: defaultdict(Fraction)) for _ in range(space.length)]
    for tokens, length, value in zip(space.tokens().tolist(), space.lengths().tolist(), values, strict=True):
        for t in range(length):
            if value:
                found[t][tuple(tokens[:t])][tuple(tokens[t:length])] += Fraction(value)
    return found


def exact_rank(matrix: list[list[Fraction]]) -> int:
    """By elimination."""
    rank, rows = 0, [list(row) for row in matrix]
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column] != 0), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] / rows[rank][column]
            rows[i] = [x - factor * y for x, y in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


def distinct_conditionals(cut: dict[tuple, dict[tuple, Fraction]]) -> int:
    return len({tuple(sorted((v, p / sum(row.values())) for v, p in row.items())) for row in cut.values()})


def mutual_information(joint: dict[tuple, Fraction], total: Fraction) -> float:
    """Sum of p log(p / (p_left p_right)) times the mass of the joint; keys are (left, right)."""
    left, right, mass = defaultdict(Fraction), defaultdict(Fraction), sum(joint.values())
    for (u, v), p in joint.items():
        left[u] += p
        right[v] += p
    return math.fsum(float(p / total) * math.log(p * mass / (left[u] * right[v])) for (u, v), p in joint.items())


CASES = [(space, kind, seed) for space in SPACES for kind in ("any", "zeros", "machine") for seed in (1, 2)]


@pytest.mark.parametrize(("space", "kind", "seed"), CASES)
def test_ranks_and_states_are_those_of_exact_fractions(space, kind, seed):
    values = weights(space, seed=seed, kind=kind)
    by_loops = cuts(space, values)
    matrices = [[[row[v] for v in {v for r in cut.values() for v in r}] for row in cut.values()] for cut in by_loops]
    assert hankel_ranks(space, table(values)).ranks.tolist() == [exact_rank(matrix) for matrix in matrices]
    assert state_counts(space, table(values)).tolist() == [distinct_conditionals(cut) for cut in by_loops]


@pytest.mark.parametrize(("space", "kind", "seed"), CASES)
def test_informations_are_those_of_loops(space, kind, seed):
    values = weights(space, seed=seed, kind=kind)
    total = Fraction(sum(values))
    by_loops = cuts(space, values)
    found, reached = cut_information(space, table(values)).tolist()
    for t, cut in enumerate(by_loops):
        joint = {(u, v): p for u, row in cut.items() for v, p in row.items()}
        assert found[t] == pytest.approx(mutual_information(joint, total), abs=ATOL)
        assert reached[t] == pytest.approx(float(sum(joint.values()) / total), abs=ATOL)
    for order in range(space.length):
        found = conditional_mutual_information(space, table(values), order).tolist()
        for t, cut in enumerate(by_loops):
            by_context = defaultdict(lambda: defaultdict(Fraction))
            for u, row in cut.items():
                for v, p in row.items():
                    by_context[u[max(0, t - order) :]][u, v[0]] += p
            wanted = math.fsum(mutual_information(joint, total) for joint in by_context.values())
            assert found[t] == pytest.approx(wanted, abs=ATOL)
            if t <= order:
                assert found[t] == 0


@pytest.mark.parametrize(("space", "kind", "seed"), CASES)
def test_information_of_older_tokens_is_the_gap_of_the_closest_kgram(space, kind, seed):
    log_p = table(weights(space, seed=seed, kind=kind))
    for order in range(space.length):
        gap = kl_divergence(log_p, closest_kgram(space, log_p, order).log_probs()[0])
        information = conditional_mutual_information(space, log_p, order).sum()
        assert information.item() == pytest.approx(gap.item(), abs=ATOL)
        # Another policy of the order is farther.
        other = kl_divergence(log_p, KGramPolicy(space, order).log_probs()[0])
        assert other.item() >= information.item() - ATOL


def uniform(space: SequenceSpace) -> torch.Tensor:
    return torch.full((space.size,), -math.log(space.size), dtype=torch.float64)


@pytest.mark.parametrize(("vocab_size", "length"), [(2, 2), (2, 7), (2, 10), (3, 4), (3, 5), (4, 5)])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_palindromes_need_all_of_the_first_half(vocab_size, length, beta):
    space = SequenceSpace(vocab_size, length)
    log_p, _ = optimal_policy(uniform(space), rewards.palindrome(space, bonus=1.5), beta=beta)
    ranks = [vocab_size ** min(t, length - t) for t in range(length)]
    assert hankel_ranks(space, log_p).ranks.tolist() == ranks
    # Past the middle there is one more state: it cannot become a palindrome any more.
    states = [rank + (2 * t > length + 1) for t, rank in enumerate(ranks)]
    assert state_counts(space, log_p).tolist() == states


@pytest.mark.parametrize(("vocab_size", "length"), [(2, 2), (2, 9), (4, 4)])
def test_parity_needs_two_states_and_every_earlier_token(vocab_size, length):
    space = SequenceSpace(vocab_size, length)
    log_p, _ = optimal_policy(uniform(space), rewards.parity(space, bonus=2.0), beta=0.5)
    two = [1] + [2] * (length - 1)
    assert hankel_ranks(space, log_p).ranks.tolist() == state_counts(space, log_p).tolist() == two
    # A fair bit, copied with the error of a coin of odds e^(bonus/beta): nothing of it is seen before all is.
    p = 1 / (1 + math.exp(-4.0))
    lost = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    for order in range(length):
        wanted = [0.0] * (length - 1) + [lost if order < length - 1 else 0.0]
        found = conditional_mutual_information(space, log_p, order).tolist()
        assert found == pytest.approx(wanted, abs=ATOL)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_two_modes_have_the_rank_of_a_binomial(power):
    space = SequenceSpace(3, 7)
    modes = torch.tensor([[0] * 7, [2] * 7])
    reward = rewards.planted_modes(space, modes, weights=torch.tensor([1.0, 0.7]).double(), widths=1.5)
    log_p, _ = optimal_policy(uniform(space), reward, beta=1 / power)
    # (a + b)^n is a sum of n + 1 products over positions; a prefix counts by the difference of its distances.
    assert hankel_ranks(space, log_p).ranks.tolist() == [min(power + 1, 2 * min(t, 7 - t) + 1) for t in range(7)]
    assert state_counts(space, log_p).tolist() == [2 * t + 1 for t in range(7)]


def test_reviews_keep_their_rank_and_gain_states_with_length():
    ranks, states = [], []
    for length in (4, 5):
        world = ReviewWorld(length=length, openings=OPENINGS[:1])
        log_p, _ = optimal_policy(world.log_human()[0], world.oracle_reward()[0], beta=0.4)
        ranks.append(hankel_ranks(world.space, log_p).ranks.tolist())
        states.append(state_counts(world.space, log_p).tolist())
    # A mixture of two authors, each of four states, weighted by a product over words.
    assert all(rank <= 8 for row in ranks for rank in row)
    assert states[1][:4] == states[0] and states[1][4] > max(ranks[1])


def test_rank_is_at_most_the_number_of_states_and_singular_values_are_correlations():
    space = SequenceSpace(3, 4, eos=2)
    log_p = table(weights(space, seed=3, kind="any"))
    found = hankel_ranks(space, log_p)
    assert (found.ranks <= state_counts(space, log_p)).all()
    for values in found.singular_values:
        assert values[0].item() == pytest.approx(1, abs=ATOL)
        assert (values.diff() <= 0).all() and (values >= 0).all()


@pytest.mark.parametrize("log_error", [1e-13, 1e-9, 1e-6])
def test_counts_do_not_see_errors_of_the_stated_size(log_error):
    space = SequenceSpace(2, 9)
    reward = rewards.planted_modes(space, torch.tensor([[0] * 9, [1] * 9]), weights=torch.ones(2), widths=1.5)
    log_p, _ = optimal_policy(uniform(space), reward, beta=0.5)
    noise = torch.rand(space.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = log_p + log_error * (2 * noise - 1)
    counts = [hankel_ranks(space, log_p).ranks.tolist(), state_counts(space, log_p).tolist()]
    found = hankel_ranks(space, moved, log_error=log_error)
    assert [found.ranks.tolist(), state_counts(space, moved, log_error=log_error).tolist()] == counts
    # Without being told of them the counts see the errors.
    if log_error > 1e-12:
        assert hankel_ranks(space, moved).ranks.tolist() != counts[0]
        assert state_counts(space, moved).tolist() != counts[1]
    # Singular values move by at most the part of the tolerance that is due to the table.
    exact = hankel_ranks(space, log_p)
    for values, others, bound in zip(exact.singular_values, found.singular_values, found.tolerances, strict=True):
        assert (values - others).abs().max() <= bound


def test_a_machine_loses_at_least_the_bound():
    space = SequenceSpace(2, 6)
    log_p, _ = optimal_policy(uniform(space), rewards.palindrome(space, bonus=3.0), beta=0.5)
    information, _ = cut_information(space, log_p)
    for order in range(6):
        # A k-gram of two tokens is a machine of 2^k states.
        gap = kl_divergence(log_p, closest_kgram(space, log_p, order).log_probs()[0]).item()
        bound = least_gap(space, log_p, n_states=2**order).item()
        assert bound == pytest.approx(max(0.0, information.max().item() - order * math.log(2)), abs=ATOL)
        assert bound <= gap + ATOL
    assert least_gap(space, log_p, n_states=1).item() > 1.0


def test_bound_counts_only_what_has_not_ended():
    # Half the completions end at once, the others repeat a fair bit: one state loses half of log 2.
    space = SequenceSpace(3, 2, eos=2)
    values = [8 if tokens == [2, 2] else 4 if tokens in ([0, 0], [1, 1]) else 0 for tokens in space.tokens().tolist()]
    assert least_gap(space, table(values), n_states=1).item() == pytest.approx(math.log(2) / 2, abs=ATOL)
    assert least_gap(space, table(values), n_states=2).item() == pytest.approx(0, abs=ATOL)


def test_a_certain_completion_needs_one_state_until_it_ends():
    space = SequenceSpace(2, 3, eos=0)
    log_p = torch.full((space.size,), -torch.inf, dtype=torch.float64)
    log_p[space.index(torch.tensor([1, 0, 0]))] = 0.0
    assert hankel_ranks(space, log_p).ranks.tolist() == state_counts(space, log_p).tolist() == [1, 1, 0]
    assert conditional_mutual_information(space, log_p, 0).tolist() == [0, 0, 0]
    assert cut_information(space, log_p).tolist() == [[0, 0, 0], [1, 1, 0]]


@pytest.mark.unchecked
@pytest.mark.parametrize("function", [hankel_ranks, state_counts, cut_information])
def test_tables_are_checked(function):
    space = SequenceSpace(2, 2)
    with pytest.raises(ValueError, match=r"log_p must have shape \[4\]; got \[3\]"):
        function(space, torch.zeros(3) - math.log(3))
    with pytest.raises(ValueError, match=r"log_p must have shape \[4\]; got \[1, 4\]"):
        function(space, uniform(space).unsqueeze(0))
    with pytest.raises(ValueError, match="log_p must hold normalised log-probabilities"):
        function(space, torch.zeros(4))


@pytest.mark.unchecked
def test_numbers_are_checked():
    space = SequenceSpace(2, 2)
    for function in (hankel_ranks, state_counts):
        with pytest.raises(ValueError, match=r"log_error must be a finite number of at least 0; got -1\.0"):
            function(space, uniform(space), log_error=-1.0)
    with pytest.raises(ValueError, match="n_states must be an integer of at least 1; got 0"):
        least_gap(space, uniform(space), n_states=0)
    with pytest.raises(ValueError, match=r"order must be in 0\.\.1"):
        conditional_mutual_information(space, uniform(space), 2)


def test_roundings_of_a_narrow_dtype_are_no_states():
    """Independent tokens: one state throughout, also where the table was rounded to float32."""
    space = SequenceSpace(2, 6)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(6, 2, generator=generator).log_softmax(-1)
    log_p = tokens[torch.arange(6), space.tokens()].sum(-1).log_softmax(-1)
    assert log_p.dtype == torch.float32
    assert hankel_ranks(space, log_p).ranks.tolist() == state_counts(space, log_p).tolist() == [1] * 6


def test_any_number_of_states_may_be_asked_for():
    space = SequenceSpace(2, 2)
    assert least_gap(space, torch.tensor([0.5, 0.0, 0.0, 0.5]).log(), n_states=10**400).item() == 0.0
