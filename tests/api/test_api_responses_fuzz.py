"""No body and no query makes /v1/responses fail, and nothing is left running behind any of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes_api import Stand, standing
from vserve.api import schema

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
KINDS = ("message", "reasoning", "function_call", "function_call_output", "item_reference", "web_search_call")
PART = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(("input_text", "output_text", "refusal", "input_image")), "text": JSON}
)
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(KINDS),
        "id": st.text(max_size=5) | JSON,
        "role": st.sampled_from(("user", "assistant", "system", "developer", "tool")),
        "content": st.text(max_size=5) | st.lists(PART, max_size=2) | JSON,
        "summary": st.lists(PART, max_size=2) | JSON,
        "call_id": st.sampled_from(("c1", "c2")) | JSON,
        "name": st.just("f") | JSON,
        "arguments": st.just("{}") | JSON,
        "output": st.text(max_size=5) | st.lists(PART, max_size=2) | JSON,
        "status": st.just("completed") | JSON,
        "encrypted_content": JSON,
    },
)
PLAUSIBLE = st.fixed_dictionaries(
    {"input": st.text(max_size=5) | st.lists(ITEM, max_size=4)},
    optional={
        "background": st.booleans(),
        "stream": st.booleans(),
        "store": st.booleans(),
        "instructions": st.text(max_size=5),
        "max_output_tokens": st.integers(1, 20),
        "truncation": st.sampled_from(("auto", "disabled")),
        "top_logprobs": st.integers(0, 3),
        "metadata": st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
        "text": st.fixed_dictionaries({}, optional={"format": st.just({"type": "text"}), "verbosity": JSON}),
        "tool_choice": st.sampled_from(("auto", "none", "required")) | JSON,
        "previous_response_id": st.just("resp_0") | JSON,
    },
)
WILD = st.dictionaries(st.sampled_from(sorted(schema.RESPONSES)), JSON, max_size=4)


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing(engine={"tokens_per_step": 3}) as running:
        yield running


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PLAUSIBLE | WILD, WILD | st.just({}))
def test_any_body_is_answered_and_never_with_a_5xx(
    stand: Stand, plausible: dict[str, Any], wild: dict[str, Any]
) -> None:
    reply = requests.post(f"{stand.url}/v1/responses", data=json.dumps({**wild, **plausible}).encode(), timeout=30)
    check(reply)
    if reply.status_code == 200 and not reply.headers["content-type"].startswith("text/event-stream"):
        id = reply.json()["id"]
        again = requests.get(f"{stand.url}/v1/responses/{id}", timeout=30)
        assert again.status_code == (200 if reply.json()["store"] else 404)
        check(requests.get(f"{stand.url}/v1/responses/{id}/input_items", timeout=30))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(min_size=1, max_size=12), st.sampled_from(("", "/cancel", "/input_items")), st.text(max_size=12))
def test_any_id_and_query_are_answered_and_never_with_a_5xx(stand: Stand, id: str, rest: str, query: str) -> None:
    url = f"{stand.url}/v1/responses/{requests.utils.quote(id, safe='')}{rest}"
    for method in ("GET", "POST", "DELETE"):
        reply = requests.request(method, url, params=requests.utils.quote(query, safe="=&[]"), timeout=30)
        assert reply.status_code in (200, 400, 404, 405), reply.text


def check(reply: requests.Response) -> None:
    assert reply.status_code in (200, 400, 404), reply.text
    if reply.status_code != 200:
        assert reply.json()["error"]["code"] == reply.status_code
        assert reply.json()["error"]["type"] == "invalid_request_error"
    elif reply.headers["content-type"].startswith("text/event-stream"):
        last = json.loads(reply.text.rstrip().rpartition("\ndata: ")[2])
        assert last["type"] in ("response.completed", "response.incomplete")


def test_nothing_runs_on_afterwards(stand: Stand) -> None:
    for _ in range(20_000):
        if stand.call(lambda: len(stand.app.tasks) + len(stand.app.replies) + len(stand.app.keep_alive)) == 0:
            return
    raise AssertionError("a response was left behind")
