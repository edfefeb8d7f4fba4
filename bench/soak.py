"""A soak: mixed traffic on the real server for minutes.  Is its memory flat, and is everything given back?

    python bench/soak.py                          ten minutes with the default model
    python bench/soak.py --minutes 30 --record

The server is a process of its own.  Clients stream, ask whole answers on connections they keep, cancel at any byte,
drip, read a byte at a time, send what the wire table refuses, set deadlines, scrape and probe.  A status that does not
fit the request, a stream without its end and a refused connection are faults.  Memory is RssAnon + VmSwap, sampled with
descriptors, threads and asyncio tasks; its slope over requests is a least-squares fit of the samples after the warm-up
(the first half), in MiB per 1,000 requests.  The KV cache is kept small so that all of it has been touched by then.
One JSON line.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# In place of this folder: http.py here would hide the standard library's http.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.record import emit
from tests.http.test_http_parser import INVALID

WORKERS = 8
SAMPLE_S = 5.0
PATIENCE_S = 120.0
KV_BYTES = "64MiB"
BAD_BODIES = (
    b"{",
    b"[]",
    b'{"prompt": 1}',
    b'{"prompt": "x", "n": 0}',
    b'{"prompt": "x", "temperature": 1e999}',
    b"\xff",
)
PROBES = ("/metrics", "/metrics", "/health", "/ping", "/load", "/v1/models", "/nowhere")


class Client:
    """One connection at a time, kept while the server keeps it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._peer: socket.socket | None = None
        self._data = b""

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        """A new connection."""
        peer = socket.socket()
        if receive_buffer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        peer.settimeout(PATIENCE_S)
        peer.connect(("127.0.0.1", self._port))
        return peer

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """A request on the kept connection; status and content."""
        peer = self._peer = self._peer or self.connect()
        peer.sendall(request(method, path, body))
        status, headers, content = self._read(peer)
        if headers.get(b"connection") == b"close":
            self.close()
        return status, content

    def _read(self, peer: socket.socket) -> tuple[int, dict[bytes, bytes], bytes]:
        data = b""
        while b"\r\n\r\n" not in data:
            data += _some(peer)
        head, _, rest = data.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
        if b"content-length" in headers:
            length = int(headers[b"content-length"])
            while len(rest) < length:
                rest += _some(peer)
        else:
            while not rest.endswith(b"\r\n0\r\n\r\n"):
                rest += _some(peer)
        return int(lines[0].split(b" ")[1]), headers, rest

    def close(self) -> None:
        """Let the kept connection go."""
        if self._peer is not None:
            self._peer.close()
            self._peer = None


def request(method: str, path: str, body: bytes = b"") -> bytes:
    """The bytes of a request."""
    length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if method == "POST" else ""
    return f"{method} {path} HTTP/1.1\r\nHost: soak\r\n{length}\r\n".encode() + body


def _some(peer: socket.socket) -> bytes:
    data = peer.recv(1 << 16)
    if not data:
        raise ConnectionError("the answer is cut")
    return data


def _body(rng: random.Random, **changes: object) -> bytes:
    words = " ".join(rng.choice(("red", "green", "blue", "one", "two", "Paris")) for _ in range(rng.randint(1, 40)))
    return json.dumps({"prompt": words, "max_tokens": rng.randint(1, 10), **changes}).encode()


def _chat(rng: random.Random, **changes: object) -> bytes:
    body = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": rng.randint(1, 10), **changes}
    return json.dumps(body).encode()


@dataclass
class Tally:
    """What the clients saw.  Guarded by a lock of its own."""

    done: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def requests(self) -> int:
        """How many have ended."""
        return sum(self.done.values())

    def count(self, kind: str, fault: str | None) -> None:
        """One more of that kind."""
        with self._lock:
            self.done[kind] += 1
            if fault is not None:
                self.faults.append(f"{kind}: {fault}"[:300])


def whole(client: Client, rng: random.Random) -> str | None:
    status, content = client.ask("POST", "/v1/completions", _body(rng, n=rng.choice((1, 1, 2))))
    return None if status in (200, 429) else f"{status} {content[:100]!r}"


def stream(client: Client, rng: random.Random) -> str | None:
    status, content = client.ask("POST", "/v1/chat/completions", _chat(rng, stream=True))
    if status == 200 and (b'"error"' in content or b"data: [DONE]" not in content):
        return f"the stream has no good end: {content[-200:]!r}"
    return None if status in (200, 429) else f"{status}"


def deadline(client: Client, rng: random.Random) -> str | None:
    status, _ = client.ask("POST", "/v1/completions", _body(rng, timeout_ms=rng.randint(1, 60), max_tokens=60))
    return None if status in (200, 429, 504) else f"{status}"


def vanish(client: Client, rng: random.Random) -> str | None:
    message = request("POST", "/v1/completions", _body(rng, stream=rng.random() < 0.5, max_tokens=60))
    with client.connect() as peer:
        peer.sendall(message if rng.random() < 0.8 else message[: rng.randrange(len(message))])
        if rng.random() < 0.5:
            peer.settimeout(rng.random() / 4)
            with contextlib.suppress(TimeoutError, ConnectionError):
                peer.recv(rng.randint(1, 2000))
        if rng.random() < 0.5:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    return None


def slow(client: Client, rng: random.Random) -> str | None:
    with client.connect(receive_buffer=2048) as peer:
        peer.sendall(request("POST", "/v1/completions", _body(rng, stream=True, max_tokens=20)))
        for _ in range(rng.randint(5, 60)):
            if not peer.recv(1):
                return "cut"
            time.sleep(0.02)
    return None


def drip(client: Client, rng: random.Random) -> str | None:
    with client.connect() as peer:
        for byte in request("GET", "/ping")[: rng.randint(5, 60)]:
            peer.sendall(bytes((byte,)))
            time.sleep(0.01)
    return None


def bad_body(client: Client, rng: random.Random) -> str | None:
    status, content = client.ask(
        "POST", rng.choice(("/v1/completions", "/v1/chat/completions")), rng.choice(BAD_BODIES)
    )
    return None if status in (400, 429) and b'"error"' in content else f"{status} {content[:100]!r}"


def bad_bytes(client: Client, rng: random.Random) -> str | None:
    """Cases whose verdict does not hang on the small limits of the table."""
    data, wanted = rng.choice(WRONG)
    with client.connect() as peer:
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        got = b""
        with contextlib.suppress(ConnectionError):
            while part := peer.recv(1 << 16):
                got += part
    return None if not got or got.startswith(b"HTTP/1.1 %d " % wanted) else f"{data!r}: {got[:60]!r}, not {wanted}"


WRONG = [(data, status) for data, status in INVALID.values() if status in (400, 505) and b"POST" not in data]


def probe(client: Client, rng: random.Random) -> str | None:
    path = rng.choice(PROBES)
    status, _ = client.ask("GET", path)
    return None if status == (404 if path == "/nowhere" else 200) else f"{path}: {status}"


def reconnect(client: Client, rng: random.Random) -> str | None:
    client.close()
    return probe(client, rng)


KINDS: dict[Callable[[Client, random.Random], str | None], int] = {
    whole: 10, stream: 10, vanish: 12, deadline: 4, slow: 2, drip: 3, bad_body: 12, bad_bytes: 15, probe: 22,
    reconnect: 10,
}  # fmt: skip
"""What clients do, and how often among a hundred."""


def work(port: int, seed: int, until_s: float, tally: Tally) -> None:
    """One client until the time is over."""
    rng, client = random.Random(seed), Client(port)
    kinds, weights = list(KINDS), list(KINDS.values())
    while time.monotonic() < until_s:
        kind = rng.choices(kinds, weights)[0]
        try:
            fault = kind(client, rng)
        except (OSError, ValueError, IndexError) as error:
            client.close()
            fault = f"{type(error).__name__}: {error}"
        tally.count(kind.__name__, fault)
    client.close()


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one moment, after so many requests."""

    requests: int
    memory_mib: float
    descriptors: int
    threads: int
    tasks: int


class Process:
    """The server's process; tasks are counted by a line of ours in it."""

    def __init__(self, flags: list[str]) -> None:
        command = [sys.executable, __file__, "--child", "serve", "--host", "127.0.0.1", "--port", "0", *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = 0
        for line in self._process.stdout:
            if "http://127.0.0.1:" in line and not self.port:
                self.port = int(line.split("http://127.0.0.1:")[1].split("/")[0].split()[0])
            if "curl" in line:
                break
        else:
            raise SystemExit("the server did not start")

    def sample(self, requests: int) -> Sample:
        """The process as the kernel and its event loop see it."""
        folder = Path("/proc", str(self._process.pid))
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        kib = sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap"))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        tasks = int(self._process.stdout.readline())
        descriptors = len(os.listdir(folder / "fd"))
        return Sample(requests, round(kib / 1024, 2), descriptors, int(status["Threads"]), tasks)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self._process.terminate()
        return self._process.wait(60)

    def kill(self) -> None:
        """At once, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(30)


def serve(arguments: list[str]) -> int:
    """The real server, with a thread that says how many tasks there are for every line on stdin."""
    import asyncio

    from vserve import cli

    def count() -> None:
        for _ in sys.stdin:
            print(sum(isinstance(item, asyncio.Task) and not item.done() for item in gc.get_objects()), flush=True)

    threading.Thread(target=count, name="count", daemon=True).start()
    return cli.main(arguments)


def slope(samples: list[Sample]) -> float:
    """MiB per 1,000 requests: least squares over the samples."""
    mean_x = sum(sample.requests for sample in samples) / len(samples)
    mean_y = sum(sample.memory_mib for sample in samples) / len(samples)
    above = sum((sample.requests - mean_x) * (sample.memory_mib - mean_y) for sample in samples)
    below = sum((sample.requests - mean_x) ** 2 for sample in samples)
    return above / below * 1000 if below else 0.0


def idle(client: Client) -> dict[str, float]:
    """What /load says is still held, at the latest after PATIENCE_S."""
    end_s = time.monotonic() + PATIENCE_S
    while True:
        now = json.loads(client.ask("GET", "/load")[1])
        held = {name: now[name] for name in ("server_load", "queue_size", "kv_blocks_held") if now[name]}
        if not held or time.monotonic() > end_s:
            return held
        time.sleep(0.1)


def soak(minutes: float, seed: int) -> dict[str, object]:
    """The whole run."""
    process = Process(["--kv-cache-memory-bytes", KV_BYTES, "--max-model-len", "512"])
    try:
        client, tally = Client(process.port), Tally()
        question = json.dumps({"prompt": "The three primary colours are", "max_tokens": 16, "temperature": 0}).encode()
        before = json.loads(client.ask("POST", "/v1/completions", question)[1])["choices"][0]["text"]
        client.close()
        samples = [process.sample(0)]
        started_s = time.monotonic()
        until_s = started_s + minutes * 60
        threads = [
            threading.Thread(target=work, args=(process.port, seed * 1000 + n, until_s, tally)) for n in range(WORKERS)
        ]
        for thread in threads:
            thread.start()
        while time.monotonic() < until_s:
            time.sleep(SAMPLE_S)
            samples.append(process.sample(tally.requests))
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - started_s
        held = idle(client)
        after = json.loads(client.ask("POST", "/v1/completions", question)[1])["choices"][0]["text"]
        client.close()
        time.sleep(1.0)
        last = process.sample(tally.requests)
        code = process.stop()
    finally:
        process.kill()
    steady = [sample for sample in samples if sample.requests > tally.requests / 2]
    return {
        "seconds": round(seconds),
        "requests": tally.requests,
        "kinds": dict(sorted(tally.done.items())),
        "faults": len(tally.faults),
        "first_faults": tally.faults[:5],
        "mib_per_1000_requests": round(slope(steady), 3),
        "memory_mib": [samples[0].memory_mib, steady[0].memory_mib, last.memory_mib],
        "curve": [[sample.requests, sample.memory_mib] for sample in samples[:: max(1, len(samples) // 12)]],
        "descriptors": [samples[0].descriptors, max(sample.descriptors for sample in samples), last.descriptors],
        "threads": [samples[0].threads, max(sample.threads for sample in samples), last.threads],
        "tasks": [samples[0].tasks, max(sample.tasks for sample in samples), last.tasks],
        "held": held,
        "same_answer": before == after,
        "exit_code": code,
    }


def main() -> int:
    """Soak and print one JSON line; 1 when something was wrong or held."""
    if sys.argv[1:2] == ["--child"]:
        return serve(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="append the line to bench/results/soak.jsonl")
    args = parser.parse_args()
    numbers = soak(args.minutes, args.seed)
    emit("soak", numbers, record=args.record)
    good = not numbers["faults"] and not numbers["held"] and numbers["same_answer"] and numbers["exit_code"] == 0
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
