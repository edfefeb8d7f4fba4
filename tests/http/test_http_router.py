"""The route table: what it finds, and what it answers otherwise."""

from __future__ import annotations

import pytest

from vserve.errors import ApiError, MethodNotAllowed
from vserve.http.exchange import Exchange, Response
from vserve.http.router import Route, Router


def answer(_: Exchange) -> Response:
    return Response(200)


def row(method: str, pattern: str, name: str) -> Route:
    return Route(method, pattern, answer, name)


ROUTER = Router(
    [
        row("GET", "/models", "list"),
        row("GET", "/models/default", "default"),
        row("GET", "/models/{id:path}", "model"),
        row("GET", "/jobs/{id}", "job"),
        row("DELETE", "/jobs/{id}", "delete"),
        row("POST", "/jobs/{id}/cancel", "cancel"),
        row("POST", "/a.b", "dotted"),
    ]
)


@pytest.mark.parametrize(
    ("method", "path", "name", "params"),
    [
        ("GET", "/models", "list", {}),
        ("HEAD", "/models", "list", {}),
        ("GET", "/models/default", "default", {}),
        ("GET", "/models/a", "model", {"id": "a"}),
        ("GET", "/models/org/name", "model", {"id": "org/name"}),
        ("GET", "/jobs/1", "job", {"id": "1"}),
        ("DELETE", "/jobs/1", "delete", {"id": "1"}),
        ("POST", "/jobs/1/cancel", "cancel", {"id": "1"}),
        ("POST", "/a.b", "dotted", {}),
    ],
)
def test_a_request_finds_its_route(method: str, path: str, name: str, params: dict[str, str]) -> None:
    route, found = ROUTER.match(method, path)
    assert (route.name, found) == (name, params)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/models/", 404),
        ("GET", "/Models", 404),
        ("GET", "/jobs/1/2", 404),
        ("GET", "/jobs/", 404),
        ("POST", "/axb", 404),
        ("BREW", "/nowhere", 404),
        ("POST", "/models", 405),
        ("HEAD", "/a.b", 405),
        ("get", "/models", 501),
        ("BREW", "/models", 501),
    ],
)
def test_what_is_not_in_the_table_is_refused(method: str, path: str, status: int) -> None:
    with pytest.raises(ApiError) as refusal:
        ROUTER.match(method, path)
    assert refusal.value.status == status


def test_a_wrong_method_is_told_which_are_right() -> None:
    with pytest.raises(MethodNotAllowed) as refusal:
        ROUTER.match("POST", "/jobs/1")
    assert refusal.value.allow == ("DELETE", "GET", "HEAD", "OPTIONS")
    assert ROUTER.allow("/a.b") == ("OPTIONS", "POST")
    assert ROUTER.allow("*") == ("DELETE", "GET", "HEAD", "OPTIONS", "POST")


def test_a_message_does_not_echo_a_whole_path() -> None:
    with pytest.raises(ApiError) as refusal:
        ROUTER.match("GET", "/" + "x" * 5000 + "\x1b")
    assert len(refusal.value.message) < 200


@pytest.mark.parametrize("patterns", [("/a", "/a"), ("/{x}", "/{x}")])
def test_a_row_cannot_be_given_twice(patterns: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="two routes"):
        Router([row("GET", pattern, "a") for pattern in patterns])


@pytest.mark.parametrize("pattern", ["/{", "/{a", "/a}", "/{a:int}", "/{}"])
def test_a_malformed_pattern_is_an_error_at_start(pattern: str) -> None:
    with pytest.raises(ValueError, match="malformed"):
        Router([row("GET", pattern, "a")])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/llm/models", "list"),
        ("/models", "list"),
        ("/llm/models/llm/models", "model"),
        ("/llmmodels", None),
        ("/llm", None),
        ("/llm/llm/models", None),
        ("/LLM/models", None),
    ],
)
def test_a_root_path_is_taken_off_once_where_it_is_there(path: str, name: str | None) -> None:
    router = Router(ROUTER.routes, "/llm")
    if name is None:
        with pytest.raises(ApiError):
            router.match("GET", path)
        with pytest.raises(ApiError):
            router.allow(path)
    else:
        assert router.match("GET", path)[0].name == name
        assert "GET" in router.allow(path)
    assert router.allow("*") == router.methods
