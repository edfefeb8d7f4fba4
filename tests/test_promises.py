"""Every promise has a test that names it, read from the markers of all tests."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.promises import AWAITED, PROMISES

TESTS = Path(__file__).resolve().parent


def marks(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(test, promise) for every @pytest.mark.promise on a test function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.promise":
                    for name in mark.args:
                        assert isinstance(name, ast.Constant), f"{node.name}: a promise is named by a literal"
                        yield node.name, str(name.value)


@functools.cache
def named() -> dict[str, list[str]]:
    """Which tests name a promise."""
    found: dict[str, list[str]] = {}
    for file in sorted(TESTS.rglob("test_*.py")):
        for test, promise in marks(ast.parse(file.read_text())):
            found.setdefault(promise, []).append(f"{file.relative_to(TESTS)}::{test}")
    return found


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_has_a_test_that_names_it(promise: str) -> None:
    module = AWAITED.get(promise)
    if module is None or (TESTS.parent / module).exists():
        assert named().get(promise), f'no test is marked @pytest.mark.promise("{promise}")'


def test_every_name_in_a_mark_is_a_promise() -> None:
    assert {promise: tests for promise, tests in named().items() if promise not in PROMISES} == {}


def test_marks_are_found_where_they_stand() -> None:
    source = '@pytest.mark.promise("R1", "R2")\n@pytest.mark.slow\ndef test_a(): ...\n@mark("R3")\ndef test_b(): ...'
    assert list(marks(ast.parse(source))) == [("test_a", "R1"), ("test_a", "R2")]
