"""The alpha-divergences between DPO-rw and EXO-rw, and beyond."""

from analysis.claims.base import Claim, Measured, Outcome, Results, Verdict

# Shares of the gain that differ by less are alike.
ALIKE = 0.005
DPO, EXO = "0.0", "1.0"
LIMIT = "inf"


def _alpha_family(results: Results) -> Outcome:
    """The alpha with the highest J at each K; alpha_divergences provides

    ``best.<beta>.<K>``: ``share_by_alpha``, of the gain J(pi*) - J(pi_ref), at each alpha's optimum; ``alpha`` and
    ``share``, the best; ``share_within``, the best of alpha in [0, 1]; ``chooses_a_mode_from``. K is "inf" in the
    limit; ``at_reference``: a list, by ``alpha``, of ``cosine_to_limit`` and ``cosine_to_rl`` by K.
    """
    stored = results["alpha_divergences"]
    best = stored.number("best")
    cases = [found for by_k in best.values() for found in by_k.values()]
    within = [found["share_within"] - found["share_by_alpha"][EXO] <= ALIKE for found in cases]
    beyond = [found["share"] - found["share_by_alpha"][EXO] <= ALIKE for found in cases]
    reported = best[str(stored.config["beta"])]
    shares = "; ".join(
        f"K={_name(k)} {_percent(found, DPO)}, {_percent(found, EXO)}, "
        f"{100 * found['share']:.1f}% (α={found['alpha']:g})"
        for k, found in reported.items()
    )
    chooses = {
        k: found["chooses_a_mode_from"] for k, found in reported.items() if found["chooses_a_mode_from"] is not None
    }
    modes = ", ".join(f"α={alpha:g} at K={_name(k)}" for k, alpha in chooses.items()) or "no α"
    text = (
        f"share of the gain J(π*) − J(π_ref) at the optima for α=0, α=1 and the best α, β={stored.config['beta']}: "
        f"{shares}. Over {len(cases)} cases (β, K), EXO's end is within {100 * ALIKE:g}% of the best α in [0, 1] in "
        f"{sum(within)}, of the best α at all in {sum(beyond)}. The optimum chooses a mode from {modes} on, at the "
        f"other K at no α. At the reference {_cosines(stored.number('at_reference'))}"
    )
    verdict = Verdict.FAILS
    if any(within):
        verdict = Verdict.HOLDS if all(within) and all(beyond) else Verdict.CONDITIONAL
    return Outcome(text, verdict, _practice(reported))


def _practice(reported: Measured) -> str:
    """What to do at K = 4, and where another alpha than 1 pays."""
    finite = [k for k in reported if k != LIMIT]
    few = min((k for k in finite if int(k) >= 4), key=int, default=max(finite, key=int))
    at_few, limit = reported[few], reported[LIMIT]
    gained = {k: reported[k]["share"] - reported[k]["share_by_alpha"][EXO] for k in finite}
    pays = [k for k in finite if gained[k] > ALIKE]
    choice = (
        "keep α = 1 (EXO-rw)"
        if few not in pays
        else f"take α = {at_few['alpha']:g}, {100 * gained[few]:.1f} points more"
    )
    text = (
        f"With a policy too small for π*, at K = {few} {choice}: the best α gets {100 * at_few['share']:.1f}% of the "
        f"gain, DPO-rw's end {_percent(at_few, DPO)}, more candidates up to {100 * limit['share']:.1f}%"
    )
    others = [k for k in pays if k != few]
    if not others:
        return f"{text}; at no other K tested does another α pay."
    listed = ", ".join(f"α = {reported[k]['alpha']:g} at K = {k} ({100 * gained[k]:.1f} points)" for k in others)
    return f"{text}; another α than 1 pays only in between: {listed}."


def _cosines(at_reference: list[Measured]) -> str:
    """Of the expected gradient at the smallest K, at the ends of [0, 1]."""
    by_alpha = {found["alpha"]: found for found in at_reference}
    k = min(by_alpha[1.0]["cosine_to_limit"], key=int)
    found = "; ".join(
        f"{by_alpha[alpha]['cosine_to_limit'][k]:.3f} and {by_alpha[alpha]['cosine_to_rl'][k]:.3f} for α={alpha:g}"
        for alpha in (0.0, 1.0)
    )
    return f"the expected gradient at K={k} has cosines {found} to its own limit's and to RL's gradient"


def _name(k: str) -> str:
    return "∞" if k == LIMIT else k


def _percent(found: Measured, alpha: str) -> str:
    return f"{100 * found['share_by_alpha'][alpha]:.1f}%"


CLAIMS = (
    Claim(
        "B6",
        "Of the α-divergences on K candidates from DPO-rw (α = 0) to EXO-rw (α = 1) and beyond, EXO's end gives a "
        "policy of limited capacity the highest J at every K",
        "not in the paper",
        function="exo_toy.losses.alpha_rw_loss, exo_toy.finite_k.expected_alpha_rw_loss",
        test="tests/test_analysis_alpha_divergences.py",
        script="analysis/alpha_divergences.py",
        figure="alpha_divergences",
        paper_value="none",
        evaluate=_alpha_family,
        should_hold=False,
    ),
)
