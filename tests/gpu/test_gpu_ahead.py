"""Kernels that were compiled ahead say the same as any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent


def test_a_runner_compiled_ahead_by_threads_has_the_plain_runners_texts(tmp_path: Path) -> None:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(TESTS / "gpu" / "compiled_ahead.py")],
        env={**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled, same = done.stdout.split()
    assert int(compiled) > 10
    assert same == "True"
