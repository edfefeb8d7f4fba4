"""/openapi.json in schemathesis' hands: what it makes of the description is asked, and each answer is as described."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.api.test_api_embeddings import embedding, minilm
from tests.fakes_api import Stand

CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 504]  # 504: what has a deadline of 1 ms may miss it

[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 413, 415, 429]
"""
EXAMPLES = 6
"""Of each operation; more find the same in more time."""
LEFT_OUT = ("positive_data_acceptance", "unsupported_method")
"""Rules that join several fields are not in the schemas; an unknown method is 501 here."""


def judged(stand: Stand) -> Any:
    """The description, taken to the letter: no status but those that a route names, every event by itself."""
    document = stand.get("/openapi.json").json()
    for path in document["paths"].values():
        for operation in path.values():
            del operation["responses"]["default"]
            for kinds in operation["responses"].values():
                for kind, content in kinds.get("content", {}).items():
                    if kind == "text/event-stream":
                        data = {"type": "string", "contentMediaType": "application/json"}
                        data["contentSchema"] = content["schema"]["contentSchema"]
                        ended = {"type": "string", "const": "[DONE]"}
                        content["schema"] = {"type": "object", "properties": {"data": {"anyOf": [data, ended]}}}
    return document


def test_every_answer_is_as_described(tmp_path: Path) -> None:
    config, file = tmp_path / "schemathesis.toml", tmp_path / "openapi.json"
    config.write_text(CONFIG)
    with embedding(minilm(), api_keys=("secret",)) as stand:
        file.write_text(json.dumps(judged(stand)))
        command = [str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(config), "run", str(file)]
        flags = ["--url", stand.url, "--header", "Authorization: Bearer secret", "--phases", "fuzzing", "--no-color"]
        bounds = ["--max-examples", str(EXAMPLES), "--generation-deterministic", "--no-shrink", "--warnings", "off"]
        left_out = ["--exclude-checks", ",".join(LEFT_OUT)]
        done = subprocess.run(
            [*command, *flags, *bounds, *left_out], capture_output=True, text=True, timeout=240, cwd=tmp_path
        )
        health = stand.get("/health")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    assert health.status_code == 200  # whatever was asked, the engines live
