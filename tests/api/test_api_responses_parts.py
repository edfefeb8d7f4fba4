"""Reasoning and calls of a split answer as items of a response: whole, streamed, replayed, gone on from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.fakes_api import EOS, Stand, says, standing

URL = "/v1/responses"
THOUGHT = f"<think>why not</think>\n\nyes{EOS}"
CALL = f'Hm<tool_call>{{"name":"f","arguments":{{"x":1}}}}</tool_call>{EOS}'
TOOLS = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]


@pytest.fixture(scope="module", params=[1, 4, 64])
def thinking(request: Any) -> Iterator[Stand]:
    with standing(says(THOUGHT), reasoning_parser="qwen3", engine={"tokens_per_step": request.param}) as running:
        yield running


def kinds(text: str) -> list[str]:
    """The types of a stream's events, deltas of one kind as one."""
    found = [block.split("\n")[0].removeprefix("event: ") for block in text.split("\n\n")[:-1]]
    return [kind for i, kind in enumerate(found) if i == 0 or found[i - 1] != kind]


def test_reasoning_is_an_item_of_its_own(thinking: Stand) -> None:
    response = thinking.post(URL, {"input": "hi"}).json()
    thought, said = response["output"]
    assert thought["type"] == "reasoning"
    assert thought["content"] == [{"type": "reasoning_text", "text": "why not"}]
    assert said["content"][0]["text"] == "yes"
    assert 0 < response["usage"]["output_tokens_details"]["reasoning_tokens"] < response["usage"]["output_tokens"]


def test_reasoning_is_streamed_and_replayed(thinking: Stand) -> None:
    live = thinking.post(URL, {"input": "hi", "stream": True}).text
    assert kinds(live)[2:9] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
    ]
    id = "resp_" + live.split('"id":"resp_')[1][:32]
    assert requests.get(f"{thinking.url}{URL}/{id}?stream=true", timeout=30).text == live


def test_logprobs_are_those_of_the_text_alone(thinking: Stand) -> None:
    response = thinking.post(URL, {"input": "hi", "top_logprobs": 1}).json()
    entries = response["output"][1]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in entries) == "yes"


@pytest.mark.parametrize("tokens_per_step", [1, 5, 200])
def test_a_call_is_an_item_whose_output_can_be_given(tokens_per_step: int) -> None:
    with standing(says(CALL), tool_call_parser="hermes", engine={"tokens_per_step": tokens_per_step}) as stand:
        response = stand.post(URL, {"input": "hi", "tools": TOOLS}).json()
        said, call = response["output"]
        assert said["content"][0]["text"].strip() == "Hm"
        assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "f", {"x": 1})
        live = stand.post(URL, {"input": "hi", "tools": TOOLS, "stream": True}).text
        assert "response.function_call_arguments.done" in kinds(live)
        id = "resp_" + live.split('"id":"resp_')[1][:32]
        assert requests.get(f"{stand.url}{URL}/{id}?stream=true&starting_after=3", timeout=30).text in live
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "42"}
        after = stand.post(URL, {"input": [output], "previous_response_id": response["id"]})
        assert after.status_code == 200
        wrong = stand.post(URL, {"input": [{**output, "call_id": "other"}], "previous_response_id": response["id"]})
        assert wrong.status_code == 400
