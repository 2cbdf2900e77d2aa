"""A table of the losses for command lines and tests. The library itself never looks a loss up by name."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from exo_toy.losses.alpha import alpha_rw_loss
from exo_toy.losses.anchored import (
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    bco_pair_loss,
    kto_loss,
    nca_pair_loss,
)
from exo_toy.losses.batch import aot_loss, aot_unpaired_loss
from exo_toy.losses.f_dpo import alpha_score, chi_po_loss, f_dpo_loss, jensen_shannon_score
from exo_toy.losses.listwise import dpo_rw_loss, exo_rw_loss
from exo_toy.losses.logistic import discopop_loss, dpop_loss, hinge_loss, robust_dpo_loss
from exo_toy.losses.pairwise import dpo_loss, exo_pref_loss
from exo_toy.losses.ranked import fpo_loss, jensen_shannon, nca_rw_loss, plackett_luce_loss
from exo_toy.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from exo_toy.losses.rewarded import dro_loss, rebel_loss, rpo_kl_loss, rpo_squared_loss
from exo_toy.losses.squared import cal_dpo_loss, ipo_loss, sppo_loss

Kind = Literal["pair", "rewarded pair", "reference-free", "batch", "unpaired", "list", "ranked"]


@dataclass(frozen=True)
class LossRecord:
    """A loss and what is claimed of it.

    Attributes:
        function: the loss.
        kind: which tensors it takes. "pair" and "batch": policy chosen, policy rejected, reference chosen, reference
            rejected log-probabilities [B]; "rewarded pair": these and the rewards of both; "reference-free": policy
            chosen and rejected, and the lengths of both unless the loss knows none; "unpaired": policy and reference
            and a third [B] of its own; "list": log ratios and rewards [B, K]; "ranked": log ratios [B, K].
        source: the paper.
        optimum: the policy that minimises its expectation over a full table under Bradley-Terry labels, in words.
        settings: every keyword that has no default, and others of interest, at values of the paper or usual ones.
    """

    function: Callable[..., Any]
    kind: Kind
    source: str
    optimum: str
    settings: Mapping[str, Any]


def _record(function: Callable[..., Any], kind: Kind, source: str, optimum: str, **settings: Any) -> LossRecord:
    return LossRecord(function, kind, source, optimum, MappingProxyType(settings))


_BOUNDARY = "none inside: completions that lose more often than they win get probability 0"
_F_OPTIMUM = "beta f'(pi/pi_ref) = r - c: the optimum under f in place of KL"

LOSSES: Mapping[str, LossRecord] = MappingProxyType(
    {
        "dpo": _record(dpo_loss, "pair", "2305.18290", "pi*", beta=0.1),
        "cdpo": _record(
            dpo_loss,
            "pair",
            "2305.18290",
            "two completions: margin logit((1-2 eps) P + eps); more: a compromise, flatter than pi*",
            beta=0.1,
            label_smoothing=0.1,
        ),
        "robust_dpo": _record(
            robust_dpo_loss,
            "pair",
            "2403.00409",
            "pi* if labels are flipped with probability eps; unbounded below where P is outside [eps, 1 - eps]",
            beta=0.1,
            label_smoothing=0.1,
        ),
        "exo_pref": _record(
            exo_pref_loss,
            "pair",
            "2402.00856",
            "two completions: margin (2P - 1) log((1-eps)/eps); more: a compromise",
            beta=0.1,
            label_smoothing=1e-3,
        ),
        "ipo": _record(ipo_loss, "pair", "2310.12036", "pi_ref exp(P(y > mu)/beta), normalised", beta=0.1),
        "hinge": _record(
            hinge_loss, "pair", "2309.06657", "two completions: margin 1 for the one preferred more often", beta=0.1
        ),
        "sppo": _record(
            sppo_loss,
            "pair",
            "2405.00675",
            "the projection of (P(y > mu) - 1/2)/beta onto the log ratios of normalised policies",
            beta=0.1,
        ),
        "nca_pair": _record(
            nca_pair_loss,
            "pair",
            "2402.05369",
            "beta log ratio = log 2 P(y > mu) where that is normalised (beta = 1, mu = pi_ref), else near it",
            beta=0.1,
        ),
        "bco_pair": _record(
            bco_pair_loss,
            "pair",
            "2404.04656",
            "beta log ratio = delta + logit P(y > mu) where that is normalised, else near it",
            beta=0.1,
            delta=0.0,
        ),
        "apo_zero": _record(apo_zero_loss, "pair", "2408.06266", _BOUNDARY, beta=0.1),
        "apo_down": _record(apo_down_loss, "pair", "2408.06266", "no closed form, not pi*", beta=0.1),
        "discopop": _record(
            discopop_loss, "pair", "2406.08414", "no closed form, not pi*; local optima", beta=0.05, tau=0.05
        ),
        "dpop": _record(
            dpop_loss,
            "pair",
            "2402.13228",
            "pi_ref if penalty >= 2 (max P / min P - 1), P = P(y > mu) and mu = pi_ref; else no closed form",
            beta=0.3,
            penalty=50.0,
        ),
        "cal_dpo": _record(cal_dpo_loss, "pair", "2412.14516", "no closed form, not pi*", beta=0.1),
        "f_dpo_kl_ref_pi": _record(
            f_dpo_loss, "pair", "2309.16240", _F_OPTIMUM, beta=0.1, score=functools.partial(alpha_score, alpha=0)
        ),
        "f_dpo_alpha": _record(
            f_dpo_loss, "pair", "2309.16240", _F_OPTIMUM, beta=0.1, score=functools.partial(alpha_score, alpha=0.5)
        ),
        "f_dpo_js": _record(f_dpo_loss, "pair", "2309.16240", _F_OPTIMUM, beta=0.1, score=jensen_shannon_score),
        "chi_po": _record(
            chi_po_loss,
            "pair",
            "2407.13399",
            "pi_ref W0(exp((r - Z)/beta)) if no gap of rewards exceeds the clip",
            beta=0.1,
            max_margin=4.0,
        ),
        "rebel": _record(rebel_loss, "rewarded pair", "2404.16767", "pi* at beta = 1/eta", eta=1.0),
        "rpo_squared": _record(
            rpo_squared_loss, "rewarded pair", "2406.11704", "pi* of eta r", beta=0.1, reward_scale=1.0
        ),
        "rpo_kl": _record(rpo_kl_loss, "rewarded pair", "2406.11704", "pi* of eta r", beta=0.1, reward_scale=1.0),
        "aot": _record(aot_loss, "batch", "2406.05882", "no closed form, not pi*", beta=0.1),
        "aot_unpaired": _record(aot_unpaired_loss, "batch", "2406.05882", "no closed form, not pi*", beta=0.1),
        "simpo": _record(
            simpo_loss,
            "reference-free",
            "2405.14734",
            "gamma = 0: exp(|y| (r + c)/beta); else no closed form",
            beta=2.0,
            gamma=1.0,
        ),
        "orpo": _record(orpo_loss, "reference-free", "2403.07691", "no closed form, not pi*", odds_weight=0.1),
        "cpo": _record(
            cpo_loss,
            "reference-free",
            "2401.08417",
            "alpha = 0: exp(r/beta), normalised; else between that and the chosen completions",
            beta=0.1,
            nll_weight=1.0,
        ),
        "kto": _record(
            kto_loss,
            "unpaired",
            "2402.01306",
            "none inside: completions that are mostly undesirable get probability 0",
            beta=0.1,
            reference_point=0.0,
        ),
        "bco": _record(
            bco_loss,
            "unpaired",
            "2404.04656",
            "pi* if desirable with probability sigma(r - c) and delta = c - beta log Z, else near it",
            beta=0.1,
            delta=0.0,
        ),
        "dro": _record(dro_loss, "unpaired", "2405.19107", "pi* at beta = tau, if V is minimised too", tau=1.0),
        "exo_rw": _record(exo_rw_loss, "list", "2402.00856", "pi* at beta = beta_r beta_pi", beta_pi=0.1, beta_r=0.1),
        "dpo_rw": _record(dpo_rw_loss, "list", "2402.05369", "pi* at beta = beta_r beta_pi", beta_pi=0.1, beta_r=0.1),
        "alpha_rw": _record(
            alpha_rw_loss, "list", "2402.00856", "pi* at beta = beta_r beta_pi", alpha=0.5, beta_pi=0.1, beta_r=0.1
        ),
        "fpo_js": _record(
            fpo_loss,
            "list",
            "2410.21662",
            "pi* at beta = beta_r beta_pi",
            divergence=jensen_shannon,
            beta_pi=0.1,
            beta_r=0.1,
        ),
        "nca_rw": _record(
            nca_rw_loss,
            "list",
            "2402.05369",
            "K to infinity: pi* at beta_r if beta_pi = 1, else near beta_pi log ratio = r/beta_r - log Z",
            beta_pi=1.0,
            beta_r=0.1,
        ),
        "plackett_luce": _record(plackett_luce_loss, "ranked", "2305.18290", "pi*", beta=0.1),
    }
)
