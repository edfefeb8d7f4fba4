"""A tokenizer from the metadata of a GGUF file.

Owns what the ``tokenizer.ggml.*`` keys mean: byte-level BPE (kind "gpt2") with the table of pre-tokenizers that the
files name, and SentencePiece BPE (kind "llama") whose merges follow from the scores.  It must not read files: the
metadata arrives as a mapping.  The defaults for absent keys are those of llama.cpp, for which such files are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, cast

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from vserve.errors import StartupError, shorten
from vserve.text.tokenizer import Tokenizer
from vserve.text.tokenizer_files import one_line, wrap_with

KINDS: Final = ("gpt2", "llama")
"""The values of tokenizer.ggml.model that build understands."""

_TOKENS_LIMIT: Final = 4 * 2**20
"""More tokens than this are refused; the largest published vocabularies have about 260,000."""


class TokenType(IntEnum):
    """The numbers of tokenizer.ggml.token_type (SentencePiece's own)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_END_OF_TURN: Final = frozenset(
    "<|im_end|> <|eot_id|> <|eom_id|> <|end|> <|return|> <|endoftext|> <|end_of_text|> <|end_of_turn|> "
    "<end_of_turn> <end_of_utterance> <EOT> <｜end▁of▁sentence｜>".split()
)
"""Control tokens that end an answer whatever eos_token_id says: a file has room for one id, many models use two."""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a byte-level vocabulary cuts text into words before merging, and what else its name stands for.

    steps cut one after the other, each the pieces that the one before left.  whole_words: a word that is in the
    vocabulary is taken whole, even where merges would not build it.  add_bos: what an absent add_bos_token means.
    nfc: the text is first brought to Unicode's normal form C.
    """

    steps: tuple[pre_tokenizers.PreTokenizer, ...]
    whole_words: bool = False
    add_bos: bool = False
    nfc: bool = False


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


_CONTRACTION: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LETTERS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
# Words of the newest families: upper case, then lower case, so that camelCase is cut.
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED: Final = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS: Final = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"

_BYTES: Final = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# ByteLevel's built-in pattern is GPT-2's.
_GPT2: Final = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGIT: Final = pre_tokenizers.Digits(individual_digits=True)
_THREE_DIGITS: Final = _split("[0-9][0-9][0-9]")
_LLAMA3: Final = _split(rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}")
_QWEN2: Final = _split(rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}|{_SYMBOLS}|{_SPACES}")
_QWEN35: Final = _split(
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_TEKKEN: Final = _split(rf"{_CASED}|{_CAPITALS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}")
_GPT4O: Final = _split(
    rf"{_CASED}{_CONTRACTION}?|{_CAPITALS}{_CONTRACTION}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DEEPSEEK_V3: Final = (
    _split(r"\p{N}{1,3}"),
    _split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
    _split(
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
    ),
)
_DEEPSEEK_CODER: Final = (
    _split(r"[\r\n]"),
    _split(r"\s?\p{L}+"),
    _split(r"\s?\p{P}+"),
    _split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
    _DIGIT,
)
_BLOOM: Final = _split(r" ?[^(\s|.,!?…。，、।۔،)]+")
_BAILING: Final = _split(rf"'(?i:[sdmt]|ll|ve|re)|{_LETTERS}|\p{{N}}|{_SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+")
_SEED: Final = _split(rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}")

_FAMILIES: Final[tuple[tuple[str, PreTokenizer], ...]] = (
    (
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 modern-bert mellum gigachat a.x-4.0 "
        "jina-es jina-de jina-v2-es jina-v2-de",
        PreTokenizer((_GPT2,)),
    ),
    ("smollm starcoder refact codeshell exaone minerva-7b mellum2", PreTokenizer((_DIGIT, _GPT2))),
    ("command-r", PreTokenizer((_DIGIT, _GPT2), nfc=True)),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        PreTokenizer((_LLAMA3, _BYTES), whole_words=True, add_bos=True),
    ),
    ("dbrx smaug-bpe glm4 chatglm-bpe", PreTokenizer((_LLAMA3, _BYTES))),
    ("qwen2", PreTokenizer((_QWEN2, _BYTES), nfc=True)),
    ("qwen35", PreTokenizer((_QWEN35, _BYTES), nfc=True)),
    ("deepseek-r1-qwen stablelm2 kormo megrez hunyuan solar-open grok-2", PreTokenizer((_QWEN2, _BYTES))),
    ("tekken", PreTokenizer((_TEKKEN, _BYTES), whole_words=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 minimax-m2", PreTokenizer((_GPT4O, _BYTES))),
    ("deepseek-v3 hunyuan-dense joyai-llm", PreTokenizer((*_DEEPSEEK_V3, _BYTES))),
    ("deepseek-coder", PreTokenizer((*_DEEPSEEK_CODER, _BYTES))),
    (
        "falcon",
        PreTokenizer(
            (
                pre_tokenizers.Punctuation(behavior="contiguous"),
                _GPT2,
                pre_tokenizers.Digits(individual_digits=False),
                _THREE_DIGITS,
            )
        ),
    ),
    # What files from before the key existed were read with.
    ("default", PreTokenizer((_split(r"[\p{P}$+<=>^~|]+"), _GPT2, _split(r"\p{N}+"), _THREE_DIGITS))),
    ("bloom gpt3-finnish poro-chat", PreTokenizer((_BLOOM, _BYTES))),
    ("viking", PreTokenizer((_BLOOM, _DIGIT, _BYTES))),
    ("bailingmoe bailingmoe2 llada-moe", PreTokenizer((_BAILING, _BYTES))),
    ("seed-coder", PreTokenizer((_SEED, _BYTES))),
)
PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = {name: pre for names, pre in _FAMILIES for name in names.split()}
"""Every value of tokenizer.ggml.pre that build understands."""


@dataclass(frozen=True, slots=True)
class _Vocab:
    """The keys of one file, checked.  tokens and scores run by token id; types holds those that are not NORMAL."""

    tokens: list[str]
    ids: Mapping[str, int]
    types: Mapping[int, int]
    scores: list[float]
    merges: list[str]
    special: Mapping[str, int]
    flags: Mapping[str, bool]
    pre: str

    def flag(self, name: str, default: bool) -> bool:
        return self.flags.get(name, default)

    def of_type(self, *types: TokenType) -> list[str]:
        return [self.tokens[id] for id, type in self.types.items() if type in types]


def build(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describes.

    metadata maps keys to plain values; an array may be any sequence.  Raises StartupError with one line that names the
    key at fault and what would work.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        vocab = _read(metadata)
        core, add_bos = _byte_level(vocab)
        bos_id, eos_id = vocab.special.get("bos"), vocab.special.get("eos")
    elif kind == "llama":
        vocab = _read(metadata)
        core, add_bos = _sentencepiece(vocab), True
        # A SentencePiece file may leave its ids out: they are the trainer's defaults then.
        bos_id, eos_id = vocab.special.get("bos", 1), vocab.special.get("eos", 2)
    else:
        raise StartupError(f"tokenizer.ggml.model is {shorten(kind)}; supported are {', '.join(KINDS)}")
    bos_id, eos_id = (id if id is not None and id < len(vocab.tokens) else None for id in (bos_id, eos_id))
    _add_marked_tokens(core, vocab, [id for id in (bos_id, eos_id) if id is not None])
    with_bos = bos_id if vocab.flag("add_bos_token", add_bos) else None
    with_eos = eos_id if vocab.flag("add_eos_token", False) else None
    if with_bos is not None or with_eos is not None:
        wrap_with(core, with_bos, with_eos)
    names = {f"{name}_token": vocab.tokens[id] for name, id in vocab.special.items() if id < len(vocab.tokens)}
    for name, special_id in (("bos_token", bos_id), ("eos_token", eos_id)):
        if special_id is not None:
            names[name] = vocab.tokens[special_id]
    return Tokenizer(core, bos_id=bos_id, eos_ids=_eos_ids(vocab, eos_id), special_tokens=names, pieces=vocab.tokens)


def _byte_level(vocab: _Vocab) -> tuple[tokenizers.Tokenizer, bool]:
    """The core of a "gpt2" vocabulary, and whether its pre-tokenizer implies a bos token."""
    pre = PRE_TOKENIZERS.get(vocab.pre)
    if pre is None:
        raise StartupError(
            f"tokenizer.ggml.pre is {shorten(vocab.pre)}, a pre-tokenizer this server does not know; "
            f"known are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    if not vocab.merges:
        raise StartupError("tokenizer.ggml.merges is missing: a vocabulary of kind gpt2 needs its merges")
    # A merge that is not two pieces fails in the library, as one that names unknown pieces does.
    merges = cast(list[tuple[str, str]], [tuple(merge.split(" ")) for merge in vocab.merges])
    try:
        model = models.BPE(vocab=dict(vocab.ids), merges=merges, ignore_merges=pre.whole_words)
    except Exception as error:  # the library raises bare Exception
        raise StartupError(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {one_line(error)}") from None
    core = tokenizers.Tokenizer(model)
    if pre.nfc:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre.steps[0] if len(pre.steps) == 1 else pre_tokenizers.Sequence(list(pre.steps))
    core.decoder = decoders.ByteLevel()
    return core, pre.add_bos


def _sentencepiece(vocab: _Vocab) -> tokenizers.Tokenizer:
    """The core of a "llama" vocabulary: BPE over the whole text, spaces written as U+2581, unknown text as bytes."""
    if len(vocab.scores) != len(vocab.tokens):
        raise StartupError("tokenizer.ggml.scores is missing: a vocabulary of kind llama needs the score of each token")
    unknown = next(iter(vocab.of_type(TokenType.UNKNOWN)), None)
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab=dict(vocab.ids),
            merges=_merges_by_score(vocab),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocab.flag("add_space_prefix", True):
        # A normalizer and not a pre-tokenizer: the text after a control token starts a word too.
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        core.normalizer = spaces
    core.decoder = decoders.Sequence(steps)
    return core


def _merges_by_score(vocab: _Vocab) -> list[tuple[str, str]]:
    """The merges that make BPE choose as SentencePiece does: of all neighbours that form a piece, the best score first.

    Kudo and Richardson 2018, arXiv:1808.06226.  SentencePiece breaks ties at the leftmost pair; a merge list breaks
    them by order within a piece, so the ways to build one piece are listed longest left part first: in a run such as
    spaces, which is built from the left, that is the leftmost pair.
    """
    marked = {id for id, type in vocab.types.items() if type != TokenType.UNUSED}
    ids = {token: id for token, id in vocab.ids.items() if id not in marked}
    order = sorted(ids.values(), key=lambda id: (-vocab.scores[id], id))
    merges: list[tuple[str, str]] = []
    for id in order:
        piece = vocab.tokens[id]
        for cut in range(len(piece) - 1, 0, -1):
            left = piece[:cut]
            if left in ids:
                right = piece[cut:]
                if right in ids:
                    merges.append((left, right))
    return merges


def _add_marked_tokens(core: tokenizers.Tokenizer, vocab: _Vocab, ends: Sequence[int]) -> None:
    """Make the tokens that the file marks match whole in the text: control ones as special, user-defined as text."""
    control = [*vocab.of_type(TokenType.CONTROL, TokenType.UNKNOWN), *(vocab.tokens[id] for id in ends)]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(control)])
    ours = set(control)
    plain = [token for token in vocab.of_type(TokenType.USER_DEFINED) if token not in ours]
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])


def _eos_ids(vocab: _Vocab, eos_id: int | None) -> set[int]:
    """Every id that ends an answer: eos, end of turn, end of message, and control tokens known to mean that."""
    named = {vocab.special[name] for name in ("eot", "eom") if name in vocab.special}
    known = {
        vocab.ids[token]
        for token in _END_OF_TURN & vocab.ids.keys()
        if vocab.types[vocab.ids[token]] == TokenType.CONTROL
    }
    return {id for id in {eos_id, *named, *known} if id is not None and id < len(vocab.tokens)}


def _read(metadata: Mapping[str, object]) -> _Vocab:
    prefix = "tokenizer.ggml."
    tokens = [
        # An empty token cannot be looked up; it gets a name that no text spells by chance.
        token or f"[EMPTY_{id}]"
        for id, token in enumerate(_strings(metadata, prefix + "tokens"))
    ]
    if not tokens:
        raise StartupError(f"{prefix}tokens is missing: the file holds no vocabulary")
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        double = next(token for id, token in enumerate(tokens) if ids[token] != id)
        raise StartupError(f"{prefix}tokens lists {shorten(double)} twice")
    types = _numbers(metadata, prefix + "token_type", len(tokens))
    normal = int(TokenType.NORMAL)
    pre = metadata.get(prefix + "pre", "default")
    return _Vocab(
        tokens=tokens,
        ids=ids,
        types={id: int(type) for id, type in enumerate(types) if type != normal},
        scores=_numbers(metadata, prefix + "scores", len(tokens)),
        merges=_strings(metadata, prefix + "merges"),
        special=_special_ids(metadata),
        flags={
            name: value
            for name in ("add_bos_token", "add_eos_token", "add_space_prefix")
            if isinstance(value := metadata.get(prefix + name), bool)
        },
        pre=pre if isinstance(pre, str) and pre else "default",
    )


def _special_ids(metadata: Mapping[str, object]) -> dict[str, int]:
    """The ids that have a name in the file: "bos", "eos", "eot", "eom", "unk", "pad"."""
    keys = {
        "bos": "bos_token_id",
        "eos": "eos_token_id",
        "eot": "eot_token_id",
        "eom": "eom_token_id",
        "unk": "unknown_token_id",
        "pad": "padding_token_id",
    }
    found = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: int(id) for name, id in found.items() if isinstance(id, int) and not isinstance(id, bool) and id >= 0}


def _array(metadata: Mapping[str, object], key: str) -> list[object]:
    """The array under key as a list, empty where it is absent.  Raises StartupError where it is no array."""
    value = metadata.get(key)
    if value is None:
        return []
    # numpy arrays are no Sequence, but they list themselves.
    to_list = getattr(value, "tolist", None)
    listed = to_list() if callable(to_list) else value
    if isinstance(listed, str | bytes) or not isinstance(listed, Sequence):
        raise StartupError(f"{key} must be an array, not {type(value).__name__}")
    if len(listed) > _TOKENS_LIMIT:
        raise StartupError(f"{key} has {len(listed)} entries, more than the {_TOKENS_LIMIT} supported")
    return list(listed)


def _strings(metadata: Mapping[str, object], key: str) -> list[str]:
    values = _array(metadata, key)
    strings = [value for value in values if isinstance(value, str)]
    if len(strings) != len(values):
        raise StartupError(f"{key} must hold strings only")
    return strings


def _numbers(metadata: Mapping[str, object], key: str, count: int) -> list[float]:
    """The numbers under key, one for each of count tokens; empty where the key is absent."""
    values = _array(metadata, key)
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) != len(values):
        raise StartupError(f"{key} must hold numbers only")
    if numbers and len(numbers) != count:
        raise StartupError(f"{key} has {len(numbers)} entries for {count} tokens")
    return numbers
