"""The shapes of steps on a GPU: every step is padded to one of a few, so that a captured graph serves it.

Owns the buckets and where each field of a step lies in its words; knows no tensor and no request.  Pure; any thread.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

ENTRY_WORDS = 8
"""Words of a row's parameters as they travel; the same as vserve.kernels.rows.WORDS."""
UPDATE_WORDS = 3
ALIGN = 4
"""Fields start at multiples of 16 bytes: kernels are compiled for pointers aligned that well."""

DECODE_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
MIXED_DECODES = (0, 32, 128)
"""Decodes that a mixed step has room for, below the number of rows."""
MIXED_SIZES = (256, 512, 640, 1024, 1280, 1536, 2048)
"""Tokens of mixed steps that cost little for their size: on an H100 an 8B step of 256 takes 7.7 ms and one of 288 9.5,
512 10.8 and 544 13.0, 640 13.3 and 768 17.2, 832 21.0 and 1024 19.7, since a product is cut into tiles."""
TOKEN_BUCKETS = (16, 32, 64, 128, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
"""Tokens of a mixed step that has a graph."""
COARSE_TOKENS = 64
"""Steps of more tokens than the largest bucket are padded to a multiple of this."""
MAX_GRAPH_TOKENS = 2048
"""Tokens of the largest step that is worth a graph."""
MIXED_CHUNKS = 32
"""Prompt chunks that a step of a bucket has room for."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step has room for: tokens, and sequences, the first `decodes` of them of one token each.

    chunks 0: a step of decodes alone, as many as tokens.
    """

    tokens: int
    decodes: int
    chunks: int

    @property
    def sequences(self) -> int:
        """Decodes and chunks; each may draw, so it is the number of draws too."""
        return self.decodes + self.chunks

    @property
    def is_decode(self) -> bool:
        """True for a step of one token a sequence, all of them drawn by the step before."""
        return not self.chunks


@dataclass(frozen=True, slots=True)
class Span:
    """Where a field lies: words start to end."""

    start: int
    end: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.end)


class Layout:
    """Where the fields of a step of one shape lie among its int32 words.

    A step of decodes: rows, positions, fresh [B].  Any other: token_ids, positions, rows [T]; sequence_rows, lens [R];
    starts [R + 1]; draw_tokens, draw_rows [S]; updates [U, 3]; entries [E, ENTRY_WORDS].
    """

    def __init__(self, shape: Shape, block_size: int) -> None:
        self.shape = shape
        self._block_size = block_size
        if shape.is_decode:
            sizes = {"rows": shape.tokens, "positions": shape.tokens, "fresh": shape.tokens}
        else:
            sizes = {
                "token_ids": shape.tokens,
                "positions": shape.tokens,
                "rows": shape.tokens,
                "sequence_rows": shape.sequences,
                "lens": shape.sequences,
                "starts": shape.sequences + 1,
                "draw_tokens": shape.sequences,
                "draw_rows": shape.sequences,
                "updates": UPDATE_WORDS * self.most_updates,
                "entries": ENTRY_WORDS * shape.chunks,
            }
        self.fields: dict[str, Span] = {}
        at = 0
        for name, size in sizes.items():
            self.fields[name] = Span(at, at + size)
            at += -(-size // ALIGN) * ALIGN
        self.words = at

    @cached_property
    def most_updates(self) -> int:
        """Table entries that travel with the step: a new block each decode, and those that its prompt tokens fill."""
        return self.shape.decodes + 2 * self.shape.chunks + -(-self.shape.tokens // self._block_size)


class Buckets:
    """Which shape a step takes, for up to max_num_seqs sequences and graphs of up to max_graph_tokens tokens."""

    def __init__(self, max_num_seqs: int, max_graph_tokens: int) -> None:
        self._rows = max_num_seqs
        self.decode = (*(size for size in DECODE_BUCKETS if size < max_num_seqs), max_num_seqs)
        self.mixed_decodes = (*(size for size in MIXED_DECODES if size < max_num_seqs), max_num_seqs)
        self.chunks = min(MIXED_CHUNKS, max_num_seqs)
        self.tokens = tuple(size for size in TOKEN_BUCKETS if size <= max_graph_tokens)

    def choose(self, decodes: int, chunks: int, tokens: int) -> Shape:
        """The smallest shape for so many decodes, prompt chunks and tokens, decodes included."""
        if not chunks:
            size = self.decode[bisect_left(self.decode, decodes)]
            return Shape(size, size, 0)
        room = self.mixed_decodes[bisect_left(self.mixed_decodes, decodes)]
        most = self.chunks if chunks <= self.chunks else self._rows
        wanted = max(tokens, room)
        place = bisect_left(self.tokens, wanted)
        if place < len(self.tokens):
            return Shape(self.tokens[place], room, most)
        return Shape(-(-wanted // COARSE_TOKENS) * COARSE_TOKENS, room, most)

    def is_graph(self, shape: Shape) -> bool:
        """True for the shapes worth a graph; the others run kernel by kernel."""
        return shape.is_decode or (shape.tokens in self.tokens and shape.chunks == self.chunks)

    def graphs(self) -> list[Shape]:
        """Every shape worth a graph: decodes from large to small, mixed steps of the usual sizes, then the others."""
        mixed = [
            Shape(tokens, decodes, self.chunks)
            for tokens in self.tokens
            for decodes in self.mixed_decodes
            if tokens > decodes
        ]
        mixed.sort(key=lambda shape: not shape.decodes or shape.tokens not in MIXED_SIZES)
        return [Shape(size, size, 0) for size in reversed(self.decode)] + mixed
