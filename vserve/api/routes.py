"""The explicit table of routes: who answers what, who may call, and what must be there first.

Nothing else adds a route.  ``gate`` decides on a request before its body is read.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vserve.api.access import METRICS, Key
from vserve.api.app import App
from vserve.api.chat import Chat
from vserve.api.completions import Completions
from vserve.api.embeddings import Embeddings
from vserve.api.models import Models
from vserve.api.ops import Ops
from vserve.api.responses import Responses
from vserve.api.score import Score
from vserve.api.tokens import Tokens
from vserve.errors import ApiError
from vserve.http.exchange import Handler, Headers
from vserve.http.router import Route

OPEN = "open"
INFER = "infer"


class Need(enum.Enum):
    """What must be there before a handler is called."""

    NOTHING = enum.auto()
    MODEL = enum.auto()  # a loaded model, and a server that is not draining
    ROOM = enum.auto()  # the same, and room in the engine's queue
    ENCODER_ROOM = enum.auto()  # the same for the embedding model's queue


@dataclass(frozen=True, slots=True)
class Entry:
    """One row: all paths and methods that one handler answers.  auth: OPEN, or the scope a key must have."""

    name: str
    methods: Sequence[str]
    patterns: Sequence[str]
    handler: Handler
    auth: str
    need: Need


class HasHeaders(Protocol):
    """A request's head, as far as the gate looks at it."""

    @property
    def headers(self) -> Headers: ...


def table(app: App) -> tuple[Entry, ...]:
    """Every route of the server.  HEAD is served wherever GET is."""
    ops, models, tokens, score, responses = Ops(app), Models(app), Tokens(app), Score(app), Responses(app)
    get, post = ("GET",), ("POST",)
    return (
        Entry("ping", ("GET", "POST"), ("/ping",), ops.ping, OPEN, Need.NOTHING),
        Entry("health", get, ("/health",), ops.health, OPEN, Need.NOTHING),
        Entry("ready", get, ("/health/ready", "/readyz"), ops.ready, OPEN, Need.NOTHING),
        Entry("live", get, ("/livez",), ops.live, OPEN, Need.NOTHING),
        Entry("startup", get, ("/startupz",), ops.startup, OPEN, Need.NOTHING),
        Entry("version", get, ("/version",), ops.version, OPEN, Need.NOTHING),
        Entry("metrics", get, ("/metrics",), ops.metrics, METRICS, Need.NOTHING),
        Entry("load", get, ("/load",), ops.load, INFER, Need.NOTHING),
        Entry("models", get, ("/v1/models",), models.list, INFER, Need.MODEL),
        Entry("model", get, ("/v1/models/{id:path}",), models.retrieve, INFER, Need.MODEL),
        Entry("chat", post, ("/v1/chat/completions",), Chat(app).create, INFER, Need.ROOM),
        Entry("completions", post, ("/v1/completions",), Completions(app).create, INFER, Need.ROOM),
        Entry("responses", post, ("/v1/responses",), responses.create, INFER, Need.ROOM),
        # Nothing is needed of the model: what was stored can be had while it loads and while others drain.
        Entry("response", get, ("/v1/responses/{id}",), responses.retrieve, INFER, Need.NOTHING),
        Entry("response_delete", ("DELETE",), ("/v1/responses/{id}",), responses.delete, INFER, Need.NOTHING),
        Entry("response_cancel", post, ("/v1/responses/{id}/cancel",), responses.cancel, INFER, Need.NOTHING),
        Entry("response_items", get, ("/v1/responses/{id}/input_items",), responses.input_items, INFER, Need.NOTHING),
        Entry("embeddings", post, ("/v1/embeddings",), Embeddings(app).create, INFER, Need.ENCODER_ROOM),
        Entry("score", post, ("/score", "/v1/score"), score.score, INFER, Need.ENCODER_ROOM),
        Entry("rerank", post, ("/rerank", "/v1/rerank", "/v2/rerank"), score.rerank, INFER, Need.ENCODER_ROOM),
        Entry("tokenize", post, ("/tokenize", "/v1/tokenize"), tokens.tokenize, INFER, Need.MODEL),
        Entry("detokenize", post, ("/detokenize", "/v1/detokenize"), tokens.detokenize, INFER, Need.MODEL),
    )


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
                caller = app.keys.check(head.headers.get("authorization"), route.auth)
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
