"""Every kernel compiles for the GPU it is written for, also where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = (
    "_plan_tasks _decode decode_e4m3 _reduce _prefill _rope_and_write _scan _settle _token_logprobs _bias_and_ban "
    "_penalise _count_tokens _vector _matrix _norm _activate _experts "
    "_words _portable_row _shared_matrix _write_out _quantise_rows"
)


def test_every_kernel_compiles_for_hopper() -> None:
    script = HERE / "compile_for_hopper.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=HERE.parent.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) == set(KERNELS.split())


def environment() -> dict[str, str]:
    path = [str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
