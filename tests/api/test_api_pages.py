"""The pages: served whole or compressed, kept by browsers, bound to this server, and gone where docs are."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from urllib.parse import urljoin

import pytest
import requests

from tests.fakes_api import Stand, standing
from vserve.api.access import SCOPES
from vserve.api.app import Options
from vserve.api.assets import Asset
from vserve.api.pages import FILES, FOLDER
from vserve.http.limits import Limits
from vserve.oauth.grants import Flow, Grants

PAGES = ["/", "/docs", "/docs/oauth2-redirect", "/redoc"]
ALL = [*PAGES, *(FOLDER + name for name in FILES)]
TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "txt": "text/plain"}


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing() as running:
        yield running


def raw(stand: Stand, path: str, method: str = "GET", **headers: str) -> tuple[requests.Response, bytes]:
    """The reply and its content as it was sent."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    reply = requests.request(
        method, stand.url + path, headers={"accept-encoding": "", **fields}, stream=True, timeout=30
    )
    return reply, reply.raw.read(decode_content=False)


@pytest.mark.parametrize("path", ALL)
def test_a_file_is_the_same_compressed_and_whole(stand: Stand, path: str) -> None:
    packed, data = raw(stand, path, accept_encoding="br, gzip;q=0.8")
    whole, content = raw(stand, path)
    assert (packed.status_code, whole.status_code) == (200, 200)
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in whole.headers
    assert gzip.decompress(data) == content
    assert len(content) > 10
    kind = whole.headers["content-type"].partition(";")[0]
    assert kind == packed.headers["content-type"].partition(";")[0]
    assert kind == TYPES.get(path.rpartition(".")[2], "text/html")
    assert {packed.headers["vary"], whole.headers["vary"]} == {"accept-encoding"}
    assert packed.headers["etag"] != whole.headers["etag"]


@pytest.mark.parametrize("accept", ["gzip", "*", "deflate, GZIP", "x-gzip"])
def test_a_client_that_reads_gzip_gets_it(stand: Stand, accept: str) -> None:
    assert raw(stand, "/", accept_encoding=accept)[0].headers["content-encoding"] == "gzip"


@pytest.mark.parametrize("accept", ["", "identity", "br", "gzip;q=0", "gzip;q=0.0, *", "deflate;q=1, *;q=0"])
def test_a_client_that_does_not_gets_it_whole(stand: Stand, accept: str) -> None:
    assert "content-encoding" not in raw(stand, "/", accept_encoding=accept)[0].headers


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize("encoding", ["gzip", "identity"])
def test_a_browser_that_has_a_file_is_not_sent_it_again(stand: Stand, path: str, encoding: str) -> None:
    first, data = raw(stand, path, accept_encoding=encoding)
    etag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    again, nothing = raw(stand, path, accept_encoding=encoding, if_none_match=f'"other", W/{etag}')
    assert (again.status_code, nothing, again.headers["etag"]) == (304, b"", etag)
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    head, nothing = raw(stand, path, "HEAD", accept_encoding=encoding)
    assert (head.status_code, nothing) == (200, b"")
    assert head.headers["content-length"] == first.headers["content-length"] == str(len(data))
    other, _ = raw(stand, path, accept_encoding=encoding, if_none_match='"other"')
    assert other.status_code == 200


@pytest.mark.parametrize("path", ALL)
def test_a_page_may_use_this_server_and_nothing_else(stand: Stand, path: str) -> None:
    headers = stand.get(path).headers
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert "//" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("prefix", ["", "/llm"])
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_is_there_under_any_prefix(stand: Stand, page: str, prefix: str) -> None:
    html = stand.get(page).text
    links = re.findall(r'(?:href|src)="([^"]*)"', html)
    assert links
    assert not re.search(r"<script(?![^>]* src=)", html)  # nothing inline
    assert not re.search(r"<style| style=| on\w+=", html)
    for link in links:
        target = urljoin(f"http://proxy{prefix}{page}", link)
        assert target.startswith(f"http://proxy{prefix}/"), link
        path = target.removeprefix(f"http://proxy{prefix}")
        assert stand.get(path).status_code == 200, link


def test_the_home_page_says_whether_there_are_keys() -> None:
    with standing() as free, standing(api_keys=("k",)) as guarded:
        assert "data-guarded=no" in free.get("/").text
        assert "data-guarded=yes" in guarded.get("/").text
        etag = free.get("/").headers["etag"]
        assert guarded.get("/", if_none_match=etag).status_code == 200


def test_pages_are_there_before_the_model_and_gone_without_docs() -> None:
    with standing(ready=False) as starting:
        assert all(starting.get(path).status_code == 200 for path in ALL)
    with standing(docs=False) as bare:
        assert all(bare.get(path).status_code == 404 for path in ALL)


def test_pages_are_not_answered_beyond_the_limit_of_connections() -> None:
    with standing(limits=Limits(connections=1)) as full, requests.Session() as session:
        assert session.get(f"{full.url}/ping", timeout=30).status_code == 200  # and the connection stays
        assert full.get("/ping").status_code == 200
        assert full.get("/docs").status_code == 503


def test_swagger_ui_may_fetch_a_token_of_the_issuer_and_redoc_may_not() -> None:
    grants = Grants.parse(["infer"], SCOPES)
    flow = Flow("https://sso.example:8443/a", "https://token.example:444/realm/token?x=1", grants)
    with standing(oauth2=flow) as stand:
        assert "connect-src 'self' https://token.example:444;" in stand.get("/docs").headers["content-security-policy"]
        for path in ("/", "/redoc", "/docs/oauth2-redirect"):
            assert "example" not in stand.get(path).headers["content-security-policy"]


def test_the_package_holds_what_is_served_and_nothing_else() -> None:
    folder = resources.files("vserve.api") / "static"
    held = {item.name.removesuffix(".gz") for item in folder.iterdir()}
    assert held == {*FILES, "home.html", "swagger.html", "redirect.html", "redoc.html"}
    assert all(Asset.read(name).content for name in held)


def test_licences_of_others_are_there() -> None:
    text = Asset.read("LICENSES.txt").content.decode()
    for words in ("Apache License", "SmartBear", "Rebilly", "Permission is hereby granted", "React"):
        assert words in text


def test_what_others_wrote_calls_no_one() -> None:
    redoc = Asset.read("redoc.standalone.js").content.decode()
    assert "cdn.redoc.ly" not in redoc
    assert not re.search(r"fonts\.(googleapis|gstatic)", redoc)


def test_docs_are_on_by_default() -> None:
    assert Options(version="1").docs
    assert (Path(__file__).parents[2] / "deploy" / "assets.sh").exists()
