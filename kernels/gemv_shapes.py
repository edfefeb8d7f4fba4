"""How gemv.py cuts the work of a product: by rows of x and size of the weight, as measured on an H100."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from typing import NamedTuple

import triton

SMALL = 1 << 24
"""Numbers of a weight up to which two rows of x are better off without the matrix units."""

WIDE = 1 << 14
"""Outputs from which a program takes many: fewer would not keep the chip busy."""


MULTIPROCESSORS = 132
"""Of an H100.  Up to 32 rows there is at most one program for each, unless the weight is large, and a program takes so
much memory that two do not fit: launched early, they would else crowd where the kernel ahead ends first."""


class Shape(NamedTuple):
    """What one program reads at a time: rows x width of the weights; warps and pipeline stages.

    ahead: so many tiles are asked for before the wait of a kernel that is launched early; on the matrix units only.
    """

    rows: int
    width: int
    warps: int
    stages: int
    ahead: int = 0


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


def matrix_shape(rows: int, num_out: int, width: int, *, gated: bool) -> Shape:
    """The shape of the work on the matrix units for x [M, K] and a weight [N, K], as measured on an H100."""
    if width <= 1024:
        return Shape(16, 128, 1, 6)
    if rows <= 16:
        return _few_rows(num_out, width, gated=gated)
    if num_out >= WIDE:
        return Shape(128, 128, 4, 4) if num_out >= 4 * WIDE and not gated else Shape(64, 128, 4, 4)
    if rows > 32:
        return Shape(32 if num_out > 2048 else 16, 256, 4, 3)
    if num_out <= 16 * MULTIPROCESSORS:
        return Shape(16, 256, 4, 6)
    return Shape(32, 256, 4, 5) if num_out <= 32 * MULTIPROCESSORS or gated else Shape(64, 128, 4, 6, ahead=1)


def _few_rows(num_out: int, width: int, *, gated: bool) -> Shape:
    if width < 2048:
        return Shape(16, 256, 2, 4)
    if gated:
        return Shape(64, 128, 8, 5) if num_out // 2 <= 64 * MULTIPROCESSORS else Shape(32, 256, 4, 4)
    if num_out <= 16 * MULTIPROCESSORS:
        return Shape(16, 512, 4, 5)
    if num_out <= 32 * MULTIPROCESSORS:
        return Shape(32, 256, 4, 6, ahead=1)
    return Shape(64, 256, 4, 4, ahead=1) if num_out < WIDE else Shape(64, 128, 4, 4, ahead=1)
