"""A coverage-guided fuzzer (atheris, libFuzzer) on everything that reads bytes of others.

    python bench/fuzz.py                                   every target for 10 s
    python bench/fuzz.py --target parser --seconds 600 --record

The targets and what they promise are in tests/fuzz/targets.py; tests/fuzz runs each for a moment.  Seeds are the wire
table and the field tables of the tests.  One JSON line a target: executions, coverage, crashes.  An input that breaks a
promise is left in the folder named by --keep, and the exit code is 1.  libFuzzer never returns, so each target runs in
a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# In place of this folder: http.py here would hide the standard library's http.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_WIRE = ("vserve.http.parser", "vserve.http.head", "vserve.http.events")
_API = ("vserve.api.body", "vserve.api.fields", "vserve.api.prompts", "vserve.api.schema", "vserve.api.requests")
INSTRUMENTED: dict[str, tuple[str, ...]] = {
    "parser": _WIRE,
    "judges": _WIRE,
    "api": _API,
    "keys": ("vserve.api.key_file",),
    "flags": ("vserve.config", "vserve.settings"),
    "toml": ("vserve.config", "vserve.settings"),
    "canary": ("vserve.errors",),
}
"""The modules whose branches guide the fuzzer, by target; here, for they must not be imported before it."""
CANARY = "canary"
"""Breaks its promise on purpose, so that a fuzzer that finds nothing is known to be able to."""
MEMORY_MIB = 1024
INPUT_TIMEOUT_S = 5


def fuzz(name: str, arguments: list[str]) -> None:
    """Run one target in this process; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=list(INSTRUMENTED[name])):
        for module in INSTRUMENTED[name]:
            importlib.import_module(module)
    from tests.fuzz.targets import TARGETS

    atheris.Setup([sys.argv[0], *arguments], TARGETS[name].run)
    atheris.Fuzz()


def run(name: str, seconds: int, seed: int, keep: Path) -> tuple[dict[str, object], str]:
    """Fuzz one target for so long in a process of its own; what came of it, and what it said."""
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vserve-fuzz-", dir=memory) as folder:
        corpus, words = Path(folder, "corpus"), Path(folder, "words")
        corpus.mkdir()
        for number, data in enumerate(target.seeds()):
            (corpus / f"{number:05}").write_bytes(data[: target.longest])
        words.write_text("".join(f'"{_quoted(word)}"\n' for word in target.words))
        command = [sys.executable, __file__, "--child", name, str(corpus), f"-dict={words}", f"-seed={seed}"]
        command += [f"-max_total_time={seconds}", f"-max_len={target.longest}", f"-rss_limit_mb={MEMORY_MIB}"]
        command += [f"-timeout={INPUT_TIMEOUT_S}", "-print_final_stats=1", f"-artifact_prefix={keep}/{name}-"]
        started_s = time.monotonic()
        environment = {**os.environ, "TMPDIR": folder}
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds + 300, env=environment
        )
        text = done.stderr + done.stdout
        grown = len(list(corpus.iterdir()))
    crashes = sorted(path.name for path in keep.glob(f"{name}-*"))
    coverage = [int(found) for found in re.findall(r"cov: (\d+)", text)]
    features = [int(found) for found in re.findall(r"ft: (\d+)", text)]
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", text)
    peak = re.search(r"stat::peak_rss_mb:\s*(\d+)", text)
    clean = done.returncode == 0 and executed is not None
    numbers: dict[str, object] = {
        "target": name,
        "seconds": round(time.monotonic() - started_s),
        "executions": int(executed[1]) if executed else 0,
        "edges": max(coverage, default=0),
        "features": max(features, default=0),
        "corpus": grown,
        "peak_rss_mib": int(peak[1]) if peak else 0,
        "crashes": 0 if clean else max(1, len(crashes)),
        "seed": seed,
    }
    return numbers, text


def _quoted(word: bytes) -> str:
    return "".join(chr(b) if 0x20 <= b < 0x7F and b not in b'"\\' else f"\\x{b:02x}" for b in word)


def main() -> int:
    """Run the targets asked for; 1 when an input broke a promise."""
    if len(sys.argv) > 2 and sys.argv[1] == "--child":
        fuzz(sys.argv[2], sys.argv[3:])
    from bench.record import emit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target", choices=tuple(INSTRUMENTED), action="append", help="repeat for several; all by default"
    )
    parser.add_argument("--seconds", type=int, default=10, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("."), help="folder for inputs that broke a promise")
    parser.add_argument("--record", action="store_true", help="append the lines to bench/results/fuzz.jsonl")
    args = parser.parse_args()
    broken = False
    for name in args.target or [name for name in INSTRUMENTED if name != CANARY]:
        numbers, text = run(name, args.seconds, args.seed, args.keep)
        emit("fuzz", numbers, record=args.record)
        if numbers["crashes"]:
            broken = True
            print(text[-4000:], file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
