"""Products of a mixture's experts whose weights are 4 or 8 bits each, which become numbers in registers.

    as moe.py says for ``products``, with the weights of packed.py, one matrix an expert

x and the result bf16, fp16 or fp32, accumulated in float32.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,assignment"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vserve.kernels import grouped
from vserve.kernels.early import await_inputs, options
from vserve.kernels.grouped_matrix import load_numbers
from vserve.kernels.grouped_row import FLOAT
from vserve.kernels.moe import Tile, find_tile, store_tile, tile_operands, tiles_bound
from vserve.kernels.packed import Form, Packed
from vserve.kernels.route import Groups


class Stack(NamedTuple):
    """A ``Packed`` for each of E experts: data uint8 [E, N, K * bits / 8], numbers [E, K / group, N] or [..., N, 2]."""

    data: Tensor
    numbers: Tensor
    bits: int
    group: int
    form: Form
    centre: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        count, outputs, num_bytes = self.data.shape
        return count, outputs, num_bytes * 8 // self.bits

    @property
    def elements(self) -> Tensor:
        """data as the kernels read it."""
        if self.bits == 4:
            return self.data.view(torch.int32)
        return self.data.view(torch.float8_e4m3fn) if self.form is Form.FLOAT else self.data

    def put(self, expert: int, weight: Packed) -> None:
        """Copy the weights of one expert to their place."""
        self.data[expert].copy_(weight.data)
        self.numbers[expert].copy_(weight.numbers)

    def takes(self, weight: Packed) -> bool:
        """Whether weight lies as those of this stack do."""
        kinds = (weight.bits, weight.group, weight.form, weight.centre)
        sizes = weight.data.shape == self.data.shape[1:] and weight.numbers.dtype == self.numbers.dtype
        return sizes and kinds == (self.bits, self.group, self.form, self.centre)

    def split(self, times: int) -> Stack:
        """For as many times the experts, each expert's rows being those of so many."""
        count, rows, num_bytes = self.data.shape
        data = self.data.view(count * times, rows // times, num_bytes)
        numbers = self.numbers.unflatten(2, (times, rows // times)).movedim(2, 1).flatten(0, 1).contiguous()
        return self._replace(data=data, numbers=numbers)


def new_stack(count: int, like: Packed) -> Stack:
    """Room for the weights of `count` experts that lie as one's do."""
    data, numbers = (part.new_empty((count, *part.shape)) for part in (like.data, like.numbers))
    return Stack(data, numbers, like.bits, like.group, like.form, like.centre)


@triton.jit
def _packed_tiles(
    x_ptr,  # [T, K] with GATED, rows x_stride apart, one a token; else [P, K], one a place in the order
    data_ptr,  # 4 bits [E, N, K / 8] int32, 8 bits [E, N, K]; with GATED [E, 2 N, ...]
    numbers_ptr,  # [E, K / GROUP, N], or [..., N, 2] with offsets
    order_ptr,  # [P] int32
    starts_ptr,  # [E + 1] int32
    y_ptr,  # [P, N]: one row a place in the order with GATED, else one a pair
    count,  # E
    pairs,  # P
    num_out,  # N
    x_stride,
    data_stride,  # of an expert
    numbers_stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    CENTRE_AT: tl.constexpr,
    ACTIVE: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    expert, first, stop = find_tile(starts_ptr, tl.program_id(1), count, pairs, BLOCK_M, BLOCK_E)
    if first >= stop:
        return
    EVEN: tl.constexpr = K % BLOCK_K == 0
    HALVES: tl.constexpr = 2 if GATED else 1
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    place = first + tl.arange(0, BLOCK_M)
    inside = place < stop
    pair = tl.load(order_ptr + place, mask=inside, other=0)
    x_row, n = tile_operands(x_ptr, x_stride, place, pair, num_out, ACTIVE, GATED, ROWS)
    outputs = num_out * HALVES
    # int64: an expert's offset passes 2**31 bytes in a large mixture
    data = data_ptr + expert.to(tl.int64) * data_stride
    numbers = numbers_ptr + expert.to(tl.int64) * numbers_stride
    acc = tl.zeros([ROWS * HALVES, BLOCK_M], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        w = load_numbers(
            data, numbers, n, outputs, start, K, GROUP, BITS, FORM, CENTRE_AT, ROWS * HALVES, BLOCK_K, ASM, DTYPE
        )
        k = start + tl.arange(0, BLOCK_K)
        if EVEN:
            x = tl.load(x_row + k[:, None], mask=inside[None, :], other=0.0)
        else:
            x = tl.load(x_row + k[:, None], mask=inside[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    if FORM == FLOAT:
        acc *= tl.load(numbers + n)[:, None]
    store_tile(acc, y_ptr, place, pair, inside, num_out, GATED, BLOCK_M, ROWS)


def products(
    x: Tensor, weight: Stack, groups: Groups, y: Tensor, active: int, *, gated: bool, tile: Tile, early: bool = False
) -> None:
    """As moe.products, with packed weights."""
    pairs, outputs = y.shape
    count, _, width = weight.shape
    assert x.stride(1) == 1
    assert x.shape[1] == width
    data = weight.elements
    _packed_tiles[(triton.cdiv(outputs, tile.outputs), tiles_bound(pairs, count, tile.pairs))](
        x, data, weight.numbers, groups.order, groups.starts, y, count, pairs, outputs, x.stride(0), data.stride(0),
        weight.numbers.stride(0), width, weight.group, weight.bits, int(weight.form), weight.centre, active, gated,
        triton.next_power_of_2(count), tile.pairs, tile.outputs, tile.inputs, tile.stages, grouped.has_asm(x),
        early, **options(tile.warps, early),
    )  # fmt: skip


def measured(pairs: int, count: int, element_size: int, *, gated: bool) -> Tile:
    """The tile for so many pairs of a token and one of `count` experts: what a plain layer takes for as many rows."""
    if element_size > 2:
        return Tile(16, 32, 32, 4, 2)
    each = pairs / count
    if each <= 24:
        return Tile(16 if each <= 8 else 32, 32 if gated else 64, 128, 4, 4)
    return Tile(64 if each <= 96 else 128, 64 if gated else 128, 128, 8, 3)
