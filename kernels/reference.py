"""Every operation of the decoder in plain PyTorch: the CPU back end, and the oracle of the compiled kernels.

The contracts are those of ``Ops`` in vserve/model/ops.py, which this file must not import.  Works on any device, in
float32, bfloat16 and float16; owns no state.  Written for few, large calls: on a CPU a call of PyTorch takes 1 to 5
microseconds, and a decode step of a small model is made of hundreds of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

MASK_LIMIT = 1 << 22
"""Most numbers in one attention mask: a longer chunk is cut into runs of queries."""

GATHER_LIMIT = 1 << 14
"""Most keys gathered at once for several decoding sequences (a single longer one still goes whole)."""

PADDING_RATIO = 1.5
"""Sequences decode together while the longest context is at most this many times the shortest."""

PADDING_KEYS = 64
"""Contexts that differ by no more than this decode together whatever the ratio."""

ALONE_SEQUENCES = 4
"""Up to so many decoding sequences, one whose pages follow one another is read where it lies, by a call of its own:
gathering keys costs more than the attention over them, until the calls do."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Queries that attend in one call: N sequences, each with Q queries over L keys.

    rows: the queries among the tokens of the step: (start, stop), or int64 [N] when they are scattered.
    slots: the cache slots of the keys: int64 [N * L], or (start, stop) of one sequence whose slots follow one another.
    Padding repeats a slot of the same sequence, so what lies in slots of no one (NaN included) is never read.
    mask: float32 0 or -inf, [N, 1, 1, L] or [Q, L]; None: all are seen or, with causal, the lower triangle of Q = L.
    """

    rows: tuple[int, int] | Tensor
    slots: tuple[int, int] | Tensor
    sequences: int
    mask: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What the layers of one step share.

    cos [T, 1, 1, E / 2]; sin [T, 1, 2, E / 2], negated in the first half; slots [T] int64.
    order: where each token's row lies in the concatenated results of the pieces; None when it lies in place.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    pieces: tuple[Piece, ...]
    order: Tensor | None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), in float32, rounded to x's dtype, times weight.

    Zhang and Sennrich 2019, arXiv:1910.07467.  torch's own rms_norm is slower on the few rows of a decode step.
    """
    wide = x if x.dtype == torch.float32 else x.to(torch.float32)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    factor = torch.addcmul(_constant(eps, x.device), length, length, value=1.0 / x.shape[-1]).rsqrt_()
    normed = wide * factor
    if x.dtype != torch.float32:
        normed = normed.to(x.dtype)
    return normed.mul_(weight)


@lru_cache(maxsize=16)
def _constant(value: float, device: torch.device) -> Tensor:
    """[1, 1] float32.  An operation on a number instead makes such a tensor each time, which costs as much again."""
    return torch.full((1, 1), value, dtype=torch.float32, device=device)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the sum replaces residual."""
    residual.add_(x)
    return rms_norm(residual, weight, eps), residual


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [T, 2F], gate first -> [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate).mul_(up)


def plan(
    positions: Tensor,
    slots: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    query_lens: tuple[int, ...],
    context_lens_host: tuple[int, ...],
    cos: Tensor,
    sin: Tensor,
    block_size: int,
) -> Plan:
    """The rotations, gather indices and masks of the step.

    Decoding sequences of like length are batched; each chunk goes alone.  query_starts and context_lens repeat what
    the two tuples say, for back ends that must not read the device.
    """
    tables = block_tables.to(torch.int64)  # block * block_size passes 2**31 on a cache of that many slots
    decoding: list[tuple[int, int, int]] = []
    pieces: list[Piece] = []
    start = 0
    for sequence, (queries, keys) in enumerate(zip(query_lens, context_lens_host, strict=True)):
        if queries == 1:
            decoding.append((keys, sequence, start))
        elif queries:
            pieces += _chunk(key_slots(tables[sequence], keys, block_size), start, queries)
        start += queries
    if len(decoding) <= ALONE_SEQUENCES and tables.device.type == "cpu":
        found = [(entry, _run(tables[entry[1]], entry[0], block_size)) for entry in decoding]
        pieces += [Piece((row, row + 1), run, 1) for (_, _, row), run in found if run is not None]
        decoding = [entry for entry, run in found if run is None]
    pieces += [_decode(batch, tables, block_size) for batch in _batches(decoding)]
    sines = sin.index_select(0, positions)
    return Plan(
        cos=cos.index_select(0, positions)[:, None, None],
        sin=torch.stack((-sines, sines), dim=1).unsqueeze(1),
        slots=slots,
        pieces=tuple(pieces),
        order=_order(pieces, positions.device),
    )


def key_slots(table: Tensor, keys: int, block_size: int) -> Tensor:
    """Slots of the first keys tokens of sequences with blocks table [..., M] int64, in order -> [..., keys]."""
    blocks = table[..., : -(-keys // block_size)]
    offsets = torch.arange(block_size, device=table.device)
    return (blocks.unsqueeze(-1) * block_size + offsets).flatten(-2)[..., :keys]


def _run(table: Tensor, keys: int, block_size: int) -> tuple[int, int] | None:
    """(start, stop) of the slots of a sequence's keys if its pages follow one another, else None."""
    blocks: list[int] = table[: -(-keys // block_size)].tolist()
    start = blocks[0] * block_size
    return (start, start + keys) if blocks == list(range(blocks[0], blocks[0] + len(blocks))) else None


def _chunk(slots: Tensor, start: int, queries: int) -> Iterator[Piece]:
    """Pieces of one sequence's chunk, whose keys have slots; the chunk's tokens are rows start and on."""
    keys = slots.shape[0]
    if queries == keys:
        yield Piece((start, start + queries), slots, 1, causal=True)
        return
    run = max(1, MASK_LIMIT // keys)
    for first in range(0, queries, run):
        last = min(queries, first + run)
        seen = keys - queries + last
        mask = slots.new_full((last - first, seen), -torch.inf, dtype=torch.float32)
        yield Piece((start + first, start + last), slots[:seen], 1, mask.triu_(seen - (last - first) + 1))


def _batches(decoding: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """(context, sequence, row) of decoding sequences in groups whose contexts differ little, each in order of rows."""
    batch: list[tuple[int, int, int]] = []
    for entry in sorted(decoding):
        if batch:
            shortest, longest = batch[0][0], entry[0]
            wasteful = longest > shortest * PADDING_RATIO and longest > shortest + PADDING_KEYS
            if wasteful or longest * (len(batch) + 1) > GATHER_LIMIT:
                yield sorted(batch, key=lambda item: item[2])
                batch = []
        batch.append(entry)
    if batch:
        yield sorted(batch, key=lambda item: item[2])


def _decode(batch: list[tuple[int, int, int]], tables: Tensor, block_size: int) -> Piece:
    contexts = [context for context, _, _ in batch]
    rows = [row for _, _, row in batch]
    longest, device = max(contexts), tables.device
    wanted = [sequence for _, sequence, _ in batch]
    chosen = tables if wanted == list(range(tables.shape[0])) else tables[torch.tensor(wanted, device=device)]
    slots = key_slots(chosen, longest, block_size)
    mask = None
    if min(contexts) != longest:
        unseen = torch.arange(longest, device=device) >= torch.tensor(contexts, device=device).unsqueeze(1)
        slots = torch.where(unseen, slots[:, :1], slots)
        mask = torch.zeros(unseen.shape, device=device).masked_fill_(unseen, -torch.inf)[:, None, None]
    in_place = rows[-1] - rows[0] == len(rows) - 1
    place = (rows[0], rows[-1] + 1) if in_place else torch.tensor(rows, device=device)
    return Piece(place, slots.reshape(-1), len(batch), mask)


def _order(pieces: list[Piece], device: torch.device) -> Tensor | None:
    """See Plan.order."""
    rows: list[int] = []
    for piece in pieces:
        rows += range(*piece.rows) if isinstance(piece.rows, tuple) else piece.rows.tolist()
    if rows == list(range(len(rows))):
        return None
    return torch.tensor(rows, device=device).argsort()


def rope_and_write(qkv: Tensor, pairs: Tensor, plan: object) -> Tensor:
    """Rotate the queries and keys of qkv [T, (Hq + 2 Hk) * E] in place; write keys and values to their slots of pairs.

    y = x * cos + (-x_high, x_low) * sin in float32: Su et al. 2021, arXiv:2104.09864, in the layout of two halves.
    Returns the queries [T, Hq, E], a view of qkv.
    """
    assert isinstance(plan, Plan)
    tokens, width = qkv.shape
    kv_heads, head_dim = pairs.shape[3:]
    keys_at = width - 2 * kv_heads * head_dim
    values_at = width - kv_heads * head_dim
    turning = qkv[:, :values_at].view(tokens, -1, 2, head_dim // 2)
    if qkv.dtype == torch.float32:
        swapped = turning.flip(2)
        turning.mul_(plan.cos).addcmul_(swapped, plan.sin)
    else:
        wide = turning.to(torch.float32)
        turning.copy_(wide * plan.cos + wide.flip(2) * plan.sin)
    pairs.view(-1, 2 * kv_heads * head_dim).index_copy_(0, plan.slots, qkv[:, keys_at:])
    return qkv[:, :keys_at].view(tokens, -1, head_dim)


def paged_attention(q: Tensor, pairs: Tensor, plan: object, scale: float) -> Tensor:
    """softmax(q k / sqrt(E)) v of q [T, Hq, E] over the keys at or before it in its sequence -> [T, Hq * E]."""
    assert isinstance(plan, Plan)
    parts = [_attend(q, pairs, piece, scale) for piece in plan.pieces]
    if len(parts) == 1 and plan.order is None:
        return parts[0]
    joined = torch.cat(parts) if parts else q.new_empty((0, q.shape[1] * q.shape[2]))
    return joined if plan.order is None else joined.index_select(0, plan.order)


def _attend(q: Tensor, pairs: Tensor, piece: Piece, scale: float) -> Tensor:
    kv_heads, head_dim = pairs.shape[3:]
    if isinstance(piece.rows, Tensor):
        q = q.index_select(0, piece.rows)
    elif piece.rows[1] - piece.rows[0] != q.shape[0]:
        q = q[piece.rows[0] : piece.rows[1]]
    rows, heads = q.shape[:2]
    if isinstance(piece.slots, Tensor):
        slots = pairs.view(-1, 2 * kv_heads * head_dim).index_select(0, piece.slots)
    else:
        slots = pairs.view(-1, 2, kv_heads, head_dim)[piece.slots[0] : piece.slots[1]]
    key, value = slots.view(piece.sequences, -1, 2, kv_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    out = scaled_dot_product_attention(
        q.view(piece.sequences, -1, heads, head_dim).transpose(1, 2),
        key,
        value,
        attn_mask=piece.mask if piece.mask is None or q.dtype == torch.float32 else piece.mask.to(q.dtype),
        is_causal=piece.causal,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return out.transpose(1, 2).reshape(rows, heads * head_dim)
