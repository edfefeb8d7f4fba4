"""The plain PyTorch operations against their formulas in float64, written out again here.

They are the oracle of the compiled kernels, so they are held to another one.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from vserve.kernels import reference

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether found has the shape of wanted and its values, to found's precision of the largest."""
    spread = TOLERANCE[found.dtype] * max(1.0, float(wanted.abs().max()))
    return found.shape == wanted.shape and bool(((found.double() - wanted).abs() <= spread).all())


class Paged:
    """Sequences with (computed, new) tokens each, their pages out of order in a cache whose other slots are NaN."""

    def __init__(self, lens: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, block_size: int) -> None:
        self.block_size, self.lens = block_size, lens
        self.queries = tuple(new for _, new in lens)
        self.contexts = tuple(old + new for old, new in lens)
        needed = [-(-context // block_size) for context in self.contexts]
        blocks = list(range(sum(needed) + 3))
        random.Random(0).shuffle(blocks)
        self.tables = torch.zeros((len(lens), max(needed)), dtype=torch.int32)
        self.pairs = torch.full((len(blocks), block_size, 2, kv_heads, dim), torch.nan)
        self.slots: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for row, (context, count) in enumerate(zip(self.contexts, needed, strict=True)):
            taken = torch.tensor([blocks.pop() for _ in range(count)])
            self.tables[row, :count] = taken
            places = torch.arange(context)
            self.slots.append(taken[places // block_size] * block_size + places % block_size)
            pair = torch.randn(context, 2, kv_heads, dim)
            self.pairs.view(-1, 2, kv_heads, dim)[self.slots[-1]] = pair
            self.keys.append(pair[:, 0])
            self.values.append(pair[:, 1])
        self.q = torch.randn(sum(self.queries), heads, dim)

    def plan(self) -> reference.Plan:
        positions = torch.cat([torch.arange(old, old + new) for old, new in self.lens])
        written = torch.cat([slots[old:] for slots, (old, _) in zip(self.slots, self.lens, strict=True)])
        starts = torch.tensor([0, *itertools.accumulate(self.queries)], dtype=torch.int32)
        table = torch.rand(max(self.contexts), self.q.shape[2] // 2)
        contexts = torch.tensor(self.contexts, dtype=torch.int32)
        return reference.plan(
            positions,
            written,
            starts,
            contexts,
            self.tables,
            self.queries,
            self.contexts,
            table,
            table,
            self.block_size,
        )

    def attended(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return reference.paged_attention(self.q.to(dtype), self.pairs.to(dtype), self.plan(), 0.3)

    def wanted(self) -> Tensor:
        """Every query by itself, in float64."""
        out = []
        rows = iter(self.q.double())
        for keys, values, (old, new) in zip(self.keys, self.values, self.lens, strict=True):
            group = self.q.shape[1] // keys.shape[1]
            k = keys.double().repeat_interleave(group, dim=1)
            v = values.double().repeat_interleave(group, dim=1)
            for seen in range(old + 1, old + new + 1):
                scores = torch.einsum("he,lhe->hl", next(rows), k[:seen]) * 0.3
                out.append(torch.einsum("hl,lhe->he", scores.softmax(-1), v[:seen]).flatten())
        return torch.stack(out)


MIXES = {
    "one decode": [(36, 1)],
    "the first token": [(0, 1)],
    "decodes of like length": [(36, 1), (37, 1), (30, 1), (31, 1), (33, 1)],
    "decodes of one length": [(36, 1)] * 6,
    "decodes of unlike length": [(300, 1), (2, 1), (100, 1), (7, 1), (299, 1), (0, 1)],
    "a prompt": [(0, 29)],
    "a chunk": [(21, 13)],
    "a chunk of all but one": [(1, 40)],
    "everything": [(9, 1), (0, 17), (200, 1), (33, 5), (1, 1), (0, 2), (64, 1), (16, 16), (3, 1)],
    "a sequence without tokens": [(9, 1), (12, 0), (0, 4)],
}


@pytest.mark.parametrize("lens", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(9, 3, 64, 16), (4, 4, 96, 8), (4, 1, 32, 32), (10, 2, 80, 16), (3, 3, 2, 8)],
)
def test_attention_is_causal_over_each_sequences_own_pages(
    lens: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, block_size: int
) -> None:
    torch.manual_seed(0)
    case = Paged(lens, heads, kv_heads, dim, block_size)
    assert close(case.attended(), case.wanted())


@DTYPES
def test_attention_keeps_the_precision_of_each_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = Paged(MIXES["everything"], 9, 3, 64, 16)
    assert close(case.attended(dtype), case.wanted())


def test_a_chunk_cut_by_the_mask_limit_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    case = Paged([(21, 13), (0, 5), (4, 9)], 4, 2, 16, 8)
    monkeypatch.setattr(reference, "MASK_LIMIT", 100)
    assert len(case.plan().pieces(None).pieces) > 3
    assert close(case.attended(), case.wanted())


@pytest.mark.parametrize("limit", [1, 40, 400])
def test_decodes_cut_by_the_gather_limit_give_the_same(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    case = Paged([(20, 1), (31, 1), (0, 1), (33, 1), (50, 1), (34, 1)], 4, 2, 16, 8)
    monkeypatch.setattr(reference, "GATHER_LIMIT", limit)
    assert close(case.attended(), case.wanted())


@pytest.mark.parametrize("sequences", [1, reference.ALONE_SEQUENCES, reference.ALONE_SEQUENCES + 1])
def test_pages_that_follow_one_another_are_read_where_they_lie_and_give_the_same(sequences: int) -> None:
    torch.manual_seed(0)
    case = Paged([(40, 1)] * sequences, 4, 2, 16, 8)
    blocks = len(case.pairs)
    ordered = torch.full_like(case.pairs, torch.nan)
    ordered[torch.arange(blocks)[: case.tables.numel()]] = case.pairs[case.tables.flatten().long()]
    case.pairs = ordered
    case.tables = torch.arange(case.tables.numel(), dtype=torch.int32).view_as(case.tables)
    in_place = [isinstance(piece.slots, tuple) for piece in case.plan().pieces(None).pieces]
    assert all(in_place) if sequences <= reference.ALONE_SEQUENCES else not any(in_place)
    assert close(case.attended(), case.wanted())


def test_slots_past_two_to_the_31_do_not_wrap() -> None:
    table = torch.tensor([2**27 + 5, 3])
    assert reference.key_slots(table, 18, 16).tolist() == [
        *range((2**27 + 5) * 16, (2**27 + 6) * 16),
        48,
        49,
    ]


@DTYPES
def test_queries_and_keys_turn_and_only_their_slots_are_written(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, heads, kv_heads, dim = 5, 4, 2, 16
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    angles = torch.randn(40, dim // 2)
    positions = torch.tensor([3, 0, 17, 39, 4])
    slots = torch.tensor([9, 2, 31, 16, 0])
    pairs = torch.full((4, 8, 2, kv_heads, dim), torch.nan, dtype=dtype)
    plan = reference.plan(
        positions,
        slots,
        torch.arange(6, dtype=torch.int32),
        torch.ones(5, dtype=torch.int32),
        torch.zeros((5, 1), dtype=torch.int32),
        (1,) * 5,
        (1,) * 5,
        angles.cos(),
        angles.sin(),
        8,
    )
    before = qkv.double().view(tokens, -1, dim)
    q = reference.rope_and_write(qkv, pairs, plan)

    low, high = before[:, : heads + kv_heads].chunk(2, dim=-1)
    turned = torch.complex(low, high) * torch.polar(
        torch.ones(5, 1, dim // 2).double(), angles.double()[positions, None]
    )
    wanted = torch.cat((turned.real, turned.imag), dim=-1)
    written = pairs.view(-1, 2, kv_heads, dim)
    assert close(q, wanted[:, :heads])
    assert close(written[slots, 0], wanted[:, heads:])
    assert torch.equal(written[slots, 1], before[:, heads + kv_heads :].to(dtype))
    rest = torch.ones(32, dtype=torch.bool).index_fill(0, slots, False)
    assert written[rest].isnan().all()


@DTYPES
@pytest.mark.parametrize("shape", [(1, 576), (7, 33), (0, 64)])
def test_rms_norm_follows_its_formula(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype) * 3, torch.randn(shape[1]).to(dtype)
    kept = x.clone()
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    found = reference.rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    assert torch.equal(x, kept)
    assert shape[0] == 0 or close(found, wanted)


def test_rms_norm_of_a_tiny_row_is_held_by_eps() -> None:
    x = torch.full((1, 8), 1e-6)
    assert torch.allclose(reference.rms_norm(x, torch.ones(8), 1e-2), x * 10, rtol=1e-5)


@DTYPES
def test_add_rms_norm_leaves_the_sum_in_the_residual(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, 40).to(dtype), torch.randn(3, 40).to(dtype), torch.randn(40).to(dtype)
    total = x + residual
    normed, left = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert left is residual
    assert torch.equal(left, total)
    assert torch.equal(normed, reference.rms_norm(total, weight, 1e-5))


@DTYPES
def test_silu_mul_gates_the_second_half_with_the_first(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(4, 66).to(dtype)
    kept = gate_up.clone()
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert close(reference.silu_mul(gate_up), gate * gate.sigmoid() * up)
    assert torch.equal(gate_up, kept)
