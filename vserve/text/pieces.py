"""Pieces: how a vocabulary spells the bytes of its tokens, and how the text of several follows from them.

Pure; knows no model and no file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum, auto
from typing import Final

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

_SPACE: Final = "\u2581"
"""How SentencePiece writes a space inside a piece."""

_FOREIGN: Final = "\uffff"
"""A character that no vocabulary uses: Unicode reserves it as a non-character."""

_COMPOSING: Final = 3
"""NFC makes at most so many bytes into one: U+0390, two bytes, is six when it is written out."""
_MOST_LOST: Final = 64
"""A vocabulary that lacks more bytes than this is not one of bytes."""
_KEEPS_BYTES: Final = frozenset({"ByteLevel", "Digits", "Split", "Punctuation", "Metaspace"})
_NOT_IN_UTF8: Final = bytes((0xC0, 0xC1, *range(0xF5, 0x100)))


class DecodeStyle(Enum):
    """How the text of several tokens follows from the tokens."""

    BYTES = auto()
    """The bytes of the tokens, joined, read as UTF-8."""
    BYTES_STRIPPED = auto()
    """The same, less one space at the very start (the one that SentencePiece put before the first word)."""
    WINDOW = auto()
    """Only the library knows: decode a window of ids and compare."""


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte (Radford et al. 2019, the GPT-2 encoder).

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 upwards in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class Spelling(Enum):
    """How a piece of the vocabulary spells its bytes."""

    BYTE_LEVEL = auto()
    SENTENCEPIECE = auto()
    PLAIN = auto()


def read_decoder(core: tokenizers.Tokenizer) -> tuple[DecodeStyle, Spelling]:
    """What core's decoder does, where it is one of the two families whose text is a join of bytes."""
    if core.decoder is None:
        return DecodeStyle.WINDOW, Spelling.PLAIN
    state: dict[str, object] = json.loads(core.decoder.__getstate__())
    nested = state.get("decoders")
    steps: list[dict[str, object]] = nested if isinstance(nested, list) else [state]
    kinds = [step.get("type") for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return DecodeStyle.BYTES, Spelling.BYTE_LEVEL
    if kinds[:3] in (["Replace", "ByteFallback", "Fuse"], ["ByteFallback", "Replace", "Fuse"]):
        replace = steps[kinds.index("Replace")]
        spaces = replace.get("pattern") == {"String": _SPACE} and replace.get("content") == " "
        if spaces and len(steps) == 3:
            return DecodeStyle.BYTES, Spelling.SENTENCEPIECE
        if spaces and steps[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return DecodeStyle.BYTES_STRIPPED, Spelling.SENTENCEPIECE
    return DecodeStyle.WINDOW, Spelling.PLAIN


def pieces_by_id(core: tokenizers.Tokenizer) -> list[str]:
    """The spelling of every id; "" in the holes that some vocabularies have."""
    ids = core.get_vocab(with_added_tokens=True)
    pieces = [""] * (max(ids.values(), default=-1) + 1)
    for piece, id in ids.items():
        pieces[id] = piece
    return pieces


def bytes_of_pieces(pieces: Sequence[str], spelling: Spelling) -> list[bytes]:
    """What each piece adds to a text."""
    if spelling is Spelling.PLAIN:
        return [piece.encode() for piece in pieces]
    if spelling is Spelling.SENTENCEPIECE:
        table = [piece.replace(_SPACE, " ").encode() for piece in pieces]
        fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        for id, piece in enumerate(pieces):
            if piece in fallback:
                table[id] = fallback[piece]
        return table
    # A character below 256 that the alphabet does not use must not pass for a byte.
    to_byte: dict[int, str | int] = dict.fromkeys(range(256), _FOREIGN)
    to_byte |= {ord(char): byte for char, byte in byte_alphabet().items()}
    # One translate for the whole vocabulary: one for each of 50,000 pieces costs three times as much.
    translated = _FOREIGN.join(pieces).translate(to_byte).split(_FOREIGN)
    if len(translated) != len(pieces):
        translated = [piece.translate(to_byte) for piece in pieces]
    return [_latin1_or(spelled, piece) for spelled, piece in zip(translated, pieces, strict=True)]


def _latin1_or(spelled: str, piece: str) -> bytes:
    """The bytes of a translated piece.  Added tokens outside the byte alphabet stand for themselves."""
    try:
        return spelled.encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()


def most_bytes_of_a_token(core: tokenizers.Tokenizer, token_bytes: Sequence[bytes], lost: bytes) -> int | None:
    """The most bytes of text, less the lost ones, that one token can stand for; None where that is unknown.

    Known only where no step drops text: a BPE of bytes, no token that takes the spaces beside it.
    """
    if not isinstance(core.model, models.BPE) or len(lost) > _MOST_LOST:
        return None
    if any(token.lstrip or token.rstrip for token in core.get_added_tokens_decoder().values()):
        return None
    if any(step.get("type") not in _KEEPS_BYTES or _removes(step) for step in _steps(core.pre_tokenizer)):
        return None
    factor = 1
    for step in _steps(core.normalizer):
        kind = step.get("type")
        if kind == "NFC" and not lost.strip(_NOT_IN_UTF8):
            factor = _COMPOSING
        elif kind != "Prepend" and not (kind == "Replace" and step.get("content") == _SPACE):
            return None
    return factor * max(map(len, token_bytes))


def _steps(part: pre_tokenizers.PreTokenizer | normalizers.Normalizer | None) -> list[dict[str, object]]:
    """What a part of the tokenizer does, one step after the other; an unreadable one is a step without a type."""
    if part is None:
        return []
    state: dict[str, object] = json.loads(part.__getstate__())
    nested = state.get("pretokenizers", state.get("normalizers"))
    return nested if isinstance(nested, list) else [state]


def _removes(step: dict[str, object]) -> bool:
    return str(step.get("behavior", "")).lower() == "removed"
