"""The next token of each row, drawn on the device without a sort; penalties, biases and log-probabilities.

With s[v] = logit[v] / temperature, a row's draw is the largest of s[v] + g[v] over the tokens its filters keep, where
g[v] = -log(-log(u[v])) and u[v] is uniform in (0, 1), a hash of (seed, counter, v): the Gumbel-max draw from softmax(s)
over those tokens (Maddison, Tarlow, Minka 2014, arXiv:1411.0030).  At temperature 0 it is the largest logit.  Equal
values: the lowest id.  The draw depends on the row alone: logits, parameters, seed and counter.

Filters, each on what the one before kept, ties at an edge kept whole: top_k, the k largest; min_p, s >= max s +
log(min_p); top_p, the smallest set that holds top_p of the mass (Holtzman et al. 2020, arXiv:1904.09751).  Every kept
set is {s >= edge}, so the edge need not be found: the best token over all is the answer if it is kept, which one pass
tells (count and mass above it).  If it is not, nothing at or below it is, and the same noise is asked for its best
token above: the last answer is exactly the best kept token.  Rejection by pivot: FlashInfer 2025, arXiv:2501.01005.
Only a top_k that rejects, or that top_p measures on, has its edge searched, by halving the order of floats.

logits [B, V] float32, V up to 2^31 - 1.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GREEDY_BELOW = 1e-5
"""A temperature under this is 0: dividing by it would only overflow."""
SPAN = 2048
"""Logits that one program of the first pass reads."""
BLOCK = 4096
"""Logits that the one program of a row reads at a time."""
WARPS = 16
PARTS = 5
"""Numbers that it hands on: best score and its place, largest logit, sum of weights, 1 if a logit is not a number."""


@triton.jit
def _mix(x):
    # The finaliser of MurmurHash3: every input bit changes every output bit.
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _row_keys(seed, counter):
    # seed, counter int64 scalars -> two 32-bit keys of this draw
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    key = _mix(low ^ 0x9E3779B9) ^ high
    key = _mix(key) + counter.to(tl.uint32)
    key = _mix(key)
    return key, _mix(key ^ 0x7F4A7C15)


@triton.jit
def _gumbel(v, key, other):
    # v int32 token ids -> one number each.  From -log(1 - u): small u, which decide, keep all their digits.
    bits = _mix(_mix(v.to(tl.uint32) * 0x9E3779B1 + key) ^ other)
    u = (bits.to(tl.float32) + 0.5) * 2.3283064e-10
    u = tl.minimum(u, 0.99999994)
    waiting = tl.where(u < 1e-3, u + u * u * (0.5 + u * 0.33333334), -tl.log(1.0 - u))
    return -tl.log(waiting)


@triton.jit
def _first_largest(scores, v):
    # The largest score, and the lowest id that has it; NaN never wins
    best = tl.max(scores, axis=0)
    return best, tl.min(tl.where(scores == best, v, 2147483647), axis=0)


@triton.jit
def _scan(
    logits_ptr,  # [B, V], rows stride apart
    temperature_ptr,  # [B]
    top_p_ptr,  # [B]
    seeds_ptr,  # [B] int64
    counters_ptr,  # [B] int64
    parts_ptr,  # [B, spans, PARTS] float32
    stride,
    num_tokens,  # V
    num_spans,
    GREEDY_BELOW: tl.constexpr,
    SPAN: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    span = tl.program_id(1)
    v = span * SPAN + tl.arange(0, SPAN)
    logits = tl.load(logits_ptr + row * stride + v, mask=v < num_tokens, other=float("-inf"))
    temperature = tl.load(temperature_ptr + row)
    largest = tl.max(logits, axis=0)
    broken = tl.max((logits != logits).to(tl.int32), axis=0)
    mass = 0.0
    if temperature < GREEDY_BELOW:
        best, place = _first_largest(logits, v)
    else:
        inverse = 1.0 / temperature
        if tl.load(top_p_ptr + row) < 1.0:
            # A span of nothing but -inf has no weight; -inf - -inf would make it NaN.
            base = tl.where(largest == float("-inf"), 0.0, largest)
            mass = tl.sum(tl.exp((logits - base) * inverse), axis=0)
        key, other = _row_keys(tl.load(seeds_ptr + row), tl.load(counters_ptr + row))
        best, place = _first_largest(logits * inverse + _gumbel(v, key, other), v)
    to = parts_ptr + (row * num_spans + span) * PARTS
    tl.store(to, best)
    # Bits of an int32 in a float32 slot: a float holds no id over 2^24
    tl.store(to + 1, place.to(tl.float32, bitcast=True))
    tl.store(to + 2, largest)
    tl.store(to + 3, mass)
    tl.store(to + 4, broken.to(tl.float32))


@triton.jit
def _order(x):
    # float32 -> int32 in the same order
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(order):
    # The inverse of _order
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _kth_largest(row_ptr, num_tokens, k, top, tops, BLOCK: tl.constexpr):
    # A value with k logits of row_ptr [V] at or above it, or, where ties leave none, the k-th largest.  top: the
    # largest logit; tops [spans]: the largest of each span, which bound the k-th from below if they are k or more
    low = tl.full([], -2147483648, tl.int64)  # count(>= low) >= k, always
    high = _order(top).to(tl.int64) + 1  # count(>= high) < k
    orders = _order(tops)
    above = tl.sum((orders[None, :] > orders[:, None]).to(tl.int32), axis=1)
    bound = tl.min(tl.where(above < k, orders, 2147483647), axis=0)
    if k <= tl.sum((orders >= bound).to(tl.int32), axis=0):
        low = bound.to(tl.int64)
    while high - low > 1:
        # Three cuts a pass: a quarter of the interval is left.
        step = tl.maximum((high - low) // 4, 1)
        a = low + step
        b = tl.minimum(a + step, high - 1)
        c = tl.minimum(b + step, high - 1)
        count_a = tl.zeros([BLOCK], tl.int32)
        count_b = tl.zeros([BLOCK], tl.int32)
        count_c = tl.zeros([BLOCK], tl.int32)
        for start in range(0, num_tokens, BLOCK):
            v = start + tl.arange(0, BLOCK)
            order = _order(tl.load(row_ptr + v, mask=v < num_tokens, other=float("-inf")))
            inside = v < num_tokens
            count_a += ((order >= a.to(tl.int32)) & inside).to(tl.int32)
            count_b += ((order >= b.to(tl.int32)) & inside).to(tl.int32)
            count_c += ((order >= c.to(tl.int32)) & inside).to(tl.int32)
        num_a = tl.sum(count_a, axis=0)
        num_b = tl.sum(count_b, axis=0)
        num_c = tl.sum(count_c, axis=0)
        if num_c >= k:
            low = c
            if num_c == k:
                high = c + 1
        elif num_b >= k:
            low = b
            high = c
            if num_b == k:
                high = b + 1
        elif num_a >= k:
            low = a
            high = b
            if num_a == k:
                high = a + 1
        else:
            high = a
    return _value(low.to(tl.int32))


@triton.jit
def _mass_from(row_ptr, num_tokens, edge, top, inverse, BLOCK: tl.constexpr):
    # Sum of exp((logit - top) / temperature) over logits >= edge
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_tokens, BLOCK):
        v = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + v, mask=v < num_tokens, other=float("-inf"))
        mass += tl.where(logits >= edge, tl.exp((logits - top) * inverse), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def _above(row_ptr, num_tokens, pivot, top, inverse, BLOCK: tl.constexpr):
    # How many logits are greater than pivot, and the sum of their exp((logit - top) / temperature)
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_tokens, BLOCK):
        v = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + v, mask=v < num_tokens, other=float("-inf"))
        greater = logits > pivot
        count += greater.to(tl.int32)
        mass += tl.where(greater, tl.exp((logits - top) * inverse), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _best_above(row_ptr, num_tokens, pivot, edge, inverse, key, other, BLOCK: tl.constexpr):
    # The id of the best score among logits greater than pivot and not under edge
    best_score = tl.full([BLOCK], float("-inf"), tl.float32)
    best_place = tl.zeros([BLOCK], tl.int32) + 2147483647
    for start in range(0, num_tokens, BLOCK):
        v = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + v, mask=v < num_tokens, other=float("-inf"))
        free = (logits > pivot) & (logits >= edge)
        score = tl.where(free, logits * inverse + _gumbel(v, key, other), float("-inf"))
        better = score > best_score
        best_score = tl.where(better, score, best_score)
        best_place = tl.where(better, v, best_place)
    best = tl.max(best_score, axis=0)
    return tl.min(tl.where(best_score == best, best_place, 2147483647), axis=0)


@triton.jit
def _settle(
    logits_ptr,  # [B, V], rows stride apart
    temperature_ptr,  # [B]
    top_k_ptr,  # [B] int32
    top_p_ptr,  # [B]
    min_p_ptr,  # [B]
    seeds_ptr,  # [B] int64
    counters_ptr,  # [B] int64
    parts_ptr,  # [B, spans, PARTS] float32
    ids_ptr,  # [B] int64
    stride,
    num_tokens,  # V
    num_spans,
    GREEDY_BELOW: tl.constexpr,
    BLOCK_SPANS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    span = tl.arange(0, BLOCK_SPANS)
    mask = span < num_spans
    part = parts_ptr + (row * num_spans + span) * PARTS
    scores = tl.load(part, mask=mask, other=float("-inf"))
    places = tl.load(part + 1, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    tops = tl.load(part + 2, mask=mask, other=float("-inf"))
    broken = tl.max(tl.load(part + 4, mask=mask, other=0.0), axis=0)
    top = tl.max(tops, axis=0)
    best = tl.max(scores, axis=0)
    token = tl.min(tl.where((scores == best) & mask, places, 2147483647), axis=0)
    if (broken > 0.0) | (top == float("inf")) | (top == float("-inf")):
        tl.store(ids_ptr + row, tl.full([], -1, tl.int64))
        return
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    limits_k = (top_k > 0) & (top_k < num_tokens)
    limits_p = top_p < 1.0
    if (temperature < GREEDY_BELOW) | ((~limits_k) & (~limits_p) & (min_p <= 0.0)):
        tl.store(ids_ptr + row, token.to(tl.int64))
        return

    inverse = 1.0 / temperature
    masses = tl.load(part + 3, mask=mask, other=0.0)
    mass = tl.sum(tl.where(tops > float("-inf"), masses * tl.exp((tops - top) * inverse), 0.0), axis=0)
    edge = tl.full([], float("-inf"), tl.float32)
    if min_p > 0.0:
        edge = top + tl.log(min_p) * temperature
    has_edge_k = 0
    if limits_p & limits_k:
        edge = tl.maximum(edge, _kth_largest(row_ptr, num_tokens, top_k, top, tops, BLOCK))
        has_edge_k = 1
    if limits_p & (edge > float("-inf")):
        mass = _mass_from(row_ptr, num_tokens, edge, top, inverse, BLOCK)
    key, other = _row_keys(tl.load(seeds_ptr + row), tl.load(counters_ptr + row))
    searching = 1
    while searching == 1:
        pivot = tl.load(row_ptr + token)
        # The largest logit is always kept, whatever rounding says of its mass.
        kept = (pivot >= edge) | (pivot == top)
        if kept & (limits_p | (limits_k & (has_edge_k == 0))):
            count, above = _above(row_ptr, num_tokens, pivot, top, inverse, BLOCK)
            kept = (((count < top_k) | (~limits_k)) & ((above < top_p * mass) | (~limits_p))) | (count == 0)
        if kept:
            searching = 0
        else:
            if limits_k & (has_edge_k == 0):
                # One search costs less than rounds of draws from a flat distribution.
                edge = tl.maximum(edge, _kth_largest(row_ptr, num_tokens, top_k, top, tops, BLOCK))
                has_edge_k = 1
            token = _best_above(row_ptr, num_tokens, pivot, edge, inverse, key, other, BLOCK)
    tl.store(ids_ptr + row, token.to(tl.int64))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    counters: Tensor,
) -> Tensor:
    """One id for each row of logits [B, V] float32 -> [B] int64; -1 for a row with a NaN, an +inf or nothing but -inf.

    temperature, top_p, min_p [B] float32, top_k [B] int32; top_k 0, top_p 1 and min_p 0 are off.  seeds, counters [B]
    int64: a draw is a function of both (the counter's low 32 bits) and of its row alone.
    """
    rows, num_tokens = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return ids
    spans = triton.cdiv(num_tokens, SPAN)
    parts = torch.empty((rows, spans, PARTS), dtype=torch.float32, device=logits.device)
    _scan[(rows, spans)](
        logits, temperature, top_p, seeds, counters, parts, logits.stride(0), num_tokens, spans, GREEDY_BELOW, SPAN,
        PARTS, num_warps=8,
    )  # fmt: skip
    _settle[(rows,)](
        logits, temperature, top_k, top_p, min_p, seeds, counters, parts, ids, logits.stride(0), num_tokens, spans,
        GREEDY_BELOW, triton.next_power_of_2(spans), min(BLOCK, triton.next_power_of_2(num_tokens)), PARTS,
        num_warps=WARPS,
    )  # fmt: skip
    return ids


@triton.jit
def _bias_and_ban(
    logits_ptr,  # [B, V], rows stride apart; changed in place
    rows_ptr,  # [B] int64
    lengths_ptr,  # [B] int64
    bias_ids_ptr,  # [S, NB] int32
    biases_ptr,  # [S, NB]
    banned_ids_ptr,  # [S, NS] int32
    free_from_ptr,  # [S] int64
    stride,
    num_biases,  # NB
    num_banned,  # NS
    BLOCK_BIASES: tl.constexpr,
    BLOCK_BANNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state = tl.load(rows_ptr + row)
    if state < 0:
        return
    i = tl.arange(0, BLOCK_BIASES)
    token = tl.load(bias_ids_ptr + state * num_biases + i, mask=i < num_biases, other=-1)
    used = token >= 0
    bias = tl.load(biases_ptr + state * num_biases + i, mask=used, other=0.0)
    to = logits_ptr + row * stride + token
    tl.store(to, tl.load(to, mask=used, other=0.0) + bias, mask=used)
    if tl.load(lengths_ptr + row) < tl.load(free_from_ptr + state):
        # A banned id may have a bias too: its store must come after.
        tl.debug_barrier()
        j = tl.arange(0, BLOCK_BANNED)
        banned = tl.load(banned_ids_ptr + state * num_banned + j, mask=j < num_banned, other=-1)
        tl.store(logits_ptr + row * stride + banned, float("-inf"), mask=banned >= 0)


@triton.jit
def _penalise(
    logits_ptr,  # [B, V], rows stride apart; changed in place
    rows_ptr,  # [B] int64
    counts_ptr,  # [S, V] int32
    repetition_ptr,  # [S]
    presence_ptr,  # [S]
    frequency_ptr,  # [S]
    stride,
    num_tokens,  # V
    SPAN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state = tl.load(rows_ptr + row)
    if state < 0:
        return
    v = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    inside = v < num_tokens
    seen = tl.load(counts_ptr + state * num_tokens + v, mask=inside, other=0)
    touched = seen != 0
    logits = tl.load(logits_ptr + row * stride + v, mask=touched, other=0.0)
    repetition = tl.load(repetition_ptr + state)
    logits = tl.where(logits > 0, logits / repetition, logits * repetition)
    times = (seen >> 1).to(tl.float32)
    logits -= tl.load(frequency_ptr + state) * times
    logits -= tl.load(presence_ptr + state) * (times > 0).to(tl.float32)
    tl.store(logits_ptr + row * stride + v, logits, mask=touched)


def bias_and_ban(
    logits: Tensor,
    rows: Tensor,
    lengths: Tensor,
    bias_ids: Tensor,
    biases: Tensor,
    banned_ids: Tensor,
    free_from: Tensor,
) -> None:
    """Change logits [B, V] float32 in place: add each row's biases, then set its banned ids to -inf while it is short.

    rows [B] int64: place of each row's state in the tables below, -1 for a row to leave alone.  bias_ids [S, NB] int32
    (distinct in a row, padded with -1), biases [S, NB] float32; banned_ids [S, NS] int32 (padded with -1) count while
    lengths [B] int64 < free_from [S] int64.
    """
    num_biases, num_banned = bias_ids.shape[1], banned_ids.shape[1]
    if logits.shape[0]:
        _bias_and_ban[(logits.shape[0],)](
            logits, rows, lengths, bias_ids, biases, banned_ids, free_from, logits.stride(0), num_biases, num_banned,
            triton.next_power_of_2(num_biases), triton.next_power_of_2(num_banned), num_warps=4,
        )  # fmt: skip


def penalise(
    logits: Tensor, rows: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Change logits [B, V] float32 in place: repetition over prompt and answer, frequency and presence over the answer.

    rows [B] int64: place of each row's state, -1 for a row to leave alone.  counts [S, V] int32: twice the number of
    times that the token was generated, plus 1 if it is in the prompt.  repetition (1 is off), presence, frequency [S].
    """
    batch, num_tokens = logits.shape
    if batch:
        _penalise[(batch, triton.cdiv(num_tokens, SPAN))](
            logits, rows, counts, repetition, presence, frequency, logits.stride(0), num_tokens, SPAN, num_warps=8
        )


@triton.jit
def _count_tokens(
    counts_ptr,  # [S, V] int32
    rows_ptr,  # [B] int64
    ids_ptr,  # [B] int64
    num_rows,
    num_tokens,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + i, mask=i < num_rows, other=-1)
    token = tl.load(ids_ptr + i, mask=i < num_rows, other=-1)
    used = (row >= 0) & (token >= 0)
    to = counts_ptr + row * num_tokens + token
    tl.store(to, tl.load(to, mask=used, other=0) + 2, mask=used)


def count_tokens(counts: Tensor, rows: Tensor, ids: Tensor) -> None:
    """Add one generated token ids [B] int64 (-1: none) to counts [S, V] of penalise, at rows [B] int64 (-1: none).

    The rows that are not -1 must differ.
    """
    if len(ids):
        _count_tokens[(triton.cdiv(len(ids), 128),)](counts, rows, ids, len(ids), counts.shape[1], 128, num_warps=4)


@triton.jit
def _token_logprobs(
    logits_ptr,  # [B, V], rows stride apart
    ids_ptr,  # [B] int64
    logprobs_ptr,  # [B]
    ranks_ptr,  # [B] int32
    stride,
    num_tokens,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + row)
    if token < 0:
        return
    row_ptr = logits_ptr + row * stride
    score = tl.load(row_ptr + token)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_tokens, BLOCK):
        v = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + v, mask=v < num_tokens, other=float("-inf"))
        count += (logits > score).to(tl.int32)
        new = tl.maximum(largest, logits)
        base = tl.where(new == float("-inf"), 0.0, new)
        mass = mass * tl.exp(largest - base) + tl.exp(logits - base)
        largest = new
    top = tl.max(largest, axis=0)
    total = tl.sum(mass * tl.exp(largest - top), axis=0)
    tl.store(logprobs_ptr + row, score - top - tl.log(total))
    tl.store(ranks_ptr + row, tl.sum(count, axis=0) + 1)


def token_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Natural log-probability [B] float32 and rank [B] int32 of ids [B] int64 under softmax(logits [B, V] float32).

    Rank 1 is the most likely; ties share the better rank.  Rows of id -1 hold anything.
    """
    rows, num_tokens = logits.shape
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows:
        _token_logprobs[(rows,)](
            logits, ids, logprobs, ranks, logits.stride(0), num_tokens, min(BLOCK, triton.next_power_of_2(num_tokens)),
            num_warps=WARPS,
        )  # fmt: skip
    return logprobs, ranks
