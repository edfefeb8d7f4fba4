"""GpuDecoder: the forward pass on CUDA, fused where that pays, on inputs that lie on the device already.

Few rows: the norm before a product and the residual after it are part of a kernel that reads the weights once.  More:
cuBLAS, with the residual as its accumulator.  Which, is asked of kernels.dispatch by shape; nothing here reads a value,
so the same Python captures the same kernels for every batch of a shape.  One thread, one stream at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vserve.kernels import cuda, dispatch
from vserve.kernels.cuda import StepPlan
from vserve.model.config import ModelConfig
from vserve.model.decoder import Decoder
from vserve.model.layers import Block, Embedding
from vserve.model.linear import Linear, PlainLinear
from vserve.model.ops import KvCache, Step


class GpuDecoder(Decoder):
    """A Decoder whose linear layers are plain ones on one GPU."""

    def __init__(
        self, config: ModelConfig, embedding: Embedding, blocks: Sequence[Block], norm: Tensor, head: Linear
    ) -> None:
        """norm [D]: the last norm's weight, which also tells device and dtype.  head: D -> V."""
        super().__init__(config, cuda, embedding, blocks, norm, head)
        self._ends = (blocks[0], blocks[-1])
        self._plain_head = _plain(head)
        self._layers = tuple(
            (
                block.attention_norm,
                _plain(block.qkv),
                _plain(block.output),
                block.mlp_norm,
                _plain(block.gate_up),
                _plain(block.down),
            )
            for block in blocks
        )

    @property
    def rotation(self) -> tuple[Tensor, Tensor]:
        """cos and sin [max_position, head_dim / 2] float32."""
        return self._cos, self._sin

    def ends(self) -> GpuDecoder:
        """The first and the last layer alone: they launch every kernel that all of them launch."""
        return GpuDecoder(self.config, self._embedding, self._ends, self._norm, self._plain_head)

    @torch.inference_mode()
    def forward(self, step: Step, cache: KvCache) -> Tensor:
        """As Decoder.forward."""
        plan = cuda.plan(
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
        return self.compute(step.ids, plan, cache.pairs, step.logit_rows).to(torch.float32)

    def compute(self, ids: Tensor, plan: StepPlan, pairs: Sequence[Tensor], logit_rows: Tensor | None) -> Tensor:
        """Logits [S, V] in the model's dtype of logit_rows [S] (any int; None: of every token) for ids [T] int64.

        Writes keys and values to pairs, one a layer, where plan says.  Rows that belong to no sequence may hold
        anything; they touch no other row.
        """
        eps, last = self.config.rms_norm_eps, len(self._layers) - 1
        residual = self._embedding(ids)
        for number, (layer, pair) in enumerate(zip(self._layers, pairs, strict=True)):
            attention_norm, qkv, output, mlp_norm, gate_up, down = layer
            q = cuda.rope_and_write(cuda.norm_linear(residual, attention_norm, eps, qkv.weight, qkv.bias), pair, plan)
            x = cuda.paged_attention(q, pair, plan, self._scale)
            if number == last and logit_rows is not None:  # what follows is wanted of these rows only
                x, residual = x.index_select(0, logit_rows), residual.index_select(0, logit_rows)
            residual = add_linear(x, output, residual)
            if gate_up.bias is None:
                x = cuda.norm_gated_linear(residual, mlp_norm, eps, gate_up.weight)
            else:
                x = cuda.silu_mul(cuda.norm_linear(residual, mlp_norm, eps, gate_up.weight, gate_up.bias))
            residual = add_linear(x, down, residual)
        head = self._plain_head
        return cuda.norm_linear(residual, self._norm, eps, head.weight, head.bias)


def add_linear(x: Tensor, linear: PlainLinear, residual: Tensor) -> Tensor:
    """residual [M, N] + linear(x [M, K]), rounded once; residual is undefined afterwards."""
    weight, bias = linear.weight, linear.bias
    if dispatch.use_gemv(x.shape[0], weight.shape[0], weight.shape[1], x.device):
        return cuda.linear(x, weight, bias, residual)
    if bias is not None:
        return residual.add_(functional.linear(x, weight, bias))
    return residual.addmm_(x, weight.t())


def _plain(linear: Linear) -> PlainLinear:
    assert isinstance(linear, PlainLinear), "a GPU's linear layers are plain ones"
    return linear
