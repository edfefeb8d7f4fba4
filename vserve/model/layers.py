"""The parts of a decoder that are neither operations nor plain linears: a block's weights, embeddings, rotary tables.

Knows the shapes of a model and the formulas of its position scaling; nothing of files, steps or caches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from vserve.model.config import ModelConfig, RopeKind, RopeScaling
from vserve.model.experts import Experts
from vserve.model.linear import Linear
from vserve.model.weights import StoredTensor


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A norm's weight [D], in the model's dtype or float32.  With a bias [D] it is a LayerNorm, else an RMS norm."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Mlp:
    """up: both halves of a gated MLP stacked, gate first, D -> 2F; without a gate D -> F.  down: F -> D."""

    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The weights of one decoder layer, and what its attention sees.

    qkv: queries, keys, values stacked, D -> (Hq + 2 Hk) * E.  q_norm, k_norm [E]: of each head, both or neither.
    attention_post_norm, mlp_post_norm: of what a layer adds.  window: tokens the attention sees, None for all.
    rotation: which of the model's rotations it uses, 0 or 1.  kv_scales: of keys and of values in an fp8 cache, where
    the checkpoint has them; None: each head's own.
    """

    attention_norm: Norm
    qkv: Linear
    output: Linear
    mlp_norm: Norm
    mlp: Mlp | Experts
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    attention_post_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None
    window: int | None = None
    rotation: int = 0
    kv_scales: tuple[float, float] | None = None


class Embedding(Protocol):
    """ids [T] int64 -> [T, D] in the model's dtype, in new memory."""

    dtype: torch.dtype

    def __call__(self, ids: Tensor) -> Tensor: ...


class DenseEmbedding:
    """A table [V, D] in its stored float dtype, on any device; the rows that are looked up are converted to dtype."""

    def __init__(self, table: Tensor, dtype: torch.dtype) -> None:
        self._table = table
        self.dtype = dtype

    def __call__(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self._table).to(self.dtype)


class StoredEmbedding:
    """A quantised table as its file stores it, in CPU memory; the rows that are looked up are dequantised."""

    def __init__(self, stored: StoredTensor, dtype: torch.dtype) -> None:
        self._stored = stored
        self.dtype = dtype

    def __call__(self, ids: Tensor) -> Tensor:
        return self._stored.select_rows(ids).dense(self.dtype)


class FittedEmbedding:
    """An embedding that is scaled, or projected to the model's width, or both; the factor is rounded to its dtype."""

    def __init__(self, embedding: Embedding, scale: float, projection: Linear | None) -> None:
        self._embedding = embedding
        self._scale = float(torch.tensor(scale, dtype=embedding.dtype))
        self._projection = projection
        self.dtype = embedding.dtype

    def __call__(self, ids: Tensor) -> Tensor:
        x = self._embedding(ids)
        if self._scale != 1.0:
            x = x.mul_(self._scale)
        return x if self._projection is None else self._projection(x)


class Chain:
    """One linear layer behind another."""

    def __init__(self, first: Linear, second: Linear) -> None:
        self._first = first
        self._second = second

    def __call__(self, x: Tensor) -> Tensor:
        return self._second(self._first(x))


class Positions:
    """Learned vectors of positions, a table [offset + max_position, D] in the model's dtype."""

    def __init__(self, table: Tensor, offset: int) -> None:
        self._table = table
        self._offset = offset

    def __call__(self, positions: Tensor) -> Tensor:
        """positions [T] of any int; a negative one is padding and gets some vector -> [T, D]."""
        return functional.embedding(positions.clamp(min=0) + self._offset, self._table)


def rotary_tables(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [max_position, R * head_dim / 2] float32: the R rotations of every position, side by side.

    Pairs that do not rotate have cos 1 and sin 0.
    """
    places = torch.arange(config.max_position, dtype=torch.float32, device=device)[:, None]
    rotations = [rotary_frequencies(config)]
    if config.local_rope_theta is not None:
        rotations.append(rotary_frequencies(replace(config, rope_theta=config.local_rope_theta, rope_scaling=None)))
    tables = []
    for frequencies, magnitude in rotations:
        angles = places * frequencies.to(device)
        cos, sin = angles.cos().mul_(magnitude), angles.sin().mul_(magnitude)
        still = config.head_dim // 2 - frequencies.shape[0]
        tables.append((functional.pad(cos, (0, still), value=1.0), functional.pad(sin, (0, still))))
    return torch.cat([cos for cos, _ in tables], dim=1), torch.cat([sin for _, sin in tables], dim=1)


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position [rotating numbers / 2] float32 on the CPU, and the factor of cos and sin."""
    if config.position_offset is not None:
        return torch.empty(0), 1.0
    rotary_dim = rotating(config)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    plain = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    match scaling.kind:
        case RopeKind.LINEAR:
            return plain / scaling.factor, 1.0
        case RopeKind.DYNAMIC:  # plain up to max_position, and no sequence is longer
            return plain, 1.0
        case RopeKind.LLAMA3:
            return _llama3(plain, scaling), 1.0
        case RopeKind.YARN:
            return _yarn(plain, scaling, config), scaling.attention_factor
        case RopeKind.FACTORS:
            return plain / torch.tensor(scaling.factors, dtype=torch.float32), 1.0
        case RopeKind.LONGROPE:
            # One choice for all sequences: keys that were rotated one way cannot be used with queries of the other.
            is_long = config.max_position > scaling.original_max_position
            factors = scaling.factors if is_long else scaling.short_factors
            return plain / torch.tensor(factors, dtype=torch.float32), scaling.attention_factor


def rotating(config: ModelConfig) -> int:
    """Numbers of a head that are rotated."""
    return config.rotary_dim or config.head_dim


def rotary_order(config: ModelConfig) -> Tensor | None:
    """Where each row of the stacked queries and keys comes from, so that number i of a head rotates with i + E / 2.

    A model that rotates the first part of each head pairs i with i + part / 2.  int64 [(Hq + 2 Hk) * E], values in
    their order; None when nothing moves.
    """
    part, head_dim = rotating(config), config.head_dim
    if part == head_dim:
        return None
    half, still = part // 2, (head_dim - part) // 2
    place = torch.arange(head_dim)
    first, second, rest = place[:half], place[half:part], place[part:]
    head = torch.cat((first, rest[:still], second, rest[still:]))
    heads = config.num_heads + config.num_kv_heads
    turned = (torch.arange(heads)[:, None] * head_dim + head).reshape(-1)
    return torch.cat((turned, torch.arange(heads * head_dim, (heads + config.num_kv_heads) * head_dim)))


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Long waves are stretched by factor, short ones kept, those between blended: the Llama 3.1 model card's rule."""
    turns = scaling.original_max_position * plain / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1.0 - blend) * plain / scaling.factor + blend * plain


def _yarn(plain: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """Peng et al. 2023, arXiv:2309.00071, section 3.2: stretched where a dimension turns seldom, kept where often."""

    def dimension(turns: float) -> float:
        span = math.log(scaling.original_max_position / (turns * 2 * math.pi))
        return rotating(config) * span / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotating(config) - 1)
    width = high - low if high > low else 0.001
    stretched = ((torch.arange(plain.shape[0], dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return plain / scaling.factor * stretched + plain * (1.0 - stretched)
