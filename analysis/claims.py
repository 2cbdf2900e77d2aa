"""The paper's claims in our words, where each is checked here, and what the stored results say of it.

The verdicts are computed from stored results alone. The paper is Ji et al., arXiv:2402.00856v4; KL directions are read
by argument order. What an experiment must provide is listed beside the function that reads it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from analysis.storage import StoredResult

Results = Mapping[str, StoredResult]
Measured = Mapping[str, Any]

# Identities are exact: what is left is rounding.
EXACT = 1e-12
# A bias of c/K + O(1/K^2) has slope -1 on logarithmic axes, up to the second term.
SLOPE_TOLERANCE = 0.01
COEFFICIENT_TOLERANCE = 0.01
# An objective known to 1e-16 is flat within about 1e-8 of its maximum, and L-BFGS stops somewhere there.
MAXIMISER_TOLERANCE = 1e-6
# A density ratio within this factor of pi*'s at the mode, on which pi* puts a thousand times the reference, follows it.
FOLLOWS = 2.0
# Converged: a loss at finite K ends within a tenth of the best value of KL(pi_theta || pi*).
NEAR_OPTIMUM = 1.1


class Verdict(StrEnum):
    """What the results say of a claim."""

    HOLDS = "holds"
    CONDITIONAL = "holds under stated conditions"
    FAILS = "fails"
    NOT_TESTED = "not tested here"


@dataclass(frozen=True)
class Outcome:
    """What was measured, in one line, and the verdict it leads to."""

    ours: str
    verdict: Verdict


@dataclass(frozen=True)
class Claim:
    """A claim, where it is made and where it is checked; ``evaluate`` is None where it is not tested here."""

    id: str
    statement: str
    where: str
    function: str = ""
    test: str = ""
    script: str = ""
    figure: str = ""
    paper_value: str = ""
    evaluate: Callable[[Results], Outcome] | None = None
    why_not: str = ""
    # False for a claim whose failure is itself a finding: it is reported and does not make the command fail.
    should_hold: bool = True


def judge(claim: Claim, results: Results) -> Outcome:
    """The outcome of a claim; of one that is not tested, the reason."""
    return claim.evaluate(results) if claim.evaluate else Outcome(claim.why_not, Verdict.NOT_TESTED)


def failed(outcomes: Mapping[Claim, Outcome]) -> list[Claim]:
    """Claims that should hold and do not."""
    return [claim for claim, outcome in outcomes.items() if claim.should_hold and outcome.verdict == Verdict.FAILS]


def _holds_if(condition: bool, otherwise: Verdict = Verdict.FAILS) -> Verdict:
    # A NaN compares as False, and so never holds.
    return Verdict.HOLDS if condition else otherwise


def _identities(*names: str) -> Callable[[Results], Outcome]:
    """Exact identities; objective_identity provides ``problems`` and ``worst_residual.<identity>`` (relative)."""

    def evaluate(results: Results) -> Outcome:
        stored = results["objective_identity"]
        residuals = [stored.number(f"worst_residual.{name}") for name in names]
        problems = stored.number("problems")
        text = f"largest relative residual {_largest(residuals):.1e} over {problems} drawn problems"
        return Outcome(text, _holds_if(all(residual <= EXACT for residual in residuals)))

    return evaluate


def _optimum(results: Results) -> Outcome:
    """The optimum of J; objective_identity provides ``optimum_excess``: the most by which any of

    ``perturbed_policies`` exceeds the objective of pi*_beta, relative to the objective's largest term.
    """
    stored = results["objective_identity"]
    balance, excess = _identities("optimum")(results), stored.number("optimum_excess")
    text = f"gradient of J at π*_β: {balance.ours}; J of {stored.number('perturbed_policies'):,} perturbed policies "
    text += f"above that of π*_β by at most {excess:.1e}, relative"
    return Outcome(text, _holds_if(balance.verdict == Verdict.HOLDS and excess <= EXACT))


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
        f"{_largest(list(distances.values())):.1e} of π*_β (total variation) for each of the splits "
        f"{', '.join(distances)}"
    )
    reached = all(distance <= MAXIMISER_TOLERANCE for distance in distances.values())
    return Outcome(text, _holds_if(identities.verdict == Verdict.HOLDS and reached))


def _largest(values: list[float]) -> float:
    """The maximum, NaN if one of them is."""
    return next((value for value in values if value != value), max(values))


def _loss_limit(loss: str) -> Callable[[Results], Outcome]:
    """E[loss] tends to its limit; gradient_alignment provides, over all cases,

    ``largest_k``, ``<loss>.loss_slope`` (of log |bias| against log K, the one farthest from -1) and
    ``<loss>.loss_coefficient_error`` (K * bias against c, relative, the worst at the largest K).
    """

    def evaluate(results: Results) -> Outcome:
        stored = results["gradient_alignment"]
        slope, error = stored.number(f"{loss}.loss_slope"), stored.number(f"{loss}.loss_coefficient_error")
        text = f"bias falls as K^{slope:.4f}; K·bias within {error:.1e} of its closed form at K={_largest_k(stored)}"
        return Outcome(text, _holds_if(abs(slope + 1) <= SLOPE_TOLERANCE and error <= COEFFICIENT_TOLERANCE))

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
        return Outcome(text, _holds_if(rate and cosine > other))

    return evaluate


def _largest_k(stored: StoredResult) -> str:
    return f"{stored.number('largest_k'):,}"


def _loss_and_gradient_limit(loss: str) -> Callable[[Results], Outcome]:
    """Both of the above."""

    def evaluate(results: Results) -> Outcome:
        value, gradient = _loss_limit(loss)(results), _gradient_limit(loss)(results)
        both = value.verdict == gradient.verdict == Verdict.HOLDS
        return Outcome(f"loss: {value.ours}; gradient: {gradient.ours}", _holds_if(both))

    return evaluate


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
    return Outcome(text, _holds_if(all(chosen.values()), Verdict.CONDITIONAL))


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
    return Outcome(text, _holds_if(from_k == min(values), Verdict.CONDITIONAL))


def _mean_seeking(results: Results) -> Outcome:
    """DPO under limited capacity: its limit gives both modes less than pi* does, the rest lying between them."""
    target, best, mean, _ = _two_modes(results["mode_seeking"])
    text = (
        f"masses of the two modes {_pair(mean['mode_masses'])} at the minimiser of KL(π*‖π_θ), {_pair(target)} in π*; "
        f"KL(π_θ‖π*) {mean['kl_policy_to_optimal']:.3f}, at best {best['kl_policy_to_optimal']:.3f}"
    )
    neither = all(mass < wanted for mass, wanted in zip(mean["mode_masses"], target, strict=True))
    return Outcome(text, _holds_if(neither and mean["kl_policy_to_optimal"] > best["kl_policy_to_optimal"]))


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
    return Outcome(text, _holds_if(exo <= EXACT and dpo > EXACT))


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
        verdicts += [outcome.verdict, _holds_if(error <= COEFFICIENT_TOLERANCE)]
    return Outcome("; ".join(text), _holds_if(all(verdict == Verdict.HOLDS for verdict in verdicts)))


def _model_step(results: Results) -> Outcome:
    """A step of a language model by two ways; lm_step provides ``worst.<head>.<method>.<quantity>``, the largest

    relative difference of loss and gradients from the naive way's and from float64, ``rounding`` (of its dtype), and
    ``cells`` (a list, by ``vocab_size`` and ``k``, with ``steps.<head>.<method>``).
    """
    stored = results["lm_step"]
    worst, rounding = stored.number("worst"), stored.number("rounding")
    kernel = [worst[head]["kernel"] for head in worst]
    naive = [worst[head]["naive"] for head in worst]
    loss, gradient = (_largest([found[f"{name}_difference"] for found in kernel]) for name in ("loss", "gradient"))
    ours, theirs = (_largest([found["gradient_difference_from_float64"] for found in way]) for way in (kernel, naive))
    largest = max(stored.number("cells"), key=lambda cell: (cell["vocab_size"], cell["k"]))
    sizes = "; ".join(
        f"head {head}: {_step(steps['kernel'])}, naive {_step(steps['naive'])}"
        for head, steps in largest["steps"].items()
    )
    text = (
        f"{stored.number('dtype')}, {stored.number('device')}: largest relative difference of the loss {loss:.1e}, of "
        f"any parameter's gradient {gradient:.1e} (from float64: kernel {ours:.1e}, naive {theirs:.1e}). Peak memory "
        f"and time of a step at V={largest['vocab_size']:,}, K={largest['k']}: {sizes}"
    )
    differences = [difference for found in kernel for difference in found.values()]
    # What is left is rounding, amplified by the model: half the digits are a wide margin for it.
    return Outcome(text, _holds_if(all(difference <= rounding**0.5 for difference in differences)))


def _frontier(results: Results) -> Outcome:
    """Distances below the exact frontier at equal divergence, and rewards at equal steps, in pairs of the same seed."""
    stored = results["alignment"]
    at = stored.number("at_divergence")
    closer = {pair: _signs(found) for pair, found in at["differences"].items()}
    differences = stored.number("differences")
    # Less below the frontier, and more reward, are what the paper reports of the first of each pair.
    orders = [sign == -1 for pair in ("exo_rw - ppo", "ppo - dpo_rw") for sign in closer[pair].values()]
    below = "; ".join(
        f"{LOOKS[name]} " + ", ".join(f"{value['mean']:.2f} at {kl}" for kl, value in found.items())
        for name, found in at["below_frontier"].items()
    )
    rewards = _listed(_signs_of(differences, "oracle_reward"), MORE)
    optimised = _listed(_signs_of(differences, "model_objective", ("exo_rw - ppo", "exo_rw - dpo_rw")), MORE)
    text = (
        f"nats of oracle reward below the exact frontier at equal KL to the reference: {below}. "
        f"Paired by seed (95 % intervals), at equal KL: {_listed(closer, NEARER)}. "
        f"At equal β and steps, oracle reward: {rewards}. J of the reward model that is optimised: {optimised}. "
        f"PPO sees {stored.number('ppo_completions'):,} completions of a prompt, the others "
        f"{stored.config['completions']:,}. {_when_changed(results['alignment_ablations'])}"
    )
    return Outcome(text, Verdict.HOLDS if all(orders) else Verdict.CONDITIONAL if any(orders) else Verdict.FAILS)


NEARER = {-1: "nearer", 0: "no clear difference", 1: "farther"}
MORE = {-1: "less", 0: "no clear difference", 1: "more"}


def _listed(signs: Mapping[str, Mapping[str, int]], words: Mapping[int, str]) -> str:
    """Pair by pair: "EXO-rw against PPO nearer at 0.2, 0.5, farther at 1"."""
    texts = []
    for pair, found in signs.items():
        first, second = (LOOKS[name] for name in pair.split(" - "))
        groups = {word: [at for at, sign in found.items() if sign == key] for key, word in words.items()}
        said = ", ".join(f"{word} at {', '.join(at)}" for word, at in groups.items() if at)
        texts.append(f"{first} against {second} {said}")
    return "; ".join(texts)


def _signs_of(
    differences: Mapping[str, Mapping[str, Measured]], name: str, pairs: tuple[str, ...] = ()
) -> dict[str, dict[str, int]]:
    """The sign of one measure's difference by pair and temperature."""
    return {
        pair: _signs({beta: found[name] for beta, found in betas.items()})
        for pair, betas in differences.items()
        if not pairs or pair in pairs
    }


def _when_changed(stored: StoredResult) -> str:
    """Under which single changes of the setting one method of a pair ends with less J of the oracle's reward."""
    texts = []
    for pair in ("exo_rw - ppo", "ppo - dpo_rw", "exo_rw - dpo_rw", "exo_pref - dpo_pref"):
        found: dict[int, list[str]] = {1: [], 0: [], -1: []}
        for axis, values in stored.number("axes").items():
            if axis.startswith("limit_"):
                continue
            for value, entry in values.items():
                if pair in entry["differences"]:
                    (sign,) = _signs({value: entry["differences"][pair]["oracle_objective"]}).values()
                    found[sign].append(f"{axis}={value}")
        first, second = (LOOKS[name] for name in pair.split(" - "))
        usual = max(found, key=lambda sign: len(found[sign]))
        outcomes = [
            f"{MORE[sign]} in {len(found[sign])}" + ("" if sign == usual else f" ({', '.join(found[sign])})")
            for sign in found
            if found[sign]
        ]
        texts.append(f"{first} against {second} {', '.join(outcomes)}")
    beta = stored.config["beta"]
    return f"J of the oracle's reward with one setting changed at β={beta:g}: " + ". ".join(texts)


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
        _holds_if(meet and gaps["exo_pref"] > MAXIMISER_TOLERANCE),
    )


def _gradient_noise(results: Results) -> Outcome:
    """Noise over signal of EXO-rw and PPO at equal K, on the same policies; gradient_noise provides

    ``trainings.<training>.<beta>.<stage>``: geometric means over seeds, per sample; ``exo_over_other.<other>.<K>``.
    """
    trainings = results["gradient_noise"].number("trainings")
    names = {"exo_rw": "EXO-rw", "ppo": "PPO"}
    betas = list(trainings["ppo"])
    start = trainings["ppo"][betas[0]]["start"]
    at_start, paired = start["exo_over_other"]["ppo"], start["exo_over_other"]["leave_one_out"]
    first, *_, last = at_start
    # By training, temperature, stage and K: is EXO-rw less noisy than PPO, in all of the interval?
    less = [
        ratio["high"] < 1
        for by_beta in trainings.values()
        for stages in by_beta.values()
        for stage, found in stages.items()
        if stage != "start"
        for ratio in found["exo_over_other"]["ppo"].values()
    ]
    at_end = "; ".join(
        f"on {names[training]}'s policies "
        + ", ".join(f"{by_beta[beta]['end']['exo_over_other']['ppo'][last]['mean']:.2g} at β={beta}" for beta in betas)
        for training, by_beta in trainings.items()
    )
    traces = ", ".join(
        f"{trainings['exo_rw'][beta]['end']['trace']['exo_rw'][last]['mean']:.2g} and "
        f"{trainings['ppo'][beta]['end']['trace']['ppo']['mean']:.2g} at β={beta}"
        for beta in betas
    )
    baselines = [
        trainings["ppo"][beta]["end"]["noise_to_signal"]["none"]["mean"]
        / trainings["ppo"][beta]["end"]["noise_to_signal"]["best"]["mean"]
        for beta in betas
    ]
    text = (
        f"exact noise over signal at equal K. At the start EXO-rw's is the leave-one-out policy gradient's (ratio "
        f"{paired[first]['mean']:.6f}) and {at_start[first]['mean']:.2f} times PPO's at K={first}, "
        f"{at_start[last]['mean']:.2f} at K={last}. Later it is below PPO's in {sum(less)} of {len(less)} cases "
        f"(training, β, stage, K); at the end, K={last}, EXO-rw over PPO: {at_end}; trace per sample "
        f"of each on its own policies: {traces}. Without a baseline the policy "
        f"gradient has {min(baselines):.3g} to {max(baselines):.3g} times the noise that it has with the best constant"
    )
    verdict = Verdict.HOLDS if all(less) else Verdict.CONDITIONAL if any(less) else Verdict.FAILS
    return Outcome(text, verdict)


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


LOOKS = {
    "exo_rw": "EXO-rw",
    "dpo_rw": "DPO-rw",
    "ppo": "PPO",
    "ppo_few": "PPO on as few completions",
    "exo_pref": "EXO-pref",
    "dpo_pref": "DPO-pref",
}


def _signs(differences: Mapping[str, Measured]) -> dict[str, int]:
    """The sign of each difference, 0 where its interval holds 0."""
    return {at: 1 if found["low"] > 0 else -1 if found["high"] < 0 else 0 for at, found in differences.items()}


def _step(step: Measured) -> str:
    return f"{step['peak_bytes'] / 2**20:,.0f} MiB and {step['median_seconds']:.2f} s"


NEEDS_MODELS = "needs the data sets, the weights of the authors' models and GPT-4 as a judge"

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
        "C11",
        "Policy-gradient RL has high variance and needs sampling inside the training loop",
        "Introduction; here against EXO-rw at equal numbers of samples",
        function="exo_toy.gradient_noise.exo_rw_noise, exo_toy.gradient_noise.policy_gradient_noise",
        test="tests/test_gradient_noise.py",
        script="analysis/gradient_noise.py",
        figure="gradient_noise",
        paper_value="stated",
        evaluate=_gradient_noise,
        should_hold=False,
    ),
    Claim(
        "C12",
        "An autoregressive model of polynomial size cannot hold every energy-based distribution",
        "Introduction and Section 3 (after Lin et al., 2021)",
        paper_value="cited",
        why_not="planned: state counts and the KL gap against capacity",
    ),
    Claim(
        "C13",
        "IMDB: EXO has the best frontier of oracle reward against KL(π_θ‖π_sft), and the highest reward at equal "
        "training steps",
        "Section 4, IMDB; here in a world of reviews where all is exact",
        function="exo_toy.evaluation.frontier, exo_toy.training.align, exo_toy.training.ppo",
        test="tests/test_analysis_alignment.py",
        script="analysis/alignment.py",
        figure="alignment",
        paper_value="EXO above PPO above DPO (figure)",
        evaluate=_frontier,
        should_hold=False,
    ),
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
    Claim(
        "C15",
        "TL;DR, Anthropic-HH and instruction following: EXO above DPO and PPO, on par with Best-of-128",
        "Section 4, tables of win rates",
        paper_value="tables below",
        why_not=NEEDS_MODELS,
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
    Claim(
        "E2",
        "The same losses serve language models: a step has the same loss and gradients through naive logits and "
        "through the kernel that makes none",
        "not in the paper",
        function="exo_toy.kernels.linear_logps",
        test="tests/test_analysis_lm_step.py",
        script="analysis/lm_step.py",
        figure="lm_step",
        paper_value="none",
        evaluate=_model_step,
    ),
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

WIN_RATE_COLUMNS = ("method", "RM vs SFT", "RM vs chosen", "GPT-4 vs SFT", "GPT-4 vs chosen")
WIN_RATES = {
    "TL;DR summarisation": (
        ("DPO-pref", 68.3, 23.7, 57.0, 30.5),
        ("EXO-pref", 92.5, 60.1, 83.0, 55.0),
        ("Best-of-N (128)", 99.3, 75.8, 83.5, 60.0),
        ("PPO", 93.2, 58.3, 77.0, 52.0),
        ("DPO-rw", 82.7, 39.8, 70.0, 41.0),
        ("EXO-rw", 97.3, 76.4, 88.5, 64.0),
    ),
    "Anthropic-HH (helpfulness) dialogue": (
        ("DPO-pref", 66.3, 65.1, 58.0, 37.0),
        ("EXO-pref", 76.4, 76.7, 73.0, 51.0),
        ("Best-of-N (128)", 94.6, 98.2, 86.0, 63.0),
        ("PPO", 75.0, 74.0, 66.5, 52.0),
        ("DPO-rw", 79.9, 81.3, 75.5, 49.0),
        ("EXO-rw", 85.6, 87.2, 83.5, 60.0),
    ),
}
