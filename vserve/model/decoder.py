"""Decoder: one forward pass of a model over a mixed batch of prefill chunks and decodes.

Owns the weights and the order of operations; every operation that touches the cache or could be one kernel is the
back end's (``Ops``).  Knows no request, no queue and no sampling.  One thread at a time.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from vserve.model.config import ModelConfig
from vserve.model.experts import Experts
from vserve.model.layers import Block, Embedding, Mlp, Norm, Positions, rotary_tables
from vserve.model.linear import Linear
from vserve.model.memory import CachePlan
from vserve.model.ops import KvCache, Ops, Step
from vserve.model.threads import Sharing, StepThreads

CACHE_TYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
}
"""The types of keys and values, as a CachePlan names them."""


class Decoder:
    """A model on one device, in one dtype, computing with one back end."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        embedding: Embedding,
        blocks: Sequence[Block],
        norm: Norm | None,
        head: Linear,
        positions: Positions | None = None,
    ) -> None:
        """norm: the last one, None where config has none.  head: D -> V.  positions: where they are learned."""
        self.config = config
        self.device = blocks[0].attention_norm.weight.device
        self.dtype = embedding.dtype
        self._ops = ops
        self._embedding = embedding
        self._positions = positions
        self._blocks = tuple(blocks)
        self._norm = norm
        self._head = head
        self._cos, self._sin = rotary_tables(config, self.device)
        self._scale = config.attention_scale or config.head_dim**-0.5
        self._norms = self._chain()
        self._threads = StepThreads() if self.device.type == "cpu" else None

    def _chain(self) -> tuple[tuple[Norm, Norm | None], ...]:
        """For each block the norm that follows its attention and the one that follows its MLP."""
        if self.config.post_norm:
            return tuple((block.attention_norm, block.mlp_norm) for block in self._blocks)
        following = [*(block.attention_norm for block in self._blocks[1:]), self._norm]
        return tuple((block.mlp_norm, norm) for block, norm in zip(self._blocks, following, strict=True))

    def share_cores(self, sharing: Sharing) -> None:
        """Leave an encoder in this process its part of the cores.  Before the first step."""
        if self._threads is not None:
            self._threads.limit = lambda: sharing.step_threads

    @property
    def num_layers(self) -> int:
        return len(self._blocks)

    @property
    def vocab_size(self) -> int:
        """The width of the logits."""
        return self.config.vocab_size

    def planned_cache(self, plan: CachePlan) -> KvCache:
        """new_cache of what was planned."""
        return self.new_cache(plan.num_blocks, plan.block_size, CACHE_TYPES[plan.dtype])

    def new_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None) -> KvCache:
        """Zeroed pages of block_size tokens for every layer; on a CPU a page takes memory when it is first written.

        dtype: of keys and values, the model's own when None; float8_e4m3fn, with a scale for each head of a token.
        """
        dtype, layers, heads = dtype or self.dtype, self.config.num_layers, self.config.num_kv_heads
        shape = (num_blocks, block_size, 2, heads, self.config.head_dim)
        pairs = tuple(self._pages(shape, dtype) for _ in range(layers))
        if dtype.itemsize > 1:
            return KvCache(pairs, block_size, num_blocks)
        places = (num_blocks, heads, block_size, 2)
        return KvCache(pairs, block_size, num_blocks, tuple(self._pages(places, torch.bfloat16) for _ in range(layers)))

    def _pages(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self.device)
        # torch.zeros would write every page now: seconds of start, and gigabytes resident that may never be used.
        anonymous = mmap.mmap(-1, torch.Size(shape).numel() * dtype.itemsize)
        return torch.frombuffer(anonymous, dtype=dtype).view(shape)

    @torch.inference_mode()
    def forward(self, step: Step, cache: KvCache) -> Tensor:
        """Compute the step, writing its keys and values to cache; returns logits [S, V] float32 of step.logit_rows.

        Every position must be below config.max_position and every id below config.vocab_size: the caller checks.
        """
        if self._threads is not None:
            self._threads.prepare()
        plan = self._ops.plan(
            step.positions,
            step.slots,
            step.query_starts,
            step.context_lens,
            step.block_tables,
            step.query_lens,
            step.context_lens_host,
            self._cos,
            self._sin,
            cache.block_size,
        )
        return self._compute(step.ids, step.positions, plan, cache, step.logit_rows).to(torch.float32)

    def _compute(
        self,
        ids: Tensor,
        positions: Tensor | None,
        plan: object,
        cache: KvCache,
        logit_rows: Tensor | None,
    ) -> Tensor:
        """Logits [S, V] of logit_rows (None: of every token), for any model; positions are needed where learned."""
        ops, config, eps = self._ops, self.config, self.config.norm_eps
        residual = self._embedding(ids)
        if self._positions is not None:
            assert positions is not None
            residual = residual.add_(self._positions(positions))
        x = residual if config.post_norm else self._normed(residual, self._blocks[0].attention_norm)
        last = len(self._blocks) - 1
        layers = zip(self._blocks, self._norms, cache.layers(), strict=True)
        for number, (block, norms, (pair, scales)) in enumerate(layers):
            x = block.qkv(x)
            norm_weights = (block.q_norm, block.k_norm)
            q = ops.rope_and_write(x, pair, plan, *norm_weights, eps, block.rotation, scales, block.kv_scales)
            x = ops.paged_attention(q, pair, plan, self._scale, block.window, config.attention_softcap, scales)
            if number == last and logit_rows is not None:  # what follows is wanted of the logit rows only
                x, residual = x.index_select(0, logit_rows), residual.index_select(0, logit_rows)
            x = block.output(x)
            if block.attention_post_norm is not None:
                x = ops.rms_norm(x, block.attention_post_norm, eps)
            x, residual = self._added(x, residual, norms[0])
            x = self._mlp(block.mlp, x)
            if block.mlp_post_norm is not None:
                x = ops.rms_norm(x, block.mlp_post_norm, eps)
            x, residual = self._added(x, residual, norms[1])
        logits = self._head(x)
        cap = config.logit_softcap
        return logits if cap is None else logits.to(torch.float32).div_(cap).tanh_().mul_(cap)

    def _mlp(self, mlp: Mlp | Experts, x: Tensor) -> Tensor:
        if not isinstance(mlp, Mlp):
            return mlp(x)
        if self.config.gated:
            return mlp.down(self._ops.gated(mlp.up(x), self.config.activation))
        return mlp.down(self._ops.activate(mlp.up(x), self.config.activation))

    def _normed(self, x: Tensor, norm: Norm) -> Tensor:
        if norm.bias is None:
            return self._ops.rms_norm(x, norm.weight, self.config.norm_eps)
        return self._ops.layer_norm(x, norm.weight, norm.bias, self.config.norm_eps)

    def _added(self, x: Tensor, residual: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
        """What the next layer sees, and the new residual: x + residual, which a post-norm model goes on with normed."""
        if norm is None:
            return residual.add_(x), residual
        if norm.bias is None:
            x, residual = self._ops.add_rms_norm(x, residual, norm.weight, self.config.norm_eps)
        else:
            x, residual = self._ops.add_layer_norm(x, residual, norm.weight, norm.bias, self.config.norm_eps)
        return x, x if self.config.post_norm else residual
