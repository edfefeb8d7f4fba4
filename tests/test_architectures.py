"""README's table of architectures is what was recorded, and what was recorded has tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    cells = [
        Cell("opt", "fp32", 3, "cpu"),
        *(Cell("opt", "gpu", 1, device, made) for device, made in (("cpu", None), ("an H100", "abc"))),
        *(Cell("opt", "awq", 1, device, "abc") for device in ("cpu", "an H100")),
        Cell("gpt2", "gpu", 1, "cpu"),
    ]
    lines = architectures.table(cells).splitlines()
    row = next(line for line in lines if line.startswith("| OPT"))
    assert row.startswith("| OPT | CPU | GPU | CPU, GPU | – (")
    assert next(line for line in lines if line.startswith("| GPT-2")).split(" | ")[2] == "interpreted"
    number = row.rsplit("(", 1)[1].split(")")[0]
    assert f"({number}) llama.cpp has no GGUF form of it" in lines[-1]
    assert lines[-1].endswith("GPU: compiled, on one an H100 at abc.")


def test_what_was_seen_on_a_gpu_and_on_a_cpu_is_recorded_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architectures, "RECORD", tmp_path / "record.jsonl")
    monkeypatch.setenv("VSERVE_COMMIT", "abc")
    for device, tests in (("cpu", 1), ("an H100", 2), ("cpu", 3)):
        architectures.record({("opt", "gpu"): tests}, device)
    found = architectures.recorded()
    assert found == [Cell("opt", "gpu", 3, "cpu", "abc"), Cell("opt", "gpu", 2, "an H100", "abc")]


def test_without_a_gpu_the_gpus_tests_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.architectures", "--gpu"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2
    assert "--gpu: there is no GPU here" in done.stderr
