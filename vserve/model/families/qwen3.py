"""Qwen3: Llama with a norm of each head of the queries and keys, and heads of a size of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from vserve.model.config import Architecture, ModelConfig
from vserve.model.families.common import GGUF_BLOCK, GGUF_TOP, Silent, gguf_decoder, qwen_windows, rotary_decoder
from vserve.model.families.family import Family, GgufFamily, GgufShapes, Names
from vserve.model.fields import Fields

QK_NORMS: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


def _read(fields: Fields) -> ModelConfig:
    base = rotary_decoder(fields, Architecture.QWEN3, Silent(max_position=32768, num_kv_heads=32, head_dim=128))
    return replace(base, qk_norm=True, windows=qwen_windows(fields, base.num_layers))


def _read_gguf(fields: Fields, shapes: GgufShapes, factors: tuple[float, ...]) -> ModelConfig:
    return replace(gguf_decoder(fields, shapes, Architecture.QWEN3, "qwen3", factors), qk_norm=True)


FAMILY = Family(Architecture.QWEN3, _read, Names(), GgufFamily("qwen3", _read_gguf, GGUF_BLOCK | QK_NORMS, GGUF_TOP))
