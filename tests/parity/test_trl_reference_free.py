"""TRL 1.16's losses without a reference: SimPO, CPO and ORPO.

They are methods of trainers that read a few settings of theirs; the rest of those trainers is not needed.
"""

from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl")

from exo_toy import losses  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not trl.__version__.startswith("1.16."), reason=f"written for TRL 1.16, not {trl.__version__}"),
    # Trainers that TRL calls experimental say so when they are imported.
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental':UserWarning"),
]

CHOSEN, REJECTED = torch.tensor([-1.0, -2.5, -0.1, -30.0]), torch.tensor([-1.5, -0.3, -4.0, -31.0])
LENGTHS = torch.tensor([3, 1, 5, 2]), torch.tensor([2, 4, 1, 3])


def settings_of_theirs(**settings):
    defaults = dict(label_smoothing=0.0, alpha=0.0, accelerator=SimpleNamespace(device="cpu"))
    return SimpleNamespace(**{**defaults, **settings})


def means_of_both():
    return [logps / n for logps, n in zip((CHOSEN, REJECTED), LENGTHS, strict=True)]


def assert_equal_results(result, wanted):
    for got, value in zip(result, wanted, strict=True):
        assert torch.allclose(got, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_cpo(eps):
    """The likelihood is added elsewhere, a mean over all tokens."""
    from trl.experimental.cpo import CPOTrainer

    given = settings_of_theirs(loss_type="sigmoid", beta=0.2, label_smoothing=eps)
    result = losses.smoothed(losses.cpo_loss, label_smoothing=eps)(CHOSEN, REJECTED, beta=0.2, nll_weight=0.0)
    assert_equal_results(result, CPOTrainer.cpo_loss(given, CHOSEN, REJECTED))


def test_simpo():
    """Gamma is absolute there, too. Smoothed labels keep gamma's sign there; here the other label asks for it."""
    from trl.experimental.cpo import CPOTrainer

    given = settings_of_theirs(loss_type="simpo", beta=2.0, simpo_gamma=0.8)
    settings = dict(beta=2.0, gamma=0.8)
    result = losses.simpo_loss(CHOSEN, REJECTED, *LENGTHS, **settings)
    assert_equal_results(result, CPOTrainer.cpo_loss(given, *means_of_both()))
    given.label_smoothing = 0.1
    smooth, _, _ = CPOTrainer.cpo_loss(given, *means_of_both())
    margin = 2.0 * (means_of_both()[0] - means_of_both()[1])
    smoothed = losses.smoothed(losses.simpo_loss, label_smoothing=0.1)(CHOSEN, REJECTED, *LENGTHS, **settings).losses
    other_label = [-torch.nn.functional.logsigmoid(-margin + sign * 0.8) for sign in (1, -1)]
    assert torch.allclose(smoothed - smooth, 0.1 * (other_label[1] - other_label[0]), atol=1e-5)


def test_orpo():
    """Its loss is minus what that method returns, and a likelihood added elsewhere, of prompt and completion."""
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = means_of_both()
    odds, *rewards, _, _ = ORPOTrainer.odds_ratio_loss(settings_of_theirs(beta=0.3), chosen, rejected)
    result = losses.orpo_loss(CHOSEN, REJECTED, *LENGTHS, odds_weight=0.3)
    assert_equal_results(result, [-chosen - odds, *rewards])
