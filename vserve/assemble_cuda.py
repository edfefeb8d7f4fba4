"""The CUDA half of assembling an engine: memory for steps, the runner, its first graphs, and the chunk size.

Knows model and engine; G only.  Running out of the GPU's memory is a StartupError that says what took it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Final

import torch

from vserve.engine.cuda_runner import CudaRunner
from vserve.engine.shapes import MIXED_DECODES, MIXED_SIZES, Buckets, Shape
from vserve.errors import StartupError
from vserve.kernels.gemv import MAX_ROWS
from vserve.model.gpu_decoder import GpuDecoder
from vserve.model.memory import CachePlan, gib
from vserve.observe.progress import Reporter

log = logging.getLogger(__name__)

MIXED_STEP_S: Final = 0.015
"""A step that decodes and takes in a prompt should last no longer: it is the gap that every stream then sees."""
CHUNK_LEAST: Final = 256
CHUNK_MOST: Final = 2048
PROBE_TOKENS: Final = 512
FIRST_DECODES: Final = (1, 8, 32, 128)
"""Beside the largest: until idle moments bring the others, a batch is padded to at most four times its size."""
COMPILERS: Final = 16
"""Threads that compile kernels at a cold start."""


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn a lack of GPU memory while doing `what` into a StartupError with the numbers and the flags to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        wanted = str(error).split("Tried to allocate", 1)[-1].split(".  ")[0].split(". GPU", 1)[0].strip()
        raise StartupError(
            f"out of GPU memory while {what}: {wanted or 'more'} wanted, {gib(free)} of {gib(total)} free; lower "
            "--gpu-memory-utilization, --max-num-batched-tokens or --max-num-seqs, or take a smaller model"
        ) from None


def make_runner(
    decoder: GpuDecoder, plan: CachePlan, *, max_num_seqs: int, max_tokens: int, reporter: Reporter
) -> CudaRunner:
    """The runner over a new KV cache, with the few graphs that serving starts with."""
    with explained("making the KV cache"):
        cache = decoder.new_cache(plan.num_blocks, plan.block_size)
        runner = CudaRunner(
            decoder, cache, max_num_seqs=max_num_seqs, max_model_len=plan.max_model_len, max_tokens=max_tokens
        )
    first = first_shapes(runner.buckets)
    reporter.begin("compiling kernels")
    with explained("compiling kernels"):
        wanted = dict.fromkeys((*first, *small_decodes(runner.buckets)))
        compiled = runner.compile(wanted, min(COMPILERS, os.cpu_count() or 1))
    log.info("%d kernels compiled or taken from the cache", compiled)
    reporter.begin("capturing CUDA graphs")
    with explained("capturing CUDA graphs"):
        for number, shape in enumerate(first):
            began = time.perf_counter()
            runner.capture(shape)
            log.info("captured %s in %.2f s", shape, time.perf_counter() - began)
            reporter.update(number + 1, len(first))
        torch.cuda.synchronize()
    return runner


def first_shapes(buckets: Buckets) -> list[Shape]:
    """Decode shapes that every batch fits, some smaller ones, and the prompts of one chunk."""
    most = buckets.decode[-1]
    sizes = sorted({size for size in (*FIRST_DECODES, most) if size <= most}, reverse=True)
    shapes = [Shape(size, size, 0) for size in sizes]
    tokens = min(PROBE_TOKENS, buckets.tokens[-1]) if buckets.tokens else 0
    if tokens:
        # A whole prompt alone, and the sizes that steps of few and of many decodes take.
        shapes.append(buckets.choose(0, 1, tokens))
        few = min(most, MIXED_DECODES[1])
        wanted = [(few, MIXED_SIZES[0]), *((most, size) for size in MIXED_SIZES[1:3])]
        shapes += [buckets.choose(decodes, 1, size) for decodes, size in wanted if decodes < size <= buckets.tokens[-1]]
    return shapes


def small_decodes(buckets: Buckets) -> list[Shape]:
    """The decode shapes whose products are kernels of ours: later captures of them are not to wait for a compiler."""
    return [Shape(size, size, 0) for size in buckets.decode if size <= MAX_ROWS]


def prefill_chunk(runner: CudaRunner) -> int:
    """Prompt tokens that a step of about MIXED_STEP_S takes in, by the time of one that was measured."""
    shape = runner.buckets.choose(0, 1, min(PROBE_TOKENS, runner.buckets.tokens[-1]))
    rate = shape.tokens / runner.seconds(shape)
    chunk = max(CHUNK_LEAST, min(CHUNK_MOST, int(rate * MIXED_STEP_S)))
    log.info("prefill runs at %.0f tokens a second: at most %d tokens beside decodes", rate, chunk)
    return chunk
