"""The commit of a build: what it wrote down, else what the install knows, else nothing."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

import vserve
from vserve.build import NAME, git_hash

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


def telling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: str | None, installed: object) -> str | None:
    """git_hash of a package in whose folder a build left written, and whose metadata has installed."""
    if written is not None:
        (tmp_path / NAME).write_text(written)
    monkeypatch.setattr(vserve, "__path__", [str(tmp_path)])
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    folder = tmp_path / "vserve-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: vserve\nVersion: 1\n")
    if installed is not None:
        (folder / "direct_url.json").write_text(installed if isinstance(installed, str) else json.dumps(installed))
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(folder))
    return git_hash()


@pytest.mark.parametrize(
    ("written", "installed", "told"),
    [
        (f"{COMMIT}\n", None, COMMIT),
        (f"{COMMIT}-dirty\n", None, f"{COMMIT}-dirty"),
        (f"{COMMIT}\n", {"vcs_info": {"commit_id": OTHER}}, COMMIT),
        (None, {"url": "u", "vcs_info": {"vcs": "git", "commit_id": OTHER}}, OTHER),
        ("\n", {"vcs_info": {"commit_id": OTHER}}, OTHER),
        ("\n", None, None),
        (None, {"url": "file:///somewhere", "dir_info": {"editable": True}}, None),
        (None, {"vcs_info": {"commit_id": "not a hash"}}, None),
        (None, {"vcs_info": []}, None),
        (None, "no json", None),
        ("a sk-secret in the wrong file", None, None),
        ("\u00e9", None, None),
    ],
)
def test_the_commit_is_the_builds_own_or_the_installs_or_unknown(
    written: str | None, installed: object, told: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert telling(monkeypatch, tmp_path, written, installed) == told
