"""The tokenizer: text to token ids and back, and what each id means.

Owns the per-id tables that make decoding a join of bytes; a folder's files are tokenizer_files.py's, what a vocabulary
spells is pieces.py's.  It must not know where a request came from, nor what a chat template is; ``gguf_vocab`` builds
the same class from the metadata of a GGUF file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from vserve.errors import BadRequest, StartupError, shorten
from vserve.text.pieces import (
    DecodeStyle,
    byte_alphabet,
    bytes_of_pieces,
    most_bytes_of_a_token,
    pieces_by_id,
    read_decoder,
)
from vserve.text.tokenizer_files import (
    add_missing_tokens,
    check_panic,
    id_of,
    mark_special,
    named_eos_ids,
    named_tokens,
    read_config,
    read_core,
    wrap_with,
)


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
        self.style, spelling = read_decoder(core)
        self._pieces = pieces if pieces is not None else pieces_by_id(core)
        self.vocab_size = len(self._pieces)
        self.special_ids = frozenset(id for id, token in core.get_added_tokens_decoder().items() if token.special)
        self._bytes = bytes_of_pieces(self._pieces, spelling)
        self._visible_bytes = list(self._bytes)
        for id in self.special_ids:
            self._visible_bytes[id] = b""
        # Byte-level vocabularies may lack a byte that hardly any text has: the library leaves it out.
        self._lost = bytes({*range(256)} - {piece[0] for piece in self._bytes if len(piece) == 1})
        self._most_bytes = most_bytes_of_a_token(core, self._bytes, self._lost)
        self._partly_visible: dict[frozenset[int], list[bytes]] = {}

    @classmethod
    def from_folder(cls, folder: Path, *, generation_config: Mapping[str, object] | None = None) -> Self:
        """Read tokenizer.json and, where there is one, tokenizer_config.json.

        generation_config (that file's content) adds its ``eos_token_id``, a number or a list, to the ids that end a
        generation.  Raises StartupError with one line that names the file.
        """
        core = read_core(folder)
        config = read_config(folder)
        add_missing_tokens(core, config, folder)
        special_tokens = named_tokens(config)
        mark_special(core, special_tokens.values())
        bos_id = id_of(core, special_tokens.get("bos_token"))
        eos_id = id_of(core, special_tokens.get("eos_token"))
        eos_ids = set() if eos_id is None else {eos_id}
        eos_ids |= named_eos_ids(generation_config or {})
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
            check_panic(error)
            raise

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = True) -> list[list[int]]:
        """The ids of each text, computed on all cores; otherwise as encode."""
        try:
            encodings = self._core.encode_batch_fast(list(texts), add_special_tokens=add_special)
        except TypeError:
            raise BadRequest("a text is not valid Unicode: it holds a lone surrogate") from None
        except BaseException as error:
            check_panic(error)
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
            check_panic(error)
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
