"""Gradients that vanish where a pair is badly misordered, and what that costs."""

import math

from analysis.claims.base import EXACT, Claim, Outcome, Results, Verdict, holds_if


def _vanishing_gradients(results: Results) -> Outcome:
    """Gradients of a pair, its correction, and training from wrong starts; vanishing_gradients provides

    ``largest_gradient_error``, ``correction.<loss>.time`` (by ``config["misordered"]``) and ``training``, a list by
    ``scenario``, ``training`` and ``wrong`` with ``steps`` and ``adam_steps``.
    """
    stored = results["vanishing_gradients"]
    error, correction = stored.number("largest_gradient_error"), stored.number("correction")
    misordered = stored.config["misordered"]
    ratios = [
        exo / dpo for exo, dpo in zip(correction["exo_pref"]["time"], correction["dpo_pref"]["time"], strict=True)
    ]
    # The ratio has to grow with the distance, and like an exponential of it at the end.
    distance = misordered[-1] - misordered[-2]
    grows = ratios == sorted(ratios) and math.log(ratios[-1] / ratios[-2]) > distance / 2

    def at_most_wrong(scenario: str, quantity: str) -> dict[str, float]:
        cases = [case for case in stored.number("training") if case["scenario"] == scenario]
        most = max(case["wrong"] for case in cases)
        return {case["training"]: case[quantity] for case in cases if case["wrong"] == most}

    reference, policy = at_most_wrong("reference", "steps"), at_most_wrong("policy", "steps")
    slower = [steps["exo_rw"] > steps["dpo_pref"] for steps in (reference, policy)]
    named = {"exo_rw": "EXO-rw", "dpo_pref": "DPO", "exo_rw_many": f"EXO-rw at K={stored.config['many']}",
             "reverse_kl": "RL"}  # fmt: skip

    def listed(steps: dict[str, float]) -> str:
        return ", ".join(f"{name} {steps[training]:.2g}" for training, name in named.items())

    pairs = ", ".join(f"{ratio:.2g} at {nats:g}" for nats, ratio in zip(misordered, ratios, strict=True))
    most = max(stored.config["wrong_reference"]), max(stored.config["wrong_policy"])
    adam = at_most_wrong("policy", "adam_steps")
    text = (
        f"gradients within {error:.1e} of autograd's; time to correct a pair, EXO-pref over DPO: {pairs} nats of "
        f"margin. Steps of gradient descent until J has made up nine tenths: reference wrong by {most[0]:g} nats: "
        f"{listed(reference)}; only the policy wrong, by {most[1]:g}: {listed(policy)} (Adam: {listed(adam)})"
    )
    practice = (
        "Where training has pushed the policy the wrong way, EXO-rw on pairs takes "
        f"{policy['exo_rw'] / policy['dpo_pref']:.2g} times DPO's steps of plain gradient descent to come back (of "
        f"Adam, on exact gradients, {adam['exo_rw'] / adam['dpo_pref']:.2g} times): use Adam or DPO there; where the "
        f"reference is wrong the choice matters little ({reference['exo_rw'] / reference['dpo_pref']:.2g} times) and "
        f"more candidates do: K={stored.config['many']} takes EXO-rw "
        f"{reference['exo_rw_many'] / reference['exo_rw']:.2g} times the steps of K=2."
    )
    if not (error <= EXACT and grows):
        return Outcome(text, Verdict.FAILS)
    return Outcome(text, holds_if(all(slower), Verdict.CONDITIONAL if any(slower) else Verdict.FAILS), practice)


CLAIMS = (
    Claim(
        "B3",
        "EXO's gradient on a pair misordered by m nats of margin falls like m·e^−m, DPO's does not: EXO corrects it in "
        "a time like e^m/m, DPO in m, and training from a confidently wrong start is slower with EXO",
        "not in the paper",
        function="exo_toy.margins.exo_margin_gradient, exo_toy.margins.exo_flow_time, exo_toy.margins.dpo_flow_time",
        test="tests/test_margins.py, tests/test_analysis_vanishing_gradients.py",
        script="analysis/vanishing_gradients.py",
        figure="vanishing_gradients",
        paper_value="none",
        evaluate=_vanishing_gradients,
    ),
)
