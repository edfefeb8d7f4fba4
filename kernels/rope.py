"""Rotary embedding of queries and keys, an RMS norm of each head before it where the model has one, and the write of
keys and values to their pages: one kernel.

    n = x * norm / sqrt(mean(x^2) + eps)                              (only with a norm; over the E numbers of one head)
    y[i]         = n[i] * cos[t, i] - n[i + E/2] * sin[t, i]          i < E/2: the "halves" layout
    y[i + E/2]   = n[i + E/2] * cos[t, i] + n[i] * sin[t, i]

q [T, Hq, E], k and v [T, Hk, E]: views of one stacked projection or tensors of their own, bf16, fp16 or fp32;
cos, sin [T, E/2] float32, of each token's position, which may be views of wider tables;
caches [num_blocks, block_size, Hk, E] of any float type, e4m3 with scales (narrow.py); slots [T] int64.
A token of slot -1 (padding of a captured batch) writes nothing to the cache.
Su et al. 2021, "RoFormer", arXiv:2104.09864; the head norm: Henry et al. 2020, arXiv:2010.04245.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vserve.kernels.early import await_inputs, options
from vserve.kernels.narrow import reduced, scale_of

TILE = 512
"""Numbers of one half of the heads that a program rotates."""


@triton.jit
def _rotate(low, high, cos, sin, norm_ptr, i, inside, eps, HAS_NORM: tl.constexpr, HALF: tl.constexpr):
    # low, high [heads, HALF] float32; cos, sin [1, HALF]
    if HAS_NORM:
        mean = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * HALF)
        scale = tl.rsqrt(mean + eps)[:, None]
        low *= scale * tl.load(norm_ptr + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        high *= scale * tl.load(norm_ptr + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _rope_and_write(
    q_ptr,  # [T, Hq, E], tokens q_stride apart
    k_ptr,  # [T, Hk, E], tokens k_stride apart
    v_ptr,  # [T, Hk, E], tokens v_stride apart
    q_norm_ptr,  # [E]
    k_norm_ptr,  # [E]
    cos_ptr,  # [T, E / 2], tokens table_stride apart
    sin_ptr,  # the same strides
    slots_ptr,  # [T]
    out_ptr,  # [T, Hq, E] contiguous
    key_cache_ptr,  # [num_blocks, block_size, Hk, E], blocks block_stride apart, tokens of a block slot_stride
    value_cache_ptr,  # the same strides
    scales_ptr,  # [num_blocks, Hk, block_size, 2], read when SCALED
    key_scale,  # of all keys, read when GIVEN
    value_scale,
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    block_stride,
    slot_stride,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    Q_PARTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SCALED: tl.constexpr,
    GIVEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    i = tl.arange(0, BLOCK_HALF)
    inside = i < HALF
    cos = tl.load(cos_ptr + token * table_stride + i, mask=inside, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * table_stride + i, mask=inside, other=0.0)[None, :]
    if part < Q_PARTS:
        head = part * HEADS + tl.arange(0, HEADS)
        mask = (head < Q_HEADS)[:, None] & inside[None, :]
        at = head[:, None] * (2 * HALF) + i[None, :]
        low = tl.load(q_ptr + token * q_stride + at, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(q_ptr + token * q_stride + at + HALF, mask=mask, other=0.0).to(tl.float32)
        low, high = _rotate(low, high, cos, sin, q_norm_ptr, i, inside, eps, HAS_NORM, HALF)
        to = out_ptr + token * (Q_HEADS * 2 * HALF) + at
        tl.store(to, low.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(to + HALF, high.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            head = (part - Q_PARTS) * HEADS + tl.arange(0, HEADS)
            mask = (head < KV_HEADS)[:, None] & inside[None, :]
            at = head[:, None] * (2 * HALF) + i[None, :]
            low = tl.load(k_ptr + token * k_stride + at, mask=mask, other=0.0).to(tl.float32)
            high = tl.load(k_ptr + token * k_stride + at + HALF, mask=mask, other=0.0).to(tl.float32)
            low, high = _rotate(low, high, cos, sin, k_norm_ptr, i, inside, eps, HAS_NORM, HALF)
            # int64 (slots are): block * stride passes 2**31 on a cache of that many numbers
            place = (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * slot_stride
            low_value = tl.load(v_ptr + token * v_stride + at, mask=mask, other=0.0)
            high_value = tl.load(v_ptr + token * v_stride + at + HALF, mask=mask, other=0.0)
            if SCALED:
                low_value, high_value = low_value.to(tl.float32), high_value.to(tl.float32)
                of_keys = scale_of(low, high, key_scale, GIVEN)
                of_values = scale_of(low_value, high_value, value_scale, GIVEN)
                low, high = reduced(low, of_keys), reduced(high, of_keys)
                low_value, high_value = reduced(low_value, of_values), reduced(high_value, of_values)
                word = ((slot // BLOCK_SIZE) * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
                tl.store(scales_ptr + word * 2, of_keys, mask=head < KV_HEADS)
                tl.store(scales_ptr + word * 2 + 1, of_values, mask=head < KV_HEADS)
            to = key_cache_ptr + place + at
            tl.store(to, low.to(key_cache_ptr.dtype.element_ty), mask=mask)
            tl.store(to + HALF, high.to(key_cache_ptr.dtype.element_ty), mask=mask)
            to = value_cache_ptr + place + at
            tl.store(to, low_value.to(value_cache_ptr.dtype.element_ty), mask=mask)
            tl.store(to + HALF, high_value.to(value_cache_ptr.dtype.element_ty), mask=mask)


def rope_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    scales: Tensor | None = None,
    given: tuple[float, float] | None = None,
    early: bool = False,
) -> Tensor:
    """Rotate q and k, write k and v to slots (slot < 0: not at all); returns the rotated q, a new [T, Hq, E].

    q, k, v may be views with any stride between tokens; each token's [heads, E] is contiguous.  scales [num_blocks, Hk,
    block_size, 2] bf16, with caches of e4m3 alone: written too; given: the same for all keys, and for all values.
    """
    return norm_rope_and_write(
        q, k, v, None, None, 0.0, cos, sin, key_cache, value_cache, slots, scales=scales, given=given, early=early
    )


def norm_rope_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    scales: Tensor | None = None,
    given: tuple[float, float] | None = None,
    early: bool = False,
) -> Tensor:
    """As rope_and_write, with each head of q and k RMS-normalised before it: q_norm, k_norm [E], both or neither."""
    tokens, q_heads, width = q.shape
    kv_heads = k.shape[1]
    half = width // 2
    for tensor in (q, k, v):
        assert tensor.stride(2) == 1
        assert tensor.stride(1) == width
    assert key_cache.stride() == value_cache.stride()
    assert key_cache.stride()[2:] == (width, 1)
    assert (scales is not None) == (key_cache.dtype.itemsize == 1)
    assert scales is None or scales.is_contiguous()
    assert cos.stride() == sin.stride()
    assert cos.stride(1) == 1
    assert cos.shape[1] == half
    out = torch.empty((tokens, q_heads, width), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    block_half = triton.next_power_of_2(half)
    heads = min(max(1, TILE // block_half), triton.next_power_of_2(max(q_heads, kv_heads)))
    q_parts = triton.cdiv(q_heads, heads)
    _rope_and_write[(tokens, q_parts + triton.cdiv(kv_heads, heads))](
        q,
        k,
        v,
        q if q_norm is None else q_norm,
        k if k_norm is None else k_norm,
        cos,
        sin,
        slots,
        out,
        key_cache,
        value_cache,
        q if scales is None else scales,
        *(given or (1.0, 1.0)),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        cos.stride(0),
        key_cache.stride(0),
        key_cache.stride(1),
        eps,
        q_heads,
        kv_heads,
        half,
        block_half,
        heads,
        q_parts,
        key_cache.shape[1],
        q_norm is not None,
        scales is not None,
        given is not None,
        early,
        **options(2, early),
    )
    return out


def split_qkv(qkv: Tensor, q_heads: int, kv_heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (Hq + 2 Hk) * E], the stacked projection -> views q [T, Hq, E], k [T, Hk, E], v [T, Hk, E]."""
    heads = qkv.view(qkv.shape[0], q_heads + 2 * kv_heads, width)
    q, k, v = heads.split_with_sizes((q_heads, kv_heads, kv_heads), dim=1)
    return q, k, v
