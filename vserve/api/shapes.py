"""JSON shapes that chat and completions share: head of a reply, usage, log-probabilities, frames of a stream.

Pure: values in, bytes or plain values out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from vserve.engine.request import FinishReason, Timing, TokenLogprobs
from vserve.text.parts import Part
from vserve.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""What minus infinity prints as: JSON has no infinity."""

Drawn = tuple[int, TokenLogprobs]
"""A drawn token and its log-probabilities."""


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk and the whole reply begin with."""

    id: str
    created_s: int
    model: str
    fingerprint: str

    def json(self, kind: str) -> bytes:
        """The opening of the JSON object, without a closing brace; kind is its ``object``."""
        fields = {
            "id": self.id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        return orjson.dumps(fields)[:-1]


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of a reply so far: over all prompts (each once) and all choices.

    reasoning: those of completion that were reasoning; None where none is told apart.
    """

    prompt: int
    completion: int
    cached: int
    reasoning: int | None = None

    def usage(self) -> dict[str, object]:
        """The ``usage`` object."""
        return {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True, slots=True)
class Piece:
    """What one choice has to say in one chunk, or in all when the reply is whole.

    text: the content only.  offset: characters of the choice's text before this piece.  finish: set on the last piece.
    parts: all of it in order, the content too; None where the text is not split, so that all of it is content.
    """

    text: str
    offset: int = 0
    ids: Sequence[int] = ()
    drawn: Sequence[Drawn] = ()
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    parts: tuple[Part, ...] | None = None


@dataclass(frozen=True, slots=True)
class TokenText:
    """How tokens are spelled in log-probabilities."""

    tokenizer: Tokenizer
    as_ids: bool

    def of(self, token: int) -> str:
        """The token's own text, U+FFFD for broken characters, or "token_id:N"."""
        return f"token_id:{token}" if self.as_ids else self.tokenizer.token_bytes(token).decode("utf-8", "replace")


def chat_logprobs(drawn: Sequence[Drawn], text: TokenText) -> dict[str, object]:
    """The ``logprobs`` object of a chat choice."""
    return {"content": [_chat_entry(token, entry, text) for token, entry in drawn], "refusal": None}


def _chat_entry(token: int, entry: TokenLogprobs, text: TokenText) -> dict[str, object]:
    top = [_chat_token(other, logprob, text) for other, logprob in entry.top]
    return {**_chat_token(token, entry.logprob, text), "top_logprobs": top}


def _chat_token(token: int, logprob: float, text: TokenText) -> dict[str, object]:
    return {
        "token": text.of(token),
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": list(text.tokenizer.token_bytes(token)),
    }


def completion_logprobs(drawn: Sequence[Drawn], offset: int, text: TokenText) -> dict[str, object]:
    """The ``logprobs`` object of a completion choice; offset: characters before the first of these tokens."""
    tokens = [text.of(token) for token, _ in drawn]
    offsets = []
    for token, _ in drawn:
        offsets.append(offset)
        offset += len(text.tokenizer.token_bytes(token).decode("utf-8", "replace"))
    top = []
    for token, entry in drawn:
        best = {text.of(other): max(logprob, LEAST_LOGPROB) for other, logprob in entry.top}
        best.setdefault(text.of(token), max(entry.logprob, LEAST_LOGPROB))
        top.append(best)
    return {
        "text_offset": offsets,
        "token_logprobs": [max(entry.logprob, LEAST_LOGPROB) for _, entry in drawn],
        "tokens": tokens,
        "top_logprobs": top,
    }


def frame(head: bytes, choice: dict[str, object] | None, usage: dict[str, object] | None, extra: bytes = b"") -> bytes:
    """One event of a stream: head as from ``Head.json``; choice None is a chunk without choices."""
    inner = b"" if choice is None else orjson.dumps(choice)
    counts = b"" if usage is None else b',"usage":' + orjson.dumps(usage)
    return b"data: " + head + b',"choices":[' + inner + b"]" + extra + counts + b"}\n\n"


def server_timing(timings: Sequence[Timing]) -> str:
    """The Server-Timing value of a reply: milliseconds in the queue, in prefill and in decode.

    Several choices run side by side: each phase lasts until the last of them leaves it.
    """
    arrival = min(timing.arrival_s for timing in timings)
    scheduled = max(timing.scheduled_s for timing in timings)
    first = max(timing.first_token_s for timing in timings)
    finished = max(timing.finished_s for timing in timings)
    spans = (("queue", arrival, scheduled), ("prefill", scheduled, first), ("decode", first, finished))
    return ", ".join(f"{name};dur={max(0.0, end - begin) * 1e3:.1f}" for name, begin, end in spans)
