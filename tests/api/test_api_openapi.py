"""/openapi.json: it says all that the tables say, nothing else, and what it says is so."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import openapi_spec_validator
import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema.validators import extend

from tests.fakes_api import EOS, Stand, options, parse_events, says, standing
from vserve.api.access import SCOPES
from vserve.api.app import App
from vserve.api.entry import OPEN, Entry, Need
from vserve.api.fields import Anything, Fate, Field, Table, read
from vserve.api.openapi import describe
from vserve.api.routes import table
from vserve.api.schema import STREAM_OPTION_ROWS
from vserve.errors import BadRequest
from vserve.oauth.grants import Flow, Grants

HI = [{"role": "user", "content": "hi"}]
HUGE_VOCABULARY = 2**80  # the one bound that the description cannot know
EVERYTHING = table(App(options(rca=True)))
ENTRIES = tuple(entry for entry in EVERYTHING if not entry.page)
TABLES: dict[str, Table] = {body.name: body.rows for entry in ENTRIES for body in entry.doc.takes}
ROWS = {f"{name}.{row.name}": row for name, rows in TABLES.items() for row in rows.values()}
ROWS |= {f"query.{entry.name}.{row.name}": row for entry in ENTRIES for row in entry.doc.query.values()}
ROWS |= {f"stream_options.{row.name}": row for row in STREAM_OPTION_ROWS.values()}


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing(rca=True) as running:
        yield running


@pytest.fixture(scope="module")
def document(stand: Stand) -> Any:
    return stand.get("/openapi.json").json()


def test_the_description_is_valid_openapi(document: Any) -> None:
    assert document["openapi"] == "3.1.0"
    assert document["info"]["version"] == "1.2.3"
    openapi_spec_validator.validate(document)
    names = [item["operationId"] for path in document["paths"].values() for item in path.values()]
    assert len(names) == len(set(names))


def test_the_description_has_every_route_and_no_other(document: Any) -> None:
    said = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    served = {
        (method, pattern.replace(":path}", "}"))
        for entry in ENTRIES
        for pattern in entry.patterns
        for method in entry.methods
    }
    assert said == served


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_route_is_described_with_its_body_its_query_and_who_may_call(entry: Entry, document: Any) -> None:
    for pattern in entry.patterns:
        for method in entry.methods:
            said = document["paths"][pattern.replace(":path}", "}")][method.lower()]
            assert said["summary"] == entry.doc.help
            assert said["summary"].endswith(".")
            assert bool(said["security"]) == (entry.auth != OPEN)
            assert ("requestBody" in said) == bool(entry.doc.takes and method == "POST")
            parameters = {(item["in"], item["name"]) for item in said.get("parameters", ())}
            named = {("path", name) for name in re.findall(r"\{([a-z_]+)", pattern)}
            assert parameters == named | {("query", name) for name in entry.doc.query}


@pytest.mark.parametrize("name", TABLES)
def test_a_body_is_described_with_every_row_of_its_table_and_no_other(name: str, document: Any) -> None:
    said = document["components"]["schemas"][name]
    assert said["properties"].keys() == TABLES[name].keys()
    assert set(said.get("required", ())) == {row.name for row in TABLES[name].values() if row.required}
    for row in TABLES[name].values():
        assert row.help in said["properties"][row.name]["description"]


def test_every_schema_is_used_by_a_route_and_every_reference_leads_somewhere(document: Any) -> None:
    schemas = document["components"]["schemas"]
    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert used == schemas.keys()


def test_a_strict_server_says_that_it_takes_nothing_unknown() -> None:
    said: Any = describe(ENTRIES, "1", True)
    assert all(said["components"]["schemas"][name]["additionalProperties"] is False for name in TABLES)
    loose: Any = describe(ENTRIES, "1", False)
    assert all(loose["components"]["schemas"][name]["additionalProperties"] is True for name in TABLES)


def test_a_field_that_is_not_served_is_described_by_the_values_that_ask_for_nothing(document: Any) -> None:
    said = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    for row in TABLES["ChatCompletionRequest"].values():
        if row.fate is Fate.REFUSED:
            assert said[row.name]["enum"] == [*row.harmless, None]


def test_a_client_that_has_the_description_is_not_sent_it_again(stand: Stand) -> None:
    first = stand.get("/openapi.json")
    etag = first.headers["etag"]
    for sent in (etag, f'"other", W/{etag}', "*"):
        again = stand.get("/openapi.json", if_none_match=sent)
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert stand.get("/openapi.json", if_none_match='"other"').content == first.content


def test_a_server_behind_a_prefix_says_so(document: Any) -> None:
    assert "servers" not in document
    said: Any = describe(ENTRIES, "1", False, "/llm")
    assert said["servers"] == [{"url": "/llm"}]
    openapi_spec_validator.validate(said)


def test_the_flow_of_an_issuer_is_described_with_the_scopes_that_open_each_route() -> None:
    grants = Grants.parse(["read=infer", "all=infer", "all=admin"], SCOPES)
    flow = Flow("https://sso.example/auth", "https://sso.example/token", grants)
    said: Any = describe(ENTRIES, "1", False, oauth2=flow)
    openapi_spec_validator.validate(said)
    described = said["components"]["securitySchemes"]["oauth2"]
    code = described["flows"]["authorizationCode"]
    assert (code["authorizationUrl"], code["tokenUrl"]) == ("https://sso.example/auth", "https://sso.example/token")
    assert code["scopes"].keys() == {"read", "all"}
    assert "admin and infer" in code["scopes"]["all"]
    ways = said["paths"]["/v1/chat/completions"]["post"]["security"]
    assert ways == [{"bearer": ["infer"]}, {"apiKey": ["infer"]}, {"oauth2": ["read"]}, {"oauth2": ["all"]}]
    assert said["paths"]["/scale_elastic_ep"]["post"]["security"][2:] == [{"oauth2": ["all"]}]
    assert said["paths"]["/metrics"]["get"]["security"] == [{}, {"bearer": ["metrics"]}, {"apiKey": ["metrics"]}]
    assert said["paths"]["/ping"]["get"]["security"] == []


EXAMPLES = [
    (entry.patterns[0], body.name, body.example) for entry in ENTRIES for body in entry.doc.takes[:1] if body.example
]


@pytest.mark.parametrize(("path", "name", "example"), EXAMPLES, ids=[path for path, _, _ in EXAMPLES])
def test_the_example_of_a_body_is_shown_fits_its_schema_and_works(
    path: str, name: str, example: dict[str, Any], stand: Stand, document: Any
) -> None:
    said = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    assert said["example"] == example
    check_shape(document, name, example)
    reply = stand.post(path, example, accept="application/json")
    # The stand has no embedding model; everything else is answered.
    asks_encoder = next(entry for entry in ENTRIES if path in entry.patterns).need is Need.ENCODER_ROOM
    assert reply.status_code == (404 if asks_encoder else 200), reply.text


def test_the_description_is_open_and_there_before_the_model_and_can_be_left_out() -> None:
    with standing(ready=False, api_keys=("secret",)) as starting:
        assert starting.get("/openapi.json").status_code == 200
    with standing(docs=False) as bare:
        reply = bare.get("/openapi.json")
        assert reply.status_code == 404


# ---- What the description accepts, the server accepts ------------------------------------------------------------

_STRICT_INTEGER = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)


def _ecma_pattern(validator: Any, pattern: str, value: object, schema: object) -> Iterator[jsonschema.ValidationError]:
    # ECMA-262: $ is the end of the text and nothing else.
    if isinstance(value, str) and re.search(pattern.replace("$", r"\Z"), value) is None:
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


def _unique_names(validator: Any, unique: bool, value: object, schema: object) -> Iterator[jsonschema.ValidationError]:
    # Tools: JSON Schema can't say that names differ.
    items = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    functions = [item["function"] if isinstance(item.get("function"), dict) else item for item in items]
    names = [str(function.get("name")) for function in functions]
    if len(set(names)) < len(names):
        yield jsonschema.ValidationError(f"{names} has one name twice")


Judge = extend(
    jsonschema.Draft202012Validator,
    {"pattern": _ecma_pattern, "uniqueItems": _unique_names},
    type_checker=_STRICT_INTEGER,
)
"""JSON Schema, but an integer is a number written without a fraction."""

_SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
) | st.text(max_size=8)
_JSON = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def near(schema: Any) -> st.SearchStrategy[Any]:
    """Values that schema takes or only just refuses, and any others."""
    options: list[st.SearchStrategy[Any]] = [_JSON]
    if "anyOf" in schema:
        options += [near(option) for option in schema["anyOf"]]
    if "enum" in schema:
        options.append(st.sampled_from(schema["enum"]) if schema["enum"] else st.none())
    if "const" in schema:
        options.append(st.just(schema["const"]))
    kinds = schema.get("type", ())
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind in _NEAR:
            options.append(_NEAR[kind](schema))
    return st.one_of(options)


def _near_number(schema: Any) -> st.SearchStrategy[Any]:
    bounds = [schema[key] for key in ("minimum", "maximum", "exclusiveMinimum") if key in schema]
    edges = [bound + step for bound in bounds for step in (-1, 0, 1)]
    edges += [math.nextafter(bound, bound + step) for bound in bounds if abs(bound) < 2**50 for step in (-1, 1)]
    inside = st.integers(math.ceil(min(bounds)), math.floor(max(bounds))) if len(bounds) > 1 else st.integers(0, 2**40)
    return inside | (st.sampled_from(edges) if edges else inside)


def _near_string(schema: Any) -> st.SearchStrategy[str]:
    least, most = schema.get("minLength", 0), schema.get("maxLength", 8)
    sizes = st.sampled_from([size for size in (least - 1, least, least + 1, most, most + 1) if 0 <= size <= 5000])
    return st.builds(lambda char, size: char * size, st.characters(exclude_categories=("Cs",)), sizes)


def _near_array(schema: Any) -> st.SearchStrategy[list[Any]]:
    items = near(schema.get("items", {}))
    least, most = schema.get("minItems", 0), schema.get("maxItems", 8)
    sizes = [size for size in (most, most + 1) if size <= 2000]
    made: st.SearchStrategy[list[Any]] = st.lists(items, min_size=max(0, least - 1), max_size=least + 3)
    return made | st.builds(lambda item, size: [item] * size, items, st.sampled_from(sizes)) if sizes else made


def _near_object(schema: Any) -> st.SearchStrategy[dict[str, Any]]:
    known = {name: near(value) for name, value in schema.get("properties", {}).items()}
    more = schema.get("additionalProperties", True)
    values = near(more if isinstance(more, dict) else {})
    named = schema.get("propertyNames", {}).get("not", {}).get("enum", ["x"])
    digits = st.integers(0, 10**13).map(str)
    others = st.dictionaries(digits | st.text(max_size=5) | st.sampled_from(named), values, max_size=2)
    most = schema.get("maxProperties", 2000)
    full = st.builds(
        lambda value, size: {str(i): value for i in range(size)}, values, st.sampled_from([min(most, 1100), most + 1])
    )
    fixed = st.fixed_dictionaries({}, optional=known)
    return st.builds(lambda a, b: {**b, **a}, fixed, others) | (full if most < 2000 else fixed)


_NEAR: dict[str, Any] = {
    "integer": _near_number,
    "number": _near_number,
    "string": _near_string,
    "array": _near_array,
    "object": _near_object,
    "boolean": lambda schema: st.booleans(),
    "null": lambda schema: st.none(),
}


def taken(row: Field[object], value: object, strict: bool) -> bool:
    try:
        read({row.name: value}, {row.name: row}, HUGE_VOCABULARY, strict)
    except BadRequest:
        return False
    return True


def alike(row: Field[object]) -> object:
    """Rows that are checked by the same rule."""
    return repr((row.kind, row.fate, row.harmless, row.required))


DISTINCT = {alike(row): name for name, row in ROWS.items()}.values()


@pytest.mark.parametrize("name", DISTINCT)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_field_takes_what_its_schema_takes_and_nothing_else(name: str, data: st.DataObject) -> None:
    row = ROWS[name]
    for strict in (False, True):
        schema = row.schema(strict)
        value = data.draw(near(schema))
        assert taken(row, value, strict) == Judge(schema).is_valid(value), (value, schema)


def test_schemas_are_fresh_objects() -> None:
    for row in ROWS.values():
        first = row.schema(False)
        first["spoiled"] = True
        assert "spoiled" not in row.schema(False)


def test_only_fields_without_effect_take_just_anything() -> None:
    assert not [name for name, row in ROWS.items() if row.fate is Fate.OBEYED and isinstance(row.kind, Anything)]


# ---- What is answered has the shape that is described ------------------------------------------------------------


def closed(schema: Any) -> Any:
    """The schema with every object's fields taken for all there are."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    return {**made, "additionalProperties": False} if isinstance(made.get("properties"), dict) else made


def check_shape(document: Any, name: str, value: Any) -> None:
    schemas = closed(document["components"]["schemas"])
    jsonschema.validate(value, {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}})


REPLIES: list[tuple[str, str, dict[str, Any] | None]] = [
    # schema, path, body (None: GET)
    ("Health", "/health", None),
    ("Health", "/readyz", None),
    ("Health", "/livez", None),
    ("Health", "/startupz", None),
    ("Version", "/version", None),
    ("Load", "/load", None),
    ("ModelList", "/v1/models", None),
    ("Model", "/v1/models/fake/letters", None),
    ("OpenApi", "/openapi.json", None),
    ("ChatCompletion", "/v1/chat/completions", {"messages": HI, "n": 2}),
    (
        "ChatCompletion",
        "/v1/chat/completions",
        {"messages": HI, "logprobs": True, "top_logprobs": 2, "return_token_ids": True},
    ),
    ("Completion", "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3}),
    ("Completion", "/v1/completions", {"prompt": "a", "logprobs": 1, "max_tokens": 3, "return_token_ids": True}),
    ("Message", "/v1/messages", {"messages": HI, "max_tokens": 3}),
    ("TokenCount", "/v1/messages/count_tokens", {"messages": HI}),
    ("ChatCompletion", "/v1/chat/completions/batch", {"messages": [HI, HI]}),
    ("Rendered", "/v1/chat/completions/render", {"messages": HI}),
    ("Rendered", "/v1/completions/render", {"prompt": [[71], [72]]}),
    ("Invocation", "/invocations", {"messages": HI}),
    ("Scaled", "/scale_elastic_ep", {"new_data_parallel_size": 1}),
    ("Scaling", "/is_scaling_elastic_ep", {}),
    ("Scaling", "/is_scaling_elastic_ep", None),
    ("Response", "/v1/responses", {"input": "hi"}),
    ("Response", "/v1/responses", {"prompt": "hi", "metadata": {"a": "b"}}),
    (
        "Response",
        "/v1/responses",
        {
            "input": HI,
            "top_logprobs": 2,
            "max_output_tokens": 3,
            "instructions": "be",
            "tools": [{"type": "function", "name": "f"}],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        },
    ),
    ("Tokenized", "/tokenize", {"prompt": "hello", "return_token_strs": True}),
    ("Tokenized", "/v1/tokenize", {"prompt": ["hello", "you"]}),
    ("Tokenized", "/tokenize", {"prompt": ""}),
    ("Tokenized", "/tokenize", {"prompt": []}),
    ("Tokenized", "/tokenize", {"messages": HI}),
    ("Detokenized", "/detokenize", {"tokens": [104, 105]}),
    ("DebugVersion", "/debug/version", None),
    ("DebugStats", "/debug/stats", None),
    ("DebugCache", "/debug/cache_stats", None),
    ("DebugTraces", "/debug/traces", None),
    ("DebugTraces", "/debug/traces?format=chrome", None),
]


@pytest.mark.parametrize(("name", "path", "body"), REPLIES)
def test_a_reply_has_the_shape_that_is_described(
    name: str, path: str, body: dict[str, Any] | None, stand: Stand, document: Any
) -> None:
    reply = stand.get(path) if body is None else stand.post(path, body, accept="application/json")
    assert reply.status_code == 200, reply.text
    check_shape(document, name, reply.json())


@pytest.mark.parametrize(
    ("name", "path", "body"),
    [
        ("ChatCompletionChunk", "/v1/chat/completions", {"messages": HI, "stream_options": {"include_usage": True}}),
        ("ChatCompletionChunk", "/v1/chat/completions", {"messages": HI, "logprobs": True, "return_token_ids": True}),
        ("Completion", "/v1/completions", {"prompt": "a", "logprobs": 0, "stream_options": {"include_usage": True}}),
        ("MessageEvent", "/v1/messages", {"messages": HI, "max_tokens": 20, "stop_sequences": ["or"]}),
        ("ResponseEvent", "/v1/responses", {"input": "hi", "top_logprobs": 1}),
        ("ResponseEvent", "/v1/responses", {"input": "hi", "background": True, "max_output_tokens": 4}),
    ],
)
def test_an_event_has_the_shape_that_is_described(
    name: str, path: str, body: dict[str, Any], stand: Stand, document: Any
) -> None:
    events = parse_events(stand.post(path, {**body, "stream": True}).text)
    assert len(events) >= 3
    for event in events:
        if event == "[DONE]":
            continue
        check_shape(document, name, event)


def test_reasoning_and_calls_of_a_response_have_the_shape_that_is_described(document: Any) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    body = {"input": "hi", "tools": [{"type": "function", "name": "f"}], "max_output_tokens": 200}
    script = says(f"<think>so</think>well{call}{EOS}")
    with standing(script, context=2048, reasoning_parser="qwen3", tool_call_parser="hermes") as stand:
        whole = stand.post("/v1/responses", body).json()
        events = stand.events("/v1/responses", body)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    check_shape(document, "Response", whole)
    assert {"response.reasoning_text.done", "response.function_call_arguments.done"} <= {one["type"] for one in events}
    for event in events:
        check_shape(document, "ResponseEvent", event)


def test_what_is_stored_is_answered_in_the_shapes_that_are_described(stand: Stand, document: Any) -> None:
    said = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"role": "user", "content": [{"type": "input_text", "text": "go on"}]},
    ]
    first = stand.post("/v1/responses", {"input": said}).json()
    path = f"/v1/responses/{first['id']}"
    assert stand.get(path).json() == first
    items = stand.get(f"{path}/input_items?limit=4&order=asc").json()
    assert (len(items["data"]), items["has_more"]) == (4, True)
    check_shape(document, "ResponseItems", items)
    check_shape(document, "ResponseItems", stand.get(f"{path}/input_items").json())
    for event in parse_events(stand.get(f"{path}?stream=true&starting_after=1").text):
        check_shape(document, "ResponseEvent", event)
    gone = requests.delete(stand.url + path, timeout=30)
    check_shape(document, "ResponseDeleted", gone.json())
    check_shape(document, "Error", stand.get(path).json())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/completions", 400)],
)
def test_an_error_has_the_shape_that_is_described(
    method: str, path: str, status: int, stand: Stand, document: Any
) -> None:
    reply = stand.post(path, {}) if method == "POST" else stand.get(path)
    assert reply.status_code == status
    check_shape(document, "Error", reply.json())


def test_probes_that_say_no_have_the_shape_that_is_described(document: Any) -> None:
    with standing(ready=False) as starting:
        for path in ("/health", "/readyz", "/startupz"):
            reply = starting.get(path)
            assert reply.status_code == 503
            check_shape(document, "Health", reply.json())
