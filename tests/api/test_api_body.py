"""Bodies: media type, syntax, nesting."""

from __future__ import annotations

import pytest

from vserve.api.body import DEPTH_LIMIT, read
from vserve.errors import BadRequest, UnsupportedMediaType


@pytest.mark.parametrize(
    "kind", [None, "", "application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"]
)
def test_json_of_every_name_and_none_is_read(kind: str | None) -> None:
    assert read(b'{"a": 1}', kind) == {"a": 1}


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"])
def test_another_media_type_is_415(kind: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="application/json"):
        read(b"{}", kind)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no body"),
        (b"{", "not valid JSON"),
        (b"[1]", "a list"),
        (b'"x"', "a string"),
        (b"null", "null"),
        (b"true", "a boolean"),
        (b"1", "an integer"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": Infinity}', "not valid JSON"),
        (b'{"a": 1e999}', "not valid JSON"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": 1} x', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
    ],
)
@pytest.mark.promise("input: huge anything")
def test_what_is_not_one_json_object_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(data, None)
    assert said in caught.value.message
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(("left", "right"), [(b"[", b"]"), (b'{"a":', b"}")])
@pytest.mark.parametrize(
    ("depth", "good"), [(DEPTH_LIMIT - 1, True), (DEPTH_LIMIT, False), (1000, False), (100_000, False)]
)
@pytest.mark.promise("input: huge anything")
def test_nesting_is_bounded(left: bytes, right: bytes, depth: int, good: bool) -> None:
    data = b'{"a":' + left * depth + b"1" + right * depth + b"}"
    if good:
        read(data, None)
    else:
        with pytest.raises(BadRequest, match=f"deeper than {DEPTH_LIMIT}"):
            read(data, None)


def test_many_brackets_that_are_not_deep_are_fine() -> None:
    assert read(b'{"a": [' + b",".join([b'[{"b": [1]}]'] * 500) + b'], "c": "[[[[{{{{"}', None)["c"] == "[[[[{{{{"
