"""Modifiers: of a loss, of log-probabilities, of weights."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exo_toy import losses
from exo_toy.losses import LOSSES
from tests import loss_oracles, strategies
from tests.loss_cases import PAIR_CASES
from tests.loss_laws import LENGTHS, LOGPS, NEGATIVE, SCORES
from tests.tolerances import TOLERANCES, assert_close

smoothings = st.floats(1e-3, 0.49)
cases = pytest.mark.parametrize("case", PAIR_CASES, ids=lambda case: case.name)


# Of a loss


@given(drawn=strategies.pairs(), eps=smoothings)
def test_smoothed_dpo_is_conservative_dpo(drawn, eps):
    smoothed = losses.smoothed(losses.dpo_loss, label_smoothing=eps)(*drawn.logps, beta=drawn.beta)
    for value, wanted in zip(
        smoothed, losses.dpo_loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps), strict=True
    ):
        assert_close(value, wanted)


@given(drawn=strategies.pairs(), eps=smoothings)
def test_robust_of_dpo_is_robust_dpo(drawn, eps):
    composed = losses.robust(losses.dpo_loss, label_smoothing=eps)(*drawn.logps, beta=drawn.beta)
    direct = losses.robust_dpo_loss(*drawn.logps, beta=drawn.beta, label_smoothing=eps)
    for value, wanted in zip(composed, direct, strict=True):
        assert_close(value, wanted, scale=(1 + drawn.margin.abs().max().item()) / (1 - 2 * eps))


@cases
@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_robustness_undoes_smoothing(case, eps):
    loss = LOSSES[case.name].function
    for inner, outer in [(losses.smoothed, losses.robust), (losses.robust, losses.smoothed)]:
        both = outer(inner(loss, label_smoothing=eps), label_smoothing=eps)
        assert_close(both(*LOGPS, **case.settings).losses, case(*LOGPS).losses, scale=100.0)


@cases
@pytest.mark.parametrize("modifier", [losses.smoothed, losses.robust], ids=lambda modifier: modifier.__name__)
def test_no_noise_is_the_loss_itself(case, modifier):
    same = modifier(LOSSES[case.name].function, label_smoothing=0.0)(*LOGPS, **case.settings)
    assert_close(same.losses, case(*LOGPS).losses)
    # Also where the other label would cost an infinite loss.
    impossible = torch.tensor([-math.inf], dtype=torch.float64), *(torch.zeros(1).double() for _ in range(3))
    assert_close(
        modifier(LOSSES[case.name].function, label_smoothing=0)(*impossible, **case.settings).losses,
        case(*impossible).losses,
    )


@given(drawn=strategies.pairs(bound=8.0))
def test_scores_compose(drawn):
    """DPO of scores is f-DPO, and any loss of log ratios itself."""
    for score in (losses.jensen_shannon_score, losses.chi_po_score, functools.partial(losses.alpha_score, alpha=0.5)):
        wanted = losses.f_dpo_loss(*drawn.logps, beta=drawn.beta, score=score).losses
        scored = losses.scored(losses.dpo_loss, score=score)(*drawn.logps, beta=drawn.beta)
        assert_close(scored.losses, wanted, scale=1e4)
        assert_close(scored.chosen_rewards, drawn.beta * score(drawn.policy_chosen - drawn.ref_chosen), scale=10.0)
    for case in PAIR_CASES:
        same = losses.scored(LOSSES[case.name].function, score=lambda x: x)(*LOGPS, **case.settings)
        assert_close(same.losses, case(*LOGPS).losses)


def test_modifiers_of_modifiers():
    """A hinge under another divergence and noisy labels, of log-probabilities per token, by plain arithmetic."""
    logps = [losses.length_normalized(x, n) for x, n in zip(LOGPS, (*LENGTHS, *LENGTHS), strict=True)]
    hinge = losses.scored(losses.hinge_loss, score=losses.jensen_shannon_score)
    value = losses.smoothed(hinge, label_smoothing=0.1)(*logps, beta=0.7).losses
    for got, *row in zip(value.tolist(), *(x.tolist() for x in (*LOGPS, *LENGTHS)), strict=True):
        w, lo, rw, rlo, n_w, n_l = row
        scores = [math.log(2 / (1 + math.exp(-x))) for x in ((w - rw) / n_w, (lo - rlo) / n_l)]
        margin = 0.7 * (scores[0] - scores[1])
        assert math.isclose(got, 0.9 * max(0, 1 - margin) + 0.1 * max(0, 1 + margin), rel_tol=1e-12)


def test_scores_that_overflow_are_refused():
    far = torch.tensor([800.0]).double(), *(torch.zeros(1).double() for _ in range(3))
    scored = losses.scored(losses.hinge_loss, score=losses.chi_po_score)
    with pytest.raises(ValueError, match="policy_chosen_logps must be finite or -inf; got inf"):
        scored(*far, beta=1.0)


def test_modifiers_exchange_lengths_and_rewards_with_their_completions():
    for loss, tensors, settings in [
        (losses.simpo_loss, (*NEGATIVE, *LENGTHS), {"beta": 2.0, "gamma": 0.5}),
        (losses.rebel_loss, (*LOGPS, *SCORES), {"eta": 0.7}),
    ]:
        swapped = [x for pair in zip(tensors[1::2], tensors[::2], strict=True) for x in pair]
        right, wrong = (loss(*given_tensors, **settings).losses for given_tensors in (tensors, swapped))
        mixed = losses.smoothed(loss, label_smoothing=0.2)(*tensors, **settings).losses
        assert_close(mixed, 0.8 * right + 0.2 * wrong)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_modifiers_keep_the_dtype_and_compute_in_float32(dtype):
    logps = [x.to(dtype) for x in LOGPS]
    wide = [x.double() for x in logps]
    for modifier in (losses.smoothed, losses.robust):
        loss = modifier(losses.dpo_loss, label_smoothing=0.2)
        for value, wanted in zip(loss(*logps, beta=0.3), loss(*wide, beta=0.3), strict=True):
            assert value.dtype == dtype
            assert_close(value, wanted)


def test_smoothed_aot_is_smoothed_in_its_sum():
    """Its entries belong to ranks: exchanged labels turn the ranks round."""
    u, v = (LOGPS[0] - LOGPS[1]).sort().values, (LOGPS[2] - LOGPS[3]).sort().values
    expected = sum(
        0.9 * loss_oracles.logistic(0.7 * x) + 0.1 * loss_oracles.logistic(-0.7 * x) for x in (u - v).tolist()
    )
    assert_close(losses.smoothed(losses.aot_loss, label_smoothing=0.1)(*LOGPS, beta=0.7).losses.sum(), expected)


# Of log-probabilities and weights

TOKENS = torch.tensor([[-1.0, -2.0, -0.5, -4.0], [-0.3, -0.2, math.nan, math.nan]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


def test_length_normalised_losses():
    """IPO with means and DPO with means, as some trainers have them."""
    lengths = (*LENGTHS, *LENGTHS)
    means = [losses.length_normalized(logps, n) for logps, n in zip(LOGPS, lengths, strict=True)]
    by_hand = [
        [x / n for x, n in zip(a.tolist(), b.tolist(), strict=True)] for a, b in zip(LOGPS, lengths, strict=True)
    ]
    expected = [loss_oracles.ipo(*row, beta=0.2) for row in zip(*by_hand, strict=True)]
    assert_close(losses.ipo_loss(*means, beta=0.2).losses, expected, scale=10.0)
    zero = torch.zeros_like(NEGATIVE[0])
    means = [losses.length_normalized(logps, n) for logps, n in zip(NEGATIVE, LENGTHS, strict=True)]
    simpo = losses.simpo_loss(*NEGATIVE, *LENGTHS, beta=2.0, gamma=0.0).losses
    assert_close(losses.dpo_loss(*means, zero, zero, beta=2.0).losses, simpo)
    halves = losses.length_normalized(torch.tensor([-3.0], dtype=torch.bfloat16), torch.tensor([7]))
    assert halves.dtype == torch.float32
    assert_close(halves, [-3 / 7])


def test_length_desensitised_log_probabilities():
    shared = torch.tensor([2, 2])
    for alpha in (0.0, 0.3, 1.0, 1):
        leaf = TOKENS.clone().requires_grad_()
        logps = losses.length_desensitized(leaf, MASK, shared, alpha=alpha)
        assert_close(logps, [-3.0 - 4.5 * alpha, -0.5])
        (gradient,) = torch.autograd.grad(logps.sum(), leaf)
        assert_close(gradient, [[1.0, 1.0, alpha, alpha], [1.0, 1.0, 0.0, 0.0]])
    left_padded = losses.length_desensitized(TOKENS.flip(-1), MASK.flip(-1), shared, alpha=0.0)
    assert_close(left_padded, [-4.5, -0.5])


def test_desensitised_dpo_at_alpha_one_is_dpo():
    tokens = [torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)).double() for seed in range(4)]
    counts = [torch.tensor([5, 2, 3]), torch.tensor([3, 4, 3])]
    masks = [torch.arange(5) < n[:, None] for n in counts] * 2
    shared = torch.minimum(*counts)
    plain = [x.masked_fill(~mask, 0.0).sum(-1) for x, mask in zip(tokens, masks, strict=True)]
    for alpha, same in [(1.0, True), (0.5, False)]:
        logps = [losses.length_desensitized(x, m, shared, alpha=alpha) for x, m in zip(tokens, masks, strict=True)]
        difference = losses.dpo_loss(*logps, beta=0.5).losses - losses.dpo_loss(*plain, beta=0.5).losses
        # Equal lengths share every token.
        assert_close(difference[2], 0.0)
        assert (difference[:2].abs() < 1e-12).all() == same


def test_wpo_weights():
    assert_close(losses.wpo_weights(TOKENS, MASK), [math.exp(-7.5 / 4), math.exp(-0.25)])
    aligned = losses.wpo_weights(TOKENS, MASK, log_sum_sq_probs=torch.full_like(TOKENS, -0.7))
    assert_close(aligned, [math.exp(-7.5 / 4 + 0.7), math.exp(-0.25 + 0.7)])
    assert not losses.wpo_weights(TOKENS.clone().requires_grad_(), MASK).requires_grad
    # A uniform policy's own samples all count 1.
    uniform = torch.full((1, 3), -math.log(8), dtype=torch.float64)
    assert_close(losses.wpo_weights(uniform, uniform < 0, log_sum_sq_probs=uniform), [1.0])
