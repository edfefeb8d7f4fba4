"""GpuDecoder: the forward pass on CUDA, fused where that pays, on inputs that lie on the device already.

Few rows: the norm before a product and the residual after it are part of a kernel that reads the weights once.  More:
cuBLAS, with the residual as its accumulator.  Which, is asked of kernels.dispatch by shape; nothing here reads a value,
so the same Python captures the same kernels for every batch of a shape.  The fused forms are those of a model whose
RMS norms lead to plain layers and to MLPs gated by SiLU, dense or of experts; any other runs operation by operation, as
on a CPU.
One thread, one stream at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vserve.kernels import cuda, dispatch, moe
from vserve.kernels.cuda import StepPlan
from vserve.model.config import Activation, ModelConfig
from vserve.model.decoder import Decoder
from vserve.model.experts import Experts
from vserve.model.gpu_experts import GpuExperts
from vserve.model.gpu_linear import QUANTISED, FloatGpuLinear, GpuLinear
from vserve.model.layers import Block, Embedding, Mlp, Norm, Positions
from vserve.model.linear import Linear, PlainLinear
from vserve.model.ops import KvCache, Step

_FUSED = (PlainLinear, *QUANTISED)
"""Layers that have forms with a norm before them and a sum behind."""


@dataclass(frozen=True, slots=True, eq=False)
class _Dense:
    """An MLP in the form that can be fused."""

    gate_up: PlainLinear | GpuLinear
    down: PlainLinear | GpuLinear


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """One block in the form that can be fused."""

    block: Block
    qkv: PlainLinear | GpuLinear
    output: PlainLinear | GpuLinear
    mlp: _Dense | GpuExperts


class GpuDecoder(Decoder):
    """A Decoder on one GPU."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        blocks: Sequence[Block],
        norm: Norm | None,
        head: Linear,
        positions: Positions | None = None,
    ) -> None:
        """norm: the last one, None where config has none.  head: D -> V.  positions: where they are learned."""
        super().__init__(config, cuda, embedding, blocks, norm, head, positions)
        self._fused = _fused(config, blocks, norm, head)

    @property
    def rotation(self) -> tuple[Tensor, Tensor]:
        """cos and sin [max_position, R * head_dim / 2] float32."""
        return self._cos, self._sin

    def ends(self) -> GpuDecoder:
        """The last layer and the first of each other kind: they launch every kernel that all of them launch."""
        kinds = {(block.window, block.rotation, type(block.mlp)): block for block in reversed(self._blocks[:-1])}
        blocks = (*reversed(kinds.values()), self._blocks[-1])
        return GpuDecoder(self.config, self._embedding, blocks, self._norm, self._head, self._positions)

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
        """Logits [S, V] in the model's dtype or float32 of logit_rows [S] (any int; None: of every token) for ids [T].

        ids int64.  Writes keys and values to pairs, one a layer, where plan says.  Rows that belong to no sequence may
        hold anything; they touch no other row.
        """
        if self._fused is None:
            return self._compute(ids, plan.positions, plan, pairs, logit_rows)
        layers, norm, head = self._fused
        eps, last = self.config.norm_eps, len(layers) - 1
        residual = self._embedding(ids)
        for number, (layer, pair) in enumerate(zip(layers, pairs, strict=True)):
            block = layer.block
            x = norm_linear(residual, block.attention_norm.weight, eps, layer.qkv)
            q = cuda.rope_and_write(x, pair, plan, block.q_norm, block.k_norm, eps, block.rotation)
            x = cuda.paged_attention(q, pair, plan, self._scale, block.window)
            if number == last and logit_rows is not None:  # what follows is wanted of these rows only
                x, residual = x.index_select(0, logit_rows), residual.index_select(0, logit_rows)
            residual = add_linear(x, layer.output, residual)
            residual = _add_mlp(residual, block.mlp_norm.weight, eps, layer.mlp)
        return norm_linear(residual, norm.weight, eps, head)


def norm_linear(x: Tensor, norm: Tensor, eps: float, linear: PlainLinear | GpuLinear) -> Tensor:
    """linear(rms_norm(x [M, K], norm [K], eps))."""
    if isinstance(linear, PlainLinear):
        return cuda.norm_linear(x, norm, eps, linear.weight, linear.bias)
    return linear.normed(x, norm, eps)


def norm_gated_linear(x: Tensor, norm: Tensor, eps: float, linear: PlainLinear | GpuLinear) -> Tensor:
    """silu(first half) * second half of norm_linear."""
    if not isinstance(linear, PlainLinear):
        return linear.normed_gated(x, norm, eps)
    if linear.bias is None:
        return cuda.norm_gated_linear(x, norm, eps, linear.weight)
    return cuda.silu_mul(cuda.norm_linear(x, norm, eps, linear.weight, linear.bias))


def add_dense(
    residual: Tensor, norm: Tensor, eps: float, gate_up: PlainLinear | GpuLinear, down: PlainLinear | GpuLinear
) -> Tensor:
    """residual [M, N] + down(silu(gate) * up) of its rms_norm with norm [N]; residual is undefined afterwards."""
    if isinstance(down, FloatGpuLinear) and isinstance(gate_up, FloatGpuLinear) and not down.reads(residual):
        # The gate is computed where the inputs of the next product become e4m3.
        return down.gated_added(gate_up.normed(residual, norm, eps), residual)
    return add_linear(norm_gated_linear(residual, norm, eps, gate_up), down, residual)


def add_linear(x: Tensor, linear: PlainLinear | GpuLinear, residual: Tensor) -> Tensor:
    """residual [M, N] + linear(x [M, K]); residual is undefined afterwards."""
    if not isinstance(linear, PlainLinear):
        return linear.added(x, residual)
    weight, bias = linear.weight, linear.bias
    if dispatch.use_gemv(x.shape[0], weight.shape[0], weight.shape[1], x.device):
        return cuda.linear(x, weight, bias, residual)
    if bias is not None:
        return residual.add_(functional.linear(x, weight, bias))
    return residual.addmm_(x, weight.t())


def add_experts(residual: Tensor, norm: Tensor, eps: float, experts: GpuExperts) -> Tensor:
    """residual [M, D] + the mixture of rms_norm(residual, norm, eps); residual is undefined afterwards."""
    router = experts.router
    if 0 < residual.shape[0] <= moe.FEW_TOKENS:
        assert isinstance(router, _FUSED)
        scores = norm_linear(residual, norm, eps, router)
        added = experts.add_to(residual, norm, eps, scores)
        return experts.add(cuda.rms_norm(residual, norm, eps), scores, residual) if added is None else added
    x = cuda.rms_norm(residual, norm, eps)
    return experts.add(x, router(x), residual)


def _add_mlp(residual: Tensor, norm: Tensor, eps: float, mlp: _Dense | GpuExperts) -> Tensor:
    if isinstance(mlp, GpuExperts):
        return add_experts(residual, norm, eps, mlp)
    return add_dense(residual, norm, eps, mlp.gate_up, mlp.down)


def _fused(
    config: ModelConfig, blocks: Sequence[Block], norm: Norm | None, head: Linear
) -> tuple[tuple[_Layer, ...], Norm, PlainLinear | GpuLinear] | None:
    """The layers, the last norm and the head where all of them can be fused; else None."""
    plain = config.activation is Activation.SILU and config.gated and config.position_offset is None
    if not plain or config.sandwich or config.post_norm or config.attention_softcap or config.logit_softcap:
        return None
    if norm is None or norm.bias is not None or not isinstance(head, _FUSED):
        return None
    layers = []
    for block in blocks:
        mlp = _fused_mlp(block.mlp)
        if mlp is None or block.attention_norm.bias is not None:
            return None
        if not isinstance(block.qkv, _FUSED) or not isinstance(block.output, _FUSED):
            return None
        layers.append(_Layer(block, block.qkv, block.output, mlp))
    return tuple(layers), norm, head


def _fused_mlp(mlp: Mlp | Experts) -> _Dense | GpuExperts | None:
    if isinstance(mlp, GpuExperts):
        return mlp if isinstance(mlp.router, _FUSED) else None
    if isinstance(mlp, Mlp) and isinstance(mlp.up, _FUSED) and isinstance(mlp.down, _FUSED):
        return _Dense(mlp.up, mlp.down)
    return None
