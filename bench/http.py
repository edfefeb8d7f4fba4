"""What the front end costs by itself: server CPU per request and per streamed token, on loopback.

    python bench/http.py                               every case
    python bench/http.py --ping --stream --loop asyncio --connections 16 --requests 200000

The server runs in a process of its own; a raw client in this process drives it over keep-alive connections without
pipelining.  CPU is what getrusage says of the server's event-loop thread, so neither the client's speed nor a busy
machine is counted.  ping, fresh, echo and stream measure the HTTP half with handlers of their own.  chat, chat stream
and token are the whole front end (HTTP, validation, template, tokenizer, bridge, detokenizer, SSE) with a fake engine
that emits one token a step to every stream.  One JSON line a measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# In place of this folder, not beside it: this file's own name would hide the standard library's http.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.record import emit
from tests.fakes_api import LETTERS, NAME, TEMPLATE
from tests.fakes_engine import FakeEngine
from vserve.api.app import App, Model, Options
from vserve.api.failure import render
from vserve.api.routes import Gate, routes, table
from vserve.bridge import Bridge
from vserve.engine.inbox import Inbox
from vserve.errors import ApiError
from vserve.http import sse
from vserve.http.exchange import Exchange, Response
from vserve.http.limits import Limits
from vserve.http.router import Route, Router
from vserve.http.server import HttpServer
from vserve.text.template import ChatTemplate

STEP_S = 0.004
"""Time of a step of the fake engine: what a small model on a GPU takes at a large batch."""

TOKEN = (
    b'{"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1700000000,"model":"smollm2",'
    b'"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}'
)
TIME_LIMIT_S = 120.0


class Steps:
    """A fake engine without a timer: one token to every open stream in each pass of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._left: dict[Exchange, int] = {}

    def open(self, exchange: Exchange) -> None:
        """Stream as many tokens as the query's n says."""
        tokens = int(exchange.request.query_params()["n"][0])
        exchange.start_stream(200, sse.CONTENT_TYPE, sse.HEADERS)
        if not self._left:
            self._loop.call_soon(self._step)
        self._left[exchange] = tokens

    def _step(self) -> None:
        for exchange, left in list(self._left.items()):
            if exchange.gone:
                del self._left[exchange]
            elif exchange.writable:
                exchange.write(sse.frame(TOKEN))
                self._left[exchange] = left - 1
                if left == 1:
                    exchange.write(sse.DONE)
                    exchange.end()
                    del self._left[exchange]
        if self._left:
            self._loop.call_soon(self._step)


def _usage(_: Exchange) -> Response:
    used = resource.getrusage(resource.RUSAGE_THREAD)  # handlers run on the loop's thread
    return Response(200, json.dumps({"user_s": used.ru_utime, "system_s": used.ru_stime}).encode())


async def _serve_api(rca: bool) -> None:
    """The whole front end over a fake engine on its own thread."""
    sys.setswitchinterval(100e-6)  # as serve.py does
    app = App(Options(version="bench", max_queue=4096, rca=rca))
    entries = table(app)
    usage = Route("GET", "/usage", _usage, "usage", auth="open")
    server = HttpServer(
        Router([*routes(entries), usage]), Limits(), render, Gate(app, entries), access_log=app.exchanged
    )
    app.metrics.timer.start()
    inbox = Inbox(4096)
    bridge = Bridge(asyncio.get_running_loop(), inbox, turns=server.site.turns)
    words = LETTERS.encode("word by word, ", add_special=False)
    engine = FakeEngine(inbox, bridge, lambda request: words, step_s=STEP_S)
    app.ready(
        Model(
            names=(NAME,),
            tokenizer=LETTERS,
            template=ChatTemplate(TEMPLATE),
            bridge=bridge,
            waiting=inbox,
            heartbeat=engine.heartbeat,
            max_model_len=1 << 20,
            vocab_size=LETTERS.vocab_size,
        )
    )
    engine.start()
    await server.listen("127.0.0.1", 0)
    print(server.port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent goes
    await server.close(1.0)
    engine.stop()


async def _serve() -> None:
    pong = Response(200)

    def ping(_: Exchange) -> Response:
        return pong

    async def echo(exchange: Exchange) -> Response:
        return Response(200, exchange.request.body)

    def render_error(error: ApiError, _: Exchange | None) -> Response:
        return Response(error.status, json.dumps(error.body()).encode())

    routes = [
        Route("GET", "/ping", ping, "ping"),
        Route("GET", "/usage", _usage, "usage"),
        Route("POST", "/echo", echo, "echo", body=True),
        Route("GET", "/stream", Steps(asyncio.get_running_loop()).open, "stream"),
    ]
    server = HttpServer(Router(routes), Limits(), render_error)
    await server.listen("127.0.0.1", 0)
    print(server.port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent goes
    await server.close(1.0)


def _run_server(loop: str, api: bool, rca: bool) -> None:
    serve = partial(_serve_api, rca) if api else _serve
    if loop == "uvloop":
        import uvloop

        uvloop.run(serve())
    else:
        asyncio.run(serve())


def _ask(port: int, request: bytes) -> bytes:
    """One request on a connection of its own; the body of the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(request)
        data = b""
        while part := sock.recv(65536):
            data += part
    return data.partition(b"\r\n\r\n")[2]


def _cpu_s(port: int) -> float:
    used = json.loads(_ask(port, b"GET /usage HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n"))
    return float(used["user_s"] + used["system_s"])


def _drive(port: int, connections: int, request: bytes, total: int, whole: Callable[[bytes], bool]) -> int:
    """Send request total times over so many keep-alive connections, one at a time on each; how many were answered.

    whole tells from the bytes of one answer so far whether it is complete.
    """
    selector = selectors.DefaultSelector()
    sent = answered = 0
    until_s = time.monotonic() + TIME_LIMIT_S
    parts: dict[socket.socket, bytes] = {}
    for _ in range(min(connections, total)):
        sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(sock, selectors.EVENT_READ)
        parts[sock] = b""
        sock.sendall(request)
        sent += 1
    while answered < total and time.monotonic() < until_s:
        for key, _ in selector.select(5.0):
            ready = key.fileobj
            assert isinstance(ready, socket.socket)
            data = ready.recv(262144)
            if not data:
                raise SystemExit("the server closed a connection")
            parts[ready] = (parts[ready] + data)[-65536:]
            if whole(parts[ready]):
                parts[ready] = b""
                answered += 1
                if sent < total:
                    ready.sendall(request)
                    sent += 1
    for sock in parts:
        sock.close()
    selector.close()
    return answered


def _measure(port: int, drive: Callable[[], int]) -> tuple[int, float, float]:
    before_s, start_s = _cpu_s(port), time.monotonic()
    count = drive()
    return count, _cpu_s(port) - before_s, time.monotonic() - start_s


def _ping(port: int, args: argparse.Namespace, request: bytes, name: str) -> dict[str, object]:
    def drive(total: int) -> int:
        return _drive(port, args.connections, request, total, lambda data: b"\r\n\r\n" in data)

    drive(max(args.requests // 20, 1))  # warm-up
    count, cpu_s, wall_s = _measure(port, lambda: drive(args.requests))
    return {
        "case": name,
        "requests": count,
        "connections": args.connections,
        "cpu_us_per_request": round(cpu_s / count * 1e6, 2),
        "requests_per_cpu_s": round(count / cpu_s),
        "requests_per_s": round(count / wall_s),
    }


def _stream(port: int, args: argparse.Namespace) -> dict[str, object]:
    request = b"GET /stream?n=%d HTTP/1.1\r\nhost: bench\r\n\r\n" % args.tokens

    def drive() -> int:
        return _drive(port, args.streams, request, args.streams, lambda data: data.endswith(b"0\r\n\r\n"))

    drive()  # warm-up
    count, cpu_s, wall_s = _measure(port, drive)
    chunks = count * args.tokens
    return {
        "case": "stream",
        "streams": count,
        "tokens": args.tokens,
        "cpu_us_per_chunk": round(cpu_s / chunks * 1e6, 2),
        "chunks_per_s": round(chunks / wall_s),
    }


def _chat(tokens: int, stream: bool) -> bytes:
    content = "What is the difference between a thread and a process? " * 4
    body = json.dumps(
        {
            "model": NAME,
            "messages": [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": content}],
            "max_tokens": tokens,
            "temperature": 0.7,
            "stream": stream,
        }
    ).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


def _api(port: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """A whole chat request of one token, a streamed one, and what each further streamed token adds."""

    def whole(data: bytes) -> bool:
        return data.endswith(b"}") and b'"usage"' in data

    def ended(data: bytes) -> bool:
        return data.endswith(b"0\r\n\r\n")

    def cost(request: bytes, count: int, streams: int, done: Callable[[bytes], bool]) -> float:
        answered, cpu_s, _ = _measure(port, lambda: _drive(port, streams, request, count, done))
        return cpu_s / answered * 1e6

    count, streams, tokens = max(args.requests // 50, 64), args.streams, args.tokens // 4
    cost(_chat(8, True), 4 * streams, streams, ended)  # warm-up
    one = cost(_chat(1, False), count, streams, whole)
    first = cost(_chat(1, True), count, streams, ended)
    long = cost(_chat(tokens, True), streams, streams, ended)
    return [
        {"case": "chat", "connections": streams, "requests": count, "cpu_us_per_request": round(one, 1)},
        {"case": "chat stream", "connections": streams, "requests": count, "cpu_us_per_request": round(first, 1)},
        {
            "case": "token",
            "streams": streams,
            "tokens": tokens,
            "cpu_us_per_token": round((long - first) / (tokens - 1), 2),
        },
    ]


def main() -> None:
    """Run the cases asked for and print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ping", action="store_true", help="GET /ping with the fewest fields, the same each time")
    parser.add_argument("--fresh", action="store_true", help="GET /ping with a browser's fields and a key: parsed anew")
    parser.add_argument("--echo", action="store_true", help="POST of 1 KiB to an async handler")
    parser.add_argument("--stream", action="store_true", help="SSE tokens to many streams at once")
    parser.add_argument("--api", action="store_true", help="chat requests and streamed tokens, fake engine")
    parser.add_argument("--rca", action="store_true", help="the same with every request traced")
    parser.add_argument("--record", action="store_true", help="append the lines to bench/results/http.jsonl")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2_000)
    args = parser.parse_args()
    if args.serve:
        _run_server(args.loop, args.api, args.rca)
        return
    if not (args.ping or args.fresh or args.echo or args.stream or args.api):
        args.ping = args.fresh = args.echo = args.stream = args.api = True
    fields = b"".join(b"x-field-%d: some value of usual length\r\n" % i for i in range(6))
    fresh = b"GET /ping HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer sk-0123456789\r\n" + fields + b"\r\n"
    echo = b"POST /echo HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: 1024\r\n\r\n"
    cases: list[Callable[[int], list[dict[str, object]]]] = []
    if args.ping:
        cases.append(lambda port: [_ping(port, args, b"GET /ping HTTP/1.1\r\nhost: bench\r\n\r\n", "ping")])
    if args.fresh:
        cases.append(lambda port: [_ping(port, args, fresh, "ping, parsed anew")])
    if args.echo:
        cases.append(lambda port: [_ping(port, args, echo + b"x" * 1024, "echo of 1 KiB")])
    if args.stream:
        cases.append(lambda port: [_stream(port, args)])
    command = [sys.executable, __file__, "--serve", "--loop", args.loop]
    _run_cases(command, cases, args)
    if args.api:
        traced = ["--rca"] if args.rca else []
        _run_cases([*command, "--api", *traced], [lambda port: _api(port, args)], args)


def _run_cases(
    command: list[str], cases: list[Callable[[int], list[dict[str, object]]]], args: argparse.Namespace
) -> None:
    """Start a server and print one line for each measurement of the cases."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        for case in cases:
            for numbers in case(port):
                traced = {"rca": True} if args.rca and numbers["case"] in ("chat", "chat stream", "token") else {}
                emit("http", {"loop": args.loop, **numbers, **traced}, record=args.record)
        assert server.stdin is not None
        server.stdin.close()


if __name__ == "__main__":
    main()
