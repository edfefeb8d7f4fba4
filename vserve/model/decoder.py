"""Decoder: one forward pass of a Llama-family model over a mixed batch of prefill chunks and decodes.

Owns the weights and the order of operations; every operation that touches the cache or could be one kernel is the
back end's (``Ops``).  Knows no request, no queue and no sampling.  One thread at a time.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from vserve.model.config import ModelConfig
from vserve.model.layers import Block, Embedding, rotary_tables
from vserve.model.linear import Linear
from vserve.model.ops import KvCache, Ops, Step
from vserve.model.threads import Sharing, StepThreads


class Decoder:
    """A model on one device, in one dtype, computing with one back end."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        embedding: Embedding,
        blocks: Sequence[Block],
        norm: Tensor,
        head: Linear,
    ) -> None:
        """norm [D]: the last norm's weight, which also tells device and dtype.  head: D -> V."""
        self.config = config
        self.device = norm.device
        self.dtype = norm.dtype
        self._ops = ops
        self._embedding = embedding
        self._blocks = tuple(blocks)
        self._norm = norm
        self._head = head
        self._cos, self._sin = rotary_tables(config, norm.device)
        self._scale = config.head_dim**-0.5
        self._threads = StepThreads() if norm.device.type == "cpu" else None

    def share_cores(self, sharing: Sharing) -> None:
        """Leave an encoder in this process its part of the cores.  Before the first step."""
        if self._threads is not None:
            self._threads.limit = lambda: sharing.step_threads

    @property
    def vocab_size(self) -> int:
        """The width of the logits."""
        return self.config.vocab_size

    def new_cache(self, num_blocks: int, block_size: int) -> KvCache:
        """Zeroed pages of block_size tokens for every layer; on a CPU a page takes memory when it is first written."""
        shape = (num_blocks, block_size, 2, self.config.num_kv_heads, self.config.head_dim)
        pairs = tuple(self._pages(shape) for _ in range(self.config.num_layers))
        return KvCache(pairs, block_size, num_blocks)

    def _pages(self, shape: tuple[int, ...]) -> Tensor:
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        # torch.zeros would write every page now: seconds of start, and gigabytes resident that may never be used.
        anonymous = mmap.mmap(-1, torch.Size(shape).numel() * self.dtype.itemsize)
        return torch.frombuffer(anonymous, dtype=self.dtype).view(shape)

    @torch.inference_mode()
    def forward(self, step: Step, cache: KvCache) -> Tensor:
        """Compute the step, writing its keys and values to cache; returns logits [S, V] float32 of step.logit_rows.

        Every position must be below config.max_position and every id below config.vocab_size: the caller checks.
        """
        if self._threads is not None:
            self._threads.prepare()
        ops, eps = self._ops, self.config.rms_norm_eps
        plan = ops.plan(
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
        residual = self._embedding(step.ids)
        x = ops.rms_norm(residual, self._blocks[0].attention_norm, eps)
        last = len(self._blocks) - 1
        for number, (block, pairs) in enumerate(zip(self._blocks, cache.pairs, strict=True)):
            q = ops.rope_and_write(block.qkv(x), pairs, plan)
            x = ops.paged_attention(q, pairs, plan, self._scale)
            if number == last:  # what follows is wanted of the logit rows only
                x, residual = x.index_select(0, step.logit_rows), residual.index_select(0, step.logit_rows)
            x, residual = ops.add_rms_norm(block.output(x), residual, block.mlp_norm, eps)
            x = block.down(ops.silu_mul(block.gate_up(x)))
            norm = self._norm if number == last else self._blocks[number + 1].attention_norm
            x, residual = ops.add_rms_norm(x, residual, norm, eps)
        return self._head(x).to(torch.float32)
