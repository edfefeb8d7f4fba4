"""One row of the route table: what it matches, who answers, who may call, what must be there first, what it is for.

Knows no handler.  The rows themselves are routes.py's; what is made of their descriptions is openapi.py's.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from vserve.api.access import INFER
from vserve.api.fields import Table
from vserve.http.exchange import Handler

__all__ = ["ADMIN", "INFER", "OPEN", "Body", "Doc", "Entry", "Need"]

OPEN = "open"
ADMIN = "admin"


class Need(enum.Enum):
    """What must be there before a handler is called."""

    NOTHING = enum.auto()
    MODEL = enum.auto()  # a loaded model, and a server that is not draining
    ROOM = enum.auto()  # the same, and room in the engine's queue
    ENCODER_ROOM = enum.auto()  # the same for the embedding model's queue


@dataclass(frozen=True, slots=True)
class Body:
    """A JSON body: the name of its schema, the field table that checks it, and a small one that works anywhere."""

    name: str
    rows: Table
    example: dict[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Doc:
    """What /openapi.json says of a route beside its methods, paths and scope.

    help: one sentence.  takes: the bodies it accepts, one of them.  query: the fields of its query.  reply: the schema
    of its 200 (a name of reply_schema.py), None for one without content.  texts: other media types of a 200.  events:
    the schema of one event's data, where the reply can be a stream.  also: further statuses with a body that is not an
    error's.  error: the schema of its errors.  fails: error statuses that do not follow from the rest of the row.
    """

    help: str
    takes: tuple[Body, ...] = ()
    query: Table = field(default_factory=dict)
    reply: str | None = None
    texts: tuple[str, ...] = ()
    events: str | None = None
    also: tuple[tuple[int, str], ...] = ()
    error: str = "Error"
    fails: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """One row: all paths and methods that one handler answers.  auth: OPEN, or the scope a key must have.

    page: for people to look at: not described in /openapi.json, nor answered when connections run out.
    """

    name: str
    methods: Sequence[str]
    patterns: Sequence[str]
    handler: Handler
    auth: str
    need: Need
    doc: Doc
    page: bool = False
