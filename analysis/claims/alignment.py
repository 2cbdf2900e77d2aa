"""The whole pipeline: frontiers of reward against divergence."""

from collections.abc import Mapping

from analysis.claims.base import LOOKS, Claim, Measured, Outcome, Results, Verdict, signs
from analysis.storage import StoredResult


def _frontier(results: Results) -> Outcome:
    """Distances below the exact frontier at equal divergence, and rewards at equal steps, in pairs of the same seed."""
    stored = results["alignment"]
    at = stored.number("at_divergence")
    closer = {pair: signs(found) for pair, found in at["differences"].items()}
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
        pair: signs({beta: found[name] for beta, found in betas.items()})
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
                    (sign,) = signs({value: entry["differences"][pair]["oracle_objective"]}).values()
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


CLAIMS = (
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
)
