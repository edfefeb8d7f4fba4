"""The nginx snippet, in a real nginx in front of the real server."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator

import pytest
import requests
from openai import OpenAI

from tests.e2e.process import ROOT, Server

CHAT = [{"role": "user", "content": "Count to twenty in words."}]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def proxy(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an nginx with the snippet, its addresses put to this test's."""
    folder = tmp_path_factory.mktemp("nginx")
    port = free_port()
    snippet = (ROOT / "deploy" / "nginx" / "vserve.conf").read_text()
    snippet, servers = re.subn(r"server 127\.0\.0\.1:8000", f"server 127.0.0.1:{server.port}", snippet)
    snippet, listens = re.subn(r"listen 127\.0\.0\.1:8080", f"listen 127.0.0.1:{port}", snippet)
    assert (servers, listens) == (1, 1)
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"pid {folder}/nginx.pid;\nerror_log {folder}/error.log;\nworker_processes 1;\ndaemon off;\n"
        f"events {{}}\nhttp {{\naccess_log {folder}/access.log;\n{paths}{snippet}}}\n"
        + ("user root;\n" if os.geteuid() == 0 else "")
    )
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    assert program is not None
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    tested = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=30)
    assert tested.returncode == 0, tested.stderr
    process = subprocess.Popen(command)
    try:
        retries = requests.adapters.HTTPAdapter(max_retries=requests.adapters.Retry(connect=20, backoff_factor=0.05))
        with requests.Session() as session:
            session.mount("http://", retries)
            assert session.get(f"http://127.0.0.1:{port}/ping", timeout=10).status_code == 200
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def test_a_stream_passes_through_token_by_token(proxy: str) -> None:
    reply = requests.post(
        f"{proxy}/v1/chat/completions",
        json={"messages": CHAT, "max_tokens": 24, "stream": True, "temperature": 0, "ignore_eos": True},
        stream=True,
        timeout=60,
    )
    assert reply.headers["content-type"].startswith("text/event-stream")
    pieces = [piece for piece in reply.iter_content(chunk_size=None) if piece]
    assert len(pieces) > 8  # a proxy that buffers would hand over one or two
    assert b"".join(pieces).endswith(b"data: [DONE]\n\n")


def test_the_official_client_works_through_it(proxy: str) -> None:
    client = OpenAI(base_url=f"{proxy}/v1", api_key="unused")
    reply = client.chat.completions.create(model="", messages=CHAT, max_tokens=5)  # type: ignore[arg-type]
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 5


def test_a_reply_carries_the_id_that_nginx_gave(proxy: str) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", requests.get(f"{proxy}/version", timeout=10).headers["x-request-id"])
