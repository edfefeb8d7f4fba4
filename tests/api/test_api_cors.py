"""CORS: closed by default, on every reply once opened, never '*' with credentials."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import requests

from tests.fakes_api import standing
from vserve.api.cors import ASKED_LIMIT, Cors
from vserve.errors import StartupError
from vserve.http.events import Headers

PAGE = "https://app.example"


@dataclass(frozen=True)
class Head:
    method: str
    headers: Headers


def ask(cors: Cors, method: str = "GET", **fields: str) -> list[tuple[str, str]]:
    pairs = [(name.replace("_", "-"), value) for name, value in fields.items()]
    return list(cors(Head(method, Headers(pairs))))


def made(
    *origins: str,
    methods: tuple[str, ...] = ("GET", "POST"),
    headers: tuple[str, ...] = ("*",),
    credentials: bool = False,
) -> Cors:
    return Cors(origins, methods, headers, credentials=credentials)


def test_a_listed_origin_is_named_and_others_are_not() -> None:
    cors = made(PAGE, "http://LocalHost:3000")
    assert ("access-control-allow-origin", PAGE) in ask(cors, origin=PAGE)
    assert ("access-control-allow-origin", "http://localhost:3000") in ask(cors, origin="http://localhost:3000")
    for other in (None, "https://evil.example", "null", "*", PAGE + ".evil", f"{PAGE}, {PAGE}", PAGE + ":444", ""):
        assert ask(cors, **({} if other is None else {"origin": other})) == [("vary", "Origin")]


def test_any_origin_gets_a_star_that_does_not_vary() -> None:
    fields = dict(ask(made("*"), origin="https://who.ever"))
    assert fields["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in fields
    assert "vary" not in fields


def test_credentials_name_the_origin() -> None:
    fields = dict(ask(made(PAGE, credentials=True), origin=PAGE))
    assert fields["access-control-allow-origin"] == PAGE
    assert fields["access-control-allow-credentials"] == "true"
    assert fields["vary"] == "Origin"


@pytest.mark.parametrize(
    ("allowed", "asked", "replied"),
    [
        (("authorization", "content-type"), "x-other", "authorization, content-type"),
        (("*",), "authorization,x-stainless-os", "authorization, x-stainless-os"),
        (("*",), None, None),
        (("*",), "a b", None),
        (("*",), "a,,b", None),
        (("*",), "a" * (ASKED_LIMIT + 1), None),
    ],
)
def test_a_preflight_says_which_methods_and_fields(
    allowed: tuple[str, ...], asked: str | None, replied: str | None
) -> None:
    cors = made(PAGE, headers=allowed)
    more = {} if asked is None else {"access_control_request_headers": asked}
    fields = ask(cors, "OPTIONS", origin=PAGE, access_control_request_method="POST", **more)
    assert dict(fields).get("access-control-allow-headers") == replied
    assert dict(fields)["access-control-allow-methods"] == "GET, POST"
    assert int(dict(fields)["access-control-max-age"]) > 0
    assert (("vary", "Access-Control-Request-Headers") in fields) == (allowed == ("*",))


def test_any_method_is_the_one_asked_for() -> None:
    fields = ask(made("*", methods=("*",)), "OPTIONS", origin=PAGE, access_control_request_method="PUT")
    assert dict(fields)["access-control-allow-methods"] == "PUT"


@pytest.mark.parametrize(
    ("origins", "methods", "headers", "credentials", "said"),
    [
        (("*",), (), (), True, "cannot go with --allow-credentials"),
        ((PAGE, "*"), (), (), True, "cannot go with --allow-credentials"),
        ((PAGE + "/",), (), (), False, "--allowed-origins"),
        (("app.example",), (), (), False, "--allowed-origins"),
        (("https://*.example",), (), (), False, "--allowed-origins"),
        (("null",), (), (), False, "--allowed-origins"),
        ((PAGE + "\r\nx: y",), (), (), False, "--allowed-origins"),
        ((PAGE,), ("GET POST",), (), False, "--allowed-methods"),
        ((PAGE,), (), ("a:b",), False, "--allowed-headers"),
    ],
)
def test_what_cannot_be_meant_ends_the_start(
    origins: tuple[str, ...], methods: tuple[str, ...], headers: tuple[str, ...], credentials: bool, said: str
) -> None:
    with pytest.raises(StartupError, match=said):
        Cors(origins, methods, headers, credentials=credentials)


def test_preflights_need_no_key_and_errors_carry_the_fields() -> None:
    with standing(api_keys=("right",), reply_headers=made(PAGE)) as stand:
        url = f"{stand.url}/v1/chat/completions"
        asking = {"origin": PAGE, "access-control-request-method": "POST"}
        preflight = requests.options(url, headers=asking, timeout=10)
        assert (preflight.status_code, preflight.content) == (204, b"")
        assert preflight.headers["access-control-allow-origin"] == PAGE
        for path in ("/v1/chat/completions", "/nowhere"):
            reply = stand.post(path, {}, origin=PAGE)
            assert reply.status_code in (401, 404)
            assert reply.headers["access-control-allow-origin"] == PAGE
            assert reply.headers["vary"] == "Origin"
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
        stream = stand.post("/v1/chat/completions", body, origin=PAGE, authorization="Bearer right")
        assert (stream.status_code, stream.headers["access-control-allow-origin"]) == (200, PAGE)
        assert "x-request-id" in stream.headers["access-control-expose-headers"]
        assert "access-control-allow-origin" not in stand.post("/nowhere", {}, origin="https://evil.example").headers


def test_without_the_flag_no_reply_mentions_it() -> None:
    with standing() as stand:
        reply = requests.get(f"{stand.url}/ping", headers={"origin": PAGE}, timeout=10)
        assert not [name for name in reply.headers if name.lower().startswith("access-control") or name == "vary"]
