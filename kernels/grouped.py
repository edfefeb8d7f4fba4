"""Products with weights of 4 or 8 bits, which become numbers in registers: W4A16, W8A16 and fp8 weights.

    y[m, n] = s(m) * sum over k of w[n, k] * norm[k] * x[m, k]  (+ bias[n]) (+ residual[m, n])
    s(m)    = 1 / sqrt(mean over k of x[m, k]^2 + eps), or 1 without a norm;  w as packed.py says
    gated: y[0, f] = silu(y'[0, f]) * y'[0, F + f],  y' the above over weights [2F, K]

x [M, K], y [M, N] (gated: [M, F]) bf16, fp16 or fp32, accumulated in float32.

One row of x: a program takes a few rows of the weights; a thread's 16 bytes are one group's, so its products are added
up as plain integers times x, and scale and offset come in once for 16 or 32 weights.  Norm and gate belong to this
kernel only.  More rows go through the matrix units, the weights as the first operand (64 rows and more of it keep
Hopper's wide instruction busy however few the rows of x); where tiles are few, several programs share one, each with a
part of K.  The last to end adds the parts up, always in the same order: no sum depends on who comes first.

Integers become floats without a conversion: 4 bits put into the mantissa of a power of two, 128 or more in bf16 and
fp32 and 1024 in fp16, give that power + q exactly.  Split K for small batches: arXiv:2402.00025.
"""

# ruff: noqa: SIM108
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,assignment"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vserve.kernels.early import await_inputs, options
from vserve.kernels.grouped_shapes import Shape, measured
from vserve.kernels.packed import Form, Packed

ZERO = tl.constexpr(int(Form.ZERO))
MINIMUM = tl.constexpr(int(Form.MINIMUM))
CENTRE = tl.constexpr(int(Form.CENTRE))
FLOAT = tl.constexpr(int(Form.FLOAT))

_HALVES = {
    torch.bfloat16: "shl.b32 c, SRC, 16; mov.b32 A, c; and.b32 c, SRC, 0xFFFF0000; mov.b32 B, c;",
    torch.float16: "mov.b32 {h0, h1}, SRC; cvt.f32.f16 A, h0; cvt.f32.f16 B, h1;",
}
"""A pair of numbers in a register -> two fp32."""


def _unpack(dtype: torch.dtype, source: str, to: list[str]) -> str:
    """PTX: four numbers of dtype in a 64-bit register -> four fp32 registers."""
    halves = [_HALVES[dtype].replace("SRC", f"p{i}").replace("A,", f"{a},").replace("B,", f"{b},")
              for i, (a, b) in enumerate(((to[0], to[1]), (to[2], to[3])))]  # fmt: skip
    return f"mov.b64 {{p0, p1}}, {source}; " + " ".join(halves)


def _inputs(dtype: torch.dtype, count: int, sources: list[str], norms: list[str]) -> str:
    """PTX: count numbers of x in x0, x1, ..., times those of a norm where there is one."""
    text = "".join(_unpack(dtype, source, [f"x{4 * i + j}" for j in range(4)]) for i, source in enumerate(sources))
    if norms:
        text += "".join(_unpack(dtype, norm, [f"n{4 * i + j}" for j in range(4)]) for i, norm in enumerate(norms))
    return text


_REGISTERS = ".reg .b32 p0, p1, u, t, c; .reg .b16 h0, h1; .reg .f32 v, x<8>, n<8>; "

_NIBBLES = (("u", 12), ("$1", 8), ("$1", 16), ("t", 12), ("u", 16), ("$1", 12), ("t", 8), ("t", 16))
"""Where the low halves of a word's four bytes lie, then the high ones: bits 8, 12 or 16 and up of the word ($1), of it
shifted left by 12 (u) or shifted right by 12 (t).

There they are the mantissa of 2^15, 2^11 or 2^7, without a shift for each; the sum of 32 products
is off by 1e-4 of itself at most."""


def _exponent(bit: int) -> int:
    """The fp32 in whose mantissa bit is worth 1: 2^(23 - bit)."""
    return (127 + 23 - bit) << 23


def _word_product(kind: str, dtype: torch.dtype, normed: bool) -> str:
    """PTX: the sum of a word's weights times x.  kind: int4 (_NIBBLES too large), int8, float8.  $0 <- $1, x, norm."""
    count = 2 if kind == "int4" else 1
    sources = [f"${2 + i}" for i in range(count)]
    norms = [f"${2 + count + i}" for i in range(count)] if normed else []
    text = "{ " + _REGISTERS + _inputs(dtype, 4 * count, sources, norms)
    if normed:
        text += "".join(f"mul.f32 x{i}, x{i}, n{i}; " for i in range(4 * count))
    weights: list[str] = []
    if kind == "int4":
        text += "shl.b32 u, $1, 12; shr.u32 t, $1, 12; "
        for source, bit in _NIBBLES:
            weights.append(f"lop3.b32 p0, {source}, {0xF << bit:#010x}, {_exponent(bit):#010x}, 0xEA; mov.b32 v, p0; ")
    elif kind == "int8":
        for byte in range(4):
            # A byte in the mantissa of 2^23, exact.
            weights.append(f"prmt.b32 t, $1, 0x4B000000, 0x744{byte}; mov.b32 v, t; sub.f32 v, v, 0f4B000000; ")
    else:
        text += ".reg .b16 e0, e1; .reg .b32 f0, f1; mov.b32 {e0, e1}, $1; "
        text += "cvt.rn.f16x2.e4m3x2 f0, e0; cvt.rn.f16x2.e4m3x2 f1, e1; "
        for pair in range(2):
            text += f"mov.b32 {{h0, h1}}, f{pair}; cvt.f32.f16 n{2 * pair}, h0; cvt.f32.f16 n{2 * pair + 1}, h1; "
        weights = [f"mov.f32 v, n{i}; " for i in range(4)]
    for i, weight in enumerate(weights):
        text += weight + (f"fma.rn.f32 $0, v, x{i}, $0; " if i else "mul.f32 $0, v, x0; ")
    return text + "}"


def _word_sums(kind: str, dtype: torch.dtype, normed: bool) -> str:
    """PTX: the sum of a word's inputs (times the norm), the same with what each weight is too large by, and the squares
    of the inputs (without the norm).  $0, $1, $2 <- x, norm."""
    count = 2 if kind == "int4" else 1
    sources = [f"${3 + i}" for i in range(count)]
    norms = [f"${3 + count + i}" for i in range(count)] if normed else []
    text = "{ " + _REGISTERS + _inputs(dtype, 4 * count, sources, norms)
    text += "mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000; mov.f32 $2, 0f00000000; "
    for i in range(4 * count):
        if normed:
            text += f"fma.rn.f32 $2, x{i}, x{i}, $2; mul.f32 x{i}, x{i}, n{i}; "
        base = _exponent(_NIBBLES[i][1]) if kind == "int4" else 0
        text += f"add.f32 $0, $0, x{i}; fma.rn.f32 $1, x{i}, 0f{base:08X}, $1; "
    return text + "}"


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

MATRIX_ROWS = 128
"""Rows of x from which it is cheaper to write the weights out and leave the product to cuBLAS."""

_SINGLE = {"rows": 32, "width": 64, "warps": 4, "stages": 2}
"""Of a shape with fp32 x: what was measured for halves would not fit a multiprocessor's memory."""


@triton.jit
def _parts(w, x_low, x_high, BITS: tl.constexpr):
    # w [ROWS, B] bytes, x [B] fp32 -> [ROWS, B] fp32: q times x, over both halves of the byte
    if BITS == 4:
        low = (w & 0x0F).to(tl.float32)
        high = (w >> 4).to(tl.float32)
        return low * x_low[None, :] + high * x_high[None, :]
    return w.to(tl.float32) * x_low[None, :]


@triton.jit
def _load_step(
    data_ptr, scale_ptr, offset_ptr, row, num_scales, start,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    # row [ROWS] int64 -> bytes [ROWS, B], scale and offset [ROWS, C] of K from start
    B: tl.constexpr = BLOCK_K * BITS // 8
    C: tl.constexpr = B // 16
    WIDE: tl.constexpr = 16 * 8 // BITS
    j = tl.arange(0, B)
    c = tl.arange(0, C)
    at = data_ptr + row[:, None] * (K * BITS // 8) + (start * BITS // 8 + j)[None, :]
    g = (start + c * WIDE) // GROUP
    scale_at = scale_ptr + g[None, :] * num_scales + row[:, None]
    offset_at = offset_ptr + g[None, :] * num_scales + row[:, None]
    if EVEN:
        w = tl.load(at, eviction_policy="evict_first")
        scale = tl.load(scale_at)
        offset = scale
        if FORM <= MINIMUM:
            offset = tl.load(offset_at)
    else:
        w = tl.load(at, mask=(start * BITS // 8 + j < K * BITS // 8)[None, :], other=0.0, eviction_policy="evict_first")
        inside = (start + c * WIDE < K)[None, :]
        scale = tl.load(scale_at, mask=inside, other=0.0)
        offset = scale
        if FORM <= MINIMUM:
            offset = tl.load(offset_at, mask=inside, other=0.0)
    return w, scale, offset


@triton.jit
def _scaled(
    sums, w, scale, offset, x_low, x_high, x_sum, CENTRE_AT: tl.constexpr,
    ROWS: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    # sums [ROWS, C] += the weights times x, for every 16 bytes
    products = tl.sum(tl.reshape(_parts(w, x_low, x_high, BITS), [ROWS, C, 16]), axis=2)
    return _add_groups(sums, products, scale, offset, x_sum, CENTRE_AT, FORM)


@triton.jit
def _add_groups(sums, products, scale, offset, x_sum, CENTRE_AT: tl.constexpr, FORM: tl.constexpr):
    # sums, products, scale, offset [ROWS, C], x_sum [C]: products of integers become those of weights
    s = scale.to(tl.float32)
    sums += s * products
    if FORM == ZERO:
        sums -= s * offset.to(tl.float32) * x_sum[None, :]
    elif FORM == MINIMUM:
        sums += offset.to(tl.float32) * x_sum[None, :]
    elif FORM == CENTRE:
        sums -= s * CENTRE_AT * x_sum[None, :]
    return sums


@triton.jit
def _portable_row(
    x_ptr,  # [K]
    data_ptr,  # [N, K * BITS / 8], gated [2 F, ...]
    scale_ptr,  # [K / GROUP, N]
    offset_ptr,  # [K / GROUP, N]
    norm_ptr,  # [K]
    bias_ptr,  # [N] or [2 F]
    residual_ptr,  # [N]
    y_ptr,  # [N] or [F]
    num_out,  # N, gated F
    num_scales,  # N, gated 2 F
    eps,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    CENTRE_AT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    B: tl.constexpr = BLOCK_K * BITS // 8
    C: tl.constexpr = B // 16
    EVEN: tl.constexpr = K % BLOCK_K == 0
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(n, num_out - 1).to(tl.int64)
    other = row + num_out
    j = tl.arange(0, B)
    k = j
    if BITS == 4:
        k = j // 16 * 32 + j % 16
    w, s, o = _load_step(
        data_ptr, scale_ptr, offset_ptr, row, num_scales, 0, K, GROUP, BITS, FORM, BLOCK_K, EVEN
    )  # fmt: skip
    w2, s2, o2 = w, s, o
    if GATED:
        w2, s2, o2 = _load_step(
            data_ptr, scale_ptr, offset_ptr, other, num_scales, 0, K, GROUP, BITS, FORM, BLOCK_K, EVEN
        )  # fmt: skip
    await_inputs(EARLY)
    sums = tl.zeros([ROWS, C], tl.float32)
    more = tl.zeros([ROWS, C], tl.float32)
    squares = tl.zeros([B], tl.float32)
    for start in range(0, K, BLOCK_K):
        # The next weights are asked for before the present ones are used; behind the last, the last again.
        ahead = tl.minimum(start + BLOCK_K, (K - 1) // BLOCK_K * BLOCK_K)
        w_next, s_next, o_next = _load_step(
            data_ptr, scale_ptr, offset_ptr, row, num_scales, ahead, K, GROUP, BITS, FORM, BLOCK_K, EVEN
        )  # fmt: skip
        w2_next, s2_next, o2_next = w_next, s_next, o_next
        if GATED:
            w2_next, s2_next, o2_next = _load_step(
                data_ptr, scale_ptr, offset_ptr, other, num_scales, ahead, K, GROUP, BITS, FORM, BLOCK_K, EVEN
            )  # fmt: skip
        at = start + k
        x_low = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
        x_high = x_low
        if BITS == 4:
            x_high = tl.load(x_ptr + at + 16, mask=at + 16 < K, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x_low * x_low
            x_low *= tl.load(norm_ptr + at, mask=at < K, other=0.0).to(tl.float32)
            if BITS == 4:
                squares += x_high * x_high
                x_high *= tl.load(norm_ptr + at + 16, mask=at + 16 < K, other=0.0).to(tl.float32)
        x_all = x_low
        if BITS == 4:
            x_all = x_low + x_high
        x_sum = tl.sum(tl.reshape(x_all, [C, 16]), axis=1)
        sums = _scaled(sums, w, s, o, x_low, x_high, x_sum, CENTRE_AT, ROWS, C, BITS, FORM)
        if GATED:
            more = _scaled(more, w2, s2, o2, x_low, x_high, x_sum, CENTRE_AT, ROWS, C, BITS, FORM)
        w, s, o = w_next, s_next, o_next
        w2, s2, o2 = w2_next, s2_next, o2_next
    _finish_row(
        tl.sum(sums, axis=1), tl.sum(more, axis=1), tl.sum(squares, axis=0), n, num_out, eps, bias_ptr, residual_ptr,
        y_ptr, K, HAS_NORM, HAS_BIAS, HAS_RESIDUAL, GATED,
    )  # fmt: skip


@triton.jit
def _load_words(
    data_ptr, scale_ptr, offset_ptr, row, num_scales, start,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    # as _load_step, the bytes as int32 [ROWS, Q]
    Q: tl.constexpr = BLOCK_K * BITS // 32
    WIDE: tl.constexpr = 128 // BITS
    q = start * BITS // 32 + tl.arange(0, Q)
    at = data_ptr + row[:, None] * (K * BITS // 32) + q[None, :]
    c = start + tl.arange(0, Q // 4) * WIDE
    place = (c // GROUP)[None, :] * num_scales + row[:, None]
    if EVEN:
        w = tl.load(at, eviction_policy="evict_first")
        scale = tl.load(scale_ptr + place)
        offset = scale
        if FORM <= MINIMUM:
            offset = tl.load(offset_ptr + place)
    else:
        w = tl.load(at, mask=(q < K * BITS // 32)[None, :], other=0, eviction_policy="evict_first")
        scale = tl.load(scale_ptr + place, mask=(c < K)[None, :], other=0.0)
        offset = scale
        if FORM <= MINIMUM:
            offset = tl.load(offset_ptr + place, mask=(c < K)[None, :], other=0.0)
    return w, scale, offset


@triton.jit
def _word_parts(
    w, x, x2, n, n2, PRODUCT: tl.constexpr, BITS: tl.constexpr, HAS_NORM: tl.constexpr,
    ROWS: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    # w int32 [ROWS, Q], x and n int64 [1, Q]: four numbers each -> sums of 16 bytes [ROWS, Q / 4]
    if BITS == 4:
        if HAS_NORM:
            products = tl.inline_asm_elementwise(PRODUCT, "=f,r,l,l,l,l", [w, x, x2, n, n2], tl.float32, True, 1)
        else:
            products = tl.inline_asm_elementwise(PRODUCT, "=f,r,l,l", [w, x, x2], tl.float32, True, 1)
    elif HAS_NORM:
        products = tl.inline_asm_elementwise(PRODUCT, "=f,r,l,l", [w, x, n], tl.float32, True, 1)
    else:
        products = tl.inline_asm_elementwise(PRODUCT, "=f,r,l", [w, x], tl.float32, True, 1)
    return tl.sum(tl.reshape(products, [ROWS, Q // 4, 4]), axis=2)


@triton.jit
def _load_fours(x_ptr, start, K: tl.constexpr, BITS: tl.constexpr, Q: tl.constexpr, EVEN: tl.constexpr):
    # the numbers that belong to Q words from K = start, four in an int64: [Q] twice (8 bits: twice the same)
    q = tl.arange(0, Q)
    k = q
    if BITS == 4:
        k = q // 4 * 8 + q % 4
    at = start // 4 + k
    if EVEN:
        x = tl.load(x_ptr + at)
        x2 = x
        if BITS == 4:
            x2 = tl.load(x_ptr + at + 4)
    else:
        x = tl.load(x_ptr + at, mask=at < K // 4, other=0)
        x2 = x
        if BITS == 4:
            x2 = tl.load(x_ptr + at + 4, mask=at + 4 < K // 4, other=0)
    return x, x2


@triton.jit
def _add_words(
    sums, more, squares, x_ptr, norm_ptr, start, w, s, o, w2, s2, o2,
    K: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, CENTRE_AT: tl.constexpr, HAS_NORM: tl.constexpr,
    GATED: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr, PRODUCT: tl.constexpr, SUMS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    # sums (and more) [ROWS, Q / 4] += the weights w (and w2) times x at start, squares [Q] += x^2
    x, x2 = _load_fours(x_ptr, start, K, BITS, Q, EVEN)
    n, n2 = x, x2
    if HAS_NORM:
        n, n2 = _load_fours(norm_ptr, start, K, BITS, Q, EVEN)
    if BITS == 4:
        if HAS_NORM:
            x_all, x_over, x_squares = tl.inline_asm_elementwise(
                SUMS, "=f,=f,=f,l,l,l,l", [x, x2, n, n2], (tl.float32, tl.float32, tl.float32), True, 1
            )
        else:
            x_all, x_over, x_squares = tl.inline_asm_elementwise(
                SUMS, "=f,=f,=f,l,l", [x, x2], (tl.float32, tl.float32, tl.float32), True, 1
            )
    elif HAS_NORM:
        x_all, x_over, x_squares = tl.inline_asm_elementwise(
            SUMS, "=f,=f,=f,l,l", [x, n], (tl.float32, tl.float32, tl.float32), True, 1
        )
    else:
        x_all, x_over, x_squares = tl.inline_asm_elementwise(
            SUMS, "=f,=f,=f,l", [x], (tl.float32, tl.float32, tl.float32), True, 1
        )
    squares += x_squares
    x_sum = tl.sum(tl.reshape(x_all, [Q // 4, 4]), axis=1)
    over = tl.sum(tl.reshape(x_over, [Q // 4, 4]), axis=1)[None, :]
    x, x2, n, n2 = x[None, :], x2[None, :], n[None, :], n2[None, :]
    products = _word_parts(w, x, x2, n, n2, PRODUCT, BITS, HAS_NORM, ROWS, Q) - over
    sums = _add_groups(sums, products, s, o, x_sum, CENTRE_AT, FORM)
    if GATED:
        products = _word_parts(w2, x, x2, n, n2, PRODUCT, BITS, HAS_NORM, ROWS, Q) - over
        more = _add_groups(more, products, s2, o2, x_sum, CENTRE_AT, FORM)
    return sums, more, squares


@triton.jit
def _words(
    x_ptr,  # [K / 4] int64: four numbers each
    data_ptr,  # [N, K * BITS / 32] int32, gated [2 F, ...]
    scale_ptr,  # [K / GROUP, N]
    offset_ptr,  # [K / GROUP, N]
    norm_ptr,  # [K / 4] int64
    bias_ptr,  # [N] or [2 F]
    residual_ptr,  # [N]
    y_ptr,  # [N] or [F]
    num_out,  # N, gated F
    num_scales,  # N, gated 2 F
    eps,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    CENTRE_AT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUMS: tl.constexpr,
):
    # _portable_row in machine code: the same sums, on words of 4 bytes.
    Q: tl.constexpr = BLOCK_K * BITS // 32
    EVEN: tl.constexpr = K % BLOCK_K == 0
    LAST: tl.constexpr = (K - 1) // BLOCK_K * BLOCK_K
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(n, num_out - 1).to(tl.int64)
    other = row + num_out
    w, s, o = _load_words(data_ptr, scale_ptr, offset_ptr, row, num_scales, 0, K, GROUP, BITS, FORM, BLOCK_K, EVEN)
    w2, s2, o2 = w, s, o
    if GATED:
        w2, s2, o2 = _load_words(
            data_ptr, scale_ptr, offset_ptr, other, num_scales, 0, K, GROUP, BITS, FORM, BLOCK_K, EVEN
        )  # fmt: skip
    await_inputs(EARLY)
    sums = tl.zeros([ROWS, Q // 4], tl.float32)
    more = tl.zeros([ROWS, Q // 4], tl.float32)
    squares = tl.zeros([Q], tl.float32)
    for start in range(0, LAST, BLOCK_K):
        # The next weights are asked for before the present ones are used.
        w_next, s_next, o_next = _load_words(
            data_ptr, scale_ptr, offset_ptr, row, num_scales, start + BLOCK_K, K, GROUP, BITS, FORM, BLOCK_K, EVEN
        )  # fmt: skip
        w2_next, s2_next, o2_next = w_next, s_next, o_next
        if GATED:
            w2_next, s2_next, o2_next = _load_words(
                data_ptr, scale_ptr, offset_ptr, other, num_scales, start + BLOCK_K, K, GROUP, BITS, FORM, BLOCK_K, EVEN
            )  # fmt: skip
        sums, more, squares = _add_words(
            sums, more, squares, x_ptr, norm_ptr, start, w, s, o, w2, s2, o2, K, BITS, FORM, CENTRE_AT, HAS_NORM, GATED,
            ROWS, Q, PRODUCT, SUMS, True,
        )  # fmt: skip
        w, s, o = w_next, s_next, o_next
        w2, s2, o2 = w2_next, s2_next, o2_next
    sums, more, squares = _add_words(
        sums, more, squares, x_ptr, norm_ptr, LAST, w, s, o, w2, s2, o2, K, BITS, FORM, CENTRE_AT, HAS_NORM, GATED,
        ROWS, Q, PRODUCT, SUMS, EVEN,
    )  # fmt: skip
    _finish_row(
        tl.sum(sums, axis=1), tl.sum(more, axis=1), tl.sum(squares, axis=0), n, num_out, eps, bias_ptr, residual_ptr,
        y_ptr, K, HAS_NORM, HAS_BIAS, HAS_RESIDUAL, GATED,
    )  # fmt: skip


@triton.jit
def _finish_row(
    y, up, squares, n, num_out, eps, bias_ptr, residual_ptr, y_ptr, K: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    # sums y (and up) [ROWS] -> y_ptr, with norm, bias, gate and residual
    valid = n < num_out
    if HAS_NORM:
        factor = tl.rsqrt(squares / K + eps)
        y *= factor
        up *= factor
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=valid, other=0.0).to(tl.float32)
    if GATED:
        if HAS_BIAS:
            up += tl.load(bias_ptr + num_out + n, mask=valid, other=0.0).to(tl.float32)
        y = y / (1.0 + tl.exp(-y)) * up
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + n, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=valid)


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
def _shared_matrix(
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
def _write_out(
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


def linear(
    x: Tensor,
    weight: Packed,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    early: bool = False,
    shape: Shape | None = None,
) -> Tensor:
    """x [M, K] times weight, with what is given of norm [K], bias [N], residual [M, N] -> a new [M, N].

    A norm is for one row only.  shape overrides the measured choice.
    """
    if x.shape[0] == 1:
        return _one_row(x, weight, norm, eps, bias, residual, gated=False, early=early, shape=shape)
    assert norm is None
    return _rows(x, weight, bias, residual, shape)


def gated_row(
    x: Tensor,
    weight: Packed,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    early: bool = False,
    shape: Shape | None = None,
) -> Tensor:
    """silu(gate) * up -> a new [1, F], for gate and up stacked in weight [2F, K] and one row x [1, K]."""
    return _one_row(x, weight, norm, eps, bias, None, gated=True, early=early, shape=shape)


def write_out(weight: Packed, dtype: torch.dtype) -> Tensor:
    """The weights as a new [N, K] of dtype, rounded once from fp32."""
    out = torch.empty((weight.outputs, weight.inputs), dtype=dtype, device=weight.data.device)
    offset = weight.scale if weight.offset is None else weight.offset
    rows, width = 16, 256
    _write_out[(triton.cdiv(weight.outputs, rows), triton.cdiv(weight.inputs, width))](
        _bytes(weight), weight.scale, offset, out, weight.outputs, weight.inputs, weight.group, weight.bits,
        int(weight.form), weight.centre, rows, width, num_warps=4,
    )  # fmt: skip
    return out


def _one_row(
    x: Tensor,
    weight: Packed,
    norm: Tensor | None,
    eps: float,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    gated: bool,
    early: bool,
    shape: Shape | None,
) -> Tensor:
    assert x.shape == (1, weight.inputs)
    assert x.stride(1) == 1
    outputs = weight.outputs // (2 if gated else 1)
    y = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    assert residual is None or (residual.is_contiguous() and residual.shape == y.shape)
    shape = measured(_kind(weight), 1, weight.outputs, weight.inputs) if shape is None else shape
    grid = (triton.cdiv(outputs, shape.rows),)
    offset = weight.scale if weight.offset is None else weight.offset
    ends = (x if bias is None else bias, x if residual is None else residual, y, outputs, weight.outputs, eps)
    about = (weight.inputs, weight.group, weight.bits, int(weight.form), weight.centre)
    flags = (norm is not None, bias is not None, residual is not None, gated, shape.rows, shape.width, early)
    if _asm(x):
        fours, norms = x.view(torch.int64), (x if norm is None else norm).view(torch.int64)
        _words[grid](
            fours, weight.data.view(torch.int32), weight.scale, offset, norms, *ends, *about, *flags,
            *_code(_kind(weight), x.dtype, norm is not None), **options(shape.warps, early),
        )  # fmt: skip
    else:
        _portable_row[grid](
            x, _bytes(weight), weight.scale, offset, x if norm is None else norm, *ends, *about, *flags,
            **options(shape.warps, early),
        )  # fmt: skip
    return y


def _rows(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None, shape: Shape | None) -> Tensor:
    rows = x.shape[0]
    assert x.shape[1] == weight.inputs
    assert x.stride(1) == 1
    y = torch.empty((rows, weight.outputs), dtype=x.dtype, device=x.device)
    assert residual is None or (residual.is_contiguous() and residual.shape == y.shape)
    block = padded(rows)
    if shape is None:
        shape = measured(_kind(weight), block, weight.outputs, weight.inputs)
        if x.element_size() > 2:
            shape = shape._replace(**_SINGLE)
    grid = (triton.cdiv(weight.outputs, shape.rows), triton.cdiv(rows, block), shape.splits)
    assert grid[0] * grid[1] <= weight.counters.numel() or shape.splits == 1
    partial = y
    if shape.splits > 1:
        partial = torch.empty((shape.splits, rows, weight.outputs), dtype=torch.float32, device=x.device)
    _shared_matrix[grid](
        x, _bytes(weight), weight.scale, weight.scale if weight.offset is None else weight.offset,
        x if bias is None else bias, x if residual is None else residual, y, partial, weight.counters, rows,
        weight.outputs, x.stride(0), weight.inputs, weight.group, weight.bits, int(weight.form), weight.centre,
        bias is not None, residual is not None, block, shape.rows, shape.width, shape.stages, shape.splits, _asm(x),
        num_warps=shape.warps,
    )  # fmt: skip
    return y


@cache
def _code(kind: str, dtype: torch.dtype, normed: bool) -> tuple[str, str]:
    return _word_product(kind, dtype, normed), _word_sums(kind, dtype, normed)


def _bytes(weight: Packed) -> Tensor:
    return weight.data.view(torch.float8_e4m3fn) if weight.form is Form.FLOAT else weight.data


def _asm(x: Tensor) -> bool:
    """Whether the kernels may use machine code: not in the interpreter, and not for fp32, which is no speed of ours."""
    return x.is_cuda and x.dtype != torch.float32


def padded(rows: int) -> int:
    """Rows of x that a program takes."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128


def _kind(weight: Packed) -> str:
    return "float8" if weight.form is Form.FLOAT else f"int{weight.bits}"
