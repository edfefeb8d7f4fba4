"""How busy a GPU is, as its driver says (NVML).  Optional: without the package pynvml there is no reader."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol, cast


class _Rates(Protocol):
    @property
    def gpu(self) -> int:
        """Percent of the last sampling period in which a kernel ran."""


class _Nvml(Protocol):
    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object: ...
    def nvmlDeviceGetUtilizationRates(self, handle: object) -> _Rates: ...


def utilization_reader(uuid: str) -> Callable[[], float | None] | None:
    """A function that reads the share of time busy, in [0, 1], of the GPU with that UUID (``GPU-...``).

    None where the package, the driver or the GPU is missing; the function returns None when a reading fails.  It may
    take a millisecond; any thread.
    """
    try:
        nvml = cast(_Nvml, importlib.import_module("pynvml"))
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:  # the package's own error type cannot be named without it
        return None

    def read() -> float | None:
        try:
            return nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100.0
        except Exception:
            return None

    return read
