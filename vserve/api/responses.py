"""/v1/responses: create, retrieve, delete, cancel, and list the input.

Owns what each route answers.  Event-loop thread; long conversations are rendered in the pool.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence

import orjson

from vserve.api.app import App, Served
from vserve.api.asked import checked
from vserve.api.chat import prepare
from vserve.api.choice import Choice
from vserve.api.fields import Field, Int, OneOf, Table, Text, Values, read, table, typed
from vserve.api.generation import Order, choices, ignored_header
from vserve.api.prompts import Message, text_of
from vserve.api.reply import Headers
from vserve.api.requests import parse_chat
from vserve.api.responses_events import Document
from vserve.api.responses_follow import Follower, Stored
from vserve.api.responses_items import Item, named
from vserve.api.responses_job import Job, Ticket
from vserve.api.responses_request import (
    ResponseRequest,
    conversation,
    own_type,
    own_words,
    parse,
    renamed,
    turns,
    without_oldest,
)
from vserve.api.responses_shelf import Shelf, owner
from vserve.api.schema import STREAM
from vserve.api.shapes import TokenText, server_timing
from vserve.api.tracing import trace_of
from vserve.errors import BadRequest, Conflict, InternalError, NotFound, shorten
from vserve.http.exchange import Exchange, Response
from vserve.store.record import Record, Status

STARTING_AFTER: Field[int | None] = Field(
    "starting_after", Int(0, 2**53), None, "with stream: the sequence number of the last event that the client has"
)
RETRIEVE = table(STREAM, STARTING_AFTER)
LIMIT: Field[int] = Field("limit", Int(1, 100), 20, "most items of the page")
ORDER: Field[str] = Field("order", OneOf(("asc", "desc")), "desc", "the first or the last item first")
AFTER: Field[str | None] = Field("after", Text(256, 1), None, "begin behind the item of this id")
INPUT_ITEMS = table(LIMIT, ORDER, AFTER)
LONG_TRACE = 2**15
"""Bytes of a trace above which it is read off the loop."""


class Responses:
    """The endpoints."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._shelf = Shelf(app.store, app.tasks)

    async def create(self, exchange: Exchange) -> Response | None:
        """Answer one request.  Raises ApiError while nothing has been sent."""
        app, served = self._app, self._app.served
        with own_type():
            asked = await checked(app, served.model, exchange, parse)
        with own_words(asked.source):
            job, headers = await self._job(exchange, served, asked)
            if exchange.gone:
                return None
            exchange.on_gone = job.stop  # nobody knows its id yet
            await self._shelf.begin(job)
        exchange.on_gone = None if asked.background else job.stop
        if asked.stream:
            # As with OpenAI: who leaves the stream of a response that is not in the background cancels it.
            await Follower(
                exchange,
                app.keep_alive,
                job,
                headers=headers,
                on_gone=exchange.on_gone,
                timing=lambda: timing_header(job.choice),
            ).run()
            return None
        if asked.background:
            return Response(200, orjson.dumps(job.now()), headers=headers)
        return await self._whole(exchange, job, headers)

    async def retrieve(self, exchange: Exchange) -> Response | None:
        """The response as it is now, or with stream=true its events from the beginning or after starting_after."""
        with own_type():
            query, headers = self._query(exchange, RETRIEVE)
            stream, after = query[STREAM], query[STARTING_AFTER]
            if after is not None and not stream:
                raise BadRequest("`starting_after` needs `stream` to be true.", param="starting_after")
            found = await self._shelf.find(exchange.params["id"], owner(self._app, exchange))
        if isinstance(found, Job):
            if not stream:
                return Response(200, orjson.dumps(found.now()), headers=headers)
            source: Job | Stored = found
        elif not stream:
            return Response(200, found.document, headers=headers)
        else:
            source = Stored.of(found) if len(found.trace) <= LONG_TRACE else await self._off_loop(found)
        await Follower(
            exchange, self._app.keep_alive, source, after=-1 if after is None else after, headers=headers
        ).run()
        return None

    async def delete(self, exchange: Exchange) -> Response:
        """Forget the response; one that runs is cancelled."""
        id = exchange.params["id"]
        with own_type():
            await self._shelf.delete(id, owner(self._app, exchange))
        return Response(200, orjson.dumps({"id": id, "object": "response", "deleted": True}))

    async def cancel(self, exchange: Exchange) -> Response:
        """Cancel a response that runs; one that is cancelled already is returned as it is."""
        id = exchange.params["id"]
        with own_type():
            found = await self._shelf.find(id, owner(self._app, exchange))
            if isinstance(found, Job):
                found.stop()
                await asyncio.shield(found.ended)
                document = found.body
            else:
                document = found.document
            if found.status is not Status.CANCELLED:
                raise Conflict(f"The response {shorten(id)} is {found.status.value} and cannot be cancelled any more.")
        return Response(200, document)

    async def input_items(self, exchange: Exchange) -> Response:
        """A page of the response's own input, the last item first unless order=asc."""
        with own_type():
            query, headers = self._query(exchange, INPUT_ITEMS)
            found = await self._shelf.find(exchange.params["id"], owner(self._app, exchange))
            items: list[Item] = orjson.loads(found.ticket.items if isinstance(found, Job) else found.items)
            if query[ORDER] == "desc":
                items.reverse()
            after = query[AFTER]
            if after is not None:
                ids = [item["id"] for item in items]
                if after not in ids:
                    raise NotFound(f"The response has no input item {shorten(after)}.", param="after")
                items = items[ids.index(after) + 1 :]
        page = items[: query[LIMIT]]
        listing = {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > len(page),
        }
        return Response(200, orjson.dumps(listing), headers=headers)

    def _query(self, exchange: Exchange, rows: Table) -> tuple[Values, Headers]:
        """The checked query, and the header that names what has no effect."""
        given = {name: typed(rows.get(name), values[-1]) for name, values in exchange.request.query_params().items()}
        values, ignored = read(given, rows, 0, self._app.options.strict)
        return values, ignored_header(ignored)

    async def _off_loop(self, record: Record) -> Stored:
        return await self._app.off_loop(lambda: Stored.of(record))

    async def _whole(self, exchange: Exchange, job: Job, headers: Headers) -> Response | None:
        """The finished response; who leaves before has cancelled it."""
        await asyncio.shield(job.ended)
        exchange.on_gone = None
        if job.status is Status.FAILED:
            raise job.error or InternalError("The response failed.")
        return Response(200, job.body, headers=(*headers, *timing_header(job.choice)))

    async def _job(self, exchange: Exchange, served: Served, asked: ResponseRequest) -> tuple[Job, Headers]:
        """The response that is asked for, not started yet, and the headers of its reply."""
        app, shelf, whose = self._app, self._shelf, owner(self._app, exchange)
        context = [] if asked.previous is None else await shelf.chain(asked.previous, whose)
        key = secrets.token_hex(16)
        items = named(await shelf.resolve(asked.items, whose), key)
        order = await _order(app, served, asked, conversation(asked, context, items))
        (choice,) = await choices(app, served, exchange, order)
        assert choice.request is not None  # max_output_tokens is at least 1
        sampling = choice.request.sampling
        now_s = int(time.time())
        document: Document = {
            "id": f"resp_{key}",
            "object": "response",
            "created_at": now_s,
            "status": None,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "model": served.name(order.wanted.model),
            "output": [],
            "usage": None,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **asked.echoed,
        }
        ticket = Ticket(
            key=key,
            owner=whose,
            created_s=now_s,
            document=document,
            items=orjson.dumps(items),
            kept=asked.store,
            background=asked.background,
            words=TokenText(served.model.tokenizer, False) if asked.logprobs else None,
        )
        ignored = dict.fromkeys((*asked.ignored, *renamed(order.wanted.ignored, asked.source)))
        trace = trace_of(exchange)
        if trace is not None:
            trace.reply_id, trace.stream = f"resp_{key}", asked.stream
        job = Job(app, served.model.bridge, choice, exchange.id, ticket)
        job.caller = app.caller(exchange)
        return job, ignored_header(tuple(ignored))


def timing_header(choice: Choice) -> Headers:
    """Where the time of a finished answer went, as far as that is known."""
    return () if choice.timing is None else (("server-timing", server_timing([choice.timing])),)


async def _order(app: App, served: Served, asked: ResponseRequest, said: Sequence[Message]) -> Order:
    """What is to be generated; with truncation auto without as many of the oldest messages as must go."""
    context = served.model.max_model_len

    async def made(count: int) -> Order:
        left = list(said) if count == 0 else without_oldest(said, count)
        chat = parse_chat({**asked.chat, "messages": left}, served.model.vocab_size, app.options.strict)
        served.name(chat.wanted.model)
        return await prepare(app, served, chat)

    async def fitting(count: int) -> Order | None:
        try:
            order = await made(count)
        except BadRequest:  # of what cannot fit, or of something that fewer messages do not cure
            if sum(len(text_of(message)) for message in said[count:]) <= context:
                raise
            return None
        return order if len(order.prompts[0].ids) + (order.wanted.max_tokens or 1) <= context else None

    most = turns(said)
    if not asked.cut_oldest or most == 0:
        return await made(0)
    order = await fitting(0)
    if order is not None:
        return order
    low, high = 1, most  # the least count that makes it fit, by halves
    while low < high:
        middle = (low + high) // 2
        if await fitting(middle) is None:
            low = middle + 1
        else:
            high = middle
    return await made(low)  # if even this does not fit, the numbers are told
