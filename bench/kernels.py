"""Each kernel alone on the GPU, beside its floor and what PyTorch offers for the same work.

    python bench/kernels.py                         every section, printed
    python bench/kernels.py --only linear --record  one section, also kept in bench/results/kernels.jsonl
    python bench/kernels.py --only dispatch         the rows of kernels/dispatch.py for this card

Every number is the median over replays of one captured graph of many calls, which takes the launches' own cost away;
the calls go around several sets of inputs, larger together than the cache.  The floor is the bytes that must move at
3.0 TB/s or the products at 779 TFLOP/s, both measured on an H100 80GB (a copy and an 8192-cubed matrix product).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# In place of this folder, whose http.py would be taken for the standard library's by what torch imports.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional

from bench.record import emit
from vserve.kernels import reference
from vserve.kernels.activation import silu_mul
from vserve.kernels.attention_decode import decode_attention
from vserve.kernels.attention_prefill import prefill_attention
from vserve.kernels.gemv import MAX_ROWS, gated_gemv, gemv
from vserve.kernels.gemv_shapes import on_vectors
from vserve.kernels.norm import add_rms_norm, rms_norm
from vserve.kernels.rope import rope_and_write, split_qkv
from vserve.kernels.sampling import sample, token_logprobs
from vserve.kernels.tasks import plan_tasks

BYTES_PER_US = 3.0e6
FLOPS_PER_US = 779e6
CACHE_BYTES = 200_000_000
"""Inputs of one graph together: four times the second-level cache of an H100."""
BLOCK_SIZE = 16
EPS = 1e-5
SAME = 1.02
"""Times that differ by less are equal."""
DTYPE = torch.bfloat16

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Model:
    """The dimensions that the kernels see."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    vocabulary: int

    def weights(self) -> list[tuple[str, int, int]]:
        """(name, N, K) of each linear layer; gate_up has N = 2F."""
        return [
            ("qkv", (self.heads + 2 * self.kv_heads) * self.head_width, self.width),
            ("o", self.width, self.heads * self.head_width),
            ("gate_up", 2 * self.inner, self.width),
            ("down", self.width, self.inner),
            ("head", self.vocabulary, self.width),
        ]


MODELS = (
    Model("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
    Model("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256),
    Model("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152),
)


def time_us(calls: list[Call], repeats: int = 20) -> float:
    """Microseconds of one call: the median over replays of a graph of all of them, after a warm-up."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for i in range(repeats + 3):
        start, end = torch.Event("cuda", enable_timing=True), torch.Event("cuda", enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(float(start.elapsed_time(end)) * 1000.0 / len(calls))
    graph.reset()
    return statistics.median(times)


def copies(num_bytes: int, least: int = 8, most: int = 64) -> int:
    """How many sets of inputs of num_bytes are larger together than the cache, within reason."""
    return max(least, min(most, -(-CACHE_BYTES // max(1, num_bytes))))


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    """Random numbers on the GPU: zeros would be faster than any real data."""
    return torch.randn(*shape, device="cuda", dtype=torch.float32).mul_(scale).to(dtype)


def row(
    section: str,
    name: str,
    us: float,
    *,
    num_bytes: float = 0.0,
    flops: float = 0.0,
    more: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """One line of results: the time, the rate, the share of the floor that bounds it, and whatever else was timed."""
    read, multiply = num_bytes / BYTES_PER_US, flops / FLOPS_PER_US
    rate = {"GB_s": round(num_bytes / us / 1e3)} if read >= multiply else {"TFLOP_s": round(flops / us / 1e6)}
    percent = round(100 * max(read, multiply) / us)
    return {"section": section, "name": name, "us": round(us, 2), **rate, "floor_percent": percent, **(more or {})}


def sorted_mass(logits: Tensor) -> Tensor:
    """What top_p costs with a sort."""
    return logits.softmax(1).sort(1, descending=True)[0].cumsum(1)


def layer_calls(
    name: str, x: Tensor, weights: list[Tensor], norm: Tensor, residual: Tensor
) -> tuple[list[Call], list[Call]]:
    """A linear layer with its norm, SiLU or residual: (through gemv.py, through cuBLAS and kernels of their own)."""

    def prepared() -> Tensor:
        return rms_norm(x, norm, EPS, early=True)

    def ours(w: Tensor) -> Tensor:
        if name in ("o", "down"):
            return gemv(x, w, residual=residual, early=True)
        call = gated_gemv if name == "gate_up" else gemv
        if on_vectors(x.shape[0], *w.shape):
            return call(x, w, norm=norm, eps=EPS, early=True)
        return call(prepared(), w, early=True)

    def theirs(w: Tensor) -> Tensor:
        if name in ("o", "down"):
            return functional.linear(x, w).add_(residual)
        y = functional.linear(prepared(), w)
        return silu_mul(y, early=True) if name == "gate_up" else y

    return [partial(ours, w) for w in weights], [partial(theirs, w) for w in weights]


def linear_rows(model: Model) -> Iterator[dict[str, object]]:
    """Every weight of the model with its norm, SiLU or residual: gemv.py beside cuBLAS and kernels of their own."""
    for name, num_out, width in model.weights():
        num_bytes = num_out * width * 2
        weights = [draw(num_out, width, scale=width**-0.5) for _ in range(copies(num_bytes, most=96))]
        norm = draw(width)
        for rows in (1, 2, 4, 8, 16):
            x = draw(rows, width)
            ours, theirs = layer_calls(name, x, weights, norm, draw(rows, num_out))
            cublas = time_us([partial(functional.linear, x, w) for w in weights])
            more = {"cublas_us": round(time_us(theirs), 2), "cublas_alone_us": round(cublas, 2)}
            yield row("linear", f"{model.name} {name} M={rows}", time_us(ours), num_bytes=num_bytes, more=more)
        del weights


def chain_rows(model: Model) -> Iterator[dict[str, object]]:
    """All linear layers of one decode step in one graph: what section 1 of the performance page measured."""
    shapes = {name: (num_out, width) for name, num_out, width in model.weights()}
    layers = [
        {name: draw(*shape, scale=shape[1] ** -0.5) for name, shape in shapes.items() if name != "head"}
        for _ in range(model.layers)
    ]
    head, norm = draw(*shapes["head"], scale=model.width**-0.5), draw(model.width)
    num_bytes = sum(w.numel() * 2 for layer in layers for w in layer.values()) + head.numel() * 2
    attended = model.heads * model.head_width
    for rows in (1, 2, 4, 8, 16):
        start = draw(rows, model.width)

        def linear(x: Tensor, weight: Tensor, early: bool, call: Callable[..., Tensor] = gemv) -> Tensor:
            if on_vectors(x.shape[0], *weight.shape):
                return call(x, weight, norm=norm, eps=EPS, early=early)
            return call(rms_norm(x, norm, EPS, early=early), weight, early=early)

        def step(early: bool, start: Tensor = start) -> Tensor:
            x = start
            for layer in layers:
                qkv = linear(x, layer["qkv"], early)
                x = gemv(qkv[:, :attended], layer["o"], residual=x, early=early)
                inner = linear(x, layer["gate_up"], early, gated_gemv)
                x = gemv(inner, layer["down"], residual=x, early=early)
            return linear(x, head, early)

        def plain(start: Tensor = start) -> Tensor:
            x = start
            for layer in layers:
                qkv = functional.linear(x, layer["qkv"])
                x = functional.linear(qkv[:, :attended], layer["o"])
                x = functional.linear(functional.linear(x, layer["gate_up"])[:, : model.inner], layer["down"])
            return functional.linear(x, head)

        cublas = time_us([plain])
        for early in (False, True) if rows == 1 else (True,):
            us = time_us([partial(step, early)])
            yield row(
                "chain",
                f"{model.name} M={rows} early={early}",
                us,
                num_bytes=num_bytes,
                more={"cublas_alone_us": round(cublas, 1)},
            )


def pages(model: Model, lens: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random keys and values, block tables in random order, and lengths."""
    blocks = [-(-n // BLOCK_SIZE) for n in lens]
    shape = (sum(blocks), BLOCK_SIZE, 2, model.kv_heads, model.head_width)
    pairs = draw(*shape)
    places = torch.randperm(sum(blocks), device="cuda", dtype=torch.int32)
    tables = torch.zeros(len(lens), max(blocks), dtype=torch.int32, device="cuda")
    used = 0
    for index, count in enumerate(blocks):
        tables[index, :count] = places[used : used + count]
        used += count
    return pairs[:, :, 0], pairs[:, :, 1], tables, torch.tensor(lens, dtype=torch.int32, device="cuda")


def decode_rows(model: Model) -> Iterator[dict[str, object]]:
    """Decode attention over paged keys beside torch's attention over contiguous ones (equal lengths only).

    fp8_us, fp8_GB_s: over the same keys in e4m3 with their scales.
    """
    scale = model.head_width**-0.5
    batches = [("1x512", [512]), ("1x8192", [8192]), ("1x32768", [32768]), ("8x640", [640] * 8)]
    batches += [("8x8192", [8192] * 8), ("32x640", [640] * 32), ("64x4096", [4096] * 64), ("128x576", [576] * 128)]
    batches += [("128x640", [640] * 128), ("256x640", [640] * 256), ("mixed", [8192, 4096] + [200] * 62)]
    for name, lens in batches:
        num_bytes = 2 * sum(lens) * model.kv_heads * model.head_width * 2
        sets = [pages(model, lens) for _ in range(copies(num_bytes, least=2, most=32))]
        q = draw(len(lens), model.heads, model.head_width)
        plan = plan_tasks(sets[0][3], model.kv_heads)
        ours = time_us([partial(decode_attention, q, s[0], s[1], s[3], s[2], scale, plan, early=True) for s in sets])
        more: dict[str, object] = {"plan_us": round(time_us([partial(plan_tasks, sets[0][3], model.kv_heads)] * 8), 2)}
        if len(set(lens)) == 1:
            shape = (len(lens), model.kv_heads, lens[0], model.head_width)
            keys = [(draw(*shape), draw(*shape)) for _ in sets]
            query = q[:, :, None]
            more["sdpa_us"] = round(
                time_us(
                    [partial(functional.scaled_dot_product_attention, query, k, v, enable_gqa=True) for k, v in keys]
                ),
                2,
            )
        narrow = [(*fp8_pages(keys, values), tables, lens) for keys, values, tables, lens in sets]
        plan = plan_tasks(sets[0][3], model.kv_heads, e4m3=True)
        fp8_us = time_us(
            [partial(decode_attention, q, k, v, n, t, scale, plan, scales=s, early=True) for k, v, s, t, n in narrow]
        )
        fp8_bytes = 2 * sum(lens) * model.kv_heads * (model.head_width + 2)
        more |= {"fp8_us": round(fp8_us, 2), "fp8_GB_s": round(fp8_bytes / fp8_us / 1e3)}
        yield row("decode attention", f"{model.name} {name}", ours, num_bytes=num_bytes, more=more)


def fp8_pages(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pages [num_blocks, BLOCK_SIZE, Hk, E] in e4m3, and their scales."""
    num_blocks, size, heads, width = keys.shape
    numbers, scales = reference.reduced(torch.stack((keys, values), dim=2).view(-1, 2, heads, width))
    numbers = numbers.view(num_blocks, size, 2, heads, width)
    scales = scales.view(num_blocks, size, heads, 2).transpose(1, 2).contiguous()
    return numbers[:, :, 0], numbers[:, :, 1], scales


def prefill_rows(model: Model) -> Iterator[dict[str, object]]:
    """Prefill attention beside torch's causal attention (whole prompts only)."""
    scale = model.head_width**-0.5
    for name, queries, contexts in [
        ("128", [128], [128]),
        ("512", [512], [512]),
        ("2048", [2048], [2048]),
        ("8192", [8192], [8192]),
        ("16x512", [512] * 16, [512] * 16),
        ("512 after 7680", [512], [8192]),
    ]:
        keys, values, tables, lens = pages(model, contexts)
        tokens = sum(queries)
        q = draw(tokens, model.heads, model.head_width)
        starts = torch.tensor([0, *queries], device="cuda").cumsum(0).int()
        pairs = sum(n * (c - n) + n * (n + 1) / 2 for n, c in zip(queries, contexts, strict=True))
        flops = 4 * pairs * model.heads * model.head_width
        num_bytes = 2 * (2 * q.numel() + 2 * sum(contexts) * model.kv_heads * model.head_width)
        us = time_us([partial(prefill_attention, q, keys, values, starts, lens, tables, scale)] * 8)
        narrow = fp8_pages(keys, values)
        inputs = (q, narrow[0], narrow[1], starts, lens, tables, scale)
        fp8 = partial(prefill_attention, *inputs, scales=narrow[2])
        more: dict[str, object] = {"fp8_us": round(time_us([fp8] * 8), 2)}
        if queries == contexts:
            shape = (len(queries), queries[0])
            query = draw(*shape, model.heads, model.head_width).transpose(1, 2)
            key, value = (draw(*shape, model.kv_heads, model.head_width).transpose(1, 2) for _ in range(2))
            more["sdpa_us"] = round(
                time_us(
                    [
                        partial(
                            functional.scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True
                        )
                    ]
                    * 8
                ),
                2,
            )
        yield row("prefill attention", f"{model.name} {name}", us, num_bytes=num_bytes, flops=flops, more=more)


def small_rows(model: Model) -> Iterator[dict[str, object]]:
    """Norms, rotary write and SiLU at a decode batch, a prefill bucket and a large chunk."""
    norm = draw(model.width)
    for tokens in (1, 128, 512, 4096):
        count = copies(tokens * model.width * 4, least=8, most=32)
        xs = [(draw(tokens, model.width), draw(tokens, model.width)) for _ in range(count)]
        us = time_us([partial(rms_norm, x, norm, EPS, early=True) for x, _ in xs])
        yield row("norm", f"{model.name} T={tokens}", us, num_bytes=tokens * model.width * 4)
        us = time_us([partial(add_rms_norm, x, r, norm, EPS, early=True) for x, r in xs])
        yield row("add norm", f"{model.name} T={tokens}", us, num_bytes=tokens * model.width * 8)
        gates = [draw(tokens, 2 * model.inner) for _ in range(count)]
        us = time_us([partial(silu_mul, g, early=True) for g in gates])
        yield row("silu mul", f"{model.name} T={tokens}", us, num_bytes=tokens * model.inner * 6)
        heads = model.heads + 2 * model.kv_heads
        stacked = [draw(tokens, heads * model.head_width) for _ in range(count)]
        blocks = -(-tokens // BLOCK_SIZE)
        pairs = [draw(blocks, BLOCK_SIZE, 2, model.kv_heads, model.head_width) for _ in range(count)]
        slots = torch.arange(tokens, device="cuda")
        cos, sin = (draw(tokens, model.head_width // 2, dtype=torch.float32) for _ in range(2))
        us = time_us(
            [
                partial(
                    rope_and_write,
                    *split_qkv(s, model.heads, model.kv_heads, model.head_width),
                    cos,
                    sin,
                    p[:, :, 0],
                    p[:, :, 1],
                    slots,
                    early=True,
                )
                for s, p in zip(stacked, pairs, strict=True)
            ]
        )
        yield row("rope", f"{model.name} T={tokens}", us, num_bytes=tokens * heads * model.head_width * 4)


def sampling_rows(model: Model) -> Iterator[dict[str, object]]:
    """Draws of a whole batch in one way, beside the sort that PyTorch would need for top_p."""
    for batch in (1, 32, 128, 256):
        num_bytes = batch * model.vocabulary * 4
        sets = [draw(batch, model.vocabulary, scale=3.0, dtype=torch.float32) for _ in range(copies(num_bytes, 2, 16))]
        seeds = torch.randint(1 << 60, (batch,), device="cuda")
        counters = torch.arange(batch, device="cuda")
        for name, heat, top_k, top_p, min_p in [
            ("greedy", 0.0, 0, 1.0, 0.0),
            ("temperature", 1.0, 0, 1.0, 0.0),
            ("top_p 0.9", 1.0, 0, 0.9, 0.0),
            ("top_k 50", 1.0, 50, 1.0, 0.0),
            ("top_k 50 top_p 0.9", 1.0, 50, 0.9, 0.0),
            ("min_p 0.05", 1.0, 0, 1.0, 0.05),
        ]:
            ways = (
                torch.full((batch,), heat, device="cuda"),
                torch.full((batch,), top_k, dtype=torch.int32, device="cuda"),
                torch.full((batch,), top_p, device="cuda"),
                torch.full((batch,), min_p, device="cuda"),
            )
            us = time_us([partial(sample, s, *ways, seeds, counters) for s in sets])
            yield row("sample", f"{model.name} B={batch} {name}", us, num_bytes=num_bytes)
        us = time_us([partial(token_logprobs, s, counters) for s in sets])
        yield row("logprobs", f"{model.name} B={batch}", us, num_bytes=num_bytes)
        us = time_us([partial(sorted_mass, s) for s in sets])
        yield row("sample", f"{model.name} B={batch} torch softmax sort cumsum", us, num_bytes=num_bytes)


def dispatch_rows(model: Model) -> Iterator[dict[str, object]]:
    """The most rows M up to which gemv.py is not slower than cuBLAS, for each weight of the model with its epilogue."""
    for name, num_out, width in model.weights():
        weights = [draw(num_out, width, scale=width**-0.5) for _ in range(copies(num_out * width * 2, most=96))]
        norm = draw(width)
        best = 0
        times = {}
        for rows in (1, 2, 3, 4, 6, 8, 12, MAX_ROWS):
            calls = layer_calls(name, draw(rows, width), weights, norm, draw(rows, num_out))
            ours, theirs = (time_us(some, 6) for some in calls)
            times[rows] = (round(ours, 1), round(theirs, 1))
            if ours > theirs * SAME:
                break
            best = rows
        yield {
            "section": "dispatch",
            "name": f"{model.name} {name}",
            "shape": [num_out, width],
            "most_rows": best,
            "us": times,
        }


SECTIONS: dict[str, Callable[[Model], Iterator[dict[str, object]]]] = {
    "chain": chain_rows,
    "linear": linear_rows,
    "decode": decode_rows,
    "prefill": prefill_rows,
    "small": small_rows,
    "sampling": sampling_rows,
    "dispatch": dispatch_rows,
}


def main() -> None:
    """Run the sections asked for on the models asked for."""
    parser = argparse.ArgumentParser(description="the kernels alone, on the GPU")
    parser.add_argument("--only", choices=sorted(SECTIONS), action="append", help="a section; may be given again")
    parser.add_argument("--model", choices=[model.name for model in MODELS], action="append")
    parser.add_argument("--record", action="store_true", help="append the results to bench/results/kernels.jsonl")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/kernels.py measures GPU kernels: no CUDA device here")
    for name in options.only or [name for name in SECTIONS if name != "dispatch"]:
        for model in MODELS:
            if options.model is None or model.name in options.model:
                for numbers in SECTIONS[name](model):
                    emit("kernels", {"gpu": torch.cuda.get_device_name(), **numbers}, record=options.record)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
