"""Linear layers whose weights stay quantised on a GPU, with the norm before them, and a gate or a sum behind.

Few rows: weights become numbers in registers (kernels/grouped.py).  Many: integers are written out as plain numbers
for cuBLAS, and e4m3 weights meet e4m3 activations on the matrix units (kernels/fp8.py).  Which, depends on the number
of rows alone, so that a captured graph serves every batch of its shape.  One thread, one stream at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from vserve.kernels import cuda, early, fp8, grouped, packed
from vserve.kernels.packed import Form, Packed
from vserve.model.grouped_weights import Groups
from vserve.model.linear import Linear
from vserve.model.quant import Blocks

_FP8_ALIGN: Final = 16
"""What inputs and outputs of an fp8 product on the matrix units are multiples of."""


class GpuLinear(Protocol):
    """x [M, K] -> [M, N] in x's dtype; the other forms as vserve.kernels.cuda has them for plain weights."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """The layer of rms_norm(x, norm, eps)."""

    def normed_gated(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """silu(first half) * second half of that."""

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual [M, N] + the layer of x; residual is undefined afterwards."""


class GroupedGpuLinear:
    """Integers in groups; order int64 [K]: place k of the weights is input order[k], None where all lie in place."""

    def __init__(self, weight: Packed, bias: Tensor | None, order: Tensor | None) -> None:
        self.weight = weight
        self._bias = bias
        self._order = order

    @property
    def in_order(self) -> bool:
        """Whether the weights lie in the order of the inputs."""
        return self._order is None

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(self._ordered(x), None)

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        if x.shape[0] == 1 and self._order is None:
            return grouped.linear(x, self.weight, norm=norm, eps=eps, bias=self._bias, early=early.one_row(x))
        return self(cuda.rms_norm(x, norm, eps))

    def normed_gated(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        if x.shape[0] == 1 and self._order is None:
            return grouped.gated_row(x, self.weight, norm=norm, eps=eps, bias=self._bias, early=early.one_row(x))
        return cuda.silu_mul(self(cuda.rms_norm(x, norm, eps)))

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._product(self._ordered(x), residual)

    def _ordered(self, x: Tensor) -> Tensor:
        return x if self._order is None else x.index_select(1, self._order)

    def _product(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if 0 < x.shape[0] <= grouped.most_rows(self.weight):
            return grouped.linear(x, self.weight, bias=self._bias, residual=residual, early=early.one_row(x))
        y = functional.linear(x, grouped.write_out(self.weight, x.dtype), self._bias)
        return y if residual is None else y.add_(residual)


class FloatGpuLinear:
    """e4m3 numbers with a scale for each output.

    input_scale float32 [1]: by which inputs become e4m3, None for what each row needs.  Few rows keep their type.
    """

    def __init__(self, weight: Packed, bias: Tensor | None, input_scale: Tensor | None = None) -> None:
        self.weight = weight
        self._bias = bias
        self._input_scale = input_scale
        self._data = weight.data.view(torch.float8_e4m3fn)

    def __call__(self, x: Tensor) -> Tensor:
        if self.reads(x):
            return grouped.linear(x, self.weight, bias=self._bias, early=early.one_row(x))
        return self._multiply(x)

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        if x.shape[0] == 1:
            return grouped.linear(x, self.weight, norm=norm, eps=eps, bias=self._bias, early=early.one_row(x))
        if self.reads(x):
            return self(cuda.rms_norm(x, norm, eps))
        return self._multiply(x, norm=norm, eps=eps)

    def normed_gated(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        if x.shape[0] == 1:
            return grouped.gated_row(x, self.weight, norm=norm, eps=eps, bias=self._bias, early=early.one_row(x))
        return cuda.silu_mul(self.normed(x, norm, eps))

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.reads(x):
            return grouped.linear(x, self.weight, bias=self._bias, residual=residual, early=early.one_row(x))
        return self._multiply(x).add_(residual)

    def gated_added(self, gate_up: Tensor, residual: Tensor) -> Tensor:
        """residual [M, N] + the layer of silu(gate) * up, gate_up [M, 2K]; of rows whose inputs become e4m3."""
        return self._multiply(gate_up, gated=True).add_(residual)

    def reads(self, x: Tensor) -> bool:
        """Whether so many rows keep their type and the weights alone are read as e4m3."""
        return 0 < x.shape[0] <= grouped.most_rows(self.weight)

    def _multiply(self, x: Tensor, *, norm: Tensor | None = None, eps: float = 0.0, gated: bool = False) -> Tensor:
        q, scale = fp8.quantise_rows(x, norm=norm, eps=eps, gated=gated, scale=self._input_scale)
        return fp8.multiply(q, scale, self._data, self.weight.scale, x.dtype, self._bias)


class StackedGpuLinear:
    """Layers of the same inputs, their outputs side by side."""

    def __init__(self, parts: Sequence[GpuLinear]) -> None:
        self._parts = tuple(parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self._parts], dim=1)

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        return self(cuda.rms_norm(x, norm, eps))

    def normed_gated(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        return cuda.silu_mul(self.normed(x, norm, eps))

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual.add_(self(x))


QUANTISED: Final = (GroupedGpuLinear, FloatGpuLinear, StackedGpuLinear)
"""Every class of such layers."""


def packed_weight(layer: Linear) -> Packed | None:
    """The weight that is all of a layer but its bias; None for one that is plain, in parts or in an order."""
    if isinstance(layer, GroupedGpuLinear):
        return layer.weight if layer.in_order else None
    return layer.weight if isinstance(layer, FloatGpuLinear) else None


def stacked_linear(parts: Sequence[GpuLinear | None]) -> GpuLinear | None:
    """parts as one layer; None where one could not be made."""
    made = [part for part in parts if part is not None]
    return StackedGpuLinear(made) if len(made) == len(parts) else None


def groups_linear(parts: Sequence[Groups], bits: int, bias: Tensor | None) -> GpuLinear | None:
    """The rows of parts one below the other, all in one order, on their device; None where groups cannot be packed."""
    if len({part.group for part in parts}) != 1 or not packed.fits(parts[0].q.shape[1], bits, parts[0].group):
        return None
    q, scale, zero = (torch.cat(part) for part in zip(*((p.q, p.scale, p.zero) for p in parts), strict=True))
    centre = int(zero[0, 0])
    if bool((zero == centre).all()):
        weight = packed.pack(q, scale, None, bits=bits, form=Form.CENTRE, centre=centre)
    else:
        # Whole numbers up to 256, exact in float16 and in bfloat16.
        weight = packed.pack(q, scale, zero.to(scale.dtype), bits=bits, form=Form.ZERO)
    return GroupedGpuLinear(weight, bias, parts[0].order)


def blocks_linear(parts: Sequence[Blocks], device: torch.device, bias: Tensor | None) -> GpuLinear | None:
    """The rows of GGUF blocks one below the other, on device; None where their groups cannot be packed.

    Scales and minima are rounded to float16, which is what most block formats keep them in.
    """
    q = torch.cat([part.q.to(device) for part in parts])
    scale = torch.cat([part.scale.to(device) for part in parts])
    minimum = torch.cat([part.minimum.to(device) for part in parts])
    bits = max(part.bits for part in parts)
    if not packed.fits(q.shape[1], bits, q.shape[1] // scale.shape[1]):
        return None
    if not (_fits_half(scale) and _fits_half(minimum)):
        return None
    scale = scale.to(torch.float16)
    centre = parts[0].centre
    if centre is not None and all(part.centre == centre for part in parts):
        weight = packed.pack(q, scale, None, bits=bits, form=Form.CENTRE, centre=centre)
    else:
        weight = packed.pack(q, scale, minimum.to(torch.float16), bits=bits, form=Form.MINIMUM)
    return GroupedGpuLinear(weight, bias, None)


def float_linear(
    data: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor | None = None
) -> GpuLinear | None:
    """A layer of e4m3 data [N, K] and the scale [N] of each row; None for sizes that the matrix units do not take.

    input_scale: as for FloatGpuLinear.
    """
    outputs, inputs = data.shape
    if outputs % _FP8_ALIGN or inputs % packed.CHUNK:
        return None
    weight = packed.pack(data.view(torch.uint8), scale.view(-1, 1), None, bits=8, form=Form.FLOAT)
    return FloatGpuLinear(weight, bias, input_scale)


def to_e4m3(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(scale float32 [N], e4m3 [N, K]) of a plain weight [N, K]: a row's largest number becomes e4m3's largest."""
    scale = weight.abs().amax(1).to(torch.float32).div_(fp8.LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    return scale, (weight.to(torch.float32) / scale.unsqueeze(1)).to(torch.float8_e4m3fn)


def _fits_half(numbers: Tensor) -> bool:
    return bool(numbers.abs().amax() <= torch.finfo(torch.float16).max)
