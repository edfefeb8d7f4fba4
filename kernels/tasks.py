"""How decode attention is cut into tasks: at most `chunk` keys of one row each, dealt out once a step on the device.

    chunk = max(MIN_CHUNK, total length / spread, up to a multiple of CHUNK_STEP);  row r has ceil(length[r] / chunk)

So one long row and many short ones give programs of equal work, and the number of tasks, R + spread, depends on no
length and fits a captured graph.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK_STEP = 64
"""A chunk is a multiple of this many keys."""
MIN_CHUNK = 64
"""Fewer keys than this are not worth a program and a share of the reduction."""
TARGET_PROGRAMS = 528
"""Programs that keep a large GPU busy: four for each of 132 multiprocessors."""
TARGET_PROGRAMS_FP8 = 1056
"""Of e4m3 caches, whose programs have half the warps."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How one step's rows are cut into tasks; made on the device, the same for every layer.

    task_rows [N] int32: row of each task, -1 for one without work.  task_starts [R + 1] int32: the first task of each
    row, and the number of tasks in use.  chunk [1] int32: keys a task.  most: the most tasks that one row can have.
    """

    task_rows: Tensor
    task_starts: Tensor
    chunk: Tensor
    most: int


@triton.jit
def _plan_tasks(
    lens_ptr,  # [R] int32
    task_rows_ptr,  # [N] int32
    task_starts_ptr,  # [R + 1] int32
    chunk_ptr,  # [1] int32
    num_rows,
    num_tasks,  # N = R + spread
    spread,
    MIN_CHUNK: tl.constexpr,
    CHUNK_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.arange(0, BLOCK)
    lens = tl.load(lens_ptr + r, mask=r < num_rows, other=0)
    lens = tl.maximum(lens, 0)
    # A row's share of int32 lengths: the sum of all passes 2**31 on no cache that fits a GPU's memory
    each = tl.cdiv(tl.sum(lens, axis=0), spread)
    chunk = tl.maximum(tl.cdiv(each, CHUNK_STEP) * CHUNK_STEP, MIN_CHUNK)
    counts = tl.cdiv(lens, chunk)
    ends = tl.cumsum(counts, axis=0)
    starts = ends - counts
    used = tl.sum(counts, axis=0)
    tl.store(chunk_ptr, chunk)
    tl.store(task_starts_ptr + r, starts, mask=r < num_rows)
    tl.store(task_starts_ptr + num_rows, used)
    for j in range(tl.max(counts, axis=0)):
        tl.store(task_rows_ptr + starts + j, r, mask=j < counts)
    for base in range(0, num_tasks, BLOCK):
        task = base + r
        tl.store(task_rows_ptr + task, -1, mask=(task >= used) & (task < num_tasks))


@triton.jit
def keys_of_task(task, row, task_starts_ptr, chunk_ptr, lens_ptr, WINDOW: tl.constexpr):
    """The keys from `begin` up to `end` that a task of `row` reads, and whether it is the only one of the row.

    WINDOW: how many of the last keys are seen; 0: all.
    """
    first = tl.load(task_starts_ptr + row)
    last = tl.load(task_starts_ptr + row + 1)
    chunk = tl.load(chunk_ptr)
    length = tl.load(lens_ptr + row)
    begin = (task - first) * chunk
    if WINDOW > 0:
        begin += tl.maximum(length - WINDOW, 0)
    return begin, tl.minimum(begin + chunk, length), last - first == 1


def plan_tasks(
    context_lens: Tensor,
    kv_heads: int,
    programs: int | None = None,
    window: int | None = None,
    *,
    e4m3: bool = False,
) -> DecodePlan:
    """Cut the rows of context_lens [R] int32 (0: a row without work) into tasks for about `programs` programs.

    window: most keys of a row that are seen; they are its last.  e4m3: for caches of it; other plans serve them too.

    The shapes of the plan depend on R alone; its values are computed on the device.
    """
    rows = context_lens.shape[0]
    if programs is None:
        programs = TARGET_PROGRAMS_FP8 if e4m3 else TARGET_PROGRAMS
    spread = max(1, programs // kv_heads)
    device = context_lens.device
    if window is not None:
        context_lens = context_lens.clamp(max=window)
    task_rows = torch.empty(rows + spread, dtype=torch.int32, device=device)
    task_starts = torch.empty(rows + 1, dtype=torch.int32, device=device)
    chunk = torch.empty(1, dtype=torch.int32, device=device)
    block = triton.next_power_of_2(max(rows, 32))
    _plan_tasks[(1,)](
        context_lens,
        task_rows,
        task_starts,
        chunk,
        rows,
        rows + spread,
        spread,
        MIN_CHUNK,
        CHUNK_STEP,
        block,
        num_warps=max(1, min(8, block // 32)),
    )
    # chunk >= total / spread, so a row of the whole total has at most spread tasks.
    return DecodePlan(task_rows, task_starts, chunk, spread)
