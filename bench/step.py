"""Time of one step of the default model on the CPU: decode by batch size, prefill by number of tokens.

    python bench/step.py [--record] [--model MODEL] [--threads N] [--context 160] [--few-rows N]

One JSON line a shape: milliseconds a step, least and median of many.  The shapes take turns, so that a neighbour's
burst of work spoils a round of all of them rather than every round of one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

# In place of this folder: bench/http.py would hide the standard library's package from torch.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from vserve.model import cpu  # noqa: E402

os.environ.update(cpu.library_environment(os.environ, reduced_precision=False))  # as the server does, before torch

import torch  # noqa: E402

from bench import record  # noqa: E402
from vserve.model import linear, loader, source  # noqa: E402
from vserve.model.decoder import Decoder  # noqa: E402
from vserve.model.ops import KvCache, Step  # noqa: E402

BLOCK_SIZE = 16
DECODE_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 32)
PREFILL_TOKENS = (16, 32, 64, 120, 256, 512)


def make_step(query_len: int, context: int, sequences: int, vocab: int) -> Step:
    """A step of equal sequences whose last tokens' logits are wanted; the pages of several are scattered.

    One alone gets pages in order from the engine's pool, and the attention makes use of that.
    """
    blocks = -(-context // BLOCK_SIZE)
    pages = torch.randperm(sequences * blocks) if sequences > 1 else torch.arange(blocks)
    tables = pages.view(sequences, blocks)
    places = torch.arange(context - query_len, context)
    slots = tables[:, places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
    return Step(
        ids=torch.randint(vocab, (sequences * query_len,)),
        positions=places.repeat(sequences),
        slots=slots.reshape(-1),
        query_starts=torch.arange(0, (sequences + 1) * query_len, query_len, dtype=torch.int32),
        context_lens=torch.full((sequences,), context, dtype=torch.int32),
        block_tables=tables.to(torch.int32),
        logit_rows=torch.arange(1, sequences + 1) * query_len - 1,
        query_lens=(query_len,) * sequences,
        context_lens_host=(context,) * sequences,
    )


def measure(decoder: Decoder, cache: KvCache, shapes: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every run of each step; each shape has a turn of about 40 ms in every round."""
    times: dict[str, list[float]] = {name: [] for name in shapes}
    for step in shapes.values():
        decoder.forward(step, cache)
    end = time.perf_counter() + seconds * len(shapes)
    while time.perf_counter() < end:
        for name, step in shapes.items():
            turn = time.perf_counter() + 0.04
            while True:
                began = time.perf_counter()
                decoder.forward(step, cache)
                ended = time.perf_counter()
                times[name].append((ended - began) * 1e3)
                if ended > turn:
                    break
    return times


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--record", action="store_true")
    options.add_argument("--model", default=None)
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options.add_argument("--context", type=int, default=160)
    options.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8"), help="of keys and values")
    options.add_argument("--few-rows", type=int, default=linear.FEW_ROWS)
    options.add_argument("--seconds", type=float, default=1.0, help="per shape")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    linear.FEW_ROWS = given.few_rows  # type: ignore[misc]
    began = time.perf_counter()
    found = source.resolve(given.model, environ=os.environ)
    decoder = loader.load(found, device=torch.device("cpu"), dtype=torch.float32)
    loaded = time.perf_counter() - began
    vocab = found.config.vocab_size
    shapes = {f"decode {n}": make_step(1, given.context, n, vocab) for n in DECODE_BATCHES}
    shapes |= {f"prefill {n}": make_step(n, n, 1, vocab) for n in PREFILL_TOKENS}
    blocks = max(DECODE_BATCHES) * -(-max(given.context, 512) // BLOCK_SIZE)
    cache = decoder.new_cache(blocks, BLOCK_SIZE, torch.float8_e4m3fn if given.kv_cache_dtype == "fp8" else None)
    setting = {"model": found.name, "threads": given.threads, "few_rows": given.few_rows, "context": given.context}
    if given.kv_cache_dtype != "auto":
        setting["kv_cache_dtype"] = given.kv_cache_dtype
    record.emit("step", {**setting, "shape": "load", "ms_min": round(loaded * 1e3, 1)}, record=given.record)
    for name, times in measure(decoder, cache, shapes, given.seconds).items():
        numbers = {"shape": name, "ms_min": round(min(times), 2), "ms_p50": round(statistics.median(times), 2)}
        record.emit("step", {**setting, **numbers}, record=given.record)


if __name__ == "__main__":
    main()
