"""Paged attention, decode and prefill, against float64; every slot that must stay unread holds NaN."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vserve.kernels import reference_gpu
from vserve.kernels.attention_decode import decode_attention
from vserve.kernels.attention_prefill import prefill_attention
from vserve.kernels.tasks import plan_tasks

Check = Callable[[Tensor, Tensor], None]
GPU = torch.cuda.is_available()
# The interpreter multiplies no bf16 matrices.
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float32]
LONG = 3000 if GPU else 300


@dataclass(frozen=True, slots=True)
class Case:
    """query tokens and keys of each sequence; heads, width of a head, block size."""

    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    heads: int
    kv_heads: int
    width: int
    size: int


@dataclass(frozen=True, slots=True)
class Pages:
    """A case's tensors on the device."""

    q: Tensor
    keys: Tensor
    values: Tensor
    starts: Tensor
    lens: Tensor
    tables: Tensor
    scale: float

    def wide(self) -> tuple[Tensor, ...]:
        """What the float64 reference takes."""
        return tuple(
            x.cpu().double() if x.is_floating_point() else x.cpu()
            for x in (self.q, self.keys, self.values, self.starts, self.lens, self.tables)
        )


def build(case: Case, dtype: torch.dtype, device: torch.device, random: torch.Generator, spare: int = 0) -> Pages:
    """Random pages in random places; NaN in all others, in the last page's tail and in `spare` rows of padding."""
    blocks = [-(-n // case.size) for n in case.contexts]
    num_blocks = sum(blocks) + 3
    places = torch.randperm(num_blocks, generator=random)
    shape = (num_blocks, case.size, case.kv_heads, case.width)
    keys, values = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
    tables = torch.zeros(len(blocks) + spare, max(blocks) + 2, dtype=torch.int32)
    used = 0
    for row, (count, context) in enumerate(zip(blocks, case.contexts, strict=True)):
        mine = places[used : used + count]
        tables[row, :count] = mine.int()
        n = torch.arange(context)
        for cache in (keys, values):
            fresh = torch.randn(context, case.kv_heads, case.width, generator=random)
            cache[mine[n // case.size], n % case.size] = fresh
        used += count
    tokens = sum(case.queries)
    q = torch.full((tokens + spare, case.heads, case.width), float("nan"))
    q[:tokens] = torch.randn(tokens, case.heads, case.width, generator=random) * 2.0
    starts = torch.tensor([0, *case.queries, *[0] * spare]).cumsum(0).int()
    lens = torch.tensor([*case.contexts, *[0] * spare], dtype=torch.int32)
    return Pages(
        q.to(device, dtype),
        keys.to(device, dtype),
        values.to(device, dtype),
        starts.to(device),
        lens.to(device),
        tables.to(device),
        case.width**-0.5,
    )


def decode_case(contexts: tuple[int, ...], heads: int, kv_heads: int, width: int, size: int) -> Case:
    return Case((1,) * len(contexts), contexts, heads, kv_heads, width, size)


DECODES = [
    decode_case((1, LONG, 17), 4, 4, 64, 16),
    decode_case((130, 129, 128, 1), 8, 2, 64, 8),
    decode_case((33, 200), 5, 1, 128, 32),
    decode_case((65,), 6, 2, 96, 16),
    decode_case((40,), 2, 1, 256, 16),
    decode_case((31, 7), 16, 1, 64, 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DECODES, ids=str)
def test_decode_attention_is_the_float64_one(
    case: Case, dtype: torch.dtype, device: torch.device, random: torch.Generator, close: Check
) -> None:
    pages = build(case, dtype, device, random)
    out = decode_attention(pages.q, pages.keys, pages.values, pages.lens, pages.tables, pages.scale)
    close(out, reference_gpu.prefill_attention(*pages.wide(), pages.scale))


def test_half_precision_keys_are_attended(device: torch.device, random: torch.Generator, close: Check) -> None:
    pages = build(decode_case((70, 3), 3, 1, 64, 16), torch.float16, device, random)
    reference = reference_gpu.prefill_attention(*pages.wide(), pages.scale)
    close(decode_attention(pages.q, pages.keys, pages.values, pages.lens, pages.tables, pages.scale), reference)
    close(
        prefill_attention(pages.q, pages.keys, pages.values, pages.starts, pages.lens, pages.tables, pages.scale),
        reference,
    )


def test_padding_rows_have_no_task_and_an_output_of_zeros(device: torch.device, random: torch.Generator) -> None:
    dtype = DTYPES[0]
    pages = build(decode_case((140, 20), 4, 2, 64, 16), dtype, device, random, spare=3)
    out = decode_attention(pages.q, pages.keys, pages.values, pages.lens, pages.tables, pages.scale)
    assert not out[:2].isnan().any()
    assert (out[2:] == 0).all()


def test_outputs_of_padding_rows_can_be_left_alone(device: torch.device, random: torch.Generator) -> None:
    pages = build(decode_case((140, 20), 4, 2, 64, 16), DTYPES[0], device, random, spare=3)
    inputs = (pages.q, pages.keys, pages.values, pages.lens, pages.tables, pages.scale)
    out = torch.full_like(pages.q, 7.0)
    decode_attention(*inputs, out=out, zeros=False)
    assert torch.equal(out[:2], decode_attention(*inputs)[:2])
    assert (out[2:] == 7.0).all()


def test_a_batch_of_padding_alone_reads_nothing(device: torch.device, random: torch.Generator) -> None:
    pages = build(decode_case((9,), 2, 1, 64, 8), DTYPES[0], device, random)
    lens = torch.zeros_like(pages.lens)
    assert (decode_attention(pages.q, pages.keys, pages.values, lens, pages.tables, pages.scale) == 0).all()


@pytest.mark.parametrize("programs", [1, 4, 64, 528])
@pytest.mark.parametrize("lens", [(0,), (1,), (128, 129), (5, 0, 4000, 64, 0), (300,) * 40], ids=str)
def test_tasks_cover_each_row_once_and_fit_their_bound(
    lens: tuple[int, ...], programs: int, device: torch.device
) -> None:
    plan = plan_tasks(torch.tensor(lens, dtype=torch.int32, device=device), 2, programs)
    chunk, rows, starts = int(plan.chunk), plan.task_rows.tolist(), plan.task_starts.tolist()
    expected = [row for row, length in enumerate(lens) for _ in range(-(-length // chunk))]
    assert len(expected) <= len(rows)
    assert rows == expected + [-1] * (len(rows) - len(expected))
    assert starts == [expected.index(row) if row in expected else starts[row] for row in range(len(lens))] + [
        len(expected)
    ]
    assert max((end - start for start, end in itertools.pairwise(starts)), default=0) <= plan.most


def test_the_split_of_a_row_does_not_change_its_answer(
    device: torch.device, random: torch.Generator, close: Check
) -> None:
    pages = build(decode_case((LONG, 130), 4, 2, 64, 16), DTYPES[0], device, random)
    reference = reference_gpu.prefill_attention(*pages.wide(), pages.scale)
    for programs in (1, 4, 1000):
        plan = plan_tasks(pages.lens, 2, programs)
        close(
            decode_attention(pages.q, pages.keys, pages.values, pages.lens, pages.tables, pages.scale, plan), reference
        )


PREFILLS = [
    Case((5, 1, 9), (5, 40, 9), 4, 4, 64, 16),
    Case((70, 3), (130, 3), 4, 1, 64, 8),
    Case((33,), (33,), 5, 1, 128, 32),
    Case((20,), (85,), 6, 2, 96, 16),
    Case((3, 0, 8), (10, 0, 8), 2, 1, 256, 16),
    Case((18,), (50,), 16, 1, 64, 16),
] + ([Case((700, 1, 130), (2000, 5, 130), 32, 8, 128, 16), Case((513,), (513,), 9, 3, 64, 16)] if GPU else [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PREFILLS, ids=str)
def test_prefill_attention_is_the_float64_one(
    case: Case, dtype: torch.dtype, device: torch.device, random: torch.Generator, close: Check
) -> None:
    pages = build(case, dtype, device, random)
    out = prefill_attention(pages.q, pages.keys, pages.values, pages.starts, pages.lens, pages.tables, pages.scale)
    close(out, reference_gpu.prefill_attention(*pages.wide(), pages.scale))


def test_prefill_neither_reads_nor_writes_padding(device: torch.device, random: torch.Generator, close: Check) -> None:
    case = Case((7, 4), (7, 24), 4, 2, 64, 16)
    pages = build(case, DTYPES[0], device, random, spare=5)
    starts = torch.tensor([0, 7, *[11] * 6], dtype=torch.int32, device=device)
    out = torch.full_like(pages.q, 7.0)
    prefill_attention(pages.q, pages.keys, pages.values, starts, pages.lens, pages.tables, pages.scale, out)
    assert (out[11:] == 7.0).all()
    wide = pages.wide()
    close(out[:11], reference_gpu.prefill_attention(*wide[:3], starts.cpu(), *wide[4:], pages.scale)[:11])


WINDOWS = [(1, None), (5, None), (16, None), (37, 3.0), (64, None), (200, 20.0), (None, 3.0)]


def blank(pages: Pages, case: Case, window: int) -> None:
    """Put NaN in every slot that no query of the case sees."""
    for row, (queries, context) in enumerate(zip(case.queries, case.contexts, strict=True)):
        for n in range(max(0, context - queries + 1 - window)):
            block = int(pages.tables[row, n // case.size])
            pages.keys[block, n % case.size] = torch.nan
            pages.values[block, n % case.size] = torch.nan


@pytest.mark.parametrize(("window", "softcap"), WINDOWS)
def test_windows_and_caps_are_those_of_the_float64_attention(
    window: int | None, softcap: float | None, device: torch.device, random: torch.Generator, close: Check
) -> None:
    dtype = DTYPES[0]
    for case in (Case((7, 33, 1, 70), (7, 90, 64, 150), 4, 2, 24, 16), Case((12,), (100,), 5, 1, 40, 8)):
        pages = build(case, dtype, device, random)
        wanted = reference_gpu.prefill_attention(*pages.wide(), pages.scale, window=window, softcap=softcap)
        if window is not None:
            blank(pages, case, window)
        inputs = (pages.q, pages.keys, pages.values, pages.starts, pages.lens, pages.tables, pages.scale)
        close(prefill_attention(*inputs, window=window, softcap=softcap), wanted)
    for lengths in ((1, 40, 65, 300), (64,)):
        case = decode_case(lengths, 6, 2, 24, 16)
        pages = build(case, dtype, device, random)
        wide = pages.wide()
        wanted = reference_gpu.decode_attention(*wide[:3], *wide[4:], pages.scale, window=window, softcap=softcap)
        if window is not None:
            blank(pages, case, window)
        for programs in (2, 64):
            tasks = plan_tasks(pages.lens, 2, programs, window)
            found = decode_attention(
                pages.q, pages.keys, pages.values, pages.lens, pages.tables, pages.scale, tasks,
                window=window, softcap=softcap,
            )  # fmt: skip
            close(found, wanted)


if GPU:

    def test_pages_past_two_to_the_31_numbers_are_reached(
        device: torch.device, random: torch.Generator, close: Check
    ) -> None:
        case = Case((3, 1), (50, 200), 8, 4, 128, 16)
        pages = build(case, torch.bfloat16, device, random)
        far = (1 << 31) // (16 * 4 * 128) + 7
        caches = []
        for cache in (pages.keys, pages.values):
            large = torch.empty((far + len(cache), *cache.shape[1:]), dtype=cache.dtype, device=device)
            large[far:] = cache
            caches.append(large)
        tables = pages.tables + far
        reference = reference_gpu.prefill_attention(*pages.wide(), pages.scale)
        close(prefill_attention(pages.q, *caches, pages.starts, pages.lens, tables, pages.scale), reference)
        last = slice(3, 4)
        close(decode_attention(pages.q[last], *caches, pages.lens[1:], tables[1:], pages.scale), reference[last])

    def test_the_same_batch_gives_the_same_bits(device: torch.device, random: torch.Generator) -> None:
        pages = build(decode_case((2000, 5, 700, 64), 32, 8, 128, 16), torch.bfloat16, device, random)
        runs = [
            decode_attention(pages.q, pages.keys, pages.values, pages.lens, pages.tables, pages.scale)
            for _ in range(20)
        ]
        assert all(torch.equal(runs[0], run) for run in runs)
