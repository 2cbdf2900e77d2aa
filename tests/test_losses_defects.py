"""Defects found in published implementations of these losses, each as a test that it is absent here."""

import math

import pytest
import torch

from exo_toy.losses import dpo_loss, dpo_rw_loss, exo_pref_loss, exo_rw_loss
from tests import oracles
from tests.tolerances import assert_close

LISTWISE = pytest.mark.parametrize("loss", [exo_rw_loss, dpo_rw_loss], ids=lambda loss: loss.__name__)
PAIRWISE = pytest.mark.parametrize("loss", [exo_pref_loss, dpo_loss], ids=lambda loss: loss.__name__)


def double(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def pair(margin: float, dtype=torch.float64) -> list[torch.Tensor]:
    """One pair of this margin at beta = 1."""
    return [torch.tensor([value], dtype=dtype) for value in (margin, 0.0, 0.0, 0.0)]


@LISTWISE
def test_arguments_changed_in_place(loss):
    """A loss overwrote its attention mask and reward labels, so that whatever read them next read something else."""
    log_ratio, rewards, mask = double([0.1, 0.2, 0.3]), double([1.0, 0.0, 2.0]), torch.tensor([[True, False, True]])
    originals = [value.clone() for value in (log_ratio, rewards, mask)]
    first = loss(log_ratio, rewards, beta_pi=0.5, beta_r=2.0, mask=mask)
    second = loss(log_ratio, rewards, beta_pi=0.5, beta_r=2.0, mask=mask)
    assert torch.equal(first, second)
    for value, original in zip((log_ratio, rewards, mask), originals, strict=True):
        assert torch.equal(value, original)


@pytest.mark.parametrize("eps", [1e-3, math.exp(-10), 0.1, 0.4])
def test_target_that_does_not_sum_to_one(eps):
    """A target of (1, e^-10) for (1 - eps, eps) let EXO-pref fall below zero, with its optimum at 10 for any eps."""
    best = math.log((1 - eps) / eps)
    margins = torch.linspace(best - 30, best + 30, 601, dtype=torch.float64)
    zero = torch.zeros_like(margins)
    losses = exo_pref_loss(margins, zero, zero, zero, beta=1.0, label_smoothing=eps).losses
    assert losses.min() >= -1e-12
    assert_close(margins[losses.argmin()], best)
    assert_close(losses[losses.argmin()], 0.0)
    unnormalised = torch.tensor([0.0, math.log(eps)], dtype=torch.float64)
    p = torch.stack([margins, zero], -1).log_softmax(-1)
    assert (p.exp() * (p - unnormalised)).sum(-1).min() < -1e-6  # what the defect gives, seen by this test


@LISTWISE
@pytest.mark.parametrize("tied", [(0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_ties_resolved_to_the_first_candidate(loss, tied):
    """Among equal rewards the first candidate was taken for the preferred one; a tie must favour nobody."""
    rewards = double([0.0, 0.0, 0.0])
    rewards[0, list(tied)] = 1.0
    log_ratio = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    loss(log_ratio, rewards, beta_pi=1.0, beta_r=0.5).sum().backward()
    gradients = log_ratio.grad[0, list(tied)]
    assert_close(gradients, gradients[:1].expand_as(gradients))
    # And an exchange of tied candidates' log ratios leaves the loss as it is.
    moved = double([0.3, -0.8, 1.4])
    exchanged = moved.clone()
    exchanged[0, list(tied)] = moved[0, list(tied)].flip(0)
    assert_close(
        loss(exchanged, rewards, beta_pi=1.0, beta_r=0.5),
        loss(moved, rewards, beta_pi=1.0, beta_r=0.5),
    )


@LISTWISE
def test_targets_of_the_first_two_candidates_only(loss):
    """With more than two candidates, only the first two targets were rewritten: every candidate's reward must tell."""
    log_ratio, base = double([0.3, -0.8, 1.4, 0.1, -0.5]), double([0.5, 1.0, -0.2, 0.7, 0.0])
    value = loss(log_ratio, base, beta_pi=1.0, beta_r=0.5)
    for candidate in range(5):
        rewards = base.clone()
        rewards[0, candidate] += 1.0
        changed = loss(log_ratio, rewards, beta_pi=1.0, beta_r=0.5)
        oracle = {"exo_rw_loss": oracles.exo_rw, "dpo_rw_loss": oracles.dpo_rw}[loss.__name__]
        assert_close(changed, [oracle(log_ratio[0].tolist(), rewards[0].tolist(), 1.0, 0.5)])
        assert (changed - value).abs().item() > 1e-2


def test_raw_rewards_as_cross_entropy_weights():
    """Rewards served as weights of the cross-entropy without a softmax, which is right for one-hot rewards alone."""
    log_ratio, rewards = double([0.3, -0.8, 1.4]), double([2.0, 0.5, -1.0])
    p_r = [math.exp(r / 0.7) for r in (2.0, 0.5, -1.0)]
    p_f = [math.exp(0.6 * f) for f in (0.3, -0.8, 1.4)]
    expected = -sum(r / sum(p_r) * math.log(f / sum(p_f)) for r, f in zip(p_r, p_f, strict=True))
    value = dpo_rw_loss(log_ratio, rewards, beta_pi=0.6, beta_r=0.7)
    assert_close(value, [expected])
    # Unlike a weighted sum it sees no constant in the rewards.
    assert_close(dpo_rw_loss(log_ratio, rewards + 5, beta_pi=0.6, beta_r=0.7), value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_accumulation(dtype):
    """Differences and sums in a half type: off by whole steps of log-probabilities of some hundred nats."""
    # Representable exactly, so that what is lost is lost inside the loss.
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = -300.0, -302.0, 1.0, -0.625
    logps = [torch.tensor([value], dtype=dtype) for value in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)]
    assert [value.item() for value in logps] == [policy_chosen, policy_rejected, ref_chosen, ref_rejected]
    in_half_a_type = (logps[0] - logps[2]) - (logps[1] - logps[3])
    margin = 0.375
    assert in_half_a_type.item() != margin  # the trap is there
    for loss, oracle, eps in [(dpo_loss, oracles.dpo, 0.0), (exo_pref_loss, oracles.exo_pref, 1e-3)]:
        assert_close(loss(*logps, beta=1.0, label_smoothing=eps).losses, [oracle(margin, 0.0, 0.0, 0.0, 1.0, eps)])
    # Sums over many candidates: 4096 terms of 1/4096 do not add up in a half type.
    many = torch.zeros(1, 4096, dtype=dtype)
    assert_close(dpo_rw_loss(many, many, beta_pi=1.0, beta_r=1.0), [math.log(4096)])
    assert exo_rw_loss(many, many, beta_pi=1.0, beta_r=1.0).item() == 0.0


@pytest.mark.unchecked
def test_label_smoothing_replaced_or_ignored():
    """Zero silently became 1e-3, impossible values passed and gave NaN logged as 0.0, and some losses ignored it."""
    for value in (0, 0.0, -0.1, 0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"label_smoothing .* got {value}"):
            exo_pref_loss(*pair(0.7), beta=1.0, label_smoothing=value)
    for value in (-0.1, 0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"label_smoothing .* got {value}"):
            dpo_loss(*pair(0.7), beta=1.0, label_smoothing=value)
    for loss, values in [(exo_pref_loss, (1e-4, 1e-3, 0.1, 0.3)), (dpo_loss, (0.0, 1e-3, 0.1, 0.3))]:
        losses = [loss(*pair(0.7), beta=1.0, label_smoothing=eps).losses.item() for eps in values]
        assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-4


@LISTWISE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_logarithm_of_an_underflowed_softmax(loss, dtype):
    """log(softmax(r)) is -inf where the softmax underflows, and 0 * -inf made the loss NaN."""
    log_ratio, rewards = (torch.tensor([row], dtype=dtype) for row in ([2000.0, 0.0, -500.0], [-1000.0, 0.0, 1000.0]))
    naive = torch.softmax(rewards.float(), -1).log()
    assert naive.isinf().any()  # the trap is there
    leaves = log_ratio.requires_grad_(), rewards.requires_grad_()
    value = loss(*leaves, beta_pi=1.0, beta_r=1.0)
    assert_close(value, [{"exo_rw_loss": 2000.0, "dpo_rw_loss": 2500.0}[loss.__name__]])
    for gradient in torch.autograd.grad(value.sum(), leaves):
        assert gradient.isfinite().all()
    assert_close(loss(rewards, rewards, beta_pi=1.0, beta_r=1.0), [0.0])


@PAIRWISE
@pytest.mark.parametrize("eps", [1e-3, 0.1, 0.49])
def test_misplaced_parentheses_blind_to_the_label(loss, eps):
    """A misplaced parenthesis made the loss even in the margin: exchanging chosen and rejected changed nothing."""
    for margin in (-20.0, -3.0, -0.1, 0.0, 0.1, 3.0, 20.0):
        chosen, rejected, ref_chosen, ref_rejected = pair(margin)
        right = loss(chosen, rejected, ref_chosen, ref_rejected, beta=1.0, label_smoothing=eps).losses
        wrong = loss(rejected, chosen, ref_rejected, ref_chosen, beta=1.0, label_smoothing=eps).losses
        assert torch.sign(right - wrong).item() == -math.copysign(1, margin) * (margin != 0)


@LISTWISE
def test_number_of_candidates_read_from_the_first_example(loss):
    """K was taken from the first row of a batch, so that longer rows were cut and shorter ones padded with nonsense."""
    log_ratio = double([0.1, -0.2, math.nan, math.nan], [0.5, 0.0, -1.0, 2.0], [1.0, 2.0, 0.3, math.nan])
    rewards = double([1.0, 0.0, math.nan, math.nan], [0.0, 1.0, 2.0, -1.0], [0.5, 0.0, 1.0, math.nan])
    mask = ~log_ratio.isnan()
    together = loss(log_ratio, rewards, beta_pi=0.7, beta_r=0.9, mask=mask)
    for row, count in enumerate((2, 4, 3)):
        alone = loss(log_ratio[row : row + 1, :count], rewards[row : row + 1, :count], beta_pi=0.7, beta_r=0.9)
        assert_close(together[row : row + 1], alone)


@PAIRWISE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_computation_that_nothing_reads(loss, dtype):
    """A switch to compute in float32 was offered and read by nothing: differences were rounded in the model's dtype."""
    logps = [torch.tensor([value], dtype=dtype) for value in (-200.0, -201.0, -100.0, -101.0)]
    logps[2] = torch.tensor([-100.0 - 1 / 64], dtype=torch.float32)
    shifted = loss(*logps, beta=1.0)
    exact = loss(*(value.double() for value in logps), beta=1.0)
    # 1/64 is lost when -100 - 1/64 is rounded to a half type, not when the difference is.
    assert shifted.losses.dtype == dtype
    assert torch.equal(shifted.losses, exact.losses.to(dtype))
    assert exact.chosen_rewards.item() == -100.0 + 1 / 64
