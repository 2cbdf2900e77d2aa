"""References fitted to a text and their optimal policies: against counts by hand, plain loops and enumeration."""

import io
import itertools
import json
import math
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exo_toy import divergences, targets, text
from exo_toy.automata import OptimalPolicy
from exo_toy.spaces import SequenceSpace
from exo_toy.text import reading
from tests.tolerances import assert_close

SMOOTHINGS = {
    "witten_bell": text.witten_bell,
    "absolute": text.absolute_discounting,
    "add_delta": partial(text.add_delta, delta=0.5),
}


def smoothed(tokens: list[int], context: tuple[int, ...], vocab_size: int, name: str) -> list[float]:
    """Probabilities after a context, by loops over the text and recursion over orders."""
    k = len(context)
    runs = Counter(tuple(tokens[i - k : i + 1]) for i in range(k, len(tokens)))
    counts = [runs[(*context, a)] for a in range(vocab_size)]
    total, kinds = sum(counts), sum(n > 0 for n in counts)
    if name == "add_delta":
        return [(n + 0.5) / (total + 0.5 * vocab_size) for n in counts]
    lower = smoothed(tokens, context[1:], vocab_size, name) if k else [1 / vocab_size] * vocab_size
    if not total:
        return lower
    if name == "witten_bell":
        return [(n + kinds * p) / (total + kinds) for n, p in zip(counts, lower, strict=True)]
    ones, twos = (sum(n == i for n in runs.values()) for i in (1, 2))
    discount = ones / (ones + 2 * twos) if ones else 0.5
    return [(max(n - discount, 0) + discount * kinds * p) / total for n, p in zip(counts, lower, strict=True)]


def test_loops_on_a_case_by_hand():
    # aab: after a come a and b, once each; of single tokens a twice, b once.
    assert smoothed([0, 0, 1], (), 2, "witten_bell") == [3 / 5, 2 / 5]
    assert smoothed([0, 0, 1], (0,), 2, "witten_bell") == [2.2 / 4, 1.8 / 4]
    # D = 1/3: one of the two counts is 1, one 2.
    assert smoothed([0, 0, 1], (), 2, "absolute") == pytest.approx([(5 / 3 + 1 / 3) / 3, (2 / 3 + 1 / 3) / 3])
    assert smoothed([0, 0, 1], (1,), 2, "add_delta") == [0.5, 0.5]


@pytest.mark.parametrize("name", SMOOTHINGS)
@given(data=st.data())
def test_fit_equals_loops_however_it_is_cut(name, data):
    vocab_size, order = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    tokens = data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=12))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4)))
    borders = [0, *cuts, len(tokens)]
    cut = [torch.tensor(tokens[i:j], dtype=torch.int64) for i, j in itertools.pairwise(borders)]
    space = SequenceSpace(vocab_size, order + 1)
    model = text.fit_kgram(iter(cut), space, order=order, smoothing=SMOOTHINGS[name])
    contexts = [[()]]
    for _ in range(order):
        contexts.append([(*context, a) for context in contexts[-1] for a in range(vocab_size)])
    for t in range(order + 1):
        wanted = [smoothed(tokens, context, vocab_size, name) for context in contexts[t]]
        assert_close(model.table(t)[0].exp(), wanted)
    # The mean of minus log p, by the same loops.
    counts = text.kgram_counts(torch.tensor(tokens), vocab_size, order=order)
    wanted = -sum(
        math.log(smoothed(tokens, tuple(tokens[max(i - order, 0) : i]), vocab_size, name)[tokens[i]])
        for i in range(len(tokens))
    )
    assert text.fitting.nats_per_token(model, counts) == pytest.approx(wanted / len(tokens), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("tokens", "space", "order", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), SequenceSpace(2, 3), 0, "got none"),
        (torch.tensor([0, 2]), SequenceSpace(2, 3), 0, "tokens must be in 0..1; got 2"),
        (torch.tensor([0, 1]), SequenceSpace(2, 3), 3, "order must be in 0..2"),
        (torch.tensor([0, 1]), SequenceSpace(2, 3, eos=0), 1, "space must have no eos"),
        (torch.tensor([0, 1]), SequenceSpace(1000, 30), 5, "tables of order 5 over 1000 tokens would take"),
    ],
)
def test_fit_refuses(tokens, space, order, message):
    with pytest.raises(ValueError, match=message):
        text.fit_kgram(tokens, space, order=order)


@given(st.text(st.sampled_from("ab_9 \n.,-é'日"), max_size=30), st.lists(st.integers(0, 30), max_size=4))
def test_words_do_not_depend_on_the_cuts(content, cuts):
    borders = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    cut = [content[i:j] for i, j in itertools.pairwise(borders)]
    whole = [word for piece in text.words([content]) for word in piece]
    assert [word for piece in text.words(cut) for word in piece] == whole
    assert "".join(whole) == "".join(content.split())


def test_long_runs_are_cut_whatever_the_pieces():
    run = "x" * 150
    for size in (1, 7, 64, 65, 150):
        cut = [run[i : i + size] for i in range(0, 150, size)]
        assert [len(word) for piece in text.words(cut) for word in piece] == [64, 64, 22]


def test_pieces_read_marks_line_ends_and_letters_that_are_cut(monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 1)
    for raw, encoding in (
        ("é\r\nb\rc\n".encode(), None),
        ("é\nb\nc\n".encode("utf-8-sig"), None),
        ("é\r\nb\nc\n".encode("utf-16"), None),
        ("é\nb\nc\n".encode("utf-32"), None),
        ("é\nb\r\nc\n".encode("latin-1"), "latin-1"),
        ("\ufeffé\nb\r\nc\n".encode("utf-16-le"), "utf-16-le"),
    ):
        read = list(text.pieces(io.BytesIO(raw), "file", encoding=encoding))
        assert "".join(read) == "é\nb\nc\n" and "" not in read
    assert list(text.pieces(io.BytesIO(b""), "file")) == []


@pytest.mark.parametrize(
    ("raw", "encoding", "message"),
    [
        (b"abc\xffdef", None, r"file: is no utf-8 text \(byte 0xff at offset 3\): name its --encoding"),
        (b"abc\xc3", None, r"byte 0xc3 at offset 3"),
        (b"ab\0c", None, "file: holds NUL characters: a binary file"),
        (b"abc", "klingon", "encoding must be one that Python knows.*'klingon'"),
        (b"abc", "base64", "encoding must be one that Python knows.*'base64'"),
        (b"ab\xff", "ascii", r"is no ascii text \(byte 0xff at offset 2\)"),
    ],
)
@pytest.mark.parametrize("chunk", [2, 2**20])
def test_pieces_refuse(raw, encoding, message, chunk, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    with pytest.raises(text.TextError, match=message):
        list(text.pieces(io.BytesIO(raw), "file", encoding=encoding))


def test_named_encoding_takes_any_bytes():
    raw = bytes(set(range(256)) - {10, 13})
    assert "".join(text.pieces(io.BytesIO(raw), "file", encoding="latin-1")) == raw.decode("latin-1")


def test_vocabulary_keeps_the_most_frequent_and_round_trips():
    vocabulary, n_different = text.Vocabulary.of(["cab", "bad"], size=3, joined_by="")
    assert (vocabulary.tokens, n_different, vocabulary.has_unknown) == (("a", "b", "<unk>"), 4, True)
    assert vocabulary.numbers("abcd").tolist() == [0, 1, 2, 2]
    assert vocabulary.text(torch.tensor([1, 0, 2])) == "ba<unk>"
    vocabulary, _ = text.Vocabulary.of(["cab", "bad"], size=4, joined_by=" ")
    assert (vocabulary.tokens, vocabulary.has_unknown) == (("a", "b", "c", "d"), False)
    assert vocabulary.text(vocabulary.numbers("dab")) == "d a b"


def test_words_beyond_a_million_cost_only_rare_ones(monkeypatch):
    monkeypatch.setattr(reading, "MOST_WORDS", 8)
    rare = [[f"rare{i}{j}" for j in range(5)] + ["often"] for i in range(20)]
    vocabulary, _ = text.Vocabulary.of(rare, size=2, joined_by=" ")
    assert vocabulary.tokens == ("often", "<unk>")


def write(path, content: str | bytes):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_keywords_are_read(tmp_path):
    path = write(tmp_path / "list", "\ufeffwhale\r\n\r\n2.5\twhite whale\n-inf\tshark\n the \n")
    assert text.read_keywords(path) == [
        (1, "whale", 1.0), (3, "white whale", 2.5), (4, "shark", -math.inf), (5, " the ", 1.0)]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "list: holds no keyword"),
        (" \n\n", "list: holds no keyword"),
        ("whale\nmuch\tshark", "list:2: a weight must be a number, or -inf; got 'much'"),
        ("nan\tshark", "list:1: a weight"),
        ("inf\tshark", "list:1: a weight"),
        ("\tshark", "list:1: a weight must be a number, or -inf; got ''"),
        ("2\t", "list:1: no keyword behind the tab"),
        (b"\xff\xff\xff", "is no utf-8 text"),
        (b"x" * (2**20 + 1), "at most 1048576 bytes"),
    ],
)
def test_bad_lists_of_keywords(tmp_path, content, message):
    with pytest.raises(text.TextError, match=message):
        text.read_keywords(write(tmp_path / "list", content))


def test_keywords_become_an_automaton_of_tokens():
    vocabulary = text.Vocabulary(("the", "white", "whale", "<unk>"), " ")
    entries = [
        text.Keyword(1, "white  whale", 2.0),
        text.Keyword(2, "white shark", 1.0),
        text.Keyword(3, "the the the", 1.0),
        text.Keyword(4, "the", -1.0),
    ]
    automaton, left_out = text.keyword_automaton(entries, vocabulary, SequenceSpace(4, 2))
    assert automaton.reward(torch.tensor([[1, 2], [0, 3], [2, 1]])).tolist() == [2.0, -1.0, 0.0]
    assert [(entry.keyword.line, entry.reason) for entry in left_out] == [
        (2, "'shark' is not among the most frequent in the text"), (3, "has 3 tokens, a completion 2")]  # fmt: skip
    for more, message in (
        ([text.Keyword(5, "white whale", 1.0)], "line 5 of the keywords: 'white whale' is there already, in line 1"),
        ([text.Keyword(5, "   ", 1.0)], "line 5 of the keywords: '   ' holds no word"),
    ):
        with pytest.raises(text.TextError, match=message):
            text.keyword_automaton([*entries, *more], vocabulary, SequenceSpace(4, 2))
    with pytest.raises(text.TextError, match="none of 1 keywords can occur: 'white shark': 'shark' is not"):
        text.keyword_automaton(entries[1:2], vocabulary, SequenceSpace(4, 2))


@pytest.fixture
def files(tmp_path):
    """A text of three letters, and keywords for it."""
    return write(tmp_path / "text", "abacabcab\nabba" * 5), write(tmp_path / "list", "ab\n2\tbc\n-1\tca\n")


@pytest.mark.parametrize(("order", "length"), [(0, 1), (0, 4), (1, 5), (2, 5)])
def test_numbers_are_those_of_enumeration(files, order, length):
    settings = text.Settings(beta=0.7, length=length, order=order, samples=3)
    vocabulary, model, facts = text.fit_file(files[0], settings)
    assert (facts["tokens"], facts["vocabulary"], facts["unknown_share"]) == (70, 4, 0.0)
    if length == 1:
        with pytest.raises(text.TextError, match="none of 3 keywords can occur"):
            text.run(*files, settings)
        return
    found = text.run(*files, settings)
    automaton, _ = text.keyword_automaton(text.read_keywords(files[1]), vocabulary, model.space)
    tokens = model.space.tokens()
    strings = [vocabulary.text(row) for row in tokens]
    reward = torch.tensor([s.count("ab") + 2 * s.count("bc") - s.count("ca") for s in strings]).double()
    log_ref = model.log_prob(tokens)[0]
    log_star, log_z = targets.optimal_policy(log_ref, reward, beta=0.7)
    closest = OptimalPolicy(model, automaton, beta=0.7).closest_kgram(order, homogeneous=True).log_prob(tokens)[0]
    assert found["log_z"] == pytest.approx(log_z.item(), abs=1e-12)
    for name, log_p in (("reference", log_ref), ("optimal", log_star), ("closest_kgram", closest)):
        mean = (log_p.exp() * reward).sum()
        wanted = {
            "mean_reward": mean,
            "variance": (log_p.exp() * (reward - mean).square()).sum(),
            "entropy": divergences.entropy(log_p),
            "kl_to_reference": divergences.kl_divergence(log_p, log_ref),
            "kl_to_optimal": divergences.kl_divergence(log_p, log_star),
            "kl_from_optimal": divergences.kl_divergence(log_star, log_p),
        }
        assert found[name] == {key: pytest.approx(value.item(), abs=1e-11) for key, value in wanted.items()}
    shown = found["candidates"]
    assert shown["log_z"]["exact"] == pytest.approx(found["log_z"], abs=1e-12)
    assert shown["exo_rw"]["exact"] == pytest.approx(found["closest_kgram"]["kl_to_optimal"], abs=1e-11)
    assert all(x["low"] <= x["value"] <= x["high"] for x in shown.values())
    # Nothing that shares a table over positions is nearer than the nearest, the reference among them.
    assert found["closest_kgram"]["kl_from_optimal"] <= found["reference"]["kl_from_optimal"] + 1e-12
    by_value = {value: log_p for value, *log_p in zip(*found["distribution"].values(), strict=True)}
    for value, (p, q) in by_value.items():
        at = reward == value
        assert p == pytest.approx(log_ref[at].exp().sum().item(), rel=1e-10, abs=1e-15)
        assert q == pytest.approx(log_star[at].exp().sum().item(), rel=1e-10, abs=1e-15)
    for samples in found["samples"].values():
        assert len(samples) == 3
        for sample in samples:
            assert sample["reward"] == reward[strings.index(sample["text"])]
    json.dumps(found, allow_nan=False)
    assert found == text.run(*files, settings)


def test_forbidden_keywords_and_fractions(files):
    list_of_keywords = write(files[1], "-inf\tab\n0.5\tc\n")
    found = text.run(files[0], list_of_keywords, text.Settings(beta=1.0, length=4, samples=9))
    assert found["reference"]["mean_reward"] == "-inf" and found["reference"]["kl_to_optimal"] == "inf"
    assert found["distribution"] is None and found["no_distribution"] == "the weights are no integers"
    assert not any("ab" in sample["text"] for sample in found["samples"]["optimal"])
    assert any("no integers" in line for line in text.lines(found))
    write(files[1], "-inf\ta\n-inf\tb\n")
    found = text.run(*files, text.Settings(beta=1.0, length=30, samples=1))
    assert found["candidates"] is None
    assert any("nothing but forbidden ones" in line for line in text.lines(found))
    everything = write(files[1], "-inf\ta\n-inf\tb\n-inf\tc\n-inf\t \n")
    write(files[0], "abc abc")
    with pytest.raises(text.TextError, match="automaton must allow a completion"):
        text.run(files[0], everything, text.Settings(beta=1.0, length=4))


def test_a_distribution_that_would_take_too_much_is_left_out_and_said(files):
    write(files[1], "1000000\tab\n")
    found = text.run(*files, text.Settings(beta=1e6, length=9))
    assert found["distribution"] is None
    assert "would take" in found["no_distribution"]


@pytest.mark.parametrize("by_words", [False, True])
@pytest.mark.parametrize("content", ["a", "aaaa", "one line without an end", "a\r\nb\r\n", "日本語 日本語"])
def test_small_texts(tmp_path, content, by_words):
    path, keywords = write(tmp_path / "text", content), write(tmp_path / "list", content.split()[0][: 1 + 9 * by_words])
    found = text.run(path, keywords, text.Settings(beta=1.0, length=5, by_words=by_words))
    assert found["text"]["tokens"] == len(content.split() if by_words else content.replace("\r", ""))
    assert math.isfinite(found["log_z"]) and found["log_z"] > 0


def test_texts_without_a_token(tmp_path):
    keywords = write(tmp_path / "list", "a")
    for content, by_words, message in (("", False, "holds no character"), (" \n ", True, "holds no word")):
        with pytest.raises(text.TextError, match=message):
            text.run(write(tmp_path / "text", content), keywords, text.Settings(beta=1.0, length=5, by_words=by_words))


def test_a_vocabulary_that_is_cut(tmp_path):
    path, keywords = write(tmp_path / "text", "a a a b b c"), write(tmp_path / "list", "a\nc\n")
    settings = text.Settings(beta=1.0, length=3, by_words=True, vocabulary=2)
    found = text.run(path, keywords, settings)
    assert found["text"] == {
        "tokens": 6, "different_tokens": 3, "vocabulary": 2, "unknown_share": 0.5,
        "nats_per_token": pytest.approx(found["text"]["nats_per_token"])}  # fmt: skip
    assert [entry["keyword"] for entry in found["keywords"]] == ["a"]
    assert [(entry["line"], entry["text"]) for entry in found["left_out"]] == [(2, "c")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 0.0}, "beta must be"),
        ({"length": 0}, "length must be"),
        ({"length": 2}, "order must be in 0..1"),
        ({"order": -1}, "order must be"),
        ({"vocabulary": 1}, "vocabulary must be"),
        ({"samples": 0}, "samples must be"),
        ({"smoothing": "none"}, "smoothing must be one of witten-bell, absolute, add-delta; got 'none'"),
        ({"smoothing": "add-delta"}, "delta goes with"),
        ({"delta": 1.0}, "delta goes with"),
        ({"smoothing": "add-delta", "delta": 0.0}, "delta must be"),
    ],
)
def test_settings_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        text.Settings(**{"beta": 1.0, **given})


@pytest.mark.parametrize("smoothing", ["witten-bell", "absolute", "add-delta"])
def test_settings_name_their_smoothing(files, smoothing):
    delta = 0.5 if smoothing == "add-delta" else None
    settings = text.Settings(beta=1.0, length=4, order=1, smoothing=smoothing, delta=delta)
    vocabulary, model, _ = text.fit_file(files[0], settings)
    tokens = vocabulary.numbers("abacabcab\nabba" * 5).tolist()
    name = smoothing.replace("-", "_")
    assert_close(model.table(1)[0, 2].exp(), smoothed(tokens, (2,), 4, name))


def test_staged_file_is_there_when_complete_and_only_then(tmp_path):
    path = write(tmp_path / "out.json", "old")
    with pytest.raises(KeyboardInterrupt), text.staged(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["out.json"]
    with text.staged(path) as file:
        file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [entry.name for entry in tmp_path.iterdir()] == ["out.json"]
    for bad, message in ((tmp_path, "no folder"), (tmp_path / "none" / "out.json", "cannot be written: No such file")):
        with pytest.raises(text.TextError, match=message), text.staged(bad):
            pass
