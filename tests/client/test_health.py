"""vserve health: each finding, and the exit code a container's probe sees."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.e2e.process import ROOT, Server, environment, serving
from vserve.cli import main
from vserve.client import health
from vserve.errors import StartupError

GOOD: dict[str, tuple[int, object]] = {
    "/health": (200, {"status": "ok"}),
    "/health/ready": (200, {"status": "ok"}),
    "/v1/completions": (200, {"choices": []}),
    "/load": (200, {"kv_blocks_held": 10, "kv_blocks_total": 100}),
}


class Peer(ThreadingHTTPServer):
    """A server that answers each path as it is told; a path without an answer is never answered."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.answers = dict(GOOD)
        self.keys: list[str | None] = []
        self.let_go = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    """One request to Peer."""

    server: Peer

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["authorization"])
        if self.path not in self.server.answers:
            self.server.let_go.wait(60)
            return
        self.rfile.read(int(self.headers["content-length"] or 0))
        status, said = self.server.answers[self.path]
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test's output is for failures."""


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.let_go.set()
    made.shutdown()
    thread.join()
    made.server_close()


def findings(capsys: pytest.CaptureFixture[str], *argv: str, code: int) -> dict[str, dict[str, object]]:
    """The checks of one run, by name."""
    assert health.run([*argv, "--json"], {}) == code
    said = json.loads(capsys.readouterr().out)
    assert said["overall"] is (code == 0)
    checks: dict[str, dict[str, object]] = said["checks"]
    return checks


def test_a_well_server_passes_every_check(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    checks = findings(capsys, "--url", peer.url, "--api-key", "secret", code=0)
    assert list(checks) == ["connectivity", "readiness", "inference_latency", "free_blocks"]
    assert checks["free_blocks"] == {"ok": True, "ratio": 0.9}
    assert set(peer.keys) == {"Bearer secret"}


@pytest.mark.parametrize(
    ("path", "answer", "failed", "error"),
    [
        ("/health", (503, {"status": "unavailable", "phase": "stalled"}), "connectivity", "503: stalled"),
        ("/health/ready", (503, {"phase": "loading weights"}), "readiness", "503: loading weights"),
        ("/v1/completions", (401, {"error": {"message": "no key"}}), "inference_latency", "401: no key"),
        ("/v1/completions", (500, b"<html>"), "inference_latency", "500"),
        ("/load", (200, {"kv_blocks_held": 99, "kv_blocks_total": 100}), "free_blocks", "the least is 5.0%"),
        ("/load", (200, {"queue_size": 0}), "free_blocks", "no model is loaded yet"),
        ("/load", (200, b"not JSON"), "free_blocks", "no model is loaded yet"),
        ("/load", (403, {}), "free_blocks", "403"),
    ],
)
def test_a_check_that_fails_says_why(
    peer: Peer, capsys: pytest.CaptureFixture[str], path: str, answer: tuple[int, object], failed: str, error: str
) -> None:
    peer.answers[path] = answer
    checks = findings(capsys, "--url", peer.url, code=1)
    assert checks[failed]["ok"] is False
    assert checks[failed]["error"] == error
    assert [name for name, found in checks.items() if not found["ok"]] == [failed]


@pytest.mark.parametrize("silent", ["/health", "/health/ready", "/v1/completions", "/load"])
def test_a_server_that_does_not_answer_is_given_up(peer: Peer, capsys: pytest.CaptureFixture[str], silent: str) -> None:
    del peer.answers[silent]
    checks = findings(capsys, "--url", peer.url, "--timeout", "0.2", code=1)
    assert "timed out" in [found.get("error") for found in checks.values()]


def test_the_inference_may_be_left_out_and_its_limit_set(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    assert "inference_latency" not in findings(capsys, "--url", peer.url, "--no-inference", code=0)
    checks = findings(capsys, "--url", peer.url, "--max-latency-ms", "0.000001", code=1)
    assert checks["inference_latency"]["error"] == "the limit is 1e-06 ms"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("http", "127.0.0.1", 8000, "", None)),
        ({"VSERVE_HOST": "0.0.0.0", "VSERVE_PORT": "81"}, ("http", "127.0.0.1", 81, "", None)),
        ({"VSERVE_HOST": "::", "VLLM_PORT": "82"}, ("http", "::1", 82, "", None)),
        ({"VSERVE_HOST": "10.0.0.1", "VSERVE_ROOT_PATH": "/llm/"}, ("http", "10.0.0.1", 8000, "/llm", None)),
        ({"VSERVE_UDS": "/run/v.sock"}, ("http", "127.0.0.1", 8000, "", "/run/v.sock")),
        ({"VSERVE_SSL_CERTFILE": "c.pem"}, ("https", "127.0.0.1", 8000, "", None)),
    ],
)
def test_without_a_url_the_servers_own_settings_are_used(
    environ: dict[str, str], expected: tuple[str, str, int, str, str | None]
) -> None:
    target = health.target_of(health.parser().parse_args([]), environ)
    assert (target.scheme, target.host, target.port, target.prefix, target.uds) == expected


@pytest.mark.parametrize(
    "argv",
    [
        ["--url", "ftp://x"],
        ["--url", "http://x:99999"],
        ["--timeout", "0"],
        ["--timeout", "nan"],
        ["--timeout", "soon"],
        ["--min-free-blocks-ratio", "2"],
        ["--unknown"],
    ],
)
def test_a_flag_that_cannot_be_used_is_one_line_and_exit_code_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["health", *argv]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(StartupError, match="port '80x'"):
        health.run([], {"VSERVE_PORT": "80x"})


def test_the_real_server_is_healthy_as_a_probe_sees_it(server: Server) -> None:
    probe = [sys.executable, "-m", "vserve", "health", "--url", server.url, "--max-latency-ms", "60000"]
    done = subprocess.run(probe, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == [
        "connectivity",
        "readiness",
        "inference_latency",
        "free_blocks",
    ]
    gone = subprocess.run(
        [*probe[:5], f"http://127.0.0.1:{unused_port()}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=60,
    )
    assert gone.returncode == 1
    assert gone.stdout.startswith("  [FAIL] connectivity (")


def test_a_unix_socket_and_a_key_are_found_in_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "v.sock"
    with serving("--uds", str(path), "--api-key", "k1"):
        environ = {**environment(), "VSERVE_UDS": str(path)}
        command = [sys.executable, "-m", "vserve", "health", "--max-latency-ms", "60000"]
        refused = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=60)
        assert refused.returncode == 1
        assert "401" in refused.stdout
        environ["VSERVE_API_KEY"] = "k1"
        assert subprocess.run(command, capture_output=True, cwd=ROOT, env=environ, timeout=60).returncode == 0


def test_nothing_heavy_is_imported() -> None:
    code = "import sys; from vserve.client import health; print({'torch', 'uvloop', 'orjson'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.stdout.strip() == "set()", done.stderr


def unused_port() -> int:
    """A port of the loopback address that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
