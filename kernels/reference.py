"""Every operation of the decoder in plain PyTorch: the CPU back end, and the oracle of the compiled kernels.

The contracts are those of ``Ops`` in vserve/model/ops.py, which this file must not import.  Works on any device, in
float32, bfloat16 and float16; owns no state.  Written for few, large calls: on a CPU a call of PyTorch takes 1 to 5
microseconds, and a decode step of a small model is made of hundreds of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional
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


LARGEST_E4M3 = 448.0
LEAST_SCALE = 2.0**-100
"""Of a head of zeros, whose scale would be 0."""
MOST_SCALE = 2.0**119
"""Of a head with an infinity."""


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
class Pieces:
    """The pieces of a step, and order: where each token's row lies in their concatenated results; None: in place."""

    pieces: tuple[Piece, ...]
    order: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What the layers of one step share.

    cos [T, 1, 1, R * E / 2]; sin [T, 1, 2, R * E / 2], negated in the first half; slots [T] int64.
    tables [R, M] int64, query_lens, contexts, block_size: as plan() had them.
    by_window: the pieces for layers with each window, made when the first such layer asks.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    tables: Tensor
    query_lens: tuple[int, ...]
    contexts: tuple[int, ...]
    block_size: int
    by_window: dict[int | None, Pieces] = field(default_factory=dict)

    def pieces(self, window: int | None) -> Pieces:
        """How the step's queries attend in a layer with this window."""
        if window is not None and max(self.contexts, default=0) <= window:
            window = None
        found = self.by_window.get(window)
        if found is None:
            found = self.by_window[window] = _pieces(
                self.tables, self.query_lens, self.contexts, self.block_size, window
            )
        return found


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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32.  Ba et al. 2016, arXiv:1607.06450."""
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual); the sum replaces residual."""
    residual.add_(x)
    return layer_norm(residual, weight, bias, eps), residual


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [T, 2F], gate first -> [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate).mul_(up)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of gate_up [T, 2F], gate first -> [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _ACTIVATIONS[activation](gate).mul_(up)


def activate(x: Tensor, activation: str) -> Tensor:
    """activation(x): Hendrycks and Gimpel 2016, arXiv:1606.08415, for gelu and its approximation by tanh."""
    return _ACTIVATIONS[activation](x)


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
    """The rotations of the step; its gather indices and masks are made when a layer asks.

    query_starts and context_lens repeat what the two tuples say, for back ends that must not read the device.
    """
    sines = sin.index_select(0, positions)
    return Plan(
        cos=cos.index_select(0, positions)[:, None, None],
        sin=torch.stack((-sines, sines), dim=1).unsqueeze(1),
        slots=slots,
        tables=block_tables.to(torch.int64),  # block * block_size passes 2**31 on a cache of that many slots
        query_lens=query_lens,
        contexts=context_lens_host,
        block_size=block_size,
    )


def _pieces(
    tables: Tensor, query_lens: tuple[int, ...], contexts: tuple[int, ...], block_size: int, window: int | None
) -> Pieces:
    """Decoding sequences of like length are batched; each chunk goes alone."""
    decoding: list[tuple[int, int, int]] = []
    pieces: list[Piece] = []
    start = 0
    for sequence, (queries, keys) in enumerate(zip(query_lens, contexts, strict=True)):
        if queries == 1:
            decoding.append((keys, sequence, start))
        elif queries:
            pieces += _chunk(tables[sequence], keys, block_size, start, queries, window)
        start += queries
    if window is not None:
        pieces += [
            _decode_windowed(batch, contexts, tables, block_size, window)
            for batch in _batches([(min(keys, window), sequence, row) for keys, sequence, row in decoding])
        ]
        return Pieces(tuple(pieces), _order(pieces, tables.device))
    if len(decoding) <= ALONE_SEQUENCES and tables.device.type == "cpu":
        found = [(entry, _run(tables[entry[1]], entry[0], block_size)) for entry in decoding]
        pieces += [Piece((row, row + 1), run, 1) for (_, _, row), run in found if run is not None]
        decoding = [entry for entry, run in found if run is None]
    pieces += [_decode(batch, tables, block_size) for batch in _batches(decoding)]
    return Pieces(tuple(pieces), _order(pieces, tables.device))


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


def _chunk(table: Tensor, keys: int, block_size: int, start: int, queries: int, window: int | None) -> Iterator[Piece]:
    """Pieces of one sequence's chunk, which has so many keys; the chunk's tokens are rows start and on."""
    slots = key_slots(table, keys, block_size)
    if queries == keys and (window is None or keys <= window):
        yield Piece((start, start + queries), slots, 1, causal=True)
        return
    run = max(1, MASK_LIMIT // (keys if window is None else min(keys, window + queries)))
    for first in range(0, queries, run):
        last = min(queries, first + run)
        seen = keys - queries + last
        begin = 0 if window is None else max(0, seen - (last - first) + 1 - window)
        mask = slots.new_full((last - first, seen - begin), -torch.inf, dtype=torch.float32)
        own = seen - begin - (last - first)  # the key of the run's first token; row i sees up to own + i
        unseen = mask.triu(own + 1)
        if window is not None:
            unseen += mask.tril_(own - window)
        yield Piece((start + first, start + last), slots[begin:seen], 1, unseen)


def _decode_windowed(
    batch: list[tuple[int, int, int]], contexts: tuple[int, ...], tables: Tensor, block_size: int, window: int
) -> Piece:
    """One query a sequence over its last `window` keys; batch: (keys seen, sequence, row)."""
    device = tables.device
    longest = max(keys for keys, _, _ in batch)
    sequences = torch.tensor([sequence for _, sequence, _ in batch], device=device)
    seen = torch.tensor([keys for keys, _, _ in batch], device=device).unsqueeze(1)
    ends = torch.tensor([contexts[sequence] for _, sequence, _ in batch], device=device).unsqueeze(1)
    place = torch.arange(longest, device=device)
    unseen = place >= seen
    keys = torch.where(unseen, ends - 1, ends - seen + place)
    slots = tables[sequences].gather(1, keys // block_size) * block_size + keys % block_size
    mask = None
    if bool(unseen.any()):
        mask = torch.zeros(unseen.shape, device=device).masked_fill_(unseen, -torch.inf)[:, None, None]
    return Piece(_place([row for _, _, row in batch], device), slots.reshape(-1), len(batch), mask)


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
    return Piece(_place(rows, device), slots.reshape(-1), len(batch), mask)


def _place(rows: list[int], device: torch.device) -> tuple[int, int] | Tensor:
    """See Piece.rows."""
    in_place = rows[-1] - rows[0] == len(rows) - 1
    return (rows[0], rows[-1] + 1) if in_place else torch.tensor(rows, device=device)


def _order(pieces: list[Piece], device: torch.device) -> Tensor | None:
    """See Plan.order."""
    rows: list[int] = []
    for piece in pieces:
        rows += range(*piece.rows) if isinstance(piece.rows, tuple) else piece.rows.tolist()
    if rows == list(range(len(rows))):
        return None
    return torch.tensor(rows, device=device).argsort()


def rope_and_write(
    qkv: Tensor,
    pairs: Tensor,
    plan: object,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    rotation: int = 0,
    scales: Tensor | None = None,
    given: tuple[float, float] | None = None,
) -> Tensor:
    """Rotate the queries and keys of qkv [T, (Hq + 2 Hk) * E] in place; write keys and values to their slots of pairs.

    y = x * cos + (-x_high, x_low) * sin in float32: Su et al. 2021, arXiv:2104.09864, in the layout of two halves.
    With norms [E] each head is RMS-normalised first.  Returns the queries [T, Hq, E], a view of qkv.
    Pairs of e4m3 have scales [num_blocks, Hk, block_size, 2] bf16, written as ``reduced`` says.
    """
    assert isinstance(plan, Plan)
    tokens, width = qkv.shape
    kv_heads, head_dim = pairs.shape[3:]
    keys_at = width - 2 * kv_heads * head_dim
    values_at = width - kv_heads * head_dim
    if q_norm is not None and k_norm is not None:
        for norm, begin, end in ((q_norm, 0, keys_at), (k_norm, keys_at, values_at)):
            heads = qkv[:, begin:end]
            heads.copy_(rms_norm(heads.reshape(-1, head_dim), norm, eps).view(tokens, -1))
    cos, sin, half = plan.cos, plan.sin, head_dim // 2
    if cos.shape[-1] != half:
        cos, sin = (table.narrow(-1, rotation * half, half) for table in (cos, sin))
    turning = qkv[:, :values_at].view(tokens, -1, 2, half)
    if qkv.dtype == torch.float32:
        swapped = turning.flip(2)
        turning.mul_(cos).addcmul_(swapped, sin)
    else:
        wide = turning.to(torch.float32)
        turning.copy_(wide * cos + wide.flip(2) * sin)
    fresh = qkv[:, keys_at:]
    if scales is not None:
        fresh, scale = reduced(fresh.view(tokens, 2, kv_heads, head_dim), given)
        scales[plan.slots // plan.block_size, :, plan.slots % plan.block_size] = scale
        # As bytes: torch copies no e4m3 numbers to places of an index.
        fresh, pairs = fresh.view(torch.uint8).view(tokens, -1), pairs.view(torch.uint8)
    elif pairs.dtype != fresh.dtype:
        fresh = fresh.to(pairs.dtype)
    pairs.view(-1, 2 * kv_heads * head_dim).index_copy_(0, plan.slots, fresh)
    return qkv[:, :keys_at].view(tokens, -1, head_dim)


def reduced(x: Tensor, given: tuple[float, float] | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values x [T, 2, Hk, E] as e4m3 numbers of that shape, and their scales [T, Hk, 2] bf16.

    scale = max |x| / 448 of each head, or one given for keys and one for values; number = x / scale, at most 448.  A
    head with a NaN has a NaN for its scale.  e4m3: Micikevicius et al. 2022, arXiv:2209.05433.
    """
    wide = x.to(torch.float32)
    most = wide.abs().amax(-1)
    if given is None:
        scale = (most / LARGEST_E4M3).clamp_(LEAST_SCALE, MOST_SCALE)
    else:
        scale = torch.where(most.isnan(), most, torch.tensor(given, device=x.device)[:, None])
    scale = scale.to(torch.bfloat16)
    numbers = (wide / scale.to(torch.float32).unsqueeze(-1)).clamp_(-LARGEST_E4M3, LARGEST_E4M3)
    return numbers.to(torch.float8_e4m3fn), scale.transpose(1, 2)


def restored(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """numbers e4m3 [N, 2, Hk, E] times scale [N, Hk, 2] -> [N, 2, Hk, E] of dtype.  NaN among the numbers is 480.

    By its bits, which takes a CPU a fifth of the time of torch's own conversion: an e4m3 number is a float32 one whose
    exponent is 120 too small.
    """
    bits = numbers.view(torch.int8).to(torch.int32).bitwise_left_shift_(20).bitwise_and_(-0x78100000)
    # Not one factor of both: a large scale times 2^120 is infinite.
    wide = bits.view(torch.float32).mul_(2.0**120).mul_(scale.to(torch.float32).transpose(1, 2).unsqueeze(-1))
    return wide.to(dtype)


def paged_attention(
    q: Tensor,
    pairs: Tensor,
    plan: object,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k) v of q [T, Hq, E] over the last `window` keys up to each token's own -> [T, Hq * E]."""
    assert isinstance(plan, Plan)
    made = plan.pieces(window)
    parts = [_attend(q, pairs, piece, scale, softcap, scales) for piece in made.pieces]
    if len(parts) == 1 and made.order is None:
        return parts[0]
    joined = torch.cat(parts) if parts else q.new_empty((0, q.shape[1] * q.shape[2]))
    return joined if made.order is None else joined.index_select(0, made.order)


def _attend(
    q: Tensor, pairs: Tensor, piece: Piece, scale: float, softcap: float | None, scales: Tensor | None
) -> Tensor:
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
    if scales is not None:
        slots = restored(slots.view(-1, 2, kv_heads, head_dim), _scales_of(piece.slots, scales), q.dtype)
    elif slots.dtype != q.dtype:
        slots = slots.to(q.dtype)
    key, value = slots.view(piece.sequences, -1, 2, kv_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    query = q.view(piece.sequences, -1, heads, head_dim).transpose(1, 2)
    if softcap is not None:
        return _capped(query, key, value, piece, scale, softcap).transpose(1, 2).reshape(rows, heads * head_dim)
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=piece.mask if piece.mask is None or q.dtype == torch.float32 else piece.mask.to(q.dtype),
        is_causal=piece.causal,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return out.transpose(1, 2).reshape(rows, heads * head_dim)


def _scales_of(slots: tuple[int, int] | Tensor, scales: Tensor) -> Tensor:
    """The scales [N, Hk, 2] of N slots, given as in Piece.slots."""
    block_size = scales.shape[2]
    places = torch.arange(*slots, device=scales.device) if isinstance(slots, tuple) else slots
    return scales[places // block_size, :, places % block_size]


def _capped(query: Tensor, key: Tensor, value: Tensor, piece: Piece, scale: float, softcap: float) -> Tensor:
    """Attention whose scores are softcap * tanh(score / softcap), which torch's own cannot do; arXiv:2408.00118."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (heads.repeat_interleave(group, dim=1) for heads in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)).to(torch.float32).mul_(scale / softcap).tanh_().mul_(softcap)
    if piece.causal:
        scores += torch.full(scores.shape[-2:], -torch.inf, device=scores.device).triu_(1)
    elif piece.mask is not None:
        scores += piece.mask
    return torch.matmul(scores.softmax(dim=-1).to(value.dtype), value)
