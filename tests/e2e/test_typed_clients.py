"""Clients made from /openapi.json: others' generators take it, and what they make fits how the API is used."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import openapi_spec_validator
import pytest
import requests

from tests.e2e.process import Server

NODE = Path(__file__).parent / "node"
"""The packages of package.json, installed by make test (npm ci)."""


def run(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(NODE / "node_modules" / ".bin" / program), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture
def project(server: Server, tmp_path: Path) -> Path:
    """A project in TypeScript with the types that openapi-typescript makes of the running server's description."""
    for name in ("typed.ts", "tsconfig.json"):
        shutil.copy(NODE / name, tmp_path)
    made = tmp_path / "made" / "vserve.d.ts"
    done = run("openapi-typescript", f"{server.url}/openapi.json", "--output", str(made), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert made.stat().st_size > 10_000
    return tmp_path


def test_the_description_of_the_running_server_is_valid(server: Server) -> None:
    openapi_spec_validator.validate(requests.get(f"{server.url}/openapi.json", timeout=30).json())


def test_a_client_in_typescript_compiles_against_the_types_made_of_it(project: Path) -> None:
    done = run("tsc", "--project", ".", cwd=project)
    assert done.returncode == 0, done.stdout


def test_the_compiler_would_say_so(project: Path) -> None:
    source = project / "typed.ts"
    source.write_text(source.read_text().replace("max_tokens: 16", "max_tokens: '16'"))
    done = run("tsc", "--project", ".", cwd=project)
    assert done.returncode != 0
    assert "typed.ts" in done.stdout
