"""Gemma 2: four norms a layer with weights stored less 1, capped scores and logits, every other layer windowed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from vserve.model.config import MAX_WIDTH, Activation, Architecture, ModelConfig, NormKind
from vserve.model.families.common import (
    GGUF_BLOCK,
    GGUF_TOP,
    Silent,
    activation,
    gguf_decoder,
    rotary_decoder,
    windows_by_layer,
)
from vserve.model.families.family import Family, GgufFamily, GgufShapes, Names
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


def gemma_gguf(
    fields: Fields, shapes: GgufShapes, factors: tuple[float, ...], architecture: Architecture, name: str, largest: int
) -> ModelConfig:
    """What Gemma 2 and 3 have in common as GGUF files, in which norms are stored whole.

    The largest model, told by its layers, scales scores by hidden_size / num_heads; the file does not say.
    """
    base = gguf_decoder(fields, shapes, architecture, name, factors)
    scalar = base.hidden_size / base.num_heads if base.num_layers == largest else base.head_dim
    return replace(
        base,
        activation=Activation.GELU_TANH,
        sandwich=True,
        attention_scale=scalar**-0.5,
        embedding_scale=math.sqrt(base.hidden_size),
    )


def gguf_windows(fields: Fields, name: str, layers: int, every: int) -> tuple[int | None, ...]:
    """ModelConfig.windows where each layer whose number is a multiple of `every`, counted from 1, sees everything."""
    window = fields.integer(f"{name}.attention.sliding_window", 1, MAX_POSITION)
    return tuple(None if (layer + 1) % every == 0 else window for layer in range(layers))


def _read_gguf(fields: Fields, shapes: GgufShapes, factors: tuple[float, ...]) -> ModelConfig:
    base = gemma_gguf(fields, shapes, factors, Architecture.GEMMA2, "gemma2", 46)
    return replace(
        base,
        windows=gguf_windows(fields, "gemma2", base.num_layers, 2),
        attention_softcap=fields.number("gemma2.attn_logit_softcapping", 1e-3, MAX_CAP, 50.0),
        logit_softcap=fields.number("gemma2.final_logit_softcapping", 1e-3, MAX_CAP, 30.0),
    )


FAMILY = Family(Architecture.GEMMA2, _read, NAMES, GgufFamily("gemma2", _read_gguf, GGUF_BLOCK | GGUF_NORMS, GGUF_TOP))
