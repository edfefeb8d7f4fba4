"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's way to ask for a chat.

Owns the two endpoints and the wording of their replies.  Event-loop thread only.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from functools import partial

import orjson

from vserve.api import messages_errors
from vserve.api import messages_fields as row
from vserve.api.app import App
from vserve.api.asked import checked
from vserve.api.chat import prepare, prompt_ids
from vserve.api.choice import Choice
from vserve.api.generation import generate, ignored_header, reply_head
from vserve.api.messages_chat import own_words, parse_messages
from vserve.api.reply import CountsNow, Framing
from vserve.api.resume import resume
from vserve.api.shapes import Counts, Head, Piece
from vserve.engine.request import FinishReason
from vserve.http import sse
from vserve.http.exchange import Exchange, Response
from vserve.text.parts import CallArguments, CallBegin, Content, Part, Reasoning


def _event(kind: str, **fields: object) -> bytes:
    return sse.frame(orjson.dumps({"type": kind, **fields}), event=kind)


FRAMING = Framing(_event("ping"), b"", messages_errors.event)


class Messages:
    """The endpoints."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def create(self, exchange: Exchange) -> Response | None:
        """Answer one request.  Raises ApiError while nothing has been sent."""
        app = self._app
        served = app.served
        event_id = exchange.request.headers.get("last-event-id")
        if event_id:
            return await resume(app, served, exchange, event_id, FRAMING)
        asked = await checked(app, served, exchange, partial(parse_messages, row.MESSAGES))
        head = reply_head(served, exchange, asked.wanted, "msg_")
        with own_words():
            order = await prepare(app, served, asked)
        renew = partial(MessagesDialect, head)
        return await generate(app, served, exchange, order, renew(), FRAMING, renew)

    async def count_tokens(self, exchange: Exchange) -> Response:
        """How many tokens the model would read."""
        app = self._app
        served = app.served
        asked = await checked(app, served, exchange, partial(parse_messages, row.COUNT_TOKENS))
        served.name(asked.wanted.model)
        with own_words():
            ids = await prompt_ids(app, served, asked.conversation)
        return Response(200, orjson.dumps({"input_tokens": len(ids)}), headers=ignored_header(asked.wanted.ignored))


class Block(enum.Enum):
    """A kind of content block, as its ``type`` says it."""

    TEXT = "text"
    THINKING = "thinking"
    TOOL_USE = "tool_use"


_EMPTY: dict[Block, dict[str, object]] = {
    Block.TEXT: {"type": "text", "text": ""},
    Block.THINKING: {"type": "thinking", "thinking": "", "signature": ""},
}


class MessagesDialect:
    """How the one choice of a reply is worded.  A stream has one block open at a time."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._open: Block | None = None
        self._index = -1
        self._called = False

    def affixes(self, index: int) -> tuple[bytes, bytes]:
        """See reply.Dialect.  Text that needs no look is that of the first block: it is not split into parts."""
        before = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        return before + b'"delta":{"type":"text_delta","text":', b"}}\n\n"

    def opening(self, choice: Choice, counts: CountsNow) -> bytes:
        """See reply.Dialect."""
        message = self._message([], None, None, _usage(counts()))
        return _event("message_start", message=message) + FRAMING.quiet

    def chunk(self, choice: Choice, piece: Piece, counts: CountsNow) -> bytes:
        """See reply.Dialect."""
        events = b"".join(event for part in _parts(piece) for event in self._events(part))
        if piece.finish is None:
            return events
        reason, sequence = _stop(piece, self._called)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return events + self._close() + _event("message_delta", delta=delta, usage=_usage(counts()))

    def ending(self, counts: CountsNow) -> bytes:
        """See reply.Dialect."""
        return _event("message_stop")

    def whole(self, pieces: Sequence[tuple[Choice, Piece]], counts: Counts) -> bytes:
        """See reply.Dialect."""
        ((_, piece),) = pieces
        parts = _parts(piece)
        reason, sequence = _stop(piece, any(isinstance(part, CallBegin) for part in parts))
        return orjson.dumps(self._message(_blocks(parts), reason, sequence, _usage(counts)))

    def _message(
        self, content: list[dict[str, object]], reason: str | None, sequence: str | None, usage: dict[str, int]
    ) -> dict[str, object]:
        return {
            "id": self._head.id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage,
        }

    def _events(self, part: Part) -> Iterator[bytes]:
        match part:
            case Content(text):
                yield self._switch(Block.TEXT)
                yield self._delta({"type": "text_delta", "text": text})
            case Reasoning(text):
                yield self._switch(Block.THINKING)
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case CallBegin(_, id, name):
                self._called = True
                yield self._close()
                yield self._start(Block.TOOL_USE, {"type": "tool_use", "id": id, "name": name, "input": {}})
            case CallArguments(_, text):
                yield self._delta({"type": "input_json_delta", "partial_json": text})

    def _switch(self, block: Block) -> bytes:
        return b"" if self._open is block else self._close() + self._start(block, _EMPTY[block])

    def _start(self, block: Block, content: dict[str, object]) -> bytes:
        self._open = block
        self._index += 1
        return _event("content_block_start", index=self._index, content_block=content)

    def _delta(self, delta: dict[str, object]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", index=self._index)


def _parts(piece: Piece) -> Sequence[Part]:
    if piece.parts is not None:
        return piece.parts
    return (Content(piece.text),) if piece.text else ()


def _blocks(parts: Sequence[Part]) -> list[dict[str, object]]:
    """The content of a whole reply: neighbours of one kind are one block."""
    blocks: list[dict[str, object]] = []
    arguments: dict[int, list[str]] = {}  # of the block at that place
    for part in parts:
        match part:
            case CallBegin(_, id, name):
                arguments[len(blocks)] = []
                blocks.append({"type": "tool_use", "id": id, "name": name, "input": {}})
            case CallArguments(_, text):
                arguments[len(blocks) - 1].append(text)
            case Content(text) | Reasoning(text):
                block = Block.TEXT if isinstance(part, Content) else Block.THINKING
                if not blocks or blocks[-1]["type"] != block.value:
                    blocks.append(dict(_EMPTY[block]))
                blocks[-1][block.value] = f"{blocks[-1][block.value]}{text}"
    for place, texts in arguments.items():
        blocks[place]["input"] = _input("".join(texts))
    return blocks


def _input(arguments: str) -> dict[str, object]:
    """A call's arguments as an object; what a cut left broken is handed on as the text it is."""
    try:
        made: object = orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        made = None
    return made if isinstance(made, dict) else {"arguments": arguments}


def _stop(piece: Piece, called: bool) -> tuple[str, str | None]:
    """stop_reason and stop_sequence of a finished choice."""
    if piece.finish is FinishReason.LENGTH:
        return "max_tokens", None
    if isinstance(piece.stop_reason, str):
        return "stop_sequence", piece.stop_reason
    return "tool_use" if called else "end_turn", None


def _usage(counts: Counts) -> dict[str, int]:
    """Anthropic's input_tokens are those that were not in the cache."""
    return {
        "input_tokens": counts.prompt - counts.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached,
        "output_tokens": counts.completion,
    }
