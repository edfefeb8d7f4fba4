"""RMS norm and LayerNorm, alone and after a residual add.

    y[t, d] = x[t, d] * weight[d] / sqrt(mean over d of x[t, d]^2 + eps)
    y[t, d] = (x[t, d] - m) * weight[d] / sqrt(mean over d of (x[t, d] - m)^2 + eps) + bias[d],  m the mean of x[t]

x, y [T, D] bf16, fp16 or fp32; weight [D] any float.  Squares, their mean and the product are float32; one rounding.
Zhang, Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467;
Ba et al. 2016, "Layer Normalization", arXiv:1607.06450.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vserve.kernels.early import await_inputs, options


@triton.jit
def _norm(
    x_ptr,  # [T, D], rows x_stride apart
    residual_ptr,  # [T, D], rows residual_stride apart; with HAS_RESIDUAL read and replaced by the sum
    weight_ptr,  # [D]
    bias_ptr,  # [D], read with IS_LAYER_NORM
    y_ptr,  # [T, D] contiguous
    x_stride,
    residual_stride,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    IS_LAYER_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < width
    x = tl.load(x_ptr + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        to = residual_ptr + row * residual_stride + d
        x += tl.load(to, mask=inside, other=0.0).to(tl.float32)
        stored = x.to(residual_ptr.dtype.element_ty)
        tl.store(to, stored, mask=inside)
        # The norm is of the sum as it is stored: later layers must see the same numbers.
        x = stored.to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    if IS_LAYER_NORM:
        x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    y = x * scale * weight
    if IS_LAYER_NORM:
        y += tl.load(bias_ptr + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + d, y.to(y_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, early: bool = False) -> Tensor:
    """x [T, D] (unit stride along D), weight [D] -> a new [T, D] of x's dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, weight, None, y, eps, has_residual=False, early=early)
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, early: bool = False) -> Tensor:
    """x [T, D] (unit stride along D), weight and bias [D] -> a new [T, D] of x's dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, weight, bias, y, eps, has_residual=False, early=early)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, early: bool = False
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual), as add_rms_norm."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, bias, y, eps, has_residual=True, early=early)
    return y, residual


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, early: bool = False
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), [T, D] each; the sum, rounded before the norm, replaces residual."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, None, y, eps, has_residual=True, early=early)
    return y, residual


def _launch(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    eps: float,
    *,
    has_residual: bool,
    early: bool,
) -> None:
    rows, width = x.shape
    assert x.stride(1) == 1
    assert residual.stride(1) == 1
    if rows == 0:
        return
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))
    _norm[(rows,)](
        x,
        residual,
        weight,
        weight if bias is None else bias,
        y,
        x.stride(0),
        residual.stride(0),
        width,
        eps,
        has_residual,
        bias is not None,
        block,
        early,
        **options(warps, early),
    )
