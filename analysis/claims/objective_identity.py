"""Identities of the objective, its optimum, and what follows from them."""

from collections.abc import Callable

from analysis.claims.base import EXACT, MAXIMISER_TOLERANCE, Claim, Outcome, Results, Verdict, holds_if, largest


def _identities(*names: str) -> Callable[[Results], Outcome]:
    """Exact identities; objective_identity provides ``problems`` and ``worst_residual.<identity>`` (relative)."""

    def evaluate(results: Results) -> Outcome:
        stored = results["objective_identity"]
        residuals = [stored.number(f"worst_residual.{name}") for name in names]
        problems = stored.number("problems")
        text = f"largest relative residual {largest(residuals):.1e} over {problems} drawn problems"
        return Outcome(text, holds_if(all(residual <= EXACT for residual in residuals)))

    return evaluate


def _optimum(results: Results) -> Outcome:
    """The optimum of J; objective_identity provides ``optimum_excess``: the most by which any of

    ``perturbed_policies`` exceeds the objective of pi*_beta, relative to the objective's largest term.
    """
    stored = results["objective_identity"]
    balance, excess = _identities("optimum")(results), stored.number("optimum_excess")
    text = f"gradient of J at π*_β: {balance.ours}; J of {stored.number('perturbed_policies'):,} perturbed policies "
    text += f"above that of π*_β by at most {excess:.1e}, relative"
    return Outcome(text, holds_if(balance.verdict == Verdict.HOLDS and excess <= EXACT))


def _splits(results: Results) -> Outcome:
    """Splits of beta; objective_identity provides ``split_distance.<split>``: the largest total variation between

    pi*_beta and the numerical maximiser of the generalised objective (the best of several starts), over
    ``split_problems``.
    """
    stored = results["objective_identity"]
    identities = _identities("generalized", "generalized_gradient", "optimum_split")(results)
    distances = stored.number("split_distance")
    text = (
        f"{identities.ours}; maximising J numerically for {stored.number('split_problems')} problems ends within "
        f"{largest(list(distances.values())):.1e} of π*_β (total variation) for each of the splits "
        f"{', '.join(distances)}"
    )
    reached = all(distance <= MAXIMISER_TOLERANCE for distance in distances.values())
    return Outcome(text, holds_if(identities.verdict == Verdict.HOLDS and reached))


def _preference_definition(results: Results) -> Outcome:
    """EXO-pref; objective_identity provides ``worst_residual.exo_pref`` (Eq. 16 against its written-out sum) and

    ``exo_pref_recovered_reward`` {eps: recovered over true reward, for small reward gaps}, with eps as text.
    """
    stored = results["objective_identity"]
    residual = stored.number("worst_residual.exo_pref")
    recovered = stored.number("exo_pref_recovered_reward")
    factors = ", ".join(f"{factor:.3g} at ε={eps}" for eps, factor in recovered.items())
    text = f"definition to {residual:.1e}; optimum is π*_β only up to ε: recovered over true reward {factors}"
    return Outcome(text, Verdict.CONDITIONAL if residual <= EXACT else Verdict.FAILS)


CLAIMS = (
    Claim(
        "C1",
        "Maximising the KL-regularised reward is minimising KL(π_θ‖π*_β)",
        "Sections 2 and 3 (after Korbak et al., 2022)",
        function="exo_toy.theorems.objective_identity",
        test="tests/test_theorems.py",
        script="analysis/objective_identity.py",
        figure="objective_identity",
        paper_value="proved",
        evaluate=_identities("objective"),
    ),
    Claim(
        "C2",
        "The optimal policy is energy-based: π*_β ∝ π_sft exp(r/β)",
        "Section 2",
        function="exo_toy.targets.optimal_policy",
        test="tests/test_targets.py",
        script="analysis/objective_identity.py",
        figure="objective_identity",
        paper_value="proved",
        evaluate=_optimum,
    ),
    Claim(
        "C3",
        "The KL penalty splits into β = β_r·β_π with the same optimum; PPO is (1, β), DPO is (β, 1) in (β_π, β_r)",
        "Section 3, generalised objective",
        function="exo_toy.theorems.generalized_objective_identity, exo_toy.theorems.optimum_equivalence",
        test="tests/test_theorems.py",
        script="analysis/objective_identity.py",
        figure="objective_identity",
        paper_value="proved",
        evaluate=_splits,
    ),
    Claim(
        "C10",
        "EXO learns from preferences with K=2 and the human label as a label-smoothed one-hot target",
        "Section 3, Eq. 16",
        function="exo_toy.losses.exo_pref_loss",
        test="tests/test_pairwise_losses.py",
        script="analysis/objective_identity.py",
        figure="objective_identity",
        paper_value="definition",
        evaluate=_preference_definition,
    ),
    Claim(
        "E1",
        "Expected losses at finite K by quadrature equal the sum over all tuples of candidates",
        "not in the paper",
        function="exo_toy.finite_k.expected_exo_rw_loss, exo_toy.finite_k.expected_dpo_rw_loss",
        test="tests/test_finite_k.py",
        script="analysis/objective_identity.py",
        figure="objective_identity",
        paper_value="none",
        evaluate=_identities("finite_k_enumeration"),
    ),
)
