"""One line of JSON a result: the bench's name, the commit, the device and the numbers."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def commit() -> str:
    """The short commit of the checkout, with + when files differ from it; "unknown" outside git.

    VSERVE_COMMIT in its place: for a copy of a checkout on another machine.
    """
    if named := os.environ.get("VSERVE_COMMIT"):
        return named
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device() -> str:
    """The GPU's name where there is one, else the processor's with its number of cores."""
    cards = Path("/proc/driver/nvidia/gpus")
    if cards.is_dir():
        for card in cards.iterdir():
            for line in (card / "information").read_text().splitlines():
                if line.startswith("Model:"):
                    return line.split(":", 1)[1].strip()
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {os.cpu_count()} cores"


def emit(bench: str, numbers: Mapping[str, object], *, record: bool) -> None:
    """Print one result line; with record also append it to bench/results/<bench>.jsonl."""
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    line = json.dumps({"bench": bench, "date": when, "commit": commit(), "device": device(), **numbers})
    print(line, flush=True)
    if record:
        RESULTS.mkdir(parents=True, exist_ok=True)
        with (RESULTS / f"{bench}.jsonl").open("a") as out:
            out.write(line + "\n")


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()
