"""Rows of activations times weights of 4 or 8 bits on the matrix units, and the weights written out as plain numbers.

    as grouped.py says, for M of up to 128, without norm and gate

The weights are the first operand: 64 rows and more of it keep Hopper's wide instruction busy however few the rows of
x.  Where tiles are few, several programs share one, each with a part of K.  The last to end adds the parts up, always in
the same order: no sum depends on who comes first.  Split K for small batches: arXiv:2402.00025.
"""

# ruff: noqa: SIM108
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from vserve.kernels.grouped_row import MINIMUM, ZERO

_TO_PAIRS = """
    {
    .reg .b32 t, u;
    prmt.b32 t, $4, 0, 0x4140;
    prmt.b32 u, $4, 0, 0x4342;
    lop3.b32 $0, t, 0x000F000F, MAGIC, 0xEA;
    lop3.b32 $1, u, 0x000F000F, MAGIC, 0xEA;
    shr.u32 t, t, 4;
    shr.u32 u, u, 4;
    lop3.b32 $2, t, 0x000F000F, MAGIC, 0xEA;
    lop3.b32 $3, u, 0x000F000F, MAGIC, 0xEA;
    }
    """
_TO_BF16 = tl.constexpr(_TO_PAIRS.replace("MAGIC", "0x43004300"))
_TO_FP16 = tl.constexpr(_TO_PAIRS.replace("MAGIC", "0x64006400"))
"""Four bytes -> 128 + q (bf16) or 1024 + q (fp16) of their low halves, then of their high ones."""


@triton.jit
def _spread(groups, ROWS: tl.constexpr, S: tl.constexpr, B: tl.constexpr):
    # one number a group -> one a byte: [ROWS, S] -> [ROWS, B]
    if S == 1:
        return tl.broadcast_to(groups, [ROWS, B])
    return tl.reshape(tl.broadcast_to(groups[:, :, None], [ROWS, S, B // S]), [ROWS, B])


@triton.jit
def _numbers(
    w, scale, offset, CENTRE_AT: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, ASM: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    # bytes, scale and offset [ROWS, B] -> the weights of the low and the high halves (8 bits: twice the same), DTYPE
    if ASM and BITS == 4:
        # Exact up to the products: 128 + q and 1024 + q less 128 + z and 1024 + z.
        if tl.bfloat16 == DTYPE:
            low, high = tl.inline_asm_elementwise(
                _TO_BF16, "=r,=r,=r,=r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
            base = 128.0
        else:
            low, high = tl.inline_asm_elementwise(
                _TO_FP16, "=r,=r,=r,=r,r", [w], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
            base = 1024.0
        s = scale.to(DTYPE)
        if FORM == MINIMUM:
            least = tl.full([1, 1], base, DTYPE)
            o = offset.to(DTYPE)
            return (low - least) * s + o, (high - least) * s + o
        if FORM == ZERO:
            z = (offset.to(tl.float32) + base).to(DTYPE)
        else:
            z = tl.full([1, 1], CENTRE_AT + base, DTYPE)
        return (low - z) * s, (high - z) * s
    if BITS == 4:
        low = (w & 0x0F).to(tl.float32)
        high = (w >> 4).to(tl.float32)
    else:
        low = w.to(tl.float32)
        high = low
    s = scale.to(tl.float32)
    if FORM == MINIMUM:
        o = offset.to(tl.float32)
        return (low * s + o).to(DTYPE), (high * s + o).to(DTYPE)
    if FORM == ZERO:
        z = offset.to(tl.float32)
        return ((low - z) * s).to(DTYPE), ((high - z) * s).to(DTYPE)
    return ((low - CENTRE_AT) * s).to(DTYPE), ((high - CENTRE_AT) * s).to(DTYPE)


@triton.jit
def _load_numbers(
    data_ptr, scale_ptr, offset_ptr, row, num_out, start, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    FORM: tl.constexpr, CENTRE_AT: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    # the weights of rows row [ROWS] and BLOCK_K inputs from start: [ROWS, B] twice, as _numbers
    B: tl.constexpr = BLOCK_K * BITS // 8
    S: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
    EVEN: tl.constexpr = K % BLOCK_K == 0
    j = tl.arange(0, B)
    g = start // GROUP + tl.arange(0, S)
    at = data_ptr + row.to(tl.int64)[:, None] * (K * BITS // 8) + (start * BITS // 8 + j)[None, :]
    place = g[None, :] * num_out + row[:, None]
    if EVEN:
        w = tl.load(at, eviction_policy="evict_first")
        scale = tl.load(scale_ptr + place)
        offset = scale
        if FORM <= MINIMUM:
            offset = tl.load(offset_ptr + place)
    else:
        w = tl.load(at, mask=(start * BITS // 8 + j < K * BITS // 8)[None, :], other=0.0)
        inside = (g * GROUP < K)[None, :]
        scale = tl.load(scale_ptr + place, mask=inside, other=0.0)
        offset = scale
        if FORM <= MINIMUM:
            offset = tl.load(offset_ptr + place, mask=inside, other=0.0)
    scale = _spread(scale, ROWS, S, B)
    if FORM <= MINIMUM:
        offset = _spread(offset, ROWS, S, B)
    return _numbers(w, scale, offset, CENTRE_AT, BITS, FORM, ASM, DTYPE)


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
    data_ptr,  # [N, K * BITS / 8]
    scale_ptr,  # [K / GROUP, N]
    offset_ptr,  # [K / GROUP, N]
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
    B: tl.constexpr = BLOCK_K * BITS // 8
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    EACH: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    row = tl.minimum(n, num_out - 1)
    j = tl.arange(0, B)
    k = j
    if BITS == 4:
        k = j // 16 * 32 + j % 16
    acc = tl.zeros([ROWS, BLOCK_M], tl.float32)
    x_row = x_ptr + m[None, :] * x_stride
    seen = (m < num_rows)[None, :]
    first = split * EACH
    for step in tl.range(first, tl.minimum(first + EACH, STEPS), num_stages=STAGES):
        start = step * BLOCK_K
        low, high = _load_numbers(
            data_ptr, scale_ptr, offset_ptr, row, num_out, start, K, GROUP, BITS, FORM, CENTRE_AT, ROWS, BLOCK_K, ASM,
            DTYPE,
        )  # fmt: skip
        at = start + k
        x = tl.load(x_row + at[:, None], mask=seen & (at < K)[:, None], other=0.0)
        acc = tl.dot(low, x, acc, input_precision="ieee")
        if BITS == 4:
            x = tl.load(x_row + (at + 16)[:, None], mask=seen & (at + 16 < K)[:, None], other=0.0)
            acc = tl.dot(high, x, acc, input_precision="ieee")
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
    data_ptr,  # [N, K * BITS / 8]
    scale_ptr,  # [K / GROUP, N]
    offset_ptr,  # [K / GROUP, N]
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
    B: tl.constexpr = BLOCK_K * BITS // 8
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * BLOCK_K
    row = tl.minimum(n, num_out - 1)
    low, high = _load_numbers(
        data_ptr, scale_ptr, offset_ptr, row, num_out, start, K, GROUP, BITS, FORM, CENTRE_AT, ROWS, BLOCK_K, False,
        out_ptr.dtype.element_ty,
    )  # fmt: skip
    j = tl.arange(0, B)
    k = start + j
    if BITS == 4:
        k = start + j // 16 * 32 + j % 16
    to = out_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    valid = (n < num_out)[:, None]
    tl.store(to, low, mask=valid & (k < K)[None, :])
    if BITS == 4:
        tl.store(to + 16, high, mask=valid & (k + 16 < K)[None, :])
