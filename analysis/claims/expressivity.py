"""How much state the optimal policy takes."""

from analysis.claims.base import Claim, Measured, Outcome, Results, Verdict

# A policy within so many nats of pi* is as good as it for any use.
CLOSE = 1e-3


def _expressivity(results: Results) -> Outcome:
    """What holding pi* takes; expressivity provides ``exact`` (a list, by ``name``, ``length``, ``beta``, ``opening``,

    with ``states``, ``reference_states`` and ``ranks`` per position, ``kgram_gaps``, ``closing_order``,
    ``close_order``, ``smallest_kept``, ``largest_tolerance``, and ``bounds`` by ``bound_states``) and ``grus`` (a list,
    by ``name``, ``length`` and ``width``, with the ``gap`` found).
    """
    stored = results["expressivity"]
    exact, grus, beta = stored.number("exact"), stored.number("grus"), stored.config["beta"]
    of = {
        name: [case for case in exact if case["name"] == name]
        for name in ("parity", "palindrome", "planted_modes", "review")
    }
    parity = all(max(case["states"]) == 2 and case["closing_order"] == case["length"] - 1 for case in of["parity"])
    doubling = all(max(case["ranks"]) == case["vocab_size"] ** (case["length"] // 2) for case in of["palindrome"])
    certified = all(case["smallest_kept"] > 10 * case["largest_tolerance"] for case in exact)
    # Of openings the one that takes most.
    longest = {
        name: max((case for case in cases if case["beta"] == beta), key=lambda c: (c["length"], max(c["states"])))
        for name, cases in of.items()
    }
    fair, mirror, modes, review = (longest[name] for name in of)
    # The sharpest pi*, where the bound says most, against as many states as there are tokens.
    sharp = min((case for case in of["palindrome"] if case["length"] == mirror["length"]), key=lambda c: c["beta"])
    few = max(n for n in sharp["bound_states"] if n <= sharp["length"])
    lost = sharp["bounds"][sharp["bound_states"].index(few)]
    text = (
        f"parity takes {max(fair['states'])} states at every length to T={fair['length']}, yet every k-gram short of "
        f"k=T−1 misses {fair['kgram_gaps'][0]:.3f} nats; palindromes take {max(mirror['ranks'])} states at "
        f"T={mirror['length']}, {'V^⌊T/2⌋ at every length' if doubling else 'not V^⌊T/2⌋ throughout'}, and {few} "
        f"states lose at least {lost:.2f} nats (β={sharp['beta']:g}); two planted modes take {max(modes['states'])} "
        f"states of rank {max(modes['ranks'])} at T={modes['length']}; the review world takes {max(review['states'])} "
        f"states of rank {max(review['ranks'])} at T={review['length']} ({max(review['reference_states'])} its "
        f"reference alone), k={review['close_order']} coming within {CLOSE:g} nats. Narrowest GRU found within "
        f"{CLOSE:g} nats: {_narrowest(grus)}"
    )
    practice = (
        "Before blaming the loss, ask how much a good completion has to remember of its prefix, not how far back: "
        f"parity over {fair['length']} tokens takes {max(fair['states'])} states, where a window one token short "
        f"misses {fair['kgram_gaps'][-2]:.2g} nats; palindromes of {sharp['length']} lose {lost:.2g} nats with {few} "
        "states, whatever the training."
    )
    # Of machines with states to count; a state of real numbers holds more, as far as its digits go.
    return Outcome(text, Verdict.CONDITIONAL if parity and doubling and certified else Verdict.FAILS, practice)


def _narrowest(grus: list[Measured]) -> str:
    """The smallest width whose gap is closed, of each target and length; an upper bound, the fit being uncertified."""
    found = []
    for name, length in dict.fromkeys((case["name"], case["length"]) for case in grus):
        mine = {case["width"]: case["gap"] for case in grus if (case["name"], case["length"]) == (name, length)}
        widths = [width for width, gap in mine.items() if gap <= CLOSE]
        least = f"width {min(widths)}" if widths else f"none up to {max(mine)} (best {min(mine.values()):.1e})"
        found.append(f"{name.replace('_', ' ')} T={length}: {least}")
    return ", ".join(found)


CLAIMS = (
    Claim(
        "C12",
        "An autoregressive model of polynomial size cannot hold every energy-based distribution",
        "Introduction and Section 3 (after Lin et al., 2021)",
        function="exo_toy.expressivity.hankel_ranks, exo_toy.expressivity.state_counts, "
        "exo_toy.expressivity.conditional_mutual_information, exo_toy.expressivity.least_gap",
        test="tests/test_expressivity.py",
        script="analysis/expressivity.py",
        figure="expressivity",
        paper_value="cited",
        evaluate=_expressivity,
    ),
)
