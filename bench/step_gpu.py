"""Time of one step on a GPU, random weights: decode by batch size, prefill by tokens, host and device apart.

    python bench/step_gpu.py --model bench/models/llama-1b [--context 512] [--batches 1,8,32] [--tokens 64,512]

One JSON line a shape.  graph_ms: the device's time of one replay, the median of many.  step_ms: wall time of a step of
the engine turned without pause (scheduler, packing, launch, wait, commit; two in flight), step_ms_max the longest of
them, host_ms what of it G spends on other than waiting.  floor_ms, of a decode step with plain weights: the bytes it
must read (weights, of a mixture those of the experts that random tokens take, keys and values) at 3.0 TB/s.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import os
import random
import statistics
import sys
import time
from collections import deque
from pathlib import Path

# In place of this folder: bench/http.py would hide the standard library's package from torch.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402

from bench import record  # noqa: E402
from vserve.engine.cuda_runner import CudaPending, CudaRunner  # noqa: E402
from vserve.engine.request import GenRequest, RequestId, SamplingParams  # noqa: E402
from vserve.engine.scheduler import Limits, Scheduler  # noqa: E402
from vserve.engine.sequence import Plan  # noqa: E402
from vserve.model import families, loader, source  # noqa: E402
from vserve.model.config import ModelConfig  # noqa: E402
from vserve.model.gpu_decoder import GpuDecoder  # noqa: E402
from vserve.model.memory import token_bytes  # noqa: E402
from vserve.model.quantization import Method, Quantization  # noqa: E402
from vserve.model.tensors import expected_shapes  # noqa: E402

QUANTIZED = {
    "none": None,
    "awq": Quantization(Method.AWQ, 4, 128),
    "fp8": Quantization(Method.FP8, online=True),
}
BLOCK_SIZE = 16
STEPS = 60
BYTES_PER_MS = 3.0e9


def floor_ms(config: ModelConfig, batch: int, context: int) -> float:
    """Of a decode step of so many sequences of context tokens.

    Experts are counted as if each token took any with the same chance; tokens of random weights share some.
    """
    names = families.family_of(config.architecture).names
    numbers = 0.0
    for name, shape in expected_shapes(config).items():
        used = 1.0
        if config.experts is not None and f".{names.expert.partition('{')[0]}" in name:
            used = 1 - (1 - config.experts.active / config.experts.count) ** batch
        if name == f"{names.base}{names.embedding}.weight" and not config.tie_embeddings:
            continue  # a row a token
        numbers += math.prod(shape) * used
    return (2 * numbers + token_bytes(config, 2) * batch * context) / BYTES_PER_MS


class Turned:
    """Scheduler and runner, turned by hand with two steps in flight."""

    def __init__(self, runner: CudaRunner, limits: Limits) -> None:
        self.runner = runner
        self.scheduler = Scheduler(limits)
        self.in_flight: deque[tuple[Plan, CudaPending]] = deque()
        self.waited_s = 0.0

    def turn(self) -> Plan | None:
        """One turn of the loop; returns what was planned."""
        plan = self.scheduler.plan(0.0)
        if plan is not None:
            self.in_flight.append((plan, self.runner.launch(plan)))
        if self.in_flight and (plan is None or len(self.in_flight) >= 2):
            done, pending = self.in_flight.popleft()
            began = time.perf_counter()
            results = pending.wait()
            self.waited_s += time.perf_counter() - began
            self.scheduler.commit(done, results, 0.0)
        return plan

    def end(self) -> None:
        """Cancel everything and drain."""
        self.scheduler.cancel_all("done", 0.0)
        while self.in_flight:
            done, pending = self.in_flight.popleft()
            self.scheduler.commit(done, pending.wait(), 0.0)


def decode(turned: Turned, batch: int, context: int, vocab: int) -> dict[str, float]:
    """A batch of sequences of about context tokens, decoding greedily."""
    rng = random.Random(batch)
    for name in range(batch):
        prompt = [rng.randrange(vocab) for _ in range(context - STEPS // 2)]
        turned.scheduler.add(GenRequest(RequestId(name), prompt, 4 * STEPS, SamplingParams(temperature=0.0)), 0.0)
    steady = 0
    while steady < 8:
        plan = turned.turn()
        assert plan is not None
        steady = steady + 1 if plan.num_decodes == batch else 0
    torch.cuda.synchronize()
    gc.collect()
    gc.disable()
    turned.waited_s = 0.0
    marks = [time.perf_counter()]
    for _ in range(STEPS):
        turned.turn()
        marks.append(time.perf_counter())
    wall = (marks[-1] - marks[0]) / STEPS
    longest = max(later - earlier for earlier, later in itertools.pairwise(marks))
    host = wall - turned.waited_s / STEPS
    shape = turned.runner.buckets.choose(batch, 0, batch)
    graphs = [turned.runner.replay_seconds(shape) for _ in range(15)]
    turned.end()
    return {
        "graph_ms": round(statistics.median(graphs) * 1e3, 3),
        "step_ms": round(wall * 1e3, 3),
        "step_ms_max": round(longest * 1e3, 3),
        "host_ms": round(host * 1e3, 3),
    }


def prefill(turned: Turned, tokens: int, vocab: int) -> dict[str, float]:
    """One prompt of so many tokens, alone, from its plan to its first id on the host."""
    rng = random.Random(tokens)
    times = []
    for name in range(6):
        prompt = [rng.randrange(vocab) for _ in range(tokens)]
        turned.scheduler.add(GenRequest(RequestId(name), prompt, 1, SamplingParams(temperature=0.0)), 0.0)
        began = time.perf_counter()
        while turned.turn() is not None or turned.in_flight:
            pass
        times.append((time.perf_counter() - began) * 1e3)
    return {"ttft_ms": round(statistics.median(times[1:]), 3), "ttft_ms_first": round(times[0], 1)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="a folder with a config.json")
    options.add_argument("--context", type=int, default=512)
    options.add_argument("--batches", default="1,2,4,8,16,32,64,128,256")
    options.add_argument("--tokens", default="16,128,512,2048")
    options.add_argument("--quantization", default="none", choices=tuple(QUANTIZED), help="of the linear layers")
    options.add_argument("--eager", action="store_true", help="kernel by kernel, without graphs")
    options.add_argument("--record", action="store_true")
    given = options.parse_args()
    batches, tokens = [list(map(int, text.split(","))) for text in (given.batches, given.tokens)]
    found = source.resolve(given.model, environ=os.environ, need_weights=False)
    decoder = loader.load(
        found,
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        load_format="dummy",
        quantization=QUANTIZED[given.quantization],
    )
    assert isinstance(decoder, GpuDecoder)
    blocks = max(max(batches) * (-(-(given.context + 4 * STEPS) // BLOCK_SIZE) + 1), 4096 // BLOCK_SIZE)
    limits = Limits(
        num_blocks=blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=max(batches),
        max_num_batched_tokens=8192,
        max_model_len=8192,
        max_prefill_chunk=2048,
        prefix_caching=False,
    )
    runner = CudaRunner(
        decoder,
        decoder.new_cache(blocks, BLOCK_SIZE),
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        max_tokens=limits.max_num_batched_tokens,
        use_graphs=not given.eager,
    )
    setting = {"model": found.name, "context": given.context, "graphs": not given.eager}
    if given.quantization != "none":
        setting["quantization"] = given.quantization
    for batch in batches:
        began = time.perf_counter()
        runner.capture(runner.buckets.choose(batch, 0, batch))
        took = time.perf_counter() - began
        numbers = decode(Turned(runner, limits), batch, given.context, found.config.vocab_size)
        if given.quantization == "none":
            floor = floor_ms(found.config, batch, given.context)
            numbers |= {"floor_ms": round(floor, 3), "floor_percent": round(100 * floor / numbers["graph_ms"])}
        line = {**setting, "shape": f"decode {batch}", **numbers, "capture_s": round(took, 2)}
        record.emit("step", line, record=given.record)
    for count in tokens:
        began = time.perf_counter()
        shape = runner.buckets.choose(0, 1, count)
        if runner.buckets.is_graph(shape):
            runner.capture(shape)
        took = time.perf_counter() - began
        numbers = prefill(Turned(runner, limits), count, found.config.vocab_size)
        numbers["graph_ms"] = round(min(runner.replay_seconds(shape) for _ in range(5)) * 1e3, 3)
        line = {**setting, "shape": f"prefill {count}", **numbers, "capture_s": round(took, 2)}
        record.emit("step", line, record=given.record)
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB", file=sys.stderr)


if __name__ == "__main__":
    main()
