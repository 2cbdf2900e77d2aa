"""What each loss makes of two modes under limited capacity."""

from analysis.claims.base import NEAR_OPTIMUM, Claim, Measured, Outcome, Results, Verdict, holds_if
from analysis.storage import StoredResult


def _mode_seeking(results: Results) -> Outcome:
    """EXO under limited capacity: the limit, and the fixed points of the expected loss at each K.

    A policy has chosen a mode where it gives that one at least what pi* gives it, and the other one less.
    mode_seeking provides what :func:`_two_modes` reads.
    """
    stored = results["mode_seeking"]
    target, limit, _, fixed_points = _two_modes(stored)
    chosen = {k: _chooses_a_mode(point["mode_masses"], target) for k, point in fixed_points.items()}
    from_k = _holds_from(chosen)
    found = f"from K={from_k} on" if from_k else "at no K tested"
    text = (
        f"masses of the two modes {_pair(limit['mode_masses'])} at the minimiser of KL(π_θ‖π*), {_pair(target)} in π*; "
        f"EXO-rw's fixed points choose a mode {found}"
    )
    if not _chooses_a_mode(limit["mode_masses"], target) or from_k is None:
        return Outcome(text, Verdict.FAILS)
    return Outcome(text, holds_if(all(chosen.values()), Verdict.CONDITIONAL))


def _finite_k(results: Results) -> Outcome:
    """EXO at finite K: KL(pi_theta || pi*) of the fixed points against the best possible."""
    _, limit, _, fixed_points = _two_modes(results["mode_seeking"])
    best = limit["kl_policy_to_optimal"]
    values = {k: point["kl_policy_to_optimal"] for k, point in fixed_points.items()}
    from_k = _holds_from({k: value <= NEAR_OPTIMUM * best for k, value in values.items()})
    reached = ", ".join(f"{value:.3f} at K={k}" for k, value in values.items())
    text = f"KL(π_θ‖π*) of the fixed points: {reached}; of the best minimiser {best:.3f}"
    if from_k is None:
        return Outcome(text, Verdict.FAILS)
    return Outcome(text, holds_if(from_k == min(values), Verdict.CONDITIONAL))


def _mean_seeking(results: Results) -> Outcome:
    """DPO under limited capacity: its limit gives both modes less than pi* does, the rest lying between them."""
    target, best, mean, _ = _two_modes(results["mode_seeking"])
    text = (
        f"masses of the two modes {_pair(mean['mode_masses'])} at the minimiser of KL(π*‖π_θ), {_pair(target)} in π*; "
        f"KL(π_θ‖π*) {mean['kl_policy_to_optimal']:.3f}, at best {best['kl_policy_to_optimal']:.3f}"
    )
    neither = all(mass < wanted for mass, wanted in zip(mean["mode_masses"], target, strict=True))
    return Outcome(text, holds_if(neither and mean["kl_policy_to_optimal"] > best["kl_policy_to_optimal"]))


def _two_modes(stored: StoredResult) -> tuple[list[float], Measured, Measured, dict[int, Measured]]:
    """The two-mode case with independent positions: pi*'s mode masses, both limits, EXO-rw's fixed points by K.

    mode_seeking provides ``target.<beta>.mode_masses``, ``capacity`` (a list, by ``order`` and ``beta``, with
    ``policy_to_optimal``, best first, and ``optimal_to_policy``) and ``fixed_points`` (a list, by ``loss`` and ``k``).
    """
    beta = stored.config["beta"]
    target = stored.number("target")[str(beta)]["mode_masses"]
    (limits,) = (case for case in stored.number("capacity") if (case["order"], case["beta"]) == (0, beta))
    points = {point["k"]: point for point in stored.number("fixed_points") if point["loss"] == "exo"}
    return target, limits["policy_to_optimal"][0], limits["optimal_to_policy"], dict(sorted(points.items()))


def _chooses_a_mode(masses: list[float], target: list[float]) -> bool:
    """One mode gets at least its share of pi*, the other less."""
    more = [mass >= wanted for mass, wanted in zip(masses, target, strict=True)]
    return sum(more) == 1


def _pair(masses: list[float]) -> str:
    return " and ".join(f"{mass:.4f}" for mass in masses)


def _holds_from(holds: dict[int, bool]) -> int | None:
    """The smallest key from which on all values are true."""
    from_k = None
    for k in sorted(holds, reverse=True):
        if not holds[k]:
            break
        from_k = k
    return from_k


CLAIMS = (
    Claim(
        "C6",
        "Under limited capacity EXO reaches RLHF's mode-seeking solution",
        "Section 3, comparison of EXO and DPO",
        function="exo_toy.finite_k.expected_exo_rw_loss",
        test="tests/test_analysis_mode_seeking.py",
        script="analysis/mode_seeking.py",
        figure="mode_seeking",
        paper_value="illustrated",
        evaluate=_mode_seeking,
    ),
    Claim(
        "C7",
        "With finite K EXO still converges effectively and efficiently",
        "Section 3, EXO with K candidates",
        function="exo_toy.finite_k.expected_exo_rw_loss",
        test="tests/test_analysis_mode_seeking.py",
        script="analysis/mode_seeking.py",
        figure="mode_seeking",
        paper_value="stated",
        evaluate=_finite_k,
    ),
    Claim(
        "C9",
        "Hence DPO is inexact: under limited capacity its solution is mean-seeking",
        "Section 3, comparison of EXO and DPO",
        function="exo_toy.finite_k.expected_dpo_rw_loss",
        test="tests/test_analysis_mode_seeking.py",
        script="analysis/mode_seeking.py",
        figure="mode_seeking",
        paper_value="illustrated",
        evaluate=_mean_seeking,
    ),
)
