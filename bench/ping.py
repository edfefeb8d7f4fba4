"""What a GET /ping waits for while tokens stream: the server's callbacks, timed, beside each slow ping.

    python bench/ping.py                                       a device that only takes time, everything else real
    python bench/ping.py --concurrency 32,128 -- MODEL FLAGS   vserve serve with these arguments

The server is the real one with a clock around each callback of its event loop.  The pinger is a process of its own;
another one asks a server that does nothing else, which shows what the machine itself adds.  For each case one JSON
line, then where the slowest pings spent their time: in which callbacks (wall and CPU, the difference being other
threads), between callbacks (uvloop, the kernel and waiting for the GIL), and on the way back.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import functools
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.client import percentile, summary
from bench.record import emit
from bench.serve import Load, Ping, Target, free_port, measure, running
from vserve.engine.sequence import Plan, Results

T = TypeVar("T")

LOG_SPANS = 2_000_000
SLOW_S = 0.001
"""Pings slower than this are told apart."""
LONG_S = 0.0003
"""Callbacks longer than this are counted."""

CALLBACKS = (
    ("vserve.http.connection", "Connection", ("data_received", "connection_made", "connection_lost", "eof_received",
                                              "_advance", "_begin", "_finish_task")),
    ("vserve.http.site", "Site", ("_flush_dirty", "_sweep")),
    ("vserve.bridge", "Bridge", ("_drain", "_fan_out")),
    ("vserve.observe.lag", "Lag", ("_beat",)),
)  # fmt: skip


class Spans:
    """Callbacks of one thread as (name, begin, end, CPU seconds); one within another belongs to the outer one."""

    def __init__(self) -> None:
        self.spans: deque[tuple[str, float, float, float]] = deque(maxlen=LOG_SPANS)
        self.pings: list[float] = []
        self._inside = False

    def around(self, name: str, call: Callable[..., T]) -> Callable[..., T]:
        """call, timed."""

        @functools.wraps(call)
        def timed(*args: object, **kwargs: object) -> T:
            if self._inside:
                return call(*args, **kwargs)
            self._inside = True
            began, cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self._inside = False
                self.spans.append((name, began, time.perf_counter(), time.thread_time() - cpu))

        return timed

    def driven(self, work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """work, each of its steps timed."""
        return Driven(work, self)


class Driven(Coroutine[Any, Any, T]):
    """A coroutine whose steps are timed."""

    def __init__(self, work: Coroutine[Any, Any, T], spans: Spans) -> None:
        self._work = work
        self.send = spans.around("task", work.send)  # type: ignore[method-assign]
        self.throw = spans.around("task", work.throw)  # type: ignore[method-assign]

    def close(self) -> None:
        """See Coroutine."""
        self._work.close()

    def __await__(self) -> Generator[Any, Any, T]:
        raise TypeError("for a task")

    def send(self, value: Any, /) -> Any:
        """Replaced by a timed one."""

    def throw(self, *error: Any) -> Any:
        """Replaced by a timed one."""


def watch(spans: Spans) -> None:
    """Put the clock around everything of ours that the loop calls, and note when a ping is read."""
    for module, owner, names in CALLBACKS:
        __import__(module)
        kind = getattr(sys.modules[module], owner)
        for name in names:
            if hasattr(kind, name):
                setattr(kind, name, spans.around(f"{owner}.{name}", getattr(kind, name)))
    from vserve.api.ops import Ops
    from vserve.http.site import Site

    start, ping = Site.start, Ops.ping

    def timed_start(self: Site, work: Any, done: Any) -> Any:
        return start(self, spans.driven(work), done)

    def noted(self: Ops, exchange: Any) -> Any:
        spans.pings.append(time.perf_counter())
        return ping(self, exchange)

    Site.start = timed_start  # type: ignore[method-assign]
    Ops.ping = noted  # type: ignore[method-assign]


def watch_engine(spans: Spans) -> None:
    """The same for what the engine thread does in a turn."""
    from vserve.engine.loop import EngineLoop
    from vserve.engine.scheduler import Scheduler

    for kind, name in ((Scheduler, "plan"), (Scheduler, "commit"), (Scheduler, "add"), (EngineLoop, "_park")):
        setattr(kind, name, spans.around(f"G.{name}", getattr(kind, name)))
    try:
        from vserve.engine.cuda_runner import CudaPending, CudaRunner
    except ImportError:
        return
    for owner, name in ((CudaRunner, "launch"), (CudaRunner, "_capture"), (CudaPending, "wait")):
        setattr(owner, name, spans.around(f"G.{name}", getattr(owner, name)))


def serve_watched(words: Sequence[str], report: Path) -> int:
    """vserve serve in this process, timed; what was seen is written to report at the end."""
    loop, engine = Spans(), Spans()
    watch(loop)
    watch_engine(engine)

    def dump(*_: object) -> None:
        seen = {"pings": loop.pings, "spans": list(loop.spans), "engine": list(engine.spans)}
        report.with_suffix(".part").write_text(json.dumps(seen))
        report.with_suffix(".part").rename(report)
        loop.pings.clear()
        loop.spans.clear()
        engine.spans.clear()

    signal.signal(signal.SIGUSR1, dump)
    if words[0] == "fake":
        return serve_fake(int(words[1]), float(words[2]), float(words[3]))
    from vserve.cli import main as vserve

    return vserve(words)


class TimedStep:
    """A step of a TimedDevice: a Pending."""

    def __init__(self, ready_s: float, ids: list[int]) -> None:
        self._ready_s, self._ids = ready_s, ids

    def wait(self) -> Results:
        """See engine.loop.Pending."""
        time.sleep(max(0.0, self._ready_s - time.perf_counter()))
        return Results(self._ids)


class TimedDevice:
    """A device that draws one id for ever and only takes time: step_s a step, and spin_s of Python to launch one."""

    def __init__(self, step_s: float, spin_s: float, token: int) -> None:
        self._step_s, self._spin_s, self._token = step_s, spin_s, token
        self._free_s = 0.0

    def launch(self, plan: Plan) -> TimedStep:
        """See engine.loop.StepRunner."""
        until_s = time.thread_time() + self._spin_s
        while time.thread_time() < until_s:
            pass
        self._free_s = max(self._free_s, time.perf_counter()) + self._step_s
        return TimedStep(self._free_s, [self._token] * sum(work.samples for work in plan.works))


def serve_fake(port: int, step_s: float, spin_s: float) -> int:
    """The front end, the scheduler and the engine's loop, without a model."""
    import threading

    import uvloop

    from tests.fakes_api import LETTERS, NAME, TEMPLATE
    from vserve import serve as real
    from vserve.api.app import App, Model, Options
    from vserve.api.failure import render
    from vserve.api.routes import Gate, routes, table
    from vserve.bridge import Bridge
    from vserve.engine.inbox import Inbox
    from vserve.engine.limits import Limits
    from vserve.engine.loop import EngineLoop
    from vserve.engine.scheduler import Scheduler
    from vserve.http.limits import Limits as WireLimits
    from vserve.http.router import Router
    from vserve.http.server import HttpServer
    from vserve.observe.heartbeat import Heartbeat
    from vserve.text.template import ChatTemplate

    async def run() -> None:
        sys.setswitchinterval(real.SWITCH_INTERVAL_S)
        app = App(Options(version="bench", max_queue=4096))
        entries = table(app)
        server = HttpServer(Router(routes(entries)), WireLimits(), render, Gate(app, entries), access_log=app.exchanged)
        app.metrics.timer.start()
        inbox = Inbox(4096)
        bridge = Bridge(asyncio.get_running_loop(), inbox, turns=server.site.turns)
        limits = Limits(20000, 16, 256, 2048, 8192, mixed_sizes=(256, 512, 640, 1024), prefix_caching=False)
        heartbeat = Heartbeat(time.monotonic())
        device = TimedDevice(step_s, spin_s, LETTERS.encode("w", add_special=False)[0])
        engine = EngineLoop(
            inbox, Scheduler(limits), device, bridge.publish, bridge.died, heartbeat, depth=2, owns_gc=True
        )
        model = Model(
            names=(NAME,), tokenizer=LETTERS, template=ChatTemplate(TEMPLATE), bridge=bridge, waiting=inbox,
            heartbeat=heartbeat, max_model_len=8192, vocab_size=LETTERS.vocab_size,
        )  # fmt: skip
        app.ready(model)
        import gc

        gc.collect()
        gc.freeze()
        thread = threading.Thread(target=engine.run, daemon=True)
        thread.start()
        await server.listen("127.0.0.1", port)
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()
        await server.close(0.1)
        engine.stop()
        thread.join(5)

    uvloop.run(run())
    return 0


def tell(pings: Sequence[Ping], seen: Any) -> None:
    """Where the slow pings' time went, and which callbacks are long."""
    handled, spans = seen["pings"], sorted(seen["spans"], key=lambda span: span[1])
    begins = [span[1] for span in spans]
    slow = [(ping, at) for ping, at in matched(pings, handled) if ping.seconds > SLOW_S]
    where: dict[str, float] = defaultdict(float)
    number: Counter[str] = Counter()
    for ping, at in slow:
        where["total"] += ping.seconds
        where["back"] += ping.received_s - at
        outside = at - ping.sent_s
        first = max(0, bisect.bisect_left(begins, ping.sent_s) - 1)
        for name, began, ended, cpu in spans[first : bisect.bisect_left(begins, at)]:
            part = min(ended, at) - max(began, ping.sent_s)
            if part > 0:
                where[name] += part
                where["(of which other threads)"] += part * max(0.0, 1 - cpu / max(ended - began, 1e-9))
                number[name] += 1
                outside -= part
        where["between"] += outside
    each = {name: f"{seconds / len(slow) * 1e3:.2f}ms/{number[name] / len(slow):.1f}" for name, seconds in
            largest(where)} if slow else {}  # fmt: skip
    print(f"  {len(slow)} of {len(pings)} pings over {SLOW_S * 1e3:g} ms; the mean one (ms/times):", each)
    for ping, at in sorted(slow, key=lambda pair: -pair[0].seconds)[:3]:
        first = max(0, bisect.bisect_left(begins, ping.sent_s) - 1)
        inside: dict[str, float] = defaultdict(float)
        count: Counter[str] = Counter()
        for name, began, ended, _ in spans[first : bisect.bisect_left(begins, at)]:
            part = min(ended, at) - max(began, ping.sent_s)
            if part > 0:
                inside[name] += part
                count[name] += 1
        parts = {name: f"{seconds * 1e3:.2f}/{count[name]}" for name, seconds in largest(inside)[:5]}
        print(f"    {ping.seconds * 1e3:.2f} ms: back {(ping.received_s - at) * 1e3:.2f}", parts)
    kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, began, ended, cpu in [*spans, *seen["engine"]]:
        kinds[name].append((ended - began, cpu))
    span_s = spans[-1][2] - spans[0][1] if spans else 1.0
    for name, times in sorted(kinds.items(), key=lambda kind: -sum(cpu for _, cpu in kind[1])):
        walls, cpus = [wall for wall, _ in times], [cpu for _, cpu in times]
        print(
            f"  {name:28} n={len(times):6} share={sum(walls) / span_s:5.1%} cpu={sum(cpus) / span_s:5.1%} wall ms p50="
            f"{percentile(walls, 0.5) * 1e3:.3f} p99={percentile(walls, 0.99) * 1e3:.3f} max={max(walls) * 1e3:.2f} "
            f"cpu p99={percentile(cpus, 0.99) * 1e3:.3f} over {LONG_S * 1e3:g}: {sum(wall > LONG_S for wall in walls)}"
        )


def largest(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    """Names and seconds, the most first."""
    return sorted(parts.items(), key=lambda part: -part[1])


def matched(pings: Sequence[Ping], handled: Sequence[float]) -> list[tuple[Ping, float]]:
    """Each ping with the moment in which the server handled it."""
    pairs = []
    for ping in pings:
        place = bisect.bisect_left(handled, ping.sent_s)
        if place < len(handled) and handled[place] <= ping.received_s:
            pairs.append((ping, handled[place]))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watched", help=argparse.SUPPRESS)
    parser.add_argument("--concurrency", default="32,128")
    parser.add_argument("--requests", type=int, default=0, help="requests a case; by default 4 per concurrency")
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=3.0, help="of the device that only takes time")
    parser.add_argument("--spin-ms", type=float, default=0.3, help="of Python a launch, likewise")
    parser.add_argument("--brief", action="store_true", help="the JSON lines alone")
    parser.add_argument("--name", default="vserve", help="name of the server in the results")
    parser.add_argument("serve", nargs="*", help="arguments for vserve serve; none: a device that only takes time")
    args = parser.parse_args()
    if args.watched:
        raise SystemExit(serve_watched(args.serve, Path(args.watched)))
    port = free_port()
    words = args.serve or ["fake"]
    if words == ["fake"]:
        words = ["fake", str(port), str(args.step_ms / 1e3), str(args.spin_ms / 1e3)]
    else:
        words = ["serve", *words, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="bench-ping-") as folder:
        report = Path(folder) / "seen.json"
        command = [sys.executable, __file__, "--watched", str(report), "--", *words]
        with running(args.name, command, port, "/health/ready") as target:
            for concurrency in map(int, args.concurrency.split(",")):
                count = args.requests or 4 * concurrency
                load = Load(concurrency, count, 0, args.output_len, None, args.input_len, args.vocab_size, True)
                measure(target, Load(concurrency, concurrency, 0, 8, None, args.input_len, args.vocab_size), seed=1)
                ask_for(report, target)
                part = measure(target, load, seed=100)
                pings = [ping.seconds * 1e3 for ping in part.pings]
                floor = [ping.seconds * 1e3 for ping in part.floor]
                numbers: dict[str, object] = {"server": args.name, "concurrency": concurrency}
                numbers |= summary(part.samples, part.wall_s)
                for name, values in (("ping", pings), ("floor", floor)):
                    for share, at in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
                        numbers[f"{name}_ms_{share}"] = round(percentile(values, at), 3)
                emit("ping", numbers, record=False)
                seen = ask_for(report, target)
                if not args.brief:
                    tell(part.pings, seen)


def ask_for(report: Path, target: Target) -> Any:
    """What the server has seen since it was asked last."""
    report.unlink(missing_ok=True)
    assert target.pid is not None
    os.kill(target.pid, signal.SIGUSR1)
    until = time.monotonic() + 30
    while not report.exists():
        if time.monotonic() > until:
            raise SystemExit("the server does not say what it saw")
        time.sleep(0.05)
    return json.loads(report.read_text())


if __name__ == "__main__":
    main()
