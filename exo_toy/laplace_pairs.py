"""Expected alpha-divergences between two normalised sums of weights over K draws, by a quadrature in two dimensions.

For i.i.d. draws y_1..y_K with probabilities q, weights w, v > 0, sums A = sum_i w_i and B = sum_i v_i, eps = 1 - alpha,

    E[D_alpha(w/A || v/B)] = (1 - E[sum_i w_i^alpha v_i^eps / (A^alpha B^eps)]) / (alpha eps).

A^-alpha and B^-eps are Gamma integrals over s and t; by independence what they leave to average is M(s, t)^(K-1) with
M(s, t) = E[exp(-s w - t v)], a matrix product over the completions for all nodes s = exp(a), t = exp(b) at once:

    Phi(s, t) = K E[w^alpha v^eps exp(-s w - t v)] M(s, t)^(K-1),
    E[sum_i ...] = int int s^alpha t^eps Phi(s, t) da db / (Gamma(alpha) Gamma(eps)).

As eps tends to 0 the mass of the inner integral moves to t = 0. With exp(-c t) Phi(s, 0) taken off, whose integral is
known, what is left is regular for -1 < eps < 1 and any rate c > 0, which may depend on s:

    alpha D = int s E[w g(s) exp(-s w)] K M(s, 0)^(K-1) da
              - sinc(pi eps) int int s^alpha t^eps (Phi(s, t) - exp(-c t) Phi(s, 0)) da db,
    g = (1 - exp(-eps x)) / eps (x at eps = 0), x = log(s c w / v) + log Gamma(1 - eps) / eps.

alpha < 1/2 is alpha > 1/2 with w and v exchanged. Both integrands are analytic for |Im a|, |Im b| < pi/2 and M^K is
bounded there, so the trapezoidal rule errs by exp(-pi^2/step): a step of 1/4 is at the limit of float64.
"""

import math

import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

STEP = 0.25
# Nodes up to this use a series in w in place of exponentials, exact to float64 after so many terms since w <= 1.
SERIES_RANGE = 0.5
N_TERMS = 17
# Logs of what the integrand is down to, relative, at the first node and of M^(K-1) at the last.
FIRST, LAST = -40.0, -60.0
ALPHA_RANGE = (-0.5, 1.5)
# Beyond [0, 1] the divergence is a difference of what grows as exp(distance to [0, 1] * spread): at most so much.
MOST_GROWTH = 30.0


def expected_alpha_divergence(
    log_w: Float[Tensor, "*X N"],
    log_v: Float[Tensor, "*X N"],
    log_p: Float[Tensor, "*X N"],
    *,
    k: int,
    alpha: float | int,
) -> Float[Tensor, "*X"]:
    r""":math:`E[D_\alpha(w/\sum_i w_i \,\|\, v/\sum_i v_i)]` over K i.i.d. draws from p.

    :math:`D_\alpha` is that of :func:`exo_toy.divergences.alpha_divergence`. Differentiable twice and more by autograd;
    an array of nodes by completions and a few of nodes by nodes are held for each row.

    Source: :math:`A^{-\alpha} = \int_0^\infty s^{\alpha-1} e^{-sA} ds / \Gamma(\alpha)`, independence, and analytic
    continuation in alpha.

    Args:
        log_w: [..., N], finite where p > 0 (elsewhere anything).
        log_v: [..., N], the same.
        log_p: [..., N] normalised log-probabilities, -inf for zero.
        k: number of draws, at least 1.
        alpha: in [-1/2, 3/2].

    Returns:
        [...] float64, at least 0 up to rounding; 0 at K = 1. Measured against all tuples, errors are about 1e-14 for
        alpha in [0, 1] and for weights spread over 20 nats, and up to 1e-8 relative where the range of alpha ends.

    Raises:
        ValueError: alpha outside its range, or beyond [0, 1] by more than 30 nats over the spread of the weights.

    Example:
        >>> log_w, log_p = torch.tensor([0.0, 1.0]).double(), torch.tensor([0.5, 0.5]).double().log()
        >>> expected_alpha_divergence(log_w, 0 * log_w, log_p, k=2, alpha=0.5)
        tensor(0.0574, dtype=torch.float64)
    """
    low, high = ALPHA_RANGE
    if not low <= alpha <= high:
        raise ValueError(f"alpha must be in [{low}, {high}]; got {alpha!r}")
    if alpha < 0.5:
        log_w, log_v, epsilon = log_v, log_w, float(alpha)
    else:
        epsilon = 1.0 - alpha
    log_w, log_v, log_p = torch.broadcast_tensors(log_w, log_v, log_p)
    spread = max(_spread(log_w, log_p), _spread(log_v, log_p))
    if max(-alpha, alpha - 1) * spread > MOST_GROWTH:
        within = f"within {MOST_GROWTH / spread:.3g} of [0, 1] for weights spread over {spread:.3g} nats"
        raise ValueError(f"alpha must be {within}; got {alpha!r}")
    if k == 1:
        return (0 * log_p.exp()).sum(-1)
    flat = torch.stack([log_w, log_v, log_p]).reshape(3, -1, log_p.shape[-1])
    rows = [_of_row(w, v, p, k, epsilon) for w, v, p in zip(flat[0], flat[1], flat[2], strict=True)]
    return torch.stack(rows).reshape(log_p.shape[:-1])


def _spread(log_w: Tensor, log_p: Tensor) -> float:
    """The widest range of a row, in nats, within the support of p."""
    log_w, outside = log_w.detach(), log_p == -torch.inf
    return (
        (log_w.masked_fill(outside, -torch.inf).amax(-1) - log_w.masked_fill(outside, torch.inf).amin(-1)).max().item()
    )


def _of_row(log_w: Tensor, log_v: Tensor, log_p: Tensor, k: int, epsilon: float) -> Tensor:
    """Of one table [N], alpha = 1 - epsilon at least 1/2."""
    inside = log_p > -torch.inf
    log_w, log_v, p = log_w[inside], log_v[inside], log_p[inside].exp()
    # Constant factors, which the divergence does not see: no gradient goes through them.
    log_w, log_v = log_w - log_w.detach().max(), log_v - log_v.detach().max()
    alpha, gap = 1 - epsilon, log_w - log_v

    a, b = _nodes(log_w, p, k, rate=min(alpha, 1.0)), _nodes(log_v, p, k, rate=2 - alpha)
    kernels_a, series_a = _kernels(log_w, a, minus_one=False)
    kernels_b, series_b = _kernels(log_v, b, minus_one=True)

    # At t = 0: averages of exp(-s w) times 1, v, w, w (1 - (w/v)^-eps) / eps and w^alpha v^eps.
    w, product = log_w.exp(), (log_w - epsilon * gap).exp()
    columns = torch.stack([p, p * log_v.exp(), p * w, p * w * _shifted(gap, epsilon), p * product], -1)
    transform, of_v, of_w, of_gap, of_product = _on_nodes(series_a, kernels_a @ columns).unbind(-1)
    power = _power_at_zero(log_w, p, a, transform, k)
    # Any rate does; that of a typical B among the draws that count at s leaves the least to cancel.
    log_rate = (math.log(k) + (of_v / transform).clamp(min=1e-300).log()).detach()
    x = a + log_rate + _log_gamma_slope(epsilon)
    mean = of_w * _shifted(x, epsilon) + of_gap * torch.exp(-epsilon * x)
    first = STEP * k * (torch.exp(a) * mean * power).sum()

    # How M^(K-1) changes from t = 0 to t, [a, b]; never by subtraction.
    change = _on_grid(series_a, (kernels_a * p) @ kernels_b.mT, series_b)
    growth, growth_minus_one = _powers(change / transform.unsqueeze(-1), k - 1)
    # The average of w^alpha v^eps exp(-s w - t v): at small t its change from t = 0; at large t itself, since there
    # exp(eps b) would enlarge the rounding of a difference.
    rows_b = torch.cat([kernels_b[: series_b.shape[-1]], torch.exp(-_scaled(log_v, b[len(series_b) :]))])
    average = _on_grid(series_a, (kernels_a * p * product) @ rows_b.mT, series_b)
    taken_off, small = -torch.exp(log_rate.unsqueeze(-1) + b), b <= math.log(SERIES_RANGE)
    rest = torch.where(small, growth_minus_one - torch.expm1(taken_off), -torch.exp(taken_off))
    difference = average * growth + of_product.unsqueeze(-1) * rest
    second = STEP**2 * k * (torch.exp(alpha * a) * power) @ difference @ torch.exp(epsilon * b)
    return (first - _sinc(epsilon) * second) / alpha


def _nodes(log_w: Tensor, p: Tensor, k: int, *, rate: float) -> Tensor:
    """Multiples of the step, from where the integrand, falling as exp(rate u) to the left, is 0 to where M^(K-1) is."""
    log_w, p = log_w.detach(), p.detach()
    low, middle = math.floor((FIRST / rate - math.log(k)) / STEP), math.ceil(4 / STEP)
    high = max(middle, math.ceil((5 - log_w.min().item()) / STEP))
    tail = torch.arange(middle, high + 1, dtype=torch.float64, device=log_w.device) * STEP
    log_transform = (p * torch.exp(-_scaled(log_w, tail))).sum(-1).log()
    # M falls: as many more nodes as are not negligible yet, and one.
    last = min(high, middle + int(((k - 1) * log_transform >= LAST).sum()))
    return torch.arange(low, last + 1, dtype=torch.float64, device=log_w.device) * STEP


def _scaled(log_w: Tensor, nodes: Tensor) -> Tensor:
    """t w [m, N]; exp(-t w) is 0 long before the clamp."""
    return torch.exp((nodes.unsqueeze(-1) + log_w).clamp(max=7))


def _kernels(log_w: Tensor, nodes: Tensor, *, minus_one: bool) -> tuple[Tensor, Tensor]:
    """Rows [r, N] and a series [m_small, terms] of which exp(-t w), or that minus one, is made at the nodes.

    The first rows are powers of w, which the series turns into the kernel at the small nodes; the others are the kernel
    itself at each of the large nodes.
    """
    n_small = int((nodes <= math.log(SERIES_RANGE)).sum())
    degrees = torch.arange(int(minus_one), N_TERMS, dtype=torch.float64, device=nodes.device)
    signs = 1 - 2 * (degrees % 2)
    series = signs * torch.exp(nodes[:n_small, None] * degrees - torch.lgamma(degrees + 1))
    minus_x = -_scaled(log_w, nodes[n_small:])
    large = torch.expm1(minus_x) if minus_one else torch.exp(minus_x)
    return torch.cat([torch.exp(degrees.unsqueeze(-1) * log_w), large]), series


def _on_nodes(series: Tensor, rows: Tensor) -> Tensor:
    """What is linear in the rows of :func:`_kernels`, at all nodes."""
    terms = series.shape[-1]
    return torch.cat([series @ rows[:terms], rows[terms:]])


def _on_grid(series_a: Tensor, matrix: Tensor, series_b: Tensor) -> Tensor:
    """The same on both sides, [a, b]."""
    return _on_nodes(series_b, _on_nodes(series_a, matrix).mT).mT


def _power_at_zero(log_w: Tensor, p: Tensor, nodes: Tensor, transform: Tensor, k: int) -> Tensor:
    """M(s, 0)^(K-1), accurate for huge K near M = 1."""
    kernels, series = _kernels(log_w, nodes, minus_one=True)
    return _powers(_on_nodes(series, kernels @ p), k - 1, far=transform)[0]


def _powers(change: Tensor, exponent: int, far: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(1 + change)^exponent and that minus one; ``far`` is 1 + change where it is known better away from 1."""
    near = change > -0.5
    log_power = exponent * torch.log1p(change.where(near, 0.0))
    base = 1 + change if far is None else far
    far_power = base.where(~near, 0.0) ** exponent
    return torch.where(near, torch.exp(log_power), far_power), torch.where(near, torch.expm1(log_power), far_power - 1)


def _shifted(x: Tensor, epsilon: float) -> Tensor:
    """(1 - exp(-eps x)) / eps, x at eps = 0."""
    return x if epsilon == 0 else -torch.expm1(-epsilon * x) / epsilon


def _log_gamma_slope(epsilon: float) -> float:
    """log Gamma(1 - eps) / eps, Euler's constant at 0; by its series where 1 - eps rounds."""
    if abs(epsilon) > 1e-2:
        return math.lgamma(1 - epsilon) / epsilon
    terms = [special.zeta(i) * epsilon ** (i - 1) / i for i in range(2, 10)]
    return -special.digamma(1) + math.fsum(terms)


def _sinc(epsilon: float) -> float:
    """1 / (Gamma(1 - eps) Gamma(1 + eps)) = sin(pi eps) / (pi eps)."""
    return 1.0 if epsilon == 0 else math.sin(math.pi * epsilon) / (math.pi * epsilon)
