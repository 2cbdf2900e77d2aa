"""Log-probabilities of labels from hidden states: the arguments of ``linear_logps``, and who computes it."""

import os
from typing import Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from exo_toy import checks
from exo_toy.kernels import reference, tiled, tiles

Backend = Literal["reference", "tiled", "triton"]


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | int | None = None,
    temperature: float | int = 1.0,
    ignore_index: int = -100,
    return_entropy: Literal[False] = False,
    save_budget: int = 0,
    backend: Backend | None = None,
    group: ProcessGroup | None = None,
) -> Tensor: ...
@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | int | None = None,
    temperature: float | int = 1.0,
    ignore_index: int = -100,
    return_entropy: Literal[True],
    save_budget: int = 0,
    backend: Backend | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]: ...
def linear_logps(
    hidden: Float[Tensor, "*tokens d"],
    weight: Float[Tensor, "V d"],
    labels: Int[Tensor, "*tokens"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | int | None = None,
    temperature: float | int = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    save_budget: int = 0,
    backend: Backend | None = None,
    group: ProcessGroup | None = None,
) -> Float[Tensor, "*tokens"] | tuple[Float[Tensor, "*tokens"], Float[Tensor, "*tokens"]]:
    r"""Log-probabilities of labels from hidden states, without the logits [n, V] ever existing.

    .. math::
        \log p(y_i \mid h_i) = z_{i y_i} - \log \sum_v e^{z_{iv}}, \quad
        z = \mathrm{cap}(H W^\top + b) / \tau, \quad \mathrm{cap}(x) = c \tanh(x / c)

    Differentiable in hidden, weight and bias; nothing is filtered or approximated, and nothing computed for an input
    that needs no gradient. With mm for a matrix product of n·d·V, forward and backward take

    * 2 mm where neither weight nor bias requires a gradient (a frozen head: LoRA, for example), since then
      :math:`\partial \log p / \partial h = J_y W_y - E_p[J W]` accumulates in the forward;
    * 3 mm where ``save_budget`` has room for all probabilities, in between where it has room for some;
    * 4 mm otherwise, the probabilities being computed again, in memory that does not grow with V;
    * 1 mm without a gradient, as for a reference policy under ``torch.no_grad()``.

    Half-precision inputs: products in the input dtype, sums in float32 (float64 inputs stay in float64). Ignored rows
    are dropped before the first product; counting the others is the one host synchronisation of a pass. The results
    are deterministic, and a row's result does not depend on how many others follow it (for this, rows are padded to a
    multiple of 64 on a CPU, of 2048 on CUDA); where d is no multiple of 16, its place may change the last bits. Second
    and higher derivatives come from the reference implementation, at its cost.

    Source: the streaming log-sum-exp of Milakov and Gimelshein, arXiv:1805.02867; gradients by differentiating it.

    Args:
        hidden: [..., d], floating point, of any strides.
        weight: [V, d] of hidden's dtype, the output head. Under autocast both are cast as by ``F.linear``.
        labels: [...] integers in [0, V), or ``ignore_index``.
        bias: [V] of hidden's dtype; without a soft-cap -inf forbids a token (all of them: NaN).
        softcap: c, above 0; None for none.
        temperature: τ, above 0; divides the logits, after the cap.
        ignore_index: label of the rows that do not count, whatever they hold.
        return_entropy: also return the entropy :math:`-\sum_v p_v \log p_v` of each row, differentiable. A frozen
            head then takes 3 mm, and ``save_budget`` is not used.
        save_budget: bytes of probabilities to keep from the forward for the backward.
        backend: "reference" (plain torch, holds the logits; any order of derivative and every ``torch.func``
            transform), "tiled" (any device), "triton" (CUDA). By default Triton on CUDA where it is installed, the
            reference inside ``torch.func`` transforms and for dual numbers of forward-mode differentiation (but not
            where those meet ``torch.compile``: ask for the reference there), otherwise tiled.
        group: process group over which the vocabulary is sharded. Each rank passes the same hidden and labels, its
            own rows of weight and bias (at least one, in rank order), and gets the full results and the full gradient
            of hidden. Arguments must be valid on all ranks: one that refuses its own leaves the others waiting. In a
            group of more than two, sums over the ranks may differ in their last bits with the place of a row.

    Returns:
        [...] in [-inf, 0] up to rounding, float32 (float64 for float64 inputs); 0 at ignored labels. With
        ``return_entropy`` a pair (log-probabilities, entropies); the entropies are in [0, log V], 0 at ignored labels.

    Raises:
        ValueError: a wrong shape, dtype, device, number or backend; a label outside its range.
        RuntimeError: Triton asked for where it cannot run.

    Example:
        >>> hidden, weight = torch.zeros(2, 3), torch.zeros(4, 3)
        >>> linear_logps(hidden, weight, torch.tensor([1, -100])).exp()
        tensor([0.2500, 1.0000])
    """
    _check(hidden, weight, labels, bias, softcap, temperature, ignore_index, save_budget)
    chosen = _choose(backend, group, hidden, weight, labels, bias)
    hidden, weight = _autocast(hidden), _autocast(weight)
    bias = None if bias is None else _autocast(bias)
    if not hidden.dtype == weight.dtype == (weight if bias is None else bias).dtype:
        others = f"weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise ValueError(f"hidden, weight and bias must have one dtype; got hidden {hidden.dtype}, {others}")

    rows = hidden.reshape(labels.numel(), hidden.shape[-1])
    flat_labels = labels.reshape(-1).long()
    softcap = None if softcap is None else float(softcap)
    if chosen == "reference":
        outside = checks.labels_outside(flat_labels, len(weight), ignore_index)
        checks.require_values(
            [hidden, flat_labels],
            (outside, lambda: checks.labels_message(flat_labels, outside, len(weight), ignore_index)),
        )
        logps, entropies = reference.linear_logps(
            rows, weight, flat_labels, bias, softcap, float(temperature), ignore_index
        )
    else:
        head_learns = weight.requires_grad or (bias is not None and bias.requires_grad)
        learns = torch.is_grad_enabled() and (hidden.requires_grad or head_learns)
        logps, entropies, *_ = tiled.forward(
            rows,
            weight,
            flat_labels,
            bias,
            softcap,
            float(temperature),
            ignore_index,
            return_entropy,
            learns and not head_learns,
            save_budget if learns and head_learns and not return_entropy else 0,
            list(tiles.tile_for(hidden.device)),
            "triton" if chosen == "triton" else "torch",
            None if group is None else group.group_name,
        )
    if return_entropy:
        return logps.view(labels.shape).clone(), entropies.view(labels.shape).clone()
    # A copy, which the caller may change: the backward needs what it is a copy of.
    return logps.view(labels.shape).clone()


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    save_budget: int,
) -> None:
    """Shapes, dtypes, devices and numbers; labels' values are looked at where the rows are counted."""
    checks.require_floating(hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}))
    checks.require_labels(labels)
    for name, tensor in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        if hasattr(tensor, "full_tensor"):  # importing DTensor to ask takes half a second
            raise ValueError(
                f"{name} must be a plain tensor; got a DTensor: pass its full_tensor(), or its to_local() with group"
            )
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape [V, d] with V at least 1; got {list(weight.shape)}")
    if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape [..., d] with weight's d, {weight.shape[1]}; got {list(hidden.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have hidden's leading shape {list(hidden.shape[:-1])}; got {list(labels.shape)} "
            "(nothing is broadcast)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [V] with weight's V, {weight.shape[0]}; got {list(bias.shape)}")
    for name, tensor in {"weight": weight, "labels": labels, "bias": bias}.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}; got {tensor.device}")
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    checks.require_temperature(dtype, temperature=temperature)
    if softcap is not None:
        checks.require_temperature(dtype, softcap=softcap)
    checks.require_integer("ignore_index", ignore_index, at_least=-(2**63), bits=64)
    checks.require_integer("save_budget", save_budget, at_least=0, bits=64)


def _choose(
    backend: str | None, group: ProcessGroup | None, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None
) -> str:
    """Who computes it."""
    if backend not in (None, "reference", "tiled", "triton"):
        raise ValueError(f'backend must be None, "reference", "tiled" or "triton"; got {backend!r}')
    transformed = checks.is_transformed(hidden, weight, labels, bias)
    if transformed and (backend in ("tiled", "triton") or group is not None):
        raise ValueError(
            'inside a torch.func transform backend must be None or "reference", and group None; '
            f"got backend {backend!r}, group {group!r}"
        )
    if backend == "reference" and group is not None:
        raise ValueError('backend must be None, "tiled" or "triton" with a group; got "reference"')
    if backend == "triton" and not (hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise RuntimeError(
            f'backend="triton" needs CUDA tensors (or TRITON_INTERPRET=1, for checks on a CPU); got {hidden.device}'
        )
    if backend == "triton" and not tiles.has_triton():
        raise RuntimeError('backend="triton" needs the package triton, which is not installed')
    if transformed:
        return "reference"
    if backend is None:
        return "triton" if tiles.default_passes(hidden.device) == "triton" else "tiled"
    return backend


def _autocast(x: Tensor) -> Tensor:
    """What autocast does to an argument of a linear layer."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x
    if not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
