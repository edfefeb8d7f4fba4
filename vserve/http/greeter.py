"""Greeter: TLS connections from accept to the end of their handshake.

What asyncio accepts for TLS reaches no protocol before its handshake is done, and so would be in no count.  Here each
is the site's from accept on: among its connections, and dropped when there are too many.  L only.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterable

from vserve.http.connection import Connection
from vserve.http.site import Site, log

PAUSE_S = 0.5
"""How long nothing is accepted where that failed: for want of descriptors, which only an end gives back."""


class Greeter:
    """Accepts TLS connections on some sockets until ``close``."""

    def __init__(self, site: Site, context: ssl.SSLContext, descriptors: Iterable[int], backlog: int) -> None:
        """descriptors: bound sockets, which stay the caller's to close."""
        self._site = site
        self._context = context
        self._sockets = [socket.fromfd(number, -1, -1) for number in descriptors]
        self._tasks: set[asyncio.Task[None]] = set()
        for sock in self._sockets:
            sock.setblocking(False)
            sock.listen(backlog)
            self._start(sock, None)

    async def close(self) -> None:
        """Accept nothing more, and end the handshakes that are under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for sock in self._sockets:
            sock.close()

    def _start(self, sock: socket.socket, address: object) -> None:
        work = self._accept(sock) if address is None else self._greet(sock, address)
        task = self._site.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, sock: socket.socket) -> None:
        site = self._site
        while True:
            try:
                client, address = await site.loop.sock_accept(sock)
            except OSError as error:
                log.error("cannot accept a connection: %s", error.strerror)
                await asyncio.sleep(PAUSE_S)
                continue
            if site.overfull:
                client.close()
            else:
                self._start(client, address)

    async def _greet(self, client: socket.socket, address: object) -> None:
        site = self._site
        connection = Connection(site)
        connection.name(address)
        site.greet(connection)
        try:
            await site.loop.connect_accepted_socket(
                lambda: connection, client, ssl=self._context, ssl_handshake_timeout=site.limits.tls_handshake_s
            )
        except OSError:  # no handshake, a broken one, or none in time
            return
        finally:
            site.greeted(connection)
