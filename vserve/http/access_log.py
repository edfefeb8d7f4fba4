"""The access log: one JSON line for each finished exchange.

A line holds the route's name, never the target: no query string, no key, no content.  What the client chose (method,
request id) is cut and escaped, so that a line is always one line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime

from vserve.http.site import AccessEntry

METHOD_LIMIT = 32


def access_line(entry: AccessEntry, now_s: float) -> str:
    """The entry as JSON without a newline, ASCII only.  now_s: seconds since 1970, the end of the exchange."""
    return json.dumps(
        {
            "time": datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds"),
            "method": entry.method[:METHOD_LIMIT] if entry.method is not None else None,
            "route": entry.route,
            "status": entry.status,
            "duration_ms": round(entry.duration_s * 1000, 3),
            "bytes": entry.body_bytes,
            "request_id": entry.request_id,
            "peer": entry.peer,
            "gone": entry.gone,
        }
    )


class AccessWriter:
    """HttpServer's access_log hook: lines through ``write``, each in one call."""

    def __init__(self, write: Callable[[str], object], wall_clock: Callable[[], float] = time.time) -> None:
        self._write = write
        self._wall_clock = wall_clock

    def __call__(self, entry: AccessEntry) -> None:
        self._write(access_line(entry, self._wall_clock()) + "\n")
