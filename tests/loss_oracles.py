"""The family of losses again, from the papers' formulas: plain arithmetic on Python floats, one example at a time.

Nothing here imports the library or torch. Naive where float64 allows it: the extremes are tested by laws instead.
tests/test_loss_oracles.py holds what these functions are compared with by hand.
"""

import math
from collections.abc import Callable, Sequence

Row = Sequence[float]


def sigma(x: float) -> float:
    """The logistic function."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def logistic(x: float) -> float:
    """-log sigma(x)."""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def softmax(values: Row) -> list[float]:
    """Probabilities proportional to the exponentials."""
    largest = max(values)
    weights = [math.exp(value - largest) for value in values]
    return [weight / math.fsum(weights) for weight in weights]


# On pairs: log-probabilities of chosen and rejected under the policy, then under the reference


def dpo(w: float, lo: float, rw: float, rlo: float, *, beta: float, label_smoothing: float = 0.0) -> float:
    """Cross-entropy of the label."""
    margin = beta * ((w - rw) - (lo - rlo))
    wrong = label_smoothing * logistic(-margin) if label_smoothing else 0.0
    return (1 - label_smoothing) * logistic(margin) + wrong


def robust_dpo(w: float, lo: float, rw: float, rlo: float, *, beta: float, label_smoothing: float) -> float:
    """The unbiased estimate of the clean loss."""
    margin = beta * ((w - rw) - (lo - rlo))
    right, wrong = logistic(margin), logistic(-margin)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def exo_pref(w: float, lo: float, rw: float, rlo: float, *, beta: float, label_smoothing: float) -> float:
    """KL of two coins."""
    margin = beta * ((w - rw) - (lo - rlo))
    return math.fsum(
        [
            sigma(margin) * (-logistic(margin) - math.log1p(-label_smoothing)),
            sigma(-margin) * (-logistic(-margin) - math.log(label_smoothing)),
        ]
    )


def ipo(w: float, lo: float, rw: float, rlo: float, *, beta: float) -> float:
    """Square about 1/(2 beta)."""
    return ((w - rw) - (lo - rlo) - 1 / (2 * beta)) ** 2


def hinge(w: float, lo: float, rw: float, rlo: float, *, beta: float) -> float:
    """Hinge at 1."""
    return max(0.0, 1 - beta * ((w - rw) - (lo - rlo)))


def sppo(w: float, lo: float, rw: float, rlo: float, *, beta: float, win_rate: float = 1.0) -> float:
    """Two squares, with step size 1/beta."""
    eta = 1 / beta
    return (w - rw - eta * (win_rate - 0.5)) ** 2 + (lo - rlo - eta * (1 - win_rate - 0.5)) ** 2


def nca_pair(w: float, lo: float, rw: float, rlo: float, *, beta: float) -> float:
    """Wanted, and each of the two as noise."""
    x, y = beta * (w - rw), beta * (lo - rlo)
    return logistic(x) + logistic(-x) / 2 + logistic(-y) / 2


def bco_pair(w: float, lo: float, rw: float, rlo: float, *, beta: float, delta: float) -> float:
    """Two classifications."""
    return logistic(beta * (w - rw) - delta) + logistic(delta - beta * (lo - rlo))


def apo_zero(w: float, lo: float, rw: float, rlo: float, *, beta: float) -> float:
    """Chosen up, rejected down."""
    return 1 - sigma(beta * (w - rw)) + sigma(beta * (lo - rlo))


def apo_down(w: float, lo: float, rw: float, rlo: float, *, beta: float) -> float:
    """Chosen down, the gap up."""
    return sigma(beta * (w - rw)) + 1 - sigma(beta * ((w - rw) - (lo - rlo)))


def discopop(w: float, lo: float, rw: float, rlo: float, *, beta: float, tau: float) -> float:
    """A mixture of logistic and exponential, the exponential's share times e^-m in one exponent."""
    margin = beta * ((w - rw) - (lo - rlo))
    return (1 - sigma(margin / tau)) * logistic(margin) + math.exp(-logistic(margin / tau) - margin)


def dpop(w: float, lo: float, rw: float, rlo: float, *, beta: float, penalty: float) -> float:
    """DPO less the penalty."""
    return logistic(beta * ((w - rw) - (lo - rlo) - penalty * max(0.0, rw - w)))


def cal_dpo(w: float, lo: float, rw: float, rlo: float, *, beta: float) -> float:
    """Logistic without beta, and two squares."""
    a, b = w - rw, lo - rlo
    return logistic(a - b) + (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2


def f_dpo(
    w: float,
    lo: float,
    rw: float,
    rlo: float,
    *,
    beta: float,
    derivative: Callable[[float], float],
) -> float:
    """DPO with f' of the ratio, here of the ratio itself and not of its logarithm."""
    return logistic(beta * (derivative(math.exp(w - rw)) - derivative(math.exp(lo - rlo))))


def chi_po(w: float, lo: float, rw: float, rlo: float, *, beta: float, max_margin: float) -> float:
    """DPO with a link and a clip."""
    margin = beta * ((math.exp(w - rw) + (w - rw)) - (math.exp(lo - rlo) + (lo - rlo)))
    return logistic(min(max(margin, -max_margin), max_margin))


# With the rewards of both


def rebel(
    w: float,
    lo: float,
    rw: float,
    rlo: float,
    score_w: float,
    score_l: float,
    *,
    eta: float,
) -> float:
    """Square of the two gaps."""
    return (((w - rw) - (lo - rlo)) / eta - (score_w - score_l)) ** 2


def rpo_squared(
    w: float,
    lo: float,
    rw: float,
    rlo: float,
    score_w: float,
    score_l: float,
    *,
    beta: float,
    reward_scale: float,
) -> float:
    """Square of the two gaps."""
    return (beta * ((w - rw) - (lo - rlo)) - reward_scale * (score_w - score_l)) ** 2


def rpo_kl(
    w: float,
    lo: float,
    rw: float,
    rlo: float,
    score_w: float,
    score_l: float,
    *,
    beta: float,
    reward_scale: float,
) -> float:
    """sigma(b) log(sigma(b)/sigma(a)) and the same of the complements."""
    a, b = beta * ((w - rw) - (lo - rlo)), reward_scale * (score_w - score_l)
    return math.fsum([sigma(b) * (logistic(a) - logistic(b)), sigma(-b) * (logistic(-a) - logistic(-b))])


# Without a reference: log-probabilities and lengths of both


def simpo(w: float, lo: float, n_w: int, n_l: int, *, beta: float, gamma: float) -> float:
    """Mean log-probabilities above a margin."""
    return logistic(beta / n_w * w - beta / n_l * lo - gamma)


def orpo(w: float, lo: float, n_w: int, n_l: int, *, odds_weight: float) -> float:
    """Likelihood, and odds spelled out."""
    p, q = math.exp(w / n_w), math.exp(lo / n_l)
    return -w / n_w - odds_weight * math.log(sigma(math.log((p / (1 - p)) / (q / (1 - q)))))


def cpo(w: float, lo: float, n_w: int | None = None, *, beta: float, nll_weight: float) -> float:
    """DPO without a reference, and the likelihood."""
    return logistic(beta * (w - lo)) - nll_weight * (w if n_w is None else w / n_w)


# On single completions


def kto(
    policy: float,
    ref: float,
    desirable: bool,
    *,
    beta: float,
    reference_point: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> float:
    """lambda_y - v, the value v by cases."""
    z = beta * (policy - ref - reference_point)
    if desirable:
        return desirable_weight - desirable_weight * sigma(z)
    return undesirable_weight - undesirable_weight * sigma(-z)


def bco(policy: float, ref: float, desirable: bool, *, beta: float, delta: float) -> float:
    """Classification by cases."""
    z = beta * (policy - ref) - delta
    return logistic(z) if desirable else logistic(-z)


def dro(policy: float, ref: float, reward: float, value: float, *, tau: float) -> float:
    """Half a square."""
    return (reward - value - tau * (policy - ref)) ** 2 / 2


# On a batch


def aot(pairs: Sequence[Row], *, beta: float) -> list[float]:
    """Sorted margins of the policy and of the reference."""
    policy, ref = sorted(w - lo for w, lo, _, _ in pairs), sorted(rw - rlo for _, _, rw, rlo in pairs)
    return [logistic(beta * (u - v)) for u, v in zip(policy, ref, strict=True)]


def aot_unpaired(pairs: Sequence[Row], *, beta: float) -> list[float]:
    """Sorted log ratios of chosen and of rejected."""
    chosen, rejected = sorted(w - rw for w, _, rw, _ in pairs), sorted(lo - rlo for _, lo, _, rlo in pairs)
    return [logistic(beta * (u - v)) for u, v in zip(chosen, rejected, strict=True)]


# On candidates


def plackett_luce(log_ratio: Row, *, beta: float) -> float:
    """Minus the log of the product of the choices, each among what is left."""
    return -math.fsum(math.log(softmax([beta * x for x in log_ratio[k:]])[0]) for k in range(len(log_ratio)))


def nca_rw(log_ratio: Row, rewards: Row, *, beta_pi: float, beta_r: float) -> float:
    """Wanted with the weight of the target, noise with 1/K."""
    target = softmax([r / beta_r for r in rewards])
    wanted = math.fsum(q * logistic(beta_pi * x) for q, x in zip(target, log_ratio, strict=True))
    return wanted + math.fsum(logistic(-beta_pi * x) for x in log_ratio) / len(log_ratio)


def fpo_js(log_ratio: Row, rewards: Row, *, beta_pi: float, beta_r: float) -> float:
    """Jensen-Shannon, from probabilities."""
    p, q = softmax([beta_pi * x for x in log_ratio]), softmax([r / beta_r for r in rewards])
    halves = [(a, (a + b) / 2) for a, b in zip(p, q, strict=True)] + [
        (b, (a + b) / 2) for a, b in zip(p, q, strict=True)
    ]
    return math.fsum(a * math.log(a / m) for a, m in halves if a > 0) / 2
