"""What is loaded ahead of a start: without the GIL, and never in the way of a start that fails."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vserve import preload

# Says what its initialiser saw: whether Python wrote to a pipe while the library was being loaded.
PATIENT = """
#include <poll.h>
#include <stdlib.h>
#include <unistd.h>
__attribute__((constructor)) static void loaded(void) {
    struct pollfd line = { atoi(getenv("TEST_LISTEN")), POLLIN, 0 };
    char word = poll(&line, 1, 20000) > 0 ? 'y' : 'n';
    if (write(atoi(getenv("TEST_TELL")), &word, 1) != 1) abort();
}
"""
# The driver's library as cuda.h declares it.  DEVICES, and what cuInit says: of the compiler's command line.
DRIVER = """
static int begun, kept;
int cuInit(unsigned int flags) { begun = flags == 0; return RESULT; }
int cuDeviceGetCount(int *count) { *count = DEVICES; return begun ? 0 : 3; }
int cuDeviceGet(int *device, int ordinal) { *device = 7; return ordinal < DEVICES ? 0 : 101; }
int cuDevicePrimaryCtxRetain(void **context, int device) { kept += device == 7; *context = &kept; return 0; }
int contexts(void) { return kept; }
"""


def library(folder: Path, name: str, source: str, *flags: str) -> Path:
    compiler = shutil.which("cc")
    assert compiler is not None
    (folder / f"{name}.c").write_text(source)
    made = folder / f"lib{name}.so"
    command = [compiler, "-shared", "-fPIC", *flags, "-o", str(made), str(folder / f"{name}.c")]
    subprocess.run(command, check=True, timeout=60)
    return made


def test_python_goes_on_while_a_library_initialises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listen, say = os.pipe()
    hear, tell = os.pipe()
    monkeypatch.setenv("TEST_LISTEN", str(listen))
    monkeypatch.setenv("TEST_TELL", str(tell))
    work = preload.Preload()
    work.start(preload.load, [(library(tmp_path, "patient", PATIENT), os.RTLD_LOCAL)])
    os.write(say, b"!")  # held by the initialiser, the GIL would not come back before it has given up
    work.wait()
    assert os.read(hear, 1) == b"y"
    for end in (listen, say, hear, tell):
        os.close(end)


def test_libraries_that_are_missing_or_broken_are_left_to_whoever_needs_them(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    preload.load([(tmp_path / "missing.so", os.RTLD_GLOBAL), (tmp_path / "broken.so", os.RTLD_LOCAL)])


@pytest.mark.parametrize(
    ("result", "devices", "contexts"), [(0, 1, 1), (0, 8, 1), (0, 0, 0), (100, 1, 0)],
    ids=["one GPU", "the first of many", "no GPU", "no driver in the kernel"],
)  # fmt: skip
def test_a_gpus_context_is_made_where_there_is_a_gpu(tmp_path: Path, result: int, devices: int, contexts: int) -> None:
    driver = library(tmp_path, f"driver{result}{devices}", DRIVER, f"-DRESULT={result}", f"-DDEVICES={devices}")
    found: list[bool] = []
    preload.open_device(str(driver), lambda: found.append(True))
    assert len(found) == contexts
    assert ctypes.CDLL(str(driver)).contexts() == contexts


@pytest.mark.parametrize("name", ["libno-such-driver.so.1", "libc.so.6"])
def test_a_machine_without_a_driver_has_no_gpu(name: str) -> None:
    found: list[bool] = []
    preload.open_device(name, lambda: found.append(True))
    assert not found


def test_torchs_library_is_loaded_before_torch_and_torch_works_with_it() -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from vserve import preload
        preload.begin("cpu").wait()
        before = "torch" in sys.modules, "libtorch_cpu.so" in Path("/proc/self/maps").read_text()
        import torch
        print(*before, int(torch.ones(2, 3).matmul(torch.ones(3, 2)).sum()))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.split(), done.stderr) == (["False", "True", "12"], "")


@pytest.mark.parametrize("written", [True, False])
def test_a_module_without_bytecode_on_disk_is_told_from_one_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    name = f"module_for_preload_{written}"
    (tmp_path / f"{name}.py").write_text("number = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", not written)
    importlib.import_module(name)
    assert preload.has_bytecode(name) is written
