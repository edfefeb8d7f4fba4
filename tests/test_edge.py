"""The edge as flags have it: what ends the start, what a reload changes and what it keeps."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.certificates import certificate
from vserve.api.access import Keys
from vserve.edge import Edge, limits, root_path
from vserve.errors import StartupError, Unauthorized
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
