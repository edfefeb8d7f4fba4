"""OPT: learned positions, LayerNorm before (or, in one size, after) the layers, ReLU, and biases everywhere."""

from __future__ import annotations

from typing import Final

from vserve.model.config import (
    MAX_HEADS,
    MAX_INTERMEDIATE,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    Activation,
    Architecture,
    ModelConfig,
    NormKind,
)
from vserve.model.families.common import activation, read_head_dim, saved_dtype
from vserve.model.families.family import Family, Names
from vserve.model.fields import Fields

_OFFSET: Final = 2
"""The first two rows of the table of positions are for padding, which there is none of here."""
_MAX_POSITION: Final = 1 << 20


def _read(fields: Fields) -> ModelConfig:
    if not fields.flag("layer_norm_elementwise_affine", True):
        raise fields.fail("layer_norm_elementwise_affine", "only true is supported")
    heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
    vocab = fields.integer("vocab_size", 1, MAX_VOCAB)
    width = fields.integer("word_embed_proj_dim", 1, MAX_WIDTH, hidden)
    biased = fields.flag("enable_bias", True)
    before = fields.flag("do_layer_norm_before", True)
    bos = fields.token_ids("bos_token_id", vocab)
    return ModelConfig(
        architecture=Architecture.OPT,
        num_layers=fields.integer("num_hidden_layers", 1, MAX_LAYERS),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=read_head_dim(fields, "head_dim", hidden, heads),
        intermediate_size=fields.integer("ffn_dim", 1, MAX_INTERMEDIATE),
        vocab_size=vocab,
        max_position=fields.integer("max_position_embeddings", 1, _MAX_POSITION, 2048),
        norm_eps=1e-5,
        rope_theta=1.0,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        attention_bias=biased,
        output_bias=biased,
        mlp_bias=biased,
        dtype=saved_dtype(fields),
        bos_id=bos[0] if bos else None,
        eos_ids=fields.token_ids("eos_token_id", vocab),
        norm=NormKind.LAYER,
        activation=activation(fields, "activation_function", Activation.RELU, Activation.GELU, Activation.GELU_TANH),
        gated=False,
        post_norm=not before,
        final_norm=before and not fields.flag("_remove_final_layer_norm", False),
        position_offset=_OFFSET,
        embedding_size=None if width == hidden else width,
    )


FAMILY = Family(
    Architecture.OPT,
    _read,
    Names(
        base="model.",
        embedding="decoder.embed_tokens",
        positions="decoder.embed_positions",
        project_in="decoder.project_in",
        project_out="decoder.project_out",
        layer="decoder.layers.{}.",
        attention_norm="self_attn_layer_norm",
        output="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        gate_up=("fc1",),
        down="fc2",
        final_norm="decoder.final_layer_norm",
    ),
)
