"""Verdicts follow the numbers, and the report says what they are and where they come from."""

import importlib
import math
import re
from types import MappingProxyType

import pytest

from analysis import report, storage
from analysis.claims import CLAIMS, Claim, Outcome, Verdict, failed, judge
from analysis.claims.mode_seeking import _holds_from

ROOT = storage.ROOT


def stored(name: str, numbers: dict, preset: str = "quick") -> storage.StoredResult:
    provenance = {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "uncommitted_changes": False,
        "python": "3.11.7",
        "torch": "2.13.0",
        "numpy": "2.4.6",
        "scipy": "1.17.1",
        "wall_seconds": 12.34,
        "cases": 7,
        "cases_from_interrupted_run": 2,
    }
    return storage.StoredResult(name, preset, {"seed": 5}, provenance, numbers, {})


def identities(residual: float, name: str = "objective") -> dict:
    return {"objective_identity": stored("objective_identity", {"problems": 9, "worst_residual": {name: residual}})}


C1 = next(claim for claim in CLAIMS if claim.id == "C1")
UNTESTED = Claim("C99", "a | b", "somewhere", why_not="planned: later")


@pytest.mark.parametrize(
    ("residual", "verdict"), [(3e-15, Verdict.HOLDS), (2e-12, Verdict.FAILS), (math.nan, Verdict.FAILS)]
)
def test_an_identity_holds_to_rounding_and_never_with_nan(residual, verdict):
    assert judge(C1, identities(residual)).verdict == verdict


def test_a_claim_without_evaluation_says_why():
    assert judge(UNTESTED, {}) == Outcome("planned: later", Verdict.NOT_TESTED)


def test_a_missing_number_is_an_error_not_a_verdict():
    with pytest.raises(storage.ResultsError, match="no number"):
        judge(C1, identities(0.0, name="something else"))


def test_only_claims_that_should_hold_count_as_failed():
    expected = Claim("A", "a", "here")
    finding = Claim("B", "b", "here", should_hold=False)
    outcomes = {claim: Outcome("", Verdict.FAILS) for claim in (expected, finding)}
    outcomes[UNTESTED] = Outcome("", Verdict.NOT_TESTED)
    assert failed(outcomes) == [expected]


@pytest.mark.parametrize(
    ("holds", "from_k"),
    [
        ({2: True, 8: True}, 2),
        ({2: False, 8: True, 32: True}, 8),
        ({2: True, 8: False, 32: True}, 32),
        ({2: True, 8: False}, None),
    ],
)
def test_a_condition_on_k_is_where_it_holds_for_good(holds, from_k):
    assert _holds_from(holds) == from_k


def two_modes(fixed_points: dict[int, tuple[float, list[float]]], mean: list[float]) -> dict:
    """Results of mode_seeking; fixed points as {K: (KL(pi_theta || pi*), mode masses)}."""

    def measured(kl: float, masses: list[float]) -> dict:
        return {"kl_policy_to_optimal": kl, "mode_masses": masses}

    limits = {"policy_to_optimal": [measured(0.4936, [0.4199, 0.0])], "optimal_to_policy": measured(2.0340, mean)}
    numbers = {
        "target": {"0.5": {"mode_masses": [0.2616, 0.1675]}},
        "capacity": [{"order": 1, "beta": 0.5}, {"order": 0, "beta": 0.25}, {"order": 0, "beta": 0.5, **limits}],
        "fixed_points": [
            {"k": 2, "loss": "dpo"},
            *({"k": k, "loss": "exo", **measured(*point)} for k, point in fixed_points.items()),
        ],
    }
    result = stored("mode_seeking", numbers)
    result.config["beta"] = 0.5
    return {"mode_seeking": result}


SPREAD = [0.0265, 0.0024]
AT_K = {2: (2.089, [0.0095, 0.0039]), 32: (0.669, [0.2170, 0.0]), 1024: (0.494, [0.4040, 0.0])}
ALWAYS = {2: (0.5, [0.41, 0.0]), 1024: (0.494, [0.404, 0.0])}
NEVER = {2: (2.089, [0.0095, 0.0039]), 1024: (2.0, [0.01, 0.01])}


@pytest.mark.parametrize("name", ["C6", "C7"])
@pytest.mark.parametrize(
    ("fixed_points", "verdict"), [(ALWAYS, Verdict.HOLDS), (AT_K, Verdict.CONDITIONAL), (NEVER, Verdict.FAILS)]
)
def test_what_holds_from_some_k_on_holds_under_conditions(name, fixed_points, verdict):
    claim = next(claim for claim in CLAIMS if claim.id == name)
    assert judge(claim, two_modes(fixed_points, SPREAD)).verdict == verdict


@pytest.mark.parametrize(("mean", "verdict"), [(SPREAD, Verdict.HOLDS), ([0.42, 0.0], Verdict.FAILS)])
def test_mean_seeking_means_less_than_the_optimum_on_both_modes(mean, verdict):
    claim = next(claim for claim in CLAIMS if claim.id == "C9")
    assert judge(claim, two_modes(AT_K, mean)).verdict == verdict


def test_every_claim_of_the_paper_has_one_row():
    ids = [claim.id for claim in CLAIMS]
    assert len(set(ids)) == len(ids)
    assert {f"C{i}" for i in range(1, 16)} <= set(ids)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_every_claim_is_tested_or_says_why_not(claim):
    assert bool(claim.evaluate) != bool(claim.why_not)
    assert bool(claim.evaluate) == bool(claim.script) == bool(claim.figure)


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.evaluate], ids=lambda claim: claim.id)
def test_what_a_claim_names_exists(claim):
    for name in claim.function.split(", "):
        module, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function))
    for path in (*claim.test.split(", "), claim.script, f"figures/{claim.figure}.py"):
        assert (ROOT / path).is_file(), path


@pytest.fixture
def text() -> str:
    results = identities(3e-15)
    outcomes = {claim: judge(claim, results) for claim in (C1, UNTESTED)}
    return report.render(outcomes, MappingProxyType(results), "quick", "exo-toy reproduce --quick")


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_report_has_a_row_for_each_claim(text):
    header, _, first, second = table_rows(text)[:4]
    assert header == list(report.COLUMNS)
    row = dict(zip(header, first, strict=True))
    assert row["claim"] == "C1"
    assert row["verdict"] == "**holds**"
    assert row["ours"] == "largest relative residual 3.0e-15 over 9 drawn problems"
    assert row["figure"] == "[objective_identity](figures/quick/objective_identity.png)"
    assert row["function"] == "`exo_toy.theorems.objective_identity`"
    row = dict(zip(header, second, strict=True))
    assert row["statement"] == r"a \| b"
    assert row["verdict"] == "**not tested here**"
    assert row["ours"] == "planned: later"


def test_advice_stands_above_the_evidence():
    beyond = Claim("B9", "b", "not in the paper")
    outcomes = {C1: Outcome("a", Verdict.HOLDS), beyond: Outcome("b", Verdict.FAILS, "Take K* = 4.")}
    text = report.render(outcomes, {}, "quick", "exo-toy reproduce --quick")
    places = [text.index(part) for part in (r"Take K\* = 4. (B9)", "## The paper's claims", "| C1 |", "## Beyond")]
    assert places == sorted(places) < [text.index("| B9 |")]


def test_the_report_says_where_it_comes_from(text):
    assert "`exo-toy reproduce --quick`" in text
    assert "preset `quick`" in text
    origin = table_rows(text)[-1]
    assert origin[:6] == [
        "objective_identity",
        "2026-01-02T03:04:05+00:00",
        "0123456789ab",
        "5",
        "7 (2 from an interrupted run)",
        "12.3",
    ]


def test_the_report_gives_the_win_rates_of_the_paper(text):
    rows = table_rows(text)
    assert ["EXO-rw", "97.3", "76.4", "88.5", "64.0"] in rows
    assert ["DPO-pref", "66.3", "65.1", "58.0", "37.0"] in rows


def test_the_report_has_what_the_world_of_reviews_gave():
    one = {"mean": 0.5, "low": 0.25, "high": 0.75}
    wins = [f"{judge}win_against_{whom}" for judge in ("", "model_") for whom in ("reference", "chosen")]
    found = dict.fromkeys(("kl_to_reference", "oracle_reward", "mode_mass", *wins), one)
    final = {"ppo": {"0.4": found}, "sft": {"0.4": found}}
    results = {"alignment": stored("alignment", {"final": final, "best_of_n": {**found, "n": 8}})}
    results["alignment"].config["betas"] = [0.4]
    outcomes = {by_id("C13"): Outcome("", Verdict.HOLDS)}
    rows = table_rows(report.render(outcomes, results, "quick", "exo-toy reproduce --quick"))
    cells = ["0.50 [0.25, 0.75]"] * 2 + ["50.0 [25.0, 75.0]"] * 4 + ["0.50 [0.25, 0.75]"]
    assert ["PPO", "0.4", *cells] in rows
    assert ["SFT on chosen", "", *cells] in rows
    assert ["Best-of-N (8), reward model", "", *cells] in rows


def test_figures_of_the_reported_run_lie_in_figures_itself():
    results = identities(3e-15)
    text = report.render({C1: judge(C1, results)}, results, "full", "exo-toy reproduce --full")
    assert "(figures/objective_identity.png)" in text
    assert "Digits to which the two sides of each exact identity agree" in text


def test_a_report_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "REPORT", tmp_path / "paper_repro.md")
    (tmp_path / "paper_repro.md").write_text("old")
    results = identities(3e-15)

    def kill(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            report.write_report({C1: judge(C1, results)}, results, "quick", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["paper_repro.md"]
    assert (tmp_path / "paper_repro.md").read_text() == "old"
    report.write_report({C1: judge(C1, results)}, results, "quick", "x")
    assert (tmp_path / "paper_repro.md").read_text().startswith("# What the paper claims")


def by_id(identifier: str) -> Claim:
    return next(claim for claim in CLAIMS if claim.id == identifier)


def minima(**gaps: float) -> dict:
    """Results of alignment_ablations; the gap of J at the full table, half a nat below it."""
    methods = ("exo_rw", "dpo_rw", "ppo", "exo_pref", "dpo_pref")
    limits = {m: {"0": {"objective_gap": 0.5}, "1": {"objective_gap": gaps.get(m, 1e-12)}} for m in methods}
    return {"alignment_ablations": stored("alignment_ablations", {"limits": limits})}


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ({"exo_pref": 0.2}, Verdict.HOLDS),
        # All meet, or one that should does not.
        ({}, Verdict.FAILS),
        ({"exo_pref": 0.2, "ppo": 1e-3}, Verdict.FAILS),
        ({"exo_pref": 0.2, "dpo_pref": math.nan}, Verdict.FAILS),
    ],
)
def test_methods_meet_in_the_limit_all_but_one(gaps, verdict):
    outcome = judge(by_id("E3"), minima(**gaps))
    assert outcome.verdict == verdict
    assert "one order less: EXO-rw 0.5" in outcome.ours


def compared(less: float, more: float) -> dict:
    """A difference with its interval."""
    return {"mean": (less + more) / 2, "low": less, "high": more}


def pipeline_results(more: dict[str, tuple[float, float]]) -> dict:
    """Results of alignment and its ablations, with one temperature and one change, in which pairs differ as given.

    What is more of J is less below the frontier.
    """
    nearer = {pair: {"1": compared(-high, -low)} for pair, (low, high) in more.items()}
    one = {pair: {name: compared(*found) for name in ("oracle_objective", "oracle_reward", "model_objective")}
           for pair, found in more.items()}  # fmt: skip
    main = {
        "differences": {pair: {"0.4": found} for pair, found in one.items()},
        "at_divergence": {"differences": nearer, "below_frontier": {"exo_rw": {"1": {"mean": 0.25}}}},
        "ppo_completions": 25600,
    }
    changed = {"axes": {"k": {"2": {"differences": one}}, "limit_completions": {"9": {"differences": {}}}}}
    results = {"alignment": stored("alignment", main), "alignment_ablations": stored("alignment_ablations", changed)}
    results["alignment"].config["completions"] = 1024
    results["alignment_ablations"].config["beta"] = 0.4
    return results


PAIRS = ("exo_rw - ppo", "ppo - dpo_rw", "exo_rw - dpo_rw", "exo_pref - dpo_pref")


@pytest.mark.parametrize(
    ("ppo_and_dpo", "verdict", "at_equal_kl", "when_changed"),
    [
        ((0.1, 0.2), Verdict.HOLDS, "nearer at 1", "more in 1. "),
        ((-0.2, -0.1), Verdict.CONDITIONAL, "farther at 1", "less in 1. "),
        ((-0.1, 0.2), Verdict.CONDITIONAL, "no clear difference at 1", "no clear difference in 1. "),
    ],
)
def test_the_order_of_methods_and_where_it_turns(ppo_and_dpo, verdict, at_equal_kl, when_changed):
    more = {**dict.fromkeys(PAIRS, (0.1, 0.2)), "ppo - dpo_rw": ppo_and_dpo}
    outcome = judge(by_id("C13"), pipeline_results(more))
    assert outcome.verdict == verdict
    assert f"PPO against DPO-rw {at_equal_kl};" in outcome.ours
    assert f"PPO against DPO-rw {when_changed}" in outcome.ours
    assert "EXO-rw 0.25 at 1." in outcome.ours and "25,600 completions of a prompt, the others 1,024" in outcome.ours


def test_no_order_at_all_fails():
    assert judge(by_id("C13"), pipeline_results(dict.fromkeys(PAIRS, (-0.2, -0.1)))).verdict == Verdict.FAILS


def test_exceptions_are_named():
    results = pipeline_results(dict.fromkeys(PAIRS, (0.1, 0.2)))
    axes = results["alignment_ablations"].numbers["axes"]
    reverse = {pair: {"oracle_objective": compared(-0.2, -0.1)} for pair in PAIRS}
    axes["k"] |= {"4": axes["k"]["2"], "8": {"differences": reverse}}
    assert "EXO-rw against PPO more in 2, less in 1 (k=8)" in judge(by_id("C13"), results).ours


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        (["as claimed", "as claimed"], Verdict.HOLDS),
        (["as claimed", "the reverse"], Verdict.CONDITIONAL),
        (["in part", "mixed"], Verdict.FAILS),
    ],
)
def test_density_ratios_follow_at_every_opening_or_not(said, verdict):
    exact = {"all openings": {"distance_under_optimum": {"mean": 1.0}, "log_mode_share": {"mean": math.log(0.25)}}}
    kind = {"verdicts": {opening: {"verdict": one} for opening, one in zip("ab", said, strict=True)}}
    kind["exact"] = dict.fromkeys(("exo_rw", "dpo_rw", "exo_pref", "dpo_pref"), exact)
    result = stored("alignment_ratios", {"openings": ["a", "b"], "rw": kind, "rw_many": kind, "pref": kind})
    result.config.update({"k": 4, "many": 32, "beta": 0.2})
    outcome = judge(by_id("C14"), {"alignment_ratios": result})
    assert outcome.verdict == verdict
    assert "K=32" in outcome.ours and "1.00 nats from log ρ* under π*, 0.25 of its mode mass" in outcome.ours
