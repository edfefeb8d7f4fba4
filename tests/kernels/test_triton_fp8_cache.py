"""Keys and values in e4m3: written and read by the kernels, against float64 on what the caches then hold.

Every slot that must stay unread holds NaN, in its numbers (0x7F) and in its scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from fakes_gpu import Engine, Parts, config, cuda_runner, plain_runner
from torch import Tensor

from vserve.engine.request import GenRequest, RequestId, SamplingParams
from vserve.kernels import reference, reference_gpu
from vserve.kernels.attention_decode import decode_attention
from vserve.kernels.attention_prefill import prefill_attention
from vserve.kernels.rope import norm_rope_and_write, split_qkv
from vserve.kernels.tasks import plan_tasks

Check = Callable[[Tensor, Tensor], None]
GPU = torch.cuda.is_available()
# The interpreter multiplies no bf16 matrices.
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float32]
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Pages:
    """A batch's tensors on the device; wide: what the float64 reference takes of it."""

    q: Tensor
    keys: Tensor
    values: Tensor
    starts: Tensor
    lens: Tensor
    tables: Tensor
    scales: Tensor
    wide: tuple[Tensor, ...]

    def prefill(self, **more: object) -> Tensor:
        inputs = (self.q, self.keys, self.values, self.starts, self.lens, self.tables, self.q.shape[2] ** -0.5)
        return prefill_attention(*inputs, scales=self.scales, **more)  # type: ignore[arg-type]

    def decode(self, programs: int = 64, window: int | None = None, softcap: float | None = None) -> Tensor:
        tasks = plan_tasks(self.lens, self.keys.shape[2], programs, window)
        inputs = (self.q, self.keys, self.values, self.lens, self.tables, self.q.shape[2] ** -0.5, tasks)
        return decode_attention(*inputs, window=window, softcap=softcap, scales=self.scales)

    def wanted(self, window: int | None = None, softcap: float | None = None) -> Tensor:
        scale = self.q.shape[2] ** -0.5
        return reference_gpu.prefill_attention(*self.wide, scale, window=window, softcap=softcap)


def build(
    queries: tuple[int, ...],
    contexts: tuple[int, ...],
    heads: tuple[int, int],
    width: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    random: torch.Generator,
    window: int | None = None,
) -> Pages:
    """Keys and values of many magnitudes in random places, and NaN in every other slot and before the window."""
    kv_heads = heads[1]
    blocks = [-(-n // size) for n in contexts]
    places = torch.randperm(sum(blocks) + 3, generator=random)
    numbers = torch.full((len(places), size, 2, kv_heads, width), torch.nan).to(E4M3)
    scales = torch.full((len(places), kv_heads, size, 2), torch.nan, dtype=torch.bfloat16)
    wide = torch.zeros(numbers.shape, dtype=torch.float64)
    tables = torch.zeros(len(blocks), max(blocks) + 2, dtype=torch.int32)
    used = 0
    for row, (count, query, context) in enumerate(zip(blocks, queries, contexts, strict=True)):
        mine = places[used : used + count]
        tables[row, :count] = mine.int()
        used += count
        seen = 0 if window is None else max(0, context - query + 1 - window)
        n = torch.arange(seen, context)
        at = (mine[n // size], n % size)
        fresh = torch.randn(context - seen, 2, kv_heads, width, generator=random)
        fresh[:, 1] *= torch.rand(context - seen, kv_heads, 1, generator=random).mul_(6.0).exp_()
        numbers[at], scale = reference.reduced(fresh)
        scales[at[0], :, at[1]] = scale
        wide[at] = numbers[at].double() * scale.double().transpose(1, 2).unsqueeze(-1)
    q = (torch.randn(sum(queries), heads[0], width, generator=random) * 2.0).to(dtype)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    lens = torch.tensor(contexts, dtype=torch.int32)
    on = [x.to(device) for x in (q, numbers, starts, lens, tables, scales)]
    return Pages(
        on[0],
        on[1][:, :, 0],
        on[1][:, :, 1],
        *on[2:],
        (q.double(), wide[:, :, 0], wide[:, :, 1], starts, lens, tables),
    )


SHAPES = [((4, 4), 64, 16), ((8, 2), 64, 8), ((5, 1), 128, 32), ((6, 2), 96, 16), ((2, 1), 256, 16), ((16, 1), 64, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width", "size"), SHAPES, ids=str)
def test_attention_over_e4m3_is_the_float64_one_of_what_is_stored(
    heads: tuple[int, int],
    width: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    random: torch.Generator,
    close: Check,
) -> None:
    pages = build((1, 1, 1, 1), (1, 130, 17, 64), heads, width, size, dtype, device, random)
    for programs in (1, 8, 528):
        close(pages.decode(programs), pages.wanted())
    close(pages.prefill(), pages.wanted())
    pages = build((5, 1, 70, 0, 9), (5, 40, 90, 0, 9), heads, width, size, dtype, device, random)
    close(pages.prefill(), pages.wanted())


@pytest.mark.parametrize(("window", "softcap"), [(1, None), (16, None), (37, 3.0), (64, 20.0), (None, 3.0)])
def test_windows_and_caps_hold_and_slots_before_a_window_stay_unread(
    window: int | None, softcap: float | None, device: torch.device, random: torch.Generator, close: Check
) -> None:
    for dtype in DTYPES:
        pages = build((7, 33, 1), (7, 90, 64), (4, 2), 32, 16, dtype, device, random, window)
        close(pages.prefill(window=window, softcap=softcap), pages.wanted(window, softcap))
        pages = build((1, 1, 1), (1, 65, 200), (6, 2), 48, 8, dtype, device, random, window)
        for programs in (2, 64):
            close(pages.decode(programs, window, softcap), pages.wanted(window, softcap))


@pytest.mark.parametrize("given", [None, (0.02, 0.25)], ids=["own", "given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width", "size"),
    [(1, 9, 3, 64, 16), (5, 4, 4, 96, 8), (3, 20, 4, 128, 32), (2, 2, 1, 256, 16)],
)
def test_heads_are_written_with_their_scales_and_nothing_else_is(
    tokens: int,
    heads: int,
    kv_heads: int,
    width: int,
    size: int,
    dtype: torch.dtype,
    given: tuple[float, float] | None,
    device: torch.device,
    random: torch.Generator,
) -> None:
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width, generator=random)
    qkv *= torch.logspace(-3, 4, tokens)[:, None]  # from tiny to beyond what a given scale reaches
    qkv = qkv.to(device, dtype)
    angles = torch.rand(tokens, width // 2, generator=random) * 6.0
    slots = torch.randperm(4 * size, generator=random)[:tokens]
    if tokens > 1:
        slots[1] = -1
    numbers = torch.full((4, size, 2, kv_heads, width), torch.nan, device=device).to(E4M3)
    scales = torch.full((4, kv_heads, size, 2), torch.nan, dtype=torch.bfloat16, device=device)
    q, k, v = split_qkv(qkv, heads, kv_heads, width)
    turns = (angles.cos().to(device), angles.sin().to(device))
    places = (numbers[:, :, 0], numbers[:, :, 1], slots.to(device))
    norm_rope_and_write(q, k, v, None, None, 0.0, *turns, *places, scales=scales, given=given)

    wanted = torch.full((4, size, 2, kv_heads, width), torch.nan, dtype=torch.float64)
    wide = [x.double().cpu() for x in (q, k, v)]
    turned = [angles.cos().double(), angles.sin().double()]
    reference_gpu.norm_rope_and_write(*wide, None, None, 0.0, *turned, wanted[:, :, 0], wanted[:, :, 1], slots)
    used = slots[slots >= 0]
    at = (used // size, used % size)
    scale = scales.cpu()[at[0], :, at[1]].double().transpose(1, 2)
    fresh = wanted[at]
    expected = fresh.abs().amax(-1) / 448 if given is None else torch.tensor(given).double()[:, None]
    assert torch.allclose(scale, expected.expand_as(scale), rtol=2**-8)
    found = numbers.cpu()[at].double() * scale.unsqueeze(-1)
    reach = 448 * scale.unsqueeze(-1)
    kept = fresh.clamp(-reach, reach)
    # Half a step of 3 bits of mantissa, or of e4m3's smallest numbers.
    step = torch.maximum(kept.abs() / 16, scale.unsqueeze(-1) * 2.0**-10)
    assert ((found - kept).abs() <= step * 1.01).all()
    rest = torch.ones(4, size, dtype=torch.bool)
    rest[at] = False
    assert (numbers.cpu().view(torch.uint8)[rest] & 0x7F == 0x7F).all()
    assert scales.cpu().transpose(1, 2)[rest].isnan().all()


@pytest.mark.parametrize("given", [None, (0.5, 0.5)], ids=["own", "given"])
def test_what_is_infinite_saturates_and_a_nan_stays_one(
    given: tuple[float, float] | None, device: torch.device
) -> None:
    kv_heads, width = 4, 32
    v = torch.ones(1, kv_heads, width)  # a key is turned first, which makes NaN of an infinity
    v[0, 0, 3], v[0, 1, 4], v[0, 2, 5] = torch.inf, -3e38, torch.nan
    k = torch.zeros(1, kv_heads, width)
    numbers = torch.zeros(1, 8, 2, kv_heads, width, device=device).to(E4M3)
    scales = torch.zeros(1, kv_heads, 8, 2, dtype=torch.bfloat16, device=device)
    turns = (torch.ones(1, width // 2, device=device), torch.zeros(1, width // 2, device=device))
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    places = (numbers[:, :, 0], numbers[:, :, 1], slots)
    heads = [x.to(device) for x in (k, k, v)]
    norm_rope_and_write(*heads, None, None, 0.0, *turns, *places, scales=scales, given=given)
    by_torch, torch_scales = reference.reduced(torch.stack((k, v), 1), given)
    for stored, scale in ((numbers[0, :1].cpu(), scales[:, :, 0].cpu()), (by_torch, torch_scales)):
        found = reference.restored(stored, scale, torch.float64)[0]
        assert found[1, [0, 1, 3]].isfinite().all()
        assert found[1, 0, 3] == 448 * scale[0, 0, 1].double()
        assert found[1, 1, 4] == -448 * scale[0, 1, 1].double()
        assert found[1, 2].isnan().all()
        assert (found[0] == 0).all()


def test_keys_and_values_survive_the_way_through_e4m3_to_a_sixteenth(random: torch.Generator) -> None:
    x = torch.randn(60, 2, 3, 64, generator=random) * torch.logspace(-25, 37, 60)[:, None, None, None]
    numbers, scale = reference.reduced(x)
    assert (numbers.dtype, scale.dtype, scale.shape) == (E4M3, torch.bfloat16, (60, 3, 2))
    found = reference.restored(numbers, scale, torch.float32)
    most = x.abs().amax(-1, keepdim=True)
    assert ((found - x).abs() <= torch.maximum(x.abs() / 16, most / 448 * 2**-10) * 1.001).all()
    # The largest of a head is kept but for the rounding of its scale.
    assert torch.allclose(found.abs().amax(-1, keepdim=True), most, rtol=2**-8)
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).view(4, 2, 1, 32)
    ones = torch.ones(4, 1, 2, dtype=torch.bfloat16)
    restored, plain = reference.restored(every, ones, torch.float32), every.to(torch.float32)
    assert torch.equal(restored[~plain.isnan()], plain[~plain.isnan()])


GREEDY = SamplingParams(temperature=0.0)


@pytest.mark.parametrize(
    "limits",
    [{}, {"max_num_batched_tokens": 16, "max_prefill_chunk": 3}, {"num_blocks": 4, "prefix_caching": False}],
    ids=["roomy", "small chunks", "few blocks"],
)
def test_texts_of_an_fp8_cache_are_those_of_the_plain_runner_and_of_each_alone(
    limits: dict[str, int], device: torch.device
) -> None:
    parts = Parts(config(layers=1, heads=2, kv_heads=1), device, torch.float32)
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32}
    prompts = [[name % 3 + 1, 2, 3, *range(name * 2 % 11)] for name in range(4)]
    wanted = [GenRequest(RequestId(name), prompt, 9, GREEDY) for name, prompt in enumerate(prompts)]
    engine = Engine(cuda_runner(parts, E4M3), 2, **(sizes | limits))
    texts = engine.run(wanted)
    assert texts == Engine(plain_runner(parts, E4M3), 1, **sizes).run(wanted)
    for request in wanted[:2]:
        alone = Engine(cuda_runner(parts, E4M3), 1, **sizes).run([request])
        assert alone[request.id] == texts[request.id]
    if "num_blocks" in limits:
        assert engine.scheduler.stats().preemptions_total > 0


def test_a_cached_prefix_of_e4m3_is_read_again(device: torch.device) -> None:
    parts = Parts(config(layers=1, heads=2, kv_heads=1), device, torch.float32)
    engine = Engine(cuda_runner(parts, E4M3), 1)
    first, second = (GenRequest(RequestId(name), list(range(1, 30)), 6, GREEDY) for name in range(2))
    text = engine.run([first])[0]
    assert engine.run([second])[1] == text
    assert engine.scheduler.stats().prefix_hits_total > 0
