"""The scales that a checkpoint brings for keys and values in an fp8 cache: their names, and what is read of them.

One number a layer for keys and one for values, with which number / scale fits e4m3; each tool has its own name for
them.  Knows no cache, and needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from vserve.errors import StartupError
from vserve.model.config import ModelConfig
from vserve.model.families import Names

if TYPE_CHECKING:
    from vserve.model.weights import Weights

_OF_KEYS: Final = ("self_attn.k_scale", "self_attn.k_proj.k_scale", "self_attn.k_proj.output_scale")
_OF_VALUES: Final = ("self_attn.v_scale", "self_attn.v_proj.v_scale", "self_attn.v_proj.output_scale")
_OF_BOTH: Final = ("self_attn.kv_scale",)
LEAST: Final = 2.0**-100
MOST: Final = 2.0**100


def names_in(weights: Weights, config: ModelConfig, names: Names) -> Iterator[str]:
    """The tensors of weights that are such scales."""
    for layer in range(config.num_layers):
        prefix = names.base + names.layer.format(layer)
        yield from (prefix + ending for ending in _OF_KEYS + _OF_VALUES + _OF_BOTH if prefix + ending in weights)


def read(weights: Weights, prefix: str) -> tuple[float, float] | None:
    """(that of keys, that of values) of the layer whose names begin with prefix; None where it has none.

    A layer with one of them uses it for both.  StartupError for one that is no positive number.
    """
    keys, values = (
        next(
            (_number(weights, prefix + ending) for ending in (*endings, *_OF_BOTH) if prefix + ending in weights), None
        )
        for endings in (_OF_KEYS, _OF_VALUES)
    )
    if keys is None:
        return None if values is None else (values, values)
    return keys, keys if values is None else values


def _number(weights: Weights, name: str) -> float:
    tensor = weights.get(name)
    if math.prod(tensor.shape) != 1:
        raise StartupError(f"tensor {name} has shape {list(tensor.shape)}, must be one number")
    number = float(tensor.dense())
    if not LEAST <= number <= MOST:  # NaN is not
        raise StartupError(f"tensor {name} is {number:g}, must be a positive number: it scales keys or values")
    return number
