"""Exact results on spaces too large to enumerate: k-gram policies, and rewards that a finite automaton computes.

* The reward: :class:`RewardAutomaton`, made by :func:`from_function`, :func:`from_keywords`, :func:`from_regex`,
  :func:`once`, :func:`per_token`, :func:`at_positions`, :func:`even_count`, by sums and by :func:`minimise`.
* The policies: :class:`KGramModel`, any order; :class:`OptimalPolicy` and its nearest k-gram models;
  :func:`tempered_policy`.
* What is known of them exactly: :func:`log_partition`, moments of the reward, entropies, divergences and J, all
  differentiable; the full distribution of an integer-valued reward, :func:`reward_distribution`, and with it best of n
  and win rates.

What sampled candidates show of them is the business of :mod:`exo_toy.candidates`.
"""

from exo_toy.automata.automaton import RewardAutomaton
from exo_toy.automata.build import at_positions, even_count, from_function, per_token
from exo_toy.automata.chain import KGramModel
from exo_toy.automata.distribution import RewardDistribution, reward_distribution, reward_range
from exo_toy.automata.keywords import from_keywords, once
from exo_toy.automata.measures import (
    Moments,
    alignment_objective,
    entropy,
    kl_divergence,
    kl_optimal_to_policy,
    kl_policy_to_optimal,
    log_partition,
    optimal_entropy,
    optimal_reward_moments,
    reward_moments,
)
from exo_toy.automata.minimise import equivalent, minimise
from exo_toy.automata.optimal import OptimalPolicy, log_tempered_normalizer, tempered_policy
from exo_toy.automata.regex import from_regex

__all__ = [
    "KGramModel",
    "Moments",
    "OptimalPolicy",
    "RewardAutomaton",
    "RewardDistribution",
    "alignment_objective",
    "at_positions",
    "entropy",
    "equivalent",
    "even_count",
    "from_function",
    "from_keywords",
    "from_regex",
    "kl_divergence",
    "kl_optimal_to_policy",
    "kl_policy_to_optimal",
    "log_partition",
    "log_tempered_normalizer",
    "minimise",
    "once",
    "optimal_entropy",
    "optimal_reward_moments",
    "per_token",
    "reward_distribution",
    "reward_moments",
    "reward_range",
    "tempered_policy",
]
