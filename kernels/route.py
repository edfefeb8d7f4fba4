"""Which experts a token takes and with what weights, and the tokens of each expert: two small kernels.

    p = softmax(scores[t]);  chosen[t] = the k experts of the largest scores, largest first, of equal ones the first
    weights[t, j] = p[chosen[t, j]], with `normalised` divided by their sum

    order = the pairs t k + j sorted by chosen[t, j], and within an expert by number;  starts[e] = pairs of those before

scores [T, E] any float, computed in float32.  A score that is NaN counts as the lowest: every row, also one of padding,
takes k different experts.  Sorting is counting: the program of an expert counts the pairs of those before it, then
writes its own one behind the other.  No atomics: the order is always the same.
Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vserve.kernels.early import await_inputs, options

_LEAST = tl.constexpr(-3.0e38)
_NOBODY = tl.constexpr(2**31 - 1)


class Routes(NamedTuple):
    """chosen [T, k] int32, the experts of each token; weights [T, k] float32."""

    chosen: Tensor
    weights: Tensor


class Groups(NamedTuple):
    """order [P] int32, the pairs of a token and an expert sorted by expert; starts [E + 1] int32, where each begins."""

    order: Tensor
    starts: Tensor


@triton.jit
def _route(
    scores_ptr,  # [T, E], rows scores_stride apart
    chosen_ptr,  # [T, ACTIVE] int32
    weights_ptr,  # [T, ACTIVE] fp32
    count,  # E
    scores_stride,
    ACTIVE: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    slot = tl.arange(0, SLOTS)
    scores = tl.load(scores_ptr + token * scores_stride + e, mask=e < count, other=0.0).to(tl.float32)
    # False for a NaN
    scores = tl.where(scores > _LEAST, scores, _LEAST)
    scores = tl.where(e < count, scores, float("-inf"))
    free = scores
    chosen = tl.zeros([SLOTS], tl.int32)
    tops = tl.full([SLOTS], float("-inf"), tl.float32)
    for j in range(ACTIVE):
        top, at = tl.max(free, axis=0, return_indices=True)
        chosen = tl.where(slot == j, at, chosen)
        tops = tl.where(slot == j, top, tops)
        free = tl.where(e == at, float("-inf"), free)
    largest = tl.max(scores, axis=0)
    parts = tl.exp(tops - largest)
    total = tl.sum(parts, axis=0) if NORMALISED else tl.sum(tl.exp(scores - largest), axis=0)
    to = token * ACTIVE + slot
    tl.store(chosen_ptr + to, chosen, mask=slot < ACTIVE)
    tl.store(weights_ptr + to, parts / total, mask=slot < ACTIVE)


@triton.jit
def _group(
    chosen_ptr,  # [P] int32
    order_ptr,  # [P] int32
    starts_ptr,  # [E + 1] int32
    pairs,  # P
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    expert = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, pairs, BLOCK):
        taken = tl.load(chosen_ptr + first + i, mask=first + i < pairs, other=_NOBODY)
        before += (taken < expert).to(tl.int32)
    place = tl.sum(before, axis=0)
    tl.store(starts_ptr + expert, place)
    for first in range(0, pairs, BLOCK):
        taken = tl.load(chosen_ptr + first + i, mask=first + i < pairs, other=_NOBODY)
        mine = taken == expert
        ones = mine.to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(ones, axis=0) - 1, first + i, mask=mine)
        place += tl.sum(ones, axis=0)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts_ptr + expert + 1, pairs)


def route(scores: Tensor, active: int, *, normalised: bool, early: bool = False) -> Routes:
    """scores [T, E] (unit stride along E) -> the experts of each token and their weights: see above."""
    tokens, count = scores.shape
    assert 0 < active <= count
    assert scores.stride(1) == 1
    chosen = torch.empty((tokens, active), dtype=torch.int32, device=scores.device)
    weights = torch.empty((tokens, active), dtype=torch.float32, device=scores.device)
    if tokens:
        block = triton.next_power_of_2(count)
        _route[(tokens,)](
            scores, chosen, weights, count, scores.stride(0), active, normalised, block,
            triton.next_power_of_2(active), early, **options(1 if block <= 512 else 4, early),
        )  # fmt: skip
    return Routes(chosen, weights)


def group(chosen: Tensor, count: int, *, early: bool = False) -> Groups:
    """The pairs of chosen [T, k] int32, contiguous, by expert of `count`.  T > 0."""
    pairs = chosen.numel()
    order = torch.empty(pairs, dtype=torch.int32, device=chosen.device)
    starts = torch.empty(count + 1, dtype=torch.int32, device=chosen.device)
    block = min(4096, max(128, triton.next_power_of_2(pairs)))
    _group[(count,)](chosen, order, starts, pairs, block, early, **options(4, early))
    return Groups(order, starts)
