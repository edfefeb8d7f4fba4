"""Compiling ahead: every kernel that a piece of work launches is compiled by several threads, then launched for real.

Triton compiles a kernel when it is first launched, one after the other.  ``compile_all`` runs the work once with every
launch left out, notes what it would have compiled, and compiles that on many threads (8 threads on an H100's host are
3.4 times as fast as one).  The launcher of each kernel, a C compiler's work, is left to its first launch: Triton 3.6
gives all their modules one name, so launchers that several threads make at once get mixed up.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import triton
from triton import knobs


class _Kernel(Protocol):
    def preload(self, specialization_data: str) -> object: ...


class _Info(Protocol):
    @property
    def jit_function(self) -> _Kernel: ...


def compile_all(work: Callable[[], None], threads: int) -> int:
    """Run work without its kernels, compile those, and return how many they were.

    Nothing that work computes may matter, and none of its kernels may have been launched before: one that is compiled
    already would run, on what those left out did not write.  Raises what compiling raises.
    """
    wanted: dict[str, _Kernel] = {}

    def note(*, fn: _Info, compile: dict[str, str], is_manual_warmup: bool, **_: object) -> bool:
        if is_manual_warmup:  # asked for by preload below
            return False
        wanted[compile["specialization_data"]] = fn.jit_function
        return True  # neither compile nor launch

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        work()
        with ThreadPoolExecutor(threads, thread_name_prefix="compiler") as pool:
            for _ in pool.map(lambda item: item[1].preload(item[0]), wanted.items()):
                pass
    finally:
        knobs.runtime.jit_cache_hook = before
    return len(wanted)


@triton.jit
def _nothing():
    pass


def prepare() -> None:
    """Do what Triton does once, before the first kernel (it reads all of itself for its cache's sake).  Any thread."""
    _nothing.warmup(grid=(1,))


def read_compiler() -> None:
    """Of ``prepare``, what needs no device and no torch: the reading, most of it without the GIL.  Any thread.

    Raises ImportError where this Triton keeps it elsewhere.
    """
    from triton.runtime.cache import triton_key

    triton_key()
