"""How long a prompt of 1 MB holds up somebody else's stream: the worst gap between its tokens, with and without.

    python bench/tokenize_block.py                     the default model, every case, three rounds
    python bench/tokenize_block.py --url http://127.0.0.1:8000

One stream runs; half-way the long request is sent and its whole answer read.  ``added_ms`` is the stream's worst gap
while the long request was under way less its worst gap just before, the least over the rounds: what other programs on
the machine add is not the server's.  ``added_ms_max`` is the most.

    python bench/tokenize_block.py --front             the front end alone, with a fake engine and one token a byte

``held_ms`` is then the most processor time that one callback of the event loop took while the long request was
answered: for so long nobody's token could go out.  A busy machine does not change it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# In place of this folder, not beside it: bench/http.py would hide the standard library's http.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.client import request_bytes, text_prompt
from bench.record import emit
from bench.serve import LOOPBACK, free_port, running

CALM_TOKENS = 60
MEGABYTE = 10**6


@dataclass(frozen=True, slots=True)
class Case:
    """A long request: where it goes and what it holds."""

    name: str
    path: str
    body: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Round:
    """One long request beside a stream.  Milliseconds; took_ms: until its answer was complete."""

    calm_ms: float
    busy_ms: float
    took_ms: float
    status: int


def cases(rng: random.Random) -> list[Case]:
    """Every way in which a megabyte can come."""
    text = text_prompt(rng, MEGABYTE // 5)[:MEGABYTE]
    ids = [rng.randrange(10_000, 40_000) for _ in range(MEGABYTE // 6)]
    said = [{"role": "user", "content": text}]
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text[i * 250 : (i + 1) * 250]} for i in range(MEGABYTE // 250)
    ]
    return [
        Case("chat", "/v1/chat/completions", {"messages": said}),
        Case("chat, 4000 messages", "/v1/chat/completions", {"messages": turns}),
        Case("completions", "/v1/completions", {"prompt": text}),
        Case("completions, ids", "/v1/completions", {"prompt": ids}),
        Case("messages", "/v1/messages", {"messages": said, "max_tokens": 5}),
        Case("tokenize", "/tokenize", {"prompt": text}),
        Case("tokenize, strings", "/tokenize", {"prompt": text, "return_token_strs": True}),
        Case("tokenize, messages", "/tokenize", {"messages": turns}),
        Case("tokenize, 1000 texts", "/tokenize", {"prompt": [text[i * 1000 : (i + 1) * 1000] for i in range(1000)]}),
        Case("detokenize", "/detokenize", {"tokens": ids}),
    ]


async def measure(port: int, case: Case) -> Round:
    """A stream, and the case beside it."""
    ask = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True, "temperature": 0}
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    writer.write(request_bytes("/v1/completions", ask, "127.0.0.1"))
    arrivals: list[float] = []
    calm = asyncio.Event()

    async def read() -> None:
        while await reader.readline():
            now = time.perf_counter()
            if not arrivals or now - arrivals[-1] > 0.0005:  # the lines of one token come together
                arrivals.append(now)
            if len(arrivals) == CALM_TOKENS:
                calm.set()

    reading = asyncio.create_task(read())
    await calm.wait()
    request = request_bytes(case.path, dict(case.body), "127.0.0.1")
    began = time.perf_counter()
    status = await send(port, request)
    ended = time.perf_counter()
    await asyncio.sleep(0.1)  # what was held up arrives
    reading.cancel()
    writer.close()
    with contextlib.suppress(asyncio.CancelledError, OSError):
        await reading
    gaps = [(after, (after - before) * 1e3) for before, after in itertools.pairwise(arrivals)]
    calm_gaps = [gap for at, gap in gaps[10:] if at <= began]
    busy_gaps = [gap for at, gap in gaps if began < at <= ended + 0.1]
    return Round(max(calm_gaps), max(busy_gaps, default=0.0), (ended - began) * 1e3, status)


async def send(port: int, request: bytes) -> int:
    """Send the request and read all of the answer; its status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return int(answer[9:12])


async def run(port: int, rounds: int, only: str, *, record: bool) -> None:
    await measure(port, Case("warm-up", "/tokenize", {"prompt": "x"}))
    for case in cases(random.Random(7)):
        if only and only not in case.name:
            continue
        found = [await measure(port, case) for _ in range(rounds)]
        added = sorted(round(one.busy_ms - one.calm_ms, 2) for one in found)
        numbers = {
            "case": case.name,
            "bytes": len(json.dumps(case.body)),
            "status": found[0].status,
            "added_ms": max(0.0, added[0]),
            "added_ms_max": max(0.0, added[-1]),
            "calm_gap_ms": round(max(one.calm_ms for one in found), 2),
            "took_ms": round(min(one.took_ms for one in found), 1),
        }
        emit("tokenize_block", numbers, record=record)


class Clock:
    """Times every callback of the event loop in the processor time of its thread."""

    def __init__(self) -> None:
        self.most_s = 0.0
        inner = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            began = time.thread_time()
            inner(handle)
            if threading.current_thread().name == "loop":
                self.most_s = max(self.most_s, time.thread_time() - began)

        asyncio.Handle._run = timed  # type: ignore[method-assign, assignment]


def front(rounds: int, only: str, *, record: bool) -> None:
    """Every case against the front end alone."""
    from tests.fakes_api import LETTERS, standing

    clock = Clock()
    with standing() as stand:
        for case in cases(random.Random(7)):
            if only and only not in case.name:
                continue
            body = dict(case.body)
            for name in ("prompt", "tokens"):  # ids of its own vocabulary
                ids = body.get(name)
                if isinstance(ids, list) and isinstance(ids[0], int):
                    body[name] = [id % LETTERS.vocab_size for id in ids]
            request = request_bytes(case.path, body, "127.0.0.1")
            held_ms, status = [], 0
            for _ in range(rounds):
                clock.most_s = 0.0
                status = asyncio.run(send(stand.port, request))
                held_ms.append(round(clock.most_s * 1e3, 2))
            numbers = {"part": "front", "case": case.name, "bytes": len(request), "status": status}
            emit("tokenize_block", {**numbers, "held_ms": min(held_ms), "held_ms_max": max(held_ms)}, record=record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="measure this server of this machine instead of starting one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--record", action="store_true", help="append the lines to bench/results/tokenize_block.jsonl")
    parser.add_argument("--front", action="store_true", help="the front end alone")
    args = parser.parse_args()
    if args.front:
        front(args.rounds, args.only, record=args.record)
        return
    with contextlib.ExitStack() as stack:
        if args.url:
            host, _, port = args.url.removeprefix("http://").rstrip("/").partition(":")
            if host not in LOOPBACK:
                raise SystemExit(f"--url {args.url}: only this machine is measured (127.0.0.1)")
            number = int(port or 80)
        else:
            number = free_port()
            command = [sys.executable, "-m", "vserve", "serve", "--host", "127.0.0.1", "--port", str(number)]
            stack.enter_context(running("vserve", command, number, "/health/ready"))
        asyncio.run(run(number, args.rounds, args.only, record=args.record))


if __name__ == "__main__":
    main()
