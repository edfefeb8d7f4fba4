"""How the work of grouped.py is cut into programs, by kind of weight, rows and size: measured on an H100.

Sizes: the linear layers of an 8B Llama.  ``bench/quant.py --tune`` times the candidates and prints the table; its head
says how.  Another size takes what was measured for the nearest.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

PROGRAMS = 264
"""About how many programs keep the chip busy: two a multiprocessor."""


class Shape(NamedTuple):
    """What a program takes at a time: rows x width of the weights; warps, pipeline stages, and programs along K.

    across: rows of x, 0 for as many as there are of up to 128.
    """

    rows: int
    width: int
    warps: int
    stages: int = 1
    splits: int = 1
    across: int = 0


MEASURED: dict[tuple[str, int, int, int], Shape] = {
    ("float8", 1, 4096, 4096): Shape(4, 1024, 4),
    ("float8", 1, 4096, 14336): Shape(2, 1024, 2),
    ("float8", 1, 6144, 4096): Shape(4, 1024, 2),
    ("float8", 1, 28672, 4096): Shape(4, 2048, 4),
    ("float8", 16, 4096, 4096): Shape(64, 128, 4, 4, 4),
    ("float8", 16, 4096, 14336): Shape(64, 128, 4, 4, 4),
    ("float8", 16, 6144, 4096): Shape(64, 128, 4, 4, 4),
    ("float8", 16, 28672, 4096): Shape(64, 128, 4, 4, 1),
    ("int4", 1, 4096, 4096): Shape(8, 4096, 4),
    ("int4", 1, 4096, 14336): Shape(8, 2048, 4),
    ("int4", 1, 6144, 4096): Shape(8, 2048, 2),
    ("int4", 1, 28672, 4096): Shape(8, 4096, 4),
    ("int4", 16, 4096, 4096): Shape(64, 128, 4, 4, 4),
    ("int4", 16, 4096, 14336): Shape(128, 128, 8, 4, 8),
    ("int4", 16, 6144, 4096): Shape(64, 128, 4, 4, 4),
    ("int4", 16, 28672, 4096): Shape(128, 128, 8, 4, 1),
    ("int4", 32, 4096, 4096): Shape(64, 128, 4, 4, 4),
    ("int4", 32, 4096, 14336): Shape(64, 128, 4, 4, 8),
    ("int4", 32, 6144, 4096): Shape(64, 128, 4, 4, 4),
    ("int4", 32, 28672, 4096): Shape(128, 128, 8, 4, 1),
    ("int4", 64, 4096, 4096): Shape(64, 128, 4, 4, 4),
    ("int4", 64, 4096, 14336): Shape(128, 128, 8, 4, 8),
    ("int4", 64, 6144, 4096): Shape(64, 256, 4, 3, 1),
    ("int4", 64, 28672, 4096): Shape(128, 128, 8, 3, 1),
    ("int4", 128, 4096, 4096): Shape(64, 128, 4, 4, 2),
    ("int4", 128, 4096, 14336): Shape(128, 128, 8, 4, 4),
    ("int4", 128, 6144, 4096): Shape(128, 128, 8, 4, 2),
    ("int4", 128, 28672, 4096): Shape(256, 64, 8, 4, 1),
    ("int4", 256, 4096, 4096): Shape(128, 128, 8, 3, 2),
    ("int4", 256, 4096, 14336): Shape(128, 128, 8, 3, 2),
    ("int4", 256, 6144, 4096): Shape(128, 128, 8, 4, 1),
    ("int4", 256, 28672, 4096): Shape(256, 64, 8, 4, 1),
    ("int4", 512, 4096, 4096): Shape(128, 128, 8, 3, 1),
    ("int4", 512, 4096, 14336): Shape(128, 64, 8, 3, 2, 256),
    ("int4", 512, 6144, 4096): Shape(256, 64, 8, 4, 1),
    ("int4", 512, 28672, 4096): Shape(256, 64, 8, 4, 1),
}
"""(kind of weight, most rows of x, N, K) -> the fastest shape; 8-bit integers take what e4m3 numbers take."""


@cache
def measured(kind: str, rows: int, outputs: int, inputs: int) -> Shape:
    """The shape for rows of x (1, or as grouped.padded) and weights [N, K]."""
    known = MEASURED.get((kind, rows, outputs, inputs))
    if known is not None:
        return known
    like = "float8" if kind == "int8" else kind
    most = max(entry[1] for entry in MEASURED if entry[0] == like)
    near = [entry for entry in MEASURED if entry[0] == like and entry[1] == min(rows, most)]
    best = min(near, key=lambda entry: max(entry[2] / outputs, outputs / entry[2]) * max(
        entry[3] / inputs, inputs / entry[3]))  # fmt: skip
    shape = MEASURED[best]
    if rows == 1:
        return shape
    programs = -(-outputs // shape.rows) * -(-rows // (shape.across or 128))
    splits = 1
    while programs * splits < PROGRAMS and splits < 8 and inputs // (2 * splits) >= 2 * shape.width:
        splits *= 2
    return shape._replace(splits=splits)
