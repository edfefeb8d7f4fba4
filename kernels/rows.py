"""The inputs of a step from what the device keeps for each row, and back: no id and no page table passes the host.

Every live sequence has a row.  The device keeps by row its last id, its block table and the WORDS words of its sampling
parameters: temperature, top_k, top_p, min_p, the seed's two halves, the prompt's length, one unused; floats as their
bits.  A step brings a few int32 words from the host (`enter`, or the arguments below), gathers what its tokens need
(`decode_inputs` for steps of one token a row, `mixed_inputs` for the others) and keeps what was drawn (`keep`).  All
grids depend on shapes alone: they fit a captured graph.  A row of -1 is padding: nothing of it is read or kept.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 8
"""Words of an entry as it comes from the host: the row, then its parameters but the unused one."""
_BLOCK = 128
_TABLE_BLOCK = 256


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What is kept by row; all on one device.

    last_ids [rows] int64.  tables [rows, M] int32: blocks of the row's sequence.  params [rows, WORDS] int32.
    """

    last_ids: Tensor
    tables: Tensor
    params: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What a step reads: T tokens, R sequences, S draws.

    ids, slots [T] int64 (slot -1: padding).  cos, sin [T, E / 2] float32.  context_lens [R] int32 (0: padding).
    tables [R, M] int32.  temperature, top_p, min_p [S] float32; top_k [S] int32; seeds, counters [S] int64.
    """

    ids: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor
    context_lens: Tensor
    tables: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    counters: Tensor


@triton.jit
def _enter(
    updates_ptr,  # [U, 3] int32: row, column, block
    entries_ptr,  # [E, WORDS] int32: row, parameters
    tables_ptr,  # [rows, M] int32
    params_ptr,  # [rows, WORDS] int32
    table_stride,
    num_updates,
    num_entries,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_updates
    row = tl.load(updates_ptr + 3 * i, mask=mask, other=-1).to(tl.int64)
    column = tl.load(updates_ptr + 3 * i + 1, mask=mask, other=0)
    block = tl.load(updates_ptr + 3 * i + 2, mask=mask, other=0)
    tl.store(tables_ptr + row * table_stride + column, block, mask=row >= 0)
    entry = i // WORDS
    word = i % WORDS
    inside = entry < num_entries
    owner = tl.load(entries_ptr + entry * WORDS, mask=inside, other=-1).to(tl.int64)
    keep = inside & (owner >= 0) & (word > 0)
    value = tl.load(entries_ptr + i, mask=keep, other=0)
    tl.store(params_ptr + owner * WORDS + word - 1, value, mask=keep)


@triton.jit
def _copy_table(from_ptr, to_ptr, count, fresh_column, fresh_block, BLOCK: tl.constexpr):
    # The first `count` blocks; fresh_block in place of what fresh_column holds (it may be written at this moment)
    for base in range(0, count, BLOCK):
        c = base + tl.arange(0, BLOCK)
        blocks = tl.load(from_ptr + c, mask=c < count, other=0)
        blocks = tl.where((c == fresh_column) & (fresh_block >= 0), fresh_block, blocks)
        tl.store(to_ptr + c, blocks, mask=c < count)


@triton.jit
def _rotation(cos_ptr, sin_ptr, to_cos_ptr, to_sin_ptr, position, i, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    e = tl.arange(0, BLOCK_HALF)
    at = position.to(tl.int64) * HALF + e
    tl.store(to_cos_ptr + i * HALF + e, tl.load(cos_ptr + at, mask=e < HALF, other=0.0), mask=e < HALF)
    tl.store(to_sin_ptr + i * HALF + e, tl.load(sin_ptr + at, mask=e < HALF, other=0.0), mask=e < HALF)


@triton.jit
def _sampling(
    params_ptr, row, length, i,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, counters_ptr,
    WORDS: tl.constexpr,
):  # fmt: skip
    # Of draw i, after `length` tokens of the sequence in row; a row below 0: the harmless greedy draw
    used = row >= 0
    at = params_ptr + row * WORDS
    temperature = tl.load(at, mask=used, other=0).to(tl.float32, bitcast=True)
    top_k = tl.load(at + 1, mask=used, other=0)
    top_p = tl.load(at + 2, mask=used, other=0).to(tl.float32, bitcast=True)
    min_p = tl.load(at + 3, mask=used, other=0).to(tl.float32, bitcast=True)
    low = tl.load(at + 4, mask=used, other=0).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(at + 5, mask=used, other=0).to(tl.int64)
    prompt = tl.load(at + 6, mask=used, other=0)
    tl.store(temperature_ptr + i, temperature)
    tl.store(top_k_ptr + i, top_k)
    tl.store(top_p_ptr + i, tl.where(used, top_p, 1.0))
    tl.store(min_p_ptr + i, min_p)
    tl.store(seeds_ptr + i, (high << 32) | low)
    tl.store(counters_ptr + i, (length - prompt).to(tl.int64))


@triton.jit
def _decode_inputs(
    rows_ptr,  # [B] int32
    positions_ptr,  # [B] int32
    fresh_ptr,  # [B] int32: the block that holds this position if it is new, -1 if it is not
    last_ids_ptr,
    tables_ptr,
    params_ptr,
    cos_table_ptr,  # [max positions, E / 2]
    sin_table_ptr,
    ids_ptr,
    slots_ptr,
    lens_ptr,
    step_tables_ptr,
    cos_ptr,
    sin_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    counters_ptr,
    table_stride,
    step_table_stride,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i).to(tl.int64)
    used = row >= 0
    position = tl.load(positions_ptr + i, mask=used, other=0)
    fresh = tl.load(fresh_ptr + i, mask=used, other=-1)
    column = position // BLOCK_SIZE
    table = tables_ptr + row * table_stride
    tl.store(table + column, fresh, mask=fresh >= 0)
    known = tl.load(table + column, mask=used & (fresh < 0), other=0)
    block = tl.where(fresh >= 0, fresh, known).to(tl.int64)
    tl.store(ids_ptr + i, tl.load(last_ids_ptr + row, mask=used, other=0))
    tl.store(slots_ptr + i, tl.where(used, block * BLOCK_SIZE + position % BLOCK_SIZE, -1))
    tl.store(lens_ptr + i, tl.where(used, position + 1, 0))
    _rotation(cos_table_ptr, sin_table_ptr, cos_ptr, sin_ptr, position, i, HALF, BLOCK_HALF)
    _sampling(
        params_ptr, row, position + 1, i,
        temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, counters_ptr, WORDS,
    )  # fmt: skip
    count = tl.where(used, column + 1, 0)
    _copy_table(table, step_tables_ptr + i.to(tl.int64) * step_table_stride, count, column, fresh, BLOCK)


@triton.jit
def _mixed_inputs(
    token_ids_ptr,  # [T] int32: the id, or -1: the row's last one
    token_positions_ptr,  # [T] int32
    token_rows_ptr,  # [T] int32
    sequence_rows_ptr,  # [R] int32
    lens_ptr,  # [R] int32
    draw_tokens_ptr,  # [S] int32: place among the tokens
    draw_rows_ptr,  # [S] int32
    last_ids_ptr,
    tables_ptr,
    params_ptr,
    cos_table_ptr,
    sin_table_ptr,
    ids_ptr,
    slots_ptr,
    step_tables_ptr,
    cos_ptr,
    sin_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    counters_ptr,
    num_tokens,
    num_sequences,
    table_stride,
    step_table_stride,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    if i < num_tokens:
        row = tl.load(token_rows_ptr + i).to(tl.int64)
        used = row >= 0
        position = tl.load(token_positions_ptr + i, mask=used, other=0)
        id = tl.load(token_ids_ptr + i, mask=used, other=0)
        last = tl.load(last_ids_ptr + row, mask=used & (id < 0), other=0)
        block = tl.load(tables_ptr + row * table_stride + position // BLOCK_SIZE, mask=used, other=0).to(tl.int64)
        tl.store(ids_ptr + i, tl.where(id < 0, last, id.to(tl.int64)))
        tl.store(slots_ptr + i, tl.where(used, block * BLOCK_SIZE + position % BLOCK_SIZE, -1))
        _rotation(cos_table_ptr, sin_table_ptr, cos_ptr, sin_ptr, position, i.to(tl.int64), HALF, BLOCK_HALF)
    elif i < num_tokens + num_sequences:
        r = i - num_tokens
        row = tl.load(sequence_rows_ptr + r).to(tl.int64)
        length = tl.load(lens_ptr + r)
        count = tl.where(row >= 0, (length + BLOCK_SIZE - 1) // BLOCK_SIZE, 0)
        _copy_table(
            tables_ptr + row * table_stride, step_tables_ptr + r.to(tl.int64) * step_table_stride, count, 0, -1, BLOCK
        )
    else:
        s = i - num_tokens - num_sequences
        row = tl.load(draw_rows_ptr + s).to(tl.int64)
        token = tl.load(draw_tokens_ptr + s)
        length = tl.load(token_positions_ptr + token) + 1
        _sampling(
            params_ptr, row, length, s,
            temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, counters_ptr, WORDS,
        )  # fmt: skip


@triton.jit
def _keep(
    rows_ptr,  # [S] int32
    ids_ptr,  # [S] int64
    last_ids_ptr,  # [rows] int64
    drawn_ptr,  # [S] int64
    num_draws,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + s, mask=s < num_draws, other=-1).to(tl.int64)
    id = tl.load(ids_ptr + s, mask=s < num_draws, other=0)
    tl.store(drawn_ptr + s, id, mask=s < num_draws)
    # A row that could draw nothing (-1) ends; until the host knows, it must not index the embedding with it.
    tl.store(last_ids_ptr + row, tl.maximum(id, 0), mask=row >= 0)


def enter(rows: Rows, updates: Tensor, entries: Tensor) -> None:
    """Write blocks and parameters of rows.

    updates [U, 3] int32: row, column, block.  entries [E, WORDS] int32: row, then its parameters.  A row of -1: skip.
    """
    num = max(updates.shape[0], entries.numel())
    if num:
        _enter[(triton.cdiv(num, _BLOCK),)](
            updates, entries, rows.tables, rows.params, rows.tables.stride(0), updates.shape[0], entries.shape[0],
            WORDS, _BLOCK, num_warps=4,
        )  # fmt: skip


def decode_inputs(
    rows: Rows,
    step_rows: Tensor,
    positions: Tensor,
    fresh: Tensor,
    cos: Tensor,
    sin: Tensor,
    block_size: int,
    inputs: Inputs,
) -> None:
    """Fill inputs for one token, the last drawn, of each of step_rows [B] int32, at positions [B] int32.

    fresh [B] int32: the block of this position where it is the block's first, which is then kept; else -1.
    cos, sin [max positions, E / 2] float32.  Here T = R = S = B.
    """
    half = cos.shape[1]
    _decode_inputs[(step_rows.shape[0],)](
        step_rows, positions, fresh, rows.last_ids, rows.tables, rows.params, cos, sin,
        inputs.ids, inputs.slots, inputs.context_lens, inputs.tables, inputs.cos, inputs.sin,
        inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p, inputs.seeds, inputs.counters,
        rows.tables.stride(0), inputs.tables.stride(0), block_size, half, triton.next_power_of_2(half), WORDS,
        _TABLE_BLOCK, num_warps=4,
    )  # fmt: skip


def mixed_inputs(
    rows: Rows,
    token_ids: Tensor,
    token_positions: Tensor,
    token_rows: Tensor,
    sequence_rows: Tensor,
    draw_tokens: Tensor,
    draw_rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    block_size: int,
    inputs: Inputs,
) -> None:
    """Fill inputs, but for context_lens, which it reads, for any mix of tokens.

    token_ids (-1: the row's last id), token_positions, token_rows [T]; sequence_rows [R]; draw_tokens (places among the
    tokens) and draw_rows [S]; all int32.
    """
    half = cos.shape[1]
    tokens, sequences, draws = token_ids.shape[0], sequence_rows.shape[0], draw_rows.shape[0]
    _mixed_inputs[(tokens + sequences + draws,)](
        token_ids, token_positions, token_rows, sequence_rows, inputs.context_lens, draw_tokens, draw_rows,
        rows.last_ids, rows.tables, rows.params, cos, sin,
        inputs.ids, inputs.slots, inputs.tables, inputs.cos, inputs.sin,
        inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p, inputs.seeds, inputs.counters,
        tokens, sequences, rows.tables.stride(0), inputs.tables.stride(0),
        block_size, half, triton.next_power_of_2(half), WORDS, _TABLE_BLOCK, num_warps=4,
    )  # fmt: skip


def keep(rows: Rows, draw_rows: Tensor, ids: Tensor, drawn: Tensor) -> None:
    """Make ids [S] int64 (-1: none could be drawn) the last ids of draw_rows [S] int32, and copy them to drawn [S]."""
    num = ids.shape[0]
    if num:
        _keep[(triton.cdiv(num, _BLOCK),)](draw_rows, ids, rows.last_ids, drawn, num, _BLOCK, num_warps=4)


def new_rows(count: int, max_blocks: int, device: torch.device) -> Rows:
    """Rows of nobody yet."""
    return Rows(
        torch.zeros(count, dtype=torch.int64, device=device),
        torch.zeros((count, max_blocks), dtype=torch.int32, device=device),
        torch.zeros((count, WORDS), dtype=torch.int32, device=device),
    )


def new_inputs(tokens: int, sequences: int, draws: int, max_blocks: int, half: int, device: torch.device) -> Inputs:
    """Room for steps of up to so many tokens, sequences and draws; half: E / 2."""

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return Inputs(
        ids=room(tokens, dtype=torch.int64),
        slots=room(tokens, dtype=torch.int64),
        cos=room(tokens, half),
        sin=room(tokens, half),
        context_lens=room(sequences, dtype=torch.int32),
        tables=room(sequences, max_blocks, dtype=torch.int32),
        temperature=room(draws),
        top_k=room(draws, dtype=torch.int32),
        top_p=room(draws),
        min_p=room(draws),
        seeds=room(draws, dtype=torch.int64),
        counters=room(draws, dtype=torch.int64),
    )
