"""Qwen3-MoE: Qwen3 whose MLPs are mixtures of many small experts."""

from __future__ import annotations

from dataclasses import replace

from vserve.model.config import MAX_EXPERTS, MAX_INTERMEDIATE, MAX_LAYERS, Architecture, Experts, ModelConfig
from vserve.model.families.common import Silent, rotary_decoder, window_of_all
from vserve.model.families.family import Family, Names
from vserve.model.fields import Fields


def _read(fields: Fields) -> ModelConfig:
    base = rotary_decoder(fields, Architecture.QWEN3_MOE, Silent(max_position=32768, num_kv_heads=4))
    layers = base.num_layers
    # Written under either name, by the version of transformers.
    count = fields.integer("num_experts", 1, MAX_EXPERTS, fields.integer("num_local_experts", 1, MAX_EXPERTS, 128))
    every = fields.integer("decoder_sparse_step", 1, MAX_LAYERS, 1)
    dense = set(fields.integers("mlp_only_layers", 0, MAX_LAYERS))
    dense |= {layer for layer in range(layers) if (layer + 1) % every}
    experts = Experts(
        count=count,
        active=fields.integer("num_experts_per_tok", 1, count, min(8, count)),
        intermediate_size=fields.integer("moe_intermediate_size", 1, MAX_INTERMEDIATE),
        normalised=fields.flag("norm_topk_prob", False),
        dense_layers=frozenset(dense),
    )
    windows: tuple[int | None, ...] = ()
    if fields.flag("use_sliding_window", False):
        windows = window_of_all(fields, "sliding_window", layers, 4096)
    return replace(base, qk_norm=True, experts=experts, windows=windows)


FAMILY = Family(Architecture.QWEN3_MOE, _read, Names())
