"""How busy a GPU is, as its driver says (NVML).  Optional: where there is no driver there is no reader.

The driver's library is called as it is; no package stands between.  Reference: NVIDIA Management Library, nvml.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

LIBRARY = "libnvidia-ml.so.1"
SUCCESS = 0


class _Rates(ctypes.Structure):
    """nvmlUtilization_t: percent of the last sampling period in which a kernel ran, and memory was moved."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


def utilization_reader(uuid: str, library: str = LIBRARY) -> Callable[[], float | None] | None:
    """A function that reads the share of time busy, in [0, 1], of the GPU with that UUID (``GPU-...``).

    None where the driver or the GPU is missing; the function returns None when a reading fails.  It may take a
    millisecond; any thread.
    """
    handle = ctypes.c_void_p()
    try:
        nvml = ctypes.CDLL(library)
        begin, find = nvml.nvmlInit_v2, nvml.nvmlDeviceGetHandleByUUID
        rates_of = nvml.nvmlDeviceGetUtilizationRates
    except (OSError, AttributeError):
        return None
    find.argtypes = (ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p))
    rates_of.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Rates))
    if begin() != SUCCESS or find(uuid.encode(), ctypes.byref(handle)) != SUCCESS:
        return None

    def read() -> float | None:
        rates = _Rates()
        if rates_of(handle, ctypes.byref(rates)) != SUCCESS:
            return None
        return min(1.0, float(rates.gpu) / 100.0)

    return read
