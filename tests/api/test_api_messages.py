"""POST /v1/messages: Anthropic's requests, replies, events and errors over a real socket."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.fakes_api import EOS, LETTERS, NAME, Stand, answers, parse_events, says, standing
from vserve.api import messages_fields as row
from vserve.api.choice import Choice, Reading
from vserve.api.messages import MessagesDialect
from vserve.api.messages_chat import parse_messages
from vserve.api.shapes import Counts, Head, Piece
from vserve.engine.request import FinishReason, GenRequest
from vserve.errors import BadRequest
from vserve.text.parts import CallArguments, CallBegin, Content, Part, Reasoning

PATH = "/v1/messages"
VOCAB = 300
HI = [{"role": "user", "content": "hi"}]
ASK = {"messages": HI, "max_tokens": 50}


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing() as running:
        yield running


def read(**fields: Any) -> Any:
    return parse_messages(row.MESSAGES, {**ASK, **fields}, VOCAB, strict=False)


def messages_of(*turns: Any, **fields: Any) -> Any:
    return list(read(messages=list(turns), **fields).conversation.messages)


def test_a_whole_reply_has_anthropics_shape(stand: Stand) -> None:
    body = stand.post(PATH, ASK, x_request_id="mine").json()
    assert body == {
        "id": "msg_mine",
        "type": "message",
        "role": "assistant",
        "model": NAME,
        "content": [{"type": "text", "text": "Hello, world!"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 5,  # of 21: the engine says that it found 16 in its cache
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 16,
            "output_tokens": 14,
        },
    }


@pytest.mark.parametrize(
    ("fields", "text", "reason", "sequence"),
    [
        ({"max_tokens": 5}, "Hello", "max_tokens", None),
        ({"stop_sequences": ["wor", "x"]}, "Hello, ", "stop_sequence", "wor"),
        ({}, "Hello, world!", "end_turn", None),
    ],
)
def test_a_stream_says_what_the_whole_reply_says(
    fields: dict[str, Any], text: str, reason: str, sequence: str | None, stand: Stand
) -> None:
    whole = stand.post(PATH, {**ASK, **fields}).json()
    assert (whole["content"][0]["text"], whole["stop_reason"], whole["stop_sequence"]) == (text, reason, sequence)
    reply = stand.post(PATH, {**ASK, **fields, "stream": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = parse_events(reply.text)
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    start, last = events[0]["message"], events[-2]
    assert (start["content"], start["stop_reason"], start["role"]) == ([], None, "assistant")
    assert "".join(event["delta"]["text"] for event in events[3:-3]) == text
    assert last["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_the_conversation_is_rendered_as_chat_renders_it(stand: Stand) -> None:
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    anthropic = {
        "system": "be kind",
        "messages": [*HI, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": blocks}],
    }
    openai = [{"role": "system", "content": "be kind"}, *HI, {"role": "assistant", "content": "yes?"}]
    ours = stand.post("/tokenize", {"messages": [*openai, {"role": "user", "content": blocks}]}).json()
    assert stand.post(f"{PATH}/count_tokens", anthropic).json() == {"input_tokens": ours["count"]}
    usage = stand.post(PATH, {**anthropic, "max_tokens": 1}).json()["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == ours["count"]


def test_a_last_message_of_the_assistant_is_gone_on_with() -> None:
    prompts: list[str] = []

    def script(request: GenRequest) -> list[int]:
        prompts.append(LETTERS.decode(request.prompt))
        return answers(request)

    with standing(script) as stand:
        turns = [*HI, {"role": "assistant", "content": "I say: "}]
        assert stand.post(PATH, {**ASK, "messages": turns}).status_code == 200
    assert prompts[0].endswith("<|im_start|>assistant\nI say: ")


def test_blocks_become_messages_of_chat() -> None:
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}
    made = messages_of(
        {"role": "user", "content": [{"type": "text", "text": "go", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "so"}, call],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "7"}]},
                {"type": "tool_result", "tool_use_id": "t2"},
                {"type": "text", "text": "and?"},
            ],
        },
        system=[{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
    )
    assert made == [
        {"role": "system", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": "so",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "7"},
        {"role": "tool", "tool_call_id": "t2", "content": ""},
        {"role": "user", "content": "and?"},
    ]


def test_sampling_fields_reach_the_request() -> None:
    wanted = read(temperature=0.5, top_p=0.9, top_k=7, stop_sequences=["x"], metadata={"user_id": "u"}).wanted
    assert (wanted.drawing.temperature, wanted.drawing.top_p, wanted.drawing.top_k) == (0.5, 0.9, 7)
    assert (wanted.stop, wanted.max_tokens) == (("x",), 50)


def test_fields_without_effect_are_named_wherever_they_are(stand: Stand) -> None:
    text = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [text], "is_error": True}
    body = {
        **ASK,
        "messages": [{"role": "user", "content": [text, result], "name": "x"}],
        "metadata": {"other": 1},
        "service_tier": "auto",
        "speed": "fast",
        "zz": 1,
    }
    assert read(**body).wanted.ignored == (
        "speed",
        "zz",
        "messages.name",
        "messages.content.cache_control",
        "messages.content.is_error",
        "messages.content.content.cache_control",
        "metadata.other",
    )
    simple = {**ASK, "messages": [{"role": "user", "content": [text]}]}
    assert stand.post(PATH, simple).headers["x-ignored-params"] == "messages.content.cache_control"
    with pytest.raises(BadRequest, match=r"messages\.content\.cache_control"):
        parse_messages(row.MESSAGES, simple, VOCAB, strict=True)


CALL = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
BAD: list[tuple[dict[str, Any], str, str]] = [
    # fields, param, what the message holds
    ({"max_tokens": None}, "max_tokens", "required"),
    ({"max_tokens": 0}, "max_tokens", "between 1"),
    ({"messages": None}, "messages", "required"),
    ({"messages": []}, "messages", "1 to 4096"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role", "user, assistant"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "1 to"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        "messages[0].content[0].type",
        "text only",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "required"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "x", "name": "y", "input": {}}]}]},
        "messages[0].content[0].type",
        "text, tool_result",
    ),
    (
        {
            "messages": [
                *HI,
                {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
            ]
        },
        "messages[1].content",
        "tool_result",
    ),
    ({"temperature": 1.5}, "temperature", "between 0 and 1"),
    ({"top_k": -1}, "top_k", "between 0"),
    ({"stop_sequences": "x"}, "stop_sequences", "a list"),
    ({"tool_choice": {"type": "maybe"}}, "tool_choice.type", "auto, any, tool, none"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name", "required"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema", "required"),
    ({"tools": [{"type": "web_search_20250305", "name": "w", "input_schema": {}}]}, "tools[0].type", "not supported"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "required"),
    ({"thinking": {"type": "enabled", "budget_tokens": 50}}, "thinking.budget_tokens", "below `max_tokens` (50)"),
    ({"mcp_servers": [{"type": "url"}]}, "mcp_servers", "not supported"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD)
def test_a_bad_field_is_named_in_its_own_words(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(**fields)
    assert caught.value.param == param
    assert words in caught.value.message
    assert f"`{param}`" in caught.value.message


def test_errors_have_anthropics_shape(stand: Stand) -> None:
    def check(reply: Any, status: int, kind: str) -> None:
        assert reply.status_code == status
        body = reply.json()
        assert body.keys() == {"type", "error", "request_id"}
        assert (body["type"], body["error"]["type"]) == ("error", kind)
        assert body["error"]["message"]
        assert body["request_id"] == reply.headers["x-request-id"]

    check(stand.post(PATH, {}), 400, "invalid_request_error")
    check(stand.post(PATH, {**ASK, "model": "none"}), 404, "not_found_error")
    check(stand.post(f"{PATH}/count_tokens", {}), 400, "invalid_request_error")
    check(stand.get(PATH), 405, "invalid_request_error")
    check(stand.post(PATH, {**ASK, "max_tokens": 10_000}), 400, "invalid_request_error")
    assert "error" in stand.post("/v1/messages/other", {}).json()
    with standing(api_keys=("k",)) as guarded:
        check(guarded.post(PATH, ASK), 401, "authentication_error")
        check(guarded.post(PATH, ASK, x_api_key="wrong"), 401, "authentication_error")
        assert guarded.post(PATH, ASK, x_api_key="k", anthropic_version="2023-06-01").status_code == 200
    with standing(ready=False) as starting:
        check(starting.post(PATH, ASK), 503, "overloaded_error")
    with standing(max_queued_tokens=0) as full:
        check(full.post(PATH, ASK), 429, "rate_limit_error")
        assert "retry-after" in full.post(PATH, ASK).headers


def test_a_broken_stream_ends_with_an_error_event_and_no_done() -> None:
    with standing(says("x" * 300), engine={"step_s": 0.01}) as stand:
        reply = stand.post(PATH, {**ASK, "max_tokens": 400, "stream": True}, x_request_timeout="200ms")
        events = parse_events(reply.text)
        assert events[-1]["type"] == "error"
        assert events[-1]["error"]["type"] == "timeout_error"
        assert "[DONE]" not in reply.text


# ---- Parts: reasoning and calls ----------------------------------------------------------------------------------

PARTS: tuple[Part, ...] = (
    Reasoning("let me"),
    Reasoning(" see"),
    Content("I ask."),
    CallBegin(0, "call_a", "f"),
    CallArguments(0, '{"x":'),
    CallArguments(0, "1}"),
    CallBegin(1, "call_b", "g"),
)
BLOCKS = [
    {"type": "thinking", "thinking": "let me see", "signature": ""},
    {"type": "text", "text": "I ask."},
    {"type": "tool_use", "id": "call_a", "name": "f", "input": {"x": 1}},
    {"type": "tool_use", "id": "call_b", "name": "g", "input": {}},
]
COUNTS = Counts(prompt=5, completion=9, cached=0)


def dialect() -> MessagesDialect:
    return MessagesDialect(Head("msg_1", 1, NAME, "fp"))


def choice() -> Choice:
    reading = Reading(
        tokenizer=LETTERS,
        skip_special=True,
        continuation=False,
        stops=(),
        include_stop=False,
        min_tokens=0,
        eos_ids=LETTERS.eos_ids,
        keep_ids=False,
        keep_logprobs=False,
        scored=False,
        count_chunks=False,
    )
    return Choice(0, True, [1, 2, 3], None, reading, "")


def folded(events: list[Any]) -> list[dict[str, Any]]:
    """The content blocks that a client makes of a stream."""
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    opened: int | None = None
    for event in events:
        if event["type"] == "content_block_start":
            assert opened is None
            assert event["index"] == len(blocks)
            opened = event["index"]
            blocks.append(event["content_block"])
            texts.append("")
        elif event["type"] == "content_block_delta":
            assert event["index"] == opened
            delta = event["delta"]
            key = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
            texts[-1] += delta[key[delta["type"]]]
        elif event["type"] == "content_block_stop":
            assert event["index"] == opened
            opened = None
    assert opened is None
    for block, text in zip(blocks, texts, strict=True):
        if block["type"] == "tool_use":
            block["input"] = json.loads(text or "{}")
        else:
            block[block["type"]] = text
    return blocks


@pytest.mark.parametrize("cuts", [(), (1,), (2, 5), (1, 2, 3, 4, 5, 6)])
def test_parts_are_blocks_whole_and_streamed_wherever_the_pieces_are_cut(cuts: tuple[int, ...]) -> None:
    whole = json.loads(
        dialect().whole([(choice(), Piece("I ask.", finish=FinishReason.STOP, parts=PARTS))], COUNTS).decode()
    )
    assert (whole["content"], whole["stop_reason"]) == (BLOCKS, "tool_use")
    words, one = dialect(), choice()
    edges = (0, *cuts, len(PARTS))
    data = words.opening(one, lambda: COUNTS)
    for begin, end in itertools.pairwise(edges):
        finish = FinishReason.STOP if end == len(PARTS) else None
        data += words.chunk(one, Piece("", finish=finish, parts=PARTS[begin:end]), lambda: COUNTS)
    events = parse_events((data + words.ending(lambda: COUNTS)).decode())
    assert folded(events) == BLOCKS
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_arguments_that_were_cut_are_handed_on_as_text() -> None:
    parts = (CallBegin(0, "c", "f"), CallArguments(0, '{"x": 1, "y'))
    body = json.loads(dialect().whole([(choice(), Piece("", finish=FinishReason.LENGTH, parts=parts))], COUNTS))
    assert body["content"][0]["input"] == {"arguments": '{"x": 1, "y'}
    assert body["stop_reason"] == "max_tokens"


def test_an_empty_answer_has_no_block() -> None:
    with standing(says(EOS)) as stand:
        assert stand.post(PATH, ASK).json()["content"] == []
        events = parse_events(stand.post(PATH, {**ASK, "stream": True}).text)
        assert [event["type"] for event in events] == ["message_start", "ping", "message_delta", "message_stop"]


# ---- Streams that go on ------------------------------------------------------------------------------------------

THOUGHT = "<think>let me see</think>"
CALL = '<tool_call>{"name":"f","arguments":{"x":1}}</tool_call>'
TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}


def heard(stand: Stand, body: dict[str, Any] | None, last: str | None, most: int) -> tuple[list[str], str]:
    """Up to so many events of a stream, and the id of the last; the connection is then cut."""
    headers = {} if last is None else {"last-event-id": last}
    with requests.post(stand.url + PATH, json=body, headers=headers, stream=True, timeout=30) as reply:
        assert reply.status_code == 200, reply.text
        blocks: list[str] = []
        data = ""
        for part in reply.iter_content(chunk_size=None):
            data += part.decode()
            *whole, data = data.split("\n\n")
            blocks += whole
            if len(blocks) >= most:
                break
    blocks = blocks[:most]
    assert all(block.startswith("id: ") for block in blocks)
    return [f"{block}\n\n" for block in blocks], blocks[-1].partition("\n")[0][4:]


def told(events: list[Any]) -> tuple[object, ...]:
    blocks = folded(events)
    for block in blocks:
        block.pop("id", None)
    kinds = [event["type"] for event in events]
    ends = kinds.count("message_start"), kinds.count("message_delta"), kinds.index("message_stop") - len(kinds)
    delta = next(event for event in events if event["type"] == "message_delta")
    return blocks, ends, delta["delta"], delta["usage"]["output_tokens"]


@pytest.mark.parametrize(
    "script",
    ["Hello, world!" + EOS, f"{THOUGHT}Now.{CALL}{EOS}", f"{CALL}{CALL}{EOS}", EOS, "ä😀" + EOS],
    ids=["text", "thought-call", "calls", "empty", "wide"],
)
@pytest.mark.parametrize("tokens_per_step", [1, 7])
def test_a_stream_cut_behind_any_event_goes_on(script: str, tokens_per_step: int) -> None:
    body = {**ASK, "max_tokens": 200, "stream": True, "tools": [TOOL]}
    engine = {"tokens_per_step": tokens_per_step}
    parsers = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    with standing(says(script), context=1024, engine=engine, **parsers) as stand:
        blocks, _ = heard(stand, body, None, 10_000)
        whole = told(parse_events("".join(blocks)))
        for most in range(1, len(blocks) + 1):
            said, last = heard(stand, body, None, most)
            while "message_stop" not in said[-1]:
                more, last = heard(stand, None, last, 3)
                said += more
            assert told(parse_events("".join(said))) == whole


def test_a_stream_that_is_not_known_is_refused_in_anthropics_words(stand: Stand) -> None:
    reply = stand.post(PATH, ASK, last_event_id="x" * 22 + ".1")
    assert (reply.status_code, reply.json()["error"]["type"]) == (404, "not_found_error")
