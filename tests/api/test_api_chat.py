"""POST /v1/chat/completions over a real socket: whole replies and the golden shapes of streams."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes_api import CONTEXT, EOS, LETTERS, NAME, Stand, says, standing

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
PROMPT_IDS = LETTERS.encode(PROMPT, add_special=False)
USAGE = {
    "prompt_tokens": 21,
    "completion_tokens": 14,
    "total_tokens": 35,
    "prompt_tokens_details": {"cached_tokens": 16},
}


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing() as running:
        yield running


def ask(stand: Stand, **fields: Any) -> Any:
    reply = stand.post(PATH, {"messages": HI, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def text_of(events: list[Any], index: int = 0) -> str:
    choices = [choice for event in events[:-1] for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def test_a_whole_reply_has_openais_shape(stand: Stand) -> None:
    reply = stand.post(PATH, {"messages": HI}, x_request_id="my-own")
    assert reply.headers["x-request-id"] == "my-own"
    assert reply.headers["content-type"] == "application/json"
    spans = r"queue;dur=\d+\.\d, prefill;dur=\d+\.\d, decode;dur=\d+\.\d, total;dur=\d+\.\d\d"
    assert re.fullmatch(spans, reply.headers["server-timing"])
    assert "x-ignored-params" not in reply.headers
    body = reply.json()
    assert body.pop("created") > 1_600_000_000
    assert re.fullmatch(r"fp_[0-9a-f]{10}", body.pop("system_fingerprint"))
    assert body == {
        "id": "chatcmpl-my-own",
        "object": "chat.completion",
        "model": NAME,
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello, world!",
                    "refusal": None,
                    "reasoning": None,
                    "reasoning_content": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": USAGE,
    }
    assert re.fullmatch(r"chatcmpl-[0-9a-f]+-\d+", ask(stand)["id"])
    assert ask(stand, request_id="theirs")["id"] == "chatcmpl-theirs"


def test_a_stream_is_a_role_then_text_then_a_finish_then_usage_then_done(stand: Stand) -> None:
    reply = stand.post(PATH, {"messages": HI, "stream": True, "stream_options": {"include_usage": True}, "zz": 1})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["x-ignored-params"] == "zz"
    events = stand.events(PATH, {"messages": HI, "stream_options": {"include_usage": True}})
    *chunks, usage, done = events
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == USAGE
    common = {key: usage[key] for key in ("id", "object", "created", "model", "system_fingerprint")}
    assert common["object"] == "chat.completion.chunk"
    first, *_, last = chunks
    assert first == {
        **common,
        "choices": [
            {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        ],
        "usage": None,
    }
    for chunk in chunks:
        assert {key: chunk[key] for key in common} == common
        assert chunk["usage"] is None
    for chunk in chunks[1:-1]:
        assert chunk["choices"][0].keys() == {"index", "delta", "logprobs", "finish_reason"}
        assert chunk["choices"][0]["delta"].keys() == {"content"}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["stop_reason"] is None
    assert text_of(events) == "Hello, world!"


def test_without_include_usage_no_chunk_speaks_of_usage(stand: Stand) -> None:
    assert not any("usage" in event for event in stand.events(PATH, {"messages": HI})[:-1])


def test_continuous_usage_grows_with_every_chunk(stand: Stand) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, usage, _ = stand.events(PATH, {"messages": HI, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 14) or counts[-1] == 14
    assert usage["usage"] == USAGE


def test_n_choices_each_have_their_role_text_and_finish(stand: Stand) -> None:
    body = ask(stand, n=3, max_tokens=5)
    assert [choice["message"]["content"] for choice in body["choices"]] == ["Hello"] * 3
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length"] * 3
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (21, 15)
    events = stand.events(PATH, {"messages": HI, "n": 3, "max_tokens": 5})
    for index in range(3):
        assert text_of(events, index) == "Hello"
    roles = [event["choices"][0]["index"] for event in events[:-1] if event["choices"][0]["delta"].get("role")]
    assert roles == [0, 1, 2]
    finishes = [event["choices"][0]["finish_reason"] for event in events[:-1]]
    assert finishes.count("length") == 3


def test_seeds_differ_between_choices_and_the_engine_gets_what_was_asked(stand: Stand) -> None:
    ask(stand, n=2, seed=2**63 - 1, temperature=0.5, logit_bias={"3": -1}, stop_token_ids=[7], min_tokens=2,
        max_tokens=9, priority=4, cache_salt="s", top_k=-1)  # fmt: skip
    one, two = stand.engine.requests[-2:]
    assert (one.sampling.seed, two.sampling.seed) == (2**63 - 1, 0)
    assert (one.sampling.temperature, one.sampling.logit_bias, one.sampling.top_k) == (0.5, ((3, -1.0),), 0)
    assert one.stop_ids == {7, 257}
    assert (one.min_tokens, one.max_tokens, one.priority, one.cache_salt) == (2, 9, 4, b"s")
    assert list(one.prompt) == PROMPT_IDS
    ask(stand, ignore_eos=True, max_tokens=2)
    assert stand.engine.requests[-1].stop_ids == frozenset()
    assert stand.engine.requests[-1].sampling.seed is None


def test_max_tokens_is_what_is_left_of_the_context_by_default(stand: Stand) -> None:
    ask(stand)
    assert stand.engine.requests[-1].max_tokens == CONTEXT - len(PROMPT_IDS)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("include", "text"), [(False, "Hello"), (True, "Hello, w")])
def test_a_stop_string_ends_the_answer(stand: Stand, stream: bool, include: bool, text: str) -> None:
    fields = {"stop": ["zz", ", w"], "include_stop_str_in_output": include}
    if stream:
        *chunks, usage, _ = events = stand.events(
            PATH, {"messages": HI, "stream_options": {"include_usage": True}, **fields}
        )
        assert text_of(events) == text
        last, counts = chunks[-1]["choices"][0], usage["usage"]
    else:
        body = ask(stand, **fields)
        assert body["choices"][0]["message"]["content"] == text
        last, counts = body["choices"][0], body["usage"]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", ", w")
    assert counts["completion_tokens"] == 8


def test_stop_token_ids_end_the_answer_with_the_id_as_reason(stand: Stand) -> None:
    comma = LETTERS.encode(",", add_special=False)[0]
    choice = ask(stand, stop_token_ids=[comma])["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("Hello", comma)


def test_special_tokens_are_shown_when_not_skipped(stand: Stand) -> None:
    fields = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    assert ask(stand, **fields)["choices"][0]["message"]["content"] == f"Hello, world!{EOS}"


def test_logprobs_are_openais_and_minus_infinity_prints(stand: Stand) -> None:
    entries = ask(stand, logprobs=True, top_logprobs=3, max_tokens=2)["choices"][0]["logprobs"]["content"]
    assert entries[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "I", "logprob": -1.5, "bytes": [73]},
            {"token": "J", "logprob": -9999.0, "bytes": [74]},
        ],
    }
    assert [entry["token"] for entry in entries] == ["H", "e"]
    assert ask(stand, logprobs=True, max_tokens=1)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    as_ids = ask(stand, logprobs=True, max_tokens=1, return_tokens_as_token_ids=True)
    assert as_ids["choices"][0]["logprobs"]["content"][0]["token"] == f"token_id:{LETTERS.encode('H')[0]}"


def test_streamed_logprobs_cover_every_token_once(stand: Stand) -> None:
    events = stand.events(PATH, {"messages": HI, "logprobs": True, "stop": "zzz"})
    entries = [
        entry for event in events[:-1] for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert "".join(entry["token"] for entry in entries) == f"Hello, world!{EOS}"


def test_token_ids_are_returned_when_asked_for(stand: Stand) -> None:
    body = ask(stand, return_token_ids=True)
    said = LETTERS.encode(f"Hello, world!{EOS}", add_special=False)
    assert body["prompt_token_ids"] == PROMPT_IDS
    assert body["choices"][0]["token_ids"] == said
    events = stand.events(PATH, {"messages": HI, "return_token_ids": True})
    assert events[0]["prompt_token_ids"] == PROMPT_IDS
    assert [token for event in events[1:-1] for token in event["choices"][0]["token_ids"]] == said


def test_echo_begins_with_the_assistants_last_message(stand: Stand) -> None:
    messages = [*HI, {"role": "assistant", "content": "Well: "}]
    fields = {"messages": messages, "echo": True, "continue_final_message": True}
    assert ask(stand, **fields)["choices"][0]["message"]["content"] == "Well: Hello, world!"
    assert list(stand.engine.requests[-1].prompt)[-6:] == LETTERS.encode("Well: ", add_special=False)
    assert text_of(stand.events(PATH, fields)) == "Well: Hello, world!"
    assert ask(stand, echo=True)["choices"][0]["message"]["content"] == "Hello, world!"


def test_template_variables_and_documents_reach_the_template(stand: Stand) -> None:
    ask(stand, chat_template_kwargs={"mood": "calm"}, documents=[{"title": "T"}], add_generation_prompt=False)
    prompt = LETTERS.decode(stand.engine.requests[-1].prompt)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n[T](calm)"


def test_a_long_conversation_is_rendered_all_the_same() -> None:
    with standing(long_text_chars=10) as stand:
        body = ask(stand, messages=[{"role": "user", "content": "x" * 100}])
        assert body["usage"]["prompt_tokens"] == 119


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, ["619", "512", "messages"]),
        ({"max_tokens": 492}, 400, ["492", "21", "491", "512"]),
        ({"max_completion_tokens": 492}, 400, ["max_completion_tokens", "492"]),
        ({"min_tokens": 6, "max_tokens": 5}, 400, ["min_tokens", "6", "5"]),
        ({"truncate_prompt_tokens": 513}, 400, ["truncate_prompt_tokens", "513", "512"]),
        ({"model": "nobody"}, 404, ["`nobody` does not exist", NAME, "short"]),
        ({"temperature": 3}, 400, ["temperature"]),
        ({"tools": [{}]}, 400, ["tools"]),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_numbers(
    stand: Stand, fields: dict[str, Any], status: int, said: list[str]
) -> None:
    for stream in (False, True):
        reply = stand.post(PATH, {"messages": HI, "stream": stream, **fields})
        assert reply.status_code == status
        error = reply.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] == status
        for word in said:
            assert word in error["message"]


@pytest.mark.parametrize("model", [None, "", NAME, "short"])
def test_every_name_of_the_model_is_served_and_the_first_is_in_the_reply(stand: Stand, model: str | None) -> None:
    assert ask(stand, model=model)["model"] == NAME


def test_truncation_keeps_the_end_of_the_prompt(stand: Stand) -> None:
    ask(stand, truncate_prompt_tokens=4, max_tokens=1)
    assert list(stand.engine.requests[-1].prompt) == PROMPT_IDS[-4:]
    ask(stand, messages=[{"role": "user", "content": "x" * 600}], truncate_prompt_tokens=-1, max_tokens=10)
    assert len(stand.engine.requests[-1].prompt) == CONTEXT - 10


def test_the_models_own_defaults_are_used() -> None:
    config = {"temperature": 0.3, "max_new_tokens": 4, "eos_token_id": [44, 257]}
    with standing(says("abcdefgh"), generation_config=config) as stand:
        assert ask(stand)["choices"][0]["message"]["content"] == "abcd"
        request = stand.engine.requests[-1]
        assert (request.sampling.temperature, request.stop_ids) == (0.3, frozenset({44, 257}))


def test_a_model_without_a_template_says_so() -> None:
    with standing(template=False) as stand:
        reply = stand.post(PATH, {"messages": HI})
        assert reply.status_code == 400
        assert "template" in reply.json()["error"]["message"]


def test_strict_servers_refuse_unknown_fields() -> None:
    with standing(strict=True) as stand:
        reply = stand.post(PATH, {"messages": HI, "frobnicate": 1})
        assert reply.status_code == 400
        assert "frobnicate" in reply.json()["error"]["message"]
