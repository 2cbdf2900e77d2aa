"""What preference labels target."""

from itertools import pairwise

from analysis.claims.base import Claim, Measured, Outcome, Results, holds_if, largest

# Closed forms against minima found by Newton's method.
CLOSED_FORM = 1e-11


def _label_targets(results: Results) -> Outcome:
    """Minimisers of expected losses on labelled pairs; label_targets provides ``two_completions.largest_error`` (from

    the closed forms), ``effective_beta_share`` {eps: at small differences} and ``cases``, a list by ``labels``,
    ``loss``, ``spread`` (of rewards) and ``order`` (the highest is the full table) with ``kl_to_optimum`` and
    ``missed_gain``; of a loss that is not ``attained`` with ``loss_by_margin``, at growing margins.
    """
    stored = results["label_targets"]
    error, cases = stored.number("two_completions.largest_error"), stored.number("cases")
    order = max(case["order"] for case in cases)
    full, limited = ([case for case in cases if (case["order"] == order) == whole] for whole in (True, False))
    eps, flip = f"{stored.config['label_smoothing']:g}", f"{stored.config['flip']:.0%}"
    share = stored.number("effective_beta_share")[eps]
    restored = {
        "EXO on true probabilities": largest(_values(full, "kl_to_optimum", "exo_reward")),
        "DPO on clean labels": largest(_values(full, "kl_to_optimum", "dpo", "bradley_terry")),
    }
    one_hot = min(case["kl_to_optimum"] for case in full if case["loss"].startswith("exo_pref@"))
    hard = [case for case in full if (case["labels"], case["loss"]) == ("hard", "dpo")]
    falls = all(later < earlier for case in hard for earlier, later in pairwise(case.get("loss_by_margin", [0, 0])))
    names = {
        "dpo": "DPO",
        f"exo_pref@{eps}": f"EXO-pref at ε={eps}",
        "exo_retuned": f"EXO-pref at ε={eps} with β times {1 / share:.3g}",
    }
    shares = "; ".join(
        f"{title} "
        + ", ".join(
            f"{name} " + " / ".join(_range(full, loss, labels, spread) for spread in stored.config["spreads"])
            for loss, name in ({**names, "exo_frequency": "EXO on the labellers' share"} if noisy else names).items()
        )
        for title, labels, noisy in (("clean", "bradley_terry", False), (f"{flip} turned over", "noisy", True))
    )
    little = ", ".join(
        f"{name} {_range(limited, loss)}"
        for loss, name in {**names, "exo_reward": "EXO on true probabilities"}.items()
        if loss != "exo_retuned"
    )
    spreads = " / ".join(f"{spread:g}" for spread in stored.config["spreads"])
    text = (
        f"two completions: recovered differences within {error:.1e} of the closed forms; full tables, KL(π‖π*): "
        + ", ".join(f"{name} at most {value:.1e}" for name, value in restored.items())
        + f", EXO-pref on one-hot labels at least {one_hot:.1e}; on hard labels DPO's loss "
        + ("falls for ever" if falls else "does not fall for ever")
        + f". Share of the gain in J missed (above 1: worse than the reference), rewards spread over {spreads} nats: "
        f"{shares}. With less than a full table, clean labels: {little}"
    )
    worst = {loss: largest([*_values(full, "missed_gain", loss, "bradley_terry", "noisy")]) for loss in names}
    ranked = ", ".join(f"{names[loss]} ({worst[loss]:.2g})" for loss in sorted(worst, key=lambda loss: worst[loss]))
    practice = (
        f"With one label per pair EXO-pref's ε is a temperature: at ε={eps} small differences of reward are followed "
        f"as at {share:.2g}·β. By the largest share of the gain in J missed, clean labels or {flip} turned over, full "
        f"table, take: {ranked}. Only DPO on clean labels, or a reward model's probabilities as label_smoothing, aim "
        "at π*_β itself."
    )
    exact = all(value <= CLOSED_FORM for value in (error, *restored.values()))
    return Outcome(text, holds_if(exact and one_hot > CLOSED_FORM and bool(hard) and falls), practice)


def _values(cases: list[Measured], quantity: str, loss: str, *labels: str) -> list[float]:
    """A quantity over the cases of a loss, by any labels where none are named."""
    return [case[quantity] for case in cases if case["loss"] == loss and (not labels or case["labels"] in labels)]


def _range(cases: list[Measured], loss: str, labels: str = "bradley_terry", spread: float | None = None) -> str:
    """The least and the most that is missed."""
    found = _values([case for case in cases if spread in (None, case["spread"])], "missed_gain", loss, labels)
    low, high = (f"{max(value, 0.0) if value > 1e-9 else 0:.2g}" for value in (min(found), max(found)))
    return low if low == high else f"{low} to {high}"


CLAIMS = (
    Claim(
        "B2",
        "On one-hot labels smoothed by ε the reward that EXO-pref recovers from a pair is tanh(Δr/2)·log((1−ε)/ε), not "
        "Δr; with a full table a target that carries the pair's true probability restores π*_β (the labels are then "
        "not needed), as DPO does on clean labels; on hard labels DPO has no optimum",
        "not in the paper",
        function="exo_toy.preferences.exo_pref_target, exo_toy.preferences.dpo_target, "
        "exo_toy.preferences.exo_pref_effective_beta, exo_toy.preferences.dpo_optimum_exists",
        test="tests/test_preferences.py, tests/test_analysis_label_targets.py",
        script="analysis/label_targets.py",
        figure="label_targets",
        paper_value="none",
        evaluate=_label_targets,
    ),
)
