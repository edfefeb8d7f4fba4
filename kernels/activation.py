"""The functions of an MLP, alone and of a gate times the up projection, over both stacked in one tensor.

    y[t, f] = a(g) * u    with g = gate_up[t, f], u = gate_up[t, F + f];    alone: y[t, f] = a(x[t, f])
    silu(g) = g / (1 + exp(-g)),  relu(g) = max(g, 0),  gelu(g) = g * (1 + erf(g / sqrt(2))) / 2,
    gelu_tanh(g) = g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3))) / 2

gate_up [T, 2F], x and y [T, F], bf16, fp16 or fp32; computed in float32.  Shazeer 2020, "GLU Variants Improve
Transformer", arXiv:2002.05202; Hendrycks, Gimpel 2016, "Gaussian Error Linear Units", arXiv:1606.08415.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vserve.kernels.early import await_inputs, options

BLOCK = 1024
_KINDS = {"silu": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}


@triton.jit
def activated(x, KIND: tl.constexpr):
    """a(x) of float32 x; KIND as _KINDS has it."""
    if KIND == 0:
        y = x / (1.0 + tl.exp(-x))
    elif KIND == 1:
        y = tl.maximum(x, 0.0)
    elif KIND == 2:
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    else:
        # (1 + tanh(z)) / 2 is 1 / (1 + exp(-2 z)); 1.5957... is 2 sqrt(2 / pi)
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return y


@triton.jit
def _activate(
    x_ptr,  # [T, 2F] with GATED, else [T, F]; rows stride apart
    y_ptr,  # [T, F] contiguous
    stride,
    width,  # F
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < width
    y = activated(tl.load(x_ptr + row * stride + f, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        y *= tl.load(x_ptr + row * stride + width + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + f, y.to(y_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor, *, early: bool = False) -> Tensor:
    """gate_up [T, 2F] (unit stride along 2F) -> silu(first half) * second half, a new [T, F]."""
    return gated(gate_up, "silu", early=early)


def gated(gate_up: Tensor, activation: str, *, early: bool = False) -> Tensor:
    """gate_up [T, 2F] (unit stride along 2F) -> activation(first half) * second half, a new [T, F]."""
    return _launch(gate_up, gate_up.shape[1] // 2, activation, gated=True, early=early)


def activate(x: Tensor, activation: str, *, early: bool = False) -> Tensor:
    """x [T, F] (unit stride along F) -> activation(x), a new [T, F]."""
    return _launch(x, x.shape[1], activation, gated=False, early=early)


def _launch(x: Tensor, width: int, activation: str, *, gated: bool, early: bool) -> Tensor:
    rows = x.shape[0]
    assert x.stride(1) == 1
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        _activate[(rows, triton.cdiv(width, BLOCK))](
            x, y, x.stride(0), width, _KINDS[activation], gated, BLOCK, early, **options(4, early)
        )
    return y
