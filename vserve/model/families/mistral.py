"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from dataclasses import replace

from vserve.model.config import Architecture, ModelConfig
from vserve.model.families.common import Silent, rotary_decoder, window_of_all
from vserve.model.families.family import Family, Names
from vserve.model.fields import Fields


def _read(fields: Fields) -> ModelConfig:
    base = rotary_decoder(fields, Architecture.MISTRAL, Silent(max_position=131072, num_kv_heads=8))
    windows = window_of_all(fields, "sliding_window", base.num_layers, 4096)
    return replace(base, attention_bias=False, output_bias=False, windows=windows)


FAMILY = Family(Architecture.MISTRAL, _read, Names())
