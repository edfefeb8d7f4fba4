"""What the server does when ten times as much comes as it can do, and when thousands of connections do nothing.

    python bench/overload.py                    both
    python bench/overload.py --load --factor 10 --seconds 10
    python bench/overload.py --idle --connections 5000

The server runs in a process of its own: the whole front end, inbox and scheduler, and in place of the model a step of
fixed time, so that its capacity does not depend on the processor: rows / (tokens * step) requests a second.
load: first more clients in a closed loop than there are rows, which is the capacity as measured; then an open loop of
factor times that, with /ping asked by a process of its own; the first second is not counted.
idle: so many connections that have sent one request; /health beside them, the server's memory for each, and the gaps
between the tokens of one stream with and without them.
One JSON line a measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# In place of this folder, not beside it: http.py's name would hide the standard library's.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.record import emit

ROWS, QUEUE, TOKENS, STEP_S = 16, 32, 16, 0.010
LONG_TOKENS = 300
WARM_UP_S = 1.0


def _serve() -> None:
    """The server's process: prints its port, ends with its standard input."""
    import threading

    import uvloop

    from tests.fakes_api import LETTERS, NAME, TEMPLATE
    from vserve.api.app import App, Model, Options
    from vserve.api.failure import render
    from vserve.api.routes import Gate, routes, table
    from vserve.bridge import Bridge
    from vserve.engine.inbox import Inbox
    from vserve.engine.loop import EngineLoop
    from vserve.engine.scheduler import Limits as EngineLimits
    from vserve.engine.scheduler import Scheduler
    from vserve.engine.sequence import Plan, Results
    from vserve.http.limits import Limits
    from vserve.http.router import Router
    from vserve.http.server import HttpServer
    from vserve.observe.heartbeat import Heartbeat
    from vserve.text.template import ChatTemplate

    class Step:
        """A step that takes STEP_S and draws the letter x."""

        def launch(self, plan: Plan) -> Step:
            self._draws = sum(work.samples for work in plan.works)
            time.sleep(STEP_S)
            return self

        def wait(self) -> Results:
            return Results([120] * self._draws)

    async def main() -> None:
        sys.setswitchinterval(100e-6)  # as serve.py does
        app = App(Options(version="bench", max_queue=QUEUE))
        entries = table(app)
        limits = Limits(connections=20_000)
        server = HttpServer(Router(routes(entries)), limits, render, Gate(app, entries), access_log=app.exchanged)
        app.metrics.timer.start()
        inbox = Inbox(QUEUE, token_limit=2**20, retry_after=app.retry_after_s)
        bridge = Bridge(asyncio.get_running_loop(), inbox, turns=server.site.turns)
        heartbeat = Heartbeat(time.monotonic())
        scheduler = Scheduler(EngineLimits(4096, 16, ROWS, 4096, 4096))
        engine = EngineLoop(inbox, scheduler, Step(), bridge.publish, bridge.died, heartbeat)
        app.ready(
            Model(
                names=(NAME,),
                tokenizer=LETTERS,
                template=ChatTemplate(TEMPLATE),
                bridge=bridge,
                waiting=inbox,
                heartbeat=heartbeat,
                max_model_len=4096,
                vocab_size=LETTERS.vocab_size,
            )
        )
        thread = threading.Thread(target=engine.run)
        thread.start()
        await server.listen("127.0.0.1", 0)
        print(server.port, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent goes
        await server.close(1.0)
        engine.stop()
        thread.join()
        app.stopped()

    uvloop.run(main())


class Client:
    """One keep-alive connection, one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> tuple[int, float]:
        """Status and seconds to the end of the answer."""
        if self._writer is None or self._reader is None or self._writer.is_closing():
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        begun_s = time.perf_counter()
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        await self._reader.readexactly(length)
        took_s = time.perf_counter() - begun_s
        if b"connection: close" in head:
            self.close()
        return int(head[9:12]), took_s

    def close(self) -> None:
        """Hang up."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _complete(tokens: int, stream: bool = False) -> bytes:
    body = json.dumps({"prompt": "word by word", "max_tokens": tokens, "stream": stream}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def _probe(port: int, path: str, until_s: float) -> list[float]:
    client, took = Client(port), []
    while time.perf_counter() < until_s:
        took.append((await client.ask(_get(path)))[1])
        await asyncio.sleep(0.005)
    client.close()
    return took


async def _capacity(port: int, seconds: float) -> float:
    """Requests a second that a closed loop gets answered."""
    begun_s = time.perf_counter()
    until_s = begun_s + seconds
    served = 0

    async def loop() -> None:
        nonlocal served
        client = Client(port)
        while time.perf_counter() < until_s:
            status, _ = await client.ask(_complete(TOKENS))
            served += status == 200
        client.close()

    await asyncio.gather(*(loop() for _ in range(ROWS + QUEUE // 2)))
    return served / seconds


async def _load(port: int, factor: float, seconds: float) -> dict[str, object]:
    await _capacity(port, 1.0)  # warm-up
    capacity = await _capacity(port, seconds)
    begun_s = time.perf_counter()
    free: list[Client] = []
    answers: list[tuple[int, float, float]] = []
    in_flight: set[asyncio.Task[None]] = set()

    async def one() -> None:
        client = free.pop() if free else Client(port)
        status, took_s = await client.ask(_complete(TOKENS))
        answers.append((status, took_s, time.perf_counter() - begun_s))
        free.append(client)

    command = [sys.executable, __file__, "--probe", str(port), "--seconds", str(seconds)]
    probe = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    sent = 0
    while (now_s := time.perf_counter()) < begun_s + seconds:
        for _ in range(int((now_s - begun_s) * capacity * factor) - sent):
            task = asyncio.create_task(one())
            in_flight.add(task)
            task.add_done_callback(in_flight.discard)
            sent += 1
        await asyncio.sleep(0.002)
    told, _ = await probe.communicate()
    pings: list[float] = json.loads(told)
    await asyncio.gather(*in_flight)
    for client in free:
        client.close()
    counted = [(status, took_s) for status, took_s, at_s in answers if WARM_UP_S <= at_s < seconds]
    refused = [took_s for status, took_s in counted if status == 429]
    goodput = sum(status == 200 for status, _ in counted) / (seconds - WARM_UP_S)
    return {
        "case": f"{factor:g} times the load",
        "capacity_per_s": round(capacity, 1),
        "offered_per_s": round(sent / seconds, 1),
        "goodput_per_s": round(goodput, 1),
        "goodput_of_capacity": round(goodput / capacity, 3),
        "refused": len(refused),
        "other_statuses": sum(status not in (200, 429) for status, _ in counted),
        "refusal_p50_ms": round(_percentile(refused, 0.5) * 1e3, 2),
        "refusal_p99_ms": round(_percentile(refused, 0.99) * 1e3, 2),
        "ping_p50_ms": round(_percentile(pings, 0.5) * 1e3, 2),
        "ping_p99_ms": round(_percentile(pings, 0.99) * 1e3, 2),
    }


async def _gaps(port: int) -> list[float]:
    """Seconds between the pieces of one stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_complete(LONG_TOKENS, stream=True))
    times = []
    while b"[DONE]" not in await reader.read(65536):
        times.append(time.perf_counter())
    writer.close()
    return [later - earlier for earlier, later in itertools.pairwise(times[1:])]


def _resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1])
    raise RuntimeError("no RssAnon")


async def _idle(port: int, pid: int, connections: int) -> dict[str, object]:
    alone = await _gaps(port)
    before_kib = _resident_kib(pid)
    clients = [Client(port) for _ in range(connections)]
    for start in range(0, connections, 100):
        await asyncio.gather(*(client.ask(_get("/health")) for client in clients[start : start + 100]))
    after_kib = _resident_kib(pid)
    beside = await _gaps(port)
    health = await _probe(port, "/health", time.perf_counter() + 5.0)
    for client in clients:
        client.close()
    return {
        "case": "idle connections",
        "connections": connections,
        "kib_each": round((after_kib - before_kib) / connections, 2),
        "health_p50_ms": round(_percentile(health, 0.5) * 1e3, 2),
        "health_p99_ms": round(_percentile(health, 0.99) * 1e3, 2),
        "itl_alone_mean_ms": round(statistics.mean(alone) * 1e3, 2),
        "itl_beside_mean_ms": round(statistics.mean(beside) * 1e3, 2),
    }


def main() -> None:
    """Run the cases asked for and print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--probe", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--idle", action="store_true")
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--connections", type=int, default=5_000)
    parser.add_argument("--record", action="store_true", help="append the lines to bench/results/overload.jsonl")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if args.serve:
        _serve()
        return
    if args.probe:
        print(json.dumps(asyncio.run(_probe(args.probe, "/ping", time.perf_counter() + args.seconds))))
        return
    both = not (args.load or args.idle)
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        if args.load or both:
            emit("overload", asyncio.run(_load(port, args.factor, args.seconds)), record=args.record)
        if args.idle or both:
            emit("overload", asyncio.run(_idle(port, server.pid, args.connections)), record=args.record)
        assert server.stdin is not None
        server.stdin.close()


if __name__ == "__main__":
    main()
