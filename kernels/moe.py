"""The products of a mixture's experts, gated MLPs of which each token takes a few; weights are read once a tile.

    h[p] = silu(gate_e x[t]) * up_e x[t],   y[t] = sum over the pairs p of t of w[p] * down_e h[p]  (+ residual[t])
    where pair p = t k + j is one token t and its expert e = chosen[t, j]; x may be normed first as gemv.py does

x [T, D]; gate_up [E, 2F, D], gate first; down [E, D, F]; Routes as route.py makes them; bf16, fp16 or fp32, products
accumulate in float32, and so does the sum over a token's experts, always in the order of its choice.  Every grid
depends on shapes alone: it fits a captured graph.

A few tokens (``few``): a program takes rows of one expert's weights for one pair, products in plain registers, the norm
for free; the second kernel sums over the experts of its token.  More tokens (``products``, of which experts.py makes
the whole): pairs are sorted by expert; a tile is some pairs of one expert, so its weights are read once a tile, and
those of experts without a pair not at all; the weights are the first operand of the matrix units, which keeps Hopper's
wide instruction busy however few the pairs.  P // tile + min(E, P) bounds the number of tiles for any choice.
Shazeer et al. 2017, arXiv:1701.06538; Gale et al. 2023, "MegaBlocks", arXiv:2211.15841.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,assignment"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vserve.kernels.early import await_inputs, await_then_release, options
from vserve.kernels.route import Groups, Routes

FEW_TOKENS = 2
"""Tokens up to which each pair reads its expert's weights for itself."""


class Tile(NamedTuple):
    """Pairs x outputs of a program, inputs of one step of its loop, and how the compiler spreads them."""

    pairs: int
    outputs: int
    inputs: int
    warps: int
    stages: int


class Rows(NamedTuple):
    """Outputs of a program and inputs of one step of its loop (of each expert), and its warps."""

    outputs: int
    inputs: int
    warps: int


@triton.jit
def _gate_rows(
    x_ptr,  # [T, K], rows x_stride apart
    weight_ptr,  # [E, 2 F, K]
    norm_ptr,  # [K]
    chosen_ptr,  # [T * ACTIVE] int32
    y_ptr,  # [T * ACTIVE, F]
    num_out,  # F
    x_stride,
    eps,
    K: tl.constexpr,
    ACTIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    EVEN: tl.constexpr = K % BLOCK_K == 0
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    # The next kernel reads what was chosen before it waits.
    await_then_release(EARLY)
    expert = tl.load(chosen_ptr + pair).to(tl.int64)
    # Past the last row read the last one again: cheaper than a mask on every load, and never stored.
    row = (expert * 2 * num_out + tl.minimum(n, num_out - 1))[:, None] * K
    other = row + num_out.to(tl.int64) * K
    x_row = x_ptr + (pair // ACTIVE).to(tl.int64) * x_stride
    w = _weights(weight_ptr + row, k[None, :], K, EVEN)
    v = _weights(weight_ptr + other, k[None, :], K, EVEN)
    gate = tl.zeros([ROWS, BLOCK_K], tl.float32)
    up = tl.zeros([ROWS, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        # The next weights are asked for before the present ones are used; behind the last, the last again.
        ahead = tl.minimum(start + BLOCK_K, (K - 1) // BLOCK_K * BLOCK_K) + k[None, :]
        w_next = w
        v_next = v
        if BLOCK_K < K:
            w_next = _weights(weight_ptr + row, ahead, K, EVEN)
            v_next = _weights(weight_ptr + other, ahead, K, EVEN)
        at = start + k
        x = tl.load(x_row + at, mask=at < K, other=0.0).to(tl.float32)
        squares += x * x
        x *= tl.load(norm_ptr + at, mask=at < K, other=0.0).to(tl.float32)
        gate += w.to(tl.float32) * x[None, :]
        up += v.to(tl.float32) * x[None, :]
        w = w_next
        v = v_next
    scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    y = tl.sum(gate, axis=1) * scale
    y = y / (1.0 + tl.exp(-y)) * (tl.sum(up, axis=1) * scale)
    tl.store(y_ptr + pair.to(tl.int64) * num_out + n, y.to(y_ptr.dtype.element_ty), mask=n < num_out)


@triton.jit
def _down_rows(
    h_ptr,  # [T * ACTIVE, K]
    weight_ptr,  # [E, N, K]
    chosen_ptr,  # [T * ACTIVE] int32
    scores_ptr,  # [T * ACTIVE] fp32
    residual_ptr,  # [T, N], rows residual_stride apart
    y_ptr,  # [T, N]
    num_out,  # N
    residual_stride,
    K: tl.constexpr,
    ACTIVE: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    EVEN: tl.constexpr = K % BLOCK_K == 0
    LAST: tl.constexpr = (K - 1) // BLOCK_K * BLOCK_K
    token = tl.program_id(1)
    i = tl.arange(0, ROWS * SLOTS)
    n = tl.program_id(0) * ROWS + i // SLOTS
    slot = i % SLOTS
    # Behind a token's last expert read the last one again; its share is 0.
    pair = token * ACTIVE + tl.minimum(slot, ACTIVE - 1)
    k = tl.arange(0, BLOCK_K)
    # What was chosen is older than the kernel ahead, which let this one start after its own wait; past the first cache,
    # which may hold the last layer's.
    expert = tl.load(chosen_ptr + pair, cache_modifier=".cg").to(tl.int64)
    share = tl.load(scores_ptr + pair, cache_modifier=".cg")
    row = (expert * num_out + tl.minimum(n, num_out - 1))[:, None] * K
    w = _weights(weight_ptr + row, k[None, :], K, EVEN)
    await_inputs(EARLY)
    sums = tl.zeros([ROWS * SLOTS, BLOCK_K], tl.float32)
    h_row = h_ptr + pair[:, None].to(tl.int64) * K
    for start in range(0, K, BLOCK_K):
        w_next = w
        if BLOCK_K < K:
            w_next = _weights(weight_ptr + row, tl.minimum(start + BLOCK_K, LAST) + k[None, :], K, EVEN)
        at = start + k
        h = tl.load(h_row + at[None, :], mask=(at < K)[None, :], other=0.0).to(tl.float32)
        sums += w.to(tl.float32) * h
        w = w_next
    y = tl.where(slot < ACTIVE, tl.sum(sums, axis=1) * share, 0.0)
    y = tl.sum(tl.reshape(y, [ROWS, SLOTS]), axis=1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = n < num_out
    token = token.to(tl.int64)
    y += tl.load(residual_ptr + token * residual_stride + n, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * num_out + n, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _weights(row_ptr, k, K: tl.constexpr, EVEN: tl.constexpr):
    # row_ptr [R, 1], k [1, B] -> [R, B]; read once: first to leave the cache
    if EVEN:
        return tl.load(row_ptr + k, eviction_policy="evict_first")
    return tl.load(row_ptr + k, mask=k < K, other=0.0, eviction_policy="evict_first")


@triton.jit
def find_tile(starts_ptr, tile, count, pairs, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert of a tile, the first of its places and the end of its expert's; the same where there is no such tile.

    starts [E + 1] int32, count E <= BLOCK_E, pairs P.
    """
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(starts_ptr + e, mask=e < count, other=pairs)
    end = tl.load(starts_ptr + e + 1, mask=e < count, other=pairs)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(tiles, axis=0)
    expert = tl.sum((last <= tile).to(tl.int32), axis=0)
    mine = e == expert
    place = tl.sum(tl.where(mine, begin + (tile - last + tiles) * BLOCK_M, 0), axis=0)
    stop = tl.sum(tl.where(mine, end, 0), axis=0)
    return expert, place, stop


@triton.jit
def tile_operands(x_ptr, x_stride, place, pair, num_out, ACTIVE: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr):
    """Where the inputs of `place` and `pair` [M] begin, [1, M], and the weights' rows of a tile [ROWS], GATED [2 ROWS]:
    gate and up of an output side by side.  The last row again past the end."""
    HALVES: tl.constexpr = 2 if GATED else 1
    row = place
    if GATED:
        row = pair // ACTIVE
    r = tl.arange(0, ROWS * HALVES)
    n = tl.minimum(tl.program_id(0) * ROWS + r // HALVES, num_out - 1) + r % HALVES * num_out
    return x_ptr + row.to(tl.int64)[None, :] * x_stride, n


@triton.jit
def _tiles(
    x_ptr,  # [T, K] with GATED, rows x_stride apart, one a token; else [P, K], one a place in the order
    weight_ptr,  # [E, N, K]; with GATED [E, 2 N, K]
    order_ptr,  # [P] int32
    starts_ptr,  # [E + 1] int32
    y_ptr,  # [P, N]: one row a place in the order with GATED, else one a pair
    count,  # E
    pairs,  # P
    num_out,  # N
    x_stride,
    K: tl.constexpr,
    ACTIVE: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    expert, first, stop = find_tile(starts_ptr, tl.program_id(1), count, pairs, BLOCK_M, BLOCK_E)
    if first >= stop:
        return
    EVEN: tl.constexpr = K % BLOCK_K == 0
    HALVES: tl.constexpr = 2 if GATED else 1
    place = first + tl.arange(0, BLOCK_M)
    inside = place < stop
    pair = tl.load(order_ptr + place, mask=inside, other=0)
    x_row, n = tile_operands(x_ptr, x_stride, place, pair, num_out, ACTIVE, GATED, ROWS)
    # int64: an expert's offset passes 2**31 numbers in a large mixture
    w_row = weight_ptr + (expert.to(tl.int64) * HALVES * num_out + n)[:, None] * K
    acc = tl.zeros([ROWS * HALVES, BLOCK_M], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        if EVEN:
            x = tl.load(x_row + k[:, None], mask=inside[None, :], other=0.0)
            w = tl.load(w_row + k[None, :])
        else:
            x = tl.load(x_row + k[:, None], mask=inside[None, :] & (k < K)[:, None], other=0.0)
            w = tl.load(w_row + k[None, :], mask=(k < K)[None, :], other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    store_tile(acc, y_ptr, place, pair, inside, num_out, GATED, BLOCK_M, ROWS)


@triton.jit
def store_tile(
    acc, y_ptr, place, pair, inside, num_out, GATED: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr
):
    """acc [ROWS, BLOCK_M] to the rows `pair` of y [P, num_out]; GATED: silu(gate) * up of [2 ROWS, BLOCK_M], gate and
    up of an output side by side, to the rows `place`."""
    to = pair
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [ROWS, 2, BLOCK_M]), (0, 2, 1)))
        acc = gate / (1.0 + tl.exp(-gate)) * up
        to = place
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = inside[None, :] & (n < num_out)[:, None]
    tl.store(y_ptr + to.to(tl.int64)[None, :] * num_out + n[:, None], acc.to(y_ptr.dtype.element_ty), mask=mask)


def few(
    x: Tensor,
    norm: Tensor,
    eps: float,
    routes: Routes,
    gate_up: Tensor,
    down: Tensor,
    *,
    early: bool = False,
    shapes: tuple[Rows, Rows] | None = None,
) -> Tensor:
    """x [T, D] + what the experts make of rms_norm(x, norm [D], eps) -> a new [T, D].  0 < T.

    shapes, of the two products, override the measured choice.
    """
    tokens, width = x.shape
    count, _, inner = down.shape
    assert x.stride(1) == 1
    assert gate_up.is_contiguous()
    assert down.is_contiguous()
    assert gate_up.shape == (count, 2 * inner, width)
    active = routes.chosen.shape[1]
    hidden = torch.empty((tokens * active, inner), dtype=x.dtype, device=x.device)
    y = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    slots = triton.next_power_of_2(active)
    first, second = shapes or rows_shapes(width, inner, slots, x.element_size())
    _gate_rows[(triton.cdiv(inner, first.outputs), tokens * active)](
        x, gate_up, norm, routes.chosen, hidden, inner, x.stride(0), eps, width, active, first.outputs, first.inputs,
        early, **options(first.warps, early),
    )  # fmt: skip
    _down_rows[(triton.cdiv(width, second.outputs), tokens)](
        hidden, down, routes.chosen, routes.weights, x, y, width, x.stride(0), inner, active, slots, second.outputs,
        second.inputs, early, **options(second.warps, early),
    )  # fmt: skip
    return y


def tiles_bound(pairs: int, count: int, block: int) -> int:
    """The most tiles of `block` pairs that any choice of experts makes of so many pairs."""
    return pairs // block + min(count, pairs)


def products(
    x: Tensor, weight: Tensor, groups: Groups, y: Tensor, active: int, *, gated: bool, tile: Tile, early: bool = False
) -> None:
    """One of the two products of groups' pairs, to y [P, N].

    gated: of tokens x [T, K] and weight [E, 2N, K], y by place in the order; else of x [P, K], by place, and weight
    [E, N, K], y by pair.
    """
    pairs, outputs = y.shape
    count, _, width = weight.shape
    assert x.stride(1) == 1
    assert x.shape[1] == width
    assert weight.is_contiguous()
    _tiles[(triton.cdiv(outputs, tile.outputs), tiles_bound(pairs, count, tile.pairs))](
        x, weight, groups.order, groups.starts, y, count, pairs, outputs, x.stride(0), width, active, gated,
        triton.next_power_of_2(count), tile.pairs, tile.outputs, tile.inputs, tile.stages, early,
        **options(tile.warps, early),
    )  # fmt: skip


def rows_shapes(width: int, inner: int, slots: int, element_size: int) -> tuple[Rows, Rows]:
    """How ``few`` cuts the two products, for D, F and k (padded); measured on an H100 with D 2048, F 768 and k 8."""
    if element_size > 2:
        return Rows(16, 128, 4), Rows(16, 16, 4)
    block = max(16, min(2048 // slots, triton.next_power_of_2(inner)))
    return Rows(1, min(2048, triton.next_power_of_2(width)), 4), Rows(2, block, 8)


def measured(pairs: int, count: int, element_size: int, *, gated: bool) -> Tile:
    """The tile for so many pairs of a token and one of `count` experts.

    Measured on an H100 with D 2048, F 768, 128 experts of which a token takes 8, and 8 to 8192 tokens in bf16: the
    fastest of six to eight candidates for each number of pairs an expert.
    """
    if element_size > 2:
        return Tile(16, 32, 32, 4, 2)
    each = pairs / count
    if each <= 8:
        return Tile(16, 32, 128, 4, 4) if gated else Tile(16, 128, 128, 4, 3)
    if each <= 24:
        return Tile(32, 32, 128, 4, 4) if gated else Tile(32, 128, 64, 4, 4)
    if each <= 96:
        return Tile(64, 32, 128, 4, 3) if gated else Tile(64, 128, 64, 8, 4)
    return Tile(128, 64, 64, 8, 3) if gated else Tile(128, 128, 64, 8, 3)
