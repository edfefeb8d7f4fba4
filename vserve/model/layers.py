"""The parts of a decoder that are neither operations nor plain linears: a block's weights, embeddings, rotary tables.

Knows the shapes of a model and the formulas of its position scaling; nothing of files, steps or caches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from vserve.model.config import ModelConfig, RopeKind, RopeScaling
from vserve.model.linear import Linear
from vserve.model.weights import StoredTensor


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The weights of one decoder layer.

    qkv: queries, keys, values stacked, D -> (Hq + 2 Hk) * E.  gate_up: both halves of the gated MLP stacked, D -> 2F.
    attention_norm, mlp_norm [D] in the model's dtype.
    """

    attention_norm: Tensor
    qkv: Linear
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Embedding(Protocol):
    """ids [T] int64 -> [T, D] in the model's dtype, in new memory."""

    def __call__(self, ids: Tensor) -> Tensor: ...


class DenseEmbedding:
    """A table [V, D] in its stored float dtype, on any device; the rows that are looked up are converted to dtype."""

    def __init__(self, table: Tensor, dtype: torch.dtype) -> None:
        self._table = table
        self._dtype = dtype

    def __call__(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self._table).to(self._dtype)


class StoredEmbedding:
    """A quantised table as its file stores it, in CPU memory; the rows that are looked up are dequantised."""

    def __init__(self, stored: StoredTensor, dtype: torch.dtype) -> None:
        self._stored = stored
        self._dtype = dtype

    def __call__(self, ids: Tensor) -> Tensor:
        return self._stored.select_rows(ids).dense(self._dtype)


def rotary_tables(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [max_position, head_dim / 2] float32: the rotation of every position a sequence may reach."""
    frequencies, magnitude = rotary_frequencies(config)
    angles = torch.arange(config.max_position, dtype=torch.float32, device=device)[:, None] * frequencies.to(device)
    return angles.cos().mul_(magnitude), angles.sin().mul_(magnitude)


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position [head_dim / 2] float32 on the CPU, and the factor of cos and sin."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
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
        return config.head_dim * span / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    width = high - low if high > low else 0.001
    stretched = ((torch.arange(plain.shape[0], dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return plain / scaling.factor * stretched + plain * (1.0 - stretched)
