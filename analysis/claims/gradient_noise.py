"""Noise of the gradients at equal numbers of samples."""

from analysis.claims.base import Claim, Outcome, Results, Verdict


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
    few = "4" if "4" in at_start else first
    practice = (
        f"Noise is no reason to prefer EXO-rw or PPO: at K={few} EXO-rw starts with {at_start[few]['mean']:.2g} times "
        f"PPO's per sample and later has less in {sum(less)} of {len(less)} cases. What to avoid is a policy gradient "
        f"without a baseline ({min(baselines):.2g} to {max(baselines):.3g} times the noise): subtract the mean reward "
        "of the prompt's other candidates."
    )
    verdict = Verdict.HOLDS if all(less) else Verdict.CONDITIONAL if any(less) else Verdict.FAILS
    return Outcome(text, verdict, practice)


CLAIMS = (
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
)
