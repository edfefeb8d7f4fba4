"""The whole server but for the process: real HTTP, text, bridge, engine thread and scheduler on the fake model, with
places in it where a test puts a fault."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import tokenizers
import uvloop
from tokenizers import decoders, models, pre_tokenizers

from tests.fakes import VOCAB, FakeModel, solo
from vserve.api.app import App, Model, Options
from vserve.api.failure import render
from vserve.api.routes import Gate, routes, table
from vserve.bridge import Bridge
from vserve.engine.inbox import Inbox
from vserve.engine.loop import EngineLoop, Pending, StepRunner
from vserve.engine.request import Emit, EngineStats, GenRequest, RequestId, SamplingParams
from vserve.engine.runner import Runner
from vserve.engine.scheduler import Limits as EngineLimits
from vserve.engine.scheduler import Scheduler
from vserve.engine.sequence import Plan, Results
from vserve.errors import EngineDied
from vserve.http.limits import Limits
from vserve.http.router import Router
from vserve.http.server import HttpServer
from vserve.observe.heartbeat import Heartbeat
from vserve.text.tokenizer import Tokenizer

T = TypeVar("T")

PATIENCE_S = 30.0
COMPLETE = "/v1/completions"
CONTEXT = 256
PLACES = ("plan", "launch", "wait", "commit", "publish")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUV"
"""Token i of the fake model is letter i."""


def _tokenizer() -> Tokenizer:
    core = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(LETTERS)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return Tokenizer(core, bos_id=None, eos_ids=(), special_tokens={})


TOKENIZER = _tokenizer()


QUESTION = [3, 1, 4, 1, 5]
"""Asked after every fault."""


class Boom(Exception):
    """The injected exception."""


def boom() -> None:
    raise Boom("injected")


class Faults:
    """What happens at each of PLACES, on G, before the real thing.  Nothing unless armed."""

    def __init__(self) -> None:
        self.armed: dict[str, Callable[[], None]] = {}

    def at(self, place: str) -> None:
        action = self.armed.get(place)
        if action is not None:
            action()


class Hang:
    """A fault that holds G until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.over = threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.over.wait(PATIENCE_S)


@dataclass(frozen=True, slots=True)
class _Pending:
    inner: Pending
    faults: Faults

    def wait(self) -> Results:
        self.faults.at("wait")
        return self.inner.wait()


@dataclass(frozen=True, slots=True)
class _Runner:
    inner: StepRunner
    faults: Faults

    def launch(self, plan: Plan) -> Pending:
        self.faults.at("launch")
        return _Pending(self.inner.launch(plan), self.faults)


class _Scheduler(Scheduler):
    def __init__(self, limits: EngineLimits, faults: Faults) -> None:
        super().__init__(limits)
        self._faults = faults

    def plan(self, now_s: float) -> Plan | None:
        if self.live:
            self._faults.at("plan")
        return super().plan(now_s)

    def commit(self, plan: Plan, results: Results, now_s: float) -> list[Emit]:
        self._faults.at("commit")
        return super().commit(plan, results, now_s)


class Stack:
    """Made on the loop; see ``running``."""

    def __init__(
        self,
        *,
        model: FakeModel | None,
        num_blocks: int,
        rows: int,
        depth: int,
        max_queue: int,
        max_queued_tokens: int,
        limits: Limits,
        send_buffer: int | None,
        **options: Any,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.faults = Faults()
        self.deaths: list[EngineDied] = []
        self.app = App(Options("1.2.3", max_queue=max_queue, max_queued_tokens=max_queued_tokens, **options))
        entries = table(self.app)
        self.server = HttpServer(Router(routes(entries)), limits, render, Gate(self.app, entries))
        self._send_buffer = send_buffer
        self.inbox = Inbox(max_queue, token_limit=max_queued_tokens, retry_after=self.app.retry_after_s)
        self.bridge = Bridge(self.loop, self.inbox, turns=self.server.site.turns)
        self.heartbeat = Heartbeat(time.monotonic())
        engine_limits = EngineLimits(num_blocks, 4, rows, 64, CONTEXT, 16, vocab_size=VOCAB)
        self.scheduler = _Scheduler(engine_limits, self.faults)
        model = model or FakeModel()
        runner = Runner(model, model.new_cache(num_blocks, 4), max_num_seqs=rows, max_model_len=CONTEXT)
        self.engine = EngineLoop(
            self.inbox,
            self.scheduler,
            _Runner(runner, self.faults),
            self._publish,
            self._die,
            self.heartbeat,
            depth=depth,
        )
        self.thread = threading.Thread(target=self.engine.run, name="engine", daemon=True)
        self.app.ready(
            Model(
                names=("fake",),
                tokenizer=TOKENIZER,
                template=None,
                bridge=self.bridge,
                waiting=self.inbox,
                heartbeat=self.heartbeat,
                max_model_len=CONTEXT,
                vocab_size=VOCAB,
            )
        )

    async def start(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        if self._send_buffer is not None:  # connections inherit it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
        await self.server.listen(sock=listener)
        self.port = self.server.port or 0
        self.thread.start()

    def _publish(self, emits: list[Emit], stats: EngineStats) -> None:
        if emits:
            self.faults.at("publish")
        self.bridge.publish(emits, stats)

    def _die(self, error: EngineDied) -> None:
        self.deaths.append(error)
        self.bridge.died(error)

    async def stop(self) -> None:
        self.engine.stop()
        await self.server.close(1.0)
        self.app.stopped()

    # ---- from the test's thread -----------------------------------------------------------------------------

    def call(self, function: Callable[[], T]) -> T:
        """Run function on the loop and return its result."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE_S)

    def until(self, what: Callable[[], bool]) -> None:
        """Until what() holds on the loop; each look is a round trip to it."""
        end_s = time.monotonic() + PATIENCE_S
        while not self.call(what):
            assert time.monotonic() < end_s, "it did not happen"

    def connect(self, *, receive_buffer: int | None = None) -> socket.socket:
        peer = socket.socket()
        if receive_buffer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        peer.settimeout(PATIENCE_S)
        peer.connect(("127.0.0.1", self.port))
        return peer

    def send(self, body: Mapping[str, Any], *, receive_buffer: int | None = None) -> socket.socket:
        """A socket on which a POST to COMPLETE has been sent and nothing was read."""
        peer = self.connect(receive_buffer=receive_buffer)
        peer.sendall(post(body))
        return peer

    def ask(self, body: Mapping[str, Any]) -> Answer:
        """POST, and the whole answer."""
        return answer(self.send(body))

    def get(self, path: str) -> Answer:
        """GET, and the whole answer."""
        peer = self.connect()
        peer.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return answer(peer)

    def until_status(self, path: str, status: int) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while self.get(path).status != status:
            assert time.monotonic() < end_s, f"{path} never said {status}"

    def settled(self) -> None:
        """Until nothing is held by anyone: replies, sequences, pages, queue, connections, tasks."""
        self.until(lambda: not self.leftovers())
        if self.thread.is_alive():
            self.scheduler.pool.check()

    def leftovers(self) -> dict[str, int]:
        """What is still there, by name; on the loop."""
        tasks = len(asyncio.all_tasks(self.loop)) - 1  # the one that asks
        found = {
            "replies": len(self.app.replies),
            "sinks": self.bridge.live,
            "keep-alives": len(self.app.keep_alive),
            "active": self.server.active,
            "connections": self.server.connections,
            "bytes in flight": self.server.site.in_flight_bytes,
            "tasks": tasks,
        }
        if self.thread.is_alive():  # a dead engine's pages end with the process
            found |= {
                "sequences": self.scheduler.live,
                "pages": self.scheduler.pool.held,
                "queue": self.inbox.size,
                "queued tokens": self.inbox.tokens,
            }
        return {name: count for name, count in found.items() if count}

    def right(self) -> None:
        """The next answer, whole and streamed, is what the model alone would say; and health is 200."""
        wanted = says(QUESTION, 12)
        assert self.ask({"prompt": QUESTION, "max_tokens": 12, "temperature": 0}).text == wanted
        assert self.ask({"prompt": QUESTION, "max_tokens": 12, "temperature": 0, "stream": True}).text == wanted
        assert self.get("/health").status == 200


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete reply; events: of a stream, parsed, without [DONE]; done: [DONE] came."""

    status: int
    headers: dict[str, str]
    body: bytes
    events: tuple[dict[str, Any], ...] = ()
    done: bool = False

    @property
    def text(self) -> str:
        """What choice 0 said."""
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            return "".join(event["choices"][0]["text"] for event in self.events if "choices" in event)
        return str(json.loads(self.body)["choices"][0]["text"])

    @property
    def error(self) -> dict[str, Any] | None:
        """The error that the client sees, in the body or as the last event."""
        if self.events:
            return self.events[-1].get("error")
        return json.loads(self.body).get("error") if self.body.startswith(b"{") else None


def post(body: Mapping[str, Any]) -> bytes:
    """The bytes of a POST to COMPLETE."""
    payload = json.dumps(body).encode()
    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(payload)}\r\n\r\n"
    return head.encode() + payload


def answer(peer: socket.socket, data: bytes = b"") -> Answer:
    """Read the reply to its end; the end of the connection must not come before it.  data: what was read before."""
    with peer:
        while part := peer.recv(1 << 16):
            data += part
    head, _, rest = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0].startswith("HTTP/1.1 "), data[:300]
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    status = int(lines[0].split(" ")[1])
    if "content-length" in headers:
        assert len(rest) == int(headers["content-length"]), "the body is cut"
        return Answer(status, headers, rest)
    content = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        assert size, "the stream is cut"
        if int(size, 16) == 0:
            break
        content += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    blocks = [line.removeprefix(b"data: ") for line in content.split(b"\n") if line.startswith(b"data: ")]
    events = tuple(json.loads(block) for block in blocks if block != b"[DONE]")
    return Answer(status, headers, content, events, blocks[-1] == b"[DONE]")


def says(prompt: list[int], max_tokens: int) -> str:
    """What the model alone answers greedily."""
    request = GenRequest(RequestId(0), prompt, max_tokens, SamplingParams(temperature=0.0))
    return "".join(LETTERS[token] for token in solo(request))


def reset(peer: socket.socket) -> None:
    """Close with RST instead of FIN."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def descriptors() -> int:
    """Open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def running(
    *,
    model: FakeModel | None = None,
    num_blocks: int = 256,
    rows: int = 8,
    depth: int = 1,
    max_queue: int = 1000,
    max_queued_tokens: int = 2**20,
    limits: Limits | None = None,
    send_buffer: int | None = None,
    **options: Any,
) -> Iterator[Stack]:
    """A running stack on a free loopback port, on an event loop of its own thread as in production.

    At the end nothing may be left: no reply, sequence, page, task, connection, thread or descriptor.
    """
    gc.collect()  # sockets that earlier tests forgot are closed now, not while the rest is counted
    before = descriptors()
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="loop", daemon=True)
    thread.start()

    async def build() -> Stack:
        stack = Stack(
            model=model,
            num_blocks=num_blocks,
            rows=rows,
            depth=depth,
            max_queue=max_queue,
            max_queued_tokens=max_queued_tokens,
            limits=limits or Limits(),
            send_buffer=send_buffer,
            **options,
        )
        await stack.start()
        return stack

    stack = asyncio.run_coroutine_threadsafe(build(), loop).result(PATIENCE_S)
    opened = descriptors()
    try:
        yield stack
        stack.settled()
        stack.until(lambda: descriptors() <= opened)  # libuv closes a pass of the loop after it reports the end
    finally:
        asyncio.run_coroutine_threadsafe(stack.stop(), loop).result(PATIENCE_S)
        stack.thread.join(PATIENCE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()
        stack.inbox.close()
    assert not stack.thread.is_alive()
    assert not thread.is_alive()
    assert descriptors() <= before, "a descriptor was left open"
