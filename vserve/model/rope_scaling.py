"""How a model stretches its rotary frequencies: ``RopeScaling``, read from config.json or GGUF metadata and checked.

Knows the parameters and where each format keeps them; the frequencies themselves are the decoder's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from vserve.model.fields import Fields

MAX_POSITION: Final = 1 << 27
MAX_THETA: Final = 1e15


class RopeKind(StrEnum):
    """How the rotary frequencies of a model are stretched beyond its first context length."""

    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"
    FACTORS = "factors"
    LONGROPE = "longrope"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Parameters of one kind of rotary scaling; those that a kind does not use keep their defaults.

    linear: frequencies are divided by factor.  dynamic: NTK past max_position, which is also the longest sequence
    served, so the frequencies are the plain ones.
    llama3: factor, low_freq_factor, high_freq_factor, original_max_position.  yarn (arXiv:2309.00071): factor,
    original_max_position, beta_fast, beta_slow, truncate, and attention_factor, which multiplies cos and sin (already
    worked out here).  factors: frequency i is divided by factors[i], head_dim / 2 of them (GGUF's rope_freqs.weight).
    longrope (arXiv:2402.13753): by factors where sequences may be longer than original_max_position, else by
    short_factors; attention_factor multiplies cos and sin in both cases.
    """

    kind: RopeKind
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()


def read_json(
    fields: Fields, position: int, rotary_dim: int, default_theta: float = 10000.0
) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from rope_parameters (transformers 5) or rope_theta and rope_scaling (before).

    fields is the whole config.json, position its max_position_embeddings; rotary_dim: numbers of a head that rotate.
    StartupError for a kind or a number that is not supported.
    """
    section = fields.section("rope_parameters") or fields.section("rope_scaling")
    theta = fields.number("rope_theta", 1.0, MAX_THETA, default_theta)
    if section is None:
        return theta, None
    theta = section.number("rope_theta", 1.0, MAX_THETA, theta)
    key = "rope_type" if "rope_type" in section else "type"
    name = section.text(key, "default")
    if name == "default":
        return theta, None
    # The length before stretching stands beside max_position_embeddings in some files and in the section in others.
    original = section.integer("original_max_position_embeddings", 1, MAX_POSITION, position)
    original = fields.integer("original_max_position_embeddings", 1, MAX_POSITION, original)
    if name in _LONGROPE_NAMES:
        return theta, _longrope(section, original, position, rotary_dim)
    reader = _JSON_SCALINGS.get(name or "")
    if reader is None:
        raise section.fail(key, f"not supported; supported are default, {', '.join(_JSON_SCALINGS)}, longrope")
    return theta, reader(section, original)


_LONGROPE_NAMES: Final = ("longrope", "su")
"""What it is called, and what it was called at first."""


def _longrope(section: Fields, original: int, position: int, rotary_dim: int) -> RopeScaling:
    factors = {}
    for key in ("long_factor", "short_factor"):
        factors[key] = section.numbers(key, 1e-6, 1e6)
        if len(factors[key]) != rotary_dim // 2:
            raise section.fail(key, f"must be {rotary_dim // 2} factors")
    stretch = section.number("factor", 1e-3, 1e6, position / original)
    attention = 1.0 if stretch <= 1.0 else math.sqrt(1.0 + math.log(stretch) / math.log(original))
    return RopeScaling(
        RopeKind.LONGROPE,
        stretch,
        original,
        attention_factor=section.number("attention_factor", 1e-6, 1e6, attention),
        factors=factors["long_factor"],
        short_factors=factors["short_factor"],
    )


def _linear(section: Fields, original: int) -> RopeScaling:
    return RopeScaling(RopeKind.LINEAR, _factor(section), original)


def _dynamic(section: Fields, original: int) -> RopeScaling:
    return RopeScaling(RopeKind.DYNAMIC, _factor(section), original)


def _llama3(section: Fields, original: int) -> RopeScaling:
    low = section.number("low_freq_factor", 1e-6, 1e6)
    high = section.number("high_freq_factor", 1e-6, 1e6)
    if high <= low:
        raise section.fail("high_freq_factor", f"must be above low_freq_factor {low:g}")
    return RopeScaling(RopeKind.LLAMA3, _factor(section), original, low_freq_factor=low, high_freq_factor=high)


def _yarn(section: Fields, original: int) -> RopeScaling:
    factor = _factor(section)
    attention = section.optional_number("attention_factor", 1e-6, 1e6)
    if attention is None:
        attention = _yarn_magnitude(factor, 1.0)
        numerator = section.number("mscale", 0.0, 1e6, 0.0)
        denominator = section.number("mscale_all_dim", 0.0, 1e6, 0.0)
        if numerator and denominator:
            attention = _yarn_magnitude(factor, numerator) / _yarn_magnitude(factor, denominator)
    return RopeScaling(
        RopeKind.YARN,
        factor,
        original,
        beta_fast=section.number("beta_fast", 1e-6, 1e6, 32.0),
        beta_slow=section.number("beta_slow", 1e-6, 1e6, 1.0),
        attention_factor=attention,
        truncate=section.flag("truncate", True),
    )


_JSON_SCALINGS: Final[dict[str, Callable[[Fields, int], RopeScaling]]] = {
    RopeKind.LINEAR: _linear,
    RopeKind.DYNAMIC: _dynamic,
    RopeKind.LLAMA3: _llama3,
    RopeKind.YARN: _yarn,
}


def _factor(section: Fields) -> float:
    return section.number("factor", 1.0, 1e6)


def _yarn_magnitude(factor: float, weight: float) -> float:
    """How much longer the context, so much sharper the attention: arXiv:2309.00071, section 3.4."""
    return 0.1 * weight * math.log(factor) + 1.0


def read_gguf(
    fields: Fields, architecture: str, position: int, head_dim: int, factors: tuple[float, ...]
) -> RopeScaling | None:
    """Scaling from GGUF metadata; factors is the file's rope_freqs.weight, () without one.  StartupError as above."""
    prefix, scale_linear = f"{architecture}.rope.scaling.", f"{architecture}.rope.scale_linear"
    name = fields.text(prefix + "type", "linear" if scale_linear in fields else "none")
    if factors:
        if len(factors) != head_dim // 2 or not all(1e-6 <= factor <= 1e6 for factor in factors):
            raise fields.fail("rope_freqs.weight", f"must hold {head_dim // 2} positive factors")
        if name != "none":
            raise fields.fail(prefix + "type", "not supported beside rope_freqs.weight")
        return RopeScaling(RopeKind.FACTORS, factors=factors)
    if name == "none":
        return None
    factor = fields.number(prefix + "factor", 1.0, 1e6, fields.number(scale_linear, 1.0, 1e6, 1.0))
    original = fields.integer(prefix + "original_context_length", 1, MAX_POSITION, position)
    if name == RopeKind.LINEAR:
        return RopeScaling(RopeKind.LINEAR, factor, original)
    if name == RopeKind.YARN:
        attention = fields.number(prefix + "attn_factor", 1e-6, 1e6, 1.0)
        return RopeScaling(
            RopeKind.YARN,
            factor,
            original,
            beta_fast=fields.number(prefix + "yarn_beta_fast", 1e-6, 1e6, 32.0),
            beta_slow=fields.number(prefix + "yarn_beta_slow", 1e-6, 1e6, 1.0),
            attention_factor=attention * _yarn_magnitude(factor, 1.0),
        )
    raise fields.fail(prefix + "type", "not supported; supported are none, linear, yarn")
