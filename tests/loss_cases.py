"""The family of losses as cases: each with settings, its oracle, and the laws that it has.

The laws of a case say what a test may assert of it, so that one test covers all losses and none is forgotten:
tests/test_losses_family.py checks that every entry of the library's table is a case.
"""

import functools
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exo_toy import losses
from exo_toy.losses import LOSSES
from tests import loss_oracles as oracles
from tests.loss_laws import BETA, INF, LOG2, LOGISTIC, LossCase, PairCase, pair_case


def _f_case(name: str, derivative: Callable[[float], float], *, no_chosen, **settings: Any) -> PairCase:
    """f-DPO: a score here, a derivative there."""
    oracle_settings = {"beta": settings["beta"], "derivative": derivative}
    laws = {"shift_invariant": False, "no_chosen": no_chosen, "no_rejected": (0.0, 0.0, 0.0), "exponential": True}
    return PairCase(name, settings, oracles.f_dpo, oracle_settings, math.log(2), **laws)


B = BETA

PAIR_CASES = [
    pair_case("dpo", oracles.dpo, LOG2, beta=B, laws=LOGISTIC),
    pair_case(
        "cdpo",
        oracles.dpo,
        LOG2,
        beta=B,
        label_smoothing=0.1,
        laws={"no_chosen": (INF, -0.9 * B, 0.9 * B), "no_rejected": (INF, 0.1 * B, -0.1 * B)},
    ),
    pair_case(
        "robust_dpo",
        oracles.robust_dpo,
        LOG2,
        beta=B,
        label_smoothing=0.1,
        laws={"no_chosen": (INF, -1.125 * B, 1.125 * B), "no_rejected": (-INF, -0.125 * B, 0.125 * B)},
    ),
    pair_case(
        "exo_pref",
        oracles.exo_pref,
        -math.log(2) - math.log(0.1 * 0.9) / 2,
        beta=B,
        label_smoothing=0.1,
        laws={"no_chosen": (-math.log(0.1), 0.0, 0.0), "no_rejected": (-math.log(0.9), 0.0, 0.0)},
    ),
    pair_case(
        "ipo",
        oracles.ipo,
        1 / (4 * B**2),
        beta=B,
        laws={"no_chosen": (INF, -INF, INF), "no_rejected": (INF, INF, -INF)},
    ),
    pair_case("hinge", oracles.hinge, 1.0, beta=B, laws=LOGISTIC),
    pair_case(
        "sppo",
        oracles.sppo,
        1 / (2 * B**2),
        beta=B,
        laws={"shift_invariant": False, "no_chosen": (INF, -INF, 1 / B), "no_rejected": (INF, -1 / B, -INF)},
    ),
    pair_case(
        "nca_pair",
        oracles.nca_pair,
        2 * LOG2,
        beta=B,
        laws={"shift_invariant": False, "no_chosen": (INF, -B, B / 4), "no_rejected": (1.5 * LOG2, -B / 4, 0.0)},
    ),
    pair_case(
        "bco_pair",
        oracles.bco_pair,
        oracles.logistic(-0.3) + oracles.logistic(0.3),
        beta=B,
        delta=0.3,
        laws={
            "shift_invariant": False,
            "no_chosen": (INF, -B, B * oracles.sigma(-0.3)),
            "no_rejected": (oracles.logistic(-0.3), -B * oracles.sigma(0.3), 0.0),
        },
    ),
    pair_case(
        "apo_zero",
        oracles.apo_zero,
        1.0,
        beta=B,
        laws={"shift_invariant": False, "no_chosen": (1.5, 0.0, B / 4), "no_rejected": (0.5, -B / 4, 0.0)},
    ),
    pair_case(
        "apo_down",
        oracles.apo_down,
        1.0,
        beta=B,
        laws={"shift_invariant": False, "no_chosen": (1.0, 0.0, 0.0), "no_rejected": (0.5, B / 4, 0.0)},
    ),
    pair_case(
        "discopop",
        oracles.discopop,
        (1 + LOG2) / 2,
        beta=B,
        tau=0.5,
        laws=LOGISTIC,
    ),
    pair_case(
        "dpop",
        oracles.dpop,
        LOG2,
        beta=B,
        penalty=2.0,
        laws={"shift_invariant": False, "no_chosen": (INF, -3 * B, B), "no_rejected": (0.0, 0.0, 0.0)},
    ),
    pair_case(
        "cal_dpo",
        oracles.cal_dpo,
        LOG2 + 1 / (2 * B**2),
        beta=B,
        laws={"shift_invariant": False, "no_chosen": (INF, -INF, 1 + 1 / B), "no_rejected": (INF, -1 / B, -INF)},
    ),
    _f_case(
        "f_dpo_kl_ref_pi", lambda t: -1 / t, beta=B, score=LOSSES["f_dpo_kl_ref_pi"].settings["score"],
        no_chosen=(INF, -INF, B),
    ),
    _f_case(
        "f_dpo_alpha", lambda t: -2 / math.sqrt(t), beta=B, score=functools.partial(losses.alpha_score, alpha=0.5),
        no_chosen=(INF, -INF, B),
    ),
    _f_case(
        "f_dpo_js", lambda t: math.log(2 * t / (1 + t)), beta=B, score=losses.jensen_shannon_score,
        no_chosen=(INF, -B, B / 2),
    ),
    pair_case(
        "chi_po",
        oracles.chi_po,
        LOG2,
        beta=B,
        max_margin=4.0,
        laws={
            "shift_invariant": False,
            "no_chosen": (oracles.logistic(-4.0), 0.0, 0.0),
            "no_rejected": (oracles.logistic(4.0), 0.0, 0.0),
            "exponential": True,
        },
    ),
]  # fmt: skip

# With the rewards of both completions as well.
REWARDED_CASES = [
    pair_case("rebel", oracles.rebel, 0.0, eta=0.8, laws={}),
    pair_case("rpo_squared", oracles.rpo_squared, 0.0, beta=B, reward_scale=1.7, laws={}),
    pair_case("rpo_kl", oracles.rpo_kl, 0.0, beta=B, reward_scale=1.7, laws={}),
]

# Of other kinds; those of sorted batches and of EXO-rw, DPO-rw and what lies between have tests of their own.
_LISTED = {"beta_pi": B, "beta_r": 1.3}
_KTO = {"beta": B, "reference_point": 0.2, "desirable_weight": 1.4}
OTHER_CASES = [
    LossCase("nca_rw", _LISTED, oracles.nca_rw, _LISTED),
    LossCase("fpo_js", {**_LISTED, "divergence": losses.jensen_shannon}, oracles.fpo_js, _LISTED),
    LossCase("plackett_luce", {"beta": B}, oracles.plackett_luce, {"beta": B}),
    LossCase("simpo", {"beta": B, "gamma": 0.4}, oracles.simpo, {"beta": B, "gamma": 0.4}),
    LossCase("orpo", {"odds_weight": 0.3}, oracles.orpo, {"odds_weight": 0.3}),
    LossCase("cpo", {"beta": B, "nll_weight": 0.4}, oracles.cpo, {"beta": B, "nll_weight": 0.4}),
    LossCase("kto", _KTO, oracles.kto, _KTO),
    LossCase("bco", {"beta": B, "delta": 0.3}, oracles.bco, {"beta": B, "delta": 0.3}),
    LossCase("dro", {"tau": B}, oracles.dro, {"tau": B}),
]
ELSEWHERE = {"aot", "aot_unpaired", "exo_rw", "dpo_rw", "alpha_rw"}


def _collected() -> list[LossCase]:
    """``CASES`` of the test files of one loss each."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("test_loss_*.py"))
    modules = [importlib.import_module(f"tests.{name}") for name in names]
    return [case for module in modules for case in getattr(module, "CASES", [])]


for _new in _collected():
    kind = LOSSES[_new.name].kind
    {"pair": PAIR_CASES, "rewarded pair": REWARDED_CASES}.get(kind, OTHER_CASES).append(_new)
