"""POST /v1/chat/completions: a conversation in, an assistant's message out.

Owns the wording of chat replies.  Event-loop thread; long conversations are rendered in the pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import orjson

from vserve.api.answering import answering, for_template, with_effort
from vserve.api.app import App, Served
from vserve.api.asked import checked
from vserve.api.choice import Choice
from vserve.api.fields import without_effect
from vserve.api.generation import Order, Prompt, check_length, generate, reply_head
from vserve.api.prompts import text_of
from vserve.api.reply import CountsNow
from vserve.api.requests import ChatRequest, Conversation, Wanted, parse_chat
from vserve.api.resume import resume
from vserve.api.shapes import Counts, Head, Piece, TokenText, chat_logprobs, frame, prompt_logprobs
from vserve.engine.request import FinishReason
from vserve.http.exchange import Exchange, Response
from vserve.text.parts import CallArguments, CallBegin, Content, Part, Reasoning
from vserve.text.template import missing_template

LONG_CONVERSATION = 64
"""Messages above which rendering is taken for slow, however short they are."""

PROMPT_END = 256


class Chat:
    """The endpoint."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def create(self, exchange: Exchange) -> Response | None:
        """Answer one request.  Raises ApiError while nothing has been sent."""
        app = self._app
        served = app.served
        event_id = exchange.request.headers.get("last-event-id")
        if event_id:
            return await resume(app, served, exchange, event_id)
        asked = await checked(app, served, exchange, parse_chat)
        order = await prepare(app, served, asked)
        head = reply_head(served, exchange, order.wanted, "chatcmpl-")
        text = TokenText(served.model.tokenizer, order.wanted.tokens_as_ids)
        legacy = asked.tools is not None and asked.tools.legacy

        def dialect() -> ChatDialect:
            return ChatDialect(head, order.wanted, text, legacy)

        return await generate(app, served, exchange, order, dialect(), renew=dialect)


async def prepare(app: App, served: Served, asked: ChatRequest) -> Order:
    """What is to be generated for a conversation, whichever endpoint it came through.  Raises BadRequest."""
    asked = with_effort(served, asked)
    most = served.model.max_model_len if asked.wanted.truncate is None else None
    ids, end = await _rendered(app, served, asked.conversation, most)
    if asked.tools is None:
        answer = answering(served, asked, end)
    else:  # the schemas of all tools become text there
        answer = await app.off_loop(partial(answering, served, asked, end))
    if app.options.strict and answer.wanted.ignored:
        raise without_effect(answer.wanted.ignored[0])
    return Order(
        wanted=answer.wanted,
        prompts=(Prompt(ids, "messages", _lead(asked)),),
        default_max_tokens=served.defaults.max_tokens,
        continuation=asked.conversation.continue_final_message,
        prompt_logprobs=asked.wanted.prompt_logprobs,
        splitting=answer.splitting,
    )


async def prompt_ids(app: App, served: Served, conversation: Conversation) -> list[int]:
    """The conversation as the model reads it.  Raises BadRequest when the template refuses it."""
    return (await _rendered(app, served, conversation))[0]


async def _rendered(
    app: App, served: Served, conversation: Conversation, most: int | None = None
) -> tuple[list[int], str]:
    """The conversation as token ids, and the last PROMPT_END characters of its text.

    Raises BadRequest, before it is tokenised, when it must have more than most tokens.
    """
    if served.model.template is None:
        raise missing_template()
    whole, tokenizer = served.model.template, served.model.tokenizer

    def render() -> tuple[list[int], str]:
        template, asked = for_template(whole, conversation)
        text = template.render(
            asked.messages,
            tools=asked.tools or None,
            documents=asked.documents or None,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
            extra=asked.template_kwargs,
        )
        if most is not None:
            check_length(tokenizer, text, most, "messages")
        return tokenizer.encode(text, add_special=asked.add_special), text[-PROMPT_END:]

    return render() if _is_short(conversation, app.options.long_text_chars) else await app.off_loop(render)


def _is_short(conversation: Conversation, limit_chars: int) -> bool:
    """Whether rendering takes no time worth a thread.  What the template makes of other variables nobody knows."""
    messages = conversation.messages
    if (
        len(messages) > LONG_CONVERSATION
        or conversation.documents
        or conversation.tools
        or conversation.template_kwargs
        or any("tool_calls" in message for message in messages)
    ):
        return False
    return sum(len(text_of(message)) for message in messages) <= limit_chars


def _lead(asked: ChatRequest) -> str:
    """With echo the answer begins with the last message, where that is the assistant's own."""
    last = asked.conversation.messages[-1]
    return text_of(last) if asked.echo and last["role"] == "assistant" else ""


class ChatDialect:
    """How chat replies are worded.  legacy: calls are worded as function_call."""

    def __init__(self, head: Head, wanted: Wanted, text: TokenText, legacy: bool = False) -> None:
        self._wanted = wanted
        self._legacy = legacy
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
        deltas: list[dict[str, object]] = [{"content": piece.text} if piece.text else {}]
        if piece.parts is not None:  # an event a part: clients know a call's beginning by its own
            deltas = [self._delta(part) for part in piece.parts] or [{}]
        events = b"".join(self._event(self._chunk_head, choice.index, delta, counts) for delta in deltas[:-1])
        entry: dict[str, object] = {"index": choice.index, "delta": deltas[-1]}
        entry["logprobs"] = chat_logprobs(piece.drawn, self._text) if piece.drawn else None
        entry["finish_reason"] = self._finish(choice, piece)
        if piece.finish is not None:
            entry["stop_reason"] = piece.stop_reason
        if self._wanted.return_token_ids:
            entry["token_ids"] = piece.ids
        head = self._chunk_head
        if piece.scores is not None and choice.first:
            head = head + b',"prompt_logprobs":' + orjson.dumps(self._scores(choice, piece))
        return events + frame(head, entry, counts().usage() if self._each_usage else None, self._extra)

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
        if self._wanted.prompt_logprobs is not None:
            reply["prompt_logprobs"] = self._scores(*pieces[0])
        return orjson.dumps(reply)

    def _scores(self, choice: Choice, piece: Piece) -> list[dict[str, object] | None]:
        return prompt_logprobs(choice.prompt, piece.scores or (), self._wanted.prompt_logprobs or 0, self._text)

    def _entry(self, choice: Choice, piece: Piece) -> dict[str, object]:
        entry: dict[str, object] = {
            "index": choice.index,
            "message": self._message(choice, piece),
            "logprobs": None if self._wanted.logprobs is None else chat_logprobs(piece.drawn, self._text),
            "finish_reason": self._finish(choice, piece),
            "stop_reason": piece.stop_reason,
        }
        if self._wanted.return_token_ids:
            entry["token_ids"] = piece.ids
        return entry

    def _message(self, choice: Choice, piece: Piece) -> dict[str, object]:
        parts = piece.parts or ()
        reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning)) or None
        texts = {part.index: part.text for part in parts if isinstance(part, CallArguments)}  # merged: one a call
        calls: list[dict[str, object]] = []
        for part in parts:
            if isinstance(part, CallBegin):
                function = {"name": part.name, "arguments": texts.get(part.index, "")}
                calls.append({"id": part.id, "type": "function", "function": function})
        message: dict[str, object] = {
            "role": "assistant",
            # An answer without a word is null only where there is something else in its place.
            "content": choice.lead + piece.text or (None if parts else ""),
            "refusal": None,
            "reasoning": reasoning,
            "reasoning_content": reasoning,
        }
        if calls and self._legacy:
            message["function_call"] = calls[0]["function"]
        elif calls:
            message["tool_calls"] = calls
        return message

    def _delta(self, part: Part) -> dict[str, object]:
        match part:
            case Reasoning(text):
                return {"reasoning": text, "reasoning_content": text}
            case Content(text):
                return {"content": text}
            case CallBegin(index, id, name):
                function = {"name": name, "arguments": ""}
                if self._legacy:
                    return {"function_call": function}
                return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
            case CallArguments(index, text):
                if self._legacy:
                    return {"function_call": {"arguments": text}}
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def _finish(self, choice: Choice, piece: Piece) -> str | None:
        if piece.finish is FinishReason.STOP and choice.num_calls:
            return "function_call" if self._legacy else "tool_calls"
        return None if piece.finish is None else piece.finish.value

    def _event(self, head: bytes, index: int, delta: Mapping[str, object], counts: CountsNow) -> bytes:
        entry: dict[str, object] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return frame(head, entry, counts().usage() if self._each_usage else None, self._extra)
