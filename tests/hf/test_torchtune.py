"""Modules for torchtune's recipes: their call, their numbers, what they refuse."""

import subprocess
import sys

import pytest
import torch

from exo_toy import losses
from exo_toy.integrations.torchtune import DPOLoss, ExoPrefLoss
from tests.tolerances import assert_close

PAIRS = [(ExoPrefLoss, losses.exo_pref_loss, 0.05), (DPOLoss, losses.dpo_loss, 0.05), (DPOLoss, losses.dpo_loss, 0.0)]


def logps(seed):
    generator = torch.Generator().manual_seed(seed)
    return [10 * torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize(("module", "function", "label_smoothing"), PAIRS)
def test_a_recipe_s_step_has_the_function_s_losses_and_gradients(module, function, label_smoothing):
    """By position, mean and backward, as torchtune's recipes call their loss."""
    chosen, rejected, *ref = logps(0)
    loss_fn = module(beta=0.3, label_smoothing=label_smoothing)
    assert isinstance(loss_fn, torch.nn.Module) and not list(loss_fn.parameters())
    results = []
    for call in (loss_fn, lambda *given: function(*given, beta=0.3, label_smoothing=label_smoothing)):
        policy = [x.clone().requires_grad_() for x in (chosen, rejected)]
        loss, chosen_rewards, rejected_rewards = call(*policy, *ref)
        loss.mean().backward()
        assert loss.shape == (5,) and not chosen_rewards.requires_grad and not rejected_rewards.requires_grad
        results.append((loss, chosen_rewards, rejected_rewards, *(x.grad for x in policy)))
    for mine, wanted in zip(*results, strict=True):
        assert_close(mine, wanted)
    assert_close(results[0][1], 0.3 * (chosen - ref[0]))
    assert_close(results[0][2], 0.3 * (rejected - ref[1]))


def test_dpo_is_that_of_torchtune():
    """Its formula, spelled out: -(1-eps) logsigmoid(m) - eps logsigmoid(-m)."""
    chosen, rejected, ref_chosen, ref_rejected = logps(1)
    margin = 0.2 * ((chosen - rejected) - (ref_chosen - ref_rejected))
    wanted = 0.9 * torch.log1p(torch.exp(-margin)) + 0.1 * torch.log1p(torch.exp(margin))
    assert_close(DPOLoss(beta=0.2, label_smoothing=0.1)(chosen, rejected, ref_chosen, ref_rejected).losses, wanted)


def test_names_are_those_of_torchtune():
    zeros = torch.zeros(1)
    names = [f"{who}_{which}_logps" for who in ("policy", "reference") for which in ("chosen", "rejected")]
    assert_close(DPOLoss(beta=1.0)(**dict.fromkeys(names, zeros)).losses, [0.6931471805599453])


def test_half_precision_logps_keep_their_dtype():
    given = [x.bfloat16() for x in logps(2)]
    result = ExoPrefLoss(beta=0.1)(*given)
    assert {part.dtype for part in result} == {torch.bfloat16} and result.losses.isfinite().all()


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("module", "given", "message"),
    [
        (ExoPrefLoss, {"beta": 0.0}, "beta must be a finite number above 0"),
        (ExoPrefLoss, {"beta": 0.1, "label_smoothing": 0.0}, r"label_smoothing must be in \(0, 1/2\)"),
        (DPOLoss, {"beta": float("nan")}, "beta must be a finite number above 0"),
        (DPOLoss, {"beta": 0.1, "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 1/2\)"),
    ],
)
def test_what_a_config_may_not_say(module, given, message):
    with pytest.raises(ValueError, match=message):
        module(**given)


@pytest.mark.unchecked
def test_shapes_that_would_broadcast_are_refused():
    zeros = torch.zeros(3)
    with pytest.raises(ValueError, match=r"policy_rejected_logps must have shape \[B\]"):
        ExoPrefLoss(beta=0.1)(zeros, zeros[:, None], zeros, zeros)


def test_nothing_else_is_loaded():
    code = (
        "import sys; import exo_toy.integrations.torchtune; "
        "assert not {'torchtune', 'transformers', 'trl', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
