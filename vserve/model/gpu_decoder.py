"""GpuDecoder: the forward pass on CUDA, fused where that pays, on inputs that lie on the device already.

Few rows: the norm before a product and the residual after it are part of kernels that read the weights once.  More:
cuBLAS, with the residual as its accumulator.  Which, is asked of kernels.dispatch by shape; nothing here reads a value,
so the same Python captures the same kernels for every batch of a shape.  The fused forms are those of a model whose
RMS norms lead to plain layers and to MLPs gated by SiLU, dense or of experts; any other runs operation by operation, as
on a CPU.
One thread, one stream at a time, which attention may fork and joins again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vserve.kernels import cuda, dispatch, moe
from vserve.kernels.cuda import Normed, StepPlan
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
    next_norm: Tensor  # of the layer behind, or the last
    next_linear: PlainLinear | GpuLinear  # which reads what that norm gives
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
        return self.compute(step.ids, plan, cache, step.logit_rows).to(torch.float32)

    def compute(self, ids: Tensor, plan: StepPlan, cache: KvCache, logit_rows: Tensor | None) -> Tensor:
        """Logits [S, V] in the model's dtype or float32 of logit_rows [S] (any int; None: of every token) for ids [T].

        ids int64.  Writes keys and values to cache where plan says.  Rows that belong to no sequence may
        hold anything; they touch no other row.
        """
        if self._fused is None:
            return self._compute(ids, plan.positions, plan, cache, logit_rows)
        layers, norm, head = self._fused
        eps, last = self.config.norm_eps, len(layers) - 1
        residual = self._embedding(ids)
        summed: Tensor | Normed = residual
        for number, (layer, (pair, scales)) in enumerate(zip(layers, cache.layers(), strict=True)):
            block, mlp = layer.block, layer.mlp
            x = norm_linear(summed, block.attention_norm.weight, eps, layer.qkv)
            norm_weights = (block.q_norm, block.k_norm)
            q = cuda.rope_and_write(x, pair, plan, *norm_weights, eps, block.rotation, scales, block.kv_scales)
            x = cuda.paged_attention(q, pair, plan, self._scale, block.window, scales=scales)
            if number == last and logit_rows is not None:  # what follows is wanted of these rows only
                x, residual = x.index_select(0, logit_rows), residual.index_select(0, logit_rows)
            inner = mlp.gate_up if isinstance(mlp, _Dense) else None
            residual, summed = add_linear(x, layer.output, residual, block.mlp_norm.weight, inner)
            residual, summed = _add_mlp(residual, summed, eps, layer)
        return norm_linear(summed, norm.weight, eps, head)


def norm_linear(x: Tensor | Normed, norm: Tensor, eps: float, linear: PlainLinear | GpuLinear) -> Tensor:
    """linear(rms_norm(x [M, K], norm [K], eps))."""
    if isinstance(linear, PlainLinear):
        return cuda.norm_linear(x, norm, eps, linear.weight, linear.bias)
    assert isinstance(x, Tensor)
    return linear.normed(x, norm, eps)


def norm_gated_linear(x: Tensor | Normed, norm: Tensor, eps: float, linear: PlainLinear | GpuLinear) -> Tensor:
    """silu(first half) * second half of norm_linear."""
    if not isinstance(linear, PlainLinear):
        assert isinstance(x, Tensor)
        return linear.normed_gated(x, norm, eps)
    if linear.bias is None:
        return cuda.norm_gated_linear(x, norm, eps, linear.weight)
    return cuda.silu_mul(cuda.norm_linear(x, norm, eps, linear.weight, linear.bias))


def add_linear(
    x: Tensor,
    linear: PlainLinear | GpuLinear,
    residual: Tensor,
    norm: Tensor,
    following: PlainLinear | GpuLinear | None,
) -> tuple[Tensor, Tensor | Normed]:
    """residual [M, N] + linear(x [M, K]), and what norm_linear of norm [N] and following takes; residual is undefined
    afterwards.  following: None where several layers read the norm.
    """
    if not isinstance(linear, PlainLinear):
        y = linear.added(x, residual)
        return y, y
    weight, bias = linear.weight, linear.bias
    if dispatch.use_gemv(x.shape[0], weight.shape[0], weight.shape[1], x.device):
        if isinstance(following, PlainLinear):
            return cuda.linear_then_norm(x, weight, bias, residual, norm, following.weight)
        y = cuda.linear(x, weight, bias, residual)
    elif bias is not None:
        y = residual.add_(functional.linear(x, weight, bias))
    else:
        y = residual.addmm_(x, weight.t())
    return y, y


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


def _add_mlp(residual: Tensor, summed: Tensor | Normed, eps: float, layer: _Layer) -> tuple[Tensor, Tensor | Normed]:
    norm, mlp = layer.block.mlp_norm.weight, layer.mlp
    if isinstance(mlp, GpuExperts):
        residual = add_experts(residual, norm, eps, mlp)
        return residual, residual
    down, gate_up = mlp.down, mlp.gate_up
    if isinstance(down, FloatGpuLinear) and isinstance(gate_up, FloatGpuLinear) and not down.reads(residual):
        # The gate is computed where the inputs of the next product become e4m3.
        residual = down.gated_added(gate_up.normed(residual, norm, eps), residual)
        return residual, residual
    x = norm_gated_linear(summed, norm, eps, gate_up)
    return add_linear(x, down, residual, layer.next_norm, layer.next_linear)


def _fused(
    config: ModelConfig, blocks: Sequence[Block], norm: Norm | None, head: Linear
) -> tuple[tuple[_Layer, ...], Norm, PlainLinear | GpuLinear] | None:
    """The layers, the last norm and the head where all of them can be fused; else None."""
    plain = config.activation is Activation.SILU and config.gated and config.position_offset is None
    if not plain or config.sandwich or config.post_norm or config.attention_softcap or config.logit_softcap:
        return None
    if norm is None or norm.bias is not None or not isinstance(head, _FUSED):
        return None
    layers: list[_Layer] = []
    following, its_norm = head, norm.weight
    for block in reversed(blocks):
        mlp = _fused_mlp(block.mlp)
        if mlp is None or block.attention_norm.bias is not None:
            return None
        if not isinstance(block.qkv, _FUSED) or not isinstance(block.output, _FUSED):
            return None
        layers.append(_Layer(block, its_norm, following, block.qkv, block.output, mlp))
        following, its_norm = block.qkv, block.attention_norm.weight
    return tuple(reversed(layers)), norm, head


def _fused_mlp(mlp: Mlp | Experts) -> _Dense | GpuExperts | None:
    if isinstance(mlp, GpuExperts):
        return mlp if isinstance(mlp.router, _FUSED) else None
    if isinstance(mlp, Mlp) and isinstance(mlp.up, _FUSED) and isinstance(mlp.down, _FUSED):
        return _Dense(mlp.up, mlp.down)
    return None
