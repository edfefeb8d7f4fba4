"""Every kernel compiles for the GPU it is written for, also where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = (
    "_plan_tasks _decode decode_e4m3 _reduce _prefill _rope_and_write _scan _settle _token_logprobs _bias_and_ban "
    "_penalise _count_tokens _vector _matrix _norm _activate _route _group _gate_rows _down_rows _tiles _packed_tiles "
    "_join words portable_row shared_matrix write_out _quantise_rows"
)


LIMIT = 232448
"""Bytes of shared memory that a program may ask for on an H100: 227 KiB."""


def test_every_kernel_compiles_for_hopper() -> None:
    assert set(printed("compile_for_hopper.py")) == set(KERNELS.split())


def test_every_tile_fits_a_multiprocessors_memory() -> None:
    *tiles, too_large = (line.split(maxsplit=2) for line in printed("tiles_for_hopper.py"))
    assert {kernel for _, kernel, _ in tiles} == {
        "_matrix",
        "shared_matrix",
        "_decode",
        "decode_e4m3",
        "_prefill",
        "_tiles",
        "_packed_tiles",
    }
    assert not [tile for tile in tiles if int(tile[0]) > LIMIT]
    assert int(too_large[0]) > LIMIT


def printed(script: str) -> list[str]:
    """The lines of a script of this folder."""
    done = subprocess.run(
        [sys.executable, str(HERE / script)],
        cwd=HERE.parent.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def environment() -> dict[str, str]:
    path = [str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    others = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**others, "PYTHONPATH": os.pathsep.join(path)}
