"""Incremental decoding: the text that each new token adds to one stream.

Owns the bytes that are not yet a whole character.  It must not know about stop strings or about the reply.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence

from vserve.text.pieces import DecodeStyle
from vserve.text.tokenizer import Tokenizer

_HELD_TOKENS = 8
"""A character takes at most four byte tokens: a window that still ends in U+FFFD after this many really is broken."""


class Detokenizer:
    """The text of a stream of ids, piece by piece.  One instance per stream, used by one thread at a time.

    The pieces of push and the last of flush, joined, equal ``tokenizer.decode`` of all the ids, and no piece ends
    inside a character.  With continuation the ids continue a prompt, so that a leading space, which decode strips for
    SentencePiece vocabularies, is kept (not where the style is WINDOW: there the library strips what it strips).
    shown are special ids whose text is kept all the same.
    """

    __slots__ = ("_pending", "_strip", "_table", "_window")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special: bool = True,
        continuation: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._table = tokenizer.byte_table(skip_special=skip_special, shown=shown)
        self._pending = b""
        self._strip = tokenizer.style is DecodeStyle.BYTES_STRIPPED and not continuation
        self._window = _Window(tokenizer, skip_special, shown) if tokenizer.style is DecodeStyle.WINDOW else None

    def push(self, ids: Sequence[int]) -> str:
        """Take the next ids; return the text that is certain now, "" while a character is incomplete.

        An id beyond the vocabulary adds nothing; none is negative.
        """
        if self._window is not None:
            return self._window.push(ids)
        table = self._table
        try:
            # One id a push is what a stream that keeps up does.
            data = table[ids[0]] if len(ids) == 1 else b"".join([table[id] for id in ids])
        except IndexError:
            data = b"".join([table[id] for id in ids if id < len(table)])
        if self._pending:
            data = self._pending + data
            self._pending = b""
        text, used = utf_8_decode(data, "replace", False)
        if used != len(data):
            self._pending = data[used:]
        return self._stripped(text) if self._strip else text

    def flush(self) -> str:
        """The rest of the text once the last id is in: an incomplete character becomes U+FFFD."""
        if self._window is not None:
            return self._window.flush()
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return self._stripped(text) if self._strip else text

    def _stripped(self, text: str) -> str:
        """The first text of a stream, less one leading space."""
        if text:
            self._strip = False
        return text.removeprefix(" ")


class _Window:
    """Decoding for vocabularies whose text is no join of bytes: decode the last ids with and without the new ones.

    ids[:seen] are released already and stay as context for those behind; the window moves on whenever text is
    released, so a push costs the same however long the stream is.
    """

    __slots__ = ("_hidden", "_ids", "_seen", "_skip_special", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, shown: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        # The library leaves out all special tokens or none: where some are shown, the others are left out here.
        self._hidden = tokenizer.special_ids - shown if skip_special and shown else frozenset()
        self._skip_special = skip_special and not shown
        self._ids: list[int] = []
        self._seen = 0

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self._push_one(id) for id in ids if id not in self._hidden])

    def flush(self) -> str:
        return self._release(self._decode(self._ids))

    def _push_one(self, id: int) -> str:
        self._ids.append(id)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) - self._seen < _HELD_TOKENS:
            return ""
        return self._release(text)

    def _release(self, text: str) -> str:
        """The part of text, that of the whole window, which is new; the window then starts at what was new."""
        before = self._decode(self._ids[: self._seen])
        if len(text) <= len(before):
            # Nothing visible (special tokens left out, say): keep the context, and the new ids while they are few.
            if len(self._ids) - self._seen >= _HELD_TOKENS:
                del self._ids[self._seen :]
            return ""
        self._ids = self._ids[self._seen :]
        self._seen = len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode_with_library(ids, skip_special=self._skip_special)
