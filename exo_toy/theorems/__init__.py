"""One function per theorem: both sides, computed independently of each other, and what the theorem assumes.

No function enforces its assumptions: break one and the sides part, which is how the tests know that they can. Where a
theorem speaks of a parameter theta, ``policy`` is any module with ``log_probs()`` [X, N]; the gradient is flattened
over its parameters. Over prompts everything is averaged. All is exact, in float64.
"""

from exo_toy.theorems.identities import (
    generalized_gradient_identity,
    generalized_objective_identity,
    objective_identity,
    optimum_equivalence,
    tabular_gradients,
)
from exo_toy.theorems.limits import (
    dpo_rw_bias_rate,
    dpo_rw_gradient_limit,
    exo_rw_bias_rate,
    exo_rw_gradient_at_reference,
    exo_rw_gradient_limit,
)
from exo_toy.theorems.samples import (
    dpo_bradley_terry_identity,
    dpo_rw_sample_gradient,
    exo_rw_sample_gradient,
    group_baseline_gradient,
)
from exo_toy.theorems.theorem import Theorem, parameter_gradient

__all__ = [
    "Theorem",
    "dpo_bradley_terry_identity",
    "dpo_rw_bias_rate",
    "dpo_rw_gradient_limit",
    "dpo_rw_sample_gradient",
    "exo_rw_bias_rate",
    "exo_rw_gradient_at_reference",
    "exo_rw_gradient_limit",
    "exo_rw_sample_gradient",
    "generalized_gradient_identity",
    "generalized_objective_identity",
    "group_baseline_gradient",
    "objective_identity",
    "optimum_equivalence",
    "parameter_gradient",
    "tabular_gradients",
]
