"""Density ratios in a space with two planted modes."""

from analysis.claims.base import Claim, Measured, Outcome, Results, Verdict

# A density ratio within this factor of pi*'s at the mode, on which pi* puts a thousand times the reference, follows it.
FOLLOWS = 2.0


def _density_ratio(results: Results) -> Outcome:
    """Density ratios at pi*'s first mode; density_ratio provides them, as ``ratio_at_first_mode`` and

    ``ratio_at_second_mode``, for ``optimal`` and, {mean, min, max} over seeds, for ``exo_rw.<order>.<K>`` and
    ``dpo_rw.<order>.<K>``. A policy follows pi* where its ratio at the mode is within a factor of pi*'s in every seed.
    """
    stored = results["density_ratio"]
    optimal, exo, dpo = (stored.number(name) for name in ("optimal", "exo_rw", "dpo_rw"))

    def follows(policy: Measured) -> bool:
        shares = [policy["ratio_at_first_mode"][end] / optimal["ratio_at_first_mode"] for end in ("min", "max")]
        return all(1 / FOLLOWS <= share <= FOLLOWS for share in shares)

    settings = [(order, k) for order in exo for k in exo[order]]
    both = {(order, k): (follows(exo[order][k]), follows(dpo[order][k])) for order, k in settings}
    as_claimed = [f"k={order}, K={k}" for (order, k), found in both.items() if found == (True, False)]
    otherwise = [
        f"k={order}, K={k} ({'both follow' if found == (True, True) else 'EXO does not'})"
        for (order, k), found in both.items()
        if found != (True, False)
    ]
    order, k = min(exo), max(exo[min(exo)], key=int)
    ratios = {
        name: (found["ratio_at_first_mode"]["mean"], found["ratio_at_second_mode"]["mean"])
        for name, found in (("EXO-rw", exo[order][k]), ("DPO-rw", dpo[order][k]))
    }
    ratios = {"π*": (optimal["ratio_at_first_mode"], optimal["ratio_at_second_mode"]), **ratios}
    text = (
        f"one prompt, exact; EXO-rw follows π* at its mode and DPO-rw does not for {'; '.join(as_claimed) or 'no case'}"
        f"; otherwise: {'; '.join(otherwise) or 'none'}. ρ at the two modes for k={order}, K={k}: "
        + ", ".join(f"{name} {first:.3g} and {second:.3g}" for name, (first, second) in ratios.items())
    )
    # One prompt of a small space cannot show what is said of seven prompts of a language model.
    return Outcome(text, Verdict.CONDITIONAL if as_claimed else Verdict.FAILS)


CLAIMS = (
    Claim(
        "C14a",
        "The same in a space with two planted modes, policies of limited capacity",
        "Section 4, visualisation",
        function="exo_toy.estimators.snis_density_ratio",
        test="tests/test_analysis_density_ratio.py",
        script="analysis/density_ratio.py",
        figure="density_ratio",
        paper_value="none",
        evaluate=_density_ratio,
    ),
)
