"""A Dockerfile as data, and its steps run without a container engine: every path put under one folder.

Knows the instructions our Dockerfile uses and refuses any other, so that a step can't go unrun.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

KNOWN = frozenset(
    "FROM ARG WORKDIR COPY RUN VOLUME ENV USER EXPOSE STOPSIGNAL HEALTHCHECK LABEL ENTRYPOINT CMD".split()
)
OWN_FOLDERS = ("/src", "/dist", "/opt/vserve", "/cache")
"""Folders of the image that steps write to."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One FROM and what follows it: (instruction, its text) pairs."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str:
        """The text of the last such instruction."""
        return [text for word, text in self.steps if word == instruction][-1]

    def all(self, instruction: str) -> list[str]:
        """The texts of all such instructions."""
        return [text for word, text in self.steps if word == instruction]


def read(text: str) -> tuple[dict[str, str], list[Stage]]:
    """The arguments before the first FROM, and the stages."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(str.strip, joined.splitlines()):
        word, rest = line.split(None, 1)
        assert word in KNOWN, f"{word}: an instruction that this reader does not know"
        if word == "FROM":
            found = re.fullmatch(r"(\S+) AS (\S+)", rest)
            assert found, line
            stages.append(Stage(found[1], found[2]))
        elif stages:
            stages[-1].steps.append((word, rest.strip()))
        else:
            name, _, value = rest.partition("=")
            arguments[name] = value.strip('"')
    return arguments, stages


def words(text: str) -> list[str]:
    """An exec form as its words."""
    found = json.loads(text)
    assert isinstance(found, list)
    return [str(word) for word in found]


def pairs(text: str) -> dict[str, str]:
    """KEY=value KEY="value" as a dict."""
    return {key: value.strip('"') for key, value in re.findall(r'(\S+?)=("[^"]*"|\S+)', text)}


class Build:
    """Stages run for real below one folder, as the current user."""

    def __init__(self, context: Path, root: Path, arguments: Mapping[str, str]) -> None:
        self._context = context
        self._root = root
        self._arguments = dict(arguments)
        self._bin = root / "shims"
        self._bin.mkdir()
        # The interpreter beneath a virtual environment: another user may not be able to enter the environment.
        (self._bin / "python").symlink_to(Path(sys.executable).resolve())
        # Resolved by the real tool against the real package lists; not installed on the machine of the tests.
        shim = self._bin / "apt-get"
        shim.write_text('#!/bin/sh\n[ "$1" = update ] && exit 0\nexec /usr/bin/apt-get --simulate "$@"\n')
        shim.chmod(0o755)

    def place(self, path: str, stage: str) -> str:
        """Where a path of the image lies here.  What a stage makes outside the shared folders is its own."""
        for folder in OWN_FOLDERS:
            if path == folder or path.startswith(folder + "/"):
                return f"{self._root}/{stage}{path}"
        return path

    def put(self, text: str, stage: str) -> str:
        """Every path of OWN_FOLDERS in a command, put in its place."""
        pattern = "|".join(re.escape(folder) for folder in OWN_FOLDERS)
        return re.sub(rf"(?<![\w./-])({pattern})(?=$|[\s/\"':;*)\]])", lambda m: self.place(m[1], stage), text)

    def run(self, stage: Stage) -> Iterator[str]:
        """Run a stage; yields each command before it is run."""
        here = Path(self._root, stage.name)
        here.mkdir(exist_ok=True)
        folder = here
        environ = {
            key: value for key, value in os.environ.items() if not key.startswith(("VSERVE_", "VIRTUAL_ENV", "PYTHON"))
        }
        environ["PATH"] = f"{self._bin}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        for word, text in stage.steps:
            if word == "ARG":
                name, _, default = text.partition("=")
                value = self._arguments.get(name, default.strip('"'))
                if value:  # an empty index would hide the one that the machine is set up with
                    environ[name] = value
            elif word == "WORKDIR":
                folder = Path(self.place(text, stage.name))
                folder.mkdir(parents=True, exist_ok=True)
            elif word == "COPY":
                self._copy(text, folder, stage.name)
            elif word == "RUN":
                command = self.put(text, stage.name)
                yield command
                if "rm -rf /var/lib" in command:
                    command = command.replace("rm -rf /var/lib/apt/lists/*", "true")
                subprocess.run(["sh", "-ec", command], cwd=folder, env=environ, check=True, timeout=600)

    def _copy(self, text: str, folder: Path, stage: str) -> None:
        found = re.fullmatch(r"(?:--from=(\S+) )?(.+) (\S+)", text)
        assert found
        source_stage, sources, target = found.groups()
        into = folder / self.put(target, stage)
        for source in sources.split():
            origin = Path(self.place(source, source_stage)) if source_stage else self._context / source
            if origin.is_dir():
                shutil.copytree(
                    origin, into, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                into.mkdir(parents=True, exist_ok=True)
                shutil.copy(origin, into / origin.name)
