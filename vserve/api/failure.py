"""Errors as replies: one shape for all routes but those whose clients know another."""

from __future__ import annotations

import orjson

from vserve.api import messages_errors
from vserve.errors import ApiError
from vserve.http.exchange import Exchange, Response


def render(error: ApiError, exchange: Exchange | None) -> Response:
    """The reply for error; exchange is None where the request could not be read."""
    body: dict[str, object] = {**error.body()}
    if exchange is not None and messages_errors.speaks(exchange):
        body = messages_errors.body(error, exchange.id)
    return Response(error.status, orjson.dumps(body), headers=error.headers())
