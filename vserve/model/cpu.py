"""What PyTorch's CPU libraries must be told through the environment before they are loaded.

Imports no torch.  oneDNN's instruction set: a child process tries the tile instructions (AMX) where the processor
claims them, because on some virtual machines they trap, and a trapped instruction ends the process that tried.
OpenMP's waiting: threads that wait by spinning starve the event loop when there are few cores.  oneDNN's caches: what
is kept for every number of rows ever seen is bounded.  Main thread, once.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

_ISA: Final = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WAITING: Final = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

SAFE_ISA: Final = "AVX512_CORE_FP16"
"""The widest instruction set without tiles; oneDNN lowers it to what the processor has."""

SPIN_COUNT: Final = "3000"
"""Rounds that an idle OpenMP thread spins before it sleeps: some 50 microseconds, the gap between two operations of a
step.  libgomp's own value is a hundred times that and more.

Median ms of a decode step of SmolLM2-135M at batch 1 and 4 on 2 free cores: libgomp's value 8.7 and 16.8; 30000: 8.9
and 17.1; 3000: 9.2 and 17.7; 1000: 10.4 and 20.1; 300: 15.4 and 33.6.  Beside a busy process the order turns round:
a chain of linears that takes 4 ms alone took 106 with libgomp's value, 39 with 20000, 12 with 1000.
"""

KEPT_KERNELS: Final = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
"""Entries of the two caches (oneDNN's and that of PyTorch's bridge to it) with a kernel for each shape of a product.

Every number of prompt tokens in a step is a new shape for each kind of layer, and an entry takes 0.8 MiB on average:
with the libraries' own 1024 a server of SmolLM2-135M grew by 500 MiB over 24,000 mixed requests.  A miss is some 0.5 ms
a kind of layer and step, for all layers of that kind together.
"""

_PROBE_LIMIT_S: Final = 60.0
_PROBE: Final = """
import torch
for dtype in (torch.bfloat16, torch.float16):
    torch.nn.functional.linear(torch.ones(64, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype))
"""


def library_environment(
    environ: Mapping[str, str],
    *,
    reduced_precision: bool,
    cpuinfo: str | None = None,
    probe: Callable[[], int] | None = None,
) -> dict[str, str]:
    """Variables to set before torch is imported; none that the user has set.

    reduced_precision: whether float16 or bfloat16 may be computed on the CPU: only then are tiles used, and tried.
    cpuinfo: what /proc/cpuinfo says, read when None.  probe: see ``try_tiles``.
    """
    found = safe_isa_environment(environ, cpuinfo, probe) if reduced_precision else {}
    if not any(name in environ for name in _WAITING):
        found["GOMP_SPINCOUNT"] = SPIN_COUNT
    return found | {name: value for name, value in KEPT_KERNELS.items() if name not in environ}


def safe_isa_environment(
    environ: Mapping[str, str], cpuinfo: str | None = None, probe: Callable[[], int] | None = None
) -> dict[str, str]:
    """oneDNN's limit where the processor claims tiles and a process that uses them dies; {} where there is no need."""
    if any(name in environ for name in _ISA) or not _claims_tiles(_cpuinfo() if cpuinfo is None else cpuinfo):
        return {}
    return {_ISA[0]: SAFE_ISA} if (probe or try_tiles)() < 0 else {}


def try_tiles() -> int:
    """Multiply in both reduced precisions in a child process; its exit status, negative when a signal ended it.

    Takes the second or two of importing torch.  A child that cannot finish counts as one that was killed.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PROBE_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return -1
    return done.returncode


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _claims_tiles(cpuinfo: str) -> bool:
    for line in cpuinfo.splitlines():
        if line.startswith("flags"):
            return "amx_tile" in line.split()
    return False
