"""Gradients of estimators of the KL to the reference."""

import math

from analysis.claims.base import Claim, Outcome, Results, holds_if

# Expected gradients are sums over completions, relative to a gradient that may be a thousandth of their terms.
GRADIENT_IDENTITY = 1e-10


def _kl_estimators(results: Results) -> Outcome:
    """Which ways of penalising a KL have which gradient; kl_estimators provides ``cells``, ``distances``, ``noise``,

    ``cases``, ``not_as_derived``, ``largest_error_of_right``, ``smallest_error_of_biased`` and
    ``largest_closed_form_error``, all errors relative.
    """
    stored = results["kl_estimators"]
    cells, distances, noise = stored.number("cells"), stored.number("distances"), stored.number("noise.policy")
    error, residual = stored.number("largest_error_of_right"), stored.number("largest_closed_form_error")
    near, far, middle = distances[0], distances[-1], min(distances, key=lambda text: abs(math.log(float(text))))
    right = {
        column: sum(column in row and set(row[column]["verdicts"]) == {"right"} for row in cells.values())
        for column in ("policy", "reference", "old policy")
    }
    by_sequence, by_token = (cells[f"{level} k3 loss"]["policy"]["error"][middle] for level in ("sequence", "token"))
    away = cells["sequence k1 loss"]["reference"]["component"][near]
    share = cells["sequence k3 reward"]["policy"]["component"][near]
    least = ", ".join(
        f"{min(noise[at], key=noise[at].__getitem__)} at {at} nats ({min(noise[at].values()):.3g} times the signal; k2 "
        f"of the whole completion as a loss {noise[at]['sequence k2 loss']:.3g})"
        for at in (near, far)
    )
    text = (
        f"k3 as a loss is {by_sequence:.0%} off at {middle} nat ({by_token:.0%} by token), as "
        f"a reward it has {share:.1%} of the gradient near the reference; k1 as a loss has none, and {away:.2f} times "
        f"it on completions of the reference. Right in all {stored.number('cases')} cases: {right['policy']} of "
        f"{len(cells)} ways on-policy, {right['reference'] + right['old policy']} off-policy without weights. Least "
        f"noisy: {least}. Relative errors: right {error:.0e}, closed forms {residual:.0e}, biased from "
        f"{stored.number('smallest_error_of_biased'):.0e} up"
    )
    winners = {at: min(values, key=values.__getitem__) for at, values in noise.items()}
    usual, close = winners[far], winners[near]
    # From where on the way that is least noisy far from the reference beats the one that is so near it.
    switch = next(at for at in distances if noise[at][usual] <= noise[at][close])
    practice = f"To penalise KL(π‖π_ref) from about {switch} nats on, take {_in_words(usual)}"
    if close != usual:
        nearer, farther = (noise[at][close] / noise[at][usual] for at in (near, far))
        practice += (
            f"; nearer, {_in_words(close)} is less noisy ({nearer:.2g} times as noisy at {near} nats, {farther:.2g} "
            f"times at {far})"
        )
    practice += (
        f". Weight old completions by the ratio of the prefix, and differentiate no k3 alone ({by_sequence:.0%} off at "
        f"{middle} nat)."
    )
    exact = error <= GRADIENT_IDENTITY and residual <= GRADIENT_IDENTITY
    return Outcome(text, holds_if(exact and not stored.number("not_as_derived")), practice)


def _in_words(way: str) -> str:
    """A way of ``noise``: level, estimator, use and whether with a baseline."""
    level, estimator, use, *baseline = way.split()
    uses = {
        "loss": f"{estimator} as a loss",
        "reward": f"{estimator} in the reward",
        "importance": f"{estimator} times the differentiated ratio of the prefix",
    }
    to_go = ", to go" if (level, use) == ("token", "reward") else ""
    by = "by token" if level == "token" else "of the whole completion"
    return f"{uses[use]} {by}{to_go}{' with a baseline' if baseline else ''}"


CLAIMS = (
    Claim(
        "B5",
        "Differentiating an estimate of KL(π‖π_ref) is not estimating its gradient: on-policy k1 as a loss has none, "
        "k3 as a loss has that of KL(π_ref‖π), losses by token leave out what a token does to later ones; k1 as a "
        "reward and k2 of the whole completion as a loss are right",
        "not in the paper; after Tang and Munos, arXiv:2506.09477",
        function="exo_toy.kl_estimators.expected_kl_surrogate, exo_toy.kl_estimators.closed_form",
        test="tests/test_kl_estimators.py",
        script="analysis/kl_estimators.py",
        figure="kl_estimators",
        paper_value="none",
        evaluate=_kl_estimators,
    ),
)
