"""What a theorem returns, and the gradient with respect to a policy's parameters."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from exo_toy.policies import Policy


@dataclass(frozen=True)
class Theorem:
    """Both sides of a theorem on one problem, of equal shape, and its assumptions in words."""

    left: Tensor
    right: Tensor
    assumptions: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.left.shape != self.right.shape:
            raise ValueError(
                f"right must have the shape of left, {list(self.left.shape)}; got {list(self.right.shape)}"
            )

    @property
    def error(self) -> float:
        """Largest difference of the sides, relative to the largest entry of either (absolute where both are 0)."""
        scale = max(self.left.abs().max().item(), self.right.abs().max().item())
        # Equal infinities agree; their difference would be NaN.
        difference = torch.where(self.left == self.right, 0.0, self.left - self.right)
        return difference.abs().max().item() / (scale or 1.0)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the sides."""
        return torch.cosine_similarity(self.left.flatten(), self.right.flatten(), dim=0, eps=0.0).item()


def parameter_gradient(value: Float[Tensor, ""], policy: Policy) -> Float[Tensor, " P"]:
    """Gradient of a scalar with respect to all trainable parameters of a policy, flattened and concatenated.

    Args:
        value: a scalar computed from ``policy.log_probs()``.
        policy: the policy; its ``.grad`` fields are left alone.

    Returns:
        [P] in the order of ``policy.parameters()``.

    Example:
        >>> from exo_toy.policies import TabularPolicy
        >>> from exo_toy.spaces import SequenceSpace
        >>> policy = TabularPolicy(SequenceSpace(2, 1))
        >>> parameter_gradient(policy.log_probs()[0, 0], policy)
        tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])
