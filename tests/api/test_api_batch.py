"""POST /v1/chat/completions/batch and /invocations over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes_api import LETTERS, Stand, parse_events, standing
from vserve.engine.request import GenRequest

BATCH = "/v1/chat/completions/batch"
CHAT = "/v1/chat/completions"


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def last_letter(request: GenRequest) -> list[int]:
    """Answers with the last letter of what the user said, and the end."""
    prompt = LETTERS.decode(request.prompt)
    return LETTERS.encode(prompt.split("<|im_end|>")[0][-1] + "<|im_end|>", add_special=False)


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing(last_letter) as running:
        yield running


def test_each_conversation_has_its_choice_in_order(stand: Stand) -> None:
    texts = ["one", "two!", "three?" * 30]
    body = stand.post(BATCH, {"messages": [said(text) for text in texts], "max_tokens": 5}).json()
    assert body["object"] == "chat.completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["e", "!", "?"]
    each = [stand.post(CHAT, {"messages": said(text)}).json()["usage"]["prompt_tokens"] for text in texts]
    assert body["usage"]["prompt_tokens"] == sum(each)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": said("x")}, "messages[0]"),
        ({"messages": [said("x"), []]}, "messages[1]"),
        ({"messages": [said("x"), [{"role": "user"}]]}, "messages[1][0].content"),
        ({"messages": [said("x")] * 129}, "messages"),
        ({"messages": [said("x"), said("y" * 600)]}, "messages[1]"),
        ({"n": 2}, "n"),
        ({"stream": True}, "stream"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"temperature": 3}, "temperature"),
    ],
)
def test_a_bad_batch_is_refused_as_a_whole(fields: dict[str, Any], param: str, stand: Stand) -> None:
    reply = stand.post(BATCH, {"messages": [said("x")], **fields})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


def test_values_that_ask_for_nothing_are_taken_and_others_named(stand: Stand) -> None:
    reply = stand.post(BATCH, {"messages": [said("x")], "n": 1, "stream": False, "zz": 1})
    assert reply.status_code == 200
    assert reply.headers["x-ignored-params"] == "zz"


def test_an_invocation_goes_where_its_body_says(stand: Stand) -> None:
    path = "/invocations"
    assert stand.post(path, {"messages": said("hey")}).json()["choices"][0]["message"]["content"] == "y"
    assert stand.post(path, {"prompt": "abc"}).json()["choices"][0]["text"] == "c"
    streamed = parse_events(stand.post(path, {"messages": said("hey"), "stream": True}).text)
    assert streamed[0]["object"] == "chat.completion.chunk"
    assert streamed[-1] == "[DONE]"
    refused = stand.post(path, {"temperature": 1})
    assert refused.status_code == 400
    assert "`messages`, `prompt`" in refused.json()["error"]["message"]
    assert stand.post(path, {"messages": []}).json()["error"]["param"] == "messages"


def test_both_are_guarded_like_every_route() -> None:
    with standing(api_keys=("k",)) as guarded:
        for path in (BATCH, "/invocations"):
            assert guarded.post(path, {"messages": said("x")}).status_code == 401
