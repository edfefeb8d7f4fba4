"""The shared memory of every tile of the matrix units that the kernels choose, for any dtype, head size and rows.

Run by a test.  Prints a line for each kind of program: bytes, kernel, and the first launch that came to it.  The last
is one that no kernel chooses, over what an H100 has: the measure must see it.  Halves are of one size: bf16 stands for
both.
"""

from __future__ import annotations

import torch
from hopper import catch, shared_bytes, some
from triton.compiler import ASTSource

KERNELS = {"_matrix", "shared_matrix", "_decode", "decode_e4m3", "_prefill", "_tiles", "_packed_tiles"}
seen: set[str] = set()
what_runs = ""


def measure(name: str, what: ASTSource, options: dict[str, object]) -> None:
    if name not in KERNELS:
        return
    constants = {what.fn.arg_names[place]: value for (place,), value in what.constants.items()}
    # How many steps a program takes changes no tile; whether the last is whole does, and whether parts are shared.
    if "BLOCK_K" in constants:
        constants["K"] = constants.get("K", 0) % constants["BLOCK_K"] == 0
    if "SPLITS" in constants:
        constants["SPLITS"] = constants["SPLITS"] > 1
    key = f"{name} {what.signature} {sorted(constants.items())} {what.attrs} {options}"
    if key not in seen:
        seen.add(key)
        print(shared_bytes(what, options), name, what_runs)


catch(measure)

from vserve.kernels import attention_decode, attention_prefill, experts, gemv, gemv_shapes, grouped  # noqa: E402
from vserve.kernels.grouped_shapes import MEASURED  # noqa: E402
from vserve.kernels.moe_packed import new_stack  # noqa: E402
from vserve.kernels.packed import Form, Packed  # noqa: E402
from vserve.kernels.route import Routes  # noqa: E402

grouped.has_asm = lambda x: x.dtype != torch.float32  # what is measured lies on a CPU here

WIDTHS = (576, 1536, 4096)
OUTPUTS = (960, 4096, gemv_shapes.WIDE, 4 * gemv_shapes.WIDE)
SIZES = ((960, 576), *sorted({(outputs, inputs) for _, _, outputs, inputs in MEASURED}))


def note(*words: object) -> None:
    global what_runs
    what_runs = " ".join(str(word) for word in words)


def plain(dtype: torch.dtype) -> None:
    for width in WIDTHS:
        for outputs in OUTPUTS:
            weight = some(outputs, width, dtype=dtype)
            for rows in (3, 17, 33):
                note(dtype, "x", (rows, width), "weight", (outputs, width))
                x = some(rows, width, dtype=dtype)
                gemv.gemv(x, weight, residual=some(rows, outputs, dtype=dtype), early=True)
                gemv.gated_gemv(x, weight, early=True)


def packed_weight(outputs: int, inputs: int, bits: int, group: int, form: Form) -> Packed:
    sides = (2,) if form.has_offset else ()
    numbers = some(inputs // group, outputs, *sides, dtype=torch.float32 if form is Form.FLOAT else torch.float16)
    data = some(outputs, inputs * bits // 8, dtype=torch.uint8)
    return Packed(data, numbers, bits, group, form, 8, some(8192, dtype=torch.int32))


def packed(dtype: torch.dtype) -> None:
    for bits, group, form in ((4, 32, Form.MINIMUM), (8, 0, Form.FLOAT)):
        for outputs, inputs in SIZES:
            weight = packed_weight(outputs, inputs, bits, group or inputs, form)
            for rows in (16, 32, 64, 128):
                note(dtype, "x", (rows, inputs), "weight", (outputs, inputs), form.name, bits, "bits")
                grouped.linear(some(rows, inputs, dtype=dtype), weight)


def attention(dtype: torch.dtype) -> None:
    heads, kv_heads = 32, 1  # many queries a key: the largest tile
    for width in (64, 96, 128, 256):
        cache = some(10, 16, 2, kv_heads, width, dtype=dtype)
        keys, values = cache[:, :, 0], cache[:, :, 1]
        narrow, scales = some(*cache.shape, dtype=torch.float8_e4m3fn), some(10, kv_heads, 16, 2)
        lens, tables = some(4, dtype=torch.int32), some(4, 8, dtype=torch.int32)
        starts = some(5, dtype=torch.int32)
        for limits in ({}, {"window": 1024, "softcap": 30.0}):
            for tokens in (4, attention_prefill.LARGE // heads):
                note(dtype, "heads", (heads, kv_heads), "of", width, "tokens", tokens, limits)
                q = some(tokens, heads, width, dtype=dtype)
                attention_prefill.prefill_attention(q, keys, values, starts, lens, tables, 0.1, **limits)
            attention_decode.decode_attention(q[:4], keys, values, lens, tables, 0.1, **limits)
            note(dtype, "heads", (heads, kv_heads), "of", width, "over e4m3", limits)
            inputs = (narrow[:, :, 0], narrow[:, :, 1])
            attention_prefill.prefill_attention(q, *inputs, starts, lens, tables, 0.1, scales=scales, **limits)
            attention_decode.decode_attention(q[:4], *inputs, lens, tables, 0.1, scales=scales, **limits)


def mixture(dtype: torch.dtype) -> None:
    for rows in (40, 300, 1000, 4096):
        note(dtype, rows, "tokens through a mixture")
        routes = Routes(some(rows, 8, dtype=torch.int32), some(rows, 8, dtype=torch.float32))
        gate_up, down = some(128, 1536, 2048, dtype=dtype), some(128, 2048, 768, dtype=dtype)
        experts.many(some(rows, 2048, dtype=dtype), routes, gate_up, down)
        for bits, group, form in ((4, 32, Form.MINIMUM), (8, 0, Form.FLOAT)):
            stacks = [
                new_stack(128, packed_weight(outputs, inputs, bits, group or inputs, form))
                for outputs, inputs in ((1536, 2048), (2048, 768))
            ]
            note(dtype, rows, "tokens through a mixture in", form.name, bits, "bits")
            experts.many(some(rows, 2048, dtype=dtype), routes, *stacks)


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for part in (plain, packed, attention, mixture):
            part(dtype)
    note("too large")
    single = torch.float32
    gemv.gated_gemv(some(3, 2048, dtype=single), some(4096, 2048, dtype=single), shape=gemv_shapes.Shape(64, 256, 4, 4))


if __name__ == "__main__":
    main()
