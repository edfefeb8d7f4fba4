"""POST /v1/chat/completions/render and /v1/completions/render: what the model would read, for people and programs.

The same checks as for the request itself; nothing is generated.  Event-loop thread; pages are written in the pool.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

import orjson

from vserve.api.accept import prefers
from vserve.api.app import App, Served
from vserve.api.asked import checked
from vserve.api.chat import prepare
from vserve.api.completions import prepare as prepare_completion
from vserve.api.generation import Order, fit, ignored_header
from vserve.api.prompts import Message, text_of
from vserve.api.requests import parse_chat, parse_completion
from vserve.http.exchange import Exchange, Response
from vserve.text.tokenizer import Tokenizer

HTML = "text/html; charset=utf-8"
_SAFE = (("content-security-policy", "default-src 'none'; sandbox"), ("x-content-type-options", "nosniff"))
_VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"})


class Render:
    """The endpoints."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def chat(self, exchange: Exchange) -> Response:
        """A conversation: its messages and the tokens the template makes of them."""
        app = self._app
        served = app.served
        asked = await checked(app, served, exchange, parse_chat)
        order = await prepare(app, served, asked)
        return await self._reply(exchange, served, order, asked.conversation.messages, many=False)

    async def completion(self, exchange: Exchange) -> Response:
        """One prompt, or a list of them."""
        app = self._app
        served = app.served
        asked = await checked(app, served, exchange, parse_completion)
        order = await prepare_completion(app, served, asked)
        return await self._reply(exchange, served, order, (), many=len(order.prompts) > 1)

    async def _reply(
        self, exchange: Exchange, served: Served, order: Order, messages: Sequence[Message], *, many: bool
    ) -> Response:
        """The page, or the JSON for a client that would rather have it; a list for many prompts."""
        served.name(order.wanted.model)
        tokenizer, context = served.model.tokenizer, served.model.max_model_len
        prompts = [fit(prompt, order, context)[0] for prompt in order.prompts]
        headers = ignored_header(order.wanted.ignored)
        if prefers(exchange.request.headers.get("accept"), "application/json", "text/html"):

            def json() -> bytes:
                entries = [_entry(tokenizer, ids, context) for ids in prompts]
                return orjson.dumps(entries if many else entries[0])

            return Response(200, await self._app.off_loop(json), headers=headers)

        def page() -> bytes:
            parts = [_message(message) for message in messages]
            if not messages:
                parts = [_prompt(tokenizer.decode(ids)) for ids in prompts]
            return "\n".join([*parts, *(_tokens(tokenizer, ids) for ids in prompts)]).encode("utf-8", "replace")

        return Response(200, await self._app.off_loop(page), HTML, (*_SAFE, *headers))


def _entry(tokenizer: Tokenizer, ids: Sequence[int], context: int) -> dict[str, object]:
    return {
        "prompt": tokenizer.decode(ids),
        "token_ids": list(ids),
        "token_strs": tokenizer.token_strs(ids),
        "count": len(ids),
        "max_model_len": context,
    }


def _message(message: Message) -> str:
    role = str(message["role"])
    text = text_of(message)
    calls = message.get("tool_calls")
    if calls:
        text += ("\n" if text else "") + orjson.dumps(calls).decode()
    name = role if re.fullmatch(r"[a-z_-]{1,64}", role) else "other"  # a role is the client's own word
    return _box(f"message-{name}", role, text)


def _prompt(text: str) -> str:
    return _box("message-prompt", "prompt", text)


def _box(name: str, label: str, text: str) -> str:
    return (
        f'<div class="chat-message">\n<div class="{name}">{escape(label)}</div>\n'
        f'<div class="message-content">{escape(text)}</div>\n</div>'
    )


def _tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Every token with its id; white space is made visible, bytes that are no text by themselves are U+FFFD."""
    shown = []
    for token in ids:
        text = tokenizer.token_bytes(token).decode("utf-8", "replace").translate(_VISIBLE)
        kind = "token special" if tokenizer.is_special(token) else "token"
        shown.append(f'<span class="{kind}"><code>{escape(text)}</code> <sub>{token}</sub></span>')
    head = f'<div class="prompt-tokens">\n<div class="token-count">{len(ids)} tokens</div>\n'
    return head + "\n".join(shown) + "\n</div>"
