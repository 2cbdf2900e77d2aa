"""Expectations over K independent draws by quadrature of a Laplace transform: exact at any K, nothing sampled.

For i.i.d. draws y_1..y_K with probabilities p, weights w(y) > 0, S = w(y_1) + ... + w(y_K) and M(t) = E[exp(-t w)],

    E[log S]              = int_0^inf (exp(-t) - M(t)^K) dt / t
    E[sum_i w_i g_i / S]  = K int_0^inf E[w g exp(-t w)] M(t)^(K-1) dt

because 1/S = int exp(-tS) dt and log S = int (exp(-t) - exp(-tS)) dt/t. With max w = 1 and t = exp(u) both integrands
are analytic for |Im u| < pi/2 and M^K is bounded there for every K, so the trapezoidal rule on u errs by
exp(-pi^2/step): a step of 1/4 is at the limit of float64.

Everything is made of the kernels phi_0(x) = expm1(-x) and phi_j(x) = x^j exp(-x), x = t w. The derivative of phi_j
with respect to log w is j phi_j - phi_{j+1}, so sums of kernels, their adjoint and all derivatives are sums of kernels.
No [nodes, N] array is ever held: forward and backward go through tiles.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

STEP = 0.25
TILE = 2**17  # kernels of a tile: 1 MiB, about a core's cache
NODE_CHUNK = 256
# Nodes with t <= MOMENT_RANGE use N_MOMENTS moments of w in place of exponentials: the series of exp(-x) at x <= 1/2
# is exact to float64 after 16 terms, also for x^3 exp(-x), and w <= 1 makes that relative to each sum.
MOMENT_RANGE = 0.5
N_MOMENTS = 16
# Log of what is left of M^(K-1) at the last node; the ratio's integrand, K (1 - M) M^(K-1) at most, is no larger.
NEGLIGIBLE = -60.0


def expected_log_sum(log_w: Float[Tensor, "*X N"], log_p: Float[Tensor, "*X N"], *, k: int) -> Float[Tensor, "*X"]:
    r""":math:`E[\log \sum_{i \le K} w(y_i)]` over K i.i.d. draws from p.

    Source: :math:`\log S = \int_0^\infty (e^{-t} - e^{-tS}) \, dt/t` (Frullani) and independence.

    Args:
        log_w: [..., N], finite where p > 0 (elsewhere anything).
        log_p: [..., N] normalised log-probabilities, -inf for zero.
        k: number of draws, at least 1.

    Returns:
        [...] float64.

    Example:
        >>> zero = torch.zeros(1, dtype=torch.float64)
        >>> round(expected_log_sum(zero, zero, k=8).exp().item(), 12)
        8.0
    """
    log_w, log_p, shift = _normalise(log_w, log_p)
    p = log_p.exp()
    nodes = _nodes(log_w, p, k)
    deviation = _kernel_sums(log_w, p.unsqueeze(-1), nodes, (0,))[..., 0]
    return shift + _integrate_log_sum(deviation, nodes, k)


def expected_log_sum_and_ratio(
    log_w: Float[Tensor, "*X N"], g: Float[Tensor, "*X N"], log_p: Float[Tensor, "*X N"], *, k: int
) -> tuple[Float[Tensor, "*X"], Float[Tensor, "*X"]]:
    r""":math:`E[\log S]` and :math:`E[\sum_i w_i g_i / S]`, :math:`S = \sum_{i \le K} w(y_i)`, in one pass.

    Source: :math:`1/S = \int_0^\infty e^{-tS} dt` and independence.

    Args:
        log_w: [..., N], finite where p > 0 (elsewhere anything).
        g: [..., N], finite where p > 0 (elsewhere anything).
        log_p: [..., N] normalised log-probabilities, -inf for zero.
        k: number of draws, at least 1.

    Returns:
        ([...], [...]) float64.

    Example:
        >>> zero = torch.zeros(2, dtype=torch.float64)
        >>> _, ratio = expected_log_sum_and_ratio(zero, torch.tensor([1.0, 3.0]).double(), zero - math.log(2), k=5)
        >>> round(ratio.item(), 12)
        2.0
    """
    g = g.masked_fill(log_p == -torch.inf, 0.0)
    log_w, log_p, shift = _normalise(log_w, log_p)
    p = log_p.exp()
    nodes = _nodes(log_w, p, k)
    sums = _kernel_sums(log_w, torch.stack([p, p * g], -1), nodes, (0, 1))
    deviation, weighted = sums[..., 0], sums[..., 1]
    log_sum = shift + _integrate_log_sum(deviation, nodes, k)
    ratio = k * STEP * (weighted * _power_of_transform(deviation, k - 1)).sum(-1)
    return log_sum, ratio


def _normalise(log_w: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log_w with maximum 0 over the support of p and 0 outside it; the shift taken off."""
    outside = log_p == -torch.inf
    log_w, log_p, outside = torch.broadcast_tensors(log_w, log_p, outside)
    # A constant shift: the result does not depend on it, so no gradient goes through it.
    shift = log_w.detach().masked_fill(outside, -torch.inf).amax(-1)
    return (log_w - shift.unsqueeze(-1)).masked_fill(outside, 0.0), log_p, shift


def _nodes(log_w: Tensor, p: Tensor, k: int) -> Tensor:
    """Nodes u, exact multiples of the step, from where M^K is 1 to where it and exp(-t) are 0, for all rows."""
    log_w, p = log_w.detach(), p.detach()
    low = math.floor((-math.log(k) - 45) / STEP)
    # By bisection: M falls in u, from 1 to 0 at the latest where the smallest weight's exponential has.
    first, last = math.ceil(4 / STEP), math.ceil((5 - log_w.min().item()) / STEP)
    while first < last and k > 1:
        middle = (first + last) // 2
        log_transform = (p * torch.exp(-torch.exp((middle * STEP + log_w).clamp(max=7)))).sum(-1).log()
        if ((k - 1) * log_transform < NEGLIGIBLE).all():
            last = middle
        else:
            first = middle + 1
    return torch.arange(low, last + 1, dtype=torch.float64, device=log_w.device) * STEP


def _integrate_log_sum(deviation: Tensor, nodes: Tensor, k: int) -> Tensor:
    """Trapezoidal sum of exp(-t) - M^K over the nodes, from M - 1 [..., m]."""
    t = nodes.exp()
    near = deviation > -0.5
    # 1 - M^K without cancellation where M is near 1; a plain difference where both terms are far from 1.
    log_transform = torch.log1p(deviation.where(near, 0.0))
    small = torch.expm1(-t) - torch.expm1(k * log_transform)
    large = torch.exp(-t) - (1 + deviation.where(~near, 0.0)) ** k
    return STEP * torch.where(near, small, large).sum(-1)


def _power_of_transform(deviation: Tensor, exponent: int) -> Tensor:
    """M^exponent from M - 1, accurate for huge exponents near M = 1 and differentiable at M = 0."""
    near = deviation > -0.5
    power_near = torch.exp(exponent * torch.log1p(deviation.where(near, 0.0)))
    power_far = (1 + deviation.where(~near, 0.0)) ** exponent
    return torch.where(near, power_near, power_far)


def _kernel_sums(log_w: Tensor, a: Tensor, nodes: Tensor, orders: tuple[int, ...]) -> Tensor:
    """sum_n a[..., n, r] phi_{orders[r]}(exp(u_m) w_n) -> [..., m, r]; differentiable any number of times."""
    leading, n, r = log_w.shape[:-1], log_w.shape[-1], a.shape[-1]
    sums = _KernelSums.apply(log_w.reshape(-1, n), a.reshape(-1, n, r), nodes, orders)
    return sums.reshape(*leading, len(nodes), r)


class _KernelSums(torch.autograd.Function):
    """log_w [X, N], a [X, N, R] -> [X, m, R]: sum over n of a times kernels."""

    @staticmethod
    def forward(ctx: Any, log_w: Tensor, a: Tensor, nodes: Tensor, orders: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(log_w, a, nodes)
        ctx.orders = orders
        return _tiled_sums(log_w, a, nodes, orders)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        log_w, a, nodes = ctx.saved_tensors
        grad_log_w, grad_a = _derivatives(log_w, a, grad, nodes, ctx.orders)
        return grad_log_w, grad_a, None, None


class _KernelAdjoint(torch.autograd.Function):
    """log_w [X, N], c [X, m, R] -> [X, N, R]: sum over nodes of c times kernels."""

    @staticmethod
    def forward(ctx: Any, log_w: Tensor, c: Tensor, nodes: Tensor, orders: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(log_w, c, nodes)
        ctx.orders = orders
        return _tiled_adjoint(log_w, c, nodes, orders)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        log_w, c, nodes = ctx.saved_tensors
        grad_log_w, _ = _derivatives(log_w, grad, c, nodes, ctx.orders)
        return grad_log_w, _KernelSums.apply(log_w, grad, nodes, ctx.orders), None, None


def _derivatives(log_w: Tensor, a: Tensor, c: Tensor, nodes: Tensor, orders: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Derivatives of sum_{n,m,r} a[n,r] c[m,r] phi_r(x_nm) with respect to log_w and a."""
    r = len(orders)
    higher = tuple(order + 1 for order in orders)
    adjoint = _KernelAdjoint.apply(log_w, torch.cat([c, c], -1), nodes, orders + higher)
    same, next_order = adjoint[..., :r], adjoint[..., r:]
    scale = torch.tensor(orders, dtype=a.dtype, device=a.device)
    return (a * (scale * same - next_order)).sum(-1), same


def _tiled_sums(log_w: Tensor, a: Tensor, nodes: Tensor, orders: tuple[int, ...]) -> Tensor:
    """Forward of _KernelSums."""
    small = _small_nodes(nodes)
    out = a.new_zeros(len(a), len(nodes), len(orders))
    coefficients = _series_coefficients(small, orders)
    for rows, columns in _tiles(log_w, N_MOMENTS):
        moments = _powers(log_w[rows, columns]) @ a[rows, columns]
        out[rows, : len(small)] += torch.einsum("rmi,xir->xmr", coefficients, moments)
    for first in range(len(small), len(nodes), NODE_CHUNK):
        chunk = slice(first, first + NODE_CHUNK)
        for rows, columns in _tiles(log_w, len(nodes[chunk])):
            for kernel, channels in _kernels(log_w[rows, columns], nodes[chunk], orders):
                out[rows, chunk, channels] += kernel @ a[rows, columns, channels]
    return out * _signs(orders, out)


def _tiled_adjoint(log_w: Tensor, c: Tensor, nodes: Tensor, orders: tuple[int, ...]) -> Tensor:
    """Forward of _KernelAdjoint."""
    small = _small_nodes(nodes)
    c = c * _signs(orders, c)
    out = c.new_zeros(*log_w.shape, len(orders))
    coefficients = _series_coefficients(small, orders)
    series = torch.einsum("rmi,xmr->xir", coefficients, c[:, : len(small)])
    for rows, columns in _tiles(log_w, N_MOMENTS):
        out[rows, columns] = _powers(log_w[rows, columns]).mT @ series[rows]
    for first in range(len(small), len(nodes), NODE_CHUNK):
        chunk = slice(first, first + NODE_CHUNK)
        for rows, columns in _tiles(log_w, len(nodes[chunk])):
            for kernel, channels in _kernels(log_w[rows, columns], nodes[chunk], orders):
                out[rows, columns, channels] += kernel.mT @ c[rows, chunk, channels]
    return out


def _signs(orders: tuple[int, ...], like: Tensor) -> Tensor:
    """[R]: (-1)^order, by which the kernels of :func:`_kernels` and the series differ from phi."""
    return torch.tensor([(-1.0) ** order for order in orders], dtype=like.dtype, device=like.device)


def _small_nodes(nodes: Tensor) -> Tensor:
    """The first nodes, served by moments."""
    return nodes[: int((nodes <= math.log(MOMENT_RANGE)).sum())]


def _series_coefficients(nodes: Tensor, orders: tuple[int, ...]) -> Tensor:
    """[R, m, N_MOMENTS]: (-1)^j phi_j(t w) = sum_i c[m, i-1] w^i."""
    powers = torch.arange(1, N_MOMENTS + 1, dtype=torch.float64, device=nodes.device)
    scaled = torch.exp(nodes.unsqueeze(-1) * powers)
    rows = []
    for order in orders:
        series = [(-1.0) ** i / math.factorial(i - order) if i >= order else 0.0 for i in range(1, N_MOMENTS + 1)]
        rows.append(scaled * torch.tensor(series, dtype=torch.float64, device=nodes.device))
    return torch.stack(rows)


def _powers(log_w: Tensor) -> Tensor:
    """[X, N] -> [X, N_MOMENTS, N]: w, w^2, ..."""
    w = log_w.exp()
    out = w.new_empty(len(w), N_MOMENTS, w.shape[-1])
    out[:, 0] = w
    for i in range(1, N_MOMENTS):
        torch.mul(out[:, i - 1], w, out=out[:, i])
    return out


def _kernels(log_w: Tensor, nodes: Tensor, orders: tuple[int, ...]) -> Iterator[tuple[Tensor, slice | list[int]]]:
    """Yield (-1)^j phi_j [X, m, N] for each order j, and where it stands in ``orders``; one array for all of them."""
    # Products of t and w would overflow on wide spreads, sums of logarithms do not; beyond exp(7) every kernel is zero,
    # and the clamp keeps the powers of x finite.
    if nodes[-1] * max(1, *orders) < 600:
        minus_x = -nodes.exp().unsqueeze(-1) * log_w.exp().unsqueeze(-2)
    else:
        minus_x = (nodes.unsqueeze(-1) + log_w.unsqueeze(-2)).clamp_(max=7).exp_().neg_()
    kernel = torch.expm1(minus_x)
    for order in range(max(orders) + 1):
        if order == 1:
            torch.addcmul(minus_x, minus_x, kernel, out=kernel)  # -x exp(-x) from expm1(-x)
        elif order > 1:
            kernel *= minus_x
        channels = [i for i, wanted in enumerate(orders) if wanted == order]
        if channels:
            together = channels[-1] - channels[0] + 1 == len(channels)
            yield kernel, slice(channels[0], channels[-1] + 1) if together else channels


def _tiles(log_w: Tensor, nodes_per_tile: int) -> Iterator[tuple[slice, slice]]:
    """Slices (rows, columns) of [X, N] such that a tile holds about TILE kernels."""
    n_rows, n = log_w.shape
    width = max(1, min(n, TILE // nodes_per_tile))
    height = max(1, TILE // (nodes_per_tile * width))
    for row in range(0, n_rows, height):
        for column in range(0, n, width):
            yield slice(row, row + height), slice(column, column + width)
