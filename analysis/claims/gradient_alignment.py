"""Limits of the losses and of their gradients, and the rate at which they are reached."""

from collections.abc import Callable

from analysis.claims.base import EXACT, Claim, Outcome, Results, Verdict, holds_if
from analysis.storage import StoredResult

# A bias of c/K + O(1/K^2) has slope -1 on logarithmic axes, up to the second term.
SLOPE_TOLERANCE = 0.01
COEFFICIENT_TOLERANCE = 0.01


def _loss_limit(loss: str) -> Callable[[Results], Outcome]:
    """E[loss] tends to its limit; gradient_alignment provides, over all cases,

    ``largest_k``, ``<loss>.loss_slope`` (of log |bias| against log K, the one farthest from -1) and
    ``<loss>.loss_coefficient_error`` (K * bias against c, relative, the worst at the largest K).
    """

    def evaluate(results: Results) -> Outcome:
        stored = results["gradient_alignment"]
        slope, error = stored.number(f"{loss}.loss_slope"), stored.number(f"{loss}.loss_coefficient_error")
        text = f"bias falls as K^{slope:.4f}; K·bias within {error:.1e} of its closed form at K={_largest_k(stored)}"
        return Outcome(text, holds_if(abs(slope + 1) <= SLOPE_TOLERANCE and error <= COEFFICIENT_TOLERANCE))

    return evaluate


def _gradient_limit(loss: str) -> Callable[[Results], Outcome]:
    """E[gradient] tends to that of its divergence; gradient_alignment provides, over all cases and policy classes,

    ``<loss>.gradient_slope`` (of the log relative error against log K, the one farthest from -1) and, at the largest
    K, the worst of ``<loss>.gradient_error`` (relative), ``<loss>.gradient_coefficient_error`` (K * bias against the
    closed form, relative), ``<loss>.cosine`` (to its own limit) and ``<loss>.largest_cosine_to_other``.
    """

    def evaluate(results: Results) -> Outcome:
        stored = results["gradient_alignment"]
        slope, error = stored.number(f"{loss}.gradient_slope"), stored.number(f"{loss}.gradient_error")
        coefficient_error = stored.number(f"{loss}.gradient_coefficient_error")
        cosine, other = stored.number(f"{loss}.cosine"), stored.number(f"{loss}.largest_cosine_to_other")
        text = (
            f"relative error falls as K^{slope:.4f}, to {error:.1e} at K={_largest_k(stored)}, K·bias within "
            f"{coefficient_error:.1e} of its closed form; 1 − cosine at most {1 - cosine:.1e} (cosine to the other "
            f"divergence's gradient at most {other:.3f})"
        )
        rate = abs(slope + 1) <= SLOPE_TOLERANCE and coefficient_error <= COEFFICIENT_TOLERANCE
        return Outcome(text, holds_if(rate and cosine > other))

    return evaluate


def _loss_and_gradient_limit(loss: str) -> Callable[[Results], Outcome]:
    """Both of the above."""

    def evaluate(results: Results) -> Outcome:
        value, gradient = _loss_limit(loss)(results), _gradient_limit(loss)(results)
        both = value.verdict == gradient.verdict == Verdict.HOLDS
        return Outcome(f"loss: {value.ours}; gradient: {gradient.ours}", holds_if(both))

    return evaluate


def _at_reference(results: Results) -> Outcome:
    """EXO-rw at the reference; gradient_alignment provides ``at_reference.exo_rw`` and ``.dpo_rw``:

    the relative distance of E[gradient] from (K-1)/K times its limit, the worst over all K and cases; and
    ``at_reference.dpo_rw_median_cosine`` {K: cosine of DPO-rw's to the gradient of KL(pi_theta || pi*)}.
    """
    stored = results["gradient_alignment"]
    exo, dpo = stored.number("at_reference.exo_rw"), stored.number("at_reference.dpo_rw")
    cosines = list(stored.number("at_reference.dpo_rw_median_cosine").items())
    (first, high), (last, low) = cosines[0], cosines[-1]
    text = (
        f"largest relative distance over all K: EXO-rw {exo:.1e}, DPO-rw {dpo:.1e} (its cosine to RL's gradient: "
        f"median {high:.3f} at K={first}, {low:.3f} at K={last})"
    )
    return Outcome(text, holds_if(exo <= EXACT and dpo > EXACT))


def _rates(results: Results) -> Outcome:
    """Bias c/K of both losses and gradients; gradient_alignment provides ``<loss>.rate_error``, the worst distance of

    the extrapolated K * bias (value and gradient) from the closed form at the largest of ``config["rate_exponents"]``.
    """
    stored = results["gradient_alignment"]
    text, verdicts = [], []
    for loss, name in (("exo_rw", "EXO-rw"), ("dpo_rw", "DPO-rw")):
        outcome, error = _loss_and_gradient_limit(loss)(results), stored.number(f"{loss}.rate_error")
        slopes = stored.number(f"{loss}.loss_slope"), stored.number(f"{loss}.gradient_slope")
        text.append(
            f"{name}: bias of the loss falls as K^{slopes[0]:.4f}, of the gradient as K^{slopes[1]:.4f}; extrapolated "
            f"coefficient within {error:.1e} of the closed form"
        )
        verdicts += [outcome.verdict, holds_if(error <= COEFFICIENT_TOLERANCE)]
    return Outcome("; ".join(text), holds_if(all(verdict == Verdict.HOLDS for verdict in verdicts)))


def _largest_k(stored: StoredResult) -> str:
    return f"{stored.number('largest_k'):,}"


CLAIMS = (
    Claim(
        "C4",
        "The K-candidate loss KL(p_f‖p_r) tends to KL(π_θ^{β_π}‖π*_{β_r}) as K grows",
        "Section 3, EXO with K candidates",
        function="exo_toy.finite_k.expected_exo_rw_loss",
        test="tests/test_finite_k.py",
        script="analysis/gradient_alignment.py",
        figure="gradient_alignment",
        paper_value="limit",
        evaluate=_loss_limit("exo_rw"),
    ),
    Claim(
        "C5",
        "(T1) EXO's gradient tends to that of KL(π_θ^{β_π}‖π*_{β_r}), which is −∇J/β_r, for any parametrisation",
        "Section 3, theorem on EXO's gradient",
        function="exo_toy.theorems.exo_rw_gradient_limit",
        test="tests/test_theorems.py",
        script="analysis/gradient_alignment.py",
        figure="gradient_alignment",
        paper_value="limit",
        evaluate=_gradient_limit("exo_rw"),
    ),
    Claim(
        "C8",
        "(T2) DPO extends to soft targets over K candidates (DPO-rw); loss and gradient tend to those of "
        "KL(π*_{β_r}‖π_θ^{β_π})",
        "Section 3, DPO with rewards",
        function="exo_toy.theorems.dpo_rw_gradient_limit",
        test="tests/test_theorems.py",
        script="analysis/gradient_alignment.py",
        figure="gradient_alignment",
        paper_value="limit",
        evaluate=_loss_and_gradient_limit("dpo_rw"),
    ),
    Claim(
        "T3",
        "At θ = reference, EXO-rw's expected gradient is (K−1)/K times its limit, at every K",
        "not in the paper",
        function="exo_toy.theorems.exo_rw_gradient_at_reference",
        test="tests/test_theorems.py",
        script="analysis/gradient_alignment.py",
        figure="gradient_alignment",
        paper_value="none",
        evaluate=_at_reference,
    ),
    Claim(
        "T4",
        "The bias of both losses is c/K + O(1/K²) with c in closed form",
        "not in the paper",
        function="exo_toy.theorems.exo_rw_bias_rate, exo_toy.theorems.dpo_rw_bias_rate",
        test="tests/test_theorems.py",
        script="analysis/gradient_alignment.py",
        figure="gradient_alignment",
        paper_value="none",
        evaluate=_rates,
    ),
)
