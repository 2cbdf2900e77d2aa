"""EXO and DPO on pairs as modules that torchtune's preference recipes can be given; torchtune itself is not needed.

In a recipe's config, in the place of its own loss:

.. code-block:: yaml

    loss:
      _component_: exo_toy.integrations.torchtune.ExoPrefLoss
      beta: 0.1
      label_smoothing: 1.0e-3
"""

from jaxtyping import Float
from torch import Tensor, nn

from exo_toy import checks
from exo_toy.losses import PreferenceLoss, dpo_loss, exo_pref_loss


class ExoPrefLoss(nn.Module):
    """EXO from preferences, :func:`~exo_toy.losses.exo_pref_loss`, with the call of torchtune's losses.

    Args:
        beta: above 0; multiplies the log ratios.
        label_smoothing: probability that a label is wrong, in (0, 1/2).

    Raises:
        ValueError: a number out of range.

    Example:
        >>> import torch
        >>> zeros = torch.zeros(2)
        >>> losses, chosen_rewards, rejected_rewards = ExoPrefLoss(beta=0.1)(zeros, zeros, zeros, zeros)
        >>> losses.shape
        torch.Size([2])
    """

    def __init__(self, *, beta: float | int, label_smoothing: float = 1e-3) -> None:
        super().__init__()
        checks.require_positive(beta=beta)
        checks.require_real("label_smoothing", label_smoothing, allowed="in (0, 1/2)", low=0.0, high=0.5)
        self.beta, self.label_smoothing = beta, label_smoothing

    def forward(
        self,
        policy_chosen_logps: Float[Tensor, " B"],
        policy_rejected_logps: Float[Tensor, " B"],
        reference_chosen_logps: Float[Tensor, " B"],
        reference_rejected_logps: Float[Tensor, " B"],
    ) -> PreferenceLoss:
        """The loss of each pair.

        Args:
            policy_chosen_logps: [B] log-probability of the chosen completion under the policy, summed over its tokens.
            policy_rejected_logps: [B] the same of the rejected one.
            reference_chosen_logps: [B] under the reference.
            reference_rejected_logps: [B] under the reference.

        Returns:
            (losses, chosen_rewards, rejected_rewards), [B] each; the rewards detached.
        """
        return exo_pref_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )


class DPOLoss(nn.Module):
    """DPO, :func:`~exo_toy.losses.dpo_loss`, with the call of torchtune's losses.

    Args:
        beta: above 0; multiplies the log ratios.
        label_smoothing: probability that a label is wrong, in [0, 1/2).

    Raises:
        ValueError: a number out of range.

    Example:
        >>> import torch
        >>> zeros = torch.zeros(1)
        >>> DPOLoss(beta=0.1)(zeros, zeros, zeros, zeros).losses
        tensor([0.6931])
    """

    def __init__(self, *, beta: float | int, label_smoothing: float | int = 0.0) -> None:
        super().__init__()
        checks.require_positive(beta=beta)
        allowed = "in [0, 1/2)"
        checks.require_real("label_smoothing", label_smoothing, allowed=allowed, low=0.0, high=0.5, low_allowed=True)
        self.beta, self.label_smoothing = beta, label_smoothing

    def forward(
        self,
        policy_chosen_logps: Float[Tensor, " B"],
        policy_rejected_logps: Float[Tensor, " B"],
        reference_chosen_logps: Float[Tensor, " B"],
        reference_rejected_logps: Float[Tensor, " B"],
    ) -> PreferenceLoss:
        """The loss of each pair; arguments and result as of :meth:`ExoPrefLoss.forward`."""
        return dpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
