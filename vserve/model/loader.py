"""load: a model's files, or random numbers in their place, -> a ``Decoder`` ready to run.

Owns what form each part of a model takes on a device; which tensors there are is tensors.py's.  All are checked before
the first is read.  Knows no file format.  Runs on the engine thread, and on a few of its own.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Final, Protocol

import torch
from torch import Tensor

from vserve.kernels import reference
from vserve.model import quant
from vserve.model.config import ModelConfig
from vserve.model.decoder import Decoder
from vserve.model.layers import Block, DenseEmbedding, Embedding, StoredEmbedding
from vserve.model.linear import GroupedLinear, Linear, dense_linear, has_grouped
from vserve.model.source import ModelSource
from vserve.model.tensors import EMBEDDING, HEAD, NORM, check, expected_shapes, linear_numbers
from vserve.model.upload import MOST_THREADS, Uploader
from vserve.model.weights import StoredTensor, Weights

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
    progress: Progress | None = None,
) -> Decoder:
    """Read source's weights, or with load_format "dummy" draw random ones from seed, onto device in dtype.

    On a CPU in float32, quantised weights stay as they are; everywhere else they become dtype.  StartupError for a
    tensor that is missing, of a wrong shape or unknown.  The decoder does not depend on the files.
    """
    if load_format == "dummy":
        return load_dummy(source.config, device=device, dtype=dtype, seed=seed, progress=progress)
    return load_weights(source.open_weights(), source.config, device=device, dtype=dtype, progress=progress)


def load_weights(
    weights: Weights,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
    dense_copy_limit: int = DENSE_COPY_LIMIT,
) -> Decoder:
    """The decoder of config with the tensors of weights; errors as in load."""
    check(weights, config)
    copies = 4 * linear_numbers(config) <= dense_copy_limit
    if device.type != "cuda":
        return _build(_StoredParts(weights, config.tie_embeddings, device, dtype, copies), config, progress)
    with closing(Uploader(device)) as uploader:
        parts = _StoredParts(weights, config.tie_embeddings, device, dtype, copies, uploader)
        return _build(parts, config, progress, MOST_THREADS)


def load_dummy(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    progress: Progress | None = None,
) -> Decoder:
    """The decoder of config with weights drawn from seed on device: normal, spread 0.02; norms are 1, biases 0."""
    return _build(_DummyParts(config, device, dtype, seed), config, progress)


class _Parts(Protocol):
    """Where the pieces of a decoder come from.  Called on several threads at once."""

    total_bytes: int

    @property
    def done_bytes(self) -> int: ...

    def vector(self, name: str) -> Tensor:
        """A norm's weight, in the model's dtype on its device."""

    def linear(self, *modules: str) -> Linear:
        """The layer of modules' weights, and biases where there are any, stacked in this order."""

    def ends(self) -> tuple[Embedding, Linear]:
        """The embedding and the head."""


def _build(parts: _Parts, config: ModelConfig, progress: Progress | None, most_threads: int | None = None) -> Decoder:
    """One layer on each thread at a time: what is done to a layer is many operations too small to share."""
    threads = torch.get_num_threads()
    loaders = threads if most_threads is None else min(threads, most_threads)
    blocks = []
    try:
        with ThreadPoolExecutor(loaders, "loader", torch.set_num_threads, (1,)) as pool:
            ends = pool.submit(parts.ends)
            for block in pool.map(partial(_block, parts), range(config.num_layers)):
                blocks.append(block)
                if progress is not None:
                    progress(parts.done_bytes, parts.total_bytes)
            embedding, head = ends.result()
    finally:
        torch.set_num_threads(threads)  # some of what the pool's threads have set is the process's
    norm = parts.vector(NORM)
    if progress is not None:
        progress(parts.total_bytes, parts.total_bytes)
    if norm.device.type == "cuda":
        from vserve.model.gpu_decoder import GpuDecoder  # its kernels need Triton, which torch for CPUs comes without

        return GpuDecoder(config, embedding, blocks, norm, head)
    return Decoder(config, reference, embedding, blocks, norm, head)


def _block(parts: _Parts, layer: int) -> Block:
    attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
    return Block(
        attention_norm=parts.vector(f"model.layers.{layer}.input_layernorm.weight"),
        qkv=parts.linear(attention + "q_proj", attention + "k_proj", attention + "v_proj"),
        output=parts.linear(attention + "o_proj"),
        mlp_norm=parts.vector(f"model.layers.{layer}.post_attention_layernorm.weight"),
        gate_up=parts.linear(mlp + "gate_proj", mlp + "up_proj"),
        down=parts.linear(mlp + "down_proj"),
    )


class _StoredParts:
    """Parts from the tensors of a file."""

    def __init__(
        self,
        weights: Weights,
        tied: bool,
        device: torch.device,
        dtype: torch.dtype,
        copies: bool,
        uploader: Uploader | None = None,
    ) -> None:
        self._weights = weights
        self._uploader = uploader
        self._tied = tied
        self._device = device
        self._dtype = dtype
        self._grouped = has_grouped(device, dtype)
        self._copies = copies
        self._taken: list[int] = []
        self.total_bytes = weights.total_bytes

    @property
    def done_bytes(self) -> int:
        return min(sum(self._taken), self.total_bytes)

    def vector(self, name: str) -> Tensor:
        return self._take(name).dense(self._dtype).to(self._device)

    def linear(self, *modules: str) -> Linear:
        stored = [self._take(f"{module}.weight") for module in modules]
        # All have a bias or none has: check() has seen to it.
        biases = [self.vector(f"{module}.bias") for module in modules if f"{module}.bias" in self._weights]
        return self._linear(stored, torch.cat(biases) if biases else None)

    def ends(self) -> tuple[Embedding, Linear]:
        stored = self._take(EMBEDDING)
        if self._tied:
            table = None if self._device.type == "cpu" else self._dense([stored])
            head = self._linear([stored], None) if table is None else dense_linear(table)
            return self._embedding(stored, table), head
        return self._embedding(stored, None), self._linear([self._take(HEAD)], None)

    def _take(self, name: str) -> StoredTensor:
        stored = self._weights.get(name)
        self._taken.append(stored.nbytes)  # one operation, so no lock
        return stored

    def _embedding(self, stored: StoredTensor, table: Tensor | None) -> Embedding:
        """The rows as they are stored, in memory of our own; table: one already on the device, to share."""
        if stored.quantised and self._device.type == "cpu":
            return StoredEmbedding(stored.select_rows(torch.arange(stored.shape[0])), self._dtype)
        if table is None:
            table = self._dense([stored], self._dtype if stored.quantised else stored.data.dtype)
        return DenseEmbedding(table, self._dtype)

    def _linear(self, stored: Sequence[StoredTensor], bias: Tensor | None) -> Linear:
        if not (self._grouped and all(quant.can_group(part.kind) for part in stored)):
            return dense_linear(self._dense(stored), bias)
        q, scale, minimum = (torch.cat(part) for part in zip(*map(quant.unpack_groups, stored), strict=True))
        many = dense_linear(self._dense(stored), bias) if self._copies else None
        return GroupedLinear(q, scale, minimum, bias, many)

    def _dense(self, stored: Sequence[StoredTensor], dtype: torch.dtype | None = None) -> Tensor:
        """The numbers of all parts one below the other, [sum of rows, cols], on the device; dtype None: the model's."""
        rows = sum(part.shape[0] for part in stored)
        weight = torch.empty((rows, stored[0].shape[1]), dtype=dtype or self._dtype, device=self._device)
        start = 0
        for part in stored:
            target = weight[start : start + part.shape[0]]
            if self._uploader is None:
                part.write_rows(0, part.shape[0], target)
            else:
                self._uploader.rows(target, part.write_rows)
            start += part.shape[0]
        return weight


class _DummyParts:
    """Parts drawn at random on the device itself, each tensor from a seed of its own: threads change nothing."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self._shapes = expected_shapes(config)
        self._device = device
        self._dtype = dtype
        self._seed = seed
        self._drawn: list[int] = []
        self.total_bytes = sum(math.prod(shape) for shape in self._shapes.values()) * dtype.itemsize

    @property
    def done_bytes(self) -> int:
        return min(sum(self._drawn), self.total_bytes)

    def vector(self, name: str) -> Tensor:
        return torch.ones(self._shapes[name], dtype=self._dtype, device=self._device)

    def linear(self, *modules: str) -> Linear:
        shapes = [self._shapes[f"{module}.weight"] for module in modules]
        outputs, inputs = sum(shape[0] for shape in shapes), shapes[0][1]
        biased = f"{modules[0]}.bias" in self._shapes
        bias = torch.zeros(outputs, dtype=self._dtype, device=self._device) if biased else None
        return dense_linear(self._matrix(modules[0], outputs, inputs), bias)

    def ends(self) -> tuple[Embedding, Linear]:
        rows, cols = self._shapes[EMBEDDING]
        table = self._matrix(EMBEDDING, rows, cols)
        head = self._matrix(HEAD, rows, cols) if HEAD in self._shapes else table
        return DenseEmbedding(table, self._dtype), dense_linear(head)

    def _matrix(self, name: str, rows: int, cols: int) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(self._seed + (zlib.crc32(name.encode()) << 32))
        weight = torch.empty((rows, cols), dtype=self._dtype, device=self._device)
        self._drawn.append(weight.nbytes)
        return weight.normal_(0.0, _DUMMY_SPREAD, generator=generator)
