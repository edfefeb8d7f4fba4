"""Functions and structured answers through /v1/responses: OpenAI's own client, the real server, the default model."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from openai.types.responses import ResponseFunctionToolCall

from tests.e2e.process import Server

ASKED = "What is the weather in Paris?"
TOOLS: Any = [
    {
        "type": "function",
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    }
]
NAMED = {"type": "function", "name": "get_weather"}


class City(pydantic.BaseModel):
    """What is asked for."""

    name: str
    country: str


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_openai_parses_an_answer_into_its_own_type(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model="", input="Name the capital of France.", text_format=City, temperature=0, max_output_tokens=80
    )
    assert response.status == "completed"
    assert response.output_parsed is not None
    assert response.output_parsed.name == "Paris"


@pytest.mark.parametrize("choice", ["required", NAMED, {"type": "allowed_tools", "mode": "required", "tools": [NAMED]}])
def test_a_function_that_must_be_called_is_called(client: openai.OpenAI, choice: Any) -> None:
    response = client.responses.create(
        model="", input=ASKED, tools=TOOLS, tool_choice=choice, temperature=0, max_output_tokens=120
    )
    assert response.status == "completed"
    assert response.output
    for item in response.output:
        assert isinstance(item, ResponseFunctionToolCall)
        assert item.name == "get_weather"
        assert set(json.loads(item.arguments)) == {"city"}


def test_a_call_that_is_cut_is_an_incomplete_call_as_in_chat(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="", input=ASKED, tools=TOOLS, tool_choice=NAMED, temperature=0, max_output_tokens=19
    )
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    (item,) = response.output
    assert isinstance(item, ResponseFunctionToolCall)
    function = {name: value for name, value in TOOLS[0].items() if name != "type"}
    reply = client.chat.completions.create(
        model="",
        messages=[{"role": "user", "content": ASKED}],
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
        max_completion_tokens=19,
    )
    assert reply.choices[0].finish_reason == "length"
    (call,) = reply.choices[0].message.tool_calls or []
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert (item.status, item.name, item.arguments) == ("incomplete", call.function.name, call.function.arguments)
    assert 0 < len(item.arguments) < len('{"city": "Paris"}')


def test_calls_are_streamed_and_their_outputs_gone_on_with(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="", input=ASKED, tools=TOOLS, tool_choice=NAMED, temperature=0, max_output_tokens=120
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    (call,) = final.output
    assert isinstance(call, ResponseFunctionToolCall)
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 21 degrees"}
    after = client.responses.create(
        model="", previous_response_id=final.id, input=[output], temperature=0, max_output_tokens=30
    )
    assert after.output_text
    stateless = client.responses.create(
        model="",
        input=[{"role": "user", "content": ASKED}, *[item.to_dict() for item in final.output], output],  # type: ignore[list-item]
        temperature=0,
        max_output_tokens=30,
    )
    assert stateless.output_text == after.output_text
    with pytest.raises(openai.BadRequestError, match="call_none"):
        client.responses.create(model="", input=[{**output, "call_id": "call_none"}])


def test_a_schema_that_is_none_is_refused_in_the_words_of_this_endpoint(client: openai.OpenAI) -> None:
    format: Any = {"type": "json_schema", "name": "x", "schema": {"type": "frob"}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="", input="hi", text={"format": format})
    assert refused.value.param == "text.format.schema"
    assert "text.format.schema" in str(refused.value)
