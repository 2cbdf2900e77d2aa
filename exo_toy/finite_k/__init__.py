"""Expected K-candidate losses, exact at every K from 1 to 2^30 and beyond, and their 1/K coefficients.

K candidates are drawn i.i.d. from the reference, or from another proposal with their weights corrected; repeats
allowed. Nothing is enumerated over tuples and nothing is sampled: :mod:`exo_toy.laplace` turns each expectation into a
one-dimensional integral, and :mod:`exo_toy.laplace_pairs` that of an alpha-divergence into a two-dimensional one.
Float64; differentiable any number of times by autograd (not by torch.func) with respect to the policy, the reference
and the proposal (as tables that stay normalised, so from their logits) and the reward. Not in the paper, whose
statements are about K tending to infinity.
"""

from exo_toy.finite_k.alpha import expected_alpha_rw_loss
from exo_toy.finite_k.coefficients import dpo_rw_bias_coefficient, exo_rw_bias_coefficient
from exo_toy.finite_k.expectations import expected_dpo_rw_loss, expected_exo_rw_loss

__all__ = [
    "dpo_rw_bias_coefficient",
    "exo_rw_bias_coefficient",
    "expected_alpha_rw_loss",
    "expected_dpo_rw_loss",
    "expected_exo_rw_loss",
]
