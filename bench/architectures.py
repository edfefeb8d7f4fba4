"""Which architectures were checked against what: runs the oracle tests, keeps their outcomes, writes README's table.

    python -m bench.architectures            run them on the CPU, record, rewrite the table
    python -m bench.architectures --gpu      the same on the GPU, its kernels compiled
    python -m bench.architectures --list     the cells that tests exist for, without running them
    python -m bench.architectures --table    rewrite the table from what is recorded

What follows a -- is for pytest (-- -n 8).  A test says what it checks by @pytest.mark.oracle(column, family): column
one of COLUMNS, family a name of tests/model/families.py; without the family it is the first word of the test's
parameter `name`.  A cell is recorded when all of its tests passed, with the commit and the device they ran on: kernels
without a GPU are interpreted.  The module is pytest's plugin, too: it leaves only such tests, each with its cell.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import pytest

from bench.record import commit

ROOT: Final = Path(__file__).resolve().parent.parent
RECORD: Final = ROOT / "bench" / "results" / "architectures.jsonl"
README: Final = ROOT / "README.md"
FOLDERS: Final = ("tests/model", "tests/kernels")
GPU_FOLDERS: Final = ("tests/gpu", "tests/kernels")
CPU: Final = "cpu"
BEGIN: Final = "<!-- architectures: written by bench/architectures.py -->"
END: Final = "<!-- /architectures -->"

COLUMNS: Final[dict[str, str]] = {
    "fp32": "safetensors, float32",
    "gpu": "GPU kernels",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "fp8": "fp8",
    "gguf": "GGUF",
}
FAMILIES: Final[dict[str, str]] = {
    "llama": "Llama 2, 3, 3.x",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3-moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "phi3": "Phi-3, Phi-3.5, Phi-4-mini",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text)",
    "opt": "OPT",
    "gpt2": "GPT-2",
}
"""Family -> what the table calls it, in the order of the table."""

_REFUSED: Final = "not read yet: refused with one line"
_TURNED: Final = "its weights are stored turned; no tool is known to write such checkpoints of it"
GAPS: Final[dict[str, str]] = {
    "opt/gguf": "llama.cpp has no GGUF form of it",
    "mistral/gguf": "such files are named llama and are read as that",
    **dict.fromkeys(("qwen3-moe/gguf", "mixtral/gguf"), _REFUSED),
    **dict.fromkeys(("gpt2/awq", "gpt2/gptq", "gpt2/fp8"), _TURNED),
}
"""Why a cell without a test has none."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One family against one oracle; tests: how many say so.  device: CPU, or the GPU's name.  commit: where noted."""

    family: str
    column: str
    tests: int
    device: str
    commit: str | None = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the oracle tests, each with its cell, which travels in its reports to where they are counted."""
    items[:] = [item for item in items if item.get_closest_marker("oracle") is not None]
    for item in items:
        item.user_properties.append(("cell", _cell(item)))


class Outcomes:
    """A pytest plugin: the cell of every test, and what became of it."""

    def __init__(self) -> None:
        self.cells: dict[str, tuple[str, str]] = {}
        self.passed: dict[str, bool] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self._note(item.nodeid, item.user_properties)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report.nodeid, report.user_properties)
        self.passed[report.nodeid] = self.passed.get(report.nodeid, True) and report.passed

    def _note(self, node: str, properties: Iterable[tuple[str, object]]) -> None:
        for name, value in properties:
            if name == "cell":
                assert isinstance(value, tuple | list)  # a list, where it comes from another process
                self.cells[node] = (str(value[0]), str(value[1]))

    def whole(self) -> dict[tuple[str, str], int]:
        """Cell -> tests, for the cells all of whose tests passed."""
        count: dict[tuple[str, str], int] = {}
        for cell in self.cells.values():
            count[cell] = count.get(cell, 0) + 1
        failed = {cell for node, cell in self.cells.items() if not self.passed.get(node, False)}
        return {cell: tests for cell, tests in count.items() if cell not in failed}


def _cell(item: pytest.Item) -> tuple[str, str]:
    marker = item.get_closest_marker("oracle")
    assert marker is not None
    column, *named = (str(argument) for argument in marker.args)
    if not named:
        assert isinstance(item, pytest.Function)
        named = [re.split(r"[, ]", str(item.callspec.params["name"]))[0]]
    assert column in COLUMNS, f"{item.nodeid}: {column} is no column"
    assert named[0] in FAMILIES, f"{item.nodeid}: {named[0]} is no family"
    return named[0], column


def recorded() -> list[Cell]:
    """The cells on record."""
    return [Cell(**json.loads(line)) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []


def record(found: Mapping[tuple[str, str], int], device: str) -> None:
    """Put the cells on record; those of a GPU and of the CPU stand beside each other."""
    kept = {(cell.family, cell.column, cell.device == CPU): cell for cell in recorded()}
    for (family, column), tests in found.items():
        kept[family, column, device == CPU] = Cell(family, column, tests, device, commit())
    order = [(family, column, on_cpu) for family in FAMILIES for column in COLUMNS for on_cpu in (True, False)]
    lines = (json.dumps(asdict(kept[place])) + "\n" for place in order if place in kept)
    RECORD.write_text("".join(lines))


def table(cells: Iterable[Cell]) -> str:
    """README's table: a number stands for the reason of a gap, listed below with the GPUs."""
    known: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        known.setdefault((cell.family, cell.column), []).append(cell)
    reasons: list[str] = []
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for family, title in FAMILIES.items():
        row = []
        for column in COLUMNS:
            found = known.get((family, column))
            if found is not None:
                row.append(_where(column, found))
                continue
            reason = GAPS.get(f"{family}/{column}", "not tested")
            if reason not in reasons:
                reasons.append(reason)
            row.append(f"– ({reasons.index(reason) + 1})")
        lines.append(f"| {title} | " + " | ".join(row) + " |")
    notes = [f"({number}) {reason}" for number, reason in enumerate(reasons, 1)]
    gpus = {(cell.device, cell.commit) for found in known.values() for cell in found if cell.device != CPU}
    notes += [f"GPU: compiled, on one {device} at {made}" for device, made in sorted(gpus, key=str)]
    return "\n".join([*lines, "", "; ".join(notes) + "." if notes else ""]).rstrip() + "\n"


def _where(column: str, cells: Iterable[Cell]) -> str:
    """What the table says of the places where a cell was checked."""
    devices = {cell.device for cell in cells}
    on_gpu = bool(devices - {CPU})
    if column == "gpu":
        return "GPU" if on_gpu else "interpreted"
    return ", ".join(name for name, there in (("CPU", CPU in devices), ("GPU", on_gpu)) if there)


def rewrite(text: str, cells: Iterable[Cell]) -> str:
    """README's text with the table in its place."""
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{table(cells)}{END}{after}"


def run(folders: Iterable[str], *options: str) -> Outcomes:
    """Collect, and without --collect-only run, the oracle tests of folders."""
    outcomes = Outcomes()
    always = (f"--rootdir={ROOT}", "-p", "no:cacheprovider", "-p", "bench.architectures")
    code = pytest.main([*folders, *always, *options], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {code}")
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description="README's table of architectures")
    parser.add_argument("--gpu", action="store_true", help="run the tests of the compiled kernels on the GPU")
    parser.add_argument("--list", action="store_true", help="print the cells that tests exist for")
    parser.add_argument("--table", action="store_true", help="rewrite the table from the record")
    parser.add_argument("pytest", nargs="*", help="what follows -- is for pytest")
    options = parser.parse_args()
    if not options.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that kernels are interpreted, whatever there is
    if options.list:
        with contextlib.redirect_stdout(io.StringIO()):
            found = run(FOLDERS, "--collect-only")
        for family, column in sorted(set(found.cells.values())):
            print(f"{family}/{column}")
        return
    if not options.table:
        import torch  # after it is settled what it may see

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else CPU
        if options.gpu and device == CPU:
            parser.error("--gpu: there is no GPU here")
        outcomes = run(GPU_FOLDERS if options.gpu else FOLDERS, *options.pytest)
        record(outcomes.whole(), device)
        failed = [node for node, passed in outcomes.passed.items() if not passed]
        print("\n".join(f"failed: {node}" for node in failed), file=sys.stderr)
    README.write_text(rewrite(README.read_text(), recorded()))


if __name__ == "__main__":
    main()
