"""Candidates from elsewhere than the reference, with their weights corrected."""

from analysis.claims.base import (
    EXACT,
    MAXIMISER_TOLERANCE,
    NEAR_OPTIMUM,
    Claim,
    Measured,
    Outcome,
    Results,
    Verdict,
    holds_if,
    in_range,
)

NAMES = {
    "reference": "the reference",
    "policy": "the policy",
    "token_tempered": "π_θ^β_π·π_ref^(1−β_π) normalised at each token",
    "half": "half policy, half reference",
}


def _refreshed(results: Results) -> Outcome:
    """EXO-rw on refreshed candidates; refreshed_candidates provides ``worst_tempered_distance``, ``best_kl``,

    ``sampled`` (proposals that can be), ``by_beta_pi.<beta_pi>.<stage>.proposals.<proposal>`` and
    ``refreshed.<corrected or not>.<K>`` (KL by refresh).
    """
    stored = results["refreshed_candidates"]
    best, paths = stored.number("best_kl"), stored.number("refreshed")
    at_end = {beta_pi: stages["end"]["proposals"] for beta_pi, stages in stored.number("by_beta_pi").items()}
    ks = list(next(iter(at_end.values()))["reference"]["distance"])
    few = "4" if "4" in ks else ks[0]

    # Two modes: how far above the best, relative, with log weights and without.
    excess = {arm: {k: [kl / best - 1 for kl in path] for k, path in by_k.items()} for arm, by_k in paths.items()}
    before, after = zip(*((path[0], path[-1]) for path in excess["corrected"].values()), strict=True)
    repaired = max(before) > NEAR_OPTIMUM - 1 >= max(after)
    left = {arm: [path[-1] for path in by_k.values()] for arm, by_k in excess.items()}
    # The arms end where the optimiser stops: what it cannot tell apart does not count.
    weights_matter = all(
        forgotten > abs(kept) + MAXIMISER_TOLERANCE
        for kept, forgotten in zip(left["corrected"], left["uncorrected"], strict=True)
    )
    exact = stored.number("worst_tempered_distance") <= EXACT

    chosen = {beta_pi: _least_biased(found, stored.number("sampled"), few) for beta_pi, found in at_end.items()}
    better = [
        at_end[beta_pi][name]["distance"][k] < at_end[beta_pi]["reference"]["distance"][k]
        and at_end[beta_pi][name]["more_progress"][k]["low"] > 0
        for beta_pi, name in chosen.items()
        for k in ks
    ]

    def off(name: str, beta_pi: str) -> str:
        distance = at_end[beta_pi][name]["distance"][few]
        return "0" if distance <= EXACT else f"{distance:.2g}"

    by_beta_pi = "; ".join(
        f"β_π={beta_pi}: "
        + ", ".join(f"{NAMES[name]} {off(name, beta_pi)}" for name in stored.number("sampled"))
        + f", the policy without log weights {off('uncorrected', beta_pi)}"
        for beta_pi in at_end
    )
    rounds = len(next(iter(paths["corrected"].values()))) - 1
    without = in_range([100 * value for value in left["uncorrected"]])
    text = (
        f"exact. Two modes, β_π = 1: KL(π_θ‖π*) is above the best that the policy can ({best:.3g}) by "
        f"{in_range([100 * value for value in before])} % on the reference's candidates (K = "
        f"{', '.join(paths['corrected'])}); after {rounds} refreshes by at most {100 * max(after):.1g} % with log "
        f"weights and by {without} % without. "
        f"Reviews, end of training, K={few}, relative distance of K/(K−1) times the mean gradient from the limit's, by "
        f"what candidates are drawn from: {by_beta_pi}; the tempered policy, which can be sampled token by token at "
        f"β_π = 1 alone, at most {stored.number('worst_tempered_distance'):.0e} at any K. Of what can be sampled "
        f"the least biased at K={few} has less bias and more progress over noise than the reference in {sum(better)} "
        f"of {len(better)} cases (β_π, K)"
    )
    if not (exact and repaired and weights_matter):
        return Outcome(text, Verdict.FAILS)
    advice = "; ".join(
        f"at β_π={beta_pi} from {NAMES[name]} (mean gradient off by {off(name, beta_pi)}, with the reference's by "
        f"{off('reference', beta_pi)})"
        for beta_pi, name in chosen.items()
    )
    practice = (
        f"At K={few}, once the policy has left the reference, draw the candidates {advice}, and pass "
        "log π_ref − log μ as log_weights: refreshing does most of the repair, and without the weights the KL to the "
        f"optimum stays {without} % above its best (two modes, β_π = 1)."
    )
    return Outcome(text, holds_if(all(better), Verdict.CONDITIONAL), practice)


def _least_biased(found: Measured, names: list[str], k: str) -> str:
    """Of these proposals, the first of those whose mean gradient is nearest to the limit's, up to rounding."""
    distance = {name: found[name]["distance"][k] for name in names}
    return next(name for name in names if distance[name] <= min(distance.values()) + EXACT)


CLAIMS = (
    Claim(
        "B4",
        "Fresh candidates repair EXO-rw at small K: trained again and again on candidates of the last policy it ends "
        "where training on many does, all the way only with the log weights log π_ref − log μ; and drawn from what can "
        "be sampled token by token its gradient has less bias and less noise",
        "not in the paper",
        function="exo_toy.losses.exo_rw_loss, exo_toy.gradient_noise.exo_rw_noises, "
        "exo_toy.gradient_noise.dpo_rw_noises, exo_toy.finite_k.expected_exo_rw_loss",
        test="tests/test_analysis_refreshed_candidates.py",
        script="analysis/refreshed_candidates.py",
        figure="refreshed_candidates",
        paper_value="none",
        evaluate=_refreshed,
        should_hold=False,
    ),
)
