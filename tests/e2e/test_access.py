"""Keys, TLS, CORS, a root path and the access log of the real server, and SIGHUP."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import requests

from tests.certificates import certificate
from tests.e2e.process import serving
from tests.e2e.test_life import run

PAGE = "https://app.example"


@pytest.mark.promise("R12", "fault: garbage on reload")
def test_a_guarded_tls_server_reloads_on_sighup_and_logs_nothing_secret(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "one")
    trusted = str(tmp_path / "trusted.pem")
    Path(trusted).write_text(Path(cert).read_text())
    keys = tmp_path / "keys.toml"
    keys.write_text("[keys.alice]\nkey = 'alice-secret'\nrequests_per_minute = 1000\n")
    flags = ["--ssl-certfile", cert, "--ssl-keyfile", key, "--api-key-file", str(keys), "--access-log"]
    flags += ["--root-path", "/llm", "--allowed-origins", f"https://b.example,{PAGE}", "--max-model-len", "256"]
    with (tmp_path / "stderr").open("w+") as stderr, serving(*flags, stderr=stderr) as server:
        assert server.url.startswith("https://")
        assert "Bearer KEY" in server.out[-1]

        def models(secret: str, trust: str = trusted) -> int:
            head = {"authorization": f"Bearer {secret}", "origin": PAGE}
            reply = requests.get(f"{server.url}/llm/v1/models?q=query-secret", headers=head, verify=trust, timeout=30)
            assert reply.headers["access-control-allow-origin"] == PAGE
            return reply.status_code

        def until(secret: str, status: int, trust: str = trusted) -> None:
            """Ask, each time a round trip, until the answer is so; bounded."""
            for _ in range(5000):
                if models(secret, trust) == status:
                    return
            raise AssertionError(f"never {status}")

        assert (models("alice-secret"), models("bob-secret")) == (200, 401)
        body = {"prompt": "prompt-secret", "max_tokens": 4}
        head = {"authorization": "Bearer alice-secret"}
        reply = requests.post(f"{server.url}/v1/completions", json=body, headers=head, verify=trusted, timeout=60)
        assert reply.status_code == 200
        keys.write_text("[keys.bob]\nkey = 'bob-secret'\n")
        server.process.send_signal(signal.SIGHUP)
        until("bob-secret", 200)
        assert models("alice-secret") == 401
        keys.write_text("[keys.bob\nbob-secret")
        for source, target in zip(certificate(tmp_path, "two"), (cert, key), strict=True):
            Path(target).write_text(Path(source).read_text())
        either = tmp_path / "either.pem"
        either.write_text(Path(trusted).read_text() + Path(cert).read_text())
        before = len((tmp_path / "stderr").read_text())
        server.process.send_signal(signal.SIGHUP)
        for _ in range(5000):
            requests.get(f"{server.url}/ping", verify=str(either), timeout=30)
            if "reloaded the certificate" in (tmp_path / "stderr").read_text()[before:]:
                break
        assert models("bob-secret", cert) == 200
        assert server.terminate() == 0
        text = (tmp_path / "stderr").read_text()
    assert "the API keys stay as they were: " in text
    assert "Traceback" not in text
    assert "secret" not in text
    logged = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    seen = {(line["method"], line["route"], line["status"]) for line in logged}
    assert seen >= {("GET", "models", 200), ("GET", "models", 401), ("POST", "completions", 200)}


def test_a_key_file_or_certificate_that_cannot_be_used_exits_2(tmp_path: Path) -> None:
    keys, cert = tmp_path / "keys.toml", tmp_path / "cert.pem"
    keys.write_text("[keys.a]\nkey = 'two words'\n")
    cert.write_text("garbage")
    for flags, said in (
        (["--api-key-file", str(keys)], f"vserve: --api-key-file {keys}: keys.a: "),
        (["--ssl-certfile", str(cert)], f"vserve: --ssl-certfile {cert}: "),
        (["--allowed-origins", "*", "--allow-credentials"], "vserve: --allowed-origins"),
        (["--root-path", "llm"], "vserve: --root-path"),
        (["--api-key", "two words"], "vserve: --api-key: "),
    ):
        done = run("serve", "--host", "127.0.0.1", "--port", "0", *flags)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(said)
        assert "words" not in line
