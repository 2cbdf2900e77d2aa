"""exo_toy: every claim of "Towards Efficient Exact Optimization of Language Model Alignment", checkable.

Import the module you need, for example ``from exo_toy.losses import exo_rw_loss``;
``import exo_toy`` itself loads nothing else.

Source: Ji et al., ICML 2024, arXiv:2402.00856.
"""

__version__ = "0.1.0"
