"""Log-probabilities of tokens, from hidden states or logits, and what preference losses need of them.

Each name is documented in the module that defines it. Triton is imported only where it is used.
"""

from exo_toy.kernels.linear import linear_logps
from exo_toy.kernels.selective import selective_logps
from exo_toy.kernels.sequences import candidate_log_ratios, sequence_logps

__all__ = ["candidate_log_ratios", "linear_logps", "selective_logps", "sequence_logps"]
