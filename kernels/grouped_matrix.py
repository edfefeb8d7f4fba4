"""Rows of activations times weights of 4 or 8 bits on the matrix units, and the weights written out as plain numbers.

    as grouped.py says, for any M, without norm and gate

The weights are the first operand: 64 rows and more of it keep Hopper's wide instruction busy however few rows x has.
They become numbers in the registers that feed that instruction, while the one before still runs; so all that a step
reads is copied ahead, which takes at least 4 bytes a number: a scale comes with its neighbour.  Where tiles are few,
several programs share one, each with a part of K.  The last to end adds the parts up, always in the same order: no sum
depends on who comes first.  Split K for small batches: arXiv:2402.00025.

4 bits put into the mantissa of a power of two, 128 in bf16 and 1024 in fp16, give that power + q exactly.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,assignment"
# ruff: noqa: SIM108

from __future__ import annotations

import triton
import triton.language as tl

from vserve.kernels.grouped_row import FLOAT, MINIMUM, ZERO, load_group

_TO_NUMBERS = """
    {
    .reg .b32 t, u, v, w;
    shr.u32 u, $8, 4;
    shr.u32 v, $8, 8;
    shr.u32 w, $8, 12;
    lop3.b32 t, $8, 0x000F000F, MAGIC, 0xEA;
    lop3.b32 u, u, 0x000F000F, MAGIC, 0xEA;
    lop3.b32 v, v, 0x000F000F, MAGIC, 0xEA;
    lop3.b32 w, w, 0x000F000F, MAGIC, 0xEA;
    mov.b32 {$0, $1}, t;
    mov.b32 {$2, $3}, u;
    mov.b32 {$4, $5}, v;
    mov.b32 {$6, $7}, w;
    }
    """
_TO_BF16 = tl.constexpr(_TO_NUMBERS.replace("MAGIC", "0x43004300"))
_TO_FP16 = tl.constexpr(_TO_NUMBERS.replace("MAGIC", "0x64006400"))
"""A word of eight integers -> 128 + q (bf16) or 1024 + q (fp16) of each, in the order of K."""


@triton.jit
def _integers(w, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr):
    # w int32 [ROWS, BLOCK_K / 8], eight integers each -> [ROWS, BLOCK_K] in the order of K: in fp32, or with ASM the
    # bits of DTYPE, 128 or 1024 too large.
    if ASM:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            _TO_BF16 if tl.bfloat16 == DTYPE else _TO_FP16, "=h,=h,=h,=h,=h,=h,=h,=h,r", [w],
            (tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), True, 1,
        )  # fmt: skip
    else:
        a = (w & 15).to(tl.float32)
        b = (w >> 16 & 15).to(tl.float32)
        c = (w >> 4 & 15).to(tl.float32)
        d = (w >> 20 & 15).to(tl.float32)
        e = (w >> 8 & 15).to(tl.float32)
        f = (w >> 24 & 15).to(tl.float32)
        g = (w >> 12 & 15).to(tl.float32)
        h = (w >> 28 & 15).to(tl.float32)
    # A word's first integer is k + 2 t of a chunk of 32; the others are 1, 8 and 16 further.
    near = tl.join(tl.join(a, b), tl.join(c, d))
    far = tl.join(tl.join(e, f), tl.join(g, h))
    q = tl.reshape(tl.join(near, far), [ROWS, BLOCK_K // 32, 4, 2, 2, 2])
    return tl.reshape(tl.permute(q, [0, 1, 5, 4, 2, 3]), [ROWS, BLOCK_K])


@triton.jit
def _spread(groups, ROWS: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr):
    # one number a group -> one a weight: [ROWS, S] -> [ROWS, BLOCK_K]
    if S == 1:
        return tl.broadcast_to(groups, [ROWS, BLOCK_K])
    return tl.reshape(tl.broadcast_to(groups[:, :, None], [ROWS, S, BLOCK_K // S]), [ROWS, BLOCK_K])


@triton.jit
def load_numbers(
    data_ptr, numbers_ptr, row, num_out, start, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    FORM: tl.constexpr, CENTRE_AT: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    # the weights of rows row [ROWS] and BLOCK_K inputs from start, [ROWS, BLOCK_K] of DTYPE; of FLOAT without the scale
    PER: tl.constexpr = 8 if BITS == 4 else 1  # weights of an element of data
    S: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
    EVEN: tl.constexpr = K % BLOCK_K == 0
    j = start // PER + tl.arange(0, BLOCK_K // PER)
    at = data_ptr + row.to(tl.int64)[:, None] * (K // PER) + j[None, :]
    if EVEN:
        w = tl.load(at, eviction_policy="evict_first")
    else:
        w = tl.load(at, mask=(j < K // PER)[None, :], other=0.0)
    if FORM == FLOAT:
        # Through fp32: straight to bf16 takes a conversion that the chip does at a quarter of its speed.
        return w.to(tl.float32).to(DTYPE)
    g = start // GROUP + tl.arange(0, S)
    place = g[None, :] * num_out + row[:, None]
    inside = (g * GROUP < K)[None, :]
    scale, offset = load_group(numbers_ptr, place, inside, FORM, EVEN, ASM)
    scale = _spread(scale, ROWS, S, BLOCK_K)
    if FORM <= MINIMUM:
        offset = _spread(offset, ROWS, S, BLOCK_K)
    if ASM and BITS == 4:
        # Exact up to the products: 128 + q and 1024 + q less 128 + z and 1024 + z.
        q = _integers(w, ROWS, BLOCK_K, True, DTYPE).to(DTYPE, bitcast=True)
        BASE: tl.constexpr = 128.0 if tl.bfloat16 == DTYPE else 1024.0
        s = scale.to(DTYPE)
        if FORM == MINIMUM:
            return (q - tl.full([1, 1], BASE, DTYPE)) * s + offset.to(DTYPE)
        if FORM == ZERO:
            return (q - (offset.to(tl.float32) + BASE).to(DTYPE)) * s
        return (q - tl.full([1, 1], CENTRE_AT + BASE, DTYPE)) * s
    if BITS == 4:
        q = _integers(w, ROWS, BLOCK_K, False, DTYPE)
    else:
        q = w.to(tl.float32)
    s = scale.to(tl.float32)
    if FORM == MINIMUM:
        return (q * s + offset.to(tl.float32)).to(DTYPE)
    if FORM == ZERO:
        return ((q - offset.to(tl.float32)) * s).to(DTYPE)
    return ((q - CENTRE_AT) * s).to(DTYPE)


@triton.jit
def _finish(
    acc, bias_ptr, residual_ptr, y_ptr, n, m, num_rows, num_out, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    # acc [ROWS, BLOCK_M] -> y, with bias and residual
    valid = (n < num_out)[:, None] & (m < num_rows)[None, :]
    to = m.to(tl.int64)[None, :] * num_out + n[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < num_out, other=0.0).to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + to, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + to, acc.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def shared_matrix(
    x_ptr,  # [M, K], rows x_stride apart
    data_ptr,  # 4 bits [N, K / 8] int32, 8 bits [N, K]
    numbers_ptr,  # [K / GROUP, N], or [K / GROUP, N, 2] with offsets
    bias_ptr,  # [N]
    residual_ptr,  # [M, N] contiguous
    y_ptr,  # [M, N] contiguous
    partial_ptr,  # [SPLITS, M, N] fp32
    counter_ptr,  # [tiles], 0 before and after
    num_rows,  # M
    num_out,  # N
    x_stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    CENTRE_AT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    ASM: tl.constexpr,
):
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    EACH: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    row = tl.minimum(n, num_out - 1)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([ROWS, BLOCK_M], tl.float32)
    x_at = x_ptr + m.to(tl.int64)[None, :] * x_stride + k[:, None]
    seen = (m < num_rows)[None, :]
    first = split * EACH
    for step in tl.range(first, tl.minimum(first + EACH, STEPS), num_stages=STAGES):
        start = step * BLOCK_K
        w = load_numbers(
            data_ptr, numbers_ptr, row, num_out, start, K, GROUP, BITS, FORM, CENTRE_AT, ROWS, BLOCK_K, ASM,
            DTYPE,
        )  # fmt: skip
        if K % BLOCK_K == 0:
            x = tl.load(x_at + start, mask=seen, other=0.0)
        else:
            x = tl.load(x_at + start, mask=seen & (start + k < K)[:, None], other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    if FORM == FLOAT:
        acc *= tl.load(numbers_ptr + row)[:, None]
    if SPLITS == 1:
        _finish(acc, bias_ptr, residual_ptr, y_ptr, n, m, num_rows, num_out, HAS_BIAS, HAS_RESIDUAL)
    else:
        valid = (n < num_out)[:, None] & seen
        place = m.to(tl.int64)[None, :] * num_out + n[:, None]
        part = num_rows.to(tl.int64) * num_out
        tl.store(partial_ptr + split * part + place, acc, mask=valid)
        counter = counter_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        # Every thread's part is written before one of them says so.
        tl.debug_barrier()
        before = tl.atomic_add(counter, 1, sem="acq_rel")
        if before == SPLITS - 1:
            acc = tl.zeros([ROWS, BLOCK_M], tl.float32)
            for number in range(SPLITS):
                acc += tl.load(partial_ptr + number * part + place, mask=valid, other=0.0, cache_modifier=".cg")
            _finish(acc, bias_ptr, residual_ptr, y_ptr, n, m, num_rows, num_out, HAS_BIAS, HAS_RESIDUAL)
            tl.store(counter, 0)


@triton.jit
def write_out(
    data_ptr,  # 4 bits [N, K / 8] int32, 8 bits [N, K]
    numbers_ptr,  # [K / GROUP, N], or [K / GROUP, N, 2] with offsets
    out_ptr,  # [N, K]
    num_out,  # N
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    CENTRE_AT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * BLOCK_K
    row = tl.minimum(n, num_out - 1)
    k = start + tl.arange(0, BLOCK_K)
    w = load_numbers(
        data_ptr, numbers_ptr, row, num_out, start, K, GROUP, BITS, FORM, CENTRE_AT, ROWS, BLOCK_K, False,
        out_ptr.dtype.element_ty if FORM != FLOAT else tl.float32,
    )  # fmt: skip
    if FORM == FLOAT:
        w = (w * tl.load(numbers_ptr + row)[:, None]).to(out_ptr.dtype.element_ty)
    to = out_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(to, w, mask=(n < num_out)[:, None] & (k < K)[None, :])
