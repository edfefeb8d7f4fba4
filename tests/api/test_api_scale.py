"""POST /scale_elastic_ep and /is_scaling_elastic_ep over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.fakes_api import Stand, standing

PATH, STATE = "/scale_elastic_ep", "/is_scaling_elastic_ep"


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing() as running:
        yield running


def post(stand: Stand, query: str, body: Any = None) -> requests.Response:
    return requests.post(f"{stand.url}{PATH}{query}", json=body, timeout=30)


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("?workers=1", None),
        ("?new_data_parallel_size=1&drain_timeout=5", None),
        ("", {"new_data_parallel_size": 1, "drain_timeout": 120}),
        ("", {"workers": 1}),
        ("?workers=1", {"new_data_parallel_size": 1}),
        ("?workers=1", {"workers": 1}),
    ],
)
def test_the_size_that_is_there_can_be_asked_for_in_both_forms(query: str, body: Any, stand: Stand) -> None:
    reply = post(stand, query, body)
    assert reply.status_code == 200, reply.text
    assert reply.json() == {"message": "Scaled to 1 data parallel engines", "data_parallel_size": 1}


@pytest.mark.parametrize(
    ("query", "body", "param", "words"),
    [
        ("?workers=5", None, "new_data_parallel_size", "cannot make it 5"),
        ("", {"new_data_parallel_size": 5, "drain_timeout": 120}, "new_data_parallel_size", "must be 1, got 5"),
        ("", None, "new_data_parallel_size", "required"),
        ("?workers=zero", None, "workers", "'zero'"),
        ("?workers=-1", None, "workers", "'-1'"),
        ("?workers=0", None, "workers", "between 1"),
        ("?workers=1&workers=2", None, "workers", "2 times"),
        ("?workers=1", {"workers": 2}, "workers", "differs"),
        ("?workers=1", {"new_data_parallel_size": 2}, "workers", "give one"),
        ("", {"new_data_parallel_size": "1"}, "new_data_parallel_size", "'1'"),
        ("", {"new_data_parallel_size": 1, "drain_timeout": -1}, "drain_timeout", "between 0"),
    ],
)
def test_any_other_size_is_refused_with_the_reason(query: str, body: Any, param: str, words: str, stand: Stand) -> None:
    reply = post(stand, query, body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert words in reply.json()["error"]["message"]


def test_the_state_tells_what_became_of_the_last_change() -> None:
    with standing() as stand:
        fresh = {
            "is_scaling_elastic_ep": False,
            "phase": "idle",
            "data_parallel_size": 1,
            "requested_data_parallel_size": None,
            "error": None,
        }
        assert stand.get(STATE).json() == fresh
        post(stand, "?workers=5")
        failed = stand.post(STATE, {}).json()
        assert failed["requested_data_parallel_size"] == 5
        assert "one copy" in failed["error"]
        post(stand, "?workers=1")
        assert stand.get(STATE).json() == {**fresh, "requested_data_parallel_size": 1}


def test_fields_without_effect_are_named(stand: Stand) -> None:
    assert post(stand, "?workers=1&zz=3").headers["x-ignored-params"] == "zz"
    with standing(strict=True) as strict:
        assert post(strict, "?workers=1&zz=3").status_code == 400


def test_only_an_administrator_scales() -> None:
    with standing(api_keys=("k",)) as guarded:
        assert post(guarded, "?workers=1").status_code == 401
        assert guarded.get(STATE).status_code == 401
        assert guarded.get(STATE, authorization="Bearer k").status_code == 200
