"""Texts of different lengths as one batch of an encoder: their tokens one behind the other, without padding.

Only attention needs texts side by side: runs of texts of about one length form a ``Group``, and only there, where the
lengths differ, is anything padded.  Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

PADDING: Final = 1.25
"""Most slots of a group on a CPU, over its tokens: a slot costs what a token costs, a group a few operations."""


@dataclass(frozen=True, slots=True)
class Group:
    """texts sequences on rows start to stop of the batch, padded to length for attention.

    gather [texts * length] int64: the row of every slot, any row where a slot is padding.  scatter [stop - start]
    int64: the slot of every row.  mask [texts, 1, 1, length] bool: the slots that are tokens.  All three are None when
    every text has that length: then nothing is padded, and rows are slots.
    """

    start: int
    stop: int
    texts: int
    length: int
    gather: Tensor | None = None
    scatter: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PackedTexts:
    """T tokens of B texts.  ids, types, places [T] int64: id, token type and place in its text of every token.

    lengths, starts [B] int64: tokens of each text and the row of its first.  sizes: lengths, on the host.
    """

    ids: Tensor
    types: Tensor
    places: Tensor
    lengths: Tensor
    starts: Tensor
    sizes: tuple[int, ...]
    groups: tuple[Group, ...]


def pack(
    texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]], device: torch.device, padding: float | None = None
) -> PackedTexts:
    """The texts, each at least one id, best sorted by length; types: as long as the ids, or () for type 0 throughout.

    padding: as PADDING; by default that on a CPU, and on a GPU one group whatever it costs: launches cost more there.
    """
    sizes = tuple(map(len, texts))
    if padding is None:
        padding = PADDING if device.type == "cpu" else float("inf")
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    kinds = torch.zeros_like(ids)
    if any(types):
        kinds = torch.tensor([t for text, kind in zip(texts, types, strict=True) for t in (kind or [0] * len(text))])
    lengths = torch.tensor(sizes, dtype=torch.int64)
    starts = lengths.cumsum(0) - lengths
    places = torch.arange(ids.shape[0]) - starts.repeat_interleave(lengths)
    groups = []
    first = row = 0
    for texts_in_group in _runs(sizes, padding):
        members = sizes[first : first + texts_in_group]
        groups.append(_group(row, members, device))
        first += texts_in_group
        row += sum(members)
    return PackedTexts(
        ids.to(device), kinds.to(device), places.to(device), lengths.to(device), starts.to(device), sizes, tuple(groups)
    )


def _runs(sizes: Sequence[int], padding: float) -> list[int]:
    """How many texts each group takes, in order."""
    runs: list[int] = []
    texts = tokens = longest = 0
    for size in sizes:
        most = max(longest, size)
        if texts and most * (texts + 1) > padding * (tokens + size):
            runs.append(texts)
            texts = tokens = 0
            most = size
        texts, tokens, longest = texts + 1, tokens + size, most
    return [*runs, texts] if texts else runs


def _group(start: int, sizes: Sequence[int], device: torch.device) -> Group:
    stop, length = start + sum(sizes), max(sizes)
    if min(sizes) == length:
        return Group(start, stop, len(sizes), length)
    lengths = torch.tensor(sizes, dtype=torch.int64)
    slots = torch.arange(length)
    mask = slots < lengths[:, None]
    firsts = (lengths.cumsum(0) - lengths)[:, None] + start
    gather = torch.where(mask, firsts + slots, start).view(-1)
    scatter = mask.view(-1).nonzero().view(-1)
    return Group(
        start,
        stop,
        len(sizes),
        length,
        gather.to(device),
        scatter.to(device),
        mask[:, None, None, :].to(device),
    )
