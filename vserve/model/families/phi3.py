"""Phi-3, Phi-3.5 and Phi-4-mini: Llama with fused projections, part of a head rotated, and two sets of rotations."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from vserve.errors import StartupError
from vserve.model.config import Architecture, ModelConfig
from vserve.model.families.common import GGUF_TOP, Silent, gguf_decoder, rotary_decoder, window_of_all
from vserve.model.families.family import Family, GgufFamily, GgufShapes, Names
from vserve.model.fields import Fields


def _read(fields: Fields) -> ModelConfig:
    silent = Silent(max_position=4096, eps=1e-5, partial_rotary=True)
    base = rotary_decoder(fields, Architecture.PHI3, silent)
    windows = window_of_all(fields, "sliding_window", base.num_layers, None)
    return replace(base, attention_bias=False, output_bias=False, windows=windows)


_GGUF_BLOCK: Final = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


def _read_gguf(fields: Fields, shapes: GgufShapes, factors: tuple[float, ...]) -> ModelConfig:
    base = gguf_decoder(fields, shapes, Architecture.PHI3, "phi3", factors, partial_rotary=True)
    if "rope_factors_long.weight" in shapes:
        raise StartupError(f"{fields.where}: longrope is not supported in GGUF files; use the model's safetensors")
    return replace(base, windows=window_of_all(fields, "phi3.attention.sliding_window", base.num_layers, None))


FAMILY = Family(
    Architecture.PHI3,
    _read,
    Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    GgufFamily("phi3", _read_gguf, _GGUF_BLOCK, GGUF_TOP),
)
