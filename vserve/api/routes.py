"""The explicit table of routes: who answers what, who may call, and what must be there first.

Nothing else adds a route.  ``gate`` decides on a request before its body is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from vserve.api import messages_fields, schema
from vserve.api.access import METRICS, Caller, credentials
from vserve.api.app import App
from vserve.api.batch import BATCH, Batch
from vserve.api.chat import Chat
from vserve.api.completions import Completions
from vserve.api.debug import TRACES, Debug
from vserve.api.embeddings import Embeddings
from vserve.api.entry import ADMIN, INFER, OPEN, Body, Doc, Entry, Need
from vserve.api.invocations import Invocations
from vserve.api.messages import Messages
from vserve.api.models import Models
from vserve.api.openapi import OpenApi
from vserve.api.ops import Ops
from vserve.api.pages import FILES, FOLDER, Pages
from vserve.api.render import Render
from vserve.api.responses import INPUT_ITEMS, RETRIEVE, Responses
from vserve.api.scale import SCALE, Scale
from vserve.api.score import Score
from vserve.api.tokens import Tokens
from vserve.api.tracing import Tracing
from vserve.errors import ApiError
from vserve.http.exchange import Handler, Headers
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
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    asks_embedding = Body("EmbeddingRequest", schema.EMBEDDINGS, {"input": "What is the capital of France?"})
    asks_chat = Body("ChatCompletionRequest", schema.CHAT, {"messages": turns, "max_tokens": 32, "stream": False})
    asks_text = Body("CompletionRequest", schema.COMPLETIONS, {"prompt": "Once upon a time", "max_tokens": 32})
    asks_response = Body("ResponseRequest", schema.RESPONSES, {"input": "Say hello.", "max_output_tokens": 32})
    asks_messages = Body("MessagesRequest", messages_fields.MESSAGES, {"messages": turns, "max_tokens": 32})
    asks_count = Body("CountTokensRequest", messages_fields.COUNT_TOKENS, {"messages": turns})
    asks_batch = Body("BatchRequest", BATCH, {"messages": [turns, turns], "max_tokens": 8})
    asks_score = Body("ScoreRequest", schema.SCORE, {"text_1": "A cat.", "text_2": ["A kitten.", "A stone."]})
    asks_rank = Body("RerankRequest", schema.RERANK, {"query": "A cat.", "documents": ["A stone.", "A kitten."]})
    asks_scale = Body("ScaleRequest", SCALE, {"new_data_parallel_size": 1})
    asks_ids = Body("TokenizeRequest", schema.TOKENIZE, {"prompt": "Hello, world!"})
    asks_words = Body("DetokenizeRequest", schema.DETOKENIZE, {"tokens": [40, 41, 42]})
    get, post, html = ("GET",), ("POST",), ("text/html",)
    rows = [
        Entry("ping", ("GET", "POST"), ("/ping",), ops.ping, OPEN, Need.NOTHING,
              Doc("The event loop turns.")),
        Entry("health", get, ("/health",), ops.health, OPEN, Need.NOTHING,
              Doc("New work would be taken and the engine is alive.", reply="Health", also=_PROBED)),
        Entry("ready", get, ("/health/ready", "/readyz"), ops.ready, OPEN, Need.NOTHING,
              Doc("Traffic may be sent here.", reply="Health", also=_PROBED)),
        Entry("live", get, ("/livez",), ops.live, OPEN, Need.NOTHING,
              Doc("A restart would not help.", reply="Health", also=_PROBED)),
        Entry("startup", get, ("/startupz",), ops.startup, OPEN, Need.NOTHING,
              Doc("The start is over.", reply="Health", also=_PROBED)),
        Entry("version", get, ("/version",), ops.version, OPEN, Need.NOTHING,
              Doc("The server's version.", reply="Version", texts=("text/plain",))),
        Entry("metrics", get, ("/metrics",), ops.metrics, METRICS, Need.NOTHING,
              Doc("Figures for Prometheus.", texts=("text/plain",))),
        Entry("load", get, ("/load",), ops.load, INFER, Need.NOTHING,
              Doc("How much there is to do.", reply="Load")),
        Entry("models", get, ("/v1/models",), models.list, INFER, Need.MODEL,
              Doc("The models that are served.", reply="ModelList")),
        Entry("model", get, ("/v1/models/{id:path}",), models.retrieve, INFER, Need.MODEL,
              Doc("One model.", reply="Model")),
        Entry("chat", post, ("/v1/chat/completions",), chat.create, INFER, Need.ROOM,
              Doc("Go on with a conversation.", takes=(asks_chat,), reply="ChatCompletion",
                  events="ChatCompletionChunk")),
        Entry("completions", post, ("/v1/completions",), completions.create, INFER, Need.ROOM,
              Doc("Go on with texts.", takes=(asks_text,), reply="Completion", events="Completion")),
        Entry("batch", post, ("/v1/chat/completions/batch",), batch.create, INFER, Need.ROOM,
              Doc("Go on with many conversations.", takes=(asks_batch,), reply="ChatCompletion")),
        Entry("render_chat", post, ("/v1/chat/completions/render",), render.chat, INFER, Need.MODEL,
              Doc("What the model would read of a conversation.", takes=(asks_chat,), reply="Rendered", texts=html)),
        Entry("render_completion", post, ("/v1/completions/render",), render.completion, INFER, Need.MODEL,
              Doc("What the model would read of prompts.", takes=(asks_text,), reply="Rendered", texts=html)),
        Entry("invocations", post, ("/invocations",), invocations.create, INFER, Need.ROOM,
              Doc("SageMaker's one path: the body says which endpoint is meant.",
                  takes=(asks_chat, asks_text, asks_embedding), reply="Invocation", events="InvocationEvent")),
        Entry("responses", post, ("/v1/responses",), responses.create, INFER, Need.ROOM,
              Doc("Answer, and keep the answer.", takes=(asks_response,), reply="Response", events="ResponseEvent",
                  fails=(409,))),
        # Nothing is needed of the model: what was stored can be had while it loads and while others drain.
        Entry("response", get, ("/v1/responses/{id}",), responses.retrieve, INFER, Need.NOTHING,
              Doc("A stored response, or its events.", query=RETRIEVE, reply="Response", events="ResponseEvent",
                  fails=(503,))),
        Entry("response_delete", ("DELETE",), ("/v1/responses/{id}",), responses.delete, INFER, Need.NOTHING,
              Doc("Forget a response.", reply="ResponseDeleted", fails=(503,))),
        Entry("response_cancel", post, ("/v1/responses/{id}/cancel",), responses.cancel, INFER, Need.NOTHING,
              Doc("Stop a response that runs.", reply="Response", fails=(409, 503))),
        Entry("response_items", get, ("/v1/responses/{id}/input_items",), responses.input_items, INFER, Need.NOTHING,
              Doc("What a response was asked.", query=INPUT_ITEMS, reply="ResponseItems", fails=(503,))),
        Entry("embeddings", post, ("/v1/embeddings",), embeddings.create, INFER, Need.ENCODER_ROOM,
              Doc("Texts as vectors.", takes=(asks_embedding,), reply="EmbeddingList")),
        Entry("score", post, ("/score", "/v1/score"), score.score, INFER, Need.ENCODER_ROOM,
              Doc("How alike texts are.", takes=(asks_score,), reply="ScoreList")),
        Entry("rerank", post, ("/rerank", "/v1/rerank", "/v2/rerank"), score.rerank, INFER, Need.ENCODER_ROOM,
              Doc("Documents in the order of how well they fit.", takes=(asks_rank,), reply="Ranking")),
        Entry("scale", post, ("/scale_elastic_ep",), scale.resize, ADMIN, Need.MODEL,
              Doc("Change how many copies of the model there are.", takes=(asks_scale,), query=SCALE, reply="Scaled")),
        Entry("scaling", ("GET", "POST"), ("/is_scaling_elastic_ep",), scale.state, ADMIN, Need.NOTHING,
              Doc("Whether such a change is under way.", reply="Scaling")),
        Entry("messages", post, ("/v1/messages",), messages.create, INFER, Need.ROOM,
              Doc("Go on with a conversation, in Anthropic's words.", takes=(asks_messages,), reply="Message",
                  events="MessageEvent", error="MessagesError")),
        Entry("count_tokens", post, ("/v1/messages/count_tokens",), messages.count_tokens, INFER, Need.MODEL,
              Doc("How many tokens the model would read.", takes=(asks_count,), reply="TokenCount",
                  error="MessagesError")),
        Entry("tokenize", post, ("/tokenize", "/v1/tokenize"), tokens.tokenize, INFER, Need.MODEL,
              Doc("Texts or a conversation as token ids.", takes=(asks_ids,), reply="Tokenized")),
        Entry("detokenize", post, ("/detokenize", "/v1/detokenize"), tokens.detokenize, INFER, Need.MODEL,
              Doc("Token ids as text.", takes=(asks_words,), reply="Detokenized")),
    ]  # fmt: skip
    if app.options.docs:
        doc = Doc("This description.", reply="OpenApi")
        rows.append(Entry("openapi", get, ("/openapi.json",), openapi.get, OPEN, Need.NOTHING, doc))
        rows += _pages(Pages(app))
    if app.options.rca:
        rows += _debug(app)
    openapi.cover(rows)
    return tuple(rows if app.tracing is None else [_traced(row, app.tracing) for row in rows])


def _debug(app: App) -> list[Entry]:
    """What --enable-rca adds."""
    debug, get = Debug(app), ("GET",)
    return [
        Entry("debug_version", get, ("/debug/version",), debug.version, ADMIN, Need.NOTHING,
              Doc("What runs here.", reply="DebugVersion")),
        Entry("debug_stats", get, ("/debug/stats",), debug.stats, ADMIN, Need.NOTHING,
              Doc("What the engine does.", reply="DebugStats")),
        Entry("debug_cache", get, ("/debug/cache_stats",), debug.cache_stats, ADMIN, Need.NOTHING,
              Doc("How full the KV cache is.", reply="DebugCache")),
        Entry("debug_traces", get, ("/debug/traces",), debug.traces, ADMIN, Need.NOTHING,
              Doc("What the last requests went through.", query=TRACES, reply="DebugTraces")),
        Entry("debug_config", get, ("/debug/config",), debug.config, ADMIN, Need.NOTHING,
              Doc("What the server was started with.", reply="DebugConfig")),
    ]  # fmt: skip


def _traced(row: Entry, tracing: Tracing) -> Entry:
    """The row, its requests traced where they bring work; a flood of probes must not push those out."""
    if "POST" not in row.methods or row.need is Need.NOTHING:
        return row
    return replace(row, handler=tracing.handler(row.handler, row.name))


def _pages(pages: Pages) -> list[Entry]:
    html, files = ("text/html",), tuple(FOLDER + name for name in FILES)

    def row(name: str, path: str, handler: Handler, help: str) -> Entry:
        return Entry(name, ("GET",), (path,), handler, OPEN, Need.NOTHING, Doc(help, texts=html), page=True)

    return [
        row("home", "/", pages.home, "What is served, how it is doing, and a chat to try."),
        row("docs", "/docs", pages.docs, "The API to read and to try: Swagger UI."),
        row("oauth2_redirect", "/docs/oauth2-redirect", pages.redirect, "The end of Swagger UI's OAuth2 flow."),
        row("redoc", "/redoc", pages.redoc, "The API to read: Redoc."),
        Entry("page_files", ("GET",), files, pages.file, OPEN, Need.NOTHING, Doc("What pages are made of."), page=True),
    ]


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
            vital=entry.auth in (OPEN, METRICS) and not entry.page,
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
        caller: Caller | None = None
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
