"""The whole server under load: TTFT, TPOT, inter-token latency and tokens a second through HTTP, on loopback.

    python bench/serve.py                                    the default model, c = 1, 4, 16
    python bench/serve.py --peer-python PYTHON               the same beside llama-cpp-python's server (A B B A)
    python bench/serve.py --url http://127.0.0.1:8000        a server that runs already

A measured server is started on a free port, warmed up with one round, and ended.  Prompts share no beginning, so the
prefix cache cannot help.  Only addresses of this machine are ever asked.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Generic, TypeVar, cast

# In place of this folder, not beside it: bench/http.py would hide the standard library's http.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.client import Sample, closed_loop, percentile, poisson, request_bytes, summary, text_prompt
from bench.record import ROOT, emit

T = TypeVar("T")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
START_LIMIT_S = 300.0
CONNECTIONS = 16
"""Streams that one client process reads: more, and the client would be the limit."""
PING_GAP_S = 0.005
ROUND_LIMIT_S = 300.0
"""A round that takes longer hangs: the server's stacks are shown then."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server to measure: its name in the results, where it listens, and the seconds it took to start (or None)."""

    name: str
    port: int
    start_s: float | None
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked: requests in flight (or a rate a second), how many in all, words in and tokens out.

    input_len: exactly so many random token ids below vocab_size in place of words.  ping: GET /ping all the while.
    """

    concurrency: int
    requests: int
    words: int
    output_len: int
    rate: float | None = None
    input_len: int | None = None
    vocab_size: int = 0
    ping: bool = False


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(name: str, command: Sequence[str], port: int, ready_path: str) -> Iterator[Target]:
    """Start the command, wait until ready_path answers 200, and end the process group afterwards."""
    began = time.perf_counter()
    log_path = Path(os.environ.get("OUT", "/tmp")) / f"bench-{name}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(list(command), stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
    try:
        while not answers(port, ready_path):
            if process.poll() is not None or time.perf_counter() - began > START_LIMIT_S:
                raise SystemExit(f"{name} did not start:\n{log_path.read_text()[-2000:]}")
            time.sleep(0.02)  # polling another program's start: there is nothing to wait on
        yield Target(name, port, time.perf_counter() - began, process.pid)
    except Hung:
        alive = "answers" if answers(port, "/ping") else "does not answer"
        process.send_signal(signal.SIGABRT)  # vserve writes the stacks of its threads then
        process.wait(20)
        print(f"{name} hangs and {alive} /ping:\n{log_path.read_text()[-6000:]}", file=sys.stderr)
        raise
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def answers(port: int, path: str) -> bool:
    """True when GET path on the port says 200."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as peer:
            peer.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n".encode())
            return peer.recv(16)[9:12] == b"200"
    except OSError:
        return False


def bodies(load: Load, rng: random.Random) -> list[bytes]:
    """The requests of one round: fresh prompts, greedy, as long as asked."""
    return [
        request_bytes(
            "/v1/completions",
            {
                "model": None,
                "prompt": prompt(load, rng),
                "max_tokens": load.output_len,
                "temperature": 0,
                "stream": True,
                "ignore_eos": True,
                "stream_options": {"include_usage": True},
            },
            "127.0.0.1",
        )
        for _ in range(load.requests)
    ]


def prompt(load: Load, rng: random.Random) -> str | list[int]:
    """Random words, or random ids where their number is asked for."""
    if load.input_len is None:
        return text_prompt(rng, load.words)
    return [rng.randrange(load.vocab_size) for _ in range(load.input_len)]


@dataclass(frozen=True, slots=True)
class Ping:
    """One GET /ping: perf_counter seconds of sending it and of having its answer."""

    sent_s: float
    received_s: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.received_s - self.sent_s


@dataclass(slots=True)
class Round:
    """What one round saw: samples, its wall time in seconds, the pings, and those of a server that has no other work.

    The last are what the machine itself adds.
    """

    samples: list[Sample]
    wall_s: float
    pings: list[Ping]
    floor: list[Ping]


def measure(target: Target, load: Load, seed: int) -> Round:
    """One round of the load against the target, from as many client processes as it takes."""
    with tempfile.TemporaryDirectory(prefix="bench-stop-") as folder, idle_server() as idle:
        stop_file = Path(folder) / "stop"
        pingers = [Child(ping_until, port, stop_file) for port in (target.port, idle) if load.ping]
        parts = [Child(drive, target.port, part, seed * 100 + i) for i, part in enumerate(split(load))]
        done = [part.result() for part in parts]
        stop_file.touch()
        pings, floor = [pinger.result() for pinger in pingers] or ([], [])
    samples = [sample for part, _ in done for sample in part]
    return Round(samples, max(wall for _, wall in done), pings, floor)


class Hung(SystemExit):
    """A round did not end."""


class Child(Generic[T]):
    """One call in a process of its own: simpler to wait for, with a limit, than a pool of them."""

    def __init__(self, call: Callable[..., T], *args: object) -> None:
        context = multiprocessing.get_context("fork")
        self._results, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_answer, args=(theirs, call, args), daemon=True)
        self._process.start()
        theirs.close()

    def result(self) -> T:
        """What the call returned; SystemExit where the process has ended without, Hung where it does not end."""
        if not self._results.poll(ROUND_LIMIT_S):
            raise Hung(f"a client process has no result after {ROUND_LIMIT_S:g} s")
        try:
            result: T = self._results.recv()
        except EOFError:
            raise SystemExit("a client process failed; its error is above") from None
        self._process.join()
        return result


def _answer(results: Connection, call: Callable[..., object], args: tuple[object, ...]) -> None:
    results.send(call(*args))


def clients(load: Load) -> int:
    """Client processes: one for every CONNECTIONS requests in flight; an open loop has one."""
    return 1 if load.rate is not None else -(-load.concurrency // CONNECTIONS)


def split(load: Load) -> list[Load]:
    """The load of each client process."""
    num = clients(load)
    return [
        replace(
            load,
            concurrency=load.concurrency * (i + 1) // num - load.concurrency * i // num,
            requests=load.requests * (i + 1) // num - load.requests * i // num,
        )
        for i in range(num)
    ]


def drive(port: int, load: Load, seed: int) -> tuple[list[Sample], float]:
    """One client process's part.  The requests are made before the clock starts."""
    rng = random.Random(seed)
    requests = bodies(load, rng)
    gc.disable()
    if load.rate is not None:
        return asyncio.run(poisson("127.0.0.1", port, requests, load.rate, rng))
    return asyncio.run(closed_loop("127.0.0.1", port, requests, load.concurrency))


def ping_until(port: int, stop: Path) -> list[Ping]:
    """GET /ping, one after another on one connection, PING_GAP_S apart, until the file is there."""
    pings = []
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while not stop.exists():
            began = time.perf_counter()
            line.sendall(b"GET /ping HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            if not line.recv(4096).startswith(b"HTTP/1.1 200"):
                raise RuntimeError("GET /ping did not answer 200")  # SystemExit would end the worker, unheard
            pings.append(Ping(began, time.perf_counter()))
            time.sleep(PING_GAP_S)
    return pings


class _Pong(asyncio.Protocol):
    """Answers whatever comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own kind

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


@contextlib.contextmanager
def idle_server() -> Iterator[int]:
    """The port of a uvloop server in a process of its own, which answers pings and does nothing else."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = multiprocessing.get_context("fork").Process(target=_answer_pings, args=(listener,), daemon=True)
        server.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.terminate()
            server.join()


def _answer_pings(listener: socket.socket) -> None:
    import uvloop

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_Pong, sock=listener)
        await server.serve_forever()

    uvloop.run(serve())


def lag_counts(port: int) -> dict[float, float]:
    """How many of the server's own samples of its loop's lag were at most so many seconds; {} where it has none."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        line.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        text = b"".join(iter(lambda: line.recv(65536), b"")).decode(errors="replace")
    rows = re.findall(r'^vserve_event_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)$', text, re.MULTILINE)
    return {float(bound): float(count) for bound, count in rows}


def lag_share(before: dict[float, float], after: dict[float, float], share: float) -> float:
    """The seconds that so many of the samples in between do not pass, read off the buckets as Prometheus does."""
    grown = {bound: count - before.get(bound, 0.0) for bound, count in sorted(after.items())}
    wanted = share * max(grown.values())
    low, under = 0.0, 0.0
    for bound, count in grown.items():
        if count >= wanted and count > under:
            return low if bound == float("inf") else low + (bound - low) * (wanted - under) / (count - under)
        low, under = bound, count
    return low


def resident_mib(pid: int) -> float:
    """Resident memory of a process in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def report(target: Target, load: Load, rounds: Sequence[Round], lag: dict[float, float], record: bool) -> None:
    """Add the rounds up and emit one line.  lag: the counts of lag before them."""
    samples = [sample for part in rounds for sample in part.samples]
    numbers: dict[str, object] = {"server": target.name, "concurrency": load.concurrency}
    if load.rate is not None:
        numbers |= {"rate": load.rate}
    numbers |= summary(samples, sum(part.wall_s for part in rounds))
    if load.ping:
        shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        for kind, pings in (("ping", [part.pings for part in rounds]), ("floor", [part.floor for part in rounds])):
            times = [ping.seconds * 1e3 for part in pings for ping in part]
            numbers |= {f"{kind}_ms_{name}": round(percentile(times, share), 3) for name, share in shares.items()}
        after = lag_counts(target.port)
        if after:
            shares = {"p50": 0.5, "p99": 0.99}
            numbers |= {f"lag_ms_{name}": round(lag_share(lag, after, part) * 1e3, 2) for name, part in shares.items()}
    if target.start_s is not None:
        numbers["start_s"] = round(target.start_s, 2)
    if target.pid is not None:
        numbers["rss_mib"] = round(resident_mib(target.pid))
    emit("serve", numbers, record=record)
    failed = next((sample for sample in samples if sample.error), None)
    if failed is not None:
        print(f"a request failed: {failed.status} {failed.error}", file=sys.stderr)


def default_model() -> Path:
    """The GGUF file of the embedded default model."""
    from vserve.model.source import resolve

    return resolve(None, environ=os.environ).path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="measure this server of this machine instead of starting one")
    parser.add_argument("--name", default="vserve", help="name of the server in the results")
    parser.add_argument("--peer-python", help="a Python that has llama-cpp-python[server]; measures it in the same run")
    parser.add_argument("--concurrency", default="1,4,16")
    parser.add_argument("--rate", type=float, help="send at this many requests a second (Poisson) instead")
    parser.add_argument(
        "--requests", type=int, default=0, help="requests a round; by default --each per concurrency, 8 at least"
    )
    parser.add_argument("--each", type=int, default=4, help="requests a round for each at a time; few: the ends weigh")
    parser.add_argument("--rounds", type=int, default=2, help="rounds for each server, interleaved A B B A")
    parser.add_argument("--words", type=int, default=100, help="words of a prompt (about 1.2 tokens each)")
    parser.add_argument("--input-len", type=int, help="prompts of exactly so many random token ids in place of words")
    parser.add_argument("--vocab-size", type=int, default=32000, help="ids of --input-len are below this")
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--warm-up-len", type=int, default=8, help="tokens of each answer of the warm-up round")
    parser.add_argument(
        "--ping", action="store_true", help="also time GET /ping, and read the loop's lag, under the load"
    )
    parser.add_argument("--record", action="store_true", help="append the lines to bench/results/serve.jsonl")
    parser.add_argument("--serve-args", default="", help="more arguments for vserve serve, separated by blanks")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        targets = []
        if args.url:
            host, _, port = args.url.removeprefix("http://").rstrip("/").partition(":")
            if host not in LOOPBACK:
                raise SystemExit(f"--url {args.url}: only this machine is measured (127.0.0.1)")
            targets.append(Target(args.name, int(port or 80), None))
        else:
            port = free_port()
            command = [sys.executable, "-m", "vserve", "serve", "--host", "127.0.0.1", "--port", str(port)]
            command += args.serve_args.split()
            targets.append(stack.enter_context(running(args.name, command, port, "/health/ready")))
        if args.peer_python:
            port = free_port()
            command = [args.peer_python, "-m", "llama_cpp.server", "--model", str(default_model())]
            command += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", "4096", "--n_threads", "2"]
            command += ["--interrupt_requests", "false"]  # by default a newcomer cuts the answer before it short
            targets.append(stack.enter_context(running("llama-cpp-python", command, port, "/v1/models")))
        for concurrency in map(int, args.concurrency.split(",")):
            count = args.requests or max(8, args.each * concurrency)
            load = Load(
                concurrency, count, args.words, args.output_len, args.rate, args.input_len, args.vocab_size, args.ping
            )
            for target in targets:  # one round to warm up: lazy tables, first touches, caches
                warm = args.warm_up_len
                measure(target, replace(load, requests=concurrency, output_len=warm, rate=None, ping=False), seed=1)
            rounds: dict[str, list[Round]] = {target.name: [] for target in targets}
            lags = {target.name: lag_counts(target.port) if args.ping else {} for target in targets}
            for turn in range(args.rounds):
                for target in targets if turn % 2 == 0 else reversed(targets):
                    rounds[target.name].append(measure(target, load, seed=100 + turn))
            for target in targets:
                report(target, load, rounds[target.name], lags[target.name], args.record)


if __name__ == "__main__":
    main()
