"""Requests that could never be served are told so with the numbers, not sent away to come back for ever."""

from __future__ import annotations

import pytest

from tests.chaos.stack import TOKENIZER
from tests.fakes_api import CONTEXT, LETTERS, standing
from vserve.api.generation import check_length
from vserve.errors import BadRequest

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
LONGEST = max(len(LETTERS.token_bytes(id)) for id in range(LETTERS.vocab_size))


@pytest.mark.parametrize(
    ("body", "numbers"),
    [
        ({"prompt": "x", "n": 9}, ("9 choices", "8 requests")),
        ({"prompt": ["x"] * 5, "n": 2}, ("10 choices", "8 requests")),
        ({"prompt": "x" * 20, "n": 6}, ("6 choices", "120 prompt tokens", "100 that")),
        ({"prompt": ["x" * 60, "y" * 60]}, ("2 choices", "120 prompt tokens", "100 that")),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_choices_that_an_empty_queue_could_not_take_are_a_400(
    body: dict[str, object], numbers: tuple[str, ...], stream: bool
) -> None:
    with standing(max_queue=8, max_queued_tokens=100) as stand:
        reply = stand.post(COMPLETE, {**body, "max_tokens": 2, "stream": stream})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "n"
        assert all(number in reply.json()["error"]["message"] for number in numbers)
        assert stand.engine.requests == []


@pytest.mark.parametrize("body", [{"prompt": "x" * 200}, {"prompt": "x" * 16, "n": 6}, {"prompt": "x", "n": 8}])
def test_what_an_empty_queue_can_take_is_served(body: dict[str, object]) -> None:
    with standing(max_queue=8, max_queued_tokens=100) as stand:
        assert stand.post(COMPLETE, {**body, "max_tokens": 2}).status_code == 200


def test_a_text_that_must_be_too_long_is_refused_with_the_numbers_before_it_is_tokenised() -> None:
    text = "x" * (LONGEST * CONTEXT + 1)
    with standing() as stand:
        for path, body, field in (
            (COMPLETE, {"prompt": text}, "prompt"),
            (COMPLETE, {"prompt": ["x", text]}, "prompt[1]"),
            (CHAT, {"messages": [{"role": "user", "content": text}]}, "messages"),
        ):
            reply = stand.post(path, body)
            assert reply.status_code == 400
            error = reply.json()["error"]
            assert error["param"] == field
            assert f"at least {CONTEXT + 1} tokens; the context has {CONTEXT}" in error["message"] or path == CHAT
            assert "at least" in error["message"]
        # One that may fit is counted; with truncate_prompt_tokens every length may.
        counted = stand.post(COMPLETE, {"prompt": text[:-1]}).json()["error"]["message"]
        assert "at least" not in counted
        assert str(len(text) - 1) in counted
        cut = stand.post(COMPLETE, {"prompt": text, "truncate_prompt_tokens": 5, "max_tokens": 2})
        assert cut.json()["usage"]["prompt_tokens"] == 5


def test_of_a_vocabulary_that_drops_text_no_length_is_too_long() -> None:
    check_length(TOKENIZER, "?" * 10_000, 1, "prompt")  # these characters are no tokens
    assert TOKENIZER.encode("?" * 10_000) == []
    with pytest.raises(BadRequest):
        check_length(LETTERS, "?" * 10_000, 1, "prompt")
