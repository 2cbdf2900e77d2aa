"""Candidates from elsewhere than the reference, with their weights corrected."""

from analysis.claims.base import EXACT, NEAR_OPTIMUM, Claim, Outcome, Results, Verdict, holds_if


def _refreshed(results: Results) -> Outcome:
    """EXO-rw on refreshed candidates; refreshed_candidates provides ``worst_tempered_distance``, ``best_kl``,

    ``by_beta_pi.<beta_pi>.<stage>.proposals.<proposal>`` and ``refreshed.<corrected or not>.<K>`` (KL by refresh).
    """
    stored = results["refreshed_candidates"]
    by_beta_pi, paths, best = stored.number("by_beta_pi"), stored.number("refreshed"), stored.number("best_kl")
    at_end = {beta_pi: stages["end"]["proposals"] for beta_pi, stages in by_beta_pi.items()}
    low, *_, high = at_end
    exact = stored.number("worst_tempered_distance") <= EXACT
    converged = all(path[-1] <= NEAR_OPTIMUM * best for path in paths["corrected"].values())
    less = [
        ratio["high"] < 1 for proposals in at_end.values() for ratio in proposals["tempered"]["over_reference"].values()
    ]
    k = "4" if "4" in at_end[high]["reference"]["cosine"] else next(iter(at_end[high]["reference"]["cosine"]))
    usual, tempered = at_end[high]["reference"], at_end[high]["tempered"]
    first, path = next(iter(paths["corrected"].items()))
    needed = next((i for i, kl in enumerate(path) if kl <= NEAR_OPTIMUM * best), None)
    reached = "not within" if needed is None else "within"
    text = (
        f"exact. On tempered candidates the mean gradient is (K−1)/K of the limit's at every K, off by at most "
        f"{stored.number('worst_tempered_distance'):.0e}; on the reference's, at the end of training and K={k}, it is "
        f"off by {usual['distance'][k]:.0%} at β_π={high} (effective share {usual['share']:.2f}, noise over signal "
        f"{1 / tempered['over_reference'][k]['mean']:.2g} times that of tempered ones) and by "
        f"{at_end[low]['reference']['distance'][k]:.0%} at β_π={low}, where the policy's own candidates are off by "
        f"{at_end[low]['policy']['distance'][k]:.0%}; without log weights the policy's are off by "
        f"{at_end[high]['uncorrected']['distance'][k]:.0%} at β_π={high}. Tempered candidates are less noisy in "
        f"{sum(less)} of {len(less)} cases (β_π, K). Two modes, K={first}: KL(π_θ‖π*) {path[0]:.3g} on the reference's "
        f"candidates, {reached} {NEAR_OPTIMUM:g} times the best ({best:.3g}) after "
        f"{len(path) - 1 if needed is None else needed} refreshes"
    )
    practice = (
        f"At K={k}, once the policy has left the reference, draw the candidates from π_θ^β_π·π_ref^(1−β_π) (the policy "
        "itself at β_π = 1, where EXO-rw becomes RLOO with the KL in the reward) and pass log π_ref − log μ as "
        "log_weights; with β_π near 0 the reference's own candidates do and nothing needs refreshing."
    )
    if not (exact and converged):
        return Outcome(text, Verdict.FAILS)
    return Outcome(text, holds_if(all(less), Verdict.CONDITIONAL), practice)


CLAIMS = (
    Claim(
        "B4",
        "Fresh candidates with their weights corrected repair EXO-rw at small K: drawn from the tempered policy its "
        "mean gradient has the direction of its limit at every K, and training on a few candidates ends where "
        "training on many does",
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
