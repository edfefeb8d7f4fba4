"""Faults of the world around the process: signals under load, a process stopped and continued, a model file cut."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
from pathlib import Path

import pytest
import requests

from tests.e2e.process import Server, serving
from tests.e2e.test_life import ask, begin, load, wait_until_idle
from vserve.model.source import resolve

TOKENS = 120
"""Of each request in flight when a signal comes."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.promise("R6", "fault: signals under load")
def test_a_signal_under_load_lets_every_request_in_flight_end_whole_and_tells_newcomers(number: signal.Signals) -> None:
    with serving("--max-model-len", "256", "--drain-timeout", "120") as server:
        idle = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(50)]
        streams = [begin(server, TOKENS) for _ in range(2)]
        answers: list[requests.Response] = []

        def whole() -> None:
            body = {"prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True}
            answers.append(requests.post(f"{server.url}/v1/completions", json=body, timeout=120))

        threads = [threading.Thread(target=whole) for _ in range(2)]
        for thread in threads:
            thread.start()
        while load(server)["server_load"] < 4:
            pass
        server.process.send_signal(number)
        while requests.get(f"{server.url}/health", timeout=30).status_code == 200:
            pass
        late = requests.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=30)
        assert (late.status_code, late.headers["connection"]) == (503, "close")
        for reply, lines in streams:
            with reply:
                rest = [line for line in lines if line.startswith(b"data: ")]
            assert rest[-1] == b"data: [DONE]"
            assert json.loads(rest[-2].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"
        for thread in threads:
            thread.join()
        for answer in answers:
            assert answer.status_code == 200
            assert answer.json()["usage"]["completion_tokens"] == TOKENS
        for peer in idle:
            assert peer.recv(1) == b""
            peer.close()
        assert server.process.wait(60) == 0


def state(server: Server) -> str:
    """The process's state letter, as the kernel has it."""
    return Path(f"/proc/{server.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.promise("R5", "fault: stopped process")
def test_a_process_stopped_and_continued_loses_nothing_and_raises_no_alarm(server: Server) -> None:
    wait_until_idle(server)
    before = ask(server, "The three primary colours are", 16)
    reply, lines = begin(server, 200)
    server.process.send_signal(signal.SIGSTOP)
    while state(server) != "T":
        pass
    # Sent while it stands still; the kernel takes them, the process answers later.
    waiting = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(20)]
    for peer in waiting:
        peer.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    server.process.send_signal(signal.SIGCONT)
    for peer in waiting:
        with peer:
            assert peer.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    with reply:
        rest = [line for line in lines if line.startswith(b"data: ")]
    assert rest[-1] == b"data: [DONE]"
    assert json.loads(rest[-2].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"
    assert ask(server, "The three primary colours are", 16) == before


@pytest.mark.promise("R13", "fault: hostile model files")
def test_a_model_file_cut_while_it_is_served_does_no_harm_or_ends_the_process_aloud(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    shutil.copy(resolve(None, environ={}).path, model)
    with (tmp_path / "stderr").open("w+") as stderr, serving(str(model), stderr=stderr) as server:
        before = ask(server, "The three primary colours are", 8)
        with model.open("r+b") as file:
            file.truncate(4096)
        try:
            assert ask(server, "The three primary colours are", 8) == before
            assert ask(server, "A prompt that is longer than the one before, so that other rows are read", 4)
            assert server.terminate() == 0
        except requests.RequestException:
            assert server.process.wait(30) != 0
            stderr.seek(0)
            assert "Bus error" in stderr.read()
