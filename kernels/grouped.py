"""Products with weights of 4 or 8 bits, which become numbers in registers: W4A16, W8A16 and fp8 weights.

    y[m, n] = s(m) * sum over k of w[n, k] * norm[k] * x[m, k]  (+ bias[n]) (+ residual[m, n])
    s(m)    = 1 / sqrt(mean over k of x[m, k]^2 + eps), or 1 without a norm;  w as packed.py says
    gated: y[0, f] = silu(y'[0, f]) * y'[0, F + f],  y' the above over weights [2F, K]

x [M, K], y [M, N] (gated: [M, F]) bf16, fp16 or fp32, accumulated in float32.

One row of x runs in grouped_row.py or, on a GPU, grouped_words.py; norm and gate belong to these only.  More rows go
through the matrix units, grouped_matrix.py.  How the work is cut into programs is measured: grouped_shapes.py.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vserve.kernels import grouped_matrix, grouped_row, grouped_words
from vserve.kernels.early import options
from vserve.kernels.grouped_shapes import Shape, measured
from vserve.kernels.packed import Form, Packed

MOST_ROWS = {4: 512, 8: 128}
"""Bits of integers -> rows of x above which it is cheaper to write the weights out and leave the product to cuBLAS."""

_SINGLE = {"rows": 32, "width": 64, "warps": 4, "stages": 2}
"""Of a shape with fp32 x: what was measured for halves would not fit a multiprocessor's memory."""


def linear(
    x: Tensor,
    weight: Packed,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    early: bool = False,
    shape: Shape | None = None,
) -> Tensor:
    """x [M, K] times weight, with what is given of norm [K], bias [N], residual [M, N] -> a new [M, N].

    A norm is for one row only.  shape overrides the measured choice.
    """
    if x.shape[0] == 1:
        return _one_row(x, weight, norm, eps, bias, residual, gated=False, early=early, shape=shape)
    assert norm is None
    return _rows(x, weight, bias, residual, shape)


def gated_row(
    x: Tensor,
    weight: Packed,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    early: bool = False,
    shape: Shape | None = None,
) -> Tensor:
    """silu(gate) * up -> a new [1, F], for gate and up stacked in weight [2F, K] and one row x [1, K]."""
    return _one_row(x, weight, norm, eps, bias, None, gated=True, early=early, shape=shape)


def write_out(weight: Packed, dtype: torch.dtype) -> Tensor:
    """The weights as a new [N, K] of dtype, rounded once from fp32."""
    out = torch.empty((weight.outputs, weight.inputs), dtype=dtype, device=weight.data.device)
    rows, width = 16, 256
    grouped_matrix.write_out[(triton.cdiv(weight.outputs, rows), triton.cdiv(weight.inputs, width))](
        _elements(weight), weight.numbers, out, weight.outputs, weight.inputs, weight.group, weight.bits,
        int(weight.form), weight.centre, rows, width, num_warps=4,
    )  # fmt: skip
    return out


def _one_row(
    x: Tensor,
    weight: Packed,
    norm: Tensor | None,
    eps: float,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    gated: bool,
    early: bool,
    shape: Shape | None,
) -> Tensor:
    assert x.shape == (1, weight.inputs)
    assert x.stride(1) == 1
    outputs = weight.outputs // (2 if gated else 1)
    y = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    assert residual is None or (residual.is_contiguous() and residual.shape == y.shape)
    shape = measured(_kind(weight), 1, weight.outputs, weight.inputs) if shape is None else shape
    grid = (triton.cdiv(outputs, shape.rows),)
    ends = (x if bias is None else bias, x if residual is None else residual, y, outputs, weight.outputs, eps)
    about = (weight.inputs, weight.group, weight.bits, int(weight.form), weight.centre)
    flags = (norm is not None, bias is not None, residual is not None, gated, shape.rows, shape.width, early)
    if has_asm(x):
        several = torch.int32 if weight.bits == 4 else torch.int64  # two or four numbers
        inputs, norms = x.view(several), (x if norm is None else norm).view(several)
        grouped_words.words[grid](
            inputs, weight.data.view(torch.int32), weight.numbers, norms, *ends, *about, *flags,
            *grouped_words.code(_kind(weight), x.dtype, norm is not None), **options(shape.warps, early),
        )  # fmt: skip
    else:
        grouped_row.portable_row[grid](
            x, _bytes(weight), weight.numbers, x if norm is None else norm, *ends, *about, *flags,
            **options(shape.warps, early),
        )  # fmt: skip
    return y


def _rows(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None, shape: Shape | None) -> Tensor:
    rows = x.shape[0]
    assert x.shape[1] == weight.inputs
    assert x.stride(1) == 1
    y = torch.empty((rows, weight.outputs), dtype=x.dtype, device=x.device)
    assert residual is None or (residual.is_contiguous() and residual.shape == y.shape)
    if shape is None:
        shape = measured(_kind(weight), padded(rows), weight.outputs, weight.inputs)
        if x.element_size() > 2:
            shape = shape._replace(**_SINGLE)
    across = shape.across or min(padded(rows), 128)
    grid = (triton.cdiv(weight.outputs, shape.rows), triton.cdiv(rows, across), shape.splits)
    assert grid[0] * grid[1] <= weight.counters.numel() or shape.splits == 1
    partial = y
    if shape.splits > 1:
        partial = torch.empty((shape.splits, rows, weight.outputs), dtype=torch.float32, device=x.device)
    grouped_matrix.shared_matrix[grid](
        x, _elements(weight), weight.numbers, x if bias is None else bias, x if residual is None else residual, y,
        partial, weight.counters, rows, weight.outputs, x.stride(0), weight.inputs, weight.group, weight.bits,
        int(weight.form), weight.centre, bias is not None, residual is not None, across, shape.rows, shape.width,
        shape.stages, shape.splits, has_asm(x), num_warps=shape.warps,
    )  # fmt: skip
    return y


def _bytes(weight: Packed) -> Tensor:
    return weight.data.view(torch.float8_e4m3fn) if weight.form is Form.FLOAT else weight.data


def _elements(weight: Packed) -> Tensor:
    return weight.data.view(torch.int32) if weight.bits == 4 else _bytes(weight)


def has_asm(x: Tensor) -> bool:
    """Whether the kernels may use machine code: not in the interpreter, and not for fp32, which is no speed of ours."""
    return x.is_cuda and x.dtype != torch.float32


def most_rows(weight: Packed) -> int:
    """Rows of x up to which ``linear`` is the fastest product, on an H100; e4m3 weights then meet e4m3 activations."""
    return 16 if weight.form is Form.FLOAT else MOST_ROWS[weight.bits]


def padded(rows: int) -> int:
    """Rows of x rounded up to a number that shapes are measured for; the last stands for more."""
    return next((count for count in (16, 32, 64, 128, 256) if rows <= count), 512)


def _kind(weight: Packed) -> str:
    return "float8" if weight.form is Form.FLOAT else f"int{weight.bits}"
