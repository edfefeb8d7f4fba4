"""GPT-2: learned positions, LayerNorm, a plain MLP, and weights that lie the other way round."""

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
from vserve.model.families.common import activation, gguf_vocab_size, read_head_dim, saved_dtype
from vserve.model.families.family import Family, GgufFamily, GgufShapes, Names
from vserve.model.fields import Fields

_MAX_POSITION: Final = 1 << 20


def _read(fields: Fields) -> ModelConfig:
    for key, wanted in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if fields.flag(key, wanted) is not wanted:
            raise fields.fail(key, f"only {str(wanted).lower()} is supported")
    heads = fields.integer("n_head", 1, MAX_HEADS, 12)
    hidden = fields.integer("n_embd", 1, MAX_WIDTH, 768)
    vocab = fields.integer("vocab_size", 1, MAX_VOCAB, 50257)
    bos = fields.token_ids("bos_token_id", vocab)
    return ModelConfig(
        architecture=Architecture.GPT2,
        num_layers=fields.integer("n_layer", 1, MAX_LAYERS, 12),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=read_head_dim(fields, "head_dim", hidden, heads),
        intermediate_size=fields.integer("n_inner", 1, MAX_INTERMEDIATE, 4 * hidden),
        vocab_size=vocab,
        max_position=fields.integer("n_positions", 1, _MAX_POSITION, 1024),
        norm_eps=fields.number("layer_norm_epsilon", 1e-12, 1.0, 1e-5),
        rope_theta=1.0,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        dtype=saved_dtype(fields),
        bos_id=bos[0] if bos else None,
        eos_ids=fields.token_ids("eos_token_id", vocab),
        norm=NormKind.LAYER,
        activation=activation(
            fields, "activation_function", Activation.GELU_TANH, Activation.GELU, Activation.RELU, Activation.SILU
        ),
        gated=False,
        position_offset=0,
        transposed=True,
    )


def _read_gguf(fields: Fields, shapes: GgufShapes, factors: tuple[float, ...]) -> ModelConfig:
    vocab = gguf_vocab_size(fields, shapes)
    heads = fields.integer("gpt2.attention.head_count", 1, MAX_HEADS)
    hidden = fields.integer("gpt2.embedding_length", 1, MAX_WIDTH)
    bos = fields.token_ids("tokenizer.ggml.bos_token_id", vocab)
    return ModelConfig(
        architecture=Architecture.GPT2,
        num_layers=fields.integer("gpt2.block_count", 1, MAX_LAYERS),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=read_head_dim(fields, "gpt2.attention.key_length", hidden, heads),
        intermediate_size=fields.integer("gpt2.feed_forward_length", 1, MAX_INTERMEDIATE),
        vocab_size=vocab,
        max_position=fields.integer("gpt2.context_length", 1, _MAX_POSITION),
        norm_eps=fields.number("gpt2.attention.layer_norm_epsilon", 1e-12, 1.0),
        rope_theta=1.0,
        tie_embeddings="output.weight" not in shapes,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        bos_id=bos[0] if bos else None,
        eos_ids=fields.token_ids("tokenizer.ggml.eos_token_id", vocab),
        norm=NormKind.LAYER,
        activation=Activation.GELU_TANH,
        gated=False,
        position_offset=0,
    )


_GGUF_TOP: Final = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", "output": "lm_head"}
_GGUF_BLOCK: Final = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}

FAMILY = Family(
    Architecture.GPT2,
    _read,
    Names(
        base="transformer.",
        embedding="wte",
        positions="wpe",
        layer="h.{}.",
        attention_norm="ln_1",
        qkv=("attn.c_attn",),
        output="attn.c_proj",
        mlp_norm="ln_2",
        gate_up=("mlp.c_fc",),
        down="mlp.c_proj",
        final_norm="ln_f",
        harmless=(".attn.bias", ".attn.masked_bias"),
    ),
    GgufFamily("gpt2", _read_gguf, _GGUF_BLOCK, _GGUF_TOP),
)
