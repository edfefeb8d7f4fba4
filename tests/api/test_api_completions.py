"""POST /v1/completions, /tokenize and /detokenize over a real socket."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes_api import CONTEXT, EOS, LETTERS, NAME, Stand, standing

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing() as running:
        yield running


def ask(stand: Stand, **fields: Any) -> Any:
    reply = stand.post(PATH, fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def texts(events: list[Any], choices: int) -> list[str]:
    said = [""] * choices
    for event in events[:-1]:
        for choice in event["choices"]:
            said[choice["index"]] += choice["text"]
    return said


def test_a_whole_reply_has_openais_shape(stand: Stand) -> None:
    body = ask(stand, prompt="Once", user="me")
    assert re.fullmatch(r"cmpl-[0-9a-f]+-\d+", body.pop("id"))
    body.pop("created")
    body.pop("system_fingerprint")
    assert body == {
        "object": "text_completion",
        "model": NAME,
        "choices": [
            {
                "index": 0,
                "text": "Hello, world!",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "prompt_logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 14,
            "total_tokens": 18,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_stream_is_text_then_a_finish_then_usage_then_done(stand: Stand) -> None:
    *chunks, usage, done = events = stand.events(PATH, {"prompt": "x", "stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 15
    assert texts(events, 1) == ["Hello, world!"]
    for chunk in chunks:
        assert chunk["object"] == "text_completion"
        assert chunk["usage"] is None
        assert chunk["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


@pytest.mark.parametrize(
    ("prompt", "echoed"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        (LETTERS.encode("ab"), ["ab"]),
        ([LETTERS.encode("ab"), LETTERS.encode("c")], ["ab", "c"]),
    ],
)
def test_every_form_of_prompt_is_answered_and_echoed(stand: Stand, prompt: Any, echoed: list[str]) -> None:
    body = ask(stand, prompt=prompt, n=2, max_tokens=3, echo=True)
    expected = [f"{text}Hel" for text in echoed for _ in range(2)]
    assert [choice["text"] for choice in body["choices"]] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, echoed))
    assert body["usage"]["completion_tokens"] == 3 * len(expected)
    assert texts(stand.events(PATH, {"prompt": prompt, "n": 2, "max_tokens": 3, "echo": True}), len(expected)) == (
        expected
    )


def test_echo_with_no_tokens_is_the_prompt_alone_and_asks_the_engine_for_nothing(stand: Stand) -> None:
    before = len(stand.engine.requests)
    body = ask(stand, prompt=["ab", "x" * CONTEXT], max_tokens=0, echo=True)
    assert [choice["text"] for choice in body["choices"]] == ["ab", "x" * CONTEXT]
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
    assert body["usage"]["completion_tokens"] == 0
    assert texts(stand.events(PATH, {"prompt": "ab", "max_tokens": 0, "echo": True}), 1) == ["ab"]
    assert len(stand.engine.requests) == before


def test_sixteen_tokens_is_the_default_and_less_where_less_is_left(stand: Stand) -> None:
    ask(stand, prompt="x")
    assert stand.engine.requests[-1].max_tokens == 16
    ask(stand, prompt="x" * (CONTEXT - 3))
    assert stand.engine.requests[-1].max_tokens == 3


def test_logprobs_have_the_older_shape_whole_and_streamed(stand: Stand) -> None:
    expected = {
        "text_offset": [0, 1, 2],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "tokens": ["H", "e", "l"],
        "top_logprobs": [{"H": -0.5, "I": -1.5}, {"e": -0.5, "f": -1.5}, {"l": -0.5, "m": -1.5}],
    }
    assert ask(stand, prompt="x", logprobs=2, max_tokens=3)["choices"][0]["logprobs"] == expected
    events = stand.events(PATH, {"prompt": "x", "logprobs": 2, "max_tokens": 3})
    streamed: dict[str, list[Any]] = {key: [] for key in expected}
    for event in events[:-1]:
        for key, values in (event["choices"][0]["logprobs"] or {}).items():
            streamed[key] += values
    assert streamed == expected
    only_drawn = ask(stand, prompt="x", logprobs=0, max_tokens=1)["choices"][0]["logprobs"]
    assert only_drawn["top_logprobs"] == [{"H": -0.5}]


def test_token_ids_are_returned_per_choice(stand: Stand) -> None:
    choice = ask(stand, prompt="ab", return_token_ids=True, max_tokens=2)["choices"][0]
    assert choice["prompt_token_ids"] == LETTERS.encode("ab")
    assert choice["token_ids"] == LETTERS.encode("He")
    events = stand.events(PATH, {"prompt": "ab", "return_token_ids": True, "max_tokens": 2})
    assert events[0]["choices"][0]["prompt_token_ids"] == LETTERS.encode("ab")
    assert [token for event in events[1:-1] for token in event["choices"][0]["token_ids"]] == LETTERS.encode("He")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "x" * 512}, ["512 tokens", "no room"]),
        ({"prompt": ["x", "y" * 600]}, ["prompt[1]", "600", "512"]),
        ({"prompt": ""}, ["prompt", "empty"]),
        ({"prompt": ["x", ""]}, ["prompt[1]", "empty"]),
        ({"prompt": "x", "max_tokens": 512}, ["512", "511"]),
        ({"prompt": ["x"] * 1024, "n": 2}, ["1024 prompts", "n=2", "2048"]),
        ({"prompt": [259]}, ["258", "259"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(stand: Stand, fields: dict[str, Any], said: list[str]) -> None:
    reply = stand.post(PATH, fields)
    assert reply.status_code == 400
    for word in said:
        assert word in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_tokenize_answers_every_form(stand: Stand, path: str) -> None:
    ids = LETTERS.encode("hé", add_special=False)
    one = {"tokens": ids, "count": 3, "max_model_len": CONTEXT, "token_strs": None}
    for body in ({"text": "hé"}, {"prompt": "hé", "model": ""}, {"prompt": "hé", "add_special_tokens": False}):
        assert stand.post(path, body).json() == one
    assert stand.post(path, {"text": ["hé", ""]}).json() == [one, {**one, "tokens": [], "count": 0}]
    chat = stand.post(
        path,
        {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False, "return_token_strs": True},
    ).json()
    assert LETTERS.decode(chat["tokens"]) == f"<|im_start|>user\na{EOS}\n"
    assert chat["token_strs"][0] == "<|im_start|>"
    assert chat["count"] == len(chat["tokens"]) == len(chat["token_strs"])
    assert stand.post(path, {"text": "x", "model": "nobody"}).status_code == 404


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
def test_detokenize_answers_every_form_and_names_an_unknown_id(stand: Stand, path: str) -> None:
    ids = LETTERS.encode(f"hé{EOS}", add_special=False)
    for body in ({"tokens": ids}, {"token_ids": ids, "model": NAME}):
        assert stand.post(path, body).json() == {"text": f"hé{EOS}", "prompt": f"hé{EOS}"}
    assert stand.post(path, {"tokens": ids, "skip_special_tokens": True}).json()["text"] == "hé"
    assert stand.post(path, {"tokens": []}).json()["text"] == ""
    reply = stand.post(path, {"tokens": [1, 259]})
    assert reply.status_code == 400
    assert "tokens[1]" in reply.json()["error"]["message"]
    assert "259" in reply.json()["error"]["message"]


def test_long_texts_are_tokenised_and_decoded_all_the_same() -> None:
    with standing(long_text_chars=4) as stand:
        ids = LETTERS.encode("hello there", add_special=False)
        assert stand.post("/tokenize", {"text": "hello there", "nonsense": 1}).json()["tokens"] == ids
        reply = stand.post("/detokenize", {"tokens": ids, "nonsense": 1})
        assert reply.json()["text"] == "hello there"
        assert reply.headers["x-ignored-params"] == "nonsense"
        assert ask(stand, prompt=["hello", "there"], max_tokens=1)["usage"]["prompt_tokens"] == 10


def test_without_a_grammar_library_a_constraint_is_a_400_and_text_is_not(stand: Stand) -> None:
    reply = stand.post(PATH, {"prompt": "x", "structured_outputs": {"regex": "a"}})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "structured_outputs.regex"
    assert "structured output" in reply.json()["error"]["message"]
    assert stand.post(PATH, {"prompt": "x", "response_format": {"type": "text"}}).status_code == 200


def test_what_keeps_tokens_out_reaches_the_engine(stand: Stand) -> None:
    ask(stand, prompt="x", allowed_token_ids=[7, 5, 7], bad_words=["ab", " c"])
    params = stand.engine.requests[-1].sampling
    assert params.allowed_ids == (5, 7)
    spelled = ["ab", " ab", "c", " c"]
    assert params.bad_words == tuple(tuple(LETTERS.encode(word, add_special=False)) for word in spelled)


def test_a_scored_prompt_is_cut_and_echoed_as_it_was_read(stand: Stand) -> None:
    body = ask(stand, prompt="abcdef", echo=True, logprobs=0, max_tokens=0, truncate_prompt_tokens=3)
    (choice,) = body["choices"]
    assert choice["text"] == "def"
    assert choice["logprobs"]["tokens"] == ["d", "e", "f"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0


def test_minus_infinity_prints_as_a_number(stand: Stand) -> None:
    choice = ask(stand, prompt="abc", max_tokens=1, logprobs=4, prompt_logprobs=4)["choices"][0]
    assert -9999.0 in choice["logprobs"]["top_logprobs"][0].values()
    assert -9999.0 in [one["logprob"] for one in choice["prompt_logprobs"][1].values()]
