"""The operations a decoder is made of, as one Protocol that every back end satisfies, and what a step is made of.

``vserve.kernels.reference`` (plain PyTorch: the CPU back end and the oracle) and ``vserve.kernels.cuda`` (Triton) are
modules with these functions, so a drifting signature is a type error.  Kernels take tensors and plain numbers only:
``Step`` and ``KvCache`` are for their callers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """The tensors of one forward pass over T tokens of R sequences, flattened; a step mixes prefill chunks and decodes.
    All are on the model's device.

    ids [T] int64: token ids.  positions [T] int64: place of each token in its sequence.
    slots [T] int64: block * block_size + offset, where the token's key and value go.
    query_starts [R + 1] int32: tokens of sequence r are rows query_starts[r] to query_starts[r + 1].
    context_lens [R] int32: keys that sequence r has after this step's tokens are written.
    block_tables [R, M] int32: blocks of each sequence in order, padded with 0.
    logit_rows [S] int64: rows of the flattened tokens whose logits are wanted.
    query_lens, context_lens_host: the same lengths on the host, for back ends that launch by shape.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    logit_rows: Tensor
    query_lens: tuple[int, ...]
    context_lens_host: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KvCache:
    """Paged keys and values of all layers.

    pairs[l] [num_blocks, block_size, 2, kv_heads, head_dim]: the key of a slot, then its value.  They lie side by side
    so that a token is written, and a sequence is gathered, by one operation a layer.
    """

    pairs: tuple[Tensor, ...]
    block_size: int
    num_blocks: int

    @property
    def keys(self) -> tuple[Tensor, ...]:
        """One view a layer, [num_blocks, block_size, kv_heads, head_dim]."""
        return tuple(pair[:, :, 0] for pair in self.pairs)

    @property
    def values(self) -> tuple[Tensor, ...]:
        """One view a layer, [num_blocks, block_size, kv_heads, head_dim]."""
        return tuple(pair[:, :, 1] for pair in self.pairs)


class Ops(Protocol):
    """What a back end provides.  T tokens, D model width, Hq query heads, Hk key heads, E head width."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, D], weight [D] -> [T, D] in x's dtype, computed in float32."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); overwrites residual with the sum."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """LayerNorm of x [T, D] with weight, bias [D] -> [T, D] in x's dtype, computed in float32."""

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(layer_norm(x + residual), x + residual); overwrites residual with the sum."""

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """gate_up [T, 2F] -> activation(first half) * second half [T, F].

        activation: "silu", "relu", "gelu" or "gelu_tanh", here and below.
        """

    def activate(self, x: Tensor, activation: str) -> Tensor:
        """activation(x), [T, F]; x is undefined afterwards."""

    def plan(
        self,
        positions: Tensor,
        slots: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
        query_lens: tuple[int, ...],
        context_lens_host: tuple[int, ...],
        cos: Tensor,
        sin: Tensor,
        block_size: int,
    ) -> object:
        """What every layer of one step shares, worked out once; handed as it is to the two operations below.

        cos, sin [max positions, R * E / 2] float32: R rotations of every position side by side; the rest as in
        Step and KvCache.
        """

    def rope_and_write(
        self,
        qkv: Tensor,
        pairs: Tensor,
        plan: object,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
        rotation: int = 0,
    ) -> Tensor:
        """Rotate queries and keys (halves layout), write keys and values to the plan's slots; returns the queries.

        qkv [T, (Hq + 2 Hk) * E]: queries, keys, values; undefined afterwards, but for the queries [T, Hq, E] returned,
        which may be a view of it.  pairs: one layer of KvCache.pairs.  q_norm, k_norm [E], both or neither: each head
        is RMS-normalised before it is rotated.  rotation: which of the tables that lie side by side in cos and sin.
        """

    def paged_attention(
        self,
        q: Tensor,
        pairs: Tensor,
        plan: object,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal attention of q [T, Hq, E] over the pages of each token's own sequence -> [T, Hq * E].

        q is contiguous, or a view of the qkv that rope_and_write had.  window: a token sees so many, itself included;
        pages that no token of the step sees are not read.  softcap: scores become softcap * tanh(score / softcap).
        """
