"""The whole of a mixture for more than a few tokens: pairs by expert, two products, and the sum over a token's experts.

    as moe.py says; the weights are plain (moe.py) or packed (moe_packed.py), each of the two products for itself

What a pair adds is kept in float32 and rounded once, with the sum.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vserve.kernels import moe, moe_packed
from vserve.kernels.early import await_inputs, options
from vserve.kernels.moe_packed import Stack
from vserve.kernels.route import Groups, Routes, group


@triton.jit
def _join(
    parts_ptr,  # [T * ACTIVE, N] fp32
    scores_ptr,  # [T * ACTIVE] fp32
    residual_ptr,  # [T, N], rows residual_stride apart
    y_ptr,  # [T, N]
    num_out,  # N
    residual_stride,
    ACTIVE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = n < num_out
    y = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(ACTIVE):
        pair = token * ACTIVE + j
        y += tl.load(scores_ptr + pair) * tl.load(parts_ptr + pair * num_out + n, mask=valid, other=0.0)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + token * residual_stride + n, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * num_out + n, y.to(y_ptr.dtype.element_ty), mask=valid)


def many(
    x: Tensor,
    routes: Routes,
    gate_up: Tensor | Stack,
    down: Tensor | Stack,
    residual: Tensor | None = None,
    *,
    early: bool = False,
) -> Tensor:
    """What the experts make of x [T, D], added to residual [T, D] where there is one -> a new [T, D].  T may be 0.

    gate_up [E, 2F, D], gate first; down [E, D, F].
    """
    tokens, width = x.shape
    count, inner = gate_up.shape[0], down.shape[2]
    assert gate_up.shape == (count, 2 * inner, width)
    assert down.shape == (count, width, inner)
    y = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if not tokens:
        return y
    active = routes.chosen.shape[1]
    groups = group(routes.chosen, count, early=early)
    hidden = torch.empty((tokens * active, inner), dtype=x.dtype, device=x.device)
    parts = torch.empty((tokens * active, width), dtype=torch.float32, device=x.device)
    _products(x, gate_up, groups, hidden, active, gated=True, early=early)
    _products(hidden, down, groups, parts, active, gated=False, early=early)
    block = min(1024, triton.next_power_of_2(width))
    _join[(tokens, triton.cdiv(width, block))](
        parts, routes.weights, parts if residual is None else residual, y, width,
        0 if residual is None else residual.stride(0), active, residual is not None, block, early,
        **options(4, early),
    )  # fmt: skip
    return y


def _products(
    x: Tensor, weight: Tensor | Stack, groups: Groups, y: Tensor, active: int, *, gated: bool, early: bool
) -> None:
    pairs, count, size = y.shape[0], weight.shape[0], x.element_size()
    if isinstance(weight, Stack):
        tile = moe_packed.measured(pairs, count, size, gated=gated)
        moe_packed.products(x, weight, groups, y, active, gated=gated, tile=tile, early=early)
    else:
        tile = moe.measured(pairs, count, size, gated=gated)
        moe.products(x, weight, groups, y, active, gated=gated, tile=tile, early=early)
