"""Linear layers: dense ones on any device, and two CPU forms that are faster, packed and grouped.

On a CPU a decode step is bound by the bytes of its weights, so quantised weights stay quantised there (GroupedLinear)
for as many rows as that pays, and a packed float32 copy (PackedLinear) serves the rest.  Every form computes in the
precision of its input: a quantised weight is used exactly, never rounded again.  Knows no model and no file.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from vserve.model.quant import GROUP

FEW_ROWS: Final = 4
"""Most rows for which grouped weights beat packed float32 ones; bench/step.py --few-rows measures it."""

_WIDE: Final = 4096
"""Outputs beyond which the table is cut in tiles, so that partial sums stay in the cache."""

_TILE: Final = 1024
"""Most outputs of a tile."""

_PACK_ROWS: Final = 64
"""The number of rows that the packed layout is asked for; oneDNN's choice is the same from 4 rows up."""

_SYMMETRIC_OFFSETS: Final = (8, 16, 128)
"""What the symmetric block formats subtract from their integers: 4, 5 and 8 bits."""

_IS_X86: Final = platform.machine().lower() in ("x86_64", "amd64")

_ZERO_BYTES: Final = 3
"""Rows of bytes that hold one row of zeros; see GroupedLinear."""

_ROW_TAIL: Final = 8
"""Bytes behind each row of the table, which the operation reads: float32 factor, float32 offset."""


class Linear(Protocol):
    """x [T, inputs] contiguous -> [T, outputs], in x's dtype and in new memory; x is read only."""

    def __call__(self, x: Tensor) -> Tensor: ...


class PlainLinear:
    """weight [outputs, inputs] and bias [outputs] as they are, on any device in any float dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Activated:
    """A layer with a function of its output behind it."""

    def __init__(self, linear: Linear, function: Callable[[Tensor], Tensor]) -> None:
        self._linear = linear
        self._function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self._function(self._linear(x))


class PackedLinear:
    """A float32 weight [outputs, inputs] copied into oneDNN's own order, up to 3 times faster than F.linear on x86.

    gelu: what its output goes through, as functional.gelu names it ("none": exact, "tanh"); None for nothing.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, gelu: str | None = None) -> None:
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        self._bias = bias
        self._after: tuple[str, list[float], str] = ("none", [], "") if gelu is None else ("gelu", [], gelu)
        self._run: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, self._weight, self._bias, *self._after)


class GroupedLinear:
    """Weights of at most 8 bits in groups of 32 inputs: weight = scale * q + minimum, used as they are.

    The integers lie transposed in a table of bytes, one row an input, and PyTorch's quantised embedding bag (the one
    vectorised operation of its CPU build that reads 8-bit weights and adds in float32) sums the 32 rows of a group,
    each times its input.  The sums of the groups are then scaled and added up:

        y[n] = sum_g scale[n, g] * (sum_j x[g, j] * (q[n, g, j] - offset)) + zero[n, g] * sum_j x[g, j]
        zero = minimum + offset * scale                                          (all 0 for the symmetric formats)

    The zeros are three more rows a group in the same table: 24-bit integers, a byte each, as exact as a float32.
    """

    def __init__(
        self, q: Tensor, scale: Tensor, minimum: Tensor, bias: Tensor | None = None, many: Linear | None = None
    ) -> None:
        """q [N, K] uint8; scale, minimum [N, K / 32] float32; bias [N]; many: serves inputs of over FEW_ROWS rows.

        many is the whole layer, bias included.  Without it such inputs use the same weights, dequantised each time.
        """
        outputs, inputs = q.shape
        self._inputs, self._outputs, self._groups = inputs, outputs, inputs // GROUP
        self._tiles = outputs // tile_width(outputs)
        offset = next((o for o in _SYMMETRIC_OFFSETS if torch.equal(minimum, scale * -float(o))), None)
        width = outputs // self._tiles
        rows = [_integer_rows(q.view(self._tiles, width, inputs), 8 if offset is None else offset)]
        factors = [scale.view(self._tiles, width, self._groups).transpose(1, 2)]
        self._zero_rows = 0 if offset is not None else _ZERO_BYTES * self._groups
        if offset is None:
            rows.append(_zero_rows((minimum + 8.0 * scale).view(self._tiles, width, self._groups)))
            factors.append(torch.ones((self._tiles, 1, width)))
        self._table = torch.cat(rows, dim=1).view(-1, width + _ROW_TAIL)
        self._scale = torch.cat(factors, dim=1).contiguous()  # [tiles, groups (and one for the zeros), N / tiles]
        self._bias = bias
        self._many = many
        self._sum: Callable[..., Tensor] = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows > FEW_ROWS or not rows:
            return self._dequantised(x) if self._many is None else self._many(x)
        weights = self._weights(x, rows)
        if self._tiles > 1:
            weights = weights.expand(self._tiles, -1).reshape(-1)
        index, offsets = _bags(self._tiles, self._groups, rows, self._zero_rows)
        sums = self._sum(self._table, index, offsets, False, 0, False, weights, None, True)
        if rows == 1:
            y = sums.view_as(self._scale).mul_(self._scale).sum(1).view(1, -1)
        else:
            tiles, groups, width = self._scale.shape
            scaled = sums.view(tiles, groups, rows, width).mul_(self._scale.unsqueeze(2)).sum(1)
            y = scaled.view(rows, width) if tiles == 1 else scaled.transpose(0, 1).reshape(rows, -1)
        return y if self._bias is None else y.add_(self._bias)

    def _weights(self, x: Tensor, rows: int) -> Tensor:
        """The factor of every index of a tile's bags: the inputs by group, then each row's sums for the zeros."""
        if rows == 1:
            flat = x.view(-1)
            if not self._zero_rows:
                return flat
            sums = flat.view(-1, GROUP).sum(1)
            return torch.cat((flat, sums, sums, sums))
        grouped = x.view(rows, self._groups, GROUP)
        flat = grouped.transpose(0, 1).reshape(-1)
        if not self._zero_rows:
            return flat
        sums = grouped.sum(2)
        return torch.cat((flat, torch.cat((sums, sums, sums), dim=1).view(-1)))

    def _dequantised(self, x: Tensor) -> Tensor:
        """The whole product through a float32 copy of one tile at a time."""
        y = x.new_empty((x.shape[0], self._outputs))
        groups, width = self._groups, self._scale.shape[2]
        for tile, table in enumerate(self._table.view(self._tiles, -1, width + _ROW_TAIL)):
            tail = table[:, width:].contiguous().view(torch.float32)
            numbers = table[:, :width].to(torch.float32).mul_(tail[:, :1]).add_(tail[:, 1:])
            weight = numbers[: self._inputs].view(groups, GROUP, width) * self._scale[tile, :groups].unsqueeze(1)
            if self._zero_rows:
                weight += numbers[self._inputs :].view(_ZERO_BYTES, groups, width).sum(0).unsqueeze(1)
            torch.mm(x, weight.view(self._inputs, width), out=y[:, tile * width : (tile + 1) * width])
        return y if self._bias is None else y.add_(self._bias)


def dense_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest dense form for the weight's [outputs, inputs] device and dtype."""
    return PackedLinear(weight, bias) if _packs(weight) else PlainLinear(weight, bias)


def gelu_linear(weight: Tensor, bias: Tensor | None, gelu: str) -> Linear:
    """dense_linear with functional.gelu of the given kind behind it."""
    if _packs(weight):
        return PackedLinear(weight, bias, gelu)
    return Activated(PlainLinear(weight, bias), partial(functional.gelu, approximate=gelu))


def has_grouped(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether GroupedLinear is fast here: x86 CPUs in float32, where the operation under it is vectorised."""
    return device.type == "cpu" and dtype == torch.float32 and "fbgemm" in torch.backends.quantized.supported_engines


def tile_width(outputs: int) -> int:
    """Outputs of one tile of a table: all, or for a wide layer the largest divisor that is not above _TILE."""
    if outputs <= _WIDE:
        return outputs
    width = max(size for size in range(1, _TILE + 1) if outputs % size == 0)
    return width if width >= GROUP else outputs


def _packs(weight: Tensor) -> bool:
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32
    return fits and _IS_X86 and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _integer_rows(q: Tensor, offset: int) -> Tensor:
    """q [tiles, width, K] uint8 -> rows of bytes [tiles, K, width + 8], each meaning 1.0 * byte - offset."""
    tiles, width, inputs = q.shape
    rows = torch.empty((tiles, inputs, width + _ROW_TAIL), dtype=torch.uint8)
    rows[..., :width] = q.transpose(1, 2)
    rows[..., width:] = torch.tensor((1.0, -float(offset))).view(torch.uint8)
    return rows


def _zero_rows(zero: Tensor) -> Tensor:
    """zero [tiles, width, G] float32 -> rows of bytes [tiles, 3 G, width + 8]: high bytes, middle ones, low ones."""
    tiles, width, groups = zero.shape
    wide = zero.transpose(1, 2).to(torch.float64)
    low = wide.amin(2, keepdim=True)
    unit = ((wide.amax(2, keepdim=True) - low) / (2 ** (8 * _ZERO_BYTES) - 1)).clamp_(
        min=torch.finfo(torch.float32).tiny
    )
    steps = ((wide - low) / unit).round_().to(torch.int64)
    rows = torch.empty((tiles, _ZERO_BYTES, groups, width + _ROW_TAIL), dtype=torch.uint8)
    for place in range(_ZERO_BYTES):
        shift = 8 * (_ZERO_BYTES - 1 - place)
        rows[:, place, :, :width] = (steps >> shift) & 0xFF
        tail = torch.cat((unit * 2**shift, low if place == 0 else torch.zeros_like(low)), dim=2).to(torch.float32)
        rows[:, place, :, width:] = tail.view(torch.uint8)
    return rows.view(tiles, _ZERO_BYTES * groups, -1)


@lru_cache(maxsize=256)
def _bags(tiles: int, groups: int, rows: int, zero_rows: int) -> tuple[Tensor, Tensor]:
    """Indices int32 of the table's rows, and where each bag starts among them, with the end.

    A tile's bags: for each group, one of 32 indices for each row of x; then one for each row of x, of all zero_rows.
    """
    inputs = groups * GROUP
    integers = torch.arange(inputs).view(groups, 1, GROUP).expand(groups, rows, GROUP).reshape(-1)
    zeros = torch.arange(inputs, inputs + zero_rows).repeat(rows)
    starts = torch.arange(tiles).unsqueeze(1) * (inputs + zero_rows)
    index = (starts + torch.cat((integers, zeros))).reshape(-1)
    lengths = torch.tensor(([GROUP] * (groups * rows) + [zero_rows] * (rows if zero_rows else 0)) * tiles)
    return index.to(torch.int32), torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(torch.int32)
