"""A few rows of activations times a weight matrix, read once: the linear layers of a small decode batch.

    y[m, n] = s(m) * sum over k of weight[n, k] * norm[k] * x[m, k]  (+ bias[n]) (+ residual[m, n])
    s(m)    = 1 / sqrt(mean over k of x[m, k]^2 + eps), or 1 without a norm
    gated: y[m, f] = silu(y'[m, f]) * y'[m, F + f],  y' the above over weight [2F, K]

x [M, K], 1 <= M <= MAX_ROWS; weight [N, K] contiguous; y [M, N] (gated: [M, F]); bf16, fp16 or fp32, accumulated in
float32.  The RMS norm costs no pass of its own: its scale leaves the sum, and the squares are added beside the product.

At these sizes the time is that of reading the weights.  One row of x (two, of a small weight): a program takes a weight
row or two, products in plain registers.  More: the rows of x are padded to 16, 32 or 64 and go through the matrix
units.  The weights are read once.  Launched early (early.py), the first weights are on their way while the kernel
waits: so weights must be older than the kernel ahead.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vserve.kernels.early import await_inputs, options

MAX_ROWS = 64
SMALL = 1 << 24
"""Numbers of a weight up to which two rows of x are better off without the matrix units."""

WIDE = 1 << 14
"""Outputs from which a program takes many: fewer would not keep the chip busy."""


class Shape(NamedTuple):
    """What one program reads at a time: rows x width of the weights; warps and pipeline stages."""

    rows: int
    width: int
    warps: int
    stages: int


@triton.jit
def _vector(
    x_ptr,  # [M, K], rows x_stride apart
    weight_ptr,  # [N, K], gated [2 F, K]
    norm_ptr,  # [K]
    bias_ptr,  # [N] or [2 F]
    residual_ptr,  # [M, N] contiguous
    y_ptr,  # [M, N] or [M, F] contiguous
    num_out,  # N, gated F
    x_stride,
    eps,
    M: tl.constexpr,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    # Past the last row read the last one again: cheaper than a mask on every load, and never stored.
    row = tl.minimum(n, num_out - 1).to(tl.int64)[:, None] * K
    other = row + num_out.to(tl.int64) * K
    EVEN: tl.constexpr = K % BLOCK_K == 0
    LAST: tl.constexpr = (K - 1) // BLOCK_K * BLOCK_K
    w = _weights(weight_ptr + row, k, K, EVEN)
    v = w
    if GATED:
        v = _weights(weight_ptr + other, k, K, EVEN)
    await_inputs(EARLY)
    first = ()
    second = ()
    squares = ()
    for _ in tl.static_range(M):
        first = first + (tl.zeros([ROWS, BLOCK_K], tl.float32),)
        second = second + (tl.zeros([ROWS, BLOCK_K], tl.float32),)
        squares = squares + (tl.zeros([BLOCK_K], tl.float32),)
    for start in range(0, LAST, BLOCK_K):
        # The next weights are asked for before the present ones are used.
        w_next = _weights(weight_ptr + row, start + BLOCK_K + k, K, EVEN)
        v_next = w_next
        if GATED:
            v_next = _weights(weight_ptr + other, start + BLOCK_K + k, K, EVEN)
        first, second, squares = _add_products(
            x_ptr, norm_ptr, x_stride, start + k, w, v, first, second, squares, M, K, HAS_NORM, GATED, True
        )
        w = w_next
        v = v_next
    first, second, squares = _add_products(
        x_ptr, norm_ptr, x_stride, LAST + k, w, v, first, second, squares, M, K, HAS_NORM, GATED, EVEN
    )
    valid = n < num_out
    for m in tl.static_range(M):
        y = tl.sum(first[m], axis=1)
        up = y
        if GATED:
            up = tl.sum(second[m], axis=1)
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(squares[m], axis=0) / K + eps)
            y *= scale
            up *= scale
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=valid, other=0.0).to(tl.float32)
        if GATED:
            if HAS_BIAS:
                up += tl.load(bias_ptr + num_out + n, mask=valid, other=0.0).to(tl.float32)
            y = y / (1.0 + tl.exp(-y)) * up
        if HAS_RESIDUAL:
            y += tl.load(residual_ptr + m * num_out + n, mask=valid, other=0.0).to(tl.float32)
        tl.store(y_ptr + m * num_out + n, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _add_products(
    x_ptr, norm_ptr, x_stride, k, w, v, first, second, squares,
    M: tl.constexpr, K: tl.constexpr, HAS_NORM: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # Adds w and v [ROWS, BLOCK_K] times each row of x at k [BLOCK_K] to the sums, one of M each
    if HAS_NORM:
        norm = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    sums = ()
    gated_sums = ()
    square_sums = ()
    for m in tl.static_range(M):
        if EVEN:
            x = tl.load(x_ptr + m * x_stride + k).to(tl.float32)
        else:
            x = tl.load(x_ptr + m * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        square = squares[m]
        if HAS_NORM:
            square += x * x
            x *= norm
        total = second[m]
        if GATED:
            total += v.to(tl.float32) * x[None, :]
        sums = sums + (first[m] + w.to(tl.float32) * x[None, :],)
        gated_sums = gated_sums + (total,)
        square_sums = square_sums + (square,)
    return sums, gated_sums, square_sums


@triton.jit
def _weights(row_ptr, k, K: tl.constexpr, EVEN: tl.constexpr):
    # row_ptr [ROWS, 1] -> [ROWS, BLOCK_K]; read once: first to leave the cache
    if EVEN:
        return tl.load(row_ptr + k[None, :], eviction_policy="evict_first")
    return tl.load(row_ptr + k[None, :], mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _matrix(
    x_ptr,  # [M, K], rows x_stride apart
    weight_ptr,  # [N, K], gated [2 F, K]
    norm_ptr,  # [K]
    bias_ptr,  # [N] or [2 F]
    residual_ptr,  # [M, N] contiguous
    y_ptr,  # [M, N] or [M, F] contiguous
    num_rows,  # M
    num_out,  # N, gated F
    x_stride,
    eps,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    row = tl.minimum(n, num_out - 1).to(tl.int64)[:, None] * K
    other = row + num_out.to(tl.int64) * K
    EVEN: tl.constexpr = K % BLOCK_K == 0
    await_inputs(EARLY)
    first = tl.zeros([BLOCK_M, ROWS], tl.float32)
    second = tl.zeros([BLOCK_M, ROWS], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        at = start + k
        mask = (m < num_rows)[:, None] & (at < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_stride + at[None, :], mask=mask, other=0.0)
        if HAS_NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            norm = tl.load(norm_ptr + at, mask=at < K, other=0.0).to(tl.float32)
            x = (wide * norm[None, :]).to(x.dtype)
        w = _weights(weight_ptr + row, at, K, EVEN)
        first = tl.dot(x, tl.trans(w), first, input_precision="ieee")
        if GATED:
            v = _weights(weight_ptr + other, at, K, EVEN)
            second = tl.dot(x, tl.trans(v), second, input_precision="ieee")
    scale = tl.rsqrt(squares / K + eps)[:, None]
    valid = (m < num_rows)[:, None] & (n < num_out)[None, :]
    y = first
    if HAS_NORM:
        y *= scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < num_out, other=0.0).to(tl.float32)[None, :]
    if GATED:
        up = second
        if HAS_NORM:
            up *= scale
        if HAS_BIAS:
            up += tl.load(bias_ptr + num_out + n, mask=n < num_out, other=0.0).to(tl.float32)[None, :]
        y = y / (1.0 + tl.exp(-y)) * up
    to = m.to(tl.int64)[:, None] * num_out + n[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + to, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), mask=valid)


def gemv(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    early: bool = False,
    shape: Shape | None = None,
) -> Tensor:
    """x [M, K] times weight [N, K], with what is given of norm [K], bias [N], residual [M, N] -> a new [M, N].

    1 <= M <= MAX_ROWS.  shape overrides the measured choice.
    """
    return _launch(x, weight, norm, eps, bias, residual, gated=False, early=early, shape=shape)


def gated_gemv(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    early: bool = False,
    shape: Shape | None = None,
) -> Tensor:
    """silu(gate) * up -> a new [M, F], for gate and up stacked in weight [2F, K]; the rest as in gemv."""
    return _launch(x, weight, norm, eps, bias, None, gated=True, early=early, shape=shape)


def _launch(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    eps: float,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    gated: bool,
    early: bool,
    shape: Shape | None,
) -> Tensor:
    rows, width = x.shape
    assert 1 <= rows <= MAX_ROWS
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert weight.shape[1] == width
    num_out = weight.shape[0] // (2 if gated else 1)
    y = torch.empty((rows, num_out), dtype=x.dtype, device=x.device)
    assert residual is None or (residual.is_contiguous() and residual.shape == y.shape)
    vector = on_vectors(rows, weight.shape[0], width)
    if shape is None:
        shape = _shape(rows, weight, gated=gated, vector=vector)
    flags = (norm is not None, bias is not None, residual is not None, gated)
    norm = x if norm is None else norm
    bias = x if bias is None else bias
    residual = x if residual is None else residual
    grid = (triton.cdiv(num_out, shape.rows),)
    if vector:
        _vector[grid](
            x, weight, norm, bias, residual, y, num_out, x.stride(0), eps, rows, width, *flags, shape.rows, shape.width,
            early, **options(shape.warps, early),
        )  # fmt: skip
    else:
        _matrix[grid](
            x, weight, norm, bias, residual, y, rows, num_out, x.stride(0), eps, width, *flags,
            padded(rows), shape.rows, shape.width, shape.stages, early,
            **options(shape.warps, early),
        )  # fmt: skip
    return y


def on_vectors(rows: int, num_out: int, width: int) -> bool:
    """True where plain products beat the matrix units, for x [rows, K] and weight [N, K]: there a norm is free too."""
    return rows == 1 or (rows == 2 and num_out * width <= SMALL)


def vector_shape(rows: int, num_out: int, width: int) -> Shape:
    """The shape of the work on vectors for weight [N, K], as measured on an H100."""
    if rows == 2:
        return Shape(2 if num_out * width < SMALL else 1, min(1024, triton.next_power_of_2(width)), 4, 1)
    if width <= 1024:
        return Shape(2, 128, 1, 1) if num_out > 16384 else Shape(2, triton.next_power_of_2(width), 4, 1)
    return Shape(1, 1024, 4, 1)


def padded(rows: int) -> int:
    """Rows of x as the matrix units take them."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def _shape(rows: int, weight: Tensor, *, gated: bool, vector: bool) -> Shape:
    num_out, width = weight.shape
    if vector:
        return vector_shape(rows, num_out, width)
    if rows > 16 and weight.element_size() > 2:
        return Shape(16, 128, 4, 2)  # the others would not fit a multiprocessor's memory
    shape = matrix_shape(rows, num_out, width, gated=gated)
    if gated and weight.element_size() > 2:
        return shape._replace(stages=min(shape.stages, 3))  # for the same reason
    return shape


def matrix_shape(rows: int, num_out: int, width: int, *, gated: bool) -> Shape:
    """The shape of the work on the matrix units for x [M, K] and a weight [N, K], as measured on an H100."""
    if width <= 1024:
        return Shape(16, 128, 1, 6)
    if rows <= 16:
        return Shape(16, 256, 2, 4) if width < 2048 else Shape(32, 256, 4, 4)
    if num_out >= WIDE:
        return Shape(128, 128, 4, 4) if num_out >= 4 * WIDE and not gated else Shape(64, 128, 4, 4)
    return Shape(32 if num_out > 2048 else 16, 256, 4, 4 if rows <= 32 else 3)
