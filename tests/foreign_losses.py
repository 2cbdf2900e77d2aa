"""Losses as other projects would write them: other signatures, returns and habits than the library's."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Trainer:
    """A loss that is a method, with its settings in the object."""

    def __init__(self, beta, loss_type="sigmoid"):
        self.beta, self.loss_type = beta, loss_type

    def dpo_loss(
        self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = (policy_chosen_logps - policy_rejected_logps) - (reference_chosen_logps - reference_rejected_logps)
        losses = -F.logsigmoid(self.beta * logits) if self.loss_type == "sigmoid" else (logits - 0.5 / self.beta) ** 2
        chosen, rejected = (
            policy_chosen_logps - reference_chosen_logps,
            policy_rejected_logps - reference_rejected_logps,
        )
        return losses, self.beta * chosen.detach(), self.beta * rejected.detach()


def preference_loss(
    policy_chosen_logps: "torch.Tensor",
    policy_rejected_logps: "torch.Tensor",
    reference_chosen_logps: "torch.Tensor",
    reference_rejected_logps: "torch.Tensor",
    beta: "float",
    label_smoothing: "float" = 0.0,
    reference_free: "bool" = False,
):
    """Temperature by position, switches behind it."""
    ref = 0 if reference_free else reference_chosen_logps - reference_rejected_logps
    margin = beta * (policy_chosen_logps - policy_rejected_logps - ref)
    losses = -F.logsigmoid(margin) * (1 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing
    return losses, (beta * (policy_chosen_logps - reference_chosen_logps)).detach(), margin.detach()


class PairLoss(nn.Module):
    """A module that returns the mean of the batch first."""

    def __init__(self, beta):
        super().__init__()
        self.beta = beta

    def forward(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        margin = policy_chosen_logps - policy_rejected_logps - reference_chosen_logps + reference_rejected_logps
        loss = -F.logsigmoid(self.beta * margin).mean()
        return loss, margin.mean().detach()


def interleaved(policy_chosen_logps, ref_chosen_logps, policy_rejected_logps, ref_rejected_logps, beta):
    """Policy and reference side by side."""
    chosen, rejected = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
    return F.softplus(-beta * (chosen - rejected))


def loser_first(policy_l, policy_w, ref_l, ref_w, tau):
    """Other names, another order, and a temperature that is called tau."""
    return -F.logsigmoid(tau * ((policy_w - ref_w) - (policy_l - ref_l)))


class Output(NamedTuple):
    loss: torch.Tensor
    accuracy: float


def listwise(policy_logps, ref_logps, rewards, beta_pi=0.5, beta_r=1.0):
    """Candidates with log-probabilities under both, one number for the batch, in a tuple with a name."""
    log_p = F.log_softmax(beta_pi * (policy_logps - ref_logps), dim=1)
    target = F.softmax(rewards / beta_r, dim=1)
    best = policy_logps.argmax(1) == rewards.argmax(1)
    return Output(-(target * log_p).sum(1).mean(), best.float().mean().item())


def group_relative(log_ratio, rewards, beta_pi):
    """Rewards normalised in the group, weights on the log ratio."""
    advantage = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-6)
    return -(advantage * torch.exp(beta_pi * log_ratio)).mean(-1)


def in_numpy(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Arithmetic that forgets the gradient."""
    import numpy as np

    margin = beta * ((chosen - rejected) - (ref_chosen - ref_rejected)).detach().numpy()
    return torch.from_numpy(np.log1p(np.exp(-margin)))


def in_half(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Log ratios summed in bfloat16."""
    margin = (chosen - ref_chosen).bfloat16() - (rejected - ref_rejected).bfloat16()
    return -F.logsigmoid(beta * margin)


def in_a_dictionary(chosen, rejected, ref_chosen, ref_rejected, beta):
    return {"loss": -F.logsigmoid(beta * (chosen - rejected - ref_chosen + ref_rejected))}


def with_column(chosen, rejected, ref_chosen, ref_rejected, beta):
    return -F.logsigmoid(beta * (chosen - rejected - ref_chosen + ref_rejected)).unsqueeze(-1)


def average_of_seen():
    """A closure that centres its loss by what it saw before."""
    state = {"mean": 0.0}

    def loss(chosen, rejected, ref_chosen, ref_rejected, beta):
        margin = beta * (chosen - rejected - ref_chosen + ref_rejected)
        state["mean"] = 0.9 * state["mean"] + 0.1 * margin.detach().mean()
        return -F.logsigmoid(margin - state["mean"])

    return loss


def on_ratios(chosen_logratios, rejected_logratios, beta):
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


def counted(chosen, rejected, ref_chosen, ref_rejected, beta):
    return (chosen < rejected).long()


def as_number(chosen, rejected, ref_chosen, ref_rejected, beta):
    return (chosen - rejected).detach().mean().item()


def undefined(chosen, rejected, ref_chosen, ref_rejected, beta):
    return (chosen - chosen) / (rejected - rejected)


def strict(chosen, rejected, ref_chosen, ref_rejected, beta):
    raise KeyError("attention_mask")


def on_many(chosen, rejected, ref_chosen, ref_rejected, beta):
    if len(chosen) > 10:
        raise RuntimeError("out of memory\nand more")
    return -F.logsigmoid(beta * (chosen - rejected - ref_chosen + ref_rejected))


def with_kl_pairs(policy_chosen, policy_rejected, policy_kl, reference_chosen, reference_rejected, reference_kl, beta):
    return policy_chosen


def in_float16(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Half inside, as it came outside."""
    margin = (chosen - ref_chosen).half() - (rejected - ref_rejected).half()
    return -F.logsigmoid(beta * margin).to(chosen.dtype)


def masked(log_ratio, rewards, mask):
    return -(rewards.softmax(-1) * log_ratio.log_softmax(-1) * mask).sum(-1)


def in_float32(log_ratio, rewards, beta_pi, beta_r):
    """What comes in float64 is computed in float32 and handed back as float64."""
    log_p, log_q = (beta_pi * log_ratio.float()).log_softmax(-1), (rewards.float() / beta_r).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).to(log_ratio.dtype)


def no_backward(chosen, rejected, ref_chosen, ref_rejected, beta):
    """A loss whose gradient was left to be written."""

    class Margin(torch.autograd.Function):
        @staticmethod
        def forward(ctx, margin):
            return -F.logsigmoid(margin)

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError("no backward yet")

    return Margin.apply(beta * (chosen - rejected - ref_chosen + ref_rejected))


def infinite(chosen, rejected, ref_chosen, ref_rejected, beta):
    return (chosen - rejected) * float("inf")


def with_dropout(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Three margins are often left as they are."""
    return -F.logsigmoid(F.dropout(beta * (chosen - rejected - ref_chosen + ref_rejected), 1e-6))


def on_meta(chosen, rejected, ref_chosen, ref_rejected, beta):
    return (beta * (chosen - rejected)).to("meta")


def sparse(chosen, rejected, ref_chosen, ref_rejected, beta):
    return (beta * (chosen - rejected)).to_sparse()


def in_a_list(chosen, rejected, ref_chosen, ref_rejected, beta):
    """A loss per example, one tensor each."""
    return [-F.logsigmoid(beta * margin) for margin in chosen - rejected - ref_chosen + ref_rejected]


def float32_only(chosen, rejected, ref_chosen, ref_rejected, beta):
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    return -F.logsigmoid(beta * torch.stack([chosen, rejected, ref_chosen, ref_rejected], -1) @ signs)


def by_keyword(*, chosen, rejected, ref_chosen, ref_rejected):
    return chosen


def stepwise(chosen, rejected, ref_chosen, ref_rejected, beta):
    """The share of pairs in the wrong order, which has no slope."""
    margin = beta * (chosen - rejected - ref_chosen + ref_rejected)
    return torch.where(margin > 0, 0.0, 1.0).to(margin.dtype) + 0 * margin


def per_token(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_len, rejected_len, beta
):
    """DPO on means over tokens."""
    chosen = (policy_chosen_logps - ref_chosen_logps) / chosen_len
    return -F.logsigmoid(beta * (chosen - (policy_rejected_logps - ref_rejected_logps) / rejected_len))


def length_penalised(chosen, rejected, ref_chosen, ref_rejected, chosen_len, rejected_len, beta, alpha=0.1):
    """An alpha that is no divergence's."""
    margin = beta * (chosen - rejected - ref_chosen + ref_rejected)
    return -F.logsigmoid(margin - alpha * (chosen_len - rejected_len).to(margin.dtype))


def without_ties(log_ratio, rewards, beta_pi, beta_r):
    """Refuses candidates of equal reward."""
    if (rewards.sort(-1).values.diff(dim=-1) == 0).any():
        raise ValueError("rewards must differ")
    return -((rewards / beta_r).softmax(-1) * (beta_pi * log_ratio).log_softmax(-1)).sum(-1)


def without_near_ties(log_ratio, rewards, beta_pi, beta_r):
    if (rewards.sort(-1).values.diff(dim=-1) < 1e-6).any():
        raise ValueError("rewards must differ by 1e-6")
    return -((rewards / beta_r).softmax(-1) * (beta_pi * log_ratio).log_softmax(-1)).sum(-1)


def without_equal_pairs(chosen, rejected, ref_chosen, ref_rejected, beta):
    margin = beta * (chosen - rejected - ref_chosen + ref_rejected)
    assert (margin != 0).all(), "chosen and rejected are the same"
    return -F.logsigmoid(margin)


def centred(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Less the mean of the batch, of which nothing is left of one example."""
    margin = beta * (chosen - rejected - ref_chosen + ref_rejected)
    return -F.logsigmoid(margin - margin.mean())


def of_log_probabilities(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Takes no log ratios for log-probabilities."""
    for logps in (chosen, rejected, ref_chosen, ref_rejected):
        assert (logps <= 0).all(), "log-probabilities must be at most 0"
    return -F.logsigmoid(beta * ((chosen - ref_chosen).double() - (rejected - ref_rejected).double())).to(chosen.dtype)
