"""The load generator: streams completions over plain sockets and times every piece that arrives.

One asyncio protocol per request in flight and no parsing beyond counting events, so that the client is not the limit;
for loads over about 50,000 tokens a second run several of these processes.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WORDS = (
    "river stone lamp window garden number engine paper silver morning forest answer bridge circle dragon energy "
    "flower ground harbor island jacket kitchen ladder market needle orange pencil quarter rocket summer ticket "
    "umbrella valley winter yellow zebra anchor basket candle desert eagle feather guitar hammer iron jungle"
).split()


@dataclass(slots=True)
class Sample:
    """One request: when it was sent, and the arrival time and number of tokens of each piece (perf_counter s)."""

    sent_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    done_s: float = 0.0
    status: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Seconds to the first piece of text."""
        return self.arrivals[0][0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean seconds a token after the first piece."""
        tokens = self.completion_tokens - self.arrivals[0][1]
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / max(tokens, 1)

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between pieces, each piece's gap once."""
        return [later[0] - earlier[0] for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


class _Stream(asyncio.Protocol):
    """Sends one request and collects its reply until the connection closes."""

    def __init__(self, request: bytes, done: asyncio.Future[Sample]) -> None:
        self._request = request
        self._done = done
        self._sample = Sample(0.0)
        self._tail = bytearray()
        self._head = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._sample.sent_s = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._head:
            self._sample.status = int(data[9:12])
            self._head = False
        # Every event that carries text holds this key with a value that is not the empty string.
        tokens = data.count(b'"text":"') - data.count(b'"text":""')
        tokens += data.count(b'"text": "') - data.count(b'"text": ""')
        if tokens > 0:
            self._sample.arrivals.append((now, tokens))
        self._tail += data
        if len(self._tail) > 8192:
            del self._tail[:-4096]

    def connection_lost(self, exc: Exception | None) -> None:
        sample = self._sample
        sample.done_s = time.perf_counter()
        at = self._tail.rfind(b'"usage":')
        if at >= 0:
            text = self._tail[at + 8 :].decode("utf-8", "replace").lstrip()
            if text.startswith("{"):
                usage = json.JSONDecoder().raw_decode(text)[0]
                sample.prompt_tokens = usage["prompt_tokens"]
                sample.completion_tokens = usage["completion_tokens"]
        if not sample.completion_tokens:
            sample.completion_tokens = sum(count for _, count in sample.arrivals)
        if sample.status != 200 or not sample.arrivals:
            sample.error = self._tail[-300:].decode("utf-8", "replace")
        if not self._done.done():
            self._done.set_result(sample)


def request_bytes(path: str, body: dict[str, object], host: str) -> bytes:
    """A whole POST with Connection: close, ready for the socket."""
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return head.encode() + f"Content-Length: {len(payload)}\r\n\r\n".encode() + payload


def text_prompt(rng: random.Random, words: int) -> str:
    """A prompt of that many words that shares no beginning with any other."""
    return " ".join(rng.choice(WORDS) for _ in range(words))


async def one(host: str, port: int, request: bytes) -> Sample:
    """Send one request on a connection of its own and wait for the end of its stream."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Sample] = loop.create_future()
    transport, _ = await loop.create_connection(lambda: _Stream(request, done), host, port)
    try:
        return await done
    finally:
        transport.close()


async def closed_loop(
    host: str, port: int, requests: Sequence[bytes], concurrency: int, now: Callable[[], float] = time.perf_counter
) -> tuple[list[Sample], float]:
    """Run all requests with that many in flight; returns samples and the wall time in seconds."""
    pending = iter(requests)
    samples: list[Sample] = []

    async def worker() -> None:
        for request in pending:
            samples.append(await one(host, port, request))

    began = now()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return samples, now() - began


async def poisson(
    host: str, port: int, requests: Sequence[bytes], rate: float, rng: random.Random
) -> tuple[list[Sample], float]:
    """Send requests at exponential gaps, rate a second, whatever is still in flight."""
    began = time.perf_counter()
    tasks = []
    for request in requests:
        tasks.append(asyncio.create_task(one(host, port, request)))
        await asyncio.sleep(rng.expovariate(rate))
    samples = list(await asyncio.gather(*tasks))
    return samples, time.perf_counter() - began


def percentile(values: Sequence[float], share: float) -> float:
    """The value at share in [0, 1] of the sorted values (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(samples: Sequence[Sample], wall_s: float) -> dict[str, float | int]:
    """Milliseconds and tokens a second over the samples that succeeded; failures are counted, not hidden."""
    good = [sample for sample in samples if not sample.error]
    numbers: dict[str, float | int] = {"requests": len(samples), "failed": len(samples) - len(good)}
    if not good:
        return numbers
    ttft = [sample.ttft_s * 1e3 for sample in good]
    tpot = [sample.tpot_s * 1e3 for sample in good if sample.completion_tokens > 1]
    gaps = [gap * 1e3 for sample in good for gap in sample.gaps_s] or [0.0]
    tokens = sum(sample.completion_tokens for sample in good)
    numbers |= {
        "prompt_tokens": round(statistics.mean(sample.prompt_tokens for sample in good)),
        "completion_tokens": round(statistics.mean(sample.completion_tokens for sample in good)),
        "ttft_ms_p50": round(percentile(ttft, 0.5), 2),
        "ttft_ms_p99": round(percentile(ttft, 0.99), 2),
        "tpot_ms_p50": round(percentile(tpot or [0.0], 0.5), 3),
        "itl_ms_p50": round(percentile(gaps, 0.5), 3),
        "itl_ms_p99": round(percentile(gaps, 0.99), 3),
        "tok_s": round(tokens / wall_s, 1),
    }
    return numbers
