"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values, and a window in the upper layers where asked."""

from __future__ import annotations

from dataclasses import replace

from vserve.model.config import Architecture, ModelConfig
from vserve.model.families.common import GGUF_BLOCK, GGUF_TOP, Silent, gguf_decoder, qwen_windows, rotary_decoder
from vserve.model.families.family import Family, GgufFamily, GgufShapes, Names
from vserve.model.fields import Fields


def _read(fields: Fields) -> ModelConfig:
    base = rotary_decoder(fields, Architecture.QWEN2, Silent(max_position=32768, num_kv_heads=32))
    return replace(base, attention_bias=True, output_bias=False, windows=qwen_windows(fields, base.num_layers))


def _read_gguf(fields: Fields, shapes: GgufShapes, factors: tuple[float, ...]) -> ModelConfig:
    return gguf_decoder(fields, shapes, Architecture.QWEN2, "qwen2", factors)


FAMILY = Family(Architecture.QWEN2, _read, Names(), GgufFamily("qwen2", _read_gguf, GGUF_BLOCK, GGUF_TOP))
