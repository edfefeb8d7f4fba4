"""What a start waits for outside Python, begun at once on threads of its own: libraries, the GPU's context, a hash.

Loading torch's largest library, initialising CUDA and hashing Triton's compiler take a second together and hardly need
the GIL, which importing our own modules needs all the time.  Decides nothing and reports nothing: what fails here fails
again, with its message, where it is needed.  Imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

LIBRARIES: Final = (("libtorch_global_deps.so", ctypes.RTLD_GLOBAL), ("libtorch_cpu.so", ctypes.RTLD_LOCAL))
"""In the order and with the flags of ``import torch``.  Neither knows of Python: no initialiser waits for the GIL."""
CUDA_LIBRARY: Final = "libtorch_cuda.so"
DRIVER: Final = "libcuda.so.1"
SUCCESS: Final = 0
WAIT_S: Final = 5.0
"""A driver that hangs is not waited for any longer."""


class Preload:
    """Threads that load ahead."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def start(self, work: Callable[..., None], *args: object) -> None:
        """Run work(*args) on a thread of its own."""
        thread = threading.Thread(target=work, args=args, name="preload", daemon=True)
        self._threads.append(thread)
        thread.start()

    def wait(self) -> None:
        """Until all have ended, which takes a second: a process that exits while a library initialises may crash."""
        for thread in self._threads:  # one may start another before it ends: that is seen too
            thread.join(WAIT_S)


def begin(device: str) -> Preload:
    """Begin.  device: as --device.  What the libraries read of the environment is set by now.  Main thread."""
    ahead = Preload()
    spec = importlib.util.find_spec("torch")
    if sys.platform == "linux" and spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "lib"
        if device != "cpu" and (folder / CUDA_LIBRARY).is_file():
            os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # or old drivers load every kernel there is
            ahead.start(open_device, DRIVER, lambda: ahead.start(_read_compiler))
        ahead.start(load, [(folder / name, flags) for name, flags in LIBRARIES])
    return ahead


def has_bytecode(module: str) -> bool:
    """Whether the next process finds an imported module compiled, or must do it again."""
    spec = sys.modules[module].__spec__
    return spec is not None and spec.cached is not None and os.path.exists(spec.cached)


def load(libraries: list[tuple[Path, int]]) -> None:
    """Load each library that is there and can be loaded, without the GIL."""
    dlopen = ctypes.CDLL(None).dlopen  # called as any function is; CDLL itself would hold the GIL meanwhile
    dlopen.restype, dlopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
    for path, flags in libraries:
        dlopen(os.fsencode(path), os.RTLD_NOW | flags)


def open_device(driver: str, found: Callable[[], None]) -> None:
    """Make the first GPU's primary context, which torch then uses; found is called once there is such a GPU.

    CUDA driver API: cuInit, cuDevicePrimaryCtxRetain.
    """
    try:
        cuda = ctypes.CDLL(driver)
        count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        if cuda.cuInit(0) != SUCCESS or cuda.cuDeviceGetCount(ctypes.byref(count)) != SUCCESS or not count.value:
            return
        found()
        if cuda.cuDeviceGet(ctypes.byref(device), 0) == SUCCESS:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    except (OSError, AttributeError):  # no driver, or something else of that name
        return


def _read_compiler() -> None:
    with contextlib.suppress(ImportError):
        from vserve.kernels import ahead

        ahead.read_compiler()
