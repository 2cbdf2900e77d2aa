"""The audit of a log: what is read and refused, numbers against oracles and exact values, files, figure, command."""

import errno
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exo_toy import audit, cli, plots
from exo_toy.audit import log, measures, report
from exo_toy.divergences import kl_divergence
from exo_toy.estimators import snis_objective
from exo_toy.objectives import alignment_objective
from exo_toy.targets import optimal_policy
from tests import oracles
from tests.tolerances import assert_close

GOOD = {
    "prompt": "p",
    "completions": ["a", "b", "c"],
    "rewards": [0.5, 2, -1.0],
    "policy_logps": [-3.0, -1, -4.5],
    "ref_logps": [-2.0, -2.5, -3.0],
}
SECOND = {"prompt": "q", "completions": ["a", "b"], "rewards": [1, 0]}
BETAS = {"beta_pi": 0.5, "beta_r": 2.0}
SETTINGS = audit.Settings(**BETAS, label_smoothing=0.1)


def read(text: str | bytes) -> list[audit.Record | audit.Problem]:
    raw = text.encode() if isinstance(text, str) else text
    return list(audit.read(io.BufferedReader(io.BytesIO(raw))))


def texts(items) -> list[str]:
    return [item.text("f") for item in items if isinstance(item, audit.Problem)]


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def run(tmp_path: Path, text: str, settings: audit.Settings = SETTINGS) -> tuple[dict, list[dict]]:
    """Summary and the prompts' documents."""
    (tmp_path / "log").write_text(text)
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    audit.run(tmp_path / "log", settings, folder, lambda problem: None)
    documents = (folder / audit.PROMPTS).read_text().splitlines()
    return json.loads((folder / audit.SUMMARY).read_text()), [json.loads(document) for document in documents]


def without(record: dict, *names: str) -> dict:
    return {name: value for name, value in record.items() if name not in names}


def drawn(log_pi: torch.Tensor, reward: torch.Tensor, prompt: str, sharing: list[int]) -> dict:
    """Every completion as often as ``sharing`` says, log-probabilities under a reference of shares 1, 2, .. N."""
    counts = torch.arange(1, len(reward) + 1).double()
    log_ref = (counts / counts.sum()).log()
    index = torch.repeat_interleave(torch.arange(len(reward)), torch.tensor(sharing)).tolist()
    return {
        "prompt": prompt,
        "completions": [str(i) for i in index],
        "rewards": reward[index].tolist(),
        "policy_logps": log_pi[index].tolist(),
        "ref_logps": log_ref[index].tolist(),
    }


# Reading


def test_candidates_and_messages_are_read():
    messages = [{"role": "user", "content": "x"}]
    chat = {**GOOD, "prompt": messages, "completions": ["a", messages, "a"], "step": 3}
    first, second, third = read(lines(GOOD, chat, SECOND))
    assert first == (1, None, "p", [0.5, 2.0, -1.0], [-3.0, -1.0, -4.5], [-2.0, -2.5, -3.0])
    assert (second.line, second.prompt) == (2, json.dumps(messages))
    assert third == (3, None, "q", [1.0, 0.0], None, None)


def test_a_prompt_is_no_number_whatever_it_holds(tmp_path):
    messages = [{"role": "user", "content": math.nan}]
    _, (document,) = run(tmp_path, lines({**GOOD, "prompt": messages}))
    assert document["prompt"] == json.dumps(messages)


def changed(**fields: object) -> str:
    return json.dumps({**GOOD, **fields})


NUMBER = "must be a number of at most 1e+30 in size; is"
NUMBERS = "must be a list of 3 numbers, one per completion; is"
COMPLETIONS = "completions must be a list of at least 2 texts; is"
TEXT = "must be a string or a list of messages; is"
MALFORMED = {
    changed(rewards=["0.5", 2, 3]): f"rewards[0] {NUMBER} '0.5'",
    changed(rewards=[0.5, math.nan, 3]): f"rewards[1] {NUMBER} nan",
    changed(rewards=[0.5, 2, math.inf]): f"rewards[2] {NUMBER} inf",
    changed(policy_logps=[-math.inf, -1, -1]): f"policy_logps[0] {NUMBER} -inf",
    changed(rewards=[0.5, 2, 1]).replace("0.5", "1e999"): f"rewards[0] {NUMBER} inf",
    changed(rewards=[0.5, 2, 10**40]): f"rewards[2] {NUMBER} 10000",
    changed(rewards=[True, 2, 3]): f"rewards[0] {NUMBER} true",
    changed(rewards=[None, 2, 3]): f"rewards[0] {NUMBER} null",
    changed(rewards=[[1], 2, 3]): f"rewards[0] {NUMBER} a list of 1",
    changed(rewards=[1, 2]): f"rewards {NUMBERS} a list of 2",
    changed(rewards=3): f"rewards {NUMBERS} 3",
    changed(rewards=None): f"rewards {NUMBERS} null",
    changed(ref_logps=[-1.0] * 4): f"ref_logps {NUMBERS} a list of 4",
    changed(policy_logps=[1.0, 2.0, 3.0]): "policy_logps[0] must be a log-probability, at most 0; is 1.0",
    json.dumps(without(GOOD, "rewards")): "rewards is missing",
    json.dumps(without(GOOD, "ref_logps")): "ref_logps is missing",
    json.dumps(without(GOOD, "policy_logps")): "policy_logps is missing",
    json.dumps(without(GOOD, "prompt")): "prompt is missing",
    json.dumps(without(GOOD, "completions")): "completions is missing",
    '{"prompt": "p", "chosen": "a", "rejected": "b"}': "completions is missing",
    changed(prompt=3): f"prompt {TEXT} 3",
    changed(prompt=[]): f"prompt {TEXT} a list of 0",
    changed(completions=["a"]): f"{COMPLETIONS} a list of 1",
    changed(completions="abc"): f"{COMPLETIONS} 'abc'",
    changed(completions={}): f"{COMPLETIONS} an object",
    changed(completions=["a", None, "c"]): f"completions[1] {TEXT} null",
    "3": "must be an object; is 3",
    '"text"': "must be an object; is 'text'",
    "null": "must be an object; is null",
    '{"prompt": "cut': "is not JSON: Unterminated string starting at (character 12)",
    '{"a": 1} {}': "is not JSON: Extra data (character 10)",
    "1" * 5000: "is not JSON: Exceeds the limit",
    '{"a": ' + "[" * 200000: "is nested too deeply",
}


@pytest.mark.parametrize(("bad", "reason"), MALFORMED.items(), ids=[reason[:40] for reason in MALFORMED.values()])
def test_what_is_malformed_is_said_and_the_rest_is_read(bad, reason):
    first, problem, last = read(f"{json.dumps(GOOD)}\n\n{bad}\r\n{json.dumps(SECOND)}")
    assert problem.text("f").startswith(f"f:3: {reason}")
    assert (first.line, last.line) == (1, 4)
    # What opens and does not close takes the rest of a list with it.
    if "[[[" not in bad and "cut" not in bad:
        first, problem, last = read(f"[{json.dumps(GOOD)},\n{bad},\n\n{json.dumps(SECOND)}]")
        assert problem.text("f").startswith(f"f:2: element 2: {reason}")
        assert (first.element, last.element, last.line) == (1, 3, 4)


def test_a_line_that_is_no_utf_8_spoils_no_other():
    first, problem, last = read(lines(GOOD).encode() + b'{"prompt": "\xff"}\n' + lines(SECOND).encode())
    assert problem.text("f").startswith("f:2: is not JSON: 'utf-8' codec can't decode byte 0xff in position 12")
    assert (first.line, last.line) == (1, 3)


@pytest.mark.parametrize("text", ["", "\n \n", "[]", " [\n ]\n", "\ufeff", "\ufeff[]"])
def test_nothing_is_read_from_nothing(text):
    assert read(text) == []


def test_byte_order_mark_and_leading_blank_lines():
    (record,) = read("\ufeff\n\n" + lines(GOOD))
    assert record.line == 3
    (record,) = read("\ufeff\n[\n\n" + lines(GOOD) + "]")
    assert (record.line, record.element) == (4, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{0},]", "f:1: element 2: is not JSON: Expecting value"),
        ("[{0},\n,{0}]", "f:2: element 2: is not JSON: Expecting value"),
        ("[{0}]\nx", "f:1: more follows after the end of the list"),
        ("[{0},\n{0}", "f:2: element 2: the file ends before the list does"),
        ('[{0},\n\n{{"prompt": "a]', "f:3: element 2: the file ends before the list does"),
    ],
)
def test_broken_lists(text, message):
    items = read(text.format(json.dumps(GOOD)))
    assert isinstance(items[0], audit.Record)
    (problem,) = texts(items)
    assert problem.startswith(message)


odd_texts = st.text(
    alphabet='a"\\[]{},\n\té\ud83d\ude00'.encode("utf-16", "surrogatepass").decode("utf-16"), max_size=8
)


@given(st.lists(odd_texts, max_size=4), st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 9))
def test_a_list_holds_what_its_lines_hold(prompts, indent, ascii_only, chunk):
    """Whatever strings it has, however it is set, wherever a chunk of it ends."""
    records = [{**GOOD, "prompt": prompt, "other": [{"a": prompt}]} for prompt in prompts]
    before, log.CHUNK = log.CHUNK, chunk
    try:
        listed = read(json.dumps(records, indent=indent, ensure_ascii=ascii_only))
    finally:
        log.CHUNK = before
    assert [item._replace(line=1) for item in listed] == [
        item._replace(line=1, element=item.line) for item in read(lines(*records))
    ]


@pytest.mark.parametrize("as_list", [False, True])
def test_what_is_too_long_is_left_out(monkeypatch, as_list):
    monkeypatch.setattr(log, "LONGEST", 300)
    monkeypatch.setattr(log, "CHUNK", 16)
    records = [GOOD, {**GOOD, "prompt": "x" * 1000}, SECOND]
    first, problem, last = read(json.dumps(records) if as_list else lines(*records))
    assert problem.reason == "is longer than 300 bytes"
    assert (first.prompt, last.prompt) == ("p", "q")
    assert as_list or (problem.line, last.line) == (2, 3)


class Endless(io.RawIOBase):
    """Records without end, which counts what is taken."""

    def __init__(self, piece: bytes, start: bytes = b"") -> None:
        self.piece, self.waiting, self.taken = piece, start, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while len(self.waiting) < len(buffer):
            self.waiting += self.piece
        buffer[:] = self.waiting[: len(buffer)]
        self.waiting = self.waiting[len(buffer) :]
        self.taken += len(buffer)
        return len(buffer)


@pytest.mark.parametrize(("piece", "start"), [(lines(GOOD), ""), (json.dumps(GOOD) + ",", "[")])
def test_a_file_is_read_as_its_records_are_taken(piece, start):
    raw = Endless(piece.encode(), start.encode())
    records = audit.read(io.BufferedReader(raw))
    for count in range(1, 1001):
        assert isinstance(next(records), audit.Record)
        # A buffer of the file and a chunk of a list ahead of what was asked for.
        assert raw.taken <= count * len(piece) + 2 * (log.CHUNK + io.DEFAULT_BUFFER_SIZE)


# Numbers


def test_losses_and_sample_sizes_equal_the_oracles(tmp_path):
    _, (document,) = run(tmp_path, lines(GOOD))
    ratio = [p - r for p, r in zip(GOOD["policy_logps"], GOOD["ref_logps"], strict=True)]
    rewards = GOOD["rewards"]
    best_and_worst = (-1.0, -4.5, -2.5, -3.0)
    wanted = {
        "exo_rw": oracles.exo_rw(ratio, rewards, **BETAS),
        "dpo_rw": oracles.dpo_rw(ratio, rewards, **BETAS),
        "exo_pref": oracles.exo_pref(*best_and_worst, 0.5, 0.1),
        "dpo": oracles.dpo(*best_and_worst, 0.5, 0.0),
    }
    assert document["losses"] == pytest.approx(wanted, rel=1e-12)
    weights = {
        "exo_weights": [math.exp(0.5 * x) for x in ratio],
        "policy": [math.exp(x) for x in ratio],
        "optimal": [math.exp(r / 1.0) for r in rewards],
    }
    assert document["ess"] == pytest.approx(
        {name: sum(w) ** 2 / sum(x * x for x in w) for name, w in weights.items()}, rel=1e-12
    )
    assert (document["line"], document["prompt"], document["k"]) == (1, "p", 3)
    assert document["mean_reward"] == pytest.approx(0.5)


def test_exact_where_the_candidates_are_the_reference(tmp_path):
    """Candidates with multiplicity proportional to the reference: every estimate is the exact number."""
    counts = [1, 2, 3, 4]
    log_ref = (torch.tensor(counts).double() / 10).log()
    log_pi = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64).log()
    reward = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    _, (document,) = run(tmp_path, lines(drawn(log_pi, reward, "p", counts)))
    assert document["k"] == 10
    log_pi_star, log_z = optimal_policy(log_ref, reward, beta=1.0)
    exact = {
        "kl_policy_to_optimal": kl_divergence(log_pi, log_pi_star),
        "kl_optimal_to_policy": kl_divergence(log_pi_star, log_pi),
        "kl_policy_to_reference": kl_divergence(log_pi, log_ref),
        "kl_optimal_to_reference": kl_divergence(log_pi_star, log_ref),
        "objective": alignment_objective(log_pi, log_ref, reward, beta=1.0),
        "expected_reward": (log_pi.exp() * reward).sum(),
        "log_z": log_z,
        "log_mean_ratio": torch.zeros(()),
    }
    assert document["estimates"].keys() == exact.keys()
    for name, value in exact.items():
        entry = document["estimates"][name]
        assert_close(torch.tensor(entry["value"], dtype=torch.float64), value, scale=10.0)


def test_intervals_and_biases_are_those_of_the_estimators(tmp_path):
    _, (document,) = run(tmp_path, lines(GOOD))
    log_ratio = torch.tensor([GOOD["policy_logps"]], dtype=torch.float64) - torch.tensor([GOOD["ref_logps"]])
    estimate = snis_objective(log_ratio, torch.tensor([GOOD["rewards"]], dtype=torch.float64), beta=1.0)
    # 95 % of a normal distribution lie within 1.96 standard deviations.
    half = 1.959963984540054 * estimate.standard_error.item()
    value = estimate.value.item()
    wanted = {"value": value, "low": value - half, "high": value + half, "bias": estimate.bias.item()}
    assert document["estimates"]["objective"] == pytest.approx(wanted, rel=1e-12)


def test_the_order_of_candidates_and_lines_changes_nothing(tmp_path):
    other = {**GOOD, "prompt": "q", "rewards": [1.5, 1.0, 3.0]}
    shuffled = {name: value[::-1] if isinstance(value, list) else value for name, value in GOOD.items()}
    _, (first, second) = run(tmp_path, lines(GOOD, other))
    _, (second_again, first_again) = run(tmp_path, lines(other, shuffled))

    for one, two in ((first, first_again), (second, second_again)):
        assert one.keys() == two.keys()
        assert one["mean_reward"] == pytest.approx(two["mean_reward"], rel=1e-12)
        for group in ("losses", "ess"):
            assert one[group] == pytest.approx(two[group], rel=1e-12)
        for name, estimate in one["estimates"].items():
            assert estimate == pytest.approx(two["estimates"][name], rel=1e-12, abs=1e-15)


def test_ragged_prompts_are_measured_alone_and_kept_in_order(tmp_path, monkeypatch):
    small = {name: value[:2] if isinstance(value, list) else value for name, value in GOOD.items()}
    records = [GOOD, small, SECOND] * 3
    alone = [run(tmp_path, lines(record))[1][0] for record in records]
    for at_once in (1, 5, 10**6):
        monkeypatch.setattr(report, "AT_ONCE", at_once)
        _, together = run(tmp_path, lines(*records))
        assert [document["line"] for document in together] == list(range(1, 10))
        for one, two in zip(alone, together, strict=True):
            assert {**one, "line": 0} == {**two, "line": 0}


@pytest.mark.parametrize(
    ("rewards", "defined"),
    [([2, 0, 1], True), ([2, 2, 1], False), ([1, 2, 1], False), ([1, 1, 1], False)],
)
def test_best_against_worst_needs_one_of_each(tmp_path, rewards, defined):
    summary, (document,) = run(tmp_path, lines({**GOOD, "rewards": rewards}))
    for name in ("dpo", "exo_pref"):
        assert (document["losses"][name] is not None) == defined
        assert (f"losses.{name}" in summary["over_prompts"]) == defined


def test_without_log_probabilities_the_rewards_speak_alone(tmp_path):
    summary, documents = run(tmp_path, json.dumps([without(GOOD, "policy_logps", "ref_logps"), GOOD]))
    first, second = documents
    assert first["estimates"].keys() == {"log_z", "kl_optimal_to_reference"}
    assert first["estimates"]["log_z"] == second["estimates"]["log_z"]
    assert "losses" not in first
    assert (first["element"], second["element"]) == (1, 2)
    assert summary["counts"] == {"malformed": 0, "records": 2, "without_log_probabilities": 1}
    prompts = {name: entry["prompts"] for name, entry in summary["over_prompts"].items()}
    assert (prompts["losses.exo_rw"], prompts["estimates.log_z"]) == (1, 2)


def test_over_prompts(tmp_path):
    records = [{**GOOD, "prompt": str(i), "rewards": [i, 2.0 * i, -1.0]} for i in range(12)]
    summary, documents = run(tmp_path, lines(*records))
    entry = summary["over_prompts"]["estimates.objective"]
    values = [document["estimates"]["objective"]["value"] for document in documents]
    biases = [document["estimates"]["objective"]["bias"] for document in documents]
    assert entry["mean"] == pytest.approx(math.fsum(values) / 12)
    assert entry["bias"] == pytest.approx(math.fsum(biases) / 12)
    assert min(values) < entry["low"] < entry["mean"] < entry["high"] < max(values)
    assert entry["prompts"] == 12
    again, _ = run(tmp_path, lines(*records))
    assert again == summary
    other, _ = run(tmp_path, lines(*records), audit.Settings(**BETAS, label_smoothing=0.1, seed=1))
    moved = other["over_prompts"]["estimates.objective"]
    assert moved["mean"] == entry["mean"] and moved["low"] != entry["low"]
    # Reward 2 i is the highest but for i = 0, where -1 < 0 = 0 leaves two best.
    assert summary["over_prompts"]["losses.dpo"]["prompts"] == 11


def test_one_prompt_has_no_interval_over_prompts(tmp_path):
    summary, _ = run(tmp_path, lines(GOOD))
    assert {entry["low"] for entry in summary["over_prompts"].values()} == {None}


def has_warning(summary: dict, text: str) -> bool:
    return any(text in warning for warning in summary["warnings"])


def test_warnings_tell_whose_draws_the_candidates_are(tmp_path):
    log_pi, reward = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log(), torch.tensor([1.0, 0.0, 2.0])
    from_reference = [drawn(log_pi, reward, str(i), [10, 20, 30]) for i in range(10)]
    from_policy = [drawn(log_pi, reward, str(i), [42, 12, 6]) for i in range(10)]
    summary, _ = run(tmp_path, lines(*from_reference))
    assert summary["warnings"] == []
    summary, _ = run(tmp_path, lines(*from_policy))
    # E under the policy of its ratio to the reference: .7^2 * 6 + .2^2 * 3 + .1^2 * 2.
    assert summary["over_prompts"]["estimates.log_mean_ratio"]["mean"] == pytest.approx(math.log(3.08))
    assert has_warning(summary, "are the candidates the policy's own")


def test_warnings_of_few_samples_and_few_prompts(tmp_path):
    summary, _ = run(tmp_path, lines(GOOD, GOOD))
    assert has_warning(summary, "π_θ/π_ref have an effective sample size below 10 at 2 of 2 prompts")
    assert has_warning(summary, "π*_β/π_ref have an effective sample size below 10 at 2 of 2 prompts")
    assert has_warning(summary, "too narrow for 2 of them")


@pytest.mark.parametrize("beta", [1e-30, 1e30])
def test_the_largest_numbers_stay_finite(tmp_path, beta):
    """Numbers out of a file must not end an audit: json refuses what is not finite."""
    extreme = {**GOOD, "rewards": [1e30, -1e30, 0], "policy_logps": [0, -1e30, -5], "ref_logps": [-1e30, 0, -4]}
    _, (document,) = run(tmp_path, lines(extreme), audit.Settings(beta, beta))
    assert document["losses"]["exo_rw"] >= 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta_pi": 0.0}, "beta_pi must be a finite number above 0; got 0.0"),
        ({"beta_r": math.nan}, "beta_r must be a finite number above 0; got nan"),
        ({"beta_r": 1e31}, "beta_r must be in [1e-30, 1e+30]; got 1e+31"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in (0, 1/2); got 0.5"),
        ({"seed": -1}, "seed must be an integer of at least 0; got -1"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        audit.Settings(**{**BETAS, **fields})


def test_every_number_over_prompts_has_a_name_in_the_table(tmp_path):
    (tmp_path / "log").write_text(lines(GOOD))
    (tmp_path / "out").mkdir()
    found = audit.run(tmp_path / "log", SETTINGS, tmp_path / "out", lambda problem: None)
    _, measured = measures.measure([read(lines(GOOD))[0]], SETTINGS)
    assert found.summary["over_prompts"].keys() == measured.keys() == report.LABELS.keys()
    assert len(found.rows()) == len(report.LABELS)


# Files


def test_nothing_is_left_of_what_fails(tmp_path):
    with pytest.raises(RuntimeError), audit.staged(tmp_path / "out") as folder:
        (folder / audit.SUMMARY).write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(audit.AuditError, match="out: cannot be written: No space left"), audit.staged(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_an_audit_is_replaced_whole_and_other_files_stay(tmp_path):
    output = tmp_path / "out"
    with audit.staged(output) as folder:
        for name in (audit.PROBLEMS, audit.SUMMARY, audit.FIGURES[0]):
            (folder / name).write_text("first")
        assert list(output.iterdir()) == [folder]
    (output / "mine").write_text("kept")
    with pytest.raises(KeyboardInterrupt), audit.staged(output) as folder:
        (folder / audit.SUMMARY).write_text("second")
        raise KeyboardInterrupt
    assert (output / audit.SUMMARY).read_text() == "first"
    with audit.staged(output) as folder:
        (folder / audit.SUMMARY).write_text("third")
    assert {path.name: path.read_text() for path in output.iterdir()} == {audit.SUMMARY: "third", "mine": "kept"}


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "none" / "out"):
        with pytest.raises(audit.AuditError, match=rf"^{output}: cannot be written: "), audit.staged(output):
            pytest.fail("the block must not be entered")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Figure


def table(name: str, n_candidates: int, *, reward: float = 1.0) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    steps = torch.arange(float(n_candidates), dtype=torch.float64).unsqueeze(0)
    return [name], -0.1 * steps, reward * steps


def test_panels_are_all_prompts_and_those_with_the_most_candidates():
    tables = [table(str(n), n) for n in (2, 16, 17, 18, 19, 20, 21, 22, 23)] + [table("flat", 30, reward=0.0)]
    panels = list(plots._panels(tables, beta=2.0))
    assert [panel.title for panel in panels] == ["all 10 prompts", *(f"{n}, K = {n}" for n in range(23, 16, -1))]
    alone = list(plots._panels([table("a", 3)], beta=2.0))
    assert [panel.title for panel in alone] == ["a, K = 3"]
    assert alone[0].log_weights["optimal"][0].equal(torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64))
    # Where some are known, prompts without log ratios are not shown.
    unknown = (["b"], None, torch.arange(40.0, dtype=torch.float64).unsqueeze(0))
    assert [panel.title for panel in plots._panels([table("a", 3), unknown], beta=2.0)] == ["a, K = 3"]
    assert [panel.title for panel in plots._panels([unknown], beta=2.0)] == ["b, K = 40"]


def test_figure_shows_the_estimates_and_is_the_same_again(tmp_path):
    tables = [table("a", 3), table("b", 5)]
    first, second = (tmp_path / name for name in ("first", "second"))
    for folder in (first, second):
        folder.mkdir()
        paths = plots.density_ratios(tables, beta=2.0, folder=folder)
        assert [path.name for path in paths] == list(audit.FIGURES)
    for name in audit.FIGURES:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    figure = plots._draw([next(plots._panels([table("a", 3)], beta=2.0))])
    lines_ = figure.axes[0].get_lines()
    drawn_ratios = [line.get_ydata() for line in lines_ if line.get_linestyle() == "None"]
    weights = [torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, -0.1, -0.2])]
    for ratio, weight in zip(drawn_ratios, weights, strict=True):
        assert_close(torch.as_tensor(ratio), 3 * weight.double().softmax(-1), scale=1e6)


def test_no_figure_without_rewards_that_vary(tmp_path):
    assert plots.density_ratios([table("a", 3, reward=0.0)], beta=1.0, folder=tmp_path) == []
    assert plots.density_ratios([], beta=1.0, folder=tmp_path) == []
    assert list(tmp_path.iterdir()) == []


# Command


def command(*arguments: object) -> int:
    return cli.main(["audit", *map(str, arguments), "--beta-pi", "0.5", "--beta-r", "2"])


@pytest.fixture
def at(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command_writes_everything(at, capsys):
    (at / "run.jsonl").write_text(lines(GOOD, {**GOOD, "prompt": "q"}))
    assert command("run.jsonl") == 0
    out, err = capsys.readouterr()
    assert {path.name for path in at.iterdir()} == {"run.jsonl", "run.jsonl.audit"}
    names = {path.name for path in (at / "run.jsonl.audit").iterdir()}
    assert names == {audit.SUMMARY, audit.PROMPTS, *audit.FIGURES}
    for text in (*names, "EXO-rw", "KL(π_θ‖π*_β)", "E[r] under π_ref", "J_β(π_θ)"):
        assert text in out
    assert "exo-toy: warning: " in err


def test_command_leaves_out_what_is_malformed_and_says_so(at, capsys):
    (at / "run.jsonl").write_text(lines(GOOD) + "{\n" * 30 + lines(SECOND))
    assert command("run.jsonl", "--no-figure", "--output", "out") == 1
    err = capsys.readouterr().err
    assert err.count("is not JSON") == 20
    assert "exo-toy: run.jsonl:2: is not JSON: Expecting property name" in err
    assert "30 malformed records left out, see out/problems.txt" in err
    problems = (at / "out" / audit.PROBLEMS).read_text().splitlines()
    assert [problem.split(":")[1] for problem in problems] == [str(number) for number in range(2, 32)]
    assert len((at / "out" / audit.PROMPTS).read_text().splitlines()) == 2
    (at / "run.jsonl").write_text(lines(GOOD))
    assert command("run.jsonl", "--no-figure", "--output", "out") == 0
    assert not (at / "out" / audit.PROBLEMS).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run: cannot be read: No such file or directory"),
        (b"", "run: nothing to audit: it holds no record"),
        (b"\n\n", "run: nothing to audit: it holds no record"),
        (b"{}\n{}\n", "run: nothing to audit: none of 2 records is usable"),
        (b"\x89PNG\0\0", "run:1: is not JSON: 'utf-8' codec can't decode byte 0x89"),
        (json.dumps(GOOD).encode("utf-16"), "run: nothing to audit: none of 1 records is usable"),
    ],
)
def test_command_with_nothing_to_audit_leaves_nothing(at, capsys, content, message):
    if content is not None:
        (at / "run").write_bytes(content)
    assert command("run") == 2
    out, err = capsys.readouterr()
    assert f"exo-toy: {message}" in err
    assert out == ""
    assert [path.name for path in at.iterdir()] == ([] if content is None else ["run"])


def test_command_cannot_read_or_write(at, capsys):
    (at / "folder").mkdir()
    assert command("folder") == 2
    assert "folder: cannot be read: Is a directory" in capsys.readouterr().err
    (at / "run").write_text(lines(GOOD))
    assert command("run", "--output", "run") == 2
    assert "run: cannot be written: " in capsys.readouterr().err


def test_command_checks_its_settings(at, capsys):
    (at / "run").write_text(lines(GOOD))
    assert cli.main(["audit", "run", "--beta-pi", "-1", "--beta-r", "1"]) == 2
    assert "beta_pi must be a finite number above 0; got -1.0" in capsys.readouterr().err
    for arguments in (["run", "--beta-pi", "1"], ["run", "--beta-r", "1"], ["--beta-pi", "1", "--beta-r", "1"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["audit", *arguments])
        assert exit_.value.code == 2


def test_command_without_its_extras(at, monkeypatch, capsys):
    (at / "run").write_text(lines(GOOD))
    real = importlib.util.find_spec
    missing = {"matplotlib", "seaborn"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else real(name))
    assert command("run") == 2
    assert (
        "draws with matplotlib, seaborn: pip install matplotlib seaborn, or pass --no-figure" in capsys.readouterr().err
    )
    assert command("run", "--no-figure") == 0
    assert {path.name for path in (at / "run.audit").iterdir()} == {audit.SUMMARY, audit.PROMPTS}
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["quantity", "mean", "95", "%", "interval", "bias", "prompts"]
    assert any(line.startswith("EXO-rw ") for line in out)


def test_command_says_when_there_is_nothing_to_draw(at, capsys):
    (at / "run").write_text(lines({**GOOD, "rewards": [1, 1, 1]}))
    assert command("run") == 0
    assert "no figure" in capsys.readouterr().err


def test_command_interrupted_leaves_nothing(at, monkeypatch, capsys):
    (at / "run").write_text(lines(GOOD))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measures.Totals, "add", interrupted)
    assert command("run", "--no-figure") == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert [path.name for path in at.iterdir()] == ["run"]


def test_command_line_loads_the_library_only_to_run():
    names = {name for name in vars(cli) if name in sys.modules and name in {"torch", "numpy", "audit", "plots"}}
    assert not names


def test_command_terminated_leaves_nothing(tmp_path):
    """It waits for a log that another process writes, and is ended from outside."""
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "exo_toy.cli", "audit", str(fifo), "--output", str(output), "--no-figure"]
    with subprocess.Popen([*command, "--beta-pi", "1", "--beta-r", "1"]) as process, fifo.open("w") as log:
        log.write(json.dumps(GOOD) + "\n")
        log.flush()
        while not any(output.glob(".part-*")):
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
        assert process.wait(20) == 143
    assert not output.exists()
