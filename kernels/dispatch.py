"""Which linear layers run in gemv.py and which in cuBLAS: up to how many rows, by card and shape.

Measured on the card named; ``bench/kernels.py --only dispatch`` measures another.  What a kernel that is launched early
leaves to the next shows in whole steps only: the rows of 32 are from those.  A shape takes the row of the nearest
measured weight.
"""

from __future__ import annotations

from functools import cache

import torch

_SAFE_ROWS = 1
"""On an unmeasured card: one row, where a plain read of the weights cannot be far from the best."""

_MEASURED: dict[str, dict[tuple[int, int], int]] = {
    "NVIDIA H100 80GB HBM3": {
        (6144, 4096): 32,
        (4096, 4096): 32,
        (28672, 4096): 64,
        (4096, 14336): 64,
        (128256, 4096): 64,
        (3072, 2048): 32,
        (2048, 2048): 32,
        (16384, 2048): 64,
        (2048, 8192): 64,
        (128256, 2048): 64,
        (960, 576): 16,
        (576, 576): 16,
        (3072, 576): 16,
        (576, 1536): 16,
        (49152, 576): 16,
    },
}
"""device name -> (N, K) of the weight -> the most rows M for which gemv.py was not slower."""


@cache
def _table(index: int) -> dict[tuple[int, int], int]:
    return _MEASURED.get(torch.cuda.get_device_name(index), {})


@cache
def most_rows(num_out: int, width: int, index: int) -> int:
    """The most rows for which a weight [N, K] should run in gemv.py on CUDA device index."""
    table = _table(index)
    if not table:
        return _SAFE_ROWS
    nearest = min(table, key=lambda shape: max(shape[0] / num_out, num_out / shape[0]) * max(
        shape[1] / width, width / shape[1]))  # fmt: skip
    return table[nearest]


def use_gemv(rows: int, num_out: int, width: int, device: torch.device) -> bool:
    """True where gemv.py should run x [rows, K] times weight [N, K].  No tensor is read; no synchronisation."""
    if device.type != "cuda":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return 1 <= rows <= most_rows(num_out, width, index)
