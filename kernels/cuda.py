"""The Triton back end: the functions of vserve.model.ops.Ops, and the fused ones that only a GPU has use for.

Signatures are those of reference.py.  Knows which kernel serves which shape; each kernel's file says how.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from vserve.kernels import activation as _activation
from vserve.kernels import dispatch, early, norm, rope
from vserve.kernels.attention_decode import decode_attention
from vserve.kernels.attention_prefill import prefill_attention
from vserve.kernels.gemv import Normed, gated_gemv, gemv, gemv_then_norm
from vserve.kernels.gemv_shapes import on_vectors
from vserve.kernels.rope import split_qkv
from vserve.kernels.sampling import bias_and_ban, count_tokens, penalise, sample, token_logprobs
from vserve.kernels.tasks import DecodePlan, plan_tasks

__all__ = [
    "DecodePlan",
    "Normed",
    "StepPlan",
    "activate",
    "add_layer_norm",
    "add_rms_norm",
    "bias_and_ban",
    "count_tokens",
    "decode_attention",
    "gated",
    "gated_gemv",
    "gemv",
    "layer_norm",
    "linear",
    "linear_then_norm",
    "norm_gated_linear",
    "norm_linear",
    "paged_attention",
    "penalise",
    "plan",
    "plan_tasks",
    "prefill_attention",
    "rms_norm",
    "rope_and_write",
    "sample",
    "silu_mul",
    "split_qkv",
    "token_logprobs",
]

EARLY_ROWS = 32
"""Kernels of more rows are not launched early: most of their time is cuBLAS's, which lets none in before its end."""


@dataclass(slots=True, eq=False)
class StepPlan:
    """What the layers of one step share.  The first `decodes` sequences have one token each and are the first rows.

    cos, sin [T, R * E / 2] float32: R rotations side by side; slots [T] int64; the rest as in ops.Step.
    positions [T] of any int, negative for padding: only models with learned positions need them.
    tasks: by plan_tasks, for each window of a layer, in the first such layer.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    decodes: int
    positions: Tensor | None = None
    tasks: dict[int | None, DecodePlan] = field(default_factory=dict)


def plan(
    positions: Tensor,
    slots: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    query_lens: tuple[int, ...],
    context_lens_host: tuple[int, ...],
    cos: Tensor,
    sin: Tensor,
    block_size: int,
) -> StepPlan:
    """What every layer of the step is handed.  Only shapes and the leading query_lens matter to what is launched.

    So a captured graph serves every batch of its bucket.  Sequences of one token that come first run in the split
    decode kernel, the rest in the prefill kernel: a batch should put its decodes first.
    """
    decodes = 0
    while decodes < len(query_lens) and query_lens[decodes] == 1:
        decodes += 1
    turns = (cos[positions], sin[positions])
    return StepPlan(*turns, slots, query_starts, context_lens, block_tables, decodes, positions)


def rope_and_write(
    qkv: Tensor,
    pairs: Tensor,
    plan: object,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    rotation: int = 0,
    scales: Tensor | None = None,
    given: tuple[float, float] | None = None,
) -> Tensor:
    """Rotate queries and keys of qkv [T, (Hq + 2 Hk) * E], write keys and values to pairs -> queries [T, Hq, E].

    With q_norm and k_norm [E] each head is RMS-normalised first.  Pairs of e4m3 have scales (kernels/narrow.py).
    """
    assert isinstance(plan, StepPlan)
    kv_heads, width = pairs.shape[3], pairs.shape[4]
    begin, end = rotation * (width // 2), (rotation + 1) * (width // 2)
    q, k, v = split_qkv(qkv, qkv.shape[1] // width - 2 * kv_heads, kv_heads, width)
    return rope.norm_rope_and_write(
        q,
        k,
        v,
        q_norm,
        k_norm,
        eps,
        plan.cos[:, begin:end],
        plan.sin[:, begin:end],
        pairs[:, :, 0],
        pairs[:, :, 1],
        plan.slots,
        scales=scales,
        given=given,
        early=_early(qkv),
    )


def paged_attention(
    q: Tensor,
    pairs: Tensor,
    plan: object,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [T, Hq, E] over the pages of each token's own sequence -> [T, Hq * E].

    Where a step has decodes and prompts, the prompts' kernel runs on a stream beside the decodes': one multiplies while
    the other reads.  It joins before this returns.
    window: a token sees so many, itself included.  softcap: scores become softcap * tanh(score / softcap).
    """
    assert isinstance(plan, StepPlan)
    keys, values = pairs[:, :, 0], pairs[:, :, 1]
    starts, lens, tables, decodes = plan.query_starts, plan.context_lens, plan.block_tables, plan.decodes
    out = q.new_empty(q.shape)
    here = beside = None
    if q.is_cuda and 0 < decodes < len(lens) and not _early(q):
        here, beside = torch.cuda.current_stream(q.device), _side_stream(q.device)
        beside.wait_stream(here)
    if decodes < len(lens):
        with torch.cuda.stream(beside):
            prefill_attention(
                q,
                keys,
                values,
                starts[decodes:],
                lens[decodes:],
                tables[decodes:],
                scale,
                out,
                window=window,
                softcap=softcap,
                scales=scales,
                early=_early(q),
            )
    if decodes:
        tasks = plan.tasks.get(window)
        if tasks is None:
            tasks = plan.tasks[window] = plan_tasks(
                lens[:decodes], keys.shape[2], window=window, e4m3=scales is not None
            )
        decode_attention(
            q[:decodes],
            keys,
            values,
            lens[:decodes],
            tables[:decodes],
            scale,
            tasks,
            out[:decodes],
            window=window,
            softcap=softcap,
            scales=scales,
            # Of a mixed step the rows behind the last decode are the first prompt's.
            zeros=decodes == len(lens),
            early=_early(q),
        )
    if here is not None and beside is not None:
        here.wait_stream(beside)
    return out.view(q.shape[0], -1)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [M, K] times weight [N, K] + bias [N] + residual [M, N] -> [M, N], by the faster kernel for this shape."""
    if dispatch.use_gemv(x.shape[0], weight.shape[0], weight.shape[1], x.device):
        return gemv(x, weight, bias=bias, residual=residual, early=_early(x))
    y = functional.linear(x, weight, bias)
    return y if residual is None else y.add_(residual)


def linear_then_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, following: Tensor
) -> tuple[Tensor, Tensor | Normed]:
    """linear(x, weight, bias, residual) [M, N], and what norm_linear and norm_gated_linear of following [L, N] take.

    That is the sum itself where its norm is a kernel of its own, or part of what reads following.
    """
    rows = x.shape[0]
    if x.dtype != torch.float16 and _on_matrix_units(rows, weight) and _on_matrix_units(rows, following):
        return gemv_then_norm(x, weight, norm_weight, bias=bias, residual=residual, early=_early(x))
    y = linear(x, weight, bias, residual)
    return y, y


def norm_linear(
    x: Tensor | Normed, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """linear(rms_norm(x [M, K], norm_weight [K], eps), weight [N, K], bias [N]) -> [M, N]."""
    if isinstance(x, Normed):
        return gemv(x, weight, eps=eps, bias=bias, early=_early(x.x))
    shape = (x.shape[0], weight.shape[0], weight.shape[1])
    if on_vectors(*shape) and dispatch.use_gemv(*shape, x.device):
        return gemv(x, weight, norm=norm_weight, eps=eps, bias=bias, early=_early(x))
    # On the matrix units the norm inside the product costs more than a kernel of its own.
    return linear(rms_norm(x, norm_weight, eps), weight, bias)


def norm_gated_linear(x: Tensor | Normed, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    """silu_mul(linear(rms_norm(x [M, K], norm_weight [K], eps), weight [2F, K])) -> [M, F]."""
    if isinstance(x, Normed):
        return gated_gemv(x, weight, eps=eps, early=_early(x.x))
    shape = (x.shape[0], weight.shape[0], weight.shape[1])
    if dispatch.use_gemv(*shape, x.device):
        if on_vectors(*shape):
            return gated_gemv(x, weight, norm=norm_weight, eps=eps, early=_early(x))
        return gated_gemv(rms_norm(x, norm_weight, eps), weight, early=_early(x))
    return silu_mul(functional.linear(rms_norm(x, norm_weight, eps), weight))


def _on_matrix_units(rows: int, weight: Tensor) -> bool:
    shape = (rows, weight.shape[0], weight.shape[1])
    return dispatch.use_gemv(*shape, weight.device) and not on_vectors(*shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D], weight [D] -> [T, D] in x's dtype, computed in float32."""
    return norm.rms_norm(x, weight, eps, early=_early(x))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) [T, D]; the sum replaces residual."""
    return norm.add_rms_norm(x, residual, weight, eps, early=_early(x))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [T, D], weight and bias [D] -> [T, D] in x's dtype, computed in float32."""
    return norm.layer_norm(x, weight, bias, eps, early=_early(x))


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual) [T, D]; the sum replaces residual."""
    return norm.add_layer_norm(x, residual, weight, bias, eps, early=_early(x))


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """gate_up [T, 2F] -> activation(first half) * second half [T, F]."""
    return _activation.gated(gate_up, activation, early=_early(gate_up))


def activate(x: Tensor, activation: str) -> Tensor:
    """activation(x) [T, F]."""
    return _activation.activate(x, activation, early=_early(x))


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F] -> silu(first half) * second half [T, F]."""
    return _activation.silu_mul(gate_up, early=_early(gate_up))


def _early(x: Tensor) -> bool:
    return x.is_cuda and x.shape[0] <= EARLY_ROWS and early.supported(x.device.index)
