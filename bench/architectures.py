"""Which architectures were checked against what: runs the oracle tests, keeps their outcomes, writes README's table.

    python -m bench.architectures            run them here, record, rewrite the table
    python -m bench.architectures --list     the cells that tests exist for, without running them
    python -m bench.architectures --table    rewrite the table from what is recorded

A test says what it checks by @pytest.mark.oracle(column, family): column one of COLUMNS, family a name of tests/model/
families.py; without the family it is the first word of the test's parameter `name`.  A cell is recorded when all of its
tests passed, with the device they ran on: kernels without a GPU are interpreted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
RECORD: Final = ROOT / "bench" / "results" / "architectures.jsonl"
README: Final = ROOT / "README.md"
FOLDERS: Final = ("tests/model", "tests/kernels")
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
_QUANTISED: Final = "no test of its own: the linear layers are those of the families that have one, or are refused"
GAPS: Final[dict[str, str]] = {
    "opt/gguf": "llama.cpp has no GGUF form of it",
    "mistral/gguf": "such files are named llama and are read as that",
    **dict.fromkeys(("qwen3-moe/gguf", "mixtral/gguf"), _REFUSED),
    **{f"{family}/{column}": _QUANTISED for family in FAMILIES for column in ("awq", "gptq", "fp8")},
}
"""Why a cell without a test has none."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One family against one oracle; tests: how many say so.  device: "cpu", or the GPU's name."""

    family: str
    column: str
    tests: int
    device: str


class Outcomes:
    """A pytest plugin: the cell of every test, and what became of it."""

    def __init__(self) -> None:
        self.cells: dict[str, tuple[str, str]] = {}
        self.passed: dict[str, bool] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.get_closest_marker("oracle") is not None]
        for item in items:
            self.cells[item.nodeid] = _cell(item)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed[report.nodeid] = self.passed.get(report.nodeid, True) and report.passed

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


def recorded(path: Path = RECORD) -> list[Cell]:
    """The cells on record."""
    return [Cell(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def record(found: Mapping[tuple[str, str], int], device: str) -> None:
    """Put the cells on record.  One that was checked on a GPU stays so when it is checked without."""
    kept = {(cell.family, cell.column): cell for cell in recorded()}
    for (family, column), tests in found.items():
        before = kept.get((family, column))
        if device == "cpu" and before is not None and before.device != "cpu":
            continue
        kept[family, column] = Cell(family, column, tests, device)
    order = [(family, column) for family in FAMILIES for column in COLUMNS if (family, column) in kept]
    RECORD.write_text("".join(json.dumps(asdict(kept[place])) + "\n" for place in order))


def table(cells: Iterable[Cell]) -> str:
    """README's table: a number stands for the reason of a gap, listed below."""
    known = {(cell.family, cell.column): cell for cell in cells}
    reasons: list[str] = []
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for family, title in FAMILIES.items():
        row = []
        for column in COLUMNS:
            cell = known.get((family, column))
            if cell is not None:
                gpu = "interpreted" if cell.device == "cpu" else cell.device
                row.append(gpu if column == "gpu" else "yes")
                continue
            reason = GAPS.get(f"{family}/{column}", "not tested")
            if reason not in reasons:
                reasons.append(reason)
            row.append(f"– ({reasons.index(reason) + 1})")
        lines.append(f"| {title} | " + " | ".join(row) + " |")
    notes = "; ".join(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))
    return "\n".join([*lines, "", notes + "." if notes else ""]).rstrip() + "\n"


def rewrite(text: str, cells: Iterable[Cell]) -> str:
    """README's text with the table in its place."""
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{table(cells)}{END}{after}"


def run(*options: str) -> Outcomes:
    """Collect, and without --collect-only run, the oracle tests."""
    outcomes = Outcomes()
    code = pytest.main([*FOLDERS, f"--rootdir={ROOT}", "-p", "no:cacheprovider", *options], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {code}")
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description="README's table of architectures")
    parser.add_argument("--list", action="store_true", help="print the cells that tests exist for")
    parser.add_argument("--table", action="store_true", help="rewrite the table from the record")
    options = parser.parse_args()
    if options.list:
        with contextlib.redirect_stdout(io.StringIO()):
            found = run("--collect-only")
        for family, column in sorted(set(found.cells.values())):
            print(f"{family}/{column}")
        return
    if not options.table:
        outcomes = run()
        import torch  # after pytest has chosen whether Triton is interpreted

        record(outcomes.whole(), torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
        failed = [node for node, passed in outcomes.passed.items() if not passed]
        print("\n".join(f"failed: {node}" for node in failed), file=sys.stderr)
    README.write_text(rewrite(README.read_text(), recorded()))


if __name__ == "__main__":
    main()
