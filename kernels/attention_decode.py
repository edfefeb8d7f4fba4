"""Paged attention of one query token a sequence, its keys split over many programs (FlashDecoding).

    out[r, h] = sum over n < context_lens[r] of softmax_n(scale * q[r, h] . K[r, n, h // G]) V[r, n, h // G]
    with a window W only over n >= context_lens[r] - W; with a cap C of the scores s, softmax_n(C tanh(s / C))

q, out [R, Hq, E]; caches [num_blocks, block_size, Hk, E], G = Hq / Hk; key n of row r lives in block
block_tables[r, n // block_size] at offset n % block_size.  bf16, fp16 or fp32; products accumulate in float32.
Caches of another float type become q's as they are read; those of e4m3 have a kernel of their own in
attention_decode_fp8.py.

A program takes a task of tasks.py, at most `chunk` keys of one row.  A row of length 0 (padding) has no task and an
output of zeros.  The G query heads that share a key head are the rows of one matrix product, padded to 16.
With a window the plan is made of min(context_lens, W), and tasks count from the first key that is seen: pages before it
are not read.  The cap: Bello et al. 2016, arXiv:1611.09940.
Dao et al. 2023, "Flash-Decoding for long-context inference"; Milakov, Gimelshein 2018, arXiv:1805.02867.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vserve.kernels import attention_decode_fp8 as fp8
from vserve.kernels.early import await_inputs, options
from vserve.kernels.narrow import words
from vserve.kernels.softcap import capped
from vserve.kernels.tasks import DecodePlan, keys_of_task, plan_tasks


@triton.jit
def _decode(
    q_ptr,  # [R, Hq, E], rows q_stride apart
    key_ptr,  # [num_blocks, block_size, Hk, E], blocks block_stride apart, tokens of a block slot_stride
    value_ptr,  # the same strides
    tables_ptr,  # [R, M] int32, rows table_stride apart
    lens_ptr,  # [R] int32
    task_rows_ptr,  # [N] int32
    task_starts_ptr,  # [R + 1] int32
    chunk_ptr,  # [1] int32
    out_ptr,  # [R, Hq, E], rows out_stride apart
    sums_ptr,  # [N, Hq, E] float32: weighted values of each task
    stats_ptr,  # [N, Hq, 2] float32: largest score and sum of weights of each task
    scale,  # of the scores, log2(e) included
    cap,  # of the scores, as the model has it; read when CAPPED
    q_stride,
    out_stride,
    block_stride,
    slot_stride,
    table_stride,
    HEADS: tl.constexpr,  # Hq
    GROUP: tl.constexpr,  # G
    BLOCK_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,  # E
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    CAPPED: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    kv_head = tl.program_id(0)
    task = tl.program_id(1)
    row = tl.load(task_rows_ptr + task)
    if row < 0:
        return
    begin, end, alone = keys_of_task(task, row, task_starts_ptr, chunk_ptr, lens_ptr, WINDOW)
    row = row.to(tl.int64)

    g = tl.arange(0, BLOCK_GROUP)
    e = tl.arange(0, BLOCK_WIDTH)
    head = kv_head * GROUP + g
    mask_q = (g < GROUP)[:, None] & (e < WIDTH)[None, :]
    q = tl.load(q_ptr + row * q_stride + head[:, None] * WIDTH + e[None, :], mask=mask_q, other=0.0)

    largest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    sums = tl.zeros([BLOCK_GROUP, BLOCK_WIDTH], tl.float32)
    table = tables_ptr + row * table_stride
    column = kv_head * WIDTH + e
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < end
        block = tl.load(table + n // BLOCK_SIZE, mask=inside, other=0)
        # int64: block * stride passes 2**31 on a cache over 4 GiB
        place = block.to(tl.int64) * block_stride + (n % BLOCK_SIZE) * slot_stride
        at = place[:, None] + column[None, :]
        # Unread slots may hold NaN, and 0 * NaN is NaN: keys and values both need the mask.
        mask = inside[:, None] & (e < WIDTH)[None, :]
        keys = tl.load(key_ptr + at, mask=mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        if CAPPED:
            scores = capped(scores, cap)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(weights, axis=1)
        values = tl.load(value_ptr + at, mask=mask, other=0.0).to(q.dtype)
        sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
        largest = new

    if alone:
        to = out_ptr + row * out_stride + head[:, None] * WIDTH + e[None, :]
        tl.store(to, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask_q)
    else:
        place = task.to(tl.int64) * HEADS + head
        tl.store(sums_ptr + place[:, None] * WIDTH + e[None, :], sums, mask=mask_q)
        tl.store(stats_ptr + place * 2, largest, mask=g < GROUP)
        tl.store(stats_ptr + place * 2 + 1, total, mask=g < GROUP)


@triton.jit
def _reduce(
    task_starts_ptr,  # [R + 1] int32
    sums_ptr,  # [N, Hq, E] float32
    stats_ptr,  # [N, Hq, 2] float32
    out_ptr,  # [R, Hq, E], rows out_stride apart
    out_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_MOST: tl.constexpr,
    TILE: tl.constexpr,
    ZEROS: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(task_starts_ptr + row)
    count = tl.load(task_starts_ptr + row + 1) - first
    if count == 1:
        return
    e = tl.arange(0, BLOCK_WIDTH)
    to = out_ptr + row * out_stride + head * WIDTH + e
    if count == 0:
        if ZEROS:
            tl.store(to, tl.zeros([BLOCK_WIDTH], out_ptr.dtype.element_ty), mask=e < WIDTH)
        return
    j = tl.arange(0, BLOCK_MOST)
    stats = stats_ptr + ((first + j).to(tl.int64) * HEADS + head) * 2
    largest = tl.load(stats, mask=j < count, other=float("-inf"))
    totals = tl.load(stats + 1, mask=j < count, other=0.0)
    top = tl.max(largest, axis=0)
    total = tl.sum(tl.exp2(largest - top) * totals, axis=0)
    y = tl.zeros([BLOCK_WIDTH], tl.float32)
    for base in range(0, count, TILE):
        k = base + tl.arange(0, TILE)
        place = (first + k).to(tl.int64) * HEADS + head
        weight = tl.exp2(tl.load(stats_ptr + place * 2, mask=k < count, other=float("-inf")) - top)
        mask = (k < count)[:, None] & (e < WIDTH)[None, :]
        sums = tl.load(sums_ptr + place[:, None] * WIDTH + e[None, :], mask=mask, other=0.0)
        y += tl.sum(weight[:, None] * sums, axis=0)
    tl.store(to, (y / total).to(out_ptr.dtype.element_ty), mask=e < WIDTH)


def decode_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    plan: DecodePlan | None = None,
    out: Tensor | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    zeros: bool = True,
    scales: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """Attention of q [R, Hq, E], one token a row, over context_lens [R] keys of block_tables [R, M] -> [R, Hq, E].

    plan: from plan_tasks of the same context_lens and window; made here when absent.  out: written in place of a new
    tensor.  zeros: rows of length 0 get zeros; else their outputs are left alone.  Each row of q and out is contiguous,
    rows may be any distance apart.
    scales [num_blocks, Hk, block_size, 2] bf16: of caches of e4m3, and of no other.
    """
    rows, heads, width = q.shape
    block_size, kv_heads = key_cache.shape[1], key_cache.shape[2]
    group = heads // kv_heads
    assert heads == group * kv_heads
    assert q.stride()[1:] == (width, 1)
    assert key_cache.stride() == value_cache.stride()
    assert key_cache.stride()[2:] == (width, 1)
    assert block_tables.stride(1) == 1
    assert (scales is not None) == (key_cache.dtype.itemsize == 1)
    if out is None:
        out = torch.empty((rows, heads, width), dtype=q.dtype, device=q.device)
    assert out.stride()[1:] == (width, 1)
    if rows == 0:
        return out
    if plan is None:
        plan = plan_tasks(context_lens, kv_heads, window=window, e4m3=scales is not None)
    tasks = plan.task_rows.shape[0]
    sums = torch.empty((tasks, heads, width), dtype=torch.float32, device=q.device)
    stats = torch.empty((tasks, heads, 2), dtype=torch.float32, device=q.device)
    block_width = triton.next_power_of_2(width)
    if scales is None:
        kernel, caches = _decode, [key_cache, value_cache]
        widths = (width, block_width)
        block_n, warps, stages = tile(width, max(q.element_size(), key_cache.element_size()))
    else:
        kernel = fp8.decode_e4m3
        key_cache, value_cache = key_cache.view(torch.int16), value_cache.view(torch.int16)
        caches = [key_cache, value_cache, words(scales)]
        widths = (width // 2, max(16, block_width // 2))  # the matrix units take no fewer
        block_n, warps, stages = fp8.tile(width, q.element_size())
    kernel[(kv_heads, tasks)](
        q,
        *caches,
        block_tables,
        context_lens,
        plan.task_rows,
        plan.task_starts,
        plan.chunk,
        out,
        sums,
        stats,
        scale * math.log2(math.e),
        softcap or 0.0,
        q.stride(0),
        out.stride(0),
        key_cache.stride(0),
        key_cache.stride(1),
        block_tables.stride(0),
        heads,
        group,
        max(16, triton.next_power_of_2(group)),
        *widths,
        block_size,
        block_n,
        stages,
        window or 0,
        softcap is not None,
        early,
        **options(warps, early),
    )
    most = triton.next_power_of_2(plan.most)
    _reduce[(rows, heads)](
        plan.task_starts,
        sums,
        stats,
        out,
        out.stride(0),
        heads,
        width,
        block_width,
        most,
        8,
        zeros,
        early,
        **options(1, early),
    )
    return out


def tile(width: int, element_size: int) -> tuple[int, int, int]:
    """(keys a step of the loop, warps, pipeline stages) for a head of width numbers of element_size bytes."""
    if width > 128 or element_size > 2:
        return 32, 4, 2
    return 64, 4 if width > 64 else 2, 3
