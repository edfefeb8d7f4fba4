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
        usage: dict[str, object] = {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        if self.reasoning is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning}
        return usage


@dataclass(frozen=True, slots=True)
class Piece:
    """What one choice has to say in one chunk, or in all when the reply is whole.

    text: the content only.  offset: characters of the choice's text before this piece.  finish: set on the last piece.
    scores: of the prompt's tokens but the first, once, where they are wanted.  parts: all of it in order, the content
    too; None where the text is not split, so that all of it is content.
    """

    text: str
    offset: int = 0
    ids: Sequence[int] = ()
    drawn: Sequence[Drawn] = ()
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    scores: Sequence[TokenLogprobs] | None = None
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


@dataclass(frozen=True, slots=True)
class Echoed:
    """The prompt's tokens as they stand before the drawn ones; scores: of all but the first."""

    prompt: Sequence[int]
    scores: Sequence[TokenLogprobs]
    top: int


def completion_logprobs(
    drawn: Sequence[Drawn], offset: int, text: TokenText, echoed: Echoed | None = None
) -> dict[str, object]:
    """The ``logprobs`` object of a completion choice; offset: characters before the first of the drawn tokens."""
    tokens: list[str] = []
    offsets: list[int] = []
    logprobs: list[float | None] = []
    top: list[dict[str, float] | None] = []

    def add(token: int, entry: TokenLogprobs | None, most: int, at: int) -> int:
        tokens.append(text.of(token))
        offsets.append(at)
        if entry is None:  # nothing comes before the first token
            logprobs.append(None)
            top.append(None)
        else:
            best = {text.of(other): max(logprob, LEAST_LOGPROB) for other, logprob in entry.top[:most]}
            best.setdefault(text.of(token), max(entry.logprob, LEAST_LOGPROB))
            logprobs.append(max(entry.logprob, LEAST_LOGPROB))
            top.append(best)
        return at + len(text.tokenizer.token_bytes(token).decode("utf-8", "replace"))

    if echoed is not None:
        at = 0
        for token, entry in zip(echoed.prompt, (None, *echoed.scores), strict=True):
            at = add(token, entry, echoed.top, at)
    for token, entry in drawn:
        offset = add(token, entry, len(entry.top), offset)
    return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": tokens, "top_logprobs": top}


def prompt_logprobs(
    prompt: Sequence[int], scores: Sequence[TokenLogprobs], top: int, text: TokenText
) -> list[dict[str, object] | None]:
    """vLLM's ``prompt_logprobs``: null for the first token; for each other its own entry and the top most likely."""
    entries: list[dict[str, object] | None] = [None]
    for token, score in zip(prompt[1:], scores, strict=True):
        ranked = {token: (score.logprob, score.rank)}
        for rank, (other, logprob) in enumerate(score.top[:top], 1):
            ranked.setdefault(other, (logprob, rank))
        entries.append(
            {
                str(one): {"logprob": max(logprob, LEAST_LOGPROB), "rank": rank, "decoded_token": text.of(one)}
                for one, (logprob, rank) in ranked.items()
            }
        )
    return entries


def frame(head: bytes, choice: dict[str, object] | None, usage: dict[str, object] | None, extra: bytes = b"") -> bytes:
    """One event of a stream: head as from ``Head.json``; choice None is a chunk without choices."""
    inner = b"" if choice is None else orjson.dumps(choice)
    counts = b"" if usage is None else b',"usage":' + orjson.dumps(usage)
    return b"data: " + head + b',"choices":[' + inner + b"]" + extra + counts + b"}\n\n"


def server_timing(timings: Sequence[Timing], decoded: bool = True) -> str:
    """The Server-Timing value of a reply: milliseconds in the queue, in prefill and, once decoded, in decode.

    Several choices run side by side: each phase lasts until the last of them leaves it.
    """
    arrival = min(timing.arrival_s for timing in timings)
    scheduled = max(timing.scheduled_s for timing in timings)
    first = max(timing.first_token_s for timing in timings)
    finished = max(timing.finished_s for timing in timings)
    spans = [("queue", arrival, scheduled), ("prefill", scheduled, first)]
    if decoded:
        spans.append(("decode", first, finished))
    return ", ".join(f"{name};dur={max(0.0, end - begin) * 1e3:.1f}" for name, begin, end in spans)
