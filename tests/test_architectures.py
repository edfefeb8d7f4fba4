"""README's table of architectures is what was recorded, and what was recorded has tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench import architectures
from bench.architectures import COLUMNS, FAMILIES, GAPS, Cell

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_is_written_from_the_record() -> None:
    text = architectures.README.read_text()
    assert architectures.rewrite(text, architectures.recorded()) == text


def test_every_cell_has_a_record_or_a_reason() -> None:
    cells = {f"{cell.family}/{cell.column}" for cell in architectures.recorded()}
    assert {f"{family}/{column}" for family in FAMILIES for column in COLUMNS} == cells | set(GAPS)


def test_what_is_recorded_is_what_there_are_tests_for() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.architectures", "--list"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) == {f"{cell.family}/{cell.column}" for cell in architectures.recorded()}


def test_a_gap_is_numbered_and_explained_and_a_gpu_is_named() -> None:
    lines = architectures.table([Cell("opt", "fp32", 3, "cpu"), Cell("opt", "gpu", 1, "H100")]).splitlines()
    row = next(line for line in lines if line.startswith("| OPT"))
    assert row.startswith("| OPT | yes | H100 | – (")
    number = row.rsplit("(", 1)[1].split(")")[0]
    assert f"({number}) llama.cpp has no GGUF form of it" in lines[-1]
