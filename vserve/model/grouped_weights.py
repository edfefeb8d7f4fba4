"""The tensors of AWQ, GPTQ and fp8 checkpoints, joined to one ``StoredTensor`` a matrix, under the plain names.

    AWQ (gemm):  qweight int32 [K, N / 8], qzeros int32 [K / G, N / 8], scales [K / G, N]
                 w[n, k] = scales[g, n] * (q - z), columns 0 2 4 6 1 3 5 7 of each eight from the lowest bits up
    GPTQ:        qweight int32 [K * bits / 32, N], qzeros int32 [K / G, N * bits / 32], scales [K / G, N], g_idx [K]
                 w[n, k] = scales[g, n] * (q - (z + shift)), in order from the lowest bits up, g = g_idx[k]
    fp8:         weight e4m3 [N, K], weight_scale [], [1], [N] or [N, 1]; static activations: input_scale [] or [1]

Every shape is checked when a tensor is asked for, before any is read.  Unpacking is exact and works on any device.
Knows no model.  Any thread may read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch
from torch import Tensor

from vserve.errors import StartupError
from vserve.model.kinds import Kind
from vserve.model.quantization import Method, Quantization
from vserve.model.weights import StoredTensor, Weights

_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns lies in the lowest four bits of a word, in the next four, and so on."""

_PACKED: Final = (".qweight", ".qzeros", ".scales", ".g_idx")
_SCALES: Final = (".weight_scale", ".input_scale")
"""Beside fp8 weights."""


class RawWeights(Weights, Protocol):
    """Weights whose integer and e4m3 tensors can be had as well."""

    def raw(self, name: str, *types: str) -> Tensor:
        """The tensor as it is; StartupError unless its type is one of types, by its safetensors name."""


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """w[n, order[k]] = scale[n, k // G] * (q[n, k] - zero[n, k // G]), exact in float32.

    q uint8 [N, K]; scale [N, K / G] as stored; zero int16 [N, K / G]; order int64 [K], None where it changes nothing.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    order: Tensor | None

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.scale.shape[1]

    def rows(self, chosen: slice | Tensor) -> Groups:
        """Some outputs."""
        return Groups(self.q[chosen], self.scale[chosen], self.zero[chosen], self.order)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights [N, K], rounded once from float32."""
        outputs, inputs = self.q.shape
        wide = self.q.view(outputs, -1, self.group).to(torch.float32)
        wide = (wide - self.zero.to(torch.float32).unsqueeze(2)) * self.scale.to(torch.float32).unsqueeze(2)
        weight = wide.view(outputs, inputs).to(dtype)
        if self.order is None:
            return weight
        placed = torch.empty_like(weight)
        placed[:, self.order] = weight
        return placed


@dataclass(frozen=True, slots=True, eq=False)
class _QuantisedMatrix(StoredTensor):
    """A matrix [N, K] that is quantised, though not in the blocks of a GGUF file."""

    @property
    def quantised(self) -> bool:
        return True

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    def blocks(self) -> Tensor:
        raise ValueError(f"tensor {self.name} has no blocks")


@dataclass(frozen=True, slots=True, eq=False)
class GroupedTensor(_QuantisedMatrix):
    """A matrix of integers in groups; data: the packed integers.  bits: 4 or 8.  scales: as stored.

    unpack: makes its ``Groups`` on a device, anew each time.
    """

    bits: int
    scales: Tensor
    unpack: Callable[[torch.device], Groups]

    def rows(self, start: int, stop: int) -> StoredTensor:
        return self._chosen(slice(start, stop), stop - start)

    def select_rows(self, order: Tensor) -> StoredTensor:
        return self._chosen(order, order.numel())

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.unpack(torch.device("cpu")).dense(dtype)

    def write_rows(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self.unpack(torch.device("cpu")).rows(slice(start, stop)).dense(out.dtype))

    def _chosen(self, chosen: slice | Tensor, count: int) -> GroupedTensor:
        whole = self.unpack

        def unpack(device: torch.device) -> Groups:
            return whole(device).rows(chosen if isinstance(chosen, slice) else chosen.to(device))

        return replace(self, shape=(count, self.shape[1]), unpack=unpack)


@dataclass(frozen=True, slots=True, eq=False)
class FloatTensor(_QuantisedMatrix):
    """A matrix of e4m3 numbers; data: float8_e4m3fn [N, K].  scale float32 [N]: of each row.

    input_scale float32 [1]: of the inputs wherever they become e4m3, None for the scale that each row needs.
    """

    scale: Tensor
    input_scale: Tensor | None = None

    def rows(self, start: int, stop: int) -> StoredTensor:
        return replace(
            self, shape=(stop - start, self.shape[1]), data=self.data[start:stop], scale=self.scale[start:stop]
        )

    def select_rows(self, order: Tensor) -> StoredTensor:
        data = self.data.view(torch.uint8)[order].view(torch.float8_e4m3fn)
        return replace(self, shape=(order.numel(), self.shape[1]), data=data, scale=self.scale[order])

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.data.to(torch.float32).mul_(self.scale.unsqueeze(1)).to(dtype)

    def write_rows(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self.rows(start, stop).dense(out.dtype))


class QuantisedWeights:
    """``Weights`` of a quantised checkpoint: the parts of a matrix appear as one tensor, X.weight."""

    def __init__(self, weights: RawWeights, quantization: Quantization) -> None:
        self._weights = weights
        self._quantization = quantization
        names = weights.names()
        if quantization.method is Method.FP8:
            self._names = tuple(name for name in names if not name.endswith(_SCALES))
        else:
            packed = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
            self._names = tuple(
                name.removesuffix(".qweight") + ".weight" if name.endswith(".qweight") else name
                for name in names
                if not (name.endswith(_PACKED[1:]) and name.rpartition(".")[0] in packed)
            )
        self._known = frozenset(self._names)

    def names(self) -> Sequence[str]:
        return self._names

    def __contains__(self, name: object) -> bool:
        return name in self._known

    @property
    def total_bytes(self) -> int:
        return self._weights.total_bytes

    def get(self, name: str) -> StoredTensor:
        module = name.removesuffix(".weight")
        if f"{module}.qweight" in self._weights and name.endswith(".weight"):
            return self._awq(name, module) if self._quantization.method is Method.AWQ else self._gptq(name, module)
        if self._quantization.method is Method.FP8 and f"{module}.weight_scale" in self._weights:
            return self._fp8(name, module)
        return self._weights.get(name)

    def _awq(self, name: str, module: str) -> StoredTensor:
        packed = self._weights.raw(f"{module}.qweight", "I32")
        inputs, outputs = _sizes(f"{module}.qweight", packed, 1, 8)
        group = self._group(module, inputs)
        scales, zeros = self._scales_and_zeros(module, inputs // group, outputs, 8)

        def unpack(device: torch.device) -> Groups:
            q = _columns(packed.to(device), 4, _AWQ_ORDER)
            zero = _columns(zeros.to(device), 4, _AWQ_ORDER).to(torch.int16)
            return Groups(q, scales.to(device).t().contiguous(), zero, None)

        return GroupedTensor(name, Kind.GROUPED, (outputs, inputs), packed, 4, scales, unpack)

    def _gptq(self, name: str, module: str) -> StoredTensor:
        bits, shift = self._quantization.bits, self._quantization.zero_shift
        per_word = 32 // bits
        packed = self._weights.raw(f"{module}.qweight", "I32")
        inputs, outputs = _sizes(f"{module}.qweight", packed, per_word, 1)
        group = self._group(module, inputs)
        scales, zeros = self._scales_and_zeros(module, inputs // group, outputs, per_word)
        order = self._order(module, inputs, group)

        def unpack(device: torch.device) -> Groups:
            q = _columns(packed.to(device).t(), bits, range(per_word)).t()
            q = q.contiguous() if order is None else q[:, order.to(device)]
            zero = _columns(zeros.to(device), bits, range(per_word)).to(torch.int16) + shift
            placed = None if order is None else order.to(device)
            return Groups(q, scales.to(device).t().contiguous(), zero, placed)

        return GroupedTensor(name, Kind.GROUPED, (outputs, inputs), packed, bits, scales, unpack)

    def _fp8(self, name: str, module: str) -> StoredTensor:
        data = self._weights.raw(name, "F8_E4M3")
        scale = self._weights.get(f"{module}.weight_scale").dense(torch.float32)
        if data.dim() != 2:
            raise StartupError(f"tensor {name} has shape {list(data.shape)}, must be a matrix")
        outputs, inputs = data.shape
        if scale.numel() not in (1, outputs) or max(scale.shape, default=1) != scale.numel():
            raise StartupError(
                f"tensor {module}.weight_scale has shape {list(scale.shape)}, must be one number or one a row"
            )
        rows = scale.reshape(-1).expand(outputs).contiguous()
        return FloatTensor(name, Kind.E4M3, (outputs, inputs), data, rows, self._input_scale(name, module))

    def _input_scale(self, name: str, module: str) -> Tensor | None:
        if not self._quantization.static:
            return None
        found = f"{module}.input_scale"
        if found not in self._weights:
            raise StartupError(f"tensor {found} is missing, which {name} needs: activation_scheme is static")
        scale = self._weights.get(found).dense(torch.float32)
        if scale.numel() != 1:
            raise StartupError(f"tensor {found} has shape {list(scale.shape)}, must be one number")
        if not 0 < float(scale) < float("inf"):
            raise StartupError(f"tensor {found} is {float(scale):g}, must be above 0")
        return scale.reshape(1)

    def _group(self, module: str, inputs: int) -> int:
        group = self._quantization.group or inputs
        if inputs % group:
            raise StartupError(f"tensor {module}.qweight has {inputs} inputs, not whole groups of {group}")
        return group

    def _scales_and_zeros(self, module: str, groups: int, outputs: int, per_word: int) -> tuple[Tensor, Tensor]:
        for part in (".scales", ".qzeros"):
            if module + part not in self._weights:
                raise StartupError(f"tensor {module}{part} is missing, which {module}.qweight needs")
        scales = self._weights.get(f"{module}.scales").data
        _require(f"{module}.scales", scales, (groups, outputs))
        zeros = self._weights.raw(f"{module}.qzeros", "I32")
        if outputs % per_word:
            raise StartupError(f"tensor {module}.qweight has {outputs} outputs, not whole words of {per_word}")
        _require(f"{module}.qzeros", zeros, (groups, outputs // per_word))
        return scales, zeros

    def _order(self, module: str, inputs: int, group: int) -> Tensor | None:
        """Which input each place of the sorted groups is, int64 [K]; None where they lie in order."""
        name = f"{module}.g_idx"
        if name not in self._weights:
            return None
        index = self._weights.raw(name, "I32")
        _require(name, index, (inputs,))
        index = index.to(torch.int64)
        order = torch.argsort(index, stable=True)
        expected = torch.arange(inputs) // group
        if not torch.equal(index[order], expected):
            raise StartupError(f"tensor {name} must name each of {inputs // group} groups {group} times")
        return None if torch.equal(index, expected) else order


def _columns(words: Tensor, bits: int, order: Sequence[int]) -> Tensor:
    """words int32 [R, C], each of 32 / bits integers; order: the place of each from the lowest bits up.

    Returns uint8 [C * 32 / bits, R]: the columns, each as a row.
    """
    rows, count = words.shape
    q = torch.empty((count, 32 // bits, rows), dtype=torch.uint8, device=words.device)
    for part, place in enumerate(order):
        q[:, place] = ((words >> (bits * part)) & (2**bits - 1)).t()
    return q.view(-1, rows)


def _sizes(name: str, packed: Tensor, per_row: int, per_column: int) -> tuple[int, int]:
    """(rows, columns) of a packed matrix once it is unpacked."""
    if packed.dim() != 2 or not packed.numel():
        raise StartupError(f"tensor {name} has shape {list(packed.shape)}, must be a matrix")
    return packed.shape[0] * per_row, packed.shape[1] * per_column


def _require(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise StartupError(f"tensor {name} has shape {list(tensor.shape)}, its qweight needs {list(shape)}")
