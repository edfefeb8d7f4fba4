"""CORS: which pages of other origins may read our replies (Fetch standard, section 3.2).  Closed unless told otherwise.

Pure: a request's head in, header fields out.  Checks the operator's words once, at start.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from vserve.errors import StartupError
from vserve.http.exchange import Fields, Headers

ANY = "*"
MAX_AGE_S = 600
ASKED_LIMIT = 1024
"""Most characters of Access-Control-Request-Headers that are repeated in a reply."""
EXPOSED = "x-request-id, x-ignored-params, retry-after"

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 5.6.2


class Head(Protocol):
    """What CORS looks at in a request."""

    @property
    def method(self) -> str: ...
    @property
    def headers(self) -> Headers: ...


class Cors:
    """The fields CORS adds to every reply, errors too.  Immutable; usable as HttpServer's reply_headers."""

    def __init__(
        self, origins: Sequence[str], methods: Sequence[str], headers: Sequence[str], *, credentials: bool
    ) -> None:
        """origins: ``scheme://host[:port]`` or ``*``.  methods, headers: names, or ``*`` for whatever is asked.

        Raises StartupError for words that are none of these, and for ``*`` with credentials: every page on the web
        could then act as its visitor.
        """
        self._origins = frozenset(origin.lower() for origin in origins)
        if credentials and ANY in self._origins:
            raise StartupError("--allowed-origins '*' cannot go with --allow-credentials; list the origins")
        for origin in self._origins - {ANY}:
            if not _ORIGIN.fullmatch(origin):
                raise StartupError(f"--allowed-origins: {origin!r} is not scheme://host[:port] (no path, no '/') or *")
        for flag, words in (("--allowed-methods", methods), ("--allowed-headers", headers)):
            for word in words:
                if not _TOKEN.fullmatch(word):
                    raise StartupError(f"{flag}: {word!r} is not a name")
        self._methods = None if ANY in methods else ", ".join(methods)
        self._headers = None if ANY in headers else ", ".join(headers)
        self._credentials = credentials

    def __call__(self, head: Head) -> Fields:
        """The fields for the reply to this request."""
        vary = () if ANY in self._origins else (("vary", "Origin"),)
        origin = head.headers.find("origin")
        if origin is None or not (ANY in self._origins or origin in self._origins):
            return vary
        fields = [*vary, ("access-control-allow-origin", ANY if ANY in self._origins else origin)]
        if self._credentials:
            fields.append(("access-control-allow-credentials", "true"))
        asked_method = head.headers.find("access-control-request-method")
        if head.method != "OPTIONS" or asked_method is None:
            fields.append(("access-control-expose-headers", EXPOSED))
            return fields
        methods = _repeat(asked_method) if self._methods is None else self._methods
        headers = self._headers
        if headers is None:
            headers = _repeat(head.headers.find("access-control-request-headers") or "")
            fields.append(("vary", "Access-Control-Request-Headers"))
        fields.append(("access-control-allow-methods", methods))
        if headers:
            fields.append(("access-control-allow-headers", headers))
        fields.append(("access-control-max-age", str(MAX_AGE_S)))
        return fields


def _repeat(asked: str) -> str:
    """A list of names as asked for; "" when it is too long or no such list.  ``*`` would not cover Authorization."""
    names = [name.strip() for name in asked.split(",")] if len(asked) <= ASKED_LIMIT else []
    return ", ".join(names) if all(_TOKEN.fullmatch(name) for name in names) else ""
