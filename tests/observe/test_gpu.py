"""The GPU's utilisation comes from the driver where there is one, and is simply absent elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vserve.observe.gpu import utilization_reader

DRIVER = """
from types import SimpleNamespace
percent = 42
def nvmlInit(): pass
def nvmlDeviceGetHandleByUUID(uuid):
    if uuid != "GPU-1": raise RuntimeError("no such GPU")
    return uuid
def nvmlDeviceGetUtilizationRates(handle):
    if percent is None: raise RuntimeError("the GPU fell off the bus")
    return SimpleNamespace(gpu=percent)
"""


def test_without_the_package_there_is_no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert utilization_reader("GPU-1") is None


def test_the_reader_says_a_share_and_none_when_the_driver_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pynvml.py").write_text(DRIVER)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    read = utilization_reader("GPU-1")
    assert read is not None
    assert read() == 0.42
    assert utilization_reader("GPU-2") is None
    monkeypatch.setattr(sys.modules["pynvml"], "percent", None)
    assert read() is None
    del sys.modules["pynvml"]
