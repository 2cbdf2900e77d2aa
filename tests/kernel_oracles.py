"""Log-probabilities of labels, their gradients and their sums, in plain loops: what the kernels are compared with.

Nothing here imports the library, torch or numpy. Matrices are sequences of rows of floats; an ignored row gives 0 and
gets no gradient. Every function is held against a case worked out by hand in the test module that uses it.
"""

import math
from collections.abc import Sequence

from tests import oracles

Row = Sequence[float]
Matrix = Sequence[Row]


def dot(a: Row, b: Row) -> float:
    """Sum of products."""
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def products(hidden: Row, weight: Matrix, bias: Row | None) -> list[float]:
    """h · W_v + b_v for each token v."""
    products = [dot(hidden, row) for row in weight]
    return products if bias is None else [x + b for x, b in zip(products, bias, strict=True)]


def logit(x: float, softcap: float | None, temperature: float) -> float:
    """The capped product over the temperature."""
    return (x if softcap is None else softcap * math.tanh(x / softcap)) / temperature


def slope(x: float, softcap: float | None, temperature: float) -> float:
    """Derivative of the logit."""
    return (1.0 if softcap is None else 1 - math.tanh(x / softcap) ** 2) / temperature


def log_probabilities(
    hidden: Row, weight: Matrix, bias: Row | None, softcap: float | None, temperature: float
) -> list[float]:
    """log p of every token."""
    return oracles.log_softmax([logit(x, softcap, temperature) for x in products(hidden, weight, bias)])


def linear_logps(
    hidden: Matrix,
    weight: Matrix,
    labels: Sequence[int],
    bias: Row | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> tuple[list[float], list[float]]:
    """log p of each row's label, and each row's entropy."""
    logps, entropies = [], []
    for h, label in zip(hidden, labels, strict=True):
        counts = label != ignore_index
        log_p = log_probabilities(h, weight, bias, softcap, temperature) if counts else []
        logps.append(log_p[label] if counts else 0.0)
        entropies.append(oracles.entropy(log_p) if counts else 0.0)
    return logps, entropies


def linear_gradients(
    hidden: Matrix,
    weight: Matrix,
    labels: Sequence[int],
    bias: Row | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    grad_logps: Row,
    grad_entropies: Row,
) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """Gradients to hidden, weight and bias of the weighted sum of all log-probabilities and entropies."""
    n_vocab, width = len(weight), len(weight[0])
    grad_products = [[0.0] * n_vocab for _ in hidden]
    for i, (h, label) in enumerate(zip(hidden, labels, strict=True)):
        if label == ignore_index:
            continue
        log_p = log_probabilities(h, weight, bias, softcap, temperature)
        entropy = oracles.entropy(log_p)
        for v, x in enumerate(products(h, weight, bias)):
            p = math.exp(log_p[v])
            surprise = p * (log_p[v] + entropy) if p > 0 else 0.0
            grad_logit = grad_logps[i] * ((v == label) - p) - grad_entropies[i] * surprise
            grad_products[i][v] = grad_logit * slope(x, softcap, temperature)
    by_token = [[row[v] for row in grad_products] for v in range(n_vocab)]
    # A row without a gradient may hold anything, NaN too.
    rows = [[x if any(g) else 0.0 for x in h] for h, g in zip(hidden, grad_products, strict=True)]
    grad_hidden = [[dot(g, [w[j] for w in weight]) for j in range(width)] for g in grad_products]
    grad_weight = [[dot(g, [h[j] for h in rows]) for j in range(width)] for g in by_token]
    return grad_hidden, grad_weight, [math.fsum(g) for g in by_token]


def selective_logps(logits: Matrix, labels: Sequence[int], temperature: float, ignore_index: int) -> list[float]:
    """log p of each row's label."""
    return [
        oracles.log_softmax([z / temperature for z in row])[label] if label != ignore_index else 0.0
        for row, label in zip(logits, labels, strict=True)
    ]


def selective_gradient(
    logits: Matrix, labels: Sequence[int], temperature: float, ignore_index: int, grad_logps: Row
) -> list[list[float]]:
    """Gradient to the logits of the weighted sum of all log-probabilities."""
    gradient = []
    for row, label, g in zip(logits, labels, grad_logps, strict=True):
        log_p = oracles.log_softmax([z / temperature for z in row]) if label != ignore_index else [0.0] * len(row)
        share = 0.0 if label == ignore_index else g / temperature
        gradient.append([share * ((v == label) - math.exp(lp)) for v, lp in enumerate(log_p)])
    return gradient


def sequence_logps(token_logps: Matrix, mask: Sequence[Sequence[bool]]) -> list[float]:
    """The sum of each row's unmasked entries."""
    return [
        math.fsum(x for x, counts in zip(row, kept, strict=True) if counts)
        for row, kept in zip(token_logps, mask, strict=True)
    ]


def candidate_log_ratios(policy: Matrix, ref: Matrix, mask: Sequence[Sequence[bool]], k: int) -> list[list[float]]:
    """Differences of the sums, k candidates to a row."""
    differences = [
        math.fsum(p - r for p, r, counts in zip(*rows, strict=True) if counts)
        for rows in zip(policy, ref, mask, strict=True)
    ]
    return [differences[i : i + k] for i in range(0, len(differences), k)]
