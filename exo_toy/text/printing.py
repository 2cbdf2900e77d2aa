"""What a run found, as lines of text."""

from collections.abc import Iterator
from typing import Any

POLICIES = {"reference": "reference", "optimal": "optimal", "closest_kgram": "best k-gram"}
QUANTITIES = {
    "mean_reward": "E[r]",
    "variance": "Var[r]",
    "entropy": "entropy, nats",
    "kl_to_reference": "KL(·‖π_ref), nats",
    "kl_to_optimal": "KL(·‖π*_β), nats",
    "kl_from_optimal": "KL(π*_β‖·), nats",
}
# What candidates show of the best k-gram policy π.
SHOWN = {
    "exo_rw": "EXO-rw → KL(π‖π*_β), nats",
    "dpo_rw": "DPO-rw - log K → KL(π*_β‖π) - KL(π*_β‖π_ref), nats",
    "log_z": "log Z_β, self-normalised, nats",
    "kl_policy_to_optimal": "KL(π‖π*_β), self-normalised, nats",
    "kl_optimal_to_policy": "KL(π*_β‖π), self-normalised, nats",
}
# A value of the reward that is rarer under both policies is not printed.
RARE = 1e-4


def lines(document: dict[str, Any]) -> Iterator[str]:
    """The document of :func:`exo_toy.text.run` for a terminal.

    Control characters of samples are escaped, a newline shown as a return sign.
    """
    settings, text = document["settings"], document["text"]
    unit = "words" if settings["by_words"] else "characters"
    yield f"text: {text['tokens']} {unit}, {text['different_tokens']} different"
    yield f"vocabulary: {text['vocabulary']}, {text['unknown_share']:.2%} of the text <unk>"
    delta = "" if settings["delta"] is None else f" δ = {settings['delta']:g}"
    smoothing = f"{settings['smoothing']}{delta}"
    yield f"reference: k = {settings['order']}, {smoothing}, {text['nats_per_token']:.4f} nats per token of the text"
    yield f"completions: {settings['length']} {unit}, 10^{document['log10_completions']:.1f} of them"
    yield f"reward r: {len(document['keywords'])} keywords, {document['states']} states; β = {settings['beta']:g}"
    yield f"log Z_β: {_number(document['log_z'])} nats"
    yield ""
    yield from _columns(
        [
            ("exact", *POLICIES.values()),
            *((label, *(_number(document[name][key]) for name in POLICIES)) for key, label in QUANTITIES.items()),
        ]
    )
    yield ""
    yield from _distribution(document)
    yield ""
    yield from _candidates(document)
    for name, label in (("reference", "reference"), ("optimal", "optimal policy")):
        yield ""
        yield f"samples of the {label}, with their rewards"
        for sample in document["samples"][name]:
            yield f"{_number(sample['reward']):>6}  {escaped(sample['text'])}"


def escaped(text: str) -> str:
    r"""The text on one line, without what a terminal would obey.

    Example:
        >>> escaped("one\ntwo\x1b")
        'one⏎two\\x1b'
    """
    shown = text.replace("\n", "⏎")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in shown)


def _distribution(document: dict[str, Any]) -> Iterator[str]:
    """A row for each value of the reward that is not rare."""
    found = document["distribution"]
    if found is None:
        yield f"no distribution of the reward: {document['no_distribution']}"
        return
    rows = zip(found["values"], found["reference"], found["optimal"], strict=True)
    shown = [row for row in rows if max(row[1:]) >= RARE]
    yield from _columns(
        [("reward", "P_ref", "P_π*"), *((_number(value), f"{p:.3e}", f"{q:.3e}") for value, p, q in shown)]
    )


def _candidates(document: dict[str, Any]) -> Iterator[str]:
    """A row for each estimate, with its interval, and the exact answer."""
    found = document["candidates"]
    if found is None:
        yield "candidates of the reference: some groups hold nothing but forbidden ones, or such as π cannot produce"
        return
    rows = [
        (label, _number(x["value"]), f"{_number(x['low'])} … {_number(x['high'])}", _number(x["exact"]))
        for label, x in ((label, found[name]) for name, label in SHOWN.items())
    ]
    groups, k = document["groups"]
    title = f"{groups} groups of {k} candidates of the reference, π the best k-gram"
    yield from _columns([(title, "estimate", "95 % interval", "exact"), *rows, *_sizes(document)])
    for warning in document["warnings"]:
        yield f"warning: {warning}"


def _sizes(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each effective sample size."""
    for name, label in (("closest_kgram", "π/π_ref"), ("optimal", "π*_β/π_ref")):
        size = document["effective_sizes"][name]
        yield f"effective sample size of {label}", _number(size["value"]), "", _number(size["exact"])


def _columns(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells])


def _number(value: float | str) -> str:
    """Six digits; what is infinite stands there as text."""
    return value if isinstance(value, str) else f"{value:.6g}"
