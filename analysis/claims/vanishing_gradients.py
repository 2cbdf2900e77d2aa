"""Gradients that vanish where a pair is badly misordered, and what that costs."""

import math

from analysis.claims.base import EXACT, Claim, Measured, Outcome, Results, Verdict, holds_if


def _vanishing_gradients(results: Results) -> Outcome:
    """Gradients of a pair, its correction, and training from wrong starts; vanishing_gradients provides

    ``largest_gradient_error``, ``correction.<loss>.time`` (by ``config["misordered"]``) and ``training``, a list by
    ``scenario``, ``training`` and ``wrong`` with ``steps`` and ``adam_steps``.
    """
    stored = results["vanishing_gradients"]
    error, correction = stored.number("largest_gradient_error"), stored.number("correction")
    misordered, eps = stored.config["misordered"], stored.config["label_smoothing"]
    exo, dpo = (correction[loss]["time"] for loss in ("exo_pref", "dpo_pref"))
    pairs = ", ".join(f"{a / b:.2g} at {nats:g}" for nats, a, b in zip(misordered, exo, dpo, strict=True))
    # To leading order at the farthest, with what is left of the expansion in 1/m.
    farthest, aim = misordered[-1], math.log((1 - eps) / eps)
    laws = exo[-1] / (math.exp(farthest) / (farthest + aim)), dpo[-1] / farthest
    as_derived = all(abs(law - 1) <= 2 / farthest for law in laws)

    def at_most_wrong(scenario: str, quantity: str) -> dict[str, float]:
        cases = [case for case in stored.number("training") if case["scenario"] == scenario]
        most = max(case["wrong"] for case in cases)
        return {case["training"]: case[quantity] for case in cases if case["wrong"] == most}

    reference, policy = at_most_wrong("reference", "steps"), at_most_wrong("policy", "steps")
    adam = at_most_wrong("policy", "adam_steps")
    slower = [steps[exo] > steps["dpo_pref"] for steps in (reference, policy) for exo in ("exo_rw", "exo_pref")]
    most = max(stored.config["wrong_reference"]), max(stored.config["wrong_policy"])
    many = stored.config["many"]
    text = (
        f"gradients within {error:.1e} of autograd's; time to correct a pair, EXO-pref over DPO: {pairs} nats of "
        f"margin. Steps of gradient descent until J has made up nine tenths: reference wrong by {most[0]:g} nats: "
        f"{_listed(reference, many)}; only the policy wrong, by {most[1]:g}: {_listed(policy, many)} "
        f"(Adam: {_listed(adam, many)})"
    )
    practice = (
        f"Where training has pushed the policy the wrong way by {most[1]:g} nats, EXO-pref takes "
        f"{_steps(policy['exo_pref'])} steps of plain gradient descent to come back, DPO {_steps(policy['dpo_pref'])}; "
        f"Adam's scaling changes that (EXO-pref {_steps(adam['exo_pref'])}, DPO {_steps(adam['dpo_pref'])} steps, on "
        f"exact gradients). Where the reference is wrong by {most[0]:g} nats, more candidates matter more than the "
        f"loss: EXO-rw {_steps(reference['exo_rw'])} steps at K=2, {_steps(reference['exo_rw_many'])} at K={many}."
    )
    if not (error <= EXACT and as_derived):
        return Outcome(text, Verdict.FAILS)
    return Outcome(text, holds_if(all(slower), Verdict.CONDITIONAL if any(slower) else Verdict.FAILS), practice)


NAMES = {"exo_rw": "EXO-rw", "exo_pref": "EXO-pref", "dpo_pref": "DPO", "reverse_kl": "RL"}


def _listed(steps: Measured, many: int) -> str:
    names = {**NAMES, "exo_rw_many": f"EXO-rw at K={many}"}
    return ", ".join(f"{name} {_steps(steps[training])}" for training, name in names.items())


def _steps(count: float) -> str:
    """Infinite where the most that were allowed did not do."""
    return "not reached" if math.isinf(count) else f"{count:,.0f}" if count < 1e6 else f"{count:.1e}"


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
