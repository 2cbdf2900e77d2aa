"""The small trainers of the experiments, over spaces that can be enumerated.

* :func:`minimize`: an exact objective to a certified minimum;
* :func:`fine_tune`, :func:`draw_candidates`, :func:`label_pairs`, :func:`fit_reward`, :func:`align`: the stages of
  alignment from samples, with a loss over K candidates;
* :func:`ppo`: alignment by proximal policy optimisation, with fresh samples at every step;
* :func:`train`: a loss over K candidates that are drawn anew at every step.
"""

from exo_toy.training.exact import Optimum, minimize
from exo_toy.training.proximal import ppo, ppo_loss
from exo_toy.training.sampled import align, draw_candidates, fine_tune, fit_reward, label_pairs, train

__all__ = [
    "Optimum",
    "align",
    "draw_candidates",
    "fine_tune",
    "fit_reward",
    "label_pairs",
    "minimize",
    "ppo",
    "ppo_loss",
    "train",
]
