"""Clients that vanish at any byte, by the thousand: is everything they held given back, and is nobody else harmed?

    python bench/disconnects.py                    10,000 at each of the engine's two depths, a minute or two
    python bench/disconnects.py --count 1000 --record

The whole server but for the process (tests/chaos/stack.py: HTTP, text, bridge, engine thread, scheduler) on the fake
model, with so few pages that sequences push each other out.  Nine of ten clients send some or all of a request, read
some or none of the answer and go by FIN or RST; some bring a deadline.  The tenth wants its answer, which must be what
the model alone says.  At the end nothing may be held: pages, queue, replies, tasks, connections, descriptors.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# In place of this folder: http.py here would hide the standard library's http.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import uvloop

from bench.record import emit
from tests.chaos.stack import running, says
from tests.chaos.test_chaos_clients import vanish


def run(count: int, depth: int, seed: int) -> dict[str, object]:
    """So many clients, eight at a time; raises AssertionError when one is harmed or anything is left."""
    started_s = time.monotonic()
    statuses: collections.Counter[int] = collections.Counter()
    with running(num_blocks=64, rows=6, depth=depth, max_queue=50) as stack, ThreadPoolExecutor(8) as pool:

        def one(number: int) -> int | None:
            rng = random.Random(seed + number)
            if number % 10:
                vanish(stack, rng)
                return None
            prompt = [number % 48, number % 7, 9]
            reply = stack.ask({"prompt": prompt, "max_tokens": 20, "temperature": 0, "stream": number % 20 == 0})
            assert reply.status == 429 or reply.text == says(prompt, 20), reply
            return reply.status

        for status in pool.map(one, range(count)):
            if status is not None:
                statuses[status] += 1
        settling_s = time.monotonic()
        stack.settled()
        settled_s = time.monotonic()
        stack.right()
        stats = stack.bridge.stats
        aborted, preempted = stats.aborted_total, stats.preemptions_total
        stack.settled()
        left = stack.call(stack.leftovers)
    return {
        "case": f"disconnects, depth {depth}",
        "clients": count,
        "vanished": count - sum(statuses.values()),
        "answered": {str(status): number for status, number in sorted(statuses.items())},
        "aborted": aborted,
        "preemptions": preempted,
        "settled_after_s": round(settled_s - settling_s, 3),
        "seconds": round(time.monotonic() - started_s, 1),
        "left": left,
    }


def main() -> None:
    """Both depths, one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="clients at each depth")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="append the lines to bench/results/disconnects.jsonl")
    args = parser.parse_args()
    uvloop.new_event_loop().close()  # libuv keeps a pipe of the first loop: open before descriptors are counted
    for depth in (1, 2):
        emit("disconnects", run(args.count, depth, args.seed), record=args.record)


if __name__ == "__main__":
    main()
