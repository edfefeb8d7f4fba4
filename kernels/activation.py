"""SiLU of the gate times the up projection, over both stacked in one tensor.

    y[t, f] = g / (1 + exp(-g)) * u    with g = gate_up[t, f], u = gate_up[t, F + f]

gate_up [T, 2F], y [T, F], bf16, fp16 or fp32; computed in float32.  Shazeer 2020, "GLU Variants Improve Transformer",
arXiv:2002.05202.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vserve.kernels.early import await_inputs, options

BLOCK = 1024


@triton.jit
def _silu_mul(
    gate_up_ptr,  # [T, 2F], rows stride apart
    y_ptr,  # [T, F] contiguous
    stride,
    width,  # F
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < width
    gate = tl.load(gate_up_ptr + row * stride + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + width + f, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * width + f, y.to(y_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor, *, early: bool = False) -> Tensor:
    """gate_up [T, 2F] (unit stride along 2F) -> silu(first half) * second half, a new [T, F]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    y = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _silu_mul[(rows, triton.cdiv(width, BLOCK))](
            gate_up, y, gate_up.stride(0), width, BLOCK, early, **options(4, early)
        )
    return y
