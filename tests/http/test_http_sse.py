"""Events as bytes, read back by a reader of the HTML Standard's rules."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vserve.http import sse


def read(stream: bytes) -> list[tuple[str, str, str]]:
    """(event, id, data) of each event, as HTML 9.2.6 dispatches them."""
    found: list[tuple[str, str, str]] = []
    event, identity = "", ""
    data: list[str] = []
    for line in re.split("\r\n|\r|\n", stream.decode())[:-1]:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                found.append((event, identity, "\n".join(data)))
            event, data = "", []
        elif name == "event":
            event = value
        elif name == "id":
            identity = value
        elif name == "data":
            data.append(value)
    return found


def test_a_plain_event_is_one_data_line() -> None:
    assert sse.frame(b'{"a":1}') == b'data: {"a":1}\n\n'


def test_event_and_id_come_before_the_data() -> None:
    assert read(sse.frame(b"x", event="done", id="7")) == [("done", "7", "x")]


@pytest.mark.parametrize("data", [b"a\nb", b"a\r\nb", b"a\rb"])
def test_every_line_of_the_data_is_a_data_line(data: bytes) -> None:
    assert read(sse.frame(data)) == [("", "", "a\nb")]


@given(texts=st.lists(st.text(max_size=20), max_size=4))
def test_events_arrive_as_they_were_sent(texts: list[str]) -> None:
    stream = sse.COMMENT.join(sse.frame(text.encode(errors="replace")) for text in texts) + sse.DONE
    expected = [re.sub("\r\n|\r", "\n", text.encode(errors="replace").decode()) for text in texts]
    assert [data for _, _, data in read(stream)] == [*expected, "[DONE]"]


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b"])
def test_a_field_cannot_hold_a_line_end(value: str) -> None:
    with pytest.raises(ValueError, match="line end"):
        sse.frame(b"x", id=value)
    with pytest.raises(ValueError, match="line end"):
        sse.frame(b"x", event=value)
