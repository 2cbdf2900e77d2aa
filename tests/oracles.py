"""The mathematics again, in plain loops over Python floats: what the library is compared with.

Nothing here imports the library, torch or numpy; sums are exact to the last bit (``math.fsum``) and nothing is clever.
Tables and candidates are sequences of floats; probability zero is a logarithm of -inf. tests/test_oracles.py holds
every function here against cases worked out by hand.
"""

import itertools
import math
from collections.abc import Callable, Sequence

Row = Sequence[float]


def log_sum_exp(values: Row) -> float:
    """log of the sum of exponentials; -inf if every value is."""
    largest = max(values)
    if math.isinf(largest):
        return largest
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values))


def below_max(values: Row) -> list[float]:
    """Each value minus the largest: no softmax sees the shift, and small differences of large values keep digits."""
    largest = max(values)
    return [value - largest for value in values]


def log_softmax(values: Row) -> list[float]:
    """Each value minus the log-sum-exp."""
    shifted = below_max(values)
    total = log_sum_exp(shifted)
    return [value - total for value in shifted]


def expectation(log_p: Row, values: Row) -> float:
    """Sum of p * value, where entries of probability zero count nothing and an infinite value counts in full."""
    terms = [(lp, value) for lp, value in zip(log_p, values, strict=True) if lp > -math.inf]
    infinite = [value for _, value in terms if math.isinf(value)]
    if infinite:
        return math.fsum(infinite)
    return math.fsum(math.exp(lp) * value for lp, value in terms)


# Divergences between normalised tables


def _minus(log_p: Row, log_q: Row) -> list[float]:
    """log p - log q, and 0 where p is zero, which no expectation under p sees."""
    return [lp - lq if lp > -math.inf else 0.0 for lp, lq in zip(log_p, log_q, strict=True)]


def kl(log_p: Row, log_q: Row) -> float:
    """KL(p||q)."""
    return expectation(log_p, _minus(log_p, log_q))


def entropy(log_p: Row) -> float:
    """-sum p log p."""
    return -expectation(log_p, log_p)


def total_variation(log_p: Row, log_q: Row) -> float:
    """Half the sum of |p - q|."""
    return math.fsum(abs(math.exp(lp) - math.exp(lq)) for lp, lq in zip(log_p, log_q, strict=True)) / 2


def jensen_shannon(log_p: Row, log_q: Row) -> float:
    """Mean of KL(p||m) and KL(q||m), m the mean of p and q, in nats."""
    log_m = [log_sum_exp([lp, lq]) - math.log(2) for lp, lq in zip(log_p, log_q, strict=True)]
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


# Targets and objectives


def optimal_policy(log_ref: Row, reward: Row, beta: float) -> tuple[list[float], float]:
    """log pi_ref + r/beta - log Z, and log Z."""
    tilted = [lr + r / beta for lr, r in zip(log_ref, reward, strict=True)]
    log_z = log_sum_exp(tilted)
    return [value - log_z for value in tilted], log_z


def tempered_policy(log_pi: Row, log_ref: Row, beta_pi: float) -> list[float]:
    """pi**beta_pi * pi_ref**(1 - beta_pi), normalised; zero where the reference is."""
    mixed = [beta_pi * (lp - lr) + lr if lr > -math.inf else -math.inf for lp, lr in zip(log_pi, log_ref, strict=True)]
    return log_softmax(mixed)


def best_of_n(log_ref: Row, reward: Row, n: int) -> list[float]:
    """Probability of being the best of n draws from the reference, by going through all N**n draws.

    Among the draws that share the highest reward one is taken, each with the same chance.
    """
    shares: list[list[float]] = [[] for _ in log_ref]
    for draws in itertools.product(range(len(log_ref)), repeat=n):
        probability = (
            math.exp(math.fsum(log_ref[y] for y in draws)) if all(log_ref[y] > -math.inf for y in draws) else 0
        )
        highest = max(reward[y] for y in draws)
        winners = [y for y in draws if reward[y] == highest]
        for y in winners:
            shares[y].append(probability / len(winners))
    return [math.fsum(share) for share in shares]


def alignment_objective(log_pi: Row, log_ref: Row, reward: Row, beta: float) -> float:
    """E_pi[r] - beta KL(pi||pi_ref)."""
    return expectation(log_pi, reward) - beta * kl(log_pi, log_ref)


def generalized_objective(log_pi: Row, log_ref: Row, reward: Row, beta_pi: float, beta_r: float) -> float:
    """The alignment objective at beta_r of the tempered policy."""
    return alignment_objective(tempered_policy(log_pi, log_ref, beta_pi), log_ref, reward, beta_r)


# Losses of one example


def _log_sigmoids(margin: float) -> list[float]:
    """log sigma(m) and log sigma(-m)."""
    return [0.0, -math.inf] if margin == math.inf else log_softmax([margin, 0.0])


def exo_rw(log_ratio: Row, rewards: Row, beta_pi: float, beta_r: float) -> float:
    """KL(p_f||p_r) over the candidates."""
    log_p_f = log_softmax([beta_pi * value for value in below_max(log_ratio)])
    log_p_r = log_softmax([value / beta_r for value in below_max(rewards)])
    return kl(log_p_f, log_p_r)


def dpo_rw(log_ratio: Row, rewards: Row, beta_pi: float, beta_r: float) -> float:
    """Cross-entropy -sum p_r log p_f over the candidates."""
    log_p_f = log_softmax([beta_pi * value for value in below_max(log_ratio)])
    log_p_r = log_softmax([value / beta_r for value in below_max(rewards)])
    return -expectation(log_p_r, log_p_f)


def exo_pref(
    policy_chosen: float,
    policy_rejected: float,
    ref_chosen: float,
    ref_rejected: float,
    beta: float,
    label_smoothing: float,
) -> float:
    """KL between (sigma(m), sigma(-m)) and (1 - eps, eps)."""
    margin = beta * math.fsum([policy_chosen, -ref_chosen, -policy_rejected, ref_rejected])
    log_p_f = _log_sigmoids(margin)
    return kl(log_p_f, [math.log1p(-label_smoothing), math.log(label_smoothing)])


def dpo(
    policy_chosen: float,
    policy_rejected: float,
    ref_chosen: float,
    ref_rejected: float,
    beta: float,
    label_smoothing: float,
) -> float:
    """-(1 - eps) log sigma(m) - eps log sigma(-m)."""
    margin = beta * math.fsum([policy_chosen, -ref_chosen, -policy_rejected, ref_rejected])
    log_p_f = _log_sigmoids(margin)
    log_eps = math.log(label_smoothing) if label_smoothing > 0 else -math.inf
    return -expectation([math.log1p(-label_smoothing), log_eps], log_p_f)


def expected_loss(
    loss: Callable[[Row, Row, float, float], float],
    log_pi: Row,
    log_ref: Row,
    reward: Row,
    k: int,
    beta_pi: float,
    beta_r: float,
) -> float:
    """Expectation of ``exo_rw`` or ``dpo_rw`` over k candidates from the reference: all N**k tuples, one by one."""
    terms = []
    for candidates in itertools.product(range(len(log_ref)), repeat=k):
        log_probability = math.fsum(log_ref[y] for y in candidates)
        if log_probability > -math.inf:
            log_ratio = [log_pi[y] - log_ref[y] for y in candidates]
            value = loss(log_ratio, [reward[y] for y in candidates], beta_pi, beta_r)
            terms.append(math.exp(log_probability) * value)
    return math.fsum(terms)
