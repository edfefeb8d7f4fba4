"""DummyParts: the pieces of a decoder drawn at random on its device, to time a model without its weights.

Several threads at once.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from vserve.model.config import ModelConfig, NormKind
from vserve.model.families import Names
from vserve.model.layers import DenseEmbedding, Embedding, Norm
from vserve.model.linear import Linear, dense_linear
from vserve.model.quantised_linear import quantised_dummy
from vserve.model.quantization import Quantization
from vserve.model.tensors import expected_shapes

if TYPE_CHECKING:  # its kernels need Triton, which torch for CPUs comes without
    from vserve.kernels.moe_packed import Stack

_DUMMY_SPREAD: Final = 0.02


class DummyParts:
    """Parts drawn at random on the device itself, each tensor from a seed of its own: threads change nothing."""

    def __init__(
        self,
        config: ModelConfig,
        names: Names,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        quantization: Quantization | None = None,
    ) -> None:
        self._quantization = quantization
        self._shapes = expected_shapes(config)
        self._config = config
        self._names = names
        self.device = device
        self.for_gpu = device.type == "cuda"
        self._dtype = dtype
        self._seed = seed
        self._drawn: list[int] = []
        self.total_bytes = sum(math.prod(shape) for shape in self._shapes.values()) * dtype.itemsize

    @property
    def done_bytes(self) -> int:
        return min(sum(self._drawn), self.total_bytes)

    def norm(self, module: str) -> Norm:
        weight = torch.ones(self._shapes[f"{module}.weight"], dtype=self._dtype, device=self.device)
        return Norm(weight, torch.zeros_like(weight) if self._config.norm is NormKind.LAYER else None)

    def table(self, module: str, rows: int) -> Tensor:
        return self._matrix(module, rows, self._shapes[f"{module}.weight"][1])

    def linear(self, *modules: str, order: Tensor | None = None) -> Linear:
        shapes = [self._turned(f"{module}.weight") for module in modules]
        outputs, inputs = sum(shape[0] for shape in shapes), shapes[0][1]
        biased = f"{modules[0]}.bias" in self._shapes
        bias = torch.zeros(outputs, dtype=self._dtype, device=self.device) if biased else None
        weight = self._matrix(modules[0], outputs, inputs)
        if self._quantization is None:
            return dense_linear(weight, bias)
        return quantised_dummy(weight, bias, self._quantization)

    def stack(self, experts: Sequence[tuple[str, ...]], outputs: int, inputs: int) -> Tensor | Stack:
        count = len(experts)
        if self._quantization is not None:
            from vserve.model.gpu_experts import stacked

            # What quantises a weight takes several times its memory beside it.
            some = next(size for size in (8, 4, 2, 1) if count % size == 0)
            parts = (
                quantised_dummy(self._matrix(modules[0], some * outputs, inputs), None, self._quantization)
                for modules in experts[::some]
            )
            packed = stacked(parts, count // some)
            if packed is not None:
                return packed.split(some)
        return self._matrix(experts[0][0], count * outputs, inputs).view(count, outputs, inputs)

    def ends(self) -> tuple[Embedding, Linear]:
        embedding, head = f"{self._names.base}{self._names.embedding}.weight", f"{self._names.head}.weight"
        rows, cols = self._shapes[embedding]
        table = self._matrix(embedding, rows, cols)
        other = self._matrix(head, rows, cols) if head in self._shapes else table
        return DenseEmbedding(table, self._dtype), dense_linear(other)

    def kv_scales(self, prefix: str) -> tuple[float, float] | None:
        return None

    def _turned(self, name: str) -> tuple[int, ...]:
        shape = self._shapes[name]
        return shape[::-1] if self._config.transposed else shape

    def _matrix(self, name: str, rows: int, cols: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(self._seed + (zlib.crc32(name.encode()) << 32))
        weight = torch.empty((rows, cols), dtype=self._dtype, device=self.device)
        self._drawn.append(weight.nbytes)
        return weight.normal_(0.0, _DUMMY_SPREAD, generator=generator)
