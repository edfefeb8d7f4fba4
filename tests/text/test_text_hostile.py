"""Hostile tokenizer files: whatever is in them, a folder is read or refused with one line, and what is read works."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.text.test_text_tokenizer import make_core
from vserve.errors import StartupError
from vserve.text.tokenizer import Tokenizer

SOUND = make_core().to_str().encode()
ODD: tuple[object, ...] = (None, True, -1, 2**63, 1e308, "", "\0", "a" * 5000, [], [[]], {}, {"type": "BPE"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


def check(folder: Path, data: bytes) -> None:
    """Read data as tokenizer.json: one line, or a tokenizer that encodes and decodes or refuses the text."""
    (folder / "tokenizer.json").write_bytes(data)
    refusal = ""
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except StartupError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        assert len(refusal) < 2000
        return
    # A file that reads well may still make the library fail on a text: that is a bug's exception, no panic.
    with contextlib.suppress(Exception):
        tokenizer.decode(tokenizer.encode("hello, world 你 </s>"))


@pytest.mark.promise("R13", "fault: hostile model files")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_read_or_refused_with_one_line(folder: Path, places: list[tuple[int, int]]) -> None:
    data = bytearray(SOUND)
    for place, byte in places:
        data[place] = byte
    check(folder, bytes(data))


@pytest.mark.promise("R13", "fault: hostile model files")
@pytest.mark.parametrize("share", range(0, 100, 7))
def test_a_file_cut_anywhere_is_refused_with_one_line(folder: Path, share: int) -> None:
    (folder / "tokenizer.json").write_bytes(SOUND[: len(SOUND) * share // 100])
    with pytest.raises(StartupError):
        Tokenizer.from_folder(folder)


def places(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of the document but those of the vocabulary."""
    if isinstance(value, dict) and path[-1:] != ("vocab",):
        for key, inner in value.items():
            yield (*path, key)
            yield from places(inner, (*path, key))


PLACES = sorted(set(places(json.loads(SOUND))))


@pytest.mark.promise("R13", "fault: hostile model files")
@pytest.mark.parametrize("path", PLACES, ids=".".join)
def test_any_field_of_any_type_is_read_or_refused_with_one_line(folder: Path, path: tuple[str, ...]) -> None:
    for odd in ODD:
        document = json.loads(SOUND)
        inner = document
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = odd
        check(folder, json.dumps(document).encode())
