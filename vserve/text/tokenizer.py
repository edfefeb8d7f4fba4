"""The tokenizer: text to token ids and back, and what each id means.

Owns the reading of a Hugging Face folder's tokenizer files and the per-id tables that make decoding a join of bytes.
It must not know where a request came from, nor what a chat template is; ``gguf_vocab`` builds the same class from the
metadata of a GGUF file.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from typing import Final, Self

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from vserve.errors import BadRequest, StartupError, shorten

_FILE_LIMIT_BYTES: Final = 512 * 2**20
"""A larger tokenizer file is refused unread; the largest published ones are about 35 MB."""

_SPACE: Final = "\u2581"
"""How SentencePiece writes a space inside a piece."""

_FOREIGN: Final = "\uffff"
"""A character that no vocabulary uses: Unicode reserves it as a non-character."""


class DecodeStyle(Enum):
    """How the text of several tokens follows from the tokens."""

    BYTES = auto()
    """The bytes of the tokens, joined, read as UTF-8."""
    BYTES_STRIPPED = auto()
    """The same, less one space at the very start (the one that SentencePiece put before the first word)."""
    WINDOW = auto()
    """Only the library knows: decode a window of ids and compare."""


class Tokenizer:
    """Text to ids and back.  Immutable after construction; any thread may call any method.

    vocab_size is the largest id + 1, bos_id the id that starts a text (None: the model has none), eos_ids the ids that
    end a generation.  special_tokens maps names such as "bos_token" to their text, as chat templates see them.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_ids: Iterable[int],
        special_tokens: Mapping[str, str],
        pieces: Sequence[str] | None = None,
    ) -> None:
        """Take over core: nobody else may change it afterwards.

        pieces is the spelling of every id, for a caller that has it at hand; asking core takes 15 ms for 50,000.
        A length limit or padding that its file left enabled would silently change prompts, so both are switched off.
        """
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._literal: tokenizers.Tokenizer | None = None
        self._literal_lock = threading.Lock()
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self.special_tokens: Mapping[str, str] = dict(special_tokens)
        self.style, spelling = _read_decoder(core)
        self._pieces = pieces if pieces is not None else _pieces_by_id(core)
        self.vocab_size = len(self._pieces)
        self.special_ids = frozenset(id for id, token in core.get_added_tokens_decoder().items() if token.special)
        self._bytes = _bytes_of_pieces(self._pieces, spelling)
        self._visible_bytes = list(self._bytes)
        for id in self.special_ids:
            self._visible_bytes[id] = b""
        # Byte-level vocabularies may lack a byte that hardly any text has: the library leaves it out.
        self._lost = bytes({*range(256)} - {piece[0] for piece in self._bytes if len(piece) == 1})
        self._most_bytes = _most_bytes_of_a_token(core, self._bytes, self._lost)
        self._partly_visible: dict[frozenset[int], list[bytes]] = {}

    @classmethod
    def from_folder(cls, folder: Path, *, generation_config: Mapping[str, object] | None = None) -> Self:
        """Read tokenizer.json and, where there is one, tokenizer_config.json.

        generation_config (that file's content) adds its ``eos_token_id``, a number or a list, to the ids that end a
        generation.  Raises StartupError with one line that names the file.
        """
        core = _read_core(folder)
        config = _read_config(folder)
        _add_missing_tokens(core, config, folder)
        special_tokens = _named_tokens(config)
        _mark_special(core, special_tokens.values())
        bos_id = _id_of(core, special_tokens.get("bos_token"))
        eos_id = _id_of(core, special_tokens.get("eos_token"))
        eos_ids = set() if eos_id is None else {eos_id}
        eos_ids |= _eos_ids(generation_config or {})
        if "add_bos_token" in config or "add_eos_token" in config:
            # The flags outrank the file's post-processor, as in transformers: several published files rely on it.
            wrap_with(
                core,
                bos_id if config.get("add_bos_token") is True else None,
                eos_id if config.get("add_eos_token") is True else None,
            )
        return cls(core, bos_id=bos_id, eos_ids=eos_ids, special_tokens=special_tokens)

    @classmethod
    def of_bytes(cls, vocab_size: int) -> Tokenizer:
        """One token a byte, and further tokens up to vocab_size ids that no text becomes: for models made of noise.

        Those read "t300" for id 300, so that whatever is drawn shows as text.  StartupError below 256 ids.
        """
        if vocab_size < 256:
            raise StartupError(f"a tokenizer of bytes needs 256 ids, the model has {vocab_size}")
        vocab = byte_alphabet()
        vocab |= {f"t{id}": id for id in range(256, vocab_size)}
        core = tokenizers.Tokenizer(models.BPE(vocab, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        return cls(core, bos_id=None, eos_ids=(), special_tokens={}, pieces=sorted(vocab, key=vocab.__getitem__))

    @property
    def bos_token(self) -> str | None:
        """The text of the token that starts a text."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The text of the token that ends a generation."""
        return self.special_tokens.get("eos_token")

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of text.  The GIL is released meanwhile.

        add_special adds the model's own start and end tokens.  With parse_special, text that spells a special token
        becomes that token; without, it is ordinary text.  Raises BadRequest for text that is not valid Unicode.
        """
        core = self._core if parse_special else self._literal_core()
        # encode_batch and not encode: only the former releases the GIL; the _fast one leaves offsets out.
        try:
            return core.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        except TypeError:
            raise BadRequest(f"text {shorten(text)} is not valid Unicode: it holds a lone surrogate") from None
        except BaseException as error:
            _check_panic(error)
            raise

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = True) -> list[list[int]]:
        """The ids of each text, computed on all cores; otherwise as encode."""
        try:
            encodings = self._core.encode_batch_fast(list(texts), add_special_tokens=add_special)
        except TypeError:
            raise BadRequest("a text is not valid Unicode: it holds a lone surrogate") from None
        except BaseException as error:
            _check_panic(error)
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of ids; an id outside the vocabulary has none.

        Bytes that are not UTF-8 become U+FFFD, one for each maximal broken part, so that the text of a longer sequence
        never contradicts that of a shorter one.
        """
        if self.style is DecodeStyle.WINDOW:
            return self.decode_with_library(ids, skip_special=skip_special)
        text = self.join_bytes(ids, skip_special=skip_special).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.style is DecodeStyle.BYTES_STRIPPED else text

    def decode_with_library(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """What the tokenizers library makes of ids: the only way where style is WINDOW.  Holds the GIL."""
        known = [id for id in ids if 0 <= id < self.vocab_size]
        try:
            return str(self._core.decode(known, skip_special_tokens=skip_special))
        except BaseException as error:
            _check_panic(error)
            raise

    def byte_table(self, *, skip_special: bool, shown: frozenset[int] = frozenset()) -> Sequence[bytes]:
        """The bytes of every id, [vocab_size]; empty for special ids with skip_special.  Shared: read only.

        shown are special ids that keep their bytes all the same.  A table is kept for each set: the server's own few,
        never a client's choice.
        """
        if not skip_special:
            return self._bytes
        if not shown:
            return self._visible_bytes
        table = self._partly_visible.get(shown)
        if table is None:
            table = list(self._visible_bytes)
            for id in shown:
                table[id] = self._bytes[id]
            self._partly_visible[shown] = table
        return table

    def join_bytes(self, ids: Iterable[int], *, skip_special: bool) -> bytes:
        """The bytes of ids, joined; an id outside the vocabulary has none."""
        table = self.byte_table(skip_special=skip_special)
        return b"".join([table[id] for id in ids if 0 <= id < self.vocab_size])

    def token_strs(self, ids: Sequence[int]) -> list[str]:
        """Each id as token_str gives it."""
        if ids and min(ids) >= 0:
            with suppress(IndexError):
                return list(map(self._pieces.__getitem__, ids))  # half the time of a line of Python an id
        return [self.token_str(id) for id in ids]

    def token_str(self, id: int) -> str:
        """The token as the vocabulary spells it ("Ġworld", "▁world"), or "" for an id outside it."""
        return self._pieces[id] if 0 <= id < self.vocab_size else ""

    def token_bytes(self, id: int) -> bytes:
        """The bytes that id adds to the text, or b"" for an id outside the vocabulary.

        For a vocabulary whose style is WINDOW this is the spelling in UTF-8, for want of better.
        """
        return self._bytes[id] if 0 <= id < self.vocab_size else b""

    def token_id(self, piece: str) -> int | None:
        """The id of a token by its spelling in the vocabulary."""
        return self._core.token_to_id(piece)

    def is_special(self, id: int) -> bool:
        """Whether id is a control token, left out of text with skip_special."""
        return id in self.special_ids

    def check_fits(self, model_vocab_size: int) -> None:
        """Raise StartupError where the vocabulary has more ids than the model has embeddings."""
        if self.vocab_size > model_vocab_size:
            raise StartupError(
                f"the tokenizer does not match the model: it has {self.vocab_size} tokens, the model {model_vocab_size}"
            )

    def least_tokens(self, text: str) -> int:
        """A number of tokens that encoding text is sure to reach, without encoding it.

        The length in bytes over that of the longest token; 0 for vocabularies where bytes may get lost on the way.
        """
        if self._most_bytes is None:
            return 0
        data = text.encode("utf-8", "surrogatepass")
        return -(-len(data.translate(None, self._lost)) // self._most_bytes)

    def _literal_core(self) -> tokenizers.Tokenizer:
        """A twin that reads special tokens as ordinary text, made when first asked for.

        The switch is a property of the library's object, so flipping it on the shared one would race.
        """
        with self._literal_lock:
            if self._literal is None:
                twin = tokenizers.Tokenizer.from_str(self._core.to_str())
                twin.encode_special_tokens = True
                self._literal = twin
            return self._literal


_COMPOSING: Final = 3
"""NFC makes at most so many bytes into one: U+0390, two bytes, is six when it is written out."""
_MOST_LOST: Final = 64
"""A vocabulary that lacks more bytes than this is not one of bytes."""
_KEEPS_BYTES: Final = frozenset({"ByteLevel", "Digits", "Split", "Punctuation", "Metaspace"})


_NOT_IN_UTF8: Final = bytes((0xC0, 0xC1, *range(0xF5, 0x100)))


def _most_bytes_of_a_token(core: tokenizers.Tokenizer, token_bytes: Sequence[bytes], lost: bytes) -> int | None:
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


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has the files of a tokenizer, readable or not."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def wrap_with(core: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None) -> None:
    """Make core put bos_id before and eos_id after each text encoded with add_special; None: nothing there."""
    ends = {id: core.id_to_token(id) for id in (bos_id, eos_id) if id is not None}
    before = [f"{ends[bos_id]}:0"] if bos_id is not None else []
    after = [f"{ends[eos_id]}:0"] if eos_id is not None else []
    core.post_processor = processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=["$A:0", "$B:1"],
        special_tokens=[(str(token), id) for id, token in ends.items()],
    )


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte (Radford et al. 2019, the GPT-2 encoder).

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 upwards in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class _Spelling(Enum):
    """How a piece of the vocabulary spells its bytes."""

    BYTE_LEVEL = auto()
    SENTENCEPIECE = auto()
    PLAIN = auto()


def _read_decoder(core: tokenizers.Tokenizer) -> tuple[DecodeStyle, _Spelling]:
    """What core's decoder does, where it is one of the two families whose text is a join of bytes."""
    if core.decoder is None:
        return DecodeStyle.WINDOW, _Spelling.PLAIN
    state: dict[str, object] = json.loads(core.decoder.__getstate__())
    nested = state.get("decoders")
    steps: list[dict[str, object]] = nested if isinstance(nested, list) else [state]
    kinds = [step.get("type") for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return DecodeStyle.BYTES, _Spelling.BYTE_LEVEL
    if kinds[:3] in (["Replace", "ByteFallback", "Fuse"], ["ByteFallback", "Replace", "Fuse"]):
        replace = steps[kinds.index("Replace")]
        spaces = replace.get("pattern") == {"String": _SPACE} and replace.get("content") == " "
        if spaces and len(steps) == 3:
            return DecodeStyle.BYTES, _Spelling.SENTENCEPIECE
        if spaces and steps[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return DecodeStyle.BYTES_STRIPPED, _Spelling.SENTENCEPIECE
    return DecodeStyle.WINDOW, _Spelling.PLAIN


def _pieces_by_id(core: tokenizers.Tokenizer) -> list[str]:
    """The spelling of every id; "" in the holes that some vocabularies have."""
    ids = core.get_vocab(with_added_tokens=True)
    pieces = [""] * (max(ids.values(), default=-1) + 1)
    for piece, id in ids.items():
        pieces[id] = piece
    return pieces


def _bytes_of_pieces(pieces: Sequence[str], spelling: _Spelling) -> list[bytes]:
    if spelling is _Spelling.PLAIN:
        return [piece.encode() for piece in pieces]
    if spelling is _Spelling.SENTENCEPIECE:
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


def _check_panic(error: BaseException) -> None:
    """Raise RuntimeError if error is a panic of the library: a BaseException, which nobody expects of a bug."""
    if type(error).__name__ == "PanicException":
        raise RuntimeError(f"the tokenizers library gave up: {one_line(error)}") from None


def _read_core(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            raise StartupError(
                f"{folder} has tokenizer.model but no tokenizer.json: save it once with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        raise StartupError(f"{folder} has no tokenizer.json")
    data = _read_limited(path)
    try:
        try:
            return tokenizers.Tokenizer.from_buffer(data)
        except BaseException as error:
            _check_panic(error)
            raise
    except Exception as error:  # the library raises bare Exception for whatever its parser dislikes
        raise StartupError(f"{path} is not a tokenizer file: {one_line(error)}") from None


def _read_config(folder: Path) -> dict[str, object]:
    """tokenizer_config.json, with the older special_tokens_map.json beneath it."""
    merged: dict[str, object] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            merged |= read_json_object(path)
    return merged


def read_json_object(path: Path) -> dict[str, object]:
    """The JSON object in a configuration file.  Raises StartupError that names the file."""
    try:
        value = json.loads(_read_limited(path))
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise StartupError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _read_limited(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _FILE_LIMIT_BYTES:
            raise StartupError(f"{path} has {size} bytes, more than a tokenizer file may have ({_FILE_LIMIT_BYTES})")
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from None


def _add_missing_tokens(core: tokenizers.Tokenizer, config: Mapping[str, object], folder: Path) -> None:
    """Add the tokens that only tokenizer_config.json lists (``added_tokens_decoder``: id -> token)."""
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return
    present = {token.content for token in core.get_added_tokens_decoder().values()}
    entries = [(int(id), token) for id, token in listed.items() if id.isascii() and id.isdigit()]
    for id, token in sorted(entries, key=lambda entry: entry[0]):
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not content or content in present:
            continue
        flags = {name: token.get(name) is True for name in ("lstrip", "rstrip", "normalized", "single_word", "special")}
        core.add_tokens([AddedToken(content, **flags)])
        if core.token_to_id(content) != id:
            raise StartupError(
                f"{folder} holds files of two tokenizers: tokenizer_config.json gives {shorten(content)} the id {id}, "
                f"tokenizer.json {core.token_to_id(content)}"
            )


def _mark_special(core: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    """Make control tokens of those that the vocabulary has as ordinary pieces; their flags stay where they have any."""
    added = {token.content for token in core.get_added_tokens_decoder().values()}
    core.add_special_tokens([token for token in tokens if token not in added and core.token_to_id(token) is not None])


def _named_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """The named tokens ("bos_token", "eos_token", "pad_token", ...) and their text."""
    named: dict[str, str] = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str) and text:
            named[key] = text
    return named


def _id_of(core: tokenizers.Tokenizer, token: str | None) -> int | None:
    return None if token is None else core.token_to_id(token)


def eos_ids_in(generation_config: Mapping[str, object], vocab_size: int) -> frozenset[int]:
    """The end-of-text ids that generation_config.json names, as far as the model has them."""
    return frozenset(id for id in _eos_ids(generation_config) if id < vocab_size)


def _eos_ids(generation_config: Mapping[str, object]) -> set[int]:
    value = generation_config.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return {id for id in values if isinstance(id, int) and not isinstance(id, bool) and id >= 0}


def one_line(error: BaseException) -> str:
    """The message of an error as it may stand in a StartupError."""
    return " ".join(str(error).split())[:200]
