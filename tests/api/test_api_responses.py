"""/v1/responses on the wire: what is obeyed, refused and reported; states, store, replays and other people's ids."""

from __future__ import annotations

import json
import random
import socket
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from openai.types.responses.response_create_params import (
    ResponseCreateParamsNonStreaming,
    ResponseCreateParamsStreaming,
)

from tests.fakes_api import CONTEXT, LETTERS, NAME, Stand, raw_post, says, standing
from vserve.api.schema import CHAT, PASSED_ON, RESPONSES
from vserve.engine.request import FinishReason
from vserve.errors import Unavailable
from vserve.store.memory import MemoryStore
from vserve.store.record import Bounds
from vserve.store.sqlite import SqliteStore

URL = "/v1/responses"
ENDLESS: dict[str, Any] = {"input": "x", "ignore_eos": True, "max_output_tokens": 300}


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing() as running:
        yield running


def create(stand: Stand, **body: Any) -> Any:
    reply = stand.post(URL, {"input": "hi", **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def get(stand: Stand, id: str, rest: str = "", **headers: str) -> requests.Response:
    return requests.get(f"{stand.url}{URL}/{id}{rest}", headers=headers, timeout=30)


def ask(stand: Stand, id: str) -> Any:
    return get(stand, id).json()


def cancel(stand: Stand, id: str) -> requests.Response:
    return requests.post(f"{stand.url}{URL}/{id}/cancel", timeout=30)


def ended(stand: Stand, id: str) -> Any:
    """The background response once it has ended."""
    stand.until(lambda: not stand.app.tasks)
    return ask(stand, id)


def events(text: str) -> list[Any]:
    found = []
    for block in text.split("\n\n")[:-1]:
        if not block.startswith(":"):
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


def said(response: Any) -> str:
    return "".join(part["text"] for item in response["output"] for part in item.get("content", ()))


def prompt(stand: Stand) -> str:
    """What the model last read."""
    return LETTERS.decode(stand.engine.requests[-1].prompt)


TURN = "<|im_start|>{}\n{}<|im_end|>\n"


def conversation(*turns: tuple[str, str]) -> str:
    return "".join(TURN.format(*turn) for turn in turns) + "<|im_start|>assistant\n"


# ---- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "turns"),
    [
        ("hi", [("user", "hi")]),
        ([{"role": "user", "content": "hi"}], [("user", "hi")]),
        ([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}], [("user", "hi")]),
        (
            [
                {"role": "developer", "content": "short!"},
                {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "yes", "annotations": []}],
                },
                {"role": "user", "content": "more"},
            ],
            [("system", "short!"), ("user", "a\nb"), ("assistant", "yes"), ("user", "more")],
        ),
    ],
)
def test_every_form_of_input_is_the_conversation_it_means(stand: Stand, items: Any, turns: Any) -> None:
    create(stand, input=items)
    assert prompt(stand) == conversation(*turns)


def test_a_call_and_its_reasoning_reach_the_template_as_one_message() -> None:
    from vserve.api.responses_items import InputItems, messages

    items = InputItems().check(
        [
            {"role": "user", "content": "q"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "thought"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
            {"role": "assistant", "content": "one"},
            {"role": "assistant", "content": "two"},
        ],
        "input",
        0,
    )
    first, turn, result, one, two = messages(items)
    assert first == {"role": "user", "content": "q"}
    assert turn["reasoning_content"] == "thought"
    assert [call["function"]["name"] for call in turn["tool_calls"]] == ["f", "g"]  # type: ignore[attr-defined]
    assert result == {"role": "tool", "tool_call_id": "c2", "content": "2"}
    assert (one["content"], two["content"]) == ("one", "two")


def test_instructions_come_first_and_are_not_inherited(stand: Stand) -> None:
    first = create(stand, instructions="be brief")
    assert prompt(stand) == conversation(("system", "be brief"), ("user", "hi"))
    assert first["instructions"] == "be brief"
    create(stand, input="and?", previous_response_id=first["id"])
    assert prompt(stand) == conversation(("user", "hi"), ("assistant", "Hello, world!"), ("user", "and?"))


@pytest.mark.parametrize(
    ("body", "param", "named"),
    [
        ({"input": None}, "input", "required"),
        ({"input": []}, "input", "empty"),
        ({"input": 7}, "input", "7"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "robot"),
        ({"input": [{"role": "user"}]}, "input[0].content", "required"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "input_image",
        ),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "web_search_call"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content", "encrypted"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments", "arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "1"}]}, "input", "'c'"),
        ({"input": [{"role": "user", "content": "x"}] * 5000}, "input", "4096"),
        ({"prompt": {"id": "pmpt_1"}, "input": None}, "prompt", "templates"),
        ({"prompt": "x"}, "prompt", "both"),
        ({"background": True, "store": False}, "store", "background"),
        ({"conversation": "conv_1"}, "conversation", "conversation"),
        ({"max_output_tokens": 0}, "max_output_tokens", "0"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "512"),
        ({"input": "x" * 600}, "input", "`input`"),
        ({"prompt": "x" * 600, "input": None}, "prompt", "`prompt`"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "16"),
        ({"metadata": {"k" * 65: "x"}}, "metadata", "64"),
        ({"metadata": {"k": "x" * 513}}, "metadata.k", "512"),
        ({"metadata": {"k": 1}}, "metadata.k", "string"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "required"),
        ({"tool_choice": "maybe"}, "tool_choice", "maybe"),
        ({"tool_choice": "required"}, "tool_choice", "no `tools`"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "'f'"),
        ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice.type", "mcp"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "xml"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "string"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "schema"),
        ({"text": {"verbosity": "loud"}}, "text.verbosity", "loud"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "huge"),
        ({"truncation": "middle"}, "truncation", "middle"),
        ({"include": ["secrets"]}, "include[0]", "secrets"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"temperature": 3}, "temperature", "3"),
        ({"n": 2}, "n", "`n`"),
        ({"messages": []}, "messages", "messages"),
        ({"previous_response_id": "chatcmpl-1"}, "previous_response_id", "resp_"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(stand: Stand, body: Any, param: str, named: str) -> None:
    reply = stand.post(URL, {"input": "hi", **body})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert named in error["message"]
    assert stand.call(lambda: stand.bridge.live) == 0


def test_what_has_no_effect_is_reported_and_strict_refuses_it(stand: Stand) -> None:
    body = {
        "input": "hi",
        "max_tool_calls": 3,
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"verbosity": "high"},
        "stream_options": {"include_obfuscation": True},
        "include": ["reasoning.encrypted_content"],
        "flavour": "mint",
    }
    reply = stand.post(URL, body)
    assert reply.status_code == 200
    names = set(reply.headers["x-ignored-params"].split(", "))
    assert {"max_tool_calls", "reasoning.summary", "stream_options.include_obfuscation", "flavour"} <= names
    assert "include.reasoning.encrypted_content" in names
    assert {"reasoning.effort", "text.verbosity"} <= names  # this model has no such dials
    with standing(strict=True) as strict:
        assert strict.post(URL, {"input": "hi", "flavour": "mint"}).status_code == 400
        assert strict.post(URL, {"input": "hi", "text": {"format": {"type": "text"}}}).status_code == 200


def test_every_field_of_openais_and_of_chats_has_a_row() -> None:
    asked = typing.get_type_hints(ResponseCreateParamsNonStreaming) | typing.get_type_hints(
        ResponseCreateParamsStreaming
    )
    assert set(asked) <= set(RESPONSES)
    not_ours = {
        "stream_options", "messages", "max_tokens", "tools", "tool_choice", "functions", "function_call", "modalities",
        "audio", "web_search_options", "reasoning_effort", "verbosity", "prediction", "use_beam_search",
        "early_stopping", "length_penalty", "prompt_embeds", "add_generation_prompt",
    }  # fmt: skip
    assert set(CHAT) - set(RESPONSES) <= not_ours


def test_every_field_handed_on_is_a_row_of_chat() -> None:
    for name in PASSED_ON:
        assert RESPONSES[name] is CHAT[name]


def test_the_request_is_repeated_in_the_response(stand: Stand) -> None:
    asked: dict[str, Any] = {
        "metadata": {"a": "b"},
        "temperature": 0.25,
        "top_p": 0.5,
        "max_output_tokens": 40,
        "truncation": "auto",
        "parallel_tool_calls": False,
        "user": "me",
        "safety_identifier": "s",
        "prompt_cache_key": "p",
    }
    response = create(stand, **asked)
    assert {name: response[name] for name in asked} == asked
    assert response["model"] == NAME
    assert response["usage"]["total_tokens"] == response["usage"]["input_tokens"] + response["usage"]["output_tokens"]


def test_truncation_auto_leaves_out_the_oldest_turns_and_no_more(stand: Stand) -> None:
    items = [{"role": "system", "content": "S"}]
    for i in range(40):
        items += [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]
    items.append({"role": "user", "content": "last"})
    assert stand.post(URL, {"input": items}).status_code == 400
    create(stand, input=items, truncation="auto", max_output_tokens=50)
    read = prompt(stand)
    assert read.startswith(TURN.format("system", "S"))
    assert read.endswith(conversation(("user", "last")))
    length = len(stand.engine.requests[-1].prompt)
    assert CONTEXT - 50 - 30 < length <= CONTEXT - 50
    too_long = stand.post(URL, {"input": [*items, {"role": "user", "content": "x" * 600}], "truncation": "auto"})
    assert too_long.status_code == 400


def test_logprobs_come_with_the_text_they_belong_to(stand: Stand) -> None:
    response = create(stand, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = response["output"][0]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in entries) == "Hello, world!"
    assert all(len(entry["top_logprobs"]) == 2 and entry["bytes"] for entry in entries)


# ---- how it ends -----------------------------------------------------------------------------------------------------


def test_the_documents_short_form_starts_a_job_and_answers_at_once() -> None:
    with standing() as stand:
        stand.engine.running.clear()  # nothing is generated before the answer is there
        start = requests.post(f"{stand.url}{URL}", json={"prompt": "长文本生成..."}, timeout=30)
        response_id = start.json()["id"]
        assert start.json()["status"] == "queued"
        assert ask(stand, response_id)["status"] == "queued"
        stand.engine.running.set()
        done = ended(stand, response_id)
        assert done["status"] == "completed"
        assert said(done) == "Hello, world!"
        assert done["background"] is True


def test_too_few_tokens_make_it_incomplete_and_it_can_be_gone_on_from(stand: Stand) -> None:
    first = create(stand, max_output_tokens=5)
    assert first["status"] == "incomplete"
    assert first["incomplete_details"] == {"reason": "max_output_tokens"}
    assert first["output"][0]["status"] == "incomplete"
    assert said(first) == "Hello"
    create(stand, input="go on", previous_response_id=first["id"])
    assert prompt(stand) == conversation(("user", "hi"), ("assistant", "Hello"), ("user", "go on"))


def test_a_chain_carries_every_turn_and_breaks_where_one_is_missing(stand: Stand) -> None:
    ids = [create(stand, input="1")["id"]]
    for turn in ("2", "3"):
        ids.append(create(stand, input=turn, previous_response_id=ids[-1])["id"])
    turns = [(who, text) for n in "123" for who, text in (("user", n), ("assistant", "Hello, world!"))]
    assert prompt(stand) == conversation(*turns[:-1])
    assert requests.delete(f"{stand.url}{URL}/{ids[1]}", timeout=30).json() == {
        "id": ids[1],
        "object": "response",
        "deleted": True,
    }
    for gone in (ids[1], ids[2], "resp_unknown"):
        reply = stand.post(URL, {"input": "4", "previous_response_id": gone})
        assert reply.status_code == 404
        assert reply.json()["error"]["param"] == "previous_response_id"
        assert reply.json()["error"]["type"] == "invalid_request_error"
    assert said(create(stand, input="4", previous_response_id=ids[0])) == "Hello, world!"


def test_items_can_be_referred_to(stand: Stand) -> None:
    first = create(stand, input=[{"role": "user", "content": "remember"}])
    (item,) = get(stand, first["id"], "/input_items").json()["data"]
    references = [{"type": "item_reference", "id": item["id"]}, {"id": first["output"][0]["id"]}]
    second = create(stand, input=[*references, {"role": "user", "content": "now"}])
    assert prompt(stand) == conversation(("user", "remember"), ("assistant", "Hello, world!"), ("user", "now"))
    listed = get(stand, second["id"], "/input_items?order=asc").json()["data"]
    assert [entry["id"] for entry in listed[:2]] == [item["id"], first["output"][0]["id"]]
    for missing in ("msg_1", item["id"].replace("i0000", "i0001"), "msg_" + "0" * 36):
        reply = stand.post(URL, {"input": [{"type": "item_reference", "id": missing}]})
        assert reply.status_code == 404, missing


def test_parents_that_run_or_failed_are_refused() -> None:
    with standing(engine={"fail": lambda request: "broken" if b"break" in bytes(request.prompt[16:21]) else None}) as s:
        s.engine.running.clear()
        running = create(s, background=True)
        reply = s.post(URL, {"input": "x", "previous_response_id": running["id"]})
        assert (reply.status_code, reply.json()["error"]["type"]) == (409, "invalid_request_error")
        cancel(s, running["id"])
        s.engine.running.set()
        reply = s.post(URL, {"input": "x", "previous_response_id": running["id"]})
        assert reply.status_code == 400
        assert "cancelled" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_engine_is_told_and_stored(stream: bool) -> None:
    with standing(engine={"fail": lambda request: "the kernel broke at 0xdead"}) as stand:
        reply = stand.post(URL, {"input": "hi", "stream": stream})
        if stream:
            last = events(reply.text)[-1]
            assert last["type"] == "response.failed"
            failed = last["response"]
            assert ask(stand, failed["id"]) == failed
            assert failed["error"]["code"] == "server_error"
        else:
            assert reply.status_code == 500
        assert "0xdead" not in reply.text
        job = create(stand, background=True)
        assert ended(stand, job["id"])["status"] == "failed"


def test_a_deadline_ends_a_background_job_too() -> None:
    with standing(engine={"step_s": 0.005}) as stand:
        job = create(stand, background=True, timeout_ms=50, **{k: v for k, v in ENDLESS.items() if k != "input"})
        done = ended(stand, job["id"])
        assert done["status"] == "failed"
        assert "deadline" in done["error"]["message"]
        assert stand.post(URL, {**ENDLESS, "timeout_ms": 50}).status_code == 504


def test_cancel_ends_a_job_once_and_is_refused_afterwards(stand: Stand) -> None:
    with standing(engine={"step_s": 0.005}) as slow:
        job = create(slow, background=True, **{k: v for k, v in ENDLESS.items() if k != "input"})
        slow.until(lambda: slow.bridge.stats.generated_tokens_total > 3)
        first = cancel(slow, job["id"])
        assert first.status_code == 200
        assert first.json()["status"] == "cancelled"
        assert first.json()["output"][0]["status"] == "incomplete"
        assert slow.engine.cancels.get(timeout=10).reason is FinishReason.CANCELLED
        assert cancel(slow, job["id"]).json() == first.json() == ask(slow, job["id"])
        assert slow.call(lambda: slow.bridge.live) == 0
    done = create(stand)
    refused = cancel(stand, done["id"])
    assert refused.status_code == 409
    assert "completed" in refused.json()["error"]["message"]
    assert cancel(stand, "resp_unknown").status_code == 404


def test_deleting_a_job_that_runs_cancels_it() -> None:
    with standing(engine={"step_s": 0.005}) as stand:
        job = create(stand, background=True, **{k: v for k, v in ENDLESS.items() if k != "input"})
        assert requests.delete(f"{stand.url}{URL}/{job['id']}", timeout=30).json()["deleted"]
        stand.engine.cancels.get(timeout=10)
        stand.until(lambda: not stand.app.tasks)
        assert get(stand, job["id"]).status_code == 404
        assert stand.call(lambda: stand.app.store.figures.entries) == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_a_client_that_leaves_cancels_what_is_not_in_the_background(stream: bool, background: bool) -> None:
    with standing(engine={"step_s": 0.002}) as stand:
        peer = raw_post(stand.port, URL, {**ENDLESS, "stream": stream, "background": background})
        stand.until(lambda: stand.bridge.stats.generated_tokens_total > 3)
        (task,) = stand.call(lambda: list(stand.app.replies))
        id = task.ticket.id  # type: ignore[attr-defined]
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.close()
        done = ended(stand, id)
        assert done["status"] == ("incomplete" if background else "cancelled")
        assert stand.call(lambda: len(stand.app.replies) + stand.bridge.live + len(stand.app.keep_alive)) == 0


def test_a_response_that_is_not_stored_is_nowhere() -> None:
    with standing() as stand:
        assert get(stand, create(stand, store=False)["id"]).status_code == 404
        text = stand.post(URL, {"input": "hi", "store": False, "stream": True}).text
        assert get(stand, events(text)[-1]["response"]["id"]).status_code == 404
        assert stand.call(lambda: stand.app.store.figures.entries) == 0


@pytest.mark.parametrize("seed", range(8))
def test_clients_that_leave_at_any_moment_leave_nothing_behind(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    store = SqliteStore(str(tmp_path / "responses.db")) if seed % 2 else None
    with standing(engine={"step_s": 0.001}, store=store) as stand:
        for _ in range(12):
            body = {**ENDLESS, "max_output_tokens": draw.randint(1, 60), "stream": draw.random() < 0.5}
            body["background"] = draw.random() < 0.3
            peer = raw_post(stand.port, URL, body)
            left = draw.randint(0, 6000 if body["stream"] else 200)
            while left > 0:
                part = peer.recv(min(left, 500))
                assert part
                left = 0 if part.endswith(b"0\r\n\r\n") else left - len(part)
            if draw.random() < 0.5:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            peer.close()
        app = stand.app
        stand.until(lambda: not app.tasks and not app.replies and not stand.bridge.live and not len(app.keep_alive))
        assert stand.call(lambda: app.store.figures.entries) <= 12  # one cut off at once may never have been read


def test_a_full_queue_refuses_and_leaves_nothing_behind() -> None:
    with standing(max_queue=1) as stand:
        stand.engine.running.clear()
        create(stand, background=True)
        stand.until(lambda: stand.bridge.live == 1)
        for _ in range(3):
            reply = stand.post(URL, {"input": "hi", "background": True})
            if reply.status_code == 429:
                break
        assert reply.status_code == 429
        assert reply.headers["retry-after"]
        stand.engine.running.set()
        stand.until(lambda: not stand.app.tasks)


def test_shutting_down_fails_what_is_in_the_background() -> None:
    with standing(engine={"step_s": 0.005}) as stand:
        job = create(stand, background=True, **{k: v for k, v in ENDLESS.items() if k != "input"})
        stand.call(lambda: stand.app.abort(Unavailable("The server is shutting down.")))
        done = ended(stand, job["id"])
        assert done["status"] == "failed"
        assert done["error"]["message"] == "The server is shutting down."


# ---- events ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
def test_a_replay_equals_the_live_stream_from_any_place(background: bool) -> None:
    with standing(says("Well, 你好! "), engine={"step_s": 0.001}) as stand:
        body = {"input": "hi", "stream": True, "background": background, "max_output_tokens": 40, "ignore_eos": True}
        live = stand.post(URL, body)
        assert live.headers["content-type"] == "text/event-stream; charset=utf-8"
        seen = events(live.text)
        assert len(seen) > 20
        assert "[DONE]" not in live.text
        id = seen[0]["response"]["id"]
        blocks = live.text.split("\n\n")
        assert get(stand, id, "?stream=true").text == live.text
        for after in range(len(seen)):
            replay = get(stand, id, f"?stream=true&starting_after={after}&include_obfuscation=false")
            assert replay.text == "\n\n".join(blocks[after + 1 :])
            assert replay.headers["x-ignored-params"] == "include_obfuscation"
        assert get(stand, id, f"?stream=true&starting_after={len(seen) + 5}").text == ""
        assert seen[-1]["response"] == ask(stand, id)


def test_a_running_response_can_be_followed_from_where_a_client_left() -> None:
    with standing(engine={"step_s": 0.002}) as stand:
        peer = raw_post(stand.port, URL, {**ENDLESS, "stream": True, "background": True})
        data = b""
        while data.count(b"output_text.delta\n") < 5:
            data += peer.recv(4096)
        peer.close()
        id = "resp_" + data.split(b'"id":"resp_')[1][:32].decode()
        rest = get(stand, id, "?stream=true&starting_after=6").text
        assert events(rest)[0]["sequence_number"] == 7
        assert events(rest)[-1]["type"] == "response.incomplete"
        assert get(stand, id, "?stream=true&starting_after=6").text == rest


def test_a_slow_reader_holds_its_place_and_loses_nothing() -> None:
    with standing(says("abcdefghij" * 30), send_buffer=4096, engine={"tokens_per_step": 1}) as stand:
        peer = raw_post(stand.port, URL, {**ENDLESS, "stream": True, "max_output_tokens": 450}, receive_buffer=4096)
        stand.until(lambda: not stand.app.tasks)  # generated and stored while nothing is read
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            part = peer.recv(1 << 16)
            assert part
            data += part
        assert b"response.incomplete" in data
        id = "resp_" + data.split(b'"id":"resp_')[1][:32].decode()
        assert said(ask(stand, id)) == ("abcdefghij" * 45)


def test_streams_of_responses_keep_quiet_lines_alive() -> None:
    with standing(keep_alive_s=0.1) as stand:
        stand.engine.running.clear()
        peer = raw_post(stand.port, URL, {**ENDLESS, "stream": True})
        data = b""
        while b"\n:\n\n" not in data:
            data += peer.recv(4096)
        peer.close()
        stand.engine.running.set()
        stand.until(lambda: len(stand.app.keep_alive) == 0)


# ---- the store -------------------------------------------------------------------------------------------------------


def test_input_items_are_listed_page_by_page(stand: Stand) -> None:
    items = [{"role": "user", "content": f"m{i}"} for i in range(7)]
    id = create(stand, input=items)["id"]
    page = get(stand, id, "/input_items?limit=3&order=asc").json()
    texts = [item["content"][0]["text"] for item in page["data"]]
    assert texts == ["m0", "m1", "m2"]
    assert page["has_more"] is True
    while page["has_more"]:
        assert page["first_id"] == page["data"][0]["id"]
        page = get(stand, id, f"/input_items?limit=3&order=asc&after={page['last_id']}").json()
        texts += [item["content"][0]["text"] for item in page["data"]]
    assert texts == [f"m{i}" for i in range(7)]
    newest = get(stand, id, "/input_items").json()["data"]
    assert [item["content"][0]["text"] for item in newest] == [f"m{i}" for i in reversed(range(7))]


@pytest.mark.parametrize(
    ("query", "param", "status"),
    [
        ("/input_items?limit=0", "limit", 400),
        ("/input_items?limit=101", "limit", 400),
        ("/input_items?limit=1_0", "limit", 400),
        ("/input_items?order=up", "order", 400),
        ("/input_items?after=msg_none", "after", 404),
        ("?stream=maybe", "stream", 400),
        ("?starting_after=3", "starting_after", 400),
        ("?stream=true&starting_after=-1", "starting_after", 400),
        ("?stream=true&starting_after=٣", "starting_after", 400),
    ],
)
def test_a_bad_query_is_refused_by_name(stand: Stand, query: str, param: str, status: int) -> None:
    reply = get(stand, create(stand)["id"], query)
    assert reply.status_code == status
    assert reply.json()["error"]["param"] == param
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_another_keys_responses_do_not_exist() -> None:
    with standing(api_keys=("ann", "bob")) as stand:
        ann, bob = {"authorization": "Bearer ann"}, {"authorization": "Bearer bob"}
        url = f"{stand.url}{URL}"
        mine = requests.post(url, json={"input": "hi"}, headers=ann, timeout=30).json()
        stand.engine.running.clear()
        runs = requests.post(url, json={"prompt": "hi"}, headers=ann, timeout=30).json()
        for id in (mine["id"], runs["id"]):
            assert requests.get(f"{url}/{id}", headers=ann, timeout=30).status_code == 200
            for method, path in (("GET", ""), ("GET", "?stream=true"), ("DELETE", ""), ("POST", "/cancel"),
                                 ("GET", "/input_items")):  # fmt: skip
                reply = requests.request(method, f"{url}/{id}{path}", headers=bob, timeout=30)
                assert reply.status_code == 404, (method, path)
                assert requests.request(method, f"{url}/{id}{path}", timeout=30).status_code == 401
            reply = requests.post(url, json={"input": "x", "previous_response_id": id}, headers=bob, timeout=30)
            assert reply.status_code == 404
        item = {"type": "item_reference", "id": mine["output"][0]["id"]}
        assert requests.post(url, json={"input": [item]}, headers=bob, timeout=30).status_code == 404
        stand.engine.running.set()
        assert requests.get(f"{url}/{mine['id']}", headers=ann, timeout=30).json() == mine


def test_the_store_keeps_its_bounds_and_the_metrics_tell() -> None:
    with standing(store=MemoryStore(Bounds(entries=2, bytes=100_000, age_s=1000))) as stand:
        ids = [create(stand)["id"] for _ in range(4)]
        assert [get(stand, id).status_code for id in ids] == [404, 404, 200, 200]
        metrics = requests.get(f"{stand.url}/metrics", timeout=30).text
        assert "vserve_stored_responses 2.0" in metrics
        assert "vserve_stored_responses_evicted_total 2.0" in metrics
        large = stand.post(URL, {"input": "hi", "metadata": {"k": "v"}, "instructions": "x" * 200_000})
        assert large.status_code == 400  # too long for the model before it is too long for the store


def test_a_request_larger_than_the_store_is_refused() -> None:
    with standing(store=MemoryStore(Bounds(entries=2, bytes=600, age_s=1000))) as stand:
        reply = stand.post(URL, {"input": "hi"})
        assert reply.status_code == 413
        assert "store" in reply.json()["error"]["message"]
        assert stand.post(URL, {"input": "hi", "store": False}).status_code == 200


def test_a_full_disk_is_an_error_for_that_request_alone(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "responses.db"))
    with standing(store=store) as stand:
        kept = create(stand)
        pages = store._database.execute("PRAGMA page_count").fetchone()[0]
        store._database.execute(f"PRAGMA max_page_count = {pages}")
        big = {"input": [{"role": "user", "content": "hi", "note": "n" * 50_000}]}
        for extra in ({}, {"stream": True}, {"background": True}):
            reply = stand.post(URL, {**big, **extra})
            assert reply.status_code == 503
            assert "store" in reply.json()["error"]["message"]
            assert str(tmp_path) not in reply.text
        assert stand.post(URL, {**big, "store": False}).status_code == 200
        assert ask(stand, kept["id"]) == kept
        assert stand.call(lambda: stand.app.store.figures.entries) == 1
        store._database.execute("PRAGMA max_page_count = 1000000")
        assert stand.post(URL, big).status_code == 200


def test_a_disk_that_fills_while_it_runs_fails_the_response_and_says_so(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "responses.db"))
    with standing(store=store) as stand:
        stand.engine.running.clear()
        job = create(stand, background=True)
        store._database.execute("PRAGMA query_only = ON")
        stand.engine.running.set()
        failed = ended(stand, job["id"])
        assert failed["status"] == "failed"
        assert "store" in failed["error"]["message"]
        assert events(get(stand, job["id"], "?stream=true").text)[-1]["response"] == failed
        store._database.execute("PRAGMA query_only = OFF")
        assert said(create(stand)) == "Hello, world!"


def test_stored_responses_outlive_the_server_and_lost_ones_have_failed(tmp_path: Path) -> None:
    path = str(tmp_path / "responses.db")
    with standing(store=SqliteStore(path)) as stand:
        text = stand.post(URL, {"input": "hi", "stream": True, "max_output_tokens": 6}).text
        done = events(text)[-1]["response"]
        stand.engine.running.clear()
        running = create(stand, background=True)
        # As a kill would: the job's last word is never written.
        stand.call(lambda: [task.cancel() for task in stand.app.tasks])
        stand.until(lambda: not stand.app.tasks)
    with standing(store=SqliteStore(path)) as stand:
        assert ask(stand, done["id"]) == done
        assert get(stand, done["id"], "?stream=true").text == text
        lost = ask(stand, running["id"])
        assert lost["status"] == "failed"
        assert "restarted" in lost["error"]["message"]
        assert events(get(stand, running["id"], "?stream=true").text)[-1]["response"] == lost
        assert cancel(stand, running["id"]).status_code == 409
        create(stand, input="on", previous_response_id=done["id"])
        assert prompt(stand) == conversation(("user", "hi"), ("assistant", said(done)), ("user", "on"))


def test_what_is_stored_can_be_had_while_the_model_loads() -> None:
    with standing(ready=False) as stand:
        assert stand.post(URL, {"input": "hi"}).status_code == 503
        assert get(stand, "resp_unknown").status_code == 404
