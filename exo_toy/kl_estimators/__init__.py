r"""What the gradient of a sampled KL penalty is in expectation: the true one, another one, or none.

With :math:`\ell = \log \pi - \log \pi_{ref}` at a completion, k1, k2 and k3 below all estimate KL(pi||pi_ref) near the
reference. A trainer makes a gradient of them in one of three ways (:class:`Recipe`), and an estimator that has the
right value need not have the right gradient. :func:`kl_surrogate` is what the trainer differentiates, for sampled
completions; :func:`expected_kl_surrogate` sums it over all completions, so that its gradient is the exact expectation.
:func:`closed_form` says what that gradient is, :func:`compare` measures it against both divergences'.

Source: Tang and Munos, arXiv:2506.09477, for sequences; the estimators are Schulman's, Approximating KL divergence,
2020. The closed forms off-policy and by token are not in the paper.
"""

from exo_toy.kl_estimators.closed_forms import (
    FROM_REF,
    TO_REF,
    TOLERANCE,
    Comparison,
    closed_form,
    compare,
    divergence_terms,
)
from exo_toy.kl_estimators.sampled import ESTIMATORS, Recipe, k1, k2, k3, kl_surrogate
from exo_toy.kl_estimators.tables import expected_kl_surrogate, score_coefficients, token_log_probs

__all__ = [
    "ESTIMATORS",
    "FROM_REF",
    "TOLERANCE",
    "TO_REF",
    "Comparison",
    "Recipe",
    "closed_form",
    "compare",
    "divergence_terms",
    "expected_kl_surrogate",
    "k1",
    "k2",
    "k3",
    "kl_surrogate",
    "score_coefficients",
    "token_log_probs",
]
