"""What the parser says: the head of a request, pieces of its content, its end.

Plain immutable values; knows neither the wire grammar nor connections.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


class Headers:
    """The fields of one message in order; names compare without case.  Immutable.

    Built from pairs whose names are lower case.  Values are latin-1 text without surrounding whitespace.
    """

    __slots__ = ("_index", "_pairs")

    def __init__(self, pairs: Sequence[tuple[str, str]] = ()) -> None:
        self._pairs = tuple(pairs)
        index: dict[str, str] = {}
        for name, value in self._pairs:
            # RFC 9110 5.3: lines of one name are one list.  A field that must be single then fails its own grammar,
            # which is what a second Host, Content-Length or Authorization deserves.
            index[name] = f"{index[name]}, {value}" if name in index else value
        self._index = index

    def get(self, name: str, default: str | None = None) -> str | None:
        """The value of name, several lines joined by ``", "``; default when there is none."""
        value = self._index.get(name)
        return value if value is not None else self._index.get(name.lower(), default)

    def find(self, name: str) -> str | None:
        """As get, for a name that is written in lower case."""
        return self._index.get(name)

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._index

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __eq__(self, other: object) -> bool:
        return self._pairs == other._pairs if isinstance(other, Headers) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._pairs)

    def __repr__(self) -> str:
        # Names only: values hold keys, and a repr ends up in logs.
        return f"Headers({', '.join(name for name, _ in self._pairs)})"


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The request line and fields, checked.

    target: as sent.  path: percent-decoded once, begins with "/" (or is "*").  query: raw, without its "?".
    version: (1, 0) or (1, 1).  content_length: None without the field.  keep_alive: what the client asks for.
    expect_continue: the client waits for 100 before it sends the content.
    """

    method: str
    target: str
    path: str
    query: str
    version: tuple[int, int]
    headers: Headers
    content_length: int | None
    chunked: bool
    keep_alive: bool
    expect_continue: bool

    @property
    def has_body(self) -> bool:
        """True when content follows the head."""
        return self.chunked or bool(self.content_length)


@dataclass(frozen=True, slots=True)
class BodyPart:
    """A non-empty piece of the content, transfer coding removed."""

    data: bytes


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """The request is complete; what follows belongs to the next one."""


Event = RequestHead | BodyPart | RequestEnd
