"""The experts of a mixture, all in one launch for each of their two products: a grouped matrix product.

    h[p] = a(gate_e x[t]) * up_e x[t],  y[t] = sum over the pairs p of t of w[p] * down_e h[p]
    where pair p is one token t and one of the k experts e that it takes

x [T, D]; gate_up [E, 2F, D], gate first; down [E, D, F]; chosen [T, k] int64, weights [T, k] float32; bf16, fp16 or
fp32, products accumulate in float32.  Pairs are sorted by expert; a tile is BLOCK_M pairs of one expert, so each
expert's weights are read once for every BLOCK_M of its pairs, and those of experts without a pair not at all.  The
grid, T k // BLOCK_M + min(E, T k) tiles, bounds the number of tiles for any choice: it fits a captured graph.
Shazeer et al. 2017, arXiv:1701.06538; Gale et al. 2023, "MegaBlocks", arXiv:2211.15841.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"
# ruff: noqa: SIM108

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Groups(NamedTuple):
    """Pairs sorted by expert: order [P] int64, the pair at each place; starts [E + 1] int32, where each expert's pairs
    begin; tiles [E + 1] int32, where its tiles begin."""

    order: Tensor
    starts: Tensor
    tiles: Tensor


class Tile(NamedTuple):
    """Pairs x outputs of a program, inputs of one step of its loop, and how the compiler spreads them."""

    pairs: int
    outputs: int
    inputs: int
    warps: int
    stages: int


@triton.jit
def _experts(
    x_ptr,  # [T, K] with GATED, one row a token; else [P, K], one a place in the order
    weight_ptr,  # [E, N, K]; with GATED [E, 2N, K]
    order_ptr,  # [P] int64
    starts_ptr,  # [E + 1] int32
    tiles_ptr,  # [E + 1] int32
    scores_ptr,  # [P] float32, one a pair; read without GATED
    y_ptr,  # [P, N]: one row a place in the order with GATED, else one a pair
    num_experts,  # E
    num_out,  # N
    width,  # K
    active,  # k
    x_stride,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(1)
    if tile >= tl.load(tiles_ptr + num_experts):
        return
    # The last expert whose first tile is not past this one; those without a pair have none.
    low = tl.zeros([], tl.int32)
    high = tl.zeros([], tl.int32) + num_experts
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(tiles_ptr + middle) <= tile:
            low = middle
        else:
            high = middle
    place = tl.load(starts_ptr + low) + (tile - tl.load(tiles_ptr + low)) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = place < tl.load(starts_ptr + low + 1)
    pair = tl.load(order_ptr + place, mask=inside, other=0)
    if GATED:
        row = pair // active
    else:
        row = place.to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # int64: an expert's offset passes 2**31 numbers in a large mixture
    expert = weight_ptr + low.to(tl.int64) * num_out * width * (2 if GATED else 1)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    other = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + row[:, None] * x_stride + k[None, :], mask=inside[:, None] & (k < width)[None, :], other=0.0
        )
        at = n[:, None].to(tl.int64) * width + k[None, :]
        mask = (n < num_out)[:, None] & (k < width)[None, :]
        w = tl.load(expert + at, mask=mask, other=0.0)
        sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
        if GATED:
            w = tl.load(expert + num_out.to(tl.int64) * width + at, mask=mask, other=0.0)
            other = tl.dot(x, tl.trans(w), other, input_precision="ieee")
    if GATED:
        y = sums / (1.0 + tl.exp(-sums)) * other
        to = place.to(tl.int64)
    else:
        y = sums * tl.load(scores_ptr + pair, mask=inside, other=0.0)[:, None]
        to = pair
    mask = inside[:, None] & (n < num_out)[None, :]
    tl.store(y_ptr + to[:, None] * num_out + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def group(chosen: Tensor, count: int, block: int) -> Groups:
    """Sort the pairs of chosen [T, k] int64 by expert, of `count`, in tiles of `block` pairs; nothing waits."""
    experts, order = chosen.flatten().sort(stable=True)
    edges = torch.arange(count + 1, device=chosen.device)
    starts = torch.searchsorted(experts, edges)
    tiles = (starts.diff() + block - 1) // block
    ends = torch.cat((tiles.new_zeros(1), tiles.cumsum(0)))
    return Groups(order, starts.to(torch.int32), ends.to(torch.int32))


def experts(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [T, D] through its experts, gated by SiLU -> a new [T, D]: see above.  T may be 0."""
    tokens, width = x.shape
    count, inner = down.shape[0], down.shape[2]
    active = chosen.shape[1]
    pairs = tokens * active
    assert x.stride(1) == 1
    assert gate_up.is_contiguous()
    assert down.is_contiguous()
    assert gate_up.shape == (count, 2 * inner, width)
    if not pairs:
        return torch.empty_like(x)
    shape = tile(pairs, count, x.element_size())
    groups = group(chosen, count, shape.pairs)
    most = pairs // shape.pairs + min(count, pairs)
    hidden = torch.empty((pairs, inner), dtype=x.dtype, device=x.device)
    # float32: what a token's experts add is rounded once
    parts = torch.empty((pairs, width), dtype=torch.float32, device=x.device)
    scores = weights.to(torch.float32).contiguous()
    for source, weight, result, gated in ((x, gate_up, hidden, True), (hidden, down, parts, False)):
        outputs = result.shape[1]
        _experts[(triton.cdiv(outputs, shape.outputs), most)](
            source, weight, *groups, scores, result, count, outputs, source.shape[1], active, source.stride(0),
            gated, shape.pairs, shape.outputs, shape.inputs, shape.stages, num_warps=shape.warps,
        )  # fmt: skip
    return parts.view(tokens, active, width).sum(1).to(x.dtype)


def tile(pairs: int, count: int, element_size: int) -> Tile:
    """The tile for so many pairs of a token and one of `count` experts."""
    if element_size > 2:
        return Tile(16, 32, 32, 4, 2)
    if pairs <= 16 * count:
        return Tile(16, 64, 128, 4, 3)
    return Tile(64, 64, 64, 4, 3)
