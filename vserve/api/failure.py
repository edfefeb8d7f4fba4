"""Errors as replies, in the one shape all routes share."""

from __future__ import annotations

import orjson

from vserve.errors import ApiError
from vserve.http.exchange import Exchange, Response


def render(error: ApiError, exchange: Exchange | None) -> Response:
    """The reply for error; exchange is None where the request could not be read."""
    return Response(error.status, orjson.dumps(error.body()), headers=error.headers())
