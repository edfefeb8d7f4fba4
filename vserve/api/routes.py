"""The explicit table of routes: who answers what, who may call, and what must be there first.

Nothing else adds a route.  ``gate`` decides on a request before its body is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vserve.api import messages_fields, schema
from vserve.api.access import METRICS, Key, credentials
from vserve.api.app import App
from vserve.api.batch import BATCH, Batch
from vserve.api.chat import Chat
from vserve.api.completions import Completions
from vserve.api.embeddings import Embeddings
from vserve.api.entry import ADMIN, INFER, OPEN, Body, Doc, Entry, Need
from vserve.api.invocations import Invocations
from vserve.api.messages import Messages
from vserve.api.models import Models
from vserve.api.openapi import OpenApi
from vserve.api.ops import Ops
from vserve.api.render import Render
from vserve.api.responses import INPUT_ITEMS, RETRIEVE, Responses
from vserve.api.scale import SCALE, Scale
from vserve.api.score import Score
from vserve.api.tokens import Tokens
from vserve.errors import ApiError
from vserve.http.exchange import Headers
from vserve.http.router import Route


class HasHeaders(Protocol):
    """A request's head, as far as the gate looks at it."""

    @property
    def headers(self) -> Headers: ...


_PROBED = ((503, "Health"),)


def table(app: App) -> tuple[Entry, ...]:
    """Every route of the server.  HEAD is served wherever GET is."""
    ops, models, tokens, messages, openapi = Ops(app), Models(app), Tokens(app), Messages(app), OpenApi(app)
    chat, completions, render, batch, scale = Chat(app), Completions(app), Render(app), Batch(app), Scale(app)
    embeddings, score, responses = Embeddings(app), Score(app), Responses(app)
    invocations = Invocations(app, {"messages": chat.create, "prompt": completions.create, "input": embeddings.create})
    asks_embedding = Body("EmbeddingRequest", schema.EMBEDDINGS)
    asks_chat = Body("ChatCompletionRequest", schema.CHAT)
    asks_text = Body("CompletionRequest", schema.COMPLETIONS)
    get, post, html = ("GET",), ("POST",), ("text/html",)
    rows = [
        Entry("ping", ("GET", "POST"), ("/ping",), ops.ping, OPEN, Need.NOTHING, Doc("The event loop turns.")),
        Entry(
            "health", get, ("/health",), ops.health, OPEN, Need.NOTHING,
            Doc("New work would be taken and the engine is alive.", reply="Health", also=_PROBED),
        ),
        Entry(
            "ready", get, ("/health/ready", "/readyz"), ops.ready, OPEN, Need.NOTHING,
            Doc("Traffic may be sent here.", reply="Health", also=_PROBED),
        ),
        Entry(
            "live", get, ("/livez",), ops.live, OPEN, Need.NOTHING,
            Doc("A restart would not help.", reply="Health", also=_PROBED),
        ),
        Entry(
            "startup", get, ("/startupz",), ops.startup, OPEN, Need.NOTHING,
            Doc("The start is over.", reply="Health", also=_PROBED),
        ),
        Entry(
            "version", get, ("/version",), ops.version, OPEN, Need.NOTHING,
            Doc("The server's version.", reply="Version", texts=("text/plain",)),
        ),
        Entry(
            "metrics", get, ("/metrics",), ops.metrics, METRICS, Need.NOTHING,
            Doc("Figures for Prometheus.", texts=("text/plain",)),
        ),
        Entry(
            "load", get, ("/load",), ops.load, INFER, Need.NOTHING, Doc("How much there is to do.", reply="Load")
        ),
        Entry(
            "models", get, ("/v1/models",), models.list, INFER, Need.MODEL,
            Doc("The models that are served.", reply="ModelList"),
        ),
        Entry(
            "model", get, ("/v1/models/{id:path}",), models.retrieve, INFER, Need.MODEL,
            Doc("One model.", reply="Model"),
        ),
        Entry(
            "chat", post, ("/v1/chat/completions",), chat.create, INFER, Need.ROOM,
            Doc(
                "Go on with a conversation.",
                takes=(asks_chat,),
                reply="ChatCompletion",
                events="ChatCompletionChunk",
            ),
        ),
        Entry(
            "completions", post, ("/v1/completions",), completions.create, INFER, Need.ROOM,
            Doc(
                "Go on with texts.",
                takes=(asks_text,),
                reply="Completion",
                events="Completion",
            ),
        ),
        Entry(
            "batch", post, ("/v1/chat/completions/batch",), batch.create, INFER, Need.ROOM,
            Doc("Go on with many conversations.", takes=(Body("BatchRequest", BATCH),), reply="ChatCompletion"),
        ),
        Entry(
            "render_chat", post, ("/v1/chat/completions/render",), render.chat, INFER, Need.MODEL,
            Doc("What the model would read of a conversation.", takes=(asks_chat,), reply="Rendered", texts=html),
        ),
        Entry(
            "render_completion", post, ("/v1/completions/render",), render.completion, INFER, Need.MODEL,
            Doc("What the model would read of prompts.", takes=(asks_text,), reply="Rendered", texts=html),
        ),
        Entry(
            "invocations", post, ("/invocations",), invocations.create, INFER, Need.ROOM,
            Doc("SageMaker's one path: the body says which endpoint is meant.",
                takes=(asks_chat, asks_text, asks_embedding),
                reply="Invocation", events="InvocationEvent"),
        ),
        Entry(
            "responses", post, ("/v1/responses",), responses.create, INFER, Need.ROOM,
            Doc("Answer, and keep the answer.", takes=(Body("ResponseRequest", schema.RESPONSES),), reply="Response",
                events="ResponseEvent", fails=(409,)),
        ),
        # Nothing is needed of the model: what was stored can be had while it loads and while others drain.
        Entry(
            "response", get, ("/v1/responses/{id}",), responses.retrieve, INFER, Need.NOTHING,
            Doc("A stored response, or its events.", query=RETRIEVE, reply="Response", events="ResponseEvent",
                fails=(503,)),
        ),
        Entry(
            "response_delete", ("DELETE",), ("/v1/responses/{id}",), responses.delete, INFER, Need.NOTHING,
            Doc("Forget a response.", reply="ResponseDeleted", fails=(503,)),
        ),
        Entry(
            "response_cancel", post, ("/v1/responses/{id}/cancel",), responses.cancel, INFER, Need.NOTHING,
            Doc("Stop a response that runs.", reply="Response", fails=(409, 503)),
        ),
        Entry(
            "response_items", get, ("/v1/responses/{id}/input_items",), responses.input_items, INFER, Need.NOTHING,
            Doc("What a response was asked.", query=INPUT_ITEMS, reply="ResponseItems", fails=(503,)),
        ),
        Entry(
            "embeddings", post, ("/v1/embeddings",), embeddings.create, INFER, Need.ENCODER_ROOM,
            Doc("Texts as vectors.", takes=(asks_embedding,), reply="EmbeddingList"),
        ),
        Entry(
            "score", post, ("/score", "/v1/score"), score.score, INFER, Need.ENCODER_ROOM,
            Doc("How alike texts are.", takes=(Body("ScoreRequest", schema.SCORE),), reply="ScoreList"),
        ),
        Entry(
            "rerank", post, ("/rerank", "/v1/rerank", "/v2/rerank"), score.rerank, INFER, Need.ENCODER_ROOM,
            Doc("Documents in the order of how well they fit.", takes=(Body("RerankRequest", schema.RERANK),),
                reply="Ranking"),
        ),
        Entry(
            "scale", post, ("/scale_elastic_ep",), scale.resize, ADMIN, Need.MODEL,
            Doc("Change how many copies of the model there are.", takes=(Body("ScaleRequest", SCALE),), query=SCALE,
                reply="Scaled"),
        ),
        Entry(
            "scaling", ("GET", "POST"), ("/is_scaling_elastic_ep",), scale.state, ADMIN, Need.NOTHING,
            Doc("Whether such a change is under way.", reply="Scaling"),
        ),
        Entry(
            "messages", post, ("/v1/messages",), messages.create, INFER, Need.ROOM,
            Doc(
                "Go on with a conversation, in Anthropic's words.",
                takes=(Body("MessagesRequest", messages_fields.MESSAGES),),
                reply="Message",
                events="MessageEvent",
                error="MessagesError",
            ),
        ),
        Entry(
            "count_tokens", post, ("/v1/messages/count_tokens",), messages.count_tokens, INFER, Need.MODEL,
            Doc(
                "How many tokens the model would read.",
                takes=(Body("CountTokensRequest", messages_fields.COUNT_TOKENS),),
                reply="TokenCount",
                error="MessagesError",
            ),
        ),
        Entry(
            "tokenize", post, ("/tokenize", "/v1/tokenize"), tokens.tokenize, INFER, Need.MODEL,
            Doc(
                "Texts or a conversation as token ids.",
                takes=(Body("TokenizeRequest", schema.TOKENIZE),),
                reply="Tokenized",
            ),
        ),
        Entry(
            "detokenize", post, ("/detokenize", "/v1/detokenize"), tokens.detokenize, INFER, Need.MODEL,
            Doc("Token ids as text.", takes=(Body("DetokenizeRequest", schema.DETOKENIZE),), reply="Detokenized"),
        ),
    ]  # fmt: skip
    if app.options.docs:
        doc = Doc("This description.", reply="OpenApi")
        rows.append(Entry("openapi", get, ("/openapi.json",), openapi.get, OPEN, Need.NOTHING, doc))
    openapi.cover(rows)
    return tuple(rows)


def routes(entries: Sequence[Entry]) -> list[Route]:
    """The rows as the router takes them.  Probes are vital: they are answered at the limit of connections too."""
    return [
        Route(
            method,
            pattern,
            entry.handler,
            entry.name,
            auth=entry.auth,
            body=method == "POST" and entry.auth != OPEN,
            vital=entry.auth in (OPEN, METRICS),
        )
        for entry in entries
        for pattern in entry.patterns
        for method in entry.methods
    ]


class Gate:
    """Who is let in, decided on the matched route before the body is read."""

    def __init__(self, app: App, entries: Sequence[Entry]) -> None:
        self._app = app
        self._entries = {entry.name: entry for entry in entries}

    def __call__(self, head: HasHeaders, route: Route) -> ApiError | None:
        """The reason to refuse, or None.  A route that is not in the table is guarded like any other."""
        error = self._refusal(head, route)
        if error is not None:
            self._app.refused(error)
        return error

    def _refusal(self, head: HasHeaders, route: Route) -> ApiError | None:
        app, entry = self._app, self._entries.get(route.name)
        caller: Key | None = None
        if route.auth != OPEN:
            try:
                caller = app.keys.check(credentials(head.headers), route.auth)
            except ApiError as error:
                return error
        refusal: ApiError | None = None
        if entry is not None and entry.need is not Need.NOTHING:
            refusal = app.unavailable()
            if refusal is None and entry.need is Need.ROOM:
                refusal = app.overloaded()
            elif refusal is None and entry.need is Need.ENCODER_ROOM:
                refusal = app.encoder_overloaded()
        # Last: only a request that is let in otherwise counts against its key's rate.
        return refusal if refusal is not None else app.keys.spend(caller)
