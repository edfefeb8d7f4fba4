"""load: a model's files, or random numbers in their place, -> a ``Decoder`` ready to run.

Owns what form each part of a model takes on a device; which tensors there are is tensors.py's.  All names and shapes
are checked before the first tensor is read, and that every number is finite while it is.  Knows no file format.  Runs
on the engine thread, and on a few of its own.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor

from vserve.errors import StartupError
from vserve.kernels import reference
from vserve.model import cache_scales, quant
from vserve.model.config import ModelConfig, NormKind
from vserve.model.decoder import Decoder
from vserve.model.experts import Experts, GroupedExperts, Routing
from vserve.model.families import Names, family_of
from vserve.model.grouped_weights import GroupedTensor
from vserve.model.layers import (
    Block,
    Chain,
    DenseEmbedding,
    Embedding,
    FittedEmbedding,
    Mlp,
    Norm,
    Positions,
    StoredEmbedding,
    rotary_order,
)
from vserve.model.linear import GroupedLinear, Linear, PlainLinear, dense_linear, has_grouped
from vserve.model.quantised_linear import Place, online_fp8, quantised_dummy, quantised_linear
from vserve.model.quantization import Quantization
from vserve.model.source import ModelSource
from vserve.model.tensors import check, expected, expected_shapes, linear_numbers
from vserve.model.upload import MOST_THREADS, Uploader
from vserve.model.weights import StoredTensor, Weights

if TYPE_CHECKING:  # its kernels need Triton, which torch for CPUs comes without
    from vserve.kernels.moe_packed import Stack

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Told (done, total) bytes after each part of the model, on the thread that loads."""

DENSE_COPY_LIMIT: Final = 4 << 30
"""Most bytes of float32 copies kept beside quantised weights, for steps of many rows; a larger model goes without."""

_DUMMY_SPREAD: Final = 0.02


def load(
    source: ModelSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load_format: str = "auto",
    seed: int = 0,
    allow_nan: bool = False,
    progress: Progress | None = None,
    quantization: Quantization | None = None,
) -> Decoder:
    """Read source's weights, or with load_format "dummy" draw random ones from seed, onto device in dtype.

    Quantised weights stay as they are on a GPU, and on a CPU in float32; elsewhere they become dtype.  quantization:
    what ``choose`` gave for source.  StartupError for a tensor that is missing, of a wrong shape or unknown, or, unless
    allow_nan, not finite.  The decoder does not depend on the files.
    """
    if load_format == "dummy":
        return load_dummy(
            source.config, device=device, dtype=dtype, seed=seed, progress=progress, quantization=quantization
        )
    return load_weights(
        source.open_weights(),
        source.config,
        device=device,
        dtype=dtype,
        progress=progress,
        allow_nan=allow_nan,
        make_fp8=quantization is not None and quantization.online,
    )


def load_weights(
    weights: Weights,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
    dense_copy_limit: int = DENSE_COPY_LIMIT,
    allow_nan: bool = False,
    for_gpu: bool | None = None,
    make_fp8: bool = False,
) -> Decoder:
    """The decoder of config with the tensors of weights; errors as in load.  make_fp8: of plain layers, as they load.

    for_gpu: in the form for a GPU, whatever the device: on a CPU its kernels are interpreted.  None: by the device.
    """
    for_gpu = device.type == "cuda" if for_gpu is None else for_gpu
    names = check(weights, config)
    copies = 4 * linear_numbers(config) <= dense_copy_limit
    if device.type != "cuda":
        parts = _StoredParts(weights, config, names, device, dtype, copies, for_gpu, make_fp8)
        decoder = _build(parts, config, names, progress)
    else:
        with closing(Uploader(device)) as uploader:
            parts = _StoredParts(weights, config, names, device, dtype, copies, for_gpu, make_fp8, uploader)
            decoder = _build(parts, config, names, progress, MOST_THREADS)
    if not allow_nan:
        parts.verify()
    return decoder


def load_dummy(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    progress: Progress | None = None,
    quantization: Quantization | None = None,
) -> Decoder:
    """The decoder of config with weights drawn from seed on device: spread 0.02, normal where they are not quantised.

    Norms are 1, biases 0.
    """
    names = family_of(config.architecture).names
    return _build(_DummyParts(config, names, device, dtype, seed, quantization), config, names, progress)


class _Parts(Protocol):
    """Where the pieces of a decoder come from.  Called on several threads at once."""

    total_bytes: int
    for_gpu: bool

    @property
    def done_bytes(self) -> int: ...

    def norm(self, module: str) -> Norm:
        """A norm, its weight as it is to be multiplied with, on the device."""

    def table(self, module: str, rows: int) -> Tensor:
        """The first rows of a matrix in the model's dtype on its device."""

    def linear(self, *modules: str, order: Tensor | None = None) -> Linear:
        """The layer of modules' weights, and biases where there are any, stacked in this order.

        order: where each row of the stack comes from, when not from its own place.
        """

    def stack(self, experts: Sequence[tuple[str, ...]], outputs: int, inputs: int) -> Tensor | Stack:
        """The weights of experts on a GPU: of each its modules', one below the other, [outputs, inputs] in all.

        Packed where the weights of all are, and alike; else [experts, outputs, inputs] in the model's dtype.
        """

    def ends(self) -> tuple[Embedding, Linear]:
        """The embedding and the head, without their projections."""

    def kv_scales(self, prefix: str) -> tuple[float, float] | None:
        """Those of the layer whose names begin with prefix, as cache_scales.read has them."""


def _build(
    parts: _Parts, config: ModelConfig, names: Names, progress: Progress | None, most_threads: int | None = None
) -> Decoder:
    """One layer on each thread at a time: what is done to a layer is many operations too small to share."""
    threads = torch.get_num_threads()
    loaders = threads if most_threads is None else min(threads, most_threads)
    blocks = []
    make = partial(_block, parts, config, names, rotary_order(config))
    try:
        with ThreadPoolExecutor(loaders, "loader", torch.set_num_threads, (1,)) as pool:
            ends = pool.submit(_ends, parts, config, names)
            for block in pool.map(make, range(config.num_layers)):
                blocks.append(block)
                if progress is not None:
                    progress(parts.done_bytes, parts.total_bytes)
            embedding, head = ends.result()
    finally:
        torch.set_num_threads(threads)  # some of what the pool's threads have set is the process's
    norm = parts.norm(names.base + names.final_norm) if config.final_norm else None
    positions = None
    if config.position_offset is not None:
        table = parts.table(f"{names.base}{names.positions}", config.max_position + config.position_offset)
        positions = Positions(table, config.position_offset)
    if progress is not None:
        progress(parts.total_bytes, parts.total_bytes)
    if parts.for_gpu:
        from vserve.model.gpu_decoder import GpuDecoder  # its kernels need Triton, which torch for CPUs comes without

        return GpuDecoder(config, embedding, blocks, norm, head, positions)
    return Decoder(config, reference, embedding, blocks, norm, head, positions)


def _ends(parts: _Parts, config: ModelConfig, names: Names) -> tuple[Embedding, Linear]:
    embedding, head = parts.ends()
    if config.embedding_size is None:
        return (
            (embedding, head)
            if config.embedding_scale == 1.0
            else (
                FittedEmbedding(embedding, config.embedding_scale, None),
                head,
            )
        )
    inward = parts.linear(f"{names.base}{names.project_in}")
    outward = parts.linear(f"{names.base}{names.project_out}")
    return FittedEmbedding(embedding, config.embedding_scale, inward), Chain(outward, head)


def _block(parts: _Parts, config: ModelConfig, names: Names, order: Tensor | None, layer: int) -> Block:
    prefix = names.base + names.layer.format(layer)
    window = config.window(layer)
    if config.has_experts(layer):
        mlp: Mlp | Experts = _experts(parts, config, names, prefix)
    else:
        up = parts.linear(*(prefix + name for name in names.gate_up))
        mlp = Mlp(up, parts.linear(prefix + names.down))
    return Block(
        attention_norm=parts.norm(prefix + names.attention_norm),
        qkv=parts.linear(*(prefix + name for name in names.qkv), order=order),
        output=parts.linear(prefix + names.output),
        mlp_norm=parts.norm(prefix + names.mlp_norm),
        mlp=mlp,
        q_norm=parts.norm(prefix + names.q_norm).weight if config.qk_norm else None,
        k_norm=parts.norm(prefix + names.k_norm).weight if config.qk_norm else None,
        attention_post_norm=parts.norm(prefix + names.attention_post_norm).weight if config.sandwich else None,
        mlp_post_norm=parts.norm(prefix + names.mlp_post_norm).weight if config.sandwich else None,
        window=window,
        rotation=1 if window is not None and config.local_rope_theta is not None else 0,
        kv_scales=parts.kv_scales(prefix),
    )


def _experts(parts: _Parts, config: ModelConfig, names: Names, prefix: str) -> Experts:
    wanted = config.experts
    assert wanted is not None
    router = parts.linear(prefix + names.router)
    inside = [prefix + names.expert.format(number) for number in range(wanted.count)]
    if not parts.for_gpu:
        routing = Routing(router, wanted.active, wanted.normalised)
        gate_up = [parts.linear(*(expert + name for name in names.expert_gate_up)) for expert in inside]
        return GroupedExperts(
            routing, gate_up, [parts.linear(expert + names.expert_down) for expert in inside], reference.silu_mul
        )
    from vserve.model.gpu_experts import GpuExperts  # its kernels need Triton, which torch for CPUs comes without

    inner, width = wanted.intermediate_size, config.hidden_size
    up = parts.stack([tuple(expert + name for name in names.expert_gate_up) for expert in inside], 2 * inner, width)
    down = parts.stack([(expert + names.expert_down,) for expert in inside], width, inner)
    return GpuExperts(router, wanted.active, wanted.normalised, up, down)


class _StoredParts:
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


class _DummyParts:
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
