"""The laboratory recognises every loss of the library: what it optimises, and that it has no defect."""

from collections.abc import Iterable

import pytest

from exo_toy.lab import characterize
from exo_toy.lab.claims import settings_of
from exo_toy.losses import LOSSES

INCREASING, BOUNDARY = "increasing in the reward", "on the boundary"
COLDER = "pi* at another temperature"
EXPONENTIAL = {"infinite"}
# The optimum that the laboratory finds, defects in its eyes that the loss has by its nature, and other losses that are
# the same on what the laboratory shows.
PAIRS = {
    "dpo": ("pi*", set(), {"cdpo", "robust_dpo"}),
    "cdpo": (INCREASING, set(), {"dpo"}),
    "robust_dpo": (INCREASING, set(), set()),
    "exo_pref": (INCREASING, set(), set()),
    "ipo": ("win rates", set(), set()),
    "hinge": (INCREASING, set(), set()),
    "sppo": (INCREASING, set(), set()),
    "nca_pair": (INCREASING, set(), set()),
    "bco_pair": (INCREASING, set(), set()),
    "apo_zero": (BOUNDARY, set(), set()),
    "apo_down": (BOUNDARY, set(), set()),
    "discopop": (INCREASING, set(), set()),
    "dpop": ("the reference", set(), set()),
    "cal_dpo": (INCREASING, set(), set()),
    "f_dpo_kl_ref_pi": ("f-divergence", EXPONENTIAL, set()),
    "f_dpo_alpha": ("f-divergence", EXPONENTIAL, set()),
    "f_dpo_js": ("f-divergence", set(), set()),
    "chi_po": ("f-divergence", set(), set()),
    "rebel": ("pi*", set(), {"rpo_squared"}),
    "rpo_squared": (COLDER, set(), set()),
    "rpo_kl": (COLDER, set(), set()),
    "aot": (INCREASING, {"mixed"}, set()),
    "aot_unpaired": (INCREASING, {"mixed"}, set()),
    "simpo": ("not increasing in the reward", set(), set()),
    "orpo": ("not increasing in the reward", set(), set()),
    "cpo": ("pi*", set(), set()),
    "kto": (BOUNDARY, set(), set()),
    "bco": ("pi*", set(), set()),
    "dro": ("pi*", set(), set()),
    "plackett_luce": ("pi*", set(), set()),
}
LISTS = {
    "exo_rw": ("KL(policy||optimal)", "pi*"),
    "dpo_rw": ("KL(optimal||policy)", "pi*"),
    "alpha_rw": ("alpha", "pi*"),
    "fpo_js": ("JS(policy, optimal)", "pi*"),
    "nca_rw": ("none", INCREASING),
}
# One of each kind.
FAST = ("dpo", "ipo", "rebel", "simpo", "kto", "dro", "plackett_luce", "exo_rw")


def slow_but(fast: Iterable[str], names: Iterable[str]) -> list:
    """Parameters of which those in ``fast`` alone run by default."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def test_every_loss_is_of_the_table():
    assert PAIRS.keys() | LISTS.keys() <= LOSSES.keys()


@pytest.mark.parametrize("name", slow_but(FAST, PAIRS))
def test_losses_on_pairs_are_recognised(name):
    verdict, allowed, same = PAIRS[name]
    report = characterize(LOSSES[name].function, settings=settings_of(name))
    assert report.optima[0].verdict == verdict
    assert report.codes == allowed, report.findings
    assert set(report.equals) - same == {name}


@pytest.mark.parametrize("name", slow_but(FAST, LISTS))
def test_losses_on_lists_are_recognised(name):
    target, verdict = LISTS[name]
    report = characterize(LOSSES[name].function, settings=settings_of(name))
    assert report.alignment.target.startswith(target)
    assert {optimum.verdict for optimum in report.optima} == {verdict}
    assert report.equals == (name,)
    assert report.findings == ()
    # The bias falls like 1/K, up to the next term.
    if report.alignment.bias:
        assert report.alignment.scale == pytest.approx(1.0, abs=5e-3)
        assert report.alignment.bias[-1] == pytest.approx(report.alignment.bias[-2] / 2, rel=0.25)
    if name == "alpha_rw":
        assert report.alignment.alpha == pytest.approx(0.5, abs=2e-3)
