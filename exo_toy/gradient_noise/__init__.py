r"""How noisy a sampled gradient is: its exact mean and the trace of its covariance. Nothing is sampled.

A sampled gradient g has mean E g and noise :math:`E\|g - E g\|^2`, the sum of the variances of its entries. On a space
that is enumerated both are exact: of one completion from the policy, as in REINFORCE and PPO; of K completions with
their own mean as a baseline; and of the losses on K candidates, EXO's and DPO's, whose weights are normalised by their
sums. The parameters enter through the scores :math:`s(y) = \nabla \log \pi_\theta(y)`, all in one vector of P numbers.
One prompt at a time; :func:`mean_of_independent` joins prompts. All in float64.
"""

from exo_toy.gradient_noise.dpo import dpo_rw_noise, dpo_rw_noises
from exo_toy.gradient_noise.exo import exo_rw_noise, exo_rw_noises
from exo_toy.gradient_noise.noise import Noise, mean_of_independent, per_sample_gradients, sample_noise
from exo_toy.gradient_noise.policy import Baseline, leave_one_out_noise, leave_one_out_noises, policy_gradient_noise

__all__ = [
    "Baseline",
    "Noise",
    "dpo_rw_noise",
    "dpo_rw_noises",
    "exo_rw_noise",
    "exo_rw_noises",
    "leave_one_out_noise",
    "leave_one_out_noises",
    "mean_of_independent",
    "per_sample_gradients",
    "policy_gradient_noise",
    "sample_noise",
]
