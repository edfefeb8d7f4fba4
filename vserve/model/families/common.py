"""What the families' readers share: the base of a rotary decoder, heads, windows, activations, GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vserve.errors import StartupError
from vserve.model.config import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_INTERMEDIATE,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    Activation,
    Architecture,
    ModelConfig,
)
from vserve.model.families.family import GgufShapes
from vserve.model.fields import Fields
from vserve.model.rope_scaling import MAX_POSITION, MAX_THETA, RopeKind, read_gguf, read_json

_ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "relu": Activation.RELU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}


@dataclass(frozen=True, slots=True)
class Silent:
    """What an architecture assumes where its config.json is silent; num_kv_heads None: as many as heads."""

    max_position: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    theta: float = 10000.0
    eps: float = 1e-6
    tied: bool = False
    partial_rotary: bool = False


def rotary_decoder(fields: Fields, architecture: Architecture, silent: Silent) -> ModelConfig:
    """The configuration of a decoder that is Llama's but for what the family's reader then changes."""
    heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
    vocab = fields.integer("vocab_size", 1, MAX_VOCAB)
    position = fields.integer("max_position_embeddings", 1, MAX_POSITION, silent.max_position)
    head_dim = read_head_dim(fields, "head_dim", hidden, heads, silent.head_dim)
    rotary_dim = partial_rotary(fields, head_dim)
    if rotary_dim != head_dim and not silent.partial_rotary:
        raise fields.fail("partial_rotary_factor", "only 1.0 is supported")
    theta, scaling = read_json(fields, position, rotary_dim, silent.theta)
    if scaling is not None and scaling.kind is RopeKind.YARN:
        # Checkpoints are published with either the first length or the stretched one here.
        position = min(MAX_POSITION, max(position, int(scaling.original_max_position * scaling.factor)))
    attention_bias = fields.flag("attention_bias", False)
    bos = fields.token_ids("bos_token_id", vocab)
    return ModelConfig(
        architecture=architecture,
        num_layers=fields.integer("num_hidden_layers", 1, MAX_LAYERS),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads(fields, "num_key_value_heads", heads, silent.num_kv_heads or heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", 1, MAX_INTERMEDIATE),
        vocab_size=vocab,
        max_position=position,
        norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0, silent.eps),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=fields.flag("tie_word_embeddings", silent.tied),
        attention_bias=attention_bias,
        output_bias=attention_bias,
        dtype=saved_dtype(fields),
        bos_id=bos[0] if bos else None,
        eos_ids=fields.token_ids("eos_token_id", vocab),
        activation=activation(fields, "hidden_act", Activation.SILU),
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
    )


def saved_dtype(fields: Fields) -> str | None:
    return fields.text("dtype", fields.text("torch_dtype"))


def activation(fields: Fields, key: str, *allowed: Activation) -> Activation:
    """The activation under key; absent: the first of allowed, which are those that the family may have."""
    name = fields.text(key)
    if name is None:
        return allowed[0]
    found = _ACTIVATIONS.get(name)
    if found is None or found not in allowed:
        known = [name for name, kind in _ACTIVATIONS.items() if kind in allowed]
        raise fields.fail(key, f"only {', '.join(known)} {'is' if len(known) == 1 else 'are'} supported")
    return found


def partial_rotary(fields: Fields, head_dim: int) -> int:
    """Numbers of a head that are rotated."""
    section = fields.section("rope_parameters") or fields.section("rope_scaling")
    part = fields.number("partial_rotary_factor", 0.0, 1.0, 1.0)
    if section is not None:
        part = section.number("partial_rotary_factor", 0.0, 1.0, part)
    size = int(head_dim * part)
    if size < 2 or size % 2:
        raise fields.fail("partial_rotary_factor", f"must leave an even part of the head size {head_dim}")
    return size


def read_head_dim(fields: Fields, key: str, hidden: int, heads: int, silent: int | None = None) -> int:
    if key not in fields and silent is None and hidden % heads:
        raise fields.fail(key, f"and hidden size {hidden} is not divisible by {heads} heads")
    size = fields.integer(key, 2, MAX_HEAD_DIM, silent or hidden // heads)
    if size % 2 or not 2 <= size <= MAX_HEAD_DIM:
        raise fields.fail(key, f"head size {size} must be even, from 2 to {MAX_HEAD_DIM}")
    return size


def kv_heads(fields: Fields, key: str, heads: int, default: int) -> int:
    count = fields.integer(key, 1, heads, default)
    if heads % count:
        raise fields.fail(key, f"{heads} heads are not divisible by {count} key-value heads")
    return count


def window_of_all(fields: Fields, key: str, layers: int, default: int | None) -> tuple[int | None, ...]:
    """ModelConfig.windows where every layer has the same window."""
    # An explicit null means no window, where an absent key means the family's own.
    window = None if fields.has_null(key) else fields.integer(key, 0, MAX_POSITION, default or 0)
    return (window,) * layers if window else ()


def windows_by_layer(fields: Fields, layers: int, window: int | None, full: frozenset[int]) -> tuple[int | None, ...]:
    """ModelConfig.windows from "layer_types"; absent: the layers `full` see everything, the others the window."""
    kinds = fields.texts("layer_types", MAX_LAYERS)
    if kinds is None:
        kinds = tuple("full_attention" if layer in full else "sliding_attention" for layer in range(layers))
    if len(kinds) != layers:
        raise fields.fail("layer_types", f"must name one type for each of {layers} layers")
    if any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise fields.fail("layer_types", "only full_attention and sliding_attention are supported")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def qwen_windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """Qwen's: no window unless use_sliding_window, and then from layer max_window_layers up."""
    if not fields.flag("use_sliding_window", False):
        return ()
    window = None if fields.has_null("sliding_window") else fields.integer("sliding_window", 1, MAX_POSITION, 4096)
    first = fields.integer("max_window_layers", 0, 1 << 20, 28)
    return windows_by_layer(fields, layers, window, frozenset(range(min(first, layers))))


# ---- GGUF ---------------------------------------------------------------------------------------------------------

GGUF_TOP: Final[dict[str, str]] = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
}
GGUF_BLOCK: Final[dict[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_decoder(
    fields: Fields,
    shapes: GgufShapes,
    architecture: Architecture,
    name: str,
    factors: tuple[float, ...] = (),
    partial_rotary: bool = False,
) -> ModelConfig:
    """The configuration of a rotary decoder whose keys begin with name; biases are told by which tensors there are."""
    vocab = gguf_vocab_size(fields, shapes)
    heads = fields.integer(f"{name}.attention.head_count", 1, MAX_HEADS)
    hidden = fields.integer(f"{name}.embedding_length", 1, MAX_WIDTH)
    position = fields.integer(f"{name}.context_length", 1, MAX_POSITION)
    head_dim = read_head_dim(fields, f"{name}.attention.key_length", hidden, heads)
    rotary_dim = fields.integer(f"{name}.rope.dimension_count", 2, MAX_HEAD_DIM, head_dim)
    unequal = [f"{name}.attention.value_length"]
    if not partial_rotary:
        unequal.append(f"{name}.rope.dimension_count")
    for key in unequal:
        if fields.integer(key, 1, MAX_HEAD_DIM, head_dim) != head_dim:
            raise fields.fail(key, f"must equal the head size {head_dim}: other models are not supported")
    bos = fields.token_ids("tokenizer.ggml.bos_token_id", vocab)
    return ModelConfig(
        architecture=architecture,
        num_layers=fields.integer(f"{name}.block_count", 1, MAX_LAYERS),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads(fields, f"{name}.attention.head_count_kv", heads, heads),
        head_dim=head_dim,
        intermediate_size=fields.integer(f"{name}.feed_forward_length", 1, MAX_INTERMEDIATE),
        vocab_size=vocab,
        max_position=position,
        norm_eps=fields.number(f"{name}.attention.layer_norm_rms_epsilon", 1e-12, 1.0),
        rope_theta=fields.number(f"{name}.rope.freq_base", 1.0, MAX_THETA, 10000.0),
        rope_scaling=read_gguf(fields, name, position, head_dim, factors),
        tie_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        bos_id=bos[0] if bos else None,
        eos_ids=fields.token_ids("tokenizer.ggml.eos_token_id", vocab),
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
    )


def gguf_vocab_size(fields: Fields, shapes: GgufShapes) -> int:
    shape = shapes.get("token_embd.weight")
    if shape is None or len(shape) != 2 or not 1 <= shape[0] <= MAX_VOCAB:
        raise StartupError(
            f"{fields.where}: tensor token_embd.weight is missing or is no matrix of at most {MAX_VOCAB} rows"
        )
    tokens = fields.length("tokenizer.ggml.tokens")
    if tokens > shape[0]:
        raise StartupError(f"{fields.where}: the tokenizer has {tokens} tokens, the embedding only {shape[0]} rows")
    return shape[0]
