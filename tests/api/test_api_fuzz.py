"""No body makes the server fail: every answer is a 2xx or a 4xx in the error shape, and the next request works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes_api import NAME, Stand, standing
from vserve.api import schema
from vserve.api.messages_fields import MESSAGES as MESSAGES_ROWS

PATHS = [
    "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/chat/completions/batch", "/v1/chat/completions/render", "/v1/completions/render", "/invocations",
    "/scale_elastic_ep",
]  # fmt: skip
FIELDS = sorted({*schema.CHAT, *schema.COMPLETIONS, *schema.TOKENIZE, *schema.DETOKENIZE, *MESSAGES_ROWS, "x"})

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": st.text(max_size=9) | JSON}
    ),
    min_size=1,
    max_size=3,
)
PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "messages": MESSAGES,
    "prompt": st.text(max_size=5) | st.lists(st.integers(0, 258), min_size=1, max_size=5),
    "text": st.text(max_size=9),
    "tokens": st.lists(st.integers(0, 258), max_size=9),
    "n": st.integers(1, 4),
    "max_tokens": st.integers(0, 20),
    "stream": st.booleans(),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1, max_size=3), max_size=3),
    "logprobs": st.booleans() | st.integers(0, 5),
    "top_logprobs": st.integers(0, 5),
    "echo": st.booleans(),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "return_token_ids": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.floats(-120, 120), max_size=3),
    "stop_token_ids": st.lists(st.integers(0, 258), max_size=3),
    "continue_final_message": st.booleans(),
    "truncate_prompt_tokens": st.integers(-1, 10),
    "timeout_ms": st.integers(2000, 5000),
    "skip_special_tokens": st.booleans(),
    "system": st.text(max_size=5),
}
PLAUSIBLE_BODY = st.fixed_dictionaries({}, optional=PLAUSIBLE)
WILD_BODY = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5)


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing(engine={"tokens_per_step": 3}) as running:
        yield running


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS), PLAUSIBLE_BODY, WILD_BODY | st.just({}))
@pytest.mark.promise("R7")
def test_any_object_is_answered_and_never_with_a_5xx(
    stand: Stand, path: str, plausible: dict[str, Any], wild: dict[str, Any]
) -> None:
    data = json.dumps({**wild, **plausible, "model": NAME}).encode()
    check(requests.post(stand.url + path, data=data, timeout=30))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS), st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@pytest.mark.promise("R7", "input: huge anything")
def test_any_bytes_are_answered_and_never_with_a_5xx(stand: Stand, path: str, data: bytes) -> None:
    check(requests.post(stand.url + path, data=data, timeout=30))


def check(reply: requests.Response) -> None:
    assert reply.status_code in (200, 400, 404), reply.text
    if reply.status_code != 200:
        error = reply.json()
        assert error.get("type") == "error" or error["error"]["code"] == reply.status_code
    elif reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.text.endswith(("data: [DONE]\n\n", 'data: {"type":"message_stop"}\n\n'))
        assert '"error"' not in reply.text
    elif not reply.headers["content-type"].startswith("text/html"):
        reply.json()
