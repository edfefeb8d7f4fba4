"""The edge as flags have it: what ends the start, what a reload changes and what it keeps."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path

import pytest
import uvloop

from tests.certificates import certificate
from vserve.api.access import Keys
from vserve.edge import Edge, flow, limits, root_path
from vserve.errors import StartupError, Unauthorized, Unavailable
from vserve.http.limits import Limits
from vserve.settings import parse


def made(*argv: str, keys: Keys | None = None) -> Edge:
    return Edge(parse(argv, {}), keys if keys is not None else Keys())


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "vserve"]
    caplog.clear()
    return found


def test_nothing_is_there_that_was_not_asked_for() -> None:
    edge = made()
    assert (edge.ssl_context, edge.cors, edge.access_log) == (None, None, None)
    assert limits(parse((), {})) == Limits()
    assert root_path(parse((), {})) == ""


@pytest.mark.parametrize(
    ("flag", "value", "field", "expected"),
    [
        ("--header-timeout", "1.5", "header_s", 1.5),
        ("--body-timeout", "2", "body_idle_s", 2.0),
        ("--body-total-timeout", "3", "body_total_s", 3.0),
        ("--keep-alive-timeout", "4", "keep_alive_s", 4.0),
        ("--write-timeout", "5", "write_stall_s", 5.0),
        ("--max-connections", "6", "connections", 6),
        ("--max-connections-per-address", "7", "connections_per_address", 7),
        ("--body-limit", "8KiB", "body_bytes", 8192),
        ("--max-bytes-in-flight", "64MiB", "in_flight_bytes", 64 * 2**20),
        ("--max-pipelined", "7", "pipelined_requests", 7),
        ("--max-request-line-bytes", "2KiB", "request_line_bytes", 2048),
        ("--max-header-bytes", "4096", "header_bytes", 4096),
        ("--max-header-fields", "9", "header_count", 9),
        ("--tls-handshake-timeout", "2.5", "tls_handshake_s", 2.5),
    ],
)
def test_each_bound_has_a_flag(flag: str, value: str, field: str, expected: object) -> None:
    assert getattr(limits(parse((flag, value), {})), field) == expected


def test_the_clients_of_a_unix_socket_are_not_one_address() -> None:
    config = parse(("--uds", "/tmp/socket", "--max-connections-per-address", "7"), {})
    assert limits(config).connections_per_address is None


@pytest.mark.parametrize(
    ("given", "taken"), [("", ""), ("/", ""), ("/llm", "/llm"), ("/llm/", "/llm"), ("/a/b", "/a/b")]
)
def test_a_root_path_is_a_path(given: str, taken: str) -> None:
    assert root_path(parse(("--root-path", given), {})) == taken


@pytest.mark.parametrize("given", ["llm", "//llm", "/a//b", "/a?b", "/a b", "/%61", "http://a/b"])
def test_a_root_path_that_no_path_begins_with_ends_the_start(given: str) -> None:
    with pytest.raises(StartupError, match="--root-path"):
        root_path(parse(("--root-path", given), {}))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--api-key-file", "/missing/keys"), "--api-key-file /missing/keys: No such file"),
        (("--ssl-certfile", "/missing/cert"), "--ssl-certfile /missing/cert: No such file"),
        (("--ssl-keyfile", "k"), "--ssl-keyfile needs --ssl-certfile"),
        (("--ssl-ca-certs", "c"), "--ssl-ca-certs needs --ssl-certfile"),
        (("--allowed-origins", "*", "--allow-credentials"), "cannot go with --allow-credentials"),
        (("--allowed-origins", "https://a,b"), "--allowed-origins: 'b'"),
    ],
)
def test_what_cannot_be_used_ends_the_start_with_one_line(argv: tuple[str, ...], said: str) -> None:
    with pytest.raises(StartupError) as caught:
        made(*argv)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reload_brings_new_keys_and_a_bad_file_keeps_the_old(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file, keys = tmp_path / "keys.toml", Keys(["plain"])
    file.write_text("[keys.a]\nkey = 'one'\n")
    edge = made("--api-key-file", str(file), keys=keys)
    salt = keys.salt("Bearer one")
    file.write_text("[keys.a]\nkey = 'two'\n")
    edge.reload()
    assert lines(caplog) == ["reloaded 1 API keys"]
    assert keys.salt("Bearer two") == salt
    for bad in ("", "garbage", "[keys.a]\nkey = 'plain'\n", "[keys.a]\nkey = 'two'\n[keys.b]\nkey = 'two'\n"):
        file.write_text(bad)
        edge.reload()
        (line,) = lines(caplog)
        assert line.startswith("the API keys stay as they were: ")
        assert "\n" not in line
        assert keys.salt("Bearer two") == salt
        assert keys.check("Bearer plain", "infer") is not None
        with pytest.raises(Unauthorized):
            keys.check("Bearer one", "infer")
    file.unlink()
    edge.reload()
    assert len(lines(caplog)) == 1
    assert keys.salt("Bearer two") == salt


def test_keys_and_certificate_are_reloaded_each_on_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cert, key = certificate(tmp_path, "one")
    file = tmp_path / "keys.toml"
    file.write_text("[keys.a]\nkey = 'one'\n")
    edge = made("--api-key-file", str(file), "--ssl-certfile", cert, "--ssl-keyfile", key)
    context = edge.ssl_context
    Path(cert).write_text("garbage")
    edge.reload()
    assert [line.split(":")[0] for line in lines(caplog)] == ["reloaded 1 API keys", "the certificate stays as it was"]
    assert edge.ssl_context is context


def test_a_hangup_with_nothing_to_read_again_is_one_line_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    edge = made()

    async def hang_up() -> None:
        handled, loop = asyncio.Event(), asyncio.get_running_loop()
        edge.watch(loop)
        signal.raise_signal(signal.SIGHUP)
        loop.add_signal_handler(signal.SIGUSR2, handled.set)  # handled behind the first: signals are told in order
        signal.raise_signal(signal.SIGUSR2)
        await asyncio.wait_for(handled.wait(), 10)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(hang_up())
    assert lines(caplog) == ["SIGHUP: there is neither an --api-key-file nor an --ssl-certfile to read again"]


ISSUER = ("--oauth2-issuer", "https://sso.example", "--oauth2-audience", "vserve")


def test_an_issuer_is_asked_only_once_the_server_runs_and_its_tokens_are_then_trusted() -> None:
    keys = Keys()
    assert not keys.guards("infer")
    edge = made(*ISSUER, keys=keys)
    assert keys.guards("infer")
    assert not keys.guards("metrics")
    with pytest.raises(Unavailable):
        keys.check("Bearer a.b.c", "infer")
    edge.stop()
    other = Keys()
    made(*ISSUER, "--oauth2-scopes", "read=infer,watch=metrics", keys=other).stop()
    assert other.guards("metrics")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (ISSUER[:2], "--oauth2-issuer needs --oauth2-audience"),
        (ISSUER[2:], "--oauth2-audience needs --oauth2-issuer"),
        (("--oauth2-jwks-url", "https://sso.example/jwks"), "--oauth2-jwks-url needs --oauth2-issuer"),
        (("--oauth2-issuer", "http://sso.example", *ISSUER[2:]), "--oauth2-issuer: 'http://sso.example' is not"),
        ((*ISSUER, "--oauth2-jwks-url", "file:///etc/passwd"), "--oauth2-jwks-url: 'file:///etc/passwd' is not"),
        ((*ISSUER, "--oauth2-scopes", "read=root"), "--oauth2-scopes: 'read=root' is not"),
        (("--oauth2-quotas", "tokens_per_day=9"), "--oauth2-quotas needs --oauth2-issuer"),
        ((*ISSUER, "--oauth2-quotas", "tokens_per_year=9"), "--oauth2-quotas: 'tokens_per_year=9' is not NAME=NUMBER"),
        ((*ISSUER, "--oauth2-quotas", "tokens_per_day"), "--oauth2-quotas: 'tokens_per_day' is not NAME=NUMBER"),
        ((*ISSUER, "--oauth2-quotas", "tokens_per_day=1,tokens_per_day=2"), "--oauth2-quotas: 'tokens_per_day=2' is"),
        ((*ISSUER, "--oauth2-quotas", "tokens_per_day=0"), "--oauth2-quotas: tokens_per_day must be a whole number"),
        ((*ISSUER, "--oauth2-quotas", "requests_per_minute=0"), "--oauth2-quotas: requests_per_minute must be a"),
    ],
)
def test_flags_that_make_no_issuer_end_the_start(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(StartupError) as caught:
        made(*flags)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--oauth2-token-url", "https://sso.example/t"),
            "--oauth2-authorization-url and --oauth2-token-url go together",
        ),
        (
            ("--oauth2-authorization-url", "https://a.example", "--oauth2-token-url", "https://a.example"),
            "--oauth2-authorization-url needs --oauth2-issuer",
        ),
        (
            (*ISSUER, "--oauth2-authorization-url", "javascript:x", "--oauth2-token-url", "https://a.example"),
            "--oauth2-authorization-url: 'javascript:x' is not",
        ),
    ],
)
def test_flags_that_make_no_flow_end_the_start(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(StartupError) as caught:
        flow(parse(flags, {}))
    assert str(caught.value).startswith(said)


def test_the_flow_is_what_the_flags_say() -> None:
    assert flow(parse(ISSUER, {})) is None
    urls = ("--oauth2-authorization-url", "https://a.example/a", "--oauth2-token-url", "https://a.example/t")
    found = flow(parse((*ISSUER, *urls), {}))
    assert found is not None
    assert (found.authorization_url, found.token_url) == ("https://a.example/a", "https://a.example/t")
    assert found.grants.opens.keys() == {"infer", "admin"}


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jwt", "vserve.oauth.issuer", "vserve.oauth.tokens"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "jwt", None)
    with pytest.raises(StartupError, match=r"pip install 'vserve\[oauth\]'"):
        made(*ISSUER)
