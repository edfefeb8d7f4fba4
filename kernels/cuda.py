"""The Triton back end: the functions of vserve.model.ops.Ops, and the fused ones that only a GPU has use for.

Signatures are those of reference.py.  Knows which kernel serves which shape; each kernel's file says how.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from vserve.kernels import activation, dispatch, early, norm, rope
from vserve.kernels.attention_decode import DecodePlan, decode_attention, plan_tasks
from vserve.kernels.attention_prefill import prefill_attention
from vserve.kernels.gemv import gated_gemv, gemv, on_vectors
from vserve.kernels.rope import split_qkv
from vserve.kernels.sampling import bias_and_ban, count_tokens, penalise, sample, token_logprobs

__all__ = [
    "DecodePlan",
    "StepPlan",
    "add_rms_norm",
    "bias_and_ban",
    "count_tokens",
    "decode_attention",
    "gated_gemv",
    "gemv",
    "linear",
    "norm_gated_linear",
    "norm_linear",
    "norm_rope_and_write",
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

EARLY_ROWS = 1
"""Kernels of more rows are not launched early.  On an H100 it takes 8 % off an 8B step of one row and 5 % off a 1B one,
and adds 2 to 13 % at 2 to 32 rows: programs that wait take the room of those that read."""


@dataclass(slots=True, eq=False)
class StepPlan:
    """What the layers of one step share.  The first `decodes` sequences have one token each and are the first rows.

    cos, sin [T, E / 2] float32; slots [T] int64; the rest as in ops.Step.  tasks: by plan_tasks, in the first layer.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    decodes: int
    tasks: DecodePlan | None = None


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
    return StepPlan(cos[positions], sin[positions], slots, query_starts, context_lens, block_tables, decodes)


def rope_and_write(qkv: Tensor, pairs: Tensor, plan: object) -> Tensor:
    """Rotate queries and keys of qkv [T, (Hq + 2 Hk) * E], write keys and values to pairs -> queries [T, Hq, E]."""
    return norm_rope_and_write(qkv, None, None, 0.0, pairs, plan)


def norm_rope_and_write(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, pairs: Tensor, plan: object
) -> Tensor:
    """rope_and_write with each head of the queries and keys RMS-normalised first, by q_norm and k_norm [E]."""
    assert isinstance(plan, StepPlan)
    kv_heads, width = pairs.shape[3], pairs.shape[4]
    q, k, v = split_qkv(qkv, qkv.shape[1] // width - 2 * kv_heads, kv_heads, width)
    return rope.norm_rope_and_write(
        q,
        k,
        v,
        q_norm,
        k_norm,
        eps,
        plan.cos,
        plan.sin,
        pairs[:, :, 0],
        pairs[:, :, 1],
        plan.slots,
        early=_early(qkv),
    )


def paged_attention(q: Tensor, pairs: Tensor, plan: object, scale: float) -> Tensor:
    """Causal attention of q [T, Hq, E] over the pages of each token's own sequence -> [T, Hq * E]."""
    assert isinstance(plan, StepPlan)
    keys, values = pairs[:, :, 0], pairs[:, :, 1]
    starts, lens, tables, decodes = plan.query_starts, plan.context_lens, plan.block_tables, plan.decodes
    out = q.new_empty(q.shape)
    if decodes:
        if plan.tasks is None:
            plan.tasks = plan_tasks(lens[:decodes], keys.shape[2])
        decode_attention(
            q[:decodes],
            keys,
            values,
            lens[:decodes],
            tables[:decodes],
            scale,
            plan.tasks,
            out[:decodes],
            early=_early(q),
        )
    if decodes < len(lens):
        prefill_attention(
            q, keys, values, starts[decodes:], lens[decodes:], tables[decodes:], scale, out, early=_early(q)
        )
    return out.view(q.shape[0], -1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [M, K] times weight [N, K] + bias [N] + residual [M, N] -> [M, N], by the faster kernel for this shape."""
    if dispatch.use_gemv(x.shape[0], weight.shape[0], weight.shape[1], x.device):
        return gemv(x, weight, bias=bias, residual=residual, early=_early(x))
    y = functional.linear(x, weight, bias)
    return y if residual is None else y.add_(residual)


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear(rms_norm(x [M, K], norm_weight [K], eps), weight [N, K], bias [N]) -> [M, N]."""
    shape = (x.shape[0], weight.shape[0], weight.shape[1])
    if on_vectors(*shape) and dispatch.use_gemv(*shape, x.device):
        return gemv(x, weight, norm=norm_weight, eps=eps, bias=bias, early=_early(x))
    # On the matrix units the norm inside the product costs more than a kernel of its own.
    return linear(rms_norm(x, norm_weight, eps), weight, bias)


def norm_gated_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    """silu_mul(linear(rms_norm(x [M, K], norm_weight [K], eps), weight [2F, K])) -> [M, F]."""
    shape = (x.shape[0], weight.shape[0], weight.shape[1])
    if dispatch.use_gemv(*shape, x.device):
        if on_vectors(*shape):
            return gated_gemv(x, weight, norm=norm_weight, eps=eps, early=_early(x))
        return gated_gemv(rms_norm(x, norm_weight, eps), weight, early=_early(x))
    return silu_mul(functional.linear(rms_norm(x, norm_weight, eps), weight))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D], weight [D] -> [T, D] in x's dtype, computed in float32."""
    return norm.rms_norm(x, weight, eps, early=_early(x))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) [T, D]; the sum replaces residual."""
    return norm.add_rms_norm(x, residual, weight, eps, early=_early(x))


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F] -> silu(first half) * second half [T, F]."""
    return activation.silu_mul(gate_up, early=_early(gate_up))


def _early(x: Tensor) -> bool:
    return x.is_cuda and x.shape[0] <= EARLY_ROWS and early.supported(x.device.index)
