"""Preference losses on log ratios and log-probabilities of candidates: per example, no reduction.

Nothing here knows a sequence space, a policy or a model; torch is all it needs, besides jaxtyping for the
annotations. Shapes: B examples, K candidates. Log-probabilities are sums over the tokens of a completion, in nats.

* :func:`exo_rw_loss`, :func:`dpo_rw_loss`, :func:`alpha_rw_loss` between them: K candidates with rewards.
* :func:`exo_pref_loss`, :func:`dpo_loss`: chosen and rejected pairs.
"""

from exo_toy.losses.alpha import alpha_rw_loss
from exo_toy.losses.listwise import dpo_rw_loss, exo_rw_loss
from exo_toy.losses.pairwise import PreferenceLoss, dpo_loss, exo_pref_loss

__all__ = ["PreferenceLoss", "alpha_rw_loss", "dpo_loss", "dpo_rw_loss", "exo_pref_loss", "exo_rw_loss"]
