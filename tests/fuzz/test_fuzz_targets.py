"""The fuzzer's targets on their seeds, and the fuzzer itself for a moment; bench/fuzz.py runs it for longer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent.parent
MOMENTS_S = {"parser": 2, "judges": 1, "api": 1, "keys": 1, "flags": 1, "toml": 1}


@pytest.mark.parametrize("name", MOMENTS_S)
def test_every_seed_keeps_the_promise_of_its_target(name: str) -> None:
    seeds = list(TARGETS[name].seeds())
    assert len(seeds) > 5
    for data in seeds:
        TARGETS[name].run(data)


def fuzz(name: str, seconds: int, keep: Path) -> tuple[int, dict[str, object]]:
    command = [sys.executable, "bench/fuzz.py", "--target", name, "--seconds", str(seconds), "--keep", str(keep)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize(("name", "seconds"), MOMENTS_S.items())
@pytest.mark.promise("R8", "R10", "input: huge anything")
def test_a_moment_of_fuzzing_breaks_no_promise(name: str, seconds: int, tmp_path: Path) -> None:
    code, numbers = fuzz(name, seconds, tmp_path)
    broken = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert (code, numbers["crashes"], broken) == (0, 0, {})
    assert int(str(numbers["executions"])) > len(list(TARGETS[name].seeds()))
    assert int(str(numbers["edges"])) > 10


def test_the_fuzzer_finds_a_promise_that_is_not_kept(tmp_path: Path) -> None:
    code, numbers = fuzz("canary", 10, tmp_path)
    assert (code, numbers["crashes"]) == (1, 1)
    assert any(path.read_bytes().startswith(b"!") for path in tmp_path.iterdir())
