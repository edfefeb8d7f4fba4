"""One row of activations times weights of 4 or 8 bits, in machine code: the sums of grouped_row.py, word by word.

A thread's 16 bytes are four words; each is multiplied by the numbers of x that belong to it without becoming numbers of
its own first.  Integers become floats without a conversion: 4 bits put into the mantissa of a power of two give that
power + q exactly, and the power times the sum of x is taken off at the end.  Needs bf16 or fp16 and a GPU.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,assignment"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from vserve.kernels.early import await_inputs
from vserve.kernels.gemv import finish_row
from vserve.kernels.grouped_row import add_groups, load_group

_HALVES = {
    torch.bfloat16: "shl.b32 c, SRC, 16; mov.b32 A, c; and.b32 c, SRC, 0xFFFF0000; mov.b32 B, c; ",
    torch.float16: "mov.b32 {h0, h1}, SRC; cvt.f32.f16 A, h0; cvt.f32.f16 B, h1; ",
}
"""A pair of numbers in a register -> two fp32."""


def _unpack(kind: str, dtype: torch.dtype, sources: list[str], to: str) -> str:
    """PTX: the numbers of dtype in sources, registers of 32 bits (int4) or of 64 -> fp32 registers to0, to1, ..."""
    text = ""
    for place, source in enumerate(sources):
        parts = [source]
        if kind != "int4":
            text += f"mov.b64 {{p0, p1}}, {source}; "
            parts = ["p0", "p1"]
        for i, part in enumerate(parts):
            first = 2 * (place * len(parts) + i)
            made = _HALVES[dtype].replace("SRC", part)
            text += made.replace("A,", f"{to}{first},").replace("B,", f"{to}{first + 1},")
    return text


_REGISTERS = ".reg .b32 p0, p1, u, t, c; .reg .b16 h0, h1; .reg .f32 v, x<8>, n<8>; "

_NIBBLES = (("u", 12), ("$1", 16), ("u", 16), ("t", 8), ("$1", 8), ("t", 12), ("$1", 12), ("t", 16))
"""Where a word's integers lie, by pairs of neighbouring inputs (packed.py): bits 8, 12 or 16 and up of the word ($1),
of it shifted left by 12 (u) or right by 12 (t).

There they are the mantissa of 2^15, 2^11 or 2^7, without a shift for each; the sum of 32 products is off by 1e-4 of
itself at most."""

_SOURCES = {"int4": 4, "int8": 1, "float8": 1}
"""Registers of x that belong to a word: pairs, or one of four numbers."""


def _exponent(bit: int) -> int:
    """The fp32 in whose mantissa bit is worth 1: 2^(23 - bit)."""
    return (127 + 23 - bit) << 23


def _word_product(kind: str, dtype: torch.dtype, normed: bool) -> str:
    """PTX: the sum of a word's weights times x.  kind: int4 (_NIBBLES too large), int8, float8.  $0 <- $1, x, norm."""
    count, numbers = _SOURCES[kind], 8 if kind == "int4" else 4
    text = "{ " + _REGISTERS + _unpack(kind, dtype, [f"${2 + i}" for i in range(count)], "x")
    if normed:
        text += _unpack(kind, dtype, [f"${2 + count + i}" for i in range(count)], "n")
        text += "".join(f"mul.f32 x{i}, x{i}, n{i}; " for i in range(numbers))
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
    count, numbers = _SOURCES[kind], 8 if kind == "int4" else 4
    text = "{ " + _REGISTERS + _unpack(kind, dtype, [f"${3 + i}" for i in range(count)], "x")
    if normed:
        text += _unpack(kind, dtype, [f"${3 + count + i}" for i in range(count)], "n")
    text += "mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000; mov.f32 $2, 0f00000000; "
    for i in range(numbers):
        if normed:
            text += f"fma.rn.f32 $2, x{i}, x{i}, $2; mul.f32 x{i}, x{i}, n{i}; "
        base = _exponent(_NIBBLES[i][1]) if kind == "int4" else 0
        text += f"add.f32 $0, $0, x{i}; fma.rn.f32 $1, x{i}, 0f{base:08X}, $1; "
    return text + "}"


@cache
def code(kind: str, dtype: torch.dtype, normed: bool) -> tuple[str, str]:
    """What ``words`` takes as PRODUCT and SUMS.  kind: int4, int8 or float8; dtype: of x; normed: with a norm."""
    return _word_product(kind, dtype, normed), _word_sums(kind, dtype, normed)


@triton.jit
def _load_words(
    data_ptr, numbers_ptr, row, num_scales, start,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    # as grouped_row has them, the bytes as int32 [ROWS, Q]
    Q: tl.constexpr = BLOCK_K * BITS // 32
    WIDE: tl.constexpr = 128 // BITS
    q = start * BITS // 32 + tl.arange(0, Q)
    at = data_ptr + row[:, None] * (K * BITS // 32) + q[None, :]
    c = start + tl.arange(0, Q // 4) * WIDE
    place = (c // GROUP)[None, :] * num_scales + row[:, None]
    if EVEN:
        w = tl.load(at, eviction_policy="evict_first")
    else:
        w = tl.load(at, mask=(q < K * BITS // 32)[None, :], other=0, eviction_policy="evict_first")
    scale, offset = load_group(numbers_ptr, place, (c < K)[None, :], FORM, EVEN, False)
    return w, scale, offset


@triton.jit
def _word_parts(
    w, x, n, PRODUCT: tl.constexpr, BITS: tl.constexpr, HAS_NORM: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    # w int32 [ROWS, Q], x and n as _load_inputs has them -> sums of 16 bytes [ROWS, Q / 4]
    if BITS == 4:
        if HAS_NORM:
            products = tl.inline_asm_elementwise(
                PRODUCT, "=f,r,r,r,r,r,r,r,r,r",
                [w, x[0][None, :], x[1][None, :], x[2][None, :], x[3][None, :],
                 n[0][None, :], n[1][None, :], n[2][None, :], n[3][None, :]], tl.float32, True, 1,
            )  # fmt: skip
        else:
            products = tl.inline_asm_elementwise(
                PRODUCT, "=f,r,r,r,r,r", [w, x[0][None, :], x[1][None, :], x[2][None, :], x[3][None, :]], tl.float32,
                True, 1,
            )  # fmt: skip
    elif HAS_NORM:
        products = tl.inline_asm_elementwise(
            PRODUCT, "=f,r,l,l", [w, x[0][None, :], n[0][None, :]], tl.float32, True, 1
        )  # fmt: skip
    else:
        products = tl.inline_asm_elementwise(PRODUCT, "=f,r,l", [w, x[0][None, :]], tl.float32, True, 1)
    return tl.sum(tl.reshape(products, [ROWS, Q // 4, 4]), axis=2)


@triton.jit
def _load_inputs(x_ptr, start, K: tl.constexpr, BITS: tl.constexpr, Q: tl.constexpr, EVEN: tl.constexpr):
    # the numbers that belong to Q words from K = start: 8 bits [Q] int64, four each; 4 bits four times [Q] int32, pairs
    q = tl.arange(0, Q)
    if BITS == 4:
        at = start // 2 + q // 4 * 16 + q % 4
        if EVEN:
            x = (tl.load(x_ptr + at), tl.load(x_ptr + at + 4), tl.load(x_ptr + at + 8), tl.load(x_ptr + at + 12))
        else:
            inside = at < K // 2
            x = (
                tl.load(x_ptr + at, mask=inside, other=0), tl.load(x_ptr + at + 4, mask=inside, other=0),
                tl.load(x_ptr + at + 8, mask=inside, other=0), tl.load(x_ptr + at + 12, mask=inside, other=0),
            )  # fmt: skip
    elif EVEN:
        x = (tl.load(x_ptr + start // 4 + q),)
    else:
        x = (tl.load(x_ptr + start // 4 + q, mask=start // 4 + q < K // 4, other=0),)
    return x


@triton.jit
def _input_sums(x, n, SUMS: tl.constexpr, BITS: tl.constexpr, HAS_NORM: tl.constexpr):
    # what _word_sums says, [Q] each
    if BITS == 4:
        if HAS_NORM:
            sums = tl.inline_asm_elementwise(
                SUMS, "=f,=f,=f,r,r,r,r,r,r,r,r", [x[0], x[1], x[2], x[3], n[0], n[1], n[2], n[3]],
                (tl.float32, tl.float32, tl.float32), True, 1,
            )  # fmt: skip
        else:
            sums = tl.inline_asm_elementwise(
                SUMS, "=f,=f,=f,r,r,r,r", [x[0], x[1], x[2], x[3]], (tl.float32, tl.float32, tl.float32), True, 1
            )
    elif HAS_NORM:
        sums = tl.inline_asm_elementwise(
            SUMS, "=f,=f,=f,l,l", [x[0], n[0]], (tl.float32, tl.float32, tl.float32), True, 1
        )
    else:
        sums = tl.inline_asm_elementwise(SUMS, "=f,=f,=f,l", [x[0]], (tl.float32, tl.float32, tl.float32), True, 1)
    return sums


@triton.jit
def _add_words(
    sums, more, squares, x_ptr, norm_ptr, start, w, s, o, w2, s2, o2,
    K: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, CENTRE_AT: tl.constexpr, HAS_NORM: tl.constexpr,
    GATED: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr, PRODUCT: tl.constexpr, SUMS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    # sums (and more) [ROWS, Q / 4] += the weights w (and w2) times x at start, squares [Q] += x^2
    x = _load_inputs(x_ptr, start, K, BITS, Q, EVEN)
    n = x
    if HAS_NORM:
        n = _load_inputs(norm_ptr, start, K, BITS, Q, EVEN)
    x_all, x_over, x_squares = _input_sums(x, n, SUMS, BITS, HAS_NORM)
    squares += x_squares
    x_sum = tl.sum(tl.reshape(x_all, [Q // 4, 4]), axis=1)
    over = tl.sum(tl.reshape(x_over, [Q // 4, 4]), axis=1)[None, :]
    products = _word_parts(w, x, n, PRODUCT, BITS, HAS_NORM, ROWS, Q) - over
    sums = add_groups(sums, products, s, o, x_sum, CENTRE_AT, FORM)
    if GATED:
        products = _word_parts(w2, x, n, PRODUCT, BITS, HAS_NORM, ROWS, Q) - over
        more = add_groups(more, products, s2, o2, x_sum, CENTRE_AT, FORM)
    return sums, more, squares


@triton.jit
def words(
    x_ptr,  # 4 bits [K / 2] int32: pairs of numbers; 8 bits [K / 4] int64: four each
    data_ptr,  # [N, K * BITS / 32] int32, gated [2 F, ...]
    numbers_ptr,  # [K / GROUP, N], or [K / GROUP, N, 2] with offsets
    norm_ptr,  # as x_ptr
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
    # portable_row in machine code: the same sums, on words of 4 bytes.
    Q: tl.constexpr = BLOCK_K * BITS // 32
    EVEN: tl.constexpr = K % BLOCK_K == 0
    LAST: tl.constexpr = (K - 1) // BLOCK_K * BLOCK_K
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(n, num_out - 1).to(tl.int64)
    other = row + num_out
    w, s, o = _load_words(data_ptr, numbers_ptr, row, num_scales, 0, K, GROUP, BITS, FORM, BLOCK_K, EVEN)
    w2, s2, o2 = w, s, o
    if GATED:
        w2, s2, o2 = _load_words(
            data_ptr, numbers_ptr, other, num_scales, 0, K, GROUP, BITS, FORM, BLOCK_K, EVEN
        )  # fmt: skip
    await_inputs(EARLY)
    sums = tl.zeros([ROWS, Q // 4], tl.float32)
    more = tl.zeros([ROWS, Q // 4], tl.float32)
    squares = tl.zeros([Q], tl.float32)
    for start in range(0, LAST, BLOCK_K):
        # The next weights are asked for before the present ones are used.
        w_next, s_next, o_next = _load_words(
            data_ptr, numbers_ptr, row, num_scales, start + BLOCK_K, K, GROUP, BITS, FORM, BLOCK_K, EVEN
        )  # fmt: skip
        w2_next, s2_next, o2_next = w_next, s_next, o_next
        if GATED:
            w2_next, s2_next, o2_next = _load_words(
                data_ptr, numbers_ptr, other, num_scales, start + BLOCK_K, K, GROUP, BITS, FORM, BLOCK_K, EVEN
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
    finish_row(
        tl.sum(sums, axis=1), tl.sum(more, axis=1), tl.sum(squares, axis=0), n, num_out, eps, bias_ptr, residual_ptr,
        y_ptr, K, HAS_NORM, HAS_BIAS, HAS_RESIDUAL, GATED,
    )  # fmt: skip
