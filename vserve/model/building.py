"""building: a decoder out of its parts, wherever they come from.

Owns which parts a model has and what form they take; reads no file and draws no number.  Runs on the engine thread, and
on a few of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from vserve.kernels import reference
from vserve.model.config import ModelConfig
from vserve.model.decoder import Decoder
from vserve.model.experts import Experts, GroupedExperts, Routing
from vserve.model.families import Names
from vserve.model.layers import Block, Chain, Embedding, FittedEmbedding, Mlp, Norm, Positions, rotary_order
from vserve.model.linear import Linear

if TYPE_CHECKING:  # its kernels need Triton, which torch for CPUs comes without
    from vserve.kernels.moe_packed import Stack

Progress = Callable[[int, int], None]
"""Told (done, total) bytes after each part of the model, on the thread that loads."""


class Parts(Protocol):
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


def build(
    parts: Parts, config: ModelConfig, names: Names, progress: Progress | None, most_threads: int | None = None
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


def _ends(parts: Parts, config: ModelConfig, names: Names) -> tuple[Embedding, Linear]:
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


def _block(parts: Parts, config: ModelConfig, names: Names, order: Tensor | None, layer: int) -> Block:
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


def _experts(parts: Parts, config: ModelConfig, names: Names, prefix: str) -> Experts:
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
