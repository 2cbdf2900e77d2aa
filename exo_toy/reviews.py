"""A small world of reviews, in which sentiment is exact.

A review is written by an author who likes the film or does not. The author is a finite machine: its state is whether
the last word negates and whether it intensifies, and with the sentiment it decides how likely each next word is. "Not"
turns the meaning of a sentiment word that follows directly or after an intensifier, a second "not" turns it back. So
the evidence of a word depends on the words before it, and the log odds of the sentiment, which are the oracle reward,
are no sum over tokens. A prompt is an opening: it shifts the mood, and may itself end in "not" or "very".
"""

import math
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from exo_toy import checks
from exo_toy.spaces import SequenceSpace, sum_over_trie

SENTIMENTS = (+1, -1)
# Of the reward: what is beyond them is rounding.
DECIMALS = 12


class Role(Enum):
    """What a word does."""

    END = "ends the review"
    FILLER = "says nothing"
    NEGATION = "turns the meaning of the next sentiment word"
    INTENSIFIER = "makes a sentiment word likelier and clearer"
    SENTIMENT = "speaks for or against the film"


@dataclass(frozen=True)
class Word:
    """A token: its role and, for a sentiment word, how much it speaks for (above 0) or against (below 0) the film."""

    text: str
    role: Role
    polarity: float = 0.0


@dataclass(frozen=True)
class Opening:
    """A prompt: log odds of a favourable author before a word is read, and the words' effect on what follows."""

    text: str
    log_odds: float = 0.0
    negated: bool = False
    intensified: bool = False


WORDS = (
    Word(".", Role.END),
    Word("film", Role.FILLER),
    Word("not", Role.NEGATION),
    Word("very", Role.INTENSIFIER),
    Word("good", Role.SENTIMENT, 1.0),
    Word("great", Role.SENTIMENT, 2.0),
    Word("bad", Role.SENTIMENT, -1.0),
    Word("awful", Role.SENTIMENT, -2.0),
)
OPENINGS = (
    Opening("I saw it:"),
    Opening("I came out smiling:", log_odds=1.5),
    Opening("I left early:", log_odds=-1.5),
    Opening("It is not", negated=True),
    Opening("It is very", intensified=True),
    Opening("It is not very", negated=True, intensified=True),
    Opening("My friend found it", log_odds=0.5),
)

# How often an author uses each role: after a plain word, and after an intensifier. Sentiment words share what is left.
ROLE_SHARES = {Role.END: 0.20, Role.FILLER: 0.25, Role.NEGATION: 0.12, Role.INTENSIFIER: 0.13}
ROLE_SHARES_INTENSIFIED = {Role.END: 0.02, Role.FILLER: 0.06, Role.NEGATION: 0.02, Role.INTENSIFIER: 0.05}
# Nobody says "not ." or "not film" often.
ROLE_SHARES_NEGATED = {Role.END: 0.02, Role.FILLER: 0.10, Role.NEGATION: 0.02, Role.INTENSIFIER: 0.26}


@dataclass(frozen=True)
class ReviewWorld:
    r"""Reviews of at most ``length`` words after each of some openings.

    With s the sentiment and q_t the machine's state before word t,

    .. math::
        P(y \mid x) = \sum_s P(s \mid x) \prod_t P(y_t \mid q_t, s), \qquad
        P(w \mid q, s) \propto \exp(\kappa\, s\, \nu(q)\, a_w)

    among the sentiment words w, with a_w the polarity, ν(q) = −1 where the state negates and κ the clarity, doubled
    where it intensifies; the shares of the other roles depend on the state alone.

    Args:
        length: T, at least 1; counts the end.
        clarity: κ, above 0: how much a sentiment word tells.
        words: the vocabulary: one end, at least one word of each other role, sentiment words of both signs.
        openings: the X prompts.

    Raises:
        ValueError: an argument out of range, a vocabulary that lacks a role.

    Example:
        >>> world = ReviewWorld(length=3)
        >>> reward = world.oracle_reward()[0]
        >>> [round(reward[world.index(text)].item(), 2) for text in ("good .", "very good .", "not good .")]
        [0.5, 1.0, -0.5]
    """

    length: int = 6
    clarity: float = 0.25
    words: tuple[Word, ...] = WORDS
    openings: tuple[Opening, ...] = OPENINGS

    def __post_init__(self) -> None:
        checks.require_integer("length", self.length, at_least=1)
        checks.require_positive(clarity=self.clarity)
        roles = [word.role for word in self.words]
        missing = [role.name for role in Role if role not in roles]
        if missing or roles.count(Role.END) > 1:
            raise ValueError(f"words must hold exactly one END and each other role; got {[r.name for r in roles]}")
        polarities = [word.polarity for word in self.words if word.role is Role.SENTIMENT]
        if not min(polarities) < 0 < max(polarities):
            raise ValueError(f"words must hold sentiment words of both signs; got polarities {polarities}")
        if not self.openings:
            raise ValueError("openings must hold at least one prompt; got none")

    @cached_property
    def space(self) -> SequenceSpace:
        """Reviews as completions: a token is a place in ``words``."""
        return SequenceSpace(len(self.words), self.length, eos=self.end)

    @cached_property
    def end(self) -> int:
        """The token that ends a review."""
        return next(i for i, word in enumerate(self.words) if word.role is Role.END)

    @property
    def n_prompts(self) -> int:
        """X."""
        return len(self.openings)

    def text(self, tokens: Int[Tensor, " T"]) -> str:
        """A review to read, up to its end."""
        words = []
        for token in tokens.tolist():
            words.append(self.words[token].text)
            if token == self.end:
                break
        return " ".join(words)

    def index(self, text: str) -> int:
        """The place of a review in the space, from its words parted by blanks; filled with the end."""
        known = {word.text: i for i, word in enumerate(self.words)}
        unknown = [word for word in text.split() if word not in known]
        if unknown:
            raise ValueError(f"text must be made of {sorted(known)}; got {unknown}")
        tokens = [known[word] for word in text.split()]
        if len(tokens) > self.length:
            raise ValueError(f"text must have at most {self.length} words; got {len(tokens)}")
        tokens += [self.end] * (self.length - len(tokens))
        return int(self.space.index(torch.tensor(tokens)))

    def log_prior(self) -> Float64[Tensor, "X 2"]:
        """log P(s | x) of a favourable and an unfavourable author."""
        log_odds = torch.tensor([opening.log_odds for opening in self.openings], dtype=torch.float64)
        return torch.nn.functional.logsigmoid(torch.stack([log_odds, -log_odds], -1))

    def log_likelihoods(self) -> Float64[Tensor, "X 2 N"]:
        """log P(y | x, s) of every review."""
        emission = self._log_emissions()
        states = torch.tensor([_state(o.negated, o.intensified) for o in self.openings])[:, None]
        tables = []
        for t in range(self.length):
            # [2, X, prefixes, V]: an author of either sentiment, at every prefix.
            tables.append(emission[:, states].transpose(0, 1).flatten(0, 1))
            if t + 1 < self.length:
                states = self._transitions()[states].flatten(1)
        return sum_over_trie(self.space, tables, order=self.length - 1).unflatten(0, (self.n_prompts, 2))

    def log_human(self) -> Float64[Tensor, "X N"]:
        """log P(y | x): what people write, which supervised fine-tuning imitates."""
        return (self.log_likelihoods() + self.log_prior().unsqueeze(-1)).logsumexp(1)

    def oracle_reward(self) -> Float64[Tensor, "X N"]:
        r"""Log odds of a favourable author given the review, :math:`\log P(+ \mid x, y) / P(- \mid x, y)`, finite.

        To twelve decimals, so that reviews of equal evidence have equal rewards: best-of-n and win rates count ties.
        """
        joint = self.log_likelihoods() + self.log_prior().unsqueeze(-1)
        return (joint[:, 0] - joint[:, 1]).round(decimals=DECIMALS)

    def _log_emissions(self) -> Float64[Tensor, "2 4 V"]:
        """log P(word | state, sentiment)."""
        rows = [
            [self._emission(sentiment, negated, intensified) for negated, intensified in _STATES]
            for sentiment in SENTIMENTS
        ]
        return torch.tensor(rows, dtype=torch.float64).log()

    def _emission(self, sentiment: int, negated: bool, intensified: bool) -> list[float]:
        """P(word | state, sentiment), in the order of the words."""
        shares = ROLE_SHARES_INTENSIFIED if intensified else ROLE_SHARES_NEGATED if negated else ROLE_SHARES
        clarity = self.clarity * (2 if intensified else 1) * sentiment * (-1 if negated else 1)
        weight = {
            word: math.exp(clarity * word.polarity) if word.role is Role.SENTIMENT else 1.0 for word in self.words
        }
        total = {role: sum(weight[word] for word in self.words if word.role is role) for role in Role}
        left = 1.0 - sum(shares.values())
        return [shares.get(word.role, left) * weight[word] / total[word.role] for word in self.words]

    def _transitions(self) -> Int[Tensor, "4 A"]:
        """The state after each word that does not end the review."""
        live = [word for word in self.words if word.role is not Role.END]
        return torch.tensor([[_next_state(*state, word.role) for word in live] for state in _STATES])


_STATES = [(negated, intensified) for negated in (False, True) for intensified in (False, True)]


def _state(negated: bool, intensified: bool) -> int:
    return _STATES.index((negated, intensified))


def _next_state(negated: bool, intensified: bool, role: Role) -> int:
    """The reach of a negation ends with the next word that is no intensifier."""
    if role is Role.NEGATION:
        return _state(not negated, False)
    if role is Role.INTENSIFIER:
        return _state(negated, True)
    return _state(False, False)
