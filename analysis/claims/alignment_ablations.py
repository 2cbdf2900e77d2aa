"""The pipeline's limits, sampling taken away."""

from analysis.claims.base import LOOKS, MAXIMISER_TOLERANCE, Claim, Outcome, Results, holds_if


def _limits(results: Results) -> Outcome:
    """Exact minima of expected losses, by order of the policy; the highest is the full table."""
    limits = results["alignment_ablations"].number("limits")
    gaps = {method: list(orders.values())[-1]["objective_gap"] for method, orders in limits.items()}
    less = {method: list(orders.values())[-2]["objective_gap"] for method, orders in limits.items()}
    others = [method for method in gaps if method != "exo_pref"]
    meet = all(gaps[method] <= MAXIMISER_TOLERANCE for method in others)
    named = ", ".join(f"{LOOKS[method]} {gap:.1e}" for method, gap in gaps.items())
    before = ", ".join(f"{LOOKS[method]} {gap:.2g}" for method, gap in less.items())
    return Outcome(
        f"J of π*_β less J of the minimum of the expected loss, nats: full table {named}; one order less: {before}",
        holds_if(meet and gaps["exo_pref"] > MAXIMISER_TOLERANCE),
    )


CLAIMS = (
    Claim(
        "E3",
        "With a full table EXO-rw, DPO-rw, PPO and DPO on Bradley-Terry labels meet at π*_β of the reward that they "
        "were given; EXO-pref with one-hot labels does not",
        "not in the paper",
        function="exo_toy.preferences.expected_preference_loss, exo_toy.finite_k.expected_exo_rw_loss",
        test="tests/test_analysis_alignment_ablations.py",
        script="analysis/alignment_ablations.py",
        figure="alignment_ablations",
        paper_value="none",
        evaluate=_limits,
    ),
)
