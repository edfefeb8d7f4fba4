"""A few rows of activations times a weight matrix, read once: the linear layers of a small decode batch.

    y[m, n] = s(m) * sum over k of weight[n, k] * norm[k] * x[m, k]  (+ bias[n]) (+ residual[m, n])
    s(m)    = 1 / sqrt(mean over k of x[m, k]^2 + eps), or 1 without a norm
    gated: y[m, f] = silu(y'[m, f]) * y'[m, F + f],  y' the above over weight [2F, K]

x [M, K], 1 <= M <= MAX_ROWS; weight [N, K] contiguous; y [M, N] (gated: [M, F]); bf16, fp16 or fp32, accumulated in
float32.  The RMS norm costs no pass of its own: its scale leaves the sum, and the squares are added beside the product,
or, where the matrix units multiply, by the product that made x (``gemv_then_norm``), with the norm's weights.

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
from vserve.kernels.gemv_shapes import Shape, matrix_shape, on_vectors, padded, vector_shape

MAX_ROWS = 64


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
    for m in tl.static_range(M):
        y = tl.sum(first[m], axis=1)
        up = y
        if GATED:
            up = tl.sum(second[m], axis=1)
        finish_row(
            y, up, tl.sum(squares[m], axis=0), n, num_out, eps, bias_ptr, residual_ptr + m * num_out,
            y_ptr + m * num_out, K, HAS_NORM, HAS_BIAS, HAS_RESIDUAL, GATED,
        )  # fmt: skip


@triton.jit
def finish_row(
    y, up, squares, n, num_out, eps, bias_ptr, residual_ptr, y_ptr, K: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    # sums y (and up) [ROWS] -> y_ptr, with norm, bias, gate and residual
    valid = n < num_out
    if HAS_NORM:
        factor = tl.rsqrt(squares / K + eps)
        y *= factor
        up *= factor
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=valid, other=0.0).to(tl.float32)
    if GATED:
        if HAS_BIAS:
            up += tl.load(bias_ptr + num_out + n, mask=valid, other=0.0).to(tl.float32)
        y = y / (1.0 + tl.exp(-y)) * up
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + n, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=valid)


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
def _rows(x_ptr, x_stride, m, k, num_rows, K: tl.constexpr):
    # -> [BLOCK_M, BLOCK_K], zeros past the last row
    mask = (m < num_rows)[:, None] & (k < K)[None, :]
    return tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0.0)


@triton.jit
def _matrix(
    x_ptr,  # [M, K], rows x_stride apart
    weight_ptr,  # [N, K], gated [2 F, K]
    norm_ptr,  # [K]
    parts_ptr,  # [M, P] float32, read with HAS_PARTS
    bias_ptr,  # [N] or [2 F]
    residual_ptr,  # [M, N] contiguous
    y_ptr,  # [M, N] or [M, F] contiguous
    next_norm_ptr,  # [N], read with FOLLOWED
    next_ptr,  # [M, N] contiguous, written with FOLLOWED
    next_parts_ptr,  # [M, programs] float32, written with FOLLOWED
    num_rows,  # M
    num_out,  # N, gated F
    num_parts,  # P
    x_stride,
    eps,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    FOLLOWED: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,  # 0 with HAS_NORM
    EARLY: tl.constexpr,
):
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    row = tl.minimum(n, num_out - 1).to(tl.int64)[:, None] * K
    other = row + num_out.to(tl.int64) * K
    EVEN: tl.constexpr = K % BLOCK_K == 0
    # Kept in registers until the end, so that the loop's first loads follow the wait at once.
    w_ahead = ()
    v_ahead = ()
    for i in tl.static_range(AHEAD):
        w_ahead = w_ahead + (_weights(weight_ptr + row, i * BLOCK_K + k, K, EVEN),)
        if GATED:
            v_ahead = v_ahead + (_weights(weight_ptr + other, i * BLOCK_K + k, K, EVEN),)
    await_inputs(EARLY)
    x_ahead = ()
    for i in tl.static_range(AHEAD):
        x_ahead = x_ahead + (_rows(x_ptr, x_stride, m, i * BLOCK_K + k, num_rows, K),)
    first = tl.zeros([BLOCK_M, ROWS], tl.float32)
    second = tl.zeros([BLOCK_M, ROWS], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    if HAS_PARTS:
        p = tl.arange(0, BLOCK_PARTS)
        mask = (m < num_rows)[:, None] & (p < num_parts)[None, :]
        squares = tl.sum(tl.load(parts_ptr + m[:, None] * num_parts + p[None, :], mask=mask, other=0.0), axis=1)
    for start in tl.range(AHEAD * BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        at = start + k
        x = _rows(x_ptr, x_stride, m, at, num_rows, K)
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
    for i in tl.static_range(AHEAD):
        first = tl.dot(x_ahead[i], tl.trans(w_ahead[i]), first, input_precision="ieee")
        if GATED:
            second = tl.dot(x_ahead[i], tl.trans(v_ahead[i]), second, input_precision="ieee")
    scale = tl.rsqrt(squares / K + eps)[:, None]
    valid = (m < num_rows)[:, None] & (n < num_out)[None, :]
    y = first
    if HAS_NORM or HAS_PARTS:
        y *= scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < num_out, other=0.0).to(tl.float32)[None, :]
    if GATED:
        up = second
        if HAS_NORM or HAS_PARTS:
            up *= scale
        if HAS_BIAS:
            up += tl.load(bias_ptr + num_out + n, mask=n < num_out, other=0.0).to(tl.float32)[None, :]
        y = y / (1.0 + tl.exp(-y)) * up
    to = m.to(tl.int64)[:, None] * num_out + n[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + to, mask=valid, other=0.0).to(tl.float32)
    stored = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + to, stored, mask=valid)
    if FOLLOWED:
        # The norm is of the sum as it is stored: later layers must see the same numbers.
        wide = tl.where(valid, stored.to(tl.float32), 0.0)
        norm = tl.load(next_norm_ptr + n, mask=n < num_out, other=0.0).to(tl.float32)
        tl.store(next_ptr + to, (wide * norm[None, :]).to(next_ptr.dtype.element_ty), mask=valid)
        place = next_parts_ptr + m * tl.num_programs(0) + tl.program_id(0)
        tl.store(place, tl.sum(wide * wide, axis=1), mask=m < num_rows)


class Normed(NamedTuple):
    """rms_norm(y) but for its scale, a number for each row: the next product applies that to its sums.

    x [M, K]: y times the norm's weights.  parts [M, P] float32: they add up to the sum of a row's squares of y.
    """

    x: Tensor
    parts: Tensor


def gemv(
    x: Tensor | Normed,
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

    1 <= M <= MAX_ROWS.  x may be what ``gemv_then_norm`` made, for M that is not on_vectors; eps is its norm's then.
    shape overrides the measured choice.
    """
    return _launch(x, weight, norm, eps, bias, residual, None, gated=False, early=early, shape=shape)[0]


def gemv_then_norm(
    x: Tensor | Normed,
    weight: Tensor,
    next_norm: Tensor,
    *,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    early: bool = False,
    shape: Shape | None = None,
) -> tuple[Tensor, Normed]:
    """gemv's [M, N] and, for the product behind the norm of weight next_norm [N], what spares it that norm.

    For M that is not on_vectors.  Its x is not scaled yet: float16, whose range is short, may overflow where a norm's
    result would not.
    """
    y, normed = _launch(x, weight, None, eps, bias, residual, next_norm, gated=False, early=early, shape=shape)
    assert normed is not None
    return y, normed


def gated_gemv(
    x: Tensor | Normed,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    early: bool = False,
    shape: Shape | None = None,
) -> Tensor:
    """silu(gate) * up -> a new [M, F], for gate and up stacked in weight [2F, K]; the rest as in gemv."""
    return _launch(x, weight, norm, eps, bias, None, None, gated=True, early=early, shape=shape)[0]


def _launch(
    given: Tensor | Normed,
    weight: Tensor,
    norm: Tensor | None,
    eps: float,
    bias: Tensor | None,
    residual: Tensor | None,
    next_norm: Tensor | None,
    *,
    gated: bool,
    early: bool,
    shape: Shape | None,
) -> tuple[Tensor, Normed | None]:
    x, parts = given if isinstance(given, Normed) else (given, None)
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
    programs = triton.cdiv(num_out, shape.rows)
    tail = (bias is not None, residual is not None)
    bias = x if bias is None else bias
    residual = x if residual is None else residual
    if vector:
        assert parts is None
        assert next_norm is None
        _vector[(programs,)](
            x, weight, x if norm is None else norm, bias, residual, y, num_out, x.stride(0), eps, rows, width,
            norm is not None, *tail, gated, shape.rows, shape.width, early, **options(shape.warps, early),
        )  # fmt: skip
        return y, None
    normed = None
    if next_norm is not None:
        made = torch.empty((rows, programs), dtype=torch.float32, device=x.device)
        normed = Normed(torch.empty_like(y), made)
    num_parts = 1 if parts is None else parts.shape[1]
    ahead = 0 if norm is not None else min(shape.ahead, width // shape.width)
    _matrix[(programs,)](
        x, weight, x if norm is None else norm, x if parts is None else parts, bias, residual, y,
        x if next_norm is None else next_norm, *((y, y) if normed is None else normed), rows, num_out, num_parts,
        x.stride(0), eps, width, norm is not None, parts is not None, *tail, next_norm is not None, gated,
        padded(rows), triton.next_power_of_2(num_parts), shape.rows, shape.width, shape.stages, ahead, early,
        **options(shape.warps, early),
    )  # fmt: skip
    return y, normed


def _shape(rows: int, weight: Tensor, *, gated: bool, vector: bool) -> Shape:
    num_out, width = weight.shape
    if vector:
        return vector_shape(rows, num_out, width)
    if rows > 16 and weight.element_size() > 2:
        return Shape(16, 128, 4, 2)  # the others would not fit a multiprocessor's memory
    shape = matrix_shape(rows, num_out, width, gated=gated)
    return shape._replace(width=shape.width // 2) if weight.element_size() > 2 else shape  # for the same reason
