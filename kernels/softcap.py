"""The soft cap of attention scores, a part of the attention kernels.

    y = c * tanh(s / c)

Scores come and go in units of log2(e): the kernels use exp2.  Bello et al. 2016, arXiv:1611.09940, section 5.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def capped(scores, cap):
    """scores, any shape, float32, times log2(e); cap > 0, as the model has it."""
    # tanh(x) = 1 - 2 / (exp(2 x) + 1): right at both ends, where exp2 gives infinity or 0.  1.4426950... is log2(e).
    return cap * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp2(scores * (2.0 / cap)) + 1.0))
