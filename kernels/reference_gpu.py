"""Plain-PyTorch twins of the fused Triton operations that reference.py has no word for: obvious, slow, change no input.

Each has the signature and the contract of its namesake in gemv.py, rope.py, attention_decode.py, attention_prefill.py,
route.py, moe.py and sampling.py, any device and any float dtype; they compute in the dtype of their inputs, so the
tests give float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

GREEDY_BELOW = 1e-5


def gemv(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [M, K], normalised if norm [K] is given, times weight [N, K], plus bias [N] and residual [M, N] -> [M, N]."""
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * norm
    y = functional.linear(x, weight, bias)
    return y if residual is None else y + residual


def gated_gemv(
    x: Tensor, weight: Tensor, *, norm: Tensor | None = None, eps: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """silu(gate) * up of the stacked weight [2F, K] -> [M, F]."""
    gate, up = gemv(x, weight, norm=norm, eps=eps, bias=bias).chunk(2, dim=1)
    return functional.silu(gate) * up


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
) -> Tensor:
    """Rotated q [T, Hq, E]; the caches are changed at slots (a slot < 0 is padding)."""

    def turn(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = x * torch.rsqrt(x.square().mean(2, keepdim=True) + eps) * norm
        low, high = x.chunk(2, dim=2)
        c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        return torch.cat((low * c - high * s, high * c + low * s), dim=2)

    used = slots >= 0
    size = key_cache.shape[1]
    blocks, offsets = slots[used] // size, slots[used] % size
    key_cache[blocks, offsets] = turn(k, k_norm)[used].to(key_cache.dtype)
    value_cache[blocks, offsets] = v[used].to(value_cache.dtype)
    return turn(q, q_norm)


def prefill_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of each sequence's last tokens over its pages; rows of no sequence are zeros."""
    out = torch.zeros_like(q)
    size, group = key_cache.shape[1], q.shape[1] // key_cache.shape[2]
    starts = query_starts.tolist()
    for row, context in enumerate(context_lens.tolist()):
        first, last = starts[row], starts[row + 1]
        if first == last:
            continue
        n = torch.arange(context, device=q.device)
        blocks = block_tables[row].long()[n // size]
        keys = key_cache[blocks, n % size].to(q.dtype).repeat_interleave(group, dim=1)
        values = value_cache[blocks, n % size].to(q.dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("thd,nhd->htn", q[first:last], keys) * scale
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        seen = context - (last - first) + torch.arange(last - first, device=q.device)
        scores = scores.masked_fill(n[None, None, :] > seen[None, :, None], float("-inf"))
        if window is not None:
            scores = scores.masked_fill(n[None, None, :] <= seen[None, :, None] - window, float("-inf"))
        out[first:last] = torch.einsum("htn,nhd->thd", scores.softmax(dim=2), values)
    return out


def decode_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One token a row; zeros for a row of length 0."""
    starts = torch.zeros(len(context_lens) + 1, dtype=torch.int32, device=q.device)
    starts[1:] = torch.arange(1, len(context_lens) + 1)
    lens = context_lens.clamp(min=1)
    out = prefill_attention(
        q, key_cache, value_cache, starts, lens, block_tables, scale, window=window, softcap=softcap
    )
    return torch.where((context_lens > 0)[:, None, None], out, 0.0)


def route(scores: Tensor, active: int, *, normalised: bool) -> tuple[Tensor, Tensor]:
    """scores [T, E] -> the experts of each token [T, k] int64, largest score first, and their weights [T, k]."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :active]
    weights = scores.softmax(dim=1).gather(1, order)
    return order, weights / weights.sum(dim=1, keepdim=True) if normalised else weights


def experts(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The sum over the experts chosen [T, k] of weights [T, k] * down[e] (silu(gate) * up), for x [T, D] -> [T, D]."""
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            out[token] += weight * (down[expert] @ (functional.silu(gate) * up))
    return out


def uniforms(seed: int, counter: int, num_tokens: int) -> Tensor:
    """u[v] of sampling.py for v < num_tokens, float64: the hash of (seed, counter, v) written out again."""

    def mix(x: Tensor) -> Tensor:
        x = x ^ (x >> 16)
        x = x * 0x85EBCA6B & 0xFFFFFFFF
        x = x ^ (x >> 13)
        x = x * 0xC2B2AE35 & 0xFFFFFFFF
        return x ^ (x >> 16)

    low, high = torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF)
    key = mix(low ^ 0x9E3779B9) ^ high
    key = mix(mix(key) + (counter & 0xFFFFFFFF) & 0xFFFFFFFF)
    other = mix(key ^ 0x7F4A7C15)
    bits = mix(mix(torch.arange(num_tokens) * 0x9E3779B1 + key & 0xFFFFFFFF) ^ other)
    return (bits.double() + 0.5) * 2.0**-32


def kept(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which of scores [V] (logits over temperature) the filters keep [V] bool: top_k, then min_p, then top_p."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    if 0 < top_k < scores.numel():
        keep &= scores >= scores.topk(top_k).values[-1]
    if min_p > 0.0:
        keep &= scores >= scores.max() + torch.tensor(min_p, dtype=scores.dtype).log()
    if top_p < 1.0:
        weights = torch.where(keep, (scores - scores.max()).exp(), 0.0)
        order = scores.argsort(descending=True)
        before = weights[order].cumsum(0) - weights[order]
        edge = scores[order][before < top_p * weights.sum()].min()
        keep &= scores >= edge
    return keep


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    counters: Tensor,
) -> Tensor:
    """One id a row [B] int64; -1 for a row without a finite largest logit."""
    ids = []
    for row in range(logits.shape[0]):
        scores, heat = logits[row].double(), float(temperature[row])
        if not torch.isfinite(scores.max()):  # max finds a NaN, if there is one
            ids.append(-1)
        elif heat < GREEDY_BELOW:
            ids.append(int(scores.argmax()))
        else:
            scores = scores / heat
            keep = kept(scores, int(top_k[row]), float(top_p[row]), float(min_p[row]))
            noise = -torch.log(-torch.log1p(-uniforms(int(seeds[row]), int(counters[row]), len(scores))))
            ids.append(int(torch.where(keep, scores + noise.to(scores.device), -torch.inf).argmax()))
    return torch.tensor(ids, dtype=torch.int64, device=logits.device)
