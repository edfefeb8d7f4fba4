"""Judges: what h11 and httptools (llhttp) read from the same bytes, request by request, for differential tests.

Where both a judge and we take a request, method, target, content and the end of the content must be the same: two
parsers that see different requests in one stream are how requests are smuggled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import h11
import httptools

Request = tuple[bytes, bytes, bytes]
"""Method, target and content."""


@dataclass
class Verdict:
    """Complete requests in order.  refused: what came next is no request; closed: it stopped reading by a rule."""

    requests: list[Request] = field(default_factory=list)
    refused: bool = False
    closed: bool = False


def h11_verdict(data: bytes) -> Verdict:
    """All requests as h11 reads them; each is answered so that the next may come."""
    verdict = Verdict()
    server = h11.Connection(h11.SERVER, max_incomplete_event_size=4096)
    server.receive_data(data)
    method = target = body = b""
    try:
        while True:
            event = server.next_event()
            if isinstance(event, h11.Request):
                method, target, body = event.method, event.target, b""
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                verdict.requests.append((method, target, body))
                server.send(h11.Response(status_code=404, headers=[("Content-Length", "0")]))
                server.send(h11.EndOfMessage())
                if server.our_state is h11.MUST_CLOSE:
                    verdict.closed = True
                    return verdict
                server.start_next_cycle()
            elif event is h11.PAUSED:  # an upgrade was offered, or the request is answered and another waits
                verdict.closed = True
                return verdict
            else:
                return verdict
    except h11.RemoteProtocolError:
        verdict.refused = True
        return verdict


class _Listener:
    """The callbacks of one httptools parser."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.parser = httptools.HttpRequestParser(self)
        self._target = self._body = b""

    def on_message_begin(self) -> None:
        self._target = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.requests.append((self.parser.get_method(), self._target, self._body))


def httptools_verdict(data: bytes) -> Verdict:
    """All requests as llhttp reads them, in its strict mode."""
    listener = _Listener()
    verdict = Verdict(listener.requests)
    try:
        listener.parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        # llhttp hands the connection over behind the head, content unread; we ignore the offer (RFC 9110 7.8).
        verdict.requests.pop()
        verdict.closed = True
    except httptools.HttpParserError:
        verdict.refused = True
    return verdict


def disagreement(ours: list[Request], refused: bool, judged: Verdict) -> str | None:
    """Why the two readings of one stream are not compatible, or None.

    One may refuse what the other takes.  What both take must be the same requests, and where nobody refuses anything,
    neither may see an end of a request that the other does not see.
    """
    for mine, theirs in zip(ours, judged.requests, strict=False):
        if mine != theirs:
            return f"we read {mine}, the judge {theirs}"
    if refused or judged.refused or judged.closed:
        return None
    if len(ours) != len(judged.requests):
        return f"we read {len(ours)} requests, the judge {len(judged.requests)}"
    return None
