"""LiteLLM against the real server, in an environment of its own: it needs another version of the openai package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.process import Server

PYTHON = Path(sys.prefix) / "litellm" / "bin" / "python"
"""Made by make test."""
SCRIPT = Path(__file__).parent / "litellm" / "client.py"


def test_litellm_chats_streams_calls_embeds_and_is_refused(both: Server) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # nothing is fetched from elsewhere
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [str(PYTHON), str(SCRIPT), both.url], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert "Paris" in got["text"]
    assert got["finish"] == "stop"
    assert got["streamed"] == got["later"] == got["response"] == got["text"]
    assert set(got["call"]) == {"city"}
    assert got["sizes"] == [384, 384]
    assert "temperature" in got["refused"]
