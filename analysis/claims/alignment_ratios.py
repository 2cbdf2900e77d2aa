"""Density ratios of the pipeline's policies, opening by opening."""

import math

from analysis.claims.base import LOOKS, Claim, Measured, Outcome, Results, Verdict

REVIEWS = {
    "rw": ("on the model's rewards, K={k}", "exo_rw", "dpo_rw"),
    "rw_many": ("on the model's rewards, K={many}", "exo_rw", "dpo_rw"),
    "pref": ("on the oracle's labels", "exo_pref", "dpo_pref"),
}
VERDICTS = ("as claimed", "in part", "mixed", "no clear difference", "the reverse")


def _review_ratios(results: Results) -> Outcome:
    """EXO against DPO at each opening, in pairs of the same seed; alignment_ratios provides, for each of ``REVIEWS``,

    ``<kind>.verdicts.<opening>`` (distances of rho from rho* and mass on pi*'s modes) and ``<kind>.exact.<policy>``.
    """
    stored = results["alignment_ratios"]
    openings = stored.number("openings")
    text: list[str] = []
    said: list[str] = []
    for kind, (where, *pair) in REVIEWS.items():
        verdicts, exact = stored.number(f"{kind}.verdicts"), stored.number(f"{kind}.exact")
        found = [verdicts[opening]["verdict"] for opening in openings]
        said += found
        counts = ", ".join(f"{verdict} at {found.count(verdict)}" for verdict in VERDICTS if verdict in found)
        means = ", ".join(_of_policy(LOOKS[method], exact[method]["all openings"]) for method in pair)
        text.append(f"{where.format(**stored.config)}: {counts}; {means}")
    claimed = [verdict == "as claimed" for verdict in said]
    verdict = Verdict.HOLDS if all(claimed) else Verdict.CONDITIONAL if any(claimed) else Verdict.FAILS
    return Outcome(f"{len(openings)} openings, β={stored.config['beta']:g}; " + "; ".join(text), verdict)


def _of_policy(name: str, mean: Measured) -> str:
    share = math.exp(mean["log_mode_share"]["mean"])
    return (
        f"{name} {mean['distance_under_optimum']['mean']:.2f} nats from log ρ* under π*, {share:.2g} of its mode mass"
    )


CLAIMS = (
    Claim(
        "C14",
        "The density ratio of EXO's policy to π_sft follows π*'s and concentrates on its mode; DPO's does not",
        "Section 4, visualisation; seven prompts in the appendix",
        function="exo_toy.estimators.snis_density_ratio",
        test="tests/test_analysis_alignment_ratios.py",
        script="analysis/alignment_ratios.py",
        figure="alignment_ratios",
        paper_value="seven prompts, drawn",
        evaluate=_review_ratios,
        should_hold=False,
    ),
)
