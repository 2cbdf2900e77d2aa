"""The world of reviews, against loops that write every review word by word."""

import itertools
import math

import pytest
import torch

from exo_toy.policies import GRUPolicy
from exo_toy.reviews import OPENINGS, WORDS, Opening, ReviewWorld, Role, Word
from tests.tolerances import assert_close

SHARES = {
    "plain": {"END": 0.20, "FILLER": 0.25, "NEGATION": 0.12, "INTENSIFIER": 0.13},
    "negated": {"END": 0.02, "FILLER": 0.10, "NEGATION": 0.02, "INTENSIFIER": 0.26},
    "intensified": {"END": 0.02, "FILLER": 0.06, "NEGATION": 0.02, "INTENSIFIER": 0.05},
}


def word_probability(word: Word, words, sentiment: int, negated: bool, intensified: bool, clarity: float) -> float:
    shares = SHARES["intensified" if intensified else "negated" if negated else "plain"]
    if word.role is not Role.SENTIMENT:
        return shares[word.role.name] / sum(other.role is word.role for other in words)
    sign = sentiment * (-1) ** negated * clarity * (2 if intensified else 1)
    total = sum(math.exp(sign * other.polarity) for other in words if other.role is Role.SENTIMENT)
    return (1 - sum(shares.values())) * math.exp(sign * word.polarity) / total


def likelihood(world: ReviewWorld, tokens, opening: Opening, sentiment: int) -> float:
    """P(review | opening, sentiment), reading from left to right."""
    negated, intensified, p = opening.negated, opening.intensified, 1.0
    for token in tokens:
        word = world.words[token]
        p *= word_probability(word, world.words, sentiment, negated, intensified, world.clarity)
        if word.role is Role.END:
            break
        negated = (not negated if word.role is Role.NEGATION else negated) and word.role in (
            Role.NEGATION,
            Role.INTENSIFIER,
        )
        intensified = word.role is Role.INTENSIFIER
    return p


WORLDS = {
    "default words": ReviewWorld(length=3),
    "end in the middle, two fillers": ReviewWorld(
        length=4,
        clarity=0.9,
        words=(
            Word("a", Role.FILLER),
            Word("fine", Role.SENTIMENT, 0.5),
            Word("!", Role.END),
            Word("b", Role.FILLER),
            Word("no", Role.NEGATION),
            Word("so", Role.INTENSIFIER),
            Word("dull", Role.SENTIMENT, -1.5),
        ),
        openings=(Opening("x", -0.3, negated=True, intensified=True), Opening("y", 2.0)),
    ),
    "one word": ReviewWorld(length=1),
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_likelihoods_prior_and_reward_are_those_of_the_loops(world):
    reviews = world.space.tokens().tolist()
    loops = [
        [[likelihood(world, review, opening, sentiment) for review in reviews] for sentiment in (1, -1)]
        for opening in world.openings
    ]
    prior = [[1 / (1 + math.exp(-o.log_odds)), 1 / (1 + math.exp(o.log_odds))] for o in world.openings]
    assert_close(world.log_likelihoods().exp(), loops)
    assert_close(world.log_prior().exp(), prior)
    human = [
        [p[0] * plus + p[1] * minus for plus, minus in zip(*pair, strict=True)]
        for pair, p in zip(loops, prior, strict=True)
    ]
    assert_close(world.log_human().exp(), human)
    odds = [
        [math.log(p[0] * plus) - math.log(p[1] * minus) for plus, minus in zip(*pair, strict=True)]
        for pair, p in zip(loops, prior, strict=True)
    ]
    assert_close(world.oracle_reward(), odds)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_people_write_some_review(world):
    assert_close(world.log_likelihoods().logsumexp(-1), torch.zeros(world.n_prompts, 2).tolist())
    assert_close(world.log_human().logsumexp(-1), [0.0] * world.n_prompts)


def test_the_expected_odds_of_the_authors_are_the_prior():
    """E_human[P(+ | x, y)] = P(+ | x), whatever the prompt."""
    world = WORLDS["default words"]
    posterior = world.oracle_reward().sigmoid()
    assert_close((world.log_human().exp() * posterior).sum(-1), world.log_prior()[:, 0].exp().tolist())


def test_negation_turns_what_follows_and_intensifiers_carry_it():
    world = ReviewWorld(length=6)
    reward = dict(zip((opening.text for opening in world.openings), world.oracle_reward(), strict=True))

    def odds(text: str, opening: str = "I saw it:") -> float:
        return reward[opening][world.index(text)].item()

    assert odds("good .") > 0 > odds("bad .")
    assert odds("great .") > odds("good .")
    assert odds("very good .") == pytest.approx(2 * odds("good ."))
    assert odds("not good .") == pytest.approx(-odds("good ."))
    assert odds("not very good .") == pytest.approx(-odds("very good ."))
    assert odds("not not good .") == pytest.approx(odds("good ."))
    assert odds("not film good .") == pytest.approx(odds("good ."))
    assert odds("good .", "It is not") == pytest.approx(odds("not good ."))
    assert odds("good .", "It is very") == pytest.approx(odds("very good ."))
    assert odds("good .", "It is not very") == pytest.approx(odds("not very good ."))
    assert odds("good .", "I came out smiling:") == pytest.approx(odds("good .") + 1.5)


def test_the_reward_is_no_sum_over_tokens():
    world = ReviewWorld(length=3)
    reward = world.oracle_reward()[0]
    a, b, c, d = (reward[world.index(text)] for text in ("not good .", "film good .", "not film .", "film film ."))
    assert abs(a + d - b - c) > 0.5


def test_texts_are_read_back():
    world = WORLDS["end in the middle, two fillers"]
    for i, tokens in enumerate(world.space.tokens()):
        assert world.index(world.text(tokens)) == i


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "length must be an integer of at least 1; got 0"),
        ({"clarity": 0.0}, "clarity must be a finite number above 0; got 0.0"),
        ({"words": WORDS[1:]}, "exactly one END"),
        ({"words": (*WORDS, WORDS[0])}, "exactly one END"),
        ({"words": WORDS[:6]}, "both signs"),
        ({"openings": ()}, "at least one prompt"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        ReviewWorld(**change)


@pytest.mark.unchecked
@pytest.mark.parametrize(("text", "message"), [("good films", r"\['films'\]"), ("good " * 7, "at most 6 words; got 7")])
def test_texts_that_are_no_reviews(text, message):
    with pytest.raises(ValueError, match=message):
        ReviewWorld(length=6).index(text)


def test_every_default_opening_differs():
    human = ReviewWorld(length=4).log_human()
    assert len(OPENINGS) == len(human)
    for a, b in itertools.combinations(human, 2):
        assert (a - b).abs().max() > 0.1


@pytest.mark.parametrize("length", [3, 5])
def test_reviews_of_equal_evidence_have_equal_rewards(length):
    """What differs by rounding alone would not be a tie for best-of-n."""
    reward = ReviewWorld(length=length).oracle_reward()
    for row in reward:
        assert len(row.unique()) == len(row.round(decimals=9).unique())


@pytest.mark.slow
def test_the_large_world_is_evaluated_exactly():
    """Length 8: 6.7 million completions of each opening, tables of 377 MB."""
    world, small = ReviewWorld(length=8), ReviewWorld(length=4)
    reward, log_human = world.oracle_reward(), world.log_human()
    assert reward.shape == (7, 6_725_601)
    assert log_human.logsumexp(-1).abs().max() < 1e-12
    # A review that ends early is the same review.
    for text in ("not very good .", "film .", "not not bad ."):
        at, there = small.index(text), world.index(text)
        torch.testing.assert_close(small.oracle_reward()[:, at], reward[:, there], rtol=0, atol=1e-12)
        torch.testing.assert_close(small.log_human()[:, at], log_human[:, there], rtol=0, atol=1e-12)
    policy = GRUPolicy(world.space, 4, n_prompts=7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_pi = policy.log_probs()
    assert log_pi.logsumexp(-1).abs().max() < 1e-10
    chosen = torch.randint(world.space.size, (7, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        by_tokens = policy.log_prob(world.space.tokens(chosen))
    torch.testing.assert_close(log_pi.gather(-1, chosen), by_tokens, rtol=1e-12, atol=0)
