"""Preference losses on log ratios and log-probabilities of candidates: per example, no reduction.

Nothing here knows a sequence space, a policy or a model; torch is all it needs, besides jaxtyping for the
annotations. Shapes: B examples, K candidates. Log-probabilities are sums over the tokens of a completion, in nats.

* K candidates with rewards: :func:`exo_rw_loss`, :func:`dpo_rw_loss`, :func:`alpha_rw_loss` between them,
  :func:`fpo_loss` for any divergence, :func:`nca_rw_loss`; ranked: :func:`plackett_luce_loss`.
* Chosen and rejected pairs with a reference, all called alike: :func:`exo_pref_loss`, :func:`dpo_loss`,
  :func:`robust_dpo_loss`, :func:`ipo_loss`, :func:`hinge_loss`, :func:`sppo_loss`, :func:`nca_pair_loss`,
  :func:`bco_pair_loss`, :func:`apo_zero_loss`, :func:`apo_down_loss`, :func:`discopop_loss`, :func:`dpop_loss`,
  :func:`cal_dpo_loss`, :func:`f_dpo_loss`, :func:`chi_po_loss`; on a batch as a whole :func:`aot_loss`,
  :func:`aot_unpaired_loss`; with the rewards of both :func:`rebel_loss`, :func:`rpo_squared_loss`,
  :func:`rpo_kl_loss`.
* Pairs without a reference: :func:`simpo_loss`, :func:`orpo_loss`, :func:`cpo_loss`.
* Single completions: :func:`kto_loss`, :func:`bco_loss`, :func:`dro_loss`.
* Modifiers, which compose with them: :func:`smoothed`, :func:`robust`, :func:`scored` of a loss;
  :func:`length_normalized`, :func:`length_desensitized` of log-probabilities; :func:`wpo_weights`; scores for f-DPO
  :func:`alpha_score`, :func:`jensen_shannon_score`, :func:`chi_po_score`.

:data:`LOSSES` lists them for command lines and tests; README.md beside this file has formulas, conventions, where other
implementations differ, and how to add one.
"""

from exo_toy.losses.alpha import alpha_rw_loss
from exo_toy.losses.anchored import (
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    bco_pair_loss,
    bco_shift,
    kto_loss,
    kto_reference_point,
    nca_pair_loss,
)
from exo_toy.losses.batch import aot_loss, aot_unpaired_loss
from exo_toy.losses.f_dpo import alpha_score, chi_po_loss, chi_po_score, f_dpo_loss, jensen_shannon_score
from exo_toy.losses.listwise import dpo_rw_loss, exo_rw_loss
from exo_toy.losses.logistic import discopop_loss, dpop_loss, hinge_loss, robust_dpo_loss
from exo_toy.losses.modifiers import length_desensitized, length_normalized, robust, scored, smoothed, wpo_weights
from exo_toy.losses.pairwise import dpo_loss, exo_pref_loss
from exo_toy.losses.ranked import fpo_loss, jensen_shannon, nca_rw_loss, plackett_luce_loss
from exo_toy.losses.ratios import PreferenceLoss, UnpairedLoss
from exo_toy.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from exo_toy.losses.rewarded import dro_loss, rebel_loss, rpo_kl_loss, rpo_squared_loss
from exo_toy.losses.squared import cal_dpo_loss, ipo_loss, sppo_loss
from exo_toy.losses.table import LOSSES, LossRecord

__all__ = [
    "LOSSES",
    "LossRecord",
    "PreferenceLoss",
    "UnpairedLoss",
    "alpha_rw_loss",
    "alpha_score",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "bco_pair_loss",
    "bco_shift",
    "cal_dpo_loss",
    "chi_po_loss",
    "chi_po_score",
    "cpo_loss",
    "discopop_loss",
    "dpo_loss",
    "dpo_rw_loss",
    "dpop_loss",
    "dro_loss",
    "exo_pref_loss",
    "exo_rw_loss",
    "f_dpo_loss",
    "fpo_loss",
    "hinge_loss",
    "ipo_loss",
    "jensen_shannon",
    "jensen_shannon_score",
    "kto_loss",
    "kto_reference_point",
    "length_desensitized",
    "length_normalized",
    "nca_pair_loss",
    "nca_rw_loss",
    "orpo_loss",
    "plackett_luce_loss",
    "rebel_loss",
    "robust",
    "robust_dpo_loss",
    "rpo_kl_loss",
    "rpo_squared_loss",
    "scored",
    "simpo_loss",
    "smoothed",
    "sppo_loss",
    "wpo_weights",
]
