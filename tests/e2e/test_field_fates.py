"""No field of OpenAI's request schemas is taken without effect and without a word: the real server is asked."""

from __future__ import annotations

import subprocess
import sys

from tests.e2e.process import ROOT, Server, environment


def test_every_field_is_obeyed_refused_or_reported(both: Server) -> None:
    command = [sys.executable, "bench/field_fates.py", "--url", both.url]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:] if line.startswith("| ")]
    assert {row[0].removeprefix("| ") for row in rows} == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
    }
    said = {row[1]: row[2] for row in rows if row[0] == "| /v1/chat/completions"}
    assert said["temperature"] == "obeyed |"
    assert said["prompt_cache_key"] == "reported as ignored |"
    assert said["audio"] == "refused with 4xx |"
    assert "**" not in done.stdout
