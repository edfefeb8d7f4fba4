"""Products with packed weights on the GPU: which shape of work is fastest, and from how many rows cuBLAS is.

    python bench/quant.py                      by rows of x: packed, written out for cuBLAS, plain bf16
    python bench/quant.py --tune               times every candidate; prints the table of kernels/grouped_shapes.py
    python bench/quant.py --tune --rows 64     for some rows only; the others stay as they are

The layers are those of an 8B Llama with x in bf16: 4-bit weights in groups of 128 with zero points, e4m3 ones with a
scale for each row.  A number is the median of replays of one captured graph of calls, which go around weights that are
together several times the second-level cache; one row comes with its norm, gate or sum.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# In place of this folder, whose http.py would be taken for the standard library's by what torch imports.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from bench import record  # noqa: E402
from bench.kernels import EPS, Call, copies, draw, time_us  # noqa: E402
from vserve.kernels import fp8, grouped  # noqa: E402
from vserve.kernels.grouped_shapes import MEASURED, Shape  # noqa: E402
from vserve.kernels.packed import Form, Packed  # noqa: E402

LAYERS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = (1, 16, 32, 64, 128, 256, 512)
"""As grouped.padded has them; the last stands for more."""
REPEATS = 7

_VECTORS = {
    "int4": [(8, 2048, 4), (8, 1024, 2), (8, 1024, 1), (4, 1024, 1), (16, 1024, 1), (8, 2048, 2), (4, 2048, 2),
             (4, 2048, 4), (8, 4096, 4), (4, 4096, 4)],
    "float8": [(4, 1024, 4), (4, 1024, 2), (2, 2048, 4), (4, 512, 2), (8, 512, 4), (2, 1024, 2), (8, 512, 1),
               (4, 1024, 1), (4, 2048, 4)],
}  # fmt: skip
_TILES = {
    16: [(64, 128, 4, 4), (64, 128, 4, 6), (64, 256, 4, 3), (128, 128, 8, 4), (128, 256, 8, 3)],
    32: [(64, 128, 4, 4), (64, 128, 4, 6), (64, 256, 4, 3), (128, 128, 8, 4), (128, 256, 8, 3)],
    64: [(64, 128, 4, 4), (64, 256, 4, 3), (128, 128, 8, 3), (128, 128, 8, 4), (128, 64, 4, 5)],
    128: [(64, 128, 4, 4), (128, 64, 8, 5), (128, 128, 8, 3), (128, 128, 8, 4), (256, 64, 8, 4)],
    256: [(128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2)],
}  # fmt: skip
"""Rows of x that a program takes -> rows and width of the weights, warps, stages."""
_FP8_TILES = [(64, 128, 4, 4), (64, 128, 4, 6), (64, 256, 4, 3), (128, 128, 8, 4)]


@dataclass(frozen=True, slots=True)
class Job:
    """A product to time: rows of x times a layer of a kind of weight, cut as shape says."""

    kind: str
    rows: int
    layer: str
    shape: Shape

    def call(self, x: Tensor, weight: Packed, norm: Tensor, residual: Tensor) -> Tensor:
        if self.rows > 1:
            added = residual if self.layer in ("o", "down") else None
            return grouped.linear(x, weight, residual=added, shape=self.shape)
        if self.layer == "gate_up":
            return grouped.gated_row(x, weight, norm=norm, eps=EPS, early=True, shape=self.shape)
        if self.layer == "qkv":
            return grouped.linear(x, weight, norm=norm, eps=EPS, early=True, shape=self.shape)
        return grouped.linear(x, weight, residual=residual, early=True, shape=self.shape)


def jobs(rows: tuple[int, ...]) -> Iterator[Job]:
    """Every candidate."""
    for layer, (outputs, inputs) in LAYERS.items():
        for kind, vectors in _VECTORS.items():
            if 1 in rows:
                yield from (Job(kind, 1, layer, Shape(*vector)) for vector in vectors)
        for count in rows:
            for across in () if count == 1 else (0,) if count <= 128 else (0, 256):
                for tile in _TILES[across or min(count, 128)]:
                    yield from _splits(Job("int4", count, layer, Shape(*tile, 1, across)), outputs, inputs)
        if 16 in rows:
            for tile in _FP8_TILES:
                yield from _splits(Job("float8", 16, layer, Shape(*tile)), outputs, inputs)


def _splits(job: Job, outputs: int, inputs: int) -> Iterator[Job]:
    shape = job.shape
    tiles = -(-outputs // shape.rows) * -(-job.rows // (shape.across or 128))
    for splits in (1, 2, 4, 8):
        programs = tiles * splits
        # Fewer leave processors idle, more only add sums to write.
        if (programs >= 96 or splits == 8) and (programs <= 1000 or splits == 1):
            yield Job(job.kind, job.rows, job.layer, shape._replace(splits=splits))


def weight(kind: str, outputs: int, inputs: int) -> Packed:
    """A random one."""
    counters = torch.zeros(8192, dtype=torch.int32, device="cuda")
    if kind == "int4":
        data = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(inputs // 128, outputs, device="cuda") * 0.004 + 0.001
        zeros = torch.randint(0, 16, (inputs // 128, outputs), device="cuda")
        numbers = torch.stack((scales, zeros), dim=2).to(torch.float16)
        return Packed(data, numbers, 4, 128, Form.ZERO, 0, counters)
    data = draw(outputs, inputs, scale=100.0).to(torch.float8_e4m3fn).view(torch.uint8)
    numbers = torch.rand(1, outputs, device="cuda") * 0.001 + 0.0001
    return Packed(data, numbers, 8, inputs, Form.FLOAT, 0, counters)


def compile_share(rows: tuple[int, ...], start: int, step: int) -> None:
    """Launch some of the jobs once: what they compile to is found on disk afterwards.  A process of its own."""
    for job in list(jobs(rows))[start::step]:
        outputs, inputs = LAYERS[job.layer]
        x, residual = draw(job.rows, inputs), draw(job.rows, outputs)
        job.call(x, weight(job.kind, outputs, inputs), draw(inputs), residual)
    torch.cuda.synchronize()


def compile_all(rows: tuple[int, ...]) -> None:
    """Compile every candidate, several at a time."""
    count = max(1, (os.cpu_count() or 1) - 1)
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=compile_share, args=(rows, number, count)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def tune(rows: tuple[int, ...]) -> None:
    """Time every candidate and print the table."""
    compile_all(rows)
    found: dict[tuple[str, int, int, int], list[tuple[float, Shape]]] = {}
    for layer, (outputs, inputs) in LAYERS.items():
        for kind in _VECTORS:
            size = outputs * inputs // (2 if kind == "int4" else 1)
            weights = [weight(kind, outputs, inputs) for _ in range(copies(size, least=3))]
            norm = draw(inputs)
            for job in jobs(rows):
                if (job.layer, job.kind) == (layer, kind):
                    x, residual = draw(job.rows, inputs), draw(job.rows, outputs)
                    us = time_us([partial(job.call, x, each, norm, residual) for each in weights], REPEATS)
                    found.setdefault((kind, job.rows, outputs, inputs), []).append((us, job.shape))
            for key, times in found.items():
                if (key[0], *key[2:]) == (kind, outputs, inputs):
                    best = "  ".join(f"{us:.1f} {tuple(shape)}" for us, shape in sorted(times)[:4])
                    print(f"{layer} {kind} {key[1]}: {best}", file=sys.stderr, flush=True)
    table = {**MEASURED, **{key: min(times)[1] for key, times in found.items()}}
    for key, shape in sorted(table.items()):
        numbers = shape[:3] if key[1] == 1 else shape if shape.across else shape[:5]
        print(f"    {key!r}: Shape({', '.join(map(str, numbers))}),".replace("'", '"'))


def by_rows(rows: tuple[int, ...], *, keep: bool) -> None:
    """Microseconds of the four products of one layer, each way there is."""
    for count in rows:
        took: dict[str, float] = {}
        for outputs, inputs in LAYERS.values():
            x = draw(count, inputs)
            for name, calls in ways(x, outputs, inputs).items():
                took[name] = took.get(name, 0.0) + time_us(calls, REPEATS)
        record.emit("quant", {"rows": count, **{name: round(us, 1) for name, us in took.items()}}, record=keep)


def ways(x: Tensor, outputs: int, inputs: int) -> dict[str, list[Call]]:
    """The product of x with a layer of this size: calls over several weights for each way."""
    number = copies(outputs * inputs // 2, least=3, most=16)
    fours, eights = ([weight(kind, outputs, inputs) for _ in range(number)] for kind in ("int4", "float8"))
    plain = [draw(outputs, inputs, scale=0.02) for _ in range(max(3, number // 4))]

    def written(each: Packed) -> Tensor:
        return functional.linear(x, grouped.write_out(each, x.dtype))

    def multiplied(each: Packed) -> Tensor:
        data = each.data.view(torch.float8_e4m3fn)
        return fp8.multiply(*fp8.quantise_rows(x), data, each.numbers, x.dtype)

    made: dict[str, list[Call]] = {
        "int4_us": [partial(grouped.linear, x, each) for each in fours],
        "int4_written_us": [partial(written, each) for each in fours],
        "float8_us": [partial(grouped.linear, x, each) for each in eights],
        "float8_both_us": [partial(multiplied, each) for each in eights],
        "bf16_us": [partial(functional.linear, x, each) for each in plain],
    }
    if x.shape[0] > grouped.most_rows(fours[0]):
        del made["int4_us"]
    if x.shape[0] > grouped.most_rows(eights[0]):
        del made["float8_us"]
    return made


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tune", action="store_true", help="time every candidate")
    options.add_argument("--rows", default=",".join(map(str, ROWS)), help="of x")
    options.add_argument("--record", action="store_true")
    given = options.parse_args()
    rows = tuple(map(int, given.rows.split(",")))
    if given.tune:
        tune(rows)
    else:
        by_rows(rows, keep=given.record)


if __name__ == "__main__":
    main()
