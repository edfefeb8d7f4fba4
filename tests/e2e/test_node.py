"""The official packages for Node.js against the real server: chat, streams, tools, responses, messages."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.e2e.process import Server

NODE = Path(__file__).parent / "node"
"""The scripts, and the packages of package.json, installed by make test (npm ci)."""


def run(script: str, server: Server) -> Any:
    done = subprocess.run(
        ["node", str(NODE / script), server.url], capture_output=True, text=True, timeout=120, cwd=NODE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_openais_package_for_node(both: Server) -> None:
    got = run("openai.mjs", both)
    chat, stream = got["chat"], got["stream"]
    assert "Paris" in chat["text"]
    assert chat["finish"] == "stop"
    assert stream["text"] == chat["text"]
    assert stream["usage"]["total_tokens"] == chat["usage"]["total_tokens"]
    tools = got["tools"]
    assert tools["whole"]["name"] == "get_weather"
    assert isinstance(tools["whole"]["arguments"]["city"], str)
    assert tools["streamed"] == tools["whole"]
    assert tools["finish"] == "tool_calls"
    responses = got["responses"]
    assert "Paris" in responses["text"]
    assert responses["streamed"] == responses["kept"] == responses["later"] == responses["text"]
    assert (responses["first"], responses["last"]) == ("response.created", "response.completed")
    assert responses["next"] == ["function_call"]
    assert responses["gone"] == 404
    assert got["embeddings"]["sizes"] == [384, 384]
    assert got["errors"] == {"kind": "BadRequestError", "status": 400, "param": "temperature"}


def test_anthropics_package_for_node(both: Server) -> None:
    got = run("anthropic.mjs", both)
    assert "Paris" in got["messages"]["text"]
    assert got["messages"]["stop"] == "end_turn"
    assert got["stream"]["text"] == got["stream"]["final"] == got["messages"]["text"]
    assert got["stream"]["usage"]["output_tokens"] == got["messages"]["usage"]["output_tokens"]
    assert got["tools"]["name"] == "get_weather"
    assert isinstance(got["tools"]["input"]["city"], str)
    assert got["tools"]["stop"] == "tool_use"
    assert (
        got["count"]["input_tokens"]
        == got["messages"]["usage"]["input_tokens"] + (got["messages"]["usage"]["cache_read_input_tokens"])
    )
    assert got["errors"] == {"kind": "BadRequestError", "status": 400}
