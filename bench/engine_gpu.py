"""What the steps of the engine are made of under a closed loop, without HTTP: a GPU, random weights.

    python bench/engine_gpu.py --model bench/models/llama-8b [--concurrency 8,32,128] [--kernels]

One JSON line a concurrency.  device_ms: the device's time of a step, steps of one shape added up in by_shape (steps,
share of the device's time, mean milliseconds, tokens used and tokens of the shape).  idle: share of the wall time that
the device had no step.  --kernels prints which kernels the time went to; the figures beside it are slower for it.
"""

from __future__ import annotations

import argparse
import gc
import io
import random
import sys
import time
from collections import Counter, deque
from pathlib import Path

# In place of this folder: bench/http.py would hide the standard library's package from torch.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402

from bench import record  # noqa: E402
from vserve.assemble import assemble  # noqa: E402
from vserve.config import Config  # noqa: E402
from vserve.engine.cuda_runner import CudaPending, CudaRunner  # noqa: E402
from vserve.engine.inbox import Inbox  # noqa: E402
from vserve.engine.request import GenRequest, RequestId, SamplingParams  # noqa: E402
from vserve.engine.scheduler import Scheduler  # noqa: E402
from vserve.engine.sequence import Plan  # noqa: E402
from vserve.observe.progress import Reporter  # noqa: E402

DEPTH = 2


class Loop:
    """The engine turned by hand: a new request for each that ends, each step timed by the device's clock."""

    def __init__(self, scheduler: Scheduler, runner: CudaRunner, input_len: int, output_len: int, vocab: int) -> None:
        self.scheduler, self.runner = scheduler, runner
        self.input_len, self.output_len, self.vocab = input_len, output_len, vocab
        self.rng = random.Random(1)
        self.sent = 0
        self.steps: list[tuple[Plan, int, int, int, torch.cuda.Event, torch.cuda.Event]] = []
        self.in_flight: deque[tuple[Plan, CudaPending]] = deque()

    def send(self) -> None:
        """One more request with a fresh prompt."""
        prompt = [self.rng.randrange(self.vocab) for _ in range(self.input_len)]
        self.sent += 1
        self.scheduler.add(
            GenRequest(RequestId(self.sent), prompt, self.output_len, SamplingParams(temperature=0.0)),
            0.0,
        )

    def turn(self) -> int:
        """One turn of the engine's loop; returns how many requests ended."""
        plan = self.scheduler.plan(0.0)
        if plan is not None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            pending = self.runner.launch(plan)
            end.record()
            self.in_flight.append((plan, pending))
            self.steps.append((plan, plan.num_decodes, len(plan.works), plan.num_tokens, begin, end))
        if plan is not None and len(self.in_flight) < DEPTH:
            return 0
        done, pending = self.in_flight.popleft()
        emits = self.scheduler.commit(done, pending.wait(), 0.0)
        return sum(emit.finish is not None for emit in emits)

    def run(self, concurrency: int, requests: int) -> float:
        """So many requests, so many at a time; returns the wall time in seconds."""
        self.steps.clear()
        began, left, live = time.perf_counter(), requests - concurrency, concurrency
        for _ in range(concurrency):
            self.send()
        while live:
            for _ in range(self.turn()):
                live -= 1
                if left:
                    self.send()
                    left, live = left - 1, live + 1
        while self.in_flight:
            done, pending = self.in_flight.popleft()
            self.scheduler.commit(done, pending.wait(), 0.0)
        return time.perf_counter() - began


def by_shape(loop: Loop) -> dict[str, dict[str, float]]:
    """What the steps of each shape took, the dearest shape first."""
    count: Counter[str] = Counter()
    took: Counter[str] = Counter()
    used: Counter[str] = Counter()
    room: Counter[str] = Counter()
    for _, decodes, works, tokens, begin, end in loop.steps:
        shape = loop.runner.buckets.choose(decodes, works - decodes, tokens)
        name = f"decode {shape.decodes}" if shape.is_decode else f"mixed {shape.tokens}/{shape.decodes}"
        count[name] += 1
        took[name] += begin.elapsed_time(end)
        used[name] += tokens
        room[name] += shape.tokens
    total = sum(took.values())
    return {
        name: {
            "steps": count[name],
            "share": round(ms / total, 3),
            "ms": round(ms / count[name], 2),
            "used": round(used[name] / count[name]),
            "tokens": round(room[name] / count[name]),
        }
        for name, ms in took.most_common()
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="a folder with a config.json")
    options.add_argument("--concurrency", default="8,32,128")
    options.add_argument("--requests", type=int, default=6, help="requests for each at a time")
    options.add_argument("--input-len", type=int, default=512)
    options.add_argument("--output-len", type=int, default=128)
    options.add_argument("--quantization", default="auto", help="as vserve serve's")
    options.add_argument("--kernels", action="store_true", help="print which kernels the time went to")
    options.add_argument("--record", action="store_true")
    given = options.parse_args()
    config = Config(
        model=given.model, load_format="dummy", enable_prefix_caching=False, quantization=given.quantization
    )
    engine = assemble(
        config, Inbox(1024), lambda emits, stats: None, lambda error: None, Reporter(io.StringIO(), print)
    )
    scheduler, runner = engine.loop._scheduler, engine.loop._runner
    assert isinstance(runner, CudaRunner)
    while runner.idle():
        pass
    loop = Loop(scheduler, runner, given.input_len, given.output_len, 32000)
    for concurrency in map(int, given.concurrency.split(",")):
        loop.run(concurrency, concurrency)
        gc.collect()
        gc.disable()
        wall = loop.run(concurrency, given.requests * concurrency)
        gc.enable()
        busy = sum(begin.elapsed_time(end) for *_, begin, end in loop.steps) / 1e3
        tokens = given.requests * concurrency * given.output_len
        line = {
            "model": Path(given.model).name,
            "quantization": None if given.quantization == "auto" else given.quantization,
            "concurrency": concurrency,
            "tok_s": round(tokens / wall),
            "steps": len(loop.steps),
            "idle": round(1 - busy / wall, 3),
            "by_shape": by_shape(loop),
        }
        record.emit("engine", {key: value for key, value in line.items() if value is not None}, record=given.record)
        if given.kernels:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                loop.run(concurrency, concurrency + concurrency // 2)
            table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=90)
            print(table, file=sys.stderr)


if __name__ == "__main__":
    main()
