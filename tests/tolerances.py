"""How close is equal: one table by dtype, with its reasons.

``rtol`` bounds the error relative to the result. ``atol`` bounds what cancellation leaves, per unit of the largest
number that entered the computation (``scale``): a difference of two numbers of size 300 is known to 300 units of atol.

* float64: "exact" means 1e-12. Rounding is 1.1e-16 per operation; sums of some tens of terms, each a few operations
  from its input, stay below 1e-13.
* float32: rounding is 6e-8; the same sums give 1e-6 (atol), and log-softmax of scaled inputs 1e-5 (rtol).
* float16, bfloat16: computed in float32 (hence its atol) and rounded once, by 2**-11 or 2**-8; rtol is twice that.
  float16 cannot hold a step below 6e-8, well under atol.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Relative, and absolute per unit of scale."""

    rtol: float
    atol: float


TOLERANCES = {
    torch.float64: Tolerance(rtol=1e-12, atol=1e-12),
    torch.float32: Tolerance(rtol=1e-5, atol=1e-6),
    torch.float16: Tolerance(rtol=2**-10, atol=1e-6),
    torch.bfloat16: Tolerance(rtol=2**-7, atol=1e-6),
}


def assert_close(
    actual: Tensor, expected: Tensor | list[float] | list[list[float]] | float, *, scale: float = 1.0
) -> None:
    """``actual`` equals ``expected`` within the tolerance of actual's dtype; infinities and NaN stand at one place.

    ``expected`` may be of a wider dtype; it is compared as it is, but for overflow: what actual's dtype cannot hold is
    expected to be infinite.
    """
    tolerance = TOLERANCES[actual.dtype]
    wanted = torch.as_tensor(expected, dtype=torch.float64, device=actual.device).detach()
    overflown = wanted.to(actual.dtype).isinf()
    wanted = torch.where(overflown, wanted.to(actual.dtype).double(), wanted)
    atol = tolerance.atol * max(1.0, scale)
    torch.testing.assert_close(actual.detach().double(), wanted, rtol=tolerance.rtol, atol=atol, equal_nan=True)
