"""Peers of others: nginx in front, with kept connections to us and without buffering, and curl with all its habits."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.certificates import certificate
from tests.e2e.process import Server, serving
from tests.e2e.test_life import load, wait_until_idle
from tests.http.test_http_parser import INVALID

CHAT = {"messages": [{"role": "user", "content": "What is the capital of France? Answer with one word."}]}
CONFIG = """
user root; worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  client_max_body_size 0;
  upstream vserve {{ server 127.0.0.1:{upstream}; keepalive 4; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://vserve; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
      proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 300s;
    }}
  }}
}}
"""


@pytest.fixture(scope="module")
def nginx(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an nginx in front of the server."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    folder = tmp_path_factory.mktemp("nginx")
    # nginx takes over a socket that is bound already: no other process can have taken the port in between.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (folder / "nginx.conf").write_text(CONFIG.format(folder=folder, upstream=server.port, port=port))
        process = subprocess.Popen(
            [program, "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")],
            env={"NGINX": f"{listener.fileno()};", "PATH": os.environ["PATH"]},
            pass_fds=[listener.fileno()],
        )
    try:
        assert requests.get(f"http://127.0.0.1:{port}/ping", timeout=30).status_code == 200
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def connections_to(server: Server) -> int:
    """Established connections that the server has."""
    end = f":{server.port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[1].endswith(end) and line[3] == "01" for line in lines)


def aborts(server: Server) -> float:
    text = requests.get(f"{server.url}/metrics", timeout=10).text
    return sum(
        float(n) for n in re.findall(r'^vllm:request_success_total\{.*finished_reason="abort".*\} (\S+)', text, re.M)
    )


def test_nginx_streams_every_event_as_it_is_made_and_the_text_is_ours(server: Server, nginx: str) -> None:
    body = {**CHAT, "temperature": 0, "max_tokens": 20}
    ours = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    with requests.post(
        f"{nginx}/v1/completions",
        json={"prompt": "Once", "max_tokens": 200, "ignore_eos": True, "stream": True},
        stream=True,
        timeout=60,
    ) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = reply.iter_lines()
        assert next(lines).startswith(b"id: ")
        assert next(lines).startswith(b"data: ")
        assert load(server)["server_load"] == 1  # the first event is here and the last one is not made yet
        assert [line for line in lines if line][-1] == b"data: [DONE]"
    with requests.post(f"{nginx}/v1/chat/completions", json={**body, "stream": True}, stream=True, timeout=60) as reply:
        events = [line.removeprefix(b"data: ") for line in reply.iter_lines() if line.startswith(b"data: ")]
    said = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert "".join(said) == ours["choices"][0]["message"]["content"]


def test_nginx_keeps_its_connections_to_us_errors_included(server: Server, nginx: str) -> None:
    wait_until_idle(server)
    requests.get(f"{nginx}/ping", timeout=30)
    before = connections_to(server)
    for _ in range(5):
        assert requests.get(f"{nginx}/health", timeout=30).status_code == 200
        assert requests.post(f"{nginx}/v1/completions", data=b"{", timeout=30).status_code == 400
        assert requests.get(f"{nginx}/nowhere", timeout=30).status_code == 404
        assert requests.head(f"{nginx}/v1/models", timeout=30).status_code == 200
        assert requests.options(f"{nginx}/v1/models", timeout=30).headers["allow"] == "GET, HEAD, OPTIONS"
    assert connections_to(server) <= max(before, 1)


def test_a_large_upload_through_nginx_is_read_or_refused_with_its_status(server: Server, nginx: str) -> None:
    def chunks(mib: int) -> Iterator[bytes]:
        yield b'{"prompt": "x", "max_tokens": 1, "user": "'
        for _ in range(mib * 16):
            yield b"a" * (1 << 16)
        yield b'"}'

    for mib, status in ((16, 400), (48, 413)):  # user is too long; the body is too long
        known = b"".join(chunks(mib))
        assert requests.post(f"{nginx}/v1/completions", data=known, timeout=60).status_code == status
        assert requests.post(f"{nginx}/v1/completions", data=chunks(mib), timeout=60).status_code == status
    wait_until_idle(server)


@pytest.mark.promise("R2")
def test_a_client_that_leaves_nginx_frees_its_pages_and_counts_as_abort(server: Server, nginx: str) -> None:
    before = aborts(server)
    for stream in (True, False):
        peer = http.client.HTTPConnection(nginx.removeprefix("http://"), timeout=60)
        body = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True, "stream": stream}
        peer.request("POST", "/v1/completions", json.dumps(body))
        if stream:
            assert peer.getresponse().read(10)
        while load(server)["kv_blocks_held"] == 0:
            pass
        peer.close()
        wait_until_idle(server)
    for _ in range(5000):
        if aborts(server) == before + 2:
            break
    assert aborts(server) == before + 2


def curl(*arguments: str, data: bytes | None = None) -> str:
    """What curl prints: -v goes to stdout as well."""
    command = ["curl", "--silent", "--show-error", "--max-time", "60", "--stderr", "-"]
    command += [*JSON, *arguments]
    done = subprocess.run(command, capture_output=True, input=data, timeout=90)
    assert done.returncode == 0, (arguments, done.stdout)
    return done.stdout.decode()


JSON = ["-H", "Content-Type: application/json"]
BODY = json.dumps({"prompt": "The three primary colours are", "max_tokens": 8, "temperature": 0})
STREAM = json.dumps({**json.loads(BODY), "stream": True, "max_tokens": 60})


def test_curl_reads_a_stream_over_1_0_up_to_the_end_of_the_connection(server: Server) -> None:
    text = curl("-0", "-i", "-N", f"{server.url}/v1/completions", "-d", STREAM)
    assert text.startswith("HTTP/1.1 200 ")
    assert "transfer-encoding" not in text.lower()
    assert "connection: close" in text.lower()
    assert text.endswith("data: [DONE]\n\n")
    whole = curl("-0", f"{server.url}/v1/completions", "-d", BODY)
    assert json.loads(whole)["usage"]["completion_tokens"] == 8


def test_curl_uploads_in_chunks_and_waits_for_continue(server: Server) -> None:
    url = f"{server.url}/v1/completions"
    plain = json.loads(curl(url, "-d", BODY))["choices"]
    chunked = curl("-v", "-H", "Transfer-Encoding: chunked", "-d", "@-", url, data=BODY.encode())
    assert "> Transfer-Encoding: chunked" in chunked
    assert json.dumps(plain[0]["text"])[1:-1] in chunked
    waited = curl("-v", "-H", "Expect: 100-continue", "--expect100-timeout", "30", "-d", BODY, url)
    assert "< HTTP/1.1 100 Continue" in waited
    assert "< HTTP/1.1 200 OK" in waited
    refused = curl("-v", "-H", "Expect: 100-continue", "--expect100-timeout", "30", "-d", BODY, f"{server.url}/nowhere")
    assert "100 Continue" not in refused
    assert "< HTTP/1.1 404 " in refused
    assert "< HTTP/1.1 417 " in curl("-v", "-H", "Expect: gold", "-d", BODY, url)


def test_curl_uses_one_connection_for_many_requests_and_understands_head_and_options(server: Server) -> None:
    urls = [f"{server.url}{path}" for path in ("/ping", "/v1/models", "/nowhere", "/health")]
    assert curl("-v", *urls).count("Re-using existing connection") == 3
    head = curl("-I", f"{server.url}/v1/models").lower()
    assert head.startswith("http/1.1 200 ")
    assert int(re.findall(r"content-length: (\d+)", head)[0]) > 0
    assert "allow: get, head, options" in curl("-i", "-X", "OPTIONS", f"{server.url}/v1/models").lower()
    assert curl("-i", "-X", "OPTIONS", "--request-target", "*", server.url).startswith("HTTP/1.1 204 ")
    assert curl("-o", "-", "-w", "%{http_code}", "--request-target", "http://x.org/ping", server.url) == "200"
    assert "HTTP/1.1 200" in curl("-i", "-H", "Connection: Upgrade", "-H", "Upgrade: h2c", f"{server.url}/ping")


@contextmanager
def private(tmp_path: Path) -> Iterator[tuple[Server, list[str]]]:
    """A server on a Unix socket with TLS and client certificates, run by python -O, and curl's words to reach it."""
    cert, key = certificate(tmp_path, "server")
    client, client_key = certificate(tmp_path, "client")
    uds = str(tmp_path / "socket")
    flags = ["--uds", uds, "--ssl-certfile", cert, "--ssl-keyfile", key, "--ssl-ca-certs", client]
    with serving(*flags, "--max-model-len", "256", program=("-O", "-m", "vserve")) as server:
        words = ["--unix-socket", uds, "--cacert", cert, "--cert", client, "--key", client_key]
        yield server, words


@pytest.mark.promise("fault: signals under load")
def test_curl_needs_its_certificate_on_a_unix_socket_and_no_rule_is_an_assert(tmp_path: Path) -> None:
    with private(tmp_path) as (server, words):
        reply = json.loads(curl(*words, "https://localhost/v1/completions", "-d", BODY))
        assert reply["usage"]["completion_tokens"] == 8
        with subprocess.Popen(
            ["curl", "-sN", "--max-time", "60", *words, "https://localhost/v1/completions", "-d", STREAM, *JSON],
            stdout=subprocess.PIPE,
        ) as stream:
            assert stream.stdout is not None
            assert stream.stdout.readline().startswith(b"id: ")
            for _ in range(3):  # new certificates are read while a stream runs on the old ones
                server.process.send_signal(signal.SIGHUP)
                curl(*words, "https://localhost/ping")
            assert stream.stdout.read().endswith(b"data: [DONE]\n\n")
        anonymous = subprocess.run(
            ["curl", "-s", "--max-time", "60", *words[:4], "https://localhost/ping"], capture_output=True, timeout=90
        )
        assert anonymous.returncode != 0
        # python -O removes every assert: what must be refused is refused all the same.
        for body, named in (
            ({"prompt": [10**9]}, "prompt"),
            ({"prompt": [-1]}, "prompt"),
            ({"prompt": "x", "n": 0}, "n"),
            ({"prompt": "x", "max_tokens": 10**6}, "max_tokens"),
            ({"prompt": "x", "logit_bias": {"999999": 1}}, "logit_bias"),
            ({"prompt": "x", "stop_token_ids": [10**9]}, "stop_token_ids"),
            ({"prompt": "x" * 5000}, "256"),
            ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ):
            answer = curl(*words, "-w", "%{http_code}", "https://localhost/v1/completions", "-d", json.dumps(body))
            assert answer.endswith("400"), body
            assert named in answer
        assert curl(*words, "-o", "-", "-w", "%{http_code}", "https://localhost/health").endswith("200")
        assert server.terminate() == 0
    assert not (tmp_path / "socket").exists()


SMALL_ONLY = {"line too long", "fields too long", "too many fields", "length too large", "chunk line too long"}


@pytest.mark.promise("R10")
def test_the_real_server_refuses_the_wire_table_and_closes(server: Server) -> None:
    wanted = {name: case for name, case in INVALID.items() if case[1] in (400, 501, 505) and name not in SMALL_ONLY}
    wanted.pop("extensions too long")  # its bound is a small one too
    for name, (data, status) in wanted.items():
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as peer:
            peer.sendall(data + b"\r\nGET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
            got = b""
            try:
                while part := peer.recv(1 << 16):
                    got += part
            except ConnectionResetError:
                pass
        if b"Transfer-Encoding: chunked" in data or b"Content-Length: " in data:
            # The head is whole and / takes no POST: that is said before the content is looked at.
            assert re.match(rb"HTTP/1\.1 (404|405|%d) " % status, got), (name, got)
        else:
            assert got.startswith(b"HTTP/1.1 %d " % status), (name, got)
        assert len(re.findall(rb"HTTP/1\.1 \d{3} ", got)) == 1, (name, got)
        assert b"connection: close" in got.lower(), name
    assert requests.get(f"{server.url}/health", timeout=10).status_code == 200
