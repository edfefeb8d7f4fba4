"""POST …/render: the page and the JSON of what the model would read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes_api import CONTEXT, LETTERS, Stand, standing

CHAT, TEXT = "/v1/chat/completions/render", "/v1/completions/render"
JSON = "application/json"


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing() as running:
        yield running


def test_a_conversation_is_shown_in_the_documented_markup(stand: Stand) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "你好!"}]
    reply = stand.post(CHAT, {"messages": messages})
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.text.startswith(
        '<div class="chat-message">\n<div class="message-system">system</div>\n'
        '<div class="message-content">be kind</div>\n</div>\n'
        '<div class="chat-message">\n<div class="message-user">user</div>\n'
        '<div class="message-content">你好!</div>\n</div>\n<div class="prompt-tokens">'
    )


def test_every_token_is_shown_with_its_id(stand: Stand) -> None:
    body = {"messages": [{"role": "user", "content": "a <b>"}]}
    ids = stand.post("/tokenize", body).json()["tokens"]
    page = stand.post(CHAT, body).text
    shown = re.findall(r'<span class="token( special)?"><code>(.*?)</code> <sub>(\d+)</sub></span>', page)
    assert [int(id) for _, _, id in shown] == ids
    assert f"{len(ids)} tokens" in page
    text = "".join(unescape(text) for _, text, _ in shown)
    assert text.replace("␣", " ").replace("⏎", "\n") == LETTERS.decode(ids)
    assert {id for special, _, id in shown if special} == {"257", "258"}


def test_json_is_given_to_who_would_rather_have_it(stand: Stand) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    ids = stand.post("/tokenize", body).json()["tokens"]
    made = stand.post(CHAT, body, accept=JSON).json()
    assert made == {
        "prompt": LETTERS.decode(ids),
        "token_ids": ids,
        "token_strs": [LETTERS.token_str(id) for id in ids],
        "count": len(ids),
        "max_model_len": CONTEXT,
    }
    one = stand.post(TEXT, {"prompt": "hi"}, accept=JSON).json()
    assert (one["prompt"], one["token_ids"]) == ("hi", LETTERS.encode("hi", add_special=False))
    many = stand.post(TEXT, {"prompt": ["hi", "you"]}, accept=JSON).json()
    assert [entry["prompt"] for entry in many] == ["hi", "you"]
    cut = stand.post(TEXT, {"prompt": "hello", "truncate_prompt_tokens": 2}, accept=JSON).json()
    assert cut["prompt"] == "lo"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (CHAT, {}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "model": "none"}, 404, "model"),
        (TEXT, {"prompt": []}, 400, "prompt"),
        (TEXT, {"prompt": [10_000]}, 400, "prompt[0]"),
    ],
)
def test_what_could_not_be_asked_is_not_rendered(
    path: str, body: dict[str, Any], status: int, param: str, stand: Stand
) -> None:
    reply = stand.post(path, body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)


class _Tags(HTMLParser):
    """The start tags of a page, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(attrs)))


_CLASS = re.compile(r"chat-message|message-[a-z_-]+|prompt-tokens|token-count|token( special)?")
_EVIL = st.sampled_from(["<script>alert(1)</script>", '"><img src=x onerror=y>', "</div>", "&lt;", "'", "\x00", "]]>"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(role=st.just("user") | _EVIL | st.text(min_size=1, max_size=8), content=_EVIL | st.text(max_size=30))
def test_nothing_of_the_client_becomes_markup(role: str, content: str, stand: Stand) -> None:
    reply = stand.post(CHAT, {"messages": [{"role": role, "content": content}]})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert reply.headers["x-content-type-options"] == "nosniff"
    tags = _Tags()
    tags.feed(reply.text)
    for tag, attributes in tags.found:
        assert tag in ("div", "span", "code", "sub")
        assert [name for name, _ in attributes] == (["class"] if tag in ("div", "span") else [])
        assert all(_CLASS.fullmatch(value or "") for _, value in attributes)
