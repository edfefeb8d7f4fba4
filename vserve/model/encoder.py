"""The encoder: BERT and its kin, from token ids to token vectors, pooled vectors or scores.

Devlin et al. 2018, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692.  Knows nothing of texts, files or requests.
One thread computes at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vserve.model.encoder_config import EncoderConfig, ScoreScale
from vserve.model.encoder_source import Pooling
from vserve.model.linear import Linear
from vserve.model.packed import Group, PackedTexts, pack


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A layer norm's weight and bias, [D]."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class EncoderBlock:
    """The weights of one layer.  qkv: queries, keys, values stacked, D -> 3D.  up: D -> F with the activation."""

    qkv: Linear
    output: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    mlp_norm: Norm


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """Embeddings of ids [V, D], positions [P, D] and token types [Y, D], and the norm of their sum."""

    words: Tensor
    positions: Tensor
    types: Tensor
    norm: Norm


@dataclass(frozen=True, slots=True, eq=False)
class ScoreHead:
    """What makes a score of the first token's vector: D -> D, tanh, D -> 1."""

    dense: Linear
    out: Linear


class Encoder:
    """An encoder on one device.

    poolings: the vectors joined in this order; () with a head, which then scores.  normalize: the model's own choice.
    """

    def __init__(
        self,
        config: EncoderConfig,
        tables: Tables,
        blocks: Sequence[EncoderBlock],
        head: ScoreHead | None,
        poolings: Sequence[Pooling],
    ) -> None:
        self.config = config
        self.device = tables.words.device
        self.dtype = tables.words.dtype
        self._tables = tables
        self._blocks = tuple(blocks)
        self._head = head
        self._poolings = tuple(poolings)

    @torch.inference_mode()
    def encode(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] = ()) -> Tensor:
        """One row a text: its pooled vector, or with a head its score, [B, size] float32 on the CPU.

        texts: each 1 to config.max_tokens ids below config.vocab_size; types: token types, () or one list a text, that
        one () for type 0 throughout.  Best sorted by length.
        """
        batch = pack(texts, types or [()] * len(texts), self.device)
        return self.pooled(self.forward(batch), batch).float().cpu()

    @torch.inference_mode()
    def forward(self, batch: PackedTexts) -> Tensor:
        """The last layer's vector of every token, [T, D]."""
        tables, eps = self._tables, self.config.layer_norm_eps
        x = functional.embedding(batch.ids, tables.words)
        x += functional.embedding(batch.places + self.config.first_position, tables.positions)
        x += functional.embedding(batch.types, tables.types)
        x = _normed(x, tables.norm, eps)
        for block in self._blocks:
            attended = self._attend(block.qkv(x), batch.groups)
            x = _normed(block.output(attended).add_(x), block.attention_norm, eps)
            x = _normed(block.down(block.up(x)).add_(x), block.mlp_norm, eps)
        return x

    @torch.inference_mode()
    def pooled(self, x: Tensor, batch: PackedTexts) -> Tensor:
        """x [T, D] -> [B, size] in x's dtype, or float32 where a sum over tokens was taken."""
        if self._head is not None:
            score = self._head.out(torch.tanh(self._head.dense(x[batch.starts]))).float()
            return score.sigmoid() if self.config.score_scale is ScoreScale.SIGMOID else score
        parts = [pool(mode, x, batch) for mode in self._poolings]
        return parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts], dim=1)

    def _attend(self, qkv: Tensor, groups: Sequence[Group]) -> Tensor:
        """qkv [T, 3D] -> [T, D]: every token over all tokens of its own text."""
        heads, width = self.config.num_heads, self.config.head_dim
        out = qkv.new_empty((qkv.shape[0], heads * width))
        for group in groups:
            rows = qkv[group.start : group.stop] if group.gather is None else qkv[group.gather]
            q, k, v = rows.view(group.texts, group.length, 3, heads, width).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=group.mask)
            y = y.transpose(1, 2).reshape(group.texts * group.length, heads * width)
            out[group.start : group.stop] = y if group.scatter is None else y[group.scatter]
        return out


def _normed(x: Tensor, norm: Norm, eps: float) -> Tensor:
    return functional.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, eps)


def pool(mode: Pooling, x: Tensor, batch: PackedTexts) -> Tensor:
    """x [T, D] -> one vector a text [B, D]; sums over tokens are taken, and returned, in float32."""
    lengths = batch.lengths
    match mode:
        case Pooling.CLS:
            return x[batch.starts]
        case Pooling.LAST:
            return x[batch.starts + lengths - 1]
        case Pooling.MAX:
            return torch.segment_reduce(x.float(), "max", lengths=lengths, axis=0)
        case Pooling.MEAN:
            return _sums(x.float(), lengths) / lengths[:, None]
        case Pooling.MEAN_SQRT:
            return _sums(x.float(), lengths) / lengths[:, None].sqrt()
        case Pooling.WEIGHTED_MEAN:
            weights = (batch.places + 1).float()[:, None]
            return _sums(x.float() * weights, lengths) / (lengths * (lengths + 1) / 2)[:, None]


def _sums(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(x, "sum", lengths=lengths, axis=0)
