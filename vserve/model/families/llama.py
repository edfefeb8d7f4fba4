"""Llama 2, 3 and 3.x, and the many models that are saved as one."""

from __future__ import annotations

from dataclasses import replace

from vserve.model.config import Architecture, ModelConfig
from vserve.model.families.common import GGUF_BLOCK, GGUF_TOP, Silent, gguf_decoder, rotary_decoder, window_of_all
from vserve.model.families.family import Family, GgufFamily, GgufShapes, Names
from vserve.model.fields import Fields


def _read(fields: Fields) -> ModelConfig:
    base = rotary_decoder(fields, Architecture.LLAMA, Silent(max_position=2048))
    return replace(base, mlp_bias=fields.flag("mlp_bias", False))


def _read_gguf(fields: Fields, shapes: GgufShapes, factors: tuple[float, ...]) -> ModelConfig:
    base = gguf_decoder(fields, shapes, Architecture.LLAMA, "llama", factors)
    # Mistral's files are called llama too.
    return replace(base, windows=window_of_all(fields, "llama.attention.sliding_window", base.num_layers, None))


FAMILY = Family(
    Architecture.LLAMA, _read, Names(), GgufFamily("llama", _read_gguf, GGUF_BLOCK, GGUF_TOP, interleaved=True)
)
