"""Turning quantised blocks into numbers, vectorised, on the CPU.

Owns the arithmetic of the block formats: ``dequantize`` gives the numbers themselves, ``unpack_groups`` the integers
with the scale and minimum of each group, for repacking without a detour through floats.  Every function is pure, may
be called from any thread and runs on that thread alone.  Knows nothing of files or models.  Formats: ggml-quants.c in
llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

# numpy and not torch: a dozen small operations a chunk are as many OpenMP barriers in torch, and while another process
# wants the cores each of them may spin for a time slice (measured: 40 s instead of 0.3 s for a model of 135 M).
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vserve.model.kinds import LAYOUTS, Kind

if TYPE_CHECKING:
    from vserve.model.weights import StoredTensor

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]

GROUP = 32
"""Numbers that share a scale and a minimum in what ``unpack_groups`` returns."""

_CHUNK_NUMBERS = 1 << 20
"""Numbers dequantised at a time: keeps the temporaries of a large embedding to a few megabytes."""


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """N blocks taken apart: number = scale * (q - offset) + minimum (no minimum: symmetric).

    q [N, block_size] uint8 in the order of the numbers; scale, minimum [N, groups of a block] float32.
    """

    q: Bytes
    scale: Floats
    minimum: Floats | None = None
    offset: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """A matrix of quantised blocks taken apart: weight = scale * (q - centre), or scale * q + minimum, group by group.

    q uint8 [rows, cols], below 2 ** bits; scale, minimum float32 [rows, groups]; centre None: minimum holds.
    """

    q: Tensor
    scale: Tensor
    minimum: Tensor
    centre: int | None
    bits: int


def dequantize(kind: Kind, blocks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of blocks [rows, row bytes] uint8, as [rows, cols] of dtype in new memory.

    Computed in float32, in the order of operations of GGML, then rounded once to dtype.
    """
    layout = LAYOUTS[kind]
    flat = blocks.reshape(-1, layout.block_bytes).numpy()
    out = np.empty((flat.shape[0], layout.block_size), dtype=np.float32)
    step = max(1, _CHUNK_NUMBERS // layout.block_size)
    for start in range(0, flat.shape[0], step):
        out[start : start + step] = _numbers(_UNPACK[kind](flat[start : start + step]))
    return torch.from_numpy(out.reshape(blocks.shape[0], -1)).to(dtype)


def can_group(kind: Kind) -> bool:
    """Whether ``unpack_groups`` takes this kind: a quantised one whose groups are 32 numbers long."""
    return kind in _UNPACK and kind is not Kind.Q6_K


def unpack_groups(stored: StoredTensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scale, minimum) of a quantised matrix, such that weight = scale * q + minimum group by group.

    q [rows, cols] uint8 in natural order: 0 to 15 for the 4-bit kinds, 0 to 31 for the 5-bit kinds, 0 to 255 for Q8_0;
    scale, minimum [rows, cols / 32] float32.  In float32 the formula gives the dequantised number exactly, but for the
    sign of a zero.  All three are new memory.  ValueError for a kind that ``can_group`` denies.
    """
    if not can_group(stored.kind):
        raise ValueError(f"tensor kind {stored.kind} has no groups of {GROUP}")
    rows, cols = stored.shape
    parts = _UNPACK[stored.kind](stored.blocks().reshape(-1, LAYOUTS[stored.kind].block_bytes).numpy())
    minimum = parts.scale * np.float32(-parts.offset) if parts.minimum is None else parts.minimum
    groups = (rows, cols // GROUP)
    return (
        torch.from_numpy(parts.q.reshape(rows, cols)),
        torch.from_numpy(parts.scale.reshape(groups)),
        torch.from_numpy(minimum.reshape(groups)),
    )


def can_pack(kind: Kind) -> bool:
    """Whether ``unpack_blocks`` takes this kind."""
    return kind in _UNPACK


def unpack_blocks(stored: StoredTensor) -> Blocks:
    """The integers, scales and minima of a matrix of a kind that ``can_pack``, in new memory."""
    rows, cols = stored.shape
    parts = _UNPACK[stored.kind](stored.blocks().reshape(-1, LAYOUTS[stored.kind].block_bytes).numpy())
    scale = torch.from_numpy(parts.scale.reshape(rows, -1))
    minimum = scale * -float(parts.offset) if parts.minimum is None else torch.from_numpy(parts.minimum)
    return Blocks(
        torch.from_numpy(parts.q.reshape(rows, cols)),
        scale,
        minimum.reshape(rows, -1),
        parts.offset if parts.minimum is None else None,
        _BITS[stored.kind],
    )


def _numbers(parts: _Parts) -> Floats:
    count, size = parts.q.shape
    numbers = parts.q.reshape(count, parts.scale.shape[1], -1).astype(np.float32)
    if parts.offset:
        numbers -= np.float32(parts.offset)
    # A file may hold infinite scales: what comes of them is a number all the same, not a warning.
    with np.errstate(all="ignore"):
        numbers *= parts.scale[..., None]
        if parts.minimum is not None:
            numbers += parts.minimum[..., None]
    return numbers.reshape(count, size)


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte ``at`` of each block, as [N, 1] float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes, run: int) -> Bytes:
    """4-bit integers of packed [N, B]: every run of bytes holds its low nibbles first, then its high ones."""
    runs = packed.reshape(packed.shape[0], -1, run)
    return np.concatenate((runs & np.uint8(0x0F), runs >> np.uint8(4)), axis=-1).reshape(packed.shape[0], -1)


def _bit_planes(packed: Bytes) -> Bytes:
    """packed [N, B] -> [N, 8 * B] of 0 and 1: bit 0 of every byte, then bit 1 of every byte, and so on."""
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    return ((packed[:, None, :] >> shifts) & np.uint8(1)).reshape(packed.shape[0], -1)


def _bits(packed: Bytes) -> Bytes:
    """packed [N, B] -> [N, 8 * B] of 0 and 1: the bits of a little-endian integer, lowest first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _k_scales(packed: Bytes) -> tuple[Floats, Floats]:
    """The eight 6-bit scales and eight 6-bit minima that Q4_K and Q5_K keep in 12 bytes, each [N, 8] float32."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate(
        (low & np.uint8(0x3F), (high & np.uint8(0x0F)) | ((low >> np.uint8(2)) & np.uint8(0x30))), axis=-1
    )
    minima = np.concatenate(
        (middle & np.uint8(0x3F), (high >> np.uint8(4)) | ((middle >> np.uint8(2)) & np.uint8(0x30))), axis=-1
    )
    return scales.astype(np.float32), minima.astype(np.float32)


def _scaled(halves: Floats, scales: Floats) -> Floats:
    with np.errstate(all="ignore"):
        return halves * scales


def _q4_0(blocks: Bytes) -> _Parts:
    return _Parts(_nibbles(blocks[:, 2:], 16), _half(blocks, 0), offset=8)


def _q4_1(blocks: Bytes) -> _Parts:
    return _Parts(_nibbles(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Bytes) -> _Parts:
    q = _nibbles(blocks[:, 6:], 16) | (_bits(blocks[:, 2:6]) << np.uint8(4))
    return _Parts(q, _half(blocks, 0), offset=16)


def _q5_1(blocks: Bytes) -> _Parts:
    q = _nibbles(blocks[:, 8:], 16) | (_bits(blocks[:, 4:8]) << np.uint8(4))
    return _Parts(q, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Bytes) -> _Parts:
    # Flipping the top bit of a two's-complement byte adds 128: int8 -128..127 becomes uint8 0..255.
    return _Parts(blocks[:, 2:] ^ np.uint8(0x80), _half(blocks, 0), offset=128)


def _q4_k(blocks: Bytes) -> _Parts:
    scales, minima = _k_scales(blocks[:, 4:16])
    q = _nibbles(blocks[:, 16:], 32)
    return _Parts(q, _scaled(_half(blocks, 0), scales), -_scaled(_half(blocks, 2), minima))


def _q5_k(blocks: Bytes) -> _Parts:
    scales, minima = _k_scales(blocks[:, 4:16])
    q = _nibbles(blocks[:, 48:], 32) | (_bit_planes(blocks[:, 16:48]) << np.uint8(4))
    return _Parts(q, _scaled(_half(blocks, 0), scales), -_scaled(_half(blocks, 2), minima))


def _q6_k(blocks: Bytes) -> _Parts:
    count = blocks.shape[0]
    low = _nibbles(blocks[:, :128], 64)
    shifts = np.array((0, 2, 4, 6), dtype=np.uint8).reshape(1, 1, 4, 1)
    high = (blocks[:, 128:192].reshape(count, 2, 1, 32) >> shifts) & np.uint8(0x03)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _Parts(low | (high.reshape(count, -1) << np.uint8(4)), _scaled(_half(blocks, 208), scales), offset=32)


_UNPACK: dict[Kind, Callable[[Bytes], _Parts]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1,
    Kind.Q8_0: _q8_0,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
}

_BITS = {kind: 4 if kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q4_K) else 8 for kind in _UNPACK}
"""The bits that hold an integer of each kind, of 4 and 8."""
