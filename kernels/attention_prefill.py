"""Paged causal attention of chunks of query tokens over everything cached before and in each chunk.

    out[t, h] = sum over n <= p(t) of softmax_n(scale * q[t, h] . K[r, n, h // G]) V[r, n, h // G]
    with a window W only over n > p(t) - W; with a cap C of the scores s, softmax_n(C tanh(s / C))
    p(t) = context_lens[r] - query_lens[r] + (t - query_starts[r]),  r the sequence of token t

q, out [T, Hq, E], the tokens of R sequences one after another: rows query_starts[r] to query_starts[r + 1];
query_starts [R + 1], context_lens [R] int32; caches [num_blocks, block_size, Hk, E], G = Hq / Hk; block_tables [R, M]
int32.  The chunk's own keys are in the cache already.  bf16, fp16 or fp32; products accumulate in float32.  Caches of
another type become q's as they are read; those of e4m3 have scales (narrow.py), which join the
scores and the weights.

A tile is BLOCK_M rows: BLOCK_M // G tokens of one sequence times the G query heads that share a key head.  The grid,
T // tokens + R tiles a key head, bounds the number of tiles for any lengths: it fits a captured graph.  Rows of no
sequence (padding after the last) are neither read nor written.  Tiles are taken last first: late tokens see most keys.
Dao 2023, "FlashAttention-2", arXiv:2307.08691; Kwon et al. 2023, "PagedAttention", arXiv:2309.06180.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vserve.kernels.early import await_inputs, options
from vserve.kernels.narrow import key_scale, value_scale, words
from vserve.kernels.softcap import capped

LARGE = 1 << 17
"""Rows of one batch, T * Hq, from which a wider tile pays."""


class Tile(NamedTuple):
    """rows x keys of one step of the loop, and how the compiler spreads them."""

    rows: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _step(
    start,
    lowest,  # the first key that any row sees, read with WINDOW
    end,
    q,  # [BLOCK_M, BLOCK_WIDTH]
    last_key,  # [BLOCK_M]: the last key that each row sees
    key_ptr,
    value_ptr,
    scales_ptr,
    table,
    column,  # [BLOCK_WIDTH]
    scale,
    cap,
    block_stride,
    slot_stride,
    largest,
    total,
    sums,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
):
    n = start + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_WIDTH)
    read = n
    if MASKED:
        # A slot that no row sees may hold NaN, and 0 * NaN is NaN: the nearest that one sees is read in its place.
        read = tl.minimum(n, end - 1)
        if WINDOW > 0:
            read = tl.maximum(read, lowest)
    block = tl.load(table + read // BLOCK_SIZE)
    # int64: block * stride passes 2**31 on a cache over 4 GiB
    place = block.to(tl.int64) * block_stride + (read % BLOCK_SIZE) * slot_stride
    at = place[:, None] + column[None, :]
    if WIDTH == BLOCK_WIDTH:
        keys = tl.load(key_ptr + at)
        values = tl.load(value_ptr + at)
    else:
        keys = tl.load(key_ptr + at, mask=(e < WIDTH)[None, :], other=0.0)
        values = tl.load(value_ptr + at, mask=(e < WIDTH)[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee")
    if SCALED:
        scale_words = tl.load(scales_ptr + block.to(tl.int64) * (tl.num_programs(0) * BLOCK_SIZE) + read % BLOCK_SIZE)
        scores *= key_scale(scale_words)[None, :]
    if CAPPED:
        scores = capped(scores * scale, cap) / scale
    if MASKED:
        scores = tl.where(n[None, :] <= last_key[:, None], scores, float("-inf"))
        if WINDOW > 0:
            scores = tl.where(n[None, :] > last_key[:, None] - WINDOW, scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - new[:, None])
    shrink = tl.exp2(largest - new)
    total = total * shrink + tl.sum(weights, axis=1)
    # A weight times a value's scale may be too small for fp16.
    VALUE_TYPE: tl.constexpr = tl.bfloat16 if SCALED and q.dtype == tl.float16 else q.dtype
    if SCALED:
        weights *= value_scale(scale_words)[None, :]
    sums = tl.dot(weights.to(VALUE_TYPE), values.to(VALUE_TYPE), sums * shrink[:, None], input_precision="ieee")
    return new, total, sums


@triton.jit
def _prefill(
    q_ptr,  # [T, Hq, E], tokens q_stride apart
    key_ptr,  # [num_blocks, block_size, Hk, E], blocks block_stride apart, tokens of a block slot_stride
    value_ptr,  # the same strides
    scales_ptr,  # [num_blocks, Hk, block_size] int32, read when SCALED
    tables_ptr,  # [R, M] int32, rows table_stride apart
    starts_ptr,  # [R + 1] int32
    lens_ptr,  # [R] int32
    out_ptr,  # [T, Hq, E], tokens out_stride apart
    scale,  # of the scores, log2(e) included; > 0
    cap,  # of the scores, as the model has it; read when CAPPED
    q_stride,
    out_stride,
    block_stride,
    slot_stride,
    table_stride,
    num_rows,  # R
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,  # G
    TOKENS: tl.constexpr,  # BLOCK_M // G
    WIDTH: tl.constexpr,  # E
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    origin = tl.load(starts_ptr)
    # Sequence r may use tiles from (its start // TOKENS + r): the last r whose first tile is not past this one.  Found
    # in one read of all: a search by halves would wait for memory at every step.
    r = tl.arange(0, BLOCK_ROWS)
    first_tile = (tl.load(starts_ptr + r, mask=r < num_rows, other=0) - origin) // TOKENS + r
    low = tl.sum(((first_tile <= tile) & (r < num_rows)).to(tl.int32), axis=0) - 1
    start = tl.load(starts_ptr + low)
    length = tl.load(starts_ptr + low + 1) - start
    offset = (tile - ((start - origin) // TOKENS + low)) * TOKENS
    if offset >= length:
        return
    context = tl.load(lens_ptr + low)
    before = context - length  # keys cached before the chunk

    m = tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_WIDTH)
    token = offset + m // GROUP
    valid = (m < TOKENS * GROUP) & (token < length)
    head = kv_head * GROUP + m % GROUP
    mask_q = valid[:, None] & (e < WIDTH)[None, :]
    at_token = (start + token).to(tl.int64)
    q = tl.load(q_ptr + (at_token * q_stride + head * WIDTH)[:, None] + e[None, :], mask=mask_q, other=0.0)
    last_key = before + tl.minimum(token, length - 1)
    end = before + tl.minimum(offset + TOKENS, length)
    # Keys that every row sees need no mask.
    plain_end = (before + offset + 1) // BLOCK_N * BLOCK_N

    # Keys before `begin` are seen by no row, those from `all_see` on by every row as far as its window goes.
    lowest = 0
    begin = 0
    all_see = 0
    if WINDOW > 0:
        lowest = tl.maximum(before + offset + 1 - WINDOW, 0)
        begin = lowest // BLOCK_N * BLOCK_N
        all_see = tl.cdiv(tl.maximum(end - WINDOW, 0), BLOCK_N) * BLOCK_N
        plain_end = tl.maximum(plain_end, begin)
        all_see = tl.minimum(all_see, plain_end)
        # Finite: a row may see nothing of the first keys, and -inf - -inf is NaN
        largest = tl.full([BLOCK_M], -1e30, tl.float32)
    else:
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_WIDTH], tl.float32)
    table = tables_ptr + low.to(tl.int64) * table_stride
    column = kv_head * WIDTH + e
    scales_ptr += kv_head * BLOCK_SIZE
    if WINDOW > 0:
        for first in tl.range(begin, all_see, BLOCK_N, num_stages=STAGES):
            largest, total, sums = _step(
                first, lowest, end, q, last_key, key_ptr, value_ptr, scales_ptr, table, column, scale, cap,
                block_stride, slot_stride, largest, total, sums,
                WIDTH, BLOCK_WIDTH, BLOCK_SIZE, BLOCK_N, True, WINDOW, CAPPED, SCALED,
            )  # fmt: skip
    for first in tl.range(all_see, plain_end, BLOCK_N, num_stages=STAGES):
        largest, total, sums = _step(
            first, lowest, end, q, last_key, key_ptr, value_ptr, scales_ptr, table, column, scale, cap,
            block_stride, slot_stride, largest, total, sums,
            WIDTH, BLOCK_WIDTH, BLOCK_SIZE, BLOCK_N, False, WINDOW, CAPPED, SCALED,
        )  # fmt: skip
    for first in tl.range(plain_end, end, BLOCK_N, num_stages=STAGES):
        largest, total, sums = _step(
            first, lowest, end, q, last_key, key_ptr, value_ptr, scales_ptr, table, column, scale, cap,
            block_stride, slot_stride, largest, total, sums,
            WIDTH, BLOCK_WIDTH, BLOCK_SIZE, BLOCK_N, True, WINDOW, CAPPED, SCALED,
        )  # fmt: skip
    to = out_ptr + (at_token * out_stride + head * WIDTH)[:, None] + e[None, :]
    tl.store(to, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask_q)


def prefill_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    out: Tensor | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scales: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """Causal attention of q [T, Hq, E], R chunks one after another, over each sequence's pages -> [T, Hq, E].

    A sequence without query tokens is skipped.  query_starts may begin above 0: rows before it are not touched, so a
    slice of a larger batch can be given with the whole q and out.  out: written in place of a new tensor; rows that
    belong to no sequence keep what they held.
    scales [num_blocks, Hk, block_size, 2] bf16: of caches of e4m3, and of no other.
    """
    tokens, heads, width = q.shape
    rows = context_lens.shape[0]
    block_size, kv_heads = key_cache.shape[1], key_cache.shape[2]
    group = heads // kv_heads
    assert heads == group * kv_heads
    assert q.stride()[1:] == (width, 1)
    assert key_cache.stride() == value_cache.stride()
    assert key_cache.stride()[2:] == (width, 1)
    assert block_tables.stride(1) == 1
    assert (scales is not None) == (key_cache.dtype.itemsize == 1)
    if out is None:
        out = torch.empty((tokens, heads, width), dtype=q.dtype, device=q.device)
    assert out.stride()[1:] == (width, 1)
    if tokens == 0 or rows == 0:
        return out
    shape = tile(tokens, heads, width, q.element_size(), key_cache.element_size())
    per_tile = shape.rows // group
    _prefill[(kv_heads, tokens // per_tile + rows)](
        q,
        key_cache,
        value_cache,
        q if scales is None else words(scales),
        block_tables,
        query_starts,
        context_lens,
        out,
        scale * math.log2(math.e),
        softcap or 0.0,
        q.stride(0),
        out.stride(0),
        key_cache.stride(0),
        key_cache.stride(1),
        block_tables.stride(0),
        rows,
        triton.next_power_of_2(rows),
        group,
        per_tile,
        width,
        triton.next_power_of_2(width),
        block_size,
        shape.rows,
        shape.keys,
        shape.stages,
        window or 0,
        softcap is not None,
        scales is not None,
        early,
        **options(shape.warps, early),
    )
    return out


def tile(tokens: int, heads: int, width: int, element_size: int, cache_size: int) -> Tile:
    """The tile for T tokens of Hq heads of width numbers: as measured on an H100.

    element_size, cache_size: bytes of a number of the queries, and of the keys as they are stored.
    """
    if max(element_size, cache_size) > 2:
        return Tile(32, 32, 4, 2)
    if cache_size == 1 and 64 < width <= 128:
        return Tile(128, 128, 8, 2)  # what is converted for each tile is shared by more rows
    if width > 128:
        return Tile(64, 32, 4, 2)
    if width > 64:
        return Tile(128, 64, 4, 3) if tokens * heads >= LARGE else Tile(64, 64, 4, 2)
    return Tile(64, 64, 4, 2)
