"""The life of the process: start, refusals to start, disconnects, drain and exit codes."""

from __future__ import annotations

import json
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.e2e.process import ROOT, Server, environment, serving


def ask(server: Server, prompt: str, tokens: int) -> str:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    reply = requests.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def load(server: Server) -> dict[str, float]:
    return dict(requests.get(f"{server.url}/load", timeout=10).json())


def wait_until_idle(server: Server) -> None:
    """Poll /load (each poll a round trip, so nothing spins) until nothing runs, waits or is held; bounded."""
    for _ in range(20_000):
        now = load(server)
        if now["server_load"] == now["queue_size"] == now["kv_blocks_held"] == 0:
            return
    raise AssertionError(f"still busy: {now}")


def hang_up(server: Server, rng: random.Random) -> None:
    """Send a request and close, or reset, after a random number of bytes each way."""
    body = json.dumps(
        {"prompt": "once upon a time " * rng.randint(1, 40), "max_tokens": 64, "stream": rng.random() < 0.5}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    message = head + body
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as peer:
        whole = rng.random() < 0.8
        peer.sendall(message if whole else message[: rng.randrange(len(message))])
        if whole and rng.random() < 0.5:
            peer.recv(rng.randint(1, 2000))
        if rng.random() < 0.5:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


@pytest.mark.promise("R2", "fault: disconnect anywhere")
def test_200_disconnects_leave_no_page_held_and_the_next_answer_right(server: Server) -> None:
    before = ask(server, "The three primary colours are", 16)
    rng = random.Random(7)
    seeds = [rng.random() for _ in range(200)]

    def client(mine: list[float]) -> None:
        for seed in mine:
            hang_up(server, random.Random(seed))

    threads = [threading.Thread(target=client, args=(seeds[start::8],)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until_idle(server)
    assert ask(server, "The three primary colours are", 16) == before


def test_the_welcome_names_address_model_time_and_a_line_to_try(server: Server) -> None:
    text = "".join(server.out)
    assert server.url in text
    assert "SmolLM2-135M-Instruct" in text
    assert "ready" in text
    assert "curl" in text


@pytest.mark.promise("R6")
def test_sigterm_lets_a_stream_finish_and_exits_0() -> None:
    with serving("--served-model-name", "alias", "--max-model-len", "512") as server:
        assert requests.get(f"{server.url}/v1/models", timeout=10).json()["data"][0]["id"] == "alias"
        body = {"prompt": "Once upon a time", "max_tokens": 200, "stream": True, "ignore_eos": True}
        with requests.post(f"{server.url}/v1/completions", json=body, stream=True, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith(b"data: ")]
        assert rest[-1] == b"data: [DONE]"
        assert json.loads(rest[-2].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(30) == 0


@pytest.mark.promise("R6")
def test_a_second_signal_stops_at_once() -> None:
    with serving("--drain-timeout", "600") as server:
        body = {"prompt": "Once upon a time", "max_tokens": 8000, "stream": True, "ignore_eos": True}
        with requests.post(f"{server.url}/v1/completions", json=body, stream=True, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            while requests.get(f"{server.url}/health/ready", timeout=10).status_code == 200:
                pass
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith(b"data: ")]
        assert rest[-1] == b"data: [DONE]"
        assert "error" in json.loads(rest[-2].removeprefix(b"data: "))
        assert server.process.wait(30) == 0


def begin(server: Server, tokens: int) -> tuple[requests.Response, Iterator[bytes]]:
    """A stream that has begun, and its lines."""
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    reply = requests.post(f"{server.url}/v1/completions", json=body, stream=True, timeout=60)
    lines: Iterator[bytes] = reply.iter_lines()
    next(lines)
    return reply, lines


@pytest.mark.promise("R6")
def test_while_draining_newcomers_are_told_to_go_elsewhere_and_a_stream_still_finishes() -> None:
    # A busy machine may take longer over 600 tokens than the usual time to drain.
    with serving("--max-model-len", "1024", "--drain-timeout", "600") as server:
        reply, lines = begin(server, 600)
        idle = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        server.process.send_signal(signal.SIGTERM)
        with reply:
            while requests.get(f"{server.url}/health", timeout=10).status_code == 200:
                pass
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
                late = requests.post(f"{server.url}{path}", json={"prompt": "x", "messages": []}, timeout=10)
                assert late.status_code == 503
                assert int(late.headers["retry-after"]) >= 1
                assert late.headers["connection"] == "close"
                assert "shutting down" in late.json()["error"]["message"]
            ready = requests.get(f"{server.url}/health/ready", timeout=10)
            assert (ready.status_code, ready.json()["phase"]) == (503, "draining")
            assert requests.get(f"{server.url}/ping", timeout=10).status_code == 200
            assert requests.get(f"{server.url}/livez", timeout=10).status_code == 200
            assert idle.recv(1) == b""  # a connection without a request is closed at once
            idle.close()
            rest = [line for line in lines if line.startswith(b"data: ")]
        assert rest[-1] == b"data: [DONE]"
        assert json.loads(rest[-2].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(30) == 0


@pytest.mark.promise("R6")
def test_what_outlives_the_drain_timeout_ends_with_an_error_event_and_the_exit_code_is_0() -> None:
    with serving("--drain-timeout", "0.3") as server:
        reply, lines = begin(server, 8000)
        whole = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        body = b'{"prompt": "x", "max_tokens": 8000, "ignore_eos": true}'
        whole.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        while load(server)["server_load"] < 2:
            pass
        server.process.send_signal(signal.SIGTERM)
        with reply:
            rest = [line for line in lines if line.startswith(b"data: ")]
        assert rest[-1] == b"data: [DONE]"
        error = json.loads(rest[-2].removeprefix(b"data: "))["error"]
        assert (error["code"], "shutting down" in error["message"]) == (503, True)
        assert whole.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
        whole.close()
        assert server.process.wait(10) == 0


def test_a_signal_while_the_model_loads_exits_0() -> None:
    command = [sys.executable, "-m", "vserve", "serve", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment()) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "finding the model" in line:  # loading weights comes next
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) == 0, rest
        assert "Traceback" not in rest
        assert "Fatal" not in rest


@pytest.mark.promise("R1", "R5")
def test_with_exit_on_stall_a_hang_answers_every_request_dumps_all_stacks_and_exits_3(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w+") as stderr:
        flags = ("--stall-timeout", "1", "--exit-on-stall", "--max-model-len", "512")
        with serving(*flags, program=("tests/e2e/hanging.py",), stderr=stderr) as server:
            reply, lines = begin(server, 400)
            hung = requests.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 77}, timeout=60)
            assert hung.status_code == 503
            with reply:
                rest = [line for line in lines if line.startswith(b"data: ")]
            assert rest[-1] == b"data: [DONE]"
            assert json.loads(rest[-2].removeprefix(b"data: "))["error"]["code"] == 503
            assert server.process.wait(10) == 3
        stderr.seek(0)
        text = stderr.read()
        assert "the engine hangs" in text
        assert "in hang_here" in text  # the engine's stack
        assert "in _report" in text  # the loop's
        assert text.count("the stacks of all threads follow") == 1


def test_without_exit_on_stall_a_hung_server_says_so_and_still_obeys_a_signal(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w+") as stderr:
        flags = ("--stall-timeout", "1", "--drain-timeout", "0.2", "--max-model-len", "512")
        with serving(*flags, program=("tests/e2e/hanging.py",), stderr=stderr) as server:
            reply, lines = begin(server, 400)
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as hung, reply:
                body = b'{"prompt": "x", "max_tokens": 77}'
                head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
                hung.sendall(head + body)
                while requests.get(f"{server.url}/health", timeout=10).status_code == 200:
                    pass
                assert requests.get(f"{server.url}/ping", timeout=10).status_code == 200
                server.process.send_signal(signal.SIGTERM)
                assert hung.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
                rest = [line for line in lines if line.startswith(b"data: ")]
            assert rest[-1] == b"data: [DONE]"
            assert server.process.wait(20) == 0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vserve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=120)


@pytest.mark.promise("fault: port in use", "fault: hostile model files")
def test_bad_starts_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    empty, folder, text = tmp_path / "empty.gguf", tmp_path / "folder", tmp_path / "model.gguf"
    empty.write_bytes(b"")
    folder.mkdir()
    text.write_bytes(b"this is not a model at all, but it is long enough to have a header")
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases: list[tuple[list[str], str]] = [
            (["serve", "--prot", "1"], "--prot"),
            (["serve", "--port", "x"], "--port"),
            (["serve", str(tmp_path / "missing"), "--port", "0"], "missing"),
            (["serve", str(empty), "--port", "0"], "empty.gguf"),
            (["serve", str(text), "--port", "0"], "model.gguf"),
            (["serve", str(folder), "--port", "0"], "config.json"),
            (["serve", str(strange), "--port", "0"], "MambaForCausalLM"),
            (["serve", "--host", "127.0.0.1", "--port", port], port),
        ]
        for arguments, named in cases:
            done = run(*arguments)
            last = done.stderr.strip().splitlines()[-1]
            assert done.returncode == 2, (arguments, done.stderr)
            assert named in last, (arguments, done.stderr)
            assert last.startswith("vserve: "), (arguments, done.stderr)
            assert "Traceback" not in done.stderr, (arguments, done.stderr)


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["--version"], ["version"]])
def test_help_and_version_exit_0(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 0
    assert done.stdout


@pytest.mark.promise("R14")
def test_a_killed_server_is_back_on_its_port_at_once() -> None:
    with serving() as first:
        before = ask(first, "The three primary colours are", 8)
        reply, lines = begin(first, 2000)
        first.process.kill()
        with reply, pytest.raises(requests.RequestException):  # it is not told, but it sees that the stream is cut
            for _ in lines:
                pass
        with serving("--port", str(first.port)) as second:
            assert second.port == first.port
            assert ask(second, "The three primary colours are", 8) == before


@pytest.mark.promise("R9", "fault: no descriptors")
def test_at_the_limit_of_descriptors_accepting_recovers_when_there_are_some_again(server: Server) -> None:
    process = server.process.pid
    used = len(list(Path(f"/proc/{process}/fd").iterdir()))
    limits = resource.prlimit(process, resource.RLIMIT_NOFILE)
    reply, lines = begin(server, 300)
    resource.prlimit(process, resource.RLIMIT_NOFILE, (used + 20, limits[1]))
    peers = []
    try:
        for _ in range(60):  # three times what it can take
            peer = socket.socket()
            peer.setblocking(False)
            peer.connect_ex(("127.0.0.1", server.port))
            peers.append(peer)
        with reply:  # who was there before is served to the end
            rest = [line for line in lines if line.startswith(b"data: ")]
        assert rest[-1] == b"data: [DONE]"
    finally:
        for peer in peers:
            peer.close()
        resource.prlimit(process, resource.RLIMIT_NOFILE, limits)
    assert requests.get(f"{server.url}/health", timeout=10).status_code == 200
    wait_until_idle(server)
