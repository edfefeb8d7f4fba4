"""Errors in Anthropic's shape, for /v1/messages and what is under it.  Pure."""

from __future__ import annotations

import orjson

from vserve.errors import ApiError
from vserve.http import sse
from vserve.http.exchange import Exchange

ROUTES = frozenset({"messages", "count_tokens"})
_PATHS = ("/v1/messages", "/v1/messages/count_tokens")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def speaks(exchange: Exchange) -> bool:
    """Whether the request was for one of these endpoints; without a route (405) its path tells."""
    if exchange.route is not None:
        return exchange.route.name in ROUTES
    return exchange.head.path.endswith(_PATHS)


def body(error: ApiError, request_id: str) -> dict[str, object]:
    """The JSON object of an error."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


def event(error: ApiError, request_id: str) -> bytes:
    """The event that ends a broken stream."""
    return sse.frame(orjson.dumps(body(error, request_id)), event="error")
