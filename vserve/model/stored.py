"""StoredParts: the pieces of a decoder from the tensors of a file.

Owns what form a stored tensor takes on a device, and that its numbers are finite; knows no file format.  Several
threads at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vserve.errors import StartupError
from vserve.model import cache_scales, quant
from vserve.model.config import ModelConfig, NormKind
from vserve.model.families import Names
from vserve.model.grouped_weights import GroupedTensor
from vserve.model.layers import DenseEmbedding, Embedding, Norm, StoredEmbedding
from vserve.model.linear import GroupedLinear, Linear, PlainLinear, dense_linear, has_grouped
from vserve.model.quantised_linear import Place, online_fp8, quantised_linear
from vserve.model.tensors import expected
from vserve.model.upload import Uploader
from vserve.model.weights import StoredTensor, Weights

if TYPE_CHECKING:  # its kernels need Triton, which torch for CPUs comes without
    from vserve.kernels.moe_packed import Stack

log = logging.getLogger(__name__)


class StoredParts:
    """Parts from the tensors of a file."""

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        names: Names,
        device: torch.device,
        dtype: torch.dtype,
        copies: bool,
        for_gpu: bool,
        make_fp8: bool = False,
        uploader: Uploader | None = None,
    ) -> None:
        self._make_fp8 = make_fp8
        self.for_gpu = for_gpu
        self._weights = weights
        self._uploader = uploader
        self._config = config
        self._names = names
        self._biases = frozenset(name for name, _ in expected(config, names) if name.endswith(".bias"))
        self.device = device
        self._dtype = dtype
        self._grouped = not for_gpu and has_grouped(device, dtype)
        self._copies = copies
        self._taken: list[int] = []
        self._noted: list[tuple[tuple[str, ...], Tensor]] = []
        self.total_bytes = weights.total_bytes

    @property
    def done_bytes(self) -> int:
        return min(sum(self._taken), self.total_bytes)

    def norm(self, module: str) -> Norm:
        weight = self._vector(f"{module}.weight", torch.float32)
        if self._config.norm is NormKind.RMS_PLUS_ONE:
            weight += 1.0  # in float32, and left so: in bfloat16 the sum would lose most of what was learned
        else:
            weight = weight.to(self._dtype)
        biased = self._config.norm is NormKind.LAYER
        bias = self._vector(f"{module}.bias", self._dtype).to(self.device) if biased else None
        return Norm(weight.to(self.device), bias)

    def table(self, module: str, rows: int) -> Tensor:
        return self._dense([self._take(f"{module}.weight").rows(0, rows)])

    def linear(self, *modules: str, order: Tensor | None = None) -> Linear:
        stored = [self._take(f"{module}.weight") for module in modules]
        # All have a bias or none has.  The file may hold more, of zeros: check() has seen to it.
        biases = [self._vector(f"{module}.bias", self._dtype) for module in modules if f"{module}.bias" in self._biases]
        bias = torch.cat(biases) if biases else None
        if order is not None:
            assert len(stored) == 1, "rows that change places are those of one fused projection"
            stored = [stored[0].select_rows(order)]
            bias = None if bias is None else bias[order]
        bias = None if bias is None else bias.to(self.device)
        if self._make_fp8 and not (stored[0].quantised or modules[0].endswith(self._names.router)):
            # Not through the uploader: its copies may still be under way when the weight is read here.
            weight = torch.cat([part.dense(self._dtype) for part in stored]).to(self.device)
            self._note(tuple(part.name for part in stored), weight.sum(dtype=torch.float32))
            return online_fp8(weight, bias)
        return self._linear(stored, bias)

    def stack(self, experts: Sequence[tuple[str, ...]], outputs: int, inputs: int) -> Tensor | Stack:
        if self._make_fp8 or self._weights.get(f"{experts[0][0]}.weight").quantised:
            from vserve.model.gpu_experts import stacked

            packed = stacked((self.linear(*modules) for modules in experts), len(experts))
            if packed is not None:
                return packed
            log.info("the weights of %s and of its neighbours become plain: they cannot be packed alike", experts[0][0])
        weight = torch.empty((len(experts), outputs, inputs), dtype=self._dtype, device=self.device)
        for into, modules in zip(weight, experts, strict=True):
            self._fill(into, [self._take(f"{module}.weight") for module in modules])
        return weight

    def ends(self) -> tuple[Embedding, Linear]:
        stored = self._take(f"{self._names.base}{self._names.embedding}.weight", turned=False)
        if self._config.tie_embeddings:
            table = self._dense([stored]) if self.for_gpu else None
            head = self._linear([stored], None) if table is None else PlainLinear(table)
            return self._embedding(stored, table), head
        head = self._linear([self._take(f"{self._names.head}.weight", turned=False)], None)
        return self._embedding(stored, None), head

    def kv_scales(self, prefix: str) -> tuple[float, float] | None:
        return cache_scales.read(self._weights, prefix)

    def verify(self) -> None:
        """StartupError naming a tensor that has a NaN or an infinity, in the file or for want of range in the dtype."""
        # One number a tensor, added up in float32: any NaN or infinity is still there.
        totals = torch.stack([numbers.sum(dtype=torch.float32).to(self.device) for _, numbers in self._noted])
        for place in totals.isfinite().logical_not().nonzero().flatten().tolist():
            for name in self._noted[place][0]:
                numbers = self._weights.get(name).dense(torch.float32)
                if not numbers.isfinite().all():
                    raise StartupError(
                        f"tensor {name} holds NaN or infinite numbers: the file is damaged or the model diverged; "
                        "--allow-nan-weights loads it all the same"
                    )
                if not numbers.to(self._dtype).isfinite().all():
                    raise StartupError(f"tensor {name} has numbers too large for {self._dtype}; try --dtype bfloat16")

    def _take(self, name: str, turned: bool = True) -> StoredTensor:
        stored = self._weights.get(name)
        self._taken.append(stored.nbytes)  # one operation, so no lock
        if turned and self._config.transposed and len(stored.shape) == 2 and not name.startswith(self._tables):
            return replace(stored, shape=stored.shape[::-1], data=stored.data.t())
        return stored

    @property
    def _tables(self) -> tuple[str, ...]:
        """Matrices that are no linear layers."""
        return (f"{self._names.base}{self._names.positions}.",)

    def _vector(self, name: str, dtype: torch.dtype) -> Tensor:
        vector = self._take(name).dense(dtype)
        self._note((name,), vector)
        return vector

    def _note(self, names: tuple[str, ...], numbers: Tensor) -> None:
        # On a GPU the numbers may still be on their way: they are added up at the end, and kept by the decoder anyway.
        self._noted.append((names, numbers.sum(dtype=torch.float32) if numbers.device.type == "cpu" else numbers))

    def _embedding(self, stored: StoredTensor, table: Tensor | None) -> Embedding:
        """The rows as they are stored, in memory of our own; table: one already on the device, to share."""
        if stored.quantised and not self.for_gpu:
            return StoredEmbedding(stored.select_rows(torch.arange(stored.shape[0])), self._dtype)
        if table is None:
            # A CPU keeps what the file has; on a GPU memory is dearer, and the rows become the model's type anyway.
            table = self._dense([stored], self._dtype if stored.quantised or self.for_gpu else stored.data.dtype)
        return DenseEmbedding(table, self._dtype)

    def _linear(self, stored: Sequence[StoredTensor], bias: Tensor | None) -> Linear:
        if self.for_gpu or any(isinstance(part, GroupedTensor) for part in stored):
            place = Place(self.device, self._dtype, self.for_gpu)
            made = quantised_linear(stored, bias, place, partial(self._plain, stored, bias), self._copies, self._note)
            return self._plain(stored, bias) if made is None else made
        if not (self._grouped and all(quant.can_group(part.kind) for part in stored)):
            return self._plain(stored, bias)
        q, scale, minimum = (torch.cat(part) for part in zip(*map(quant.unpack_groups, stored), strict=True))
        names = tuple(part.name for part in stored)
        self._note(names, scale)
        self._note(names, minimum)
        many = self._plain(stored, bias) if self._copies else None
        return GroupedLinear(q, scale, minimum, bias, many)

    def _plain(self, stored: Sequence[StoredTensor], bias: Tensor | None) -> Linear:
        weight = self._dense(stored)
        return PlainLinear(weight, bias) if self.for_gpu else dense_linear(weight, bias)

    def _dense(self, stored: Sequence[StoredTensor], dtype: torch.dtype | None = None) -> Tensor:
        """The numbers of all parts one below the other, [sum of rows, cols], on the device; dtype None: the model's."""
        rows = sum(part.shape[0] for part in stored)
        weight = torch.empty((rows, stored[0].shape[1]), dtype=dtype or self._dtype, device=self.device)
        self._fill(weight, stored)
        return weight

    def _fill(self, weight: Tensor, stored: Sequence[StoredTensor]) -> None:
        start = 0
        for part in stored:
            target = weight[start : start + part.shape[0]]
            if self._uploader is None:
                part.write_rows(0, part.shape[0], target)
            else:
                self._uploader.rows(target, part.write_rows)
            start += part.shape[0]
        self._note(tuple(part.name for part in stored), weight)
