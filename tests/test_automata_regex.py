"""Regular expressions against Python's ``re`` on all short strings, fewest states, syntax, errors."""

import itertools
import math
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exo_toy.automata import equivalent, from_keywords, from_regex, minimise, once
from tests import automata_oracles as oracles

ABC = "abc"


def texts(alphabet: str = ABC, longest: int = 5) -> list[str]:
    """All texts of at most so many characters, the shorter first."""
    return ["".join(text) for n in range(longest + 1) for text in itertools.product(alphabet, repeat=n)]


def rewards_of(automaton, texts: list[str], vocabulary=ABC) -> list[float]:
    place = {token: number for number, token in enumerate(vocabulary)}
    longest = max(map(len, texts))
    tokens = torch.tensor([[place[char] for char in text] + [-1] * (longest - len(text)) for text in texts])
    return automaton.reward(tokens, torch.tensor([len(text) for text in texts])).tolist()


PATTERNS = [
    "", "a", "abc", "a|b", "a|bc|", "a*", "a+b?", "(ab)*", "(?:ab|c)+", "a{2}", "a{2,}", "a{,2}", "a{1,3}b",
    "(a|b){2,3}c", ".", ".*", "a.c", ".*a..", "[ab]c", "[^a]", "[^ab]*", "[a-b]+", "[ab]*abb", "(a*)*", "(a*b*)*",
    "(a?){2,3}", "((a|b)c)*", "(a|ab)(c|bca?)", "a{0}", "(){3}a", "[^a-c]", "a[^a-c]|b", r"\w", r"[\w]b", r"\W|\d|a",
    "(a|b*c)*a",
]  # fmt: skip


def test_oracles_by_hand():
    ab = re.compile("ab|a+")
    assert oracles.greedy_count(ab, "aab") == 2
    assert oracles.greedy_count(re.compile("aa"), "aaaaa") == 2
    assert oracles.greedy_count(re.compile("a*"), "bab") == 1
    assert oracles.greatest_count(re.compile("aa"), "aaaaa") == 2
    assert oracles.greatest_count(re.compile("aba|b"), "abab") == 2
    assert oracles.greatest_count(re.compile("a*"), "") == 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_matches_are_those_of_re(pattern):
    compiled = re.compile(pattern, re.DOTALL)
    strings = texts()
    full = from_regex(pattern, ABC, reward=2.0)
    assert rewards_of(full, strings) == [2.0 * bool(compiled.fullmatch(text)) for text in strings]
    search = from_regex(pattern, ABC, match="search")
    assert rewards_of(search, strings) == [float(bool(compiled.search(text))) for text in strings]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_disjoint_occurrences_are_counted(pattern):
    compiled = re.compile(pattern, re.DOTALL)
    strings = texts()
    count = [oracles.greedy_count(compiled, text) for text in strings]
    assert count == [oracles.greatest_count(compiled, text) for text in strings]
    assert rewards_of(from_regex(pattern, ABC, reward=0.5, match="count"), strings) == [0.5 * n for n in count]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_languages_have_the_fewest_states(pattern):
    """As many as there are kinds of prefixes, where a kind is what may follow."""
    compiled = re.compile(pattern, re.DOTALL)

    def reward(string):
        return float(bool(compiled.fullmatch("".join(ABC[token] for token in string))))

    full = from_regex(pattern, ABC)
    kinds = oracles.classes(reward, 3, prefixes=5, suffixes=4, up_to_a_constant=False)
    assert full.n_states == kinds
    assert minimise(full).n_states <= kinds


def patterns() -> st.SearchStrategy[str]:
    """Patterns over abc, every part in a group of its own."""
    atoms = st.sampled_from(["a", "b", "c", ".", "[ab]", "[^b]", ""])

    def extend(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        quantifier = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{2,}", "{,2}"])
        return (
            st.tuples(parts, parts).map("".join)
            | st.tuples(parts, parts).map(lambda pair: f"({pair[0]}|{pair[1]})")
            | st.tuples(parts, quantifier).map(lambda pair: f"(?:{pair[0]}){pair[1]}")
        )

    return st.recursive(atoms, extend, max_leaves=6)


@given(pattern=patterns())
def test_drawn_patterns(pattern):
    compiled = re.compile(pattern, re.DOTALL)
    strings = texts(longest=4)
    found = {match: rewards_of(from_regex(pattern, ABC, match=match), strings) for match in ("full", "search", "count")}
    assert found["full"] == [float(bool(compiled.fullmatch(text))) for text in strings]
    assert found["search"] == [float(bool(compiled.search(text))) for text in strings]
    assert found["count"] == [float(oracles.greatest_count(compiled, text)) for text in strings]


def test_what_does_not_match_can_be_allowed_alone():
    """-inf for the complement: a pattern that forbids."""
    forbid = from_regex("(ab)*", ABC, reward=-math.inf)
    assert rewards_of(forbid, ["", "ab", "aba", "c"]) == [-math.inf, -math.inf, 0.0, 0.0]
    forbid = from_regex("bb", ABC, reward=-math.inf, match="search")
    assert rewards_of(forbid, ["", "bab", "abbc"]) == [0.0, 0.0, -math.inf]


def test_rewards_are_earned_where_the_match_ends():
    full = from_regex("ab", ABC)
    assert full.rewards.abs().max() == 0
    assert sorted(full.final.tolist()) == [0.0, 0.0, 0.0, 1.0]
    for match in ("search", "count"):
        earned = from_regex("ab", ABC, match=match)
        assert earned.final.abs().max() == 0
        tokens = torch.tensor([0, 0, 1, 0, 1])
        along = earned.rewards[earned.states(tokens)[:-1], tokens]
        assert along.tolist() == [0.0, 0.0, 1.0, 0.0, float(match == "count")]


def test_literal_patterns_are_keywords():
    """A phrase that does not overlap itself is counted alike, and planted alike."""
    assert equivalent(from_regex("abc", ABC, match="count"), from_keywords({"abc": 1.0}, ABC))
    assert not equivalent(from_regex("aa", ABC, match="count"), from_keywords({"aa": 1.0}, ABC))
    for phrase in ("abc", "aab", "aa"):
        assert equivalent(from_regex(phrase, ABC, match="search", reward=3.0), once(phrase, ABC, reward=3.0))


@pytest.mark.parametrize("match", ["full", "search", "count"])
def test_the_eos_is_not_seen(match):
    """What is matched is the text before it, which the dot and complements do not take it for."""
    for pattern in ("a.*", "[^a]+b?", "(ab|.)*", ".{2}"):
        plain = from_regex(pattern, ABC, match=match)
        ended = from_regex(pattern, "a$bc", match=match, eos=1)
        strings = texts(longest=4)
        for end in ("", "$"):
            assert rewards_of(ended, [text + end for text in strings], "a$bc") == rewards_of(plain, strings)
        assert (ended.transitions[:, 1] == torch.arange(ended.n_states)).all()


WORDS = ["the", "movie", "film", "very", "good", ".", "was", "don't", "C++", "[x]"]


@pytest.mark.parametrize(
    ("pattern", "letters"),
    [
        ("the movie", "tm"),
        ("the (movie|film)", "t(m|f)"),
        ("very* good", "v*g"),
        ("the  very{2,} [movie film]+", "tv{2,}[mf]+"),
        (r"[^the very] \.?", r"[^tv]\.?"),
        (r"(?: don't ){2}", "(?:d){2}"),
        (r"C\+\+ +", "C+"),
        (r"\[x] [very [x\]]", "x[vx]"),
        ("", ""),
    ],
)
def test_patterns_of_words_are_those_of_characters(pattern, letters):
    alphabet = "tmfvg.wdCx"
    for match in ("full", "search", "count"):
        by_words = from_regex(pattern, WORDS, words=True, match=match)
        by_letters = from_regex(letters, alphabet, match=match)
        assert by_words.transitions.tolist() == by_letters.transitions.tolist()
        assert by_words.rewards.tolist() == by_letters.rewards.tolist()
        assert by_words.final.tolist() == by_letters.final.tolist()


def test_words_are_whole_tokens():
    for pattern in ("goo d", r"good\.", "verygood", "[the-was]", r"\d"):
        with pytest.raises(ValueError, match=r"pattern must be a regular expression; got"):
            from_regex(pattern, WORDS, words=True)


SYMBOLS = "aZ5_ -]^.\\\n\té("


@pytest.mark.parametrize(
    "pattern",
    [r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"[\d\s]", r"[^\w]", r"\.", ".", r"\\", r"\-", "-", "]", r"[\]^]", "[.]",
     r"[a\-Z]", "[-a]", "[a-]", r"[\n\t]", r"\n", r"\(", "é", "[Z-a]", r"[^\s\S]", "[5-_]", r"[(.]", r"[\^a]"],
)  # fmt: skip
def test_symbols_escapes_and_classes_are_those_of_re(pattern):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        compiled = re.compile(pattern, re.DOTALL)
    found = rewards_of(from_regex(pattern, SYMBOLS), list(SYMBOLS), SYMBOLS)
    assert found == [float(bool(compiled.fullmatch(symbol))) for symbol in SYMBOLS]


def test_tokens_of_several_characters_are_met_by_dots_and_complements():
    vocabulary = ["a", "<s>", "b"]
    for pattern, expected in ((".", [1, 1, 1]), ("[^a]", [0, 1, 1]), ("[a-z]", [1, 0, 1]), (r"\w", [1, 0, 1])):
        assert from_regex(pattern, vocabulary).reward(torch.arange(3).unsqueeze(-1)).tolist() == expected


def test_the_automaton_knows_large_vocabularies_by_classes():
    vocabulary = [f"word{number}" for number in range(5000)]
    automaton = from_regex("word7 . [word1 word2]+", vocabulary, words=True)
    assert automaton.transitions.shape == (5, 5000)
    assert automaton.reward(torch.tensor([[7, 4999, 1, 2], [7, 0, 3, 1]])).tolist() == [1.0, 0.0]


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("d", r"got 'd' just before, which is no token that a pattern can speak of at place 1 of 'd'"),
        ("a)", r"a '\)' that closes nothing at place 1 of 'a\)'"),
        ("(a", r"a group that is not closed at place 2"),
        ("(?=a)", r"a group other than \( \) and \(\?: \)"),
        ("(?i)a", r"a group other than"),
        ("*a", r"a quantifier of nothing at place 0"),
        ("a|+", r"a quantifier of nothing at place 2"),
        ("({2})", r"a quantifier of nothing"),
        ("a**", r"a quantifier behind a quantifier"),
        ("a+?", r"a quantifier behind a quantifier"),
        ("a{2}{3}", r"a quantifier behind a quantifier"),
        ("^a", r"an anchor"),
        ("a$", r"an anchor"),
        ("a{", r"a '\{' that begins none of"),
        ("a{}", r"a '\{' that begins none of"),
        ("a{,}", r"a '\{' that begins none of"),
        ("a{x}", r"a '\{' that begins none of"),
        ("a{100000}", r"a '\{' that begins none of.*99999"),
        ("a{3,2}", r"a greatest count below the least"),
        ("[]", r"a class of nothing"),
        ("[^]", r"a class of nothing"),
        ("[a", r"a class that is not closed"),
        ("[a-", r"'-' just before"),
        ("[b-a]", r"the end of a range that does not run"),
        (r"[\w-c]", r"the end of a range that does not run"),
        (r"[a-\w]", r"the end of a range that does not run"),
        ("a\\", r"an escape that means nothing here at place 2"),
        (r"\b", r"an escape that means nothing here"),
        (r"(a)\1", r"an escape that means nothing here"),
        (r"\é", r"an escape that means nothing here"),
        ("(" * 21 + "a" + ")" * 21, r"groups nested more than 20 deep"),
        ("((a{1000}){1000})", r"at most 100000 states"),
        ("(a|b)*a(a|b){20}", r"max_states must be at least the number of states reached; got 10000"),
    ],
)
def test_bad_patterns_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        from_regex(pattern, ABC)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"match": "prefix"}, r'match must be "full", "search" or "count"; got \'prefix\''),
        ({"reward": math.nan}, r"reward must be finite.*got nan"),
        ({"reward": math.inf}, r"reward must be finite.*got inf"),
        ({"eos": 3}, r"eos must be None or a token in 0..2; got 3"),
        ({"eos": -1}, r"eos must be an integer of at least 0"),
        ({"eos": 0}, r"got 'a' just before, which is no token that a pattern can speak of"),
        ({"vocabulary": "aab"}, r"vocabulary must hold distinct strings.*got 'a' at place 1"),
        ({"max_states": 0}, r"max_states must be an integer of at least 1"),
        ({"pattern": None}, r"pattern must be a string; got None"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        from_regex(**{"pattern": "a", "vocabulary": ABC, **settings})


def test_the_most_that_is_allowed_parses():
    assert from_regex("(" * 20 + "a" + ")" * 20, ABC).n_states == 3
    assert from_regex("(){99999}a", ABC).n_states == 3
    assert from_regex("((){99999}|a){2}", ABC).n_states == 4
