"""Packed: a weight matrix of 4- or 8-bit integers in groups, as the kernels in grouped.py read it, and its layout.

    form ZERO:     w[n, k] = scale[g, n] * (q[n, k] - offset[g, n])        g = k // group
    form MINIMUM:  w[n, k] = scale[g, n] * q[n, k] + offset[g, n]
    form CENTRE:   w[n, k] = scale[g, n] * (q[n, k] - centre)
    form FLOAT:    w[n, k] = scale[n] * e4m3(q[n, k]), one group

8 bits: a byte a weight, in order.  4 bits: 32 inputs are 16 bytes, one load of a thread, so of one group.  Of them word
t, for t of 0 to 3, holds k + 2 t + (0, 8, 16, 24) from the lowest bits up and behind these the same + 1: a word is what
one thread hands the matrix units of 32 inputs, and a mask and a shift make a pair of numbers of it.  Scales lie by
group, since a program reads those of neighbouring outputs together, each beside its offset: one load takes both.  Plain
PyTorch, on any device; the twin of what the kernels compute.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 32
"""Inputs whose 4-bit weights are packed together."""

LEAST_GROUP = 32
"""The shortest group of 4-bit weights; of 8-bit ones half as many."""

_SPLIT_TILES = 8192
"""Tiles of one product whose parts are joined through counters."""


class Form(IntEnum):
    """How integers become weights; the numbers are constants of the kernels."""

    ZERO = 0
    MINIMUM = 1
    CENTRE = 2
    FLOAT = 3

    @property
    def has_offset(self) -> bool:
        return self <= Form.MINIMUM


class Packed(NamedTuple):
    """data uint8 [N, K * bits / 8] contiguous; numbers [K / group, N], scales, or [K / group, N, 2] with their offsets.

    counters int32 [_SPLIT_TILES], zero between two products: how many parts of a tile are done.
    """

    data: Tensor
    numbers: Tensor
    bits: int
    group: int
    form: Form
    centre: int
    counters: Tensor

    @property
    def outputs(self) -> int:
        return self.data.shape[0]

    @property
    def inputs(self) -> int:
        return self.data.shape[1] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.numbers.nbytes

    @property
    def scale(self) -> Tensor:
        """[K / group, N]."""
        return self.numbers[..., 0] if self.form.has_offset else self.numbers

    @property
    def offset(self) -> Tensor | None:
        """[K / group, N]."""
        return self.numbers[..., 1] if self.form.has_offset else None


def pack(q: Tensor, scale: Tensor, offset: Tensor | None, *, bits: int, form: Form, centre: int = 0) -> Packed:
    """q uint8 [N, K], below 2 ** bits; scale, offset [N, K / group], of one type, to keep them in.  All are copied."""
    assert bits in (4, 8)
    inputs = q.shape[1]
    group = inputs // scale.shape[1]
    assert group * scale.shape[1] == inputs
    assert fits(inputs, bits, group)
    assert (offset is not None) == form.has_offset
    assert form is not Form.FLOAT or group == inputs
    data = q.contiguous() if bits == 8 else _nibbles(q)
    numbers = scale.t().contiguous() if offset is None else torch.stack((scale.t(), offset.t()), dim=2)
    return Packed(
        data,
        numbers,
        bits,
        group,
        form,
        centre,
        torch.zeros(_SPLIT_TILES, dtype=torch.int32, device=q.device),
    )


def fits(inputs: int, bits: int, group: int) -> bool:
    """Whether weights of so many inputs, in groups of so many, can be packed."""
    least = LEAST_GROUP if bits == 4 else LEAST_GROUP // 2
    return inputs % CHUNK == 0 and inputs % group == 0 and group % least == 0


def integers(weight: Packed) -> Tensor:
    """q uint8 [N, K], what ``pack`` was given."""
    if weight.bits == 8:
        return weight.data
    halves = torch.stack((weight.data & 0x0F, weight.data >> 4), dim=2)
    # Places in memory: chunk, t, + 1, + 16, + 8.
    return halves.view(weight.outputs, -1, 4, 2, 2, 2).permute(0, 1, 4, 5, 2, 3).reshape(weight.outputs, weight.inputs)


def dense(weight: Packed, dtype: torch.dtype) -> Tensor:
    """The weights [N, K], worked out in float64 and rounded once to dtype."""
    q = integers(weight)
    numbers = (q.view(torch.float8_e4m3fn) if weight.form is Form.FLOAT else q).to(torch.float64)
    wide = numbers.view(weight.outputs, -1, weight.group)
    scale = weight.scale.t().to(torch.float64).unsqueeze(2)
    if weight.offset is None:
        wide = (wide - weight.centre) * scale
    else:
        offset = weight.offset.t().to(torch.float64).unsqueeze(2)
        wide = wide * scale + offset if weight.form is Form.MINIMUM else (wide - offset) * scale
    return wide.view(weight.outputs, weight.inputs).to(dtype)


def _nibbles(q: Tensor) -> Tensor:
    # Places of an input: chunk, + 16, + 8, + 2 t, + 1.
    placed = q.view(q.shape[0], -1, 2, 2, 4, 2).permute(0, 1, 4, 5, 2, 3)
    return (placed[..., 0] | (placed[..., 1] << 4)).reshape(q.shape[0], -1)
