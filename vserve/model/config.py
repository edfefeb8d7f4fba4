"""What a decoder must know of a model before it reads a tensor: ``ModelConfig``, from config.json or GGUF metadata.

Owns the list of supported architectures and every check of their numbers; both sources are untrusted.  Knows nothing
of files, tensors or devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from vserve.errors import StartupError, shorten
from vserve.model.fields import Fields
from vserve.model.rope_scaling import MAX_POSITION, MAX_THETA, RopeKind, RopeScaling, read_gguf, read_json

__all__ = ["MAX_POSITION", "Architecture", "ModelConfig", "RopeKind", "RopeScaling"]

MAX_LAYERS: Final = 1024
MAX_WIDTH: Final = 1 << 18
MAX_HEADS: Final = 1 << 12
MAX_HEAD_DIM: Final = 1 << 12
MAX_INTERMEDIATE: Final = 1 << 21
MAX_VOCAB: Final = 1 << 23


class Architecture(StrEnum):
    """A supported decoder, by the name config.json gives it under "architectures"."""

    LLAMA = "LlamaForCausalLM"
    MISTRAL = "MistralForCausalLM"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape and the constants of a decoder; every number is checked and the heads divide evenly.

    max_position: the longest sequence in tokens.  rope_scaling: None for plain rotary embedding.  dtype: the type the
    checkpoint was saved in ("bfloat16"), None when the file does not say.  bos_id, eos_ids: as the model's own
    configuration names them; generation_config.json may name others.
    """

    architecture: Architecture
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    dtype: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, object], where: str = "config.json") -> ModelConfig:
        """From a Hugging Face configuration; where names the file in errors.

        StartupError on an unsupported architecture or feature, or a number that is missing or out of range.
        """
        architecture = _json_architecture(values, where)
        family = _FAMILIES[architecture]
        fields = Fields(values, where)
        _refuse_unsupported(fields)
        heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
        hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
        vocab = fields.integer("vocab_size", 1, MAX_VOCAB)
        position = fields.integer("max_position_embeddings", 1, MAX_POSITION, family.max_position)
        head_dim = _head_dim(fields, "head_dim", hidden, heads)
        theta, scaling = read_json(fields, position)
        if scaling is not None and scaling.kind is RopeKind.YARN:
            # Checkpoints are published with either the first length or the stretched one here.
            position = min(MAX_POSITION, max(position, int(scaling.original_max_position * scaling.factor)))
        if family.sliding_window is not None:
            position = _windowed(fields, "sliding_window", position, family.sliding_window)
        attention_bias = fields.flag("attention_bias", False)
        bos = fields.token_ids("bos_token_id", vocab)
        return cls(
            architecture=architecture,
            num_layers=fields.integer("num_hidden_layers", 1, MAX_LAYERS),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=_kv_heads(fields, "num_key_value_heads", heads, family.num_kv_heads or heads),
            head_dim=head_dim,
            intermediate_size=fields.integer("intermediate_size", 1, MAX_INTERMEDIATE),
            vocab_size=vocab,
            max_position=position,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0, 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            attention_bias=attention_bias,
            output_bias=attention_bias,
            mlp_bias=fields.flag("mlp_bias", False),
            dtype=fields.text("dtype", fields.text("torch_dtype")),
            bos_id=bos[0] if bos else None,
            eos_ids=fields.token_ids("eos_token_id", vocab),
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, object],
        shapes: Mapping[str, tuple[int, ...]],
        rope_factors: tuple[float, ...] = (),
        where: str = "GGUF file",
    ) -> ModelConfig:
        """From the metadata of a GGUF file, the shapes of its tensors by GGUF name, and its rope_freqs.weight if any.

        Biases and tied embeddings are told by which tensors there are.  StartupError as ``from_json``.
        """
        _gguf_architecture(metadata, where)
        fields = Fields(metadata, where)
        vocab = _gguf_vocab_size(fields, shapes, where)
        heads = fields.integer("llama.attention.head_count", 1, MAX_HEADS)
        hidden = fields.integer("llama.embedding_length", 1, MAX_WIDTH)
        position = fields.integer("llama.context_length", 1, MAX_POSITION)
        head_dim = _head_dim(fields, "llama.attention.key_length", hidden, heads)
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if fields.integer(key, 1, MAX_HEAD_DIM, head_dim) != head_dim:
                raise fields.fail(key, f"must equal the head size {head_dim}: other models are not supported")
        bos = fields.token_ids("tokenizer.ggml.bos_token_id", vocab)
        return cls(
            architecture=Architecture.LLAMA,
            num_layers=fields.integer("llama.block_count", 1, MAX_LAYERS),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=_kv_heads(fields, "llama.attention.head_count_kv", heads, heads),
            head_dim=head_dim,
            intermediate_size=fields.integer("llama.feed_forward_length", 1, MAX_INTERMEDIATE),
            vocab_size=vocab,
            max_position=_windowed(fields, "llama.attention.sliding_window", position, 0),
            rms_norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon", 1e-12, 1.0),
            rope_theta=fields.number("llama.rope.freq_base", 1.0, MAX_THETA, 10000.0),
            rope_scaling=read_gguf(fields, position, head_dim, rope_factors),
            tie_embeddings="output.weight" not in shapes,
            attention_bias="blk.0.attn_q.bias" in shapes,
            output_bias="blk.0.attn_output.bias" in shapes,
            mlp_bias="blk.0.ffn_up.bias" in shapes,
            bos_id=bos[0] if bos else None,
            eos_ids=fields.token_ids("tokenizer.ggml.eos_token_id", vocab),
        )


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture assumes where its config.json is silent; num_kv_heads None: as many as heads."""

    max_position: int
    num_kv_heads: int | None = None
    sliding_window: int | None = None


_FAMILIES: Final[dict[Architecture, _Family]] = {
    Architecture.LLAMA: _Family(max_position=2048),
    Architecture.MISTRAL: _Family(max_position=131072, num_kv_heads=8, sliding_window=4096),
}

_GGUF_ARCHITECTURES: Final = ("llama",)


def _json_architecture(values: Mapping[str, object], where: str) -> Architecture:
    supported = ", ".join(Architecture)
    names = values.get("architectures")
    if not isinstance(names, list) or not names:
        raise StartupError(f'{where}: "architectures" is missing; supported are {supported}')
    for name in names:
        if isinstance(name, str) and name in _BY_NAME:
            return _BY_NAME[name]
    raise StartupError(f"{where}: architecture {shorten(names[0])} is not supported; supported are {supported}")


_BY_NAME: Final[dict[str, Architecture]] = {member.value: member for member in Architecture}


def _gguf_architecture(metadata: Mapping[str, object], where: str) -> None:
    name = metadata.get("general.architecture")
    if name not in _GGUF_ARCHITECTURES:
        supported = ", ".join(_GGUF_ARCHITECTURES)
        raise StartupError(f"{where}: architecture {shorten(name)} is not supported; supported are {supported}")
    experts = metadata.get("llama.expert_count")
    if experts not in (None, 0):
        raise StartupError(f"{where}: mixture-of-experts models ({shorten(experts)} experts) are not supported")


def _refuse_unsupported(fields: Fields) -> None:
    """What a config.json may ask for that would change the numbers, were it passed over in silence."""
    if fields.text("hidden_act", "silu") != "silu":
        raise fields.fail("hidden_act", "only silu is supported")
    if "quantization_config" in fields:
        raise fields.fail("quantization_config", "not supported: use unquantised safetensors or a GGUF file")
    if fields.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
        raise fields.fail("partial_rotary_factor", "only 1.0 is supported")


def _head_dim(fields: Fields, key: str, hidden: int, heads: int) -> int:
    if key not in fields and hidden % heads:
        raise fields.fail(key, f"and hidden size {hidden} is not divisible by {heads} heads")
    size = fields.integer(key, 2, MAX_HEAD_DIM, hidden // heads)
    if size % 2 or not 2 <= size <= MAX_HEAD_DIM:
        raise fields.fail(key, f"head size {size} must be even, from 2 to {MAX_HEAD_DIM}")
    return size


def _kv_heads(fields: Fields, key: str, heads: int, default: int) -> int:
    count = fields.integer(key, 1, heads, default)
    if heads % count:
        raise fields.fail(key, f"{heads} heads are not divisible by {count} key-value heads")
    return count


def _windowed(fields: Fields, key: str, position: int, default: int) -> int:
    """The longest sequence served: inside its sliding window, a model's attention is plain causal attention."""
    # An explicit null means no window, where an absent key means the family's own.
    window = 0 if fields.has_null(key) else fields.integer(key, 0, MAX_POSITION, default)
    return min(position, window) if window else position


def _gguf_vocab_size(fields: Fields, shapes: Mapping[str, tuple[int, ...]], where: str) -> int:
    shape = shapes.get("token_embd.weight")
    if shape is None or len(shape) != 2 or not 1 <= shape[0] <= MAX_VOCAB:
        raise StartupError(f"{where}: tensor token_embd.weight is missing or is no matrix of at most {MAX_VOCAB} rows")
    tokens = fields.length("tokenizer.ggml.tokens")
    if tokens > shape[0]:
        raise StartupError(f"{where}: the tokenizer has {tokens} tokens, the embedding only {shape[0]} rows")
    return shape[0]
