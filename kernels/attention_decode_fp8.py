"""attention_decode.py's kernel for keys and values in e4m3: the same tasks, sums and formula.

    k[n, e] = key_scale[n] * e4m3(K[n, e]),  v likewise;  the scales of narrow.py join the scores and the weights

Two neighbouring numbers of a head are read as one word of 16 bits, which the matrix units' loads can turn around where
single bytes have to be gathered one by one; so even and odd columns are products of their own.  A number becomes a bf16
one by its bits: the sign, then exponent and mantissa four places further down, times 2^120 (0x7F, e4m3's NaN, becomes
480: a NaN lies in the scale).  On an H100 this takes 0.54 to 0.61 of the time of bf16 keys, plain conversions of bytes
0.75 to 0.82.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from vserve.kernels.early import await_inputs
from vserve.kernels.narrow import key_scale, value_scale
from vserve.kernels.softcap import capped
from vserve.kernels.tasks import keys_of_task


@triton.jit
def _numbers(words, WIDE: tl.constexpr):
    """The low and the high bytes of words int16, e4m3, as bf16 numbers; WIDE: as fp32 ones."""
    if WIDE:
        bits = words.to(tl.int32)
        low = ((bits & 0x7F) << 20) | (((bits >> 7) & 1) << 31)
        high = (((bits >> 8) & 0x7F) << 20) | (((bits >> 15) & 1) << 31)
        low = low.to(tl.float32, bitcast=True) * 1.329227995784916e36
        high = high.to(tl.float32, bitcast=True) * 1.329227995784916e36
    else:
        # Two words a register at once: as plain arithmetic on 16 bits the whole loop has a quarter more instructions.
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c;
            shl.b32 a, $2, 4;
            shl.b32 b, $2, 8;
            and.b32 a, a, 0x07F007F0;
            and.b32 b, b, 0x80008000;
            or.b32 a, a, b;
            shr.u32 c, $2, 4;
            and.b32 c, c, 0x07F007F0;
            and.b32 b, $2, 0x80008000;
            or.b32 c, c, b;
            mov.b32 b, 0x7B807B80;
            mul.rn.bf16x2 $0, a, b;
            mul.rn.bf16x2 $1, c, b;
            }""",
            "=r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return low, high


@triton.jit
def decode_e4m3(
    q_ptr,  # [R, Hq, E], rows q_stride apart
    key_ptr,  # [num_blocks, block_size, Hk, E / 2] int16, blocks block_stride apart, tokens of a block slot_stride
    value_ptr,  # the same strides
    scales_ptr,  # [num_blocks, Hk, block_size] int32
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
    HALF: tl.constexpr,  # E / 2
    BLOCK_HALF: tl.constexpr,
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

    WIDE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    # Not q's type: a weight times a value's scale may be too small for fp16.
    VALUE_TYPE: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    g = tl.arange(0, BLOCK_GROUP)
    e = tl.arange(0, BLOCK_HALF)
    head = kv_head * GROUP + g
    mask_q = (g < GROUP)[:, None] & (e < HALF)[None, :]
    at_q = head[:, None] * (2 * HALF) + 2 * e[None, :]
    q_even = tl.load(q_ptr + row * q_stride + at_q, mask=mask_q, other=0.0)
    q_odd = tl.load(q_ptr + row * q_stride + at_q + 1, mask=mask_q, other=0.0)

    largest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    sums_even = tl.zeros([BLOCK_GROUP, BLOCK_HALF], tl.float32)
    sums_odd = tl.zeros([BLOCK_GROUP, BLOCK_HALF], tl.float32)
    table = tables_ptr + row * table_stride
    column = kv_head * HALF + e
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < end
        # int64: block * stride passes 2**31 on a cache over 4 GiB
        block = tl.load(table + n // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        at = (block * block_stride + (n % BLOCK_SIZE) * slot_stride)[:, None] + column[None, :]
        # Unread slots may hold NaN, and 0 * NaN is NaN: numbers and scales all need the mask.
        mask = inside[:, None] & (e < HALF)[None, :]
        even, odd = _numbers(tl.load(key_ptr + at, mask=mask, other=0), WIDE)
        scores = tl.dot(q_even, tl.trans(even.to(q_even.dtype)), input_precision="ieee")
        scores = tl.dot(q_odd, tl.trans(odd.to(q_odd.dtype)), scores, input_precision="ieee")
        at_scale = (block * tl.num_programs(0) + kv_head) * BLOCK_SIZE + n % BLOCK_SIZE
        scales = tl.load(scales_ptr + at_scale, mask=inside, other=0)
        scores *= (key_scale(scales) * scale)[None, :]
        if CAPPED:
            scores = capped(scores, cap)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(weights, axis=1)
        even, odd = _numbers(tl.load(value_ptr + at, mask=mask, other=0), WIDE)
        weights = (weights * value_scale(scales)[None, :]).to(VALUE_TYPE)
        sums_even = tl.dot(weights, even, sums_even * shrink[:, None], input_precision="ieee")
        sums_odd = tl.dot(weights, odd, sums_odd * shrink[:, None], input_precision="ieee")
        largest = new

    if alone:
        to = out_ptr + row * out_stride + at_q
        tl.store(to, (sums_even / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask_q)
        tl.store(to + 1, (sums_odd / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask_q)
    else:
        of_task = task.to(tl.int64) * HEADS
        tl.store(sums_ptr + of_task * (2 * HALF) + at_q, sums_even, mask=mask_q)
        tl.store(sums_ptr + of_task * (2 * HALF) + at_q + 1, sums_odd, mask=mask_q)
        tl.store(stats_ptr + (of_task + head) * 2, largest, mask=g < GROUP)
        tl.store(stats_ptr + (of_task + head) * 2 + 1, total, mask=g < GROUP)


def tile(width: int, element_size: int) -> tuple[int, int, int]:
    """(keys a step of the loop, warps, pipeline stages) for a head of width numbers, queries of element_size bytes."""
    if width > 128 or element_size > 2:
        return 32, 4, 2
    return 64, 2, 3
