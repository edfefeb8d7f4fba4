"""HttpServer: listening sockets and the life of the server around them: listen, drain, close.

Owns what accepts; everything that is shared by the connections is in site.py.  L only.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import stat
import time
from collections.abc import Callable

from vserve.errors import ApiError, StartupError
from vserve.http.connection import Connection
from vserve.http.exchange import Exchange, Fields, Response
from vserve.http.greeter import Greeter
from vserve.http.limits import Limits
from vserve.http.router import Router
from vserve.http.site import AccessLog, Gate, Hooks, ReplyHeaders, Site
from vserve.http.writer import Writer

BACKLOG = 2048
LAST_REPLIES_S = 1.0
"""How long close() lets the last replies reach their clients once every exchange has ended."""


class HttpServer:
    """An HTTP/1.1 server for one route table."""

    def __init__(
        self,
        router: Router,
        limits: Limits,
        render_error: Callable[[ApiError, Exchange | None], Response],
        gate: Gate | None = None,
        *,
        server_headers: Fields = (("server", "vserve"),),
        reply_headers: ReplyHeaders | None = None,
        access_log: AccessLog | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Must be called inside the running loop.  For the hooks see site.Hooks.

        server_headers are part of every reply, errors too.  clock: seconds, never set back; wall_clock: for Date.
        """
        hooks = Hooks(render_error, gate, reply_headers, access_log)
        self.site = Site(router, limits, hooks, Writer(server_headers, wall_clock), clock)
        self._servers: list[asyncio.Server] = []
        self._greeters: list[Greeter] = []
        self._uds_paths: list[str] = []

    @property
    def connections(self) -> int:
        """Open connections, idle ones and those in their TLS handshake too."""
        return self.site.open

    @property
    def active(self) -> int:
        """Requests whose reply has not ended."""
        return self.site.active

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the server listens: "host:port", "[v6]:port" or the path of a Unix socket."""
        names = [sock.getsockname() for server in self._servers for sock in server.sockets]
        return tuple(_format_address(name) for name in names)

    @property
    def port(self) -> int | None:
        """The first TCP port listened on; None if there is none."""
        for server in self._servers:
            for sock in server.sockets:
                if sock.family in (socket.AF_INET, socket.AF_INET6):
                    return int(sock.getsockname()[1])
        return None

    def protocol(self) -> Connection:
        """A new connection, for a transport made elsewhere."""
        return Connection(self.site)

    async def listen(
        self,
        host: str | None = None,
        port: int | None = None,
        *,
        uds: str | None = None,
        sock: socket.socket | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Start accepting on host and port (0: any free one), a Unix socket path, or a bound socket.

        May be called more than once.  A stale Unix socket at the path is replaced, one that answers is not.  Raises
        StartupError, one line, when the address cannot be had.
        """
        loop = self.site.loop
        plain = ssl_context is None
        where = uds if uds is not None else f"{host}:{port}"
        try:
            if uds is not None:
                _clear_stale(uds)
                server: asyncio.Server = await loop.create_unix_server(
                    self.protocol, uds, backlog=BACKLOG, start_serving=plain
                )
                self._uds_paths.append(uds)
            elif sock is not None:
                server = await loop.create_server(self.protocol, sock=sock, backlog=BACKLOG, start_serving=plain)
            else:
                server = await loop.create_server(self.protocol, host, port or 0, backlog=BACKLOG, start_serving=plain)
            if ssl_context is not None:
                descriptors = [sock.fileno() for sock in server.sockets]
                self._greeters.append(Greeter(self.site, ssl_context, descriptors, BACKLOG))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise StartupError(f"cannot listen on {where}: {reason}") from None
        self._servers.append(server)

    def drain(self) -> None:
        """From now on every reply ends its connection, and idle ones that were used are closed.  Accepting goes on."""
        self.site.draining = True
        for peer in list(self.site.connections):
            peer.drain()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request is in flight; False if that takes longer than timeout_s."""
        return await self.site.quiet(lambda: not self.site.active, timeout_s)

    async def close(self, grace_s: float) -> None:
        """Stop accepting, drain, let requests in flight finish for up to grace_s, then cut what is left.

        Afterwards no connection, task or timer of the server is left.
        """
        site = self.site
        for server in self._servers:
            server.close()
        self._remove_uds()
        for greeter in self._greeters:
            await greeter.close()
        self._greeters.clear()
        site.draining = True
        for peer in list(site.connections):
            peer.retire()
        await self.wait_idle(grace_s)
        if not site.active:
            await site.quiet(lambda: not site.connections, min(grace_s, LAST_REPLIES_S))
        for peer in list(site.connections):
            peer.drop()
        await site.quiet(lambda: not site.connections, LAST_REPLIES_S)
        await site.end_tasks()
        site.stop_sweeping()
        self._servers.clear()

    def _remove_uds(self) -> None:
        for path in self._uds_paths:
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue
        self._uds_paths.clear()


def _clear_stale(path: str) -> None:
    """Remove a Unix socket nobody listens on; OSError (address in use) when somebody does or it is no socket."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise FileExistsError(17, "a file that is no socket is in the way")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(98, "another server listens there")


def _format_address(name: object) -> str:
    if not isinstance(name, tuple):
        return str(name)
    host, port = name[0], name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
