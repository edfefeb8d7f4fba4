"""How long the server takes to be ready, phase by phase, and what it holds then.

    python bench/startup.py --serve-args "bench/models/llama-1b --load-format dummy"
    python bench/startup.py --weights bench/models/llama-8b      random weights of these dimensions, written to files
    python bench/startup.py --cold --serve-args ...              with an empty cache of compiled kernels

Phases are what GET /startupz says, asked every few milliseconds; "python" is the time until the port answers at all.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

# In place of this folder, not beside it: bench/http.py would hide the standard library's http.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.record import ROOT, emit
from bench.serve import free_port, resident_mib

ASK_GAP_S = 0.005
START_LIMIT_S = 300.0


def ask(port: int) -> tuple[int, Mapping[str, object]]:
    """(status, body) of GET /startupz; status 0 when nobody listens."""
    import http.client

    line = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        line.request("GET", "/startupz")
        reply = line.getresponse()
        body = json.loads(reply.read() or b"{}")
        return reply.status, body if isinstance(body, dict) else {}
    except (OSError, http.client.HTTPException):
        return 0, {}
    finally:
        line.close()


def has_bytecode() -> bool:
    """Whether Python finds torch compiled: where it must not write its bytecode, every start takes seconds longer."""
    torch = importlib.util.find_spec("torch")
    return torch is not None and torch.cached is not None and Path(torch.cached).exists()


def start(command: Sequence[str], port: int, environ: Mapping[str, str], log: Path) -> dict[str, object]:
    """One start, from the first instruction of Python to readiness, and its end."""
    phases: dict[str, float] = {}
    began = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=dict(environ), start_new_session=True)
    try:
        status, last, phase = 0, began, "python"
        while status != 200:
            if process.poll() is not None or time.perf_counter() - began > START_LIMIT_S:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-2000:]}")
            time.sleep(ASK_GAP_S)  # another program's start: there is nothing to wait on
            status, body = ask(port)
            now = time.perf_counter()
            if status:
                phases[phase] = phases.get(phase, 0.0) + now - last
                last, phase = now, str(body.get("phase") or "starting")
        ready = time.perf_counter() - began
        return {
            "ready_s": round(ready, 2),
            "phases_s": {name: round(took, 2) for name, took in phases.items() if took >= 0.005},
            "rss_mib": round(resident_mib(process.pid)),
        }
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def written(model: Path) -> Iterator[tuple[Path, int]]:
    """A folder with random bfloat16 weights for model's config.json and a tokenizer of bytes, and its size in bytes."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from vserve.model import source, tensors

    config = source.resolve(str(model), environ=os.environ, need_weights=False).config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="bench-weights-") as name:
        folder = Path(name)
        shutil.copy(model / "config.json", folder)
        numbers = {
            tensor: torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(0.02).cpu()
            for tensor, shape in tensors.expected_shapes(config).items()
        }
        save_file(numbers, folder / "model.safetensors")
        size = sum(tensor.nbytes for tensor in numbers.values())
        del numbers
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        words.decoder = decoders.ByteLevel()
        words.save(str(folder / "tokenizer.json"))
        yield folder, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="vserve", help="name in the results")
    parser.add_argument("--times", type=int, default=2, help="starts, one after the other")
    parser.add_argument("--cold", action="store_true", help="each with an empty cache of compiled kernels")
    parser.add_argument(
        "--weights", type=Path, help="write random weights for this folder's config.json, and load them"
    )
    parser.add_argument("--serve-args", default="", help="arguments for vserve serve, separated by blanks")
    parser.add_argument("--record", action="store_true", help="append the lines to bench/results/startup.jsonl")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-startup-")))
        more = args.serve_args.split()
        about: dict[str, object] = {"server": args.name, "cold": args.cold, "bytecode": has_bytecode()}
        about["serve_args"] = args.serve_args
        if args.weights is not None:
            folder, size = stack.enter_context(written(args.weights))
            more, about["weights_gb"] = [str(folder), *more], round(size / 1e9, 2)
        for turn in range(args.times):
            port = free_port()
            command = [sys.executable, "-m", "vserve", "serve", "--host", "127.0.0.1", "--port", str(port), *more]
            environ = dict(os.environ)
            if args.cold:
                environ["TRITON_CACHE_DIR"] = str(scratch / str(turn))
            emit(
                "startup", {**about, "turn": turn, **start(command, port, environ, scratch / "log")}, record=args.record
            )


if __name__ == "__main__":
    main()
