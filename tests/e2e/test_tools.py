"""Tools with the official client against the real server and the default model, whose template knows none."""

from __future__ import annotations

import json
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import openai
import pydantic
import pytest
import requests

from tests.e2e.process import Server

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TIME: dict[str, Any] = {
    "type": "object",
    "properties": {"zone": {"$ref": "#/$defs/Zone"}},
    "required": ["zone"],
    "additionalProperties": False,
    "$defs": {"Zone": {"type": "integer", "minimum": -12, "maximum": 14}},
}
SCHEMAS = {"get_weather": WEATHER, "get_time": TIME}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": name.replace("_", " "), "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
ASK: Any = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def check(calls: Any) -> list[str]:
    """Every call's arguments follow its schema; the names in order."""
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        assert call.id
    return [call.function.name for call in calls]


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_required_calls_have_valid_arguments(client: openai.OpenAI, temperature: float) -> None:
    reply = client.chat.completions.create(
        model="", messages=ASK, tools=TOOLS, tool_choice="required", temperature=temperature, seed=1, max_tokens=400
    )
    choice = reply.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert check(choice.message.tool_calls)


def test_a_named_call_is_that_one_and_there_is_one(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="",
        messages=ASK,
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "get_time"}},
        temperature=0,
        max_tokens=200,
    )
    assert check(reply.choices[0].message.tool_calls) == ["get_time"]
    assert reply.choices[0].finish_reason == "tool_calls"


def test_without_parallel_calls_there_is_one(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="", messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=400, seed=3
    )
    assert len(check(reply.choices[0].message.tool_calls)) == 1


def test_a_stream_adds_up_to_the_whole_in_the_clients_own_hands(client: openai.OpenAI) -> None:
    fields: Any = {
        "model": "", "messages": ASK, "tools": TOOLS, "tool_choice": "required", "temperature": 0, "max_tokens": 400,
    }  # fmt: skip
    whole = client.chat.completions.create(**fields).choices[0].message
    with client.chat.completions.stream(**fields) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert check(final.message.tool_calls) == check(whole.tool_calls)
    assert [call.function.arguments for call in final.message.tool_calls or []] == [
        call.function.arguments for call in whole.tool_calls or []
    ]
    assert len(done) == len(final.message.tool_calls or [])


class Lookup(pydantic.BaseModel):
    """Look something up."""

    word: str
    times: int


def test_the_clients_parser_reads_strict_tools(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="",
        messages=ASK,
        tools=[openai.pydantic_function_tool(Lookup)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=200,
    )
    call = (reply.choices[0].message.tool_calls or [])[0]
    assert isinstance(call.function.parsed_arguments, Lookup)


def test_a_model_left_to_choose_may_answer_and_a_conversation_goes_on_behind_its_calls(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="", messages=ASK, tools=TOOLS, temperature=0, max_tokens=40)
    message = reply.choices[0].message
    assert message.content or message.tool_calls
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    turns: Any = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "It is 31 degrees celsius in Paris."},
    ]
    reply = client.chat.completions.create(model="", messages=turns, temperature=0, max_tokens=40)
    assert "31" in (reply.choices[0].message.content or "")


def test_functions_of_old_are_served(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="",
        messages=ASK,
        functions=[{"name": "get_time", "parameters": TIME}],
        function_call={"name": "get_time"},
        max_tokens=100,
        temperature=0,
    )
    call = reply.choices[0].message.function_call
    assert call is not None
    jsonschema.validate(json.loads(call.arguments), TIME)
    assert reply.choices[0].finish_reason == "function_call"


def test_a_tool_whose_schema_cannot_be_kept_is_a_bad_request(server: Server) -> None:
    tool: Any = {"function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "nonsense"}}}}}
    reply = requests.post(
        f"{server.url}/v1/chat/completions",
        json={"messages": ASK, "tools": [tool], "tool_choice": "required"},
        timeout=60,
    )
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tool_choice")


def test_either_a_call_or_the_answers_own_format_is_given(client: openai.OpenAI) -> None:
    schema: Any = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model="",
        messages=[{"role": "user", "content": "How many legs has a dog?"}],
        tools=TOOLS,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        temperature=0,
        max_tokens=400,
    )
    message = reply.choices[0].message
    if message.tool_calls:
        check(message.tool_calls)
    else:
        jsonschema.validate(json.loads(message.content or ""), schema)
