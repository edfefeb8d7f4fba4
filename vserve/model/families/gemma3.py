"""Gemma 3, the text model: Gemma 2 with head norms in place of caps, and rotations of their own for windowed layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from vserve.model.config import MAX_LAYERS, Architecture, ModelConfig
from vserve.model.families.common import GGUF_BLOCK, GGUF_TOP, Silent, windows_by_layer
from vserve.model.families.family import Family, GgufFamily, GgufShapes
from vserve.model.families.gemma2 import GGUF_NORMS, NAMES, gemma, gemma_gguf, gguf_windows
from vserve.model.families.qwen3 import QK_NORMS
from vserve.model.fields import Fields
from vserve.model.rope_scaling import MAX_POSITION, MAX_THETA

_LOCAL_THETA: Final = 10000.0


def _read(fields: Fields) -> ModelConfig:
    if fields.flag("use_bidirectional_attention", False):
        raise fields.fail("use_bidirectional_attention", "only false is supported")
    # Since version 5 each type of layer has its section; before, the keys stood at the top.
    sections = fields.section("rope_parameters")
    full = local = None
    if sections is not None:
        full, local = sections.section("full_attention"), sections.section("sliding_attention")
    theta = fields.number("rope_local_base_freq", 1.0, MAX_THETA, _LOCAL_THETA)
    if local is not None:
        if local.text("rope_type", "default") != "default":
            raise local.fail("rope_type", "only default is supported for windowed layers")
        theta = local.number("rope_theta", 1.0, MAX_THETA, theta)
    if full is not None:
        fields = fields.with_section("rope_parameters", full)
    silent = Silent(max_position=131072, num_kv_heads=4, head_dim=256, theta=1e6, tied=True)
    base = gemma(fields, Architecture.GEMMA3, silent, None)
    window = None if fields.has_null("sliding_window") else fields.integer("sliding_window", 1, MAX_POSITION, 4096)
    every = fields.integer("sliding_window_pattern", 1, MAX_LAYERS, 6)
    every = fields.integer("_sliding_window_pattern", 1, MAX_LAYERS, every)
    layers = frozenset(range(every - 1, base.num_layers, every))
    windows = windows_by_layer(fields, base.num_layers, window, layers)
    return replace(base, qk_norm=True, windows=windows, local_rope_theta=theta if windows else None)


def _read_gguf(fields: Fields, shapes: GgufShapes, factors: tuple[float, ...]) -> ModelConfig:
    base = gemma_gguf(fields, shapes, factors, Architecture.GEMMA3, "gemma3", 62)
    theta = fields.number("gemma3.rope.freq_base_swa", 1.0, MAX_THETA, _LOCAL_THETA)
    windows = gguf_windows(fields, "gemma3", base.num_layers, 6)
    return replace(base, qk_norm=True, windows=windows, local_rope_theta=theta)


FAMILY = Family(
    Architecture.GEMMA3,
    _read,
    NAMES,
    GgufFamily("gemma3", _read_gguf, GGUF_BLOCK | GGUF_NORMS | QK_NORMS, GGUF_TOP),
)
