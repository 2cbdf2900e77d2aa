"""KL, entropy, total variation, Jensen-Shannon and alpha-divergences: oracle, laws, infinities, gradients, errors."""

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exo_toy.divergences import alpha_divergence, entropy, jensen_shannon, kl_divergence, total_variation
from tests import oracles, strategies
from tests.tolerances import TOLERANCES, assert_close

INF = math.inf
ATOL = TOLERANCES[torch.float64].atol
KINDS = {
    "kl": (kl_divergence, oracles.kl),
    "tv": (total_variation, oracles.total_variation),
    "js": (jensen_shannon, oracles.jensen_shannon),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def log_table(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def alpha_oracle(log_p: list[float], log_q: list[float], alpha: float) -> float:
    """The definition at 40 digits, its limits included."""
    with mpmath.workdps(40):
        p, q = ([mpmath.exp(mpmath.mpf(entry)) for entry in row] for row in (log_p, log_q))
        # The logarithms are rounded to 16 digits: what is lost there must not be divided by alpha (1 - alpha).
        p, q = ([entry / mpmath.fsum(row) for entry in row] for row in (p, q))
        if alpha in (0, 1):
            p, q = (p, q) if alpha == 1 else (q, p)
            if any(pp > 0 and qq == 0 for pp, qq in zip(p, q, strict=True)):
                return INF
            return float(mpmath.fsum(pp * mpmath.log(pp / qq) for pp, qq in zip(p, q, strict=True) if pp > 0))
        a = mpmath.mpf(alpha)
        total = mpmath.mpf(0)
        for pp, qq in zip(p, q, strict=True):
            if pp == 0 or qq == 0:
                if (alpha > 1 and pp > 0) or (alpha < 0 and qq > 0):
                    return INF
            else:
                total += pp**a * qq ** (1 - a)
        return float((1 - total) / (a * (1 - a)))


@st.composite
def table_pairs(draw: st.DrawFn, *, holes: bool = False) -> tuple[Tensor, Tensor]:
    """Two normalised tables [X, N]; with ``holes``, -inf in both and q = 0 only where p = 0."""
    n_prompts, n = draw(strategies.sizes(2, low=1, high=6))
    log_p, log_q = (draw(strategies.log_probabilities((n_prompts, n))) for _ in range(2))
    if holes:
        in_p, extra = draw(strategies.masks((n_prompts, n))), draw(strategies.masks((n_prompts, n)))
        log_p = log_p.masked_fill(~in_p, -INF).log_softmax(-1)
        log_q = log_q.masked_fill(~(in_p | extra), -INF).log_softmax(-1)
    return log_p, log_q


def row_by_row(oracle: Callable[..., float], *tables: Tensor, **kwargs: float) -> list[float]:
    return [oracle(*(row.tolist() for row in rows), **kwargs) for rows in zip(*tables, strict=True)]


# Against the oracle


@each_kind
@given(pair=table_pairs(holes=True))
def test_agrees_with_the_oracle(kind, device, pair):
    function, oracle = KINDS[kind]
    log_p, log_q = (table.to(device) for table in pair)
    assert_close(function(log_p, log_q), row_by_row(oracle, log_p, log_q))


@given(pair=table_pairs(holes=True))
def test_entropy_agrees_with_the_oracle(device, pair):
    log_p = pair[0].to(device)
    assert_close(entropy(log_p), row_by_row(oracles.entropy, log_p))


ALPHAS = [-1.5, 0, 1e-12, 0.3, 0.5, 1 - 1e-9, 1, 2.5]


@pytest.mark.parametrize("alpha", ALPHAS)
@given(pair=table_pairs())
def test_alpha_divergence_agrees_with_the_definition_at_40_digits(alpha, pair):
    # p^2.5 q^-1.5 of tables 16 nats apart is e^40 or so: relative accuracy is then what there is.
    log_p, log_q = pair
    assert_close(alpha_divergence(log_p, log_q, alpha=alpha), row_by_row(alpha_oracle, log_p, log_q, alpha=alpha),
                 scale=100.0)  # fmt: skip


@given(pair=table_pairs(holes=True), alpha=st.floats(0.01, 3.0))
def test_alpha_divergence_where_probabilities_are_zero(pair, alpha):
    log_p, log_q = pair
    for first, second in ((log_p, log_q), (log_q, log_p)):
        expected = row_by_row(alpha_oracle, first, second, alpha=alpha)
        # alpha (1 - alpha) in the denominator magnifies the tables' own rounding where supports differ.
        assert_close(alpha_divergence(first, second, alpha=alpha), expected, scale=1 + 1e-2 / abs(1 - alpha or 1.0))


def test_worked_values():
    p, q = log_table(0.5, 0.25, 0.25), log_table(0.25, 0.25, 0.5)
    assert_close(kl_divergence(p, q), 0.25 * math.log(2))
    assert_close(entropy(p), 1.5 * math.log(2))
    assert_close(total_variation(p, q), 0.25)
    # Hellinger: 4 (1 - sum sqrt(p q)); Pearson: half of sum (p - q)^2 / q.
    assert_close(alpha_divergence(p, q, alpha=0.5), 4 * (1 - (2 * math.sqrt(0.125) + 0.25)))
    assert_close(alpha_divergence(p, q, alpha=2), 0.5 * (0.25 + 0.125))
    # m = (3, 2, 3) / 8: (1/2 log 4/3 + 1/4 log 2/3) / 2, twice.
    assert_close(jensen_shannon(p, q), 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3))


# Laws


def test_the_order_of_the_arguments_is_kept():
    p, q = log_table(0.9, 0.1), log_table(0.5, 0.5)
    assert_close(kl_divergence(p, q), 0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert_close(kl_divergence(q, p), -0.5 * math.log(0.36))


@given(pair=table_pairs(), alpha=st.floats(-2.0, 3.0))
def test_alpha_divergence_swaps_with_its_arguments(pair, alpha):
    log_p, log_q = pair
    ours = alpha_divergence(log_p, log_q, alpha=alpha)
    theirs = alpha_divergence(log_q, log_p, alpha=1 - alpha)
    # 1 - alpha is rounded; a power of e^16 then differs by 16 roundings, the value at the limits not at all.
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@given(pair=table_pairs())
def test_alpha_divergence_has_the_kl_divergences_as_limits(pair):
    log_p, log_q = pair
    assert torch.equal(alpha_divergence(log_p, log_q, alpha=1), kl_divergence(log_p, log_q))
    assert torch.equal(alpha_divergence(log_p, log_q, alpha=0), kl_divergence(log_q, log_p))
    # The derivative in alpha is at most about (log p/q)^2 of 1000 here.
    for alpha, limit in ((1 - 1e-9, kl_divergence(log_p, log_q)), (1e-9, kl_divergence(log_q, log_p))):
        torch.testing.assert_close(alpha_divergence(log_p, log_q, alpha=alpha), limit, rtol=1e-7, atol=1e-6)


@given(pair=table_pairs(holes=True))
def test_bounds_and_symmetry(pair):
    log_p, log_q = pair
    assert (kl_divergence(log_p, log_q) >= -ATOL).all()
    assert (entropy(log_p) >= -ATOL).all()
    assert (entropy(log_p) <= math.log(log_p.shape[-1]) + ATOL).all()
    tv, js = total_variation(log_p, log_q), jensen_shannon(log_p, log_q)
    assert ((tv >= 0) & (tv <= 1 + ATOL)).all()
    assert ((js >= -ATOL) & (js <= math.log(2) + ATOL)).all()
    assert torch.equal(tv, total_variation(log_q, log_p))
    assert_close(js, jensen_shannon(log_q, log_p))
    # Pinsker: TV <= sqrt(KL/2).
    assert (tv <= (kl_divergence(log_p, log_q).clamp(min=0) / 2).sqrt() + 1e-7).all()


@each_kind
@given(pair=table_pairs(holes=True))
def test_zero_between_a_table_and_itself(kind, pair):
    function, _ = KINDS[kind]
    # log(2p) - log 2 in Jensen-Shannon's mean is p up to rounding.
    assert_close(function(pair[0], pair[0]), torch.zeros(len(pair[0]), dtype=torch.float64), scale=1e-3)


@pytest.mark.parametrize("alpha", ALPHAS)
@given(pair=table_pairs(holes=True))
def test_alpha_divergence_is_zero_between_a_table_and_itself(alpha, pair):
    assert (alpha_divergence(pair[0], pair[0], alpha=alpha) == 0).all()


def test_disjoint_supports():
    p, q = log_table(1.0, 0.0), log_table(0.0, 1.0)
    assert kl_divergence(p, q).item() == INF
    assert total_variation(p, q).item() == 1.0
    assert_close(jensen_shannon(p, q), math.log(2))
    assert_close(alpha_divergence(p, q, alpha=0.3), 1 / 0.21)
    assert alpha_divergence(p, q, alpha=1.5).item() == INF
    assert alpha_divergence(p, q, alpha=-0.5).item() == INF


def test_infinite_only_in_the_row_and_direction_without_support():
    p = torch.stack([log_table(0.5, 0.5), log_table(1.0, 0.0)])
    q = torch.stack([log_table(1.0, 0.0), log_table(0.5, 0.5)])
    assert kl_divergence(p, q)[0].item() == INF
    assert_close(kl_divergence(p, q)[1], math.log(2))


def test_a_positive_probability_that_underflows_still_counts():
    p, q = torch.tensor([-800.0, 0.0]).double(), log_table(0.0, 1.0)
    assert kl_divergence(p, q).item() == INF


def test_alpha_divergence_of_probabilities_that_underflow():
    """e^-1500 against 1/3: finite, 4 (1 - sum sqrt(p q)), with finite gradients."""
    p = torch.tensor([-1500.0, -math.log(2), -math.log(2)], dtype=torch.float64, requires_grad=True)
    q = log_table(1 / 3, 1 / 3, 1 / 3).requires_grad_()
    value = alpha_divergence(p, q, alpha=0.5)
    assert_close(value, 4 * (1 - 2 * math.sqrt(1 / 6)))
    # Of the raw tables, m = sqrt(p q): 4 (p - m/2) in log p, -2 m in log q.
    to_p, to_q = torch.autograd.grad(value, (p, q))
    mean = math.sqrt(1 / 6)
    assert_close(to_p, [0.0, 2 - 2 * mean, 2 - 2 * mean])
    assert_close(to_q, [0.0, -2 * mean, -2 * mean])


def test_alpha_divergence_of_huge_order_is_infinite():
    p, q = log_table(0.4, 0.6), log_table(0.5, 0.5)
    assert alpha_divergence(p, q, alpha=1e200).item() == INF
    assert alpha_divergence(p, q, alpha=-1e200).item() == INF


# Gradients


@pytest.mark.parametrize(
    "function",
    [
        kl_divergence,
        total_variation,
        jensen_shannon,
        lambda p, q: alpha_divergence(p, q, alpha=0.3),
        lambda p, q: alpha_divergence(p, q, alpha=1),
        lambda p, q: alpha_divergence(p, q, alpha=2.5),
        lambda p, q: entropy(p) + entropy(q),
    ],
    ids=["kl", "tv", "js", "alpha 0.3", "alpha 1", "alpha 2.5", "entropy"],
)
def test_gradcheck_and_gradgradcheck(function):
    logits = [
        torch.tensor([[0.3, -1.2, 0.5], [2.0, 0.1, -0.4]], dtype=torch.float64, requires_grad=True),
        torch.tensor([[1.0, 0.2, -0.7], [0.0, 0.6, 0.3]], dtype=torch.float64, requires_grad=True),
    ]

    def of_logits(*logits: Tensor) -> Tensor:
        return function(*(value.log_softmax(-1) for value in logits))

    assert torch.autograd.gradcheck(of_logits, logits)
    assert torch.autograd.gradgradcheck(of_logits, logits)


@pytest.mark.parametrize("alpha", [0, 0.5, 0.7, 1, 2.0])
def test_gradient_of_alpha_divergence_where_the_tables_agree(alpha):
    """Of raw tables: sum(p - p^a q^(1-a)) / (a (1-a)) has derivative p/a in log p, -p/a in log q; swapped below 1/2."""
    p = log_table(0.2, 0.3, 0.5).requires_grad_()
    q = p.detach().clone().requires_grad_()
    to_p, to_q = torch.autograd.grad(alpha_divergence(p, q, alpha=alpha), (p, q))
    if alpha >= 0.5:
        expected = (p.exp() / alpha, -p.exp() / alpha)
    else:
        expected = (-p.exp() / (1 - alpha), p.exp() / (1 - alpha))
    assert_close(to_p, expected[0])
    assert_close(to_q, expected[1])


TWO_SIDED = {**{kind: function for kind, (function, _) in KINDS.items()},
             "alpha 0.3": lambda p, q: alpha_divergence(p, q, alpha=0.3),
             "alpha 0.8": lambda p, q: alpha_divergence(p, q, alpha=0.8)}  # fmt: skip


def at_logits(function: Callable[..., Tensor], p_logits: Tensor, q_logits: Tensor) -> tuple[Tensor, ...]:
    """Value, gradients and a second derivative through log_softmax."""
    free = [p_logits.clone().requires_grad_(), q_logits.clone().requires_grad_()]
    value = function(*(logits.log_softmax(-1) for logits in free))
    gradients = torch.autograd.grad(value, free, create_graph=True)
    weights = torch.tensor([0.3, 1.1, -0.8], dtype=torch.float64)
    second = torch.autograd.grad(sum((gradient * weights).sum() for gradient in gradients), free)
    return value.detach(), *(gradient.detach() for gradient in gradients), *second


@pytest.mark.parametrize("kind", TWO_SIDED)
@pytest.mark.parametrize("also_q", [False, True], ids=["p zero", "both zero"])
def test_probability_zero_is_the_limit_of_small_probabilities(kind, also_q):
    """Value, gradients and second derivatives at -inf, against -3000, where every power has underflowed."""
    function = TWO_SIDED[kind]
    p, q = (torch.tensor(row, dtype=torch.float64) for row in ([0.3, -0.4, 2.0], [1.2, 0.9, 0.4]))
    results = []
    for zero in (-INF, -3000.0):
        p[1] = zero
        if also_q:
            q[1] = zero
        results.append(at_logits(function, p, q))
    assert results[0][0] > 0.01
    for at, near in zip(*results, strict=True):
        assert at.isfinite().all()
        assert_close(at, near)


def test_a_probability_zero_of_q_is_the_limit_too():
    """For alpha in (0, 1), total variation and Jensen-Shannon, q = 0 < p is finite; its gradients are limits."""
    p, q = (torch.tensor(row, dtype=torch.float64) for row in ([0.3, -0.4, 2.0], [1.2, 0.9, 0.4]))
    for kind in ("tv", "js", "alpha 0.3", "alpha 0.8"):
        results = []
        for zero in (-INF, -4000.0):
            q[1] = zero
            results.append(at_logits(TWO_SIDED[kind], p, q))
        for at, near in zip(*results, strict=True):
            assert at.isfinite().all(), kind
            assert_close(at, near)


# Shapes and dtypes


@pytest.mark.parametrize("kind", TWO_SIDED)
@given(pair=table_pairs(holes=True))
def test_a_table_is_shared_by_prompts(kind, pair):
    function = TWO_SIDED[kind]
    log_p, log_q = pair
    assert_close(function(log_p[0], log_q), function(log_p[:1].expand_as(log_q), log_q))
    assert_close(function(log_p, log_q[0]), function(log_p, log_q[:1].expand_as(log_p)))
    assert function(log_p[0], log_q[0]).shape == ()
    assert_close(function(log_p[None], log_q[None]), function(log_p, log_q)[None])


@pytest.mark.parametrize("kind", TWO_SIDED)
def test_float32_inputs_are_computed_in_float64(kind):
    p, q = log_table(0.25, 0.5, 0.25).float(), log_table(0.125, 0.125, 0.75).float()
    value = TWO_SIDED[kind](p, q)
    assert value.dtype == torch.float64
    assert_close(value, TWO_SIDED[kind](p.double(), q.double()))
    assert entropy(p).dtype == torch.float64


# Errors


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


@pytest.mark.unchecked
@pytest.mark.parametrize("kind", TWO_SIDED)
def test_bad_tables_are_refused_by_name(kind):
    function, good = TWO_SIDED[kind], log_table(0.5, 0.5)
    for bad, words in [
        (torch.zeros(2), "log_q must hold normalised log-probabilities"),
        (torch.tensor([0.0, math.nan]), "log_q must hold normalised log-probabilities"),
        (torch.tensor([0.0, INF]), "log_q must hold normalised log-probabilities"),
        (torch.full((2,), -INF), "log_q must hold normalised log-probabilities"),
        (log_table(0.2, 0.3, 0.5), "as many completions (last dimension) as log_p, 2; got shape [3]"),
        (torch.tensor(0.0), "log_q must be a table [..., N] with no dimension of 0; got shape []"),
        (torch.zeros(3, 0), "log_q must be a table [..., N] with no dimension of 0; got shape [3, 0]"),
        (torch.tensor([0, 1]), "log_q must have a floating-point dtype; got torch.int64"),
        ([0.5, 0.5], "log_q must be a torch.Tensor; got list"),
    ]:
        message = message_of(lambda bad=bad: function(good, bad))
        # The order of log_p and log_q is turned for alpha below one half.
        assert words in message or words.replace("log_q", "log_p") in message, message
    message = message_of(lambda: function(good.expand(3, 2), good.expand(4, 2)))
    assert "must have the leading dimensions of" in message


@pytest.mark.unchecked
def test_messages_name_the_first_bad_row():
    table = torch.stack([log_table(0.5, 0.5), torch.zeros(2)])
    assert "|log-sum-exp| is 0.69" in message_of(lambda: entropy(table))
    assert "at index [1]" in message_of(lambda: entropy(table))


@pytest.mark.unchecked
@pytest.mark.parametrize("alpha", [math.nan, INF, -INF, "1", True, torch.tensor(0.5)], ids=str)
def test_alpha_must_be_a_finite_number(alpha):
    good = log_table(0.5, 0.5)
    assert "alpha must be a finite number" in message_of(lambda: alpha_divergence(good, good, alpha=alpha))
