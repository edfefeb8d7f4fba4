"""POST /v1/chat/completions: a conversation in, an assistant's message out.

Owns the wording of chat replies.  Event-loop thread; long conversations are rendered in the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from vserve.api import body
from vserve.api.app import App, Served
from vserve.api.choice import Choice
from vserve.api.generation import Order, Prompt, check_length, generate, reply_head
from vserve.api.prompts import text_of
from vserve.api.reply import CountsNow
from vserve.api.requests import ChatRequest, Conversation, Wanted, parse_chat
from vserve.api.resume import resume
from vserve.api.shapes import Counts, Head, Piece, TokenText, chat_logprobs, frame
from vserve.http.exchange import Exchange, Response
from vserve.text.template import missing_template

LONG_CONVERSATION = 64
"""Messages above which rendering is taken for slow, however short they are."""


class Chat:
    """The endpoint."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def create(self, exchange: Exchange) -> Response | None:
        """Answer one request.  Raises ApiError while nothing has been sent."""
        app = self._app
        served = app.served
        request = exchange.request
        event_id = request.headers.get("last-event-id")
        if event_id:
            return await resume(app, served, exchange, event_id)
        fields = body.read(request.body, request.headers.get("content-type"))
        asked = parse_chat(fields, served.model.vocab_size, app.options.strict)
        wanted = asked.wanted
        head = reply_head(served, exchange, wanted, "chatcmpl-")
        text = TokenText(served.model.tokenizer, wanted.tokens_as_ids)
        order = await prepare(app, served, asked)

        def dialect() -> ChatDialect:
            return ChatDialect(head, wanted, text)

        return await generate(app, served, exchange, order, dialect(), renew=dialect)


async def prepare(app: App, served: Served, asked: ChatRequest) -> Order:
    """What is to be generated for a conversation, whichever endpoint it came through.  Raises BadRequest."""
    most = served.model.max_model_len if asked.wanted.truncate is None else None
    prompt = Prompt(await prompt_ids(app, served, asked.conversation, most), "messages", _lead(asked))
    return Order(
        wanted=asked.wanted,
        prompts=(prompt,),
        default_max_tokens=served.defaults.max_tokens,
        continuation=asked.conversation.continue_final_message,
    )


async def prompt_ids(app: App, served: Served, conversation: Conversation, most: int | None = None) -> list[int]:
    """The conversation as the model reads it.

    Raises BadRequest when the template refuses it, or before it is tokenised when it must have more than most tokens.
    """
    template, tokenizer = served.model.template, served.model.tokenizer
    if template is None:
        raise missing_template()

    def render() -> list[int]:
        text = template.render(
            conversation.messages,
            tools=conversation.tools or None,
            documents=conversation.documents or None,
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
            extra=conversation.template_kwargs,
        )
        if most is not None:
            check_length(tokenizer, text, most, "messages")
        return tokenizer.encode(text, add_special=conversation.add_special)

    return render() if _is_short(conversation, app.options.long_text_chars) else await app.off_loop(render)


def _is_short(conversation: Conversation, limit_chars: int) -> bool:
    """Whether rendering takes no time worth a thread.  What the template makes of other variables nobody knows."""
    messages = conversation.messages
    if (
        len(messages) > LONG_CONVERSATION
        or conversation.documents
        or conversation.tools
        or conversation.template_kwargs
    ):
        return False
    return sum(len(text_of(message)) for message in messages) <= limit_chars


def _lead(asked: ChatRequest) -> str:
    """With echo the answer begins with the last message, where that is the assistant's own."""
    last = asked.conversation.messages[-1]
    return text_of(last) if asked.echo and last["role"] == "assistant" else ""


class ChatDialect:
    """How chat replies are worded."""

    def __init__(self, head: Head, wanted: Wanted, text: TokenText) -> None:
        self._wanted = wanted
        self._text = text
        options = wanted.stream_options
        self._each_usage = options.continuous_usage_stats
        self._last_usage = options.include_usage
        self._extra = b',"usage":null' if options.include_usage and not options.continuous_usage_stats else b""
        self._chunk_head = head.json("chat.completion.chunk")
        self._head = head

    def affixes(self, index: int) -> tuple[bytes, bytes]:
        """See reply.Dialect."""
        before = b'data: %b,"choices":[{"index":%d,"delta":{"content":' % (self._chunk_head, index)
        return before, b'},"logprobs":null,"finish_reason":null}]%b}\n\n' % self._extra

    def opening(self, choice: Choice, counts: CountsNow) -> bytes:
        """The role, and the text that goes before the first token."""
        head = self._chunk_head
        if self._wanted.return_token_ids:
            head = head + b',"prompt_token_ids":' + orjson.dumps(list(choice.prompt))
        events = self._event(head, choice.index, {"role": "assistant", "content": ""}, counts)
        if choice.lead:
            events += self._event(self._chunk_head, choice.index, {"content": choice.lead}, counts)
        return events

    def chunk(self, choice: Choice, piece: Piece, counts: CountsNow) -> bytes:
        """See reply.Dialect."""
        entry: dict[str, object] = {"index": choice.index, "delta": {"content": piece.text} if piece.text else {}}
        entry["logprobs"] = chat_logprobs(piece.drawn, self._text) if piece.drawn else None
        entry["finish_reason"] = None if piece.finish is None else piece.finish.value
        if piece.finish is not None:
            entry["stop_reason"] = piece.stop_reason
        if self._wanted.return_token_ids:
            entry["token_ids"] = piece.ids
        return frame(self._chunk_head, entry, counts().usage() if self._each_usage else None, self._extra)

    def ending(self, counts: CountsNow) -> bytes:
        """See reply.Dialect."""
        return frame(self._chunk_head, None, counts().usage()) if self._last_usage else b""

    def whole(self, pieces: Sequence[tuple[Choice, Piece]], counts: Counts) -> bytes:
        """See reply.Dialect."""
        reply: dict[str, object] = {
            "id": self._head.id,
            "object": "chat.completion",
            "created": self._head.created_s,
            "model": self._head.model,
            "choices": [self._entry(choice, piece) for choice, piece in pieces],
            "usage": counts.usage(),
            "system_fingerprint": self._head.fingerprint,
        }
        if self._wanted.return_token_ids:
            reply["prompt_token_ids"] = list(pieces[0][0].prompt)
        return orjson.dumps(reply)

    def _entry(self, choice: Choice, piece: Piece) -> dict[str, object]:
        entry: dict[str, object] = {
            "index": choice.index,
            "message": {
                "role": "assistant",
                "content": choice.lead + piece.text,
                "refusal": None,
                "reasoning": None,
                "reasoning_content": None,
            },
            "logprobs": None if self._wanted.logprobs is None else chat_logprobs(piece.drawn, self._text),
            "finish_reason": None if piece.finish is None else piece.finish.value,
            "stop_reason": piece.stop_reason,
        }
        if self._wanted.return_token_ids:
            entry["token_ids"] = piece.ids
        return entry

    def _event(self, head: bytes, index: int, delta: dict[str, str], counts: CountsNow) -> bytes:
        entry: dict[str, object] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return frame(head, entry, counts().usage() if self._each_usage else None, self._extra)
