"""Products of many rows in fp8: activations become e4m3 row by row, and the matrix units multiply e4m3 by e4m3.

    scale[m] = max over k of |v[m, k]| / 448, or one given for all rows (static);  q[m, k] = e4m3(v[m, k] / scale[m])
    v = x;  rms_norm(x, norm) ;  or silu(x[:, :F]) * x[:, F:]
    y[m, n] = scale[m] * w_scale[n] * sum over k of q[m, k] * w[n, k]  (+ bias[n]) (+ residual[m, n])

Fewer rows are read with their weights alone in e4m3: grouped.py.  e4m3: arXiv:2209.05433.
"""

# ruff: noqa: SIM108
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 448.0
"""The largest e4m3 number."""
_LARGEST = tl.constexpr(LARGEST)

_LEAST_SCALE = tl.constexpr(1e-12)
"""Of a row of zeros."""


@triton.jit
def _quantise_rows(
    x_ptr,  # [M, K] or gated [M, 2 K], rows x_stride apart
    norm_ptr,  # [K]
    given_ptr,  # [1] fp32
    q_ptr,  # [M, K] e4m3
    scale_ptr,  # [M] fp32
    x_stride,
    eps,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GATED: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < K
    v = tl.load(x_ptr + m * x_stride + k, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(v * v, axis=0) / K + eps)
        v = v * factor * tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x_ptr + m * x_stride + K + k, mask=mask, other=0.0).to(tl.float32)
        v = v / (1.0 + tl.exp(-v)) * up
    if GIVEN:
        scale = tl.load(given_ptr)
    else:
        scale = tl.maximum(tl.max(tl.abs(v), axis=0) / _LARGEST, _LEAST_SCALE)
    q = tl.minimum(tl.maximum(v / scale, -_LARGEST), _LARGEST)
    tl.store(q_ptr + m * K + k, q.to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + m, scale)


def quantise_rows(
    x: Tensor, *, norm: Tensor | None = None, eps: float = 0.0, gated: bool = False, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [M, K] (gated: [M, 2K]) -> its rows, normed or gated, as e4m3 [M, K], and the scale of each, fp32 [M, 1].

    scale fp32 [1]: given for all rows; numbers beyond its reach become the largest.
    """
    rows, width = x.shape[0], x.shape[1] // (2 if gated else 1)
    assert x.stride(1) == 1
    q = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _quantise_rows[(rows,)](
        x, x if norm is None else norm, scales if scale is None else scale, q, scales, x.stride(0), eps, width,
        norm is not None, gated, scale is not None, block, num_warps=4 if block <= 4096 else 8,
    )  # fmt: skip
    return q, scales


def multiply(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """q e4m3 [M, K] and weight e4m3 [N, K] with their scales fp32 [M, 1] and [1, N] -> [M, N] of dtype.

    K and N are multiples of 16.  Sums are float32's but for fp16 results, which pass through bf16.
    """
    y = torch._scaled_mm(
        q, weight.t(), scale_a=scale, scale_b=weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    if dtype != torch.bfloat16:
        y = y.to(dtype)
    return y if bias is None else y.add_(bias)
