"""Noise of the gradients at equal numbers of samples."""

from analysis.claims.base import LOOKS, Claim, Measured, Outcome, Results, Verdict, in_range


def _gradient_noise(results: Results) -> Outcome:
    """Noise over progress of EXO-rw and PPO at equal K, on the same policies; gradient_noise provides

    ``trainings.<training>.<beta>.<stage>``: geometric means over seeds, per sample; ``exo_over_other.<other>.<K>`` and
    ``none_over_leave_one_out.<K>``, None where a seed makes no progress; cosines ``<which>.<loss>.<K>``.
    """
    trainings = results["gradient_noise"].number("trainings")
    # All trainings share the start.
    start = next(iter(next(iter(trainings.values())).values()))["start"]
    later = {
        training: [found for stages in by_beta.values() for stage, found in stages.items() if stage != "start"]
        for training, by_beta in trainings.items()
    }
    everywhere = [found for cases in later.values() for found in cases]
    first, *_, last = start["exo_over_other"]["ppo"]
    few = "4" if "4" in start["exo_over_other"]["ppo"] else first

    # By whose policies they are: is EXO-rw less noisy than PPO, in all of the interval?
    less = {
        training: [
            ratio is not None and ratio["high"] < 1
            for found in cases
            for ratio in found["exo_over_other"]["ppo"].values()
        ]
        for training, cases in later.items()
    }
    counts = " and ".join(f"{sum(cases)} of {len(cases)} on {LOOKS[name]}'s policies" for name, cases in less.items())
    text = (
        "exact, per sample at equal K. Noise over progress, the square of what the mean gradient has along J's: at the "
        f"start EXO-rw has {_mean(start['exo_over_other']['leave_one_out'][first]):.6f} times the leave-one-out policy "
        f"gradient's, {_mean(start['exo_over_other']['ppo'][first]):.2f} times PPO's at K={first} and "
        f"{_mean(start['exo_over_other']['ppo'][last]):.2f} at K={last}; later it has less than PPO in {counts} "
        f"(β, stage, K). {_losses(later, few)}. {_baseline(start, everywhere, [first, few])}"
    )
    cases = [case for by_training in less.values() for case in by_training]
    if not any(cases):
        return Outcome(text, Verdict.FAILS)
    choice = (
        f"EXO-rw's gradient has less noise than PPO's for the progress that it makes on J ({counts})"
        if all(cases)
        else f"Noise alone does not decide between EXO-rw and PPO (EXO-rw has less for its progress on J in {counts})"
    )
    verdict = Verdict.HOLDS if all(cases) else Verdict.CONDITIONAL
    return Outcome(text, verdict, f"{choice}; {_advice(start, everywhere, few)}.")


def _losses(later: dict[str, list[Measured]], k: str) -> str:
    """How far the losses' means are from the gradient of J and from those of their limits, and their own noise."""
    parts = []
    for training, cases in later.items():
        for loss in ("exo_rw", "dpo_rw"):
            cosine, to_limit = (
                in_range([_mean(found[which][loss][k]) for found in cases]) for which in ("cosine", "cosine_to_limit")
            )
            noise = in_range([_mean(found["noise_to_signal"][loss][k]) for found in cases])
            parts.append(
                f"{LOOKS[loss]} on {LOOKS[training]}'s policies {cosine} to J's gradient, {to_limit} to its limit's, "
                f"noise over its own signal {noise}"
            )
    return f"Cosines of the mean gradient at K={k} after the start: {'; '.join(parts)}"


def _baseline(start: Measured, later: list[Measured], ks: list[str]) -> str:
    """What a leave-one-out baseline does to the noise of a policy gradient without one."""
    parts = []
    for k in dict.fromkeys(ks):
        ratios = [found["none_over_leave_one_out"][k] for found in later]
        parts.append(
            f"K={k} {_mean(start['none_over_leave_one_out'][k]):.2g} at the start, later "
            f"{in_range([_mean(ratio) for ratio in ratios])} and above 1 in {sum(map(_pays, ratios))} of {len(ratios)}"
        )
    return f"Policy gradient's noise without a baseline over that with leave-one-out: {'; '.join(parts)}"


def _advice(start: Measured, later: list[Measured], few: str) -> str:
    """From how many samples on leave-one-out pays at every stage but the start, and what it costs there."""
    ks = list(start["none_over_leave_one_out"])
    pays = [k for k in ks if all(_pays(found["none_over_leave_one_out"][k]) for found in later)]
    # From here on, at every K.
    since = next((k for i, k in enumerate(ks) if set(ks[i:]) <= set(pays)), None)
    found = (
        f"away from the reference a policy gradient gains from the leave-one-out baseline from K={since} on"
        if since
        else "at no K measured does the leave-one-out baseline lower a policy gradient's noise at every stage"
    )
    costs = [
        f"{1 / _mean(ratio):.2g} times at K={k}"
        for k, ratio in start["none_over_leave_one_out"].items()
        if ratio["high"] < 1 and int(k) <= int(few)
    ]
    return found + (f", while near the reference it adds noise ({', '.join(costs)})" if costs else "")


def _pays(ratio: Measured) -> bool:
    """The noise without is above the noise with it, in all of the interval."""
    return bool(ratio["low"] > 1)


def _mean(found: Measured) -> float:
    return float(found["mean"])


CLAIMS = (
    Claim(
        "C11",
        "Policy-gradient RL has high variance and needs sampling inside the training loop",
        "Introduction; here against EXO-rw at equal numbers of samples",
        function="exo_toy.gradient_noise.exo_rw_noise, exo_toy.gradient_noise.dpo_rw_noise, "
        "exo_toy.gradient_noise.policy_gradient_noise",
        test="tests/test_gradient_noise.py",
        script="analysis/gradient_noise.py",
        figure="gradient_noise",
        paper_value="stated",
        evaluate=_gradient_noise,
        should_hold=False,
    ),
)
