"""Assertions for other projects: they pass what they should, and fail readably."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exo_toy.lab.claims import settings_of
from exo_toy.losses import LOSSES, dpo_loss, dpo_rw_loss, exo_pref_loss, exo_rw_loss
from exo_toy.testing import assert_conforms, assert_gradient_targets, assert_sound
from tests import planted_losses as planted
from tests.test_lab_losses import FAST, slow_but

BETAS = {"beta_pi": 0.5, "beta_r": 1.0}


def by_hand(log_ratio, rewards, beta_pi=0.5, beta_r=1.0):
    log_p, log_q = (beta_pi * log_ratio).log_softmax(-1), (rewards / beta_r).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("name", slow_but(FAST, LOSSES))
def test_every_loss_conforms_to_itself(name):
    assert_conforms(LOSSES[name].function, like=LOSSES[name].function, settings=settings_of(name))


def test_a_loss_written_elsewhere_conforms():
    assert_conforms(by_hand, like=exo_rw_loss, settings={}, like_settings=BETAS)
    assert_conforms(lambda f, r: by_hand(f, r), like=exo_rw_loss, settings=BETAS)


@pytest.mark.parametrize(
    ("function", "like", "settings", "message"),
    [
        (dpo_rw_loss, exo_rw_loss, BETAS, r"dpo_rw_loss is not exo_rw_loss: its loss in torch.float64\n  want       0"),
        (
            planted.rejected_detached,
            dpo_loss,
            {"beta": 0.5},
            r"its gradient in torch.float64\n  want       0.25\n  have       0\n  tolerance  2.5e-10\n  at  ",
        ),
        (planted.log_of_a_sigmoid, dpo_loss, {"beta": 0.5}, r"have       inf\n.*\n  at .*0000"),
        (planted.target_of_one_and_a_bit, exo_pref_loss, {"beta": 0.5}, "its loss in torch.float64"),
        (planted.ties_to_the_first, exo_rw_loss, {"beta_pi": 0.5}, r"at         log_ratio \(0, 0"),
    ],
)
def test_what_differs_is_said(function, like, settings, message):
    like_settings = {**BETAS} if like is exo_rw_loss else settings
    with pytest.raises(AssertionError, match=message):
        assert_conforms(function, like=like, settings=settings, like_settings=like_settings)


def test_losses_that_mix_examples_are_compared_on_batches():
    """With a batch of one they are all DPO."""
    aot, unpaired = LOSSES["aot"].function, LOSSES["aot_unpaired"].function
    assert_conforms(aot, like=aot, settings={"beta": 0.5})
    with pytest.raises(AssertionError, match="aot_loss is not dpo_loss: an example's loss in aot_loss depends on the"):
        assert_conforms(aot, like=dpo_loss, settings={"beta": 0.5})
    with pytest.raises(
        AssertionError, match=r"aot_loss is not aot_unpaired_loss: its gradient.*(\n.*){3}\n  at .*; policy"
    ):
        assert_conforms(aot, like=unpaired, settings={"beta": 0.5})


def test_half_types_are_held_to_their_rounding():
    half = (torch.bfloat16, torch.float16)
    assert_conforms(dpo_loss, like=dpo_loss, settings={"beta": 0.5}, dtypes=half)
    with pytest.raises(AssertionError, match=r"torch\.float16"):
        assert_conforms(planted.candidates_summed_in_half, like=exo_rw_loss, settings=BETAS, dtypes=(torch.float16,))


def test_gradients_and_their_targets():
    assert_gradient_targets(by_hand, "KL(policy||optimal)")
    # The temperatures of a closure, which takes none, are told.
    assert_gradient_targets(lambda f, r: by_hand(f, r), "KL(policy||optimal)", settings=BETAS)
    settings = {**BETAS, "alpha": 0.3}
    assert_gradient_targets(LOSSES["alpha_rw"].function, "alpha = 0.3", settings=settings)
    with pytest.raises(AssertionError, match=r"want       alpha = 0.3\n  have       alpha = 0.7"):
        assert_gradient_targets(planted.list_alpha_the_other_way, "alpha = 0.3", settings=settings)
    with pytest.raises(AssertionError, match=r"want       a cosine of 1\n.*\n.*\n  it tends to that of KL\(optimal"):
        assert_gradient_targets(dpo_rw_loss, "KL(policy||optimal)", settings=BETAS)
    with pytest.raises(AssertionError, match=r"have       nan\n.*\n  it is NaN or infinite"):
        assert_gradient_targets(planted.standardised, "KL(policy||optimal)", settings={"beta_pi": 0.5})
    with pytest.raises(AssertionError, match=r"want       alpha = \.5\n(.*\n)  it tends to that of no divergence"):
        assert_gradient_targets(planted.rewards_as_weights, "alpha = .5", settings={"beta_pi": 0.5})


def test_the_test_file_of_the_readme_runs_as_it_stands(tmp_path):
    root = Path(__file__).parents[1]
    blocks = re.findall(r"^```python\n(.*?)^```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.M)
    (block,) = (block for block in blocks if "exo_toy.testing" in block)
    (tmp_path / "test_my_loss.py").write_text(block)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 passed" in run.stdout


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("function", "target", "message"),
    [
        (exo_rw_loss, "reverse", "target must be one of .* or 'alpha = ...'; got 'reverse'"),
        (dpo_loss, "KL(policy||optimal)", "function must be a loss on log ratios and rewards"),
    ],
)
def test_what_cannot_be_asserted(function, target, message):
    with pytest.raises(ValueError, match=message):
        assert_gradient_targets(function, target)


def test_defects_are_listed():
    assert_sound(exo_rw_loss, settings=BETAS)
    with pytest.raises(AssertionError, match=r"reference_written_to has 1 defect\(s\)\n  in-place: writes to its arg"):
        assert_sound(planted.reference_written_to, settings={"beta": 0.5})
    assert_sound(planted.reference_written_to, settings={"beta": 0.5}, allow={"in-place"})
    with pytest.raises(ValueError, match=r"allow must be among alpha, .*; got inplace"):
        assert_sound(exo_rw_loss, settings=BETAS, allow={"inplace"})
