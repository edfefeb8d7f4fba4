"""/openapi.json: the description of the server, made of the route table, the field tables and the reply shapes.

Writes down nothing that those tables do not say.  ``describe`` is pure; the endpoint belongs to the event-loop thread
and has the description made in the pool, once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import orjson

from vserve.api import reply_schema
from vserve.api.accept import has_it
from vserve.api.access import METRICS
from vserve.api.app import App
from vserve.api.entry import INFER, OPEN, Doc, Entry, Need
from vserve.api.fields import Schema, Table, object_schema
from vserve.http.exchange import Exchange, Response
from vserve.oauth.grants import Flow

ABOUT = (
    "An OpenAI-compatible inference server.  A field without effect is named in the header x-ignored-params of the "
    "reply; null means the same as a field that was not sent.  A key is asked for only where the server has keys."
)
_PARAMETER = re.compile(r"\{([a-z_]+)(?::path)?\}")


class OpenApi:
    """The endpoint."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._entries: Sequence[Entry] = ()
        self._made: Response | None = None

    def cover(self, entries: Sequence[Entry]) -> None:
        """Say what is to be described; before the first request."""
        self._entries = entries

    async def get(self, exchange: Exchange) -> Response:
        """The description; 304 for a client that has it."""
        made = self._made
        if made is None:
            made = self._made = await self._app.off_loop(self._make)
        if has_it(exchange.head.headers.get("if-none-match"), made.headers[0][1]):
            return Response(304, headers=made.headers)
        return made

    def _make(self) -> Response:
        options = self._app.options
        said = describe(self._entries, options.version, options.strict, options.root_path, options.oauth2)
        data = orjson.dumps(said)
        etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        return Response(200, data, headers=(("etag", etag), ("cache-control", "no-cache")))


def describe(
    entries: Sequence[Entry], version: str, strict: bool, root_path: str = "", oauth2: Flow | None = None
) -> dict[str, object]:
    """The OpenAPI 3.1 document.

    strict: fields without effect are refused.  root_path: what clients put before every path.
    """
    paths: dict[str, dict[str, object]] = {}
    schemas = dict(reply_schema.SCHEMAS)
    for entry in (entry for entry in entries if not entry.page):
        for body in entry.doc.takes:
            schemas[body.name] = object_schema(body.rows, strict)
        for i, pattern in enumerate(entry.patterns):
            path = paths.setdefault(_PARAMETER.sub(r"{\1}", pattern), {})
            for j, method in enumerate(entry.methods):
                operation = _operation(entry, method, pattern, strict, first=i == 0 and j == 0)
                path[method.lower()] = {**operation, "security": _security(entry, oauth2)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "vserve", "version": version, "description": ABOUT},
        **({"servers": [{"url": root_path}]} if root_path else {}),
        "tags": [{"name": name, "description": said} for name, said in TAGS.items()],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": SECURITY if oauth2 is None else _with_oauth2(oauth2)},
    }


TAGS = {"Inference": "What the models do.", "Operation": "How the server is, and what it is."}


def _tag(entry: Entry) -> str:
    generates = "POST" in entry.methods or any(pattern.startswith("/v1/") for pattern in entry.patterns)
    return "Inference" if entry.auth == INFER and generates else "Operation"


SECURITY: Schema = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, or an access token where the server takes those: `Authorization: Bearer KEY`.",
    },
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same in its own header."},
}


def _operation(entry: Entry, method: str, pattern: str, strict: bool, *, first: bool) -> dict[str, object]:
    doc = entry.doc
    words = "_".join(re.findall(r"\w+", f"{method.lower()} {_PARAMETER.sub('', pattern)}"))
    made: dict[str, object] = {
        "operationId": entry.name if first else f"{entry.name}_{words}",
        "summary": doc.help,
        "tags": [_tag(entry)],
        "responses": {**_responses(doc), **_refusals(entry, method, pattern)},
    }
    parameters = [_path_parameter(name) for name in _PARAMETER.findall(pattern)] + _query(doc.query)
    if parameters:
        made["parameters"] = parameters
    if doc.takes and method == "POST":
        refs: list[Schema] = [reply_schema.ref(body.name) for body in doc.takes]
        schema: Schema = refs[0] if len(refs) == 1 else {"anyOf": list(refs)}
        required = any(row.required for body in doc.takes for row in body.rows.values()) or not doc.query
        content: Schema = {"schema": schema}
        if doc.takes[0].example is not None:
            content["example"] = doc.takes[0].example
        made["requestBody"] = {"required": required, "content": {"application/json": content}}
    return made


def _security(entry: Entry, oauth2: Flow | None) -> list[Schema]:
    """One of these is enough."""
    if entry.auth == OPEN:
        return []
    tokens = () if oauth2 is None else oauth2.grants.that_open(entry.auth)
    keys: list[Schema] = [{"bearer": [entry.auth]}, {"apiKey": [entry.auth]}]
    keys += [{"oauth2": [theirs]} for theirs in tokens]
    return [{}, *keys] if entry.auth == METRICS else keys  # figures are open until a key has their scope


def _with_oauth2(oauth2: Flow) -> Schema:
    opens = oauth2.grants.opens.items()
    scopes = {theirs: f"The scope {' and '.join(sorted(ours))} of this server." for theirs, ours in opens}
    flow: Schema = {
        "authorizationUrl": oauth2.authorization_url,
        "tokenUrl": oauth2.token_url,
        "scopes": scopes,
    }
    return {**SECURITY, "oauth2": {"type": "oauth2", "flows": {"authorizationCode": flow}}}


def _path_parameter(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _query(rows: Table) -> list[Schema]:
    return [
        {
            "name": name,
            "in": "query",
            "required": row.required,
            "description": row.help,
            "schema": row.kind.schema(),  # a query has no null
        }
        for name, row in rows.items()
    ]


def _responses(doc: Doc) -> Schema:
    content: Schema = {}
    if doc.reply is not None:
        content["application/json"] = {"schema": reply_schema.ref(doc.reply)}
    for kind in doc.texts:
        content[kind] = {"schema": {"type": "string"}}
    if doc.events is not None:
        event: Schema = {"contentMediaType": "text/event-stream", "contentSchema": reply_schema.ref(doc.events)}
        content["text/event-stream"] = {"schema": {"type": "string", **event}}
    done: Schema = {"description": "Done."}
    made: Schema = {"200": {**done, "content": content} if content else done}
    for status, name in doc.also:
        made[str(status)] = {
            "description": "The same, with another verdict.",
            "content": {"application/json": {"schema": reply_schema.ref(name)}},
        }
    return made


_REASONS = {
    "400": "The request is wrong; the message names the field, the value and the limit.",
    "401": "No key, or one that is not known.",
    "403": "The key is not for this.",
    "404": "There is no such thing: a model, or what the path names.",
    "409": "What is named is not in a state for this.",
    "413": "The body is too large.",
    "415": "The body's media type is not JSON.",
    "429": "Too much at once, or the key's quota is used up; Retry-After says when to come back.",
    "500": "The server failed; the message has the request's id.",
    "503": "Not now: the model loads, the server drains or the engine is gone.",
    "504": "The request's deadline passed.",
    "default": "Refused before the request was understood: its head, its size or its slowness.",
}


def _refusals(entry: Entry, method: str, pattern: str) -> Schema:
    """The errors that a route can answer with, beside those that it documents as a reply."""
    takes_body = method == "POST" and entry.auth != OPEN
    waits = entry.need in (Need.ROOM, Need.ENCODER_ROOM)
    names_model = any("model" in body.rows for body in entry.doc.takes)
    possible = {
        "400": True,
        "401": entry.auth != OPEN,
        "403": entry.auth != OPEN,
        "404": names_model or "{" in pattern,
        "409": 409 in entry.doc.fails,
        "413": takes_body,
        "415": bool(entry.doc.takes) and takes_body,
        "429": entry.auth != OPEN,
        "500": True,
        "503": entry.need is not Need.NOTHING or 503 in entry.doc.fails,
        "504": waits,
        "default": True,
    }
    content: Schema = {"application/json": {"schema": reply_schema.ref(entry.doc.error)}}
    said = {str(status) for status, _ in entry.doc.also}
    return {
        status: {"description": _REASONS[status], "content": content}
        for status, might in possible.items()
        if might and status not in said
    }
