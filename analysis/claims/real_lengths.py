"""What of the short completions' results holds at real lengths, and what it costs."""

import math

from analysis.claims.base import Claim, Measured, Outcome, Results, holds_if

# A policy has sought a mode that holds so much of it.
SOUGHT = 0.9
# Exponential growth with length at no less than half of what the divergence per token would give.
LEAST_RATE = 0.5
# Candidates of a prompt that a run may draw.
FEASIBLE = 1024


def _real_lengths(results: Results) -> Outcome:
    """Modes and candidates; real_lengths provides ``planted`` (a list, by ``length`` and ``order``, of both minimisers

    and of ``optimal``) and ``candidates`` (a list, by ``length`` and ``divergence``, with ``log_ess_share``,
    ``doublings_needed``, ``estimates`` and ``coverage``).
    """
    stored = results["real_lengths"]
    # A policy without memory holds no phrase.
    planted = [case for case in stored.number("planted") if case["order"] > 0]
    found = stored.number("candidates")
    divergences = sorted({case["divergence"] for case in found})
    seeking = all(map(_seeks, planted))
    rates = [_rates(_by_length(found, divergence)) for divergence in divergences]
    growing = all(LEAST_RATE <= rate < math.inf for each in rates for rate in each.values())
    case = max(planted, key=lambda case: (case["length"], case["order"]))
    seeker, mean = case["policy_to_optimal"], case["optimal_to_policy"]
    short, *_, long = steep = _by_length(found, divergences[-1])
    estimate, low, high, exact = long["estimates"]["log_z"]
    held = " and ".join(f"{_share(each['coverage'])} at T={each['length']}" for each in (short, long))
    text = (
        f"two planted phrases, T={case['length']}, k={case['order']} shared by all positions: min KL(π_θ‖π*) puts "
        f"{max(seeker['modes'][1:]):.3f} on one mode and earns {seeker['expected_reward']:.1f} of π*'s "
        f"{case['optimal']['expected_reward']:.1f}, KL(π_θ‖π*) {seeker['kl_policy_to_optimal']:.2f} (its "
        f"gradient's largest entry {case['gradient']:.0e}); min KL(π*‖π_θ) keeps {mean['modes'][1]:.3f} and "
        f"{mean['modes'][2]:.3f}, earns {mean['expected_reward']:.1f}, KL(π_θ‖π*) "
        f"{mean['kl_policy_to_optimal']:.1f}. At {long['divergence']:g} nats per token and T={long['length']}: ESS of "
        f"π*'s weights {_power(long['log_ess_share']['optimal'])} per candidate, EXO-rw within "
        f"{stored.config['share']:.0%} of its limit from K={_doubled(long['doublings_needed']['exo'])}, DPO-rw from "
        f"{_doubled(long['doublings_needed']['dpo'])} (log K grows by {rates[-1]['exo']:.2f} and "
        f"{rates[-1]['dpo']:.2f} nats per nat of divergence); SNIS from {stored.config['snis_samples']} samples puts "
        f"log Z at {estimate:.1f} ({low:.1f} … {high:.1f}), it is {exact:.1f}; its 95% interval holds log Z in {held}"
    )
    k = max(int(k) for k in long["losses"] if int(k) <= FEASIBLE)
    enough = [each["length"] for each in steep if 2 ** each["doublings_needed"]["exo"] <= k]
    reach = f"up to {max(enough)} tokens" if enough else "at no length tested"
    practice = (
        f"Keep log K at least of the order of the divergence per token times the length: at {long['divergence']:g} "
        f"nats per token, K = {k} candidates of the reference bring EXO-rw within {stored.config['share']:.0%} of its "
        f"limit {reach}. Check estimates of log Z against that too: SNIS's 95% interval holds it in {held}."
    )
    return Outcome(text, holds_if(seeking and growing), practice)


def _seeks(case: Measured) -> bool:
    """Each minimiser does as it did on short completions, and is the better in its own divergence."""
    seeker, mean = case["policy_to_optimal"], case["optimal_to_policy"]
    modes = seeker["modes"][1:], mean["modes"][1:]
    own = (
        seeker["kl_policy_to_optimal"] < mean["kl_policy_to_optimal"]
        and mean["kl_optimal_to_policy"] < seeker["kl_optimal_to_policy"]
    )
    return max(modes[0]) >= SOUGHT > max(modes[1]) and own


def _rates(cases: list[Measured]) -> dict[str, float]:
    """What the longest completions add, in nats per token and per nat of divergence."""
    shorter, longer = cases[-2:]
    added = longer["divergence"] * (longer["length"] - shorter["length"])
    rates = {
        name: (longer["doublings_needed"][name] - shorter["doublings_needed"][name]) * math.log(2) / added
        for name in ("exo", "dpo")
    }
    return {**rates, "ess": (shorter["log_ess_share"]["optimal"] - longer["log_ess_share"]["optimal"]) / added}


def _by_length(cases: list[Measured], divergence: float) -> list[Measured]:
    return sorted((case for case in cases if case["divergence"] == divergence), key=lambda case: case["length"])


def _share(found: list[float]) -> str:
    """A share with its interval."""
    share, low, high = (100 * value for value in found)
    return f"{share:.0f}% ({low:.0f} … {high:.0f}%)"


def _power(log_value: float) -> str:
    return f"10^{log_value / math.log(10):.1f}"


def _doubled(doublings: float) -> str:
    """Infinite where the most that were asked for did not do."""
    return "beyond all asked for" if math.isinf(doublings) else f"2^{doublings:.0f}"


CLAIMS = (
    Claim(
        "B7",
        "At lengths that cannot be enumerated the minimiser of KL(π_θ‖π*) still takes one mode and that of KL(π*‖π_θ) "
        "all; at a fixed divergence per token the candidates that EXO and DPO need grow exponentially with length",
        "not in the paper",
        function="exo_toy.automata.kl_policy_to_optimal, exo_toy.automata.OptimalPolicy, "
        "exo_toy.automata.reward_distribution, exo_toy.candidates.compare",
        test="tests/test_automata_optimal.py, tests/test_candidates.py, tests/test_analysis_real_lengths.py",
        script="analysis/real_lengths.py",
        figure="real_lengths",
        paper_value="none",
        evaluate=_real_lengths,
    ),
)
