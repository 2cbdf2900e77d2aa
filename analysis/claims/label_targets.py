"""What preference labels target."""

from analysis.claims.base import MAXIMISER_TOLERANCE, Claim, Outcome, Results, holds_if, largest


def _label_targets(results: Results) -> Outcome:
    """Minimisers of expected losses on labelled pairs; label_targets provides ``two_completions.largest_error`` (from

    the closed forms), ``effective_beta_share`` {eps: at small differences} and ``cases``, a list by ``labels``,
    ``loss`` and ``order`` (the highest is the full table) with ``attained``, ``kl_to_optimum`` and ``missed_gain``.
    """
    stored = results["label_targets"]
    error, cases = stored.number("two_completions.largest_error"), stored.number("cases")
    full = max(case["order"] for case in cases)

    def worst(quantity: str, loss: str, *labels: str) -> float:
        """Over the full tables."""
        found = [case[quantity] for case in cases if (case["order"], case["loss"]) == (full, loss)
                 and (not labels or case["labels"] in labels)]  # fmt: skip
        return largest(found)

    restored = {"EXO with the true probability": worst("kl_to_optimum", "exo_reward"),
                "DPO on clean labels": worst("kl_to_optimum", "dpo", "bradley_terry")}  # fmt: skip
    one_hot = min(
        case["kl_to_optimum"] for case in cases if case["order"] == full and case["loss"].startswith("exo_pref@")
    )
    unbounded = not any(
        case["attained"] for case in cases if (case["order"], case["labels"], case["loss"]) == (full, "hard", "dpo")
    )
    eps = f"{stored.config['label_smoothing']:g}"
    share = stored.number("effective_beta_share")[eps]
    missed = {loss: worst("missed_gain", loss, "bradley_terry") for loss in (f"exo_pref@{eps}", "exo_retuned", "dpo")}
    noisy = worst("missed_gain", "dpo", "noisy")
    text = (
        f"two completions: recovered differences within {error:.1e} of the closed forms; full tables, KL(π‖π*): "
        + ", ".join(f"{name} at most {value:.1e}" for name, value in restored.items())
        + f", EXO-pref on one-hot labels at least {one_hot:.1e}; DPO on hard labels has "
        + ("no optimum" if unbounded else "an optimum")
        + f". Share of the gain in J missed (above 1: worse than the reference): EXO-pref at ε={eps} up to "
        f"{missed[f'exo_pref@{eps}']:.2g}, with β times "
        f"{1 / share:.3g} {missed['exo_retuned']:.2g}; DPO with {stored.config['flip']:.0%} of the labels turned over "
        f"{noisy:.2g}"
    )
    practice = (
        f"With one label per pair EXO-pref's ε is a temperature: at ε={eps} small differences of reward are followed "
        f"as at {share:.2g}·β. As label_smoothing pass each pair's true probability that the rejected one is better, "
        "as a reward model gives it, and π*_β is restored whatever the noise of the labels; without one take DPO, or "
        f"EXO-pref with β times {1 / share:.3g}."
    )
    exact = all(value <= MAXIMISER_TOLERANCE for value in (error, *restored.values()))
    return Outcome(text, holds_if(exact and one_hot > MAXIMISER_TOLERANCE and unbounded), practice)


CLAIMS = (
    Claim(
        "B2",
        "On one-hot labels smoothed by ε the reward that EXO-pref recovers is tanh(Δr/2)·log((1−ε)/ε), not Δr; a "
        "target that carries the label's probability restores π*_β, as DPO does on clean labels; on hard labels DPO "
        "has no optimum",
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
