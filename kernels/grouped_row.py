"""One row of activations times weights of 4 or 8 bits: the kernel that every device can run, interpreted too.

    as grouped.py says, for M = 1, with norm and gate

A program takes a few rows of the weights; 16 bytes are one group's, so their products are added up as plain integers
times x, and scale and offset come in once for 16 or 32 weights.  Its twin in machine code is grouped_words.py.
"""

# ruff: noqa: SIM108
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from vserve.kernels.early import await_inputs
from vserve.kernels.gemv import finish_row
from vserve.kernels.packed import Form

ZERO = tl.constexpr(int(Form.ZERO))
MINIMUM = tl.constexpr(int(Form.MINIMUM))
CENTRE = tl.constexpr(int(Form.CENTRE))
FLOAT = tl.constexpr(int(Form.FLOAT))


@triton.jit
def _parts(w, x_low, x_high, BITS: tl.constexpr):
    # w [ROWS, B] bytes, x [B] fp32 -> [ROWS, B] fp32: q times x, over both halves of the byte
    if BITS == 4:
        low = (w & 0x0F).to(tl.float32)
        high = (w >> 4).to(tl.float32)
        return low * x_low[None, :] + high * x_high[None, :]
    return w.to(tl.float32) * x_low[None, :]


@triton.jit
def load_group(numbers_ptr, place, inside, FORM: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr):
    """The scales and offsets of numbers [G, N] at place, a scale for an offset where there is none.

    Not EVEN: zeros but for those inside.  WORDS: a scale of 2 bytes is read with its neighbour.
    """
    TYPE: tl.constexpr = numbers_ptr.dtype.element_ty
    SMALL: tl.constexpr = TYPE.primitive_bitwidth == 16
    if SMALL and (FORM <= MINIMUM or WORDS):
        at = numbers_ptr.to(tl.pointer_type(tl.int32)) + (place if FORM <= MINIMUM else place >> 1)
    elif FORM <= MINIMUM:
        at = numbers_ptr + 2 * place
    else:
        at = numbers_ptr + place
    if EVEN:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=inside, other=0)
    if SMALL and FORM <= MINIMUM:
        scale = (found & 0xFFFF).to(tl.int16).to(TYPE, bitcast=True)
        offset = (found >> 16).to(tl.int16).to(TYPE, bitcast=True)
    elif SMALL and WORDS:
        scale = (found >> ((place & 1) * 16).to(tl.int32)).to(tl.int16).to(TYPE, bitcast=True)
        offset = scale
    elif FORM <= MINIMUM:
        scale = found
        if EVEN:
            offset = tl.load(at + 1)
        else:
            offset = tl.load(at + 1, mask=inside, other=0)
    else:
        scale = found
        offset = found
    return scale, offset


@triton.jit
def _load_step(
    data_ptr, numbers_ptr, row, num_scales, start,
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
    inside = (start + c * WIDE < K)[None, :]
    scale, offset = load_group(numbers_ptr, g[None, :] * num_scales + row[:, None], inside, FORM, EVEN, False)
    if EVEN:
        w = tl.load(at, eviction_policy="evict_first")
    else:
        w = tl.load(at, mask=(start * BITS // 8 + j < K * BITS // 8)[None, :], other=0.0, eviction_policy="evict_first")
    return w, scale, offset


@triton.jit
def _scaled(
    sums, w, scale, offset, x_low, x_high, x_sum, CENTRE_AT: tl.constexpr,
    ROWS: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    # sums [ROWS, C] += the weights times x, for every 16 bytes
    products = tl.sum(tl.reshape(_parts(w, x_low, x_high, BITS), [ROWS, C, 16]), axis=2)
    return add_groups(sums, products, scale, offset, x_sum, CENTRE_AT, FORM)


@triton.jit
def add_groups(sums, products, scale, offset, x_sum, CENTRE_AT: tl.constexpr, FORM: tl.constexpr):
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
def portable_row(
    x_ptr,  # [K]
    data_ptr,  # [N, K * BITS / 8], gated [2 F, ...]
    numbers_ptr,  # [K / GROUP, N], or [K / GROUP, N, 2] with offsets
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
        k = j // 16 * 32 + j % 2 * 16 + j % 16 // 4 * 2 + j % 4 // 2
    w, s, o = _load_step(
        data_ptr, numbers_ptr, row, num_scales, 0, K, GROUP, BITS, FORM, BLOCK_K, EVEN
    )  # fmt: skip
    w2, s2, o2 = w, s, o
    if GATED:
        w2, s2, o2 = _load_step(
            data_ptr, numbers_ptr, other, num_scales, 0, K, GROUP, BITS, FORM, BLOCK_K, EVEN
        )  # fmt: skip
    await_inputs(EARLY)
    sums = tl.zeros([ROWS, C], tl.float32)
    more = tl.zeros([ROWS, C], tl.float32)
    squares = tl.zeros([B], tl.float32)
    for start in range(0, K, BLOCK_K):
        # The next weights are asked for before the present ones are used; behind the last, the last again.
        ahead = tl.minimum(start + BLOCK_K, (K - 1) // BLOCK_K * BLOCK_K)
        w_next, s_next, o_next = _load_step(
            data_ptr, numbers_ptr, row, num_scales, ahead, K, GROUP, BITS, FORM, BLOCK_K, EVEN
        )  # fmt: skip
        w2_next, s2_next, o2_next = w_next, s_next, o_next
        if GATED:
            w2_next, s2_next, o2_next = _load_step(
                data_ptr, numbers_ptr, other, num_scales, ahead, K, GROUP, BITS, FORM, BLOCK_K, EVEN
            )  # fmt: skip
        at = start + k
        x_low = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
        x_high = x_low
        if BITS == 4:
            x_high = tl.load(x_ptr + at + 8, mask=at + 8 < K, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x_low * x_low
            x_low *= tl.load(norm_ptr + at, mask=at < K, other=0.0).to(tl.float32)
            if BITS == 4:
                squares += x_high * x_high
                x_high *= tl.load(norm_ptr + at + 8, mask=at + 8 < K, other=0.0).to(tl.float32)
        x_all = x_low
        if BITS == 4:
            x_all = x_low + x_high
        x_sum = tl.sum(tl.reshape(x_all, [C, 16]), axis=1)
        sums = _scaled(sums, w, s, o, x_low, x_high, x_sum, CENTRE_AT, ROWS, C, BITS, FORM)
        if GATED:
            more = _scaled(more, w2, s2, o2, x_low, x_high, x_sum, CENTRE_AT, ROWS, C, BITS, FORM)
        w, s, o = w_next, s_next, o_next
        w2, s2, o2 = w2_next, s2_next, o2_next
    finish_row(
        tl.sum(sums, axis=1), tl.sum(more, axis=1), tl.sum(squares, axis=0), n, num_out, eps, bias_ptr, residual_ptr,
        y_ptr, K, HAS_NORM, HAS_BIAS, HAS_RESIDUAL, GATED,
    )  # fmt: skip
