"""Phi-3, Phi-3.5 and Phi-4-mini: Llama with fused projections, part of a head rotated, and two sets of rotations."""

from __future__ import annotations

from dataclasses import replace

from vserve.model.config import Architecture, ModelConfig
from vserve.model.families.common import Silent, rotary_decoder, window_of_all
from vserve.model.families.family import Family, Names
from vserve.model.fields import Fields


def _read(fields: Fields) -> ModelConfig:
    silent = Silent(max_position=4096, eps=1e-5, partial_rotary=True)
    base = rotary_decoder(fields, Architecture.PHI3, silent)
    windows = window_of_all(fields, "sliding_window", base.num_layers, None)
    return replace(base, attention_bias=False, output_bias=False, windows=windows)


FAMILY = Family(Architecture.PHI3, _read, Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)))
