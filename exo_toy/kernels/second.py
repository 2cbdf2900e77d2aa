"""Second derivatives of the operators, by differentiating a plain function that computes the same."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from exo_toy.checks import autocast_off


def derivatives(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """∂/∂(grad_outputs, inputs) of Σ cotangents · ∂L/∂inputs, where L = Σ grad_outputs · function(*inputs).

    None stands for an input that is absent, an output without a gradient, a cotangent of zero.
    """
    create_graph = torch.is_grad_enabled()
    device = next(x.device for x in inputs if x is not None)
    with torch.enable_grad(), autocast_off(device):
        # Views: the gradients below stop at them, those of higher order pass through.
        variables = [
            None if x is None else x.view_as(x) if create_graph and x.requires_grad else x.detach().requires_grad_()
            for x in (*grad_outputs, *inputs)
        ]
        outer, inner = variables[: len(grad_outputs)], variables[len(grad_outputs) :]
        outputs = [(y, g) for y, g in zip(function(*inner), outer, strict=True) if g is not None]
        asked = [(x, c) for x, c in zip(inner, cotangents, strict=True) if x is not None and c is not None]
        if not asked:
            return [None] * len(outer), [None] * len(inner)
        first = torch.autograd.grad(
            [y for y, _ in outputs], [x for x, _ in asked], [g.to(y.dtype) for y, g in outputs], create_graph=True
        )
        present = [x for x in variables if x is not None]
        found = iter(
            torch.autograd.grad(first, present, [c for _, c in asked], allow_unused=True, create_graph=create_graph)
        )
    results = [None if x is None else next(found) for x in variables]
    return results[: len(outer)], results[len(outer) :]
