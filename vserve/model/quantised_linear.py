"""Linear layers of quantised weights: which form they take on which device.

On a GPU integers and e4m3 numbers stay packed (gpu_linear.py); on a CPU groups become those of ``GroupedLinear``, which
are 32 long and as exact; e4m3 numbers become plain ones there.  Knows no file and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vserve.model import quant
from vserve.model.grouped_weights import FloatTensor, GroupedTensor, Groups
from vserve.model.kinds import Kind
from vserve.model.linear import GroupedLinear, Linear, PlainLinear, dense_linear, has_grouped
from vserve.model.quant import GROUP
from vserve.model.quantization import Method, Quantization
from vserve.model.weights import StoredTensor

Dense = Callable[[], Linear]
"""Makes the whole layer from plain numbers."""
Note = Callable[[tuple[str, ...], Tensor], None]
"""Told the names of tensors and the numbers that would show a NaN or an infinity of theirs."""


class OrderedLinear:
    """A layer whose weights lie in another order of the inputs: place k of them is input order[k]."""

    def __init__(self, linear: Linear, order: Tensor) -> None:
        self._linear = linear
        self._order = order

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x.index_select(1, self._order))


class StackedLinear:
    """Layers of the same inputs, their outputs side by side."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self._parts = tuple(parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self._parts], dim=1)


@dataclass(frozen=True, slots=True)
class Place:
    """Where layers are to be: their device, the type of their inputs, and whether in the form for a GPU."""

    device: torch.device
    dtype: torch.dtype
    for_gpu: bool


def quantised_linear(
    stored: Sequence[StoredTensor], bias: Tensor | None, place: Place, plain: Dense, copies: bool, note: Note
) -> Linear | None:
    """The layer of stored's rows, one below the other, with its weights as they are; None where it has to be dense.

    bias: on its device.  copies: many rows are served by plain on a CPU, else worked out from the same weights.
    """
    groups = [part for part in stored if isinstance(part, GroupedTensor)]
    for part in groups:
        note((part.name,), part.scales)
    if place.for_gpu:
        return _on_gpu(stored, groups, bias, place.device, note)
    if len(groups) != len(stored) or not has_grouped(place.device, place.dtype):
        return None
    made = [part.unpack(place.device) for part in groups]
    if any(part.group % GROUP for part in made):
        return None
    if _same_order(made):
        return _on_cpu(made, bias, plain() if copies and made[0].order is None else None)
    pieces = _split(bias, stored)
    return StackedLinear([_on_cpu([part], piece, None) for part, piece in zip(made, pieces, strict=True)])


def _on_cpu(made: Sequence[Groups], bias: Tensor | None, many: Linear | None) -> Linear:
    order = made[0].order
    q, scale, minimum = (
        torch.cat(part) for part in zip(*((part.q, *_of_32(part)) for part in made), strict=True)
    )  # fmt: skip
    if order is None:
        return GroupedLinear(q, scale, minimum, bias, many)
    # What serves many rows takes inputs in their own order.
    return OrderedLinear(GroupedLinear(q, scale, minimum, bias), order)


def _of_32(groups: Groups) -> tuple[Tensor, Tensor]:
    """Scale and minimum of every 32 inputs, float32."""
    scale = groups.scale.to(torch.float32)
    minimum = -scale * groups.zero.to(torch.float32)
    times = groups.group // GROUP
    return scale.repeat_interleave(times, 1), minimum.repeat_interleave(times, 1)


def _same_order(made: Sequence[Groups]) -> bool:
    first = made[0].order
    return all(
        part.order is None if first is None else part.order is not None and torch.equal(part.order, first)
        for part in made
    )


def _on_gpu(
    stored: Sequence[StoredTensor],
    groups: Sequence[GroupedTensor],
    bias: Tensor | None,
    device: torch.device,
    note: Note,
) -> Linear | None:
    from vserve.model import gpu_linear  # as below

    if len(groups) == len(stored):
        made = [part.unpack(device) for part in groups]
        bits = max(part.bits for part in groups)
        if _same_order(made):
            return gpu_linear.groups_linear(made, bits, bias)
        return gpu_linear.stacked_linear(
            [
                gpu_linear.groups_linear([part], bits, piece)
                for part, piece in zip(made, _split(bias, stored), strict=True)
            ]
        )
    floats = [part for part in stored if isinstance(part, FloatTensor)]
    if len(floats) == len(stored):
        for tensor in floats:
            note((tensor.name,), tensor.scale)
            note((tensor.name,), _not_a_number(tensor.data.to(device)))
        data = torch.cat([part.data.to(device).view(torch.uint8) for part in floats]).view(torch.float8_e4m3fn)
        scale = torch.cat([part.scale.to(device) for part in floats])
        return gpu_linear.float_linear(data, scale, bias, _common(floats, device))
    if not all(quant.can_pack(part.kind) for part in stored):
        return None
    blocks = [quant.unpack_blocks(part) for part in stored]
    for part, block in zip(stored, blocks, strict=True):
        note((part.name,), block.scale)
        note((part.name,), block.minimum)
    if len({part.scale.shape[1] for part in blocks}) == 1:
        return gpu_linear.blocks_linear(blocks, device, bias)
    return gpu_linear.stacked_linear(
        [
            gpu_linear.blocks_linear([part], device, piece)
            for part, piece in zip(blocks, _split(bias, stored), strict=True)
        ]
    )


def _common(floats: Sequence[FloatTensor], device: torch.device) -> Tensor | None:
    """One scale for the inputs that layers share: the largest, which cuts off nothing that another would keep."""
    scales = [part.input_scale for part in floats if part.input_scale is not None]
    return torch.cat(scales).amax(0, keepdim=True).to(device) if scales else None


def _not_a_number(data: Tensor) -> Tensor:
    """NaN where e4m3 data has one, else 0."""
    found = (data.view(torch.uint8) & 0x7F == 0x7F).any()
    return torch.where(found, torch.nan, 0.0)


def _split(bias: Tensor | None, stored: Sequence[StoredTensor]) -> list[Tensor | None]:
    return [None] * len(stored) if bias is None else list(torch.split(bias, [part.shape[0] for part in stored]))


def online_fp8(weight: Tensor, bias: Tensor | None) -> Linear:
    """A plain weight [N, K] on a GPU as e4m3 numbers with a scale for each row; plain where its sizes are odd."""
    from vserve.model import gpu_linear  # its kernels need Triton, which torch for CPUs comes without

    scale, data = gpu_linear.to_e4m3(weight)
    return gpu_linear.float_linear(data, scale, bias) or PlainLinear(weight, bias)


def quantised_dummy(weight: Tensor, bias: Tensor | None, quantization: Quantization) -> Linear:
    """A layer of about weight's [N, K] numbers, quantised: rounded to the nearest, one group at a time."""
    if quantization.method is Method.FP8:
        return online_fp8(weight, bias) if weight.is_cuda else PlainLinear(weight, bias)
    outputs, inputs = weight.shape
    most = 2**quantization.bits - 1
    wide = weight.to(torch.float32).view(outputs, -1, quantization.group or inputs)
    low, high = wide.amin(2, keepdim=True), wide.amax(2, keepdim=True)
    scale = ((high - low) / most).to(torch.float16)
    zero = (-low / scale).round()
    q = (wide / scale + zero).round().clamp_(0, most).to(torch.uint8).view(outputs, inputs)
    groups = Groups(q, scale.squeeze(2), zero.squeeze(2).to(torch.int16), None)
    stored = GroupedTensor("dummy", Kind.GROUPED, (outputs, inputs), q, quantization.bits, scale, lambda _: groups)
    place = Place(weight.device, weight.dtype, weight.is_cuda)

    def plain() -> Linear:
        return dense_linear(groups.dense(weight.dtype), bias)

    return quantised_linear([stored], bias, place, plain, False, lambda *_: None) or plain()
