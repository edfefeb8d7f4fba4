"""No one gets in and nothing leaks: every route is walked without a key, secrets are looked for wherever text goes."""

from __future__ import annotations

import http.client
import json
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import requests

from tests.fakes_api import Stand, standing
from vserve.api.access import Key, digest
from vserve.api.routes import OPEN, Entry, table
from vserve.http.access_log import AccessWriter
from vserve.http.site import AccessEntry

KEY, PROMPT = "sk-the-secret-key", "the-secret-prompt"
OPEN_ROUTES = {"ping", "health", "ready", "live", "startup", "version", "openapi"}
PAGES = {"home", "docs", "oauth2_redirect", "redoc", "page_files"}
"""All that answers without a key: probes, which tell no more than how the server is, its version, its description, and
pages, which are the same for everyone."""

REFUSED = ("AuthenticationError", "authentication_error")
"""In OpenAI's words and in Anthropic's."""


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing(api_keys=(KEY,), rca=True) as running:
        scraper = Key("scraper", digest("sk-metrics"), frozenset({"metrics"}))
        running.call(lambda: running.app.keys.name([scraper]))
        yield running


def entries(stand: Stand) -> tuple[Entry, ...]:
    return stand.call(lambda: table(stand.app))


def ask(stand: Stand, method: str, target: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """The target goes out as it is: no client tidies it up."""
    peer = http.client.HTTPConnection("127.0.0.1", stand.port, timeout=30)
    host = headers.pop("host", "localhost")
    peer.putrequest(method, target, skip_host=True)
    peer.putheader("Host", host)
    for name, value in headers.items():
        peer.putheader(name, value)
    body = b'{"prompt": "x", "text": "x", "tokens": [1]}' if method == "POST" else b""
    if body:
        peer.putheader("Content-Length", str(len(body)))
    peer.endheaders(body or None)
    reply = peer.getresponse()
    content = reply.read()
    peer.close()
    return reply.status, {name.lower(): value for name, value in reply.getheaders()}, content


def test_the_open_routes_are_the_known_ones(stand: Stand) -> None:
    assert {entry.name for entry in entries(stand) if entry.auth == OPEN} == OPEN_ROUTES | PAGES
    assert {entry.name for entry in entries(stand) if entry.page} == PAGES


@pytest.mark.promise("R12", "input: side doors")
def test_every_other_route_answers_401_without_its_key_and_403_without_its_scope(stand: Stand) -> None:
    walked = 0
    for entry in entries(stand):
        for pattern in entry.patterns:
            path = pattern.replace("{id:path}", "a/b").replace("{id}", "a")
            for method in (*entry.methods, *(("HEAD",) if "GET" in entry.methods else ())):
                if entry.auth == OPEN:
                    assert ask(stand, method, path)[0] in (200, 503), path
                    continue
                walked += 1
                for authorization in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
                    status, headers, content = ask(stand, method, path, **authorization)
                    assert status == 401, (method, path)
                    assert headers["www-authenticate"].startswith("Bearer")
                    assert method == "HEAD" or json.loads(content)["error"]["type"] in REFUSED
                if entry.auth != "metrics":
                    assert ask(stand, method, path, Authorization="Bearer sk-metrics")[0] == 403, (method, path)
                assert ask(stand, method, path, Authorization=f"Bearer {KEY}")[0] not in (401, 403), (method, path)
    assert walked > 5


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/v1/models", "/load", "/metrics"])
@pytest.mark.parametrize(
    "change",
    ["/{}", "//{}", "/./{}", "/x/../{}", "/ping/../{}", "/%2e/{}", "/{}/", "/{}%00", "/{}?x=/ping", "/{};/ping",
     "http://localhost/{}", "http://ping/{}?/ping", "/%76%31/../{}", "/PING/../{}"],
)  # fmt: skip
@pytest.mark.promise("R12", "input: paths in Host")
def test_no_spelling_of_a_path_goes_around_the_key(stand: Stand, path: str, change: str) -> None:
    target = change.format(path.removeprefix("/"))
    for method in ("GET", "POST", "HEAD", "PUT"):
        for host in ("localhost", "localhost/ping", "localhost/?x=", "localhost#/ping"):
            status, _, _ = ask(stand, method, target, host=host)
            assert status in (400, 401, 404, 405), (method, target, host, status)


def test_no_header_of_a_proxy_changes_who_the_caller_is(stand: Stand) -> None:
    for name in ("X-Original-URL", "X-Rewrite-URL", "X-Forwarded-For", "X-Forwarded-Host", "X-HTTP-Method-Override"):
        for value in ("/ping", "127.0.0.1", "localhost", "GET"):
            assert ask(stand, "GET", "/v1/models", **{name: value})[0] == 401


@pytest.mark.promise("R12")
def test_no_key_and_no_prompt_is_in_a_log_an_error_or_a_metric(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines: list[str] = []
    with standing(api_keys=(KEY,)) as stand:
        hooks, write = stand.server.site.hooks, AccessWriter(lines.append)
        count = hooks.access_log
        assert count is not None

        def both(entry: AccessEntry) -> None:
            write(entry)
            count(entry)

        stand.call(lambda: setattr(stand.server.site, "hooks", replace(hooks, access_log=both)))
        head = {"Authorization": f"Bearer {KEY}"}
        replies = [
            requests.post(f"{stand.url}/v1/completions", json=body, headers=head, timeout=30)
            for body in (
                {"prompt": PROMPT},
                {"prompt": PROMPT, "stream": True},
                {"prompt": PROMPT * 1000},
                {"prompt": PROMPT, "temperature": 9},
                {"prompt": PROMPT, "stop": ["a"] * 100},
                {"prompt": PROMPT, "timeout_ms": 1},
            )
        ]
        assert [reply.status_code for reply in replies][:4] == [200, 200, 400, 400]
        wrong = {"Authorization": f"Bearer {KEY}x"}
        replies.append(requests.get(f"{stand.url}/v1/models?q={PROMPT}", headers=wrong, timeout=30))
        replies.append(requests.get(f"{stand.url}/nowhere", headers={**head, "X-Request-Id": "mine"}, timeout=30))
        scraped = requests.get(f"{stand.url}/metrics", headers=head, timeout=30).text
    errors = "".join(reply.text for reply in replies if reply.status_code >= 400)
    assert lines
    assert errors
    for text in (caplog.text, "".join(lines), errors, scraped, repr(stand.app.keys.__dict__)):
        assert KEY not in text
        assert PROMPT not in text
    assert all(KEY not in str(reply.headers) for reply in replies)
