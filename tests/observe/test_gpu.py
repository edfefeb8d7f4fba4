"""The GPU's utilisation comes from the driver where there is one, and is simply absent elsewhere."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from vserve.observe.gpu import utilization_reader

# The driver's library as nvml.h declares it, with one GPU.
DRIVER = """
#include <string.h>
typedef struct { unsigned int gpu, memory; } Rates;
static int begun; static int percent = 42; static int device;
int nvmlInit_v2(void) { begun = 1; return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    if (!begun || strcmp(uuid, "GPU-1")) return 6;
    *handle = &device; return 0;
}
int nvmlDeviceGetUtilizationRates(void *handle, Rates *rates) {
    if (handle != &device || percent < 0) return 15;
    rates->gpu = percent; rates->memory = 7; return 0;
}
void set_percent(int now) { percent = now; }
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("driver")
    source, library = folder / "driver.c", folder / "libdriver.so"
    source.write_text(DRIVER)
    compiler = shutil.which("cc")
    assert compiler is not None
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True, timeout=60)
    return str(library)


def test_without_a_driver_there_is_no_reader(tmp_path: Path) -> None:
    assert utilization_reader("GPU-1", "libno-such-driver.so.1") is None
    (tmp_path / "broken.so").write_bytes(b"no library")
    assert utilization_reader("GPU-1", str(tmp_path / "broken.so")) is None


def test_a_library_that_is_none_of_nvmls_gives_no_reader() -> None:
    assert utilization_reader("GPU-1", "libc.so.6") is None


@pytest.mark.parametrize(("percent", "share"), [(0, 0.0), (42, 0.42), (100, 1.0), (101, 1.0), (-1, None)])
def test_the_reader_says_a_share_and_none_when_the_driver_fails(driver: str, percent: int, share: float | None) -> None:
    read = utilization_reader("GPU-1", driver)
    assert read is not None
    ctypes.CDLL(driver).set_percent(percent)
    assert read() == share


def test_a_gpu_that_the_driver_does_not_know_has_no_reader(driver: str) -> None:
    assert utilization_reader("GPU-2", driver) is None
