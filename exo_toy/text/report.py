"""From a text and a list of keywords to the optimal policy, its numbers and its samples."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exo_toy import automata, checks
from exo_toy.automata import KGramModel, OptimalPolicy, RewardAutomaton
from exo_toy.candidates import Exact, compare, draw_candidates, effective_sizes, exact_answers
from exo_toy.spaces import SequenceSpace
from exo_toy.text import fitting
from exo_toy.text.keywords import keyword_automaton, read_keywords
from exo_toy.text.reading import TextError, Vocabulary, characters, pieces, words
from exo_toy.text.writing import plain

SMOOTHINGS = ("witten-bell", "absolute", "add-delta")
# Tokens that are told apart, and the order of the model, where none is asked for.
SIZES = {False: 128, True: 1000}
ORDERS = {False: 2, True: 1}
# Candidates of the reference that are set beside the exact answers.
GROUPS, GROUP = 16, 64
# Where fewer than this share of them is effective, or would be, a reader is warned.
SMALL_SHARE = 0.1
OnProgress = Callable[[str, int, int], None]
OnStep = Callable[[str], None]
# What takes long once the text has been read, in order.
STEPS = (
    "log Z",
    "the nearest k-gram policy",
    "the samples",
    "the divergences",
    "the rewards and entropies",
    "the distribution of the reward",
    "the candidates",
)


@dataclass(frozen=True)
class Settings:
    """What a run of :func:`run` depends on beside its files.

    Args:
        beta: strength of the KL penalty, above 0, in the unit of the weights.
        length: T, tokens of a completion.
        by_words: whether words are the tokens, or characters.
        order: k of the reference and of the k-gram policies; None for 1 for words and 2 for characters.
        vocabulary: tokens told apart at most, ``<unk>`` among them; None for 1000 words or 128 characters.
        smoothing: "witten-bell", "absolute" or "add-delta".
        delta: of "add-delta", above 0.
        samples: drawn of the reference and of the optimal policy.
        seed: of the samples.
        encoding: of the text; None for UTF-8, or what a byte order mark says.

    Raises:
        ValueError: a setting out of range.
    """

    beta: float
    length: int = 64
    by_words: bool = False
    order: int | None = None
    vocabulary: int | None = None
    smoothing: str = "witten-bell"
    delta: float | None = None
    samples: int = 5
    seed: int = 0
    encoding: str | None = None

    def __post_init__(self) -> None:
        checks.require_positive(beta=self.beta)
        checks.require_integer("length", self.length, at_least=1)
        checks.require_integer("order", self.k, at_least=0)
        checks.require_integer("vocabulary", self.n_tokens, at_least=2)
        checks.require_integer("samples", self.samples, at_least=1)
        checks.require_integer("seed", self.seed, at_least=0, bits=64)
        if self.smoothing not in SMOOTHINGS:
            raise ValueError(f"smoothing must be one of {', '.join(SMOOTHINGS)}; got {self.smoothing!r}")
        if (self.smoothing == "add-delta") != (self.delta is not None):
            raise ValueError(f"delta goes with smoothing add-delta and with no other; got {self.delta}")
        if self.delta is not None:
            checks.require_positive(delta=self.delta)
        SequenceSpace(2, self.length).require_order(self.k)

    @property
    def k(self) -> int:
        """The order."""
        return ORDERS[self.by_words] if self.order is None else self.order

    @property
    def n_tokens(self) -> int:
        """The most tokens told apart."""
        return SIZES[self.by_words] if self.vocabulary is None else self.vocabulary

    @property
    def smooth(self) -> fitting.Smoothing:
        """The function of this name."""
        if self.smoothing == "add-delta":
            assert self.delta is not None
            return partial(fitting.add_delta, delta=self.delta)
        return fitting.witten_bell if self.smoothing == "witten-bell" else fitting.absolute_discounting


def run(
    path: Path,
    reward: Path,
    settings: Settings,
    on_progress: OnProgress | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Fit the reference to a text and find its optimal policy for the keywords, exactly.

    Args:
        path: of the text.
        reward: of the keywords.
        settings: temperature, length, tokens, order, smoothing, samples.
        on_progress: of the reading, gets what is done, how many bytes of it are, and how many there are.
        on_step: of the recursions, gets what comes next.

    Returns:
        A document of JSON: ``text`` and ``keywords``, what was read; ``log_z``; ``reference``, ``optimal`` and
        ``closest_kgram``, each with the mean and variance of its reward, its entropy, and its divergences to the
        reference and to and from the optimal policy, in nats; ``distribution`` of an integer-valued reward, or null
        and why; ``candidates``, what ``groups`` of them (how many, and K) show of ``closest_kgram``, or null where a
        group holds none that is allowed, or that ``closest_kgram`` can produce; ``effective_sizes`` of these, and
        ``warnings`` where they are small; ``samples``. What is infinite is a string.

    Raises:
        TextError: a file that is no use, or for whose keywords nothing is allowed.
        ValueError: tables that exceed the memory budget.
    """
    keywords = read_keywords(reward)
    vocabulary, model, facts = fit_file(path, settings, on_progress)
    automaton, left_out = keyword_automaton(keywords, vocabulary, model.space)
    used = [keyword for keyword in keywords if keyword not in [entry.keyword for entry in left_out]]
    with _said_for_users():
        _require_recursion(model, automaton.n_states)
        n_strings = max(GROUPS * GROUP, settings.samples)
        # Their tokens twice, and what each token adds to two sums.
        model.space.require_memory(
            4 * 8 * n_strings * settings.length, what=f"{n_strings} completions of {settings.length} tokens"
        )

    def begin(step: str) -> None:
        if on_step is not None:
            on_step(f"{STEPS.index(step) + 1} of {len(STEPS)}: {step}")

    begin("log Z")
    try:
        optimal = OptimalPolicy(model, automaton, beta=settings.beta)
    except ValueError as error:
        raise TextError(f"{reward}: {error}") from error
    begin("the nearest k-gram policy")
    closest = optimal.closest_kgram(model.order, homogeneous=True)
    begin("the samples")
    generator = torch.Generator().manual_seed(settings.seed)
    policies: dict[str, KGramModel | OptimalPolicy] = {"reference": model, "optimal": optimal}
    samples = {
        name: _samples(policy.sample(settings.samples, generator)[0], vocabulary, automaton)
        for name, policy in policies.items()
    }
    begin("the divergences")
    exact = exact_answers(closest, model, automaton, beta_pi=1, beta_r=settings.beta)
    begin("the rewards and entropies")
    measured = measure(model, automaton, closest, exact, beta=settings.beta)
    begin("the distribution of the reward")
    distribution, why_not = _distribution(model, automaton, settings.beta)
    begin("the candidates")
    document = {
        "file": str(path),
        "reward": str(reward),
        "settings": {**asdict(settings), "order": settings.k, "vocabulary": settings.n_tokens},
        "text": facts,
        "keywords": [{"keyword": keyword.text, "weight": keyword.weight} for keyword in used],
        "left_out": [{**entry.keyword._asdict(), "reason": entry.reason} for entry in left_out],
        "states": automaton.n_states,
        "log10_completions": settings.length * math.log10(model.space.vocab_size),
        **measured,
        "distribution": distribution,
        "no_distribution": why_not,
        "groups": [GROUPS, GROUP],
        **_candidates(closest, model, automaton, settings, exact, generator),
        "samples": samples,
    }
    return plain(document)


def fit_file(
    path: Path, settings: Settings, on_progress: OnProgress | None = None
) -> tuple[Vocabulary, KGramModel, dict[str, Any]]:
    """The vocabulary of a text file, the model fitted to it, and facts about both; the file is read twice.

    Raises:
        TextError: a file that cannot be read twice, or holds no token.
        ValueError: tables that exceed the memory budget.
    """
    tokenise, joined_by = (words, " ") if settings.by_words else (characters, "")
    try:
        with path.open("rb") as file:
            if not file.seekable():
                raise TextError(f"{path}: must be a file that can be read twice, no pipe")
            size = path.stat().st_size

            def tokens(stage: str) -> Iterator[Any]:
                on_bytes = None if on_progress is None else lambda n: on_progress(stage, n, size)
                return tokenise(pieces(file, str(path), encoding=settings.encoding, on_bytes=on_bytes))

            vocabulary, n_different = Vocabulary.of(
                tokens("the vocabulary"), size=settings.n_tokens, joined_by=joined_by
            )
            if not vocabulary.tokens:
                raise TextError(f"{path}: holds no {'word' if settings.by_words else 'character'}")
            space = SequenceSpace(len(vocabulary.tokens), settings.length)
            with _said_for_users():
                fitting.require_tables(space, order=settings.k)
            numbers = map(vocabulary.numbers, tokens("the counts"))
            counts = fitting.kgram_counts(numbers, space.vocab_size, order=settings.k)
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from error
    model = fitting.from_counts(counts, space, smoothing=settings.smooth)
    n_tokens = counts[0].sum().item()
    facts = {
        "tokens": int(n_tokens),
        "different_tokens": n_different,
        "vocabulary": space.vocab_size,
        "unknown_share": counts[0][0, -1].item() / n_tokens if vocabulary.has_unknown else 0.0,
        "nats_per_token": fitting.nats_per_token(model, counts),
    }
    return vocabulary, model, facts


def measure(
    model: KGramModel, automaton: RewardAutomaton, closest: KGramModel, exact: Exact, *, beta: float
) -> dict[str, Any]:
    """What is known exactly of a reference, its optimal policy and the k-gram policy nearest to that.

    The nearest is the minimiser of KL(π* || π) among k-gram policies of the reference's order whose positions share a
    table, as the reference's do; ``exact`` are the divergences around it.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    to_optimal = automata.kl_policy_to_optimal(model, model, automaton, beta=beta)
    return {
        "log_z": exact.log_z.item(),
        "reference": _numbers(
            *automata.reward_moments(model, automaton),
            automata.entropy(model),
            zero,
            to_optimal,
            exact.kl_optimal_to_reference,
        ),
        "optimal": _numbers(
            *automata.optimal_reward_moments(model, automaton, beta=beta),
            automata.optimal_entropy(model, automaton, beta=beta),
            exact.kl_optimal_to_reference,
            zero,
            zero,
        ),
        "closest_kgram": _numbers(
            *automata.reward_moments(closest, automaton),
            automata.entropy(closest),
            exact.kl_to_reference,
            exact.kl_policy_to_optimal,
            exact.kl_optimal_to_policy,
        ),
    }


def _distribution(model: KGramModel, automaton: RewardAutomaton, beta: float) -> tuple[dict[str, Any] | None, str]:
    """The reward's distribution under both policies, or why there is none."""
    weights = automaton.rewards[automaton.rewards > -torch.inf]
    if (weights != weights.round()).any():
        return None, "the weights are no integers"
    least, largest = automata.reward_range(model.space, automaton)
    try:
        with _said_for_users():
            _require_recursion(model, automaton.n_states * (largest - least + 2))
    except TextError as error:
        return None, str(error)
    found = automata.reward_distribution(model, automaton)
    return {
        "values": found.values.tolist(),
        "reference": found.log_probs[0].exp().tolist(),
        "optimal": found.optimal(beta=beta).log_probs[0].exp().tolist(),
    }, ""


def _candidates(
    pi: KGramModel,
    ref: KGramModel,
    automaton: RewardAutomaton,
    settings: Settings,
    exact: Exact,
    generator: torch.Generator,
) -> dict[str, Any]:
    """What candidates of the reference show of a policy, beside the exact answers; None where they show nothing."""
    drawn = draw_candidates(pi, ref, automaton, groups=GROUPS, k=GROUP, generator=generator)
    shows = (drawn.rewards > -torch.inf).any(-1) & (drawn.log_ratio > -torch.inf).any(-1)
    if not shows.all():
        return {"candidates": None, "effective_sizes": None, "warnings": []}
    found = compare(pi, ref, automaton, drawn, beta_pi=1, beta_r=settings.beta, exact=exact)._asdict()
    sizes = effective_sizes(pi, ref, automaton, drawn, beta_pi=1, beta_r=settings.beta)
    estimates = {name: {key: x.item() for key, x in one._asdict().items()} for name, one in found.items()}
    by_weights = {
        name: {key: x.item() for key, x in size._asdict().items()}
        for name, size in zip(("closest_kgram", "optimal"), sizes, strict=True)
    }
    return {"candidates": estimates, "effective_sizes": by_weights, "warnings": list(_warnings(by_weights))}


def _warnings(sizes: dict[str, dict[str, float]]) -> Iterator[str]:
    """What a reader of the estimates should know before believing them."""
    n_candidates = GROUPS * GROUP
    for name, weights in {"closest_kgram": "π/π_ref of the best k-gram", "optimal": "π*_β/π_ref"}.items():
        drawn, exact = sizes[name]["value"], sizes[name]["exact"]
        if min(drawn, exact) < SMALL_SHARE * n_candidates:
            yield (
                f"of {n_candidates} candidates ({GROUPS} groups of K = {GROUP}) the weights {weights} have an "
                f"effective sample size (ESS) of {drawn:.3g}, {exact:.3g} by their exact moments: estimates are biased "
                "and their intervals too narrow; the exact answers stand beside them"
            )


@contextmanager
def _said_for_users() -> Iterator[None]:
    """What exceeds the memory budget, with what to ask for instead."""
    try:
        yield
    except ValueError as error:
        what, _, _ = str(error).partition(";")
        raise TextError(f"{what}; a smaller --vocabulary, --order, --length or --samples takes less") from error


def _require_recursion(model: KGramModel, n_states: int) -> None:
    """Raise where the recursion would exceed the space's memory budget."""
    space = model.space
    # Some √T positions are kept, three tables of V^k S entries each.
    n_kept = 3 * math.ceil(math.sqrt(space.length))
    n_bytes = 8 * n_kept * n_states * space.vocab_size ** max(model.order, 1)
    space.require_memory(
        n_bytes, what=f"recursions over {n_states} states and {space.vocab_size}^{model.order} contexts"
    )


def _numbers(*values: Tensor) -> dict[str, float]:
    names = ("mean_reward", "variance", "entropy", "kl_to_reference", "kl_to_optimal", "kl_from_optimal")
    return {name: value.item() for name, value in zip(names, values, strict=True)}


def _samples(tokens: Tensor, vocabulary: Vocabulary, automaton: RewardAutomaton) -> list[dict[str, Any]]:
    rewards = automaton.reward(tokens).tolist()
    return [{"text": vocabulary.text(row), "reward": r} for row, r in zip(tokens, rewards, strict=True)]
