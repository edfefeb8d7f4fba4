"""Compile every launch of a decode and a prefill step for an H100, on a machine without one.  Run by a test.

The interpreter takes programs that the compiler refuses (a variable whose shape changes in a loop, say).  What is
compiled is thrown away.  Prints a line each.
"""

from __future__ import annotations

import torch
import triton
from hopper import TARGET, catch, shared_bytes, some
from triton.compiler import ASTSource

seen: set[str] = set()


def compile_launch(name: str, what: ASTSource, options: dict[str, object]) -> None:
    kernel = triton.compile(what, target=TARGET, options=options)
    if name not in seen:  # what the other tests go by is what the whole compiler says
        assert shared_bytes(what, options) == kernel.metadata.shared, name
    seen.add(name)
    print(name)


catch(compile_launch)

from vserve.kernels import (  # noqa: E402
    attention_decode,
    attention_prefill,
    experts,
    fp8,
    gemv,
    grouped,
    moe,
    norm,
    rope,
    route,
    sampling,
)
from vserve.kernels.activation import activate, gated, silu_mul  # noqa: E402
from vserve.kernels.moe_packed import new_stack  # noqa: E402
from vserve.kernels.packed import Form, Packed  # noqa: E402
from vserve.kernels.tasks import plan_tasks  # noqa: E402

grouped.has_asm = lambda x: x.dtype != torch.float32  # what is compiled lies on a CPU here


SIZES = ((1536, 2048), (2048, 768))
"""Of the two products of an expert."""


def grouped_weight(outputs: int, inputs: int, bits: int, group: int, form: Form) -> Packed:
    sides = (2,) if form.has_offset else ()
    numbers = some(inputs // group, outputs, *sides, dtype=torch.float32 if form is Form.FLOAT else torch.float16)
    data = some(outputs, inputs * bits // 8, dtype=torch.uint8)
    counters = some(8192, dtype=torch.int32)
    return Packed(data, numbers, bits, group, form, 8, counters)


def main() -> None:
    int32, int64, single = torch.int32, torch.int64, torch.float32
    rows = 4
    for heads, kv_heads, width in ((32, 8, 128), (6, 2, 96)):
        cache = some(10, 16, 2, kv_heads, width)
        keys, values, q = cache[:, :, 0], cache[:, :, 1], some(rows, heads, width)
        lens, tables = some(rows, dtype=int32), some(rows, 8, dtype=int32)
        attention_decode.decode_attention(q, keys, values, lens, tables, 0.1, early=True)
        starts = some(rows + 1, dtype=int32)
        attention_prefill.prefill_attention(q, keys, values, starts, lens, tables, 0.1, early=True)
        for window, cap in ((4096, None), (None, 50.0), (1024, 30.0)):
            inputs = (q, keys, values, starts, lens, tables, 0.1)
            attention_prefill.prefill_attention(*inputs, window=window, softcap=cap, early=True)
            tasks = plan_tasks(lens, kv_heads)
            attention_decode.decode_attention(
                q, keys, values, lens, tables, 0.1, tasks, window=window, softcap=cap, early=True
            )
        angles = some(rows, width // 2, dtype=single)
        k, weight = some(rows, kv_heads, width), some(width)
        slots = some(rows, dtype=int64)
        rope.norm_rope_and_write(q, k, k, weight, weight, 1e-5, angles, angles, keys, values, slots, early=True)
        narrow, scales = cache.to(torch.float8_e4m3fn), some(10, kv_heads, 16, 2)
        keys, values = narrow[:, :, 0], narrow[:, :, 1]
        for given in (None, (0.5, 0.25)):
            turned = (q, k, k, angles, angles, keys, values, slots)
            rope.rope_and_write(*turned, scales=scales, given=given, early=True)
        for dtype in (torch.bfloat16, torch.float16) if width == 128 else (single,):
            for window, cap in ((None, None), (1024, 30.0)):
                inputs = (q.to(dtype), keys, values, starts, lens, tables, 0.1)
                attention_prefill.prefill_attention(*inputs, window=window, softcap=cap, scales=scales, early=True)
                attention_decode.decode_attention(
                    *inputs[:3], *inputs[4:], tasks, window=window, softcap=cap, scales=scales, early=True
                )
    logits, one, ids = some(rows, 9000, dtype=single), some(rows, dtype=single), some(rows, dtype=int64)
    counts, lists = some(rows, 9000, dtype=int32), some(rows, 300, dtype=int32)
    sampling.sample(logits, one, lens, one, one, ids, ids)
    sampling.token_logprobs(logits, ids)
    sampling.bias_and_ban(logits, ids, ids, lists, some(rows, 300, dtype=single), lists[:, :5].contiguous(), ids)
    sampling.penalise(logits, ids, counts, one, one, one)
    sampling.count_tokens(counts, ids, ids)
    for m in (1, 2, 8, 64):
        gemv.gemv(some(m, 2048), some(4096, 2048), norm=some(2048), residual=some(m, 4096), early=True)
        gemv.gated_gemv(some(m, 576), some(4096, 576), norm=some(576), bias=some(4096))
        gemv.gated_gemv(some(m, 2048), some(4096, 2048), early=True)
    for m in (8, 32):
        _, normed = gemv.gemv_then_norm(some(m, 2048), some(4096, 2048), some(4096), residual=some(m, 4096), early=True)
        gemv.gemv(normed, some(6144, 4096), early=True)
        gemv.gated_gemv(normed, some(8192, 4096), early=True)
    norm.add_rms_norm(some(rows, 576), some(rows, 576), some(576), 1e-5, early=True)
    norm.add_layer_norm(some(rows, 576), some(rows, 576), some(576), some(576), 1e-5, early=True)
    silu_mul(some(rows, 2048), early=True)
    for activation in ("relu", "gelu", "gelu_tanh"):
        activate(some(rows, 2048), activation)
        gated(some(rows, 2048), activation)
    for m in (1, 2, 40):
        routes = route.route(some(m, 16), 8, normalised=True, early=m == 1)
        stacks = some(16, 1536, 2048), some(16, 2048, 768)
        moe.few(some(m, 2048), some(2048), 1e-5, routes, *stacks, early=m == 1)
        experts.many(some(m, 2048), routes, *stacks, some(m, 2048), early=m == 1)
    for bits, group, form in ((4, 128, Form.ZERO), (4, 32, Form.MINIMUM), (8, 16, Form.CENTRE), (8, 2048, Form.FLOAT)):
        for dtype in (torch.bfloat16, torch.float16, single):
            weight = grouped_weight(4096, 2048, bits, group, form)
            x, width = some(1, 2048, dtype=dtype), some(2048, dtype=dtype)
            grouped.linear(x, weight, residual=some(1, 4096, dtype=dtype), early=True)
            grouped.gated_row(x, weight, norm=width, early=True)
            grouped.linear(some(16, 2048, dtype=dtype), weight, bias=some(4096, dtype=dtype))
        grouped.write_out(weight, torch.bfloat16)
        routes = route.route(some(24, 16), 8, normalised=False)
        stacks = [new_stack(16, grouped_weight(*size, bits, min(group, size[1]), form)) for size in SIZES]
        experts.many(some(24, 2048), routes, *stacks)
        experts.many(some(1, 2048), routes, *stacks, early=True)
    fp8.quantise_rows(some(4, 2048), norm=some(2048))


if __name__ == "__main__":
    main()
