"""Early launch: a kernel's programs start while the kernel ahead still runs, and wait before they read what it wrote.

Programmatic dependent launch (CUDA programming guide, "Programmatic Dependent Launch and Synchronization"), on Hopper
and later.  Two rules keep it right, and every kernel here that can be launched early obeys both: each program calls
``await_inputs`` before it touches anything that an earlier kernel wrote or still reads (all but constants), and none
returns before that call, so that a kernel's end means that all before it have ended too.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def await_inputs(EARLY: tl.constexpr):
    """Let the next kernel start, then wait until the kernels ahead have ended and their writes can be read."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def await_then_release(EARLY: tl.constexpr):
    """await_inputs the other way round: when the next kernel starts, all kernels ahead of this one have ended.

    So the next may read what those wrote, though not from its first cache, before its own wait.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def options(warps: int, early: bool) -> dict[str, int | bool]:
    """The launch options of a kernel of so many warps."""
    return {"num_warps": warps, "launch_pdl": True} if early else {"num_warps": warps}


@cache
def supported(index: int) -> bool:
    """True where CUDA device index can launch kernels early."""
    return torch.cuda.get_device_capability(index) >= (9, 0)


def one_row(x: torch.Tensor) -> bool:
    """True where work on x [M, K] is a single row on a device that launches early: more rows only lose by it."""
    return x.is_cuda and x.shape[0] == 1 and supported(x.device.index)
