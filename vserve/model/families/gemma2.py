"""Gemma 2: four norms a layer with weights stored less 1, capped scores and logits, every other layer windowed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from vserve.model.config import MAX_WIDTH, Activation, Architecture, ModelConfig, NormKind
from vserve.model.families.common import Silent, activation, rotary_decoder, windows_by_layer
from vserve.model.families.family import Family, Names
from vserve.model.fields import Fields
from vserve.model.rope_scaling import MAX_POSITION

MAX_CAP: Final = 1e6
NAMES: Final = Names(mlp_norm="pre_feedforward_layernorm")
GGUF_NORMS: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def gemma(fields: Fields, architecture: Architecture, silent: Silent, cap: float | None) -> ModelConfig:
    """What Gemma 2 and 3 have in common; cap: of scores, where the file says nothing (that of logits likewise)."""
    base = rotary_decoder(fields, architecture, silent)
    scalar = fields.number("query_pre_attn_scalar", 1e-3, MAX_WIDTH, 256.0)
    return replace(
        base,
        norm=NormKind.RMS_PLUS_ONE,
        activation=activation(fields, "hidden_activation", Activation.GELU_TANH),
        sandwich=True,
        attention_scale=scalar**-0.5,
        attention_softcap=_cap(fields, "attn_logit_softcapping", cap),
        logit_softcap=_cap(fields, "final_logit_softcapping", None if cap is None else 30.0),
        embedding_scale=math.sqrt(base.hidden_size),
    )


def _cap(fields: Fields, key: str, default: float | None) -> float | None:
    if key not in fields:
        return None if fields.has_null(key) else default
    return fields.number(key, 1e-3, MAX_CAP)


def _read(fields: Fields) -> ModelConfig:
    silent = Silent(max_position=8192, num_kv_heads=4, head_dim=256, tied=True)
    base = gemma(fields, Architecture.GEMMA2, silent, 50.0)
    window = None if fields.has_null("sliding_window") else fields.integer("sliding_window", 1, MAX_POSITION, 4096)
    full = frozenset(range(1, base.num_layers, 2))
    return replace(base, windows=windows_by_layer(fields, base.num_layers, window, full))


FAMILY = Family(Architecture.GEMMA2, _read, NAMES)
