"""The life of the process: start, refusals to start, disconnects, drain and exit codes."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
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


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vserve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=120)


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
            (["serve", "--port", "0", str(tmp_path / "missing")], "missing"),
            (["serve", "--port", "0", str(empty)], "empty.gguf"),
            (["serve", "--port", "0", str(text)], "model.gguf"),
            (["serve", "--port", "0", str(folder)], "config.json"),
            (["serve", "--port", "0", str(strange)], "MambaForCausalLM"),
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
