"""Which tensors a model of some configuration has, under which names and in which shapes; and whether a file has them.

Knows no file format, reads no tensor and needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from vserve.errors import StartupError, shorten
from vserve.model.config import ModelConfig

if TYPE_CHECKING:
    from vserve.model.weights import Weights

EMBEDDING: Final = "model.embed_tokens.weight"
NORM: Final = "model.norm.weight"
HEAD: Final = "lm_head.weight"

_HARMLESS_SUFFIX: Final = ".rotary_emb.inv_freq"
"""Old checkpoints hold the rotary frequencies, which are worked out from the configuration."""


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor that a model of config must have."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = {
        "self_attn.q_proj": (queries, width, config.attention_bias),
        "self_attn.k_proj": (keys, width, config.attention_bias),
        "self_attn.v_proj": (keys, width, config.attention_bias),
        "self_attn.o_proj": (width, queries, config.output_bias),
        "mlp.gate_proj": (inner, width, config.mlp_bias),
        "mlp.up_proj": (inner, width, config.mlp_bias),
        "mlp.down_proj": (width, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, width), NORM: (width,)}
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, width)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (width,)
        shapes[prefix + "post_attention_layernorm.weight"] = (width,)
        for name, (outputs, inputs, biased) in matrices.items():
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            if biased:
                shapes[f"{prefix}{name}.bias"] = (outputs,)
    return shapes


def check(weights: Weights, config: ModelConfig) -> None:
    """StartupError unless weights holds exactly the tensors of config, each in its shape."""
    shapes = expected_shapes(config)
    model = f"a {config.num_layers}-layer {config.architecture}"
    for name, wanted in shapes.items():
        if name not in weights:
            raise StartupError(f"tensor {name} is missing, which {model} needs with shape {_text(wanted)}")
        found = weights.get(name).shape
        if found != wanted:
            raise StartupError(
                f"tensor {name} has shape {_text(found)}, but {model} of this size needs {_text(wanted)}"
            )
    for name in weights.names():
        # A tied head may be stored too: it is the embedding again, and transformers reads past it as well.
        if name not in shapes and name != HEAD and not name.endswith(_HARMLESS_SUFFIX):
            raise StartupError(f"tensor {shorten(name)} is not one of {model}: the file holds another model")


def _text(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def linear_numbers(config: ModelConfig) -> int:
    """Numbers in all linear layers; a head that is the embedding counts, as it is multiplied with too."""
    matrices = sum(shape[0] * shape[1] for name, shape in expected_shapes(config).items() if len(shape) == 2)
    return matrices if config.tie_embeddings else matrices - config.vocab_size * config.hidden_size
