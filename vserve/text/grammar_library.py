"""llguidance, as far as vserve uses it: a vocabulary for it, grammars compiled within limits, and a trial of each.

The one module that imports the library (extra "structured"); runs in the server and in the helper process alike, so
that what the helper accepted compiles to the same here.  Thread: any, one at a time for one matcher.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from vserve.text.grammar_spec import GrammarKind, GrammarSpec

LIMITS = LLParserLimits(
    max_items_in_row=16_000,  # an object of 3,000 optional properties needs 12,007
    initial_lexer_fuel=200_000,  # 1,000,000 lets a pattern of 30 characters take 0.8 s and 160 MB in one mask
    step_lexer_fuel=50_000,
    step_max_items=100_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
TRIAL_STEPS = 48
SLOWEST_MASK_S = 0.1
"""Processor time.  A grammar with a slower mask on its trial is refused: every stream would wait for it."""
_MOST_REASON = 400


class GrammarError(ValueError):
    """The source cannot be compiled, or allows no text; the message is for the client."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the library must know of a tokenizer.

    tokens: the bytes of every id.  special: ids that no text becomes.  eos: ids that end an answer, at least one.
    size: width of the logits, at least len(tokens).
    """

    tokens: Sequence[bytes]
    special: Sequence[int]
    eos: Sequence[int]
    size: int


class _Words:
    """A vocabulary in the shape that the library asks for."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, encode: Callable[[str], list[int]] | None) -> None:
        self.eos_token_id = vocabulary.eos[0]
        self.special_token_ids = list(vocabulary.special)
        self.tokens = [*vocabulary.tokens, *[b""] * (vocabulary.size - len(vocabulary.tokens))]

        self._encode = encode or _Greedy(vocabulary)

    def __call__(self, text: str) -> list[int]:
        """How text that the grammar leaves no choice about is to be spelled."""
        return self._encode(text)


class _Greedy:
    """Always the longest token that fits: a spelling, for want of the model's own."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        special = set(vocabulary.special)
        self._ids = {token: id for id, token in enumerate(vocabulary.tokens) if token and id not in special}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        data, ids, at = text.encode("utf-8", "replace"), [], 0
        while at < len(data):
            lengths = range(min(self._longest, len(data) - at), 0, -1)
            length = next((length for length in lengths if data[at : at + length] in self._ids), None)
            if length is None:
                break
            ids.append(self._ids[data[at : at + length]])
            at += length
        return ids


def tokenizer_for(vocabulary: Vocabulary, encode: Callable[[str], list[int]] | None = None) -> LLTokenizer:
    """The library's own index of a vocabulary: a quarter of a second for 49,152 ids, half of it holding the GIL.

    encode: the model's own spelling of a text; any thread that computes masks calls it.
    """
    words = _Words(vocabulary, encode)
    return LLTokenizer(TokenizerWrapper(words), n_vocab=vocabulary.size, eos_token=list(vocabulary.eos))


def compile_spec(tokenizer: LLTokenizer, spec: GrammarSpec) -> LLMatcher:
    """A matcher at its start.  Raises GrammarError.  Takes no longer than LIMITS let it, which may be seconds."""
    try:
        source = _source(spec)
    except Exception as error:  # the converter of GBNF raises what it likes
        raise GrammarError(reason(str(error))) from None
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=LIMITS)
    check(matcher)
    return matcher


def check(matcher: LLMatcher) -> None:
    """Raise GrammarError if the matcher has failed."""
    if matcher.is_error():
        raise GrammarError(reason(matcher.get_error()))


def trial(matcher: LLMatcher) -> None:
    """Write some random text with the matcher, which is used up.

    Raises GrammarError where nothing can be written, a limit is met at once or a mask is slow.
    """
    draw = random.Random(0)
    for _ in range(TRIAL_STEPS):
        began_s = time.thread_time()
        mask = matcher.compute_bitmask()
        took_s = time.thread_time() - began_s
        check(matcher)
        if took_s > SLOWEST_MASK_S:
            raise GrammarError("it is too complex: what may follow takes too long to work out")
        bits = int.from_bytes(mask, "little")
        if not bits:
            raise GrammarError("it allows no text at all")
        # The first allowed id from a random place on, found without unpacking the whole mask.
        place = draw.randrange(bits.bit_length())
        tail = bits >> place
        matcher.consume_token(place + (tail & -tail).bit_length() - 1)
        check(matcher)
        if matcher.is_stopped():
            return


def _source(spec: GrammarSpec) -> str:
    match spec.kind:
        case GrammarKind.JSON_OBJECT:
            return _json('{"type":"object"}', spec.whitespace)
        case GrammarKind.JSON_SCHEMA:
            return _json(spec.source, spec.whitespace)
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(spec.source)
        case GrammarKind.CHOICE:
            # json.dumps keeps to ASCII, and \uXXXX is read back by the library.
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(spec.source))))
        case GrammarKind.LARK:
            return LLMatcher.grammar_from_lark(any_to_lark(spec.source) if "::=" in spec.source else spec.source)


def _json(schema: str, whitespace: str | None) -> str:
    if whitespace is None:
        return LLMatcher.grammar_from_json_schema(schema)
    if not whitespace:
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": whitespace})


def reason(text: str) -> str:
    """The library's message as it may stand in ours: one line, bounded."""
    if "NoExtension" in text:
        return "it allows no text"
    line = " ".join(text.replace("<non-verbose/>", "").split())
    return line if len(line) <= _MOST_REASON else line[:_MOST_REASON] + "…"
