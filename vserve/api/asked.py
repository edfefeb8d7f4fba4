"""How every endpoint with a JSON body begins: the body read and checked, off the loop when it is long.

Event-loop thread; the parser it is given runs in the pool for long bodies and must be pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from vserve.api import body
from vserve.api.app import App
from vserve.api.fields import Table, typed
from vserve.errors import BadRequest
from vserve.http.exchange import Exchange, Request

T = TypeVar("T")

LONG_BODY_BYTES = 65536
"""A longer body is read in the pool: a megabyte of token ids takes 8 ms to read and check, this one half of one."""

Parser = Callable[[dict[str, object], int, bool], T]
"""From a body, the vocabulary's size and whether to be strict to a checked request; raises BadRequest."""


class Spoken(Protocol):
    """What is served, as far as the check of a body needs it."""

    @property
    def vocab_size(self) -> int: ...


async def checked(app: App, served: Spoken, exchange: Exchange, parse: Parser[T]) -> T:
    """The exchange's request as parse makes it.  Raises BadRequest and UnsupportedMediaType."""
    request = exchange.request

    def read() -> T:
        fields = body.read(request.body, request.headers.get("content-type"))
        return parse(fields, served.vocab_size, app.options.strict)

    return read() if len(request.body) <= LONG_BODY_BYTES else await app.off_loop(read)


def query_fields(request: Request, rows: Table) -> dict[str, object]:
    """The fields of the query, as JSON would have them.  Raises BadRequest for one that is given twice."""
    made: dict[str, object] = {}
    for name, given in request.query_params().items():
        if len(given) > 1:
            raise BadRequest(f"`{name}` is given {len(given)} times.", param=name)
        made[name] = typed(rows.get(name), given[0])
    return made
