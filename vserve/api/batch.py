"""POST /v1/chat/completions/batch: many conversations in, one choice for each out.

Event-loop thread only.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from vserve.api import schema
from vserve.api.app import App
from vserve.api.asked import checked
from vserve.api.chat import ChatDialect, prepare
from vserve.api.fields import Field, read, refused, table
from vserve.api.generation import Order, Prompt, generate, reply_head
from vserve.api.nested import Items
from vserve.api.prompts import Message, Messages
from vserve.api.requests import ChatRequest, parse_chat
from vserve.api.shapes import TokenText
from vserve.http.exchange import Exchange, Response

CONVERSATION_LIMIT = 128
CONVERSATIONS: Field[tuple[tuple[Message, ...], ...]] = Field(
    "messages", Items(Messages(), CONVERSATION_LIMIT, 1), (), "a list of conversations", required=True
)
_ONE = "each conversation has one choice, sent with the others"
_OWN = (
    CONVERSATIONS,
    refused("n", _ONE, (1,)),
    refused("stream", _ONE, (False,)),
    refused("stream_options", _ONE),
    refused("return_token_ids", "token ids of one prompt", (False,)),
)
BATCH = table(*(row for name, row in schema.CHAT.items() if name not in {own.name for own in _OWN}), *_OWN)


def parse_batch(
    body: dict[str, object], vocab_size: int, strict: bool = False
) -> tuple[tuple[tuple[Message, ...], ...], ChatRequest]:
    """body as its conversations and the chat request that the first of them makes.  Raises BadRequest."""
    conversations = read(body, BATCH, vocab_size, strict)[0][CONVERSATIONS]
    return conversations, parse_chat({**body, "messages": list(conversations[0])}, vocab_size, strict)


class Batch:
    """The endpoint."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def create(self, exchange: Exchange) -> Response | None:
        """Answer one request.  Raises ApiError while nothing has been sent."""
        app = self._app
        served = app.served
        conversations, first = await checked(app, served, exchange, parse_batch)
        order: Order | None = None
        prompts: list[Prompt] = []
        for i, messages in enumerate(conversations):
            asked = replace(first, conversation=replace(first.conversation, messages=messages))
            order = await prepare(app, served, asked)
            prompts += [replace(prompt, path=f"messages[{i}]") for prompt in order.prompts]
            await asyncio.sleep(0)  # many short conversations take as long as a long one: others get their turn
        assert order is not None  # the table asks for at least one conversation
        wanted = first.wanted
        head = reply_head(served, exchange, wanted, "chatcmpl-")
        dialect = ChatDialect(head, wanted, TokenText(served.model.tokenizer, wanted.tokens_as_ids))
        return await generate(app, served, exchange, replace(order, prompts=prompts), dialect)
