"""Structured output of the real default model: whatever it wants to say, what it says is valid."""

from __future__ import annotations

import enum
import json
import os
import re
import select
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pydantic
import pytest
import requests

from tests.e2e.process import Server, serving

USER = [{"role": "user", "content": "Describe a person who lives in Zürich, as JSON."}]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": ["string", "null"], "maxLength": 10},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "an object": PERSON,
    "nested": {
        "type": "object",
        "properties": {
            "who": PERSON,
            "where": {"type": "object", "properties": {"city": {"const": "Zürich"}}, "additionalProperties": False},
        },
        "required": ["who", "where"],
        "additionalProperties": False,
    },
    "an array": {"type": "array", "items": PERSON, "minItems": 2, "maxItems": 2},
    "an enum": {"enum": ["red", "grün", 3, None, True]},
    "numbers": {"type": "array", "items": {"type": "number", "minimum": -1, "maximum": 1}, "maxItems": 3},
    "a tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer", "maximum": 99, "minimum": 0}, {"type": "boolean"}],
        "items": False,
        "minItems": 2,
    },
    "a pattern": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
    "a date": {"type": "string", "format": "date"},
    "any of": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "integer"}, "maxItems": 2}]},
    "recursive": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"enum": [1, 2]}, "next": {"$ref": "#/$defs/node"}},
                "required": ["v"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "unicode": {
        "type": "object",
        "properties": {"日本": {"enum": ["東京", "京都"]}, "ключ": {"type": "boolean"}},
        "required": ["日本", "ключ"],
        "additionalProperties": False,
    },
}  # fmt: skip


def chat(server: Server, **fields: Any) -> requests.Response:
    body = {"messages": USER, "max_tokens": 160, "temperature": 0, **fields}
    return requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)


def said(server: Server, **fields: Any) -> tuple[str, str]:
    """What the first choice says, and why it ends."""
    reply = chat(server, **fields)
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def format_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_follows_its_schema(server: Server, name: str, temperature: float) -> None:
    text, finish = said(
        server,
        temperature=temperature,
        seed=3,
        structured_outputs={"json": SCHEMAS[name], "disable_any_whitespace": True},
    )
    if finish == "length" and name == "recursive":  # it may go on for ever: what there is begins an answer
        assert re.fullmatch(r'(\{"v":[12],"next":)+\{?("v?)?"?(:[12]?,?)?("\w*"?:?)?', text), text
        return
    assert finish == "stop", text
    jsonschema.validate(json.loads(text), SCHEMAS[name], format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": format_of(PERSON)},
        {"structured_outputs": {"json": PERSON}},
        {"structured_outputs": {"json": json.dumps(PERSON)}},
        {"guided_json": PERSON},
        {"guided_json": PERSON, "guided_whitespace_pattern": " ?"},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_every_field_for_a_schema_is_obeyed(server: Server, fields: dict[str, Any]) -> None:
    text, finish = said(server, **fields)
    assert finish == "stop", text
    jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": r"\d{3}-[a-f]{2,4}(!|\?)"}}, r"\d{3}-[a-f]{2,4}(!|\?)"),
        ({"guided_regex": r"(ja|nein), Zürich \p{Lu}"}, r"(ja|nein), Zürich \w"),
        ({"structured_outputs": {"choice": ["positive", "negative", "no idea"]}}, "positive|negative|no idea"),
        ({"guided_choice": ["“quoted\"\\", "日本語"]}, "“quoted\"\\\\|日本語"),
        ({"structured_outputs": {"grammar": 'start: "a" NUM ("," NUM)* ";"\nNUM: /[0-9]{1,2}/'}}, r"a\d+(,\d+)*;"),
        ({"guided_grammar": 'root ::= "yes" | "no" ws "way"\nws ::= " "'}, "yes|no way"),
    ],
)  # fmt: skip
def test_an_answer_follows_its_pattern_choice_or_grammar(server: Server, fields: dict[str, Any], pattern: str) -> None:
    for temperature in (0, 2):
        text, finish = said(server, temperature=temperature, seed=5, max_tokens=60, **fields)
        if finish == "stop":
            assert re.fullmatch(pattern, text), text
        else:  # only the grammar with a star may go on for ever
            assert "grammar" in str(fields)
            assert finish == "length"


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
)
def test_json_mode_gives_an_object(server: Server, fields: dict[str, Any]) -> None:
    text, finish = said(server, max_tokens=300, **fields)
    if finish == "stop":
        assert isinstance(json.loads(text), dict)
    else:
        assert text.lstrip().startswith("{")
        assert finish == "length"


def test_completions_are_constrained_too_and_max_tokens_may_cut_them(server: Server) -> None:
    body = {"prompt": "The colour is", "structured_outputs": {"choice": ["extraordinarily greenish"]}, "max_tokens": 2}
    choice = requests.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert "extraordinarily greenish".startswith(choice["text"])


def test_a_stream_says_the_same_as_a_whole_reply(server: Server) -> None:
    whole, _ = said(server, response_format=format_of(PERSON))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    stream = client.chat.completions.create(
        model="", messages=USER, temperature=0, max_tokens=160, stream=True, response_format=format_of(PERSON)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Animal(pydantic.BaseModel):
    kind: str = pydantic.Field(max_length=12)
    legs: int = pydantic.Field(ge=0, le=100)
    colour: Colour
    friends: list[str] = pydantic.Field(max_length=1)


def test_the_openai_client_parses_a_pydantic_model(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    reply = client.chat.completions.parse(
        model="",
        messages=[{"role": "user", "content": "Name an animal."}],
        response_format=Animal,
        temperature=0,
        max_tokens=200,
    )
    animal = reply.choices[0].message.parsed
    assert isinstance(animal, Animal)
    assert 0 <= animal.legs <= 100


def test_each_choice_of_n_follows_the_grammar_on_its_own(server: Server) -> None:
    reply = chat(server, n=4, temperature=1.5, seed=1, structured_outputs={"regex": "[a-z]{3,8} [0-9]{4}"}).json()
    texts = [choice["message"]["content"] for choice in reply["choices"]]
    assert all(re.fullmatch("[a-z]{3,8} [0-9]{4}", text) for text in texts)
    assert len(set(texts)) > 1


def test_constrained_requests_do_not_change_what_others_say(server: Server) -> None:
    free = {"max_tokens": 40}
    alone = said(server, **free)
    jobs: list[dict[str, Any]] = [
        free,
        {"response_format": format_of(PERSON)},
        free,
        {"guided_choice": ["a", "bb"]},
        free,
    ]
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda fields: said(server, **fields), jobs))
    assert [answers[i] for i in (0, 2, 4)] == [alone] * 3
    jsonschema.validate(json.loads(answers[1][0]), PERSON)
    assert answers[3][0] in ("a", "bb")


def test_a_mask_goes_together_with_logprobs_penalties_bias_and_stops(server: Server) -> None:
    reply = chat(
        server,
        structured_outputs={"regex": "(alpha|beta|gamma){6}"},
        logprobs=True,
        top_logprobs=2,
        frequency_penalty=2.0,
        repetition_penalty=1.3,
        logit_bias={"64": 5},
        stop=["gamma"],
        temperature=0.7,
        seed=9,
    ).json()["choices"][0]
    assert re.fullmatch("(alpha|beta)*", reply["message"]["content"])
    assert reply["finish_reason"] == "stop"
    entries = reply["logprobs"]["content"]
    assert all(-9999.0 <= entry["logprob"] <= 0 for entry in entries)


def test_min_tokens_gives_way_where_the_grammar_is_complete(server: Server) -> None:
    assert said(server, structured_outputs={"choice": ["yes"]}, min_tokens=50) == ("yes", "stop")


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"guided_json": {"type": "strin"}}, "guided_json", "strin"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "no text"),
        ({"guided_regex": "(open"}, "guided_regex", "unclosed"),
        ({"guided_regex": r"a(?!b)"}, "guided_regex", "look"),
        ({"guided_regex": "((((a{100}){100}){100}){100})"}, "guided_regex", "guided_regex"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar", "nothing"),
        ({"guided_grammar": "root ::= ((("}, "guided_grammar", "guided_grammar"),
        (
            {"response_format": format_of({"type": "object", "not": {}})},
            "response_format.json_schema.schema",
            "not",
        ),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "guided_regex"),
        ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "JSON"),
        ({"structured_outputs": {}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex", "both"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        ({"guided_decoding_backend": "other"}, "guided_decoding_backend", "not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_a_400_with_the_reason(
    server: Server, fields: dict[str, Any], param: str, word: str
) -> None:
    reply = chat(server, **fields)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert word in error["message"]
    assert len(error["message"]) < 700


@pytest.mark.promise("R7", "fault: exploding grammar", "input: exploding schema")
def test_hostile_sources_neither_end_nor_block_the_server(server: Server) -> None:
    """A chain of rules that overflows the stack, a huge schema, a slow one; a free stream meanwhile goes on."""
    rules = "\n".join(f'r{i}: "x" r{i + 1}' for i in range(15_000))
    hostile: list[dict[str, Any]] = [
        {"guided_grammar": f'start: r0\n{rules}\nr15000: "z"'},
        {"guided_json": {"properties": {f"p{i}": {"type": "string"} for i in range(3000)}, "type": "object"}},
        {"guided_json": {"type": "integer", "multipleOf": 999983, "minimum": 0, "maximum": 10**15}},
        {"guided_regex": ".*" * 500 + "x"},
        {"guided_json": {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}, "$ref": "#/$defs/d0"}},
    ]
    alone = said(server, max_tokens=30)
    with ThreadPoolExecutor(6) as pool:
        replies = pool.map(lambda fields: chat(server, max_tokens=4, **fields), hostile)
        assert said(server, max_tokens=30) == alone
        assert {reply.status_code for reply in replies} <= {200, 400}
    assert said(server, guided_choice=["fine"]) == ("fine", "stop")
    assert requests.get(f"{server.url}/health", timeout=10).status_code == 200


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] + [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        if task.name != str(pid)
        for child in (task / "children").read_text().split()
    ]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_no_helper_outlives_the_server(end: signal.Signals) -> None:
    with serving() as own:
        assert said(own, guided_choice=["x"]) == ("x", "stop")
        (child,) = children_of(own.process.pid)
        watch = os.pidfd_open(child)
        own.process.send_signal(end)
        assert own.process.wait(60) == (0 if end is signal.SIGTERM else -signal.SIGKILL)
        assert select.select([watch], [], [], 30)[0], "the helper still runs"
        os.close(watch)
