"""Mixtral: Mistral whose MLPs are mixtures of a few large experts."""

from __future__ import annotations

from dataclasses import replace

from vserve.model.config import MAX_EXPERTS, Architecture, Experts, ModelConfig
from vserve.model.families.common import Silent, rotary_decoder, window_of_all
from vserve.model.families.family import Family, Names
from vserve.model.fields import Fields


def _read(fields: Fields) -> ModelConfig:
    silent = Silent(max_position=131072, num_kv_heads=8, theta=1e6, eps=1e-5)
    base = rotary_decoder(fields, Architecture.MIXTRAL, silent)
    count = fields.integer("num_local_experts", 1, MAX_EXPERTS, 8)
    experts = Experts(
        count=count,
        active=fields.integer("num_experts_per_tok", 1, count, min(2, count)),
        intermediate_size=base.intermediate_size,
        normalised=True,
    )
    windows = window_of_all(fields, "sliding_window", base.num_layers, None)
    return replace(base, attention_bias=False, output_bias=False, experts=experts, windows=windows)


FAMILY = Family(
    Architecture.MIXTRAL,
    _read,
    Names(
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{}.",
        expert_gate_up=("w1", "w3"),
        expert_down="w2",
    ),
)
