"""Keys and values as e4m3 numbers, a part of the kernels that write and read the cache.

    scale = max |x| / 448 over one head of one token, or one given for all, as bf16;   stored = e4m3(x / scale)

What is beyond 448 * scale becomes the largest number; a head that holds a NaN has a NaN for its scale.  The scales of
a layer are [num_blocks, Hk, block_size, 2] bf16, of the key and of the value: one word of 4 bytes for both, in the
order of the keys that a program reads.  e4m3: Micikevicius et al. 2022, arXiv:2209.05433.
"""

# ruff: noqa: SIM108
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vserve.kernels.reference import LARGEST_E4M3, LEAST_SCALE, MOST_SCALE

_LARGEST = tl.constexpr(LARGEST_E4M3)
_LEAST_SCALE = tl.constexpr(LEAST_SCALE)
_MOST_SCALE = tl.constexpr(MOST_SCALE)


@triton.jit
def scale_of(low, high, given, GIVEN: tl.constexpr):
    """The scale [heads] bf16 of the halves low, high [heads, n] float32 of each head."""
    most = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
    if GIVEN:
        scale = tl.zeros_like(most) + given
    else:
        scale = tl.minimum(tl.maximum(most / _LARGEST, _LEAST_SCALE), _MOST_SCALE)
    # The conversion to e4m3 need not keep a NaN, and max drops it.
    broken = tl.max(((low != low) | (high != high)).to(tl.int32), axis=1)
    return tl.where(broken > 0, float("nan"), scale).to(tl.bfloat16)


@triton.jit
def reduced(x, scale):
    """x [heads, n] float32 over scale [heads] bf16, within e4m3's range."""
    return tl.minimum(tl.maximum(x / scale.to(tl.float32)[:, None], -_LARGEST), _LARGEST)


@triton.jit
def key_scale(words):
    """float32, of the words as the cache has them."""
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def value_scale(words):
    """float32, of the words as the cache has them."""
    return (words & -65536).to(tl.float32, bitcast=True)


def words(scales: Tensor) -> Tensor:
    """scales [num_blocks, Hk, block_size, 2] bf16 as kernels read them: int32 [num_blocks, Hk, block_size, 1]."""
    assert scales.is_contiguous()
    return scales.view(torch.int32)
