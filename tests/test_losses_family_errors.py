"""Every refusal of the family of losses: a ValueError that names the argument, what it was and what is allowed."""

import itertools
import math

import pytest
import torch

from exo_toy import losses
from exo_toy.losses import LOSSES
from tests.loss_laws import LOG_RATIO, LOGPS, arguments

pytestmark = pytest.mark.unchecked

INF, NAN = math.inf, math.nan
BY_NAME = pytest.mark.parametrize("name", LOSSES)
WITH_PAIRS = [name for name, record in LOSSES.items() if record.kind in ("pair", "rewarded pair", "batch")]
PAIRS = pytest.mark.parametrize("name", WITH_PAIRS)
POLICY = ["policy_chosen_logps", "policy_rejected_logps"]
REF = ["ref_chosen_logps", "ref_rejected_logps"]


def refuses(call, *arguments_, **settings) -> str:
    with pytest.raises(ValueError) as refusal:
        call(*arguments_, **settings)
    return str(refusal.value)


def called(name: str, *changed, **settings):
    """The loss with the first of its tensors changed."""
    tensors = [*changed, *arguments(name)[len(changed) :]]
    return LOSSES[name].function(*tensors, **{**LOSSES[name].settings, **settings})


BAD_SCALARS = [0, 0.0, -1, NAN, INF, True, "0.1", None, torch.tensor(0.1)]


@BY_NAME
def test_temperatures(name):
    temperatures = {"beta", "beta_pi", "beta_r", "eta", "reward_scale", "odds_weight"} & LOSSES[name].settings.keys()
    temperatures |= {"tau"} & LOSSES[name].settings.keys()
    assert temperatures
    for setting, value in itertools.product(temperatures, BAD_SCALARS):
        message = refuses(called, name, **{setting: value})
        # ORPO's weight stands where the others have beta.
        assert message.startswith(
            (f"{setting} must be a finite number above 0", "beta must be a finite number above 0")
        )
        assert f"got {value!r}" in message


@BY_NAME
def test_shapes(name):
    for shape in [(), (3, 1), (1,), (4,), (2, 3, 1)]:
        message = refuses(called, name, torch.zeros(shape).double())
        assert "must have" in message and str(list(shape)) in message


@BY_NAME
def test_every_tensor_is_checked_for_its_shape(name):
    tensors = arguments(name)
    for index in range(1, len(tensors)):
        changed = list(tensors)
        changed[index] = torch.cat([tensors[index], tensors[index]])
        message = refuses(LOSSES[name].function, *changed, **LOSSES[name].settings)
        assert "must have the same shape" in message


@BY_NAME
def test_dtypes(name):
    first = arguments(name)[0]
    for dtype in (torch.int64, torch.bool, torch.complex64):
        message = refuses(called, name, torch.ones(first.shape, dtype=dtype))
        assert message.endswith(f"must have a floating-point dtype; got {dtype}")
    assert refuses(called, name, first.tolist()).endswith("must be a torch.Tensor; got list")


@PAIRS
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_values_of_pairs(name, value):
    for index in range(4):
        check_value_of_pair(name, index, value)


def check_value_of_pair(name, index, value):
    changed = list(LOGPS)
    changed[index] = LOGPS[index].clone()
    changed[index][1] = value
    if index < 2 and value == -INF and name != "aot_unpaired":
        assert not called(name, *changed).losses.isnan().any()
        return
    message = refuses(called, name, *changed)
    allowed = "finite or -inf" if index < 2 and value != -INF else "finite"
    assert message == f"{[*POLICY, *REF][index]} must be {allowed}; got {value} at index [1]"


@PAIRS
def test_a_pair_of_impossible_completions(name):
    impossible = LOGPS[0].clone()
    impossible[2] = -INF
    message = refuses(called, name, impossible, impossible)
    assert message.endswith("got -inf at index [2]")


@pytest.mark.parametrize("name", [name for name, record in LOSSES.items() if record.kind == "unpaired"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_values_of_single_completions(name, value):
    policy, ref = LOGPS[0].clone(), LOGPS[2].clone()
    policy[1] = value
    if value == -INF:
        assert not called(name, policy).losses.isnan().any()
    else:
        assert refuses(called, name, policy) == f"policy_logps must be finite or -inf; got {value} at index [1]"
    ref[1] = value
    assert refuses(called, name, LOGPS[0], ref) == f"ref_logps must be finite; got {value} at index [1]"


@pytest.mark.parametrize("name", ["rebel", "rpo_squared", "rpo_kl", "dro"])
def test_rewards_are_finite(name):
    tensors = list(arguments(name))
    tensors[-1] = tensors[-1].clone()
    tensors[-1][0] = NAN
    message = refuses(LOSSES[name].function, *tensors, **LOSSES[name].settings)
    assert message.endswith("must be finite; got nan at index [0]")


@pytest.mark.parametrize(
    ("name", "setting", "bad", "allowed"),
    [
        ("robust_dpo", "label_smoothing", [0.5, -0.1, NAN, True, None], "in [0, 1/2)"),
        ("dpop", "penalty", [-1, INF, NAN, True], "finite and at least 0"),
        ("discopop", "tau", [1.5, 2], "in (0, 1]"),
        ("sppo", "win_rate", [-0.1, 1.1, NAN, "1", True], "in [0, 1]"),
        ("bco_pair", "delta", [INF, NAN, "0", None], "finite"),
        ("bco", "delta", [-INF, NAN, True], "finite"),
        ("kto", "reference_point", [-0.1, INF, NAN, None], "finite and at least 0"),
        ("kto", "desirable_weight", [0, -1, INF, None], "a finite number above 0"),
        ("kto", "undesirable_weight", [0.0, NAN], "a finite number above 0"),
        ("chi_po", "max_margin", [0, -1, NAN, None], "a finite number above 0"),
        ("simpo", "gamma", [-0.1, INF, NAN, None], "finite and at least 0"),
        ("cpo", "nll_weight", [-0.1, INF, NAN, None], "finite and at least 0"),
    ],
)
def test_other_scalars(name, setting, bad, allowed):
    for value in bad:
        message = refuses(called, name, **{setting: value})
        assert message.startswith(f"{setting} must be {allowed}")
        assert message.endswith(f"got {value!r}")


@pytest.mark.parametrize(("name", "setting"), [("bco", "delta"), ("bco_pair", "delta"), ("kto", "reference_point")])
def test_anchors_that_are_tensors(name, setting):
    assert "got shape [3]" in refuses(called, name, **{setting: torch.zeros(3)})
    assert f"{setting} must have a floating-point dtype" in refuses(called, name, **{setting: torch.tensor(1)})
    assert f"{setting} must be finite" in refuses(called, name, **{setting: torch.tensor(NAN)})


def test_win_rates():
    rates = torch.tensor([0.5, 1.2, 0.0], dtype=torch.float64)
    assert refuses(called, "sppo", win_rate=rates) == "win_rate must be in [0, 1]; got 1.2 at index [1]"
    assert refuses(called, "sppo", win_rate=rates[:2]).startswith("win_rate must have the same shape [B]")


def test_alpha():
    for value in (NAN, INF, "1", None, True):
        assert refuses(losses.alpha_score, torch.zeros(2), alpha=value).startswith("alpha must be a finite number")


# Lengths, tokens, labels


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_lengths(name):
    chosen, rejected, n_w, n_l = arguments(name)
    function, settings = LOSSES[name].function, LOSSES[name].settings
    assert (
        refuses(function, chosen, rejected, n_w - 3, n_l, **settings)
        == "lengths must be at least 1; got 0 at index [0]"
    )
    assert "integer dtype; got torch.float64" in refuses(function, chosen, rejected, n_w.double(), n_l, **settings)
    assert "integer dtype; got list" in refuses(function, chosen, rejected, n_w, n_l.tolist(), **settings)
    assert "integer dtype; got torch.bool" in refuses(function, chosen, rejected, n_w > 0, n_l, **settings)


def test_probabilities_above_one_have_no_odds():
    chosen, rejected, *lengths = arguments("orpo")
    high = rejected.clone()
    high[1] = 0.5
    message = refuses(losses.orpo_loss, chosen, high, *lengths, odds_weight=0.1)
    assert message == "policy_rejected_logps must be at most 0; got 0.1 at index [1]"
    zero = torch.zeros_like(chosen)
    assert "below 0 where policy_chosen_logps is 0" in refuses(losses.orpo_loss, zero, zero, *lengths, odds_weight=0.1)


def test_desirable_is_a_mask():
    for name in ("kto", "bco"):
        for flags in (torch.ones(3), torch.ones(3, dtype=torch.int64), [True] * 3):
            message = refuses(called, name, LOGPS[0], LOGPS[2], flags)
            assert message.startswith("desirable must be a torch.bool tensor")


def test_tokens():
    tokens, mask, shared = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.tensor([1, 2])
    for alpha in (-0.1, 1.1, NAN, True, None):
        assert refuses(losses.length_desensitized, tokens, mask, shared, alpha=alpha).startswith(
            "alpha must be in [0, 1]"
        )
    assert "mask must have" in refuses(losses.length_desensitized, tokens, mask[:, :2], shared, alpha=0.5)
    assert "shared_lengths must" in refuses(losses.length_desensitized, tokens, mask, shared[:1], alpha=0.5)
    assert "shared_lengths must be at least 1" in refuses(
        losses.length_desensitized, tokens, mask, shared - 1, alpha=0.5
    )
    empty = mask.clone()
    empty[1] = False
    assert (
        refuses(losses.wpo_weights, tokens, empty)
        == "mask must be True for a token of each row; got False at index [1]"
    )


@pytest.mark.parametrize("modifier", [losses.smoothed, losses.robust], ids=lambda modifier: modifier.__name__)
def test_noise(modifier):
    for value in (0.5, -0.1, 1.5, NAN, True, None):
        message = refuses(modifier, losses.dpo_loss, label_smoothing=value)
        assert message.startswith("label_smoothing must be in [0, 1/2)")


def test_empty_classes():
    some = torch.ones(2)
    assert refuses(losses.bco_shift, some[:0], some).startswith("chosen_rewards must have shape [B] with B >= 1")
    assert refuses(losses.bco_shift, some, some[:0]).startswith("rejected_rewards must have shape [B] with B >= 1")
    assert refuses(losses.kto_reference_point, some[:0], some[:0]).startswith("policy_logps must have shape [B]")
    assert "must be finite" in refuses(losses.kto_reference_point, some * -INF, some)


# Lists


@pytest.mark.parametrize("name", ["nca_rw", "fpo_js", "plackett_luce"])
def test_rows_of_lists(name):
    function, settings = LOSSES[name].function, LOSSES[name].settings
    tensors = arguments(name)
    none = torch.ones(LOG_RATIO.shape, dtype=torch.bool)
    none[1] = False
    message = refuses(function, *tensors, mask=none, **settings)
    assert message == "mask must keep at least one candidate per row; got all False at index [1]"
    for value in (NAN, INF):
        bad = LOG_RATIO.clone()
        bad[0, 2] = value
        message = refuses(function, bad, *tensors[1:], **settings)
        assert message == f"log_ratio must be finite or -inf where unmasked; got {value} at index [0, 2]"
    assert "K >= 2" in refuses(function, *(x[:, :1] for x in tensors), **settings)
    assert "mask must be a torch.bool" in refuses(function, *tensors, mask=none.double(), **settings)


def test_rankings_of_impossible_candidates():
    """One of them costs an infinite loss unless it is last; of two, none can be said to be better."""
    once = LOG_RATIO.clone()
    once[1, 3] = -INF
    assert losses.plackett_luce_loss(once, beta=1.0).isfinite().all()
    once[1, 3], once[1, 0] = 0.0, -INF
    assert losses.plackett_luce_loss(once, beta=1.0)[1] == INF
    once[1, 1] = -INF
    message = refuses(losses.plackett_luce_loss, once, beta=1.0)
    assert message == "log_ratio must be above -inf for all but one candidate of each row; got two of -inf in row 1"
