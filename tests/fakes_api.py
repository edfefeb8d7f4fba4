"""A whole front end for tests: real HTTP server, real text, fake engine, on a loop of its own thread."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import requests
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tests.fakes_engine import FakeEngine, Script
from vserve.api.app import App, Model, Options
from vserve.api.encoder import EncoderModel
from vserve.api.failure import render
from vserve.api.routes import Gate, routes, table
from vserve.bridge import Bridge
from vserve.engine.inbox import Inbox
from vserve.engine.request import GenRequest
from vserve.http.limits import Limits
from vserve.http.router import Router
from vserve.http.server import HttpServer
from vserve.http.site import ReplyHeaders
from vserve.store.record import Store
from vserve.text.template import ChatTemplate
from vserve.text.tokenizer import Tokenizer

T = TypeVar("T")

PATIENCE_S = 30.0
"""How long a test waits for what must come."""

NAME = "fake/letters"
CONTEXT = 512
BOS, EOS, START = "<|bos|>", "<|im_end|>", "<|im_start|>"

TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if documents %}{{ '[' + documents[0].title + ']' }}{% endif %}
{%- if mood is defined %}{{ '(' + mood + ')' }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def letters() -> Tokenizer:
    """A tokenizer whose ordinary tokens are the 256 bytes, so that one ASCII character is one token; ids 256 to 258
    are the specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True) for name in (BOS, EOS, START)])
    return Tokenizer(core, bos_id=256, eos_ids={257}, special_tokens={"bos_token": BOS})


LETTERS = letters()
(EOS_ID,) = LETTERS.eos_ids


def says(text: str) -> Script:
    """An engine script: the text, special tokens included, over and over."""
    ids = LETTERS.encode(text, add_special=False)
    return lambda request: ids


def answers(request: GenRequest) -> list[int]:
    """The default script: "Hello, world!" and the end of the turn."""
    return LETTERS.encode(f"Hello, world!{EOS}", add_special=False)


class Stand:
    """A running front end."""

    def __init__(
        self, app: App, server: HttpServer, engine: FakeEngine, bridge: Bridge, loop: asyncio.AbstractEventLoop
    ):
        self.app = app
        self.server = server
        self.engine = engine
        self.bridge = bridge
        self.loop = loop
        self.port = server.port or 0
        self.url = f"http://127.0.0.1:{server.port}"

    def call(self, function: Callable[[], T]) -> T:
        """Run function on the loop and return its result."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def until(self, what: Callable[[], bool]) -> None:
        """Until what() holds on the loop; each look is a round trip to it."""
        end_s = time.monotonic() + PATIENCE_S
        while not self.call(what):
            assert time.monotonic() < end_s, "it did not happen"

    def post(self, path: str, body: Mapping[str, Any], **headers: str) -> requests.Response:
        """POST body as JSON."""
        return requests.post(
            self.url + path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()}, timeout=30
        )

    def get(self, path: str, **headers: str) -> requests.Response:
        """GET path."""
        return requests.get(self.url + path, headers={k.replace("_", "-"): v for k, v in headers.items()}, timeout=30)

    def events(self, path: str, body: Mapping[str, Any]) -> list[Any]:
        """POST a streaming request: the data of every event, parsed; "[DONE]" as it is."""
        reply = self.post(path, {**body, "stream": True})
        assert reply.status_code == 200, reply.text
        return parse_events(reply.text)


def parse_events(text: str) -> list[Any]:
    """The data of every event of a whole stream; comments are left out.  An event's name must be its type."""
    events: list[Any] = []
    for block in text.split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        block = without_id(block)
        name, _, data = block.rpartition("data: ")
        assert name == "" or name.startswith("event: "), block
        events.append(data if data == "[DONE]" else json.loads(data))
        if name:
            assert events[-1]["type"] == name.removeprefix("event: ").strip()
    return events


def without_id(block: str) -> str:
    """An event less its id line."""
    return block.partition("\n")[2] if block.startswith("id: ") else block


def options(**changes: object) -> Options:
    """Options with changes."""
    return Options(**{"version": "1.2.3", **changes})  # type: ignore[arg-type]


@contextmanager
def standing(
    script: Script = answers,
    *,
    ready: bool = True,
    max_queue: int = 64,
    generation_config: Mapping[str, object] | None = None,
    limits: Limits | None = None,
    engine: Mapping[str, object] | None = None,
    template: bool | str = True,
    context: int = CONTEXT,
    send_buffer: int | None = None,
    reply_headers: ReplyHeaders | None = None,
    store: Store | None = None,
    encoder: Callable[[asyncio.AbstractEventLoop], EncoderModel] | None = None,
    generates: bool = True,
    **changes: object,
) -> Iterator[Stand]:
    """A front end on a free loopback port; with ready false the model is still missing.

    send_buffer: bytes that the kernel takes for a client that does not read.  encoder: makes the embedding model.
    generates: whether the fake engine is served too.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="loop", daemon=True)
    thread.start()

    async def build() -> tuple[Stand, Model]:
        app = App(options(max_queue=max_queue, **changes), store)
        entries = table(app)
        server = HttpServer(
            Router(routes(entries)),
            limits or Limits(),
            render,
            Gate(app, entries),
            reply_headers=reply_headers,
            access_log=app.exchanged,
        )
        app.metrics.timer.start()
        listener = socket.create_server(("127.0.0.1", 0))
        if send_buffer is not None:  # connections inherit it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        await server.listen(sock=listener)
        inbox = Inbox(max_queue)
        bridge = Bridge(asyncio.get_running_loop(), inbox, turns=server.site.turns)
        fake = FakeEngine(inbox, bridge, script, **(engine or {}))  # type: ignore[arg-type]
        model = Model(
            names=(NAME, "short"),
            tokenizer=LETTERS,
            template=ChatTemplate(TEMPLATE if template is True else template) if template else None,
            bridge=bridge,
            waiting=inbox,
            heartbeat=fake.heartbeat,
            max_model_len=context,
            vocab_size=LETTERS.vocab_size,
            generation_config=generation_config or {},
        )
        return Stand(app, server, fake, bridge, loop), model

    stand, model = asyncio.run_coroutine_threadsafe(build(), loop).result(10)
    stand.engine.start()
    if ready:
        embedding = encoder(loop) if encoder is not None else None
        stand.call(lambda: stand.app.ready(model if generates else None, embedding))
    try:
        yield stand
    finally:
        asyncio.run_coroutine_threadsafe(stand.server.close(1.0), loop).result(10)
        stand.call(stand.app.stopped)
        stand.engine.stop()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def raw_post(port: int, path: str, body: object, receive_buffer: int | None = None) -> socket.socket:
    """A socket on which the POST has been sent and nothing was read."""
    payload = json.dumps(body).encode()
    peer = socket.socket()
    if receive_buffer is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    peer.settimeout(30)
    peer.connect(("127.0.0.1", port))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    peer.sendall(head.encode() + payload)
    return peer
